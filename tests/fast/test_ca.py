"Concept Ablation: both terms, the stop-gradient, anchors of the right captions."
import pytest
import torch

from resalign.baselines.ca import CAConfig, ca
from resalign.baselines.parts import layers, sample_latents
from tests.fast.toys import (SAFE, T, UNSAFE, agree, check_settings, draw_sample, drawn_pictures, given, ledger, noises,
                             noisy, run,
                             said, square, stream)
from each import each


def test_settings():
    check_settings(CAConfig, dict(params='kv', steps=2, lr=1e-3, batch=8, prior_weight=1., pictures=8,
                                  sampling_steps=4, guidance=5., seed=0),
                   [('steps', 0, 1), ('prior_weight', -1e-9, 0.)])


def formula(net, kind, s, unsafe, weight):
    own, wanted = (noises(net, kind, noisy(s), s.t, text) for text in (unsafe, s.text))
    return square(own - wanted.detach()) + weight*square(wanted - s.noise.double())


@ledger('ca/prior_weight', 'ca/params')
@each('kind, params, weight',
                         [('epsilon', 'kv', 1.), ('v_prediction', 'kv', .3), ('epsilon', 'cross', 0.)])
def test_the_concept_is_answered_as_its_own_anchor_by_the_current_model(kind, params, weight):
    pipe, data = given(kind)
    config = CAConfig(params=params, prior_weight=weight, steps=3, lr=.05, batch=4, pictures=6, sampling_steps=3,
                      guidance=2., seed=2)
    pictures, which = drawn_pictures(pipe, kind, 2, ['ca anchors'], config)
    trained = set(layers(pipe.unet, params))
    steps, _, out = run(ca, pipe, data, config)
    assert len(steps) == 3 and out['solves'] == []
    for k, (step, row) in enumerate(zip(steps, out['log'])):
        s = draw_sample(pictures, 4, stream(2, 'ca', k), T)
        unsafe = [said(pipe, UNSAFE[which[j]]) for j in s.index]
        agree(step, row, lambda net: formula(net, kind, s, unsafe, weight))
        assert (step.kind, step.lr, set(step.grads)) == ('Adam', .05, trained)


def test_captions_without_the_words_are_left_out_and_counted():
    pipe, data = given()
    data.unsafe_captions[1] = 'a blue house in meadow'
    data.unsafe_captions[3] = 'Crossed  swords old fox'
    config = CAConfig(steps=1, pictures=6, sampling_steps=3, guidance=2., seed=2, batch=6)
    with pytest.warns(UserWarning, match='ca: 1 of 4 unsafe captions'): steps, _, out = run(ca, pipe, data, config)
    assert out['skipped'] == [dict(captions=1, of=4)]
    which = torch.tensor([0, 2, 3])[torch.randint(3, (6,), generator=stream(2, 'ca anchors'))]
    safe = {0: SAFE[0], 2: SAFE[2], 3: 'old fox'}
    pictures = sample_latents(given()[0], [safe[int(j)] for j in which], 3, 2., 2)
    s = draw_sample(pictures, 6, stream(2, 'ca', 0), T)
    said_unsafe = [said(pipe, data.unsafe_captions[which[j]]) for j in s.index]
    agree(steps[0], out['log'][0], lambda net: formula(net, 'epsilon', s, said_unsafe, 1.))
