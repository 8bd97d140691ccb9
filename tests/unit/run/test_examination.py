"""A slope that is the derivative passes, one that is not is refused, and training does not notice the examination."""

import copy
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from contract.case import kind, members
from dumo.autodiff import float64
from dumo.config.spec import Run
from dumo.flow.slope import Along, CentralSlope, JvpSlope, Slope
from dumo.plan import preflight
from dumo.run import examination
from dumo.run.resolve import resolve
from dumo.run.weights import build
from dumo.training import checkpoint
from dumo.types import Cond, Frozen, Heads, Net, Objective, Sample, Spec, Time, UserError
from trained import train
from unit.run import known

CPU = torch.device("cpu")
POINTS = ("moons", "moons-meanflow")


class Skewed(JvpSlope):
    """Right but for a factor on one head: always, or only where it is used one way."""

    factor: float = 1.1
    head: int = -1
    known: bool | None = None  # the direction, before the pass

    def __call__(
        self, net: Net, ref: Frozen, x: Sample, c: Cond, *, t: Time, direction: Sample | None = None, **rest: Time
    ) -> tuple[Heads, Along]:
        heads, along = super().__call__(net, ref, x, c, t=t, **rest)
        wrong = self.known in (None, direction is not None)

        def skewed(w: Sample) -> Heads:
            found = list(along(w))
            found[self.head] = found[self.head] * (self.factor if wrong else 1)
            return tuple(found)

        return heads, skewed


class Careless(CentralSlope):
    """A difference that is taken in any precision."""

    def check(self, precision: str, time_scale: float = 1.0) -> None:
        """Refuses nothing."""


def tiny(name: str = "moons", *more: str) -> Run:
    """A recipe made small; with the exact slope of torch."""
    return known.tiny(name, "net.width=16", "net.depth=3", "train.log_every=1", "objective.slope.kind=jvp", *more)


def sloped(run: Run, slope: Spec, **net: float) -> Run:
    """The run with another slope and net, which nobody has looked at."""
    return run.model_copy(
        update={"objective": run.objective.model_copy(update={"slope": slope}), "net": run.net.model_copy(update=net)}
    )


@pytest.mark.slow
@pytest.mark.parametrize("ref", ["self", "0.999"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("slope", members(Slope), ids=kind)
@pytest.mark.parametrize("name", ["moons-meanflow", "digits"])
def test_every_slope_passes_where_it_is_not_refused(name: str, slope: type[Spec], precision: str, ref: str) -> None:
    words = [f"objective.slope.kind={kind(slope)}", f"train.precision={precision}", f"train.ref={ref}"]
    words += ["net.attention=2"] if name.startswith("digits") else []
    if precision == "bf16" and slope is CentralSlope:
        with pytest.raises(UserError):
            resolve(tiny(name, *words))
        return
    run = tiny(name, *words)
    for found in (examination.examine(run, CPU), examination.examine_weights(run, build(run), CPU)):
        found.require()
        assert (found.slope, found.precision, found.time_scale) == (kind(slope), precision, run.net.time_scale)
        assert tuple(found.errors) == run.objective.needs.heads
        assert found.passed
        assert max(found.errors.values()) < (0.02 if precision == "bf16" else 1e-3)


@pytest.mark.parametrize("name", POINTS)
def test_ten_percent_are_found(name: str) -> None:
    found = examination.examine(sloped(tiny(name), Skewed()), CPU)
    assert [*found.errors.values()][-1] == pytest.approx(0.1, rel=1e-3)
    assert not found.passed
    assert not examination.examine(sloped(tiny(name), Skewed(factor=1.04)), CPU).passed
    assert examination.examine(sloped(tiny(name), Skewed(factor=1.005)), CPU).passed


WRONG = [
    *(Skewed(head=k) for k in (0, 1)),
    *(Skewed(known=k) for k in (True, False)),
    *(Skewed.model_construct(factor=factor) for factor in (float("nan"), float("inf"), -1.0, 0.0)),
]


@pytest.mark.parametrize("slope", WRONG, ids=repr)
def test_each_head_and_either_use_counts_and_no_number_is_no_derivative(slope: Skewed) -> None:
    with pytest.raises(UserError):
        examination.examine(sloped(tiny(), slope), CPU).require()


@pytest.mark.parametrize(
    ("slope", "precision", "scale"),
    [
        (Careless(), "bf16", 1.0),  # the paper's difference, under autocast
        (CentralSlope(), "fp32", 1000.0),  # the time embedding of image models
        (CentralSlope(h=1e-7), "fp32", 1.0),  # rounding
    ],
    ids=["bf16", "time_scale", "h"],
)
@pytest.mark.parametrize("name", ["moons-meanflow", "digits"])
def test_differences_that_are_no_derivatives(name: str, slope: CentralSlope, precision: str, scale: float) -> None:
    heads = ["net.attention=2"] if name == "digits" else []
    run = sloped(tiny(name, f"train.precision={precision}", *heads), slope, time_scale=scale)
    found = examination.examine(run, CPU)
    assert min(found.errors.values()) > 2 * found.limit
    with pytest.raises(UserError) as refused:
        found.require()
    said = str(refused.value)
    for part in ("slope 'central'", f"precision {precision}", f"time_scale {scale:g}", "%", "limit 5 %", "kind=dual"):
        assert part in said
    assert ("train.precision=fp32" in said) == (precision == "bf16")


def test_a_fresh_net_would_pass_anything() -> None:
    run = sloped(tiny(), Skewed(factor=100.0))
    net = build(run)
    assert examination.examine_weights(run, net, CPU).passed  # its heads are zero, and so are their derivatives
    assert not examination.examine(run, CPU).passed
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    assert not examination.examine_weights(run, net, CPU).passed


def test_where_the_derivative_is_zero_the_error_is_absolute() -> None:
    class Shifted(JvpSlope):
        by: float

        def __call__(
            self, net: Net, ref: Frozen, x: Sample, c: Cond, *, t: Time, direction: Sample | None = None, **rest: Time
        ) -> tuple[Heads, Along]:
            heads, along = super().__call__(net, ref, x, c, t=t, **rest)
            return heads, lambda w: tuple(slope + self.by / slope.numel() ** 0.5 for slope in along(w))

    for by, passed in ((0.0, True), (0.9e-7, True), (1.1e-6, False)):
        run = sloped(tiny(), Shifted(by=by))
        assert examination.examine_weights(run, build(run), CPU).passed == passed


@pytest.mark.parametrize(("ref", "own"), [("self", True), ("0.999", False)])
def test_the_slope_sees_theta_minus_as_training_shows_it(ref: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    same: list[bool] = []
    real = JvpSlope.__call__

    def watch(self: JvpSlope, net: Net, ref: Frozen, *args: Tensor, **inputs: Tensor) -> tuple[Heads, Along]:
        same.append(ref.module is net)
        return real(self, net, ref, *args, **inputs)

    monkeypatch.setattr(JvpSlope, "__call__", watch)
    examination.examine(tiny("moons", f"train.ref={ref}"), CPU).require()
    assert same == [own, own]


def test_labels_are_in_range_and_keyed_by_the_seed() -> None:
    run = tiny("digits", "net.attention=2")
    given = run.objective, run.path, run.data
    point = examination.example_point(*given, 0, 128)
    assert set(point.c.tolist()) == set(range(11))  # the null class, too
    assert point.x_t.shape == point.direction.shape == (128, 1, 8, 8)
    assert list(point.inputs) == ["t"]
    assert torch.equal(point.x_t, examination.example_point(*given, 0, 128).x_t)
    assert not torch.equal(point.x_t, examination.example_point(*given, 1, 128).x_t)


def test_times_reach_the_ends() -> None:
    run = tiny("moons-meanflow")
    inputs = examination.example_point(run.objective, run.path, run.data, 0, 4).inputs
    t, r = inputs["t"], inputs["r"]
    assert t.min() > 0
    assert t.max() == t[-1] == 1
    assert (r <= t).all()
    assert (r[0], r[-1]) == (t[0], 0)
    assert len(t.unique()) == 4


def test_examining_leaves_everything_as_it_is() -> None:
    run = tiny("moons-meanflow")
    net = build(run).train()
    x, c, ones = torch.ones(4, 2), torch.zeros(4, dtype=torch.long), torch.ones(4)
    net(x, c, t=ones, r=ones)[0].square().sum().backward()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    state = torch.random.get_rng_state()
    first = examination.examine_weights(run, net, CPU), examination.examine(run, CPU)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(7)
    assert (examination.examine_weights(run, net, CPU), examination.examine(run, CPU)) == first
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for p, grad in zip(net.parameters(), grads, strict=True):
        assert p.grad is None if grad is None else torch.equal(cast(Tensor, p.grad), grad)


def test_float64_of_a_block_at_a_time_has_the_bits_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no more bytes than are counted; the net keeps its weights."""
    run = tiny("digits")
    net = build(run).eval()
    before = {key: (id(p), p.dtype) for key, p in net.named_parameters()}
    point = examination.example_point(run.objective, run.path, run.data, run.train.seed, 2)
    most = watch_float64(monkeypatch)
    ours = float64.exact_derivative(net, point.x_t, point.direction, point.c, **point.inputs)
    assert {key: (id(p), p.dtype) for key, p in net.named_parameters()} == before
    assert max(most) == float64.copied_bytes(net) < float64._bytes_in_float64(net)
    monkeypatch.setattr(float64, "float64_copy", lambda net, device: copy.deepcopy(net).double())
    copied = float64.exact_derivative(net, point.x_t, point.direction, point.c, **point.inputs)
    for our_head, head in zip(ours, copied, strict=True):
        assert torch.equal(our_head, head)


def watch_float64(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let an examination note, whenever it has cast a block, the bytes in memory of their own of the copy it casts."""
    most, copies = list[int](), list[nn.Module]()
    own_copy, own_cast = float64.float64_copy, float64._BlockCast.cast

    def in_float64(net: nn.Module, device: torch.device) -> nn.Module:
        copies.append(own_copy(net, device))
        return copies[-1]

    def cast(self: float64._BlockCast, *given: object) -> None:
        own_cast(self, *given)
        tensors = (*copies[-1].parameters(), *copies[-1].buffers())
        most.append(sum(x.nbytes for x in tensors if x.dtype == torch.float64))

    monkeypatch.setattr(float64, "float64_copy", in_float64)
    monkeypatch.setattr(float64._BlockCast, "cast", cast)
    return most


@pytest.mark.parametrize("ref", ["self", "0.999"])
def test_an_examination_of_the_weights_in_training_copies_none(ref: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny("moons-meanflow", f"train.ref={ref}")
    net = build(run)
    own = examination.slope_errors
    compared: list[nn.Module] = []

    def watch(objective: Objective, net: nn.Module, ref: Frozen, point: examination.ExamplePoint) -> dict[str, Tensor]:
        compared.extend([net, ref.module])
        return own(objective, net, ref, point)

    monkeypatch.setattr(examination, "slope_errors", watch)
    examination.examine_weights(run, net, CPU).require()
    assert (compared[0] is compared[1]) == (ref == "self")
    for module in compared:
        assert module is not net
        assert [*map(id, module.parameters())] == [*map(id, net.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "first"), [(6, 2), (4, 2), (2, 2), (1, 1)])
def test_weights_are_examined_once_at_the_first_checkpoint(
    steps: int, first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[list[str]] = []
    own = examination.examine_weights

    def watch(run: Run, net: nn.Module, device: torch.device) -> examination.Examination:
        saved.append([path.name for path in checkpoint.paths_by_step(tmp_path / "run/checkpoints").values()])
        return own(run, net, device)

    monkeypatch.setattr(examination, "examine_weights", watch)
    train(tiny("moons", f"train.steps={steps}"), tmp_path / "run")
    assert saved == [[]]  # looked at before it is saved
    assert list(checkpoint.paths_by_step(tmp_path / "run/checkpoints"))[-1] == steps
    if steps > first:
        train(tiny("moons", "train.steps=9"), tmp_path / "run")
        assert len(saved) == 1


@pytest.mark.slow
def test_train_stops_at_a_first_checkpoint_with_a_broken_slope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = JvpSlope.__call__

    def late(self: JvpSlope, net: Net, ref: Frozen, x: Sample, c: Cond, **inputs: Tensor) -> tuple[Heads, Along]:
        """Wrong on two rows, which is what the true weights are tried on."""
        heads, along = own(self, net, ref, x, c, **inputs)
        return heads, lambda w: tuple(slope * (1.1 if len(x) == 2 else 1) for slope in along(w))

    monkeypatch.setattr(JvpSlope, "__call__", late)
    run, folder = tiny(), tmp_path / "run"
    for _ in range(2):  # starting again is no way round
        with pytest.raises(UserError):
            train(run, folder)
        assert list(checkpoint.paths_by_step(folder / "checkpoints")) == []  # what was refused is not kept
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no number is null, and a slope that cannot be taken is a finding with its way out."""
    monkeypatch.setattr(preflight, "_describe_environment", dict)
    bad = preflight.check(sloped(tiny(), Skewed.model_construct(factor=float("nan"))))
    (line,) = bad.findings
    assert (bad.is_ok, line.state, bad.to_json()["examination"]["errors"]["u"]) == (False, "failing", None)

    class Refusing(JvpSlope):
        def __call__(self, *_: object, **__: object) -> tuple[Heads, Along]:
            raise UserError("no tangent rule for torch.special.airy_ai")

    refused = preflight.check(sloped(tiny(), Refusing()))
    (line,) = refused.findings
    assert (refused.is_ok, line.state, refused.examination) == (False, "failing", None)
    assert "airy" in line.way
    with pytest.raises(UserError, match="device 'gpu'"):
        preflight.check(tiny(), "gpu")
