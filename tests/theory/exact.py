"""Flows whose every quantity is known, to hold the objectives against. Everything here is float64.

Data are Gaussians and mixtures of them, per class; along the linear path x_t = t z + (1 - t) x each component stays
Gaussian, with mean (1 - t) m and standard deviation S(t) = sqrt(t^2 + (1 - t)^2 s^2). So the mean velocity of the flow
is known in closed form, for one component

    v(x, t) = E[v_t | x_t = x] = A (x - (1 - t) m) - m        with   A(t) = S'/S,

and for a mixture the mean of these under the posterior of the component. The flow x_t -> x_r then is

- of a Gaussian, closed: (x - (1 - t) m) scales with S;
- of a guided Gaussian with m = 0, closed: v_w = (w A_c + (1 - w) A_0) x, so x scales with S_c^w S_0^(1 - w);
- of a mixture in one dimension, by quantiles: the flow keeps the order of points, so F_r(x_r) = F_t(x_t);
- of anything else, by Runge and Kutta.

`Exact` puts a flow behind the interface of a net, so that any objective can be asked whether it rests there. The last
class of every flow is its null condition.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import inf, pi, prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from dumo.autodiff.dual import carry, primal
from dumo.flow.guide import Guide
from dumo.flow.noise import draw
from dumo.flow.path import Linear, Trig
from dumo.runtime.random import stream
from dumo.types import Frozen, Heads, Needs, NoisyBatch, Objective

D = torch.float64
PLAIN = Guide()


def column(a: Tensor) -> Tensor:
    """One number per row, to multiply points with."""
    return a[:, None]


def spread(s: Tensor, t: Tensor) -> Tensor:
    """S(t): the standard deviation at time t of a component of standard deviation s."""
    return (t**2 + (1 - t) ** 2 * s**2).sqrt()


def growth(s: Tensor, t: Tensor) -> Tensor:
    """A(t) = d log S / dt."""
    return (t - (1 - t) * s**2) / spread(s, t) ** 2


@dataclass(frozen=True)
class Gaussian:
    """N(m, s^2 I) per class, guided by w at the times low <= t <= high; with guidance, all means are zero.

    As of every flow, `data` are samples of x, `velocity` is E[v_t | x_t = x, c], `guided` what guidance makes of it,
    and `carry` x_r of the guided flow through x_t = x; `classes` is also the index of the null condition.

    d log S_c^w S_0^(1-w) / dt = A_c + (w - 1) (A_c - A_0), and the second part counts only inside [low, high]: clamping
    the time of its integral says just that. An interval that reaches 0 or 1 goes on beyond it, as differences do.
    """

    std: Tensor  # (classes + 1,)
    mean: Tensor  # (classes + 1,)
    guide: Guide = PLAIN
    dim: int = 2

    def __post_init__(self) -> None:
        assert (torch.as_tensor(self.guide.scale) == 1).all() or not self.mean.any(), "no closed form"

    @property
    def classes(self) -> int:
        return len(self.std) - 1

    def data(self, c: Tensor, g: torch.Generator) -> Tensor:
        return column(self.mean[c]) + column(self.std[c]) * torch.randn(len(c), self.dim, generator=g, dtype=D)

    def velocity(self, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        m = self.mean[c]
        return column(growth(self.std[c], t)) * (x - column((1 - t) * m)) - column(m)

    def guided(self, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        extra = growth(self.std[c], t) - growth(self.std[-1], t)
        where = self._inside(t) == t
        return self.velocity(x, c, t) + column(where * extra * (self.guide.scale - 1)) * x

    def carry(self, x: Tensor, c: Tensor, t: Tensor, r: Tensor) -> Tensor:
        ratio = (self._log(c, r) - self._log(c, t)).exp()
        m = self.mean[c]
        return column((1 - r) * m) + column(ratio) * (x - column((1 - t) * m))

    def _log(self, c: Tensor, t: Tensor) -> Tensor:
        inside = self._inside(t)
        extra = spread(self.std[c], inside).log() - spread(self.std[-1], inside).log()
        return spread(self.std[c], t).log() + (self.guide.scale - 1) * extra

    def _inside(self, t: Tensor) -> Tensor:
        low, high = (torch.as_tensor(a, dtype=D) for a in (self.guide.interval.low, self.guide.interval.high))
        return t.clamp(torch.where(low > 0, low, -inf), torch.where(high < 1, high, inf))


@dataclass(frozen=True)
class Mixture:
    """Gaussian components shared by all classes, which differ in their weights; guided by w at all times."""

    weight: Tensor  # (classes + 1, k), rows sum to 1
    mean: Tensor  # (k, d)
    std: Tensor  # (k, d)
    guide: Guide = PLAIN

    @property
    def classes(self) -> int:
        return len(self.weight) - 1

    def data(self, c: Tensor, g: torch.Generator) -> Tensor:
        k = torch.multinomial(self.weight[c], 1, generator=g)[:, 0]
        return self.mean[k] + self.std[k] * torch.randn(self.mean[k].shape, generator=g, dtype=D)

    def velocity(self, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        """The mean of the components' velocities, each as likely as it is at x."""
        log, v = self._components(x, t)
        return (self._likely(log, c) * v).sum(1)

    def guided(self, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        log, v = self._components(x, t)
        likely, w = self._likely(log, c), torch.as_tensor(self.guide.scale, dtype=D).reshape(-1, 1, 1)
        if (w != 1).any():
            likely = w * likely + (1 - w) * self._likely(log, torch.full_like(c, self.classes))
        return (likely * v).sum(1)

    def carry(self, x: Tensor, c: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return integrate(lambda x, t: self.guided(x, c, t), x, t, r)

    def _components(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Of each component, the log of its density at x, coordinate by coordinate, and its velocity: (b, k, d)."""
        t = t[:, None, None]
        off, variance = x[:, None] - (1 - t) * self.mean, t**2 + (1 - t) ** 2 * self.std**2
        v = (t - (1 - t) * self.std**2) / variance * off - self.mean
        return -(off**2 / variance + variance.log()) / 2, v

    def _likely(self, log: Tensor, c: Tensor) -> Tensor:
        """The share of each component at x: one for the whole point."""
        return (log.sum(-1, keepdim=True) + self.weight[c].log()[..., None]).softmax(1)


@dataclass(frozen=True)
class Product(Mixture):
    """Every coordinate a mixture of its own: the flow acts on each alone, and moves quantiles to quantiles."""

    def data(self, c: Tensor, g: torch.Generator) -> Tensor:
        columns = [super(Product, self).data(c, g)[:, i] for i in range(self.mean.shape[1])]
        return torch.stack(columns, 1)

    def carry(self, x: Tensor, c: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Bisect for F_r(x_r) = F_t(x_t); a last step of Newton's carries the derivatives."""
        assert (torch.as_tensor(self.guide.scale) == 1).all(), "guidance mixes two flows: no quantiles"
        level = self.share(x, c, t)
        low, high = torch.full_like(x, -20).detach(), torch.full_like(x, 20).detach()
        for _ in range(60):
            middle = (low + high) / 2
            below = (self.share(middle, c, r) < level).detach()
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        y = ((low + high) / 2).detach()
        return y - (self.share(y, c, r) - level) / self.density(y, c, r).detach()

    def share(self, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        """F_t(x) of each coordinate, less a half."""
        t = t[:, None, None]
        deep = (x[:, None] - (1 - t) * self.mean) / spread(self.std, t)
        return (self.weight[c][..., None] * torch.erf(deep / sqrt(2))).sum(1) / 2

    def density(self, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        """p_t(x) of each coordinate."""
        t = t[:, None, None]
        deep = (x[:, None] - (1 - t) * self.mean) / spread(self.std, t)
        bell = (-(deep**2) / 2).exp() / (spread(self.std, t) * sqrt(2 * torch.pi))
        return (self.weight[c][..., None] * bell).sum(1)

    def _likely(self, log: Tensor, c: Tensor) -> Tensor:
        """The share of each component at x: one for each coordinate."""
        return (log + self.weight[c].log()[..., None]).softmax(1)


@dataclass(frozen=True)
class OnTrig:
    """A flow of the linear path on the trigonometric one: x_t = x_s / n(s), s / (1 - s) = tan(pi t / 2).

    Here n(s)^2 = s^2 + (1 - s)^2. The means of noise and data given x_t are the same points' on both paths, whence the
    velocity.
    """

    of: "Flow"

    @property
    def classes(self) -> int:
        return self.of.classes

    def data(self, c: Tensor, g: torch.Generator) -> Tensor:
        return self.of.data(c, g)

    def velocity(self, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        return self._turned(self.of.velocity, x, c, t)

    def guided(self, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        return self._turned(self.of.guided, x, c, t)

    def carry(self, x: Tensor, c: Tensor, t: Tensor, r: Tensor) -> Tensor:
        (s, n), (q, m) = self._there(t), self._there(r)
        return self.of.carry(column(n) * x, c, s, q) / column(m)

    def _turned(self, f: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        s, n = self._there(t)
        x_s, angle = column(n) * x, column(t * pi / 2)
        v = f(x_s, c, s)
        data, noise = x_s - column(s) * v, x_s + column(1 - s) * v
        return pi / 2 * (angle.cos() * noise - angle.sin() * data)

    def _there(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The time on the linear path, and its n."""
        sin, cos = (t * pi / 2).sin(), (t * pi / 2).cos()
        return sin / (sin + cos), 1 / (sin + cos)


Flow = Gaussian | Mixture | OnTrig


def integrate(f: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """x_r by eight explicit Runge-Kutta steps of order 12: midpoint rules of n substeps, extrapolated (Gragg 1965)."""
    fine = (2, 4, 6, 8, 10, 12)
    weight = [prod(n**2 / (n**2 - k**2) for k in fine if k != n) for n in fine]  # their errors are even in 1 / n
    h = (r - t) / 8
    for i in range(8):
        x = sum((w * _midpoint(f, x, t + i * h, h, n) for w, n in zip(weight, fine, strict=True)), 0 * x)
    return x


def _midpoint(f: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, h: Tensor, n: int) -> Tensor:
    """x after a time h, in n leaps over the last point."""
    dt = h / n
    last, x = x, x + column(dt) * f(x, t)
    for k in range(1, n):
        last, x = x, last + 2 * column(dt) * f(x, t + k * dt)
    return (last + x + column(dt) * f(x, t + h)) / 2


def opaque(f: Callable[..., Tensor], *at: Tensor) -> Tensor:
    """f(x, t, r) for a slope that rides: whatever f is made of, its tangent is by forward-mode differentiation."""
    still = tuple(primal(a) for a in at)
    return carry(f(*still), push_forward, at, f, still)


def push_forward(*rest: Any) -> Tensor:  # noqa: ANN401, the changes of x, t, r, then f and these
    """The change of f(x, t, r); None: it does not move."""
    *moved, f, at = rest
    along = tuple(torch.zeros_like(a) if d is None else d for a, d in zip(at, moved, strict=True))
    return torch.func.jvp(f, at, along)[1]


@dataclass(frozen=True)
class Told:
    """What the knobs of a net say of guidance: numbers per row, where a Guide has one for all."""

    scale: Tensor
    interval: "Told | None" = None
    low: Tensor | float = 0.0
    high: Tensor | float = 1.0


LEVELS = 7  # of steps 2^-k: the finest stands for none (Shortcut models)


class Exact(nn.Module):
    """A net that knows its flow. Each head is off by probe[head] of 1 and of x_t, at first by nothing.

    Heads: v and w, the velocity; d, a critic, 0; u and m, the mean velocity down to r, 0 where no r reaches them; g,
    the mean of dv_i/dx_i on the way from r, of a flow that acts on each coordinate alone; f, the mean direction on the
    trigonometric path. A step may be told as k, of size 2^-k. At negative times all of them are the velocity at -t. The
    knobs w, low and high are those of a guided flow. Gauges are zero. An objective with others is refused until they
    are taught here.
    """

    def __init__(self, flow: Flow, needs: Needs) -> None:
        super().__init__()
        self.flow, self.needs = OnTrig(flow) if "trig" in needs.formulas.paths[:1] else flow, needs
        self.probe = nn.Parameter(torch.zeros(len(needs.heads), 2, dtype=D))

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, **inputs: Tensor) -> Heads:
        assert not inputs.keys() - {"r", "k", "w", "low", "high"}
        flow = self.told(inputs)
        r = {"r": inputs.pop("r")} if "r" in inputs else {}  # it may move

        def head(name: str, x: Tensor, t: Tensor, *r: Tensor) -> Tensor:
            return self.head(flow, name, x, c, t, inputs | dict(zip("r", r, strict=False)))

        known = [opaque(partial(head, name), x, t, *r.values()) for name in self.needs.heads]
        gauges = (0 * primal(t) for _ in self.needs.gauges)
        return *(y + a + b * x for y, (a, b) in zip(known, self.probe, strict=True)), *gauges

    def told(self, inputs: dict[str, Tensor]) -> Flow:
        """The flow that the knobs ask for."""
        if "w" not in inputs:
            return self.flow
        limits = Told(inputs["w"], None, inputs["low"], inputs["high"])
        return replace(self.flow, guide=Told(inputs["w"], limits))

    def head(self, flow: Flow, head: str, x: Tensor, c: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """What a head of this name is, as a function of x and t."""
        if head == "d":
            return 0 * x
        if head[0] in "vw":  # v2 is another; w is that of samples
            return flow.guided(x, c, t)
        r = 0 * t
        if "k" in inputs:
            r = torch.where(inputs["k"] >= LEVELS, t, t - torch.exp2(-inputs["k"]))
        elif "r" in (*self.needs.inputs, *self.needs.own.get(head, ())):
            r = inputs["r"]
        if self.needs.signed:  # elsewhere a difference may go on beyond the data
            t, r = t.abs(), torch.where(t < 0, -t, r)
        if head == "g":
            return self.growth(x, c, t, r, flow)
        return self.direction(flow, x, c, t) if head == "f" else self.average(x, c, t, r, flow)

    def average(self, x: Tensor, c: Tensor, t: Tensor, r: Tensor, flow: Flow | None = None) -> Tensor:
        """(x_t - x_r) / (t - r), and where r = t its limit."""
        same, flow = column(t == r), flow or self.flow
        u = (x - flow.carry(x, c, t, r)) / torch.where(same, 1, column(t - r))
        return torch.where(same, flow.guided(x, c, t), u)

    def growth(self, x: Tensor, c: Tensor, t: Tensor, r: Tensor, flow: Flow) -> Tensor:
        """The logarithm of dx_t/dx_r over t - r, and where r = t its limit."""

        def moved(f: Callable[[Tensor], Tensor]) -> Tensor:
            return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]

        if isinstance(flow, Product):  # carry has no second derivatives
            way = (flow.density(flow.carry(x, c, t, r), c, r) / flow.density(x, c, t)).log()
        else:
            way = -moved(lambda x: flow.carry(x, c, t, r)).log()
        same = column(t == r)
        limit = moved(lambda x: flow.guided(x, c, t))
        return torch.where(same, limit, way / torch.where(same, 1, column(t - r)))

    def direction(self, flow: Flow, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        """(cos(theta) x_t - x_0) / sin(theta), and at t = 0 its limit."""
        angle, start = column(t * pi / 2), column(t == 0)
        f = (angle.cos() * x - flow.carry(x, c, t, 0 * t)) / torch.where(start, 1, angle.sin())
        return torch.where(start, flow.guided(x, c, t) * 2 / pi, f)


def table(*rows: list[float]) -> Tensor:
    """A tensor in float64."""
    return torch.tensor(rows, dtype=D)


def gaussian(guide: Guide = PLAIN) -> Gaussian:
    """Three classes of three widths around zero, and a null of a fourth."""
    return Gaussian(table([0.4, 0.6, 0.9, 0.7])[0], torch.zeros(4, dtype=D), guide)


def plane(guide: Guide = PLAIN) -> Mixture:
    """Two classes of two components each, in the plane; the null has all four."""
    weight = table([0.4, 0.6, 0, 0], [0, 0, 0.5, 0.5], [0.2, 0.3, 0.25, 0.25])
    mean, std = (
        table([-0.8, 0.6], [0.7, -0.5], [0.4, 0.9], [-0.3, -0.9]),
        table([0.7, 0.8], [0.8, 0.7], [0.9, 0.6], [0.7, 0.7]),
    )
    return Mixture(weight, mean, std, guide)


APART = Gaussian(table([0.4, 0.6, 0.9, 0.7])[0], table([1.0, -0.5, 0.3, 0.0])[0])  # means, no guidance
PRODUCT = Product(
    weight=table([0.3, 0.7, 0.0], [0.5, 0.2, 0.3], [0.2, 0.5, 0.3]),
    mean=table([-1.0, 0.8], [0.4, -0.6], [1.0, 0.0]),
    std=table([0.3, 0.5], [0.4, 0.3], [0.6, 0.4]),
)

CORNERS = table([1.0, 0.0, 1.0, 0.5, 0.3], [0.0, 0.0, 1.0, 0.5, 0.0])  # t and r


def record(objective: Objective, flow: Flow, rows: int = 256) -> NoisyBatch:
    """What a training step sees, v_t replaced by its mean given x_t; the first rows are at the corners of time, where
    the law of times leaves rows alone.

    The training is over: what grows or shrinks with it has arrived. Targets are affine in v_t, so the gradient of a
    squared error there is the gradient's mean over v_t, exactly: no noise is left, and what should vanish, vanishes.
    """
    g = torch.Generator().manual_seed(7)
    c = torch.randint(0, flow.classes, (rows,), generator=g)
    null = torch.full_like(c, flow.classes)
    trig = "trig" in objective.needs.formulas.paths[:1]
    path, on = (Trig(), OnTrig(flow)) if trig else (Linear(), flow)
    key: dict[str, Any] = {"seed": 0, "step": 0, "progress": 1.0}
    x = flow.data(c, g)
    # Noise of its own: numbers that were made elsewhere for these very rows outlive a change of how training draws.
    z = torch.randn(x.shape, generator=stream(0, 0, "z")).to(x)
    b = draw(objective, path, x, c, null, z=z, **key, teacher=lambda x, t, c, v: on.velocity(x, c, t))
    if objective.times.group > 1:  # rows belong together, or a step has to fit its time
        return b
    t, r = torch.cat([CORNERS[0], b.t[5:]]), torch.cat([CORNERS[1], b.r[5:]])
    return replace(b.at(t), r=r)


def gradient(objective: Objective, net: Exact, b: NoisyBatch) -> Tensor:
    """d mean loss / d probe, (heads, 2)."""
    loss = objective.loss(net, Frozen(net), b).loss.mean()
    return torch.autograd.grad(loss, net.probe)[0]


def drawn(
    objective: Objective, n: int = 64, flow: Flow | None = None, *, teacher: bool = False, progress: float = 0.0
) -> NoisyBatch:
    """Rows as training draws them; with a teacher, v_t is its mean."""
    flow, g = flow or gaussian(), torch.Generator().manual_seed(1)
    c = torch.arange(n) % flow.classes
    mean = (lambda x, t, c, v: flow.velocity(x, c, t)) if teacher else None
    key: dict[str, Any] = {"seed": 0, "step": 0, "progress": progress, "teacher": mean}
    return draw(objective, Linear(), flow.data(c, g), c, torch.full_like(c, flow.classes), **key)


def stiffness(objective: Objective, net: Exact, b: NoisyBatch) -> Tensor:
    """How the gradient grows with the displacement of the heads, near the flow, where it is linear in it."""
    rest, columns = gradient(objective, net, b), []
    for direction in 1e-4 * torch.eye(net.probe.numel(), dtype=D):
        net.probe.data = direction.view_as(net.probe)
        columns.append((gradient(objective, net, b) - rest).flatten() / 1e-4)
    return torch.stack(columns, 1)


def falls(left: Sequence[Tensor], order: float, within: float = 0.1) -> bool:
    """Whether errors, of steps each half of the one before, are of this order."""
    return all(((coarse / fine).log2() - order).abs().max() < within for coarse, fine in pairwise(left))
