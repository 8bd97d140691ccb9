"""Check that a run's network fits its data, path, pipeline and teacher, when the run is resolved for training.

`check_built` builds the network on the meta device and reads the configs of its pipeline. `dumo.config.check_spec` has
already checked everything that needs only the config values.
"""

from dumo.config.check_spec import buckets_field, captions_field
from dumo.config.conditions import shown_data
from dumo.config.spec import Run
from dumo.data import Data, Images, Latents
from dumo.flow.path import Diffusion, FlowPath
from dumo.flow.slope import slope_of
from dumo.nets import Net, Pretrained
from dumo.nets.dualized import Dualized
from dumo.run.net import meta_net
from dumo.types import UserError


def check_built(run: Run) -> None:
    """Raise UserError for the first mismatch of a network with the data, path, pipeline, slope or teacher."""
    _check_editing(run.data, run.net)
    net = meta_net(run, short=True)
    if isinstance(net, Dualized) and net.max_patches is not None:
        _check_positions(run.data, net.patch, net.max_patches)
    _check_path(run.path, run.net)
    slope = slope_of(run.objective)
    if slope:
        slope.check(run.train.precision, run.net.time_scale)
    if run.teacher and run.teacher.kind == "base":
        _check_base_teacher(run.path)


def _check_editing(data: Data, net: Net) -> None:
    """Require source images if and only if the model edits images."""
    source = getattr(data.captions, "source", None)
    texts = net.texts
    family = texts.family if texts and texts.kind == "pipeline" else None
    edits = family is not None and family.edits_images
    model = family.pipeline if family else f"net '{net.kind}'"
    field = f"{captions_field(data)}.source"
    if source and not edits:
        raise UserError(
            f"{field} = {source} is a column of images to edit, but {model} does not edit images: remove it"
        )
    if edits and not source:
        raise UserError(f"{field} is missing, but a {model} edits images: set it to the column of images to edit")


def _check_positions(data: Data, patch: int, max_patches: int) -> None:
    """Refuse images with more patches per side than the positional embedding of the model.

    Some models would silently use wrong positions.
    """
    sides = [*data.shape[1:]]
    if isinstance(data, Images | Latents) and buckets_field(data):
        for shape in data.shapes:
            sides += shape[1:]
    patches = max(sides) // patch
    if patches > max_patches:
        # A patch of latents covers more pixels than its side, by the downsampling factor of the codec.
        pixels_per_patch = patch * max(shown_data(data).shape[1:]) // max(data.shape[1:])
        field = "data.images.side" if isinstance(data, Latents) else "data.side"
        fix = f"set {field}={max_patches * pixels_per_patch} or less"
        # If the square fits, only the longest bucket is too long.
        if max(data.shape[1:]) // patch <= max_patches:
            fix = f"lower {buckets_field(data)}.ratio"
        raise UserError(
            f"pipeline has a model with positions for {max_patches} patches a side, but the images have {patches}: "
            f"{fix}"
        )


def _check_path(path: FlowPath, net: Net) -> None:
    """Require the diffusion path, with the schedule of the pipeline, if and only if the net is a diffusion model."""
    diffusion = net.diffusion if isinstance(net, Pretrained) else None
    if isinstance(path, Diffusion) and diffusion is None:
        raise UserError(
            "path.kind = diffusion needs a pipeline's model that predicts noise (epsilon or v prediction): set "
            "path.kind=linear"
        )
    if diffusion and not isinstance(path, Diffusion):
        raise UserError(
            f"path.kind = {path.kind}, but pipeline has a diffusion model with its own noise schedule: set "
            "path.kind=diffusion"
        )
    if diffusion and isinstance(path, Diffusion) and path.schedule not in (None, diffusion.schedule):
        raise UserError("path.schedule differs from that of the pipeline's scheduler: set path.schedule=null")


def _check_base_teacher(path: FlowPath) -> None:
    """Require the linear path with sd 1, because the base model under the adapters predicts its velocity."""
    if path.kind == "trig" or path.sd != 1:
        raise UserError(
            f"teacher.kind = base needs path 'linear' with sd 1, not path '{path.kind}' with sd {path.sd:g}: "
            "set teacher.kind=run and teacher.source to the folder of a run"
        )
