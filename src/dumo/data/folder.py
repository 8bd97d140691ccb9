"""Image files in a folder: a folder per class, or all of one kind."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dumo.data.store import SPLITS, Labels, in_split, named, read_regular, some
from dumo.types import UserError


class Folder:
    """Files, given with their sizes, in the order of their names.

    The class is the folder below the deepest one that holds them all, numbered in the order of its name, however deep
    the files lie in it. Raises UserError where a split must be chosen, or some files are in no class.
    """

    def __init__(self, root: Path, sizes: Mapping[str, int], *, split: str | None, labelled: bool) -> None:
        files = list(sizes)
        if split is not None:
            files = in_split(root, split, [f for f in files if split in Path(f).relative_to(root).parts[:-1]])
        above = os.path.commonpath([os.path.dirname(file) for file in files])
        tops = [_top(file, above) for file in files]
        if split is None and len(found := set(tops)) > 1 and found <= SPLITS:
            raise UserError(f"{above} holds the splits {some(found)}: choose one with data.split")
        self.files, self.sizes = files, sizes
        self.labels = _labels(above, tops) if labelled else None

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        """Of names and sizes, as they were when the folder was opened."""
        return named({file: self.sizes[file] for file in self.files})

    def path(self, i: int) -> str:
        """The file."""
        return self.files[i]

    def read(self, i: int) -> bytes:
        """The file's bytes. Raises as `read_regular`."""
        return read_regular(self.files[i])


def _top(file: str, above: str) -> str:
    """The first folder between the two, '' where there is none."""
    first, sign, _ = file.removeprefix(above).lstrip(os.sep).partition(os.sep)
    return first if sign else ""


def _labels(above: str, tops: Sequence[str]) -> Labels | None:
    names = sorted(set(tops))
    if names == [""]:
        return None
    if names[0] == "":
        raise UserError(
            f"{above} holds images both in folders ({some(names[1:])}) and beside them, which are of no class: "
            "set data.labelled=false, or move them"
        )
    number = {name: i for i, name in enumerate(names)}
    return Labels(torch.tensor([number[top] for top in tops]), len(names), tuple(names))
