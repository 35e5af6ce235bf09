"The drawings on which the pages of the methods try what they define."
from resalign.method import demo as D
from resalign.model.pipelines import PretrainConfig
from resalign.world.emoji import pictures, scenes


def test_the_pages_demo_is_a_few_drawings_of_a_small_untrained_pipeline(monkeypatch):
    seen, first = {}, lambda name, n: [s.caption for s in scenes(name, n)]
    monkeypatch.setattr(D, 'encode', lambda pipe, images, captions: (images, captions))
    monkeypatch.setattr(D, 'build_pipeline', lambda captions,
                        config: seen.update(captions=captions, config=config) or 'pipe')
    pipe, data = D.demo()
    sets = 'unsafe-weapon', 'retain', 'pool-things'
    assert pipe == 'pipe' and seen['config'] == PretrainConfig(unet_channels=(32, 64))
    assert seen['captions'] == [c for name in sets for c in first(name, 64)]
    for name, (images, captions) in zip(sets, (data.unsafe, data.retain, data.pool['things'])):
        assert captions == first(name, 8) and (images == pictures(scenes(name, 8))).all()
    assert (data.unsafe_captions, data.retain_captions) == (first('unsafe-weapon', 8), first('retain', 8))
    assert list(data.pool) == ['things'] and len(D.demo_data('pipe', 3).unsafe_captions) == 3

    # each unsafe caption names the concept, no benign one does
    named = lambda name: [any(w in c for w in data.erase) for c in first(name, 64)]
    assert all(named('unsafe-weapon')) and not any(named('retain') + named('pool-things'))
