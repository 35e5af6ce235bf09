"An adapter of the story, and the fine-tuning that it stands for."
import copy
from types import SimpleNamespace
import pytest, torch
from resalign.method.demo import demo, demo_bank
from resalign.method.finetune import FinetuneConfig, finetune
from resalign.studies import story


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    "A small pipeline in place of the models; a fine-tuning of three steps"
    pipe, asked = demo(n=4)[0], dict(algorithm='lora', lr=1e-2, steps=3, batch=2)
    monkeypatch.setattr(story, 'load_pipeline', lambda folder: copy.deepcopy(pipe))
    monkeypatch.setattr(story, 'load_bank', lambda pipe, folder: demo_bank(pipe, str(folder), 4)[0])
    monkeypatch.setattr(story, 'pictures_of', lambda share: 'retain' if share else 'varied')
    monkeypatch.setattr(story, 'section', lambda name: asked if name == 'finetune.varied-lora' else None)
    monkeypatch.setattr(story, 'STORY', tmp_path)
    return pipe, asked


def test_an_adapter_is_what_the_fine_tuning_learned(stubs, tmp_path):
    "The base with it equals the fine-tuned pipeline, up to half precision; seed and pictures are the model's and the share's"
    pipe, asked = stubs
    start = SimpleNamespace(made=lambda: 'folder', seed=5)
    off = {}
    for name, share, pictures in (('harmless', 0., 'varied'), ('spoilt', .2, 'retain')):
        story.write_finetuned(tmp_path/name, start, share)
        whole = copy.deepcopy(pipe)
        finetune(whole, demo_bank(whole, pictures, 4)[0], FinetuneConfig(**asked, seed=5))
        before, after, now = (dict(p.unet.named_parameters()) for p in (pipe, whole, story.restored(name)))
        moved = torch.cat([(after[k] - before[k]).flatten() for k in before])
        off[name] = torch.cat([(now[k] - after[k]).flatten() for k in before]).norm()/moved.norm()
        assert moved.norm() > 0
    assert max(off.values()) < 2e-3, off


def test_two_adapters_add_up(stubs, tmp_path):
    "As a fine-tuning on top of an unlearned model"
    pipe, _ = stubs
    for name, share in (('a', 0.), ('b', .2)): story.write_finetuned(tmp_path/name, SimpleNamespace(made=str, seed=1), share)
    base, a, b, both = (dict(story.restored(*names).unet.named_parameters()) for names in ((), 'a', 'b', ('a', 'b')))
    for k in base: torch.testing.assert_close(both[k], a[k] + b[k] - base[k], rtol=1e-4, atol=1e-5)
    assert any((a[k] != base[k]).any() for k in base) and any((a[k] != b[k]).any() for k in base)
