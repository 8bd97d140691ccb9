"""One safetensors file of a whole model: which model it is of, and the commands that make a diffusers folder of it.

`unpack_hint` is the only entrance, for errors: dumo opens folders, and these commands make one. In this order it

1. reads the names of the file's tensors, and the dtype of the first;
2. finds the kind of file: the first of `_FILE_KINDS` whose marks are all among the names;
3. words the commands for it. A file of Stable Diffusion 1, 2 or XL holds autoencoder and text encoders, too, so
   diffusers makes the whole folder of it. Of other models the transformer alone is taken from the file, and the
   pipeline's other components are fetched. A model whose file diffusers cannot open is fetched whole.

To add a model, add a row to `_FILE_KINDS`.
"""

import json
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dumo.io import hub, weights


@dataclass(frozen=True)
class _FileKind:
    """The files of one model that is published as a single file."""

    marks: tuple[str, ...]  # beginnings of segments of tensors' names: a file of the model has a name for each
    repository: str  # on the Hugging Face hub, with the model as a folder of diffusers
    class_name: str  # of diffusers: of the pipeline if the file is a whole one, else of the transformer
    is_whole_pipeline: bool = False  # holds autoencoder and text encoders, too
    has_loader: bool = True  # diffusers can open one file of it


# Specific before general, because the first match wins. A model has two rows where files with the original names of
# tensors and files with diffusers' names are both met. Models of one family differ in how many blocks they have, which
# are counted from 0.
_FILE_KINDS = (
    _FileKind(
        ("conditioner.embedders.1.",),
        "stabilityai/stable-diffusion-xl-base-1.0",
        "StableDiffusionXLPipeline",
        is_whole_pipeline=True,
    ),
    _FileKind(
        ("cond_stage_model.model.",),
        "stabilityai/stable-diffusion-2-1",
        "StableDiffusionPipeline",
        is_whole_pipeline=True,
    ),
    _FileKind(
        ("cond_stage_model.transformer.",),
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "StableDiffusionPipeline",
        is_whole_pipeline=True,
    ),
    # 38 joint blocks: SD 3.5 large
    _FileKind(("joint_blocks.37.",), "stabilityai/stable-diffusion-3.5-large", "SD3Transformer2DModel"),
    # a second attention in the first blocks: SD 3.5 medium; without it SD 3 medium, of 24 blocks as well
    _FileKind(("joint_blocks.0.x_block.attn2.",), "stabilityai/stable-diffusion-3.5-medium", "SD3Transformer2DModel"),
    _FileKind(("joint_blocks.",), "stabilityai/stable-diffusion-3-medium-diffusers", "SD3Transformer2DModel"),
    _FileKind(("distilled_guidance_layer.",), "lodestones/Chroma1-HD", "ChromaTransformer2DModel"),
    # 48 single blocks: FLUX.2 dev
    _FileKind(
        ("double_stream_modulation_img.", "single_blocks.47."),
        "black-forest-labs/FLUX.2-dev",
        "Flux2Transformer2DModel",
    ),
    # 8 double blocks, and fewer single ones than dev: klein 9B; 5 double blocks: klein 4B
    _FileKind(
        ("double_stream_modulation_img.", "double_blocks.7."),
        "black-forest-labs/FLUX.2-klein-base-9B",
        "Flux2Transformer2DModel",
    ),
    _FileKind(
        ("double_stream_modulation_img.", "double_blocks."),
        "black-forest-labs/FLUX.2-klein-base-4B",
        "Flux2Transformer2DModel",
    ),
    # FLUX.1 dev is given the guidance as a number, and schnell is not
    _FileKind(("double_blocks.", "guidance_in."), "black-forest-labs/FLUX.1-dev", "FluxTransformer2DModel"),
    _FileKind(("double_blocks.",), "black-forest-labs/FLUX.1-schnell", "FluxTransformer2DModel"),
    _FileKind(
        ("single_transformer_blocks.0.norm.linear.", "time_text_embed.guidance_embedder."),
        "black-forest-labs/FLUX.1-dev",
        "FluxTransformer2DModel",
    ),
    _FileKind(
        ("single_transformer_blocks.0.norm.linear.", "time_text_embed.text_embedder."),
        "black-forest-labs/FLUX.1-schnell",
        "FluxTransformer2DModel",
    ),
    _FileKind(("transformer_blocks.0.img_mod.",), "Qwen/Qwen-Image", "QwenImageTransformer2DModel"),
    # in diffusers' names: 38 blocks, a second attention, neither
    _FileKind(
        ("transformer_blocks.37.norm1_context.linear.", "pos_embed.proj.", "time_text_embed."),
        "stabilityai/stable-diffusion-3.5-large",
        "SD3Transformer2DModel",
    ),
    _FileKind(
        ("transformer_blocks.0.attn2.", "transformer_blocks.0.norm1_context.linear.", "pos_embed.proj."),
        "stabilityai/stable-diffusion-3.5-medium",
        "SD3Transformer2DModel",
    ),
    _FileKind(
        ("transformer_blocks.0.norm1_context.linear.", "pos_embed.proj.", "time_text_embed."),
        "stabilityai/stable-diffusion-3-medium-diffusers",
        "SD3Transformer2DModel",
    ),
    _FileKind(("cap_pad_token",), "Tongyi-MAI/Z-Image", "ZImageTransformer2DModel"),
    _FileKind(("cap_embedder.",), "Alpha-VLLM/Lumina-Image-2.0", "Lumina2Transformer2DModel"),
    _FileKind(("double_layers.",), "fal/AuraFlow-v0.3", "AuraFlowTransformer2DModel"),
    _FileKind(("attention_y_norm.",), "Efficient-Large-Model/Sana_1600M_1024px_diffusers", "SanaTransformer2DModel"),
    _FileKind(
        ("blocks.0.cross_attn.q_linear.",),
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        "PixArtTransformer2DModel",
        has_loader=False,
    ),
    # 40 blocks: Wan 14B; 30 blocks: Wan 1.3B
    _FileKind(("head.modulation", "blocks.39."), "Wan-AI/Wan2.1-T2V-14B-Diffusers", "WanTransformer3DModel"),
    _FileKind(("head.modulation",), "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "WanTransformer3DModel"),
)
_OTHER_MODELS = (  # which dumo does not know, with the marks of one that it knows
    ("head.modulation", "img_emb."),  # Wan that begins with an image
    ("double_blocks.", "txt_in.individual_token_refiner."),  # HunyuanVideo
)
_FOLDER = "DIR"  # in the commands: the folder that the user makes
_MODEL_FOLDER = "transformer"
_OTHER_COMPONENTS = ("vae", "scheduler", "text_encoder*", "tokenizer*")
_PIPELINE_FILES = ("model_index.json", "README.md")
_MODEL_CONFIG = f"{_MODEL_FOLDER}/config.json"  # read to unpack the file
_TORCH_DTYPES = {"F32": "float32", "F16": "float16"}  # by the dtypes of safetensors
# of any other file: of one in bfloat16 its own; fp8, in which no net can be tuned, is widened to it
_OTHER_DTYPE = "bfloat16"
_MAX_NAMES = 3  # of tensors, shown in the error for a file of no known model: ours


def unpack_hint(file: Path) -> str:
    """What a file is, and the command that makes a folder DIR of it, in words. Raises UserError for a damaged file."""
    with weights.open_safetensors(file) as tensors:
        names = list(tensors.keys())
        dtype = tensors.get_slice(names[0]).get_dtype() if names else ""
    kind = _kind_of(names)
    if kind is None:
        return _unknown_model_hint(file, names)
    if kind.is_whole_pipeline:
        return _pipeline_hint(file, kind)
    if kind.has_loader:
        return _transformer_hint(file, kind, _TORCH_DTYPES.get(dtype, _OTHER_DTYPE))
    return _fetch_hint(file, kind)


def _kind_of(names: Collection[str]) -> _FileKind | None:
    """The kind of a file by the names of its tensors; None: none of _FILE_KINDS."""
    for marks in _OTHER_MODELS:
        if all(_has_mark(names, mark) for mark in marks):
            return None
    for kind in _FILE_KINDS:
        if all(_has_mark(names, mark) for mark in kind.marks):
            return kind
    return None


def _has_mark(names: Collection[str], mark: str) -> bool:
    """Whether a mark begins one of the names, or a later segment of one: segments stand between dots."""
    return any(name.startswith(mark) or f".{mark}" in name for name in names)


def _unknown_model_hint(file: Path, names: list[str]) -> str:
    """The hint for a file of no known model, with the names of its first tensors."""
    shown_names = ", ".join(names[:_MAX_NAMES])
    return (
        f"{file} is one file, by its tensors ({shown_names} ...) of no model that dumo knows. Fetch the folder of the "
        f"model that it was made of from the Hugging Face hub into {_FOLDER}"
    )


def _pipeline_hint(file: Path, kind: _FileKind) -> str:
    """The hint for a file of a whole pipeline: diffusers fetches the configs, and makes the folder of them and it."""
    command = _python_command(
        f"from diffusers import {kind.class_name} as P; "
        f'P.from_single_file({_literal(file)}, config="{kind.repository}").save_pretrained("{_FOLDER}")'
    )
    return (
        f"{file} is one file, without the configs and tokenizers of a pipeline. Make a folder {_FOLDER} of it, "
        f"{command}"
    )


def _transformer_hint(file: Path, kind: _FileKind, torch_dtype: str) -> str:
    """The hint for a file of a transformer: the rest of the folder is fetched first, then diffusers adds the file."""
    fetch = hub.download_command(kind.repository, _OTHER_COMPONENTS, (*_PIPELINE_FILES, _MODEL_CONFIG), _FOLDER)
    command = _python_command(
        f"import torch; from diffusers import {kind.class_name} as M; "
        f'M.from_single_file({_literal(file)}, config="{_FOLDER}", subfolder="{_MODEL_FOLDER}", '
        f'torch_dtype=torch.{torch_dtype}).save_pretrained("{_FOLDER}/{_MODEL_FOLDER}")'
    )
    return (
        f"{file} is one file of a {kind.class_name}, without the other parts of a pipeline. Make a folder {_FOLDER} of "
        f"it, {fetch} && {command}"
    )


def _fetch_hint(file: Path, kind: _FileKind) -> str:
    """The hint for a file that diffusers cannot open: the whole folder is fetched, and the file is not used."""
    fetch = hub.download_command(kind.repository, (_MODEL_FOLDER, *_OTHER_COMPONENTS), _PIPELINE_FILES, _FOLDER)
    return (
        f"{file} is one file of a {kind.class_name}, which diffusers does not unpack. Fetch the folder {_FOLDER} of "
        f"its model, {fetch}"
    )


def _python_command(code: str) -> str:
    """The shell's command that runs a line of Python."""
    return f"python -c {shlex.quote(code)}"


def _literal(file: Path) -> str:
    """A path as a string in Python, in double quotes, which the shell's single quotes leave alone."""
    return json.dumps(str(file), ensure_ascii=False)
