"""Gaussian flows, of which every quantity is known in closed form, and a network that knows one. All in float64.

The data are Gaussian for each class. Along the linear path x_t = t z + (1 - t) x they stay Gaussian, with mean
(1 - t) m and standard deviation S(t) = sqrt(t^2 + (1 - t)^2 s^2). So the velocity of the flow is

    v(x, t) = E[v_t | x_t = x] = A (x - (1 - t) m) - m        with   A(t) = S'/S,

and the flow x_t -> x_r scales x - (1 - t) m with S. A guided Gaussian with m = 0 has the velocity
v_w = (w A_c + (1 - w) A_0) x, so x scales with S_c^w S_0^(1 - w).

`ExactNet` puts a flow behind the interface of a network, with a displacement of each head, so that an objective can be
asked whether its gradient vanishes at the flow, and whether descent leads back to it. The last class of every flow is
its null condition.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import inf, pi
from typing import Any

import torch
from torch import Generator, Tensor, nn

from dumo.autodiff.dual import carry, primal
from dumo.flow.guide import Guide
from dumo.flow.noisy_batch import draw
from dumo.flow.path import Linear, Trig
from dumo.runtime.random import stream
from dumo.types import Frozen, Heads, Needs, NoisyBatch, Objective, UserError

D = torch.float64
PLAIN = Guide()
FINEST_STEP = 7  # of steps 2^-k: k = 7 stands for no step (Shortcut models)


def column(a: Tensor) -> Tensor:
    """One number per row, shaped to multiply points (b, d)."""
    return a[:, None]


def spread(s: Tensor, t: Tensor) -> Tensor:
    """S(t): the standard deviation at time t of data of standard deviation s."""
    return (t**2 + (1 - t) ** 2 * s**2).sqrt()


def growth(s: Tensor, t: Tensor) -> Tensor:
    """A(t) = d log S / dt."""
    return (t - (1 - t) * s**2) / spread(s, t) ** 2


@dataclass(frozen=True)
class RowGuide:
    """The scale and interval of guidance as numbers per row, as a network gets them by its knobs."""

    scale: Tensor
    interval: "RowInterval"


@dataclass(frozen=True)
class RowInterval:
    """The interval of a `RowGuide`."""

    low: Tensor
    high: Tensor


class ExactFlow(ABC):
    """A flow from noise to data, for points (b, d) and conditions (b,)."""

    @property
    @abstractmethod
    def classes(self) -> int:
        """The number of classes, which is also the index of the null condition."""

    @abstractmethod
    def data(self, c: Tensor, g: Generator) -> Tensor:
        """Draw a sample of the data of each class in c."""

    @abstractmethod
    def velocity(self, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        """E[v_t | x_t = x, c]."""

    @abstractmethod
    def guided(self, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        """The velocity with guidance."""

    @abstractmethod
    def carry(self, x: Tensor, c: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """x_r on the guided flow through x_t = x."""

    def log_stretch(self, x: Tensor, c: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The logarithm of dx_t/dx_r, of a flow that acts on each coordinate alone."""
        return -torch.func.jvp(lambda x: self.carry(x, c, t, r), (x,), (torch.ones_like(x),))[1].log()


@dataclass(frozen=True)
class Gaussian(ExactFlow):
    """N(m, s^2 I) per class, guided by w at the times low <= t <= high; with guidance, all means are zero.

    d log S_c^w S_0^(1-w) / dt = A_c + (w - 1) (A_c - A_0), and the second part counts only inside [low, high]: clamping
    the time of its integral says just that. An interval that reaches 0 or 1 goes on beyond it, as differences do.
    """

    std: Tensor  # (classes + 1,)
    mean: Tensor  # (classes + 1,)
    guide: Guide | RowGuide = PLAIN
    dim: int = 2

    def __post_init__(self) -> None:
        assert (torch.as_tensor(self.guide.scale) == 1).all() or not self.mean.any(), "no closed form"

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.std) - 1

    def data(self, c: Tensor, g: Generator) -> Tensor:
        """Draw a sample of each class in c."""
        return column(self.mean[c]) + column(self.std[c]) * torch.randn(len(c), self.dim, generator=g, dtype=D)

    def velocity(self, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        """A (x - (1 - t) m) - m."""
        m = self.mean[c]
        return column(growth(self.std[c], t)) * (x - column((1 - t) * m)) - column(m)

    def guided(self, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        """The velocity, and (w - 1) (A_c - A_0) x inside the interval."""
        extra = growth(self.std[c], t) - growth(self.std[-1], t)
        where = self._clamped(t) == t
        return self.velocity(x, c, t) + column(where * extra * (self.guide.scale - 1)) * x

    def carry(self, x: Tensor, c: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """x - (1 - t) m scales with S_c^w S_0^(1 - w)."""
        ratio = (self._log_scale(c, r) - self._log_scale(c, t)).exp()
        m = self.mean[c]
        return column((1 - r) * m) + column(ratio) * (x - column((1 - t) * m))

    def _log_scale(self, c: Tensor, t: Tensor) -> Tensor:
        """log S_c^w S_0^(1 - w), up to a constant."""
        inside = self._clamped(t)
        extra = spread(self.std[c], inside).log() - spread(self.std[-1], inside).log()
        return spread(self.std[c], t).log() + (self.guide.scale - 1) * extra

    def _clamped(self, t: Tensor) -> Tensor:
        """t, or the end of the guided interval that is nearest."""
        low, high = (torch.as_tensor(a, dtype=D) for a in (self.guide.interval.low, self.guide.interval.high))
        return t.clamp(torch.where(low > 0, low, -inf), torch.where(high < 1, high, inf))


@dataclass(frozen=True)
class OnTrig(ExactFlow):
    """A flow of the linear path on the trigonometric one: x_t = x_s / n(s), s / (1 - s) = tan(pi t / 2).

    Here n(s)^2 = s^2 + (1 - s)^2. The means of noise and data given x_t are those of the same point on both paths,
    which gives the velocity.
    """

    of: ExactFlow

    @property
    def classes(self) -> int:
        """The number of classes."""
        return self.of.classes

    def data(self, c: Tensor, g: Generator) -> Tensor:
        """Draw a sample of each class in c."""
        return self.of.data(c, g)

    def velocity(self, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        """pi / 2 (cos E[z] - sin E[x])."""
        return self._turned(self.of.velocity, x, c, t)

    def guided(self, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        """As the velocity, of the guided flow."""
        return self._turned(self.of.guided, x, c, t)

    def carry(self, x: Tensor, c: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """To the linear path, along it, and back."""
        (s, n), (q, m) = self._on_linear(t), self._on_linear(r)
        return self.of.carry(column(n) * x, c, s, q) / column(m)

    def _turned(self, f: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        """The velocity on this path of the flow whose velocity on the linear path is f."""
        s, n = self._on_linear(t)
        x_s, angle = column(n) * x, column(t * pi / 2)
        v = f(x_s, c, s)
        data, noise = x_s - column(s) * v, x_s + column(1 - s) * v
        return pi / 2 * (angle.cos() * noise - angle.sin() * data)

    def _on_linear(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The time on the linear path, and its n."""
        sin, cos = (t * pi / 2).sin(), (t * pi / 2).cos()
        return sin / (sin + cos), 1 / (sin + cos)


Head = Callable[[ExactFlow, Tensor, Tensor, Tensor, Tensor], Tensor]  # (flow, x, c, t, r) -> what a head is at the flow


def velocity_head(flow: ExactFlow, x: Tensor, c: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The guided velocity."""
    return flow.guided(x, c, t)


def mean_velocity_head(flow: ExactFlow, x: Tensor, c: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """(x_t - x_r) / (t - r), and its limit where r = t."""
    same = column(t == r)
    u = (x - flow.carry(x, c, t, r)) / torch.where(same, 1, column(t - r))
    return torch.where(same, flow.guided(x, c, t), u)


def growth_head(flow: ExactFlow, x: Tensor, c: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The mean of dv_i/dx_i on the way from r: the logarithm of dx_t/dx_r over t - r, and its limit where r = t."""
    same = column(t == r)
    limit = torch.func.jvp(lambda x: flow.guided(x, c, t), (x,), (torch.ones_like(x),))[1]
    return torch.where(same, limit, flow.log_stretch(x, c, t, r) / torch.where(same, 1, column(t - r)))


def direction_head(flow: ExactFlow, x: Tensor, c: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The mean direction on the trigonometric path: (cos(theta) x_t - x_0) / sin(theta), and its limit at t = 0."""
    angle, start = column(t * pi / 2), column(t == 0)
    f = (angle.cos() * x - flow.carry(x, c, t, 0 * t)) / torch.where(start, 1, angle.sin())
    return torch.where(start, flow.guided(x, c, t) * 2 / pi, f)


# What heads are at the flow, by the first letter of their names: v2 is another v, and w is the velocity of samples. A
# critic d is 0. A mean velocity of which no r is told goes down to the data.
HEADS: dict[str, Head] = {
    "v": velocity_head,
    "w": velocity_head,
    "u": mean_velocity_head,
    "m": mean_velocity_head,
    "g": growth_head,
    "f": direction_head,
    "d": lambda flow, x, c, t, r: 0 * x,
}
INPUTS = {"t", "r", "k", "w", "beta", "low", "high"}


class ExactNet(nn.Module):
    """A network that returns the exact values of a flow, plus the error probe[head] times (1, x_t), initially 0.

    Heads are defined in `HEADS` and by the caller. The input k is a step of size 2^-k. At negative times the heads are
    the velocity at -t. The knobs w, or beta = 1 / w, low and high set the guidance of the flow. Gauges are 0. Raises
    UserError for heads and inputs without a definition.
    """

    def __init__(self, flow: ExactFlow, needs: Needs, heads: Mapping[str, Head] | None = None) -> None:
        super().__init__()
        self.flow = flow_on_path(flow, needs)
        self.needs = needs
        self.probe = nn.Parameter(torch.zeros(len(needs.heads), 2, dtype=D))

        known = {name: HEADS[name[0]] for name in needs.heads if name[:1] in HEADS} | dict(heads or {})
        unknown = [*({*needs.heads} - known.keys()), *({*needs.names} - INPUTS)]
        if unknown:
            raise UserError(
                f"the exact flow does not define {', '.join(sorted(unknown))}: use names v... for velocities, u... "
                "for mean velocities, t and r for times, or pass heads={name: f(flow, x, c, t, r)} to check_objective"
            )
        self.functions = [known[name] for name in needs.heads]

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, **inputs: Tensor) -> Heads:
        """Return the heads, each with its error, and the gauges."""
        flow = self._flow_of_knobs(inputs)
        moving = (x, t, inputs.pop("r")) if "r" in inputs else (x, t)

        outputs: list[Tensor] = []
        for name, function, (a, b) in zip(self.needs.heads, self.functions, self.probe, strict=True):

            def value(
                x: Tensor, t: Tensor, r: Tensor | None = None, name: str = name, function: Head = function
            ) -> Tensor:
                return function(flow, x, c, *self._times(name, t, r, inputs))

            outputs.append(opaque(value, *moving) + a + b * x)
        return *outputs, *(0 * primal(t) for _ in self.needs.gauges)

    def _flow_of_knobs(self, inputs: dict[str, Tensor]) -> ExactFlow:
        """The flow that the knobs ask for."""
        if not inputs.keys() & {"w", "beta"}:
            return self.flow
        w = inputs["w"] if "w" in inputs else 1 / inputs["beta"]
        low, high = inputs.get("low", torch.zeros_like(w)), inputs.get("high", torch.ones_like(w))
        guide = RowGuide(w, RowInterval(low, high))
        flow: Any = self.flow
        return replace(flow, guide=guide)

    def _times(self, head: str, t: Tensor, r: Tensor | None, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """t and r of a head: 0 where it is told no r."""
        is_told = "r" in (*self.needs.inputs, *self.needs.own.get(head, ()))
        r = r if r is not None and is_told else 0 * t
        if "k" in inputs:
            r = torch.where(inputs["k"] >= FINEST_STEP, t, t - torch.exp2(-inputs["k"]))
        if self.needs.signed:  # elsewhere a difference may go on beyond the data
            return t.abs(), torch.where(t < 0, -t, r)
        return t, r


def flow_on_path(flow: ExactFlow, needs: Needs) -> ExactFlow:
    """The flow on the first path of an objective's formulas."""
    return OnTrig(flow) if "trig" in needs.formulas.paths[:1] else flow


def opaque(f: Callable[..., Tensor], *at: Tensor) -> Tensor:
    """f(*at) for a dual number: whatever f is made of, its tangent is by forward-mode differentiation."""
    still = tuple(primal(a) for a in at)
    return carry(f(*still), _push_forward, at, f, still)


def _push_forward(*rest: Any) -> Tensor:  # noqa: ANN401, the changes of the arguments, then f and the arguments
    """The change of f; an argument whose change is None does not move."""
    *moved, f, at = rest
    along = tuple(torch.zeros_like(a) if d is None else d for a, d in zip(at, moved, strict=True))
    return torch.func.jvp(f, at, along)[1]


def table(*rows: list[float]) -> Tensor:
    """A tensor in float64."""
    return torch.tensor(rows, dtype=D)


def gaussian(guide: Guide = PLAIN) -> Gaussian:
    """Three classes of three widths around zero, and a null of a fourth."""
    return Gaussian(table([0.4, 0.6, 0.9, 0.7])[0], torch.zeros(4, dtype=D), guide)


APART = Gaussian(table([0.4, 0.6, 0.9, 0.7])[0], table([1.0, -0.5, 0.3, 0.0])[0])  # means, no guidance
CORNERS = table([1.0, 0.0, 1.0, 0.5, 0.3], [0.0, 0.0, 1.0, 0.5, 0.0])  # t and r


def exact_batch(objective: Objective, flow: ExactFlow, rows: int = 256) -> NoisyBatch:
    """A batch as training draws it, with v_t replaced by its mean given x_t, at the end of the training.

    The first rows are at the corners of time, where the law of times leaves rows alone. Targets are affine in v_t, so
    the gradient of a squared error is the gradient's mean over v_t, exactly: no noise is left, and what should vanish,
    vanishes.
    """
    g = torch.Generator().manual_seed(7)
    c = torch.randint(0, flow.classes, (rows,), generator=g)
    null = torch.full_like(c, flow.classes)
    on_path = flow_on_path(flow, objective.needs)
    path = Linear() if on_path is flow else Trig()
    x = flow.data(c, g)
    z = torch.randn(x.shape, generator=stream(0, 0, "z")).to(x)
    b = draw(
        objective,
        path,
        x,
        c,
        null,
        z=z,
        seed=0,
        step=0,
        progress=1.0,
        teacher=lambda x, t, c, v: on_path.velocity(x, c, t),
    )
    if objective.times.group > 1:  # rows belong together, or a step has to fit its time
        return b
    t, r = torch.cat([CORNERS[0], b.t[5:]]), torch.cat([CORNERS[1], b.r[5:]])
    return replace(b.at(t), r=r)


def gradient(objective: Objective, net: ExactNet, b: NoisyBatch) -> Tensor:
    """d mean loss / d probe, (heads, 2)."""
    loss = objective.loss(net, Frozen(net), b).loss.mean()
    return torch.autograd.grad(loss, net.probe)[0]


def stiffness(objective: Objective, net: ExactNet, b: NoisyBatch) -> Tensor:
    """How the gradient grows with the displacement of the heads, near the flow, where it is linear in it."""
    rest = gradient(objective, net, b)
    columns: list[Tensor] = []
    for direction in 1e-4 * torch.eye(net.probe.numel(), dtype=D):
        net.probe.data = direction.view_as(net.probe)
        columns.append((gradient(objective, net, b) - rest).flatten() / 1e-4)
    net.probe.data.zero_()
    return torch.stack(columns, 1)
