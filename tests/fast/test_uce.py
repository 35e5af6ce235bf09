"UCE and RECE: closed forms against their objectives, positions of embeddings, whole runs against dense solves."
import pytest
import torch

from resalign.baselines.parts import layers
from resalign.baselines import uce as page
from resalign.baselines.uce import (RECEConfig, Rounds, UCEConfig, best_round, concept_left, distance, edit,
                                    edit_embeddings, embeddings, rece, rece_embeddings, uce)
from tests.fast.toys import BEFORE, BENIGN, UNSAFE, check_settings, close, given, ledger, said
from each import each

KEYS = 'block.attn2.to_k.weight', 'block.attn2.to_v.weight'


def test_settings():
    edges = [('ridge', 0., 1e-6), ('erase_scale', 0., 1e-6), ('preserve_scale', -1e-9, 0.)]
    defaults = dict(ridge=.5, erase_scale=1., preserve_scale=1., tokens='last')
    check_settings(UCEConfig, defaults, edges)
    check_settings(RECEConfig, defaults | dict(rounds=1, rece_ridge=.1, keep_erased=True, sampling_steps=10,
                                               guidance=5.),
                   [*edges, ('rece_ridge', 0., 1e-6), ('rounds', 0, 1), ('sampling_steps', 0, 1)])


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_closed_forms():
    # the edit minimises its objective and is what dense least squares finds
    W0, erase, values, keep = numbers(3, 4), numbers(5, 4, seed=1), numbers(5, 3, seed=2), numbers(6, 4, seed=3)
    for s_e, s_p, ridge in (1., 1., .5), (10., .3, .5), (2., 0., .1):
        found = edit(W0, erase, values, keep, UCEConfig(erase_scale=s_e, preserve_scale=s_p, ridge=ridge))
        W = found.clone().requires_grad_(True)
        objective = sum(s_e*(W @ c - v).square().sum() for c, v in zip(erase, values))
        objective = objective + sum(s_p*(W @ c - W0 @ c).square().sum() for c in keep) + ridge*(W - W0).square().sum()
        assert torch.autograd.grad(objective, W)[0].abs().max() < 1e-9
        tall = torch.cat([s_e**.5*erase, s_p**.5*keep, ridge**.5*torch.eye(4)])
        wanted = torch.cat([s_e**.5*values, s_p**.5*keep @ W0.T, ridge**.5*W0.T])
        close(found, torch.linalg.lstsq(tall, wanted).solution.T, rtol=1e-9)

    # what is still there minimises its objective
    now, then, c = [numbers(3, 4, seed=k) for k in (1, 2)], [numbers(3, 4, seed=k) for k in (3, 4)], numbers(5, 4)
    for ridge in .1, 2.:
        found = rece_embeddings(now, then, c, ridge)
        x = found.clone().requires_grad_(True)
        objective = ridge*x.square().sum() + sum((W @ a - W0 @ b).square().sum()
                                                 for W, W0 in zip(now, then) for a, b in zip(x, c))
        assert torch.autograd.grad(objective, x)[0].abs().max() < 1e-9

    # the distance is the mean square over maps
    now, then, c, guide = [numbers(3, 4, seed=k) for k in (1, 2)], [numbers(3, 4, seed=k) for k in (3, 4)], numbers(5,
            4), numbers(5, 4, seed=9)
    far = [(W @ a - W0 @ g).square().sum()/3 for W, W0 in zip(now, then) for a, g in zip(c, guide)]
    assert distance(now, then, c, guide) == pytest.approx(float(sum(far)/len(far)))
    at_first = [(W0 @ (a - g)).square().sum()/3 for W0 in then for a, g in zip(c, guide)]
    assert concept_left(now, then, c, guide) == pytest.approx(float(sum(far)/sum(at_first)))
    assert concept_left(then, then, c, guide) == 1


def places(pipe, tokens, unsafe=UNSAFE, before=BEFORE, whole=None, benign=BENIGN):
    "Embeddings of concept, guide, empty prompt and benign captions, by counting words"
    pairs = sorted({(w, b) for w, b in zip(whole, before)})
    erase, guide, empty, keep, first = [], [], [], [], 9
    for w, b in pairs:
        end, last = len(w.split()), len(b.split())   # words stand at 1, 2, ...
        places = dict(last=[(end, last)], rest=[(i, i) for i in range(last + 1, 9)],
                      end=[(end + k, last + k) for k in range(9 - max(end, last))])[tokens]
        for i, j in places:
            erase.append(said(pipe, w)[i])
            guide.append(said(pipe, b)[j])
            empty.append(said(pipe, '')[i])
            first = min(first, i)
    for c in sorted(set(benign)):
        keep += [said(pipe, c)[len(c.split())]] if tokens == 'last' else list(said(pipe, c)[first:])
    return [torch.stack(v).double() for v in (erase, guide, empty, keep)]


# to the end of the words
WHOLE = ['a red fox kitchen knife', 'a blue fox crossed swords', 'a green fox kitchen knife', 'old fox crossed swords']


@each('tokens', ['last', 'end', 'rest'])
def test_embeddings_stand_at_the_right_places(tokens):
    pipe, _ = given()
    cuts = [(b, w[len(b):], '') for b, w in zip(BEFORE, WHOLE)]
    cuts += [(*cuts[0][:2], ' in meadow')]   # the same words of another caption, once
    found = edit_embeddings(pipe, cuts, BENIGN + BENIGN[:1], tokens)
    for what, a, b in zip(('erase', 'guide', 'empty', 'keep'), found, places(pipe, tokens, whole=WHOLE)):
        close(a, b, what)
    many = dict(last=4, end=4 + 4 + 4 + 5, rest=5 + 5 + 5 + 6)[tokens]
    assert [len(v) for v in found[:3]] == [many]*3 and all(v.dtype == torch.float64 for v in found)


def test_starts_and_precision():
    # a guide without words is the start token
    pipe, _ = given()
    found, at = embeddings(pipe, ['', 'a red car'])
    assert at.tolist() == [0, 3] and found.shape == (2, 9, 4)
    pipe.text_encoder.requires_grad_(True)
    assert not embeddings(pipe, ['a'])[0].requires_grad

    # low precision maps are edited in float32
    pipe, data = given()
    full, other = pipe.unet.get_parameter(KEYS[0]), pipe.unet.get_parameter('block.attn1.to_k.weight')
    full.data, other.data = full.data.half(), other.data.half()
    uce(pipe, data, UCEConfig())
    assert full.dtype == torch.float32 and other.dtype == torch.float16


def whole(pipe, config, rounds, W0s):
    "The maps after UCE and rounds of RECE, and what is logged, by dense least squares"
    erase, guide, empty, keep = places(pipe, config.tokens, whole=WHOLE)
    def fit(W0, c, v):
        s_e, s_p, r = config.erase_scale**.5, config.preserve_scale**.5, config.ridge**.5
        tall = torch.cat([s_e*c, s_p*keep, r*torch.eye(4)])
        return torch.linalg.lstsq(tall, torch.cat([s_e*v, s_p*keep @ W0.T, r*W0.T])).solution.T
    far = lambda Ws, c, g: float(sum((c @ W.T - g @ W0.T).square().mean() for W, W0 in zip(Ws, W0s))/2)
    Ws = [fit(W0, erase, guide @ W0.T) for W0 in W0s]
    left = lambda Ws: far(Ws, erase, guide)/far(W0s, erase, guide)
    log, trail, pairs = [dict(step=0, loss=far(Ws, erase, guide), left=left(Ws))], [Ws], [(erase, guide)]
    for k in range(rounds):
        tall = torch.cat([*Ws, config.rece_ridge**.5*torch.eye(4)])
        found = torch.linalg.lstsq(tall, torch.cat([*(W0 @ erase.T for W0 in W0s),
                                                    torch.zeros(4, len(erase))])).solution.T
        near = far(Ws, found, erase)
        pairs.append((found, empty))
        c, goal = (torch.cat(v) for v in zip(*(pairs if config.keep_erased else pairs[-1:])))
        Ws = [fit(W, c, goal @ W0.T) for W, W0 in zip(Ws, W0s)]
        log.append(dict(step=k + 1, loss=far(Ws, found, empty), left=left(Ws), attack=near))
        trail.append(Ws)
    best = min(range(rounds + 1), key=lambda k: log[k]['left'])
    Ws = trail[best]
    if rounds: log = [row | dict(kept=row['step'] == best) for row in log]
    return Ws, log


@ledger('uce/tokens', 'rece/tokens', 'rece/rounds', 'rece/keep_erased', 'rece/preserve_scale')
@each('method, changes', [
    ('uce', {}), ('uce', dict(tokens='rest', erase_scale=4., preserve_scale=.2, ridge=.3)), ('rece', {}),
    ('uce', dict(tokens='end', erase_scale=4.)), ('rece', dict(keep_erased=False, tokens='end', rounds=2, ridge=.1, preserve_scale=.1)),
    ('rece', dict(tokens='rest', rounds=3, rece_ridge=.4, erase_scale=2., keep_erased=False)),
    ('rece', dict(tokens='rest', rounds=3, rece_ridge=.4, erase_scale=2.))])
def test_keys_and_values_are_edited_and_nothing_else(method, changes):
    pipe, data = given()
    run, kind = dict(uce=(uce, UCEConfig), rece=(rece, RECEConfig))[method]
    config = kind(**changes)
    before = {n: p.clone() for n, p in pipe.unet.named_parameters()}
    pipe.unet.requires_grad_(True)
    Ws, log = whole(pipe, config, 0 if method == 'uce' else config.rounds, [before[n].double() for n in KEYS])
    out = run(pipe, data, config)
    for n, W in zip(KEYS, Ws): close(pipe.unet.get_parameter(n), W, n)
    assert {n for n, p in pipe.unet.named_parameters()
            if not torch.equal(p, before[n])} == set(KEYS) == set(layers(pipe.unet, 'kv'))
    assert out['solves'] == out['skipped'] == [] and len(out['log']) == len(log)
    for found, wanted in zip(out['log'], log): assert found == pytest.approx(wanted, rel=1e-3)
    assert {type(row['loss']) for row in out['log']} == {float} # they are written to a file
    assert not any(p.requires_grad for p in pipe.unet.parameters())


def test_the_erased_pairs_stay_erased_in_later_rounds():
    "Solved for the new embeddings alone, rounds bring the concept back"
    original = [numbers(6, 16, seed=k) for k in (1, 2)]
    pairs = [numbers(n, 16, seed=9 + n) for n in (3, 4, 5)]
    erase, guide, empty, preserve = pairs[0], numbers(3, 16, seed=5), numbers(3, 16, seed=6), pairs[2]
    left = {}
    for keep in True, False:
        rounds = Rounds(original, (erase, guide, empty, preserve), RECEConfig(erase_scale=10., keep_erased=keep))
        left[keep] = [rounds.row(0, erase, guide)['left']] + [rounds.rece(k)['left'] for k in (1, 2)]
    assert left[True][0] == left[False][0] and max(left[True]) < .001 < .2 < left[False][2], left


@each('shares, best', [([.5, .2, .2, .4], 1), ([.1, .2, 0., 0.], 2), ([0., 0., 0., 0.], 0)])
def test_the_best_round_on_validation_is_kept(shares, best, monkeypatch):
    pipe, data = given()
    data.detector, data.validation = (lambda pictures: 0), (('old fox', 1),)
    config, seen = RECEConfig(rounds=3, tokens='rest', keep_erased=False, sampling_steps=7, guidance=2.), []
    def share(pipe, given, steps, guidance):
        assert given is data and (steps, guidance) == (7, 2.)
        seen.append(pipe.unet.get_parameter(KEYS[0]).clone())
        return shares[len(seen) - 1]
    monkeypatch.setattr(page, 'unsafe_share', share)
    out = rece(pipe, data, config)
    assert len(seen) == 4 and torch.equal(pipe.unet.get_parameter(KEYS[0]), seen[best])
    assert [row['kept'] for row in out['log']] == [k == best for k in range(4)] and best_round(out['log']) == best
    assert [row['unsafe'] for row in out['log']] == shares and not torch.equal(seen[0], seen[1])


def test_captions_without_the_words_are_left_out():
    pipe, data = given()
    data.unsafe_captions[1] = 'a old house'
    with pytest.warns(UserWarning, match='uce: 1 of 4'): out = uce(pipe, data)
    assert out['skipped'] == [dict(captions=1, of=4)]
    other, rest = given()
    rest.unsafe_captions = [c for k, c in enumerate(rest.unsafe_captions) if k != 1]
    uce(other, rest)
    assert torch.equal(pipe.unet.get_parameter(KEYS[0]), other.unet.get_parameter(KEYS[0]))
