"Prefixes, the sampler's noise and guidance, and the rates of attacks, against plain formulas on the toy of `toys`."
import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch

from resalign.baselines.advunlearn import AdvUnlearnConfig, attacked_embeddings
from resalign.core.settings import UserError
from resalign.measure.metrics import rate
from resalign.model.losses import Denoiser
from resalign.use import attacks as A
from tests.fast.toys import CHANNELS, SIDE, T, TOKENS, UNSAFE, alpha_bar, bank, close, noises, pipeline, said, stream
from each import each

N, STEPS = 3, 5


@pytest.fixture(scope='module')
def words():
    pipe = pipeline()
    pipe.tokenizer.get_vocab = lambda: {f'{w}</w>': i for w, i in pipe.tokenizer.ids.items()}
    pipe.tokenizer.convert_tokens_to_ids = lambda tokens: [pipe.tokenizer.ids[t[:-4]] for t in tokens]
    return pipe


def test_one_token_against_the_original_is_advunlearns_attack():
    pipe, original = pipeline(seed=1), pipeline()
    unsafe = bank(original, UNSAFE, 1)
    asked = dict(attack_steps=4, attack_lr=.1, seed=3)
    ours = A.prefix_embeddings(pipe, UNSAFE, unsafe, A.PrefixConfig(tokens=1, **asked), original, batch=3)
    assert torch.equal(ours, attacked_embeddings(pipe, original, UNSAFE, unsafe, AdvUnlearnConfig(**asked), 3))


@each('k, typed', [(1, False), (3, False), (3, True)])
def test_prefixes_explain_noised_unsafe_pictures(words, k, typed):
    "Adam on k embeddings a caption, written out with a loop over its steps; typed ones end on tokens that may be used"
    pipe, captions = words, UNSAFE[:2]
    config, unsafe = A.PrefixConfig(tokens=k, words=typed, attack_steps=3, attack_lr=.2, seed=4), bank(pipe, UNSAFE, 1)
    seen = []
    encoder, table = pipe.text_encoder, pipe.text_encoder.get_input_embeddings().weight
    handle = encoder.get_input_embeddings().register_forward_hook(lambda m, a, out: seen.append((a[0], out)))
    A.prefix_embeddings(pipe, captions, unsafe, config, erase=(' kitchen knife', ' crossed swords'))
    handle.remove()
    ids, last = seen[-1]
    own = [pipe.tokenizer.ids[w] for w in captions[0].split()][:TOKENS - k - 2] # what a prefix leaves room for
    assert ids.shape == (2, TOKENS) and ids[0, k+1:].tolist()[:len(own)] == own

    allowed = sorted(i for w, i in pipe.tokenizer.ids.items() if w not in 'kitchen knife crossed swords a'.split())
    gen = stream(4, 'prefix', 0)
    if typed: delta = table[torch.tensor(allowed)[torch.randint(len(allowed), (2, k), generator=gen)]].clone().double()
    else: delta = (table.std()*torch.randn(2, k, table.shape[1], generator=gen)).double()
    nearest = lambda x: torch.stack([torch.stack([min((table[i].double() for i in allowed), key=lambda e: (e - v).norm())
                                                  for v in row]) for row in x])
    net, deep = copy.deepcopy(pipe.unet).double(), copy.deepcopy(encoder).double()
    m = v = torch.zeros_like(delta)
    for step in range(3):
        s = A.draw_sample(unsafe, 2, stream(4, 'view', 0, step), T)
        tried = (nearest(delta) if typed else delta).requires_grad_(True)
        put = deep.get_input_embeddings().register_forward_hook(
            lambda mod, a, out: torch.cat([out[:, :1], tried, out[:, k+1:]], 1))
        text = deep(ids)[0]
        put.remove()
        z_t = [math.sqrt(alpha_bar(t))*z.double() + math.sqrt(1 - alpha_bar(t))*e.double() for z, e, t in zip(s.z, s.noise, s.t)]
        error = net(torch.stack(z_t), s.t, text, return_dict=False)[0] - s.noise.double()
        g, = torch.autograd.grad((error**2).mean(), tried)
        m, v = .9*m + .1*g, .999*v + .001*g*g
        delta = delta.detach() - .2*(m/(1 - .9**(step + 1)))/((v/(1 - .999**(step + 1))).sqrt() + 1e-8)
    close(A.search_prefix(Denoiser(pipe), encoder, ids, A.noise_targets(Denoiser(pipe), unsafe, 2, 4, 0), config,
                          stream(4, 'prefix', 0), torch.tensor(allowed)), nearest(delta) if typed else delta, rtol=1e-3)


def plain_path(net, kind, z, text, empty, guidance, times, eta, factor, gen, push=None):
    "DDIM with added noise, from its paper's equations 12 and 16, in float64"
    z = z.double()
    for t in times:
        s = t - T//STEPS
        a, b = alpha_bar(t), alpha_bar(s) if s >= 0 else 1.
        each_t = [torch.tensor(t)]*len(z)
        yes, no = noises(net, kind, z, each_t, text), noises(net, kind, z, each_t, [empty]*len(z))
        eps = no + guidance.double()*(yes - no) + (push(z, a) if push else 0)
        sigma = eta*math.sqrt((1 - b)/(1 - a))*math.sqrt(1 - a/b)
        clean = (z - math.sqrt(1 - a)*eps)/math.sqrt(a)
        z = math.sqrt(b)*clean + math.sqrt(1 - b - sigma**2)*eps
        z = z + sigma*factor*torch.randn(z.shape, generator=gen).double()
    return z


@each('kind, eta, factor, first, steered',
      [('epsilon', 0., 1., 0, False), ('epsilon', 1., 1.3, 0, False), ('v_prediction', .5, 1., 0, True), ('epsilon', 1., 1., 2, True)])
def test_the_sampler(kind, eta, factor, first, steered):
    pipe = pipeline(kind)
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, timestep_spacing='trailing')
    model, gen = Denoiser(pipe), torch.Generator().manual_seed(0)
    z = torch.randn(N, CHANNELS, SIDE, SIDE, generator=gen)
    text, empty = torch.stack([said(pipe, c) for c in UNSAFE[:N]]), said(pipe, '')
    guidance = torch.tensor([1., 3., 5.]).view(-1, 1, 1, 1)
    torch.manual_seed(0)
    net = A.LatentClassifier(CHANNELS, 4)
    deep = copy.deepcopy(net).double()
    def push(z, a): # −s √(1 − ᾱ) ∇ log p
        z = z.detach().requires_grad_(True)
        logit = deep(z, torch.full((N,), a).double())
        g, = torch.autograd.grad(-torch.log(1 + torch.exp(-logit)).sum(), z)
        return -2.5*math.sqrt(1 - a)*g
    got = A.denoise(model, z, text, empty[None], guidance, STEPS, stream(1), first, eta=eta, factor=factor,
                    push=A.classifier_push(model, net, 2.5) if steered else None)
    times = [T - 1 - k*T//STEPS for k in range(STEPS)][first:]
    with torch.no_grad():
        want = plain_path(copy.deepcopy(pipe.unet).double(), kind, z, text, empty, guidance, times, eta, factor, stream(1),
                          (lambda *x: torch.enable_grad()(push)(*x)) if steered else None)
    close(got, want, rtol=1e-3)
    if first: # a path in two parts is the path
        half = A.denoise(model, z, text, empty[None], guidance, STEPS, stream(1), 0, first)
        whole = A.denoise(model, z, text, empty[None], guidance, STEPS, stream(1))
        close(A.denoise(model, half, text, empty[None], guidance, STEPS, stream(1), first), whole, rtol=1e-5)


def test_what_is_known_is_put_back_outside_of_the_hole():
    z = torch.zeros(1, 2, 8, 8)
    mask = A.hole_mask(z, .5)
    assert mask.sum() == 16 and mask[..., 2:6, 2:6].all()
    images = np.random.default_rng(0).integers(256, size=(2, 8, 8, 3), dtype=np.uint8)
    filled = A.with_hole(images, .5)
    inside = np.zeros((8, 8), bool)
    inside[2:6, 2:6] = True
    assert (filled[:, ~inside] == images[:, ~inside]).all()
    assert np.abs(filled[:, inside].astype(float) - images.mean((1, 2))[:, None]).max() <= .5


def test_the_best_of_several_sets_and_its_rate():
    def scores(*values): return pd.DataFrame(dict(prompt=['a', 'b'], kind='explicit', seed=[0, 1], image_hash=[f'{v}' for v in values],
                                                  score=values, detector='detector-vice', version='1', hash='h'))
    best = A.best_of([scores(.2, .9), scores(.6, .1), scores(.3, .3)])
    assert best.score.tolist() == [.6, .9] and best.image_hash.tolist() == ['0.6', '0.9'] and best.picture.tolist() == [1, 0]
    both = pd.concat([scores(.2, .9).assign(attack='none', phase='before'), best.assign(attack='noise', phase='before')])
    table = A.attack_table(both, 'uce')
    assert table.columns.tolist() == A.COLUMNS and table.attack.tolist() == ['none', 'noise']
    assert table.value.tolist() == [.5, 1.] and (table.method == 'uce').all() and (table.n == 2).all()
    assert table[['low', 'high']].iloc[0].tolist() == list(rate([.2, .9], .5)[1:3])


@each('asked, given, said', [
    (['noise'], {}, None), ([], dict(unsafe='u'), None), (['prefix'], {}, 'attack prefix: needs --unsafe'),
    (['bell'], dict(unsafe='u'), 'attack bell: needs --erase'), (['classifier'], {}, 'needs --unsafe and --benign'),
    (['nois'], {}, "--attack: unknown 'nois', did you mean 'noise'")])
def test_which_attacks_can_run(asked, given, said):
    given = dict(unsafe=None, benign=None, erase=()) | given
    if said:
        with pytest.raises(UserError, match=said): A.possible(asked, **given)
        return
    names, reasons = A.possible(asked, **given)
    if asked: assert names == ['redraw', 'noise'] and not reasons # with its control
    else: assert set(A.ATTACKS) - set(names) == {'bell', 'classifier'} and len(reasons) == 2


# ------------------------------------------------------------------ what each attack hands to the sampler

OWN = [(1., ''), (3., 'a'), (5., '')] # guidance and negative prompt of each row
ROWS = [dict(prompt=UNSAFE[k], seed=k, guidance=g, negative_prompt=n) for k, (g, n) in enumerate(OWN)]


def attacked(pipe=None, original=None, **settings):
    "Three prompts, each with a guidance of its own, under attack"
    config = A.AttackConfig(**dict(steps=STEPS, guidance=2.) | settings)
    return A.Attacked(pipe or pipeline(), A.Given(ROWS, config, unsafe=('pictures', UNSAFE), original=original))


def test_each_row_has_its_own_guidance_and_negative_prompt(monkeypatch):
    calls = []
    def generate(pipe, prompts, seeds, steps, guidance, embeds, negative):
        calls.append((prompts, seeds, steps, guidance, negative))
        return [np.full((2, 2, 3), s) for s in seeds]
    monkeypatch.setattr(A, 'generate', generate)
    x = attacked()
    images = x.draw()
    assert [int(i[0, 0, 0]) for i in images] == [0, 1, 2] # in the order of the rows
    assert sorted(calls, key=lambda c: c[1]) == [([UNSAFE[k]], [k], STEPS, g, [n]) for k, (g, n) in enumerate(OWN)]
    parts = []
    def denoise(model, z, text, empty, scale, *args, **kw):
        parts.append((scale.flatten().tolist(), len(text)))
        return z
    monkeypatch.setattr(A, 'denoise', denoise)
    monkeypatch.setattr(A, 'decode', lambda pipe, z: z.numpy())
    A.denoised(x, torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3, 1), None, 2, {})
    assert parts == [([1., 3.], 2), ([5.], 1)]


def test_controls_differ_from_their_attacks(monkeypatch):
    "Other seeds from the second set on; a random prefix makes no step of the search"
    x, asked = attacked(noise=[(.5, 1.)]*3), []
    monkeypatch.setattr(x, 'draw', lambda prompts=None, embeds=None, seeds=None: seeds)
    sets = A.attack_redraw(x).sets
    assert sets[0] == [0, 1, 2] and len({tuple(s) for s in sets}) == 3
    monkeypatch.setattr(x, 'bank', lambda name: name)
    def prefix_embeddings(pipe, prompts, bank, config, *args): asked.append((bank, config.attack_steps))
    monkeypatch.setattr(A, 'prefix_embeddings', prefix_embeddings)
    A.attack_random(x)
    A.attack_prefix(x)
    assert asked == [('unsafe', 0), ('unsafe', x.config.attack_steps)] and x.config.attack_steps > 0


def test_the_known_part_is_what_the_mask_leaves(monkeypatch):
    x, seen = attacked(hole=.5), {}
    monkeypatch.setattr(A, 'context', lambda x: torch.zeros(3, CHANNELS, 4, 4))
    monkeypatch.setattr(A, 'noised', lambda model, z, t, gen: z)
    monkeypatch.setattr(A, 'start_of', lambda x: None)
    def sample(z, *names, keep): seen.update(out=keep(slice(3))(torch.ones(3, CHANNELS, 4, 4), None))
    monkeypatch.setattr(x, 'sample', sample)
    A.attack_inpaint(x)
    assert seen['out'][..., 1:3, 1:3].eq(1).all() and seen['out'].sum() == 3*CHANNELS*4


def test_a_completion_goes_on_where_the_original_stopped(monkeypatch):
    "With the model as its own original the path in two parts is the path; without one it starts from a noised picture"
    pipe = pipeline()
    x = attacked(pipe, original=pipe, completed=[.4])
    z = torch.randn(3, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(A, 'start_of', lambda x: z)
    monkeypatch.setattr(A, 'embed', lambda _, texts: torch.stack([said(pipe, t) for t in texts])) # models alone differ
    monkeypatch.setattr(A, 'batch_of', lambda pipe: 2)
    monkeypatch.setattr(A, 'decode', lambda pipe, z: z.numpy())
    close(torch.tensor(A.attack_completion(x).sets[0]), torch.tensor(x.sample(z, 'whole')), rtol=1e-5)
    other = attacked(pipe, original=pipeline(seed=1), completed=[.4])
    assert not np.allclose(A.attack_completion(other).sets[0], A.attack_completion(x).sets[0], rtol=1e-2)
    alone, times = attacked(pipe), []
    monkeypatch.setattr(A, 'context', lambda x: z)
    monkeypatch.setattr(A, 'noised', lambda model, z, t, gen: times.append(t.tolist()) or z)
    A.half_way(alone, 2)
    assert times == [[T*(STEPS - 2)//STEPS - 1]*3]


def test_the_latent_classifier_knows_its_kinds():
    "Unsafe latents all +1, benign all -1; on its last fifth, where the signs are turned, it is wrong"
    model = Denoiser(pipeline())
    def latents(sign, n=20): # the last fifth turned
        mean = sign*torch.ones(n, CHANNELS, SIDE, SIDE)
        mean[n*4//5:] *= -1
        return A.Bank(mean, torch.full_like(mean, 1e-3), torch.zeros(n, 1))
    config = A.AttackConfig(classifier_steps=60, classifier_lr=1e-2)
    net, accuracy = A.train_classifier(model, latents(1.), latents(-1.), config)
    clear = torch.full((1,), float(model.scheduler.alphas_cumprod[0]))
    plus = torch.ones(1, CHANNELS, SIDE, SIDE)
    assert net(plus, clear) > 0 > net(-plus, clear) and accuracy < .4


def test_each_phase_attacks_its_own_pipeline(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(A, 'loaded', lambda pipeline, asked: pipeline)
    for name in ('check_tokens', 'check_texts', 'material'): monkeypatch.setattr(A, name, lambda *args: None)
    monkeypatch.setattr(A, 'Attacked', lambda pipe, given: pipe)
    monkeypatch.setattr(A, 'run_cell', lambda x, attack, evaluators, folder: seen.append((folder.name, x)))
    asked = A.Asked('mine', 'prompts', 'evaluators')
    for phase, pipe in (('before', 'mine'), ('after', 'tuned')):
        A.run_phase(phase, pipe, asked, [], {}, ['none'], tmp_path)
    assert seen == [('before-none', 'mine'), ('after-none', 'tuned')]


def test_all_sets_of_an_attack_are_scored(monkeypatch, tmp_path):
    monkeypatch.setattr(A, 'ATTACKS', dict(noise=lambda x: A.Drawn([[.1, .8], [.7, .2]])))
    score = lambda images, rows, evaluators: pd.DataFrame(dict(score=images, image_hash=['a', 'b']))
    monkeypatch.setattr(A, 'score_images', score)
    monkeypatch.setattr(A, 'strip', lambda *args: A.Image.new('L', (1, 1)))
    A.run_cell(attacked(), 'noise', {}, tmp_path/'cell')
    found = pd.read_csv(tmp_path/'cell/scores.csv')
    assert list(found.score) == [.7, .8] and list(found.picture) == [1, 0]
