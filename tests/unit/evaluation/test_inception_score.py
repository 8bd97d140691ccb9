"""The Inception Score: its extremes, its definition, and its independence of batches."""

import pytest
import torch
from torch import Tensor

from dumo.evaluation.distance import Score
from dumo.runtime.random import stream

K = 7


def logits(n: int) -> Tensor:
    return 3 * torch.randn(n, K, generator=stream("score", n))


def direct(x: Tensor) -> float:
    """Salimans et al. 2016, as written."""
    p = x.double().softmax(1)
    return (p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item()


def test_is_the_definition_per_split() -> None:
    x = logits(50)
    mean, sd = Score.of(x, torch.arange(50), size=20, splits=3).value()
    parts = torch.tensor([direct(part) for part in x.split(20)], dtype=torch.float64)
    assert mean == pytest.approx(parts.mean().item(), rel=1e-12)
    assert sd == pytest.approx(parts.std(correction=0).item(), rel=1e-10)


def test_extremes() -> None:
    """Sure and balanced: the number of classes. Always the same answer: 1, sure or not."""
    sure = 1e4 * torch.eye(K).repeat(3, 1)  # softmax underflows to exact zeros
    index = torch.arange(len(sure))
    assert Score.of(sure, index, size=100, splits=1).value() == (pytest.approx(K, rel=1e-12), 0)
    for alike in (sure[:1], logits(1)):
        assert Score.of(alike.repeat(5, 1), torch.arange(5), size=5, splits=1).value()[0] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("sizes", [(60,), (1, 59), (13, 0, 27, 20), (1,) * 60])
def test_any_order_and_any_batches_merge_to_the_whole(sizes: tuple[int, ...]) -> None:
    x, order = logits(60), torch.randperm(60, generator=stream("order"))
    whole = Score.of(x, torch.arange(60), size=25, splits=3)
    parts = [Score.of(x[rows], rows, size=25, splits=3) for rows in order.split(list(sizes))]
    merged = sum(parts[1:], start=parts[0])
    assert torch.equal(merged.count, torch.tensor([25.0, 25, 10], dtype=torch.float64))
    torch.testing.assert_close(merged.mass, whole.mass, rtol=1e-12, atol=1e-14)
    assert merged.value() == pytest.approx(whole.value(), rel=1e-12)


def test_empty_splits_do_not_count() -> None:
    x = logits(10)
    some = Score.of(x, torch.arange(10), size=10, splits=1).value()
    assert Score.of(x, torch.arange(10), size=10, splits=4).value() == some
