"""What ComfyUI makes of a file with a LoRA, from facts of its code: `load_lora`, `model_lora_keys_unet` and
`calculate_weight` of comfy/lora.py at commit 17358c8, the maps of comfy/utils.py at 09708ea.

It has weights by names of its own, and fuses what diffusers has as q, k and v. For each layer of diffusers a rule says
which of its own has it; where it is fused, the place is the letter in the group that follows the number of the block.
"""

import re

import torch
from torch import Tensor

State = dict[str, Tensor]
PLACES = "qkvm"  # of rows in a fused layer; m: the perceptron, in single blocks of Flux
BLOCK = r"transformer_blocks\.(\d+)\."
SD3 = {
    BLOCK + r"attn\.to_([qkv])": r"joint_blocks.\1.x_block.attn.qkv",
    BLOCK + r"attn2\.to_([qkv])": r"joint_blocks.\1.x_block.attn2.qkv",
    BLOCK + r"attn\.add_([qkv])_proj": r"joint_blocks.\1.context_block.attn.qkv",
    BLOCK + r"attn\.to_out\.0": r"joint_blocks.\1.x_block.attn.proj",
    BLOCK + r"attn2\.to_out\.0": r"joint_blocks.\1.x_block.attn2.proj",
    BLOCK + r"attn\.to_add_out": r"joint_blocks.\1.context_block.attn.proj",
    BLOCK + r"ff\.net\.0\.proj": r"joint_blocks.\1.x_block.mlp.fc1",
    BLOCK + r"ff\.net\.2": r"joint_blocks.\1.x_block.mlp.fc2",
    BLOCK + r"ff_context\.net\.0\.proj": r"joint_blocks.\1.context_block.mlp.fc1",
    BLOCK + r"ff_context\.net\.2": r"joint_blocks.\1.context_block.mlp.fc2",
    r"time_text_embed\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
    r"time_text_embed\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
    "proj_out": "final_layer.linear",
}
FLUX = {
    BLOCK + r"attn\.to_([qkv])": r"double_blocks.\1.img_attn.qkv",
    BLOCK + r"attn\.add_([qkv])_proj": r"double_blocks.\1.txt_attn.qkv",
    BLOCK + r"attn\.to_out\.0": r"double_blocks.\1.img_attn.proj",
    BLOCK + r"attn\.to_add_out": r"double_blocks.\1.txt_attn.proj",
    BLOCK + r"ff\.(?:net\.0\.proj|linear_in)": r"double_blocks.\1.img_mlp.0",
    BLOCK + r"ff\.(?:net\.2|linear_out)": r"double_blocks.\1.img_mlp.2",
    BLOCK + r"ff_context\.(?:net\.0\.proj|linear_in)": r"double_blocks.\1.txt_mlp.0",
    BLOCK + r"ff_context\.(?:net\.2|linear_out)": r"double_blocks.\1.txt_mlp.2",
    r"single_" + BLOCK + r"attn\.to_([qkv])": r"single_blocks.\1.linear1",
    r"single_" + BLOCK + r"proj_(m)lp": r"single_blocks.\1.linear1",
    r"single_" + BLOCK + r"attn\.to_qkv_mlp_proj": r"single_blocks.\1.linear1",
    r"single_" + BLOCK + r"(?:proj_out|attn\.to_out)": r"single_blocks.\1.linear2",
    r"time_text_embed\.timestep_embedder\.linear_1": "time_in.in_layer",
    r"time_text_embed\.timestep_embedder\.linear_2": "time_in.out_layer",
    "proj_out": "final_layer.linear",
}
FLUX2 = {  # in files of weights, not of LoRAs
    r"time_guidance_embed\.timestep_embedder\.linear_1": "time_in.in_layer",
    r"time_guidance_embed\.timestep_embedder\.linear_2": "time_in.out_layer",
}
Z_IMAGE = {
    r"(layers\.\d+|\w+_refiner\.\d+)\.attention\.to_([qkv])": r"\1.attention.qkv",
    r"(layers\.\d+|\w+_refiner\.\d+)\.attention\.to_out\.0": r"\1.attention.out",
    r"((?:layers|\w+_refiner)\.\d+\.feed_forward\.w\d|t_embedder\.mlp\.\d)": r"\1",
    r"all_final_layer\.2-1\.linear": "final_layer.linear",
}
JOINT = r"joint_" + BLOCK
LAYERS = {"linear_1": "c_fc1", "linear_2": "c_fc2", "out_projection": "c_proj"}
AURAFLOW = {
    **{JOINT + rf"attn\.to_{x}": rf"double_layers.\1.attn.w2{x}" for x in "qkv"},
    **{JOINT + rf"attn\.add_{x}_proj": rf"double_layers.\1.attn.w1{x}" for x in "qkv"},
    JOINT + r"attn\.to_out\.0": r"double_layers.\1.attn.w2o",
    JOINT + r"attn\.to_add_out": r"double_layers.\1.attn.w1o",
    **{JOINT + rf"ff\.{name}": rf"double_layers.\1.mlpX.{own}" for name, own in LAYERS.items()},
    **{JOINT + rf"ff_context\.{name}": rf"double_layers.\1.mlpC.{own}" for name, own in LAYERS.items()},
    **{r"single_" + BLOCK + rf"attn\.to_{x}": rf"single_layers.\1.attn.w1{x}" for x in "qkv"},
    r"single_" + BLOCK + r"attn\.to_out\.0": r"single_layers.\1.attn.w1o",
    **{r"single_" + BLOCK + rf"ff\.{name}": rf"single_layers.\1.mlp.{own}" for name, own in LAYERS.items()},
    r"time_step_proj\.linear_1": "t_embedder.mlp.0",
    r"time_step_proj\.linear_2": "t_embedder.mlp.2",
    "proj_out": "final_linear",
}
PIXART = {
    BLOCK + r"attn1\.to_([qkv])": r"blocks.\1.attn.qkv",
    BLOCK + r"attn1\.to_out\.0": r"blocks.\1.attn.proj",
    BLOCK + r"attn2\.to_q": r"blocks.\1.cross_attn.q_linear",
    BLOCK + r"attn2\.to_([kv])": r"blocks.\1.cross_attn.kv_linear",
    BLOCK + r"attn2\.to_out\.0": r"blocks.\1.cross_attn.proj",
    BLOCK + r"ff\.net\.0\.proj": r"blocks.\1.mlp.fc1",
    BLOCK + r"ff\.net\.2": r"blocks.\1.mlp.fc2",
    r"adaln_single\.emb\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
    r"adaln_single\.emb\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
    "proj_out": "final_layer.linear",
}
RULES: dict[str, dict[str, str]] = {
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": FLUX,
    "ChromaTransformer2DModel": FLUX,
    "QwenImageTransformer2DModel": {r"(.*)": r"\1"},  # its names are those of diffusers
    "ZImageTransformer2DModel": Z_IMAGE,
    "AuraFlowTransformer2DModel": AURAFLOW,
    "PixArtTransformer2DModel": PIXART,
}


def place(layer: str, rules: dict[str, str]) -> tuple[str, int | None] | None:
    """Which of ComfyUI's own layers has a layer of diffusers, and as which of several; None: the rules have none."""
    for rule, own in rules.items():
        if match := re.fullmatch(rule, layer):
            return match.expand(own), PLACES.index(match[2]) if (match.lastindex or 0) > 1 else None
    return None


def native(weights: State, kind: str) -> State:
    """A model of diffusers under ComfyUI's own names, fused as there; what no rule has keeps its name."""
    found, fused = State(), dict[str, dict[int, Tensor]]()
    for name, tensor in weights.items():
        layer, _, end = name.rpartition(".")
        own, part = place(layer, RULES[kind] | (FLUX2 if kind.startswith("Flux2") else {})) or (layer, None)
        if part is None:
            found[f"{own}.{end}"] = tensor.clone()
        else:
            fused.setdefault(f"{own}.{end}", {})[part] = tensor
    return found | {name: torch.cat([rows for _, rows in sorted(parts.items())]) for name, parts in fused.items()}


def loaded(weights: State, file: State, kind: str) -> State:
    """The model under its own names after the loader has merged a file at strength 1.

    A key may be left over only if the file has the same layer by another name, too.
    """
    there, used = native(weights, kind), set[str]()
    # The rows of its own weights that each name of a layer stands for, (name of the weight, first row, number of rows).
    rows: dict[str, tuple[str, int, int]] = {}
    for name, tensor in there.items():
        own = name.removesuffix(".weight")
        rows[f"lora_unet_{own.replace('.', '_')}"] = (name, 0, len(tensor))
    fused: dict[str, dict[int, str]] = {}
    sizes = {name.removesuffix(".weight"): len(x) for name, x in weights.items() if name.endswith(".weight")}
    for layer in sizes:
        if found := place(layer, RULES[kind]):
            own, part = found
            fused.setdefault(own, {})[part or 0] = layer
    for own, layers in fused.items():
        first = 0
        for _, layer in sorted(layers.items()):
            rows[f"transformer.{layer}"] = (f"{own}.weight", first, sizes[layer])
            first += sizes[layer]
    for layer, (name, first, count) in rows.items():
        if (up := file.get(f"{layer}.lora_B.weight")) is not None:
            down = file[f"{layer}.lora_A.weight"]
            own_rows = there[name].narrow(0, first, count)
            own_rows.add_((up.flatten(1) @ down.flatten(1)).view_as(own_rows))
            used |= {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"}
    for key in file.keys() - used:
        assert any(torch.equal(file[key], file[other]) for other in used if file[other].shape == file[key].shape), key
    return there
