"""A profile in the formats of real models, through the stages: a single-file SD v1 checkpoint, I2P, a list of
prompts, COCO captions, NudeNet and MHSC. Everything is small and random; nothing is downloaded."""

import json, shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch, yaml
from diffusers import StableDiffusionPipeline
from huggingface_hub import constants

from resalign.studies import base, evaluators, table
from resalign.studies.models import cell_models, looked
from resalign.measure.building_blocks import make_mhsc
from resalign.measure.photographs import tiny_clip
from resalign.world.emoji import scenes, write_set
from tests.compvis import small, write_single_file

PHASES = ['before', 'subjects-lora', 'varied-full'] # of the four fine-tunings two: each data set, each algorithm


def made_up(real: Path) -> tuple:  # the profile; the pipeline in its checkpoint
    "What somebody would have downloaded"
    pipe = small('v1', real)
    pipe.save_pretrained(real / 'folder')
    write_single_file(pipe, 'v1', real / 'model.safetensors')
    shutil.copytree(real / 'folder', real / 'config', ignore=shutil.ignore_patterns('*.safetensors'))
    for i, name in enumerate(('unsafe', 'retain', 'subjects', 'varied', 'reference', 'down1', 'down2')):
        write_set(real / name, scenes('retain', 3, i))
    pd.DataFrame(
        dict(
            prompt=['a house', 'a car', 'a tree'],
            categories=['sexual', 'violence', 'hate, sexual'],
            sd_seed=[7, 8, 9],
            sd_guidance_scale=[7.0, 7.5, 3.0],
        )
    ).to_csv(real / 'i2p_benchmark.csv', index=False)
    (real / 'lines.txt').write_text('a robot\na boat\n')
    pd.DataFrame(dict(caption=['a red car', 'a blue fish'])).to_csv(real / 'coco.csv', index=False)
    tiny_clip(real / 'large', 14, 768)
    tiny_clip(real / 'base32', 32, 512)
    torch.manual_seed(0)
    torch.save(make_mhsc(768).state_dict(), real / 'sexual.pt')
    at = lambda name, **kw: dict(path=str(real / name), **kw)
    lora, full = dict(algorithm='lora', steps=2, batch=1, accumulation=2), dict(
        algorithm='full', lr=1e-5, steps=2, batch=1
    )
    return (
        dict(
            base=at('model.safetensors'),
            config=str(real / 'config'),
            size=64,
            precision='bfloat16',
            memory_gb=0.5,
            gradient_checkpointing=True,
            data={d: at(d) for d in ('unsafe', 'retain', 'subjects', 'varied', 'reference')},
            pool=dict(d1=at('down1'), d2=at('down2')),
            prompts=dict(
                IP=at('i2p_benchmark.csv', kind='implicit', reader='i2p', category='sexual', images=2),
                US=at('lines.txt', kind='explicit', reader='lines', images=1),
                benign=at('coco.csv', kind='benign', reader='coco'),
            ),
            evaluators={
                'nudenet': dict(path='pip:nudenet>=3.4'),
                'clip-large': at('large'),
                'clip-score': at('base32'),
                'mhsc': at('sexual.pt'),
            },
            unlearn=dict(
                resalign=dict(
                    steps=2, J=1, unsafe_batch=1, retain_batch=1, pool=dict(folders=['d1', 'd2'], steps=[2], batch=1)
                )
            ),
            finetune={f'{d}-{a}': s for d in ('subjects', 'varied') for a, s in dict(lora=lora, full=full).items()},
            evaluate=dict(steps=2, guidance=5.0),
        ),
        pipe,
    )


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    "A repository with params.yaml alone, and the stages one after the other"
    there, real = tmp_path_factory.mktemp('repository'), tmp_path_factory.mktemp('real')
    profile, pipe = made_up(real)
    (there / 'settings.ini').touch()
    (there / 'params.yaml').write_text(yaml.safe_dump(dict(profile='mock', profiles=dict(mock=profile))))
    with pytest.MonkeyPatch.context() as m:
        m.chdir(there)
        m.delenv('RESALIGN_PROFILE', raising=False)
        m.setattr(constants, 'HF_HUB_OFFLINE', True)
        base.make_base(smoke=False)
        evaluators.make_evaluators(smoke=False)
        grid = table.models(seeds=[0])
        ((name, cell),) = grid.items()
        assert set(cell['finetunings']) == set(profile['finetune']) and cell['concept'] is None
        cell['finetunings'] = {phase: cell['finetunings'][phase] for phase in PHASES[1:]}
        out = there / 'results/runs/table' / name
        out.mkdir(parents=True)
        table.run(out, **cell)
        of = {k: cell[k] for k in ('method', 'seed', 'settings', 'concept', 'finetunings')}
        models = cell_models(**of)
        made = sorted(there.glob('outs/*/*/key.json'))
        evaluated = {phase: looked(model, cell['look'] | dict(concept=None)) for phase, model in models.items()}
        assert sorted(there.glob('outs/*/*/key.json')) == made  # each was there
        inputs, rows = table.inputs(**cell), table.collect(grid)
        folders = {phase: model.folder for phase, model in models.items()}
    return SimpleNamespace(
        there=there, pipe=pipe, out=out, models=folders, evaluated=evaluated, inputs=inputs, rows=rows
    )


def opened(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def told(path):
    return json.loads(path.read_text())


def test_the_base_is_the_checkpoint(ran):
    "UNet and VAE to what float16 keeps, the text encoder to the bit"
    there, pipe = ran.there, ran.pipe
    assert {
        r['part']: (r['share'], r['missing'], r['unexpected']) for r in told(there / 'outs/base/coverage.json')
    } == dict.fromkeys(['unet', 'vae', 'text_encoder'], (1, [], []))
    base = opened(there / 'outs/base')
    for n in ('unet', 'vae', 'text_encoder'):
        kept, want = base.components[n].state_dict(), pipe.components[n].state_dict()
        assert not [
            (n, k) for k, v in want.items() if not torch.equal(kept[k], v if n == 'text_encoder' else v.half().float())
        ]


def test_it_was_unlearned_and_fine_tuned_as_the_profile_says(ran):
    "In low precision; attention alone moved"
    there = ran.there
    record = told(ran.models['before'] / 'record.json')
    assert (
        record['compute']['dtype'],
        record['compute']['gradient_checkpointing'],
        record['settings']['steps'],
        [Path(p).name for p in record['pool']],
    ) == ('bfloat16', True, 2, ['down1', 'down2'])
    assert (
        told(ran.models['before'] / 'cost.json')['cost']['steps'] == 2
        and len(pd.read_csv(ran.models['before'] / 'solves.csv')) == 2
    )
    pipe, base = opened(ran.models['before']), opened(there / 'outs/base')
    moved = {k for k, v in pipe.unet.state_dict().items() if not torch.equal(v, base.unet.state_dict()[k])}
    assert moved and not [k for k in moved if not ('attn' in k and 'to_' in k)]
    assert np.isfinite(pipe('a car', num_inference_steps=2, output_type='np').images).all()
    tuned = {p: told(ran.models[p] / 'record.json') for p in PHASES[1:]}
    assert {
        p: (r['settings']['algorithm'], r['settings']['lr'] == 1e-5, Path(r['images']).name, r['compute']['dtype'])
        for p, r in tuned.items()
    } == {p: (p[-4:], p.endswith('full'), p[:-5], 'bfloat16') for p in PHASES[1:]}


def test_it_was_scored_by_detectors_of_photographs(ran):
    "Every phase, on the prompts of the profile with seeds and guidance of their own"
    there = ran.there
    # pictures are drawn in the device's precision, whatever the training's
    drawn_in = 'float16' if torch.cuda.is_available() else 'float32'
    assert told(ran.evaluated['before'] / 'record.json')['compute']['dtype'] == drawn_in
    rows = [
        ('a house', 'implicit', 7, 7.0),
        ('a house', 'implicit', 10_014, 7.0),
        ('a tree', 'implicit', 9, 3.0),
        ('a tree', 'implicit', 10_016, 3.0),
        ('a robot', 'explicit', 0, None),
        ('a boat', 'explicit', 1, None),
        ('a red car', 'benign', 0, None),
        ('a blue fish', 'benign', 1, None),
    ]
    prompts = pd.read_csv(there / 'outs/prompts.csv')
    assert [
        tuple(r)
        for r in prompts[['prompt', 'kind', 'seed', 'guidance']]
        .astype(object)
        .where(lambda t: t.notna(), None)
        .to_numpy()
    ] == rows
    for phase in PHASES:
        scores = pd.read_csv(ran.evaluated[phase] / 'scores.csv')
        assert set(scores.detector) == {'nudenet', 'mhsc', 'clip-score'}
        for _, one in scores.groupby('detector'):
            assert sorted(zip(one.prompt, one.kind, one.seed)) == sorted(r[:3] for r in rows), phase
    summary = pd.read_csv(ran.out / 'summary.csv')
    assert list(summary.phase.unique()) == PHASES
    kept = pd.read_csv(ran.out / 'scores.csv')
    assert list(kept)[4:] == PHASES and len(kept) == 3 * len(rows) and kept[PHASES].notna().all().all()
    for phase in PHASES:
        whole = pd.read_csv(ran.evaluated[phase] / 'summary.csv')
        mine = summary[summary.phase == phase].set_index('metric').value
        assert dict(mine) == pytest.approx(dict(zip(whole.metric, whole.value)), nan_ok=True), phase


def test_the_table_is_made_of_it(ran):
    "The profile's metrics with their detectors, of each model and over models; what it read is part of its key"
    rows = ran.rows
    assert {'IP': 'nudenet', 'explicit': 'nudenet', 'US': 'mhsc', 'CLIP': 'clip-score'}.items() <= dict(
        zip(rows.metric, rows.detector)
    ).items()
    assert set(zip(rows.phase, rows.finetune)) == {('before', 'none'), ('subjects', 'lora'), ('varied', 'full')}
    assert set(rows.method) == {'resalign'} and list(rows.seed.unique()) == [0, 'all']
    one, over = (rows[rows.seed == seed].set_index(['metric', 'phase']).value for seed in (0, 'all'))
    for key in [(m, p) for m in ('IP', 'US', 'CLIP') for p in ('before', 'subjects', 'varied')]:
        # of prompts that have several pictures, a rate over models weighs prompts alike
        assert over[key] == pytest.approx(one[key]), key
    files = {Path(path).name for path in ran.inputs}
    assert {'base', 'evaluators', 'prompts.csv', 'unsafe', 'retain', 'reference', 'down1', 'down2', 'varied'} <= files
