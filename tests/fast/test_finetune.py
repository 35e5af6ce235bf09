"Fine-tuning and its simulation against plain loops: every number of the log and of the weights."
from dataclasses import replace
from types import SimpleNamespace
import pytest, torch
from diffusers import FlowMatchEulerDiscreteScheduler
from pydantic import ValidationError
from resalign.model.compute import to_low_precision
from resalign.core.settings import UserError
from resalign.model.data import Bank
from resalign.method.finetune import (ALGORITHMS, FinetuneConfig, FinetuneLoss, MovingAverage, adapter_params, add_lora,
                                      finetune, merge_lora, simulated)
from resalign.model.losses import Denoiser
import toy_finetune as toy
from toy_finetune import Rule, descent, loss_at, toy_bank, toy_pipe, weights
from each import each


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


BANK, PRIOR = 0, 7 # seeds of the pictures

def bank(seed=BANK):
    torch.set_default_dtype(torch.float64)
    return Bank(*toy_bank(seed=seed))

def close(a, b):
    assert a.keys() == b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-8, atol=1e-10, msg=lambda m: f'{k}: {m}')

def same_log(log, said):
    assert [list(r) for r in log] == [['step', 'loss', 'grad_norm']]*len(said)
    for row, expected in zip(log, said): assert row == pytest.approx(expected, rel=1e-8)

class Scheduled(Rule):
    "A learning rate a step"
    def __init__(self, kind, rates):
        super().__init__(kind, rates[0])
        self.rates = rates

    def __call__(self, w, g):
        self.lr = self.rates[self.n]
        return super().__call__(w, g)

def reference(
    kind='sgd',
    lr=0.05,
    steps=3,
    batch=3,
    accumulation=1,
    prior_weight=0.0,
    seed=0,
    clip=1.0,
    decay=0.0,
    start=None,
    names=(),
):
    def loss(w, k):
        return loss_at(w, toy_bank(), k, batch, toy_bank(seed=PRIOR), prior_weight, seed, names)

    rule = Scheduled(kind, lr) if isinstance(lr, list) else Rule(kind, lr)
    return descent(start or weights(toy_pipe()), loss, rule, steps, accumulation, clip, decay)


# ------------------------------------------------------------------ settings

def test_settings():
    # defaults are the smoke setting
    assert FinetuneConfig().model_dump() == dict(
        algorithm='lora',
        optimizer='adamw',
        lr=1e-3,
        steps=5,
        batch=4,
        rank=4,
        prior_weight=0.0,
        accumulation=1,
        lr_scheduler='constant',
        warmup=0,
        ema=0.0,
        token='<new>',
        train_text_encoder=False,
        seed=0,
    )
    assert set(ALGORITHMS) == {'full', 'lora', 'custom-diffusion', 'svdiff', 'textual-inversion'}

    # bounds of settings
    inside = dict(lr=[1e-12], steps=[1], batch=[1], rank=[1], prior_weight=[0., 3.], accumulation=[1], ema=[0., .999])
    outside = dict(
        lr=[0.0, -1.0],
        steps=[0],
        batch=[0],
        rank=[0],
        prior_weight=[-1e-9],
        accumulation=[0],
        ema=[1.0, -0.1],
        algorithm=['dreambooth'],
        optimizer=['lion'],
        lr_scheduler=['sqrt'],
        warmup=[-1],
    )
    for k, values in inside.items(): assert [getattr(FinetuneConfig(**{k: v}), k) for v in values] == values
    for k, values in outside.items():
        for v in values:
            with pytest.raises(ValidationError) as e: FinetuneConfig(**{k: v})
            assert e.value.errors()[0]['loc'] == (k,)

    # prior preservation without pictures is refused
    with pytest.raises(UserError, match='prior_weight'):
        finetune(toy_pipe(), bank(), FinetuneConfig(algorithm='full', prior_weight=0.1))

    # batches of a step
    assert [list(FinetuneConfig(accumulation=n).batches(step)) for n, step in ((1, 0), (1, 4), (3, 0), (3, 2))] == [
        [0],
        [4],
        [0, 1, 2],
        [6, 7, 8],
    ]


# ------------------------------------------------------------------ finetune, all of the weights

@each('kind', ['sgd', 'adam', 'adamw'])
def test_full_equals_the_written_out_optimizer(kind):
    pipe = toy_pipe()
    log = finetune(pipe, bank(), FinetuneConfig(algorithm='full', optimizer=kind, lr=.05, steps=4, batch=3))
    trail, said = reference(kind, steps=4)
    assert said[0]['grad_norm'] > 1.1 # clipping takes part
    same_log(log, said)
    close(weights(pipe), trail[-1])
    assert not any(p.requires_grad for p in pipe.unet.parameters())

def test_full_moves_weights_that_were_frozen():
    pipe = toy_pipe()
    pipe.unet.requires_grad_(False)
    start = weights(pipe)
    finetune(pipe, bank(), FinetuneConfig(algorithm='full', lr=.05, steps=1, batch=3))
    assert not any(torch.equal(start[k], v) for k, v in weights(pipe).items())

def test_a_gradient_shorter_than_1_is_left_alone_and_a_longer_one_is_shortened_to_1():
    for prior_weight, longer in (0., False), (300., True):
        start = weights(toy_pipe(size=.1))
        pipe = toy_pipe(size=.1)
        log = finetune(
            pipe,
            bank(),
            FinetuneConfig(algorithm='full', optimizer='sgd', lr=0.5, steps=1, batch=3, prior_weight=prior_weight),
            prior=bank(PRIOR),
        )
        moved = toy.norm({k: v - start[k] for k, v in weights(pipe).items()})
        assert (log[0]['grad_norm'] > 1) == longer
        assert moved == pytest.approx(.5*min(1., log[0]['grad_norm']), rel=1e-5)

@each('changes, written', [
    (dict(steps=2, prior_weight=.3), dict(steps=2, prior_weight=.3)), # of pictures that it draws by itself
    (dict(steps=3, batch=2, accumulation=2), dict(batch=2, accumulation=2)), # those of 2k and 2k + 1, averaged
    (dict(steps=2, seed=5), dict(steps=2, seed=5)),
    (dict(steps=4, warmup=2), dict(steps=4, lr=[0., .025, .05, .05])),
    (dict(steps=4, lr_scheduler='linear'), dict(steps=4, lr=[.05, .0375, .025, .0125])),
    (dict(steps=5, lr_scheduler='cosine', warmup=1), dict(steps=5, lr=[0., .05, .05*(.5 + .5**1.5), .025, .05*(.5 - .5**1.5)])),
    (dict(steps=4, ema=.7), dict(steps=4, decay=.7))]) # the average is what is kept
def test_each_setting_is_the_written_out_loops(changes, written):
    pipe = toy_pipe()
    config = FinetuneConfig(**dict(algorithm='full', optimizer='sgd', lr=.05, batch=3) | changes)
    log = finetune(pipe, bank(), config, prior=bank(PRIOR) if config.prior_weight else None)
    trail, said = reference(**written)
    same_log(log, said)
    close(weights(pipe), trail[-1])


def test_average_by_the_formula():
    p = torch.nn.Parameter(torch.tensor([2.]))
    none = MovingAverage([p], 0.)
    none.update()
    none.copy_to_params()
    assert none.modules() == {} and p.item() == 2.
    average, expected = MovingAverage([p], .9), None
    for value in 3., 5., -1.:
        p.data.fill_(value)
        average.update()
        expected = value if expected is None else .9*expected + .1*value
    assert next(average.modules()['ema'].parameters()).item() == pytest.approx(expected)
    average.copy_to_params()
    assert p.item() == pytest.approx(expected)

def test_watching_and_going_on(tmp_path):
    # watch is called before the first step and after each
    pipe, seen, first = toy_pipe(), [], []
    def watch(n):
        seen.append(n)
        first.append(pipe.unet.norm.weight[0].item())
    finetune(pipe, bank(), FinetuneConfig(algorithm='full', optimizer='sgd', lr=.05, steps=3, batch=3), watch=watch)
    trail, _ = reference()
    assert seen == [0, 1, 2, 3]
    assert first == pytest.approx(
        [weights(toy_pipe())['norm.weight'][0].item()] + [w['norm.weight'][0].item() for w in trail]
    )

    # a checkpoint holds the average too and a longer run goes on from it
    config = FinetuneConfig(algorithm='full', optimizer='adam', lr=.05, steps=2, batch=3, ema=.7)
    finetune(toy_pipe(), bank(), config, checkpoint=tmp_path/'c')
    pipe = toy_pipe()
    log = finetune(pipe, bank(), config.model_copy(update=dict(steps=4)), checkpoint=tmp_path/'c')
    trail, said = reference('adam', steps=4, decay=.7)
    same_log(log, said)
    close(weights(pipe), trail[-1])


# ------------------------------------------------------------------ the sample

def predictions(pipe): return FinetuneLoss(Denoiser(pipe), bank(), FinetuneConfig(batch=3))

@each('prediction', ['epsilon', 'v_prediction'])
def test_the_loss_is_the_formulas(prediction):
    pipe = toy_pipe(prediction=prediction)
    loss = FinetuneLoss(Denoiser(pipe), bank(), FinetuneConfig(batch=3))
    expected = toy.denoising(weights(pipe), toy.drawn(toy_bank(), 3, toy.stream(0, 'finetune', 4)), prediction)
    assert loss.frozen(4)().item() == pytest.approx(expected.item(), rel=1e-9)

def test_a_sample_belongs_to_seed_names_what_and_step():
    def drawn(seed=0, names=(), step=0, what='finetune'):
        s = FinetuneLoss(Denoiser(toy_pipe()), bank(), FinetuneConfig(batch=3, seed=seed), names).draw(
            bank(), step, what
        )
        return s, toy.drawn(toy_bank(), 3, toy.stream(seed, *names, what, step))
    seen = []
    for asked in dict(), dict(seed=1), dict(names=('a',)), dict(names=('a', 2)), dict(step=1), dict(what='prior'):
        s, (z, noise, t, text) = drawn(**asked)
        assert all(map(torch.equal, (s.z, s.noise, s.t, s.text), (z, noise, t, text))), asked
        assert torch.equal(s.z, drawn(**asked)[0].z), asked
        assert not any(torch.equal(s.noise, other) for other in seen), asked
        seen.append(s.noise)

def test_a_loss_of_its_sample():
    # a frozen loss is a function of the parameters alone
    pipe = toy_pipe()
    loss = predictions(pipe).frozen(0)
    first = loss().item()
    assert loss().item() == first
    pipe.unet.norm.weight.data.mul_(2.)
    assert loss().item() == pytest.approx(loss_at(weights(pipe), toy_bank(), 0, 3).item()) != first

    # residuals are prediction minus target
    pipe = toy_pipe()
    z, noise, t, text = toy.drawn(toy_bank(), 3, toy.stream(0, 'finetune', 1))
    a = toy.alphas()[t][:, None, None, None]
    expected = (
        torch.stack([toy.predicted(weights(pipe), *row) for row in zip(a.sqrt() * z + (1 - a).sqrt() * noise, t, text)])
        - noise
    )
    torch.testing.assert_close(predictions(pipe).residuals(1)(), expected.flatten(), rtol=1e-9, atol=1e-12)

    # the samples captions are dressed and the priors are not
    dressed = []
    def encode_text(s):
        dressed.append(s.index)
        return replace(s, text=s.text*0)
    plain = [torch.zeros_like(t) if i == 2 else t for i, t in enumerate(toy_bank())]
    pipe = toy_pipe()
    loss = FinetuneLoss(
        Denoiser(pipe), bank(), FinetuneConfig(batch=3, prior_weight=0.3), prior=bank(PRIOR), encode_text=encode_text
    )
    expected = loss_at(weights(pipe), plain, 1, 3, toy_bank(seed=PRIOR), .3)
    assert loss.frozen(1)().item() == pytest.approx(expected.item(), rel=1e-9)
    assert len(dressed) == 1

@each('prior_weight', [0., .3])
def test_several_samples_are_averaged_and_residuals_have_the_loss_as_their_mean_square(prior_weight):
    pipe = toy_pipe()
    loss = FinetuneLoss(
        Denoiser(pipe), bank(), FinetuneConfig(batch=3, prior_weight=prior_weight), ('x',), prior=bank(PRIOR)
    )
    each = [
        loss_at(weights(pipe), toy_bank(), k, 3, toy_bank(seed=PRIOR), prior_weight, names=('x',)).item()
        for k in (2, 3, 5)
    ]
    assert loss.frozen(3)().item() == pytest.approx(each[1], rel=1e-9)
    assert loss.frozen(2, 3, 5)().item() == pytest.approx(sum(each)/3, rel=1e-9)
    r = loss.residuals(2, 3, 5)()
    assert r.shape == (3*3*8*(1 + bool(prior_weight)),)
    assert r.square().mean().item() == pytest.approx(sum(each)/3, rel=1e-9)


# ------------------------------------------------------------------ the simulation

def simulation(kind='sgd', lr=.05, steps=3, names=('draw', 1), **settings):
    pipe, config = (
        toy_pipe(),
        FinetuneConfig(algorithm='full', optimizer=kind, lr=lr, steps=steps, batch=3, seed=2, **settings),
    )
    return (
        pipe,
        FinetuneLoss(Denoiser(pipe), bank(), config, names, prior=bank(PRIOR)),
        list(pipe.unet.parameters()),
        config,
    )


@each('kind', ['sgd', 'adam', 'adamw'])
def test_simulated_ends_where_the_unclipped_loop_ends_and_takes_all_of_it_back(kind):
    pipe, loss, params, config = simulation(kind, prior_weight=.3)
    before, start = [p.detach().clone() for p in params], weights(pipe)
    for p in params[::2]: p.requires_grad_(False)
    with simulated(loss, params, config) as theta:
        trail, said = reference(kind, prior_weight=.3, seed=2, names=('draw', 1), clip=None)
        assert said[0]['grad_norm'] > 1.1 # clipping would be noticed
        close(weights(pipe), trail[-1])
        assert all(map(torch.equal, theta, before))
        assert all(p.grad is None and p.requires_grad for p in params)
        params[1].sum().backward()
    close(weights(pipe), start)
    assert all(map(torch.equal, params, before)) and all(p.grad is None for p in params)
    assert [p.requires_grad for p in params] == [i % 2 == 1 for i in range(len(params))]

@each('changes', [dict(lr_scheduler='cosine'), dict(warmup=1)])
def test_a_simulation_with_a_schedule_is_refused(changes):
    pipe, loss, params, config = simulation('sgd')
    with pytest.raises(UserError, match='constant learning rate'):
        with simulated(loss, params, config.model_copy(update=changes)): pass

def test_a_simulation_is_taken_back():
    # simulated steps over the mean of their batches too
    pipe, loss, params, config = simulation(accumulation=2)
    with simulated(loss, params, config):
        close(weights(pipe), reference(accumulation=2, seed=2, names=('draw', 1), clip=None)[0][-1])

    # simulated is taken back after an error inside and after one in a step
    pipe, loss, params, config = simulation()
    before, where = [p.detach().clone() for p in params], [p.data_ptr() for p in params]
    with pytest.raises(ZeroDivisionError), simulated(loss, params, config): 1/0
    assert all(map(torch.equal, params, before)) and all(p.grad is None for p in params)
    steps, inner = [], loss.frozen
    def breaks(k):
        steps.append(k)
        return inner(k) if k < 1 else lambda: 1/0
    loss.frozen = breaks
    with pytest.raises(ZeroDivisionError), simulated(loss, params, config): pytest.fail('the second step fails')
    assert steps == [0, 1] and all(map(torch.equal, params, before)) and all(p.grad is None for p in params)
    assert [p.data_ptr() for p in params] == where # the very memory, for whoever holds it


def test_what_else_a_simulation_moves():
    # what the loss does not depend on has a gradient of zero and decays in adamw
    pipe, loss, params, config = simulation('adamw', steps=2)
    idle = torch.nn.Parameter(torch.tensor([3.]))
    with simulated(loss, [*params, idle], config): assert idle.item() == pytest.approx(3*(1 - .05*.01)**2, rel=1e-12)
    assert idle.item() == 3.

    # low weights are moved in float32 and come back as they were
    torch.set_default_dtype(torch.float32)
    pipe = toy_pipe()
    p = torch.nn.Parameter(torch.tensor([1.], dtype=torch.bfloat16))
    class Straight:
        "L = p, whatever is drawn"
        model = Denoiser(pipe)
        def frozen(self, step): return lambda: p.sum()
    with simulated(Straight(), [p], FinetuneConfig(optimizer='sgd', lr=1e-4, steps=3)):
        assert p.dtype == torch.float32 and p.item() == pytest.approx(1 - 3e-4, abs=1e-7)
    assert p.dtype == torch.bfloat16 and p.item() == 1.


# ------------------------------------------------------------------ LoRA

PROJECTIONS = [f'{a}.{m}' for a in ('attn1', 'attn2') for m in ('to_q', 'to_k', 'to_v', 'to_out.0')]

def adapter(seed=0, rank=4, name='finetune', up_std=0., std=None):
    "A and B as drawn from the stream of (seed, 'lora', name): A of each projection, then its B, in the network's order"
    gen, out = toy.stream(seed, 'lora', name), {}
    for m, p in ((m, weights(toy_pipe())[f'{m}.weight']) for m in PROJECTIONS):
        out[f'{m}.A'] = torch.randn(rank, p.shape[1], generator=gen)*(1/rank if std is None else std)
        out[f'{m}.B'] = torch.randn(p.shape[0], rank, generator=gen)*up_std
    return out

def merged(w, ab):
    return {
        k: v + ab[f'{m}.B'] @ ab[f'{m}.A']
        if k.endswith('.weight') and (m := k.removesuffix('.weight')) in PROJECTIONS
        else v
        for k, v in w.items()
    }


@pytest.mark.filterwarnings('ignore:Already found a `peft_config`')
def test_adapters():
    # which projections are adapted and how they start
    pipe = toy_pipe()
    pipe.unet.add_module(
        'joint',
        torch.nn.ModuleDict(
            {
                n: torch.nn.Linear(2, 2)
                for n in ('add_q_proj', 'add_k_proj', 'add_v_proj', 'to_add_out', 'proj_in', 'to_out')
            }
        ),
    )
    params = add_lora(pipe.unet, 'x')
    named = adapter_params(pipe.unet, 'x')
    modules = [*PROJECTIONS, *(f'joint.{n}' for n in ('add_q_proj', 'add_k_proj', 'add_v_proj', 'to_add_out'))]
    assert list(named) == [f'{m}.lora_{side}.x.weight' for m in modules for side in 'AB']
    assert len(params) == len(named) and all(p is q for p, q in zip(params, named.values()))
    assert [k for k, p in pipe.unet.named_parameters() if p.requires_grad] == list(named) and len(named) == 24
    assert all(p.shape[0 if '_A' in k else 1] == 4 for k, p in named.items())

    # the adapters first numbers and their spread
    for asked, spread in (
        (dict(rank=2), dict(rank=2)),
        (dict(rank=3, seed=9, up_std=0.02), dict(rank=3, seed=9, up_std=0.02)),
        (dict(down_std=0.7, up_std=0.1), dict(std=0.7, up_std=0.1)),
        (dict(down_std=0.0), dict(std=0.0)),
    ):
        params = add_lora(toy_pipe().unet, 'y', **asked)
        expected = adapter(name='y', **spread)
        assert len(params) == len(expected)
        for p, (k, v) in zip(params, expected.items()):
            torch.testing.assert_close(p.detach(), v, rtol=1e-12, atol=0, msg=lambda m: f'{asked} {k}: {m}')

    # another name is another adapter
    unet = toy_pipe().unet
    first = add_lora(unet, 'a')
    second = add_lora(unet, 'ab')
    assert len(adapter_params(unet, 'a')) == len(adapter_params(unet, 'ab')) == len(first) == len(second) == 16
    assert not set(adapter_params(unet, 'a')) & set(adapter_params(unet, 'ab'))
    assert not any(torch.equal(a, b) for a, b in zip(first[::2], second[::2]))


@pytest.mark.filterwarnings('ignore:Already found a `peft_config`')
@each('rank', [2, 3])
def test_merging_adds_B_times_A_and_removes_the_adapter(rank):
    pipe = toy_pipe()
    add_lora(pipe.unet, 'x', rank, up_std=.3)
    other = add_lora(pipe.unet, 'other', up_std=.3) # isn't merged
    for p in other: p.data.mul_(0.)
    z, t, text = torch.ones(1, 2, 2, 2), torch.tensor([3]), torch.ones(1, 4, 3)
    merge_lora(pipe.unet, 'x')
    expected = merged(weights(toy_pipe()), adapter(rank=rank, name='x', up_std=.3))
    close(weights(pipe), expected)
    torch.testing.assert_close(pipe.unet(z, t, text)[0][0], toy.predicted(expected, z[0], t[0], text[0]))
    assert not any(p.requires_grad for p in pipe.unet.parameters())

def test_an_adapter_on_low_weights_is_merged_into_those_that_were_loaded():
    torch.set_default_dtype(torch.float32)
    pipe = toy_pipe()
    pipe.unet.float()
    start = {k: v.float() for k, v in weights(toy_pipe()).items()}
    to_low_precision(pipe.unet, torch.bfloat16)
    params = add_lora(pipe.unet, 'x', 2, up_std=.01, down_std=.1)
    assert {p.dtype for p in params} == {torch.float32}
    merge_lora(pipe.unet, 'x')
    for k, v in merged(start, adapter(rank=2, name='x', up_std=.01, std=.1)).items():
        torch.testing.assert_close(weights(pipe)[k], v, rtol=0, atol=1e-6)

@each('kind', ['sgd', 'adamw'])
def test_lora_equals_the_written_out_adapter(kind):
    pipe, start = toy_pipe(), weights(toy_pipe())
    log = finetune(
        pipe, bank(), FinetuneConfig(algorithm='lora', optimizer=kind, lr=0.1, steps=3, batch=3, rank=2, seed=3)
    )
    trail, said = descent(
        adapter(3, 2), lambda ab, k: loss_at(merged(start, ab), toy_bank(), k, 3, seed=3), Rule(kind, 0.1), 3, clip=1.0
    )
    same_log(log, said)
    close(weights(pipe), merged(start, trail[-1]))
    moved = {k for k, v in weights(pipe).items() if not torch.equal(v, start[k])}
    assert moved == {f'{m}.weight' for m in PROJECTIONS}

class Transformer(toy.Toy):
    "The toy, called as SD3's transformer is"
    def __init__(self):
        super().__init__()
        self.config.pooled_projection_dim = 2

    def forward(self, z, timestep, encoder_hidden_states, pooled_projections, return_dict=True):
        assert pooled_projections.shape == (len(z), 2)
        return super().forward(z, timestep/100, encoder_hidden_states)

def test_methods_by_network():
    # a transformer has full and lora alone
    pipe, start = (
        SimpleNamespace(transformer=Transformer(), scheduler=FlowMatchEulerDiscreteScheduler()),
        weights(toy_pipe()),
    )
    pipe.transformer.load_state_dict(start)
    for algorithm in 'custom-diffusion', 'svdiff', 'textual-inversion':
        with pytest.raises(UserError, match=f'algorithm: {algorithm}'):
            finetune(pipe, bank(), FinetuneConfig(algorithm=algorithm))

    def loss(w, step):
        "Rectified flow: from z at σ = 0 to ε at σ = 1, the velocity is ε - z"
        z, noise, t, text = toy.drawn(toy_bank(), 3, toy.stream(0, 'finetune', step), 1000)
        sigma = (t + 1)/1000
        return (
            sum(
                (toy.predicted(w, (1 - s) * a + s * b, 10 * s, c[:-1]) - (b - a)).square().mean()
                for a, b, s, c in zip(z, noise, sigma.float(), text)
            )
            / 3
        )

    trail, said = descent(start, loss, Rule('sgd', .05), 2, clip=1.)
    log = finetune(pipe, bank(), FinetuneConfig(algorithm='full', optimizer='sgd', lr=.05, steps=2, batch=3))
    for row, expected in zip(log, said): assert row == pytest.approx(expected, rel=1e-5)
    for k, p in pipe.transformer.named_parameters():
        torch.testing.assert_close(p.detach(), trail[-1][k], rtol=1e-5, atol=1e-6)

    # a unet has the other methods too
    log = finetune(toy_pipe(), bank(), FinetuneConfig(algorithm='svdiff', batch=3, steps=1))
    assert log[0]['loss'] == pytest.approx(loss_at(weights(toy_pipe()), toy_bank(), 0, 3).item())


