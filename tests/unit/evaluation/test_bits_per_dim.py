"""Bits are those of grey levels, noise is each row's own, and what has no likelihood is refused."""

from math import log, log2

import pytest
import torch

from dumo.data import Digits
from dumo.evaluation import Context, LikelihoodProtocol
from dumo.evaluation.bits_per_dim import LikelihoodEvaluator, dequantise
from dumo.io.data_source import TensorData

LEVELS = torch.arange(17).repeat(4).view(4, 1, 1, 17) / 8 - 1


def judge(x: torch.Tensor = LEVELS, **fields: int | None) -> LikelihoodEvaluator:
    return LikelihoodProtocol(samples=4, **fields).evaluator(Context(lambda: TensorData(x, torch.arange(len(x)))))


def cells(x: torch.Tensor, of: torch.Tensor) -> bool:
    """Whether x lies in the cells of these levels, but for rounding."""
    return ((x + 1) / 2 * 17 - (of + 1) * 8 - 0.5).abs().max().item() < 0.5 + 1e-5


def test_a_density_that_knows_nothing_takes_the_bits_of_a_level() -> None:
    """Uniform in [-1, 1] is 1/2 a number: log2 of 17 levels, and 1 bit of points, for these have none."""
    for x, bits in ((LEVELS, log2(17)), (LEVELS.view(4, 17), 1)):
        evaluator = judge(x, levels=17 if x.ndim > 2 else None)
        found = evaluator.score([(torch.tensor([2, 0, 1, 3]), torch.full((4,), -17 * log(2)))])
        assert found == {"bits": pytest.approx(bits), "bits_sd": pytest.approx(0)}
        assert not evaluator.baselines()
    assert judge(torch.ones(4, 1, 2, 2)).score([(torch.arange(4), torch.zeros(4))])["bits"] == 7  # 256 levels


def test_noise_keeps_levels_and_is_each_row_s_own() -> None:
    x = dequantise(LEVELS, 17, 0)
    assert cells(x, LEVELS)
    assert torch.equal(dequantise(LEVELS[:2], 17, 0), x[:2])
    assert not torch.equal(dequantise(LEVELS, 17, 1), x)
    within = ((dequantise(LEVELS.repeat(100, 1, 1, 1), 17, 0) + 1) / 2 * 17).frac()
    assert within.mean() == pytest.approx(0.5, abs=0.01)
    assert within.var() == pytest.approx(1 / 12, abs=0.003)


def test_directions_are_signs_of_the_row() -> None:
    evaluator = judge(levels=17, probes=4)
    e = torch.stack(evaluator.directions(range(4)))
    assert (e.abs() == 0.5).all()  # their squares add up to 1
    assert len({tuple(row.flatten().tolist()) for row in e.view(16, 17)}) == 16
    assert torch.equal(torch.stack(evaluator.directions([3, 1])), e[:, [3, 1]])
    assert judge(levels=17, probes=0).directions([0]) == []


def test_it_is_of_what_was_held_out() -> None:
    data = Digits(held=360).originals()
    evaluator = LikelihoodProtocol(samples=360, levels=17).evaluator(Context(lambda: data))
    assert cells(evaluator.x, data.held_out.x)
    assert torch.equal(evaluator.c, data.held_out.c)
    assert evaluator.facts["reference"] == "360 samples of the data, never trained on"


def test_some_of_sorted_data_are_of_all_classes() -> None:
    x, c = LEVELS.repeat(25, 1, 1, 1), torch.arange(10).repeat_interleave(10)
    protocol = LikelihoodProtocol(samples=50, levels=17)
    first, again = (protocol.evaluator(Context(lambda: TensorData(x, c))) for _ in range(2))
    assert first.c.unique().tolist() == list(range(10))
    assert torch.equal(first.c, first.c.sort().values)  # in the order of the data
    assert torch.equal(first.c, again.c)
