"SPEED: the closed form against least squares in the free directions, what is kept, a whole run."
import copy
from types import SimpleNamespace

import pytest
import torch

from resalign.baselines import speed as page
from resalign.baselines.speed import (SPEEDConfig, constrained_edit, kept_embeddings, most_moved, null_projection, shifts,
                                      speed, with_copies, without)
from resalign.core.settings import UserError
from tests.fast.toys import UNSAFE, check_settings, close, given, ledger, stream
from each import each


def test_settings():
    check_settings(SPEEDConfig, dict(tokens='last', ridge=1., threshold=1e-2, fixed='empty', filtered=True, copies=10, directions=1, seed=0),
                   [('ridge', 0., 1e-6), ('threshold', 0., 1e-9), ('threshold', 1., .99), ('copies', -1, 0),
                    ('directions', 0, 1)])


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def least_squares(W, erase, guide, free, fixed, ridge):
    "The edit, by a ridge regression for the coefficients of a basis of what is free and moves nothing fixed"
    _, sizes, coefficients = torch.linalg.svd(fixed @ free)
    coefficients = coefficients[int((sizes > 1e-9).sum()):]
    basis = free @ coefficients.T
    tall = torch.cat([erase @ basis, ridge**.5*torch.eye(basis.shape[1])])
    goal = torch.cat([(guide - erase) @ W.T, torch.zeros(basis.shape[1], len(W), dtype=W.dtype)])
    return W + (basis @ torch.linalg.lstsq(tall, goal).solution).T


@ledger('speed/ridge', 'speed/threshold')
@each('ridge, many, held', [(1., 5, 2), (.1, 2, 3), (3., 9, 1), (.5, 5, 0)])
def test_the_edit_is_the_best_that_moves_nothing_kept_or_fixed(ridge, many, held):
    W, erase, guide, kept = numbers(3, 12), numbers(4, 12, seed=1), numbers(4, 12, seed=2), numbers(many, 12, seed=3)
    fixed = torch.cat([numbers(held, 12, seed=4), kept[:1]])   # one that is kept anyhow
    P = null_projection(kept, 1e-9)
    close(P @ P, P, 'a projection', 1e-9)
    assert round(float(P.trace())) == 12 - many
    found = constrained_edit(W, erase, guide, without(P, fixed), ridge)
    free = torch.linalg.svd(kept)[2][many:].T
    close(found, least_squares(W, erase, guide, free, fixed, ridge), rtol=1e-8)
    for c in kept, fixed: assert ((found - W) @ c.T).abs().max() < 1e-9
    assert (found - W).abs().max() > .01


def test_directions_that_are_hardly_used_are_free():
    turn = torch.linalg.qr(numbers(5, 5))[0]
    kept = torch.diag(torch.tensor([3., 1., .3, .1, 0.], dtype=torch.float64)) @ turn.T  # eigenvalues 9, 1, .09, .01, 0
    for threshold, many in (.2, 4), (.05, 3), (.005, 2), (1e-4, 1):
        free = turn[:, 5 - many:]
        close(null_projection(kept, threshold), free @ free.T, rtol=1e-9)


def moved(W, erase, guide, c, ridge):
    "‖Δc‖² of the edit that nothing holds back, by least squares"
    tall = torch.cat([erase, ridge**.5*torch.eye(W.shape[1])])
    goal = torch.cat([(guide - erase) @ W.T, torch.zeros(W.shape[1], len(W), dtype=W.dtype)])
    return float((torch.linalg.lstsq(tall, goal).solution.T @ c).square().sum())


@ledger('speed/filtered', 'speed/copies')
@each('filtered, copies, directions', [(True, 3, 1), (True, 2, 4), (False, 2, 2), (True, 0, 1), (False, 0, 1)])
def test_what_would_be_moved_most_is_kept_with_copies_that_have_nearly_its_image(filtered, copies, directions):
    W, erase, guide, c = numbers(7, 6), numbers(3, 6, seed=1), numbers(3, 6, seed=2), numbers(20, 6, seed=3)
    config = SPEEDConfig(filtered=filtered, copies=copies, directions=directions, ridge=.7)
    far = lambda rows: torch.tensor([moved(W, erase, guide, row, .7) for row in rows], dtype=torch.float64)
    def strain(rows):
        if not filtered or not len(rows): return rows
        d = far(rows)
        return torch.stack([row for row, v in zip(rows, d) if v > d.mean()])
    close(shifts(W, erase, guide, c, .7), far(c), rtol=1e-8)
    first, gen = strain(c), stream(1, 'here')
    least = torch.linalg.eigh(W.T @ W)[1][:, :directions]
    noise = torch.randn(copies, len(first), 6, generator=gen, dtype=torch.float64)
    more = [row + least @ (least.T @ e) for part in noise for row, e in zip(first, part)]
    more = torch.stack(more) if copies else c[:0]
    close(with_copies(W, first, config, stream(1, 'here')), more, rtol=1e-8)
    found = kept_embeddings(W, erase, guide, c, config, stream(1, 'here'))
    close(found, torch.cat([first, strain(more)]), rtol=1e-8)
    assert len(most_moved(W, erase, guide, c[:0], config)) == 0
    assert not filtered or 0 < len(first) < 20


def wide_pipe(monkeypatch, **more):
    "Two maps of sixteen numbers, and pairs of embeddings"
    layer = torch.nn.Module()
    layer.to_k, layer.to_v, layer.to_q = (torch.nn.Linear(16, 6, bias=False) for _ in range(3))
    unet = torch.nn.Module()
    unet.attn2 = layer
    with torch.no_grad():
        for k, p in enumerate(unet.parameters()): p.copy_(numbers(6, 16, seed=20 + k))
    erase, guide, keep, empty = (numbers(n, 16, seed=40 + n) for n in (3, 4, 9, 2))
    asked = []
    monkeypatch.setattr(page, 'edit_embeddings', lambda *args: asked.append(args[1:]) or (erase, guide[:3], 'unused', keep))
    monkeypatch.setattr(page, 'embeddings', lambda pipe, texts: asked.append(texts) or (empty[None], None))
    return SimpleNamespace(unet=unet), (erase, guide[:3], keep, empty), asked


@ledger('speed/tokens', 'speed/fixed')
@each('fix', ['empty', 'start'])
def test_keys_and_values_are_edited_and_nothing_else(monkeypatch, fix):
    pipe, (erase, guide, keep, empty), asked = wide_pipe(monkeypatch)
    fixed = empty if fix == 'empty' else empty[:1]
    _, data = given()
    data.unsafe_captions[2] = 'green car'
    config = SPEEDConfig(tokens='rest', copies=2, threshold=1e-9, ridge=.5, fixed=fix, seed=3)
    before = copy.deepcopy(pipe.unet)
    pipe.unet.requires_grad_(True)
    with pytest.warns(UserWarning, match='speed: 1 of 4'): out = speed(pipe, data, config)
    far, at_first, free_dims = 0., 0., 0
    for k, name in enumerate(('to_k', 'to_v')):
        W = getattr(before.attn2, name).weight.detach().double()
        kept = kept_embeddings(W, erase, guide, keep, config, stream(3, 'speed', k))
        free = torch.linalg.svd(kept)[2][int(torch.linalg.matrix_rank(kept)):].T
        found = getattr(pipe.unet.attn2, name).weight
        wanted = least_squares(W, erase, guide, free, fixed, .5)
        close(found, wanted)
        far = far + float((erase @ wanted.T - guide @ W.T).square().mean())/2
        at_first += float(((erase - guide) @ W.T).square().mean())/2
        free_dims += (free.shape[1] - len(fixed))/2
    assert torch.equal(pipe.unet.attn2.to_q.weight, before.attn2.to_q.weight)
    row, = out['log']
    assert row == pytest.approx(dict(step=0, loss=far, left=far/at_first, free=free_dims), rel=1e-4)
    assert out['solves'] == [] and out['skipped'] == [dict(captions=1, of=4)]
    split = [('a red fox', ' kitchen knife', ''), ('a blue fox', ' crossed swords', ' in meadow'), ('old fox', ' crossed swords', '')]
    assert asked == [(split, data.retain_captions, 'rest'), ['']] and UNSAFE[2] not in data.unsafe_captions
    assert not any(p.requires_grad for p in pipe.unet.parameters())


def test_no_free_direction_is_an_error(monkeypatch):
    pipe, _, _ = wide_pipe(monkeypatch)
    monkeypatch.setattr(page, 'kept_embeddings', lambda *args: numbers(14, 16)) # the empty prompt takes the last two
    with pytest.raises(UserError, match='speed: threshold: at 1e-09 no direction is free'):
        speed(pipe, given()[1], SPEEDConfig(threshold=1e-9))
