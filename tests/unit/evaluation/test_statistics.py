"""Statistics do not depend on batches, order or ranks, and are kept."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dumo.evaluation.reference import STANDARDS, data_facts
from dumo.evaluation.statistics import Statistics, gather, load_statistics, save_statistics, statistics_of
from dumo.io import tensor_files
from dumo.types import UserError
from forked import main_of
from meeting import outputs
from unit.evaluation import meet
from unit.evaluation.extractor import Album, extractor, images

TOTAL = meet.TOTAL
PATIENCE = 300  # seconds, on a busy machine


def counted(batch: int = TOTAL, order: torch.Tensor | None = None) -> Statistics:
    x, order = images(TOTAL), torch.arange(TOTAL) if order is None else order
    return gather(statistics_of(extractor, ((rows, x[rows]) for rows in order.split(batch)), TOTAL), TOTAL)


def same(a: Statistics, b: Statistics) -> None:
    """Features to the bit, sums up to rounding."""
    assert torch.equal(a.features, b.features)
    assert torch.equal(a.image_numbers, b.image_numbers)
    assert a.inception_score.value()[0] == pytest.approx(b.inception_score.value()[0], rel=1e-12)
    for x, y in ((a.pool, b.pool), (a.spatial, b.spatial)):
        assert x.count == y.count == TOTAL
        torch.testing.assert_close(x.mean, y.mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(x.scatter, y.scatter, rtol=1e-12, atol=1e-12)


def test_holds_what_the_network_saw() -> None:
    seen, whole = extractor(images(TOTAL)), counted()
    assert torch.equal(whole.features, seen.pool)
    torch.testing.assert_close(whole.pool.covariance, seen.pool.double().T.cov())
    torch.testing.assert_close(whole.spatial.mean, seen.spatial.double().mean(0))
    assert whole.inception_score.value()[0] > 1.01


@pytest.mark.parametrize("batch", [1, 7, 60])
def test_any_batches_in_any_order_are_the_same(batch: int) -> None:
    same(counted(batch, torch.arange(TOTAL).flip(0)), counted())


def test_two_ranks_are_one(tmp_path: Path) -> None:
    """Ranks of unequal shares, in orders of their own; the data's batches go to them in turn."""
    whole = tmp_path / "whole"
    words = (tmp_path / "meeting", whole)
    outputs([main_of("unit.evaluation.meet", rank, *words, cwd=tmp_path) for rank in (0, 1)], PATIENCE)
    same(load_statistics(whole, {"of": "samples"}), counted())
    same(
        load_statistics(whole.with_suffix(".data"), data_facts(Album(images(TOTAL)), "folder", STANDARDS["folder"])),
        counted(),
    )


def test_missing_and_repeated_images_are_refused_and_none_at_all() -> None:
    every = torch.arange(TOTAL)
    for order, came in ((every[:-1], 60), (every.clamp(max=59), 61)):
        with pytest.raises(UserError, match=f"{came} images"):
            counted(7, order)
    with pytest.raises(UserError):
        statistics_of(extractor, [], 5)


def test_is_kept_and_read_for_what_it_is_only(tmp_path: Path) -> None:
    path, told = tmp_path / "data.safetensors", {"data": "cifar10", "inception": "6726825d"}
    save_statistics(path, counted(), told)
    same(load_statistics(path, told), counted())
    assert load_statistics(path, told | {"data": "mine"}) is None
    parts, notes = tensor_files.read(path)
    save_file(parts | {"pool.mean": 2 * parts["pool.mean"]}, path, notes)
    assert load_statistics(path, told) is None
    path.write_bytes(path.read_bytes()[:-1])
    assert load_statistics(path, told) is None
    save_file({"rows": torch.zeros(1)}, path, told)
    assert load_statistics(path, told) is None
