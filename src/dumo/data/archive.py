"""Images in memory as a webdataset archive, so that other processes have them, too, as images in a file.

`write_archive` writes it, and `dumo.data.tar` reads it. `PngImages` are the images in between, encoded one by one.
"""

import io
import tarfile
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from dumo.io import file as files
from dumo.io.picture import png, singles
from dumo.runtime import signals
from dumo.runtime.progress import Bar, delayed_bar


class PngImages:
    """Images in memory as PNG of 8 bits, each encoded when it is read."""

    def __init__(self, x: Float[Tensor, "n c h w"]) -> None:
        """Take images in [-1, 1], grey or of colours."""
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def path(self, i: int) -> str:
        """What to call image i."""
        return f"image {i}"

    def read(self, i: int) -> bytes:
        """The bytes of image i."""
        (picture,) = singles(self.x[i : i + 1])
        return png(picture)


def write_archive(file: Path, images: PngImages, labels: Tensor | None, bar: Bar) -> None:
    """Write images with their classes (n,), if they have some, whole or not at all.

    Raises OSError; Stopped after a signal.
    """
    with (
        files.atomic_write(file) as temp_path,
        tarfile.open(temp_path, "w") as archive,
        delayed_bar("keeping the images", len(images), inner=bar) as tick,
    ):
        for i in range(len(images)):
            signals.check()
            _add(archive, f"{i:08d}.png", images.read(i))
            if labels is not None:
                _add(archive, f"{i:08d}.cls", str(int(labels[i])).encode())
            tick(i + 1, "")


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member to an archive."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
