"""Load published weights as the start of a run: the velocity of a SiT, or the trunk of a DiT, which predicts noise.

`read` is the entry point. It checks that the run's net equals the published one, loads the file, checks its layers, and
converts their names to those of dumo.
"""

from collections.abc import Collection
from pathlib import Path

from torch import Tensor, nn

from dumo.config.teacher_spec import Start
from dumo.encoders.part import DIFFUSERS, choose_files, require_weights
from dumo.flow.path import FlowPath
from dumo.io import hub
from dumo.io.read import read_json
from dumo.io.tensor_files import load
from dumo.nets import Net
from dumo.nets.dit import SIZES, DiT, Transformer
from dumo.nets.dit_convert import PUBLISHED_FIELDS, UNUSED_PREFIX, convert, from_diffusers, our_name
from dumo.nets.embed import FREQUENCIES
from dumo.types import UserError

_ATTENTION_BY_WIDTH = {width: attention for width, _, attention in SIZES.values()}
# The config file of a diffusers folder.
_CONFIG_FILE = "config.json"
_DIFFUSERS_CLASS = "DiTTransformer2DModel"
_CONFIG_FIX = "download the model again"
_TRUNK = ("embed.", "positions", "label.", "blocks.")
# Converted weights outside the trunk.
_OTHER_CONVERTED = ("heads.v.out.weight", "heads.v.out.bias", "scalars.embedders.t.0.weight")


def read(start: Start, spec: Net, path: FlowPath, net: nn.Module) -> dict[str, Tensor]:
    """Read the weights of `start.source` under the names of the run's net; for kind dit only the trunk.

    Raise UserError if the net differs from the published one, if the file has other layers or is a pickle, if the
    folder is not a diffusers DiT, or if the path is not linear.
    """
    file = hub.path_of(start.source, "start.source", _choose_files)
    if not isinstance(spec, DiT) or not isinstance(net, Transformer):
        raise UserError(f"start.kind={start.kind} needs net.kind=dit, got {spec.kind}: set net.kind=dit")
    _require_published_net(start, spec, path)
    tensors: dict[str, Tensor] = {}
    for name, tensor in _load_tensors(start, file).items():
        if not name.startswith(UNUSED_PREFIX):
            tensors[name] = tensor
    _require_layers(start, tensors, net)
    state = convert(tensors, net)
    if start.kind == "sit":
        return state
    return {name: weight for name, weight in state.items() if name.startswith(_TRUNK)}


def _require_published_net(start: Start, spec: DiT, path: FlowPath) -> None:
    """Raise UserError if a run's net or path differs from that of the published net of the same width."""
    prefix = f"start.kind {start.kind}: the published net"
    required_fields: dict[str, object] = dict(PUBLISHED_FIELDS)
    required_fields["attention"] = _ATTENTION_BY_WIDTH.get(spec.width, spec.attention)
    # At r = t, `late` does not change the function.
    del required_fields["late"]
    if start.kind == "sit":
        required_fields["time_scale"] = 1.0
    for field, value in required_fields.items():
        run_value = getattr(spec, field)
        if run_value != value:
            raise UserError(f"{prefix} has {field} {value}, but this run {run_value}: set net.{field}={value}")
    if spec.texts:
        raise UserError(f"{prefix} is class-conditional, but this run uses texts: set net.texts=null")
    if start.kind == "sit" and (path.kind != "linear" or path.sd != 1):
        raise UserError(
            f"{prefix} predicts a velocity on path 'linear' with sd 1, not on path '{path.kind}' with sd {path.sd:g}: "
            "set path.kind=linear path.sd=1"
        )


def _load_tensors(start: Start, place: Path) -> dict[str, Tensor]:
    """Load the tensors of a file, or of the diffusers folder of a DiT, under the authors' names."""
    if not place.is_dir():
        return load(place)
    files = [*place.glob(f"*{hub.SUFFIX}")]
    if len(files) == 1 and not (place / _CONFIG_FILE).is_file():
        return load(files[0])
    model_class = "nothing"
    for folder in (place, place / "transformer"):
        if (folder / _CONFIG_FILE).is_file():
            model_class = read_json(folder / _CONFIG_FILE).get("_class_name", "nothing")
            if start.kind == "dit" and model_class == _DIFFUSERS_CLASS:
                part_weights = require_weights(folder, DIFFUSERS, "start.source", _CONFIG_FIX)
                return from_diffusers(part_weights.load())
            break
    raise UserError(
        f"start.source: {place} contains {model_class}: use a safetensors file of the authors, for start.kind=dit also "
        f"a folder of a {_DIFFUSERS_CLASS}; diffusers flow models need net.kind=diffusers instead"
    )


def _choose_files(files: Collection[str]) -> list[str]:
    """Choose the files of a repository: its diffusers model, or else its top-level weight files."""
    for folder in ("", "transformer"):
        if str(Path(folder, _CONFIG_FILE)) in files:
            return choose_files(files, folder)
    return [file for file in files if "/" not in file and file.endswith(hub.SUFFIX)]


def _require_layers(start: Start, tensors: dict[str, Tensor], net: Transformer) -> None:
    """Raise UserError unless the tensors, under the authors' names, are a SiT or DiT of the net's sizes."""
    prefix = f"start.source: {start.source} is not a SiT or DiT of this size,"
    fix = "set net.depth, save only the model's weights (`ema`), or use another file"

    # Compare the names.
    trunk_names = {name for name in net.state_dict() if name.startswith(_TRUNK)}
    source_names: set[str] = set()
    for name in tensors:
        net_name = our_name(name)
        if net_name is None or (net_name.startswith(_TRUNK) and net_name not in trunk_names):
            raise UserError(f"{prefix} {name} is not a layer of this network: {fix}")
        source_names.add(net_name)
    missing = sorted({*trunk_names, *_OTHER_CONVERTED} - source_names - {"positions"})
    if missing:
        raise UserError(f"{prefix} it has no weights for {missing[0]}: {fix}")

    # Compare the shapes. A DiT also predicts a variance.
    width, patch_numbers = net.embed.weight.shape
    channels = patch_numbers // net.patch**2
    shapes = {
        "x_embedder.proj.weight": [(width, channels, net.patch, net.patch)],
        "t_embedder.mlp.0.weight": [(width, 2 * FREQUENCIES)],
        "final_layer.linear.weight": [(patch_numbers, width), (2 * patch_numbers, width)],
    }
    for name, allowed_shapes in shapes.items():
        if name not in tensors:
            continue
        shape = tuple(tensors[name].shape)
        if shape not in allowed_shapes:
            raise UserError(
                f"{prefix} it has {name} of shape {shape}, but this network needs {allowed_shapes[0]}: set net.patch, "
                f"net.width: {fix}"
            )
