"""The models of diffusers that can be tuned, a row each: the paths of their parts, and their arguments.

A row holds what no config does. Models of a diffusion (`noise`) are read by `dumo.nets.vp`. Every other model here
learned the velocity noise - data on the linear path, with data at t = 0 and noise at t = 1; Z-Image and Lumina 2 count
time from the noise and give data - noise (`backward`).

A row is right if the stock pipeline makes the same image as dumo, to the bit.
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
Arguments = dict[str, Any]  # of its forward, by name

TURN = 1000.0  # radians per unit of t of the quickest wave: nearly every time embedding reads 1000 t


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
    def there(self) -> Tensor:
        """The mask, for a model that demands one."""
        return self.tokens.new_ones(self.tokens.shape[:2], dtype=torch.bool) if self.mask is None else self.mask


def plain(a: Inputs) -> Arguments:
    """The arguments of most models."""
    return {"hidden_states": a.x, "timestep": a.time, "encoder_hidden_states": a.tokens}


def pooled(a: Inputs) -> Arguments:
    """`plain`, with pooled text."""
    return {**plain(a), "pooled_projections": a.pooled}


def flux(a: Inputs) -> Arguments:
    """`pooled`, with positions, and the number of guidance."""
    ids = {"img_ids": positions(a.grid, 3, a.x), "txt_ids": a.tokens.new_zeros(a.tokens.shape[1], 3)}
    return {**pooled(a), **ids, "guidance": a.guidance}


def kontext(a: Inputs) -> Arguments:
    """As `flux`, with the image that is edited as tokens behind the others: 1 on the axis where they have 0."""
    assert a.source is not None
    given, places = flux(a), positions(a.grid, 3, a.x)
    places[:, 0] = 1
    tokens = {"hidden_states": torch.cat([a.x, a.source.to(a.x.dtype)], 1)}
    return {**given, **tokens, "img_ids": torch.cat([given["img_ids"], places])}


def flux2(a: Inputs) -> Arguments:
    """As `flux`, with four axes: the last is the place of a token in its text; no pooled text."""
    text = a.tokens.new_zeros(a.tokens.shape[1], 4)
    text[:, 3] = torch.arange(len(text), device=text.device)
    return {**plain(a), "img_ids": positions(a.grid, 4, a.x), "txt_ids": text, "guidance": a.guidance}


def chroma(a: Inputs) -> Arguments:
    """As `flux`, with a mask over text and image, in numbers, which its blocks add to the scores."""
    mask = None
    if a.mask is not None:
        mask = torch.cat([a.mask, a.mask.new_ones(len(a.mask), a.grid[0] * a.grid[1])], 1).to(a.tokens.dtype)
    ids = {"img_ids": positions(a.grid, 3, a.x), "txt_ids": a.tokens.new_zeros(a.tokens.shape[1], 3)}
    return {**plain(a), **ids, "attention_mask": mask}


def sana(a: Inputs) -> Arguments:
    """`plain`, with a mask of text, and the number of guidance."""
    return {**plain(a), "encoder_attention_mask": a.mask, "guidance": a.guidance}


def qwen(a: Inputs) -> Arguments:
    """`plain`, with a mask of text, and the grid for positions."""
    shapes = [[(1, *a.grid)]] * len(a.tokens)
    return {**plain(a), "encoder_hidden_states_mask": a.mask, "img_shapes": shapes}


def z_image(a: Inputs) -> Arguments:
    """Lists of rows: an image is a video of one frame, a caption has no padding."""
    lengths = a.lengths or (a.tokens.shape[1],) * len(a.tokens)
    captions = [row[:n] for row, n in zip(a.tokens.unbind(), lengths, strict=True)]
    return {"x": list(a.x.unsqueeze(2).unbind(0)), "t": a.time, "cap_feats": captions}


def lumina2(a: Inputs) -> Arguments:
    """`plain`, with a mask, which says how long a caption is."""
    return {**plain(a), "encoder_attention_mask": a.there}


def cogview4(a: Inputs) -> Arguments:
    """`plain`, with sizes in pixels: 16 per side of a patch, 8 per latent (its pipeline's)."""
    b, size = len(a.tokens), [16.0 * n for n in a.grid]
    sizes = a.tokens.new_tensor([size]).expand(b, 2)
    return {**plain(a), "original_size": sizes, "target_size": sizes, "crop_coords": sizes.new_zeros(b, 2)}


def prx(a: Inputs) -> Arguments:
    """`plain`, with a mask of text."""
    return {**plain(a), "attention_mask": a.mask}


def unet(a: Inputs) -> Arguments:
    """Of a UNet, whose embedder of time is handed the times themselves (`Family.exact`)."""
    return {"sample": a.x, "timestep": primal(a.time), "encoder_hidden_states": a.tokens}


def sdxl(a: Inputs) -> Arguments:
    """As `unet`, with pooled text and sizes in pixels, 8 per latent: of the image, its corner, and of the image."""
    high, wide = (8.0 * n for n in a.grid)
    sizes = a.tokens.new_tensor([[high, wide, 0, 0, high, wide]]).expand(len(a.tokens), 6)
    return {**unet(a), "added_cond_kwargs": {"text_embeds": a.pooled, "time_ids": sizes}}


def pixart(a: Inputs) -> Arguments:
    """As `sana`, without a number of guidance, and without sizes."""
    sizes = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return {**plain(a), "encoder_attention_mask": a.there, **sizes}


def video(a: Inputs) -> Arguments:
    """`plain`, with an image as a video of one frame."""
    return {**plain(a), "hidden_states": a.x.unsqueeze(2)}


def positions(grid: tuple[int, int], axes: int, like: Array) -> Tensor:
    """The positions of patches, (n, axes): row and column are axes 1 and 2."""
    rows, columns = (torch.arange(n, device=like.device, dtype=torch.float32) for n in grid)
    zero = rows.new_zeros(grid)
    places = [zero, rows[:, None].expand(grid), columns.expand(grid), *[zero] * (axes - 3)]
    return torch.stack(places, -1).flatten(0, 1)


def packed(x: Sample, grid: tuple[int, int], p: int) -> Array:
    """(b, c, h, w) -> (b, n, c p p), patches row by row, as the pipelines pack."""
    b, c, (rows, columns) = x.shape[0], x.shape[1], grid
    return x.reshape(b, c, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, c * p * p)


def unpacked(y: Array, grid: tuple[int, int], p: int) -> Array:
    """The inverse of `packed`."""
    b, (rows, columns) = y.shape[0], grid
    return y.reshape(b, rows, columns, -1, p, p).permute(0, 3, 1, 4, 2, 5).reshape(b, -1, rows * p, columns * p)


@dataclass(frozen=True)
class Family:
    """A class of diffusers. Keys are of its config, paths of its modules."""

    call: Callable[[Inputs], Arguments]
    pipeline: str  # the class that makes an image of a text
    # What its encode_prompt returns, in order: tokens, mask, pooled; with -, those of the negative prompt; _: no text.
    encodes: str
    length: int  # tokens of a text at most, by the defaults of its __call__
    text: str  # key: numbers of a token of text
    pooled: str = ""  # key: numbers of pooled text, if it takes any
    masked: bool = False  # whether it takes a mask of text
    adds: bool = False  # its mask hides nothing, but is added to the scores of attention: padding is read
    clock: Callable[[Config], float] = lambda config: 1.0  # its own time at t = 1
    backward: bool = False  # its time is 1 - t, and its output data - noise
    turn: Callable[[Config], float] = lambda config: TURN  # radians per unit of t of its quickest wave
    embedder: str = "timestep_embedder"  # the end of the path of every two-layer perceptron over waves of t; "": none
    last: str = "proj_out"  # path: the last layer
    noise: bool = False  # it learned the noise of a diffusion, or its v: the scheduler says which, and its times
    channels_last: bool = False  # of its outputs, within a patch
    out_channels: str = ""  # where it reads their number: "attribute" or "config"; "": nowhere
    packed: bool = False  # it takes and gives tokens, (b, n, c p p)
    exact: str = ""  # path: the part that takes time and guidance first, rounded to the precision of the layers before
    exact_scale: float = 1.0  # of their numbers there
    guidance_scale: Callable[[Config], float] = lambda config: 1.0
    idle: str = ""  # pattern of paths, LAST for the last block: layers that do not reach the output
    apart: bool = False  # it takes captions as a list, each with its own length
    alone: bool = False  # it takes no mask, so rows whose captions have several lengths go through it one by one
    compiles: bool = True  # torch.compile takes its blocks with a derivative that rides on the pass
    lean_masks: bool = True  # it passes the mask to blocks that are computed again, too
    edits: bool = False  # it takes an image in addition to a text, and its first outputs alone are of x
    side: Callable[[Config], int] = lambda config: 1024  # pixels of its pipeline's default image; 0: it is no square
    routes: bool = False  # its blocks, in lists alone, take and give text and image as `dumo.nets.route.Routed` does
    reads: str = ""  # path: a part that reads the numbers of the mask, its second argument

    def patch(self, config: Config, channels: int) -> int:
        """The side of a patch. Raises UserError where the model takes samples of other channels."""
        takes: int = config["in_channels"]
        if not self.packed:
            sides = config.get("patch_size", config.get("all_patch_size", 1))
            p: int = sides[-1] if isinstance(sides, list | tuple) else sides
            fits = takes == channels
        else:
            p = isqrt(takes // channels)
            fits = p > 0 and p * p * channels == takes
        if not fits:
            many = f"tokens of {takes} numbers, channels x patch x patch" if self.packed else f"{takes} channels"
            raise UserError(
                f"pipeline has a model of {many}, and the data have {channels} channels: take data that fit it"
            )
        return p

    def pooled_width(self, config: Config) -> int:
        """The numbers of pooled text, if it takes any; SDXL embeds six sizes with them."""
        return config[self.pooled] - 6 * (config.get("addition_time_embed_dim") or 0) if self.pooled else 0


def eights(config: Config) -> int:
    """The default side by a config that says it in latents of 8 pixels."""
    return 8 * config.get("sample_size", 128)


def thousand(config: Config) -> float:
    """A clock from 0 to 1000."""
    return TURN


BOTH = "tokens mask -tokens -mask"
FAMILIES: dict[str, Family] = {
    "SD3Transformer2DModel": Family(
        pooled, "StableDiffusion3Pipeline", "tokens -tokens pooled -pooled", 77 + 256,
        "joint_attention_dim", "pooled_projection_dim",
        clock=thousand, channels_last=True, out_channels="attribute", side=eights, routes=True,
    ),
    "FluxTransformer2DModel": Family(
        flux, "FluxPipeline", "tokens pooled _", 512, "joint_attention_dim", "pooled_projection_dim",
        packed=True, exact="time_text_embed", exact_scale=TURN, routes=True,
    ),
    "Flux2Transformer2DModel": Family(
        flux2, "Flux2Pipeline", "tokens _", 512, "joint_attention_dim",
        packed=True, exact="time_guidance_embed", exact_scale=TURN,
    ),
    "ChromaTransformer2DModel": Family(
        chroma, "ChromaPipeline", "tokens _ mask -tokens _ -mask", 512, "joint_attention_dim", masked=True,
        adds=True, packed=True, exact="time_text_embed", exact_scale=TURN, embedder="", lean_masks=False,
    ),
    "SanaTransformer2DModel": Family(
        sana, "SanaPipeline", BOTH, 300, "caption_channels", masked=True,
        clock=lambda config: TURN * config.get("timestep_scale", 1.0),
        turn=lambda config: TURN * config.get("timestep_scale", 1.0),
        guidance_scale=lambda config: config["guidance_embeds_scale"],
        side=lambda config: 32 * config["sample_size"],
    ),
    "QwenImageTransformer2DModel": Family(
        qwen, "QwenImagePipeline", "tokens mask", 512, "joint_attention_dim",
        masked=True, packed=True, exact="time_text_embed",
        idle=r"transformer_blocks\.LAST\.(attn\.to_add_out|txt_mlp)",
    ),
    "ZImageTransformer2DModel": Family(
        z_image, "ZImagePipeline", "tokens -tokens", 512, "cap_feat_dim",
        masked=True, apart=True, backward=True, turn=lambda config: config["t_scale"],
        embedder="t_embedder.mlp", last="all_final_layer.2-1.linear", channels_last=True, out_channels="attribute",
    ),
    "Lumina2Transformer2DModel": Family(
        lumina2, "Lumina2Pipeline", BOTH, 256, "cap_feat_dim",
        masked=True, backward=True, turn=lambda config: 1.0, last="norm_out.linear_2",
        channels_last=True, out_channels="attribute", reads="rope_embedder", side=eights,
    ),
    "AuraFlowTransformer2DModel": Family(  # padding is zeros, which its blocks see
        plain, "AuraFlowPipeline", "tokens _ -tokens _", 256, "joint_attention_dim",
        embedder="time_step_proj", channels_last=True, out_channels="config",
    ),
    "CogView4Transformer2DModel": Family(  # its mask is added to the scores, so it hides nothing
        cogview4, "CogView4Pipeline", "tokens -tokens", 1024, "text_embed_dim", alone=True, clock=thousand,
        side=eights,
    ),
    "PRXTransformer2DModel": Family(
        prx, "PRXPipeline", BOTH, 256, "context_in_dim", masked=True, embedder="time_in", last="final_layer.linear",
        turn=lambda config: config["time_factor"], compiles=False,
        side=lambda config: 512,
    ),
    "WanTransformer3DModel": Family(
        video, "WanPipeline", "tokens -tokens", 512, "text_dim", clock=thousand,
        embedder="condition_embedder.time_embedder", channels_last=True,
        side=lambda config: 0,
    ),
    "PixArtTransformer2DModel": Family(
        pixart, "PixArtSigmaPipeline", BOTH, 300, "caption_channels", masked=True, noise=True,
        channels_last=True, out_channels="attribute", side=eights,
    ),
    "UNet2DConditionModel": Family(
        unet, "StableDiffusionPipeline", "tokens -tokens", 77, "cross_attention_dim", noise=True, last="conv_out",
        embedder="time_embedding", exact="time_proj", side=eights,
    ),
}  # fmt: skip
UNET, PIXART = "UNet2DConditionModel", "PixArtTransformer2DModel"
SDXL = replace(
    FAMILIES[UNET],
    call=sdxl,
    pipeline="StableDiffusionXLPipeline",
    encodes="tokens -tokens pooled -pooled",
    pooled="projection_class_embeddings_input_dim",
)
READ_BY_UNETS = {9: "fills a part of an image", 8: "edits an image", 7: "enlarges an image", 5: "follows a depth"}
EDITS = {  # those of a class above that take an image, too, by the class of the pipeline
    "FluxKontextPipeline": replace(
        FAMILIES["FluxTransformer2DModel"], call=kontext, pipeline="FluxKontextPipeline", edits=True
    ),
}
VARIANTS = {  # of a base, by a word in the class of the pipeline, and what they are
    "Edit": "edits an image",
    "Kontext": "fills a part of an image",  # by a mask: the one without has a row
    "Inpaint": "fills a part of an image",
    "Fill": "fills a part of an image",
    "Img2Img": "begins with an image",
    "ImageToVideo": "begins with an image",
    "Control": "follows an image",
    "Layered": "makes layers",
    "Sprint": "has the path of a consistency model, which is none of dumo's",
}


def family(config: Config, pipeline: str = "") -> Family:
    """The row of a config.json, and of the class of its pipeline, if it has one.

    Raises UserError, with the way out, for a model that is none of them, and for a variant of one: a pipeline that
    makes images of more than a text.
    """
    kind = class_of(config)
    if row := EDITS.get(pipeline) if kind == "FluxTransformer2DModel" else None:
        return row
    if kind == PIXART:
        without_sizes(config)
    if row := unet_of(config) if kind == UNET else FAMILIES.get(kind):
        if pipeline.replace("Text2Img", "") in ("", row.pipeline):  # an older name
            return row
        does = next((does for word, does in VARIANTS.items() if word in pipeline), "is no pipeline that dumo knows")
        raise UserError(
            f"pipeline is a {pipeline}, which {does}: dumo trains what makes an image of a text alone. Take the folder "
            f"of a {row.pipeline}"
        )
    known = ", ".join(name.removesuffix("Transformer2DModel").removesuffix("Transformer3DModel") for name in FAMILIES)
    raise UserError(f"pipeline has a {kind}, which dumo was not tested with: take one of {known}")


def class_of(config: Config) -> str:
    """The class of a model; PixArt was published under an older one's name."""
    kind = str(config.get("_class_name"))
    older = kind == "Transformer2DModel" and config.get("norm_type") == "ada_norm_single"
    return PIXART if older else kind


def without_sizes(config: Config) -> None:
    """Raise UserError for a PixArt that reads sizes, as one of 1024 pixels does where its config says nothing."""
    reads = config.get("use_additional_conditions")
    if config.get("sample_size") == 128 if reads is None else reads:
        raise UserError(
            "pipeline has a PixArt-alpha of 1024 pixels, which reads the sizes of images (use_additional_conditions), "
            "and dumo has none for it: take PixArt-Sigma, or PixArt-alpha of 512 pixels"
        )


def unet_of(config: Config) -> Family:
    """The row of a UNet by its config. Raises UserError for one that reads more than a text and sizes."""
    takes, gives = config.get("in_channels"), config.get("out_channels")
    if takes != gives:
        does = READ_BY_UNETS.get(takes or 0, "reads more than a sample")
        raise UserError(
            f"pipeline has a UNet of {takes} channels, of which it gives {gives}: it {does}, and dumo trains what "
            "makes an image of a text alone. Take the folder of a text-to-image pipeline"
        )
    added = config.get("addition_embed_type")
    keys = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")
    odd = [key for key in keys if config.get(key)] + ["addition_embed_type"] * (added not in (None, "text_time"))
    if odd:
        raise UserError(
            f"pipeline has a UNet with {odd[0]}, which dumo was not tested with: take Stable Diffusion 1.5, 2.1 or XL"
        )
    return SDXL if added else FAMILIES[UNET]
