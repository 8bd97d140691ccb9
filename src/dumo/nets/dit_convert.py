"""Convert published DiT or SiT weights to the network in `dumo.nets.dit`, for `dumo.run.published`.

`PUBLISHED_FIELDS` are the settings of networks that can load them.

1. `from_diffusers` renames the weights of a DiT that diffusers saved to the names of DiT's authors.
2. `our_name` returns the network's name for a layer of the authors. Names with `UNUSED_PREFIX` are not needed.
3. `convert` renames all weights, and transforms those in which the two networks differ.

The functions work on dictionaries of tensors; `dumo.run.published` reads files and checks names and shapes.
"""

import re
from collections.abc import Mapping

from torch import Tensor, cat, equal

from dumo.nets.dit import Transformer
from dumo.types import UserError

# From the names of facebookresearch/DiT and willisma/SiT, models.py.
_OUR_NAMES = {
    r"x_embedder\.proj\.": "embed.",
    r"pos_embed$": "positions",
    r"t_embedder\.mlp\.": "scalars.embedders.t.",
    r"y_embedder\.embedding_table\.": "label.",
    r"blocks\.(\d+)\.adaLN_modulation\.1\.": r"blocks.\1.modulation.",
    r"blocks\.(\d+)\.attn\.qkv\.": r"blocks.\1.qkv.",
    r"blocks\.(\d+)\.attn\.proj\.": r"blocks.\1.out.",
    r"blocks\.(\d+)\.mlp\.fc1\.": r"blocks.\1.up.",
    r"blocks\.(\d+)\.mlp\.fc2\.": r"blocks.\1.down.",
    r"final_layer\.adaLN_modulation\.1\.": "heads.v.modulation.",
    r"final_layer\.linear\.": "heads.v.out.",
}
# From the names of diffusers' DiTTransformer2DModel, after fusing queries, keys and values.
_AUTHORS_NAMES = {
    r"pos_embed\.proj\.": "x_embedder.proj.",
    r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_1\.": "t_embedder.mlp.0.",
    r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_2\.": "t_embedder.mlp.2.",
    r"transformer_blocks\.0\.norm1\.emb\.class_embedder\.": "y_embedder.",
    r"transformer_blocks\.(\d+)\.norm1\.linear\.": r"blocks.\1.adaLN_modulation.1.",
    r"transformer_blocks\.(\d+)\.attn1\.qkv\.": r"blocks.\1.attn.qkv.",
    r"transformer_blocks\.(\d+)\.attn1\.to_out\.0\.": r"blocks.\1.attn.proj.",
    r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.": r"blocks.\1.mlp.fc1.",
    r"transformer_blocks\.(\d+)\.ff\.net\.2\.": r"blocks.\1.mlp.fc2.",
    r"proj_out_1\.": "final_layer.adaLN_modulation.1.",
    r"proj_out_2\.": "final_layer.linear.",
}
# The fields of a `DiT` spec for which the network is the function of the DiT paper.
PUBLISHED_FIELDS = {"precondition": "none", "modern": False, "qk_norm": False, "magnitude": "free", "late": None}
# Layers of REPA (Yu et al. 2025) that only its training loss uses.
UNUSED_PREFIX = "projectors."


def from_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a diffusers DiT to the names of DiT's authors.

    diffusers saves equal embeddings of time and class in every block; those of the first block are used. Raises
    UserError if they differ.
    """
    for name, tensor in weights.items():
        name_in_first_block = re.sub(r"^transformer_blocks\.\d+\.norm1\.emb\.", "transformer_blocks.0.norm1.emb.", name)
        if not equal(tensor, weights[name_in_first_block]):
            raise UserError(
                f"start.source: {name} is not {name_in_first_block}, but a DiT has one embedding: use another model"
            )
    fused = dict(weights)
    for query_name in weights:
        if ".attn1.to_q." in query_name:
            parts = [fused.pop(query_name.replace("to_q", part)) for part in ("to_q", "to_k", "to_v")]
            fused[query_name.replace("to_q", "qkv")] = cat(parts)
    return _rename(fused, _AUTHORS_NAMES)


def our_name(authors_name: str) -> str | None:
    """Return the network's name for a weight of the authors, or None if the network has no such layer."""
    return _translate(authors_name, _OUR_NAMES)


def convert(weights: Mapping[str, Tensor], net: Transformer) -> dict[str, Tensor]:
    """Convert the weights of a published SiT (Ma et al. 2024) or DiT, by the authors' names, to those of `net`.

    `net` has time scale 1, and defines the sizes and the frequencies of the time embedding. Names that `our_name` does
    not know are dropped. The trunks are the same function: patches, sinusoids, order of queries, keys and values,
    modulations. Three differences are absorbed into the weights:

    - SiT has time s = 1 - t, from noise to data, and returns dx/ds, so v(x_t, t) = -F(x_t, 1 - t). The last layer
      absorbs the sign, and the first layer of the time embedding absorbs the time, by
      cos w(1 - t) = cos w cos wt + sin w sin wt,  sin w(1 - t) = sin w cos wt - cos w sin wt.
      REPA (Yu et al. 2025), with the same names, has t = 0 at the data as dumo, so only the trunk of its files is
      converted correctly. For a DiT as well, the caller uses only the trunk.
    - The outputs of a patch have the order row, column, channel there, and channel, row, column here.
    - A learned sigma, the second half of the output channels, is dropped, as in SiT's forward pass.
    """
    state = _rename(weights, _OUR_NAMES)

    # Convert patches and positions. SiT's positions are fixed sinusoids.
    state["embed.weight"] = state["embed.weight"].flatten(1)
    if "positions" in state:
        state["positions"] = state["positions"].squeeze(0)
    else:
        state["positions"] = net.positions

    # Convert the last layer: order, sigma and sign.
    channels = net.embed.in_features // net.patch**2
    for name in ("heads.v.out.weight", "heads.v.out.bias"):
        rows = state[name].unflatten(0, (net.patch, net.patch, -1))[:, :, :channels].movedim(2, 0).flatten(0, 2)
        state[name] = -rows

    # Convert the first layer of the time embedding.
    first_layer = "scalars.embedders.t.0.weight"
    cos_weights, sin_weights = state[first_layer].double().chunk(2, 1)
    frequencies = net.scalars.frequencies.double().to(cos_weights.device)
    cos = frequencies.cos()
    sin = frequencies.sin()
    reversed_weights = cat([cos_weights * cos + sin_weights * sin, cos_weights * sin - sin_weights * cos], 1)
    state[first_layer] = reversed_weights.to(state[first_layer])
    return state


def _rename(weights: Mapping[str, Tensor], new_names: Mapping[str, str]) -> dict[str, Tensor]:
    """Rename weights by a table of patterns, and drop those that no pattern matches."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        new_name = _translate(name, new_names)
        if new_name is not None:
            renamed[new_name] = tensor
    return renamed


def _translate(name: str, new_names: Mapping[str, str]) -> str | None:
    """Return the new name by the first pattern that matches at the start of `name`, or None."""
    for pattern, replacement in new_names.items():
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    return None
