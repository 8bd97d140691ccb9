"""Whether a run's net, its pipeline's files and its data fit together, checked when the run is resolved for training.

`check_opened` makes the net on the meta device, reads the pipeline's configs and raises the first fault that one of
the functions below yields. `dumo.config.check`, which does neither, is before it.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from torch import nn

from dumo.config.check import require
from dumo.config.conditions import Conditions, shown
from dumo.config.need import Need, buckets_field, captions_field, names_of
from dumo.config.tree import Tree
from dumo.data import Data, Images, Latents
from dumo.flow.path import Diffusion, Path
from dumo.flow.slope import DualSlope, slope_of
from dumo.nets import Net, Pretrained
from dumo.nets.dualized import Dualized
from dumo.nets.table import Embedded, PipelineTexts
from dumo.run.net import outline
from dumo.training.spec import Train
from dumo.types import Needs


def check_opened(run: Tree) -> None:
    """Raise UserError for the first mismatch of a net with its data, path, pipeline, slope, compiler or teacher."""
    require(editing_faults(run.data, run.net))
    net = outline(run, short=True)
    require(patch_faults(run.data, net), position_faults(run.data, net), schedule_faults(run.path, run.net))
    slope = slope_of(run.objective)
    if slope:
        slope.check(run.train.precision, run.net.time_scale)
    require(compiler_faults(run.train, run.objective.needs, run.net, net, run.data.classes))
    if run.teacher and run.teacher.kind == "base":
        require(base_teacher_faults(net, run.net.kind, run.path))


def editing_faults(data: Data, net: Net) -> Iterator[str]:
    """Images to edit without a model that edits, and such a model without images."""
    texts = net.texts
    source = getattr(Conditions(data).captions, "source", None)
    model = texts.family.pipeline if isinstance(texts, PipelineTexts) else net.kind
    data_has = names_of({"images to edit": bool(source)})
    net_edits = names_of({"images to edit": isinstance(texts, PipelineTexts) and texts.family.edits})

    def fault(_: str) -> str:
        return (
            f"{captions_field(data)}.source is the column of images to edit, {source or 'null'}, and the pipeline is a "
            f"{model}: name one for a model that edits, and for no other"
        )

    for need in (Need(data_has, net_edits, fault), Need(net_edits, data_has, fault)):
        yield from need.faults()


def patch_faults(data: Data, net: nn.Module) -> Iterator[str]:
    """Buckets of sides that the net's patches do not divide."""
    images = shown(data)
    field = buckets_field(data)
    if not (field and isinstance(data, Images | Latents) and isinstance(images, Images) and images.buckets):
        return
    patch: int = getattr(net, "patch", 1)
    undivided = [side for side in bucket_sides(data) if side % patch]
    if undivided:
        yield (
            f"{field}.step = {images.buckets.step} pixels makes sides of {undivided[0]}, which net.patch {patch} does "
            f"not divide: make it a multiple of {images.side * patch // data.shape[1]}"
        )


def bucket_sides(data: Images | Latents) -> list[int]:
    """The heights and widths of what the net takes, bucket by bucket."""
    sides: list[int] = []
    for shape in data.shapes:
        sides += shape[1:]
    return sides


def position_faults(data: Data, net: nn.Module) -> Iterator[str]:
    """Images of more patches along a side than a pretrained model has positions for."""
    if not isinstance(net, Dualized) or net.max_patches is None:
        return
    max_patches = net.max_patches
    problem = f"pipeline has a model with positions for {max_patches} patches a side"
    if max(data.shape[1:]) // net.patch > max_patches:
        field = "data.images.side" if isinstance(data, Latents) else "data.side"
        pixels = shown(data).shape[1]
        latents = data.shape[1]
        max_pixels = max_patches * net.patch * pixels // latents
        yield (
            f"{problem}, and images of {pixels:,} x {pixels:,} pixels have {latents // net.patch}: set "
            f"{field}={max_pixels} or less"
        )
    field = buckets_field(data)
    if field and isinstance(data, Images | Latents):
        patches = max(side // net.patch for side in bucket_sides(data))
        if patches > max_patches:
            yield f"{problem}, and {field} has {patches}: lower {field}.ratio"


def schedule_faults(path: Path, net: Net) -> Iterator[str]:
    """A model of a diffusion on another path than its own, or that path with another net."""
    frame = net.frame if isinstance(net, Pretrained) else None
    if isinstance(path, Diffusion) and frame is None:
        yield (
            "path 'diffusion' is that of a pipeline's model which learned noise (epsilon or v prediction), and this "
            "net is none: set path.kind=linear"
        )
    elif frame and not isinstance(path, Diffusion):
        yield (
            "pipeline has a model of a diffusion, whose path ends before the noise, at the last time of its schedule: "
            "set path.kind=diffusion"
        )
    elif frame and isinstance(path, Diffusion) and path.schedule not in (None, frame.schedule):
        yield "path.schedule is another than the pipeline's scheduler has: leave it out, or set it to null"


def compiler_faults(train: Train, needs: Needs, spec: Net, net: nn.Module, classes: int) -> Iterator[str]:
    """Blocks of which torch makes no single graph with a dual slope, and a loss if texts are looked up on the host."""
    texts = spec.texts
    is_dual = isinstance(needs.slope, DualSlope)
    if train.compile != "none" and is_dual and isinstance(net, Dualized) and not net.family.compiles:
        yield (
            f"train.compile = {train.compile}: torch cannot compile the blocks of this pipeline's model where slope "
            "'dual' rides along: set train.compile=none"
        )
    if train.compile == "loss" and isinstance(texts, Embedded) and texts.is_mapped(classes):
        yield (
            f"train.compile = loss: texts take more than net.texts.memory = {texts.memory:g} GB, so they are looked up "
            "on the host, where no compiler follows: set train.compile=blocks, or raise net.texts.memory"
        )


def base_teacher_faults(net: nn.Module, kind: str, path: Path) -> Iterator[str]:
    """A net without adapters as its own teacher, or on another path than that of its velocity."""
    off: Callable[[], AbstractContextManager[None]] | None = getattr(net, "base", None)
    if off is None or path.kind == "trig" or path.sd != 1:
        yield (
            f"teacher.kind = base asks for the net with its adapters off, on path 'linear' of sd 1; this is net "
            f"'{kind}' on path '{path.kind}' of sd {path.sd:g}: set teacher.kind=run and teacher.source to the "
            "folder of a run that can teach"
        )
        return
    with off():  # raises UserError if the net has no adapters
        pass
