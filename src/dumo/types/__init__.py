"""The nouns of dumo: every shape and every contract that two packages share.

Time runs from t = 0, the data x, to t = 1, the noise z. Times are dimensionless, in [0, 1], one per row.

In the order of a training step:

1. a `TimeLaw` draws the times (t, r), and a `Law` each further number that a loss reads;
2. a `NoisyBatch` holds these with data, noise and conditions, and what else the `Needs` of an objective ask;
3. an `Objective` makes `Terms` of it, a loss for each row, with a `Net` and, as theta^-, a `Frozen` one;
4. of the trained net it makes `Readings`, which a solver calls.

All of it is public: classes of users derive from `Spec`, `TimeLaw`, the bases in `outside` and
`dumo.objectives.base.ObjectiveSpec`. Knows no other subpackage.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from dumo.types.batch_rows import index, split_by_moving

if TYPE_CHECKING:
    Array = Tensor
else:
    Array = Any  # a Tensor, or what stands in for one on its way through a net: `dumo.autodiff.dual.Dual`

# Shapes: b rows of a batch, *d the axes of a sample, *c those of a condition
Sample = Float[Array, "b *d"]  # x, z, x_t, v, u
Time = Float[Array, " b"]  # t, r, s; 0 is data, 1 is noise
PerSample = Float[Tensor, " b"]  # one number per row
Trail = Float[Array, "b points *d"]  # points of each row's trajectory, from the data on
Rows = Bool[Tensor, " b"]  # a truth value per row: which rows are chosen
Cond = Shaped[Tensor, "b *c"]  # class indices (b,), or a text embedding
Heads = tuple[Array, ...]  # what a net returns: Samples of heads and PerSamples of gauges, in the order of `Needs`

# Functions of several packages
TeacherVelocity = Callable[[Sample, Time, Cond, Sample], Sample]  # a teacher: (x_t, t, c, v_t) -> the velocity to learn
Climb = Callable[[Sample, Time, Time, Cond], tuple[Sample, PerSample]]  # (x_t, t, s, c) -> x_s, growth of log volume

# Marks of a spec's fields, written into their JSON schema as `json_schema_extra`
# - whether a resumed run may have another value; without a mark it may not
FREE: JsonDict = {"free": True}  # it may
CHANGES: JsonDict = {"changes": True}  # it may, too, and run.yaml lists from which step on
# - what is shown
QUIET: JsonDict = {"quiet": True}  # the field is not shown at its default
MACHINE: JsonDict = FREE | QUIET  # for fields of the machine, and of what a run keeps on disk
# - fields that are paths, which are made absolute when a run begins (`dumo.run.resolve.with_absolute_paths`). What lies
#   there is known by its hash, so most paths are FREE.
WHERE: JsonDict = {"where": "always"}  # a path, which stays for the run
PLACE: JsonDict = FREE | WHERE  # a path, which may change
MAYBE_PLACE: JsonDict = FREE | {"where": "maybe"}  # a path if something lies there, else a name, which stays as it is
# - places that may be a name on the Hugging Face Hub, which gets its commit when a run begins (`dumo.io.hub`)
HUB_MODEL: JsonDict = {"hub": "model"}
HUB_DATASET: JsonDict = {"hub": "dataset"}
# - fields that dumo fills in itself
PINNED: JsonDict = {"pinned": True}  # a hash, taken when the run begins


def marks_of(field: FieldInfo) -> Mapping[str, Any]:
    """Return a field's marks by name; empty if it has none."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


class Spec(BaseModel):
    """A value that says what to build or do; every family is a union of specs, distinguished by `kind`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@runtime_checkable
class Net(Protocol):
    """F(x_t, c; t, r, w ...): times and knobs go in by name, heads and gauges come out in the order of `Needs`."""

    def __call__(self, x: Sample, c: Cond, /, **inputs: Time) -> Heads: ...


@dataclass(frozen=True)
class Frozen:
    """theta^-: a net whose passes record no gradient, with the weights in training or their moving average."""

    module: nn.Module

    @torch.no_grad()
    def __call__(self, x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        """Return the heads of a pass, as `Net` returns them, without gradients."""
        return self.module(x, c, **inputs)


def unwrap(net: Net) -> nn.Module:
    """Return the network inside its wrappers: DataParallel, DistributedDataParallel, AveragedModel, torch.compile.

    A network of another class is returned as it is, also if it has a part named `module`.
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
    """theta^- with the weights in training: the net without its wrappers and without gradients."""
    return Frozen(unwrap(net))


class TimeLaw(Spec, ABC):
    """The law from which the times (t, r) of a batch's rows are drawn; r <= t, unless `climbs`."""

    @abstractmethod
    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw t and r of n rows, both (n,), by the generator g."""

    @property
    def group(self) -> int:
        """The number of neighbouring rows that belong together: a batch is split between such groups only."""
        return 1

    def moving(self, n: int) -> tuple[bool, ...] | None:
        """Which of the first n rows may have r != t, by place in the batch alone; others have r = t. None: all may."""
        return None

    @property
    def moving_share(self) -> float:
        """The share of rows that may have r != t (`moving`), in [0, 1]."""
        return 1.0

    @property
    def between(self) -> bool:
        """Whether some jumps end before the data, at r > 0: only then were jumps taught that others can follow."""
        return True

    @property
    def teaches_velocity(self) -> bool:
        """Whether a mean velocity is learned at r = t, where it is the velocity: not if every row has r = 0."""
        return self.between or self.moving_share < 1

    @property
    def climbs(self) -> bool:
        """Whether some rows have r > t: jumps towards the noise."""
        return False


class Law(Spec, ABC):
    """The law of a further random number or sample that a loss reads in `NoisyBatch.drawn`."""

    @abstractmethod
    def rows(self, key: Sequence[int | str], rows: range, batch: int, shape: Sequence[int]) -> Sample | PerSample:
        """Draw for these rows of a batch by a key of `dumo.runtime.random`.

        A row is the same whatever other rows are drawn. `shape` is that of a sample. Returns (len(rows), *shape), or
        (len(rows),).
        """


class Formulas(NamedTuple):  # as a default of `Needs` no dataclass, which a compiler could not follow
    """Where the formulas of an objective hold."""

    paths: tuple[str, ...] = ("linear",)  # the kinds of paths
    climbs: bool = False  # also for r > t
    unit: bool = False  # only for data of standard deviation 1, because some constants are meant for that


STRAIGHT = Formulas(paths=("linear", "diffusion"))  # of what holds wherever v = (x_t - x) / t


class FromTeacher(NamedTuple):
    """What a loss learns from a teacher: its velocity, or points of its trajectories."""

    velocity: Literal["may", "must", "no"] = "may"  # may: a teacher's can replace v_t; must: the loss asks for it
    points: int = 0  # steps of its trajectories, whose ends the loss learns from; 0: of none
    reads_v_t: bool = True  # whether the loss reads v_t; else no teacher is asked for it


@dataclass(frozen=True)
class Needs:
    """What an objective says of itself to the code that builds, checks, counts or samples: its net, then its loss."""

    # the net: what goes in and comes out
    inputs: tuple[str, ...] = ("t",)  # the times that `readings` supplies: t, r
    heads: tuple[str, ...] = ("v",)  # outputs shaped like the data, all of them used by the loss
    gauges: tuple[str, ...] = ()  # outputs of one number per row, learned with the net
    knobs: Mapping[str, float] = field(default_factory=dict)  # further inputs, which a sampler may set; their defaults
    own: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # inputs that only some heads get, by head
    signed: bool = False  # the net gets negative times, too

    # the loss: what it reads and holds
    formulas: Formulas = Formulas()  # noqa: RUF009, a tuple
    laws: Mapping[str, Law] = field(default_factory=dict)  # of what more is drawn for a row, by its name in `drawn`
    slope: Spec | None = None  # how du/dt is taken, if it is: the field `slope`, of `dumo.flow.slope`
    guide: Spec | float | None = None  # what guides v*: the field `guide`, of `dumo.flow.guide`, or the field `scale`
    teacher: FromTeacher = FromTeacher()  # noqa: RUF009, a tuple
    group: int = 1  # the number of neighbouring rows that meet in the loss
    compares_rows: bool = False  # it compares samples with data of the same label, by their distances
    diffuses_samples: bool = False  # it compares velocities of its samples, diffused by fresh noise, with the data's
    ref: float | None = None  # the decay of the average that is theta^- in its source; None: the weights in training
    scheduled: bool = False  # it changes with `NoisyBatch.progress`
    amplifies: float = 0.0  # by how much the rounding of the net is multiplied, at most (`dumo.flow.precision`)

    # what steps cost: pairs (progress, share of the training), in each of which steps cost as one at that progress
    phases: tuple[tuple[float, float], ...] = ((0.0, 1.0),)

    @property
    def shared(self) -> tuple[str, ...]:
        """The names of the inputs that every head gets: `inputs`, then `knobs`."""
        return (*self.inputs, *self.knobs)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all inputs of a pass: those of every head, then those of some heads alone."""
        names = [*self.shared]
        for inputs in self.own.values():
            names.extend(inputs)
        return tuple(dict.fromkeys(names))


@runtime_checkable
class Path(Protocol):
    """x_t = alpha(t) z + gamma(t) x (paper, Eq. 1): what a batch asks of one of `dumo.flow.path`."""

    def at(self, x: Sample, z: Sample, t: Time) -> tuple[Sample, Sample]:
        """Return x_t and its conditional slope v_t = dx_t/dt, given data and noise."""
        ...


@dataclass(frozen=True)
class NoisyBatch:
    """A minibatch with all its randomness already drawn; a loss reads it and draws nothing."""

    # data and noise on the path
    path: Path
    x: Sample  # the data in units of the path's sd
    z: Sample
    t: Time
    r: Time
    x_t: Sample
    v_t: Sample  # dx_t/dt: given (x, z), or the teacher's where `FromTeacher.reads_v_t`

    # conditions
    c: Cond  # on the rows whose condition was dropped: null
    null: Cond
    kept: Rows  # the rows to guide: the condition was not dropped, and the teacher, guided itself, does not answer them

    # what some objectives need
    moving: tuple[bool, ...] | None = None  # the rows that may have r != t, fixed by place; None: all
    drawn: Mapping[str, Tensor] = field(default_factory=dict)  # by name, what `Needs.laws` drew
    progress: float = 0.0  # the share of the training that is done, in [0, 1]
    teacher: TeacherVelocity | None = None  # gives another velocity instead of v_t
    trail: Trail | None = None  # the row's trajectory at equal steps from t = 0 to 1; None: the path alone is known
    host: tuple[Time, Rows] | None = None  # copies of t and kept on the CPU, where the batch is on another device
    teacher_rows: Rows | None = None  # the rows that the teacher answers; None: all, if there is one

    @property
    def on_host(self) -> tuple[Time, Rows] | None:
        """t and kept on the CPU, which can be read without waiting for a device; None: they are on a device alone."""
        if type(self.t) is Tensor and self.t.device.type == "cpu":
            return self.t, self.kept
        return self.host

    def at(self, s: Time | float, x: Sample | None = None, z: Sample | None = None) -> "NoisyBatch":
        """Return the same rows at another time s, (b,) or one number, with other data x and noise z if given.

        Any of the rows may have r != t then.
        """
        host = None
        if not isinstance(s, Tensor):
            if self.host is not None:
                host_t, host_kept = self.host
                host = (torch.full_like(host_t, s), host_kept)
            s = torch.full_like(self.t, s)
        x = self.x if x is None else x
        z = self.z if z is None else z
        x_s, v_s = self.path.at(x, z, s)
        v_s = self.velocity(x_s, s, v_s)
        return replace(self, x=x, z=z, t=s, x_t=x_s, v_t=v_s, moving=None, host=host)

    def velocity(self, x: Sample, s: Time, v: Sample) -> Sample:
        """Return the velocity to learn at the point x and time s: the teacher's on the rows that it answers, else v."""
        if self.teacher is None:
            return v
        teacher_v = self.teacher(x, s, self.c, v)
        if self.teacher_rows is None:
            return teacher_v
        return torch.where(lift(self.teacher_rows, v), teacher_v, v)

    def on(self, s: Time) -> Sample:
        """x_s on each row's trajectory, where s must be one of its equally spaced times; without one, on the path."""
        if self.trail is None:
            return self.path.at(self.x, self.z, s)[0]
        point = (s * (self.trail.shape[1] - 1)).round().long()
        row = torch.arange(len(point), device=point.device)
        return self.trail[row, point]

    @property
    def moving_and_resting_rows(self) -> tuple[list[int], list[int]]:
        """The places of the rows that may have r != t, and of those that may have r = t; all and all if not known."""
        if self.moving is None:
            return list(range(len(self.t))), list(range(len(self.t)))
        return split_by_moving(self.moving)

    def __getitem__(self, rows: slice | list[int] | Int[Tensor, " k"]) -> "NoisyBatch":
        """Return a batch of some of the rows.

        Which rows may move stays known, but not of rows that a tensor names: only its device knows which they are.
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
            host = host[0][rows], host[1][rows]
        tensors: dict[str, Any] = {}
        for record_field in fields(self):
            value = getattr(self, record_field.name)
            if isinstance(value, Tensor):
                tensors[record_field.name] = value[places]
        drawn = {name: value[places] for name, value in self.drawn.items()}
        return replace(self, **tensors, moving=moving, drawn=drawn, host=host)


@dataclass(frozen=True)
class Terms:
    """The loss of each row, its parts by name, and notes to watch. The trainer takes means and logs them, by time t."""

    loss: PerSample  # its mean is trained on
    parts: Mapping[str, PerSample] = field(default_factory=dict)  # not dict[str, Tensor], which does not compile
    notes: Mapping[str, PerSample] = field(default_factory=dict)  # not part of the loss, and without gradients

    def detach(self) -> "Terms":
        """Return a copy without gradients."""
        parts = {name: rows.detach() for name, rows in self.parts.items()}
        notes = {name: rows.detach() for name, rows in self.notes.items()}
        return Terms(self.loss.detach(), parts, notes)


@dataclass(frozen=True)
class Readings:
    """What a trained net can tell a solver; None where the objective never taught it."""

    velocity: Callable[[Sample, Time, Cond], Sample] | None = None  # (x_t, t, c) -> dx_t/dt
    endpoint: Callable[[Sample, Time, Cond], Sample] | None = None  # (x_t, t, c) -> x_0
    flow_map: Callable[[Sample, Time, Time, Cond], Sample] | None = None  # (x_t, t, s, c) -> x_s
    both: Callable[[Sample, Time, Cond], tuple[Sample, Sample]] | None = None  # (x_t, t, c) -> dx_t/dt, x_0: one pass
    climb: Climb | None = None  # a jump from t up to s, and how much it adds to the log of volume: one pass

    # where these hold
    hops: Callable[[float, float], bool] | None = None  # (t, s) -> whether the flow map was taught this jump; None: all
    lowest: float = 0.0  # the lowest time at which the endpoint was taught


@runtime_checkable
class Objective(Protocol):
    """A way to train a net, and to read it afterwards: a frozen spec. dumo uses no attributes of it but these."""

    @property
    def kind(self) -> str:
        """Its name."""
        ...

    @property
    def needs(self) -> Needs:
        """What it says of itself."""
        ...

    @property
    def times(self) -> TimeLaw:
        """The law of (t, r)."""
        ...

    @property
    def drop(self) -> float:
        """The probability that a row's condition is dropped, in [0, 1]."""
        ...

    def __iter__(self) -> Iterator[tuple[str, object]]:
        """The fields by name, as pydantic gives them."""
        ...

    def model_copy(self, *, update: Mapping[str, Any]) -> "Objective":
        """This spec with other values for some fields, unchecked, as pydantic copies it."""
        ...

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """The loss of each row of a batch. Pure: it draws and changes nothing.

        The passes that it makes, and their order, do not depend on the batch's values.
        """
        ...

    def readings(self, net: Net) -> Readings:
        """What a net that was trained so can tell a solver. Does not call the net."""
        ...


def lift(t: Time | Rows, like: Sample) -> Array:
    """Shape one number per row, (b,), as (b, 1, ...), so that it multiplies a sample shaped like `like`."""
    return t.view(-1, *(1,) * (like.ndim - 1))


def mean_square(e: Sample) -> PerSample:
    """Return the mean of squares of each row, (b,), over all axes but the batch axis."""
    return e.square().flatten(1).mean(1)
