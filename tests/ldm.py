"""One file of the original layout (LDM) of a tiny Stable Diffusion 1: a folder's weights by their first names."""

import re
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
VAE = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "mid_block.resnets.0": "mid.block_1",
       "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1", "group_norm": "norm",
       "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "downsamplers.0": "downsample",
       "upsamplers.0": "upsample"}  # fmt: skip


def file_of(folder: Path, file: Path) -> Path:
    """Write the file of a folder of two levels with a layer each; returns it."""
    whole: dict[str, Tensor] = {}
    for part, prefix, called in (
        ("unet", "model.diffusion_model", of_unet),
        ("vae", "first_stage_model", of_vae),
        ("text_encoder", "cond_stage_model.transformer.text_model", lambda name: name.removeprefix("text_model.")),
    ):
        for weights in (folder / part).glob("*.safetensors"):
            whole |= {f"{prefix}.{called(name)}": x.contiguous() for name, x in load_file(weights).items()}
    save_file(whole, file)
    return file


def of_unet(name: str) -> str:
    """A UNet's, with a layer a block: a block has two places, its layers and then what changes the side."""
    layer, _, what = name.rpartition(".")
    if layer in UNET:
        return f"{UNET[layer]}.{what}"
    for theirs, ours in RESNET.items():
        name = re.sub(rf"(resnets\.\d+)\.{theirs}\.", rf"\1.{ours}.", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}", name)
    name = name.replace("mid_block.attentions.0", "middle_block.1")
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{2 * int(m[1]) + 2}.0.op", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"output_blocks.{2 * int(m[1]) + 1}.1", name)
    for side, first in (("down", 1), ("up", 0)):
        where = {"down": "input", "up": "output"}[side]
        for kind, place in (("resnets", 0), ("attentions", 1)):
            name = re.sub(
                rf"{side}_blocks\.(\d)\.{kind}\.(\d)",
                lambda m: f"{where}_blocks.{2 * int(m[1]) + int(m[2]) + first}.{place}",  # noqa: B023
                name,
            )
    return name


def of_vae(name: str) -> str:
    """An autoencoder's of four levels, whose decoder counts them from the other end."""
    for theirs, ours in VAE.items():
        name = name.replace(f"{theirs}.", f"{ours}.")
    name = re.sub(r"down_blocks\.(\d)\.", r"down.\1.", name)
    name = re.sub(r"up_blocks\.(\d)\.", lambda m: f"up.{3 - int(m[1])}.", name)
    return name.replace("resnets.", "block.")
