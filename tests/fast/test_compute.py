"Precision and optimizers: which numbers are kept, widened, scaled and handed on."
from types import SimpleNamespace
import pytest, torch
from torch import nn
from resalign.core import training
from resalign.core.settings import UserError
from resalign.core.training import OPTIMIZERS
from resalign.model import compute
from resalign.model.compute import (GRADIENT_SCALE, Compute, ScaleGradient, backbone, call_model, call_scaled,
                                    compute_config, device_name, device_of, finish, make_optimizer, measure_cost,
                                    modules_of, prepare, prepare_sampling, resolve_device, restore_float32, to_float32,
                                    to_low_precision)

FINE = 1 + 2**-20 # bfloat16 rounds it to 1

def net():
    m = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    for p in m.parameters(): nn.init.constant_(p, FINE)
    return m


# ------------------------------------------------------------------ low precision and back

def test_low_precision_and_back():
    # low precision takes matrices in float32 and keeps them as they were
    m = net()
    m.append(nn.Linear(2, 2, dtype=torch.float64))
    to_low_precision(m, torch.bfloat16)
    assert [p.dtype for p in m.parameters()] == [torch.bfloat16, torch.float32]*2 + [torch.float64]*2
    for p in m[0].weight, m[1].weight: assert p.full.dtype == torch.float32 and p.full.eq(FINE).all() and p.eq(1).all()
    assert not any('full' in p.__dict__ for p in (m[0].bias, *m[2].parameters()))

    # to float32 gives back the numbers that were loaded
    m = net()
    to_low_precision(m, torch.bfloat16)
    half, wide, double = (
        nn.Parameter(torch.ones(2, dtype=torch.float16) * 0.5),
        nn.Parameter(torch.ones(2)),
        nn.Parameter(torch.ones(2, dtype=torch.float64)),
    )
    data = wide.data_ptr()
    params = [m[0].weight, half, wide, double]
    assert to_float32(params) is params
    assert [p.dtype for p in params] == [torch.float32]*3 + [torch.float64]
    assert (
        m[0].weight.eq(FINE).all()
        and 'full' not in m[0].weight.__dict__
        and half.eq(0.5).all()
        and wide.data_ptr() == data
    )
    assert m[1].weight.dtype == torch.bfloat16

    # restore keeps a change and forgets the rounding of the rest
    m = net()
    to_low_precision(m, torch.bfloat16)
    m[1].weight.data.fill_(3.)
    restore_float32(m)
    assert {p.dtype for p in m.parameters()} == {torch.float32}
    assert (
        m[0].weight.eq(FINE).all()
        and m[1].weight.eq(3.0).all()
        and not any('full' in p.__dict__ for p in m.parameters())
    )
    plain = net()
    before = [p.data_ptr() for p in plain.parameters()]
    restore_float32(plain)
    assert [p.data_ptr() for p in plain.parameters()] == before


# ------------------------------------------------------------------ scaled gradients

def test_scaled_gradients():
    # scaled is the identity and multiplies the gradient
    x = torch.tensor([2., 3.], requires_grad=True)
    y = ScaleGradient.apply(x, 5.)
    assert torch.equal(y, x)
    (y*torch.tensor([1., 10.])).sum().backward()
    assert x.grad.tolist() == [5., 50.] and GRADIENT_SCALE == 4096

    # gradients are larger inside the network and right outside
    m, x, extra = Probe(), torch.tensor([3.], requires_grad=True), torch.tensor([4.], requires_grad=True)
    out = call_scaled(m, (x,), dict(extra=extra))
    assert out.item() == 10. and out.dtype == torch.float32
    (7*out).backward()
    assert (
        m.inside[0].item() == 7 * 4096
        and m.w.grad.item() == 21.0
        and x.grad.item() == 14.0
        and extra.grad.item() == 7.0
        and m.frozen.grad is None
    )

class Probe(nn.Module):
    "w·x + frozen·extra, and the gradient seen inside"
    def __init__(self):
        super().__init__()
        self.w, self.frozen, self.inside = (
            nn.Parameter(torch.tensor([2.0])),
            nn.Parameter(torch.tensor([1.0]), requires_grad=False),
            [],
        )

    def forward(self, x, extra=None, return_dict=True):
        out = self.w*x + (0 if extra is None else self.frozen*extra)
        if out.requires_grad: out.register_hook(lambda g: self.inside.append(g.clone()))
        self.kinds = dict(
            x=x.dtype,
            extra=getattr(extra, 'dtype', None),
            autocast=torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu'),
        )
        return (out, 'more')


def test_a_model_runs_in_the_precision_that_was_asked_for():
    m, x = Probe(), torch.tensor([3.], requires_grad=True)
    def kinds(c, x=x, **kw):
        m.compute = c
        out = call_model(m, x, **kw)
        assert out.dtype == x.dtype
        return out, dict(m.kinds)
    assert call_model(m, x).item() == 6. and m.kinds['autocast'] is False
    for dtype in 'float32', 'bfloat16', 'float16':
        m.inside.clear()
        out, seen = kinds(Compute(dtype=dtype), extra=torch.ones(1))
        assert out.item() == 7. and seen['autocast'] == (False if dtype == 'float32' else getattr(torch, dtype))
        out.backward()
        assert m.inside[0].item() == (4096 if dtype == 'float16' else 1), dtype
    with torch.no_grad(): assert kinds(Compute(dtype='float16'))[0].item() == 6.
    assert kinds(Compute(dtype='bfloat16'), x.detach().double())[0].dtype == torch.float64
    assert device_of(m) == torch.device('cpu')


# ------------------------------------------------------------------ optimizers

def one_step(opt, p):
    p.grad = torch.tensor([2.])
    opt.step()
    return p.item()

def test_optimizers(monkeypatch):
    # an optimizer by name or itself
    m = Probe()
    expected = dict(sgd=1 - .1*2, adam=1 - .1, adamw=1 - .1*.01 - .1) # Adam's first step is lr, whatever the gradient
    for name, value in expected.items():
        for kind in name, OPTIMIZERS[name]:
            p = nn.Parameter(torch.ones(1))
            assert one_step(make_optimizer(kind, [p], .1, m), p) == pytest.approx(value, abs=1e-6), name
    p = nn.Parameter(torch.ones(1))
    own = lambda ps, lr: torch.optim.SGD(ps, 5*lr)
    assert one_step(make_optimizer(own, [p], .1, m), p) == pytest.approx(0.)

    # eight bits where the network was prepared for them
    made = []
    library = SimpleNamespace(
        Adam8bit=lambda *a, **kw: made.append(('adam', a, kw)) or 'A',
        AdamW8bit=lambda *a, **kw: made.append(('adamw', a, kw)) or 'W',
    )
    monkeypatch.setattr(compute, 'eight_bit_library', lambda: library)
    m, ps = nn.Sequential(Probe()), [nn.Parameter(torch.ones(1))]
    own = lambda ps, lr: 'own'
    m[0].compute = Compute(eight_bit_adam=True)  # of a part is enough
    assert [make_optimizer(k, ps, 0.1, m) for k in ('adam', 'adamw', OPTIMIZERS['adamw'], own)] == [
        'A',
        'W',
        'W',
        'own',
    ] and isinstance(make_optimizer('sgd', ps, 0.1, m), torch.optim.SGD)
    assert made == [
        ('adam', (ps, 0.1), {}),
        ('adamw', (ps, 0.1), dict(weight_decay=0.01)),
        ('adamw', (ps, 0.1), dict(weight_decay=0.01)),
    ]
    m[0].compute = Compute()
    assert type(make_optimizer('adamw', ps, .1, m)) is torch.optim.AdamW and len(made) == 3
    monkeypatch.undo()

    # the first library of eight bits that is there
    monkeypatch.setattr(compute, 'EIGHT_BIT', dict(no_such_library='no.such', json='json.decoder', ast='ast'))
    import json.decoder
    assert compute.eight_bit_library() is json.decoder
    monkeypatch.setattr(compute, 'EIGHT_BIT', dict(no_such_library='no.such'))
    with pytest.raises(UserError, match='eight_bit_adam'): compute_config(dict(eight_bit_adam=True, device='cpu'))


# ------------------------------------------------------------------ a pipeline, before and after

class Net(Probe):
    def __init__(self):
        super().__init__()
        self.m, self.checkpointing = nn.Parameter(torch.full((2, 2), FINE)), []
    def enable_gradient_checkpointing(self): self.checkpointing.append(True)
    def disable_gradient_checkpointing(self): self.checkpointing.append(False)

def test_a_pipeline_before_and_after():
    # defaults change nothing
    assert Compute().model_dump() == dict(
        dtype='float32', gradient_checkpointing=False, eight_bit_adam=False, device=None
    )
    pipe = SimpleNamespace(unet=Net(), text_encoder=Net(), name='x')
    prepare(pipe, compute_config(dict(device='cpu')))
    assert (
        pipe.unet.m.dtype == torch.float32
        and pipe.unet.checkpointing == []
        and modules_of(pipe) == [pipe.unet, pipe.text_encoder]
    )
    finish(pipe)
    assert not hasattr(pipe.unet, 'compute') and pipe.unet.checkpointing == [] and pipe.unet.m.eq(FINE).all()

    # prepare lowers the denoiser alone and finish undoes it
    for name in 'unet', 'transformer':
        pipe = SimpleNamespace(**{name: Net()}, text_encoder=Net())
        net = backbone(pipe)
        assert net is getattr(pipe, name)
        prepare(pipe, Compute(dtype='bfloat16', gradient_checkpointing=True, device='cpu'))
        assert (
            net.m.dtype == torch.bfloat16
            and pipe.text_encoder.m.dtype == torch.float32
            and net.checkpointing == [True]
            and net.compute.dtype == 'bfloat16'
        )
        finish(pipe)
        finish(pipe) # twice is once
        assert net.m.eq(FINE).all() and net.checkpointing == [True, False] and not hasattr(net, 'compute')


def test_devices_and_costs(monkeypatch):
    # devices by name
    assert resolve_device(Compute(device='cpu')) == torch.device('cpu')
    assert resolve_device(Compute(device='CPU')) == torch.device('cpu')
    for name in 'gpu', 'meta': # tensors on meta have no numbers
        with pytest.raises(UserError, match=f"device: '{name}'"): resolve_device(Compute(device=name))
    assert device_name(torch.device('cpu')).endswith(' cpu')

    # the cost has the median of the steps
    usage = SimpleNamespace(ru_maxrss=3_000_000)
    monkeypatch.setattr(compute.resource, 'getrusage', lambda who: usage)
    monkeypatch.setattr(compute.sys, 'platform', 'linux')
    pipe = SimpleNamespace(unet=Probe())
    with measure_cost(pipe) as cost:
        assert cost == {}
        training._step_seconds.get().extend([.5, .1, .30004])
    assert cost == dict(
        device=device_name(torch.device('cpu')),
        steps=3,
        seconds_per_step=0.3,
        peak_gb=3.072,
        peak_of='resident set of the process',
    )
    monkeypatch.setattr(compute.sys, 'platform', 'darwin')
    with measure_cost(pipe) as cost: pass
    assert cost['steps'] == 0 and cost['seconds_per_step'] is None and cost['peak_gb'] == .003
    monkeypatch.setattr(compute, 'device_of', lambda module: torch.device('cuda'))
    of = dict(reset_peak_memory_stats=None, max_memory_allocated=3*10**9, get_device_name='A card')
    for name, value in of.items(): monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    with measure_cost(pipe) as cost: pass
    assert (cost['peak_gb'], cost['peak_of'], cost['device']) == (3, 'allocated on the GPU', 'A card')


def test_a_pipeline_samples_in_the_precision_that_was_asked_for(capsys):
    "All of it; that a VAE is decoded in float32 is said where that costs something"
    class Pipe:
        vae, text_encoder_2 = SimpleNamespace(config=SimpleNamespace(force_upcast=True)), None
        def to(self, *where): self.where = where
    for dtype in 'float32', 'bfloat16', 'float16':
        pipe = Pipe()
        assert prepare_sampling(pipe, Compute(dtype=dtype, device='cpu')) == dtype
        assert pipe.where == (torch.device('cpu'), getattr(torch, dtype))
        assert ('overflows' in capsys.readouterr().err) == (dtype == 'float16')
