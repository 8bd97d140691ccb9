"""Tiny transformers of diffusers with random weights, and what their pipelines call them with, batch 2.

`TINY[name]` is a row. `row.model(dtype)` makes the module. `row(model, x, t)` passes x (`row.shape`, as the class takes
it) at times t (2,), t = 1 noise, with conditions from a seed. To import diffusers takes seconds, so it waits for
`model`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dumo.autodiff.dual import primal
from dumo.types import Array

B, L = 2, 7  # rows, tokens of text
LENGTHS = torch.tensor([[4], [7]])  # of the captions of the two rows, where they are masked
SIZE = (16.0, 16.0)
Draw = Callable[..., Tensor]  # shape -> N(0, 1)
Given = dict[str, Any]  # arguments of forward by name


@dataclass(frozen=True)
class Tiny:
    """A class of diffusers by name, its config, the shape of x, and its arguments: (x, t, draw) -> Given."""

    kind: str
    config: dict[str, Any]
    shape: tuple[int, ...]
    given: Callable[[Array, Array, Draw], Given]

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """The module in training mode. Weights are N(0, 1 / fan_in), those of norms 1 + N(0, .01), biases N(0, .01)."""
        import diffusers

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*FluxPosEmbed")  # Chroma's own
            model = getattr(diffusers, self.kind).from_config(self.config)
        g = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            drawn = torch.randn(p.shape, generator=g)
            one = float(p.ndim == 1 and bool((p == 1).all()))
            p.data = (one + 0.1 * drawn if p.ndim == 1 else drawn * (len(p) / p.numel()) ** 0.5).to(dtype)
        return nn.Module.to(model, dtype).train()  # diffusers' own `to` warns

    def x(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        """N(0, 1), `shape`."""
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

    def __call__(self, model: nn.Module, x: Array, t: Array, seed: int = 2) -> Array:
        """The model's output, shaped as x."""
        g = torch.Generator().manual_seed(seed)
        out = model(
            **self.given(x, t, lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64).to(x.dtype)),
            return_dict=False,
        )[0]
        return torch.stack(out).squeeze(2) if isinstance(out, list) else out[:, : x.shape[1]]  # no learned variance


def mask(text: int = L) -> Tensor:
    """Which tokens of text there are, (2, text): in the first row not all."""
    return torch.arange(text) < LENGTHS


def grid(side: int, axes: int) -> Tensor:
    """Positions of side x side patches, (side^2, axes): the row and the column stand in places 1 and 2."""
    ids = torch.zeros(side, side, axes)
    ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
    return ids.flatten(0, 1)


def sd3(x: Array, t: Array, draw: Draw) -> Given:
    text, pooled = draw(B, L, 16), draw(B, 12)
    return {"hidden_states": x, "timestep": 1000 * t, "encoder_hidden_states": text, "pooled_projections": pooled}


def flux(x: Array, t: Array, draw: Draw) -> Given:
    text, pooled, ids = draw(B, L, 16), draw(B, 12), {"img_ids": grid(4, 3), "txt_ids": torch.zeros(L, 3)}
    return {"hidden_states": x, "timestep": t, "encoder_hidden_states": text, "pooled_projections": pooled, **ids}


def flux_guided(x: Array, t: Array, draw: Draw) -> Given:
    return {**flux(x, t, draw), "guidance": torch.full((B,), 3.5, dtype=x.dtype)}


def flux2(x: Array, t: Array, draw: Draw) -> Given:
    ids = {"img_ids": grid(4, 4).expand(B, -1, -1), "txt_ids": torch.zeros(B, L, 4)}
    guidance = torch.full((B,), 3.5, dtype=x.dtype)
    return {"hidden_states": x, "timestep": t, "encoder_hidden_states": draw(B, L, 16), "guidance": guidance, **ids}


def flux2_klein(x: Array, t: Array, draw: Draw) -> Given:
    return {**flux2(x, t, draw), "guidance": None}


def chroma(x: Array, t: Array, draw: Draw) -> Given:
    given = flux(x, t, draw)
    del given["pooled_projections"]
    return given


def chroma_masked(x: Array, t: Array, draw: Draw) -> Given:
    seen = torch.cat([mask(), torch.ones(B, x.shape[1], dtype=torch.bool)], 1)
    return {**chroma(x, t, draw), "attention_mask": seen.to(x.dtype)}  # its pipeline's are numbers


def auraflow(x: Array, t: Array, draw: Draw) -> Given:
    return {"hidden_states": x, "timestep": t, "encoder_hidden_states": draw(B, L, 16)}


def sana(x: Array, t: Array, draw: Draw) -> Given:
    return {"hidden_states": x, "timestep": 1000 * t, "encoder_hidden_states": draw(B, L, 16)}


def sana_masked(x: Array, t: Array, draw: Draw) -> Given:
    return {**sana(x, t, draw), "encoder_attention_mask": mask().to(x.dtype)}


def sana_sprint(x: Array, t: Array, draw: Draw) -> Given:
    return {**sana_masked(x, t, draw), "guidance": torch.full((B,), 0.45, dtype=x.dtype)}


def qwen(x: Array, t: Array, draw: Draw) -> Given:
    text, seen, shapes = draw(B, L, 16), mask(), [[(1, 4, 4)]] * B
    text = {"encoder_hidden_states": text, "encoder_hidden_states_mask": seen}
    return {"hidden_states": x, "timestep": t, "img_shapes": shapes, **text}


def z_image(x: Array, t: Array, draw: Draw) -> Given:
    return {"x": list(x.unsqueeze(2)), "t": 1 - t, "cap_feats": [draw(L, 16), draw(L, 16)]}


def z_image_lengths(x: Array, t: Array, draw: Draw) -> Given:
    return {"x": list(x.unsqueeze(2)), "t": 1 - t, "cap_feats": [draw(L, 16), draw(36, 16)]}


def lumina2(x: Array, t: Array, draw: Draw) -> Given:
    text = {"encoder_hidden_states": draw(B, L, 16), "encoder_attention_mask": mask()}
    return {"hidden_states": x, "timestep": 1 - t, **text}


def cogview4(x: Array, t: Array, draw: Draw) -> Given:
    size, corner = torch.tensor([SIZE] * B, dtype=x.dtype), torch.zeros(B, 2, dtype=x.dtype)
    text, sizes = draw(B, L, 16), {"original_size": size, "target_size": size, "crop_coords": corner}
    return {"hidden_states": x, "timestep": 1000 * t, "encoder_hidden_states": text, **sizes}


def prx(x: Array, t: Array, draw: Draw) -> Given:
    return {"hidden_states": x, "timestep": t, "encoder_hidden_states": draw(B, L, 16)}


def prx_masked(x: Array, t: Array, draw: Draw) -> Given:
    return {**prx(x, t, draw), "attention_mask": mask()}


def wan(x: Array, t: Array, draw: Draw) -> Given:
    return sana(x, t, draw)


def unet(x: Array, t: Array, draw: Draw) -> Given:
    return {"sample": x, "timestep": primal(1000 * t), "encoder_hidden_states": draw(B, L, 16)}


def sdxl(x: Array, t: Array, draw: Draw) -> Given:
    given, sizes = unet(x, t, draw), torch.tensor([[64.0, 64, 0, 0, 64, 64]] * B, dtype=x.dtype)
    return {**given, "added_cond_kwargs": {"text_embeds": draw(B, 12), "time_ids": sizes}}


def pixart(x: Array, t: Array, draw: Draw) -> Given:
    sizes = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return {**sana_masked(x, t, draw), **sizes}


def pixart_alpha(x: Array, t: Array, draw: Draw) -> Given:
    pixels, ratio = torch.tensor([[64.0, 64]] * B, dtype=x.dtype), torch.ones(B, 1, dtype=x.dtype)
    return {**sana_masked(x, t, draw), "added_cond_kwargs": {"resolution": pixels, "aspect_ratio": ratio}}


HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}
SD3 = {
    **HEADS, "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 12, "pos_embed_max_size": 8,
}  # fmt: skip
SINGLE = {
    **HEADS, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 16,
    "axes_dims_rope": [2, 2, 4],
}  # fmt: skip
FLUX = {**SINGLE, "pooled_projection_dim": 12}
FLUX2 = {**SINGLE, "axes_dims_rope": [2, 2, 2, 2], "timestep_guidance_channels": 16}
FLUX2_KLEIN = {**FLUX2, "guidance_embeds": False}
CHROMA = {**SINGLE, "approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 2}
AURAFLOW = {
    **HEADS, "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 1,
    "num_single_dit_layers": 1, "joint_attention_dim": 16, "caption_projection_dim": 16, "pos_embed_max_size": 16,
}  # fmt: skip
SANA = {
    **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 16, "sample_size": 8,
}  # fmt: skip
SANA_SPRINT = {**SANA, "guidance_embeds": True, "qk_norm": "rms_norm_across_heads", "timestep_scale": 0.001}
QWEN = {
    **HEADS, "in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 16,
    "axes_dims_rope": [2, 2, 4],
}  # fmt: skip
Z_IMAGE = {
    "in_channels": 4, "dim": 16, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    "cap_feat_dim": 16, "axes_dims": [4, 2, 2], "axes_lens": [128, 16, 16],
}  # fmt: skip
LUMINA2 = {
    "sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1,
    "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 8, "axes_dim_rope": [2, 2, 2],
    "axes_lens": [32, 16, 16], "cap_feat_dim": 16,
}  # fmt: skip
COGVIEW4 = {
    **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 16, "time_embed_dim": 16,
    "condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8, "rope_axes_dim": [16, 16],
}  # fmt: skip
PRX = {
    "in_channels": 4, "context_in_dim": 16, "hidden_size": 16, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2,
    "axes_dim": [4, 4],
}  # fmt: skip
WAN = {
    "attention_head_dim": 12, "num_attention_heads": 2, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 16,
}  # fmt: skip

UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": [8, 16], "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 16, "attention_head_dim": 2, "norm_num_groups": 4,
}  # fmt: skip
SDXL = {
    **UNET, "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 12 + 6 * 8, "transformer_layers_per_block": [1, 2],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
PIXART = {
    **HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 2, "cross_attention_dim": 16, "caption_channels": 16,
    "sample_size": 8, "use_additional_conditions": False,
}  # fmt: skip
PIXART_ALPHA = {  # two embeddings of a size and one of a ratio fill its width: thirds
    **PIXART, "attention_head_dim": 12, "cross_attention_dim": 24, "sample_size": 128,
    "use_additional_conditions": None,
}  # fmt: skip

IMAGE, PACKED, VIDEO = (B, 4, 8, 8), (B, 16, 16), (B, 4, 2, 8, 8)
TINY: dict[str, Tiny] = {
    "sd3": Tiny("SD3Transformer2DModel", SD3, IMAGE, sd3),
    "sd3.5": Tiny("SD3Transformer2DModel", {**SD3, "dual_attention_layers": [0], "qk_norm": "rms_norm"}, IMAGE, sd3),
    "flux": Tiny("FluxTransformer2DModel", FLUX, PACKED, flux),
    "flux-guided": Tiny("FluxTransformer2DModel", {**FLUX, "guidance_embeds": True}, PACKED, flux_guided),
    "flux2": Tiny("Flux2Transformer2DModel", FLUX2, PACKED, flux2),
    "flux2-klein": Tiny("Flux2Transformer2DModel", FLUX2_KLEIN, PACKED, flux2_klein),
    "chroma": Tiny("ChromaTransformer2DModel", CHROMA, PACKED, chroma),
    "chroma-masked": Tiny("ChromaTransformer2DModel", CHROMA, PACKED, chroma_masked),
    "auraflow": Tiny("AuraFlowTransformer2DModel", AURAFLOW, IMAGE, auraflow),
    "sana": Tiny("SanaTransformer2DModel", SANA, IMAGE, sana),
    "sana-masked": Tiny("SanaTransformer2DModel", SANA, IMAGE, sana_masked),
    "sana-sprint": Tiny("SanaTransformer2DModel", SANA_SPRINT, IMAGE, sana_sprint),
    "qwen": Tiny("QwenImageTransformer2DModel", QWEN, PACKED, qwen),
    "z-image": Tiny("ZImageTransformer2DModel", Z_IMAGE, IMAGE, z_image),
    "z-image-lengths": Tiny("ZImageTransformer2DModel", Z_IMAGE, IMAGE, z_image_lengths),
    "lumina2": Tiny("Lumina2Transformer2DModel", LUMINA2, IMAGE, lumina2),
    "cogview4": Tiny("CogView4Transformer2DModel", COGVIEW4, IMAGE, cogview4),
    "prx": Tiny("PRXTransformer2DModel", PRX, IMAGE, prx),
    "prx-masked": Tiny("PRXTransformer2DModel", PRX, IMAGE, prx_masked),
    "wan": Tiny("WanTransformer3DModel", WAN, VIDEO, wan),
    "sd1": Tiny("UNet2DConditionModel", UNET, IMAGE, unet),
    "sd2-v": Tiny("UNet2DConditionModel", {**UNET, "use_linear_projection": True}, IMAGE, unet),
    "sdxl": Tiny("UNet2DConditionModel", SDXL, IMAGE, sdxl),
    "pixart": Tiny("PixArtTransformer2DModel", PIXART, IMAGE, pixart),
    "pixart-alpha": Tiny("PixArtTransformer2DModel", PIXART_ALPHA, IMAGE, pixart_alpha),
}
