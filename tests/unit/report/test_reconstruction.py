"""What a codec makes of the first images of the data that can be read."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from autoencoder import taef2
from dumo.data import Latents
from dumo.report.reconstruction import reconstruct
from dumo.run.sampler import Sampler
from unit.data.animals import SIDE, picture


def sampler_with(root: Path, num_broken: int, num_whole: int) -> Sampler:
    """A sampler of a run on latents of images, the first of which cannot be read."""
    (root / "images").mkdir()
    for i in range(num_broken + num_whole):
        data = b"no image" if i < num_broken else picture(i)
        (root / "images" / f"{i:02}.png").write_bytes(data)
    images = {"root": str(root / "images"), "side": SIDE, "crop": "none", "on_bad": "skip"}
    codec = {"kind": "taef2", "weights": str(taef2(root / "taef2.safetensors"))}
    data = Latents.model_validate({"root": "none", "images": images, "codec": codec}).with_facts()
    flow = SimpleNamespace(device=torch.device("cpu"))
    return Sampler(cast(Any, flow), data, cast(Any, None))


@pytest.mark.filterwarnings("ignore:.* images cannot be read:UserWarning")
@pytest.mark.parametrize(("num_broken", "num_whole", "count"), [(5, 9, 6), (6, 2, 2)])
def test_images_that_cannot_be_read_are_passed_over(
    num_broken: int, num_whole: int, count: int, tmp_path: Path
) -> None:
    reconstruction = reconstruct(sampler_with(tmp_path, num_broken, num_whole))
    assert reconstruction
    assert reconstruction.count == count


@pytest.mark.filterwarnings("ignore:.* images cannot be read:UserWarning")
def test_without_images_there_is_nothing_to_show(tmp_path: Path) -> None:
    assert reconstruct(sampler_with(tmp_path, 7, 0)) is None
