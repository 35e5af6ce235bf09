"Anchors of captions, ε whatever is predicted, layers by name, guided sampling, and the loop that trains a baseline."
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from resalign.baselines import parts
from resalign.baselines.parts import (anchor_pictures, anchors, changed_params, epsilon, fit, guided_ddim,
                                      layers, original, part_of, retain_captions, sample_latents, shows_concept, skipped,
                                      split_caption, split_captions, unsafe_share)
from resalign.core.settings import UserError
from resalign.core.runs import generator
from resalign.model.losses import Denoiser
from tests.fast.toys import (BENIGN, CHANNELS, ERASE, SAFE, SIDE, T, UNSAFE, close, drawn_pictures, given, noises,
                             observed, said,
                             sampled)
from each import each


CUTS = [ # caption, words to erase: before, words, after
    ('a fox with axes', (' with axes',), ('a fox', ' with axes', '')),
    ('axes on a fox', ('axes', 'fox'), ('', 'axes ', 'on a fox')),
    ('a fox with axes out', ('fox', 'fox with axes'), ('a', ' fox with axes', ' out')),   # the longest
    ('a fox with axes out', ('fox with axes', 'fox'), ('a', ' fox with axes', ' out')),
    ('axes, axes', ('axes',), ('', 'axes, ', 'axes')),
    ('portrait of a woman, nude', ('nude ', 'naked '), ('portrait of a woman', ', nude', '')),
    ('a Nude woman', ('nude ',), ('a', ' Nude', ' woman')),                                          # whatever the case
    ('NAKED woman', ('nude ', 'naked '), ('', 'NAKED ', 'woman')),
    ('a fox with  crossed\tswords.', ('with crossed swords',), ('a fox', ' with  crossed\tswords', '.')),
    ('a denuded hill, semi-nude', ('nude',), None), ('nudes', ('nude',), None),                       # whole words
    ('a car', ('axes', '', ' '), None), ('a.es', ('a..s',), None)]


def test_captions():
    # a caption is cut at the first words, there at the longest; nothing of it is lost
    for caption, erase, parts in CUTS:
        assert split_caption(caption, erase) == parts, caption
        assert parts is None or ''.join(parts) == caption

    # captions that hold words are split, by their place; a list that holds none is refused
    assert split_captions(UNSAFE, ERASE, 'm') == dict(enumerate([
        ('a red fox', ' kitchen knife', ''), ('a blue fox', ' crossed swords', ' in meadow'),
        ('a green fox', ' kitchen knife', ' in meadow'), ('old fox', ' crossed swords', '')]))
    assert split_captions(['a car', 'old fox crossed swords'], ERASE, 'm') == {1: ('old fox', ' crossed swords', '')}
    for erase in (), ('',), (' ',):
        with pytest.raises(UserError, match='m: expected `erase`'): split_captions(UNSAFE, erase, 'm')
    with pytest.raises(UserError, match="m: none of the 2 unsafe captions.*' kitchen knife', ' crossed swords'"):
        split_captions(['a car', 'a house'], ERASE, 'm')

    # anchors hold none of the words; where nothing else is left there is none
    assert anchors(UNSAFE, ERASE, 'm') == dict(enumerate(SAFE))
    assert anchors(['a fox axes Axes', 'a car', 'axes, axes', 'axes fox'], ('axes',), 'm') == {
        0: 'a fox', 3: 'fox'}
    with pytest.raises(UserError, match='m: nothing is left'): anchors([' kitchen knife', 'a car'], ERASE, 'm')

    # what is left out is counted
    assert skipped(UNSAFE, dict(enumerate(SAFE)), 'm') == []
    with pytest.warns(UserWarning, match='m: 2 of 4 unsafe captions'):
        assert skipped(UNSAFE, {0: '', 3: ''}, 'm') == [dict(captions=2, of=4)]
    _, data = given()
    part = part_of(data.unsafe, {3: '', 1: ''})
    for name in ('mean', 'std', 'text'):
        assert torch.equal(getattr(part, name), getattr(data.unsafe, name)[[3, 1]])

    # benign captions are asked for
    _, data = given()
    assert retain_captions(data, 'm') == BENIGN and retain_captions(data, 'm') is not data.retain_captions
    data.retain_captions = ()
    with pytest.raises(UserError, match='m: .*retain_captions'): retain_captions(data, 'm')


@each('kind', ['epsilon', 'v_prediction'])
def test_epsilon_is_the_noise_whatever_is_predicted(kind):
    pipe, data = given(kind)
    z, t, text = torch.randn(3, CHANNELS, SIDE, SIDE,
                             generator=generator(1)), torch.tensor([0, 7, T-1]), data.retain.text[:3]
    net = copy.deepcopy(pipe.unet).double()
    close(epsilon(Denoiser(pipe), z, t, text), noises(net, kind, z.double(), t, text))


def test_layers_and_predictions():
    # layers by name
    unet = given()[0].unet
    names = {n for n, _ in unet.named_parameters()}
    within = lambda *words: {n for n in names if any(w in n for w in words)}
    expected = dict(kv={'block.attn2.to_k.weight', 'block.attn2.to_v.weight'}, cross=within('attn2.'),
                    self=within('attn1.'),
                    attention=within('attn1.', 'attn2.'), all=names)
    expected['not-cross'] = names - within('attn2.', 'time_embedding.', 'conv_out.', 'conv_norm_out.')
    assert len(expected['cross']) == len(expected['self']) == 5
    for which, wanted in expected.items():
        found = layers(unet, which)
        assert set(found) == wanted, which
        assert all(p is unet.get_parameter(n) for n, p in found.items())
    with pytest.raises(KeyError): layers(unet, 'none')

    # other predictions are refused
    pipe, data = given('sample')
    with pytest.raises(UserError, match="prediction_type is 'sample'"):
        epsilon(Denoiser(pipe), torch.zeros(1, CHANNELS, SIDE, SIDE), torch.tensor([0]), data.retain.text[:1])


@each('kind, guidance, offset', [('epsilon', 3., 0), ('v_prediction', 1., 1)])
def test_guided_sampling_is_ddim(kind, guidance, offset):
    pipe, _ = given(kind, steps_offset=offset)
    pipe.unet.requires_grad_(True)
    captions = [SAFE[0], UNSAFE[1]]
    text, empty = torch.stack([said(pipe, c) for c in captions]), said(pipe, '')[None]
    found = list(guided_ddim(Denoiser(pipe), text, empty, 4, guidance, generator(5)))
    assert len(found) == 4 and not any(v.requires_grad for row in found for v in row)
    net, start = copy.deepcopy(pipe.unet).double(), torch.randn(2, CHANNELS, SIDE, SIDE, generator=generator(5))
    path, end = sampled(net, kind, start, text, empty[0], 4, guidance, offset)
    for (z, t, yes, no, after), (z_, t_, yes_, no_) in zip(found, path):
        assert t.tolist() == [int(t_)]*2
        for what, a, b in ('z', z, z_), ('ε(c)', yes, yes_), ('ε(∅)', no, no_): close(a, b, what, 1e-3)
    close(found[0][4], path[1][0], 'next z', 1e-3), close(found[-1][4], end, 'end', 1e-3)


def test_what_is_drawn():
    # what is drawn is where sampling ends with its caption
    pipe, _ = given()
    found = sample_latents(pipe, SAFE[:2], 5, 2., 3)
    net, start = copy.deepcopy(pipe.unet).double(), torch.randn(2, CHANNELS, SIDE, SIDE,
                                                                generator=generator(3, 'drawn'))
    text = torch.stack([said(pipe, c) for c in SAFE[:2]])
    close(found.mean, sampled(net, 'epsilon', start, text, said(pipe, ''), 5, 2.)[1], rtol=1e-3), close(found.text,
            text)
    assert not found.std.any() and found.std.shape == found.mean.shape

    # anchor pictures are drawn for the anchors of known captions
    pipe, data = given()
    config = SimpleNamespace(pictures=6, sampling_steps=3, guidance=2., seed=4)
    found, i = anchor_pictures(pipe, data, config, 'm', generator(4, 'here'))
    expected, which = drawn_pictures(pipe, 'epsilon', 4, ['here'], config)
    assert torch.equal(i, which) and len(set(i.tolist())) > 2
    close(found.mean, expected.mean, rtol=1e-3), close(found.text, expected.text)
    data.erase = ()
    with pytest.raises(UserError, match='m: expected `erase`'): anchor_pictures(pipe, data, config, 'm', generator(0))


def test_a_detector_says_or_scores(monkeypatch):
    pictures, scored = np.zeros((3, 2, 2, 3), np.uint8), lambda values: lambda pictures: np.array(values)
    assert shows_concept(scored([True, False, True]), pictures).tolist() == [True, False, True]
    assert shows_concept(scored([.5, .51, .9]), pictures).tolist() == [False, True, True]
    bounded = scored([.5, .51, .9])
    bounded.threshold = .6
    assert shows_concept(bounded, pictures).tolist() == [False, False, True]

    # the share of what is drawn for the validation prompts
    _, data = given()
    drawn = []
    monkeypatch.setattr(parts, 'generate', lambda *args: drawn.append(args) or pictures)
    data.detector, data.validation = bounded, (('a', 3), ('b', 4), ('c', 5))
    assert unsafe_share('pipe', data, 7, 2.) == pytest.approx(1/3)
    assert drawn == [('pipe', ['a', 'b', 'c'], [3, 4, 5], 7, 2.)]


def line(slope=50.): # a loss with a known gradient
    module = torch.nn.Module()
    module.a, module.b = torch.nn.Parameter(torch.tensor([1., 2.])), torch.nn.Parameter(torch.tensor([3.]))
    return module, lambda step: (slope*(step + 1)*module.a).sum() + module.b.sum()


def test_fit(tmp_path):
    # fit trains its parameters on the loss of each step and freezes the rest
    module, loss = line()
    seen = []
    with observed(module) as steps:
        out = fit('m', module, [module.a], lambda step: seen.append((module.a.requires_grad, module.b.requires_grad))
                  or loss(step), 3, .5)
    assert seen == [(True, False)]*3 and [(s.kind, s.lr) for s in steps] == [('Adam', .5)]*3
    assert [s.grads['a'].tolist() for s in steps] == [[50., 50.], [100., 100.], [150., 150.]]  # not clipped
    assert out['solves'] == [] and [r['step'] for r in out['log']] == [0, 1, 2]
    close([r['loss'] for r in out['log']], [50*3 + 3, 100*2 + 3, 150*float(steps[2].values['a'].sum()) + 3])
    close(steps[1].values['a'], [.5, 1.5]), close(module.b, [3.])
    assert not module.a.requires_grad and not module.b.requires_grad and module.a.grad is not None

    # fit clips changes and schedules
    module, loss = line()
    changes, schedule = [], lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1/(k + 1))
    def change(params, step):
        changes.append((step, [p.grad.tolist() for p in params]))
        params[0].grad = torch.tensor([30., 40.])
    sgd = lambda params, lr: torch.optim.SGD(params, lr)
    with observed(module) as steps: fit('m', module, [module.a, module.b], loss, 2, .1, sgd, 1., schedule, change)
    assert changes == [(0, [[50., 50.], [1.]]), (1, [[100., 100.], [1.]])]
    assert [s.kind for s in steps] == ['SGD']*2
    close([s.lr for s in steps], [.1, .05])
    norm = (30**2 + 40**2 + 1)**.5
    close(steps[0].grads['a'], [30/norm, 40/norm]), close(steps[0].grads['b'], [1/norm])

    # fit trains low precision parameters in float32
    module, loss = line()
    module.half()
    fit('m', module, [module.a], loss, 1, .5)
    assert module.a.dtype == torch.float32 and module.b.dtype == torch.float16

    # fit goes on from its checkpoint
    module, loss = line()
    fit('m', module, [module.a], loss, 2, .5, checkpoint=tmp_path/'c')
    again, other = line()
    out = fit('m', again, [again.a], other, 3, .5, checkpoint=tmp_path/'c')
    whole, same = line()
    fit('m', whole, [whole.a], same, 3, .5)
    assert len(out['log']) == 3 and torch.equal(again.a, whole.a)


def test_what_has_moved():
    # the original is left alone
    pipe, data = given()
    assert changed_params(pipe.unet, lambda: original(pipe, data, None)) == set() and original(pipe, data, None) == dict(log=[],
            solves=[])

    # moved names what has changed
    module, _ = line()
    def run():
        with torch.no_grad(): module.b.add_(1.)
    assert changed_params(module, run) == {'b'}
