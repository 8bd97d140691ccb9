"""The nouns of dumo: every shape and every contract that two packages share. Of dumo it imports `error` and `rows`.

Time runs from t = 0, the data x, to t = 1, the noise z. Times are dimensionless, in [0, 1], one per row.

In the order of a training step: a `TimeLaw` draws (t, r), which go into a minibatch, `Noised`, with what else an
objective asks for in its `Needs`; an `Objective` makes `Terms` of it with a `Net`; and of the trained net it makes
`Reads`, which a solver calls.

Touches modules that you name (`outside`), and nothing else. Knows no other subpackage.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import BaseModel, ConfigDict
from pydantic.config import JsonDict
from torch import Generator, Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from dumo.error import UserError as UserError
from dumo.types.rows import index, split_by_step

if TYPE_CHECKING:
    Array = Tensor
else:
    Array = Any  # a Tensor, or what stands in for one on its way through a net: `dumo.autodiff.dual.Dual`
Sample = Float[Array, "b *d"]  # x, z, x_t, v, u
Time = Float[Array, " b"]  # t, r, s; 0 is data, 1 is noise
PerSample = Float[Tensor, " b"]  # one number per row
Trail = Float[Array, "b points *d"]  # places of each row along one trajectory, from the data on
Rows = Bool[Tensor, " b"]  # which rows
Cond = Shaped[Tensor, "b *c"]  # class indices (b,), or a text embedding
Heads = tuple[Array, ...]  # Samples of heads and PerSamples of gauges, in the order of `Needs`
Taught = Callable[[Sample, Time, Cond, Sample], Sample]  # (x_t, t, c, v_t) -> the velocity to learn
Climb = Callable[[Sample, Time, Time, Cond], tuple[Sample, PerSample]]  # (x_t, t, s, c) -> x_s, growth of log volume
# Marks of a spec's fields, in their JSON schema.
FREE: JsonDict = {"free": True}  # the field may change when a run is resumed
CHANGES: JsonDict = {"changes": True}  # the field may change, too, and run.yaml lists from which step on
QUIET: JsonDict = {"quiet": True}  # the field is not shown at its default
MACHINE: JsonDict = FREE | QUIET  # for fields of the machine, and of what a run keeps on disk
# The field is a path, and is made absolute when a run begins (`dumo.run.resolve.with_absolute_paths`); with `maybe`
# only if something lies there, because else it is a name. What lies there is known by its hash, so most paths are FREE.
WHERE: JsonDict = {"where": "always"}
PLACE: JsonDict = FREE | WHERE
MAYBE_PLACE: JsonDict = FREE | {"where": "maybe"}
PINNED: JsonDict = {"pinned": True}  # the field is a hash, taken when the run began; None in runs of an older dumo


class Spec(BaseModel):
    """A value that says what to build or do; every family is a union of specs, distinguished by `kind`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@runtime_checkable
class Net(Protocol):
    """F(x_t, c; t, r, w ...): times and knobs go in by name, heads and gauges come out in the order of `Needs`."""

    def __call__(self, x: Sample, c: Cond, /, **inputs: Time) -> Heads: ...


@dataclass(frozen=True)
class Frozen:
    """theta^-: a net that records no gradient, of the weights in training or of their moving average."""

    module: nn.Module

    @torch.no_grad()
    def __call__(self, x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        """As `Net`, without gradients."""
        return self.module(x, c, **inputs)


def unwrap(net: Net) -> nn.Module:
    """The network inside what averages, replicates or compiles it. One that has a part named `module` stays."""
    while True:
        compiled_from = vars(net).get("_modules", {}).get("_orig_mod")  # of torch.compile
        if isinstance(net, DataParallel | DistributedDataParallel | AveragedModel):
            net = net.module
        elif isinstance(compiled_from, nn.Module):
            net = compiled_from
        else:
            return cast(nn.Module, net)


def frozen(net: Net) -> Frozen:
    """The weights in training, without gradients, from inside any distributed wrapper."""
    return Frozen(unwrap(net))


class TimeLaw(Spec, ABC):
    """The law of (t, r), with r <= t unless it climbs."""

    @abstractmethod
    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""

    @property
    def group(self) -> int:
        """The number of neighbouring rows that belong together: no piece of a batch may part them."""
        return 1

    def moving(self, n: int) -> tuple[bool, ...] | None:
        """Which of the first n rows may have a step, by place alone, while the others have r = t; None: all may."""
        return None

    @property
    def moving_share(self) -> float:
        """The share of the rows that `moving` names, in [0, 1]."""
        return 1.0

    @property
    def between(self) -> bool:
        """Whether some jumps end before the data, at r > 0: only then are several jumps in turn what was taught."""
        return True

    @property
    def climbs(self) -> bool:
        """Whether r > t on some of the rows: jumps up to the noise, too."""
        return False


class Law(Spec, ABC):
    """The law of something more that a loss reads, drawn into `Noised.drawn`."""

    @abstractmethod
    def rows(self, key: Sequence[int | str], rows: range, batch: int, shape: Sequence[int]) -> Sample | PerSample:
        """Draw by a key of `dumo.runtime.random` for these rows of a batch: the same whatever other rows are drawn."""


class Formulas(NamedTuple):  # as a default of `Needs` no dataclass, which a compiler could not follow
    """Where the formulas of an objective hold."""

    paths: tuple[str, ...] = ("linear",)
    climbs: bool = False  # for r > t, too
    unit: bool = False  # for data of standard deviation 1, by some constants of it


STRAIGHT = Formulas(paths=("linear", "diffusion"))  # of what holds wherever v = (x_t - x) / t


class FromTeacher(NamedTuple):
    """What a loss learns from a teacher."""

    velocity: Literal["may", "must", "no"] = "may"  # may: a teacher's can replace v_t; must: the loss asks for it
    points: int = 0  # steps of its trajectories, whose ends the loss learns from; 0: of none


@dataclass(frozen=True)
class Needs:
    """What an objective says of itself to the code that builds, checks, counts or samples: its net, then its loss."""

    inputs: tuple[str, ...] = ("t",)  # what `read` supplies: t, r
    heads: tuple[str, ...] = ("v",)  # outputs shaped like the data, all of them used by the loss
    gauges: tuple[str, ...] = ()  # outputs of one number per row, learned with the net
    knobs: Mapping[str, float] = field(default_factory=dict)  # inputs a sampler may set, with defaults
    own: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # inputs of some heads alone
    signed: bool = False  # the net gets negative times, too
    formulas: Formulas = Formulas()  # noqa: RUF009, a tuple
    laws: Mapping[str, Law] = field(default_factory=dict)  # of what more is drawn for a row, by its name in `drawn`
    slope: Spec | None = None  # along the flow, if the loss takes it: the field `slope`, of `dumo.flow.slope`
    guide: Spec | float | None = None  # what makes v*: the field `guide`, of `dumo.flow.guide`, or the field `scale`
    teacher: FromTeacher = FromTeacher()  # noqa: RUF009, a tuple
    group: int = 1  # this many neighbouring rows meet in the loss
    ref: float | None = None  # the decay of the average that is theta^- in its source; None: the weights in training
    amplifies: float = 0.0  # how often the rounding of the net is multiplied (`dumo.flow.precision`)
    phases: tuple[tuple[float, float], ...] = ((0.0, 1.0),)  # where steps cost alike: a progress, its share of training

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
    """x_t = alpha(t) z + gamma(t) x (paper, Eq. 1): what a record asks of one of `dumo.flow.path`."""

    def at(self, x: Sample, z: Sample, t: Time) -> tuple[Sample, Sample]:
        """Return x_t and its conditional slope v_t = dx_t/dt, given data and noise."""
        ...


@dataclass(frozen=True)
class Noised:
    """A minibatch with all its randomness already drawn; a loss reads it and draws nothing."""

    path: Path
    x: Sample  # the data in units of the path's sd
    z: Sample
    t: Time
    r: Time
    x_t: Sample
    v_t: Sample  # dx_t/dt: given (x, z), or the teacher's
    c: Cond  # some of it dropped to null
    null: Cond
    kept: Rows  # the rows whose condition was not dropped, and that no teacher answers as guided as it is
    moving: tuple[bool, ...] | None = None  # the rows that may have r < t, fixed by place; None: all
    drawn: Mapping[str, Tensor] = field(default_factory=dict)  # by `Needs.laws`
    progress: float = 0.0  # share of the training done, in [0, 1]
    teacher: Taught | None = None  # gives another velocity instead of v_t
    trail: Trail | None = None  # of the row, at equal steps from t = 0 to 1; None: none but the path
    host: tuple[Time, Rows] | None = None  # t and kept on the CPU, where they were drawn and the record is elsewhere
    taught: Rows | None = None  # the rows that the teacher answers; None: all, if there is one

    @property
    def known(self) -> tuple[Time, Rows] | None:
        """t and kept on the CPU, where to read them waits for no device; None: they are on a device alone."""
        if type(self.t) is Tensor and self.t.device.type == "cpu":
            return self.t, self.kept
        return self.host

    def at(self, s: Time | float, x: Sample | None = None, z: Sample | None = None) -> "Noised":
        """These rows at time s, where any of them may move; with data x and noise z instead of their own, if given."""
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
        """The velocity to learn at x and s, where the data's own is v: the teacher's, on the rows that it answers."""
        if self.teacher is None:
            return v
        teacher_v = self.teacher(x, s, self.c, v)
        if self.taught is None:
            return teacher_v
        return torch.where(lift(self.taught, v), teacher_v, v)

    def on(self, s: Time) -> Sample:
        """x_s on each row's trajectory, where s is one of its equally spaced times; without one, on the path."""
        if self.trail is None:
            return self.path.at(self.x, self.z, s)[0]
        place = (s * (self.trail.shape[1] - 1)).round().long()
        return self.trail[torch.arange(len(place), device=place.device), place]

    @property
    def rows_by_step(self) -> tuple[list[int], list[int]]:
        """The places of the rows that may move, and of those that may rest; both are all rows if `moving` is None."""
        if self.moving is None:
            return list(range(len(self.t))), list(range(len(self.t)))
        return split_by_step(self.moving)

    def __getitem__(self, rows: slice | list[int] | Int[Tensor, " k"]) -> "Noised":
        """Some of the rows. Their places are fixed before a pass, so that shapes are static.

        Of rows that a tensor names any may move, since only the device knows which they are.
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
    """A loss per row, its named parts, and what else to watch; the trainer takes means and logs them all by time."""

    loss: PerSample
    parts: Mapping[str, PerSample] = field(default_factory=dict)  # not dict[str, Tensor], which does not compile
    notes: Mapping[str, PerSample] = field(default_factory=dict)  # no part of the loss, without gradients

    def detach(self) -> "Terms":
        """These terms, detached from the graph."""
        parts = {name: rows.detach() for name, rows in self.parts.items()}
        notes = {name: rows.detach() for name, rows in self.notes.items()}
        return Terms(self.loss.detach(), parts, notes)


@dataclass(frozen=True)
class Reads:
    """What a trained net can tell a solver; None where the objective never taught it."""

    velocity: Callable[[Sample, Time, Cond], Sample] | None = None  # (x_t, t, c) -> dx_t/dt
    endpoint: Callable[[Sample, Time, Cond], Sample] | None = None  # (x_t, t, c) -> x_0
    flow_map: Callable[[Sample, Time, Time, Cond], Sample] | None = None  # (x_t, t, s, c) -> x_s
    both: Callable[[Sample, Time, Cond], tuple[Sample, Sample]] | None = None  # (x_t, t, c) -> dx_t/dt, x_0: one pass
    climb: Climb | None = None  # a jump from t up to s, and what it does to volume, of one pass
    hops: Callable[[float, float], bool] | None = None  # (t, s) -> was this jump of the flow map taught; None: all were
    lowest: float = 0.0  # the first time from which the endpoint was taught


@runtime_checkable
class Objective(Protocol):
    """A way to train a net, and to read it afterwards: a frozen spec. What follows is all that is read of it."""

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

    def loss(self, net: Net, ref: Frozen, b: Noised) -> Terms:
        """Pure: the same passes in the same order whatever the record says; draws and changes nothing."""
        ...

    def read(self, net: Net) -> Reads:
        """How to sample a net trained so. Does not call it."""
        ...


def lift(t: Time | Rows, like: Sample) -> Array:
    """Shape a number per row so that it multiplies a sample: the one place where times are broadcast."""
    return t.view(-1, *(1,) * (like.ndim - 1))


def mean_square(e: Sample) -> PerSample:
    """Mean of squares over all but the batch axis."""
    return e.square().flatten(1).mean(1)
