"""The file of the weights of the FID's Inception: where it comes from, how it is made, and what is checked of it.

The weights are published as a pickle, and dumo reads none: a pickle runs what it likes. Who wants a FID makes a
safetensors file of it once, by `MAKE`, which also notes the sha256 of its source.
"""

import os
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dumo.features.inception import Inception
from dumo.types import UserError

VARIABLE = "DUMO_INCEPTION"  # of the environment: where the weights are
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # of the published file
FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
MAKE = (
    'python -c "import hashlib, pathlib, torch; from safetensors.torch import save_file;'
    f" p = '{FILE}'; w = torch.load(p, map_location='cpu', weights_only=True);"
    " save_file({k: v.contiguous() for k, v in w.items()}, 'inception.safetensors',"
    " {'source': p, 'sha256': hashlib.sha256(pathlib.Path(p).read_bytes()).hexdigest()})\""
)


def load(path: Path | str | None = None, device: torch.device | str = "cpu") -> Inception:
    """The network with the published weights, from `path` or, without it, from where `VARIABLE` says.

    Checked are the name and shape of every weight, that all are finite float32, and that the file says it was made
    (`MAKE`) of a source of the published `SHA256`. `origin` repeats what it says. Raises `UserError`.
    """
    found = path or os.environ.get(VARIABLE)
    if not found or not Path(found).is_file():
        said = f"{found} is no file" if found else f"no path is given and {VARIABLE} is not set"
        raise UserError(f"no weights of Inception for the FID: {said}.\n{_way()}")
    with torch.device("meta"):
        net = Inception()
    try:
        with safe_open(found, "pt") as file:
            origin, weights = file.metadata() or {}, {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{found} is no safetensors file ({error}), and dumo reads no pickle.\n{_way()}") from error
    _check(net, origin, weights, str(found))
    net.load_state_dict(weights, assign=True)
    net.origin = origin
    return net.to(device)


def facts(net: nn.Module) -> dict[str, str]:
    """What a report says of a network that was loaded: what it was made of, and the hash of the weights that it has."""
    origin, said = getattr(net, "origin", {}), sha256()
    for name, w in sorted(net.state_dict().items()):
        said.update(f"{name} {tuple(w.shape)}".encode() + w.cpu().numpy().tobytes())
    made = f"Inception of December 2015, of a file of sha256 {origin.get('sha256', 'unknown')}"
    return {"features": made, "features_sha256": said.hexdigest()}


def _check(net: Inception, origin: dict[str, str], weights: dict[str, Tensor], path: str) -> None:
    """Refuse weights that are not those of the published file, as far as it can be told."""
    wanted = {name: w.shape for name, w in net.state_dict().items()}
    for name in [name for name in weights if name.endswith("num_batches_tracked")]:
        del weights[name]
    if odd := sorted(wanted.keys() ^ weights.keys()):
        verb = "lacks" if odd[0] in wanted else "has an unknown"
        raise UserError(f"{path} {verb} {odd[0]} ({len(odd)} such names): these are not Inception's weights.\n{_way()}")
    for name, w in weights.items():
        if w.shape != wanted[name] or w.dtype != torch.float32 or not w.isfinite().all():
            raise UserError(
                f"{path}: {name} is {w.dtype} of shape {tuple(w.shape)}, not finite float32 of shape"
                f" {tuple(wanted[name])}: these are not Inception's weights.\n{_way()}"
            )
    if origin.get("sha256") != SHA256:
        said = origin.get("sha256", "nothing")
        raise UserError(f"{path} says it was made of a file of sha256 {said}, not {SHA256}.\n{_way()}")


def _way() -> str:
    """How to get the weights."""
    return f"Fetch {URL}, run beside it\n  {MAKE}\nand give the path of inception.safetensors, or set {VARIABLE} to it."
