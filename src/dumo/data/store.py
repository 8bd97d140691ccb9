"""Where encoded images lie: files of a folder, rows of a table (`dumo.data.parquet`), members of an archive (`tar`).

A store is opened without decoding any image. `Store` is what all stores offer, `Folder` is that of files, and
`FirstImages` the first images of another store. Opening one (`dumo.data.image.open_store`) goes in this order:

1. `walk_files` lists the files under a root, with their states;
2. `choose_shards` takes the shards of a split; a folder does so itself;
3. the store checks its labels with `count_classes`.

`require_small` guards against what is no image, and `store_hashes` gives the hashes of a store.
"""

import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dumo.data.pixel import Unreadable
from dumo.io import digest
from dumo.io.content import Hashes
from dumo.io.inventory import FileState, ItemFiles, state_of
from dumo.io.read import first_few
from dumo.io.trained import holds_own_images
from dumo.types import UserError

# Names of the parts of a data set, as they stand in names of folders and files.
_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "dev", "test"))
_MAX_IMAGE_BYTES = 2**30  # ours. A sparse file, or one that never ends, would fill the memory
_MAX_NAMED = 8  # classes or splits that a message names: ours
_MAX_CLASSES = 10**6  # where they are counted by the largest number: ours. Nets, tables and counts have a row for each


@dataclass(frozen=True)
class Labels:
    """The class of each image, and how many classes there are.

    Where the classes have names their number is known; where there are numbers only, it is one more than the largest.
    """

    c: Tensor  # (n,), Long, in 0 ... count - 1
    count: int
    names: tuple[str, ...] = ()  # () where there are numbers only


class EncodedImages(Protocol):
    """Encoded images in a fixed order, to be read from many threads at once."""

    def __len__(self) -> int: ...

    def path(self, i: int) -> str:
        """What to call image i."""
        ...

    def read(self, i: int) -> bytes:
        """The bytes of image i. Raises OSError or ValueError where they are not available."""
        ...


@runtime_checkable
class Store(EncodedImages, Protocol):
    """Encoded images in files."""

    def fingerprint(self) -> str:
        """A short text, another one where images were added, removed, renamed or replaced by images of another size."""
        ...

    @property
    def item_files(self) -> ItemFiles:
        """The files that the images lie in, as they were when the store was opened."""
        ...

    @property
    def labels(self) -> Labels | None:
        """The classes; None where there are none, or they are not read."""
        ...


def store_hashes(store: Store) -> Hashes:
    """The hashes of a store's images, as far as they are noted."""
    return Hashes(store.item_files, store.path, store.read, store.labels and store.labels.c)


class Folder:
    """Files, given with their states, in the order of their names.

    Classes are the folders below the deepest folder that holds all files, numbered in the order of their names; a class
    has all files in its folder, at any depth. Raises UserError where a split must be chosen, or some files are in no
    class.
    """

    def __init__(self, root: Path, states: Mapping[str, FileState], *, split: str | None, labelled: bool) -> None:
        files = list(states)
        if split is not None:
            files = [file for file in files if split in Path(file).relative_to(root).parts[:-1]]
            _require_split(root, split, files)
        self.files = files
        self.item_files = ItemFiles.of(files, [states[file] for file in files])
        folder = self.item_files.folder
        parents = [file.rpartition(os.sep)[0] for file in files]
        class_folder_of = {parent: _class_folder(parent, folder) for parent in set(parents)}
        class_folders = [class_folder_of[parent] for parent in parents]
        names = set(class_folders)
        if split is None and len(names) > 1 and names <= _SPLITS:
            raise UserError(f"{folder} holds the splits {first_sorted(names)}: choose one with data.split")
        self.labels = _labels(folder, class_folders) if labelled else None

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        """A digest of the files' names below the folder that holds them all, and of their sizes as they were opened."""
        start = len(self.item_files.folder)  # of a name below the folder
        sizes = self.item_files.states[:, 0].tolist()
        return digest.short(*(f"{file[start:]} {size}" for file, size in zip(self.files, sizes, strict=True)))

    def path(self, i: int) -> str:
        """The file of image i."""
        return self.files[i]

    def read(self, i: int) -> bytes:
        """The bytes of image i. Raises OSError, and Unreadable for what is no image's file."""
        return _read_regular(self.files[i])


class FirstImages:
    """The first images of a store, with the classes that all of its images have."""

    def __init__(self, store: Store, count: int) -> None:
        """Take the first `count` images of a store, which has that number or more."""
        self.store = store
        self.count = count
        self.labels = None if store.labels is None else replace(store.labels, c=store.labels.c[:count])
        # the files that these images lie in; of the last one, its first items alone
        files = store.item_files
        num_files = int(files.file_of_item[count - 1]) + 1
        counts = files.counts[:num_files].copy()
        num_left_out = int(counts.sum()) - count
        counts[-1] -= num_left_out
        self.item_files = ItemFiles(files.paths[:num_files], files.states[:num_files], counts, num_left_out)

    def __len__(self) -> int:
        return self.count

    def fingerprint(self) -> str:
        """The fingerprint of all images, with the number of those that are taken."""
        return digest.short(self.store.fingerprint(), f"first {self.count}")

    def path(self, i: int) -> str:
        """What to call image i."""
        return self.store.path(i)

    def read(self, i: int) -> bytes:
        """The bytes of image i. Raises as the store does."""
        return self.store.read(i)


def walk_files(root: Path) -> dict[str, FileState]:
    """All files under a folder, or the one file `root`, with their states.

    They come in the order of their names. Hidden files are left out, and below `root` the folders that dumo puts images
    of its own into (`holds_own_images`). Links are followed; a link to nowhere has size -1. Raises UserError where
    there is nothing, or a link leads to a folder above it.
    """
    if root.is_dir():
        states: dict[str, FileState] = {}
        _walk_folder(str(root), frozenset(), states)
        return states
    if not root.exists():
        raise UserError(f"there is no folder or file {root}: set data.root to where the images are")
    return {str(root): state_of(root.stat())}


def _read_regular(file: str) -> bytes:
    """The bytes of a file. Raises OSError; and Unreadable for more bytes than an image has, for a pipe or a device.

    What a pipe holds never comes, or never ends.
    """
    with open(os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as stream:
        file_stat = os.fstat(stream.fileno())
        if not stat.S_ISREG(file_stat.st_mode):
            raise Unreadable("is no regular file")
        require_small(file_stat.st_size)
        return stream.read(file_stat.st_size)


def require_small(size: int) -> None:
    """Raise Unreadable for more bytes than an image has."""
    if size > _MAX_IMAGE_BYTES:
        raise Unreadable(f"has {size} bytes, more than an image has")


def choose_shards(root: Path, files: Sequence[str], split: str | None) -> list[str]:
    """The shards of one split, by their names and folders: `data/train-00000-of-00010.parquet` is of `train`.

    Without a split: all, if they are of one split. Raises UserError where the split is absent, or must be chosen; or
    for what is no regular file, for opening a pipe would wait for ever.
    """
    if split is not None:
        files = [file for file in files if split in _words(root, file)]
        _require_split(root, split, files)
    else:
        splits = {_split_of(root, file) for file in files}
        if len(splits) > 1:
            raise UserError(f"{root} holds {', '.join(sorted(splits))}: choose one with data.split")
    for file in files:
        if os.path.exists(file) and not os.path.isfile(file):
            raise UserError(f"{file} is no regular file, but a pipe, a device or a folder: remove it")
    return list(files)


def count_classes(c: Tensor, root: str, names: Sequence[str] = ()) -> Labels:
    """Count the classes of labels (n,). Raises UserError for a label that is no class, and for too many classes.

    `root` is where the labels are, for a message; `names` are those of the classes, where they are known.
    """
    low = int(c.min()) if len(c) else 0
    high = int(c.max()) if len(c) else -1
    no_class = "which is no class: set data.labelled=false, or choose a split"
    if low < 0:
        raise UserError(f"{root} has the label {low}, {no_class}")
    if names and high >= len(names):
        raise UserError(f"{root} has the label {high}, {no_class}")
    if high >= _MAX_CLASSES:
        raise UserError(
            f"{root} has the label {high}, so {high + 1:,} classes, and {_MAX_CLASSES:,} are the most: name the column "
            "of classes with data.label, number them from 0, or set data.labelled=false"
        )
    return Labels(c, len(names) or high + 1, tuple(names))


def first_sorted(items: Iterable[str]) -> str:
    """The first _MAX_NAMED items in their order, and how many more there are: `a, b, c and 2 more`."""
    return first_few(sorted(items), max_items=_MAX_NAMED)


def _walk_folder(folder: str, above: frozenset[tuple[int, int]], states: dict[str, FileState]) -> None:
    """Add the states of the files in a folder, depth first, as `walk_files` has them.

    `above` are the folders on the way, by device and inode; none of the root.
    """
    folder_stat = os.stat(folder)
    identity = (folder_stat.st_dev, folder_stat.st_ino)
    if identity in above:
        raise UserError(f"{folder} is a link to a folder that holds it, so it never ends: remove the link")
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    is_below_root = bool(above)
    if is_below_root and holds_own_images(folder, {entry.name for entry in visible}):
        return
    for entry in sorted(visible, key=attrgetter("name")):
        try:
            entry_stat = os.stat(entry.path)
        except OSError:  # a link to nowhere, or to itself: reading it says so
            states[entry.path] = (-1, 0, 0)
            continue
        if stat.S_ISDIR(entry_stat.st_mode):
            _walk_folder(entry.path, above | {identity}, states)
        else:
            states[entry.path] = state_of(entry_stat)


def _split_of(root: Path, file: str) -> str:
    """The first split that the names of a file's folders and of the file have; `(no split)` where they have none."""
    for word in _words(root, file):
        if word in _SPLITS:
            return word
    return "(no split)"


def _require_split(root: Path, split: str, files: Sequence[str]) -> None:
    """Raise UserError where a split has no files."""
    if not files:
        raise UserError(f"{root} has no split '{split}': no folder or file of it is called so; change data.split")


def _words(root: Path, file: str) -> list[str]:
    """The folders of a file below the root, then the words of its name: one of them may name the split."""
    relative = Path(file).relative_to(root) if Path(file) != root else Path(root.name)
    return [*relative.parts[:-1], *re.split(r"[-_.]", relative.stem)]


def _class_folder(parent: str, folder: str) -> str:
    """The name of the folder directly below `folder` on the way to `parent`; "" where both are one."""
    return parent.removeprefix(folder).lstrip(os.sep).partition(os.sep)[0]


def _labels(folder: str, class_folders: Sequence[str]) -> Labels | None:
    """The classes of files, by the names of their class folders below `folder`; None where all lie in it directly.

    Raises UserError where only some do.
    """
    names = sorted(set(class_folders))
    if names == [""]:
        return None
    if names[0] == "":
        raise UserError(
            f"{folder} holds images both in folders ({first_sorted(names[1:])}) and outside them, which are of no "
            "class: set data.labelled=false, or move them"
        )
    number = {name: i for i, name in enumerate(names)}
    return Labels(torch.tensor([number[name] for name in class_folders]), len(names), tuple(names))
