"""Webdataset shards: tar archives in which `0001.jpg` and `0001.cls` are one sample, an image and its class number."""

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch

from dumo.data.pixel import SUFFIXES
from dumo.data.store import Labels, counted
from dumo.types import UserError


class Member(NamedTuple):
    """Where an image lies."""

    file: str
    name: str
    key: str  # its name without the suffix, which it shares with its label
    start: int
    size: int


class Tar:
    """The images of some archives, in their order there. Members are found once, and then read at random.

    Raises UserError for a file that is no whole archive, and where only some images have a label.
    """

    def __init__(self, files: Sequence[str], *, labelled: bool) -> None:
        self.members: list[Member] = []
        classes: dict[tuple[str, str], int] = {}
        for file in files:
            for member, content in _entries(file):
                if content is None:
                    self.members.append(member)
                elif labelled:
                    classes[file, member.key] = _number(member, content)
        self.labels = self._labels(classes) if classes else None

    def __len__(self) -> int:
        return len(self.members)

    def path(self, i: int) -> str:
        """The archive and the member."""
        return f"{self.members[i].file} member {self.members[i].name}"

    def read(self, i: int) -> bytes:
        """The member's bytes. Raises OSError."""
        member = self.members[i]
        with open(member.file, "rb") as archive:
            archive.seek(member.start)
            return archive.read(member.size)

    def _labels(self, classes: dict[tuple[str, str], int]) -> Labels:
        for i, member in enumerate(self.members):
            if (member.file, member.key) not in classes:
                raise UserError(f"{self.path(i)} has no label '{member.key}.cls', others have: set data.labelled=false")
        return counted(torch.tensor([classes[m.file, m.key] for m in self.members]), self.members[0].file)


def _entries(file: str) -> Iterator[tuple[Member, bytes | None]]:
    """Images with None, labels with what they say."""
    try:
        with tarfile.open(file, "r:") as archive:
            for info in archive:
                path = PurePosixPath(info.name)
                stem, _, suffix = path.name.partition(".")
                if not info.isfile() or not stem:
                    continue
                member = Member(file, info.name, str(path.with_name(stem)), info.offset_data, info.size)
                if f".{suffix.lower()}" in SUFFIXES:
                    yield member, None
                elif suffix == "cls" and (content := archive.extractfile(info)):
                    yield member, content.read()
            end = archive.offset
    except tarfile.TarError as error:
        raise UserError(f"{file} is no whole tar archive: {error}; fetch it again, or remove it") from error
    with Path(file).open("rb") as archive:
        archive.seek(end)
        if archive.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:  # where tarfile stops without a word
            raise UserError(f"{file} is broken off or damaged at byte {end}: fetch it again, or remove it")


def _number(member: Member, content: bytes) -> int:
    try:
        return int(content)
    except ValueError as error:
        raise UserError(f"{member.file} member {member.name} holds no class number: {content[:20]!r}") from error
