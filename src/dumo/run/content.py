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


def verify_data(source: object, folder: Path, last: Checkpoint | None, *, accept: bool, verify: bool) -> Change | None:
    """Hash what changed since it was read, and from now on expect what the checkpoint was trained on.

    With `verify` all is hashed. Every rank must call it; they share the reading. Returns what is other with `accept`,
    which raises UserError without, on every rank, with the names.
    """
    origin = getattr(source, "origin", None)
    if isinstance(origin, Origin):
        agreement.gather_results(origin.verify if verify else lambda: origin.require(WAIT))
    hashes = hashes_of(source)
    if hashes is None:
        return None
    rank = int(os.environ.get("LOCAL_RANK", "0"))  # each machine reads its own files
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if verify:
        hashes.forget()
        agreement.gather_results(lambda: hashes.hash(range(rank, len(hashes), ranks)))
    if last is None or not (last.path / DATA).is_file():
        return None

    # compare with what the checkpoint was trained on
    trained_on = agreement.on_each_rank(lambda: load(last.path / DATA))
    names = content.unpacked(trained_on["names"].numpy().tobytes())
    expected = trained_on["hashes"].numpy()
    problem = ""
    if names != hashes.names:
        problem = f"images are {content.moved(names, hashes.names)}"
    elif trained_on["labels"].numpy().tobytes().hex() != hashes.labels():
        problem = "the classes of the images are others"
    else:
        hashes.expect(expected, f"is not what it was when {folder} was trained on it: put it back as it was, {WAY_OUT}")
        agreement.gather_results(lambda: hashes.hash(hashes.suspect()[rank::ranks]))
        changed = np.unique(np.concatenate(agreement.gather_results(hashes.others)))
        if len(changed):
            problem = f"{content.few(changed.tolist(), hashes.path)} changed"
    if problem and not accept:
        raise refusal(folder, problem)
    if not accept:
        return None
    hashes.expected = None
    if not problem:
        return None
    was = digest.of_bytes(names, expected.tobytes())[:16]
    now = digest.of_bytes(hashes.names, hashes.seen().tobytes())[:16]
    return Change(was, now)


def refusal(folder: Path, problem: str) -> UserError:
    """That the data of a run have changed, with the way out."""
    return UserError(
        f"{folder}: the data are not those that it was trained on ({problem}): put them back as they were, {WAY_OUT}"
    )


def seen(hashes: Hashes | None) -> dict[str, Tensor]:
    """What a checkpoint says of the data: what any rank has read of them. Every rank must call it.

    Raises UserError, on all ranks, where two have read other contents of an image.
    """
    if hashes is None:
        return {}
    read_here = torch.from_numpy(hashes.seen())
    read_anywhere = dist.largest(read_here)
    if dist.world() > 1:
        agreement.gather_results(lambda: _require_same(hashes, read_here, read_anywhere))
        hashes.expect(read_anywhere.numpy(), "is another on another rank: give all ranks the same files")
    hashes.rest()
    labels = torch.tensor(list(bytes.fromhex(hashes.labels())), dtype=torch.uint8)
    return {"hashes": read_anywhere, "names": hashes.packed, "labels": labels}


def _require_same(hashes: Hashes, read_here: Tensor, read_anywhere: Tensor) -> None:
    """Raise UserError where another rank has other contents."""
    differs = (read_here != read_anywhere).any(1) & read_here.any(1)
    rows = differs.nonzero().flatten()
    if rows.numel():
        raise UserError(f"{hashes.path(int(rows[0]))} is another on another rank: give all ranks the same files")
