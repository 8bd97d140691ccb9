"""Where encoded images lie: files of a folder, rows of a table (`dumo.data.parquet`), members of an archive (`tar`).

A store is opened without decoding any image. `Store` is what all of them offer, `Folder` the one of files; `walk` lists
files with their states, and `counted` checks labels for all stores.
"""

import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dumo.data.pixel import Unreadable
from dumo.io import digest
from dumo.io.seen import Files, State, state_of
from dumo.types import UserError

# Names of the parts of a data set, as they stand in names of folders and files.
SPLITS = frozenset(("train", "training", "val", "valid", "validation", "dev", "test"))
MAX_IMAGE_BYTES = 2**30  # ours. A sparse file, or one that never ends, would fill the memory
MAX_CLASSES = 10**6  # where they are counted by the largest number: ours. Nets, tables and counts have a row for each


@dataclass(frozen=True)
class Labels:
    """The class of each image, and how many classes there are.

    Where the classes have names their number is known; where there are numbers only, it is one more than the largest.
    """

    c: Tensor  # (n,), Long, in 0 ... count - 1
    count: int
    names: tuple[str, ...] = ()  # () where there are numbers only


@runtime_checkable
class Store(Protocol):
    """Encoded images in a fixed order, to be read from many threads at once."""

    def fingerprint(self) -> str:
        """A short text, another one where images were added, removed, renamed or replaced by some of another size."""
        ...

    @property
    def within(self) -> Files:
        """The files that the images lie in, as they were when it was opened."""
        ...

    @property
    def labels(self) -> Labels | None:
        """None where there are none, or they are not read."""
        ...

    def __len__(self) -> int: ...

    def path(self, i: int) -> str:
        """What to call image i."""
        ...

    def read(self, i: int) -> bytes:
        """The bytes of image i. Raises OSError or ValueError where they are not available."""
        ...


class Folder:
    """Files, given with their states, in the order of their names.

    The class is the folder below the deepest one that holds them all, numbered in the order of its name, however deep
    the files lie in it. Raises UserError where a split must be chosen, or some files are in no class.
    """

    def __init__(self, root: Path, states: Mapping[str, State], *, split: str | None, labelled: bool) -> None:
        files = list(states)
        if split is not None:
            files = in_split(root, split, [f for f in files if split in Path(f).relative_to(root).parts[:-1]])
        self.files = files
        self.within = Files.of(files, [states[file] for file in files])
        above = self.within.above
        folders = [file.rpartition(os.sep)[0] for file in files]
        top_of_folder = {folder: _top(folder, above) for folder in set(folders)}
        tops = [top_of_folder[folder] for folder in folders]
        top_names = set(tops)
        if split is None and len(top_names) > 1 and top_names <= SPLITS:
            raise UserError(f"{above} holds the splits {some(top_names)}: choose one with data.split")
        self.labels = _labels(above, tops) if labelled else None

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        """Of the files' names below the folder that holds them all, and of their sizes when that was opened."""
        above = len(self.within.above)
        sizes = self.within.states[:, 0].tolist()
        return digest.short(*(f"{file[above:]} {size}" for file, size in zip(self.files, sizes, strict=True)))

    def path(self, i: int) -> str:
        """The file."""
        return self.files[i]

    def read(self, i: int) -> bytes:
        """The file's bytes. Raises as `read_regular`."""
        return read_regular(self.files[i])


def walk(root: Path) -> dict[str, State]:
    """All files under `root`, or itself, with their states; by name, hidden ones left out, links followed.

    A link to nowhere has size -1. Raises UserError where there is nothing, or a link leads to a folder above it.
    """
    if root.is_dir():
        states: dict[str, State] = {}
        _walk_folder(str(root), frozenset(), states)
        return states
    if not root.exists():
        raise UserError(f"there is no folder or file {root}: set data.root to where the images are")
    return {str(root): state_of(root.stat())}


def read_regular(file: str) -> bytes:
    """The bytes of a file. Raises OSError, and Unreadable for a pipe or a device, and for what no image is as large as.

    What a pipe holds never comes, or never ends.
    """
    with open(os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as opened:
        about = os.fstat(opened.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise Unreadable("is no regular file")
        require_small(about.st_size)
        return opened.read(about.st_size)


def require_small(size: int) -> None:
    """Raise Unreadable for more bytes than an image has."""
    if size > MAX_IMAGE_BYTES:
        raise Unreadable(f"has {size} bytes, more than an image has")


def choose(root: Path, files: Sequence[str], split: str | None) -> list[str]:
    """The shards of one split, by their names and folders: `data/train-00000-of-00010.parquet` is of `train`.

    Without a split: all, if they are of one. Raises UserError where the split is absent, or must be chosen; or for what
    is no regular file, for opening a pipe would wait for ever.
    """
    if split is not None:
        files = in_split(root, split, [file for file in files if split in _tokens(root, file)])
    else:
        splits = {_split_of(root, file) for file in files}
        if len(splits) > 1:
            raise UserError(f"{root} holds {', '.join(sorted(splits))}: choose one with data.split")
    for file in files:
        if os.path.exists(file) and not os.path.isfile(file):
            raise UserError(f"{file} is no regular file, but a pipe, a device or a folder: remove it")
    return list(files)


def in_split(root: Path, split: str, files: list[str]) -> list[str]:
    """The files of a split, as they are. Raises UserError if there are none."""
    if not files:
        raise UserError(f"{root} has no split '{split}': no folder or file of it is called so; change data.split")
    return files


def counted(c: Tensor, root: str, names: Sequence[str] = ()) -> Labels:
    """Labels as they stand in the data, with the classes' names if known. Raises UserError for one that is none."""
    low = int(c.min()) if len(c) else 0
    high = int(c.max()) if len(c) else -1
    no_class = "which is no class: set data.labelled=false, or choose a split"
    if low < 0:
        raise UserError(f"{root} has the label {low}, {no_class}")
    if names and high >= len(names):
        raise UserError(f"{root} has the label {high}, {no_class}")
    if high >= MAX_CLASSES:
        raise UserError(
            f"{root} has the label {high}, so {high + 1:,} classes, and {MAX_CLASSES:,} are the most: name the column "
            "of classes with data.label, number them from 0, or set data.labelled=false"
        )
    return Labels(c, len(names) or high + 1, tuple(names))


def some(items: Iterable[str]) -> str:
    """The first few of many, in words."""
    listed = sorted(items)
    words = ", ".join(listed[:8])
    if len(listed) > 8:
        words += f" and {len(listed) - 8} more"
    return words


def _walk_folder(folder: str, above: frozenset[tuple[int, int]], states: dict[str, State]) -> None:
    """Add the states of the files in a folder, depth first; `above` are the folders on the way, by device and inode."""
    about_folder = os.stat(folder)
    identity = (about_folder.st_dev, about_folder.st_ino)
    if identity in above:
        raise UserError(f"{folder} is a link to a folder that holds it, so it never ends: remove the link")
    with os.scandir(folder) as entries:
        listed = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in listed:
        try:
            about = os.stat(entry.path)
        except OSError:  # a link to nowhere, or to itself: reading it says so
            states[entry.path] = (-1, 0, 0)
            continue
        if stat.S_ISDIR(about.st_mode):
            _walk_folder(entry.path, above | {identity}, states)
        else:
            states[entry.path] = state_of(about)


def _split_of(root: Path, file: str) -> str:
    """The first split that the file's folders or name say."""
    for name in _tokens(root, file):
        if name in SPLITS:
            return name
    return "(no split)"


def _tokens(root: Path, file: str) -> list[str]:
    """Folders below the root, then the words of the file's name: what a split may be called by."""
    relative = Path(file).relative_to(root) if Path(file) != root else Path(root.name)
    return [*relative.parts[:-1], *re.split(r"[-_.]", relative.stem)]


def _top(folder: str, above: str) -> str:
    """The first folder below `above` on the way to a folder, '' where they are the same."""
    return folder.removeprefix(above).lstrip(os.sep).partition(os.sep)[0]


def _labels(above: str, tops: Sequence[str]) -> Labels | None:
    names = sorted(set(tops))
    if names == [""]:
        return None
    if names[0] == "":
        raise UserError(
            f"{above} holds images both in folders ({some(names[1:])}) and outside them, which are of no class: "
            "set data.labelled=false, or move them"
        )
    number = {name: i for i, name in enumerate(names)}
    return Labels(torch.tensor([number[top] for top in tops]), len(names), tuple(names))
