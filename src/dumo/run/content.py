"""Whether the data of a run are what its checkpoint was trained on, image by image (`dumo.io.content`).

A checkpoint has, in `data.safetensors`, the hashes of what was read until then, zeros for the rest; what the images are
called; and a hash of their classes.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dumo.data.latents import WAIT, Origin
from dumo.io import content, digest
from dumo.io.content import Hashes, hashes_of
from dumo.io.weights import load
from dumo.runtime import dist
from dumo.training import agreement
from dumo.training.checkpoint import DATA
from dumo.training.manifest import Checkpoint
from dumo.types import UserError

WAY_OUT = "give another folder with --out, or go on with the data as they are by --accept"


@dataclass(frozen=True)
class Change:
    """How data have changed: a short text of what they were, and of what they are."""

    was: str
    now: str


def prove(source: object, folder: Path, last: Checkpoint | None, *, accept: bool, verify: bool) -> Change | None:
    """Hash what changed since it was read, all if `verify`, and from now on expect what the checkpoint was trained on.

    Every rank must call it; they share the reading. Returns what is other with `accept`, which raises UserError
    without, on every rank, with the names.
    """
    if isinstance(origin := getattr(source, "origin", None), Origin):
        agreement.agreed(origin.verify if verify else lambda: origin.require(WAIT))
    if (hashes := hashes_of(source)) is None:
        return None
    rank, ranks = (int(os.environ.get(name, one)) for name, one in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    if verify:
        hashes.forget()
        agreement.agreed(lambda: hashes.hash(range(rank, len(hashes), ranks)))
    if last is None or not (last.path / DATA).is_file():
        return None
    then = agreement.own(lambda: load(last.path / DATA))
    names, labels, expected = content.unpacked(then["names"].numpy().tobytes()), then["labels"], then["hashes"].numpy()
    if names != hashes.names:
        wrong = f"images are {content.moved(names, hashes.names)}"
    elif labels.numpy().tobytes().hex() != hashes.labels():
        wrong = "the classes of the images are others"
    else:
        hashes.expect(expected, f"is not what it was when {folder} was trained on it: put it back as it was, {WAY_OUT}")
        agreement.agreed(lambda: hashes.hash(hashes.suspect()[rank::ranks]))
        others = np.unique(np.concatenate(agreement.agreed(hashes.others)))
        wrong = f"{content.few(others.tolist(), hashes.path)} changed" if len(others) else ""
    if wrong and not accept:
        raise refusal(folder, wrong)
    if not accept:
        return None
    hashes.expected = None
    pieces = (names, expected.tobytes()), (hashes.names, hashes.seen().tobytes())
    was, now = (digest.of_bytes(*piece)[:16] for piece in pieces)
    return Change(was, now) if wrong else None


def refusal(folder: Path, wrong: str) -> UserError:
    """That the data of a run have changed, with the way out."""
    what = f"{folder}: the data are not those that it was trained on ({wrong})"
    return UserError(f"{what}: put them back as they were, {WAY_OUT}")


def seen(hashes: Hashes | None) -> dict[str, Tensor]:
    """What a checkpoint says of the data: what any rank has read of them. Every rank must call it.

    Raises UserError, on all ranks, where two have read other contents of an image.
    """
    if hashes is None:
        return {}
    mine = torch.from_numpy(hashes.seen())
    whole = dist.largest(mine)
    if dist.world() > 1:
        agreement.agreed(lambda: require_same(hashes, mine, whole))
        hashes.expect(whole.numpy(), "is another on another rank: give all ranks the same files")
    hashes.rest()
    labels = torch.tensor(list(bytes.fromhex(hashes.labels())), dtype=torch.uint8)
    return {"hashes": whole, "names": hashes.packed, "labels": labels}


def require_same(hashes: Hashes, mine: Tensor, whole: Tensor) -> None:
    """Raise UserError where another rank has other contents."""
    if (wrong := ((mine != whole).any(1) & mine.any(1)).nonzero().flatten()).numel():
        raise UserError(f"{hashes.path(int(wrong[0]))} is another on another rank: give all ranks the same files")
