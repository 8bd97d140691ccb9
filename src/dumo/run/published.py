"""Published weights that a run begins with: a velocity of SiT's, or the trunk of a DiT, which predicts noise."""

from pathlib import Path

from torch import Tensor, nn

from dumo.config.teacher import Start
from dumo.flow.path import Path as FlowPath
from dumo.io.read import read_settings, user_path
from dumo.io.weights import load
from dumo.nets import Net
from dumo.nets.dit import PUBLISHED, SIZES, UNUSED, DiT, Transformer, converted, of_diffusers, our_name
from dumo.nets.embed import FREQUENCIES
from dumo.types import UserError

ATTENTION = {width: attention for width, _, attention in SIZES.values()}
CONFIG, WEIGHTS, DIFFUSERS = "config.json", "diffusion_pytorch_model.safetensors", "DiTTransformer2DModel"
ANOTHER = "take another copy of the model"
TRUNK = ("embed.", "positions", "label.", "blocks.")
REST = ("heads.v.out.weight", "heads.v.out.bias", "scalars.embedders.t.0.weight")  # also converted


def read(start: Start, spec: Net, path: FlowPath, net: nn.Module) -> dict[str, Tensor]:
    """The weights of `start.source` by the names of the run's net; of kind dit those of the trunk alone.

    Raises UserError if the net is another function than the published one, the file has other layers or is a pickle,
    the folder is not diffusers' of a DiT, or the path is not linear.
    """
    file = user_path(start.source, "start.source")
    if not isinstance(spec, DiT) or not isinstance(net, Transformer):
        raise UserError(f"start.kind {start.kind} is for net.kind dit, and this run's is {spec.kind}")
    wanted = {**PUBLISHED, "attention": ATTENTION.get(spec.width, spec.attention)}
    del wanted["late"]  # where r = t it is the published one
    wanted |= {"time_scale": 1.0} if start.kind == "sit" else {}
    wrong = [
        f"has {field} {value}, and this one {getattr(spec, field)}: set net.{field}={value}"
        for field, value in wanted.items()
        if getattr(spec, field) != value
    ]
    wrong += ["is a net of classes, and this one reads texts: set net.texts=null"] if spec.texts else []
    if start.kind == "sit" and (path.kind, path.sd) != ("linear", 1):
        wrong += [f"is a velocity on path 'linear' of sd 1, not on {path.kind}: set path.kind"]
    if wrong:
        raise UserError(f"start.kind {start.kind}: the published net {wrong[0]}")
    found = {name: tensor for name, tensor in weights(start, file).items() if not name.startswith(UNUSED)}
    return fitting(start, found, net)


def weights(start: Start, place: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of a diffusers folder of a DiT, by the authors' names. Raises UserError as `read`."""
    if not place.is_dir():
        return load(place)
    folder = next((one for one in (place, place / "transformer") if (one / CONFIG).is_file()), None)
    kind = read_settings(folder / CONFIG, ANOTHER).get("_class_name", "nothing") if folder else "nothing"
    if folder and (start.kind, kind) == ("dit", DIFFUSERS):
        return of_diffusers(load(folder / WEIGHTS))
    raise UserError(
        f"start.source: {place} is a folder of {kind}. A sit is one safetensors file under its authors' names, a dit "
        f"such a file or a folder of {DIFFUSERS}, and a flow model of diffusers a net of its own: net.kind=diffusers"
    )


def fitting(start: Start, found: dict[str, Tensor], net: Transformer) -> dict[str, Tensor]:
    """The tensors by our names. Raises UserError if the file is not of a SiT of these sizes."""
    own = {name for name in net.state_dict() if name.startswith(TRUNK)}
    have = {name: our_name(name) for name in found}
    wrong = [
        f"{name} is none of its layers here"
        for name, ours in have.items()
        if ours is None or (ours.startswith(TRUNK) and ours not in own)
    ]
    lacking = {*own, *REST} - {*have.values(), "positions"}
    wrong += [f"it has nothing for {name}" for name in sorted(lacking)]
    (width, patch), p = net.embed.weight.shape, net.patch
    sizes = {
        "x_embedder.proj.weight": [(width, patch // p**2, p, p)],
        "t_embedder.mlp.0.weight": [(width, 2 * FREQUENCIES)],
        "final_layer.linear.weight": [(patch, width), (2 * patch, width)],
    }
    wrong += [
        f"it has {name} of shape {shape}, and this net takes {may[0]}: set net.patch, net.width"
        for name, may in sizes.items()
        if name in found and (shape := tuple(found[name].shape)) not in may
    ]
    if wrong:
        raise UserError(
            f"start.source: {start.source} is no SiT or DiT of these sizes, {wrong[0]}: set net.depth, take the part "
            "that holds the model (`ema`), or another file"
        )
    state = converted(found, net)
    return state if start.kind == "sit" else {name: w for name, w in state.items() if name.startswith(TRUNK)}
