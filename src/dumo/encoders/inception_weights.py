"""The file of the weights of the FID's Inception: where it comes from, how it is made, and what is checked of it.

The weights are published as a pickle, and dumo reads none: a pickle runs what it likes. Who wants a FID makes a
safetensors file of it once, by `MAKE`, which also notes the sha256 of its source.
"""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from dumo.encoders.inception import Inception
from dumo.io import digest
from dumo.io.weights import compare, read
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


def place(path: Path | str | None = None) -> Path | None:
    """Where the weights should be: `path`, or where `VARIABLE` says."""
    found = path or os.environ.get(VARIABLE)
    return Path(found) if found else None


def load(path: Path | str | None = None, device: torch.device | str = "cpu") -> Inception:
    """The network with the published weights, from `path` or, without it, from where `VARIABLE` says.

    Checked are the name and shape of every weight, that all are finite float32, and that the file says it was made
    (`MAKE`) of a source of the published `SHA256`. `origin` repeats what it says. Raises `UserError`.
    """
    found = place(path)
    if not found or not found.is_file():
        said = f"{found} is no file" if found else f"no path is given and {VARIABLE} is not set"
        raise UserError(f"no weights of Inception for the FID: {said}.\n{_way()}")
    with torch.device("meta"):
        net = Inception()
    weights, origin = read(found, _way(), convert=False)
    _check(net, origin, weights, found)
    net.load_state_dict(weights, assign=True)
    net.origin = origin
    return net.to(device)


def facts(net: nn.Module) -> dict[str, str]:
    """What a report says of a network that was loaded: what it was made of, and the hash of the weights that it has."""
    weights = sorted(net.state_dict().items())
    said = digest.of_bytes(*(f"{name} {tuple(w.shape)}".encode() + w.cpu().numpy().tobytes() for name, w in weights))
    source = getattr(net, "origin", {}).get("sha256", "unknown")
    return {"features": f"Inception of December 2015, of a file of sha256 {source}", "features_sha256": said}


def _check(net: Inception, origin: dict[str, str], weights: dict[str, Tensor], path: Path) -> None:
    """Refuse weights that are not those of the published file, as far as can be seen."""
    for name in [name for name in weights if name.endswith("num_batches_tracked")]:
        del weights[name]
    other = f"these are not Inception's weights.\n{_way()}"
    compare(path, weights, net.state_dict(), "Inception", other)
    if odd := [name for name, w in weights.items() if not w.isfinite().all()]:
        raise UserError(f"{path}: {odd[0]} is not finite: {other}")
    if origin.get("sha256") != SHA256:
        said = origin.get("sha256", "nothing")
        raise UserError(f"{path} says it was made of a file of sha256 {said}, not {SHA256}.\n{_way()}")


def _way() -> str:
    """How to get the weights."""
    return f"Fetch {URL}, run in its folder\n  {MAKE}\nand set {VARIABLE} to inception.safetensors."
