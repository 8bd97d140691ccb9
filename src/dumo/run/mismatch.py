"""Mismatches of a run's net with its data, path, pipeline and teacher, found when the run is resolved for training.

`check_built` is the entrance: it makes the net on the meta device, reads the pipeline's configs and raises the first
fault that one of the functions below it yields. Checks that need neither are in `dumo.config.check`, which runs first.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch import nn

from dumo.config.check import require
from dumo.config.conditions import shown_data
from dumo.config.need import buckets_field, captions_field
from dumo.config.parts import RunParts
from dumo.data import Data, has_images, is_images, is_latents
from dumo.flow.path import Diffusion, FlowPath
from dumo.flow.slope import DualSlope, slope_of
from dumo.nets import Net, is_dualized, is_pretrained
from dumo.nets.textfamily import has_embeddings
from dumo.run.net import outline
from dumo.training.spec import Train
from dumo.types import Needs, UserError

if TYPE_CHECKING:
    from dumo.data import Images, Latents


def check_built(run: RunParts) -> None:
    """Raise UserError for the first mismatch of a net with its data, path, pipeline, slope, compiler or teacher."""
    if run.data.captions or run.net.texts:
        require(_editing_faults(run.data, run.net))
    net = outline(run, short=True)
    if buckets_field(run.data):
        require(_patch_faults(run.data, net))
    if is_dualized(net) and net.max_patches is not None:
        default_side = run.net.side if is_pretrained(run.net) else 0
        require(_position_faults(run.data, net.patch, net.max_patches, default_side))
    if is_pretrained(run.net) or isinstance(run.path, Diffusion):
        require(_schedule_faults(run.path, run.net))
    slope = slope_of(run.objective)
    if slope:
        slope.check(run.train.precision, run.net.time_scale)
    if run.train.compile != "none":
        require(_compiler_faults(run.train, run.objective.needs, run.net, net, run.data.classes))
    if run.teacher and run.teacher.kind == "base":
        require(_base_teacher_faults(net, run.net, run.path))


def _editing_faults(data: Data, spec: Net) -> Iterator[str]:
    """Images to edit without a model that edits, and such a model without images."""
    source = getattr(data.captions, "source", None)
    texts = spec.texts
    family = texts.family if texts and texts.kind == "pipeline" else None
    edits = family is not None and family.edits_images
    model = family.pipeline if family else f"net '{spec.kind}'"
    field = f"{captions_field(data)}.source"
    if source and not edits:
        yield f"{field} = {source} is a column of images to edit, and a {model} edits none: leave it out"
    if edits and not source:
        yield f"{field} is missing, and a {model} edits images: set it to the column of images to edit"


def _patch_faults(data: Data, net: nn.Module) -> Iterator[str]:
    """Buckets of sides that the net's patches do not divide."""
    images = shown_data(data)
    if not has_images(data) or not is_images(images):
        return
    if images.buckets is None:
        return
    patch: int = getattr(net, "patch", 1)
    pixels_per_patch = images.side * patch // data.shape[1]
    undivided = [side for side in _bucket_sides(data) if side % patch]
    if undivided:
        yield (
            f"{buckets_field(data)}.step = {images.buckets.step} pixels makes sides of {undivided[0]}, which net.patch "
            f"{patch} does not divide: make it a multiple of {pixels_per_patch}"
        )


def _bucket_sides(data: "Images | Latents") -> list[int]:
    """The heights and widths of what the net takes, bucket by bucket."""
    sides: list[int] = []
    for shape in data.shapes:
        sides += shape[1:]
    return sides


def _position_faults(data: Data, patch: int, max_patches: int, default_side: int) -> Iterator[str]:
    """Images of more patches along a side than a pretrained model has positions for.

    `patch` is the side of its patches, `default_side` the pixels along a side of the pipeline's default image; 0: it
    has none.
    """
    longest = max(data.shape[1:])  # in latents, or pixels where there is no codec
    pixels = shown_data(data).shape[1:]
    pixels_per_patch = patch * max(pixels) // longest
    patches = longest // patch
    if patches > max_patches:
        field = "data.images.side" if is_latents(data) else "data.side"
        size = " x ".join(f"{side:,}" for side in pixels)
        default = ""
        if default_side and default_side // pixels_per_patch <= max_patches:
            default = f" (the pipeline's default is {default_side})"
        yield (
            f"pipeline has a model with positions for {max_patches} patches a side, and images of {size} pixels have "
            f"{patches}: set {field}={max_patches * pixels_per_patch} or less{default}"
        )
    bucket_field = buckets_field(data)
    if bucket_field and has_images(data):
        bucket_patches = max(side // patch for side in _bucket_sides(data))
        if bucket_patches > max_patches:
            yield (
                f"pipeline has a model with positions for {max_patches} patches a side, and {bucket_field} has "
                f"{bucket_patches}: lower {bucket_field}.ratio"
            )


def _schedule_faults(path: FlowPath, spec: Net) -> Iterator[str]:
    """A model of a diffusion on another path than its own, or that path with another net."""
    diffusion = spec.diffusion if is_pretrained(spec) else None  # None: the net has learned no diffusion
    if isinstance(path, Diffusion) and diffusion is None:
        yield (
            "path.kind = diffusion needs a pipeline's model which learned noise (epsilon or v prediction), and this "
            "net is none: set path.kind=linear"
        )
    if diffusion and not isinstance(path, Diffusion):
        yield (
            f"path.kind = {path.kind}, and pipeline has a model of a diffusion, whose path ends before the noise, at "
            "the last time of its schedule: set path.kind=diffusion"
        )
    if diffusion and isinstance(path, Diffusion) and path.schedule not in (None, diffusion.schedule):
        yield "path.schedule is another than the pipeline's scheduler has: leave it out, or set it to null"


def _compiler_faults(train: Train, needs: Needs, spec: Net, net: nn.Module, classes: int) -> Iterator[str]:
    """Blocks of which torch makes no single graph with a dual slope, and a loss if texts are looked up on the host."""
    has_dual_slope = isinstance(needs.slope, DualSlope)
    has_uncompiled_blocks = is_dualized(net) and not net.family.compiles
    if has_dual_slope and has_uncompiled_blocks:
        yield (
            f"train.compile = {train.compile}: torch cannot compile the blocks of this pipeline's model together with "
            "slope 'dual': set train.compile=none"
        )
    texts = spec.texts
    if train.compile == "loss" and has_embeddings(texts) and texts.is_mapped(classes):
        yield (
            f"train.compile = loss: texts take more than net.texts.memory = {texts.memory:g} GB, so they are looked up "
            "on the host, where no compiler follows: set train.compile=blocks, or raise net.texts.memory"
        )


def _base_teacher_faults(net: nn.Module, spec: Net, path: FlowPath) -> Iterator[str]:
    """A net without adapters as its own teacher, or on another path than that of its velocity."""
    adapters_off: Callable[[], AbstractContextManager[object]] | None = getattr(net, "base", None)
    if adapters_off is None:
        yield (
            f"teacher.kind = base asks for the net with its adapters off, and net '{spec.kind}' has none to turn off: "
            "set teacher.kind=run and teacher.source to the folder of a run that can teach"
        )
        return
    if path.kind == "trig" or path.sd != 1:
        yield (
            f"teacher.kind = base asks for a net on path 'linear' of sd 1; this is on path '{path.kind}' of sd "
            f"{path.sd:g}: set teacher.kind=run and teacher.source to the folder of a run that can teach"
        )
        return
    try:
        with adapters_off():
            pass
    except UserError as error:  # the net was built without adapters
        yield str(error)
