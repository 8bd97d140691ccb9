"""What data refuse: one case per row, with the name that the message must contain (docs/refusals.md)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dumo.data import Digits, Latents
from dumo.data.bucket import Buckets
from dumo.data.cache import open_cache
from dumo.data.caption import CaptionFiles, Templates
from dumo.data.encoding import encode
from dumo.encoders import Codec, SdVae, Taef2
from dumo.encoders.caption import Captions
from dumo.encoders.codec import Images, Moments
from dumo.types import UserError
from unit.data.test_encode import Broken
from unit.encoders.toy import GAUSSIAN, PLAN, POINT, Pictures, Sampled

COUNT = 40

# What is asked of a cache of seven classes at 8 pixels, which GAUSSIAN has made.
CACHES: list[tuple[Codec, dict[str, Any], str]] = [
    (GAUSSIAN.codec, {"classes": 10}, "classes"),
    (GAUSSIAN.codec, {"resolution": 256}, "resolution"),
    (Taef2(), {}, "codec.kind"),
    (SdVae(weights="there"), {}, "codec.weights"),
]

# What is encoded into a folder that holds another cache.
PLANS: list[tuple[dict[str, Any], str]] = [
    ({"resolution": 16}, "resolution"),
    ({"classes": 10}, "classes"),
    ({"dtype": "float16"}, "dtype"),
    ({"shard_rows": 8}, "shard_rows"),
]

# Images and labels that are not as planned.
ZEROS = torch.zeros(2, 3, 8, 8)
LABELS = torch.tensor([6, 0])
IMAGES: list[tuple[Tensor, Tensor, str]] = [
    (ZEROS[:, :, :4], LABELS, "(3, 4, 8)"),
    (ZEROS, LABELS + 1, "label 7"),
    (ZEROS, LABELS - 1, "label -1"),
    (ZEROS + 255, LABELS, "255"),
    (ZEROS[:0], LABELS[:0], "no images"),
    (ZEROS * torch.nan, LABELS, "numbers"),
]


@dataclass(frozen=True)
class Given:
    """The same batch, whatever rows are asked for."""

    x: Tensor
    c: Tensor

    def __len__(self) -> int:
        return len(self.c)

    def rows(self, i: slice, /) -> tuple[Tensor, Tensor]:
        """All."""
        return self.x, self.c


class Loud(Sampled):
    """Numbers that half precision does not hold."""

    def encode(self, images: Images) -> Moments:
        """A million times as large."""
        return super().encode(images) * 1e6


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "gaussian"
    encode(Pictures(COUNT), GAUSSIAN, PLAN, folder)
    return folder


@pytest.mark.parametrize(("codec", "asked", "name"), CACHES)
def test_caches(cache: Path, codec: Codec, asked: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError) as refused:
        open_cache(cache, codec, asked)
    assert name in str(refused.value)


@pytest.mark.parametrize(("change", "name"), PLANS)
def test_plans(cache: Path, change: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError) as refused:
        encode(Pictures(COUNT), GAUSSIAN, PLAN.model_copy(update=change), cache)
    assert name in str(refused.value)


@pytest.mark.parametrize(("x", "c", "name"), IMAGES)
def test_images(tmp_path: Path, x: Tensor, c: Tensor, name: str) -> None:
    with pytest.raises(UserError) as refused:
        encode(Given(x, c), POINT, PLAN, tmp_path)
    assert name in str(refused.value)


def captioned_digits(**fields: object) -> object:
    return Digits.model_validate({"captions": {"kind": "templates", **fields}}).open()


def other_captions(_: Path) -> object:
    return CaptionFiles(digest="0" * 16).require(Captions.from_images([["a"], ["b"]]), "photos")


def latents(images: dict[str, Any], **fields: Any) -> Latents:  # noqa: ANN401, fields of latents
    images = {"kind": "images", "root": "b", "side": 64, **images}
    return Latents.model_validate({"root": "a", "images": images, "codec": {"kind": "taef2"}, **fields})


def augmented_latents(_: Path) -> object:
    return latents({"augment": {}})


def a_prior_of_buckets(_: Path) -> object:
    return latents({"buckets": {}}, prior=0.5)


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another codec's weights": (
        lambda cache: encode(Pictures(COUNT), replace(GAUSSIAN, sha256="2" * 64), PLAN, cache),
        "weights",
    ),
    "another number of images": (lambda cache: encode(Pictures(17), GAUSSIAN, PLAN, cache), "17"),
    "latents too large for float16": (
        lambda _: encode(
            Pictures(3), replace(POINT, net=Loud()), PLAN.model_copy(update={"dtype": "float16"}), _ / "new"
        ),
        "float16",
    ),
    "images of which none can be read": (lambda cache: encode(Broken(40), POINT, PLAN, cache / "new"), "40"),
    "a template without a name": (lambda _: captioned_digits(templates=("a digit",)), "a digit"),
    "a template with other braces": (lambda _: captioned_digits(templates=("{x}",)), "{x}"),
    "names for fewer classes": (lambda _: captioned_digits(templates=("{}",), names=("a", "b")), "captions.names"),
    "one caption of two classes": (lambda _: captioned_digits(templates=("{}",), names=("a",) * 10), "'a'"),
    "held-out captions of which there are none": (
        lambda _: Templates(templates=("{}",)).captions_in_turn(torch.arange(3), 10, held_out=True),
        "captions.held",
    ),
    "captions that changed": (other_captions, "captions.digest"),
    "few held-out digits": (lambda _: Digits(held=64), "held"),
    "an area that is no multiple of the step": (lambda _: Buckets(step=8, smaller=(12,)).groups(32), "buckets.step"),
    "an area larger than the side": (lambda _: Buckets(step=8, smaller=(48,)).groups(32), "side"),
    "augmented images as latents": (augmented_latents, "data.images.augment"),
    "a prior of images in buckets": (a_prior_of_buckets, "data.prior"),
}


@pytest.mark.parametrize("case", CASES)
def test_others(case: str, cache: Path) -> None:
    act, name = CASES[case]
    with pytest.raises((UserError, ValidationError)) as refused:
        act(cache)
    assert name in str(refused.value)
