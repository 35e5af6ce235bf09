"""Small pipelines in the layouts of SD v1, v2 and XL, and the single-file checkpoints (CompVis names) that hold
the same weights."""

import copy, re
from pathlib import Path
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from resalign.model.pipelines import train_tokenizer

BETAS = dict(beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000)
RESNET = {
    'norm1': 'in_layers.0',
    'conv1': 'in_layers.2',
    'time_emb_proj': 'emb_layers.1',
    'norm2': 'out_layers.0',
    'conv2': 'out_layers.3',
    'conv_shortcut': 'skip_connection',
}
OUTER = {
    'conv_in': 'input_blocks.0.0',
    'time_embedding.linear_1': 'time_embed.0',
    'time_embedding.linear_2': 'time_embed.2',
    'conv_norm_out': 'out.0',
    'conv_out': 'out.2',
    'add_embedding.linear_1': 'label_emb.0.0',
    'add_embedding.linear_2': 'label_emb.0.2',
}


def unet_name(name: str, unet) -> str:
    "A UNet weight's name in CompVis checkpoints"
    span = unet.config.layers_per_block + 1
    stem, _, kind = name.rpartition('.')
    if stem in OUTER:
        return f'{OUTER[stem]}.{kind}'
    if m := re.match(r'(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)', name):
        where, b, what, j, rest = m[1], int(m[2]), m[3], int(m[4]), m[5]
        at = f'input_blocks.{1 + b*span + j}' if where == 'down' else f'output_blocks.{b*span + j}'
    elif m := re.match(r'mid_block\.(resnets|attentions)\.(\d+)\.(.*)', name):
        what, rest = m[1], m[3]
        return f"middle_block.{2*int(m[2]) if what == 'resnets' else 1}.{resnet(rest) if what == 'resnets' else rest}"
    elif m := re.match(r'down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)', name):
        return f'input_blocks.{(int(m[1]) + 1)*span}.0.op.{m[2]}'
    elif m := re.match(r'up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.*)', name):
        attends = hasattr(unet.up_blocks[int(m[1])], 'attentions')
        return f'output_blocks.{(int(m[1]) + 1)*span - 1}.{1 + attends}.conv.{m[2]}'
    return f'{at}.0.{resnet(rest)}' if what == 'resnets' else f'{at}.1.{rest}'


def resnet(rest: str) -> str:
    part, _, kind = rest.rpartition('.')
    return f'{RESNET[part]}.{kind}'


def vae_weights(vae) -> dict:
    "With its attention as 1x1 convolutions"
    out, n = {}, len(vae.config.block_out_channels)
    for name, w in vae.state_dict().items():
        if 'attentions' in name and w.dim() == 2:
            w = w[:, :, None, None]
        name = re.sub(r'mid_block\.resnets\.(\d)', lambda m: f'mid.block_{int(m[1]) + 1}', name)
        name = re.sub(r'up_blocks\.(\d)', lambda m: f'up.{n - 1 - int(m[1])}', name)
        name = re.sub(r'down_blocks\.(\d)', r'down.\1', name)
        name = re.sub(r'resnets\.(\d)', r'block.\1', name)
        for a, b in (
            ('downsamplers.0.conv', 'downsample.conv'),
            ('upsamplers.0.conv', 'upsample.conv'),
            ('conv_shortcut', 'nin_shortcut'),
            ('mid_block.attentions.0', 'mid.attn_1'),
            ('group_norm', 'norm'),
            ('to_q', 'q'),
            ('to_k', 'k'),
            ('to_v', 'v'),
            ('to_out.0', 'proj_out'),
            ('conv_norm_out', 'norm_out'),
        ):
            name = name.replace(a, b)
        out[name] = w
    return out


def open_clip(text) -> dict:
    "A text encoder with the names of OpenCLIP, queries, keys and values in one matrix"
    own, out = {k.removeprefix('text_model.'): v for k, v in text.state_dict().items()}, {}
    for name, w in own.items():
        if re.search(r'self_attn\.[kv]_proj', name):
            continue
        if 'q_proj' in name:
            w = torch.cat([own[name.replace('q_proj', f'{x}_proj')] for x in 'qkv'])
            name = re.sub(r'self_attn\.q_proj\.(\w+)', r'attn.in_proj_\1', name)
        if name == 'text_projection.weight':
            name, w = 'text_projection', w.T
        for a, b in (
            ('embeddings.position_embedding.weight', 'positional_embedding'),
            ('embeddings.', ''),
            ('final_layer_norm', 'ln_final'),
            ('encoder.layers', 'transformer.resblocks'),
            ('layer_norm1', 'ln_1'),
            ('layer_norm2', 'ln_2'),
            ('fc1', 'c_fc'),
            ('fc2', 'c_proj'),
            ('self_attn', 'attn'),
        ):
            name = name.replace(a, b)
        out[name] = w
    return out


def clip(text) -> dict:
    return {f"transformer.text_model.{k.removeprefix('text_model.')}": v for k, v in text.state_dict().items()}


def single_file(pipe, kind: str) -> dict:
    "Everything that a published checkpoint of this kind holds, buffers that nobody needs included"
    under = lambda prefix, weights: {f'{prefix}.{k}': v for k, v in weights.items()}
    out = under(
        'model.diffusion_model', {unet_name(k, pipe.unet): v for k, v in pipe.unet.state_dict().items()}
    ) | under('first_stage_model', vae_weights(pipe.vae))
    places = torch.arange(pipe.tokenizer.model_max_length)[None]
    if kind == 'v1':
        out |= under('cond_stage_model', clip(pipe.text_encoder)) | {
            'cond_stage_model.transformer.text_model.embeddings.position_ids': places
        }
    if kind == 'v2':  # the text encoder has one layer more, whose output nobody reads
        words = open_clip(pipe.text_encoder)
        last = pipe.text_encoder.config.num_hidden_layers
        words |= {
            k.replace('resblocks.0.', f'resblocks.{last}.'): v + 1 for k, v in words.items() if 'resblocks.0.' in k
        }
        width = pipe.text_encoder.config.hidden_size
        out |= under(
            'cond_stage_model.model',
            words | dict(text_projection=torch.ones(width, width), logit_scale=torch.tensor(4.6)),
        )
    if kind == 'xl':
        out |= under('conditioner.embedders.0', clip(pipe.text_encoder)) | under(
            'conditioner.embedders.1.model', open_clip(pipe.text_encoder_2) | dict(logit_scale=torch.tensor(4.6))
        )
        return out | {'conditioner.embedders.0.transformer.text_model.embeddings.position_ids': places}
    return out | dict(betas=torch.linspace(0, 1, 1000), alphas_cumprod=torch.linspace(1, 0, 1000))


def write_single_file(pipe, kind, file):
    save_file({k: v.clone().contiguous() for k, v in single_file(pipe, kind).items()}, file)
    return Path(file)


def eightfold_vae(**changes) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=['DownEncoderBlock2D'] * 4,
        up_block_types=['UpDecoderBlock2D'] * 4,
        latent_channels=4,
        sample_size=64,
        **changes,
    )


def two_layers(tokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def narrow_xl(tokenizer, **schedule) -> StableDiffusionXLPipeline:
    "Two text encoders, pooled embeddings, time ids, two transformer blocks a level, linear projections; 77 tokens"
    torch.manual_seed(0)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 77
    unet = UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=96,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type='text_time',
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64 + 6 * 8,
    )
    return StableDiffusionXLPipeline(
        eightfold_vae(force_upcast=False),
        CLIPTextModel(two_layers(tokenizer, 32)),
        CLIPTextModelWithProjection(two_layers(tokenizer, 64)),
        tokenizer,
        copy.deepcopy(tokenizer),
        unet,
        EulerDiscreteScheduler(beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012, **schedule),
    )


def small(kind: str, folder) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """Random weights: four levels, 77 tokens, eightfold VAE; v2 predicts the velocity, has linear projections and
    23 text layers; XL two text encoders and time ids"""
    torch.manual_seed(dict(v1=1, v2=2, xl=3)[kind])
    tokenizer = train_tokenizer(
        ['a fox', 'a bear', 'a castle'], Path(folder) / 'words', vocabulary=20, tokens=77
    )

    def words(cls, width, layers, act='quick_gelu'):
        return cls(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=layers,
                num_attention_heads=2,
                hidden_act=act,
                projection_dim=width,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )

    vae = eightfold_vae(layers_per_block=2)
    shape = dict(sample_size=8, layers_per_block=2)
    if kind == 'xl':
        unet = UNet2DConditionModel(
            **shape,
            cross_attention_dim=48,
            block_out_channels=(32, 64, 64),
            down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
            up_block_types=('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
            transformer_layers_per_block=(1, 2, 2),
            use_linear_projection=True,
            addition_embed_type='text_time',
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
        )
        pipe = StableDiffusionXLPipeline(
            vae,
            words(CLIPTextModel, 16, 2),
            words(CLIPTextModelWithProjection, 32, 3, 'gelu'),
            tokenizer,
            copy.deepcopy(tokenizer),
            unet,
            EulerDiscreteScheduler(**BETAS),
        )
    else:
        v2 = kind == 'v2'
        unet = UNet2DConditionModel(
            **shape, cross_attention_dim=32, block_out_channels=(32, 32, 64, 64), use_linear_projection=v2
        )
        text = words(CLIPTextModel, 32, 23 if v2 else 2, 'gelu' if v2 else 'quick_gelu')
        noise = (
            DDIMScheduler(
                **BETAS, prediction_type='v_prediction', clip_sample=False, set_alpha_to_one=False, steps_offset=1
            )
            if v2
            else PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
        )
        pipe = StableDiffusionPipeline(
            vae=vae,
            text_encoder=text,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=noise,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    for module in pipe.components.values():
        for p in module.parameters() if isinstance(module, torch.nn.Module) else ():
            if p.ndim < 2:
                p.data.add_(
                    0.02 * torch.randn(p.shape)
                )  # norms and biases, or two that change places would not be noticed
    pipe.set_progress_bar_config(disable=True)
    return pipe
