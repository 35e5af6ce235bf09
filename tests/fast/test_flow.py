"The rectified-flow path and its denoiser against their formulas; the layout of the small SD3."
import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import nn

from resalign.baselines.parts import layers
from resalign.core.runs import generator
from resalign.core.settings import UserError
from resalign.model.pipelines import build_sd3
from resalign.model.data import Bank, draw_sample
from resalign.model.flow import FlowView, guided_euler, training_gb
from resalign.model.losses import Denoiser, FlowDenoiser, HarmfulLoss, RetainLoss, shifted_sigmas
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
    captions = [f'{a}{b}{c} fox' for a in 'pqrst' for b in 'aeiou' for c in 'bcdfghklmn']
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
    assert build_sd3(['a red fox'], 1).transformer.config.num_layers == 1


class HearingTransformer(ToyTransformer):
    "One that knows its latents' size, and so that it is a flow's"
    config = SimpleNamespace(pooled_projection_dim=2, joint_attention_dim=3, in_channels=2, sample_size=2)


@each('steps, guidance, distilled', [(4, 3., False), (5, 1., False), (4, 3., True)])
def test_guided_euler_against_its_formula(steps, guidance, distilled):
    "z + (σ' − σ)(v_∅ + w (v_c − v_∅)), from σ = 1 to 0; along v_c alone where the guidance was distilled"
    pipe, bank = toy()
    pipe.transformer = HearingTransformer()
    if distilled: pipe.transformer.config = SimpleNamespace(**vars(HearingTransformer.config), guidance_embeds=True)
    text, empty = bank.text[:3], bank.text[3:4]
    rows = list(guided_euler(Denoiser(pipe), text, empty, steps, guidance, generator(1)))
    z = torch.randn(3, 2, 2, 2, generator=generator(1)).double()
    net = copy.deepcopy(pipe.transformer).double()
    def v(z, t, text):
        time = torch.full((len(z),), 20*sigma(t)).double()
        return net(z, time, text[:, :3], text[:, 3, :2], return_dict=False)[0].detach()
    for k, (at, t, v_c, v_empty, following) in enumerate(rows):
        time = 19 - k*20//steps
        after = sigma(19 - (k + 1)*20//steps) if k + 1 < steps else 0.
        yes, no = v(z, time, text), v(z, time, empty.expand(3, -1, -1))
        assert t.tolist() == [time]*3
        close(at, z, rtol=1e-4)
        close(v_c, yes, rtol=1e-4)
        close(v_empty, no, rtol=1e-4)
        z = z + (after - sigma(time))*(yes if distilled else no + guidance*(yes - no))
        close(following, z, rtol=1e-4)
    assert len(rows) == steps and sigma(19) == 1


def test_the_layers_of_joint_attention():
    "Each group written out for one block of each kind; what a UNet alone has is refused by name"
    names = [f'transformer_blocks.0.attn.{n}.weight' for n in 'to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out'.split()]
    names += ['single_transformer_blocks.0.attn.to_k.weight', 'transformer_blocks.0.ff.net.0.proj.weight', 'context_embedder.weight',
              'time_text_embed.text_embedder.linear_1.weight', 'norm_out.linear.weight', 'proj_out.weight']
    net = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=4), named_parameters=lambda: [(n, n) for n in names])
    expected = dict(kv=names[5:7], cross=names[4:8], attention=names[:9], all=names, **{'not-cross': names[:4] + names[8:11]})
    for which, wanted in expected.items(): assert list(layers(net, which)) == wanted, which
    with pytest.raises(UserError, match="params: 'self'.*no such layers"): layers(net, 'self')


def test_a_view_is_a_unets_pipeline():
    "Copies too; what it saves is a transformer's LoRA"
    saved = []
    pipe = SimpleNamespace(transformer='net', vae='vae', save_lora_weights=lambda *a, **kw: saved.append((a, kw)))
    view = copy.copy(FlowView(pipe))
    assert (view.unet, view.vae, hasattr(view, 'text_encoder_2')) == ('net', 'vae', False)
    view.save_lora_weights('there', unet_lora_layers='weights')
    assert saved == [(('there',), dict(transformer_lora_layers='weights'))]


def test_flux_hears_every_token_and_its_pooled_embedding_and_knows_where_pixels_are():
    from resalign.model.losses import FluxDenoiser
    heard = {}

    class Net(nn.Module):
        config = SimpleNamespace(guidance_embeds=True)
        def __init__(self):
            super().__init__()
            self.two = nn.Parameter(torch.tensor(2.))
        def forward(self, latents, **kw):
            heard.update(kw)
            return (self.two*latents,)

    d = object.__new__(FluxDenoiser)
    d.unet, d.sigmas, d.width = Net(), torch.tensor([.1, .4, .9]), 3
    z, text, t = torch.randn(2, 4, 4, 6), torch.randn(2, 5, 7), torch.tensor([2, 0])
    assert torch.equal(d(z, t, text), 2*z) # packing and unpacking lose nothing
    assert torch.equal(heard['encoder_hidden_states'], text[:, :4])
    assert torch.equal(heard['pooled_projections'], text[:, 4, :3])
    assert heard['timestep'].tolist() == d.sigmas[t].tolist() and heard['guidance'].tolist() == [3.5, 3.5]
    places = [(0, y, x) for y in range(2) for x in range(3)]
    assert heard['img_ids'].tolist() == [list(map(float, p)) for p in places]
    assert heard['txt_ids'].tolist() == [[0., 0., 0.]]*4


def test_the_counted_memory_of_a_step():
    "2 bytes a weight of the transformer, 4 of the rest; 2 for what each block hands on, and twice the widest inside"
    net = nn.Module()
    net.config = SimpleNamespace(num_attention_heads=2, attention_head_dim=3)
    net.transformer_blocks = nn.ModuleList([nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 11))])
    net.single_transformer_blocks = nn.ModuleList([nn.Linear(5, 2)])
    need = training_gb(dict(transformer=net, vae=nn.Linear(3, 1)), tokens=10, batch=4)
    assert need['weights']*1e9 == pytest.approx(2*(42 + 88 + 12) + 4*4)
    assert need['activations']*1e9 == pytest.approx(2*4*10*(2*6 + 2*(7 + 11)))
