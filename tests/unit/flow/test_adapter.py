"""How objectives call a user's network: its arguments, its conditions, its outputs, its random numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dumo.flow.adapter import ConditionRows, NetAdapter, heads_of
from dumo.runtime.random import generator_states, seeded_generators
from dumo.types import Needs, UserError, unwrap

X = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.1, 0.2, 0.3, 0.4])
R = torch.tensor([0.0, 0.1, 0.2, 0.3])
C = torch.tensor([0, 1, 2, 0])
TWO = Needs(inputs=("t", "r"), heads=("v", "u"))


class Recording(nn.Module):
    """Keeps what it was called with, and returns x for both heads."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, Any] = {}

    def record(self, **given: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401, whatever comes
        self.given = given
        return given["x"], given["x"]


class InOrder(Recording):
    def forward(self, x: Tensor, t: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.record(x=x, t=t, r=r, c=c)


class ClassFirst(Recording):
    def forward(self, x: Tensor, c: Tensor, r: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.record(x=x, t=t, r=r, c=c)


class Keywords(Recording):
    def forward(self, x: Tensor, *, c: Tensor, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.record(x=x, t=t, r=r, c=c)


class Dumos(Recording):
    def forward(self, x: Tensor, label: Tensor, /, *, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.record(x=x, t=t, r=r, c=label)


@pytest.mark.parametrize("build", [InOrder, ClassFirst, Keywords, Dumos])
def test_times_and_class_reach_their_arguments_in_any_order(build: type[Recording]) -> None:
    net = build()
    NetAdapter(net, TWO, None, labelled=True, time_scale=10.0)(X, C, r=R, t=T)
    assert torch.equal(net.given["x"], X)
    assert torch.equal(net.given["t"], 10 * T)
    assert torch.equal(net.given["r"], 10 * R)
    assert torch.equal(net.given["c"], C)


def test_other_names_are_a_type_error() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return x

    with pytest.raises(TypeError, match="'t'"):
        NetAdapter(Named(), Needs(), None, labelled=False)(X, C, t=T)


def test_a_scale_of_time_leaves_steps_and_knobs_as_they_are() -> None:
    seen: list[Tensor] = []

    def call(net: nn.Module, x: Tensor, t: Tensor, k: Tensor, w: Tensor, c: object) -> Tensor:
        seen.extend((t, k, w))
        return x

    needs = Needs(inputs=("t", "k"), knobs={"w": 2.0})
    NetAdapter(nn.Module(), needs, call, labelled=False, time_scale=1000.0)(X, C, t=T, k=R + 7, w=R + 2)
    for value, expected in zip(seen, (1000 * T, R + 7, R + 2), strict=True):
        assert torch.equal(value, expected)


def test_who_is_not_labelled_gets_no_class() -> None:
    class Unlabelled(Recording):
        def forward(self, x: Tensor, t: Tensor, r: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return self.record(x=x, c=c)

    net = Unlabelled()
    NetAdapter(net, TWO, None, labelled=False)(X, C, t=T, r=R)
    assert net.given["c"] is None


def test_conditions_arrive_as_they_were_given() -> None:
    seen: list[Any] = []

    def call(net: nn.Module, x: Tensor, t: Tensor, r: Tensor, c: object) -> tuple[Tensor, Tensor]:
        seen.append((t, r, c))
        return x, x

    values = torch.randn(4, 5)
    for given, null in (({"text": values}, {"text": torch.zeros(5)}), (values, torch.zeros(5))):
        rows = ConditionRows.of(given, null)
        adapter = NetAdapter(InOrder(), TWO, call, labelled=False, rows=rows)
        dropped = int(rows.drop(torch.tensor([3])))
        adapter(X, torch.tensor([0, dropped, 2, 1]), t=T, r=R)
    expected = torch.stack([values[0], torch.zeros(5), values[2], values[1]])
    assert torch.equal(seen[0][0], T)
    assert torch.equal(seen[0][1], R)
    assert torch.equal(seen[0][2]["text"], expected)
    assert torch.equal(seen[1][2], expected)
    NetAdapter(InOrder(), TWO, call, labelled=True)(X, C, t=T, r=R)
    assert seen[2][2] is C


def test_a_function_gets_times_and_condition_by_name_in_any_order() -> None:
    seen: list[tuple[Tensor | None, ...]] = []

    def call(net: nn.Module, x: Tensor, c: Tensor | None, r: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((t, r, c))
        return x, x

    NetAdapter(nn.Module(), TWO, call, labelled=True)(X, C, t=T, r=R)
    for found, given in zip(seen[0], (T, R, C), strict=True):
        assert found is not None
        assert torch.equal(found, given)


def test_a_condition_without_a_null_keeps_its_row() -> None:
    rows = ConditionRows.of(
        {"text": torch.ones(3, 2), "size": torch.tensor([5.0, 6.0, 7.0]), "mask": torch.ones(3, dtype=torch.bool)},
        {"text": torch.zeros(1, 2)},
    )
    dropped = rows.drop(torch.tensor([2, 1]))
    taken = rows.take(torch.tensor([int(dropped[0]), 1, int(dropped[1])]))
    assert isinstance(taken, dict)
    assert taken["text"].tolist() == [[0, 0], [1, 1], [0, 0]]
    assert taken["size"].tolist() == [7, 6, 6]
    assert taken["mask"].all()
    in_float64 = rows.to(torch.device("cpu"), torch.float64)
    assert in_float64.rows["text"].dtype == torch.float64
    assert in_float64.rows["mask"].dtype == torch.bool


def test_heads_are_a_tensor_or_a_tuple() -> None:
    (v,) = heads_of(X, X, Needs(heads=("v",)), "Net")
    assert v is X
    for outputs in ((X, 2 * X), [X, 2 * X]):
        v, u = heads_of(outputs, X, TWO, "Net")
        assert torch.equal(v, X)
        assert torch.equal(u, 2 * X)
    v, gauge = heads_of((X, T), X, Needs(heads=("v",), gauges=("w",)), "Net")
    assert gauge is T


@pytest.mark.parametrize("outputs", [X, (X, torch.cat([X, X], 1)), (X, X, X), (X, X[:, :1]), ()])
def test_other_shapes_which_a_loss_would_broadcast_are_refused(outputs: object) -> None:
    with pytest.raises(UserError, match=r"\(v, u\)"):
        heads_of(outputs, X, TWO, "Net")


class Draws(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + torch.rand(4, 3, 2)


def test_what_a_network_draws_is_of_the_key_and_generators_stay() -> None:
    net, needs = Draws(), Needs()
    before = generator_states(X.device)
    adapter = NetAdapter(net, needs, None, labelled=False, key=7)
    other = NetAdapter(net, needs, None, labelled=False, key=8)
    (first,) = adapter(X, C, t=T)
    with torch.no_grad():
        (again,) = adapter.with_net(net)(X, C, t=T)
    assert torch.equal(first, again)
    assert not torch.equal(first, other(X, C, t=T)[0])
    assert generator_states(X.device) == before
    with seeded_generators(7, X.device):
        drawn = torch.rand(4, 3, 2)
    assert torch.equal(first, X + drawn)


def test_without_a_key_it_draws_from_the_callers() -> None:
    before = generator_states(X.device)
    NetAdapter(Draws(), Needs(), None, labelled=False)(X, C, t=T)
    assert generator_states(X.device) != before


def test_passes_without_gradients_go_past_what_wraps_the_network() -> None:
    net = Draws()
    wrapped = AveragedModel(net)
    calls: list[nn.Module] = []
    wrapped.register_forward_hook(lambda module, *_: calls.append(module))
    adapter = NetAdapter(wrapped, Needs(), None, labelled=False)
    adapter(X, C, t=T)
    assert len(calls) == 1
    with torch.no_grad():
        adapter(X, C, t=T)
    assert len(calls) == 1
    assert unwrap(wrapped) is wrapped.module
