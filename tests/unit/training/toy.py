"""A small net, objective and data for the tests of training."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from dumo.flow.module import Flow
from dumo.flow.path import FlowPath, Linear
from dumo.runtime.random import stream
from dumo.training.duration import Timing
from dumo.training.ema import Ema
from dumo.training.layout import full_tensor
from dumo.training.metrics import StepMetrics
from dumo.training.optim import Adam, AdamW
from dumo.training.settings import Train
from dumo.training.state import State, begin
from dumo.types import (
    Cond,
    Frozen,
    Heads,
    Needs,
    Net,
    NoisyBatch,
    Objective,
    Readings,
    Sample,
    Spec,
    TeacherVelocity,
    Terms,
    Time,
    TimeLaw,
    mean_square,
)
from trained import ToyTrainer

CLASSES = 3
OPTIMIZERS = (AdamW(lr=1e-2, weight_decay=0.1), Adam(lr=1e-2))
AVERAGES = (Ema(decay=0.99), Ema(decay=0.9, ramp=False))


class Small(nn.Module):
    """Two layers, a label table, and a buffer that counts passes."""

    passes: Tensor

    def __init__(self, seed: int = 0, width: int = 8, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, width), nn.Linear(width, 2)
        self.label = nn.Embedding(CLASSES + 1, width)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        g = stream(seed, "small")
        for p in self.parameters():
            p.data = 0.5 * torch.randn(p.shape, generator=g)
        self.to(dtype)

    def forward(self, x: Sample, c: Cond, /, *, t: Time) -> Heads:
        self.passes += 1
        h = self.first(torch.cat([x, t[:, None].to(x)], 1)) + self.label(c)
        return (self.last(torch.tanh(h)),)


class Still(TimeLaw):
    """Uniform, without a step."""

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """In double precision."""
        return (t := torch.rand(n, generator=g, dtype=torch.float64)), t


class Toy(Spec):
    """Flow matching, pulled to the reference without a label: so that ref, null, t and progress all matter."""

    kind: str = "toy"
    needs: ClassVar[Needs] = Needs()
    drop: float = 0.3

    times: TimeLaw = Still()

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Square of the slope's error, plus a growing pull."""
        (v_hat,), (v_null,) = net(b.x_t, b.c, t=b.t), ref(b.x_t, b.null, t=b.t)
        v, pull = mean_square(v_hat - b.v_t), mean_square(v_hat - v_null)
        return Terms(v + 0.1 * (1 + b.progress) * pull, {"v": v, "pull": pull})

    def readings(self, net: Net) -> Readings:
        """Not needed here."""
        return Readings()


def flow_of(
    state: State,
    spec: Train,
    objective: Objective,
    path: FlowPath,
    classes: int,
    teacher: TeacherVelocity | None = None,
    prior: float | None = None,
) -> Flow:
    """A net and an objective as they are trained: `dumo.run.net.make_flow` without a run."""
    return Flow(
        state.net,
        objective,
        direct=True,
        classes=classes,
        path=path,
        coupling=spec.coupling,
        teacher=teacher,
        prior=prior,
        ref=None if spec.ref == "self" else state.averages[spec.ref].module,
        precision=spec.precision,
        seed=spec.seed,
    )


def flow_of_toy(state: State, spec: Train) -> Flow:
    """The net of a state, taught by the toy."""
    return flow_of(state, spec, Toy(), Linear(), CLASSES)


def toy(change: Callable[[Terms, NoisyBatch], Terms]) -> Toy:
    """The toy with another loss, which is made of its own."""

    class Changed(Toy):
        def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
            return change(super().loss(net, ref, b), b)

    return Changed()


def batches(batch: int = 12, dtype: torch.dtype = torch.float64) -> Callable[[int], tuple[Sample, Cond]]:
    """Points around one place per label."""

    def of(step: int) -> tuple[Sample, Cond]:
        g = stream("batch", step)
        c = torch.randint(CLASSES, (batch,), generator=g)
        x = torch.stack([c - 1, 1 - c], 1) + 0.1 * torch.randn(batch, 2, generator=g, dtype=torch.float64)
        return x.to(dtype), c

    return of


def run(
    state: State,
    spec: Train,
    *,
    objective: Toy | None = None,
    batch_at: Callable[[int], tuple[Sample, Cond]] | None = None,
    after: Sequence[Callable[[State, StepMetrics], object]] = (),
    read_clock: Callable[[], Timing] | None = None,
) -> State:
    """Train the toy on this rank's rows and return the state; `after` each step these are called."""
    make = batch_at or batches(spec.batch, next(state.net.parameters()).dtype)
    trainer = ToyTrainer(state, flow_of(state, spec, objective or Toy(), Linear(), CLASSES), spec)
    while not state.is_over:
        batch = [part[trainer.rows] for part in make(state.step)]
        metrics = trainer.step(batch, timing=read_clock() if read_clock else None)
        for call in after:
            call(state, metrics)
    return state


def trained(spec: Train | None = None, seed: int = 0) -> State:
    """A state after a few steps."""
    spec = spec or Train(steps=3, batch=12, ema=AVERAGES)
    return run(begin(Small(seed), spec), spec)


def tensors(state: State) -> dict[str, Tensor]:
    """Every tensor of a state, whole, by name; moments by parameter. All ranks must ask."""
    modules = {"net": state.net, **{f"{decay}": average.module for decay, average in state.averages.items()}}
    found = {f"{part}.{name}": x for part, module in modules.items() for name, x in module.state_dict().items()}
    for name, p in state.net.named_parameters():
        found |= {f"optimizer.{key}.{name}": x for key, x in state.optimizer.state.get(p, {}).items()}
    return {name: full_tensor(x.detach()).clone() for name, x in found.items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Whether names, dtypes and bits agree."""
    return one.keys() == two.keys() and all(
        value.dtype == two[name].dtype and torch.equal(value, two[name]) for name, value in one.items()
    )
