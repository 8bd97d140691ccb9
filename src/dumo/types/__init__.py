"""The shared types of dumo: tensor shapes, protocols and base classes.

Time runs from t = 0, the data x, to t = 1, the noise z. Times are dimensionless, in [0, 1], one per row.

In the order of a training step:

1. a `TimeLaw` draws the times (t, r), and a `Law` each additional random input of a loss;
2. a `NoisyBatch` has these, data, noise, conditions, and other inputs in the `Needs` of an objective;
3. an `Objective` computes `Terms`, a loss per row, with a `Net` and, as theta^-, a `Frozen` net;
4. the objective provides `Readings` of the trained net, which a solver calls.

Everything is public: user classes derive from `Spec`, `TimeLaw`, the base classes in `outside` and
`dumo.objectives.base.ObjectiveSpec`. Imports no other subpackage.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import BaseModel, ConfigDict
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo
from torch import Generator, Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from dumo.error import UserError as UserError
from dumo.types.batch_rows import index, split_by_moving, to_device

if TYPE_CHECKING:
    Array = Tensor
else:
    Array = Any  # a Tensor or a `dumo.autodiff.dual.Dual`

# Shapes: b is the batch size, *d the shape of a sample, *c the shape of a condition.
Sample = Float[Array, "b *d"]  # x, z, x_t, v, u
Time = Float[Array, " b"]  # t, r, s; 0 is data, 1 is noise
PerSample = Float[Tensor, " b"]  # one number per row
Trail = Float[Array, "b points *d"]  # points of each row's trajectory, starting at the data
Rows = Bool[Tensor, " b"]  # a mask of rows
Cond = Shaped[Tensor, "b *c"]  # class indices (b,), or a text embedding
Heads = tuple[Array, ...]  # what a net returns: Samples of heads and PerSamples of gauges, in the order of `Needs`

# Functions
TeacherVelocity = Callable[[Sample, Time, Cond, Sample], Sample]  # a teacher: (x_t, t, c, v_t) -> the velocity to learn
Climb = Callable[[Sample, Time, Time, Cond], tuple[Sample, PerSample]]  # (x_t, t, s, c) -> x_s, growth of log volume

# Marks of spec fields, in their JSON schema as `json_schema_extra`.
# - Fields that may change when a run is resumed. CHANGES affects the weights, so run.yaml records the step.
FREE: JsonDict = {"free": True}
CHANGES: JsonDict = {"changes": True}
# - Display
QUIET: JsonDict = {"quiet": True}  # the field is not shown at its default
MACHINE: JsonDict = FREE | QUIET  # for fields that depend on the machine, and for files that a run keeps
# - Paths, which are made absolute when a run starts (`dumo.run.resolve.with_absolute_paths`). Their content is
#   identified by a hash, so most paths are FREE.
WHERE: JsonDict = {"where": "always"}  # a path, which must not change
PLACE: JsonDict = FREE | WHERE  # a path, which may change
MAYBE_PLACE: JsonDict = FREE | {"where": "maybe"}  # a path if it exists, else a name
# - Fields that may name a Hugging Face Hub repository, whose commit is pinned when a run starts (`dumo.io.hub`)
HUB_MODEL: JsonDict = {"hub": "model"}
HUB_DATASET: JsonDict = {"hub": "dataset"}
# - Fields that dumo fills in
PINNED: JsonDict = {"pinned": True}  # a hash, recorded when the run starts


def marks_of(field: FieldInfo) -> Mapping[str, Any]:
    """Return a field's marks by name."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


class Spec(BaseModel):
    """A frozen description of something to build. A field with alternatives is a union of specs, selected by `kind`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@runtime_checkable
class Net(Protocol):
    """F(x_t, c; t, r, w ...): times and knobs go in by name, heads and gauges come out in the order of `Needs`."""

    def __call__(self, x: Sample, c: Cond, /, **inputs: Time) -> Heads: ...


@dataclass(frozen=True)
class Frozen:
    """theta^-: the net in training or its EMA, without gradients."""

    module: nn.Module

    @torch.no_grad()
    def __call__(self, x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        """Return the outputs of the net, without gradients."""
        return self.module(x, c, **inputs)


def unwrap(net: Net) -> nn.Module:
    """Return the network inside its wrappers: DataParallel, DistributedDataParallel, AveragedModel, torch.compile.

    A network of another class is returned unchanged, even if it has a submodule named `module`.
    """
    while True:
        compiled_from = vars(net).get("_modules", {}).get("_orig_mod")  # of torch.compile
        if isinstance(net, DataParallel | DistributedDataParallel | AveragedModel):
            net = net.module
        elif isinstance(compiled_from, nn.Module):
            net = compiled_from
        else:
            return cast(nn.Module, net)


def frozen(net: Net) -> Frozen:
    """Return theta^- with the weights in training: the net without wrappers and gradients."""
    return Frozen(unwrap(net))


def fake_score(net: Net) -> AbstractContextManager[object]:
    """Within the context, passes of the net use its fake score's own weights, if it has any (`Needs.fake_score`).

    This includes passes of `frozen(net)`. The backward pass may be outside of the context.
    """
    switch: Callable[[], AbstractContextManager[object]] | None = getattr(unwrap(net), "fake_score", None)
    return switch() if switch else nullcontext()


class TimeLaw(Spec, ABC):
    """The distribution of the times (t, r) of a batch's rows; r <= t, unless `climbs`."""

    @abstractmethod
    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw t and r of n rows, both (n,), with the generator g."""

    @property
    def group(self) -> int:
        """The size of groups of consecutive rows, which must not be split."""
        return 1

    def moving(self, n: int) -> tuple[bool, ...] | None:
        """Return which of the first n rows may have r != t, by position in the batch; None means all rows."""
        return None

    @property
    def moving_share(self) -> float:
        """The fraction of rows that may have r != t (`moving`), in [0, 1]."""
        return 1.0

    @property
    def between(self) -> bool:
        """Whether some jumps end before the data, at r > 0, so that further jumps can follow them."""
        return True

    @property
    def trains_velocity(self) -> bool:
        """Whether a mean velocity is learned at r = t, where it is the velocity: not if every row has r = 0."""
        return self.between or self.moving_share < 1

    @property
    def climbs(self) -> bool:
        """Whether some rows have r > t: jumps towards the noise."""
        return False


class Law(Spec, ABC):
    """The distribution of an additional random number or sample that a loss reads in `NoisyBatch.drawn`."""

    @abstractmethod
    def rows(self, key: Sequence[int | str], rows: range, batch: int, shape: Sequence[int]) -> Sample | PerSample:
        """Draw for these rows of a batch with a key of `dumo.runtime.random`.

        A row does not depend on the other rows that are drawn. `shape` is the shape of a sample. Returns
        (len(rows), *shape), or (len(rows),).
        """


class Formulas(NamedTuple):  # as a default of `Needs` no dataclass, which a compiler could not follow
    """The conditions under which the formulas of an objective hold."""

    paths: tuple[str, ...] = ("linear",)  # the kinds of paths
    climbs: bool = False  # also for r > t
    unit: bool = False  # only for data of standard deviation 1, because some constants are meant for that


STRAIGHT = Formulas(paths=("linear", "diffusion"))  # if only v = (x_t - x) / t is used


class FromTeacher(NamedTuple):
    """The teacher outputs that a loss uses: its velocity, or points of its trajectories."""

    velocity: Literal["may", "must", "no"] = "may"  # may: it can replace v_t; must: it is required
    points: int = 0  # number of trajectory steps whose ends the loss uses
    reads_v_t: bool = True  # whether the loss reads v_t


@dataclass(frozen=True)
class Needs:
    """The requirements of an objective on its net and its loss, for building, checking, counting and sampling."""

    # Inputs and outputs of the net.
    inputs: tuple[str, ...] = ("t",)  # the times that `readings` supplies: t, r
    heads: tuple[str, ...] = ("v",)  # outputs shaped like the data, all of them used by the loss
    gauges: tuple[str, ...] = ()  # outputs with one number per row
    knobs: Mapping[str, float] = field(default_factory=dict)  # defaults of conditioning inputs that a sampler may set
    own: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # inputs of some heads only, by head
    signed: bool = False  # whether the net gets negative times

    # Inputs and properties of the loss.
    formulas: Formulas = Formulas()  # noqa: RUF009, a tuple
    laws: Mapping[str, Law] = field(default_factory=dict)  # additional random inputs, by name in `drawn`
    slope: Spec | None = None  # how du/dt is computed: the field `slope`, from `dumo.flow.slope`
    guide: Spec | float | None = None  # what guides v*: the field `guide`, of `dumo.flow.guide`, or the field `scale`
    teacher: FromTeacher = FromTeacher()  # noqa: RUF009, a tuple
    group: int = 1  # the number of consecutive rows that the loss combines
    compares_rows: bool = False  # it uses distances between samples and data of the same label
    diffuses_samples: bool = False  # it compares the velocities of noised samples and data
    reads_null: bool = False  # it learns from the difference that a condition makes, and so needs conditions
    ref: float | None = None  # the EMA decay of theta^- in the paper; None: the weights in training
    scheduled: bool = False  # it changes with `NoisyBatch.progress`
    fake_score: bool = False  # head w has weights of its own, if the net can have them (`dumo.types.fake_score`)
    amplifies: float = 0.0  # the maximum amplification of the net's rounding error (`dumo.flow.precision`)

    # Pairs (progress, fraction of the training) for cost estimates: the steps of a phase cost as a step at `progress`.
    phases: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    # Likewise pairs (step, fraction of the steps) of a loss that changes with `NoisyBatch.step`.
    cycle: tuple[tuple[int, float], ...] = ((0, 1.0),)

    @property
    def shared(self) -> tuple[str, ...]:
        """The names of the inputs that every head gets: `inputs`, then `knobs`."""
        return (*self.inputs, *self.knobs)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all inputs of the net: shared inputs, then inputs of some heads."""
        names = [*self.shared]
        for inputs in self.own.values():
            names.extend(inputs)
        return tuple(dict.fromkeys(names))


@runtime_checkable
class Path(Protocol):
    """x_t = alpha(t) z + gamma(t) x (paper, Eq. 1), the interface of the paths in `dumo.flow.path`."""

    def at(self, x: Sample, z: Sample, t: Time) -> tuple[Sample, Sample]:
        """Return x_t and its conditional slope v_t = dx_t/dt, given data and noise."""
        ...

    def gamma(self, t: Tensor) -> Tensor:
        """Return the weight of the data at time t."""
        ...

    @property
    def initial_std(self) -> float:
        """The standard deviation of a sampler's first x_t."""
        ...


class OnHost(NamedTuple):
    """Values of a `NoisyBatch` on the CPU, from which the rows of a pass are chosen."""

    t: Time
    kept: Rows
    teacher_rows: Rows | None = None


@dataclass(frozen=True)
class NoisyBatch:
    """A minibatch with all random numbers already drawn, so that a loss is deterministic."""

    # Data and noise on the path.
    path: Path
    x: Sample  # the data in units of the path's sd
    z: Sample
    t: Time
    r: Time
    x_t: Sample
    v_t: Sample  # dx_t/dt: given (x, z), or the teacher's where `FromTeacher.reads_v_t`

    # conditions
    c: Cond  # `null` on rows whose condition was dropped
    null: Cond
    kept: Rows  # the rows to guide: the condition was not dropped, and the teacher, guided itself, does not answer them

    # Inputs of some objectives.
    moving: tuple[bool, ...] | None = None  # the rows that may have r != t, by position; None: all
    drawn: Mapping[str, Tensor] = field(default_factory=dict)  # by name, what `Needs.laws` drew
    progress: float = 0.0  # the completed fraction of the training, in [0, 1]
    step: int = 0  # the number of steps before this one
    teacher: TeacherVelocity | None = None  # returns the velocity to use instead of v_t
    trail: Trail | None = None  # each row's trajectory at equal steps from t = 0 to 1, if known
    host: OnHost | None = None  # CPU copies, if the batch is on another device
    teacher_rows: Rows | None = None  # the rows with a teacher velocity; None: all, if there is a teacher

    @property
    def on_host(self) -> OnHost | None:
        """Values on the CPU, which can be read without a device synchronization, or None."""
        if type(self.t) is Tensor and self.t.device.type == "cpu":
            return OnHost(self.t, self.kept, self.teacher_rows)
        return self.host

    def at(self, s: Time | float, x: Sample | None = None, z: Sample | None = None) -> "NoisyBatch":
        """Return the same rows at another time s, (b,) or one number, with other data x and noise z if given.

        Any row of the result may have r != t.
        """
        host = None
        if not isinstance(s, Tensor):
            if self.host is not None:
                host = self.host._replace(t=torch.full_like(self.host.t, s))
            s = torch.full_like(self.t, s)
        x = self.x if x is None else x
        z = self.z if z is None else z
        x_s, v_s = self.path.at(x, z, s)
        v_s = self.velocity(x_s, s, v_s)
        return replace(self, x=x, z=z, t=s, x_t=x_s, v_t=v_s, moving=None, host=host)

    def velocity(self, x: Sample, s: Time, v: Sample) -> Sample:
        """Return the target velocity at the point x and time s: the teacher's on `teacher_rows`, else v.

        Only these rows make a pass of the teacher, if they are known on the CPU.
        """
        if self.teacher is None:
            return v
        if self.teacher_rows is None:
            return self.teacher(x, s, self.c, v)
        on_host = self.on_host
        if on_host is None or on_host.teacher_rows is None or torch.compiler.is_compiling():
            return torch.where(lift(self.teacher_rows, v), self.teacher(x, s, self.c, v), v)
        # At least one row makes the pass, so that every rank makes it.
        places = on_host.teacher_rows.nonzero().flatten()
        if not len(places):
            places = places.new_zeros(1)
        i = to_device(places, v.device)
        v_i = v[i]
        taught_v = torch.where(lift(self.teacher_rows[i], v_i), self.teacher(x[i], s[i], self.c[i], v_i), v_i)
        return v.to(taught_v).index_copy(0, i, taught_v)

    def on(self, s: Time) -> Sample:
        """Return x_s on each row's trajectory, where s must be one of its time steps, or on the path without one."""
        if self.trail is None:
            return self.path.at(self.x, self.z, s)[0]
        point = (s * (self.trail.shape[1] - 1)).round().long()
        row = torch.arange(len(point), device=point.device)
        return self.trail[row, point]

    @property
    def moving_and_resting_rows(self) -> tuple[list[int], list[int]]:
        """Return the indices of rows that may have r != t, and of rows that may have r = t; both are all if unknown."""
        if self.moving is None:
            return list(range(len(self.t))), list(range(len(self.t)))
        return split_by_moving(self.moving)

    def __getitem__(self, rows: slice | list[int] | Int[Tensor, " k"]) -> "NoisyBatch":
        """Return a batch of some of the rows.

        `moving` is kept unless `rows` is a tensor, because reading it would synchronize the device.
        """
        moving = self.moving
        host = self.host
        places: slice | Tensor
        if isinstance(rows, Tensor):
            places = rows
            moving = None
            host = None
        elif isinstance(rows, slice):
            places = rows
            moving = None if moving is None else moving[rows]
        else:
            places = index(rows, self.t.device)
            moving = None if moving is None else tuple(moving[i] for i in rows)
        if host is not None:
            taught = host.teacher_rows
            host = OnHost(host.t[rows], host.kept[rows], None if taught is None else taught[rows])
        tensors: dict[str, Any] = {}
        for record_field in fields(self):
            value = getattr(self, record_field.name)
            if isinstance(value, Tensor):
                tensors[record_field.name] = value[places]
        drawn = {name: value[places] for name, value in self.drawn.items()}
        return replace(self, **tensors, moving=moving, drawn=drawn, host=host)


@dataclass(frozen=True)
class Terms:
    """The loss of each row, its parts by name, and values to log. The trainer logs their means by time t."""

    loss: PerSample  # its mean is minimized
    parts: Mapping[str, PerSample] = field(default_factory=dict)  # not dict[str, Tensor], which does not compile
    notes: Mapping[str, PerSample] = field(default_factory=dict)  # only logged, without gradients

    def detach(self) -> "Terms":
        """Return a copy without gradients."""
        parts = {name: rows.detach() for name, rows in self.parts.items()}
        notes = {name: rows.detach() for name, rows in self.notes.items()}
        return Terms(self.loss.detach(), parts, notes)


@dataclass(frozen=True)
class Readings:
    """The functions of a trained net that a solver can call; None if the objective does not train it."""

    velocity: Callable[[Sample, Time, Cond], Sample] | None = None  # (x_t, t, c) -> dx_t/dt
    endpoint: Callable[[Sample, Time, Cond], Sample] | None = None  # (x_t, t, c) -> x_0
    flow_map: Callable[[Sample, Time, Time, Cond], Sample] | None = None  # (x_t, t, s, c) -> x_s
    both: Callable[[Sample, Time, Cond], tuple[Sample, Sample]] | None = None  # (x_t, t, c) -> dx_t/dt, x_0: one pass
    climb: Climb | None = None  # a jump from t up to s, and how much it adds to the log of volume: one pass

    # where these hold
    hops: Callable[[float, float], bool] | None = None  # (t, s) -> whether this jump is trained; None means all
    lowest: float = 0.0  # the lowest time at which the endpoint is trained
    only: tuple[float, ...] | None = None  # the times at which the endpoint is trained; None means all from `lowest`


@runtime_checkable
class Objective(Protocol):
    """A frozen spec of a training loss and of the functions to sample with. dumo uses only these attributes."""

    @property
    def kind(self) -> str:
        """The name of the objective."""
        ...

    @property
    def needs(self) -> Needs:
        """The requirements of the objective on its net and its loss."""
        ...

    @property
    def times(self) -> TimeLaw:
        """The distribution of (t, r)."""
        ...

    @property
    def drop(self) -> float:
        """The probability that a row's condition is dropped, in [0, 1]."""
        ...

    def __iter__(self) -> Iterator[tuple[str, object]]:
        """Iterate over the fields as pairs of name and value, like pydantic."""
        ...

    def model_copy(self, *, update: Mapping[str, Any]) -> "Objective":
        """Return a copy with other values for some fields, without validation, like pydantic."""
        ...

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Return the loss of each row of a batch, without side effects and without drawing random numbers.

        The passes of the net, and their order, must not depend on the values in the batch.
        """
        ...

    def readings(self, net: Net) -> Readings:
        """Return the functions of a trained net that a solver can call. This does not call the net."""
        ...


def lift(t: Time | Rows, like: Sample) -> Array:
    """Shape one number per row, (b,), as (b, 1, ...), so that it multiplies a sample shaped like `like`."""
    return t.view(-1, *(1,) * (like.ndim - 1))


def mean_square(e: Sample) -> PerSample:
    """Return the mean of squares of each row, (b,), over all axes but the batch axis."""
    return e.square().flatten(1).mean(1)
