"""One safetensors file of a whole model: which model it is of, and the commands that make a diffusers folder of it.

`unpack_hint` is the entrance. The names of a file's tensors say its model: the first of `KINDS` whose marks are all
among them. A file of Stable Diffusion 1, 2 or XL holds autoencoder and text encoders, too, so diffusers makes the whole
folder of it. Of other models the transformer alone is taken from the file, and the other parts are fetched.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dumo.encoders import part
from dumo.io import weights


@dataclass(frozen=True)
class SingleFile:
    """A model that is published as one file."""

    marks: tuple[str, ...]  # parts of tensors' names: a file of the model has one of each
    repository: str  # on the Hugging Face hub: its folder
    class_name: str  # of diffusers: of the pipeline if the file holds all, else of the transformer
    holds_all: bool = False  # with autoencoder and text encoders
    has_loader: bool = True  # diffusers opens one file of it


# In this order. Names of the original files and of diffusers', for the same model, are two rows where both are met.
KINDS = (
    SingleFile(
        ("conditioner.embedders.1.",),
        "stabilityai/stable-diffusion-xl-base-1.0",
        "StableDiffusionXLPipeline",
        holds_all=True,
    ),
    SingleFile(
        ("cond_stage_model.model.",), "stabilityai/stable-diffusion-2-1", "StableDiffusionPipeline", holds_all=True
    ),
    SingleFile(
        ("cond_stage_model.transformer.",),
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "StableDiffusionPipeline",
        holds_all=True,
    ),
    SingleFile(("joint_blocks.37.",), "stabilityai/stable-diffusion-3.5-large", "SD3Transformer2DModel"),
    SingleFile(("joint_blocks.0.x_block.attn2.",), "stabilityai/stable-diffusion-3.5-medium", "SD3Transformer2DModel"),
    SingleFile(("joint_blocks.",), "stabilityai/stable-diffusion-3-medium-diffusers", "SD3Transformer2DModel"),
    SingleFile(("distilled_guidance_layer.",), "lodestones/Chroma1-HD", "ChromaTransformer2DModel"),
    SingleFile(
        ("double_stream_modulation_img.", "single_blocks.47."),
        "black-forest-labs/FLUX.2-dev",
        "Flux2Transformer2DModel",
    ),
    SingleFile(
        ("double_stream_modulation_img.", "double_blocks.7."),
        "black-forest-labs/FLUX.2-klein-base-9B",
        "Flux2Transformer2DModel",
    ),
    SingleFile(
        ("double_stream_modulation_img.", "double_blocks."),
        "black-forest-labs/FLUX.2-klein-base-4B",
        "Flux2Transformer2DModel",
    ),
    SingleFile(("double_blocks.", "guidance_in."), "black-forest-labs/FLUX.1-dev", "FluxTransformer2DModel"),
    SingleFile(("double_blocks.",), "black-forest-labs/FLUX.1-schnell", "FluxTransformer2DModel"),
    SingleFile(
        ("single_transformer_blocks.0.norm.linear.", "time_text_embed.guidance_embedder."),
        "black-forest-labs/FLUX.1-dev",
        "FluxTransformer2DModel",
    ),
    SingleFile(
        ("single_transformer_blocks.0.norm.linear.", "time_text_embed.text_embedder."),
        "black-forest-labs/FLUX.1-schnell",
        "FluxTransformer2DModel",
    ),
    SingleFile(("transformer_blocks.0.img_mod.",), "Qwen/Qwen-Image", "QwenImageTransformer2DModel"),
    SingleFile(
        ("transformer_blocks.0.norm1_context.linear.", "pos_embed.proj.", "time_text_embed."),
        "stabilityai/stable-diffusion-3-medium-diffusers",
        "SD3Transformer2DModel",
    ),
    SingleFile(("cap_pad_token",), "Tongyi-MAI/Z-Image", "ZImageTransformer2DModel"),
    SingleFile(("cap_embedder.",), "Alpha-VLLM/Lumina-Image-2.0", "Lumina2Transformer2DModel"),
    SingleFile(("double_layers.",), "fal/AuraFlow-v0.3", "AuraFlowTransformer2DModel"),
    SingleFile(("attention_y_norm.",), "Efficient-Large-Model/Sana_1600M_1024px_diffusers", "SanaTransformer2DModel"),
    SingleFile(
        ("blocks.0.cross_attn.q_linear.",),
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        "PixArtTransformer2DModel",
        has_loader=False,
    ),
    SingleFile(("head.modulation", "blocks.39."), "Wan-AI/Wan2.1-T2V-14B-Diffusers", "WanTransformer3DModel"),
    SingleFile(("head.modulation",), "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "WanTransformer3DModel"),
)
MODEL_FOLDER = "transformer"
OTHER_PARTS = ("vae", "scheduler", "text_encoder*", "tokenizer*")
OTHER_FILES = ("model_index.json", "README.md", f"{MODEL_FOLDER}/config.json")
MAX_NAMES = 3  # of a file that is of no known model, shown in the error: ours


def unpack_hint(file: Path) -> str:
    """What a file is, and how to make a folder DIR of it, in words. Raises UserError for a file that is damaged."""
    with weights.open_safetensors(file) as opened:
        names = list(opened.keys())
        dtype = opened.get_slice(names[0]).get_dtype() if names else ""
    kind = _kind_of(names)
    if kind is None:
        shown = ", ".join(names[:MAX_NAMES])
        return (
            f"{file} is one file, by its tensors ({shown} ...) of no model that dumo knows. Fetch the folder of the "
            "model that it was made of from the Hugging Face hub into DIR"
        )
    if kind.holds_all:
        code = (
            f"from diffusers import {kind.class_name} as P; "
            f"P.from_single_file('{file}', config='{kind.repository}').save_pretrained('DIR')"
        )
        return (
            f"{file} is one file, without the configs and tokenizers of a pipeline. Make a folder DIR of it, "
            f'python -c "{code}"'
        )
    folder = "DIR"
    if not kind.has_loader:
        fetch = part.download_command(
            kind.repository, (MODEL_FOLDER, *OTHER_PARTS), ("model_index.json", "README.md"), folder
        )
        return (
            f"{file} is one file of a {kind.class_name}, which diffusers does not unpack. Fetch the folder DIR of its "
            f"model, {fetch}"
        )
    fetch = part.download_command(kind.repository, OTHER_PARTS, OTHER_FILES, folder)
    torch_dtype = {"F32": "float32", "F16": "float16"}.get(dtype, "bfloat16")
    code = (
        f"import torch; from diffusers import {kind.class_name} as M; "
        f"M.from_single_file('{file}', config='{folder}', subfolder='{MODEL_FOLDER}', torch_dtype=torch.{torch_dtype})"
        f".save_pretrained('{folder}/{MODEL_FOLDER}')"
    )
    return (
        f"{file} is one file of a {kind.class_name}, without the other parts of a pipeline. Make a folder DIR of it, "
        f'{fetch} && python -c "{code}"'
    )


def _kind_of(names: Collection[str]) -> SingleFile | None:
    """The model of a file by the names of its tensors; None: none of KINDS."""
    for kind in KINDS:
        if all(any(_begins_part(name, mark) for name in names) for mark in kind.marks):
            return kind
    return None


def _begins_part(name: str, mark: str) -> bool:
    """Whether a tensor's name has a mark at its beginning, or at that of one of its parts between dots."""
    return name.startswith(mark) or f".{mark}" in name
