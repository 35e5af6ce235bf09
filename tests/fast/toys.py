"""A pipeline of some hundred numbers, its data, and schedule, answers and samplers written out without the package.

The toy has what the losses ask of a pipeline: a UNet with named attention layers, a text encoder, a tokenizer, a VAE
and a schedule. `observed` keeps every optimizer step of a run, `agree` compares one with a formula in float64."""
import contextlib
import copy
import functools
import math
from types import SimpleNamespace

import pydantic
import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from resalign.model.data import Bank, draw_sample
from resalign.method.resalign import UnlearnData

T = 20         # training times of the schedule
CHANNELS, SIDE = 2, 2
WIDTH = 4      # of a caption's embedding
TOKENS = 9
BETA_START, BETA_END = .01, .3


# The pipeline

class Attention(nn.Module):
    def __init__(self, width, asked):
        super().__init__()
        self.to_q = nn.Linear(width, 3, bias=False)
        self.to_k = nn.Linear(asked, 3, bias=False)
        self.to_v = nn.Linear(asked, 3, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(3, width)])

    def forward(self, x, context):
        weights = (self.to_q(x) @ self.to_k(context).mT).softmax(-1)
        return self.to_out[0](weights @ self.to_v(context))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1 = Attention(3, 3)
        self.attn2 = Attention(3, WIDTH)

    def forward(self, x, text):
        x = x + self.attn1(x, x)
        return x + self.attn2(x, text)


class ToyUNet(nn.Module):
    "(z_t, t, caption) -> (prediction,): every input and every parameter matters"
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(sample_size=SIDE, in_channels=CHANNELS, addition_embed_type=None)
        self.conv_in = nn.Linear(CHANNELS, 3)
        self.time_embedding = nn.Linear(1, 3)
        self.block = Block()
        self.places = nn.Parameter(torch.zeros(SIDE*SIDE, 3)) # where a pixel is: a matrix of no layer
        self.conv_norm_out = nn.LayerNorm(3)
        self.conv_out = nn.Linear(3, CHANNELS)

    def forward(self, z, t, encoder_hidden_states, return_dict=True):
        assert len(z) == len(t) == len(encoder_hidden_states) # a real one doesn't broadcast
        like = self.conv_in.weight
        h = self.conv_in(z.to(like).flatten(2).mT) + self.places
        h = h + self.time_embedding((t.to(like)/T - .5).view(-1, 1, 1))
        h = self.conv_norm_out(self.block(h.tanh(), encoder_hidden_states.to(like)).tanh())
        out = self.conv_out(h.tanh()).mT.reshape(z.shape)
        return SimpleNamespace(sample=out) if return_dict else (out,)


class ToyTokenizer:
    "A word is a number; a start, an end, and padding"
    model_max_length, bos_token_id, eos_token_id, pad_token_id = TOKENS, 0, 1, 2

    def __init__(self, words): self.ids = {w: 3 + i for i, w in enumerate(sorted(words))}

    def __call__(self, texts, padding, max_length, truncation, return_tensors):
        assert (padding, truncation, return_tensors) == ('max_length', True, 'pt')
        ids, mask = [], []
        for text in texts:
            row = [0] + [self.ids[w] for w in text.lower().split()][:max_length - 2] + [1]
            mask.append([1]*len(row) + [0]*(max_length - len(row)))
            ids.append(row + [2]*(max_length - len(row)))
        return SimpleNamespace(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))


class ToyEncoder(nn.Module):
    "Each place knows the words up to it"
    device = torch.device('cpu')

    def __init__(self, n):
        super().__init__()
        self.embeddings = nn.ModuleDict(dict(token=nn.Embedding(n, WIDTH), position=nn.Embedding(TOKENS, WIDTH)))
        self.encoder = nn.Linear(WIDTH, WIDTH)
        self.final_layer_norm = nn.LayerNorm(WIDTH)

    def get_input_embeddings(self): return self.embeddings['token']

    def forward(self, ids):
        h = self.embeddings['token'](ids) + self.embeddings['position'].weight[:ids.shape[1]]
        many = torch.arange(1, ids.shape[1] + 1).to(h)[:, None]
        places = self.final_layer_norm(self.encoder((h.cumsum(1)/many.sqrt()).tanh()))
        return places, places[:, -1] # as CLIP's, whose second answer is pooled


class ToyVAE(nn.Module):
    "Latents of 2x2, pictures of 8x8"
    device = torch.device('cpu')
    config = SimpleNamespace(scaling_factor=.5)

    def __init__(self):
        super().__init__()
        gen = torch.Generator().manual_seed(7)
        self.up = torch.randn(CHANNELS*SIDE*SIDE, 3*8*8, generator=gen)/3
        self.down = torch.randn(3*8*8, CHANNELS*SIDE*SIDE, generator=gen)/14
        self.decoded = [] # how many at once

    def decode(self, z):
        self.decoded.append(len(z))
        return SimpleNamespace(sample=(z.flatten(1) @ self.up.to(z)).tanh().view(-1, 3, 8, 8))

    def encode(self, x):
        mean = (x.flatten(1) @ self.down.to(x)).view(-1, CHANNELS, SIDE, SIDE)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.full_like(mean, 9.)))


UNSAFE = ['a red fox kitchen knife', 'a blue fox crossed swords in meadow', 'a green fox kitchen knife in meadow',
          'old fox crossed swords']
BENIGN = ['a red car', 'a blue house in meadow', 'green car', 'a old house', 'blue meadow']
ERASE = (' kitchen knife', ' crossed swords')
SAFE = ['a red fox', 'a blue fox in meadow', 'a green fox in meadow', 'old fox'] # UNSAFE without ERASE
BEFORE = ['a red fox', 'a blue fox', 'a green fox', 'old fox']                   # what stands before ERASE


def pipeline(kind='epsilon', seed=0, steps_offset=0):
    "The toy, its weights drawn wide enough that captions are heard"
    gen = torch.Generator().manual_seed(seed)
    words = {w for text in UNSAFE + BENIGN for w in text.split()}
    encoder, unet = ToyEncoder(3 + len(words)), ToyUNet()
    with torch.no_grad():
        for p in (*unet.parameters(), *encoder.parameters()): p.copy_(.8*torch.randn(p.shape, generator=gen))
    for module in (unet, encoder): module.requires_grad_(False)
    scheduler = DDIMScheduler(num_train_timesteps=T, beta_start=BETA_START, beta_end=BETA_END,
                              beta_schedule='scaled_linear',
                              clip_sample=False, steps_offset=steps_offset, prediction_type=kind)
    return SimpleNamespace(unet=unet, text_encoder=encoder, tokenizer=ToyTokenizer(words), vae=ToyVAE(),
                           scheduler=scheduler)


def bank(pipe, captions, seed):
    gen, shape = torch.Generator().manual_seed(seed), (len(captions), CHANNELS, SIDE, SIDE)
    return Bank(torch.randn(shape, generator=gen), .3*torch.rand(shape, generator=gen),
                torch.stack([said(pipe, c) for c in captions]))


def given(kind='epsilon', **kw):
    "The toy and what every method is handed"
    pipe = pipeline(kind, **kw)
    retain = bank(pipe, BENIGN, 2)
    return pipe, UnlearnData(bank(pipe, UNSAFE, 1), retain, dict(retain=retain), list(UNSAFE), list(BENIGN), ERASE)


@torch.no_grad()
def said(pipe, caption, encoder=None):
    "(tokens, width): one caption's embedding, straight from tokenizer and text encoder"
    ids = pipe.tokenizer([caption], 'max_length', TOKENS, True, 'pt').input_ids
    return (encoder or pipe.text_encoder)(ids)[0][0]


# The schedule, answers and sampling, in float64

@functools.lru_cache
def bars():
    "ᾱ of every time of a schedule whose βs have evenly spaced roots"
    out, left = [], 1.
    for k in range(T):
        root = math.sqrt(BETA_START) + k/(T - 1)*(math.sqrt(BETA_END) - math.sqrt(BETA_START))
        left *= 1 - root**2
        out.append(left)
    return out


def alpha_bar(t): return bars()[int(t)]


def noised(z, noise, t): return math.sqrt(alpha_bar(t))*z.double() + math.sqrt(1 - alpha_bar(t))*noise.double()


def answers(net, z_t, t, text):
    "What a UNet says to rows (z_t, t, caption), given as three lists"
    return net(torch.stack(list(z_t)), torch.stack(list(t)), torch.stack(list(text)), return_dict=False)[0]


def as_noise(kind, out, z_t, t):
    "ε of each row, from what the UNet predicts for it"
    if kind == 'epsilon': return out
    return torch.stack([math.sqrt(alpha_bar(k))*v + math.sqrt(1 - alpha_bar(k))*z for v, z, k in zip(out, z_t, t)])


def noises(net, kind, z_t, t, text): return as_noise(kind, answers(net, z_t, t, text), z_t, t)


def goal(kind, z, noise, t):
    "What a UNet should say to one row"
    a = alpha_bar(t)
    return noise.double() if kind == 'epsilon' else math.sqrt(a)*noise.double() - math.sqrt(1 - a)*z.double()


def goals(kind, s): return torch.stack([goal(kind, z, e, t) for z, e, t, *_ in rows(s)])


def noisy(s): return [noised(z, e, t) for z, e, t, *_ in rows(s)]


def square(x): return (x*x).sum()/x.numel()


def mean(values): return sum(values)/len(values)


def rows(s): return list(zip(s.z, s.noise, s.t, s.text, s.index))


def denoising(net, kind, s):
    "The mean denoising loss of a sample"
    return square(answers(net, noisy(s), s.t, s.text) - goals(kind, s))


@torch.no_grad()
def sampled(net, kind, z, text, empty, steps, guidance, offset=0):
    "Guided DDIM of a row or more: [(z_t, t, ε(c), ε(∅)) ...], and where it ends"
    out, stride, z = [], T//steps, z.double()
    for k in reversed(range(steps)):
        t = torch.tensor(k*stride + offset)
        yes, no = answers(net, z, [t]*len(z), text), answers(net, z, [t]*len(z), [empty]*len(z))
        out.append((z, t, as_noise(kind, yes, z, [t]*len(z)), as_noise(kind, no, z, [t]*len(z))))
        v, a, b = no + guidance*(yes - no), alpha_bar(t), alpha_bar(t - stride) if t >= stride else 1.
        clean = (z - math.sqrt(1 - a)*v)/math.sqrt(a) if kind == 'epsilon' else math.sqrt(a)*z - math.sqrt(1 - a)*v
        noise = (z - math.sqrt(a)*clean)/math.sqrt(1 - a)
        z = math.sqrt(b)*clean + math.sqrt(1 - b)*noise
    return out, z


def drawn_pictures(pipe, kind, seed, names, config):
    "Latents that the frozen toy draws for anchors, and of which unsafe captions"
    gen = stream(seed, *names)
    which = torch.randint(len(UNSAFE), (config.pictures,), generator=gen)
    start = torch.randn(config.pictures, CHANNELS, SIDE, SIDE, generator=stream(seed, 'drawn'))
    net, empty = copy.deepcopy(pipe.unet).double(), said(pipe, '')
    text = torch.stack([said(pipe, SAFE[i]) for i in which])
    _, ends = sampled(net, kind, start, text, empty, config.sampling_steps, config.guidance)
    return Bank(ends.float(), torch.zeros(start.shape), text), which


# ESD's bank, which three methods share

def esd_prompts(config): # the captions that are sampled
    known = sorted(set(UNSAFE))
    return [known[i] for i in torch.randint(len(known), (config.prompts,),
                                            generator=stream(config.seed, 'esd captions'))]


def esd_target(yes, no, eta): return no - eta*(yes - no)


def esd_bank(pipe, kind, config):
    "[(z_t, t, caption's embedding, target)], every prompt at the first time, then at the next"
    net, empty, captions = copy.deepcopy(pipe.unet).double(), said(pipe,
            ''), [said(pipe, c) for c in esd_prompts(config)]
    start = torch.randn(config.prompts, CHANNELS, SIDE, SIDE, generator=stream(config.seed, 'esd bank'))
    path, _ = sampled(net, kind, start, captions, empty, config.sampling_steps, config.guidance)
    return [(z[j], t, c, esd_target(yes[j], no[j], config.eta)) for z, t, yes, no in path for j,
            c in enumerate(captions)]


def esd_distance(net, kind, made): # of answers from targets
    z, t, text, goal = zip(*made)
    return square(noises(net, kind, z, t, text) - torch.stack(goal))


# What a run does

def stream(seed, *names):
    from resalign.core.runs import generator
    return generator(seed, *names)


class Step:
    "One optimizer step, as it is about to be made"
    def __init__(self, optimizer, module):
        self.optimizer, group = optimizer, optimizer.param_groups[0]
        self.kind, self.lr, self.decay = type(optimizer).__name__, group['lr'], group.get('weight_decay')
        names = {id(p): n for n, p in module.named_parameters()}
        self.module = copy.deepcopy(module).double()
        params = [p for g in optimizer.param_groups for p in g['params']]
        self.grads = {names.get(id(p), i): p.grad.clone() for i, p in enumerate(params)}
        self.values = {names.get(id(p), i): p.detach().clone() for i, p in enumerate(params)}


@contextlib.contextmanager
def observed(module):
    "Inside, the list that is yielded takes up every step of every optimizer"
    steps = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, args, kw: steps.append(Step(optimizer, module)))
    try: yield steps
    finally: handle.remove()


def run(method, pipe, data, config, module=None):
    "A method's outer steps, the steps of optimizers inside of them, and what it returns"
    with observed(module or pipe.unet) as steps: out = method(pipe, data, config)
    outer = [s for s in steps if s.optimizer is steps[-1].optimizer]
    return outer, [s for s in steps if s.optimizer is not steps[-1].optimizer], out


def gradients(value, module, names):
    params = dict(module.named_parameters())
    found = torch.autograd.grad(value, [params[n] for n in names], materialize_grads=True)
    return dict(zip(names, found))


def clipped(grads, norm):
    "Gradients whose common length is at most `norm`"
    length = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
    return {n: g*min(1., norm/(length + 1e-6)) for n, g in grads.items()}


def close(found, expected, what='', rtol=2e-4):
    "Equal to float32's rounding, by the largest entry"
    found, expected = (torch.as_tensor(v).detach().double() for v in (found, expected))
    assert found.shape == expected.shape, (what, found.shape, expected.shape)
    if not found.numel(): return
    far, scale = float((found - expected).abs().max()), float(expected.abs().max())
    assert far <= rtol*scale + 1e-7, f'{what}: off by {far:.3g} of {scale:.3g}'


def same_grads(found, expected):
    assert set(found) == set(expected), set(found) ^ set(expected)
    scale = max(float(g.abs().max()) for g in expected.values())
    for n, g in expected.items():
        far = float((found[n].double() - g.double()).abs().max())
        assert far <= 2e-4*scale + 1e-8, f'{n}: off by {far:.3g} of {scale:.3g}'
    assert scale > 1e-6, 'there is no gradient to compare'


def agree(step, row, formula):
    "A step's logged loss and its gradients are the formula's, at the weights that it was taken at"
    for p in step.module.parameters(): p.requires_grad_(True)
    value = formula(step.module)
    close(row['loss'], value.item(), 'loss')
    same_grads(step.grads, gradients(value, step.module, list(step.grads)))


def check_settings(cls, defaults, edges):
    "Defaults; and of each bounded field one value that is refused and one that is still taken"
    assert {k: getattr(cls(), k) for k in defaults} == defaults
    for field, refused, taken in edges:
        assert getattr(cls(**{field: taken}), field) == taken
        with pytest.raises(pydantic.ValidationError) as e: cls(**{field: refused})
        assert e.value.errors()[0]['loc'] == (field,)


def ledger(*lines):
    "Marks the test of a line of deviations.csv, 'method/switch'"
    def mark(test):
        test.ledger = set(lines)
        return test
    return mark
