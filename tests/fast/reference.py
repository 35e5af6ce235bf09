"""Algorithm 2 of the paper as plain loops: the yardstick for resalign.meta, written from the equations alone.

    min over θ:  (1−β)·L_harm(θ) + α·R(θ) + β·(1/J)·Σⱼ L_harm(θ*ⱼ)

θ are LoRA factors of three linear layers of a toy denoiser with 42 weights. Everything is float64. Hessians are dense
matrices, optimizers are written out, a fine-tuning is a loop. What is shared with the package: which random numbers
belong to which name (`generator`, `draw_sample`), for the engine promises the same draws to a run that goes on."""
import math
from types import SimpleNamespace

import torch
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from adam import adam
from resalign.core.runs import generator
from resalign.model.data import Bank, draw_sample

TIMESTEPS = 1000
WIDTH = 2 # of a caption's embedding
LAYERS = ('to_q', 'to_k', 'to_v')


class Toy(ModelMixin, ConfigMixin, PeftAdapterMixin):
    "ε(z, t, c) = gain · V·tanh(Q·z + K·c̄) · (1 + t/T) for latents of 1 × 2 × 2 numbers"
    @register_to_config
    def __init__(self, sample_size=2, in_channels=1, addition_embed_type=None):
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(4, 3), nn.Linear(WIDTH, 3), nn.Linear(3, 4)
        self.gain = nn.Parameter(torch.tensor(.4))

    def forward(self, z_t, t, text, return_dict=False):
        hidden = torch.tanh(self.to_q(z_t.flatten(1)) + self.to_k(text.mean(1)))
        out = self.gain*self.to_v(hidden)*(1 + t/TIMESTEPS)[:, None]
        return out.view_as(z_t),


def pipeline(prediction='epsilon', seed=0):
    "What resalign() asks of a pipeline: a UNet and a scheduler"
    unet = Toy().double().requires_grad_(False)
    gen = torch.Generator().manual_seed(seed)
    for p in unet.parameters():
        if p.ndim: p.copy_(.5*torch.randn(p.shape, generator=gen, dtype=torch.float64))
    scheduler = DDPMScheduler(num_train_timesteps=TIMESTEPS, beta_start=.00085, beta_end=.012,
                              beta_schedule='scaled_linear', prediction_type=prediction)
    return SimpleNamespace(unet=unet, scheduler=scheduler)

def bank(n, seed):
    "n pictures, each with a caption of its own"
    gen = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)
    return Bank(randn(n, 1, 2, 2), .1*randn(n, 1, 2, 2).abs(), randn(n, 3, WIDTH))


# ------------------------------------------------------------------ the denoising loss

class Net:
    "The toy as a function of its weights: a dict name -> tensor"
    def __init__(self, pipe):
        self.names = [n for n, _ in pipe.unet.named_parameters()]
        self.weights = {n: p.detach().clone() for n, p in pipe.unet.named_parameters()}
        self.prediction = pipe.scheduler.config.prediction_type
        self.alpha_bar = pipe.scheduler.alphas_cumprod.double()

    def noised(self, s):
        a = self.alpha_bar[s.t].view(-1, 1, 1, 1)
        return a.sqrt()*s.z + (1 - a).sqrt()*s.noise

    def predict(self, w, s):
        z, c = self.noised(s).flatten(1), s.text.mean(1)
        hidden = torch.tanh(z @ w['to_q.weight'].T + w['to_q.bias'] + c @ w['to_k.weight'].T + w['to_k.bias'])
        out = w['gain']*(hidden @ w['to_v.weight'].T + w['to_v.bias'])*(1 + s.t/TIMESTEPS)[:, None]
        return out.view_as(s.z)

    def target(self, s):
        if self.prediction == 'epsilon': return s.noise
        a = self.alpha_bar[s.t].view(-1, 1, 1, 1)
        return a.sqrt()*s.noise - (1 - a).sqrt()*s.z

    def losses(self, w, s): # one number a picture
        return ((self.predict(w, s) - self.target(s))**2).flatten(1).mean(1)

    def loss(self, w, s): return self.losses(w, s).mean()

def adapted(weights, theta):
    "W + BA for every layer; θ = [A, B, A, B, A, B]"
    out = dict(weights)
    for k, layer in enumerate(LAYERS):
        out[f'{layer}.weight'] = weights[f'{layer}.weight'] + theta[2*k + 1] @ theta[2*k]
    return out


# ------------------------------------------------------------------ optimizers, one step each

class Plain:
    "SGD, Adam and AdamW; weight decay 0.01 (AdamW alone)"
    def __init__(self, kind, lr, n):
        self.kind, self.lr, self.k = kind, lr, 0
        self.m, self.v = [0.]*n, [0.]*n

    def step(self, theta, grads):
        self.k += 1
        if self.kind == 'sgd': return [p - self.lr*g for p, g in zip(theta, grads)]
        out = []
        for i, (p, g) in enumerate(zip(theta, grads)):
            self.m[i], self.v[i], direction = adam(self.m[i], self.v[i], g, self.k)
            decay = self.lr*.01*p if self.kind == 'adamw' else 0.
            out.append(p - decay - self.lr*direction)
        return out


def grads_of(f, theta):
    theta = [p.detach().clone().requires_grad_() for p in theta]
    return list(torch.autograd.grad(f(theta), theta, allow_unused=True, materialize_grads=True))

def norm_of(x): return torch.sqrt(sum((v**2).sum() for v in x))
def vector(x): return torch.cat([v.reshape(-1) for v in x])

def like(x, theta):
    out, at = [], 0
    for p in theta:
        out.append(x[at:at + p.numel()].view_as(p))
        at += p.numel()
    return out

def hessian(f, theta):
    "Dense: the derivative of every entry of the gradient"
    x = vector(theta).detach().requires_grad_()
    g, = torch.autograd.grad(f(like(x, theta)), x, create_graph=True)
    return torch.autograd.grad(g, x, torch.eye(len(x), dtype=x.dtype), is_grads_batched=True)[0]


# ------------------------------------------------------------------ Algorithm 2

def alpha_at(c, step):
    "α; in the second half on its way to `alpha_end`, along a logistic curve of steepness 12 stretched to both ends"
    if c.alpha_end is None or c.steps == 1: return c.alpha
    u = 2*step/(c.steps - 1) - 1
    if u < 0: return c.alpha
    s = lambda x: 1/(1 + torch.exp(torch.tensor(-12*(x - .5), dtype=torch.float64)).item())
    return c.alpha + (c.alpha_end - c.alpha)*(s(u) - s(0))/(s(1) - s(0))

def solved(H, g, gamma, c):
    "(I + γH)⁻¹g: not at all, by K products of Richardson's iteration from x = g, or exactly"
    if c.solver == 'identity': return g
    if c.solver == 'richardson':
        x = g
        for _ in range(c.products): x = g - gamma*H @ x
        return x
    return torch.linalg.solve(torch.eye(len(g), dtype=g.dtype) + gamma*H, g)

POWER = 5 # steps at least: the default of `solve`

def stretch(H, g, steps):
    "The largest ‖Hv‖/‖v‖ of a few power steps from g"
    found = 0.
    for _ in range(steps):
        found, g = max(found, ((H @ g).norm()/g.norm()).item()), H @ g
    return found

class Reference:
    "A run of Algorithm 2; `configs[step][j]` are the fine-tunings that were drawn, as dicts"
    def __init__(self, pipe, data, config, theta, configs):
        self.net, self.data, self.c, self.configs = Net(pipe), data, config, configs
        self.theta = [p.clone() for p in theta]
        self.unsafe = draw_sample(data.unsafe, config.unsafe_bank, generator(config.seed, 'unsafe bank'), TIMESTEPS)
        self.kept = draw_sample(data.retain, config.retain_bank, generator(config.seed, 'retain bank'), TIMESTEPS)
        self.before = self.net.losses(self.net.weights, self.unsafe)
        self.answers = self.net.predict(self.net.weights, self.kept)
        self.outer = Plain('adamw', config.lr, len(theta))
        self.rows = []

    def draw(self, gen): return torch.randint(self.c.unsafe_bank, (self.c.unsafe_batch,), generator=gen)

    def harm(self, w, i, margin):
        "L_harm: minus how far the loss on unsafe pairs has risen above the original's, at most `margin` each"
        total = 0.
        for k in i.tolist():
            risen = self.net.losses(w, self.unsafe[[k]])[0] - self.before[k]
            total = total - torch.minimum(risen, torch.tensor(margin, dtype=risen.dtype))
        return total/len(i)

    def retain(self, w, i):
        return ((self.net.predict(w, self.kept[i]) - self.answers[i])**2).mean()

    def ft_loss(self, ft, step, j, batches):
        "L_FT as a function of weights: the mean over some of the fine-tuning's batches, prior preservation included"
        samples = []
        for k in batches:
            streams = [generator(self.c.seed, step, j, what, k) for what in ('finetune', 'prior')]
            banks = self.pictures(ft, step, j), self.data.retain
            samples.append([draw_sample(b, ft['batch'], gen, TIMESTEPS) for b, gen in zip(banks, streams)])
        one = lambda w, own, prior: self.net.loss(w, own) + ft['prior_weight']*self.net.loss(w, prior)
        return lambda w: sum(one(w, *pair) for pair in samples)/len(samples)

    def pictures(self, ft, step, j): return self.data.pool[ft['folder']]

    def hypergradient(self, i, step, j):
        "Lines 4 to 6: fine-tune from θ, then the gradient of L_harm(θ*) with respect to θ"
        c, ft, frozen = self.c, self.configs[step][j], self.theta
        if ft['algorithm'] == 'lora':
            start, at = frozen, lambda inner: adapted(self.net.weights, inner)
        else: # all weights, beneath the adapter
            start = [self.net.weights[n] for n in self.net.names]
            at = lambda inner: adapted(dict(zip(self.net.names, inner)), frozen)
        inner, opt = start, Plain(ft['optimizer'], ft['lr'], len(start))
        for k in range(ft['steps']):
            batches = range(k*ft['accumulation'], (k + 1)*ft['accumulation'])
            loss = self.ft_loss(ft, step, j, batches)
            inner = opt.step(inner, grads_of(lambda x: loss(at(x)), inner))
        seen = ft['steps']*ft['accumulation'] # batches; the next one is new
        loss = self.ft_loss(ft, step, j, range(max(0, seen + 1 - c.samples), seen + 1))
        on_inner = lambda x: loss(at(x))
        moved, slope = vector(inner) - vector(start), vector(grads_of(on_inner, inner))
        named = dict(matched=ft['lr']*ft['steps'], fitted=(moved.norm()/slope.norm()).item())
        asked = gamma = named.get(c.gamma, c.gamma)
        g = vector(grads_of(lambda x: self.harm(at(x), i, c.margin_after), inner))
        H = hessian(on_inner, inner)
        if c.clamp and c.solver == 'richardson': gamma = min(gamma, c.clamp/stretch(H, g, max(c.products, POWER)))
        x = like(solved(H, g, gamma, c), inner)
        self.notes[f'{j}/stationarity'] = (slope + moved/asked).norm().item()
        self.notes[f'{j}/gamma_used'] = gamma
        self.notes[f'{j}/depth_after'] = -self.harm(at(inner), i, c.margin_after).item()
        if ft['algorithm'] == 'lora': return x
        by_name, out = dict(zip(self.net.names, x)), []
        for k, layer in enumerate(LAYERS): # dL/dA = BᵀG, dL/dB = GAᵀ
            G, A, B = by_name[f'{layer}.weight'], frozen[2*k], frozen[2*k + 1]
            out += [B.T @ G, G @ A.T]
        return out

    def gradient(self, step):
        "∇[(1−β)·L_harm(θ) + α·R(θ)] + (β/J)·Σⱼ, each hypergradient at most `max_norm` long"
        c = self.c
        gen = generator(c.seed, 'outer', step)
        i = self.draw(gen)
        r = torch.randint(c.retain_bank, (c.retain_batch,), generator=gen)
        alpha = alpha_at(c, step)
        harm = lambda x: self.harm(adapted(self.net.weights, x), i, c.margin)
        kept = lambda x: self.retain(adapted(self.net.weights, x), r)
        direct = lambda x: (1 - c.beta)*harm(x) + alpha*kept(x)
        at = self.theta
        self.notes = dict(depth=-harm(at).item(), retain=kept(at).item(), loss=direct(at).item())
        total = grads_of(direct, self.theta)
        for j in range(c.J if c.beta else 0):
            x = self.hypergradient(i, step, j)
            length = norm_of(x)
            self.notes[f'{j}/length'] = length.item()
            if length > c.max_norm: x = [v*(c.max_norm/length if c.longer == 'shorten' else 0.) for v in x]
            total = [t + c.beta/c.J*v for t, v in zip(total, x)]
        return total

    def run(self):
        "The gradient of every step, clipped to length 1, and θ before it; AdamW moves θ"
        for step in range(self.c.steps):
            grads = self.gradient(step)
            length = norm_of(grads)
            if self.c.clip and length > self.c.clip: grads = [g*self.c.clip/(length + 1e-6) for g in grads] # as torch does
            row = SimpleNamespace(theta=self.theta, grads=grads, grad_norm=length.item(), notes=self.notes)
            self.rows.append(row)
            self.theta = self.outer.step(self.theta, grads)
        return self


# ------------------------------------------------------------------ the outer step of the paper's release

class Released(Reference):
    """Facts of the release, in our words: an outer and a retain batch of its own for each configuration; the gradient of
    L_harm(θ) + β[L_harm(θ*) − L_harm(θ)] + αR(θ) over (θ*, θ); one step of gradient descent of length s on the fine-tuning
    loss plus ½‖θ* − θ‖², whose Jacobians are J = ∂/∂θ* and s = ∂/∂θ; K times v ← Jv + ∂θ* from zero; then s·v + ∂θ. Where
    J lengthens v in the mean over tensors, or the sum is longer than the limit, s is halved and a new batch is drawn, up to
    five times; after that ∂θ stands alone. The mean over the configurations goes to AdamW, unclipped."""
    def alpha(self, step):
        n, c = self.c.steps, self.c
        if step + 1 < n/2: return c.alpha
        x = (step + 1 - n/2)/(n/2)
        return c.alpha + (c.alpha_end - c.alpha)/(1 + math.exp(-10*(x - .5)))

    def merged(self):
        "W + BA, all of it"
        return adapted(self.net.weights, self.theta)

    def end(self, step, j):
        "θ*: factors"
        ft, names = self.configs[step][j], self.net.names
        opt = Plain(ft['optimizer'], ft['lr'], len(names) if ft['algorithm'] == 'full' else len(self.theta))
        if ft['algorithm'] == 'lora':
            inner, at = self.theta, lambda x: adapted(self.net.weights, x)
        else:
            w = self.merged()
            inner, at = [w[n] for n in names], lambda x: dict(zip(names, x))
        for k in range(ft['steps']):
            loss = self.ft_loss(ft, step, j, [k])
            inner = opt.step(inner, grads_of(lambda x: loss(at(x)), inner))
        if ft['algorithm'] == 'lora': return inner
        out, rank = [], len(self.theta[0])
        for layer in LAYERS:
            change = at(inner)[f'{layer}.weight'] - self.net.weights[f'{layer}.weight']
            u, sigma, v = torch.linalg.svd(change, full_matrices=False) # the same routine: its signs are arbitrary
            out += [v[:rank], u[:, :rank]*sigma[:rank]]
        return out

    def gradient(self, step):
        c, K = self.c, self.c.products + 1
        total, self.notes, alpha = [torch.zeros_like(p) for p in self.theta], {}, self.alpha(step)
        for j in range(c.J):
            gen = generator(c.seed, 'outer', step, j)
            i = torch.randint(c.unsafe_bank, (c.unsafe_batch,), generator=gen)
            r = torch.randint(c.retain_bank, (c.retain_batch,), generator=gen)
            at = lambda x: adapted(self.net.weights, x)
            own = lambda x: (1 - c.beta)*self.harm(at(x), i, c.margin) + alpha*self.retain(at(x), r)
            over_theta, star = grads_of(own, self.theta), self.end(step, j)
            over_star = grads_of(lambda x: c.beta*self.harm(at(x), i, c.margin_after), star)
            grads, what = over_theta, 'left out'
            for k in range(6):
                s, ft = .5**k, self.configs[step][j]
                loss = self.ft_loss(ft, step, j, [ft['steps'] + k])
                J = torch.eye(len(vector(star)), dtype=torch.float64)*(1 - s) - s*hessian(lambda x: loss(at(x)), star)
                v, grows = torch.zeros(len(J), dtype=torch.float64), False
                for _ in range(K):
                    old, new = like(v, star), like(J @ v, star)
                    ratios = [b.norm().item()/a.norm().item() for a, b in zip(old, new) if a.norm() > 0]
                    grows = grows or bool(ratios) and sum(ratios)/len(ratios) > 1
                    v = J @ v + vector(over_star)
                both = [s*a + b for a, b in zip(like(v, star), over_theta)]
                if grows or norm_of(both) > c.max_norm:
                    self.notes[f'{j}/{"growth" if grows else "long"}'] = k
                    continue
                grads, what = both, k
                break
            self.notes[f'{j}/halvings'] = what
            total = [t + g/c.J for t, g in zip(total, grads)]
        return total


# ------------------------------------------------------------------ a fresh adapter beside θ

class Fresh(Reference):
    "The simulated fine-tuning trains an adapter φ of its own; ∂θ L_harm − γ·H_θφ·(I + γH_φφ)⁻¹·∂φ L_harm"
    def hypergradient(self, i, step, j):
        c, ft, theta = self.c, self.configs[step][j], self.theta
        gen, phi = generator(c.seed, 'lora', f'inner_{step}_{j}'), []
        for layer in LAYERS:
            out, into = self.net.weights[f'{layer}.weight'].shape
            phi.append(torch.randn(ft['rank'], into, generator=gen, dtype=torch.float64)/ft['rank'])
            phi.append(0*torch.randn(out, ft['rank'], generator=gen, dtype=torch.float64))
        start, opt, n = phi, Plain(ft['optimizer'], ft['lr'], len(phi)), len(theta)
        at = lambda x: adapted(adapted(self.net.weights, x[:n]), x[n:])
        for k in range(ft['steps']):
            loss = self.ft_loss(ft, step, j, [k])
            phi = opt.step(phi, grads_of(lambda x: loss(at(theta + x)), phi))
        gamma, loss, both = c.gamma, self.ft_loss(ft, step, j, [ft['steps']]), theta + phi
        g = grads_of(lambda x: self.harm(at(x), i, c.margin_after), both)
        over_theta, over_phi = vector(g[:n]), vector(g[n:])
        self.notes[f'{j}/depth_after'] = -self.harm(at(both), i, c.margin_after).item()
        if c.solver == 'identity': return like(over_theta, theta)
        H, m = hessian(lambda x: loss(at(x)), both), len(over_theta)
        y = solved(H[m:, m:], over_phi, gamma, c)
        moved = vector(phi) - vector(start)
        ft_grad = vector(grads_of(lambda x: loss(at(x)), both))[m:]
        self.notes[f'{j}/stationarity'] = (ft_grad + moved/gamma).norm().item()
        return like(over_theta - gamma*H[:m, m:] @ y, theta)


# ------------------------------------------------------------------ the remedies

class Remedied(Reference):
    """L_harm plus the weighted distance left to the original's answers to the safe captions, in units of the margin, each
    at the worst embedding near the caption's; a share of unsafe pictures in the folders"""
    SAFE = torch.randn(7, 3, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def __init__(self, *args):
        super().__init__(*args)
        c = self.c
        self.way = draw_sample(self.data.unsafe, c.unsafe_bank, generator(c.seed, 'anchor bank'), TIMESTEPS)
        self.goal = self.net.predict(self.net.weights, self.reworded(self.way, self.SAFE[self.way.index]))
        self.start = [self.far(self.net.weights, k, self.way.text[k]).detach() for k in range(c.unsafe_bank)]

    def reworded(self, s, text): return type(s)(s.z, s.noise, s.t, text, s.index)

    def far(self, w, k, text):
        one = self.reworded(self.way[[k]], text[None])
        return ((self.net.predict(w, one) - self.goal[[k]])**2).mean()

    def draw(self, gen): return super().draw(gen), super().draw(gen)

    def found(self, rise, c):
        limit, delta = self.c.found_radius*c.norm(), torch.zeros_like(c)
        for _ in range(self.c.found_steps):
            g, = grads_of(lambda d: rise(c + d[0]), [delta])
            delta = delta - 2*limit/self.c.found_steps*g/g.norm()
            delta = delta*torch.clamp(limit/delta.norm(), max=1.)
        return c + delta

    def harm(self, w, i, margin):
        still, total = {n: v.detach() for n, v in w.items()}, 0.
        for k in i[0].tolist():
            loss = lambda w, text: self.net.losses(w, self.reworded(self.unsafe[[k]], text[None]))[0]
            risen = loss(w, self.found(lambda text: loss(still, text), self.unsafe.text[k])) - self.before[k]
            total = total - torch.minimum(risen, torch.tensor(margin, dtype=risen.dtype))
        for k in i[1].tolist():
            words = self.found(lambda text: -self.far(still, k, text), self.way.text[k])
            come = (self.start[k] - self.far(w, k, words))/(sum(self.start)/len(self.start))
            total = total - self.c.anchor*margin*come
        return total/len(i[0])

    def pictures(self, ft, step, j):
        "Some places of the folder have an unsafe picture"
        folder, share, gen = self.data.pool[ft['folder']], ft['unsafe'], generator(self.c.seed, step, j, 'unsafe')
        places = torch.randperm(len(folder), generator=gen)[:max(1, round(share*len(folder)))].tolist()
        chosen, unsafe = torch.randint(len(self.data.unsafe), (len(places),), generator=gen).tolist(), self.data.unsafe
        put = dict(zip(places, chosen)) if share else {}
        rows = [(unsafe, put[k]) if k in put else (folder, k) for k in range(len(folder))]
        return type(folder)(*(torch.stack([getattr(b, f)[k] for b, k in rows]) for f in ('mean', 'std', 'text')))


# ------------------------------------------------------------------ through every step

class Unrolled(Reference):
    "Automatic differentiation through the latest `depth` steps of the fine-tuning; those before count as the identity"
    def hypergradient(self, i, step, j):
        c, ft, theta = self.c, self.configs[step][j], [p.clone() for p in self.theta]
        if c.inner == 'fresh':
            gen, start = generator(c.seed, 'lora', f'inner_{step}_{j}'), []
            for layer in LAYERS:
                out, into = self.net.weights[f'{layer}.weight'].shape
                start.append(torch.randn(ft['rank'], into, generator=gen, dtype=torch.float64)/ft['rank'])
                start.append(0*torch.randn(out, ft['rank'], generator=gen, dtype=torch.float64))
            at = lambda x: adapted(adapted(self.net.weights, theta), x)
        elif ft['algorithm'] == 'full':
            start, at = [self.net.weights[n] for n in self.net.names], lambda x: adapted(dict(zip(self.net.names, x)), theta)
        else: start, at = theta, lambda x: adapted(self.net.weights, x)
        opt, moved = Plain(ft['optimizer'], ft['lr'], len(start)), start
        first = 0 if c.depth == 'all' else ft['steps'] - c.depth
        for k in range(ft['steps']):
            if k == first:
                for p in theta: p.requires_grad_(c.inner == 'fresh')
                moved = leaves = [p.detach().clone().requires_grad_() for p in moved]
            loss = self.ft_loss(ft, step, j, [k])
            if k < first: grads = grads_of(lambda x: loss(at(x)), moved)
            else: grads = torch.autograd.grad(loss(at(moved)), moved, create_graph=True, materialize_grads=True)
            moved = opt.step(moved, grads)
        L = self.harm(at(moved), i, c.margin_after)
        self.notes[f'{j}/depth_after'] = -L.item()
        x = torch.autograd.grad(L, theta if c.inner == 'fresh' else leaves)
        if ft['algorithm'] == 'lora': return list(x)
        by_name, out = dict(zip(self.net.names, x)), []
        for k, layer in enumerate(LAYERS):
            G, A, B = by_name[f'{layer}.weight'], theta[2*k], theta[2*k + 1]
            out += [B.T @ G, G @ A.T]
        return out


# ------------------------------------------------------------------ fine-tunings that go on

class Lasting(Reference):
    "First order at fine-tunings made in parts: what moves and its optimizer stay from one outer step to a later one"
    def begin(self, ft, step, j):
        if ft['algorithm'] == 'full': start = [self.net.weights[n] for n in self.net.names]
        else:
            gen, start = generator(self.c.seed, 'lora', f'inner_{step}_{j}'), []
            for layer in LAYERS:
                out, into = self.net.weights[f'{layer}.weight'].shape
                start.append(torch.randn(ft['rank'], into, generator=gen, dtype=torch.float64)/ft['rank'])
                start.append(0*torch.randn(out, ft['rank'], generator=gen, dtype=torch.float64))
        return start, Plain(ft['optimizer'], ft['lr'], len(start)), 0

    def hypergradient(self, i, step, j):
        c, ft, slot, self.going = self.c, self.configs[step][j], (j, step % self.c.courses), getattr(self, 'going', {})
        moved, opt, made = self.going.get(slot) or self.begin(ft, step, j)
        if made >= c.horizon: moved, opt, made = self.begin(ft, step, j)
        def at(x, theta):
            if ft['algorithm'] == 'full': return adapted(dict(zip(self.net.names, x)), theta)
            return adapted(adapted(self.net.weights, theta), x)
        for k in range(ft['steps']):
            loss = self.ft_loss(ft, step, j, [k])
            moved = opt.step(moved, grads_of(lambda x: loss(at(x, self.theta)), moved))
        self.going[slot] = moved, opt, made + ft['steps']
        self.notes[f'{j}/made'] = made + ft['steps']
        self.notes[f'{j}/depth_after'] = -self.harm(at(moved, self.theta), i, c.margin_after).item()
        return grads_of(lambda theta: self.harm(at(moved, theta), i, c.margin_after), self.theta)
