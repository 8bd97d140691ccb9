"""Published weights that a run begins with: a velocity of SiT's, or the trunk of a DiT, which predicts noise."""

from torch import Tensor, nn

from dumo.config.spec import Run
from dumo.config.teacher import Start
from dumo.io.path import user_path
from dumo.io.weights import load
from dumo.nets.dit import PUBLISHED, SIZES, DiT, Transformer
from dumo.nets.sit import BESIDE, converted, named
from dumo.types import UserError

ATTENTION = {width: attention for width, _, attention in SIZES.values()}
TRUNK = ("embed.", "positions", "label.", "blocks.")
REST = ("heads.v.out.weight", "heads.v.out.bias", "scalars.embedders.t.0.weight")  # beside it, what is converted


def read(start: Start, run: Run, net: nn.Module) -> dict[str, Tensor]:
    """The weights of `start.source` by the names of the run's net; of kind dit those of the trunk alone.

    Raises UserError for a net that is another function than the published one, a file with other layers, a folder of
    diffusers, a pickle, or a path that is not the linear one.
    """
    spec, file = run.net, user_path(start.source, "start.source")
    if not isinstance(spec, DiT) or not isinstance(net, Transformer):
        raise UserError(f"start.kind {start.kind} is for net.kind dit, and this run's is {spec.kind}")
    if file.is_dir():
        raise UserError(
            f"start.source: {file} is a folder, and start.kind {start.kind} takes one safetensors file under the names "
            "of SiT's and DiT's authors. diffusers' DiT predicts noise, and its flow models are nets of kind diffusers"
        )
    wanted = {**PUBLISHED, "attention": ATTENTION.get(spec.width, spec.attention)}
    wanted |= {"time_scale": 1.0, "aux_time": False} if start.kind == "sit" else {}
    if wrong := [field for field, value in wanted.items() if getattr(spec, field) != value]:
        field = wrong[0]
        raise UserError(
            f"start: the published net has {field} {wanted[field]}, and this one {getattr(spec, field)}: set "
            f"net.{field}={wanted[field]}"
        )
    if start.kind == "sit" and (run.path.kind, run.path.sd) != ("linear", 1):
        raise UserError(f"start.kind sit is a velocity on path 'linear' of sd 1, not on {run.path.kind}: set path.kind")
    found = {name: tensor for name, tensor in load(file).items() if not name.startswith(BESIDE)}
    return fitting(start, found, net)


def fitting(start: Start, found: dict[str, Tensor], net: Transformer) -> dict[str, Tensor]:
    """The tensors by our names. Raises UserError where the file has others than a SiT of these sizes."""
    own = {name for name in net.state_dict() if name.startswith(TRUNK)}
    have = {name: named(name) for name in found}
    strange = [name for name, ours in have.items() if ours is None or (ours.startswith(TRUNK) and ours not in own)]
    lacking = [
        name for name in (*own, "heads.v.out.weight", "scalars.embedders.t.0.weight") if name not in have.values()
    ]
    if strange or lacking:
        what = f"{strange[0]} is none of its layers here" if strange else f"it has nothing for {sorted(lacking)[0]}"
        raise UserError(
            f"start.source: {start.source} is no SiT or DiT of these sizes, {what}: set net.depth, take the part that "
            "holds the model (`ema`), or another file"
        )
    theirs = tuple(found["x_embedder.proj.weight"].shape[1:])
    if theirs != (ours := (net.embed.in_features // net.patch**2, net.patch, net.patch)):
        raise UserError(
            f"start.source: {start.source} takes patches of shape {theirs}, and this net of {ours}: set net.patch, or "
            "take other data"
        )
    state = converted(found, net, reverse=start.reverse)
    return state if start.kind == "sit" else {name: w for name, w in state.items() if name.startswith(TRUNK)}
