"""Whether the data of a run are what its checkpoint was trained on, image by image (`dumo.io.content`).

A checkpoint's `data.safetensors` has the hashes of the images that were read until then (zeros for the others), their
names, and a digest of their classes. `tensors_to_save` returns these for a new checkpoint. `verify_data` compares the
data with those of the last checkpoint, when a run is opened. `changed_data_error` is the error of both this comparison
and that of fingerprints (`dumo.run.history`).
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dumo.data.latents import ORIGIN_SECONDS
from dumo.io import digest
from dumo.io.content import Hashes
from dumo.io.read import first_few
from dumo.io.source import hashes_of, origin_of
from dumo.io.weights import load
from dumo.runtime import dist
from dumo.training import agreement
from dumo.training.checkpoint import DATA
from dumo.training.manifest import Checkpoint
from dumo.types import UserError

_PROBLEM_OF_RANKS = "is another on another rank: give all ranks the same files"


@dataclass(frozen=True)
class Change:
    """How data have changed, for the note in run.yaml."""

    # both a digest of names and hashes (`verify_data`), or both a fingerprint (`dumo.run.history`)
    was: str  # of the data before
    now: str  # of the data now


def verify_data(source: object, folder: Path, last: Checkpoint | None, *, accept: bool, verify: bool) -> Change | None:
    """Compare the data in `source` with those that the checkpoint `last` was trained on.

    In this order it

    1. compares a cache of latents with the images that it was made of;
    2. with `verify`, hashes all images anew, also where there is no checkpoint (`last` None);
    3. compares names and classes with those of the checkpoint, then the hashes of images whose files have changed since
       they were read. Later on, every image that is read is expected to be as it was, unless `accept` ends that.

    Every rank must call it; the ranks of a machine share the reading. Returns the change if there is one and `accept`
    is set. Raises UserError on every rank, with the names, if there is one and `accept` is not.
    """
    _compare_cache_with_images(source, verify=verify)

    # hash images here
    hashes = hashes_of(source)
    if hashes is None:
        return None
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))  # each machine reads its own files
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if verify:
        hashes.forget()
        agreement.gather_results(lambda: hashes.hash(range(local_rank, len(hashes), local_world_size)), is_long=True)
    if last is None or not (last.path / DATA).is_file():
        return None

    # compare with what the checkpoint was trained on
    from dumo.io import content

    tensors = agreement.on_each_rank(lambda: load(last.path / DATA))
    trained_names = content.unpack_names(tensors["names"].numpy().tobytes())
    trained_hashes = tensors["hashes"].numpy().copy()  # else the checkpoint's file stays mapped
    trained_labels_digest = tensors["labels"].numpy().tobytes().hex()
    problem = ""
    if trained_names != hashes.names:
        problem = f"images are {content.name_changes(trained_names, hashes.names)}"
    elif trained_labels_digest != hashes.labels_digest():
        problem = "the classes of the images are others"
    else:
        problem_of_image = f"is not what it was when {folder} was trained on it: put it back as it was, {_way_out()}"
        hashes.expect(trained_hashes, problem_of_image)
        suspects = hashes.suspects()
        agreement.gather_results(lambda: hashes.hash(suspects[local_rank::local_world_size]), is_long=True)
        mismatches_by_rank = agreement.gather_results(hashes.mismatches)
        changed = np.unique(np.concatenate(mismatches_by_rank))
        if len(changed):
            problem = f"{first_few(changed.tolist(), hashes.path)} changed"

    if not accept:
        if problem:
            raise changed_data_error(folder, problem)
        return None
    hashes.expected = None  # the data are taken as they are, so images that are read later may be others, too
    if not problem:
        return None
    was = digest.of_bytes(trained_names, trained_hashes.tobytes())[:16]
    now = digest.of_bytes(hashes.names, hashes.expected_or_known_hashes().tobytes())[:16]
    return Change(was, now)


def _compare_cache_with_images(source: object, *, verify: bool) -> None:
    """Raise UserError where a cache of latents was made of other images than there are now; pass any other source.

    With `verify` all images are hashed, else those whose files have changed. Every rank must call it.
    """
    origin = origin_of(source)
    if origin is None:
        return

    def compare() -> None:
        if verify:
            origin.verify()
        else:
            origin.require(ORIGIN_SECONDS)

    agreement.gather_results(compare, is_long=True)  # one rank of a machine hashes all images


def changed_data_error(folder: Path, problem: str) -> UserError:
    """The error that the data of a run have changed, with the way out."""
    return UserError(
        f"{folder}: the data are not those that it was trained on ({problem}): put them back as they were, {_way_out()}"
    )


def _way_out() -> str:
    """What else there is to do about changed data, in words."""
    return "give another folder with --out, or resume with the data as they are by --accept"


def tensors_to_save(hashes: Hashes | None) -> dict[str, Tensor]:
    """The tensors that a checkpoint keeps of the data: hashes of what any rank has read, names, classes' digest.

    Empty where the data are no files (`hashes` None). Every rank must call it. Raises UserError, on all ranks, where
    two ranks have read other contents of one image.
    """
    if hashes is None:
        return {}
    read_here = torch.from_numpy(hashes.expected_or_known_hashes())
    read_anywhere = dist.all_reduce_max(read_here)  # rows that this rank has not read are zeros
    if dist.world() > 1:
        agreement.gather_results(lambda: _require_same_contents(hashes, read_here, read_anywhere))
        hashes.expect(read_anywhere.numpy(), _PROBLEM_OF_RANKS)
    hashes.save_if_due()
    labels_digest = torch.tensor(list(bytes.fromhex(hashes.labels_digest())), dtype=torch.uint8)
    return {"hashes": read_anywhere, "names": hashes.packed_names, "labels": labels_digest}


def _require_same_contents(hashes: Hashes, read_here: Tensor, read_anywhere: Tensor) -> None:
    """Raise UserError where another rank has read other contents of an image that this one has read."""
    differs = (read_here != read_anywhere).any(1) & read_here.any(1)
    rows = differs.nonzero().flatten()
    if rows.numel():
        raise UserError(f"{hashes.path(int(rows[0]))} {_PROBLEM_OF_RANKS}")
