"""A folder of photos of mixed sizes in buckets: encoded, examined, trained on one and two ranks, stopped, sampled."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import dumo
from autoencoder import taef2
from dumo.data import Latents
from dumo.data.pixel import upright_size
from dumo.run import fill_caches
from dumo.runtime.random import stream
from e2e.shell import call, refused, together
from e2e.test_ranks import same

SIZES = [(40, 24), (24, 40), (32, 32), (50, 31), (31, 45), (16, 15)]  # width and height; the last is small
COUNT, LAST = 20, "checkpoints/step-00000008"
RECIPE = (
    "my-images-buckets",
    "data.root=cache",
    "data.images.root=photos",
    "data.codec.weights=taef2.safetensors",
)
SMALL = [
    *("data.images.side=32", "data.images.buckets.step=8", "data.images.buckets.smaller=[16]", "net.patch=1"),
    *("net.width=16", "net.depth=1", "net.attention=2", "train.batch=8", "train.steps=8", "train.schedule.warmup=2"),
    *("train.compile=none", "train.precision=fp32", "train.save_every=4", "train.log_every=1"),
]
SAID = "images are in 4 of 4 buckets (40 x 24: 7, 32 x 32: 3, 24 x 40: 7, 16 x 16: 3); cut off are "


@pytest.fixture
def photos(here: Path) -> Path:
    """Noise in several shapes, a codec, and the latents of them, made by two ranks one after the other."""
    (here / "photos").mkdir()
    for i in range(COUNT):
        width, height = SIZES[i % len(SIZES)]
        pixels = torch.randint(256, (height, width, 3), generator=stream("photo", i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(here / f"photos/{i:02}.png")
    taef2(here / "taef2.safetensors")
    # The first shard of several, after which the command keeps their size.
    words = [*RECIPE, *SMALL]
    data = fill_caches.encoding_work(words[0], words[1:], out=None, codec=None, side=None).data
    assert isinstance(data, Latents)
    fill_caches.encode(data, shard_rows=6, rank=1, world=2)
    done = call("encode", *words)
    assert done.code == 0, done.err
    assert f"{SAID}3.6% of an image on average, 14.3% at most\n" in done.out
    return here


@pytest.mark.nightly
def test_a_run_on_buckets_is_the_same_stopped_and_on_two_ranks(photos: Path) -> None:
    whole = call("train", *RECIPE, *SMALL, "--out", "whole", "train.micro_batch=4")
    assert whole.code == 0, whole.err
    assert SAID in whole.err
    shutil.copytree("whole", "stopped")
    assert call("train", "stopped", "--from", "4").code == 0
    together(2, "train", *RECIPE, *SMALL, "--out", "ranks", cwd=photos)
    same(Path("stopped") / LAST, Path("whole") / LAST)
    same(Path("ranks") / LAST, Path("whole") / LAST)


@pytest.mark.nightly
def test_sizes_are_stated_and_asked_for(photos: Path) -> None:
    assert "buckets: 4 of 4 buckets" in call("show", "--check", *RECIPE, *SMALL).out
    assert call("train", *RECIPE, *SMALL, "--out", "run", "train.steps=1").code == 0
    done = call("sample", "run", "--nfe", "1", "--count", "2", "--size", "24x40", "--format", "images")
    assert done.code == 0, done.err
    (folder,) = map(Path, done.out.split())
    assert "size24x40" in folder.name
    assert {upright_size(file.read_bytes()) for file in folder.glob("*.png")} == {(40, 24)}
    assert dumo.load("run").sample(count=1, size="40x24").shape == (1, 3, 24, 40)
    assert dumo.load("run").sample(count=1).shape == (1, 3, 32, 32)
    refused("sample", "run", "--size", "40x40", named=("size 40x40", "40x24, 32x32, 24x40, 16x16"))
    assert call("evaluate", "run", "evaluate.protocol.samples=20").code == 0  # squares against squares
    done = call("report", "run")
    assert done.code == 0, done.err
    assert call("export", "run", "--out", "out").code == 0
    card = Path("out/README.md").read_text("utf-8")
    assert "and how many: 40 x 24 (7), 24 x 40 (7), 32 x 32 (3), 16 x 16 (3) |" in card


@pytest.mark.slow
def test_what_knows_one_size_refuses_buckets(photos: Path) -> None:
    for field, *named in (
        ("data.images.buckets.step=12", "data.images: buckets of 32 x 32 pixels", "multiple of buckets.step = 12"),
        ("data.images.crop=none", "crop=none needs images of one size"),
    ):
        refused("train", *RECIPE, *SMALL, field, "--out", "run", named=(*named,))
    net = ("net={kind: unet, width: 8, multipliers: [1], depth: 1}", "data.images.buckets=null")
    refused("train", *RECIPE, "net=null", net[0], "--out", "run", named=("net 'unet'", net[1]))
