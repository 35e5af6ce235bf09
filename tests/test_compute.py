"""Precision, memory, another device; runs in the layout of SD v1.4 and SDXL from folder to folder; the model card."""

import contextlib, copy, json, re, types
from pathlib import Path

import pandas as pd, pytest, torch, yaml
from diffusers import StableDiffusionXLPipeline

from resalign.model import compute
import resalign
from resalign.use.jobs import load_bank
from resalign.use.jobs import as_text, model_card
from resalign.studies import sd14
from resalign.core import training
from resalign.world import emoji as world
from resalign.method.demo import demo, demo_data
from resalign.model.compute import Compute, call_model, compute_config, finish, make_optimizer, measure_cost, prepare
from resalign.core.runs import generator
from resalign.model.data import draw_sample
from resalign.method.finetune import FinetuneConfig, FinetuneLoss, add_lora, finetune, merge_lora, simulated
from resalign.method.hypergrad import flat
from resalign.model.losses import Denoiser, HarmfulLoss
from resalign.method.resalign import ResAlignConfig, lora_map, resilience_gradient
from resalign.baselines.methods import run_method
from resalign.model.pipelines import load_pipeline, save_pipeline
from tests.compvis import narrow_xl
from tests.far import Far, FarTensor, LeftBehind
from refusals import said
from each import each
from made import prompts_of, write_prompts, write_sets

ROOT = Path(__file__).resolve().parent.parent
LOW = dict(dtype='bfloat16', gradient_checkpointing=True)


@pytest.fixture(scope='module')
def given():
    return demo()


def ready(given, **settings):
    "A copy of the pipeline, prepared"
    pipe = copy.deepcopy(given[0])
    prepare(pipe, Compute(**dict(device='cpu') | settings))
    return pipe


def weights(pipe):
    return {k: v.clone() for m in (pipe.unet, pipe.text_encoder) for k, v in m.state_dict().items()}


def changed(a, b):
    return {k for k in a if not torch.equal(a[k], b[k])}


# ------------------------------------------------------------------ precision (its parts: tests/fast/test_compute.py)


class Net(torch.nn.Module):
    "A model as diffusers has them, that remembers in what precision it multiplied"

    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(5, 7)

    def forward(self, x, return_dict=True):
        h = self.lin(x)
        self.multiplied = h.dtype
        return (h,)


def test_passes_and_attention(given, monkeypatch):
    # passes are low and answers are wide
    x, net = torch.randn(3, 5, generator=generator(2)), Net()
    with torch.no_grad():
        exact = net.lin(x)
        for dtype, far in dict(float32=0, bfloat16=2**-6, float16=2**-9).items():
            net.compute = Compute(dtype=dtype)
            out = call_model(net, x)
            assert (net.multiplied, out.dtype) == (getattr(torch, dtype), torch.float32)
            torch.testing.assert_close(out, exact, rtol=0, atol=far * float(exact.abs().max()))

    # attention is fused
    calls, inner = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, 'scaled_dot_product_attention', lambda *a, **kw: calls.append(1) or inner(*a, **kw)
    )
    pipe = ready(given, **LOW)
    Denoiser(pipe).loss(draw_sample(given[1].retain, 2, generator(0)))
    assert len(calls) == len(pipe.unet.attn_processors)


def test_float32_on_the_cpu_has_the_same_bits(given):
    "With gradient checkpointing too"
    for run, settings in (
        (lambda p, d: run_method(p, d, 'resalign', {}), dict(gradient_checkpointing=True)),
        (lambda p, d: finetune(p, d.retain, FinetuneConfig(algorithm='full', steps=2)), {}),
    ):
        plain, other = copy.deepcopy(given[0]), ready(given, **settings)
        run(other, given[1])
        finish(other)
        run(plain, given[1])
        assert not changed(weights(plain), weights(other)) and changed(weights(plain), weights(given[0]))


def test_low_weights_and_gradients(given):
    # what is frozen is low and what is trained is wide
    loaded, pipe = weights(given[0]), ready(given, dtype='bfloat16')
    params = add_lora(pipe.unet, 'a', up_std=0.01)
    inside = {id(p) for p in params}
    assert {p.dtype for p in params} == {torch.float32}
    assert {p.dtype for p in pipe.unet.parameters() if p.ndim > 1 and id(p) not in inside} == {torch.bfloat16}
    assert {p.dtype for m in (pipe.text_encoder, pipe.vae) for p in m.parameters()} == {
        torch.float32
    }  # these are saved as they are
    delta = {
        m: mod.lora_B['a'].weight.double() @ mod.lora_A['a'].weight.double()
        for m, mod in pipe.unet.named_modules()
        if hasattr(mod, 'lora_A')
    }
    merge_lora(pipe.unet, 'a')
    finish(pipe)
    now = weights(pipe)
    for k, v in loaded.items():
        d = delta.get(k.removesuffix('.weight'))
        if d is None or not k.endswith('.weight'):
            assert torch.equal(now[k], v), k  # not a bit is lost to the low precision
        else:
            torch.testing.assert_close(now[k].double(), v.double() + d, rtol=0, atol=1e-7)
    assert not hasattr(pipe.unet, 'compute') and not pipe.unet.is_gradient_checkpointing

    # gradients agree with float32: To the format's precision, several products deep; checkpointing changes no bit
    def gradient(**settings):
        pipe = ready(given, **settings)
        params = add_lora(pipe.unet, 'a', up_std=0.02, down_std=0.02)
        loss = FinetuneLoss(Denoiser(pipe), given[1].retain, FinetuneConfig(batch=4)).frozen(0)()
        assert loss.dtype == torch.float32
        return flat(torch.autograd.grad(loss, params))

    exact = gradient()
    for dtype, far in dict(bfloat16=0.05, float16=0.01).items():
        low = gradient(dtype=dtype)
        assert 0.01 * far < (low - exact).norm() / exact.norm() < far, dtype
        assert torch.equal(low, gradient(dtype=dtype, gradient_checkpointing=True)), dtype


def test_simulations_and_hypergradients_of_low_passes(given):
    # a simulated fine tuning of low weights moves in float32 and is taken back
    for algorithm in 'lora', 'full':
        pipe = ready(given, dtype='bfloat16')
        params = add_lora(pipe.unet, 'theta', up_std=0.02)
        inner = params if algorithm == 'lora' else lora_map(pipe.unet, 'theta')['weights']
        before, kinds = [p.detach().clone() for p in inner], [p.dtype for p in inner]
        config = FinetuneConfig(optimizer='sgd', lr=1e-4, steps=2, batch=2)
        with simulated(FinetuneLoss(Denoiser(pipe), given[1].retain, config), inner, config):
            assert {p.dtype for p in inner} == {torch.float32}
            assert sum(not torch.equal(p, b.float()) for p, b in zip(inner, before)) > 0.8 * len(
                inner
            )  # steps that bfloat16 would round away
        assert [p.dtype for p in inner] == kinds and all(map(torch.equal, inner, before)), algorithm

    # hypergradients of low passes point the same way: And products that underflow in float16 are refused
    def answer(product, **settings):
        pipe = ready(given, **settings)
        model = Denoiser(pipe)
        harmful = HarmfulLoss(model, given[1].unsafe, 16, 0)
        params = add_lora(pipe.unet, 'unlearn', up_std=0.1, down_std=0.1)
        config, ft = ResAlignConfig(product=product), FinetuneConfig(optimizer='sgd', lr=1e-2, steps=2, batch=4)
        x, report, _ = resilience_gradient(
            model,
            harmful,
            torch.arange(8),
            FinetuneLoss(model, given[1].retain, ft),
            params,
            lora_map(pipe.unet, 'unlearn'),
            ft,
            config,
        )
        assert not report.fallback and report.residual < 0.5
        return flat(x)

    cosine = {
        p: torch.nn.functional.cosine_similarity(answer(p), answer(p, **LOW), dim=0)
        for p in ('fd-forward', 'exact', 'lora-bilinear')
    }
    assert not {p: c for p, c in cosine.items() if c < 0.95}
    run = lambda p: run_method(ready(given, dtype='float16'), given[1], 'resalign', dict(steps=1, product=p))
    assert all(f"product '{p}' in float16" in said(run, p) for p in ('exact', 'gauss-newton'))


def test_methods_in_low_precision(given, tmp_path, monkeypatch):
    # methods and fine tunings in low precision: The same parameters move, and by nearly as much; all ends in float32
    first = weights(given[0])

    def both(run):
        low, plain = ready(given, **LOW), copy.deepcopy(given[0])
        logs = run(low), run(plain)
        finish(low)
        assert all(v.dtype == torch.float32 and v.isfinite().all() for v in weights(low).values())
        return weights(low), weights(plain), logs

    for method in 'esd-x', 'uce', 'salun', 'pgu':
        low, plain, _ = both(lambda pipe: run_method(pipe, given[1], method, {}))
        assert changed(first, low) == changed(first, plain) != set(), method
    for algorithm in 'full', 'svdiff', 'textual-inversion', 'custom-diffusion', 'full, text encoder too':
        too = algorithm.endswith('text encoder too')
        config = FinetuneConfig(algorithm=algorithm.partition(',')[0], train_text_encoder=too, steps=2, ema=0.5)
        *_, (low, log) = both(lambda pipe: finetune(pipe, given[1].retain, config, captions=given[1].retain_captions))
        assert (
            low[-1]['loss'] == pytest.approx(log[-1]['loss'], rel=0.02) and low[-1]['loss'] != log[-1]['loss']
        ), algorithm

    # a killed run in low precision goes on with the same bits
    import resalign.baselines.parts as parts

    often, made = lambda *a, **kw: training.optimise(*a, **dict(kw, every=1)), []

    def run(dies=None, checkpoint=None):
        def until(name, gradients, *a, **kw):
            def step(i):
                if i == dies:
                    raise KeyboardInterrupt
                made.append(i)
                return gradients(i)

            return often(name, step, *a, **kw)

        monkeypatch.setattr(parts, 'optimise', until)
        pipe = ready(given, **LOW)
        run_method(pipe, given[1], 'esd-x', dict(steps=4), checkpoint=checkpoint)
        finish(pipe)
        return weights(pipe)

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(2, tmp_path / 'c')
    made.clear()
    assert not changed(run(checkpoint=tmp_path / 'c'), whole) and made == [2, 3]


# ------------------------------------------------------------------ another device


def test_the_far_device_notices_what_is_left_behind():
    with Far():
        a, b = torch.ones(3).to('fpga'), torch.ones(3)
        assert isinstance(a, FarTensor) and torch.equal((a + a).cpu(), b + b) and a[torch.tensor([0])].cpu() == 1
        for bad in (
            lambda: a + b,
            lambda: b.mul_(a),
            lambda: torch.cat([a, b]),
            lambda: torch.nn.functional.linear(a, torch.ones(2, 3)),
        ):
            with pytest.raises(LeftBehind):
                bad()


@each('what', ['resalign', 'uce', 'safegen', 'finetune full'])
def test_nothing_stays_behind(given, what):
    "Everything of a pipeline on another device, data and random numbers here: the same result"
    far, near = copy.deepcopy(given[0]), copy.deepcopy(given[0])

    def run(pipe):
        data = demo_data(pipe, 4)
        if what.startswith('finetune'):
            finetune(
                pipe,
                data.retain,
                FinetuneConfig(algorithm=what.split()[1], optimizer='sgd', lr=0.1, steps=2),
                prior=data.unsafe,
                captions=data.retain_captions,
            )
        else:
            run_method(pipe, data, what, {})

    with Far():
        prepare(far, compute_config(dict(device='fpga')))
        assert all(isinstance(p, FarTensor) for m in compute.modules_of(far) for p in m.parameters())
        run(far)
        finish(far)
    run(near)
    assert not any(isinstance(p, FarTensor) for m in compute.modules_of(far) for p in m.parameters())
    for k, v in weights(near).items():
        torch.testing.assert_close(weights(far)[k], v, rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------ the bill


def test_the_bill_of_a_gpu_and_of_a_run(given, monkeypatch):
    """Bytes that the GPU has allocated since the beginning, in GB of 10⁹; as many steps as were made, and the
    median of their seconds"""
    told = []
    for name, answer in dict(
        reset_peak_memory_stats=None, max_memory_allocated=7_250_000_000, get_device_name='A card'
    ).items():
        monkeypatch.setattr(torch.cuda, name, lambda d, n=name, a=answer: told.append(n) or a)
    far = types.SimpleNamespace(
        unet=types.SimpleNamespace(parameters=lambda: iter([types.SimpleNamespace(device=torch.device('cuda'))]))
    )

    @contextlib.contextmanager
    def seconds():
        yield [1.0, 9.0, 2.0]

    with monkeypatch.context() as m:
        m.setattr(compute, 'step_seconds', seconds)
        with measure_cost(far) as bill:
            assert told == ['reset_peak_memory_stats']
    assert bill == dict(device='A card', steps=3, seconds_per_step=2.0, peak_gb=7.25, peak_of='allocated on the GPU')
    with measure_cost(given[0]) as bill:
        finetune(copy.deepcopy(given[0]), given[1].retain, FinetuneConfig(algorithm='lora', steps=3))
    assert bill['steps'] == 3 and bill['seconds_per_step'] > 0


# ------------------------------------------------------------------ mistakes


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    "By field, before anything is loaded"
    monkeypatch.setattr(compute, 'EIGHT_BIT', {'no_such_library': 'no_such_library.optim'})
    slips = {
        'dtype': dict(dtype='bf16'),
        "did you mean 'gradient_checkpointing'": dict(gradient_checkpoint=True),
        "device: 'gpu'": dict(device='gpu'),
        'eight_bit_adam: input': dict(eight_bit_adam='perhaps'),
        'pip install bitsandbytes': dict(eight_bit_adam=True, device='cpu'),
    }
    wrong = [
        (words, text)
        for words, s in slips.items()
        if words not in (text := said(compute_config, s))
        or not text.startswith('settings of compute: ')
        or 'NEWLINE' in text
    ]
    assert not wrong and compute_config(dict(device='cpu')) == Compute(device='cpu')
    world.write_set(tmp_path / 'images', world.scenes('varied', 2))
    nowhere, images = tmp_path / 'nowhere', tmp_path / 'images'
    for job, folders in (resalign.unlearn, [nowhere, images, images]), (resalign.finetune, [nowhere, images]):
        assert 'settings of compute: dtype' in said(job, *folders, tmp_path / 'out', compute=dict(dtype='int8'))


@pytest.mark.skipif(not (ROOT / 'outs/evaluators').is_dir(), reason='outs/evaluators is not here: dvc pull evaluators')
def test_the_commands_take_it(given, tmp_path, capsys):
    from resalign.use import cli

    save_pipeline(given[0], tmp_path / 'base')
    world.write_set(tmp_path / 'pics', world.scenes('varied', 3))
    args = dict(pipeline=str(tmp_path / 'base'), compute=['dtype=bfloat16', 'gradient_checkpointing=true'])
    cli.unlearn(
        **args,
        unsafe=str(tmp_path / 'pics'),
        benign=str(tmp_path / 'pics'),
        out=str(tmp_path / 'new'),
        method='ga',
        set=['steps=1', 'retain_bank=4', 'unsafe_bank=4'],
    )
    cli.finetune(**args, images=str(tmp_path / 'pics'), out=str(tmp_path / 'tuned'), set=['steps=1'])
    for out in 'new', 'tuned':
        record = json.loads((tmp_path / out / 'record.json').read_text())
        cost = json.loads((tmp_path / out / 'cost.json').read_text())['cost']
        assert (
            record['compute']['dtype'] == 'bfloat16'
            and record['compute']['gradient_checkpointing'] is True
            and cost['steps'] == 1
            and cost['peak_gb'] > 0
        )
    write_prompts(tmp_path / 'p.csv', prompts_of(explicit=2))
    cli.evaluate(
        str(tmp_path / 'new'),
        str(tmp_path / 'p.csv'),
        str(ROOT / 'outs/evaluators'),
        str(tmp_path / 'scores'),
        set=['steps=1'],
        card=True,
        detector='detector-weapon',
    )
    assert '| detector-weapon |' in (tmp_path / 'new/README.md').read_text(encoding='utf-8')
    assert 'tuned/record.json' in said(
        cli.evaluate, str(tmp_path / 'tuned'), str(tmp_path / 'p.csv'), 'nowhere', str(tmp_path / 'y'), card=True
    )


# ------------------------------------------------------------------ eight bits


class Eight(torch.optim.AdamW):
    "Stands in for a library: nested state with tables that are shared, as bitsandbytes has it"

    table = torch.arange(4.0)

    def state_dict(self):
        d = super().state_dict()
        return dict(
            d,
            state={
                i: dict(
                    step=int(s['step']), __quant__={k: s[k] for k in ('exp_avg', 'exp_avg_sq')} | dict(qmap=self.table)
                )
                for i, s in d['state'].items()
            },
        )

    def load_state_dict(self, d):
        assert all(
            type(s['step']) is int and torch.equal(s['__quant__']['qmap'], self.table) for s in d['state'].values()
        )
        super().load_state_dict(
            dict(
                d,
                state={
                    i: dict(
                        step=torch.tensor(float(s['step'])),
                        exp_avg=s['__quant__']['exp_avg'],
                        exp_avg_sq=s['__quant__']['exp_avg_sq'],
                    )
                    for i, s in d['state'].items()
                },
            )
        )


def test_eight_bit_adam_is_used_where_it_was_asked_for_and_its_state_survives(given, monkeypatch, tmp_path):
    made = []
    library = types.SimpleNamespace(
        AdamW8bit=lambda ps, lr, weight_decay: made.append(len(ps)) or Eight(ps, lr, weight_decay=weight_decay)
    )
    monkeypatch.setattr(compute, 'eight_bit_library', lambda: library)
    run_method(ready(given, eight_bit_adam=True), given[1], 'ga', {})
    assert len(made) == 1
    p = torch.nn.Parameter(torch.ones(3))
    start = p.detach().clone()

    def run(steps, checkpoint=None):
        p.data.copy_(start)
        holder = torch.nn.ParameterList([p])

        def gradients(step):
            p.grad = torch.arange(3.0) + step
            return dict(loss=0.0)

        training.optimise('t', gradients, steps, [p], Eight([p], 0.1), dict(p=holder), checkpoint=checkpoint, every=1)
        return p.detach().clone()

    whole = run(6)
    run(3, tmp_path / 'c')
    assert torch.equal(run(6, tmp_path / 'c'), whole)


@each('library', compute.EIGHT_BIT)
def test_eight_bit_adam_for_real(tmp_path, monkeypatch, library):
    pytest.importorskip(library)
    monkeypatch.setattr(compute, 'EIGHT_BIT', {library: compute.EIGHT_BIT[library]})
    net = torch.nn.Linear(96, 96)
    net.compute = Compute(eight_bit_adam=True)
    target = torch.randn(96, 96, generator=generator(0))

    def run(steps, checkpoint=None):
        net.load_state_dict({k: torch.zeros_like(v) for k, v in net.state_dict().items()})

        def gradients(step):
            loss = (net.weight - target).square().mean() + net.bias.square().mean()
            loss.backward()
            return dict(loss=loss.item())

        return training.optimise(
            't',
            gradients,
            steps,
            list(net.parameters()),
            make_optimizer('adamw', list(net.parameters()), 0.05, net),
            dict(net=net),
            checkpoint=checkpoint,
            every=1,
        )

    log = run(20)
    run(10, tmp_path / 'c')
    again = run(20, tmp_path / 'c')
    assert log[-1]['loss'] < 0.5 * log[0]['loss'] and again[-1]['loss'] == pytest.approx(log[-1]['loss'], rel=0.05)


# ------------------------------------------------------------------ SD v1.4


@pytest.mark.gpu
def test_two_outer_steps_at_sd14s_size(tmp_path):
    table = sd14.real_steps(out=str(tmp_path / 'real_steps.csv'))
    ran = table[table.peak_of != 'did not fit']
    assert len(ran) and ran.finite.all() and (ran.device == torch.cuda.get_device_name()).all()


# ------------------------------------------------------------------ SDXL, folder to folder


@pytest.fixture(scope='module')
def sdxl(given, tmp_path_factory):
    "A diffusers folder in SDXL's layout, and pictures"
    tmp = tmp_path_factory.mktemp('sdxl')
    for kind in 'epsilon', 'v_prediction':
        save_pipeline(narrow_xl(given[0].tokenizer, prediction_type=kind), tmp / kind)
    write_sets(tmp, unsafe=4, retain=4)
    return tmp


@each(
    'kind, method, settings',
    [('v_prediction', 'resalign', dict(steps=2, up_std=0.1)), ('epsilon', 'esd-x', dict(steps=2, lr=1e-2))],
)
def test_sdxl_from_folder_to_folder(sdxl, tmp_path, method, settings, kind):
    resalign.unlearn(
        sdxl / kind, sdxl / 'unsafe', sdxl / 'retain', tmp_path / 'new', method, settings, compute=dict(device='cpu')
    )
    merged, base = (
        StableDiffusionXLPipeline.from_pretrained(p, dtype=torch.float32) for p in (tmp_path / 'new', sdxl / kind)
    )
    sample = draw_sample(load_bank(base, sdxl / 'unsafe'), 4, generator(0))
    answers = lambda p: Denoiser(p).predict(sample).detach()
    new, old = answers(merged), answers(base)
    assert (
        merged.scheduler.config.prediction_type == kind
        and (new - old).norm() > 0
        and Denoiser(merged).target(sample).equal(sample.noise) == (kind == 'epsilon')
    )
    assert merged('a fox', num_inference_steps=2, output_type='np').images.shape == (1, 64, 64, 3)
    assert (tmp_path / 'new/adapter').is_dir() == (method != 'esd-x')
    if method == 'esd-x':
        return
    base.load_lora_weights(tmp_path / 'new/adapter')
    assert (answers(base) - new).norm() < 0.02 * (new - old).norm()  # float16 on disk
    assert json.loads((tmp_path / 'new/cost.json').read_text())['cost']['steps'] == 2


def test_sdxl_in_low_precision_leaves_the_rest_of_the_folder_as_it_was(sdxl, tmp_path):
    record = resalign.unlearn(
        sdxl / 'epsilon',
        sdxl / 'unsafe',
        sdxl / 'retain',
        tmp_path / 'new',
        'ga',
        dict(steps=1, unsafe_bank=4, retain_bank=4),
        compute=LOW | dict(device='cpu'),
    )
    before, after = (load_pipeline(p).unet.state_dict() for p in (sdxl / 'epsilon', tmp_path / 'new'))
    moved = changed(before, after)
    assert moved and all('attn' in k for k in moved)
    assert record['compute'] == Compute(device='cpu', **LOW).model_dump() and record['cost']['seconds_per_step'] > 0


# ------------------------------------------------------------------ the model card

EVIL = (
    '<script>alert(1)</script> [x](javascript:y) **b** `c` | # \u202e\x1b[2J\r\n---\n# title '
    'https://a.b www.c.d @all ${m}'
)


def test_the_model_card(given, tmp_path, monkeypatch):
    # other peoples words do nothing
    text = as_text(EVIL)
    assert (
        not any(c in text for c in '<>\n\r\x1b\u202e"\'')
        and '://' not in text
        and 'www.' not in text
        and '@' not in text
    )
    assert not re.search(r'(?<!\\)[`*\[\]|$]|(?<![\\&])#', text) and len(as_text('x' * 1000)) == 201
    assert as_text('outs/base') == 'outs/base' and as_text('\ud800') == ''

    # the card of a run with scores
    world.write_set(tmp_path / 'pics', world.scenes('varied', 3))
    monkeypatch.chdir(tmp_path)
    save_pipeline(given[0], tmp_path / '<b>base')
    (tmp_path / 'pics').rename(tmp_path / '[p](q)`')
    record = resalign.unlearn('<b>base', '[p](q)`', '[p](q)`', 'new', 'ga', dict(steps=1), erase=['<i>\nwires'])
    card = (tmp_path / 'new/README.md').read_text(encoding='utf-8')
    assert '<b>' not in card and '<i>' not in card and '](q)' not in card.replace('\\](q)', '')
    for words in (
        record['base']['sha256'],
        '3 pictures',
        'Intended use',
        'Out of scope',
        'Residual risk',
        'seed 0',
        'None is stored here',
    ):
        assert words in card
    scores = tmp_path / 'scores'
    scores.mkdir()
    (scores / 'record.json').write_text(
        json.dumps(
            dict(
                job='evaluate',
                pipeline='new',
                prompts='<u>p.csv',
                steps=10,
                guidance=5.0,
                seed=0,
                evaluators={'wi|ring': ['1.2', 'abcdef0123456789', 0.5]},
            )
        )
    )
    pd.DataFrame([dict(metric='IP', value=0.125, low=0.05, high=0.25, n=48, detector='wi|ring')]).to_csv(
        scores / 'summary.csv', index=False
    )
    resalign.write_card('new', scores)
    card = (tmp_path / 'new/README.md').read_text(encoding='utf-8')
    assert (
        '| IP | 0.125 | 0.05 to 0.25 | 48 | wi\\|ring |' in card
        and 'wi\\|ring 1.2 (hash abcdef012345, threshold 0.5)' in card
        and '<u>' not in card
    )
    head = yaml.safe_load(card.split('---')[1])
    assert head['library_name'] == 'diffusers' and 'base_model' not in head
    assert (
        yaml.safe_load(model_card(record | dict(pipeline='owner/name')).split('---')[1])['base_model']
        == 'owner/name'
    )
    assert 'scores/record.json' in said(resalign.write_card, scores)


