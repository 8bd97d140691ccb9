"""Records take their rows from streams by key, whoever draws them; noise goes with data at the least cost."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

from dumo.flow.guide import Guide
from dumo.flow.module import Flow
from dumo.flow.noisy_batch import Coupling, Noise, add_noise, draw, make_draws
from dumo.flow.path import Linear
from dumo.flow.times import Pair, Uniform
from dumo.objectives import Consistency, DuMo, FlowMatching, FreeFlow, ImprovedMeanFlow, MeanFlow
from dumo.objectives.consistency import Equal
from dumo.runtime.random import random_row_mask, stream
from dumo.types import Needs, NoisyBatch, Objective, OnHost


def record(objective: Objective, x: Tensor, step: int = 0) -> NoisyBatch:
    c = torch.arange(len(x))
    return draw(objective, Linear(), x, c, torch.full_like(c, -1), seed=0, step=step)


class Rich(FlowMatching):
    """An objective with two further laws."""

    @property
    def needs(self) -> Needs:
        """With them."""
        return replace(super().needs, laws={"extra": Noise(), "strength": Uniform(high=0.5)})


def test_further_laws_are_drawn_by_name_and_shift_nothing() -> None:
    x = torch.zeros(50, 2, 3)
    plain, rich = record(FlowMatching(), x), record(Rich(), x)
    assert plain.drawn == {}
    assert set(rich.drawn) == {"extra", "strength"}
    assert rich.drawn["extra"].shape == (50, 2, 3)
    assert rich.drawn["strength"].shape == (50,)
    assert not torch.equal(rich.drawn["extra"], rich.z)
    for key in ("t", "r", "z", "c", "kept", "x_t"):
        assert torch.equal(getattr(plain, key), getattr(rich, key))


@pytest.mark.parametrize("drop", [0.0, 0.1, 1.0])
def test_labels_are_dropped_at_their_rate(drop: float) -> None:
    b = record(FlowMatching(drop=drop), torch.zeros(20_000, 1))
    assert abs((~b.kept).float().mean() - drop) < 0.01
    assert torch.equal(b.c, torch.where(b.kept, torch.arange(20_000), -1))


def test_a_dropped_label_may_be_one_number_for_all() -> None:
    x, c = torch.zeros(20, 1), torch.arange(20)
    one, each = (draw(FlowMatching(drop=0.5), Linear(), x, c, null, seed=0, step=0) for null in (99, 0 * c + 99))
    assert torch.equal(one.c, each.c)
    assert torch.equal(one.null, each.null)
    assert torch.equal(one[3:5].null, each[3:5].null)


def test_dropped_rows_are_no_run_of_rows() -> None:
    """Not the first rows, as elsewhere: each twentieth of the batch has its share, and steps differ."""
    b, later = (record(FlowMatching(drop=0.5), torch.zeros(20_000, 1), step) for step in (0, 1))
    assert (b.kept.view(20, -1).float().mean(1) - 0.5).abs().max() < 0.1
    assert not torch.equal(b.kept, later.kept)


def test_rows_that_move_are_known_by_place() -> None:
    """The same at every step, and a share's are its part of the batch's: shapes are static, the same on every rank."""
    x, c = torch.zeros(24, 2), torch.arange(24)
    for ratio in (0, 0.25, 0.6, 0.75, 1):
        law = Pair(velocity_ratio=ratio)
        b = record(MeanFlow(times=law), x)
        assert b.moving == law.moving(24) == record(MeanFlow(times=law), x, step=5).moving
        assert b.moving == tuple((b.r < b.t).tolist())
        for cut in ([12, 12], [8, 8, 8], [5, 7, 12]):
            parts = [
                draw(MeanFlow(times=law), Linear(), x[:n], c[:n], c[:n], seed=0, step=0, batch=24, first=sum(cut[:i]))
                for i, n in enumerate(cut)
            ]
            assert sum((part.moving or () for part in parts), ()) == b.moving
    assert record(FlowMatching(), x).moving is None
    assert record(MeanFlow(times=Uniform()), x).moving is None


def test_rows_are_cut_by_slice_list_or_tensor() -> None:
    b = record(MeanFlow(times=Pair(velocity_ratio=0.6)), torch.randn(10, 2, generator=stream("cut")))
    assert b.moving is not None
    for rows in (slice(2, 7), slice(None, None, 3), [7, 0, 7, 3], [-1]):
        cut = b[rows]
        for key in ("x", "z", "t", "r", "x_t", "v_t", "c", "null", "kept"):
            assert torch.equal(getattr(cut, key), getattr(b, key)[rows]), key
        assert cut.moving == tuple(torch.tensor(b.moving)[rows].tolist()) == tuple((cut.r < cut.t).tolist())
    unknown = b[torch.tensor([7, 0, 7, 3])]
    assert torch.equal(unknown.z, b[[7, 0, 7, 3]].z)
    assert unknown.moving is None  # to know it, one would have to wait for the device


def test_at_another_time_any_row_may_move() -> None:
    b = record(MeanFlow(times=Pair(velocity_ratio=0.5)), torch.zeros(8, 2))
    moved = b.at((b.t + 1) / 2)
    assert (moved.r < moved.t).all()
    assert moved.moving is None


@pytest.mark.parametrize(("dtype", "times"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_times_stay_exact_whatever_the_data(dtype: torch.dtype, times: torch.dtype) -> None:
    b = record(MeanFlow(), torch.zeros(8, 3, dtype=dtype))
    assert (b.x_t.dtype, b.v_t.dtype, b.z.dtype) == (dtype,) * 3
    assert (b.t.dtype, b.r.dtype) == (times,) * 2


def test_embedded_conditions_are_dropped_by_row() -> None:
    c = torch.randn(40, 3, 5, generator=torch.Generator().manual_seed(0))
    b = draw(FlowMatching(drop=0.5), Linear(), torch.zeros(40, 2), c, torch.zeros_like(c), seed=0, step=0)
    assert torch.equal(b.c[b.kept], c[b.kept])
    assert not b.c[~b.kept].any()
    assert 0 < b.kept.sum() < 40


def test_at_moves_the_rows_in_time() -> None:
    b = record(MeanFlow(times=Pair(of=Uniform())), torch.randn(9, 2, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(b.at(b.t).x_t, b.x_t)
    assert torch.equal(b.at(0 * b.t).x_t, b.x)
    assert torch.equal(b.at(0 * b.t + 1).x_t, b.z)
    other = b.at(b.t, x=b.z, z=b.x)
    assert torch.equal(other.v_t, -b.v_t)
    assert torch.equal(other.x, b.z)
    assert torch.equal(other.r, b.r)
    rich = record(Rich(), torch.zeros(9, 2))
    assert torch.equal(rich.at(rich.t / 2).drawn["extra"], rich.drawn["extra"])


def test_shares_of_what_is_drawn_before_a_step_are_the_whole() -> None:
    """Whoever draws them: a rank its rows at once, or all, of which it takes its own."""
    objective, named = ImprovedMeanFlow(), ("t", "r", "z", "kept", "keys", "laws", "moving")
    whole = make_draws(objective, (3, 2), seed=0, step=5, batch=24)
    for rows in (slice(0, 8), slice(8, 24)):
        share = make_draws(objective, (3, 2), seed=0, step=5, batch=24, rows=rows)
        for name in named:
            one, other = (getattr(draws, name) for draws in (share, whole[rows]))
            one, other = (torch.stack([*v.values()]) if name == "laws" else torch.as_tensor(v) for v in (one, other))
            assert torch.equal(one, other), name
    assert make_draws(objective, (3, 2), seed=0, step=5, batch=24, z=False).z is None


X = torch.randn(24, 2, 3, generator=stream("x"), dtype=torch.float64)
Z = torch.randn(24, 2, 3, generator=stream("z"), dtype=torch.float64)
C = torch.randint(3, (24,), generator=stream("c"))


def cost(x: Tensor, z: Tensor) -> float:
    return (x - z).square().sum().item()


@pytest.mark.parametrize("group", [2, 6, 12])
def test_no_other_order_is_cheaper(group: int) -> None:
    """Of the rows of a class in a group, which keep their noises between them."""
    z = Coupling(group=group)(X, Z, C)
    for first in range(0, 24, group):
        rows = torch.arange(first, first + group)
        for k in range(3):
            some = rows[C[rows] == k]
            best = min((cost(X[some], Z[some[list(order)]]) for order in permutations(range(len(some)))), default=0)
            assert cost(X[some], z[some]) == pytest.approx(best, rel=1e-12)
            assert torch.equal(z[some].flatten(1).sort(0).values, Z[some].flatten(1).sort(0).values)


def test_texts_are_classes_as_well() -> None:
    told = torch.nn.functional.one_hot(C, 3).float()
    assert torch.equal(Coupling(group=12)(X, Z, told), Coupling(group=12)(X, Z, C))


def test_pieces_of_whole_groups_are_the_batch() -> None:
    """So two ranks are one; and the data, its labels and its times are as without."""

    def record(rows: slice, coupling: Coupling | None = Coupling(group=6)) -> list[Tensor]:  # noqa: B008, frozen
        draws = make_draws(DuMo(drop=0.5), (2, 3), seed=0, step=0, batch=24, rows=rows)
        b = add_noise(draws, Linear(sd=0.5), X[rows].float(), C[rows], 3, coupling=coupling)
        return [b.z, b.x_t, b.v_t, b.x, b.c, b.t]

    whole, halves = record(slice(None)), [record(slice(0, 6)), record(slice(6, 24))]
    for one, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(torch.cat(parts), one)
    z, _, v, x, c, t = whole
    assert torch.equal(v, z - x)
    plain = record(slice(None), None)
    assert all(torch.equal(one, other) for one, other in zip((x, c, t), plain[3:], strict=True))
    assert cost(x, z) < cost(x, plain[0])


def test_draws_are_coupled_ahead_as_in_the_step() -> None:
    """Any split into whole groups gets the same noise, to the bit."""
    coupling, path = Coupling(group=8), Linear(sd=0.7)
    draws = make_draws(DuMo(), X.shape[1:], seed=0, step=0, batch=len(X))
    ahead = draws.couple(coupling, path, X, C)
    for rows in (slice(0, 24), slice(0, 8), slice(8, 24)):
        b = add_noise(draws[rows], path, X[rows], C[rows], -1, coupling=coupling)
        assert not torch.equal(b.z, draws[rows].z)
        assert torch.equal(b.z, add_noise(ahead[rows], path, X[rows], C[rows], -1, coupling=coupling).z)


def test_what_is_not_finite_is_left_to_the_step() -> None:
    x = torch.where(torch.arange(24)[:, None, None] == 7, torch.nan, X)
    z = Coupling(group=24)(x, Z, C)
    same = C.eq(C[7])
    assert torch.equal(z[same], Z[same])
    assert not torch.equal(z[~same], Z[~same])


def test_a_teacher_answers_its_share_of_the_rows_alone() -> None:
    """Its velocity is learned as it is, at any time; the other rows have the data's, guided."""
    objective, x, c = DuMo(drop=0.25, guide=Guide(zeta=0.5)), torch.zeros(40, 2), torch.arange(40)
    draws = make_draws(objective, x.shape[1:], seed=0, step=3, batch=40, prior=0.3)
    part = make_draws(objective, x.shape[1:], seed=0, step=3, batch=40, rows=slice(5, 17), prior=0.3)
    assert draws.teacher_rows is not None
    assert draws.teacher_rows.sum() == 12
    assert torch.equal(draws.teacher_rows[5:17], part.teacher_rows)
    assert not torch.equal(draws.teacher_rows, random_row_mask(0, 4, "prior", 40, 0.3))
    b = add_noise(draws, Linear(), x, c, -1, teacher=lambda x, t, c, v: torch.full_like(x, 7.0))
    plain = add_noise(replace(draws, teacher_rows=None), Linear(), x, c, -1)
    assert torch.equal(b.c, plain.c), "a label is dropped or not, whoever answers"
    for record, data in ((b, plain), (b.at(0.25), plain.at(0.25)), (b[10:30], plain[10:30])):
        assert record.teacher_rows is not None
        assert (record.v_t[record.teacher_rows] == 7).all()
        assert torch.equal(record.v_t[~record.teacher_rows], data.v_t[~record.teacher_rows])
    v_star = objective.guide(b, torch.full_like(x, 3.0), lambda b, c: torch.full_like(b.x_t, -1.0))
    guided = plain.kept & ~draws.teacher_rows
    torch.testing.assert_close(v_star[guided], b.v_t[guided] + 0.5 * (3 + 1))
    assert torch.equal(v_star[~guided], b.v_t[~guided])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_taught_rows_make_a_pass_of_the_teacher(device: str) -> None:
    """At least one, so that every rank makes the pass; on another device they are known from the CPU."""
    x, c = torch.zeros(40, 2, device=device), torch.arange(40, device=device)
    draws = make_draws(DuMo(), x.shape[1:], seed=0, step=3, batch=40, prior=0.3)
    mask = draws.teacher_rows
    assert mask is not None
    rows: list[int] = []

    def teacher(x: Tensor, t: Tensor, c: Tensor, v: Tensor) -> Tensor:
        assert len(t) == len(c) == len(v) == len(x)
        rows.append(len(x))
        return v + 1

    b = add_noise(draws, Linear(), x, c, -1, teacher=teacher, asks_teacher=False)
    b = replace(b, host=OnHost(draws.t, draws.kept, mask))
    b.velocity(b.x_t, b.t, b.v_t)
    b.at(0.25).at(0.5)
    b[8:20].at(0.5)
    untaught = [k for k, is_taught in enumerate(mask.tolist()) if not is_taught]
    other = b[untaught]
    v = other.velocity(other.x_t, other.t, other.v_t)
    assert rows == [12, 12, 12, int(mask[8:20].sum()), 1]
    if device == "cpu":
        assert torch.equal(v, other.v_t)


@pytest.mark.parametrize(
    ("objective", "times"),
    [
        (FlowMatching(), 1),
        (FreeFlow(), 0),  # which asks at places of its own
        (Consistency(), 1),
        (Consistency(discretization=Equal(count=9)), 0),  # which takes v_t at the end of its step
    ],
)
def test_a_teacher_is_asked_for_v_t_where_the_loss_reads_it(objective: Objective, times: int) -> None:
    asked: list[Tensor] = []

    def teacher(x_t: Tensor, t: Tensor, c: Tensor, v_t: Tensor) -> Tensor:
        asked.append(t)
        return v_t

    flow = Flow(nn.Identity(), objective, direct=True, teacher=teacher)
    x = torch.zeros(8, 2)
    flow.add_noise(x, torch.zeros(8, dtype=torch.long), flow.make_draws(0, x.shape[1:], batch=8))
    draw(objective, Linear(), x, torch.zeros(8, dtype=torch.long), 0, seed=0, step=0, teacher=teacher)
    assert len(asked) == 2 * times


def test_draws_are_made_on_the_cpu_whatever_the_default_device() -> None:
    expected = make_draws(DuMo(), (2,), seed=0, step=0, batch=4, prior=0.5)
    torch.set_default_device("meta")
    try:
        draws = make_draws(DuMo(), (2,), seed=0, step=0, batch=4, prior=0.5)
    finally:
        torch.set_default_device(None)
    assert torch.equal(draws.t, expected.t)
    assert torch.equal(draws.kept, expected.kept)
    assert torch.equal(draws.keys, expected.keys)
