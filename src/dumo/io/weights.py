"""Files of weights: safetensors only, whole, and the ones that were meant; or folders of shards (`dumo.io.shards`).

No pickle is read: opening one can run any code.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dumo.io import digest
from dumo.io.read import brief
from dumo.runtime import dist
from dumo.types import UserError

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
ANOTHER = "take another copy of it"


@contextmanager
def open_safetensors(file: Path, hint: str = "", *, convert: bool = True) -> Generator[safe_open, None, None]:
    """A safetensors file, whose header is read, and compared with the file's size.

    Raises UserError for no file, a pickle, or a damaged file. `hint` says where to get it; `convert`: a pickle may be
    converted as it is.
    """
    pickle = file.suffix.lower() in PICKLES  # whether it is there or not, it is not what to fetch
    if pickle or not file.is_file():
        missing = f"{file}: there is no such file{hint and f'. {hint}'}"
        raise UserError(_refusal(file, hint, convert) if pickle else missing)
    try:
        with safe_open(file, "pt") as found:
            yield found
    except SafetensorError as error:
        way = f"{ANOTHER}. {hint}" if hint else ANOTHER
        damaged = f"{file} is damaged or is not safetensors ({brief(error)}): {way}"
        raise UserError(_refusal(file, hint, convert) if _is_pickle(file) else damaged) from error


def read(file: Path, hint: str = "", *, convert: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, mapped into memory, and its notes. Raises as `open_safetensors`."""
    with open_safetensors(file, hint, convert=convert) as found:
        return {name: found.get_tensor(name) for name in found.keys()}, found.metadata() or {}  # noqa: SIM118, no dict


def load(place: Path) -> dict[str, Tensor]:
    """The tensors alone, of a file or of a folder of shards. Raises as `read` and `dumo.io.shards.outline`."""
    if place.is_dir():
        from dumo.io import shards  # slow to import

        return shards.load(place)
    return read(place)[0]


def outline(place: Path) -> dict[str, Tensor]:
    """Tensors of the names, shapes and dtypes that a file or a folder of shards holds; unread. Raises as `load`."""
    if place.is_dir():
        from dumo.io import shards  # slow to import

        return shards.outline(place)
    return load(place)  # mapped


@torch.no_grad()
def fill(place: Path, into: Mapping[str, Tensor]) -> None:
    """Copy the tensors of these names and shapes (`compare`) into `into`, whole or a rank's part. Raises as `load`."""
    if not place.is_dir() and dist.world() == 1:
        for name, whole in load(place).items():
            into[name].copy_(whole)
        return
    from dumo.io import shards  # slow to import

    if place.is_dir():
        shards.fill(place, into)
    else:
        shards.share(load(place), into)


def apart(tensors: Mapping[str, Tensor], local: Callable[[Tensor], Tensor] = torch.detach) -> dict[str, Tensor]:
    """The same values as safetensors wants them: contiguous, and no two in one memory (tied weights are cloned).

    `local` gives what of a tensor lies in this process.
    """
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().contiguous()
        place = local(whole).untyped_storage().data_ptr()
        out[name] = whole.clone() if place in seen else whole
        seen.add(place)
    return out


def title(place: Path) -> str:
    """The name of a file, without its ending, or of a folder of shards: ema-0.999."""
    return place.name.removesuffix(".safetensors")


def notes(place: Path) -> dict[str, str]:
    """What a safetensors file says of itself, its tensors left unread; shards say nothing. Raises as `read`."""
    if place.is_dir():
        return {}
    with open_safetensors(place) as found:
        return found.metadata() or {}


def sha256(place: Path) -> str:
    """Of a file's bytes; of a folder of shards, those of the one file that one process would have written."""
    if place.is_dir():
        from dumo.io import shards  # slow to import

        return digest.of_stream(shards.as_file(place))
    return digest.of_file(place)


def whole_digest(file: Path, hint: str) -> str:
    """The SHA-256 of a whole safetensors file, in hexadecimal. Raises as `open_safetensors`."""
    with open_safetensors(file, hint):
        return digest.of_file(file)


def compare(
    file: Path,
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    owner: str,
    way_out: str,
    *,
    dtypes: bool = True,
) -> None:
    """Raise UserError, naming the first that differs, unless both have the same names, shapes and, if `dtypes`, dtypes.

    `found` are a file's tensors, `wanted` those of the net, `owner` what to call it.
    """
    names = sorted(found.keys() | wanted.keys())
    pairs = {name: [_described(tensors.get(name), dtypes) for tensors in (found, wanted)] for name in names}
    if odd := [name for name, (has, needs) in pairs.items() if has != needs]:
        has, needs = pairs[odd[0]]
        more = f" ({len(odd)} such names)" if len(odd) > 1 else ""
        raise UserError(f"{file}: {odd[0]} is {has} in the file, {needs} in {owner}{more}: {way_out}")


def conversion(file: str, out: str) -> str:
    """The line that a user runs, once, to make a safetensors file of published weights."""
    return (
        'python -c "import torch, safetensors.torch as s; '
        f"s.save_file(torch.load('{file}', weights_only=True), '{out}', dict(format='pt'))\""
    )


def _refusal(file: Path, hint: str, convert: bool) -> str:
    """Why a pickle is refused, and the way out."""
    why, out = f"{file}: dumo reads no pickle, which can run code.", file.with_suffix(".safetensors")
    line = conversion(file.name, out.name if out != file else f"new-{out.name}")
    lines = [f"{why} Convert it once, where you trust it:", f"  {line}"] if convert else [why]
    return "\n".join([*lines, hint] if hint else lines)


def _is_pickle(file: Path) -> bool:
    """Whether a file begins as torch.save or pickle would have it; a whole safetensors file may do so, too."""
    with file.open("rb") as stream:
        head = stream.read(4)
    return head == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5")


def _described(tensor: Tensor | None, dtypes: bool) -> str:
    """Shape and dtype in words."""
    if tensor is None:
        return "absent"
    return f"{tuple(tensor.shape)}" + (f" {str(tensor.dtype).removeprefix('torch.')}" if dtypes else "")
