"""Guidance by hand, in training and in sampling: affine maps, rows they leave alone, passes they do not make."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dumo.flow import dropout
from dumo.flow.guide import CFG, GuidanceScale, Guide, Interval
from dumo.flow.noisy_batch import draw
from dumo.flow.path import Linear
from dumo.flow.reading import mean_velocity
from dumo.flow.sampling import join_batches, labels_in_turn, sample_batches
from dumo.flow.solver import Euler, Heun, Hop, Restart, Solver
from dumo.objectives import FlowMatching
from dumo.types import Cond, NoisyBatch, Readings, lift

V_C, V_NULL = 3.0, 5.0


def record() -> NoisyBatch:
    """Six rows; the second and the fifth have lost their label; times 0, .2, .4, .6, .8, 1; v_t = 2."""
    c = torch.arange(6)
    b = draw(FlowMatching(drop=0), Linear(), torch.zeros(6, 2), c, torch.full_like(c, 9), seed=0, step=0)
    kept = torch.tensor([True, False, True, True, False, True])
    t = torch.arange(6) / 5
    return replace(b, t=t, v_t=torch.full((6, 2), 2.0), kept=kept, c=torch.where(kept, c, 9))


def needing(guide: Guide, b: NoisyBatch) -> list[int]:
    """Passes are made for the rows that are guided, and for one where none is: no rank may go without."""
    return guided_rows(guide, b) or [0]


def guided_rows(guide: Guide, b: NoisyBatch) -> list[int]:
    """Kept labels, inside the interval."""
    return (b.kept & guide.inside(b.t)).nonzero().flatten().tolist()


def guided(guide: Guide, b: NoisyBatch, *, have_v_hat: bool = False) -> tuple[Tensor, list[str]]:
    """v*, and the passes that were made for it."""
    passes: list[str] = []

    def velocity(rows: NoisyBatch, c: Cond) -> Tensor:
        assert torch.equal(rows.t, b.t[needing(guide, b)])
        null = bool((c == 9).all())
        passes.append("null" if null else "c")
        return torch.full_like(rows.x_t, V_NULL if null else V_C)

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
    """None of weight zero has a pass, nor has a velocity at hand."""
    guide = Guide(omega=omega, zeta=zeta)
    assert guide.active == (passes != [])
    for have_v_hat in (False, True):
        found, made = guided(guide, record(), have_v_hat=have_v_hat)
        assert torch.allclose(found, expected(v_star, KEPT), rtol=0, atol=1e-6)
        assert made == [p for p in passes if p == "null" or not have_v_hat]


@pytest.mark.parametrize(
    ("low", "high", "rows"),
    [(0.0, 1.0, KEPT), (0.0, 0.75, [0, 2, 3]), (0.3, 1.0, [2, 3, 5]), (0.4, 0.6, [2, 3]), (0.5, 0.55, [])],
)
def test_rows_outside_the_interval_keep_v_t(low: float, high: float, rows: list[int]) -> None:
    """Both ends belong to it. The passes are made even where no row needs them: another rank's rows may."""
    guide = Guide(zeta=0.5, interval=Interval(low=low, high=high))
    found, made = guided(guide, record())
    assert torch.equal(found, expected(1.0, rows))
    assert made == ["c", "null"]
    assert guided_rows(guide, record()) == rows


def test_every_pass_meets_the_masks_of_its_rows() -> None:
    """A null pass drops nothing."""
    b, keys = record(), torch.arange(12, dtype=torch.int32).view(6, 2)
    seen: list[list[int] | None] = []

    def velocity(some: NoisyBatch, c: Cond) -> Tensor:
        found = dropout.current(len(some.t))
        seen.append(None if found is None else found[:, 0].tolist())
        return some.x_t

    with dropout.using(keys):
        Guide(zeta=0.5)(b, None, velocity)
    assert seen == [[0, 4, 6, 10], None]


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


def test_what_is_known_before_a_pass() -> None:
    b = record()
    assert Guide().known_target(b) is b.v_t
    assert Guide(interval=Interval(high=0.5)).known_target(b) is b.v_t
    for guide in (Guide(zeta=0.5), Guide(omega=2)):
        assert guide.known_target(b) is None


def test_nothing_of_an_unguided_row_is_seen() -> None:
    """Where no row is guided, one goes through the net all the same: whatever comes out, even no number."""
    b = replace(record(), kept=torch.zeros(6, dtype=torch.bool))
    assert torch.equal(Guide(zeta=0.5)(b, None, lambda some, c: torch.full_like(some.x_t, torch.nan)), b.v_t)


@pytest.mark.parametrize(("data", "net"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_precision_is_the_wider_of_data_and_net(data: str, net: str) -> None:
    low, out = getattr(torch, data), getattr(torch, net)
    b = record()
    b = replace(b, x=b.x.to(low), x_t=b.x_t.to(low), z=b.z.to(low), v_t=b.v_t.to(low))
    v_star = Guide(zeta=0.5)(b, None, lambda some, c: some.x_t.to(out))
    assert v_star.dtype == torch.promote_types(low, out)


def test_guidance_waits_for_no_number() -> None:
    """On tensors that hold none it takes all rows: so every rank has the same shapes."""
    b, guide, seen = record(), Guide(zeta=0.5), list[int]()
    ghost = {name: getattr(b, name).to("meta") for name in ("x", "z", "t", "r", "x_t", "v_t", "c", "null", "kept")}

    def velocity(some: NoisyBatch, c: Cond) -> Tensor:
        seen.append(len(some.t))
        return some.x_t

    assert guide(replace(b, **ghost), None, velocity).shape == b.x_t.shape
    assert seen == [6, 6]
    assert guide.guided_rows(b).tolist() == KEPT
    assert guide.guided_rows(b[torch.tensor(KEPT)]) is None  # all are needed


NULL = 4


class Small(nn.Module):
    """u(x_t, t, r) = x (1 + c) + t - r / 2, and a note of every row that went through: its label and time."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[list[tuple[int, float]]] = []

    def forward(self, x: Tensor, c: Tensor, /, t: Tensor, r: Tensor) -> tuple[Tensor]:
        self.passes.append(list(zip(c.tolist(), [round(s, 6) for s in t.tolist()], strict=True)))
        return (x * lift(1.0 + c, x) + lift(t - r / 2, x),)


X, C = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]]), torch.tensor([0, 3, NULL])
T, S = torch.tensor([0.2, 0.6, 0.4]), torch.tensor([0.1, 0.0, 0.4])


@pytest.mark.parametrize("name", ["velocity", "endpoint", "flow_map"])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_every_reading_is_the_affine_map_in_one_pass(name: str, scale: float) -> None:
    net = Small()
    plain, guided = (
        getattr(readings, name) for readings in (mean_velocity(net), CFG(scale=scale)(mean_velocity(net), NULL))
    )
    times = (T, S) if name == "flow_map" else (T,)
    with_c, without = plain(X, *times, C), plain(X, *times, torch.full_like(C, NULL))
    net.passes.clear()
    found = guided(X, *times, C)
    assert torch.allclose(found, without + scale * (with_c - without), rtol=0, atol=1e-5)
    assert torch.allclose(found[2], with_c[2], rtol=0, atol=1e-5)  # has no label
    assert [len(rows) for rows in net.passes] == [6]


def test_only_rows_inside_the_interval_are_read_twice() -> None:
    """Both ends belong to it, in single precision too."""
    net, guidance = Small(), CFG(scale=3, interval=Interval(low=0.2, high=0.4))
    velocity, plain = guidance(mean_velocity(net), NULL).velocity, mean_velocity(net).velocity
    with_c, without = plain(X, T, C), plain(X, T, torch.full_like(C, NULL))
    net.passes.clear()
    found = velocity(X, T, C)
    assert torch.allclose(found[[0, 2]], (3 * with_c - 2 * without)[[0, 2]], rtol=0, atol=1e-5)
    assert torch.equal(found[1], with_c[1])
    assert net.passes == [[(0, 0.2), (3, 0.6), (NULL, 0.4), (NULL, 0.2), (NULL, 0.4)]]
    assert torch.equal(velocity(X, T + 0.5, C), plain(X, T + 0.5, C))
    assert len(net.passes[1]) == 3


def test_what_needs_no_guidance_gets_none() -> None:
    """A scale of one, and readings that were not taught."""
    readings = mean_velocity(Small())
    assert not CFG().active
    assert CFG()(readings, NULL) is readings
    assert CFG(interval=Interval(high=0.5))(readings, NULL) is readings
    found = CFG(scale=2)(Readings(velocity=readings.velocity), NULL)
    assert (found.endpoint, found.flow_map) == (None, None)


EARLY, LATE, NEVER = Interval(high=0.5), Interval(low=0.6), Interval(low=0.01, high=0.02)
COUNTS = [  # solver, readings asked for, interval, passes counted
    (Euler(), 4, Interval(), 8),
    (Euler(), 4, EARLY, 6),  # 1, 3/4, 1/2, 1/4
    (Euler(), 4, LATE, 6),
    (Euler(), 4, NEVER, 4),
    (Heun(), 4, EARLY, 7),  # 1, 1/2, 1/2, 0
    (Restart(m=0.3), 2, EARLY, 3),
    (Hop(), 2, Interval(), 4),
]


@pytest.mark.parametrize(("solver", "nfe", "interval", "passes"), COUNTS)
def test_passes_are_counted_not_readings(solver: Solver, nfe: int, interval: Interval, passes: int) -> None:
    """At any batch size: rows of one batch are read at one time."""
    net = Small()
    readings = CFG(scale=2, interval=interval)(mean_velocity(net), NULL)
    for batch in (3, 7):
        c = labels_in_turn(7, 4)
        parts = sample_batches(net, readings, Linear(), solver, c, nfe=nfe, seed=0, shape=(2,), batch=batch)
        assert join_batches(parts).nfe == passes


@pytest.mark.parametrize("wrong", [{"scale": 0}, {"scale": -1.5}, {"interval": {"low": 0.6, "high": 0.5}}, {"w": 2}])
def test_what_is_no_guidance_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CFG.model_validate(wrong)


def test_what_settles_unguided_was_not_guided() -> None:
    assert not GuidanceScale(Guide().scale).active
    assert not GuidanceScale(Guide(omega=0.2, zeta=0.8).scale).active
    trained = GuidanceScale(Guide(zeta=0.55).scale)
    assert trained.active
    assert trained.reason() == "this model was trained at guidance scale 2.22; the scale is part of its weights"
