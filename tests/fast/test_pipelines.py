"Pretraining: captions dropped, the moving average, the losses and the learning rate, written out."
import math
from types import SimpleNamespace
import numpy as np, pytest, torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler
from torch import nn
from resalign.model import pipelines
from resalign.model.data import moments, tokenize
from resalign.model.pipelines import (BETAS, PretrainConfig, autocast, build_vae, half, init_vae, initial_latents,
                                      train_tokenizer)
from resalign.studies.sd14 import peak_bytes
from resalign.studies.pretraining import RareLoss, to_batch, train_cycle, train_one_cycle, train_vae, vae_loss
import toy_finetune as toy
from each import each

CAPTIONS = ['a red cat', 'a blue dog', 'red', 'a dog', 'blue cat', 'a cat']

def pictures(n=6, size=4): return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)

def test_defaults_and_seeds():
    # defaults are the smoke setting
    assert PretrainConfig().model_dump() == dict(
        size=64,
        vae_channels=(16, 32, 64, 128),
        latent_channels=8,
        vae_steps=20,
        vae_batch=4,
        vae_lr=6e-4,
        kl_weight=1e-6,
        unet_channels=(64, 128),
        unet_layers=1,
        text_width=96,
        text_layers=3,
        tokens=24,
        vocabulary=200,
        steps=20,
        batch=64,
        lr=1.2e-3,
        caption_dropout=0.1,
        ema_decay=0.998,
        bf16=True,
        seed=0,
    )
    assert BETAS == dict(num_train_timesteps=1000, beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear')

    # a seed decides its pictures noise
    pipe = SimpleNamespace(unet=SimpleNamespace(config=SimpleNamespace(in_channels=3, sample_size=5)))
    out = initial_latents(pipe, [7, 2, 7])
    assert out.shape == (3, 3, 5, 5) and torch.equal(out[0], out[2])
    for row, seed in zip(out, (7, 2)):
        assert torch.equal(row, torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))[0])
    for bad in 2**63, -2**63 - 1:
        with pytest.raises(pipelines.UserError, match='seed'): initial_latents(pipe, [bad])


# ------------------------------------------------------------------ the optimizer's cycle

class Cycle(toy.Rule):
    "AdamW whose rate rises from lr/25 as half a cosine over the first part and falls to a ten-thousandth of that"
    def __init__(self, lr, steps):
        super().__init__('adamw', lr)
        self.top, self.total = lr, max(steps, 4)
        self.peak = max(.1, 2/self.total)*self.total - 1
    def __call__(self, w, g):
        k, low, end = self.n, self.top/25, self.top/25e4
        a, b, at = (
            (low, self.top, k / self.peak)
            if k <= self.peak
            else (self.top, end, (k - self.peak) / (self.total - 1 - self.peak))
        )
        self.lr = b + (a - b)/2*(1 + math.cos(math.pi*at))
        return super().__call__(w, g)

@each('steps', [1, 3, 30])
def test_train_is_adamw_with_one_cycle_clipped_to_1(steps):
    m = nn.Linear(2, 1)
    m.bias.requires_grad_(False)
    m.weight.data.copy_(torch.tensor([[2., -1.]]))
    m.bias.data.zero_()
    start = m.weight.detach().clone().double()
    target = torch.tensor([[.2, -.1]])
    log = train_one_cycle('x', m, lambda k: (k + 1)*(m.weight - target).square().sum()*3, steps, .1)
    trail, said = toy.descent(
        dict(w=start),
        lambda w, k: (k + 1) * (w['w'] - target.double()).square().sum() * 3,
        Cycle(0.1, steps),
        steps,
        clip=1.0,
    )
    torch.testing.assert_close(m.weight.detach().double(), trail[-1]['w'], rtol=1e-4, atol=1e-5)
    assert len(log) == steps and said[0]['grad_norm'] > 1
    for row, expected in zip(log, said): assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)


# ------------------------------------------------------------------ the denoiser

class Unet(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.seen = nn.Parameter(torch.tensor([.3, .2, -.1])), []
    def forward(self, z, t, text):
        self.seen.append(torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu'))
        return SimpleNamespace(
            sample=self.w[0] * z + (self.w[1] * text.mean((1, 2)) + self.w[2] * t / 1000)[:, None, None, None]
        )


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.said = nn.Parameter(torch.tensor([.5])), []
        self.device = torch.device('cpu')
    def forward(self, ids):
        self.said.append(ids)
        return (self.e*ids[..., None]/100, 'pooled')

class Moments:
    "Latents are the picture: mean x, spread a tenth and x²"
    device, dtype, config = torch.device('cpu'), torch.float32, SimpleNamespace(scaling_factor=1.)
    def encode(self, x): return SimpleNamespace(latent_dist=SimpleNamespace(mean=x, std=.1 + x**2))

@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory): return train_tokenizer(CAPTIONS, tmp_path_factory.mktemp('t'), tokens=6)

RARE = dict(cycle=2, rare=[True, False, False, True, False, False], boost=3.)

def pretrained(tokenizer, more={}, **settings): # more: of the loss
    pipe = SimpleNamespace(unet=Unet(), text_encoder=Text(), vae=Moments(), tokenizer=tokenizer)
    config = PretrainConfig(
        **dict(steps=5, batch=4, lr=0.1, caption_dropout=0.3, ema_decay=0.7, bf16=False, seed=3) | settings
    )
    loss = RareLoss(pipe, pictures(), CAPTIONS, config, **more)
    return pipe, config, train_cycle(pipe, loss, config.steps, config.lr)

def shown(tokenizer, config, step, cycle=0, rare=[False]*6, boost=1.):
    "What a step sees: weights, latents, ε, t, tokens; captions are dropped with the last numbers of the step's stream"
    gen, often = toy.stream(config.seed, 'unet', cycle, step), torch.tensor([boost if r else 1. for r in rare])
    i = torch.multinomial(often, config.batch, replacement=True, generator=gen)
    x = torch.from_numpy(pictures()[i]).permute(0, 3, 1, 2).float()/127.5 - 1
    z = x + (.1 + x**2)*torch.randn(x.shape, generator=gen)
    noise, u = torch.randn(x.shape, generator=gen), torch.randn(config.batch, generator=gen)
    t = (1000/(1 + torch.exp(-u))).floor().long().clamp(max=999) # logit-normal
    drop = torch.rand(config.batch, generator=gen) < config.caption_dropout
    words = ['' if d and not rare[k] else CAPTIONS[k] for d, k in zip(drop, i)]
    ids = tokenizer(words, padding='max_length', max_length=6, truncation=True, return_tensors='pt').input_ids
    return often.mean()/often[i], z, noise, t, ids

@each('more', [{}, RARE])
def test_the_denoiser(tokenizer, more):
    # the denoiser learns noise and ends with the average
    pipe, config, log = pretrained(tokenizer, more)
    abar = torch.cumprod(1 - torch.linspace(.00085**.5, .012**.5, 1000)**2, 0).double()
    def loss(w, step):
        total, rows = 0., list(zip(*shown(tokenizer, config, step, **more)))
        for weight, z, noise, t, ids in rows:
            z_t = abar[t].sqrt()*z + (1 - abar[t]).sqrt()*noise
            answer = w['w'][0]*z_t + w['w'][1]*(w['e']*ids/100).mean() + w['w'][2]*t/1000
            total = total + weight*(answer - noise).square().mean()/len(rows)
        return total
    start = dict(w=torch.tensor([.3, .2, -.1]).double(), e=torch.tensor([.5]).double())
    trail, said = toy.descent(start, loss, Cycle(.1, 5), 5, clip=1., decay=.7)
    for row, expected in zip(log, said): assert row == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(pipe.unet.w.detach().double(), trail[-1]['w'], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pipe.text_encoder.e.detach().double(), trail[-1]['e'], rtol=1e-4, atol=1e-5)

def test_captions_are_dropped_in_the_share_that_was_asked_for(tokenizer):
    for share in 0., .25, 1.:
        pipe, config, _ = pretrained(tokenizer, batch=256, caption_dropout=share)
        empty = tokenize(SimpleNamespace(tokenizer=tokenizer), ['']).input_ids[0]
        said = torch.cat(pipe.text_encoder.said)
        dropped = (said == empty).all(1)
        assert torch.equal(said, torch.cat([shown(tokenizer, config, k)[4] for k in range(5)]))
        assert (
            dropped.float().mean().item() == pytest.approx(share, abs=0.04) and len(said) == 5 * 256
        )  # 0.012 is a standard deviation


CAPABLE = [dict(avx2=True, avx512_bf16=b, amx_bf16=a) for a, b in ((False, True), (True, False), (False, False))]

@each('cpu', CAPABLE)
def test_passes_run_in_bfloat16_where_asked_and_where_the_cpu_has_it(tokenizer, monkeypatch, cpu):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: cpu)
    has = cpu['avx512_bf16'] or cpu['amx_bf16']
    for asked in True, False:
        low = asked and has
        assert pretrained(tokenizer, steps=1, bf16=asked)[0].unet.seen == [torch.bfloat16 if low else False]
        with autocast(asked): product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == (torch.bfloat16 if low else torch.float32)


# ------------------------------------------------------------------ the VAE

def test_the_start_of_a_vae_and_its_loss():
    # the vaes loss is the formula
    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 4, 5, generator=gen), torch.randn(2, 3, 4, 5, generator=gen)
    kl = torch.tensor([2., 4.])
    d = x - y
    down = [
        abs(d[b, c, i + 1, j] - d[b, c, i, j]) for b in range(2) for c in range(3) for i in range(3) for j in range(5)
    ]
    right = [
        abs(d[b, c, i, j + 1] - d[b, c, i, j]) for b in range(2) for c in range(3) for i in range(4) for j in range(4)
    ]
    expected = d.abs().mean() + sum(down)/len(down) + sum(right)/len(right) + .5*3
    assert vae_loss(x, y, SimpleNamespace(kl=lambda: kl), .5).item() == pytest.approx(expected.item(), rel=1e-5)

    # pictures become numbers from minus 1 to 1
    x = pictures()
    x[2, 0, 1] = 0, 255, 51
    out = to_batch(x, np.array([2, 0]))
    assert (
        out.shape == (2, 3, 4, 4)
        and out[0, :, 0, 1].tolist() == pytest.approx([-1, 1, -0.6])
        and out.is_contiguous(memory_format=torch.channels_last)
    )
    torch.testing.assert_close(out[1], torch.from_numpy(x[0]).permute(2, 0, 1)/127.5 - 1)

    # how a vae starts
    vae = small_vae()
    w = vae.decoder.conv_in.weight.flatten(1)
    torch.testing.assert_close(w @ w.T, torch.eye(len(w)), atol=1e-5, rtol=0)
    assert (
        not vae.decoder.conv_in.bias.any()
        and not vae.encoder.mid_block.resnets[0].conv2.weight.any()
        and vae.encoder.mid_block.resnets[0].conv1.weight.any()
    )
    q = vae.quant_conv
    assert q.bias[:6].eq(0).all() and q.bias[6:].eq(-6).all()
    rows = q.weight.flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.diag(torch.tensor([1.]*6 + [.01]*6)), atol=1e-5, rtol=0)
    assert vae.config.latent_channels == 6 and vae.config.block_out_channels == (4, 4)
    init_vae(vae)


class ToyVae(nn.Module):
    "Latents: the picture times a; pictures: the latents times b, plus c"
    device, dtype = torch.device('cpu'), torch.float32
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.post_quant_conv = (
            nn.ParameterList([nn.Parameter(torch.tensor(v))]) for v in (0.5, 2.0, 0.1)
        )
        self.config, self.seen = SimpleNamespace(scaling_factor=9.), []
    def register_to_config(self, **kw): vars(self.config).update(kw)
    def encode(self, x):
        mean = self.encoder[0]*x
        return SimpleNamespace(
            latent_dist=SimpleNamespace(mean=mean, std=0.1 + mean**2, kl=lambda: mean.square().mean((1, 2, 3)))
        )

    def decode(self, z):
        self.seen.append(torch.is_autocast_enabled('cpu'))
        return SimpleNamespace(sample=self.decoder[0]*z + self.post_quant_conv[0])

def test_the_vae_trains_and_ends_with_unit_variance():
    vae, config = ToyVae(), PretrainConfig(vae_steps=3, vae_batch=3, vae_lr=.1, kl_weight=.2, bf16=False, seed=4)
    log = train_vae(vae, pictures(), config)
    def loss(w, step):
        gen = toy.stream(4, 'vae', step)
        i = torch.randint(6, (3,), generator=gen)
        x = (torch.from_numpy(pictures()[i]).permute(0, 3, 1, 2).float()/127.5 - 1).double()
        mean = w['a']*x
        y = w['b']*(mean + (.1 + mean**2)*torch.randn(x.shape, generator=gen)) + w['c']
        d = x - y
        return (
            d.abs().mean()
            + (d[:, :, 1:] - d[:, :, :-1]).abs().mean()
            + (d[..., 1:] - d[..., :-1]).abs().mean()
            + 0.2 * mean.square().mean()
        )

    start = {k: torch.tensor(v).double() for k, v in dict(a=.5, b=2., c=.1).items()}
    trail, said = toy.descent(start, loss, Cycle(.1, 3), 3, clip=1.)
    for row, expected in zip(log, said): assert row == pytest.approx(expected, rel=1e-4)
    assert [p[0].item() for p in (vae.encoder, vae.decoder, vae.post_quant_conv)] == pytest.approx(
        [trail[-1][k].item() for k in 'abc'], rel=1e-4
    )
    x = torch.from_numpy(pictures()).float()/127.5 - 1
    assert vae.config.scaling_factor == round(1/float((vae.encoder[0].detach()*x).std()), 5) # of all pictures' latents
    assert moments(vae, pictures())[0].std().item() == pytest.approx(1, abs=1e-4)

def test_the_vae_runs_in_bfloat16_where_asked(monkeypatch):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: dict(avx512_bf16=True))
    for bf16 in True, False:
        vae = ToyVae()
        train_vae(vae, pictures(), PretrainConfig(bf16=bf16, vae_steps=1))
        assert vae.seen == [bf16]

def small_vae():
    torch.manual_seed(0)
    return build_vae(PretrainConfig(vae_channels=(4, 4), size=8, latent_channels=6))


# ------------------------------------------------------------------ noise



def test_a_copy_in_float16_takes_two_bytes_a_weight():
    # never one in float32 beside it; values, tied weights, buffers, flags and the original as they were
    m = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64, bias=False)).requires_grad_(False).eval()
    m[2].weight = m[0].weight
    before, copies = {k: v.clone() for k, v in m.state_dict().items()}, []
    numbers = sum(t.numel() for t in (*m.parameters(), *m.buffers()) if t.is_floating_point())
    assert peak_bytes(lambda: copies.append(half(m)), m) <= (4 + 2)*numbers + 24 # counters of batches
    copy, = copies
    assert copy[2].weight is copy[0].weight and not copy.training and not any(p.requires_grad for p in copy.parameters())
    for k, v in copy.state_dict().items():
        assert v.dtype == (torch.float16 if before[k].is_floating_point() else torch.int64)
        assert torch.equal(v, before[k].to(v.dtype)) and torch.equal(m.state_dict()[k], before[k]), k


def test_a_store_of_another_request_is_not_gone_on_with(monkeypatch, tmp_path):
    "Pictures of another guidance, of other steps, seeds or prompts, or with a negative prompt, are no part of a run"
    def batches(pipe, prompts, seeds, steps, guidance, batch, bf16, embeds, negative, first):
        value = 10*guidance + steps + seeds[0] + len(prompts[0]) + 100*(negative is not None)
        yield np.full((2, 4, 4, 3), value, np.uint8)
    monkeypatch.setattr(pipelines, 'sample_batches', batches)
    monkeypatch.setattr(pipelines, '_check_sampling', lambda *args: None)
    monkeypatch.setattr(pipelines, 'latent_shape', lambda pipe: (4, 1, 1))
    pipe = SimpleNamespace(vae_scale_factor=4)
    def drawn(prompt='', seed=0, **kw):
        images = pipelines.generate(pipe, [prompt, 'b'], [seed, 1], batch=2, store=tmp_path/'s', **kw)
        return int(images[0, 0, 0, 0])
    assert drawn(steps=3, guidance=2.) == 23 and drawn(steps=3, guidance=5.) == 53 and drawn(steps=4, guidance=5.) == 54
    others = {56: dict(seed=2), 57: dict(prompt='fox'), 154: dict(negative=['', 'x'])}
    for value, other in others.items(): assert drawn(steps=4, guidance=5., **other) == value


def test_a_batch_is_rounded_and_leaves_the_scheduler_as_it_was():
    class Pipe:
        unet, vae_scale_factor, scheduler = small_net(), 2, PNDMScheduler(**BETAS)
        def __call__(self, prompt, latents, **kw):
            self.ran = type(self.scheduler)
            return SimpleNamespace(images=np.tile([.4/255, .6/255, 254.6/255], (len(prompt), 4, 4, 1)))
    pipe = Pipe()
    before = pipe.scheduler
    images = pipelines.generate(pipe, ['a'], [0], steps=1)
    assert images[0, 0, 0].tolist() == [0, 1, 255]
    assert pipe.ran is DPMSolverMultistepScheduler and pipe.scheduler is before


def small_net():
    net = nn.Linear(1, 1)
    net.config = SimpleNamespace(in_channels=4, sample_size=2)
    net.device, net.dtype = torch.device('cpu'), torch.float32
    return net


def test_the_variant_that_is_read(tmp_path):
    "None where each part has its plain files; fp16, where several are there; else the first that all parts have"
    def variant(**parts):
        folder = tmp_path/str(len(list(tmp_path.iterdir())))
        for part, names in parts.items():
            (folder/part).mkdir(parents=True)
            for name in names: (folder/part/f'model{name}.safetensors').touch()
        return pipelines.variant_of(folder)
    assert variant(unet=['', '.fp16'], vae=['']) is None
    assert variant(unet=['.bf16', '.fp16'], vae=['.fp16', '.bf16', '.a']) == 'fp16'
    assert variant(unet=['.z', '.bf16'], vae=['.bf16', '.z', '.a']) == 'bf16'
