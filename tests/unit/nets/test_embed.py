"""Embeddings by hand."""

from math import cos, sin

import pytest
import torch

from dumo.nets.embed import Gauges, Scalars, grid_waves, label_table, rotary_tables
from dumo.types import Needs


@pytest.mark.parametrize("scale", [1.0, 10.0, 1000.0])
def test_waves_of_time(scale: float) -> None:
    """cos and sin of scale t 10,000^(-i / 128): the quickest runs at the scale itself."""
    waves = Scalars(("t",), 4, scale)._waves(torch.tensor([0.0, 0.3], dtype=torch.float64))
    assert waves.shape == (2, 256)
    assert torch.equal(waves[0], torch.cat([torch.ones(128), torch.zeros(128)]).double())
    for i in (0, 1, 64, 127):
        angle = scale * 0.3 * 10_000 ** (-i / 128)
        assert waves[1, i].item() == pytest.approx(cos(angle), abs=1e-4 * max(1, scale / 100))
        assert waves[1, 128 + i].item() == pytest.approx(sin(angle), abs=1e-4 * max(1, scale / 100))


def test_embeddings_of_all_names_are_added_and_a_shift_to_the_waves_of_each() -> None:
    """As EDM's labels are; and there may be fewer frequencies, over the same range."""
    scalars = Scalars(("t", "r", "w"), 4, 1.0, count=3)
    t, r, w = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    shift = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    angles = t[:, None] * torch.tensor([1, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3)])
    assert torch.allclose(scalars._waves(t), torch.cat([angles.cos(), angles.sin()], -1))
    parts = {"t": t, "r": t - r, "w": w}
    for shifts in ((), (shift,)):
        by_hand = sum(scalars.embedders[name](scalars._waves(s) + sum(shifts)) for name, s in parts.items())
        assert torch.allclose(scalars(*shifts, t=t, r=r, w=w), by_hand, rtol=0, atol=1e-6)


@pytest.mark.parametrize("names", [("t",), ("t", "r", "w")])
def test_the_slope_of_the_embedding_of_time(names: tuple[str, ...]) -> None:
    """Of embedders that pass waves on, that of the gap its quickest alone: e = (2 cos w_0 t, cos w_1 t, ...)."""
    scalars = Scalars(names, 6, 2.0, count=3).double()
    scalars.requires_grad_(False)
    eye = torch.eye(6)
    for name, embedder in scalars.embedders.items():
        first, last = torch.nn.Linear(6, 12, bias=False), torch.nn.Linear(12, 6, bias=False)
        first.weight.data = torch.cat([eye, -eye])
        last.weight.data = torch.cat([eye, -eye], 1)  # SiLU(x) - SiLU(-x) = x
        if name == "r":
            last.weight.data[[1, 2, 4, 5]] = 0.0
        embedder[0], embedder[2] = first.double(), last.double()
    squares = torch.tensor([4.0 if "r" in names else 1.0, 1.0, 1.0], dtype=torch.float64)  # the gap is t, at r = 0
    w = scalars.frequencies.double()
    expected = ((squares * w.square()).sum() / squares.sum()).sqrt().item()
    assert scalars.slope(dict(scalars.named_parameters())) == pytest.approx(expected, rel=1e-12)


def test_embedders_and_labels_with_a_row_for_null_start_small() -> None:
    for key, p in Scalars(("t",), 200, 1.0).named_parameters():
        size = p.std() if "weight" in key else p.abs().max()
        assert size.item() == pytest.approx(0.02 * ("weight" in key), rel=0.05)
    table = label_table(10, 300)
    assert table.weight.shape == (11, 300)
    assert table.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_waves_of_places() -> None:
    """Columns first, then rows; of each the sines, then the cosines (DiT)."""
    waves = grid_waves(3, 3, 8)
    assert waves.shape == (9, 8)
    for row in range(3):
        for column in range(3):
            by_hand = [f(n * q) for n in (column, row) for f in (sin, cos) for q in (1.0, 0.01)]
            assert waves[3 * row + column].tolist() == pytest.approx(by_hand, abs=1e-6)
    oblong_tables = (grid_waves(2, 3, 8), *rotary_tables(2, 3, 8))
    square_tables = (waves, *rotary_tables(3, 3, 8))
    for found, whole in zip(oblong_tables, square_tables, strict=True):
        assert torch.equal(found, whole[:6])  # of an oblong, the first rows of the square


def test_gauges_depend_on_the_scalars_alone() -> None:
    gauges = Gauges(Needs(inputs=("t",), heads=("u",), gauges=("a", "b"), knobs={"w": 1.0}), 8, 1.0)
    t, w = torch.rand(2, 5, generator=torch.Generator().manual_seed(0))
    assert not any(out.any() for out in gauges(t=t, w=w))
    torch.nn.init.normal_(gauges.out.weight, generator=torch.Generator().manual_seed(0))
    a, b = gauges(t=t, w=w)
    assert a.shape == b.shape == (5,)
    assert not torch.allclose(a, b)
    assert not torch.allclose(a, gauges(t=t, w=w + 1)[0])
