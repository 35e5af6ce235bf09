"A denoiser of 48 numbers in float64, and fine-tuning written out from its definition: plain loops, none of our code."

import hashlib
from types import SimpleNamespace

import torch
from diffusers import DDPMScheduler
from diffusers.loaders.peft import PeftAdapterMixin
from torch import nn

from adam import adam

TIMESTEPS = 20


# ------------------------------------------------------------------ the network

class Attention(nn.Module):
    def __init__(self, width, source):
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(source, width, bias=False)
        self.to_v = nn.Linear(source, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x, y): return self.to_out[0](self.to_q(x) @ self.to_k(y).mT @ self.to_v(y))


class Gain(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x): return x*self.weight


class Toy(nn.Module, PeftAdapterMixin):
    "A UNet's names: self-attention, cross-attention, a convolution and a norm's gain"
    def __init__(self, text=3):
        super().__init__()
        self.config = SimpleNamespace(addition_embed_type=None)
        self.conv_in, self.attn1, self.attn2, self.norm = (
            nn.Conv2d(2, 2, 1),
            Attention(2, 2),
            Attention(2, text),
            Gain(2),
        )

    def forward(self, z, t, text, return_dict=True):
        x = self.conv_in(z).flatten(2).mT
        x = x + self.attn1(x, x)
        x = x + self.attn2(x, text)
        return (self.norm(x).mT.reshape(z.shape) * (1 + t/TIMESTEPS)[:, None, None, None],)


def toy_pipe(text=3, prediction='epsilon', size=.5):
    "A pipeline of the toy and its schedule; the same numbers every time"
    unet, gen = Toy(text), torch.Generator().manual_seed(1)
    for p in unet.parameters(): p.data = size*torch.randn(p.shape, generator=gen)
    return SimpleNamespace(
        unet=unet,
        scheduler=DDPMScheduler(
            num_train_timesteps=TIMESTEPS, beta_schedule='scaled_linear', prediction_type=prediction
        ),
    )


def weights(pipe): return {k: v.detach().clone() for k, v in pipe.unet.named_parameters()}


def toy_bank(n=6, seed=0, text=3):
    "(mean, std, text), each picture's numbers its own"
    gen = torch.Generator().manual_seed(100 + seed)
    return (
        torch.randn(n, 2, 2, 2, generator=gen),
        0.1 + torch.rand(n, 2, 2, 2, generator=gen),
        torch.randn(n, 4, text, generator=gen),
    )


# ------------------------------------------------------------------ the definition

def stream(seed, *names):
    "The random numbers that belong to (seed, names)"
    digest = hashlib.sha256(repr((seed, *(str(n) for n in names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], 'big'))


def drawn(bank, n, gen, timesteps=TIMESTEPS):
    "(z, ε, t, text) of n pictures without replacement: which, the latents' noise, ε, t, in this order"
    mean, std, text = bank
    index = torch.randperm(len(mean), generator=gen)[:n]
    z = mean[index] + std[index]*torch.randn(mean[index].shape, generator=gen)
    return z, torch.randn(z.shape, generator=gen), torch.randint(timesteps, (n,), generator=gen), text[index]


def alphas():
    "ᾱ_t of the scaled linear schedule from 0.0001 to 0.02"
    root = torch.linspace(.0001**.5, .02**.5, TIMESTEPS, dtype=torch.float32)
    return torch.cumprod(1 - root**2, 0).double()


def attended(w, name, x, y):
    q, k, v = x @ w[f'{name}.to_q.weight'].T, y @ w[f'{name}.to_k.weight'].T, y @ w[f'{name}.to_v.weight'].T
    return q @ k.T @ v @ w[f'{name}.to_out.0.weight'].T + w[f'{name}.to_out.0.bias']


def predicted(w, z_t, t, text):
    "What the toy answers for one picture, from its weights"
    c, h, b = z_t.shape
    x = (w['conv_in.weight'][:, :, 0, 0] @ z_t.reshape(c, -1)).T + w['conv_in.bias']
    x = x + attended(w, 'attn1', x, x)
    x = x + attended(w, 'attn2', x, text)
    return (x*w['norm.weight']).T.reshape(c, h, b) * (1 + t/TIMESTEPS)


def denoising(w, sample, prediction='epsilon'):
    "The mean over pictures and numbers of |ε - ε_θ|², or of v's"
    total, (z, noise, t, text) = 0., sample
    for i in range(len(t)):
        a, b = alphas()[t[i]].sqrt(), (1 - alphas()[t[i]]).sqrt()
        target = noise[i] if prediction == 'epsilon' else a*noise[i] - b*z[i]
        total = total + (predicted(w, a*z[i] + b*noise[i], t[i], text[i]) - target).square().sum()/z[i].numel()
    return total/len(t)


def loss_at(w, bank, step, batch, prior=None, prior_weight=0., seed=0, names=()):
    "L_FT of one batch: the pictures', and prior preservation's"
    value = denoising(w, drawn(bank, batch, stream(seed, *names, 'finetune', step)))
    if prior_weight: value = value + prior_weight*denoising(w, drawn(prior, batch, stream(seed, *names, 'prior', step)))
    return value


class Rule:
    "SGD, Adam and AdamW; weight decay 0.01 (AdamW alone)"
    def __init__(self, kind, lr): self.kind, self.lr, self.n, self.m, self.v = kind, lr, 0, {}, {}

    def __call__(self, w, g):
        self.n += 1
        out = {}
        for k in w:
            if self.kind == 'sgd':
                out[k] = w[k] - self.lr*g[k]
                continue
            self.m[k], self.v[k], direction = adam(self.m.get(k, 0.), self.v.get(k, 0.), g[k], self.n)
            decay = .01*self.lr*w[k] if self.kind == 'adamw' else 0.
            out[k] = w[k] - decay - self.lr*direction
        return out


def norm(g): return sum(float(x.square().sum()) for x in g.values())**.5


def descent(w, loss, rule, steps, accumulation=1, clip=None, decay=0.):
    """(weights after each step, log) for `loss(w, batch number)`: gradients averaged over the batches of a step,
    clipped, then the rule; with a `decay` the moving average stands in place of the last weights"""
    trail, log, mean = [], [], None
    for step in range(steps):
        leaf = {k: v.detach().clone().requires_grad_() for k, v in w.items()}
        values = [loss(leaf, accumulation*step + k) for k in range(accumulation)]
        numbers = [v.item() for v in values]
        grads = [torch.autograd.grad(v, list(leaf.values()), allow_unused=True) for v in values]
        g = {
            k: sum(gs[i] if gs[i] is not None else 0 * leaf[k] for gs in grads).detach() / accumulation
            for i, k in enumerate(leaf)
        }
        log.append(dict(step=step, loss=sum(numbers)/accumulation, grad_norm=norm(g)))
        if clip and norm(g) > clip: g = {k: x*clip/(norm(g) + 1e-6) for k, x in g.items()}
        w = rule({k: v.detach() for k, v in w.items()}, g)
        mean = w if mean is None else {k: decay*mean[k] + (1 - decay)*w[k] for k in w}
        trail.append(w)
    if decay: trail[-1] = mean
    return trail, log
