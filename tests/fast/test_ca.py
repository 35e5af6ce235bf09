"Concept Ablation: both terms, the stop-gradient, anchors of the right captions."
import pytest

from resalign.baselines.ca import CAConfig, ca
from resalign.baselines.parts import layers
from tests.fast.toys import (T, UNSAFE, agree, answers, check_settings, draw_sample, drawn_pictures, given, goals,
                             ledger, noisy, run,
                             said, square, stream)
from each import each


def test_settings():
    check_settings(CAConfig, dict(params='kv', steps=2, lr=1e-3, batch=8, prior_weight=1., pictures=8,
                                  sampling_steps=4, guidance=5., seed=0),
                   [('steps', 0, 1), ('prior_weight', -1e-9, 0.)])


def formula(net, kind, s, unsafe, weight):
    own, wanted = answers(net, noisy(s), s.t, unsafe), answers(net, noisy(s), s.t, s.text)
    return square(own - wanted.detach()) + weight*square(wanted - goals(kind, s))


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
