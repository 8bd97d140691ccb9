"""Whether a cache was made of the images that are here: by their names, and by the hashes of their files.

`require_origin` compares now. `expect_origin` does, too, and leaves the other images to be compared when they are read.
Both compare the names first, then hashes: those that are known, those of files that changed since they were hashed, and
those of copies if these are small. `has_cache` says whether a folder has a certain cache at all, and `read_names` reads
the names of the images that a cache was made of.

`cache_name` names a cache after its images, NAME-KEY: other images have another key.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dumo.data.album import HASH_COLUMN
from dumo.data.cache import CacheIndex, read_index
from dumo.data.image import Images
from dumo.io import digest, table
from dumo.io.content import Hashes, name_changes, unpack_names
from dumo.io.inventory import HashRows
from dumo.io.table import ELSEWHERE, Shard
from dumo.io.weights import load
from dumo.types import UserError

NAMES = "names.zlib"  # a file in a cache: the names of its images, compressed


def cache_name(name: str, images: Images, weights: str) -> str:
    """NAME-KEY, for a folder with the latents of these images by a codec whose weights have the hash `weights`.

    The key is a hash of the images, of how they are encoded, and of the weights. `images` are with their classes, and
    on this machine. Reads images whose hash is not noted.
    """
    hashes = images.hashes()
    assert hashes is not None, "the images are here"
    hashes.hash(range(len(hashes)))
    fields = (images.side, images.crop, images.flip, images.labels, images.names, images.split, images.count)
    key = digest.short(hashes.fingerprint(), hashes.digest(range(len(hashes))), str(fields), weights)
    return f"{name}-{key}"


def read_names(folder: Path) -> bytes:
    """The names of a cache's images, as `Hashes.names` has them; b"" where the cache does not say."""
    file = folder / NAMES
    return unpack_names(file.read_bytes()) if file.is_file() else b""


def has_cache(folder: Path, index: CacheIndex) -> bool:
    """Whether a folder has the cache of this index, whatever the images that it was made of."""
    cached = read_index(folder)
    if cached is None:
        return False
    with_these_images = cached.model_copy(update={"fingerprint": index.fingerprint, "rows": index.rows})
    return with_these_images.compared_inputs() == index.compared_inputs()


def require_origin(folder: Path, hashes: Hashes, *, max_bytes: int) -> None:
    """Raise UserError, with a name, where a cache was made of other images than those that are here.

    Images whose files changed since they were hashed are hashed now, and copies of files, too, if these have at most
    `max_bytes` together. A folder without a cache passes.
    """
    _compare(folder, hashes, max_bytes, reads_later=False)


def expect_origin(folder: Path, hashes: Hashes, *, max_bytes: int) -> None:
    """Compare as many images as `require_origin` does, and let `hashes` compare all others when they are read.

    Raises UserError, now or then, with the name of the image that has changed.
    """
    _compare(folder, hashes, max_bytes, reads_later=True)


def _compare(folder: Path, hashes: Hashes, max_bytes: int, *, reads_later: bool) -> None:
    """Compare a cache with the images that are here; `reads_later`: the rest is compared when it is read."""
    cached = read_index(folder)
    if cached is None:
        return
    fix = f"put the images back as they were, begin a new run on these with another --out, or {ELSEWHERE}"
    if HASH_COLUMN not in cached.columns:
        raise UserError(f"{folder} does not say what is in its images, as caches of an older dumo: {ELSEWHERE}")
    shards = table.written_shards(folder, cached)

    # names and classes
    if cached.fingerprint != hashes.fingerprint():
        if shards:
            names = read_names(folder)
            change = "of other names or classes"
            if names not in (b"", hashes.names):
                change = name_changes(names, hashes.names)
            raise UserError(f"{folder} is of other images than are here, {change}: {fix}")
        return

    # hashes
    expected_hashes = _cached_hashes(folder, cached, shards, hashes, reads_later=reads_later)
    hashes.expect(expected_hashes, f"is not the image that {folder} was made of: {fix}")
    hashes.hash(hashes.suspects())
    suspect_copies = hashes.suspects(copies=True)
    if len(suspect_copies) and hashes.file_bytes(suspect_copies) <= max_bytes:
        hashes.hash(suspect_copies)
    changed = hashes.mismatches()
    if len(changed):
        first = int(changed[0])
        more = ""
        if len(changed) > 1:
            more = f", and {len(changed) - 1:,} more are others"
        raise UserError(
            f"{folder}: {shards[first // cached.shard_rows].file} was made of another {hashes.path(first)} than is "
            f"here{more}: {fix}"
        )


def _cached_hashes(
    folder: Path, cached: CacheIndex, shards: Mapping[int, Shard], hashes: Hashes, *, reads_later: bool
) -> HashRows:
    """The hashes (n, 32), by the cache, of the images of shards whose images may have changed; zeros for all others.

    `reads_later`: also of shards with images whose hash is not known yet.
    """
    cached_hashes = np.zeros_like(hashes.sha256)
    for number, shard in shards.items():
        span = cached.span(number)
        is_doubtful = hashes.is_doubtful(span)
        differs = shard.source_hash != hashes.digest(span) and (is_doubtful or reads_later)
        if differs and shard.fault(folder, deep=is_doubtful) is None:  # what is damaged is refused elsewhere
            columns = load(folder / shard.file)
            cached_hashes[columns["image"].numpy()] = columns[HASH_COLUMN].numpy()
    return cached_hashes
