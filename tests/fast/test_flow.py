"The rectified-flow path and its denoiser against their formulas; the layout of the small SD3."
import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import nn

from resalign.core.runs import generator
from resalign.model.pipelines import build_sd3
from resalign.model.data import Bank, draw_sample
from resalign.model.losses import FlowDenoiser, HarmfulLoss, RetainLoss, shifted_sigmas
from tests.fast.toys import close, mean, square
from each import each


class ToyTransformer(nn.Module):
    config = SimpleNamespace(pooled_projection_dim=2)

    def __init__(self):
        super().__init__()
        self.words, self.pooled, self.picture = nn.Linear(3, 1), nn.Linear(2, 1), nn.Linear(1, 1)

    def forward(self, z, timestep, encoder_hidden_states, pooled_projections, return_dict=True):
        assert return_dict is False and timestep.dtype == z.dtype
        like = self.words.weight
        told = self.words(encoder_hidden_states.to(like)).mean((1, 2)) + self.pooled(pooled_projections.to(like))[:, 0]
        told = told + timestep.to(like)/20
        return ((self.picture.weight[0, 0]*z.to(like) + self.picture.bias[0]*told.view(-1, 1, 1, 1)).tanh(),)


def toy():
    torch.manual_seed(0)
    pipe = SimpleNamespace(transformer=ToyTransformer(),
                           scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=20, shift=3.))
    bank = Bank(torch.randn(5, 2, 2, 2), .1*torch.rand(5, 2, 2, 2), torch.randn(5, 4, 3))
    return pipe, bank


def sigma(t):
    "3u/(1 + 2u) at u = (t+1)/20"
    u = (int(t) + 1)/20
    return 3*u/(1 + 2*u)


def loss(net, z, e, t, text):
    net, z, e = copy.deepcopy(net).double(), z.double(), e.double()
    z_t = (1 - sigma(t))*z + sigma(t)*e
    out, = net(z_t[None], torch.tensor([20*sigma(t)]).double(), text[None, :3], text[None, 3, :2], return_dict=False)
    return out[0].detach(), square(out[0] - (e - z)).item()


@each('shift', [1., 3., 7.])
def test_the_path_is_shifted_as_published_and_as_the_scheduler_has_it(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=50, shift=shift)
    by_hand = [shift*u/(1 + (shift - 1)*u) for u in ((t + 1)/50 for t in range(50))]
    assert shifted_sigmas(scheduler).dtype == torch.float32
    close(shifted_sigmas(scheduler), by_hand, rtol=1e-6)
    close(shifted_sigmas(scheduler), scheduler.sigmas.flip(0), rtol=1e-6)


def test_a_shift_that_depends_on_the_picture_is_the_exponential_of_the_largest():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.15, shift=5.)
    scheduler.set_timesteps(sigmas=[1., .75, .5, .25], mu=1.15)
    close(shifted_sigmas(scheduler)[[999, 749, 499, 249]], scheduler.sigmas[:4], rtol=1e-5)


def test_prediction_target_and_loss_of_a_flow():
    # prediction target and loss
    pipe, bank = toy()
    model, s = FlowDenoiser(pipe), draw_sample(bank, 5, generator(1), 20)
    assert model.timesteps == 20
    for k, (z, e, t, text) in enumerate(zip(s.z, s.noise, s.t, s.text)):
        said, value = loss(pipe.transformer, z, e, t, text)
        close(model.predict(s)[k], said, 'prediction')
        close(model.target(s)[k], (e - z).double(), 'target')
        close(model.losses(s)[k], value, 'loss')
    close(model(s.z.double(), s.t, s.text), model(s.z, s.t, s.text), 'another precision')
    close(model.loss(s), mean([loss(pipe.transformer, *row)[1] for row in zip(s.z, s.noise, s.t, s.text)]))

    # the target is the paths derivative
    pipe, bank = toy()
    s = draw_sample(bank, 3, generator(2), 20)
    z = lambda sigma: (1 - sigma)*s.z.double() + sigma*s.noise.double()
    close(FlowDenoiser(pipe).target(s), (z(.5 + 1e-4) - z(.5 - 1e-4))/2e-4, rtol=1e-5)


def rows(s): return zip(s.z, s.noise, s.t, s.text)


def test_harmful_and_retain_losses_take_it_as_they_take_a_unet():
    pipe, bank = toy()
    model = FlowDenoiser(pipe)
    harmful, retain = HarmfulLoss(model, bank, 4, 0), RetainLoss(model, bank, 4, 0)
    before = [loss(pipe.transformer, *r) for r in rows(harmful.samples)]
    answers = [loss(pipe.transformer, *r)[0] for r in rows(retain.samples)]
    with torch.no_grad(): pipe.transformer.picture.bias.add_(1.)
    after = [loss(pipe.transformer, *r) for r in rows(harmful.samples)]
    rises = [min(b - a, .05) for (_, a), (_, b) in zip(before, after)]
    close(harmful(model, torch.arange(4), .05), -mean(rises))
    now = [loss(pipe.transformer, *r)[0] for r in rows(retain.samples)]
    i = torch.randint(4, (9,), generator=generator(3))
    close(retain(model, 9, generator(3)), mean([square(now[k] - answers[k]) for k in i]))


def test_the_small_pipeline_has_sd3s_layout():
    state = torch.get_rng_state()
    # enough for all of the vocabulary
    captions = [f'{a}{b}{c} robot' for a in 'pqrst' for b in 'aeiou' for c in 'bcdfghklmn']
    pipe = build_sd3(captions)
    torch.set_rng_state(state)
    words = [e.config for e in (pipe.text_encoder, pipe.text_encoder_2)]
    has = lambda c, **kw: {k: c[k] if isinstance(c, dict) else getattr(c, k) for k in kw} == kw
    for width, c in zip((16, 32), words):
        assert has(c, hidden_size=width, intermediate_size=4*width, num_hidden_layers=2, num_attention_heads=4,
                   projection_dim=width,
                   max_position_embeddings=24, vocab_size=len(pipe.tokenizer), bos_token_id=pipe.tokenizer.bos_token_id,
                   eos_token_id=pipe.tokenizer.eos_token_id, pad_token_id=pipe.tokenizer.pad_token_id)
    # letters, with and without end
    assert len(pipe.tokenizer) == 2*256 + 2 + 200 and pipe.tokenizer.model_max_length == 24
    assert has(dict(pipe.transformer.config), sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
               attention_head_dim=8,
               num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=16 + 32,
               pos_embed_max_size=8)
    assert has(dict(pipe.vae.config), block_out_channels=(16,)*4, layers_per_block=1, norm_num_groups=4,
               latent_channels=4, sample_size=64,
               scaling_factor=1.5, shift_factor=.06, use_quant_conv=False, use_post_quant_conv=False,
               mid_block_add_attention=False)
    assert list(pipe.vae.config.down_block_types) == ['DownEncoderBlock2D']*4
    assert list(pipe.vae.config.up_block_types) == ['UpDecoderBlock2D']*4
    assert pipe.scheduler.config.shift == 3 and pipe.text_encoder_3 is None and pipe.tokenizer_2 is not pipe.tokenizer
    assert not any(p.requires_grad or m.training
                   for m in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
                   for p in m.parameters())
    assert pipe._progress_bar_config == dict(disable=True)
    torch.manual_seed(0)
    again = SD3Transformer2DModel.from_config(pipe.transformer.config)
    torch.set_rng_state(state)
    assert all(torch.equal(p, q) for p, q in zip(pipe.transformer.parameters(), again.parameters())) # drawn from seed 0
    assert build_sd3(['a red robot'], 1).transformer.config.num_layers == 1
