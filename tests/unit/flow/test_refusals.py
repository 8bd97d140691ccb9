"""What `dumo.Flow` refuses: one case per row, with the name that the message must contain."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast

import pytest
import torch
from torch import Tensor, nn

import dumo
from contract.own import Numbers, Perceptron, UNet
from dumo.flow.guide import CFG
from dumo.flow.module import Flow
from dumo.flow.noisy_batch import Coupling, path_velocity
from dumo.flow.path import Linear, Trig
from dumo.objectives import Drift, FlowMatching, ImprovedMeanFlow
from dumo.types import Frozen, Needs, Net, NoisyBatch, Terms, UserError

TWO = Needs(heads=("v", "u"))
U = Needs(heads=("u",))
U_OF_TWO_TIMES = Needs(inputs=("t", "r"), heads=("u",))
V_OF_TWO_TIMES = Needs(inputs=("t", "r"))
X = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 3
NUMBERS = torch.randn(8, 3, generator=torch.Generator().manual_seed(2))


def points(classes: int = 0) -> nn.Module:
    torch.manual_seed(0)
    return Perceptron(TWO, classes)


def learns(
    build: Callable[[], nn.Module] = points,
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


class Around(nn.Module):
    """A network that is right, for subclasses that put a mistake around it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = points()

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return self.net(x, t)


class MixesRows(Around):
    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return self.net(x - x.mean(0), t)


class UsesTheFirstTime(Around):
    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return self.net(x, t[:1].expand(len(t)))


class SpreadsNaN(Around):
    """Other rows are NaN if the first row of x is not the one of the first pass."""

    first_row: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
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

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        self.is_started.fill_(True)
        return self.net(x, t)


class Counts(Around):
    calls = 0

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        self.calls += 1
        return self.net(x + 0.1 * self.calls, t)


class InPlace(Around):
    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        x += 1
        return self.net(x, t)


class NotFinite(Around):
    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        v, u = self.net(x, t)
        return v, u / 0


class DetachesTime(Around):
    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        size = (3 * t.detach()).sin()[:, None]
        return tuple(size * head for head in self.net(x, t))


class InHalf(nn.Module):
    """It casts what it gets to bf16, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2, dtype=torch.bfloat16)

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return self.layer(torch.cat([x, t[:, None], r[:, None]], 1).bfloat16()).float()


class MeanLoss(FlowMatching):
    """A loss that returns another shape than one number per row."""

    shape_of: ClassVar[Callable[[Tensor], Tensor]] = torch.mean

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        terms = super().loss(net, ref, b)
        object.__setattr__(terms, "loss", type(self).shape_of(terms.loss))  # shapes are checked in tests alone
        return terms


class ColumnLoss(MeanLoss):
    shape_of: ClassVar[Callable[[Tensor], Tensor]] = lambda loss: loss[:, None]


class Drifts(Drift):
    """A drift of a user's own."""

    kind: Literal["drifts"] = "drifts"  # pyright: ignore[reportIncompatibleVariableOverride]


def guided_teacher() -> Flow:
    return dumo.Flow(points(3), "flow_matching", classes=3, guide=CFG(scale=2))


def slope(kind: str) -> dict[str, Any]:
    return {"kind": "dumo", "slope": {"kind": kind}}


AT_DATA = {"kind": "meanflow", "times": {"kind": "beta"}}
REFUSED: list[tuple[str, str, Callable[[], object]]] = [
    # the network
    ("a buffer changes", "norm.running_mean", learns(lambda: UNet(norm="batch"), IMAGES)),
    ("a buffer changes once", "is_started", learns(StartsByData)),
    ("a state", "Counts", learns(Counts)),
    ("x in place", "InPlace", learns(InPlace)),
    ("rows mix", "head 'v'", learns(MixesRows)),
    ("the time of another row", "head 'v'", learns(UsesTheFirstTime)),
    ("NaN by another row", "head 'u'", learns(SpreadsNaN)),
    ("not finite", "head 'u' is not finite", learns(NotFinite)),
    ("one head of two", "(v, u)", learns(lambda: Perceptron(Needs()))),
    # its derivative
    ("t.detach() and dual", "not dual", learns(DetachesTime, objective=slope("dual"))),
    ("t.detach() and jvp", "not jvp", learns(DetachesTime, objective=slope("jvp"))),
    ("t.detach()", '{"kind": "central"}', learns(DetachesTime)),
    ("central under bf16", "not central", learns(objective=slope("central"), precision="bf16")),
    # the loss
    ("a mean", "shape ()", lambda: dumo.Flow(Perceptron(Needs()), MeanLoss())(X)),
    ("a column", "shape (8, 1)", lambda: dumo.Flow(Perceptron(Needs()), ColumnLoss())(X)),
    # the objective and its settings
    ("no teacher", "pi_flow", learns(objective="pi_flow")),
    ("trajectories", "teacher.pairs", learns(objective={"kind": "cmt"})),
    ("an idle teacher", "teacher=", learns(lambda: Perceptron(U_OF_TWO_TIMES), objective="imm", teacher=path_velocity)),
    ("no conditions to compare", "must be dropped", learns(lambda: Perceptron(V_OF_TWO_TIMES), objective="self_e")),
    ("a share without a teacher", "prior = 0.5", learns(prior=0.5)),
    ("a share of no row", "prior = 0.05", learns(prior=0.05, teacher=path_velocity)),
    ("a share of all rows", "prior = 1", learns(prior=1.0, teacher=path_velocity)),
    ("a share for pi_flow", "prior", learns(objective="pi_flow", prior=0.5, teacher=path_velocity)),
    ("a teacher of labels", "classes is 3", lambda: dumo.Flow(points(), teacher=dumo.Flow(points(3), classes=3))),
    ("a teacher of a path", "path.sd", lambda: dumo.Flow(points(), teacher=dumo.Flow(points(), path=Linear(sd=0.5)))),
    ("guided twice", "guide=", lambda: dumo.Flow(points(3), classes=3, teacher=guided_teacher())),
    ("a path", "'trig'", learns(lambda: Perceptron(U), objective="consistency", path=Trig())),
    ("no first stage", "ref=", learns(lambda: Perceptron(U), objective={"kind": "consistency", "low": 0.6})),
    ("a guide", "objective.guide", learns(lambda: Perceptron(U_OF_TWO_TIMES, 3), X, LABELS, AT_DATA, classes=3)),
    ("bf16", "precision fp32", learns(lambda: Perceptron(U), objective="consistency", precision="bf16")),
    ("weights in bf16", "weights in bfloat16", learns(InHalf, objective="rcgm")),
    ("a scripted network", "torch.jit.script", lambda: dumo.Flow(torch.jit.script(nn.Linear(2, 2)))),
    ("a precision", "'fp16'", lambda: dumo.Flow(points(), precision=cast(Any, "fp16"))),
    ("a shard", "shard = (2, 2)", lambda: dumo.Flow(points(), shard=(2, 2))),
    ("a shard of ranks that are unknown", "has ranks = 1", learns(shard=(1, 2))),
    ("a knob", "knobs.scale", lambda: dumo.Flow(Perceptron(ImprovedMeanFlow().needs, 3), "imf", knobs={"scale": 2})),
    ("drift", "'drift'", learns(Numbers, X, NUMBERS, {"kind": "drift", "size": 4}, null=torch.zeros(3))),
    ("an own drift", "'drifts'", learns(Numbers, X, NUMBERS, Drifts(size=4), null=torch.zeros(3))),
    ("a coupling", "coupling=", learns(Numbers, X, NUMBERS, null=torch.zeros(3), coupling=Coupling(group=8))),
    ("a coupling of rows that are compared", "'imm'", learns(Numbers, objective="imm", coupling=Coupling(group=8))),
    # data and conditions
    ("0 to 255", "x lies between", learns(x=127.5 * (X + 1))),
    ("0 to 16", "x lies between", learns(x=8 * (X.clamp(-1, 1) + 1))),
    ("bytes", "x lies between", learns(x=(100 * X).byte())),
    ("NaN", "x lies between", learns(x=X * float("nan"))),
    ("x with a gradient", "x.detach()", learns(x=X.clone().requires_grad_())),
    ("z", "z has shape (8, 3)", after(lambda flow: flow(X, z=torch.zeros(8, 3)))),
    ("progress", "progress = 3", after(lambda flow: flow(X, progress=3))),
    ("no label", "classes=", learns(lambda: points(3), classes=3)),
    ("a null alone", "null=", learns(null=torch.zeros(3))),
    ("labels alone", "classes=", learns(c=LABELS)),
    ("labels (b, 1)", "classes = 3", learns(lambda: points(3), X, LABELS[:, None], classes=3)),
    ("labels in float", "classes = 3", learns(lambda: points(3), X, LABELS.float(), classes=3)),
    ("labels from 1", "label 3", learns(lambda: points(3), X, LABELS + 1, classes=3)),
    ("a negative label", "label -1", learns(lambda: points(3), X, LABELS - 1, classes=3)),
    ("a null beside labels", "null=", learns(lambda: points(3), X, LABELS, classes=3, null=torch.zeros(3))),
    ("a null of another name", "null.text", learns(Numbers, X, NUMBERS, null={"text": torch.zeros(3)})),
    # reading and sampling
    ("a label in velocity", "label 7", after(lambda flow: flow.velocity(X, 0.5, LABELS + 7), 3)),
    ("no label in velocity", "classes=", after(lambda flow: flow.velocity(X, 0.5), 3)),
    ("a time above 1", "500", after(lambda flow: flow.velocity(X, 500))),
    ("a time below 0", "-0.5", after(lambda flow: flow.velocity(X, torch.linspace(-0.5, 1, 8)))),
    ("a jump", "'dumo'", after(lambda flow: flow.jump(X, 1.0, 0.5))),
    (
        "a jump up",
        "'f2d2'",
        after(lambda f: f.jump(X, 0.3, 0.7), 0, lambda _: Perceptron(U_OF_TWO_TIMES), "meanflow"),
    ),
    ("guidance of a guided one", "guidance = 2", after(lambda flow: flow.sample(4, guidance=2.0), 3)),
    ("a guide of a guided one", "guidance = 2", lambda: dumo.Flow(points(3), classes=3, guide=CFG(scale=2))),
    (
        "guidance after a guided teacher",
        "a teacher without guide=",
        lambda: dumo.Flow(points(3), "flow_matching", classes=3, teacher=guided_teacher()).sample(
            4, guidance=2.0, shape=(2,)
        ),
    ),
    ("guidance by nothing", "classes=", after(lambda flow: flow.sample(4, guidance=2.0))),
    ("a sample's label", "label 0", after(lambda flow: flow.sample([0, 1]))),
    ("a shape", "shape=", lambda: dumo.Flow(points()).sample(4)),
    ("a solver", "'huen'", after(lambda flow: flow.sample(4, solver="huen"))),
    ("nfe", "nfe = 0", after(lambda flow: flow.sample(4, nfe=0))),
]


@pytest.mark.parametrize(("named", "do"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_it_is_refused_in_one_line_that_names_it(named: str, do: Callable[[], object]) -> None:
    with pytest.raises(UserError) as refused:
        do()
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
