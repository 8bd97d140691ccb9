"""Dropout's masks: a function of row, step and layer, and nothing else."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from dumo.flow import dropout
from dumo.flow.dropout import current, drop, keys, layer_keys, using

LAYERS, SHAPE = range(3), (4, 5, 5)


def whole(rows: Tensor, layer: int = 0, p: float = 0.5, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """A mask of these rows."""
    return drop(torch.ones(len(rows), *shape), layer_keys(rows, layer), p)


def by_hand(key: tuple[int, int], layer: int, n: int, p: float) -> list[bool]:
    """Which of n numbers stay, in Python's whole numbers."""
    top = 2**32

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % top
        x = (x ^ x >> 15) * 0x846CA68B % top
        return x ^ x >> 16

    step, start = (mix((k + layer * -1640531527 % 2**31) % top) for k in key)
    words = [mix((i * (step | 1) + start) % top) for i in range((n + 1) // 2)]
    halves = [half for word in words for half in (word % 2**16, word >> 16)]
    signed = [half - 2**16 if half >= 2**15 else half for half in halves]
    return [half >= round(p * 2**16) - 2**15 for half in signed][:n]


def test_by_hand() -> None:
    rows = keys(seed=3, step=7, batch=6)
    assert rows.dtype == torch.int32
    assert rows.min() < -(2**30) < 2**30 < rows.max()  # of all 32 bits
    for layer in LAYERS:
        kept = whole(rows, layer, 0.3, (5, 5)) > 0
        assert kept.flatten(1).tolist() == [by_hand(tuple(row.tolist()), layer, 25, 0.3) for row in rows]


@pytest.mark.parametrize("p", [0.0, 0.13, 0.5, 0.9])
def test_shares_and_mean(p: float) -> None:
    """A share p is dropped and the mean is kept: of 1.6 million numbers, within five standard errors."""
    m = whole(keys(0, 0, 400), 1, p, (4000,))
    assert (m == 0).double().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / m.numel()) ** 0.5 + 1e-5)
    assert m.double().mean().item() == pytest.approx(1, abs=5 * (p / (1 - p) / m.numel()) ** 0.5 + 1e-5)
    assert len(m.unique()) == (2 if p else 1)


def test_rows_places_layers_and_steps_are_independent() -> None:
    """Correlations of 40,000 numbers each stay below five standard errors, neighbours and halves of a word included."""
    batch, n = 8, 40_000
    first, other = keys(0, 0, batch), keys(0, 1, batch)
    rows = [whole(k, layer, 0.5, (n,)) - 1 for k in (first, other) for layer in LAYERS]
    flat = torch.cat(rows)
    shifted = torch.cat([flat, flat.roll(1, 1), flat.roll(2, 1)])
    correlation = shifted @ shifted.mT / n
    assert (correlation - torch.eye(len(shifted))).abs().max() < 5 * n**-0.5


def test_contexts_nest_and_end() -> None:
    rows = keys(0, 0, 4)
    with using(rows):
        assert current(4) is rows
        with dropout.rows([2, 0]):
            assert torch.equal(current(2), rows[[2, 0]])
            with dropout.off():
                assert current(17) is None
            with dropout.rows([1]):
                assert torch.equal(current(1), rows[:1])
        assert current(4) is rows
        with pytest.raises(ZeroDivisionError), dropout.off():
            1 / 0  # noqa: B018
        assert current(4) is rows


def test_keys_that_nobody_set_and_rows_that_nobody_named_are_refused() -> None:
    for context in (nullcontext(), dropout.rows([0])):
        with context, pytest.raises(RuntimeError, match="without keys"):
            current(1)
    with using(keys(0, 0, 4)), pytest.raises(RuntimeError, match=r"2 rows has dropout keys for 4.*dropout.rows"):
        current(2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_dropped_keeps_its_dtype(dtype: torch.dtype) -> None:
    rows = keys(0, 0, 4)
    h = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    out = drop(h, rows, 0.25)
    out.sum().backward()
    assert out.dtype == dtype
    assert torch.equal(h.grad, drop(torch.ones_like(h), rows, 0.25))
