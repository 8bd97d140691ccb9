"""Guidance by hand: each affine map, the rows it leaves alone, and the passes it does not make."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dumo.flow.draw import draw
from dumo.flow.guide import Guide, Interval
from dumo.flow.path import Linear
from dumo.objectives import FlowMatching
from dumo.types import Cond, Noised

V_C, V_NULL = 3.0, 5.0


def record() -> Noised:
    """Six rows; the second and the fifth have lost their label; times 0, .2, .4, .6, .8, 1; v_t = 2."""
    c = torch.arange(6)
    b = draw(FlowMatching(drop=0), Linear(), torch.zeros(6, 2), c, torch.full_like(c, 9), seed=0, step=0)
    kept = torch.tensor([True, False, True, True, False, True])
    t = torch.arange(6) / 5
    return replace(b, t=t, v_t=torch.full((6, 2), 2.0), kept=kept, c=torch.where(kept, c, 9))


def guided(guide: Guide, b: Noised, *, have_v_hat: bool = False) -> tuple[Tensor, list[str]]:
    """v*, and the passes that were made for it."""
    passes: list[str] = []

    def velocity(rows: Noised, c: Cond) -> Tensor:
        assert rows is b
        null = bool((c == 9).all())
        passes.append("null" if null else "c")
        return torch.full_like(b.x_t, V_NULL if null else V_C)

    v_hat = torch.full_like(b.x_t, V_C) if have_v_hat else None
    return guide(b, v_hat, velocity), passes


def expected(number: float, rows: list[int]) -> Tensor:
    v = torch.full((6, 2), 2.0)
    v[rows] = number
    return v


KEPT = [0, 2, 3, 5]
MAPS = [  # omega, zeta, v* on guided rows, passes
    (1.0, 0.0, 2.0, []),
    (1.0, 0.5, 2 + 0.5 * (V_C - V_NULL), ["c", "null"]),
    (0.2, 0.9, 0.2 * 2 + 0.9 * V_C - 0.1 * V_NULL, ["c", "null"]),
    (0.5, 0.5, 0.5 * 2 + 0.5 * V_C, ["c"]),
    (0.2, 0.8, 0.2 * 2 + 0.8 * V_C, ["c"]),
    (1.5, 0.0, 1.5 * 2 - 0.5 * V_NULL, ["null"]),
    (0.6, 0.0, 0.6 * 2 + 0.4 * V_NULL, ["null"]),
]


@pytest.mark.parametrize(("omega", "zeta", "v_star", "passes"), MAPS)
def test_every_affine_map(omega: float, zeta: float, v_star: float, passes: list[str]) -> None:
    guide = Guide(omega=omega, zeta=zeta)
    found, made = guided(guide, record())
    assert torch.allclose(found, expected(v_star, KEPT), rtol=0, atol=1e-6)
    assert made == passes  # none of weight zero
    assert guide.active == (made != [])


@pytest.mark.parametrize(("omega", "zeta", "v_star", "passes"), MAPS)
def test_a_velocity_at_hand_saves_its_pass(omega: float, zeta: float, v_star: float, passes: list[str]) -> None:
    found, made = guided(Guide(omega=omega, zeta=zeta), record(), have_v_hat=True)
    assert torch.allclose(found, expected(v_star, KEPT), rtol=0, atol=1e-6)
    assert made == [p for p in passes if p == "null"]


@pytest.mark.parametrize(
    ("low", "high", "rows"),
    [(0.0, 1.0, KEPT), (0.0, 0.75, [0, 2, 3]), (0.3, 1.0, [2, 3, 5]), (0.4, 0.6, [2, 3]), (0.5, 0.55, [])],
)
def test_rows_outside_the_interval_keep_v_t(low: float, high: float, rows: list[int]) -> None:
    """Both ends belong to it. The passes are made all the same: other rows of the batch may need them."""
    guide = Guide(zeta=0.5, interval=Interval(low=low, high=high))
    found, made = guided(guide, record())
    assert torch.equal(found, expected(1.0, rows))
    assert made == ["c", "null"]
    assert guide.rows(record()).nonzero().flatten().tolist() == rows


@pytest.mark.parametrize(
    ("omega", "zeta", "scale"), [(1, 0, 1), (1, 0.55, 1 / 0.45), (0.2, 0.92, 2.5), (1.75, 0, 1.75)]
)
def test_effective_scale_is_where_the_map_settles(omega: float, zeta: float, scale: float) -> None:
    """V <- omega v + zeta V + (1 - omega - zeta) V_0, again and again, ends at V_0 + w (v - V_0)."""
    guide = Guide(omega=omega, zeta=zeta)
    v, v_null, settled = 2.0, 5.0, 0.0
    for _ in range(2000):
        settled = omega * v + zeta * settled + (1 - omega - zeta) * v_null
    assert guide.scale == pytest.approx(scale)
    assert settled == pytest.approx(v_null + guide.scale * (v - v_null))
