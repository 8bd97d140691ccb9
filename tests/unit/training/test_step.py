"""A step is the gradient of the mean loss, however the batch is cut; and one that would do harm is skipped."""

import math
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.overrides import TorchFunctionMode

from dumo.flow.module import Flow
from dumo.flow.noisy_batch import draw
from dumo.flow.path import Linear
from dumo.training.ema import Ema, PowerEma
from dumo.training.metrics import MAX_LISTED_ROWS, Skipped, StepMetrics
from dumo.training.micro_batch import rows_of_rank
from dumo.training.optim import AdamW
from dumo.training.settings import Train
from dumo.training.state import State, begin
from dumo.types import Frozen, Net, NoisyBatch, Terms, Time, TimeLaw, frozen
from trained import ToyTrainer
from unit.training.toy import AVERAGES, CLASSES, Small, Toy, batches, flow_of, same, tensors, toy, trained

STEPS = 9


def step(state: State, objective: Toy | None = None, batch: int = 12, lr: float = 1e-2, **more: object) -> StepMetrics:
    fields = {"steps": STEPS, "batch": batch, "optimizer": AdamW(lr=lr), "ema": AVERAGES} | more
    spec = Train.model_validate(fields)
    flow = flow_of(state, spec, objective or Toy(), Linear(), CLASSES)
    some = batches(batch, next(state.net.parameters()).dtype)(state.step)
    return ToyTrainer(state, flow, spec).step(some)


def fresh(dtype: torch.dtype = torch.float64, seed: int = 0) -> State:
    return begin(Small(seed, dtype=dtype), Train(steps=STEPS, batch=12, ema=AVERAGES))


def noised(batch: int = 12, seed: int = 0, at: int = 0) -> NoisyBatch:
    x, c = batches(batch)(at)
    null = torch.full_like(c, CLASSES)
    return draw(Toy(), Linear(), x, c, null, seed=seed, step=at, progress=at / STEPS)


def test_the_gradient_of_the_mean_loss() -> None:
    state, twin, b = fresh(), Small(), noised()
    terms = Toy().loss(twin, frozen(twin), b)
    terms.loss.mean().backward()
    state.net.eval()
    record = step(state)
    for mine, other in zip(state.net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-14)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in twin.parameters() if p.grad is not None))
    assert record.grad_norm == pytest.approx(norm, rel=1e-12)
    assert record.loss == pytest.approx(terms.loss.mean().item(), rel=1e-12)
    assert record.parts == pytest.approx({name: part.mean().item() for name, part in terms.parts.items()}, rel=1e-12)
    assert record.row().keys().isdisjoint({"received_signal", "due", "skipped"})
    assert state.net.training
    assert not any(average.module.training for average in state.averages.values())


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("rows", [6, 5, 3, 1])
def test_any_split_is_the_whole_batch(dtype: torch.dtype, close: float, rows: int) -> None:
    whole, split = fresh(dtype), fresh(dtype)
    for _ in range(3):
        one, many = step(whole), step(split, micro_batch=rows)
        assert many.loss == pytest.approx(one.loss, rel=10 * close)
        assert many.grad_norm == pytest.approx(one.grad_norm, rel=10 * close)
        assert many.counts == one.counts
    skip = {name for name in tensors(whole) if name.endswith("passes")}  # a split makes more passes
    for name, value in tensors(whole).items():
        if name not in skip:
            torch.testing.assert_close(tensors(split)[name], value, rtol=0, atol=close)


def test_only_averages_walk_over_modules_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first step. A pretrained model has thousands of modules."""
    spec = Train(steps=STEPS, batch=12, ema=())
    state = begin(Small(), spec)
    trainer = ToyTrainer(state, flow_of(state, spec, Toy(), Linear(), CLASSES), spec)
    some = batches(12, torch.float64)(0)
    trainer.step(some)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a step walks over all modules")

    for name in ("train", "named_parameters", "named_modules"):
        monkeypatch.setattr(torch.nn.Module, name, refuse)
    trainer.step(some)


def test_bins_are_means_by_time() -> None:
    state, b = fresh(), noised(40)
    terms = Toy().loss(state.net, frozen(state.net), b)
    record = step(state, batch=40, micro_batch=14)
    assert sum(record.counts) == 40
    assert 0 in record.counts or min(record.counts) > 0
    for name, value in {"loss": terms.loss, **terms.parts}.items():
        for i, (mean, count) in enumerate(zip(record.bins[name], record.counts, strict=True)):
            rows = (b.t >= i / 10) & (b.t < (i + 1) / 10)
            assert count == rows.sum()
            assert mean == pytest.approx(value[rows].mean().item(), rel=1e-12, nan_ok=True)
        sums = (m * n for m, n in zip(record.bins[name], record.counts, strict=True) if n)
        assert sum(sums) / 40 == pytest.approx(value.mean().item())


def test_notes_are_logged_as_parts_are_and_move_nothing() -> None:
    noted = toy(lambda terms, b: Terms(terms.loss, terms.parts, {"late": b.t.square().float()}))
    plain, noting, t = fresh(), fresh(), noised(40).t
    one, record = step(plain, batch=40), step(noting, noted, batch=40, micro_batch=None)
    assert same(tensors(plain), tensors(noting))
    assert (one.notes, one.bins.keys()) == ({}, {"loss", "v", "pull"})
    assert record.notes == pytest.approx({"late": t.square().mean().item()}, rel=1e-6)
    assert record.parts == one.parts
    assert record.bins["late"][4] == pytest.approx(t[(t >= 0.4) & (t < 0.5)].square().mean().item(), rel=1e-6)
    cut = step(fresh(), noted, batch=40, micro_batch=14)
    assert cut.bins["late"] == pytest.approx(record.bins["late"], nan_ok=True)


class Ends(TimeLaw):
    """Times at both ends of the range, where a bin is easily missed."""

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """0, 1, 0, 1 ..."""
        return (t := torch.arange(n, dtype=torch.float64) % 2), t


def test_bins_hold_both_ends() -> None:
    record = step(fresh(), Toy(times=Ends()))
    assert record.counts == [6, 0, 0, 0, 0, 0, 0, 0, 0, 6]
    assert [math.isnan(mean) for mean in record.bins["v"]] == [False, *[True] * 8, False]


class Broken(Toy):
    """Not finite at late times: the loss, a part of it at early ones as well, or the gradient, at any."""

    how: str

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        terms, late, early = super().loss(net, ref, b), b.t > 0.6, b.t < 0.2
        if self.how == "gradient":  # sqrt(0) is 0, with an infinite slope
            (v_hat,) = net(b.x_t, b.c, t=b.t)
            return Terms(terms.loss + (v_hat - v_hat).abs().sum(1).sqrt(), terms.parts)
        loss = terms.loss.where(~late, math.inf)
        return Terms(loss, terms.parts | ({"pull": b.t.where(~early, math.nan)} if self.how == "part" else {}))


def untouched(before: dict[str, Tensor], state: State) -> bool:
    """Whether weights, moments and averages are, bit for bit, what they were; the net counts its passes."""
    return same(*({k: v for k, v in of.items() if not k.endswith("passes")} for of in (before, tensors(state))))


@pytest.mark.parametrize("how", ["loss", "part", "gradient"])
def test_what_is_not_finite_is_counted_and_not_applied(how: str) -> None:
    state = trained()
    before, lr, trend = tensors(state), state.optimizer.param_groups[0]["lr"], state.trend
    record = step(state, Broken(how=how), lr=0.5, clip=1.0)
    assert untouched(before, state)
    assert (state.step, state.images, state.optimizer.param_groups[0]["lr"]) == (4, 48, lr)
    assert (state.skips, state.trend) == (1, trend)

    t, (_, c) = noised(at=3).t, batches()(3)
    places = {"loss": t > 0.6, "part": (t > 0.6) | (t < 0.2), "gradient": t >= 0}[how].nonzero().flatten().tolist()
    what = {"loss": "loss", "part": "loss, pull", "gradient": "the gradient norm"}[how]
    named = [{"t": t[i].item(), "class": int(c[i]), "place": i, "rank": 0} for i in places]
    extent = (t[places].min().item(), t[places].max().item())
    assert record.skipped == Skipped(what, len(places), 12, extent, [] if how == "gradient" else named)
    assert record.row()["skipped"]["count"] == len(places)

    assert math.isfinite(step(state).loss)  # and the run goes on, with the batch of the step after
    assert (state.step, state.skips) == (5, 0)


def test_steps_after_a_skipped_one_do_not_depend_on_it() -> None:
    """They have their own numbers: a run that was put there without that step makes the same."""
    skipped, put = trained(), trained()
    step(skipped, Broken(how="loss"))
    put.step, put.images = 4, 48
    assert step(skipped).loss == step(put).loss
    assert untouched(tensors(skipped), put)
    many = step(fresh(), Broken(how="loss"), batch=96).skipped
    assert many
    assert many.count > MAX_LISTED_ROWS == len(many.rows)


@pytest.mark.parametrize("place", [3, -1])
def test_a_number_of_another_rank_skips_the_step_here(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss, or the norm that it has: what is agreed is a mean over ranks."""

    def mean(numbers: Tensor) -> Tensor:
        other = numbers.clone()
        other[place] = math.nan
        return (numbers + other) / 2

    state = trained()
    before = tensors(state)
    monkeypatch.setattr("dumo.training.metrics.dist.mean", mean)
    assert step(state).skipped
    assert untouched(before, state)


class Waits(TorchFunctionMode):
    """Counts what would wait for a device: a number or a tensor that goes to the host, and shapes that hang on one."""

    NAMES = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "nonzero", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, f: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        if (name := getattr(f, "__name__", "")) in self.NAMES:
            self.seen.append(name)
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize("more", [{}, {"clip": 1.0, "micro_batch": 3}])
def test_a_step_waits_for_its_device_once(more: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """For its record; what is drawn on the host is no matter of it."""
    state, spec = fresh(), Train.model_validate({"steps": STEPS, "batch": 12} | more)
    state.optimizer = torch.optim.SGD(state.net.parameters(), lr=1.0)  # others keep their step on the host
    drawn = iter([noised()[rows] for rows in rows_of_rank(spec, Toy())[1]])
    monkeypatch.setattr(Flow, "add_noise", lambda *_, **__: next(drawn))
    with Waits() as waits:
        assert step(state, **more).step == 1
    assert waits.seen == ["tolist"]


def test_a_part_outside_the_loss_may_be_broken() -> None:
    watched = toy(lambda terms, b: Terms(terms.loss, terms.parts | {"watched": torch.full_like(b.t, math.nan)}))
    assert math.isnan(step(fresh(), watched).parts["watched"])


def test_clip_bounds_the_gradient() -> None:
    free, loose, tight = fresh(), fresh(), fresh()
    norm = step(free).grad_norm
    assert step(loose, clip=2 * norm).grad_norm == norm
    assert same(tensors(free), tensors(loose))
    assert step(tight, clip=norm / 10).grad_norm == norm
    clipped = torch.cat([p.grad.flatten() for p in tight.net.parameters() if p.grad is not None])
    assert clipped.norm().item() == pytest.approx(norm / 10, rel=1e-4)


def test_the_step_number_draws_anew() -> None:
    state, times = fresh(), toy(lambda terms, b: Terms(b.t + 0 * terms.loss))
    assert step(state, times).loss != step(state, times).loss


def test_bf16_computes_low_and_keeps_high() -> None:
    low, high = fresh(torch.float32), fresh(torch.float32)
    seen: list[torch.dtype] = []
    low.net.get_submodule("last").register_forward_hook(lambda *a: seen.append(a[2].dtype))
    rough, exact = step(low, precision="bf16"), step(high)
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for name, value in tensors(low).items() if "passes" not in name} == {torch.float32}
    assert rough.loss != exact.loss
    assert rough.loss == pytest.approx(exact.loss, rel=0.02)
    assert rough.grad_norm == pytest.approx(exact.grad_norm, rel=0.05)


def test_bf16_keeps_the_gradient_where_the_reference_passes_first() -> None:
    class First(Toy):
        """theta^- runs before the net, so autocast casts the weights without gradients first."""

        def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
            ref(b.x_t, b.null, t=b.t)
            return super().loss(net, ref, b)

    assert step(fresh(torch.float32), First(), precision="bf16").grad_norm > 0.1


@pytest.mark.parametrize("average", [Ema(decay=0.99), PowerEma(std=0.1)])
def test_update_n_of_an_average_is_that_of_step_n(average: Ema | PowerEma) -> None:
    state = begin(Small(), Train(steps=STEPS, batch=12, ema=(average,)))
    expected = state.net.get_parameter("last.bias").detach().clone()
    for n in range(1, 5):
        step(state, ema=(average,))
        expected.lerp_(state.net.get_parameter("last.bias").detach(), 1 - average(n))
    found = state.averages[average.key].module.get_parameter("last.bias")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_trend_is_that_of_the_parts() -> None:
    """A loss that is weighted by its own size says nothing of the error."""
    state, weighted = fresh(), toy(lambda terms, b: Terms(terms.loss / terms.loss.detach(), terms.parts))
    record = step(state, weighted)
    assert record.loss == pytest.approx(1)
    assert state.trend.level == pytest.approx(sum(record.parts.values()))
