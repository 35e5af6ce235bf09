"An adapter of the story, and the fine-tuning that it stands for."
import copy
from types import SimpleNamespace
import pytest, torch
from resalign.core.settings import params
from resalign.method.demo import demo, demo_bank
from resalign.method.finetune import FinetuneConfig, finetune
from resalign.studies import hypergradients, story
from resalign.studies.models import concept_of, drawn_data, section, settings_of


@pytest.fixture
def pipe(tmp_path, monkeypatch):
    "A small pipeline in place of the models and their base; the name of a set in place of its folder"
    pipe = demo(n=4)[0]
    monkeypatch.setattr(story, 'load_pipeline', lambda folder: copy.deepcopy(pipe))
    monkeypatch.setattr(story, 'load_bank', lambda pipe, folder: demo_bank(pipe, folder, 4)[0])
    monkeypatch.setattr(story, 'STORY', tmp_path)
    return pipe


def model(pictures, seed=5):
    "A fine-tuning of three steps"
    settings = dict(algorithm='lora', lr=1e-2, steps=3, batch=2)
    start = SimpleNamespace(made=lambda: 'folder')
    return SimpleNamespace(unlearned=start, settings=settings, seed=seed, images=lambda: pictures)


def test_an_adapter_is_what_the_fine_tuning_learned(pipe, tmp_path):
    "The base with it equals the fine-tuned pipeline, up to half precision; seed and pictures are the model's"
    off = {}
    for name, pictures in (('harmless', 'varied'), ('spoilt', 'retain')):
        asked = model(pictures)
        story.write_finetuned(tmp_path/name, asked)
        whole = copy.deepcopy(pipe)
        finetune(whole, demo_bank(whole, pictures, 4)[0], FinetuneConfig(**asked.settings, seed=5))
        before, after, now = (dict(p.unet.named_parameters()) for p in (pipe, whole, story.restored(name)))
        moved = torch.cat([(after[k] - before[k]).flatten() for k in before])
        off[name] = torch.cat([(now[k] - after[k]).flatten() for k in before]).norm()/moved.norm()
        assert moved.norm() > 0
    assert max(off.values()) < 2e-3, off


def test_what_is_fine_tuned(monkeypatch):
    "The models of the table, on harmless pictures, or a fifth of them unsafe"
    monkeypatch.setattr(hypergradients, 'mixed_folder', lambda concept, share: (concept, share))
    models = {f'{method}_{name}': story.finetuned(method, name) for method, name in story.FINETUNED}
    concept, table = concept_of('reported'), section('finetune.varied-lora')
    assert {k: m.images() for k, m in models.items() if k != 'resalign_spoilt'} == dict.fromkeys(
        ['ga_harmless', 'resalign_harmless'], drawn_data()/'varied')
    assert models['resalign_spoilt'].images() == (concept, .2)
    for name, m in models.items():
        start = m.unlearned
        assert name.startswith(start.method) and start.settings == settings_of(start.method) and m.settings == table
        assert (start.concept, start.seed, m.seed) == (concept, *[params('story.seed')]*2)


def test_two_adapters_add_up(pipe, tmp_path):
    "As a fine-tuning on top of an unlearned model"
    for name, pictures in (('a', 'varied'), ('b', 'retain')): story.write_finetuned(tmp_path/name, model(pictures, 1))
    base, a, b, both = (dict(story.restored(*names).unet.named_parameters()) for names in ((), 'a', 'b', ('a', 'b')))
    for k in base: torch.testing.assert_close(both[k], a[k] + b[k] - base[k], rtol=1e-4, atol=1e-5)
    assert any((a[k] != base[k]).any() for k in base) and any((a[k] != b[k]).any() for k in base)
