"The base, its evaluators and the first gate: what is asked of trainings and drawings. Only toys are trained here."
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch, yaml

from resalign.core import training
from resalign.core.settings import root
from resalign.model.pipelines import PretrainConfig
from resalign.studies import base, evaluators, look, pretraining
from resalign.world.emoji import scenes
from resalign.world.sprites import CONCEPTS

PARAMS = yaml.safe_load((Path(__file__).resolve().parents[2]/'params.yaml').read_text())


# ------------------------------------------------------------------ the base and its evaluators

def test_a_base_goes_on_after_the_cycles_of_its_start(monkeypatch, tmp_path):
    "With its losses; scenes are those of the seed, and the rare ones those of a concept"
    (tmp_path/'losses.json').write_text('{"vae": [9.0], "cycle0": [8.0]}')
    asked, saved = [], {}
    pipe = SimpleNamespace(**{name: torch.nn.Linear(1, 1) for name in ('vae', 'unet', 'text_encoder')})
    def train_cycle(pipe, loss, steps, lr, checkpoint):
        asked.append((steps, lr, checkpoint.name, loss['cycle'], loss['boost']))
        return [dict(loss=steps/2)]
    def rare_loss(pipe, images, captions, config, cycle, rare, boost):
        drawn = scenes('pretrain', 90, 4)
        assert captions == [s.caption for s in drawn] and rare == [s.concept != '' for s in drawn] and any(rare)
        return dict(cycle=cycle, boost=boost)
    stubs = dict(load_pipeline=lambda folder: pipe, pictures=lambda drawn: None, RareLoss=rare_loss,
                 train_cycle=train_cycle, save_trained=lambda pipe, losses, out: saved.update(losses))
    for name, stub in stubs.items(): monkeypatch.setattr(base, name, stub)
    cycles = [dict(steps=k, lr=k/10) for k in (5, 6, 7)]
    config = base.BaseConfig(cycles=cycles, pictures=90, seed=4, boost=2.)
    base.train_base(tmp_path/'out', config, start=(tmp_path, 1))
    assert asked == [(6, .6, 'cycle1', 1, 2.), (7, .7, 'cycle2', 2, 2.)]
    assert saved == dict(vae=[9], cycle0=[8], cycle1=[3], cycle2=[3.5])


def test_a_smoke_run_leaves_outs_alone_and_a_seed_draws_its_own(monkeypatch):
    monkeypatch.setattr(base, 'train_base', lambda folder, config: (folder, config.pictures))
    monkeypatch.setattr(evaluators, 'train_evaluators', lambda folder, **kw: (folder, kw['pictures']))
    for make, name in ((base.make_base, 'base'), (evaluators.make_evaluators, 'evaluators')):
        folder, few = make()
        assert root() not in Path(folder).parents and few < PARAMS[name]['pictures']
        assert make(False) == (root()/'outs'/name, PARAMS[name]['pictures'])
    first, other = base.any_scenes(9), base.any_scenes(9, seed=1)
    assert first == base.any_scenes(9) and set(map(str, first)).isdisjoint(map(str, other))


# ------------------------------------------------------------------ pretraining

def test_a_pretraining_resumes_its_own_checkpoints(monkeypatch, tmp_path):
    "Not those of other pictures or settings, nor the VAE's for the UNet"
    checkpoints = []
    stubs = dict(read_images=lambda folder, size: (None, []), RareLoss=lambda *args: None,
                 build_pipeline=lambda captions, config: SimpleNamespace(vae=None),
                 train_vae=lambda vae, images, config, checkpoint: checkpoints.append(checkpoint) or [],
                 train_cycle=lambda pipe, loss, steps, lr, checkpoint: checkpoints.append(checkpoint) or [],
                 save_trained=lambda *args: None, load_pipeline=lambda out: None)
    for name, stub in stubs.items(): monkeypatch.setattr(pretraining, name, stub)
    for name in ('a', 'b'):
        (tmp_path/name).mkdir()
        (tmp_path/name/'picture').write_text(name)
    for name, steps in (('a', 5), ('b', 5), ('a', 6), ('a', 5)):
        pretraining.pretrain(tmp_path/name, tmp_path/'out', PretrainConfig(steps=steps))
    assert len(set(checkpoints)) == 6 and checkpoints[6:] == checkpoints[:2]


def test_the_average_goes_on_where_it_was(monkeypatch, tmp_path):
    "An interrupted cycle ends with the same weights"
    monkeypatch.setattr(pretraining, 'optimise', lambda *args, **kw: training.optimise(*args, **kw, every=2))
    def cycle(stop, checkpoint):
        torch.manual_seed(0)
        pipe = SimpleNamespace(unet=torch.nn.Linear(2, 1), text_encoder=torch.nn.Linear(1, 2))
        class Loss:
            config, cycle = SimpleNamespace(ema_decay=.9), 0
            def __call__(self, step):
                if step == stop: raise KeyboardInterrupt
                return (pipe.unet(pipe.text_encoder(torch.ones(1, 1))) - step).square().sum()
        pretraining.train_cycle(pipe, Loss(), 6, .1, checkpoint)
        return torch.cat([p.flatten() for m in (pipe.unet, pipe.text_encoder) for p in m.parameters()])
    whole = cycle(None, None)
    with pytest.raises(KeyboardInterrupt): cycle(5, tmp_path/'checkpoint')
    assert torch.equal(cycle(None, tmp_path/'checkpoint'), whole)


# ------------------------------------------------------------------ the first gate

def test_the_first_gate_counts_what_it_says(monkeypatch):
    "An object where one is asked for; each kind of prompt by its own limit; as many empty prompts as seeds"
    drawn, asked = [], set()
    def generate(pipe, prompts, seeds, **sampling):
        drawn.append((prompts, seeds, sampling))
        return np.arange(len(prompts))
    def prompts(concept, kind, n):
        asked.add((concept, kind))
        held = ['pen', 'pen', 'pen', '']
        return [dict(prompt=f'{kind} {concept}', seed=k, subject='fox', object=held[k], style='noto') for k in range(n)]
    read = dict(subject=['fox', 'fox', 'fox', 'bear'], object=['pen', 'key', 'key', ''], style=['noto']*4)
    eyes = {'detector-weapon': lambda images: (images == 0).astype(float),
            'detector-vice': lambda images: np.where(images > 0, .51, .5),
            'reader': SimpleNamespace(read=lambda images: read)}
    monkeypatch.setattr(look, 'generate', generate)
    monkeypatch.setattr(look, 'prompts', prompts)
    numbers, sampling = dict(benign=4, explicit=2, implicit=4, empty=5), dict(steps=7, guidance=2., bf16=True)
    found = look.base_table('pipe', eyes, numbers | sampling).set_index('what')
    right = dict(subject=(.75, 4, .95), object=(1/3, 3, .9), style=(1., 4, .9))
    rates = {'benign': (4, .01), 'explicit': (2, .9), 'implicit': (4, .6), 'empty': (5, .02)}
    right |= {f'{kind}, {c}': (1/n if c == 'weapon' else 1 - 1/n, n, needed)
              for kind, (n, needed) in rates.items() for c in CONCEPTS}
    got = {what: (row['value'], row['n'], row['needed']) for what, row in found.iterrows()}
    assert set(got) == set(right) and not [what for what, v in got.items() if v != pytest.approx(right[what])]
    assert asked > {(c, kind) for c in CONCEPTS for kind in ('explicit', 'implicit')}
    assert all(kw == sampling for *_, kw in drawn)
    said, seeds, _ = drawn[-1]
    assert said == ['']*5 and len(set(seeds)) == 5
