"""What is wrong with a network, a loss, data or settings is a line that names it and the way out, before training."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dumo
from contract.own import Numbers, Perceptron, Text, UNet, waves
from dumo.autodiff.dual import Dual
from dumo.flow import condition, derivative, loop
from dumo.flow.check import MAX_DIFFERENCE, try_pass
from dumo.flow.condition import require_data
from dumo.flow.draw import Coupling, path_velocity
from dumo.flow.guide import CFG
from dumo.flow.loop import LoopFlow as Flow
from dumo.flow.passes import Passes
from dumo.flow.path import Linear, Trig
from dumo.flow.signature import Signature
from dumo.objectives import F2D2, Drift, DuMo, FlowMatching, FreeFlow, ImprovedMeanFlow, MeanFlow
from dumo.types import Frozen, Needs, Net, Noised, Terms, UserError, mean_square

TWO = Needs(heads=("v", "u"))
X = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 3
NUMBERS = torch.randn(8, 3, generator=torch.Generator().manual_seed(2))


def points(classes: int = 0) -> nn.Module:
    torch.manual_seed(0)
    return Perceptron(TWO, classes)


class Around(nn.Module):
    """What people put around a network that is right."""

    def __init__(self) -> None:
        super().__init__()
        self.net = points()

    def forward(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401, not always heads
        return self.changed(x, t)

    def changed(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
        return self.net(x, t)


class InHalf(nn.Module):
    """It casts what it gets to bf16, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2, dtype=torch.bfloat16)

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return self.layer(torch.cat([x, t[:, None], r[:, None]], 1).bfloat16()).float()


class HasSelu(nn.Module):
    """An operation that has torch's own derivative, and no rule of dumo's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return nn.functional.selu(self.layer(torch.cat([x, t[:, None], r[:, None]], 1)))


class MixesRows(Around):
    def changed(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
        return self.net(x - x.mean(0), t)


class UsesTheFirstTime(Around):
    def changed(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
        return self.net(x, t[:1].expand(len(t)))


class SpreadsNaN(Around):
    """Other rows are no numbers where the first row of x is another one than at first."""

    first_row: Tensor | None = None

    def changed(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
        if self.first_row is None:
            self.first_row = x[0].clone()
        v, u = self.net(x, t)
        return v, u if torch.equal(x[0], self.first_row) else u * float("nan")


class StartsByData(Around):
    """It notes in a buffer that it had a pass, as layers do that begin with a statistic of the first batch."""

    is_started: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("is_started", torch.tensor(False))

    def changed(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
        self.is_started.fill_(True)
        return self.net(x, t)


class HasNoRoom(Around):
    def changed(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class DrawsOfNumpy(Around):
    def changed(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
        return self.net(x + float(np.random.default_rng().random()), t)


class Counts(Around):
    calls = 0

    def changed(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
        self.calls += 1
        return self.net(x + 0.1 * self.calls, t)


class InPlace(Around):
    def changed(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
        x += 1
        return self.net(x, t)


class DetachesTime(Around):
    def changed(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
        size = (3 * t.detach()).sin()[:, None]
        return [size * head for head in self.net(x, t)]


class FloatsTime(Around):
    def changed(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
        sizes = torch.tensor([[3 * float(s)] for s in t])
        return [sizes * head for head in self.net(x, t)]


class NotFinite(Around):
    def changed(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
        v, u = self.net(x, t)
        return v, u / 0


class Dict(Around):
    def changed(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
        v, u = self.net(x, t)
        return {"v": v, "u": u}


class AddsInPlace(Perceptron):
    def forward(
        self, x: Tensor, t: Tensor, r: Tensor | None = None, y: Tensor | None = None, **knobs: Tensor
    ) -> tuple[Tensor, ...]:
        end = 1 * (t if r is None else r)
        end += 0.1 * x.sum(1)
        return super().forward(x, t, end, y, **knobs)


class JoinsLate(nn.Module):
    """It takes x and times apart, in the types in which they come, or x in 16 bits."""

    def __init__(self, *, casts: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into = nn.Linear(2, 16)
        self.time = nn.Linear(16, 16)
        self.out = nn.Linear(16, 4)
        self.casts = casts

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        if self.casts:
            x = x.bfloat16()
        h = self.into(x) + self.time(waves(t).to(x.dtype))
        return self.out(nn.functional.silu(h)).to(x.dtype).chunk(2, 1)


class Fails(Around):
    def changed(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
        return self.net(x, t[:, None])


class NeedsMore(nn.Module):
    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return x + tokens


class Steep(nn.Module):
    """Waves of up to 1000 radians."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(18, 32), nn.SiLU(), nn.Linear(32, 4))

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return self.net(torch.cat([x, waves(100 * t)], 1)).chunk(2, 1)


class Own(FlowMatching):
    """A loss of somebody's."""

    how: ClassVar[Callable[[Terms, Frozen, Noised], Any]]

    def loss(self, net: Net, ref: Frozen, b: Noised) -> Any:  # noqa: ANN401, not always terms
        return type(self).how(super().loss(net, ref, b), ref, b)


class Drifts(Drift):
    """A drift of somebody's."""

    kind: Literal["drifts"] = "drifts"  # pyright: ignore[reportIncompatibleVariableOverride]


def loses(how: Callable[[Terms, Frozen, Noised], Any]) -> Flow:
    """A flow of such a loss."""
    own = type("Mine", (Own,), {"how": staticmethod(how), "__annotations__": {}})
    return Flow(Perceptron(Needs()), own())


def in_a_column(terms: Terms, *_: object) -> Terms:
    object.__setattr__(terms, "loss", terms.loss[:, None])  # shapes are checked in tests alone
    return terms


def by_ref(_: Terms, ref: Frozen, b: Noised) -> Terms:
    (v,) = ref(b.x_t, b.c, t=b.t)
    return Terms(mean_square(v - b.v_t))


@dataclass(frozen=True)
class Mistake:
    """What is done, and how its line begins and ends."""

    do: Callable[[], object]
    line: str
    way: str = ""


def learns(
    build: Callable[[], nn.Module],
    x: Tensor = X,
    c: Any = None,  # noqa: ANN401
    objective: Any = "dumo",  # noqa: ANN401
    **settings: Any,  # noqa: ANN401
) -> Callable[[], object]:
    """The first loss of a flow of this network."""
    return lambda: dumo.Flow(build(), objective, **settings)(x, c)


def after(
    do: Callable[[Any], object],
    classes: int = 0,
    build: Callable[[int], nn.Module] = points,
    objective: Any = "dumo",  # noqa: ANN401
) -> Callable[[], object]:
    """Something with a flow that has had a first loss."""

    def first_loss_then() -> object:
        flow = dumo.Flow(build(classes), objective, classes=classes)
        flow(X, LABELS if classes else None)
        return do(flow)

    return first_loss_then


def guided_teacher() -> Flow:
    return dumo.Flow(points(3), "flow_matching", classes=3, guide=CFG(scale=2))


NO_MODULE: Any = None
CENTRAL = {"kind": "dumo", "slope": {"kind": "central"}}
ONE_HEAD = Needs(inputs=("t", "r"), heads=("u",))
MISTAKES = {
    # a loss
    "a mean": Mistake(
        lambda: loses(lambda terms, *_: terms.loss.mean())(X),
        "objective 'flow_matching': its loss returned a tensor of shape ()",
        "shape (8,); the trainer takes the mean",
    ),
    "(b, 1)": Mistake(
        lambda: loses(in_a_column)(X),
        "objective 'flow_matching': its loss returned Terms where 'loss' has shape (8, 1)",
        "the trainer takes the mean over rows",
    ),
    "a dict": Mistake(
        lambda: loses(lambda terms, *_: {"loss": terms.loss})(X),
        "objective 'flow_matching': its loss returned a dict: return dumo.types.Terms",
    ),
    "by ref": Mistake(
        lambda: loses(by_ref)(X),
        "objective 'flow_matching': its loss has no gradient: the pass that learns is net(...)",
    ),
    # a network
    "batch norm": Mistake(
        learns(lambda: UNet(norm="batch"), IMAGES),
        "UNet: a pass in training changes its buffer 'norm.running_mean' (of BatchNorm2d)",
        "nn.GroupNorm or nn.LayerNorm",
    ),
    "rows mix": Mistake(learns(MixesRows), "head 'v' of one row changes with another row", "keep them apart"),
    "the time of another row": Mistake(
        learns(UsesTheFirstTime), "head 'v' of one row changes with another row", "keep them apart"
    ),
    "no numbers by another row": Mistake(
        learns(SpreadsNaN), "head 'u' of one row changes with another row", "keep them apart"
    ),
    "a first pass": Mistake(
        learns(StartsByData), "StartsByData: a pass in training changes its buffer 'is_started' (of StartsByData)"
    ),
    "no room": Mistake(
        learns(HasNoRoom),
        "HasNoRoom failed on x (4, 2) at times (4,): OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "It has no room on cpu: give a smaller network, or a device of more memory",
    ),
    "numpy": Mistake(
        learns(DrawsOfNumpy),
        "DrawsOfNumpy: two passes in training on the same rows differ",
        "not with numpy's, Python's or one of its own",
    ),
    "a state": Mistake(learns(Counts), "Counts: two passes in training on the same rows differ"),
    "x in place": Mistake(
        learns(InPlace), "InPlace: a pass changes its input x in place", "write x = x + ..."
    ),
    "not finite": Mistake(learns(NotFinite), "NotFinite: head 'u' is not finite on the first rows"),
    "one head": Mistake(
        learns(lambda: Perceptron(Needs())),
        "Perceptron returned (4, 2); this objective needs 2 outputs, v, u",
        "or one tensor with 4 channels",
    ),
    "heads in a dict": Mistake(learns(Dict), "Dict returned a dict: return its heads, v, u, as a tuple"),
    "it fails": Mistake(
        learns(Fails),
        "Fails failed on x (4, 2) at times (4,): ",
        "or give dumo.Flow(call=lambda net, x, t, c: net(...))",
    ),
    "no module": Mistake(lambda: dumo.Flow(NO_MODULE), "net is a NoneType: give an nn.Module"),
    "frozen": Mistake(
        learns(lambda: points().requires_grad_(False)), "no parameter of Perceptron is trained", "that learns"
    ),
    "no second time": Mistake(
        learns(Around, objective="meanflow"), "Around.forward has no second time", "x, t, r, c: net(...))"
    ),
    # its derivative
    "t.detach() and dual": Mistake(
        learns(DetachesTime, objective={"kind": "dumo", "slope": {"kind": "dual"}}),
        "no du/dt of DetachesTime: not dual: slope 'dual' has no tangent for 'Tensor.detach",
        "Leave out the slope, and one that serves is taken",
    ),
    "t.detach() and jvp": Mistake(
        learns(DetachesTime, objective={"kind": "dumo", "slope": {"kind": "jvp"}}),
        "no du/dt of DetachesTime: not jvp: du/dt is ",
        "% off. Leave out the slope, and one that serves is taken",
    ),
    "central where t is steep": Mistake(
        learns(Steep, objective=CENTRAL),
        "no du/dt of Steep: not central, h = 0.005: du/dt is ",
        "Leave out the slope, and one that serves is taken",
    ),
    "central under bf16": Mistake(
        learns(points, objective=CENTRAL, precision="bf16"),
        "no du/dt of Perceptron: not central, h = 0.005: slope 'central' needs precision fp32",
        "Leave out the slope, and one that serves is taken",
    ),
    # data
    "bytes": Mistake(learns(points, X.byte()), "x is torch.uint8: give floats near [-1, 1], of bytes x / 127.5 - 1"),
    "0 to 255": Mistake(learns(points, 127.5 * (X + 1)), "x lies between ", "scale them"),
    "not a number": Mistake(learns(points, X * float("nan")), "x is not finite everywhere: look at the data"),
    "data with gradients": Mistake(
        learns(points, X.clone().requires_grad_()),
        "x carries gradients, so the loss would train what made it",
        "give x.detach(), or encode under torch.no_grad()",
    ),
    "no rows": Mistake(learns(points, X[:0]), "x has shape (0, 2), and so no data"),
    "no axis": Mistake(learns(points, X[:, 0]), "x has shape (8,): give rows, (b, ...)"),
    "other data": Mistake(after(lambda flow: flow(IMAGES)), "x has shape (8, 1, 8, 8): give rows of shape (2,)"),
    "a group": Mistake(
        learns(lambda: Perceptron(ONE_HEAD), X[:6], objective="imm"),
        "6 rows, and 4 belong together in objective 'imm': give a multiple of 4; ",
        "a DataLoader leaves out a smaller last batch by drop_last=True",
    ),
    "a group of a last batch": Mistake(
        after(lambda flow: flow(X[:6]), build=lambda classes: Perceptron(ONE_HEAD), objective="imm"),
        "6 rows, and 4 belong together in objective 'imm': give a multiple of 4; ",
    ),
    "noise": Mistake(
        after(lambda flow: flow(X, z=torch.zeros(8, 3))), "z has shape (8, 3), x (8, 2): give noise of the shape of x"
    ),
    "progress": Mistake(after(lambda flow: flow(X, progress=2.0)), "progress = 2: give the share of the training"),
    # conditions
    "a label too large": Mistake(
        learns(lambda: points(3), c=LABELS + 10, classes=3), "label 10 with classes = 3: labels are 0 to 2"
    ),
    "labels alone": Mistake(learns(points, c=LABELS), "labels without a number of classes: give dumo.Flow("),
    "classes alone": Mistake(
        learns(lambda: points(3), classes=3), "classes = 3, and no labels: give c, or leave out classes="
    ),
    "labels (b, 1)": Mistake(
        learns(lambda: points(3), c=LABELS[:, None], classes=3), "classes = 3 is for labels, whole numbers"
    ),
    "labels that are floats": Mistake(
        learns(lambda: points(3), c=LABELS.float(), classes=3), "c is torch.float32 of shape (8,): give c.long()"
    ),
    "labels from 1": Mistake(
        learns(lambda: points(3), c=LABELS + 1, classes=3), "label 3 with classes = 3 stands for none", "0 to 2"
    ),
    "0 to 16": Mistake(learns(points, 8 * (X.clamp(-1, 1) + 1)), "x lies between ", "scale them"),
    "float64": Mistake(learns(points, X.double()), "Perceptron failed on x (4, 2)", "give x.to(torch.float32)"),
    "an embedding without none": Mistake(
        learns(lambda: points(2), c=LABELS, classes=3), "Perceptron failed on x (4, 2)", "needs classes + 1 rows"
    ),
    "too few": Mistake(
        learns(lambda: points(3), c=LABELS[:4], classes=3), "condition 'c' has shape (4,): give one row for each of 8"
    ),
    "no argument": Mistake(
        learns(Around, c={"tokens": NUMBERS}), "condition 'tokens' is no argument of Around.forward: rename it"
    ),
    "no argument for numbers": Mistake(learns(Around, c=NUMBERS), "Around.forward has no argument for a condition"),
    "no argument for labels": Mistake(
        learns(Around, c=LABELS, classes=3), "Around.forward has no argument for a class", "leave out classes="
    ),
    "a null of another name": Mistake(
        learns(Numbers, c=NUMBERS, null={"text": torch.zeros(3)}), "null has a 'text', and c has cond"
    ),
    "a null of another shape": Mistake(
        learns(Numbers, c=NUMBERS, null=torch.zeros(4)), "null of condition 'cond' has shape (4,): give a row of it"
    ),
    "a null alone": Mistake(learns(points, null=torch.zeros(3)), "null= stands for a condition, and there is none"),
    "null beside labels": Mistake(
        learns(lambda: points(3), c=LABELS, classes=3, null=torch.zeros(3)), "null= is for conditions that are no"
    ),
    "text left out": Mistake(learns(Text, IMAGES), "Text failed on x (4, 1, 8, 8)", "c: net(...))"),
    # settings
    "a kind that is none": Mistake(learns(points, objective="dumoo"), "objective.kind: unknown kind 'dumoo'"),
    "a class": Mistake(learns(points, objective=DuMo), "the objective is DuMo: give its name"),
    "a teacher that is none": Mistake(
        lambda: dumo.Flow(points(), teacher=points()), "teacher is a Perceptron: give a dumo.Flow that was trained"
    ),
    "a teacher of labels": Mistake(
        lambda: dumo.Flow(points(), teacher=dumo.Flow(points(3), classes=3)),
        "teacher has classes = 3, and this flow 0: give both the same labels",
    ),
    "no teacher": Mistake(
        learns(points, objective="pi_flow"), "objective 'pi_flow' learns from a teacher's velocity: give"
    ),
    "a teacher in vain": Mistake(
        learns(lambda: Perceptron(ONE_HEAD), objective="imm", teacher=lambda x, t, c, v: v),
        "objective 'imm' learns from no velocity, so a teacher's says nothing to it: leave out teacher=",
    ),
    "a share without a teacher": Mistake(
        learns(points, prior=0.5),
        "prior = 0.5 is the share of the rows that a teacher answers, and there is no teacher: give",
        "give dumo.Flow(teacher=...), or leave out prior=",
    ),
    "a share below 0": Mistake(
        learns(points, prior=-0.1, teacher=path_velocity),
        "prior = -0.1: give a share of the rows, above 0 and below 1, or leave it out",
    ),
    "a share of all rows": Mistake(
        learns(points, prior=1.0, teacher=path_velocity),
        "prior = 1: give a share of the rows, above 0 and below 1, or leave it out",
    ),
    "a share of no row": Mistake(
        learns(points, prior=0.05, teacher=path_velocity),
        "prior = 0.05 of a batch of 8 rows is no row, or all of them: give another share, or more rows",
    ),
    "a share for who asks the teacher alone": Mistake(
        learns(points, objective="pi_flow", prior=0.5, teacher=path_velocity),
        "objective 'pi_flow' cannot learn from a teacher on some rows, and from the data on the others",
        "leave out prior=, or take another objective, such as 'dumo'",
    ),
    "a teacher of another path": Mistake(
        lambda: dumo.Flow(points(), teacher=dumo.Flow(points(), path=Linear(sd=0.5))),
        "teacher has path 'linear' of sd 0.5, and this flow 'linear' of sd 1: give both the same path=",
    ),
    "a path without formulas": Mistake(
        learns(lambda: Perceptron(Needs(heads=("u",))), objective="consistency", path=Trig()),
        "objective 'consistency' has its formulas for path 'linear', not 'trig'",
        "give dumo.Flow(path=...) another of dumo.flow.path",
    ),
    "no first stage": Mistake(
        learns(lambda: Perceptron(Needs(heads=("u",))), objective={"kind": "consistency", "low": 0.6}),
        "objective 'consistency' with low learns from the net that training begins with",
        "give dumo.Flow(ref=...) a copy of it, which stays as it is",
    ),
    "a precision": Mistake(
        learns(lambda: Perceptron(Needs(heads=("u",))), objective="consistency", precision="bf16"),
        "objective 'consistency' needs precision fp32, not torch.bfloat16 autocast: it multiplies the rounding of the "
        "net without bound. Use fp32 (of a run train.precision=fp32, of a loop of your own "
        "weights in float32 and dumo.Flow(precision='fp32')), a longer step, or",
    ),
    "weights of 16 bits": Mistake(
        learns(InHalf, objective="rcgm"), "objective 'rcgm' needs precision fp32, not weights in bfloat16: it"
    ),
    "no gradient of a derivative": Mistake(
        learns(HasSelu, objective="lsd"),
        "this loss differentiates through a derivative, for which 'selu', which this net uses, has no rule",
        "use another operation, or objective 'meanflow'",
    ),
    "a guide by what is not taught": Mistake(
        learns(
            lambda: Perceptron(ONE_HEAD, 3),
            c=LABELS,
            classes=3,
            objective={"kind": "meanflow", "times": {"kind": "beta"}},
        ),
        "objective.guide reads the velocity of objective 'meanflow' at r = t, and all of objective.times have r = 0",
        "or objective.guide.omega=1 and objective.guide.zeta=0",
    ),
    "a shard": Mistake(lambda: dumo.Flow(points(), shard=(2, 2)), "shard = (2, 2): give (rank, ranks) of the data"),
    "a scale": Mistake(lambda: dumo.Flow(points(), time_scale=0.0), "time_scale = 0: give what times"),
    "a path": Mistake(
        lambda: dumo.Flow(points(), path="trig"),
        "path is 'trig': give one of dumo.flow.path, such as Trig(), or leave it out",
    ),
    "classes": Mistake(lambda: dumo.Flow(points(), classes=-1), "classes = -1: give how many labels there are"),
    "a precision of another library": Mistake(
        lambda: dumo.Flow(points(), precision=cast(Any, "fp16")),
        "precision = 'fp16': give 'fp32', 'tf32' or 'bf16', or leave it out for the caller's autocast",
    ),
    "a guide that is a number": Mistake(
        lambda: dumo.Flow(points(3), "flow_matching", classes=3, guide=cast(Any, 2.0)),
        "guide = 2.0: give dumo.flow.guide.CFG(scale=2), or flow.sample(guidance=2)",
    ),
    "a knob": Mistake(
        lambda: dumo.Flow(Perceptron(ImprovedMeanFlow().needs, 3), "imf", classes=3, knobs={"scale": 2}),
        "objective 'imf' has no knob 'scale': its knobs are w, low, high",
    ),
    "a drift of what is no label": Mistake(
        learns(Numbers, c=NUMBERS, objective={"kind": "drift", "size": 4}, null=torch.zeros(3)),
        "objective 'drift' compares rows of one label, and c is no label: give labels and classes=, or take another",
    ),
    "a drift by another name": Mistake(
        learns(Numbers, c=NUMBERS, objective=Drifts(size=4), null=torch.zeros(3)),
        "objective 'drifts' compares rows of one label, and c is no label: give labels and classes=, or take another",
    ),
    "a coupling of what is no label": Mistake(
        learns(Numbers, c=NUMBERS, null=torch.zeros(3), coupling=Coupling(group=8)),
        "coupling= compares rows of one label, and c is no label: give labels and classes=, or leave out coupling=",
    ),
    "labels on another device": Mistake(
        learns(lambda: points(3), c=LABELS.to("meta"), classes=3),
        "condition 'c' is on meta, and x on cpu: give both on the same device",
    ),
    "a derivative by dual numbers alone": Mistake(
        learns(lambda: AddsInPlace(F2D2().needs), objective="f2d2"),
        "whatever the slope, has no tangent for 'add_, in place', which this net uses: use another operation",
    ),
    "no other derivative": Mistake(
        lambda: dumo.Flow(AddsInPlace(FreeFlow().needs), "freeflow", teacher=lambda x, t, c, v: v)(X),
        "whatever the slope, has no tangent for 'Tensor.__iadd__', which this net uses: use another operation",
    ),
    # what is read
    "a jump": Mistake(
        after(lambda flow: flow.jump(X, 1.0, 0.5)),
        "objective 'dumo' teaches no jump that ends at s = 0.5: give s=0, or train with 'dumo_any' or 'meanflow'",
    ),
    "a jump up": Mistake(
        after(lambda flow: flow.jump(X, 0.3, 0.7), build=lambda _: Perceptron(MeanFlow().needs), objective="meanflow"),
        "objective 'meanflow' teaches no jumps up to the noise: give s up to t",
    ),
    "a time above 1": Mistake(
        after(lambda flow: flow.velocity(X, 500)), "a time of 500: times run from 0, data, to 1, noise"
    ),
    "a time below 0": Mistake(
        after(lambda flow: flow.velocity(X, torch.linspace(-0.5, 1, 8))), "a time of -0.5: times run from 0"
    ),
    "times": Mistake(after(lambda flow: flow.velocity(X, torch.ones(3))), "a time of shape (3,) for 8 rows: give"),
    "no label": Mistake(after(lambda flow: flow.velocity(X, 0.5), 3), "classes = 3, and no labels: give c"),
    "a label": Mistake(after(lambda flow: flow.velocity(X, 0.5, LABELS + 7), 3), "label 7 with classes = 3"),
    "before a loss": Mistake(lambda: dumo.Flow(points()).sample(4), "the shape of the data is not known before"),
    "guided twice": Mistake(
        after(lambda flow: flow.sample(4, guidance=2.0), 3),
        "guidance = 2: this model was trained at guidance scale 2.22; the scale is part of its weights",
    ),
    "guided twice, always": Mistake(
        lambda: dumo.Flow(points(3), classes=3, guide=CFG(scale=2)),
        "guidance = 2: this model was trained at guidance scale 2.22; the scale is part of its weights",
    ),
    "guided twice, by knobs": Mistake(
        after(
            lambda flow: flow.sample(4, guidance=2.0),
            3,
            build=lambda classes: Perceptron(ImprovedMeanFlow().needs, classes),
            objective="imf",
        ),
        "guidance = 2: the knobs of objective 'imf' guide this model already",
        "leave guidance out, and give dumo.Flow(knobs=...)",
    ),
    "guided twice, by a teacher": Mistake(
        lambda: dumo.Flow(points(3), classes=3, teacher=guided_teacher()),
        "objective 'dumo' would guide what the teacher's guide= of scale 2 has guided: give a teacher without guide=",
    ),
    "guided twice, after a teacher": Mistake(
        lambda: dumo.Flow(points(3), "flow_matching", classes=3, teacher=guided_teacher()).sample(
            4, guidance=2.0, shape=(2,)
        ),
        "guidance = 2: this model was trained at guidance scale 2;",
        "or train with a teacher without guide=",
    ),
    "nothing to guide by": Mistake(
        after(lambda flow: flow.sample(4, guidance=2.0)),
        "guidance = 2 needs what the network makes of no condition",
        "train with classes= or null=",
    ),
    "labels of none": Mistake(after(lambda flow: flow.sample([0, 1])), "label 0 is out of range: this model has"),
    "none": Mistake(after(lambda flow: flow.sample(None)), "flow.sample(None): give how many samples"),
    "no solver": Mistake(
        after(lambda flow: flow.sample(4, solver="huen")),
        "there is no solver 'huen': use euler, heun, restart, hop or hermite",
    ),
    "a solver in a dict": Mistake(
        after(lambda flow: flow.sample(4, solver=cast(Any, {"kind": "euler"}))),
        "solver = {'kind': 'euler'}: give a name, such as 'heun', or one of dumo.flow.solver, such as Heun()",
    ),
    "no passes": Mistake(after(lambda flow: flow.sample(4, nfe=0)), "nfe = 0 is no number of passes"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_says_the_way_out(name: str) -> None:
    mistake = MISTAKES[name]
    with pytest.raises(UserError) as refused:
        mistake.do()
    line = str(refused.value)
    assert mistake.line in line
    assert line.endswith(mistake.way)
    assert "\n" not in line


def test_a_check_in_evaluation_is_made_again_in_training() -> None:
    flow = dumo.Flow(UNet(norm="batch")).eval()
    flow(IMAGES)
    flow.train()
    with pytest.raises(UserError, match=r"changes its buffer 'norm\.running_mean'"):
        flow(IMAGES)

    flow = dumo.Flow(UNet(dropout=0.3)).eval()
    flow(IMAGES)
    assert not flow.net_draws
    flow.train()(IMAGES)
    assert flow.net_draws


def test_a_share_of_no_row_is_for_validation() -> None:
    flow = dumo.Flow(points(), teacher=path_velocity, prior=0.5).eval()
    flow(X[:1])
    with pytest.raises(UserError, match=r"prior = 0\.5 of a batch of 1 rows is no row"):
        flow.train()(X[:1])
    flow(X)


def test_generators_stay_where_a_check_refuses() -> None:
    flow = dumo.Flow(MixesRows())
    before = torch.get_rng_state()
    with pytest.raises(UserError):
        flow(X)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_refused_network_is_as_it_was() -> None:
    net = StartsByData()
    with pytest.raises(UserError):
        dumo.Flow(net)(X)
    assert not net.is_started


def test_a_network_whose_layers_are_lazy_is_tried_as_it_is() -> None:
    class Lazy(Around):
        def __init__(self) -> None:
            super().__init__()
            self.lazy = nn.LazyLinear(2)

        def changed(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
            return self.net(self.lazy(x), t)

    flow = dumo.Flow(Lazy())
    assert flow(X).isfinite()
    assert not flow.is_check_of_copy


def test_rows_that_a_zero_layer_hides_are_seen_to_mix_at_the_second_check() -> None:
    class UncopiedMixesRows(MixesRows):
        def __deepcopy__(self, memo: object) -> "UncopiedMixesRows":
            raise RuntimeError("not me")

    net = UncopiedMixesRows()
    last_layer = cast(Perceptron, net.net).out
    nn.init.zeros_(last_layer.weight)
    nn.init.zeros_(last_layer.bias)
    flow = dumo.Flow(net)
    flow(X)
    nn.init.normal_(last_layer.weight)
    flow.step = 100
    with pytest.raises(UserError, match="head 'v' of one row changes with another row"):
        flow(X)


def test_data_with_gradients_are_read_where_none_are_taken() -> None:
    flow = dumo.Flow(points())
    x = X.clone().requires_grad_()
    with torch.no_grad():
        assert flow(x).isfinite()
    assert flow(x.detach()).isfinite()
    assert flow.velocity(x, 0.5).isfinite().all()


def test_a_number_of_numpy_says_how_many_samples() -> None:
    flow = dumo.Flow(points())
    assert torch.equal(flow.sample(np.int64(2), shape=(2,)), flow.sample(2, shape=(2,)))


def test_a_network_on_another_device_is_said() -> None:
    flow = dumo.Flow(points())
    passes, b = flow.passes(X)
    flow.net.to("meta")
    with pytest.raises(UserError, match=r"x is on cpu, and the network's weights on meta: give x\.to\('meta'\)"):
        try_pass(passes, b, TWO)


def test_what_is_no_tensor_is_said() -> None:
    with pytest.raises(UserError, match="x is a ndarray: give a tensor"):
        require_data(X.numpy())


# ------------------------------------------------------------------------------------------------------------- harmless


class DrawsOfTorch(Around):
    def changed(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
        return self.net(x + 0.1 * torch.randn(len(x), 2), t)


class AsksForTensors(Around):
    def changed(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
        assert isinstance(x, Tensor)
        return self.net(x, t)


def test_draws_of_torch_are_keyed_in_a_network_and_in_a_loss() -> None:
    losses = [dumo.Flow(DrawsOfTorch())(X).item() for _ in range(2)]
    assert losses[0] == losses[1]
    torch.manual_seed(0)
    flow = loses(lambda terms, *_: Terms(terms.loss * torch.rand(8)))
    assert flow(X, step=1).item() == flow(X, step=1).item()
    assert flow(X, step=1).item() != flow(X, step=2).item()


def test_another_way_is_found_and_said(caplog: pytest.LogCaptureFixture) -> None:
    flow = dumo.Flow(AsksForTensors())
    flow(X)
    assert flow.slope_reason.startswith("jvp, ")
    assert "not dual" in flow.slope_reason
    assert f"dumo: du/dt by {flow.slope_reason}" in caplog.messages
    assert flow.slope_reason in repr(flow)


@pytest.mark.parametrize("case", ["latents of 16 bits", "weights of 16 bits", "casts inside"])
def test_du_dt_is_not_compared_where_differences_cannot_be_taken(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if case != "casts inside":
        monkeypatch.setattr(derivative, "_MAX_COPIED_PARAMETERS", 0)
    net = JoinsLate(casts=case == "casts inside")
    x = X if case == "casts inside" else X.bfloat16()
    if case == "weights of 16 bits":
        net = net.bfloat16()
    flow = dumo.Flow(net)
    with torch.autocast("cpu", torch.bfloat16, enabled=case != "weights of 16 bits"):
        assert flow(x).isfinite()
    assert flow.slope_reason.startswith("dual, not compared")


def test_a_network_that_needs_autocast_and_has_no_slope_is_refused() -> None:
    class DetachesLate(JoinsLate):
        def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
            if isinstance(x, Dual):
                raise TypeError("not me")
            return super().forward(x, torch.from_numpy(t.detach().numpy()))

    flow = dumo.Flow(DetachesLate(casts=True))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match=r"no du/dt of .*not dual: .*not jvp: "):
        flow(X)


@pytest.mark.parametrize("build", [DetachesTime, FloatsTime])
def test_where_time_is_cut_off_differences_serve(build: type[Around], caplog: pytest.LogCaptureFixture) -> None:
    dumo.Flow(build())(X)
    (message,) = caplog.messages
    assert re.fullmatch(r"dumo: du/dt by central, h = .*; not dual: .*; not jvp: .*", message)


def test_a_network_that_is_steep_in_time_is_said_and_a_scale_helps(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    dumo.Flow(Steep()).check(X)
    (message,) = caplog.messages
    found = re.search(r"t du/dt is ([\d.]+) times v.*time_scale=([\d.e-]+)\)", message)
    assert found
    assert float(found[1]) > 1
    caplog.clear()
    dumo.Flow(Steep(), time_scale=float(found[2])).check(X)
    dumo.Flow(points()).check(X)
    assert caplog.messages == []


# ------------------------------------------------------------------------------------------------------------ its parts


def test_layers_of_zeros_are_drawn_in_the_copy_alone() -> None:
    net = Perceptron(TWO)
    nn.init.zeros_(net.out.weight)
    nn.init.zeros_(net.out.bias)
    flow = dumo.Flow(net)
    flow.check(X)
    assert not net.out.weight.any()
    passes = Passes(net, TWO, Signature.of(net), labelled=False)
    copied_passes = derivative.copy_without_zero_layers(passes)
    assert copied_passes
    drawn = copied_passes.net
    assert isinstance(drawn, Perceptron)
    assert drawn.out.weight.any()
    assert float(flow.slope_reason.partition(", ")[2].partition(" %")[0]) > 0  # of what is not 0


def test_a_network_that_cannot_be_copied_is_checked_as_it_is_and_once_more() -> None:
    class Uncopied(Around):
        def __deepcopy__(self, memo: object) -> "Uncopied":
            raise RuntimeError("not me")

    flow = dumo.Flow(Uncopied())
    checks: list[int] = []
    own_check = flow.check
    flow.__dict__["check"] = lambda *given: checks.append(flow.step) or own_check(*given)
    flow(X)
    flow.step = 99
    flow(X)
    flow.eval()(X)
    flow.train()
    for _ in range(2):
        flow(X)
    assert checks == [0, 100]


class NearlyRight(Around):
    """Its outputs hardly depend on the time that it cuts off."""

    def changed(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
        size = 1 + (0.05 * t.detach()).sin()[:, None]
        return [size * head for head in self.net(x, t)]


def test_a_slope_that_is_nearly_right_is_not_exact() -> None:
    why = dumo.Flow(NearlyRight()).check(X)
    assert why.startswith("central")
    off = re.search(r"not jvp: du/dt is ([\d.]+) % off", why)
    assert off
    assert 1 < float(off[1]) < 5


def test_a_slope_that_was_chosen_is_tried_first() -> None:
    first = dumo.Flow(AsksForTensors())
    first.check(X)
    assert first.chosen_slope
    other = dumo.Flow(points())
    other.chosen_slope = first.chosen_slope
    assert other.check(X).startswith("jvp")


def test_a_device_without_float64_is_checked_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As MPS, where only what was copied to the CPU can be float64."""
    to_cpu, to_float64 = Tensor.cpu, Tensor.double

    def copy_to_cpu(x: Tensor) -> Tensor:
        copied = to_cpu(x).clone()
        copied.is_on_cpu = True
        return copied

    def cast_on_cpu(x: Tensor) -> Tensor:
        if not hasattr(x, "is_on_cpu"):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return to_float64(x)

    monkeypatch.setattr(Tensor, "cpu", copy_to_cpu)
    monkeypatch.setattr(Tensor, "double", cast_on_cpu)
    monkeypatch.setattr(loop, "max_pass_difference", lambda x: MAX_DIFFERENCE["fp32"])
    assert dumo.Flow(points()).check(X).startswith("dual, ")


def test_each_and_rows_of_conditions() -> None:
    assert condition.map_tensors(None, lambda rows: rows[:2]) is None
    assert torch.equal(cast(Tensor, condition.map_tensors(LABELS, lambda rows: rows[:2])), LABELS[:2])
    assert condition.num_rows({"a": NUMBERS[:5]}) == 5
