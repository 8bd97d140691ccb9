"""What a cache gives back is what the codec gave, and it refuses what it does not fit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dumo.data.cache import CachePlan, open_cache
from dumo.data.encoding import encode
from dumo.encoders import SdVae, Taef2
from dumo.encoders.codec import LoadedCodec
from dumo.io import digest
from dumo.io.table import FILE, ShardTable
from dumo.io.tensor_files import load
from dumo.types import UserError
from unit.encoders.toy import CLASSES, GAUSSIAN, PLAN, POINT, SIDE, Pictures, contents, picture

COUNT = 50
ROWS = torch.tensor([49, 0, 16, 15, 3, 16])  # of three shards, in no order, one twice


def made(folder: Path, codec: LoadedCodec = POINT, **change: object) -> ShardTable:
    """A cache of `COUNT` pictures, opened."""
    assert encode(Pictures(COUNT), codec, PLAN.model_copy(update=change), folder).missing == 0
    return open_cache(folder, codec.codec)


def encoded(rows: Tensor, codec: LoadedCodec = POINT) -> Tensor:
    """The images of these rows through a codec."""
    return codec.encode(pictures(rows))


def pictures(rows: Tensor) -> Tensor:
    """The images of these rows, in [-1, 1]."""
    return torch.stack([picture(int(k)) for k in rows]) / 127.5 - 1


def test_rows_come_as_they_were_encoded(tmp_path: Path) -> None:
    """Again, too: what is done to rows that are mapped is not done to their file."""
    cache = made(tmp_path)
    assert len(cache) == COUNT
    cache.take(ROWS, "x").zero_()
    assert torch.equal(cache.take(ROWS, "x"), encoded(ROWS))
    assert torch.equal(cache.take(ROWS, "labels"), ROWS % CLASSES)
    for wrong in (COUNT, -1):
        with pytest.raises(IndexError):
            cache.take(torch.tensor([wrong]), "x")


def test_flipped_rows_are_the_encoded_mirror_images(tmp_path: Path) -> None:
    flipped = torch.tensor([True, False, True, False, True, False])
    x = made(tmp_path).take(ROWS, "x", "flipped", flipped)
    assert torch.equal(x[flipped], POINT.encode(pictures(ROWS).flip(3))[flipped])
    assert torch.equal(x[~flipped], encoded(ROWS)[~flipped])


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_stored_dtype_rounds_and_no_more(tmp_path: Path, dtype: str, error: float) -> None:
    x = made(tmp_path, dtype=dtype).take(ROWS, "x")
    assert x.dtype == load(tmp_path / "shard-00000.safetensors")["x"].dtype == getattr(torch, dtype)
    assert 0 < ((x - encoded(ROWS)) / encoded(ROWS)).abs().max() <= error


@pytest.mark.slow
def test_moments_are_normalised_and_can_be_drawn_from(tmp_path: Path) -> None:
    moments = made(tmp_path, GAUSSIAN).take(ROWS, "x")
    mean, deviation = GAUSSIAN.net.encode(pictures(ROWS)).mul(0.18215).chunk(2, 1)
    torch.testing.assert_close(moments, torch.cat([mean, deviation], 1))
    draws = torch.stack([GAUSSIAN.codec.sample(moments, "draw", i, rows=range(len(ROWS))) for i in range(2000)])
    assert ((draws.mean(0) - mean) / deviation).abs().max() < 5 / 2000**0.5
    assert (draws.std(0) / deviation - 1).abs().max() < 5 / 4000**0.5


def test_samples_are_one_draw_of_the_moments(tmp_path: Path) -> None:
    every = torch.arange(COUNT)
    mean, deviation = made(tmp_path / "moments", GAUSSIAN).take(every, "x").chunk(2, 1)
    x = made(tmp_path / "samples", GAUSSIAN, store="samples").take(every, "x")
    z = (x - mean) / deviation
    assert x.shape[1] == GAUSSIAN.codec.channels
    assert len(z[:, 0, 0, 0].round(decimals=4).unique()) > COUNT - 3  # no two shards share their draws
    assert abs(float(z.mean())) < 5 / z.numel() ** 0.5
    assert abs(float(z.std()) - 1) < 5 / (2 * z.numel()) ** 0.5
    assert torch.equal(GAUSSIAN.codec.sample(x, "draw", rows=range(COUNT)), x)
    for rank in (1, 0):
        plan = PLAN.model_copy(update={"store": "samples"})
        encode(Pictures(COUNT), GAUSSIAN, plan, tmp_path / "turns", rank=rank, world=2)
    assert contents(tmp_path / "turns") == contents(tmp_path / "samples")  # draws do not depend on who makes them
    assert not torch.equal(x, made(tmp_path / "seed", GAUSSIAN, store="samples", seed=1).take(every, "x"))


def test_no_cache_an_unfinished_one_and_a_damaged_index_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a cache"):
        open_cache(tmp_path, POINT.codec)
    encode(Pictures(COUNT), POINT, PLAN, tmp_path, rank=1, world=2)
    with pytest.raises(UserError, match="unfinished"):
        open_cache(tmp_path, POINT.codec)
    for text in ("[", '{"a": 1}', "3", ""):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(UserError, match=r"damaged|is not JSON"):
            open_cache(tmp_path, POINT.codec)


def test_the_index_says_all(tmp_path: Path) -> None:
    """For people and other programs: what was encoded, by what, how, and the checksums."""
    plan = CachePlan(resolution=SIDE, classes=CLASSES, names=tuple("abcdefg"), source="pictures", crop="none", seed=3)
    encode(Pictures(5), GAUSSIAN, plan, tmp_path)
    found = json.loads((tmp_path / FILE).read_text())
    told = {
        "source": "pictures", "crop": "none", "resolution": SIDE, "classes": CLASSES, "rows": 5, "flips": True,
        "weights": "0" * 64, "codec": {"kind": "sd-vae", "variant": "sd", "weights": "here"},
    }  # fmt: skip
    assert {name: found[name] for name in told} == told
    assert found["columns"]["x"] == {"dtype": "float16", "shape": [8, 1, 1]}
    assert found["shards"][0]["rows"] == 5


def test_the_same_weights_elsewhere_fit_and_have_the_same_inputs(tmp_path: Path) -> None:
    one = made(tmp_path / "1").index.inputs
    elsewhere = replace(POINT, codec=Taef2(weights="elsewhere"))
    assert one == made(tmp_path / "2", elsewhere).index.inputs
    assert one != made(tmp_path / "3", replace(POINT, sha256="2" * 64)).index.inputs
    assert one != made(tmp_path / "4", fingerprint="of other files").index.inputs
    (tmp_path / "w").write_bytes(b"weights")
    made(tmp_path / "cache", replace(GAUSSIAN, sha256=digest.of_bytes(b"weights")))
    open_cache(tmp_path / "cache", SdVae(weights=str(tmp_path / "w")), {"resolution": SIDE, "classes": CLASSES})
