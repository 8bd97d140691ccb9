"""The models of diffusers that can be tuned: a `Family` for each class, with the paths of its parts and its arguments.

`family` is the entrance: it finds the `Family` of a config.json, or refuses the model. `dumo.nets.dualized` calls the
model with what `Family.arguments` makes of its `Inputs`; `dumo.encoders.prompt` encodes texts by it. To add a model,
add an entry to `FAMILIES`, or to `VARIANTS` where its class is there already, and a function of arguments if no other
fits (docs/families.md). `PIPELINES` are the accepted classes of pipelines, which messages and that page list.

A family holds what no config says. Models of a diffusion (`Family.diffusion`) are read by `dumo.nets.vp`. Every other
model here learned the velocity noise - data on the linear path, with data at t = 0 and noise at t = 1; Z-Image and
Lumina 2 count time from the noise and give data - noise (`Family.backward`).

A family is right if the stock pipeline makes the same image as dumo, to the bit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from dumo.autodiff.dual import primal
from dumo.types import Array, Sample, UserError

Config = Mapping[str, Any]  # a model's config.json
Arguments = dict[str, Any]  # of a model's forward, by name

MAX_FREQUENCY = 1000.0  # rad per unit of t, of the quickest wave: nearly every time embedding reads 1000 t


@dataclass(frozen=True)
class Inputs:
    """The inputs of a pass: x as the model takes it, the model's own time (b,), and the condition of every row."""

    x: Array  # (b, c, h, w), or packed into tokens (b, n, c p p)
    time: Array
    tokens: Tensor  # (b, l, d), of text
    mask: Tensor | None  # (b, l), bool: which of them there are; None: all
    pooled: Tensor | None  # (b, p)
    guidance: Array | None  # (b,), the embedded number of a distilled model
    grid: tuple[int, int]  # rows and columns of patches
    lengths: tuple[int, ...] | None  # tokens by row, for a model that takes captions one by one
    source: Tensor | None = None  # (b, n, c p p): the image that is edited, packed, of a model that edits

    @property
    def mask_or_ones(self) -> Tensor:
        """The mask, (b, l), for a model that demands one."""
        if self.mask is None:
            return self.tokens.new_ones(self.tokens.shape[:2], dtype=torch.bool)
        return self.mask


def plain(a: Inputs) -> Arguments:
    """Return the arguments that most models take."""
    return {"hidden_states": a.x, "timestep": a.time, "encoder_hidden_states": a.tokens}


def sd3(a: Inputs) -> Arguments:
    """`plain`, with pooled text."""
    return {**plain(a), "pooled_projections": a.pooled}


def flux(a: Inputs) -> Arguments:
    """As `sd3`, with positions, and the number of guidance."""
    return {
        **sd3(a),
        "img_ids": positions(a.grid, 3, a.x),
        "txt_ids": a.tokens.new_zeros(a.tokens.shape[1], 3),
        "guidance": a.guidance,
    }


def kontext(a: Inputs) -> Arguments:
    """As `flux`, with the image that is edited as tokens behind the others: 1 on the axis where they have 0."""
    assert a.source is not None
    arguments = flux(a)
    source_positions = positions(a.grid, 3, a.x)
    source_positions[:, 0] = 1
    arguments["hidden_states"] = torch.cat([a.x, a.source.to(a.x.dtype)], 1)
    arguments["img_ids"] = torch.cat([arguments["img_ids"], source_positions])
    return arguments


def flux2(a: Inputs) -> Arguments:
    """As `flux`, with four axes: the last is the place of a token in its text; no pooled text."""
    text_positions = a.tokens.new_zeros(a.tokens.shape[1], 4)
    text_positions[:, 3] = torch.arange(len(text_positions), device=text_positions.device)
    return {
        **plain(a),
        "img_ids": positions(a.grid, 4, a.x),
        "txt_ids": text_positions,
        "guidance": a.guidance,
    }


def chroma(a: Inputs) -> Arguments:
    """As `flux`, with a mask over text and image, in numbers, which its blocks add to the scores."""
    mask = None
    if a.mask is not None:
        image_mask = a.mask.new_ones(len(a.mask), a.grid[0] * a.grid[1])
        mask = torch.cat([a.mask, image_mask], 1).to(a.tokens.dtype)
    return {
        **plain(a),
        "img_ids": positions(a.grid, 3, a.x),
        "txt_ids": a.tokens.new_zeros(a.tokens.shape[1], 3),
        "attention_mask": mask,
    }


def sana(a: Inputs) -> Arguments:
    """`plain`, with a mask of text, and the number of guidance."""
    return {**plain(a), "encoder_attention_mask": a.mask, "guidance": a.guidance}


def qwen(a: Inputs) -> Arguments:
    """`plain`, with a mask of text, and the grid for positions."""
    image_shapes = [(1, *a.grid)]  # of one image: frames, rows, columns
    return {**plain(a), "encoder_hidden_states_mask": a.mask, "img_shapes": [image_shapes] * len(a.tokens)}


def z_image(a: Inputs) -> Arguments:
    """Lists of rows: an image is a video of one frame, a caption has no padding."""
    lengths = a.lengths or (a.tokens.shape[1],) * len(a.tokens)
    captions = [tokens[:length] for tokens, length in zip(a.tokens.unbind(), lengths, strict=True)]
    return {"x": list(a.x.unsqueeze(2).unbind(0)), "t": a.time, "cap_feats": captions}


def lumina2(a: Inputs) -> Arguments:
    """`plain`, with a mask, which says how long a caption is."""
    return {**plain(a), "encoder_attention_mask": a.mask_or_ones}


def cogview4(a: Inputs) -> Arguments:
    """`plain`, with sizes in pixels: 16 per side of a patch, 8 per latent (its pipeline's)."""
    b = len(a.tokens)
    pixels = [16.0 * patches for patches in a.grid]
    sizes = a.tokens.new_tensor([pixels]).expand(b, 2)
    return {
        **plain(a),
        "original_size": sizes,
        "target_size": sizes,
        "crop_coords": sizes.new_zeros(b, 2),
    }


def prx(a: Inputs) -> Arguments:
    """`plain`, with a mask of text."""
    return {**plain(a), "attention_mask": a.mask}


def unet(a: Inputs) -> Arguments:
    """Of a UNet, whose embedder of time is handed the times themselves (`Family.time_part`)."""
    return {"sample": a.x, "timestep": primal(a.time), "encoder_hidden_states": a.tokens}


def sdxl(a: Inputs) -> Arguments:
    """As `unet`, with pooled text and sizes in pixels, 8 per latent: of the image, its corner, and of the image."""
    height = 8.0 * a.grid[0]
    width = 8.0 * a.grid[1]
    sizes = a.tokens.new_tensor([[height, width, 0, 0, height, width]]).expand(len(a.tokens), 6)
    return {**unet(a), "added_cond_kwargs": {"text_embeds": a.pooled, "time_ids": sizes}}


def pixart(a: Inputs) -> Arguments:
    """As `sana`, without a number of guidance, and without sizes."""
    return {
        **plain(a),
        "encoder_attention_mask": a.mask_or_ones,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def pixart_alpha(a: Inputs) -> Arguments:
    """As `pixart`, with the height and width of the image in pixels, 8 per latent, and their ratio.

    A model of 512 pixels or fewer has no embedders of sizes, and ignores them.
    """
    b = len(a.tokens)
    height = 8.0 * a.x.shape[2]
    width = 8.0 * a.x.shape[3]
    sizes = {
        "resolution": a.tokens.new_tensor([[height, width]]).expand(b, 2),
        "aspect_ratio": a.tokens.new_tensor([[height / width]]).expand(b, 1),
    }
    return {**pixart(a), "added_cond_kwargs": sizes}


def wan(a: Inputs) -> Arguments:
    """`plain`, with an image as a video of one frame."""
    return {**plain(a), "hidden_states": a.x.unsqueeze(2)}


def positions(grid: tuple[int, int], axes: int, like: Array) -> Tensor:
    """The positions of patches, (n, axes), on the device of `like`: axes 1 and 2 are row and column, others are 0."""
    rows = torch.arange(grid[0], device=like.device, dtype=torch.float32)
    columns = torch.arange(grid[1], device=like.device, dtype=torch.float32)
    coordinates = rows.new_zeros(*grid, axes)
    coordinates[..., 1] = rows[:, None]
    coordinates[..., 2] = columns
    return coordinates.flatten(0, 1)


def pack_latents(x: Sample, grid: tuple[int, int], p: int) -> Array:
    """Pack x (b, c, h, w) into patches of p x p, (b, n, c p p), row by row, as the pipelines do."""
    b, c = x.shape[:2]
    rows, columns = grid
    return x.reshape(b, c, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, c * p * p)


def unpack_latents(y: Array, grid: tuple[int, int], p: int) -> Array:
    """Unpack patches y (b, n, c p p) to (b, c, h, w), as `pack_latents` packs them."""
    b = y.shape[0]
    rows, columns = grid
    return y.reshape(b, rows, columns, -1, p, p).permute(0, 3, 1, 4, 2, 5).reshape(b, -1, rows * p, columns * p)


@dataclass(frozen=True)
class Family:
    """A class of diffusers. Keys are of its config.json, paths of its modules."""

    # text
    arguments: Callable[[Inputs], Arguments]  # of its forward
    pipeline: str  # the class that makes an image of a text
    # What its encode_prompt returns, in order: tokens, mask, pooled; with -, those of the negative prompt; _: no text.
    encodes: str
    length: int  # tokens of a text at most, by the defaults of its __call__
    text_width: str  # key: numbers of a token of text
    pooled_text_width: str = ""  # key: numbers of pooled text, if it takes any
    takes_mask: bool = False  # of text
    adds_mask: bool = False  # its mask hides nothing, but is added to the scores of attention: padding is read
    mask_reader: str = ""  # path: a part that reads the numbers of the mask, its second argument
    takes_lists: bool = False  # of captions, each with its own length
    one_by_one: bool = False  # it takes no mask, so rows whose captions have several lengths go through it one by one

    # time
    clock: Callable[[Config], float] = lambda config: 1.0  # its own time at t = 1
    backward: bool = False  # its time is 1 - t, and its output data - noise
    diffusion: bool = False  # it learned the noise of a diffusion, or its v: the scheduler says which, and its times
    max_frequency: Callable[[Config], float] = lambda config: MAX_FREQUENCY  # rad per unit of t, of its quickest wave
    embedder: str = "timestep_embedder"  # the end of the path of every two-layer perceptron over waves of t; "": none
    # path: the part that takes time and guidance first, rounded to the precision of the layers before
    time_part: str = ""
    time_part_scale: float = 1.0  # of time and guidance where they enter that part
    guidance_scale: Callable[[Config], float] = lambda config: 1.0

    # samples
    last: str = "proj_out"  # path: the last layer
    channels_last: bool = False  # of its outputs, within a patch
    out_channels: str = ""  # where it reads their number: "attribute" or "config"; "": nowhere
    packed: bool = False  # it takes and gives tokens, (b, n, c p p)
    edits: bool = False  # it takes an image in addition to a text, and its first outputs alone are of x
    side: Callable[[Config], int] = lambda config: 1024  # pixels of its pipeline's default image; 0: it is no square

    # blocks
    unused_layers: str = ""  # pattern of paths, LAST for the last block: layers that do not reach the output
    compiles: bool = True  # torch.compile takes its blocks with a derivative that rides on the pass
    lean_masks: bool = True  # it passes the mask to blocks that are computed again, too
    routes: bool = False  # its blocks, in lists alone, take and give text and image as `dumo.nets.route` does

    def patch(self, config: Config, channels: int) -> int:
        """Return the side of a patch. Raises UserError where the model takes samples of other channels."""
        in_channels: int = config["in_channels"]
        if self.packed:
            p = isqrt(in_channels // channels)
            if p == 0 or p * p * channels != in_channels:
                raise UserError(
                    f"pipeline has a model of tokens of {in_channels} numbers, channels x patch x patch, and the data "
                    f"have {channels} channels: take data that fit it"
                )
            return p
        if in_channels != channels:
            raise UserError(
                f"pipeline has a model of {in_channels} channels, and the data have {channels} channels: take data "
                "that fit it"
            )
        patch: int | list[int] = config.get("patch_size", config.get("all_patch_size", 1))
        return patch[-1] if isinstance(patch, list | tuple) else patch  # Wan's: frames, rows, columns

    def pooled_width(self, config: Config) -> int:
        """Return the numbers of pooled text; 0: the model takes none. SDXL embeds six sizes with them."""
        if not self.pooled_text_width:
            return 0
        return config[self.pooled_text_width] - 6 * (config.get("addition_time_embed_dim") or 0)


def latent_side(config: Config) -> int:
    """Return the default side in pixels, from a config that has it in latents of 8 pixels."""
    return 8 * config.get("sample_size", 128)


def thousand(config: Config) -> float:
    """Return 1000: the model's time runs from 0 to 1000."""
    return 1000.0


def sana_clock(config: Config) -> float:
    """Return 1000 times the factor that the config has."""
    return 1000.0 * config.get("timestep_scale", 1.0)


TOKENS_AND_MASKS = "tokens mask -tokens -mask"
FLUX = "FluxTransformer2DModel"
FLUX2 = "Flux2Transformer2DModel"
UNET = "UNet2DConditionModel"
PIXART = "PixArtTransformer2DModel"
FAMILIES: dict[str, Family] = {  # by the class of the model
    "SD3Transformer2DModel": Family(
        arguments=sd3,
        pipeline="StableDiffusion3Pipeline",
        encodes="tokens -tokens pooled -pooled",
        length=77 + 256,  # CLIP's and T5's
        text_width="joint_attention_dim",
        pooled_text_width="pooled_projection_dim",
        clock=thousand,
        channels_last=True,
        out_channels="attribute",
        side=latent_side,
        routes=True,
    ),
    FLUX: Family(
        arguments=flux,
        pipeline="FluxPipeline",
        encodes="tokens pooled _",
        length=512,
        text_width="joint_attention_dim",
        pooled_text_width="pooled_projection_dim",
        time_part="time_text_embed",
        time_part_scale=1000.0,
        packed=True,
        routes=True,
    ),
    FLUX2: Family(
        arguments=flux2,
        pipeline="Flux2Pipeline",
        encodes="tokens _",
        length=512,
        text_width="joint_attention_dim",
        time_part="time_guidance_embed",
        time_part_scale=1000.0,
        packed=True,
    ),
    "ChromaTransformer2DModel": Family(
        arguments=chroma,
        pipeline="ChromaPipeline",
        encodes="tokens _ mask -tokens _ -mask",
        length=512,
        text_width="joint_attention_dim",
        takes_mask=True,
        adds_mask=True,
        embedder="",
        time_part="time_text_embed",
        time_part_scale=1000.0,
        packed=True,
        lean_masks=False,
    ),
    "SanaTransformer2DModel": Family(
        arguments=sana,
        pipeline="SanaPipeline",
        encodes=TOKENS_AND_MASKS,
        length=300,
        text_width="caption_channels",
        takes_mask=True,
        clock=sana_clock,
        max_frequency=sana_clock,
        guidance_scale=lambda config: config["guidance_embeds_scale"],
        side=lambda config: 32 * config["sample_size"],
    ),
    "QwenImageTransformer2DModel": Family(
        arguments=qwen,
        pipeline="QwenImagePipeline",
        encodes="tokens mask",
        length=512,
        text_width="joint_attention_dim",
        takes_mask=True,
        time_part="time_text_embed",
        packed=True,
        unused_layers=r"transformer_blocks\.LAST\.(attn\.to_add_out|txt_mlp)",
    ),
    "ZImageTransformer2DModel": Family(
        arguments=z_image,
        pipeline="ZImagePipeline",
        encodes="tokens -tokens",
        length=512,
        text_width="cap_feat_dim",
        takes_mask=True,
        takes_lists=True,
        backward=True,
        max_frequency=lambda config: config["t_scale"],
        embedder="t_embedder.mlp",
        last="all_final_layer.2-1.linear",
        channels_last=True,
        out_channels="attribute",
    ),
    "Lumina2Transformer2DModel": Family(
        arguments=lumina2,
        pipeline="Lumina2Pipeline",
        encodes=TOKENS_AND_MASKS,
        length=256,
        text_width="cap_feat_dim",
        takes_mask=True,
        mask_reader="rope_embedder",
        backward=True,
        max_frequency=lambda config: 1.0,
        last="norm_out.linear_2",
        channels_last=True,
        out_channels="attribute",
        side=latent_side,
    ),
    "AuraFlowTransformer2DModel": Family(  # padding is zeros, which its blocks see
        arguments=plain,
        pipeline="AuraFlowPipeline",
        encodes="tokens _ -tokens _",
        length=256,
        text_width="joint_attention_dim",
        embedder="time_step_proj",
        channels_last=True,
        out_channels="config",
    ),
    "CogView4Transformer2DModel": Family(  # its mask is added to the scores, so it hides nothing
        arguments=cogview4,
        pipeline="CogView4Pipeline",
        encodes="tokens -tokens",
        length=1024,
        text_width="text_embed_dim",
        one_by_one=True,
        clock=thousand,
        side=latent_side,
    ),
    "PRXTransformer2DModel": Family(
        arguments=prx,
        pipeline="PRXPipeline",
        encodes=TOKENS_AND_MASKS,
        length=256,
        text_width="context_in_dim",
        takes_mask=True,
        max_frequency=lambda config: config["time_factor"],
        embedder="time_in",
        last="final_layer.linear",
        side=lambda config: 512,
        compiles=False,
    ),
    "WanTransformer3DModel": Family(
        arguments=wan,
        pipeline="WanPipeline",
        encodes="tokens -tokens",
        length=512,
        text_width="text_dim",
        clock=thousand,
        embedder="condition_embedder.time_embedder",
        channels_last=True,
        side=lambda config: 0,
    ),
    PIXART: Family(
        arguments=pixart,
        pipeline="PixArtSigmaPipeline",
        encodes=TOKENS_AND_MASKS,
        length=300,
        text_width="caption_channels",
        takes_mask=True,
        diffusion=True,
        channels_last=True,
        out_channels="attribute",
        side=latent_side,
    ),
    UNET: Family(
        arguments=unet,
        pipeline="StableDiffusionPipeline",
        encodes="tokens -tokens",
        length=77,
        text_width="cross_attention_dim",
        diffusion=True,
        embedder="time_embedding",
        time_part="time_proj",
        last="conv_out",
        side=latent_side,
    ),
}
SDXL = replace(
    FAMILIES[UNET],
    arguments=sdxl,
    pipeline="StableDiffusionXLPipeline",
    encodes="tokens -tokens pooled -pooled",
    pooled_text_width="projection_class_embeddings_input_dim",
)
KONTEXT = replace(FAMILIES[FLUX], arguments=kontext, pipeline="FluxKontextPipeline", edits=True)
KLEIN = replace(FAMILIES[FLUX2], pipeline="Flux2KleinPipeline")
PIXART_ALPHA = replace(FAMILIES[PIXART], arguments=pixart_alpha, pipeline="PixArtAlphaPipeline", length=120)
VARIANTS = (SDXL, KONTEXT, KLEIN, PIXART_ALPHA)  # of models whose class another family has, too
PIPELINES = tuple(entry.pipeline for entry in (*FAMILIES.values(), *VARIANTS))  # the classes that dumo accepts
ALPHA_SAMPLE_SIZE = 128  # of a PixArt-alpha that reads sizes: PixArtAlphaPipeline passes them to no other

UNET_PURPOSES = {  # by the channels that a UNet reads
    9: "fills a part of an image",
    8: "edits an image",
    7: "enlarges an image",
    5: "follows a depth",
}
PIPELINE_PURPOSES = {  # of variants of a base, by a word in the class of the pipeline
    "Edit": "edits an image",
    "Kontext": "fills a part of an image",  # by a mask: the one without is KONTEXT
    "KV": "keeps the keys and values of images to edit",
    "Inpaint": "fills a part of an image",
    "Fill": "fills a part of an image",
    "Img2Img": "begins with an image",
    "ImageToVideo": "begins with an image",
    "Control": "follows an image",
    "Layered": "makes layers",
    "Sprint": "has the path of a consistency model, which is none of dumo's",
}


def family(config: Config, pipeline: str = "") -> Family:
    """Return the family of a model, by its config.json and the class of its pipeline; "": it has none.

    Raises UserError, with the way out, for a model of no family, and for a variant of one: a pipeline that makes images
    of more than a text.
    """
    model_family = _find_family(config, pipeline)
    if model_family is None:
        raise UserError(
            f"pipeline has a {class_of(config)}, which dumo was not tested with: take the folder of one of "
            f"{', '.join(PIPELINES)}"
        )
    newer_name = pipeline.replace("Text2Img", "")  # Lumina2Text2ImgPipeline became Lumina2Pipeline
    if newer_name in ("", model_family.pipeline):
        return model_family
    purposes = [purpose for word, purpose in PIPELINE_PURPOSES.items() if word in pipeline]
    purpose = purposes[0] if purposes else "is no pipeline that dumo knows"
    raise UserError(
        f"pipeline is a {pipeline}, which {purpose}: dumo trains what makes an image of a text alone. Take the folder "
        f"of a {model_family.pipeline}"
    )


def class_of(config: Config) -> str:
    """Return the class of a model in diffusers. PixArt was published under the name of an older class."""
    model_class = str(config.get("_class_name"))
    if model_class == "Transformer2DModel" and config.get("norm_type") == "ada_norm_single":
        return PIXART
    return model_class


def _find_family(config: Config, pipeline: str) -> Family | None:
    """Return the family that fits a model best, which may be of another pipeline; None: no family has its class.

    Raises UserError for a variant that the pipelines of its class do not run.
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
    """Return the family of a FLUX.2: [klein] embeds no guidance. Raises UserError for a [klein] that does."""
    embeds_guidance = bool(config.get("guidance_embeds", True))  # True is the default of its class
    if pipeline == KLEIN.pipeline and embeds_guidance:
        raise UserError(
            f"pipeline is a {pipeline}, which passes its model no guidance, and this model embeds it (guidance_embeds):"
            f" take the folder of a {FAMILIES[FLUX2].pipeline}"
        )
    if embeds_guidance or pipeline == FAMILIES[FLUX2].pipeline:
        return FAMILIES[FLUX2]
    return KLEIN


def _pixart_family(config: Config, pipeline: str) -> Family:
    """Return the family of a PixArt: alpha reads the sizes of images, if it is of 1024 pixels.

    Raises UserError for a model that reads sizes which its pipeline does not pass.
    """
    sample_size = config.get("sample_size", ALPHA_SAMPLE_SIZE)
    reads_sizes = config.get("use_additional_conditions")
    if reads_sizes is None:  # as its class decides
        reads_sizes = sample_size == ALPHA_SAMPLE_SIZE
    if reads_sizes and (sample_size != ALPHA_SAMPLE_SIZE or pipeline == FAMILIES[PIXART].pipeline):
        raise UserError(
            f"pipeline has a PixArt that reads the sizes of images (use_additional_conditions), with sample_size "
            f"{sample_size}, and no {pipeline or PIXART_ALPHA.pipeline} passes them to it: take the folder of a "
            f"{PIXART_ALPHA.pipeline} of 1024 pixels, or of a {FAMILIES[PIXART].pipeline} without them"
        )
    if reads_sizes or pipeline == PIXART_ALPHA.pipeline:
        return PIXART_ALPHA
    return FAMILIES[PIXART]


def _unet_family(config: Config) -> Family:
    """Return the family of a UNet by its config. Raises UserError for one that reads more than a text and sizes."""
    in_channels = config.get("in_channels")
    out_channels = config.get("out_channels")
    if in_channels != out_channels:
        purpose = UNET_PURPOSES.get(in_channels or 0, "reads more than a sample")
        raise UserError(
            f"pipeline has a UNet of {in_channels} channels, of which it gives {out_channels}: it {purpose}, and dumo "
            "trains what makes an image of a text alone. Take the folder of a text-to-image pipeline"
        )
    keys = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")
    untested = [key for key in keys if config.get(key)]
    embeds_sizes = config.get("addition_embed_type")
    if embeds_sizes not in (None, "text_time"):
        untested.append("addition_embed_type")
    if untested:
        raise UserError(
            f"pipeline has a UNet with {untested[0]}, which dumo was not tested with: take Stable Diffusion 1.5, 2.1 "
            "or XL"
        )
    return SDXL if embeds_sizes else FAMILIES[UNET]
