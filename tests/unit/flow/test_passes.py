"""How objectives call a network of anybody's: its arguments' names, its conditions, its outputs, its random numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dumo.flow.condition import table_of
from dumo.flow.conditiontable import ConditionTable
from dumo.flow.passes import Passes, heads_of
from dumo.flow.signature import Signature
from dumo.runtime.random import generator_states, seeded_generators
from dumo.types import Needs, UserError, unwrap

X = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.1, 0.2, 0.3, 0.4])
R = torch.tensor([0.0, 0.1, 0.2, 0.3])
C = torch.tensor([0, 1, 2, 0])
TWO = Needs(inputs=("t", "r"), heads=("v", "u"))


class Told(nn.Module):
    """Keeps by which names it was called, and returns x for both heads."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, Any] = {}

    def told(self, **given: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401, whatever comes
        self.given = given
        return given["x"], given["x"]


class Short(Told):
    def forward(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.told(x=x, t=t, s=s, y=y)


class Long(Told):
    def forward(
        self, sample: Tensor, timestep: Tensor, r_timestep: Tensor, class_labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.told(x=sample, t=timestep, s=r_timestep, y=class_labels)


class Named(Told):
    def forward(self, x: Tensor, *, sigma: Tensor, end: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        return self.told(x=x, t=sigma, s=end, y=cond)


class Last(Told):
    """As diffusers have it: the class may come first."""

    def forward(self, x: Tensor, label: Tensor, time: Tensor, time_end: Tensor) -> tuple[Tensor, Tensor]:
        return self.told(x=x, t=time, s=time_end, y=label)


@pytest.mark.parametrize("build", [Short, Long, Named, Last])
def test_times_and_class_go_by_the_names_of_forward(build: Callable[[], Told]) -> None:
    net = build()
    passes = Passes(net, TWO, Signature.of(net), labelled=True, time_scale=10.0)
    passes(X, C, t=T, r=R)
    assert torch.equal(net.given["x"], X)
    assert torch.equal(net.given["t"], 10 * T)
    assert torch.equal(net.given["s"], 10 * R)
    assert torch.equal(net.given["y"], C)


def test_a_scale_of_time_leaves_steps_and_knobs_as_they_are() -> None:
    seen: list[Tensor] = []

    def call(net: nn.Module, x: Tensor, t: Tensor, k: Tensor, w: Tensor, c: object) -> Tensor:
        seen.extend((t, k, w))
        return x

    needs = Needs(inputs=("t", "k"), knobs={"w": 2.0})
    Passes(nn.Module(), needs, call, labelled=False, time_scale=1000.0)(X, C, t=T, k=R + 7, w=R + 2)
    for value, expected in zip(seen, (1000 * T, R + 7, R + 2), strict=True):
        assert torch.equal(value, expected)


def test_who_is_not_labelled_gets_no_class() -> None:
    class Unlabelled(Told):
        def forward(self, x: Tensor, t: Tensor, r: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return self.told(x=x, y=y)

    net = Unlabelled()
    Passes(net, TWO, Signature.of(net), labelled=False)(X, C, t=T, r=R)
    assert net.given["y"] is None


def test_a_call_of_ones_own_gets_times_in_turn_and_the_condition_as_it_was_given() -> None:
    seen: list[Any] = []

    def call(net: nn.Module, x: Tensor, t: Tensor, r: Tensor, c: object) -> tuple[Tensor, Tensor]:
        seen.append((t, r, c))
        return x, x

    rows = torch.randn(4, 5)
    for given, null in (({"text": rows}, {"text": torch.zeros(5)}), (rows, torch.zeros(5))):
        table = table_of(given, null, call)
        passes = Passes(Short(), TWO, call, labelled=False, table=table)
        dropped = int(table.drop_rows(torch.tensor([3])))
        passes(X, torch.tensor([0, dropped, 2, 1]), t=T, r=R)
    expected = torch.stack([rows[0], torch.zeros(5), rows[2], rows[1]])
    assert torch.equal(seen[0][0], T)
    assert torch.equal(seen[0][1], R)
    assert torch.equal(seen[0][2]["text"], expected)
    assert torch.equal(seen[1][2], expected)
    Passes(Short(), TWO, call, labelled=True)(X, C, t=T, r=R)
    assert seen[2][2] is C


def test_a_function_of_ones_own_gets_the_times_in_one_order_whichever_way_they_are_given() -> None:
    seen: list[tuple[Tensor, ...]] = []

    def call(net: nn.Module, x: Tensor, t: Tensor, r: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        seen.append((t, r))
        return x, x

    passes = Passes(nn.Module(), TWO, call, labelled=False)
    passes(X, C, t=T, r=R)
    passes(X, C, r=R, t=T)
    for t, r in seen:
        assert torch.equal(t, T)
        assert torch.equal(r, R)


def test_an_argument_without_a_null_keeps_its_row() -> None:
    table = ConditionTable(
        {"text": torch.ones(3, 2), "size": torch.tensor([5.0, 6.0, 7.0]), "mask": torch.ones(3, dtype=torch.bool)},
        {"text": torch.zeros(1, 2)},
    )
    dropped = table.drop_rows(torch.tensor([2, 1]))
    taken = table.take(torch.tensor([int(dropped[0]), 1, int(dropped[1])]))
    assert taken["text"].tolist() == [[0, 0], [1, 1], [0, 0]]
    assert taken["size"].tolist() == [7, 6, 6]
    assert taken["mask"].all()
    assert table.to_float64().rows["text"].dtype == torch.float64
    assert table.to_float64().rows["mask"].dtype == torch.bool


class Output:
    """As diffusers return it."""

    def __init__(self, sample: Tensor) -> None:
        self.sample = sample


STACKED = torch.cat([X, 2 * X], 1)


@pytest.mark.parametrize(
    "returned",
    [(X, 2 * X), [X, 2 * X], STACKED, (STACKED,), Output(STACKED), ((X, 2 * X),)],
    ids=["tuple", "list", "stacked", "tuple of one", "sample", "nested"],
)
def test_heads_come_in_any_of_these(returned: object) -> None:
    v, u = heads_of(returned, X, TWO, "Net")
    assert torch.equal(v, X)
    assert torch.equal(u, 2 * X)


def test_one_head_may_be_the_tensor_itself() -> None:
    (v,) = heads_of(X, X, Needs(heads=("v",)), "Net")
    assert v is X
    v, gauge = heads_of((X, T), X, Needs(heads=("v",), gauges=("w",)), "Net")
    assert gauge is T


WRONG = {
    "returned (4, 3, 2); this objective needs 2 outputs, v, u: a tuple of (4, 3, 2), (4, 3, 2), or one": X,
    "returned (4, 3, 2), (4, 6, 2); this": (X, STACKED),
    "returned (4, 3, 2), (4, 3, 2), (4, 3, 2); this": (X, X, X),
    "returned (4, 3, 2), NoneType; this": (X, None),
    "returned nothing; this": (),
    "returned a dict: return its heads, v, u, as a tuple": {"v": X, "u": X},
    "returned a NoneType": None,
}


@pytest.mark.parametrize("line", WRONG)
def test_other_outputs_are_refused_with_their_shapes(line: str) -> None:
    with pytest.raises(UserError) as refused:
        heads_of(WRONG[line], X, TWO, "Net")
    assert str(refused.value).startswith(f"Net {line}")


class NoTime(nn.Module):
    def forward(self, x: Tensor, emb: Tensor, who: Tensor) -> Tensor:
        return x


class NoEnd(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x


def test_what_forward_does_not_take_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"NoTime.forward\(x, emb, who\) has no argument with a name of a time"):
        Signature.of(NoTime())
    signature = Signature.of(NoEnd())
    assert signature is not None
    signature.require(Needs(), classes=False)
    with pytest.raises(UserError, match=r"NoEnd.forward has no second time.* x, t, r, c: net"):
        signature.require(TWO, classes=False)
    with pytest.raises(UserError, match=r"NoEnd.forward has no argument w, which"):
        signature.require(Needs(knobs={"w": 1.0}), classes=False)
    with pytest.raises(UserError, match=r"NoEnd.forward has no argument for a class .* or leave out classes="):
        signature.require(Needs(), classes=True)


class Draws(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + torch.rand(4, 3, 2)


def test_what_a_network_draws_is_of_the_key_and_generators_stay() -> None:
    net, needs = Draws(), Needs()
    before = generator_states(X.device)
    passes = Passes(net, needs, Signature.of(net), labelled=False, key=7)
    other = Passes(net, needs, Signature.of(net), labelled=False, key=8)
    (first,) = passes(X, C, t=T)
    with torch.no_grad():
        (again,) = passes.with_net(net)(X, C, t=T)
    assert torch.equal(first, again)
    assert not torch.equal(first, other(X, C, t=T)[0])
    assert generator_states(X.device) == before
    with seeded_generators(7, X.device):
        drawn = torch.rand(4, 3, 2)
    assert torch.equal(first, X + drawn)


def test_without_a_key_it_draws_from_the_callers() -> None:
    net = Draws()
    before = generator_states(X.device)
    Passes(net, Needs(), Signature.of(net), labelled=False)(X, C, t=T)
    assert generator_states(X.device) != before


def test_passes_without_gradients_go_past_what_wraps_the_network() -> None:
    net = NoEnd()
    wrapped = AveragedModel(net)
    calls: list[nn.Module] = []
    wrapped.register_forward_hook(lambda module, *_: calls.append(module))
    passes = Passes(wrapped, Needs(), Signature.of(net), labelled=False)
    passes(X, C, t=T)
    assert len(calls) == 1
    with torch.no_grad():
        passes(X, C, t=T)
    assert len(calls) == 1
    assert unwrap(wrapped) is wrapped.module
    assert passes.call_description == "net(x, t=)"
