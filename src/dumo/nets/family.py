"""The diffusers models that can be fine-tuned: one `Family` per class, with its arguments and the names of its layers.

`family_of` returns the `Family` of a pipeline from its config.json, or raises UserError. `dumo.nets.dualized` calls the
model with the arguments that `Family.arguments` returns for `Inputs`, and `dumo.encoders.encode_prompt` uses the family
to encode texts. To add a family, add an entry to `FAMILIES`, or to `VARIANTS` if the model class has an entry already,
and a function for the arguments if none of the existing ones fits (docs/families.md). `PIPELINES` lists the supported
pipeline classes.

A family contains what does not follow from configs. `dumo.nets.vp` converts the outputs of diffusion models
(`Family.is_diffusion`). All other models predict the velocity noise - data on the linear path, with data at t = 0 and
noise at t = 1. Z-Image and Lumina 2 reverse time and predict data - noise (`Family.has_reversed_time`).

Tests check that stock pipelines and dumo generate the same images.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from dumo.autodiff.dual import primal
from dumo.encoders.pipeline_folder import TRANSFORMER, Pipeline
from dumo.encoders.pipeline_folder import UNET as UNET_PART
from dumo.types import Array, Sample, UserError

# A model's config.json.
Config = Mapping[str, Any]
# The arguments of a model's forward, by name.
Arguments = dict[str, Any]

# The highest frequency of a time embedding, in rad per unit of t: nearly all models embed 1000 t.
MAX_FREQUENCY = 1000.0


@dataclass(frozen=True)
class Inputs:
    """The inputs of a diffusers model for b rows: images in the model's layout, the model's time, and texts."""

    x: Array  # the image (b, c, h, w), or packed into tokens (b, n, c p p)
    time: Array  # (b,), in the model's own unit
    tokens: Tensor  # (b, l, d), of text
    mask: Tensor | None  # (b, l), bool: False on padding of text. None means no padding
    pooled: Tensor | None  # (b, p), of text
    guidance: Array | None  # (b,), the number that a distilled model embeds
    grid: tuple[int, int]  # rows and columns of patches
    lengths: tuple[int, ...] | None  # text tokens per row, for models that process captions one by one
    source: Tensor | None = None  # (b, n, c p p), packed: the image to edit

    @property
    def mask_or_ones(self) -> Tensor:
        """Return the mask (b, l) for a model that requires one."""
        if self.mask is None:
            return self.tokens.new_ones(self.tokens.shape[:2], dtype=torch.bool)
        return self.mask


# --- The arguments of forward, one function for each kind of model. ---


def plain_arguments(inputs: Inputs) -> Arguments:
    """Return image, time and text tokens, with the names that most models use."""
    return {"hidden_states": inputs.x, "timestep": inputs.time, "encoder_hidden_states": inputs.tokens}


def sd3_arguments(inputs: Inputs) -> Arguments:
    """Return image, time, text tokens, and the pooled text."""
    return {**plain_arguments(inputs), "pooled_projections": inputs.pooled}


def flux_arguments(inputs: Inputs) -> Arguments:
    """Return image, time, text tokens and pooled text, with positions on three axes, and the embedded guidance.

    Text tokens have position 0 on all axes.
    """
    return {
        **sd3_arguments(inputs),
        "img_ids": positions(inputs.grid, 3, inputs.x),
        "txt_ids": inputs.tokens.new_zeros(inputs.tokens.shape[1], 3),
        "guidance": inputs.guidance,
    }


def kontext_arguments(inputs: Inputs) -> Arguments:
    """Return the arguments of a FLUX.1, with the tokens of the image to edit after the tokens of the sample.

    They have the same positions as the sample, except for 1 on the first axis.
    """
    assert inputs.source is not None
    arguments = flux_arguments(inputs)
    source_positions = positions(inputs.grid, 3, inputs.x)
    source_positions[:, 0] = 1
    arguments["hidden_states"] = torch.cat([inputs.x, inputs.source.to(inputs.x.dtype)], 1)
    arguments["img_ids"] = torch.cat([arguments["img_ids"], source_positions])
    return arguments


def flux2_arguments(inputs: Inputs) -> Arguments:
    """Return image, time and text tokens, with positions on four axes, and the embedded guidance.

    The last axis is the position of a token in its text.
    """
    text_positions = inputs.tokens.new_zeros(inputs.tokens.shape[1], 4)
    text_positions[:, 3] = torch.arange(len(text_positions), device=text_positions.device)
    return {
        **plain_arguments(inputs),
        "img_ids": positions(inputs.grid, 4, inputs.x),
        "txt_ids": text_positions,
        "guidance": inputs.guidance,
    }


def chroma_arguments(inputs: Inputs) -> Arguments:
    """Return image, time and text tokens, with positions on three axes, and a mask over text and image.

    The mask is floating-point, because the blocks add it to the attention scores.
    """
    mask = None
    if inputs.mask is not None:
        image_mask = inputs.mask.new_ones(len(inputs.mask), inputs.grid[0] * inputs.grid[1])
        mask = torch.cat([inputs.mask, image_mask], 1).to(inputs.tokens.dtype)
    return {
        **plain_arguments(inputs),
        "img_ids": positions(inputs.grid, 3, inputs.x),
        "txt_ids": inputs.tokens.new_zeros(inputs.tokens.shape[1], 3),
        "attention_mask": mask,
    }


def sana_arguments(inputs: Inputs) -> Arguments:
    """Return image, time, text tokens and their mask, and the embedded guidance."""
    return {**plain_arguments(inputs), "encoder_attention_mask": inputs.mask, "guidance": inputs.guidance}


def qwen_arguments(inputs: Inputs) -> Arguments:
    """Return image, time, text tokens and their mask, and the grid, from which the model computes positions."""
    # Frames, rows and columns of each image.
    image_shapes = [(1, *inputs.grid)]
    return {
        **plain_arguments(inputs),
        "encoder_hidden_states_mask": inputs.mask,
        "img_shapes": [image_shapes] * len(inputs.tokens),
    }


def z_image_arguments(inputs: Inputs) -> Arguments:
    """Return image, time and text tokens as lists of rows: an image as a video of one frame, a caption unpadded."""
    lengths = inputs.lengths or (inputs.tokens.shape[1],) * len(inputs.tokens)
    captions = [tokens[:length] for tokens, length in zip(inputs.tokens.unbind(), lengths, strict=True)]
    return {"x": list(inputs.x.unsqueeze(2).unbind(0)), "t": inputs.time, "cap_feats": captions}


def lumina2_arguments(inputs: Inputs) -> Arguments:
    """Return image, time, text tokens and their mask, from which the model reads how long a caption is."""
    return {**plain_arguments(inputs), "encoder_attention_mask": inputs.mask_or_ones}


def cogview4_arguments(inputs: Inputs) -> Arguments:
    """Return image, time and text tokens, with the image's size and corner in pixels.

    Its pipeline counts 16 pixels per side of a patch, 8 per latent.
    """
    b = len(inputs.tokens)
    pixels = [16.0 * patches for patches in inputs.grid]
    sizes = inputs.tokens.new_tensor([pixels]).expand(b, 2)
    return {
        **plain_arguments(inputs),
        "original_size": sizes,
        "target_size": sizes,
        "crop_coords": sizes.new_zeros(b, 2),
    }


def prx_arguments(inputs: Inputs) -> Arguments:
    """Return image, time, text tokens and their mask."""
    return {**plain_arguments(inputs), "attention_mask": inputs.mask}


def unet_arguments(inputs: Inputs) -> Arguments:
    """Return image, time and text tokens by a UNet's names.

    The time has no tangent here: `Family.time_part` gets the times themselves.
    """
    return {"sample": inputs.x, "timestep": primal(inputs.time), "encoder_hidden_states": inputs.tokens}


def sdxl_arguments(inputs: Inputs) -> Arguments:
    """Return the arguments of a UNet, with pooled text and six sizes in pixels, 8 per latent.

    The sizes are the image's height and width, the top and left of its crop, and height and width again.
    """
    height = 8.0 * inputs.grid[0]
    width = 8.0 * inputs.grid[1]
    sizes = inputs.tokens.new_tensor([[height, width, 0, 0, height, width]]).expand(len(inputs.tokens), 6)
    return {**unet_arguments(inputs), "added_cond_kwargs": {"text_embeds": inputs.pooled, "time_ids": sizes}}


def pixart_arguments(inputs: Inputs) -> Arguments:
    """Return image, time, text tokens and their mask, without image sizes."""
    return {
        **plain_arguments(inputs),
        "encoder_attention_mask": inputs.mask_or_ones,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def pixart_alpha_arguments(inputs: Inputs) -> Arguments:
    """Return image, time, text tokens and their mask, with the image's size in pixels, 8 per latent, and its ratio.

    Models for 512 pixels or fewer have no size embedders and ignore them.
    """
    b = len(inputs.tokens)
    height = 8.0 * inputs.x.shape[2]
    width = 8.0 * inputs.x.shape[3]
    sizes = {
        "resolution": inputs.tokens.new_tensor([[height, width]]).expand(b, 2),
        "aspect_ratio": inputs.tokens.new_tensor([[height / width]]).expand(b, 1),
    }
    return {**pixart_arguments(inputs), "added_cond_kwargs": sizes}


def wan_arguments(inputs: Inputs) -> Arguments:
    """Return image, time and text tokens, with an image as a video of one frame."""
    return {**plain_arguments(inputs), "hidden_states": inputs.x.unsqueeze(2)}


def positions(grid: tuple[int, int], axes: int, like: Array) -> Tensor:
    """Return the positions (n, axes) of patches on the device of `like`: row and column on axes 1 and 2, else 0."""
    rows = torch.arange(grid[0], device=like.device, dtype=torch.float32)
    columns = torch.arange(grid[1], device=like.device, dtype=torch.float32)
    coordinates = rows.new_zeros(*grid, axes)
    coordinates[..., 1] = rows[:, None]
    coordinates[..., 2] = columns
    return coordinates.flatten(0, 1)


def pack_latents(x: Sample, grid: tuple[int, int], p: int) -> Array:
    """Pack x (b, c, h, w) into p x p patches (b, n, c p p), row by row, as the pipelines do."""
    b, c = x.shape[:2]
    rows, columns = grid
    return x.reshape(b, c, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, c * p * p)


def unpack_latents(y: Array, grid: tuple[int, int], p: int) -> Array:
    """Unpack patches y (b, n, c p p) to (b, c, h, w), the inverse of `pack_latents`."""
    b = y.shape[0]
    rows, columns = grid
    return y.reshape(b, rows, columns, -1, p, p).permute(0, 3, 1, 4, 2, 5).reshape(b, -1, rows * p, columns * p)


@dataclass(frozen=True)
class Family:
    """The properties of a diffusers model class that do not follow from its config.

    A "key" is a key of the model's config.json, and a "path" the name of a submodule; "" means none.
    """

    arguments: Callable[[Inputs], Arguments]  # returns the arguments of the model's forward
    pipeline: str  # the class of the text-to-image pipeline

    # text
    # The outputs of the pipeline's encode_prompt, in order: "tokens", "mask" and "pooled" of the prompt, with the
    # prefix "-" for the negative prompt, and "_" for outputs that are not used.
    encodes: str
    max_text_tokens: int  # the default of the pipeline's __call__
    text_width: str  # key: channels of a token
    pooled_text_width: str = ""  # key: channels of the pooled text embedding; "" if the model has none
    takes_mask: bool = False  # whether forward has a text mask
    adds_mask: bool = False  # the mask is added to the attention scores, so padding is attended to
    mask_reader: str = ""  # path: a submodule that uses the values of the mask, its second argument
    takes_lists: bool = False  # forward takes lists of captions with different lengths
    one_by_one: bool = False  # without a mask, rows with captions of different lengths are processed one by one

    # time
    time_scale: Callable[[Config], float] = lambda config: 1.0  # the model's time at t = 1
    has_reversed_time: bool = False  # the model's time is 1 - t, and its output is data - noise
    # A diffusion model, which predicts noise or v at the times of its scheduler.
    is_diffusion: bool = False
    # The highest frequency of the time embedding, in rad per unit of t.
    max_frequency: Callable[[Config], float] = lambda config: MAX_FREQUENCY
    # The last part of the paths of time embedders, which are two-layer perceptrons of sines and cosines; "" if none.
    time_embedder: str = "timestep_embedder"
    # path: the submodule whose first arguments are time and guidance, which earlier layers would round.
    time_part: str = ""
    time_part_scale: float = 1.0  # the factor of time and guidance before that submodule
    guidance_scale: Callable[[Config], float] = lambda config: 1.0  # the factor of the embedded guidance

    # samples
    last_layer: str = "proj_out"  # path: the layer that computes the outputs of a patch
    channels_last: bool = False  # whether the channels are last in the outputs of a patch
    out_channels: str = ""  # where the model stores their number: "attribute" or "config"; "" if nowhere
    takes_packed_latents: bool = False  # inputs and outputs are tokens (b, n, c p p)
    edits_images: bool = False  # forward also has an image to edit, and only the first outputs belong to x
    default_side: Callable[[Config], int] = lambda config: 1024  # pixels of the pipeline's image; 0 if not a square

    # blocks
    unused_layers: str = ""  # a pattern of paths, with LAST for the last block: layers without effect on the output
    keeps_mask_when_checkpointed: bool = True  # whether recomputed blocks receive the mask

    def patch(self, config: Config, channels: int) -> int:
        """Return the side of a patch. Raises UserError if the model needs a different number of channels."""
        in_channels: int = config["in_channels"]
        if self.takes_packed_latents:
            p = isqrt(in_channels // channels)
            if p == 0 or p * p * channels != in_channels:
                raise UserError(
                    f"pipeline has a model with tokens of {in_channels} numbers (channels x patch x patch), but the "
                    f"data have {channels} channels: use latents of this model's autoencoder"
                )
            return p
        if in_channels != channels:
            raise UserError(
                f"pipeline has a model with {in_channels} channels, but the data have {channels}: use data with "
                f"{in_channels} channels"
            )
        patch: int | list[int] = config.get("patch_size", config.get("all_patch_size", 1))
        # Wan's patches have frames, rows and columns.
        return patch[-1] if isinstance(patch, list | tuple) else patch

    def pooled_width(self, config: Config) -> int:
        """Return the width of the pooled text embedding, or 0 if the model has none. SDXL also embeds six sizes."""
        if not self.pooled_text_width:
            return 0
        return config[self.pooled_text_width] - 6 * (config.get("addition_time_embed_dim") or 0)


def _latent_side(config: Config) -> int:
    """Return the default side in pixels. The config has the side in latents, each 8 pixels."""
    return 8 * config.get("sample_size", 128)


def _thousand(config: Config) -> float:
    """Return 1000, the time scale of models with times from 0 to 1000."""
    return 1000.0


def _sana_time_scale(config: Config) -> float:
    """Return 1000 times the config's factor, for SANA."""
    return 1000.0 * config.get("timestep_scale", 1.0)


_TOKENS_AND_MASKS = "tokens mask -tokens -mask"
FLUX = "FluxTransformer2DModel"
FLUX2 = "Flux2Transformer2DModel"
UNET = "UNet2DConditionModel"
PIXART = "PixArtTransformer2DModel"
# By model class.
FAMILIES: dict[str, Family] = {
    "SD3Transformer2DModel": Family(
        arguments=sd3_arguments,
        pipeline="StableDiffusion3Pipeline",
        encodes="tokens -tokens pooled -pooled",
        max_text_tokens=77 + 256,  # CLIP's and T5's
        text_width="joint_attention_dim",
        pooled_text_width="pooled_projection_dim",
        time_scale=_thousand,
        channels_last=True,
        out_channels="attribute",
        default_side=_latent_side,
    ),
    FLUX: Family(
        arguments=flux_arguments,
        pipeline="FluxPipeline",
        encodes="tokens pooled _",
        max_text_tokens=512,
        text_width="joint_attention_dim",
        pooled_text_width="pooled_projection_dim",
        time_part="time_text_embed",
        time_part_scale=1000.0,
        takes_packed_latents=True,
    ),
    FLUX2: Family(
        arguments=flux2_arguments,
        pipeline="Flux2Pipeline",
        encodes="tokens _",
        max_text_tokens=512,
        text_width="joint_attention_dim",
        time_part="time_guidance_embed",
        time_part_scale=1000.0,
        takes_packed_latents=True,
    ),
    "ChromaTransformer2DModel": Family(
        arguments=chroma_arguments,
        pipeline="ChromaPipeline",
        encodes="tokens _ mask -tokens _ -mask",
        max_text_tokens=512,
        text_width="joint_attention_dim",
        takes_mask=True,
        adds_mask=True,
        time_embedder="",
        time_part="time_text_embed",
        time_part_scale=1000.0,
        takes_packed_latents=True,
        keeps_mask_when_checkpointed=False,
    ),
    "SanaTransformer2DModel": Family(
        arguments=sana_arguments,
        pipeline="SanaPipeline",
        encodes=_TOKENS_AND_MASKS,
        max_text_tokens=300,
        text_width="caption_channels",
        takes_mask=True,
        time_scale=_sana_time_scale,
        max_frequency=_sana_time_scale,
        guidance_scale=lambda config: config["guidance_embeds_scale"],
        default_side=lambda config: 32 * config["sample_size"],
    ),
    "QwenImageTransformer2DModel": Family(
        arguments=qwen_arguments,
        pipeline="QwenImagePipeline",
        encodes="tokens mask",
        max_text_tokens=512,
        text_width="joint_attention_dim",
        takes_mask=True,
        time_part="time_text_embed",
        takes_packed_latents=True,
        unused_layers=r"transformer_blocks\.LAST\.(attn\.to_add_out|txt_mlp)",
    ),
    "ZImageTransformer2DModel": Family(
        arguments=z_image_arguments,
        pipeline="ZImagePipeline",
        encodes="tokens -tokens",
        max_text_tokens=512,
        text_width="cap_feat_dim",
        takes_mask=True,
        takes_lists=True,
        has_reversed_time=True,
        max_frequency=lambda config: config["t_scale"],
        time_embedder="t_embedder.mlp",
        last_layer="all_final_layer.2-1.linear",
        channels_last=True,
        out_channels="attribute",
    ),
    "Lumina2Transformer2DModel": Family(
        arguments=lumina2_arguments,
        pipeline="Lumina2Pipeline",
        encodes=_TOKENS_AND_MASKS,
        max_text_tokens=256,
        text_width="cap_feat_dim",
        takes_mask=True,
        mask_reader="rope_embedder",
        has_reversed_time=True,
        max_frequency=lambda config: 1.0,
        last_layer="norm_out.linear_2",
        channels_last=True,
        out_channels="attribute",
        default_side=_latent_side,
    ),
    "AuraFlowTransformer2DModel": Family(  # padding is zeros, which its blocks see
        arguments=plain_arguments,
        pipeline="AuraFlowPipeline",
        encodes="tokens _ -tokens _",
        max_text_tokens=256,
        text_width="joint_attention_dim",
        time_embedder="time_step_proj",
        channels_last=True,
        out_channels="config",
    ),
    "CogView4Transformer2DModel": Family(  # its mask is added to the scores, so it hides nothing
        arguments=cogview4_arguments,
        pipeline="CogView4Pipeline",
        encodes="tokens -tokens",
        max_text_tokens=1024,
        text_width="text_embed_dim",
        one_by_one=True,
        time_scale=_thousand,
        default_side=_latent_side,
    ),
    "PRXTransformer2DModel": Family(
        arguments=prx_arguments,
        pipeline="PRXPipeline",
        encodes=_TOKENS_AND_MASKS,
        max_text_tokens=256,
        text_width="context_in_dim",
        takes_mask=True,
        max_frequency=lambda config: config["time_factor"],
        time_embedder="time_in",
        last_layer="final_layer.linear",
        default_side=lambda config: 512,
    ),
    "WanTransformer3DModel": Family(
        arguments=wan_arguments,
        pipeline="WanPipeline",
        encodes="tokens -tokens",
        max_text_tokens=512,
        text_width="text_dim",
        time_scale=_thousand,
        time_embedder="condition_embedder.time_embedder",
        channels_last=True,
        default_side=lambda config: 0,
    ),
    PIXART: Family(
        arguments=pixart_arguments,
        pipeline="PixArtSigmaPipeline",
        encodes=_TOKENS_AND_MASKS,
        max_text_tokens=300,
        text_width="caption_channels",
        takes_mask=True,
        is_diffusion=True,
        channels_last=True,
        out_channels="attribute",
        default_side=_latent_side,
    ),
    UNET: Family(
        arguments=unet_arguments,
        pipeline="StableDiffusionPipeline",
        encodes="tokens -tokens",
        max_text_tokens=77,
        text_width="cross_attention_dim",
        is_diffusion=True,
        time_embedder="time_embedding",
        time_part="time_proj",
        last_layer="conv_out",
        default_side=_latent_side,
    ),
}
SDXL = replace(
    FAMILIES[UNET],
    arguments=sdxl_arguments,
    pipeline="StableDiffusionXLPipeline",
    encodes="tokens -tokens pooled -pooled",
    pooled_text_width="projection_class_embeddings_input_dim",
)
KONTEXT = replace(FAMILIES[FLUX], arguments=kontext_arguments, pipeline="FluxKontextPipeline", edits_images=True)
KLEIN = replace(FAMILIES[FLUX2], pipeline="Flux2KleinPipeline")
PIXART_ALPHA = replace(
    FAMILIES[PIXART], arguments=pixart_alpha_arguments, pipeline="PixArtAlphaPipeline", max_text_tokens=120
)
# Families with the model class of another family.
VARIANTS = (SDXL, KONTEXT, KLEIN, PIXART_ALPHA)
# The supported pipeline classes.
PIPELINES = tuple(entry.pipeline for entry in (*FAMILIES.values(), *VARIANTS))
# The only sample_size for which PixArtAlphaPipeline passes image sizes to its model.
_ALPHA_SAMPLE_SIZE = 128

# The purpose of an unsupported UNet, by its number of input channels.
_UNET_PURPOSES = {
    9: "inpaints an image",
    8: "edits an image",
    7: "upscales an image",
    5: "uses a depth map",
}
# The purpose of an unsupported pipeline, by a word in its class name. Kontext without a mask is supported (KONTEXT).
PIPELINE_PURPOSES = {
    "Edit": "edits an image",
    "Kontext": "inpaints an image",
    "KV": "caches the keys and values of images to edit",
    "Inpaint": "inpaints an image",
    "Fill": "inpaints an image",
    "Img2Img": "starts from an image",
    "ImageToVideo": "starts from an image",
    "Control": "uses a control image",
    "Layered": "generates layers",
    "Sprint": "has the path of a consistency model, which is not supported",
}


# Settings in a config.json that are known in all families: settings of layers, which dumo does not use, and settings
# with known values. Other numbers and lists are taken as sizes.
_LAYER_SETTINGS = frozenset(
    {
        "act_fn",
        "activation_fn",
        "attention_bias",
        "bottleneck_size",
        "caption_channels",
        "cross_attention_norm",
        "cross_attn_norm",
        "mid_block_only_cross_attention",
        "mid_block_type",
        "norm_elementwise_affine",
        "only_cross_attention",
        "qk_norm",
        "resnet_skip_time_act",
        "resnet_time_scale_shift",
        "upcast_attention",
        "use_linear_projection",
    }
)
_KNOWN_VALUES: dict[str, tuple[Any, ...]] = {
    "guidance_embeds": (True,),  # net.guidance
    "use_additional_conditions": (True,),  # PIXART_ALPHA
    "addition_embed_type": ("text_time",),  # SDXL
    "norm_type": ("ada_norm_single",),
    "attention_type": ("default",),
    "time_embedding_type": ("positional",),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "time_max_period": (10_000,),
    # The sizes of inputs that no text-to-image pipeline uses.
    "siglip_feat_dim": (),
    "image_dim": (),
    "added_kv_proj_dim": (),
    "pos_embed_seq_len": (),
    "encoder_hid_dim": (),
    "num_class_embeds": (),
    "time_cond_proj_dim": (),
    "time_embedding_dim": (),
}


def find_family(config: Config, pipeline: str = "") -> Family:
    """Return the family of a model by its config.json and the class of its pipeline, or "" if it has none.

    Raises UserError for a model without a family, for an unknown setting in the config, and for a pipeline with inputs
    other than text.
    """
    model_family = _closest_family(config, pipeline)
    if model_family is None:
        raise UserError(
            f"pipeline has a {class_of(config)}, which is not supported: use the folder of one of "
            f"{', '.join(PIPELINES)}"
        )
    unknown_key = _first_unknown_setting(config)
    if unknown_key is not None:
        raise UserError(
            f"pipeline has a {class_of(config)} with {unknown_key} = {config[unknown_key]!r} in its config.json, "
            "which is not supported: use a pipeline without it"
        )
    # diffusers has renamed Lumina2Text2ImgPipeline to Lumina2Pipeline.
    newer_name = pipeline.replace("Text2Img", "")
    if newer_name in ("", model_family.pipeline):
        return model_family
    purposes = [purpose for word, purpose in PIPELINE_PURPOSES.items() if word in pipeline]
    purpose = purposes[0] if purposes else "is not supported"
    raise UserError(
        f"pipeline is a {pipeline}, which {purpose}, but only text-to-image pipelines are supported: use the folder "
        f"of a {model_family.pipeline}"
    )


def family_of(pipeline: Pipeline) -> Family:
    """Return the family of a pipeline's model.

    Raises UserError as `find_family`, and for a pipeline that has no transformer and no UNet.
    """
    if pipeline.index and not {TRANSFORMER, UNET_PART} & pipeline.index.keys():
        raise UserError(
            f"pipeline is a {pipeline.class_name}, which has no transformer and no unet: use the folder of one of "
            f"{', '.join(PIPELINES)}"
        )
    return find_family(pipeline.config(TRANSFORMER), pipeline.class_name)


def _first_unknown_setting(config: Config) -> str | None:
    """Return the first key of a config.json with an unknown setting, or None."""
    for key, value in config.items():
        is_size = isinstance(value, int | float | list | tuple) and not isinstance(value, bool)
        if key in _KNOWN_VALUES:
            is_known = value in (None, *_KNOWN_VALUES[key]) or (value is False and key != "flip_sin_to_cos")
        else:
            is_known = key.startswith("_") or key in _LAYER_SETTINGS or is_size or value in (None, False)
        if not is_known:
            return key
    return None


def class_of(config: Config) -> str:
    """Return the class of a model in diffusers. PixArt was published under the name of an older class."""
    model_class = str(config.get("_class_name"))
    if model_class == "Transformer2DModel" and config.get("norm_type") == "ada_norm_single":
        return PIXART
    return model_class


def is_unet(config: Config) -> bool:
    """Return whether a model is a UNet."""
    return class_of(config) == UNET


def _closest_family(config: Config, pipeline: str) -> Family | None:
    """Return the best family for a model, possibly of another pipeline, or None if no family has its class.

    Raises UserError for a variant that the pipelines of its class do not support.
    """
    model_class = class_of(config)
    if model_class == FLUX and pipeline == KONTEXT.pipeline:
        return KONTEXT
    if model_class == FLUX2:
        return _flux2_family(config, pipeline)
    if model_class == PIXART:
        return _pixart_family(config, pipeline)
    if model_class == UNET:
        return _unet_family(config)
    return FAMILIES.get(model_class)


def _flux2_family(config: Config, pipeline: str) -> Family:
    """Return the family of a FLUX.2. Raises UserError for a [klein] pipeline with a model that embeds guidance."""
    # True is the default of the model class.
    embeds_guidance = bool(config.get("guidance_embeds", True))
    if pipeline == KLEIN.pipeline and embeds_guidance:
        raise UserError(
            f"pipeline is a {pipeline}, which does not pass guidance to its model, but this model embeds it "
            f"(guidance_embeds): use the folder of a {FAMILIES[FLUX2].pipeline}"
        )
    if embeds_guidance or pipeline == FAMILIES[FLUX2].pipeline:
        return FAMILIES[FLUX2]
    return KLEIN


def _pixart_family(config: Config, pipeline: str) -> Family:
    """Return the family of a PixArt. A PixArt-alpha for 1024 pixels uses size conditioning.

    Raises UserError for a model with size conditioning that its pipeline does not support.
    """
    sample_size = config.get("sample_size", _ALPHA_SAMPLE_SIZE)
    reads_sizes = config.get("use_additional_conditions")
    # null means the default of the model class.
    if reads_sizes is None:
        reads_sizes = sample_size == _ALPHA_SAMPLE_SIZE
    if reads_sizes and (sample_size != _ALPHA_SAMPLE_SIZE or pipeline == FAMILIES[PIXART].pipeline):
        raise UserError(
            f"pipeline: this PixArt uses size conditioning (use_additional_conditions) at sample_size {sample_size}, "
            f"which {pipeline or PIXART_ALPHA.pipeline} does not support: use the folder of a {PIXART_ALPHA.pipeline} "
            f"for 1024 pixels, or of a {FAMILIES[PIXART].pipeline} without size conditioning"
        )
    if reads_sizes or pipeline == PIXART_ALPHA.pipeline:
        return PIXART_ALPHA
    return FAMILIES[PIXART]


def _unet_family(config: Config) -> Family:
    """Return the family of a UNet by its config. Raises UserError for inputs other than a sample, text and sizes."""
    in_channels = config.get("in_channels")
    out_channels = config.get("out_channels")
    if in_channels != out_channels:
        purpose = _UNET_PURPOSES.get(in_channels or 0, "has further inputs")
        raise UserError(
            f"pipeline has a UNet with {in_channels} input channels and {out_channels} output channels: it {purpose}, "
            "but only text-to-image pipelines are supported: use the folder of one"
        )
    return SDXL if config.get("addition_embed_type") else FAMILIES[UNET]
