"""Dual numbers: that a tangent comes once, of the right shape and unrecorded, now or later, and is let go again."""

import gc
import threading
import weakref
from collections.abc import Callable
from copy import deepcopy
from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import checkpoint

import dumo.autodiff.rule  # noqa: F401, the operations of a Dual
from dumo.autodiff.dual import Dual, accept_duals, carry, pair, primal, primal_only, tangent
from dumo.autodiff.tape import DeferredTangent, ModifiedInPlace, evaluate, is_complete
from dumo.types import Array

calls: list[str] = []


def double(dx: Tensor, name: str = "", *saved: object) -> Tensor:
    """A push that notes its name."""
    calls.append(name)
    return 2 * dx


def total(da: Tensor, db: Tensor, name: str) -> Tensor:
    calls.append(name)
    return da + db


@pytest.fixture(autouse=True)
def forget() -> None:
    calls.clear()


def later(x: Tensor) -> Array:
    """A Dual whose tangent is set by hand."""
    return pair(x, DeferredTangent(x.shape, x.dtype))


def along(f: Callable[[Array], Array], p: Tensor, d: Tensor, late: bool) -> tuple[Tensor, Tensor]:
    """f of p and its tangent along d, which is known at once, or once f is over."""
    x = later(p) if late else pair(p, d)
    y = f(x)
    if late:
        x.t.value = d
        evaluate([y.t])
    return y.p, y.t.value if late else y.t


each_way = pytest.mark.parametrize("late", [False, True])


def ends(*heads: Array) -> list[DeferredTangent]:
    return [head.t for head in heads]


def diamond() -> tuple[Array, list[DeferredTangent]]:
    """a feeds b and c, which feed d; b feeds e too."""
    x, p = later(torch.ones(3)), torch.ones(3)
    a = carry(p, double, (x,), "a")
    b, c = carry(p, double, (a,), "b"), carry(p, double, (a,), "c")
    return x, ends(carry(p, total, (b, c), "d"), carry(p, double, (b,), "e"), a)


# Carry.


def test_one_late_operand_makes_the_outcome_late() -> None:
    x, y = pair(torch.ones(3), torch.full((3,), 5.0)), later(torch.ones(3))
    z = carry(torch.ones(3), total, (x, y), "sum")
    assert calls == []
    y.t.value = torch.arange(3.0)
    evaluate([z.t])
    assert torch.equal(z.t.value, torch.tensor([5.0, 6.0, 7.0]))


@each_way
def test_a_tangent_has_shape_and_dtype_of_its_primal(late: bool) -> None:
    """Where only a column moves, where the primal was promoted, and where a sharded module cast it on its way in."""
    w = torch.randn(4, 3, dtype=torch.float64)
    for p in (torch.randn(4, 1), torch.randn(4, 1).bfloat16()):
        d = torch.randn(4, 1)
        y, t = along(lambda x: x + w, p, d, late)
        assert (t.shape, t.dtype) == (y.shape, y.dtype) == ((4, 3), torch.float64)
        assert torch.equal(t, d.to(p.dtype).double().expand(4, 3))


@each_way
def test_a_primal_that_was_cast_takes_its_tangent_along(late: bool) -> None:
    """A sharded module replaces the tensors of a dataclass, each for itself, by those of its precision."""

    def cast(x: Array) -> Array:
        x.p = x.p.bfloat16()
        return F.linear(x, torch.randn(3, 4).bfloat16())

    assert along(cast, torch.randn(2, 4), torch.randn(2, 4), late)[1].dtype == torch.bfloat16


@each_way
def test_tangents_are_never_recorded(late: bool) -> None:
    """Though everything in sight asks for gradients, and gradients are on."""
    w, d = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    p = torch.randn(2, 4, requires_grad=True)
    y, t = along(lambda x: F.gelu(F.linear(x, w)) * x.sum(-1, keepdim=True), p, d, late)
    assert y.requires_grad
    assert not t.requires_grad
    y.sum().backward()
    assert d.grad is None
    assert p.grad is not None


def test_what_is_kept_for_later_holds_no_graph() -> None:
    p, w = torch.randn(2, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    y = later(p) * w
    assert not any(x.requires_grad for x in y.t.saved if isinstance(x, Tensor))
    assert any(isinstance(x, Tensor) and x.data_ptr() == w.data_ptr() for x in y.t.saved)


# Play.


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_play_computes_each_once_in_any_order(order: tuple[int, ...]) -> None:
    x, last = diamond()
    x.t.value = torch.tensor([1.0, 2.0, 3.0])
    evaluate([last[i] for i in order])
    assert sorted(calls) == ["a", "b", "c", "d", "e"]
    for end, factor in zip(last, (8, 8, 2), strict=True):
        assert torch.equal(end.value, factor * x.t.value)


def test_play_computes_what_is_asked_for_alone() -> None:
    x, last = diamond()
    x.t.value = torch.ones(3)
    evaluate(last[2:])
    assert calls == ["a"]
    evaluate(last[1:2])
    assert calls == ["a", "b", "e"]
    evaluate(last)
    assert sorted(calls) == ["a", "b", "c", "d", "e"]


@pytest.mark.slow
def test_play_lets_go_of_what_it_has_used() -> None:
    """Of saved tensors, and of tangents in between."""
    x, w = later(torch.ones(3)), torch.full((3,), 2.0)
    y = x * w
    z = y.sin()
    middle = weakref.ref(y.t)
    kept = [weakref.ref(s) for s in y.t.saved if isinstance(s, Tensor)]
    assert len(kept) == 1
    del y
    gc.collect()
    assert kept[0]() is not None
    x.t.value = torch.ones(3)
    evaluate([z.t])
    assert kept[0]() is None
    assert middle() is None
    assert torch.allclose(z.t.value, 2 * torch.full((3,), 2.0).cos())


def test_play_goes_deeper_than_the_stack_of_python() -> None:
    x = later(torch.zeros(2, dtype=torch.float64))
    y = x
    for _ in range(2500):
        y = y * 1.001 + 1  # two operations
    x.t.value = torch.ones(2, dtype=torch.float64)
    assert is_complete([y.t])
    evaluate([y.t])
    assert torch.allclose(y.t.value, torch.full((2,), 1.001**2500, dtype=torch.float64), rtol=1e-11)


def test_an_input_without_a_direction_is_an_error() -> None:
    y = later(torch.ones(2)) * 2
    with pytest.raises(AssertionError, match="no tangent"):
        evaluate([y.t])


# Holds.


def test_holds_sees_weights_that_were_given_back() -> None:
    """As a sharded module does after its pass: the storage is emptied, the tensor lives."""
    w, x = torch.randn(3, 4), later(torch.randn(2, 4))
    y = F.gelu(F.linear(x, w))
    z = y * torch.zeros(0, 2, 3).sum()  # empty tensors have no storage, and miss none
    assert is_complete([y.t, z.t])
    size = w.untyped_storage().size()
    w.untyped_storage().resize_(0)
    assert not is_complete([y.t])
    assert not is_complete([z.t, x.t])
    assert is_complete([x.t])
    w.untyped_storage().resize_(size)
    assert is_complete([y.t])


@pytest.mark.parametrize("f", [lambda x, w: x * w, lambda x, w: F.linear(x, w), lambda x, w: (x * w).sin()])
def test_what_was_written_to_is_not_played(f: Callable[[Array, Tensor], Array]) -> None:
    """The tape would take the new numbers for the old: silently wrong."""
    w, x = torch.randn(4, 4), later(torch.randn(4, 4))
    y = f(x, w)
    assert is_complete([y.t])
    w[0] = 0
    with pytest.raises(ModifiedInPlace, match="modified in place"):
        is_complete([y.t])


@pytest.mark.parametrize("f", [lambda x, i: x[i], lambda x, i: x[:, i], lambda x, i: x.index_select(1, i)])
def test_an_index_that_was_written_to_is_not_played(f: Callable[[Array, Tensor], Array]) -> None:
    i, x = torch.arange(4), later(torch.randn(4, 4))
    y = f(x, i)
    assert is_complete([y.t])
    i.zero_()
    with pytest.raises(ModifiedInPlace, match="modified in place"):
        is_complete([y.t])


# Assignment.


def test_what_was_computed_before_an_assignment_stays() -> None:
    """On the tape, too, which needs the old numbers; and under every name the Dual has the new ones."""
    p, d = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)

    def f(x: Array) -> tuple[Array, Array]:
        q = 2 * x
        before, other = q.sin(), q.to(q.dtype).contiguous()
        q[1:] = q[:2] * q[0]
        return before, other

    _, slopes = torch.func.jvp(f, (p,), (d,))
    x = later(p)
    rode, taped = f(pair(p, d)), f(x)
    x.t.value = d
    assert is_complete(ends(*taped))
    evaluate(ends(*taped))
    for a, b, plain, slope in zip(rode, taped, f(p), slopes, strict=True):
        assert torch.equal(a.p, plain)
        assert torch.equal(b.p, plain)
        assert torch.allclose(a.t, slope, rtol=1e-14)
        assert torch.allclose(b.t.value, slope, rtol=1e-14)


# Primal only.


def test_inside_primal_only_nothing_moves() -> None:
    x = pair(torch.ones(2), torch.ones(2))
    with primal_only():
        y = x * 2
        with primal_only():
            assert type(x + 1) is Tensor
        assert type(F.layer_norm(x, (2,))) is Tensor
        assert type(F.layer_norm(y, (2,))) is Tensor
    assert type(y) is Tensor
    assert isinstance(x * 2, Dual)


def test_primal_only_is_of_one_thread() -> None:
    """A backward pass recomputes in a thread of its own, while another rank of threads may be in its forward pass."""
    x, inside, found = pair(torch.ones(2), torch.ones(2)), threading.Event(), list[Array]()
    done = threading.Event()

    def recompute() -> None:
        with primal_only():
            inside.set()
            done.wait(10)
            found.append(x * 2)

    thread = threading.Thread(target=recompute)
    thread.start()
    inside.wait(10)
    here = x * 2
    done.set()
    thread.join()
    assert isinstance(here, Dual)
    assert type(found[0]) is Tensor


# The type.


def test_a_dual_is_an_object_of_two_tensors() -> None:
    """Copied and hashed as such; what no tensor has, it has not."""
    p = torch.randn(2, 3, requires_grad=True)
    x = pair(p, torch.zeros(2, 3))
    assert primal(x) is p
    assert tangent(x) is x.t
    assert (primal(3), tangent(p)) == (3, None)
    twin = deepcopy(pair(torch.ones(2), torch.zeros(2)))
    assert torch.equal(twin.p, torch.ones(2))
    assert len({x, twin, x}) == 2
    assert not hasattr(x, "nothing_of_the_kind")
    assert not hasattr(x, "__nothing__")


@each_way
@pytest.mark.parametrize("f", [lambda x: x[0], lambda x: sum(x), lambda x: torch.stack(list(x)), lambda x: [*x][-1]])
def test_a_dual_is_walked_row_by_row(f: Callable[[Array], Array], late: bool) -> None:
    p, d = torch.randn(3, 2), torch.randn(3, 2)
    y, t = along(f, p, d, late)
    assert torch.equal(y, f(p))
    assert torch.equal(t, f(d))


def test_a_checkpoint_sees_the_device_of_a_dual() -> None:
    accept_duals()
    x = torch.empty(1, device="meta")
    assert checkpoint._infer_device_type(pair(x, None)) == "meta"
    assert checkpoint._infer_device_type(x, None) == "meta"
    assert checkpoint.get_device_states(pair(torch.empty(1), None)) == ([], [])
