"""Whether the data of a run are what its checkpoint was trained on, image by image (`dumo.io.content`).

A checkpoint's `data.safetensors` has the hashes of the images that were read until then (zeros for the others), their
names, and a hash of their classes. `tensors_to_save` returns these for a new checkpoint; `verify_data` compares the
data with those of the last one, when a run is opened.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dumo.io import digest
from dumo.io.read import first_few
from dumo.io.source import hashes_of
from dumo.io.weights import load
from dumo.runtime import dist
from dumo.runtime.door import option
from dumo.training import agreement
from dumo.training.checkpoint import DATA
from dumo.training.manifest import Checkpoint
from dumo.types import UserError
from dumo.types.family import is_instance_of

if TYPE_CHECKING:
    from dumo.io.content import Hashes


@dataclass(frozen=True)
class Change:
    """How data have changed, for the note in run.yaml."""

    was: str  # a hash, or the fingerprint, of the data before
    now: str  # and of the data now


def verify_data(source: object, folder: Path, last: Checkpoint | None, *, accept: bool, verify: bool) -> Change | None:
    """Compare the data in `source` with those that the checkpoint `last` was trained on.

    Hashes the images whose files have changed since they were read; with `verify`, all. From then on every image that
    is read is expected to be as it was. Every rank must call it; they share the reading. Returns the change if there is
    one, and it is accepted (`accept`); raises UserError on every rank, with the names, if it is not.
    """
    # of a cache of latents: compare with the images that it was made of
    origin = getattr(source, "origin", None)
    if origin is not None and is_instance_of(origin, "dumo.data.latents:Origin"):
        from dumo.data.latents import ORIGIN_SECONDS

        def compare_with_images() -> None:
            if verify:
                origin.verify()
            else:
                origin.require(ORIGIN_SECONDS)

        agreement.gather_results(compare_with_images)

    # hash images here
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
    from dumo.io import content

    trained_on = agreement.on_each_rank(lambda: load(last.path / DATA))
    names = content.unpack_names(trained_on["names"].numpy().tobytes())
    expected = trained_on["hashes"].numpy()
    problem = ""
    if names != hashes.names:
        problem = f"images are {content.name_changes(names, hashes.names)}"
    elif trained_on["labels"].numpy().tobytes().hex() != hashes.labels_digest():
        problem = "the classes of the images are others"
    else:
        problem_of_image = f"is not what it was when {folder} was trained on it: put it back as it was, {_way_out()}"
        hashes.expect(expected, problem_of_image)
        agreement.gather_results(lambda: hashes.hash(hashes.suspect()[rank::ranks]))
        changed = np.unique(np.concatenate(agreement.gather_results(hashes.mismatches)))
        if len(changed):
            problem = f"{first_few(changed.tolist(), hashes.path)} changed"
    if problem and not accept:
        raise changed_data_error(folder, problem)
    if not accept:
        return None
    hashes.expected = None
    if not problem:
        return None
    was = digest.of_bytes(names, expected.tobytes())[:16]
    now = digest.of_bytes(hashes.names, hashes.expected_or_known().tobytes())[:16]
    return Change(was, now)


def changed_data_error(folder: Path, problem: str) -> UserError:
    """The error that the data of a run have changed, with the way out."""
    return UserError(
        f"{folder}: the data are not those that it was trained on ({problem}): put them back as they were, {_way_out()}"
    )


def _way_out() -> str:
    """What else there is to do about changed data, in words."""
    return f"give another folder with {option('out')}, or go on with the data as they are by {option('accept', True)}"


def tensors_to_save(hashes: "Hashes | None") -> dict[str, Tensor]:
    """The tensors that a checkpoint keeps of the data: hashes of what any rank has read, names, and classes.

    Empty where the data are no files (`hashes` None). Every rank must call it. Raises UserError, on all ranks, where
    two ranks have read other contents of one image.
    """
    if hashes is None:
        return {}
    read_here = torch.from_numpy(hashes.expected_or_known())
    read_anywhere = dist.all_reduce_max(read_here)
    if dist.world() > 1:
        agreement.gather_results(lambda: _require_same_contents(hashes, read_here, read_anywhere))
        hashes.expect(read_anywhere.numpy(), "is another on another rank: give all ranks the same files")
    hashes.save_if_due()
    labels = torch.tensor(list(bytes.fromhex(hashes.labels_digest())), dtype=torch.uint8)
    return {"hashes": read_anywhere, "names": hashes.packed_names, "labels": labels}


def _require_same_contents(hashes: "Hashes", read_here: Tensor, read_anywhere: Tensor) -> None:
    """Raise UserError where another rank has read other contents of an image that this one has read."""
    differs = (read_here != read_anywhere).any(1) & read_here.any(1)
    rows = differs.nonzero().flatten()
    if rows.numel():
        raise UserError(f"{hashes.path(int(rows[0]))} is another on another rank: give all ranks the same files")
