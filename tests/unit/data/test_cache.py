"""What a cache gives back is what the codec gave, and it refuses what it does not fit."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from dumo.codecs import Codec, Identity, Taef2
from dumo.codecs.scaled import Opened
from dumo.data.cache import FILE, Plan, open_cache
from dumo.data.encode import encode
from dumo.io.weights import load
from dumo.random import stream
from dumo.types import UserError
from unit.codecs.toy import CLASSES, GAUSSIAN, OPENED, PLAN, SIDE, Pictures, contents, picture

COUNT = 50
ROWS = torch.tensor([49, 0, 16, 15, 3, 16])  # of three shards, in no order, one twice


def made(folder: Path, codec: Opened | None = None, **change: object) -> Path:
    """A cache of `COUNT` pictures."""
    codec = codec or Identity().open()
    assert encode(Pictures(COUNT), codec, PLAN.model_copy(update=change), folder).missing == 0
    return folder


def pictures(rows: Tensor) -> Tensor:
    """The images of these rows, in [-1, 1]."""
    return torch.stack([picture(int(k)) for k in rows]) / 127.5 - 1


def test_rows_come_as_they_were_encoded(tmp_path: Path) -> None:
    cache = open_cache(made(tmp_path))
    assert len(cache) == COUNT
    x, labels = cache.rows(ROWS)
    assert torch.equal(x, pictures(ROWS))
    assert torch.equal(labels, ROWS % CLASSES)
    assert torch.equal(cache.labels, torch.arange(COUNT) % CLASSES)
    with pytest.raises(IndexError):
        cache.rows(torch.tensor([COUNT]))
    with pytest.raises(IndexError):
        cache.rows(torch.tensor([-1]))


def test_flipped_rows_are_the_encoded_mirror_images(tmp_path: Path) -> None:
    flipped = torch.tensor([True, False, True, False, True, False])
    x, _ = open_cache(made(tmp_path / "both")).rows(ROWS, flipped)
    assert torch.equal(x[flipped], pictures(ROWS).flip(3)[flipped])
    assert torch.equal(x[~flipped], pictures(ROWS)[~flipped])

    cache = open_cache(made(tmp_path / "one", flips=False))
    cache.rows(ROWS, flipped & False)
    with pytest.raises(UserError, match="no mirrored images"):
        cache.rows(ROWS, flipped)


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_stored_dtype_rounds_and_no_more(tmp_path: Path, dtype: str, error: float) -> None:
    cache = open_cache(made(tmp_path, dtype=dtype))
    x, _ = cache.rows(ROWS)
    assert x.dtype == torch.float32
    assert load(tmp_path / "shard-00000.safetensors")["x"].dtype == getattr(torch, dtype)
    assert 0 < ((x - pictures(ROWS)) / pictures(ROWS)).abs().max() <= error


def test_moments_are_normalised_and_can_be_drawn_from(tmp_path: Path) -> None:
    cache = open_cache(made(tmp_path, OPENED))
    moments, _ = cache.rows(ROWS)
    shift, scale = (torch.tensor(v)[:, None, None] for v in (GAUSSIAN.shift, GAUSSIAN.scale))
    raw = pictures(ROWS)
    mean, deviation = (raw - shift) * scale, (raw.abs() / 4 + 1 / 8) * scale
    torch.testing.assert_close(moments, torch.cat([mean, deviation], 1))
    draws = torch.stack([GAUSSIAN.sample(moments, "draw", i, rows=range(len(ROWS))) for i in range(2000)])
    assert ((draws.mean(0) - mean) / deviation).abs().max() < 5 / 2000**0.5
    assert (draws.std(0) / deviation - 1).abs().max() < 5 / 4000**0.5


def test_samples_are_one_draw_of_the_moments(tmp_path: Path) -> None:
    moments, _ = open_cache(made(tmp_path / "moments", OPENED)).rows(torch.arange(COUNT))
    cache = open_cache(made(tmp_path / "samples", OPENED, store="samples"))
    x, _ = cache.rows(torch.arange(COUNT))
    mean, deviation = moments.chunk(2, 1)
    z = (x - mean) / deviation
    assert x.shape[1] == GAUSSIAN.channels
    assert len(z[:, 0, 0, 0].round(decimals=4).unique()) > COUNT - 3  # no two shards share their draws
    assert abs(float(z.mean())) < 5 / z.numel() ** 0.5
    assert abs(float(z.std()) - 1) < 5 / (2 * z.numel()) ** 0.5
    assert torch.equal(GAUSSIAN.sample(x, "draw", rows=range(COUNT)), x)
    for rank in (1, 0):
        encode(
            Pictures(COUNT),
            OPENED,
            PLAN.model_copy(update={"store": "samples"}),
            tmp_path / "turns",
            rank=rank,
            world=2,
        )
    assert contents(tmp_path / "turns") == contents(tmp_path / "samples")  # draws do not depend on who makes them
    other, _ = open_cache(made(tmp_path / "seed", OPENED, store="samples", seed=1)).rows(torch.arange(COUNT))
    assert not torch.equal(x, other)


@pytest.mark.parametrize("flips", [True, False])
@pytest.mark.parametrize("store", ["moments", "samples"])
def test_mean_and_deviation_are_those_of_a_draw(tmp_path: Path, store: str, flips: bool) -> None:
    """Of moments: the variance of a draw is that of the means plus the mean of the variances."""
    cache = open_cache(made(tmp_path, OPENED, store=store, flips=flips))
    ways = (False, True) if flips else (False,)
    x = torch.cat([cache.rows(torch.arange(COUNT), torch.full((COUNT,), way))[0] for way in ways]).double()
    mean, *deviation = x.split(3, 1)
    variance = mean.var((0, 2, 3), correction=0) + sum(d.square().mean((0, 2, 3)) for d in deviation)
    assert cache.contents.mean == pytest.approx(mean.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert cache.contents.std == pytest.approx(variance.sqrt().tolist(), rel=1e-12)


def test_another_normalisation_is_made_on_reading(tmp_path: Path) -> None:
    """With the cache's own mean and deviation, one per channel, what comes has mean 0 and deviation 1."""
    first = open_cache(made(tmp_path, OPENED))
    codec = GAUSSIAN.normalised(first.contents.mean, first.contents.std)
    cache = open_cache(tmp_path, codec=codec)
    for rows in (ROWS, torch.arange(COUNT)):
        expected = codec.normalise(GAUSSIAN.restore(first.rows(rows)[0]))
        torch.testing.assert_close(cache.rows(rows)[0], expected)
    both = [cache.rows(torch.arange(COUNT), torch.full((COUNT,), way))[0] for way in (False, True)]
    mean, deviation = torch.cat(both).double().chunk(2, 1)
    assert mean.mean((0, 2, 3)).abs().max() < 1e-6
    variance = mean.var((0, 2, 3), correction=0) + deviation.square().mean((0, 2, 3))
    assert (variance - 1).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"classes": 10}, "classes: 7 in the cache, 10 asked"),
        ({"resolution": 256}, "resolution: 4 in the cache, 256 asked"),
        ({"codec": Taef2()}, "codec.kind: sd-vae in the cache, taef2 asked"),
        ({"codec": GAUSSIAN.model_copy(update={"factor": 8})}, "codec.factor: 1 in the cache, 8 asked"),
        ({"codec": GAUSSIAN.model_copy(update={"weights": "there"})}, "codec.weights: here in the cache, there asked"),
        ({"codec": GAUSSIAN.model_copy(update={"sha256": "1" * 64})}, "codec.sha256: 0{64} in the cache, 1{64} asked"),
    ],
)
def test_what_does_not_fit_is_refused_with_both(tmp_path: Path, asked: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_cache(made(tmp_path, OPENED), **asked)  # type: ignore[arg-type]


def test_same_weights_elsewhere_fit_by_their_hash(tmp_path: Path) -> None:
    codec = GAUSSIAN.model_copy(update={"weights": "there", "sha256": "0" * 64})
    open_cache(made(tmp_path, OPENED), codec=codec, resolution=SIDE, classes=CLASSES)


def test_no_cache_and_an_unfinished_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no cache"):
        open_cache(tmp_path)
    encode(Pictures(COUNT), Identity().open(), PLAN, tmp_path, rank=1, world=2)
    with pytest.raises(UserError, match="unfinished"):
        open_cache(tmp_path)


@pytest.mark.parametrize("text", ["[", "a: 1", "3", ""])
def test_damaged_yaml_is_refused(tmp_path: Path, text: str) -> None:
    (made(tmp_path) / FILE).write_text(text)
    with pytest.raises(UserError, match="damaged"):
        open_cache(tmp_path)


def test_yaml_says_all(tmp_path: Path) -> None:
    """For people and other programs: what was encoded, by what, how, and the checksums."""
    plan = Plan(resolution=SIDE, classes=CLASSES, names=tuple("abcdefg"), source="pictures", crop="none", seed=3)
    encode(Pictures(5), OPENED, plan, tmp_path)
    told = yaml.safe_load((tmp_path / FILE).read_text())
    assert {k: told[k] for k in ("source", "crop", "resolution", "classes", "images", "flips", "weights")} == {
        "source": "pictures", "crop": "none", "resolution": SIDE, "classes": CLASSES, "images": 5, "flips": True,
        "weights": "0" * 64,
    }  # fmt: skip
    assert told["codec"]["scale"] == list(GAUSSIAN.scale)  # type: ignore[arg-type]
    assert told["shape"] == [6, SIDE, SIDE]
    assert told["shards"][0]["rows"] == 5


def test_reading_leaves_the_files_alone(tmp_path: Path) -> None:
    """Shards are mapped privately: what is done to the rows is not done to the file."""
    cache = open_cache(made(tmp_path))
    cache.rows(ROWS)[0].zero_()
    assert torch.equal(cache.rows(ROWS)[0], pictures(ROWS))


def codecs() -> list[Codec]:
    """One with a shift, one without."""
    return [Identity(), GAUSSIAN]


@pytest.mark.parametrize("codec", codecs(), ids=lambda codec: codec.kind)
def test_restore_is_the_inverse_of_normalise(codec: Codec) -> None:
    raw = torch.randn(2, 6 if codec.gaussian else 3, 4, 4, generator=stream("raw"), dtype=torch.float64)
    torch.testing.assert_close(codec.restore(codec.normalise(raw)), raw, rtol=0, atol=1e-14)
