"""A few images in three classes, in every kind of store."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from dumo.data import Images
from dumo.types import UserError

COUNT, SIDE = 12, 8
CLASSES = ("ant", "bee", "cow")


def levels(i: int) -> tuple[int, int, int]:
    return (20 * i, 255 - 20 * i, 7)


def picture(i: int) -> bytes:
    """A plane of a colour of its own, with a white left upper corner."""
    image = Image.new("RGB", (SIDE, SIDE), levels(i))
    image.putpixel((0, 0), (255, 255, 255))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def label(i: int) -> int:
    return i // 4  # so that all stores have one order


def as_folder(root: Path) -> None:
    for i in range(COUNT):
        file = root / CLASSES[label(i)] / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(i))


def table(rows: range, **columns: object) -> pa.Table:
    image = [{"bytes": picture(i), "path": f"{i}.png"} for i in rows]
    made = pa.table({"image": image, "label": [label(i) for i in rows], **columns})
    names = {"info": {"features": {"label": {"_type": "ClassLabel", "names": list(CLASSES)}}}}
    return made.replace_schema_metadata({"huggingface": json.dumps(names)})


def as_parquet(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for k, rows in enumerate((range(7), range(7, COUNT))):
        pq.write_table(table(rows), root / f"train-{k:05}-of-00002.parquet", row_group_size=3)


def archive(file: Path, members: dict[str, bytes]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))


def as_tar(root: Path) -> None:
    for k, rows in enumerate((range(5), range(5, COUNT))):
        members = {}
        for i in rows:
            members |= {f"{i:06}.cls": str(label(i)).encode(), f"{i:06}.png": picture(i), f"{i:06}.json": b"{}"}
        archive(root / f"animals-train-{k:06}.tar", members)


STORES: dict[str, Callable[[Path], None]] = {"folder": as_folder, "parquet": as_parquet, "tar": as_tar}


def spec(root: Path, **fields: object) -> Images:
    return Images.model_validate({"root": str(root), "side": SIDE, **fields}).with_facts()


def refused(root: Path, **fields: object) -> str:
    """What the user is told, whether the data are opened or only looked at."""
    with pytest.raises((UserError, ValidationError)) as caught:
        spec(root, **fields).open()
    return str(caught.value)


def bytes_of(x: torch.Tensor) -> torch.Tensor:
    return ((x + 1) * 127.5).round().int()
