"""Weights of a published SiT (Ma et al. 2024) or DiT (Peebles & Xie 2023) under the names of our DiT.

The trunks are the same function: patches, sinusoids, order of queries, keys and values, modulations. Three differences
are all absorbed by the weights:

- SiT counts time from noise to data, s = 1 - t, and outputs dx/ds, so v(x_t, t) = -F(x_t, 1 - t). The sign goes into
  the last layer, and the time into the first layer of its embedding, by
  cos w(1 - t) = cos w cos wt + sin w sin wt,  sin w(1 - t) = sin w cos wt - cos w sin wt.
  REPA (Yu et al. 2025), whose files have the same names, counts time as we do.
- The outputs of a patch have the order row, column, channel; here it is channel, row, column.
- A learned sigma is the second half of the output channels; SiT's own forward pass drops it, and so do we.
"""

import re
from collections.abc import Mapping

from torch import Tensor, cat, equal

from dumo.nets.dit import Transformer
from dumo.types import UserError

NAMES = {  # of facebookresearch/DiT and willisma/SiT, models.py
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
DIFFUSERS = {  # names of its DiTTransformer2DModel, to the authors'
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
UNUSED = "projectors."  # of REPA: for its training loss alone


def our_name(name: str, names: Mapping[str, str] = NAMES) -> str | None:
    """Our name for a published one; None: our net has no such layer."""
    found = [re.sub(pattern, ours, name) for pattern, ours in names.items() if re.match(pattern, name)]
    return found[0] if found else None


def of_diffusers(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A DiT as diffusers saves it, under its authors' names. Every block holds embeddings there, equal to the first's.

    Raises UserError where they differ.
    """
    for name, tensor in found.items():
        first = re.sub(r"^transformer_blocks\.\d+\.norm1\.emb\.", "transformer_blocks.0.norm1.emb.", name)
        if not equal(tensor, found[first]):
            raise UserError(f"start.source: {name} is not {first}, and a DiT embeds once: take another one")
    joined = dict(found)
    for name in [name for name in found if ".attn1.to_q." in name]:
        parts = [joined.pop(name.replace("to_q", part)) for part in ("to_q", "to_k", "to_v")]
        joined[name.replace("to_q", "qkv")] = cat(parts)
    return {theirs: tensor for name, tensor in joined.items() if (theirs := our_name(name, DIFFUSERS))}


def converted(found: Mapping[str, Tensor], net: Transformer) -> dict[str, Tensor]:
    """The weights of a SiT under our names, from names that `our_name` knows, for a net of time scale 1.

    A SiT counts time s = 1 - t from noise to data, so v(x_t, t) = -F(x_t, 1 - t).
    """
    state = {ours: tensor for name, tensor in found.items() if (ours := our_name(name))}
    state["embed.weight"] = state["embed.weight"].flatten(1)
    state["positions"] = state["positions"].squeeze(0) if "positions" in state else net.positions  # fixed sinusoids
    channels = net.embed.in_features // net.patch**2
    for name in ("heads.v.out.weight", "heads.v.out.bias"):
        rows = state[name].unflatten(0, (net.patch, net.patch, -1))[:, :, :channels].movedim(2, 0).flatten(0, 2)
        state[name] = -rows
    first = "scalars.embedders.t.0.weight"
    of_cos, of_sin = state[first].double().chunk(2, 1)
    cos, sin = (w := net.scalars.frequencies.double().to(of_cos.device)).cos(), w.sin()
    state[first] = cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], 1).to(state[first])
    return state
