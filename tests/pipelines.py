"""Complete pipelines of diffusers with tiny random parts, in folders as `save_pretrained` leaves them.

`PIPELINES[name]` is a row, and `save(name, folder)` makes the folder in a second or two: transformer, VAE, every text
encoder and tokenizer, scheduler. Tokens are bytes. An image has 64 pixels a side, its latent 8.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transformers_tiny import TINY

SIDE = 64  # pixels
SPECIAL = ["<pad>", "<bos>", "<unk>", "<eos>"]  # 2 as the number of the end means the largest one to CLIP
VOCABULARY = len(SPECIAL) + 256
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
Part = Callable[[], Any]


def tokens(length: int = 512, *, begin: bool = False, end: bool = True) -> Any:  # noqa: ANN401, of transformers
    """A tokenizer of bytes, which pads to the right."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    whole = Tokenizer(models.BPE({word: i for i, word in enumerate([*SPECIAL, *alphabet])}, [], unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    if begin or end:
        single = " ".join(["<bos>"] * begin + ["$A"] + ["<eos>"] * end)
        whole.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 1), ("<eos>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        model_max_length=length, chat_template=CHAT, padding_side="right",
    )  # fmt: skip


def clip(width: int, projection: int, name: str = "CLIPTextModelWithProjection") -> Part:
    """A CLIP's side of texts."""

    def made() -> nn.Module:
        import transformers

        sizes = {**SIZES, "hidden_size": width, "projection_dim": projection, "max_position_embeddings": 77}
        return getattr(transformers, name)(transformers.CLIPTextConfig(**sizes))

    return made


def t5(name: str = "T5") -> Part:
    """An encoder of the family of T5."""

    def made() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu", dropout_rate=0.0,
        )  # fmt: skip
        return getattr(transformers, f"{name}EncoderModel")(config)

    return made


def language(name: str, **sizes: object) -> Part:
    """A language model, by the name of its config without Config."""

    def made() -> nn.Module:
        import transformers

        return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**{**GROUPED, **sizes}))

    return made


def qwen_vl() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {**GROUPED, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    vision = {
        "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def mistral() -> nn.Module:
    """30 layers, of which three are read."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "head_dim": 8,
    }  # fmt: skip
    text = {**GROUPED, "model_type": "mistral", "hidden_size": 8, "num_hidden_layers": 31, "head_dim": 4}
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))


def qwen3() -> nn.Module:
    """28 layers, of which three are read."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**{**GROUPED, "hidden_size": 8, "num_hidden_layers": 28, "head_dim": 4}))


def t5_gemma() -> nn.Module:
    """It says the config of the whole model, as the published one does."""
    from transformers import T5GemmaConfig
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    part = {**GROUPED, "query_pre_attn_scalar": 8, "dropout_rate": 0.0}
    whole = T5GemmaConfig(encoder=part, decoder=part, is_encoder_decoder=False)
    made = T5GemmaEncoder(whole.encoder)
    made.save_pretrained = lambda folder, **how: saved_as(whole, made, folder, how)
    return made


def saved_as(config: Any, model: nn.Module, folder: str, how: dict[str, Any]) -> None:  # noqa: ANN401, of transformers
    """Save a model with another config."""
    type(model).save_pretrained(model, folder, **how)
    config.save_pretrained(folder)


def vae(name: str = "AutoencoderKL", **config: object) -> Part:
    """An autoencoder of 4 channels, a latent's side an eighth of the image's."""

    def made() -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**config)

    return made


def kl(**config: object) -> Part:
    """Stable Diffusion's."""
    blocks: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 1, "use_quant_conv": False, "use_post_quant_conv": False,
    }  # fmt: skip
    return vae(**WIDTHS, **{**blocks, **config})


WIDTHS = {"block_out_channels": [8] * 4, "norm_num_groups": 4, "latent_channels": 4}
KL = kl(scaling_factor=1.5305, shift_factor=0.0609)
SDXL = kl(scaling_factor=0.13025, use_quant_conv=True, use_post_quant_conv=True)  # its pipeline asks for the latter
OLDER = kl(scaling_factor=0.13025)  # without a shift, which the pipelines of these do not read
KL_FLUX2 = vae(
    "AutoencoderKLFlux2", **WIDTHS, layers_per_block=1,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)  # fmt: skip
STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 2.0, 0.8, 1.1]}
VIDEO = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, **STATISTICS}
DC = vae(
    "AutoencoderDC", latent_channels=4, attention_head_dim=4, scaling_factor=0.41407,
    encoder_block_types="ResBlock", decoder_block_types="ResBlock",
    encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
    encoder_layers_per_block=(1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1),
    encoder_qkv_multiscales=((), (), (), ()), decoder_qkv_multiscales=((), (), (), ()),
)  # fmt: skip


def scheduler(name: str, **config: object) -> Part:
    """By its class."""

    def made() -> Any:  # noqa: ANN401
        import diffusers

        return getattr(diffusers, name)(**config)

    return made


FLOW = scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0)
SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LINEAR = scheduler("DPMSolverMultistepScheduler", beta_schedule="linear")
NONE = {"safety_checker": lambda: None, "feature_extractor": lambda: None}
GEMMA = language("Gemma2", query_pre_attn_scalar=8)


@dataclass(frozen=True)
class Complete:
    """A pipeline's class, its tiny transformer's name in TINY with what differs, and its other parts."""

    pipeline: str
    tiny: str
    parts: dict[str, Part]
    config: dict[str, Any]
    vae: Part = KL
    scheduler: Part = FLOW


PIPELINES: dict[str, Complete] = {
    "SD3": Complete(
        "StableDiffusion3Pipeline", "sd3",
        {
            "text_encoder": clip(6, 5), "tokenizer": lambda: tokens(77, begin=True),
            "text_encoder_2": clip(10, 7), "tokenizer_2": lambda: tokens(77, begin=True),
            "text_encoder_3": t5(), "tokenizer_3": tokens,
        },
        {},
    ),
    "Flux": Complete(
        "FluxPipeline", "flux-guided",
        {
            "text_encoder": clip(12, 12, "CLIPTextModel"), "tokenizer": lambda: tokens(77, begin=True),
            "text_encoder_2": t5(), "tokenizer_2": tokens,
        },
        {},
    ),
    "Flux-Kontext": Complete(
        "FluxKontextPipeline", "flux-guided",
        {
            "text_encoder": clip(12, 12, "CLIPTextModel"), "tokenizer": lambda: tokens(77, begin=True),
            "text_encoder_2": t5(), "tokenizer_2": tokens,
        },
        {},
    ),
    "Flux2": Complete(
        "Flux2Pipeline", "flux2",
        {"text_encoder": mistral, "tokenizer": lambda: tokens(end=False)},
        {"joint_attention_dim": 24},
        KL_FLUX2,
    ),
    "Flux2-klein": Complete(
        "Flux2KleinPipeline", "flux2-klein",
        {"text_encoder": qwen3, "tokenizer": lambda: tokens(end=False)},
        {"joint_attention_dim": 24},
        KL_FLUX2,
    ),
    "Chroma": Complete("ChromaPipeline", "chroma", {"text_encoder": t5(), "tokenizer": tokens}, {}),
    "SANA": Complete(
        "SanaPipeline", "sana",
        {"text_encoder": GEMMA, "tokenizer": lambda: tokens(begin=True, end=False)},
        {}, DC,
    ),
    "Qwen-Image": Complete(
        "QwenImagePipeline", "qwen", {"text_encoder": qwen_vl, "tokenizer": lambda: tokens(end=False)}, {},
        vae("AutoencoderKLQwenImage", **VIDEO, attn_scales=[], temperal_downsample=[False, True, True]),
    ),
    "Z-Image": Complete(
        "ZImagePipeline", "z-image",
        {"text_encoder": language("Qwen3"), "tokenizer": lambda: tokens(end=False)},
        {"axes_lens": [1024, 16, 16]},
    ),
    "Lumina2": Complete(
        "Lumina2Pipeline", "lumina2",
        {"text_encoder": GEMMA, "tokenizer": lambda: tokens(begin=True, end=False)},
        {"axes_lens": [300, 16, 16]},
    ),
    "AuraFlow": Complete("AuraFlowPipeline", "auraflow", {"text_encoder": t5("UMT5"), "tokenizer": tokens}, {}, OLDER),
    "CogView4": Complete(
        "CogView4Pipeline", "cogview4",
        {"text_encoder": language("Glm"), "tokenizer": lambda: tokens(begin=True, end=False)}, {}, OLDER,
    ),
    "PRX": Complete("PRXPipeline", "prx", {"text_encoder": t5_gemma, "tokenizer": lambda: tokens(256)}, {}),
    "Wan": Complete(
        "WanPipeline", "wan", {"text_encoder": t5("UMT5"), "tokenizer": tokens}, {},
        vae("AutoencoderKLWan", **VIDEO, temperal_downsample=[False, True, True]),
    ),
    "SD1": Complete(
        "StableDiffusionPipeline", "sd1",
        {"text_encoder": clip(16, 16, "CLIPTextModel"), "tokenizer": lambda: tokens(77, begin=True), **NONE},
        {}, OLDER, scheduler("PNDMScheduler", **SD, skip_prk_steps=True, steps_offset=1),
    ),
    "SD2-v": Complete(
        "StableDiffusionPipeline", "sd2-v",
        {"text_encoder": clip(16, 16, "CLIPTextModel"), "tokenizer": lambda: tokens(77, begin=True), **NONE},
        {}, OLDER,
        scheduler("DDIMScheduler", **SD, prediction_type="v_prediction", rescale_betas_zero_snr=True),
    ),
    "SDXL": Complete(
        "StableDiffusionXLPipeline", "sdxl",
        {
            "text_encoder": clip(6, 5, "CLIPTextModel"), "tokenizer": lambda: tokens(77, begin=True),
            "text_encoder_2": clip(10, 12), "tokenizer_2": lambda: tokens(77, begin=True),
        },
        {}, SDXL, scheduler("EulerDiscreteScheduler", **SD, steps_offset=1),
    ),
    "PixArt": Complete(
        "PixArtSigmaPipeline", "pixart", {"text_encoder": t5(), "tokenizer": tokens}, {}, OLDER,
        LINEAR,
    ),
    "PixArt-alpha": Complete(
        "PixArtAlphaPipeline", "pixart-alpha", {"text_encoder": t5(), "tokenizer": tokens}, {}, OLDER, LINEAR
    ),
}  # fmt: skip


def filled(net: nn.Module, seed: int) -> nn.Module:
    """The net with weights that keep the size of what goes through."""
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        drawn = torch.randn(p.shape, generator=g)
        one = float(p.ndim == 1 and bool((p == 1).all()))
        p.data = one + 0.1 * drawn if p.ndim == 1 else drawn * (len(p) / p.numel()) ** 0.5
    return net.eval()


def draw_statistics(statistics: nn.Module) -> None:
    """Give a batch norm a mean and a variance of its own for each channel, as one has that saw data."""
    g = torch.Generator().manual_seed(5)
    statistics.running_mean = 0.3 * torch.randn(statistics.running_mean.shape, generator=g)
    statistics.running_var = 0.5 + torch.rand(statistics.running_var.shape, generator=g)


def save(name: str, folder: Path, seed: int = 0, *, dtype: str = "float32", variant: str | None = None) -> Path:
    """A row's pipeline in a folder, its VAE with the null means that are published.

    Weights are stored in `dtype`; `variant` is in the names of their files.
    """
    import diffusers

    row, tiny = PIPELINES[name], TINY[PIPELINES[name].tiny]
    transformer = getattr(diffusers, tiny.kind).from_config({**tiny.config, **row.config})
    model = "unet" if tiny.kind.startswith("UNet") else "transformer"
    parts = {model: transformer, "vae": row.vae(), **{part: make() for part, make in row.parts.items()}}
    for i, part in enumerate(parts.values()):
        if isinstance(part, nn.Module):
            filled(part, seed + i)
    if row.vae is KL_FLUX2:
        draw_statistics(parts["vae"].bn)
    for part in parts.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, getattr(torch, dtype))  # diffusers' own would warn
    getattr(diffusers, row.pipeline)(**parts, scheduler=row.scheduler()).save_pretrained(folder, variant=variant)
    return folder
