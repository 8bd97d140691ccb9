"""`Flow`: a network, the objective that teaches it, and how it is read.

    flow = Flow(net, DuMo(), classes=10)
    loss = flow(x, c)                    # draws noise, times and dropped labels; takes du/dt
    images = flow.sample(16, nfe=1)

It owns no optimizer and no file. In a training loop of anybody's, `flow(x, c)` is the loss, and the network may be
wrapped (DistributedDataParallel, FSDP2, torch.compile, accelerate) before or after. dumo's own step asks the same
object piece by piece: `drawn`, `noised`, `terms`.

Random numbers are functions of (seed, step, row of the global batch): other ones on every rank. Those that a network
draws itself, such as nn.Dropout's, are functions of (seed, step, rank), and the same in all passes of a step. So a
resumed run goes on to the bit.
"""

import copy
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import lcm
from typing import Any, cast

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dumo.flow import dropout, generate
from dumo.flow.check import (
    MAX_DIFFERENCE,
    choose_slope,
    drawn_copy,
    inputs_of,
    require_pure_net,
    require_rows_apart,
    require_terms,
    short,
)
from dumo.flow.condition import Condition, is_table, require_batch, table_of
from dumo.flow.draw import Coupling, Draws, drawn, noised
from dumo.flow.guide import CFG, GuidanceScale, Guide
from dumo.flow.passes import NONE, OwnCall, Passes, Signature, drawing, inner
from dumo.flow.path import Linear
from dumo.flow.precision import Precision, autocast
from dumo.flow.reading import reading, teaching
from dumo.flow.slope import Slope, precision_of
from dumo.flow.solver import Euler, Hop, Restart, Solver
from dumo.runtime import dist
from dumo.runtime.random import stream
from dumo.types import (
    Cond,
    Frozen,
    Net,
    Noised,
    Objective,
    Path,
    Reads,
    Sample,
    Taught,
    Terms,
    Time,
    Trail,
    UserError,
    frozen,
)
from dumo.types.rows import to_device

log = logging.getLogger("dumo")
Loss = Callable[[Net, Frozen, Noised], Terms]

STEEP = 1.0  # ours, of t du/dt over v: fresh networks of .4 trained well, of 1.4 half as well, of 13 not at all
COPIED = 400_000_000  # parameters up to which the check works on a copy: ours
AGAIN = 100  # the step at which a network that was not copied is checked once more, its layers of zeros then trained
ROWS = 4  # of the check
STATE = 512  # bytes of the extra state, always as many


class Flow(nn.Module):
    """A network and the objective that teaches it: `flow(x, c)` is the loss, `flow.sample(n)` samples.

    `net` is any module: its forward takes x (b, ...) first, and the time, a second time and a class by usual names
    (`dumo.flow.passes`), or `call(net, x, t, c)` calls it; it returns the objective's heads. `classes`: labels are 0 to
    classes - 1, and `classes` itself means none. `null` is what stands for a dropped condition: a row, or a dict of
    rows. Without classes and null nothing is dropped or guided. `time_scale` multiplies each time on its way to the
    network. `shard`: (rank, ranks) of the data; None: those of torch.distributed.

    An objective that names no slope gets the first of dual, jvp and central that runs on this network and is exact.

    `ref`: theta^-, an average of the weights that you keep; None: the weights in training. `teacher`: its velocity
    (x_t, t, c, v_t) takes the place of the data's, on a share `prior` of the rows (None: on all). `precision`: of
    passes; None: as it is around. `knobs` and `guide` are how it is read.
    """

    def __init__(
        self,
        net: nn.Module,
        objective: Objective,
        *,
        classes: int = 0,
        null: Tensor | Mapping[str, Tensor] | None = None,
        time_scale: float = 1.0,
        call: OwnCall | None = None,
        seed: int = 0,
        shard: tuple[int, int] | None = None,
        path: Path | None = None,
        coupling: Coupling | None = None,
        teacher: "Taught | Flow | None" = None,
        prior: float | None = None,
        ref: nn.Module | None = None,
        precision: Precision | None = None,
        knobs: Mapping[str, float] | None = None,
        guide: CFG | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.objective = objective
        self.classes = classes
        self.null = null
        self.time_scale = time_scale
        self.own_call = call
        self.seed = seed
        self.shard = shard
        self.path: Path = path or Linear()
        self.coupling = coupling
        self.teacher = teaching(Reads(teacher.velocity)) if isinstance(teacher, Flow) else teacher
        self.prior = prior
        self.ref = None if ref is None else Frozen(ref)
        self.precision: Precision | None = precision
        self.knobs = knobs
        self.guide = guide or CFG()

        self.step = 0  # losses so far
        self.rows = 0  # of a rank's batch
        self.shape: tuple[int, ...] | None = None  # of a row
        self.last: Terms | None = None  # of the last loss, detached: its parts say more than the loss
        self.names_slope = "slope" in getattr(objective, "model_fields_set", ("slope",))
        self.choice: Slope | None = None  # where the objective names none
        self.why = ""  # so
        self.checked = False
        self.draws_itself = False  # whether the network draws random numbers

    # ------------------------------------------------------------------------------------ a training step, in pieces

    def drawn(self, step: int, shape: Sequence[int], *, batch: int, rows: slice = slice(None), z: bool = True) -> Draws:
        """The random numbers of these rows of a step's batch, for samples of this shape; `z`: their noise, too."""
        return drawn(self.objective, shape, seed=self.seed, step=step, batch=batch, rows=rows, z=z, prior=self.prior)

    def noised(
        self,
        draws: Draws,
        x: Sample,
        c: Cond,
        *,
        null: int | None = None,
        z: Sample | None = None,
        between: Trail | None = None,
        progress: float = 0.0,
    ) -> Noised:
        """The record of data x of conditions c: noise, times and dropped conditions put to it."""
        return noised(
            draws,
            self.path,
            x,
            c,
            self.classes if null is None else null,
            progress=progress,
            z=z,
            teacher=self.teacher,
            coupling=self.coupling,
            between=between,
        )

    def terms(self, b: Noised, keys: dropout.Keys, loss: Loss | None = None, *, keep: bool = True) -> Terms:
        """The loss of a record by a network of dumo's, of these keys of dropout; `loss` is a compiled one.

        `keep`: casts of weights are kept to the end of the pass.
        """
        with autocast(self.precision or "fp32", b.x_t.device, keep=keep), dropout.using(keys):
            return (loss or self.objective.loss)(cast(Net, self.net), self.reference, b)

    @property
    def reference(self) -> Frozen:
        """theta^-: an average that was given, else the weights in training."""
        return self.ref or frozen(cast(Net, self.net))

    # ------------------------------------------------------------------------------------- a training step, in a line

    def forward(self, x: Sample, c: Condition = None, **how: Any) -> Tensor:  # noqa: ANN401, of `loss`
        """`loss`: what DistributedDataParallel, accelerate and Lightning wrap."""
        return self.loss(x, c, **how)

    def loss(
        self,
        x: Sample,
        c: Condition = None,
        *,
        step: int | None = None,
        progress: float = 0.0,
        z: Sample | None = None,
    ) -> Tensor:
        """The mean loss of data x (b, ...), floats near [-1, 1], of conditions c.

        c: None, class numbers (b,), numbers (b, ...), or a dict of tensors by the names of the network's forward. In
        training mode calls are counted: the count, or `step`, is which random numbers are drawn. `progress` is the
        share of the training that is done, for objectives that change with it; `z` noise that goes with x. Raises
        UserError as `check`, which the first call makes, on all ranks.
        """
        require_batch(x, c, self.classes, self.shape, self.call)
        if not self.checked or (self.step == AGAIN and not self._copied):
            self.check(x, c)
        self.shape = self.shape or tuple(x.shape[1:])
        self.rows = max(self.rows, len(x))  # a smaller last batch keeps its rank's rows
        at = self.step if step is None else step
        b, keys = self._record(x, c, at, progress=progress, z=z)
        key = self._key(at) if self.training else None
        passes = self._passes(c, key)
        ref = Frozen(passes) if self.ref is None else Frozen(passes.of(self.ref.module))
        with dropout.using(keys if self.training else None), drawing(key, x.device):  # a loss of yours may draw
            terms = require_terms(self.objective.loss(passes, ref, b), len(x), self.objective.kind)
        if step is None and self.training:
            self.step += 1
        self.last = terms.detach()
        return terms.loss.mean()

    # ----------------------------------------------------------------------------------------------- the other way

    @property
    def reads(self) -> Reads:
        """What the network tells a solver, c being class numbers; None for what the objective never taught."""
        return self.readings(self.guide)

    def readings(self, guide: CFG | None = None, knobs: Mapping[str, float] | None = None) -> Reads:
        """The same with this guidance (None: none), and these knobs."""
        net = cast(Net, self.net) if self.call is None else self._passes(None, None)
        return (guide or CFG())(reading(self.objective, net, knobs or self.knobs), self.classes)

    @cached_property
    def call(self) -> OwnCall | Signature | None:
        """How the network is called; None: as dumo's own. Raises UserError where no argument of it is a time."""
        return self.own_call or Signature.of(inner(self.net))

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(inner(self.net).parameters()).device

    @torch.no_grad()
    def velocity(self, x: Sample, t: Time | float, c: Condition = None) -> Sample:
        """dx_t/dt at x_t = x and t, one pass. Raises UserError where the objective never taught it."""
        return self._read("velocity", x, c, t)

    @torch.no_grad()
    def jump(self, x: Sample, t: Time | float, s: Time | float = 0.0, c: Condition = None) -> Sample:
        """x_s of the trajectory through x at t, one pass; s = 0 is data. Raises UserError where it was never taught."""
        if self.reads.flow_map is not None:
            return self._read("flow_map", x, c, t, s)
        if not (isinstance(s, float | int) and s == 0):
            raise UserError(
                f"objective '{self.objective.kind}' teaches no jump that ends at s = {s}: give s=0, or train with "
                "'dumo_any' or 'meanflow'"
            )
        return self._read("endpoint", x, c, t)

    @torch.no_grad()
    def sample(
        self,
        c: int | Sequence[int] | Condition = 1,
        *,
        nfe: int = 1,
        seed: int = 0,
        solver: Solver | None = None,
        guidance: float | None = None,
        shape: Sequence[int] | None = None,
    ) -> Tensor:
        """Samples in float32 on the CPU: c of them, of the classes in turn; or one for each condition in c.

        Sample i is a function of (seed, i, its condition), whatever batch it is made in. `solver`: None takes the best
        for few passes. `guidance` is the scale w of classifier-free guidance, for plain targets; `shape` that of a row,
        known after the first loss. Raises UserError as solvers do.
        """
        shape = shape or self.shape
        if shape is None:
            raise UserError("the shape of the data is not known before the first loss: give flow.sample(shape=...)")
        given, index = self._samples(c)
        passes = self._passes(given, None)
        guide = self.guide if guidance is None else self._guide(guidance)
        reads = self._reads(passes, guide, NONE if passes.table else self.classes)
        made = generate.joined(
            self.batches(reads, solver or best_solver(reads), index, net=passes, nfe=nfe, seed=seed, shape=shape)
        )
        for part in self.net.modules():
            if isinstance(part, FSDPModule):  # whose root stays whole after a pass that has no backward pass
                part.reshard()
        return made.x

    def batches(
        self,
        reads: Reads,
        solver: Solver,
        c: Cond,
        *,
        net: nn.Module | None = None,
        nfe: int,
        seed: int,
        shape: Sequence[int],
        indices: Sequence[int] | None = None,
        batch: int = generate.ROWS,
        z: Sample | None = None,
    ) -> Iterator[generate.Batch]:
        """Samples of this shape by a reading of the network, batch by batch: as `generate.batches`, and raises so.

        `net` is what the reading calls, where that is not the network itself.
        """
        return generate.batches(
            net or self.net,
            reads,
            self.path,
            solver,
            c,
            nfe=nfe,
            seed=seed,
            shape=shape,
            indices=indices,
            batch=batch,
            device=self.device,
            precision=self.precision or "fp32",
            z=z,
        )

    def of(self, net: nn.Module) -> "Flow":
        """The same flow over other weights, such as an average's."""
        found = inner(net)
        other = copy.copy(self)
        other.__dict__["_modules"] = {"net": found.net if isinstance(found, Flow) else net}  # not this one's, too
        return other

    # ------------------------------------------------------------------------------------------------------ the check

    def check(self, x: Sample, c: Condition = None) -> str:
        """Try the network and the loss on a few rows, once, and say how du/dt is taken, and why.

        Weights, buffers and generators stay as they are. Under torch.distributed every rank must call it. Raises
        UserError, with the way out, for outputs that the objective does not need, rows that mix, buffers that a pass
        changes, random numbers of unknown source, a loss that is not a number for each row, a wrong derivative.
        """
        fault: UserError | None = None
        try:
            self._check(x, c)
        except UserError as error:
            fault = error
        if self._largest(float(fault is not None)):
            raise fault or UserError("another rank's data, network or loss was refused: its line says why")
        self.checked = True
        return self.why

    def _check(self, x: Sample, c: Condition) -> None:
        """As `check`, of this rank."""
        require_batch(x, c, self.classes, self.shape, self.call, deeply=True)
        needs = self.objective.needs
        if isinstance(self.call, Signature):
            self.call.require(needs, classes=bool(self.classes) and not is_table(c))
        if needs.teacher.velocity == "must" and self.teacher is None:
            raise UserError(
                f"objective '{self.objective.kind}' learns from a teacher's velocity: give dumo.Flow(teacher=...), a "
                "flow that was trained, or a function of (x_t, t, c, v_t)"
            )
        if not self._drops(c):
            self.objective = without_drop(self.objective)
        group = lcm(self.objective.times.group, needs.group)
        if len(x) % group:
            raise UserError(f"{len(x)} rows, and {group} belong together in objective '{self.objective.kind}'")
        some = slice(0, max(ROWS // group, 2 if group > 1 else 1) * group)
        x = x[some]
        c = {name: v[some] for name, v in c.items()} if isinstance(c, Mapping) else c if c is None else c[some]
        b, keys = self._record(x, c, self.step)
        with torch.random.fork_rng([x.device] if x.is_cuda else []), dropout.using(keys if self.training else None):
            self.draws_itself = self._draws(x, c, b)
            passes = self._passes(c, self._key(self.step))
            probe = drawn_copy(passes) if self._copied else passes
            require_pure_net(probe, b, needs, tolerance(x))
            require_rows_apart(probe, b, needs)
            if needs.slope is not None:
                self._take_slope(passes, replace(b, moving=None))

    def _draws(self, x: Sample, c: Condition, b: Noised) -> bool:
        """Whether a pass draws of torch's generators. Raises UserError where it fails."""
        passes = self._passes(c, None)
        before = _generators(x)
        try:
            with torch.no_grad():
                passes(b.x_t, b.c, **inputs_of(b, self.objective.needs))
        except UserError:
            raise
        except Exception as error:  # a module of somebody else may raise anything
            raise UserError(
                f"{type(inner(self.net)).__name__} failed on x {tuple(b.x_t.shape)} at times {tuple(b.t.shape)}: "
                f"{short(error)}. It is called with {passes.described}; give dumo.Flow(call=lambda net, x, t, c: "
                "net(...)) to call it otherwise"
            ) from error
        return before != _generators(x)

    def _take_slope(self, passes: Passes, b: Noised) -> None:
        """Choose how du/dt is taken, or try the given one. Raises UserError as `choose_slope`."""
        given = cast(Slope, self.objective.needs.slope) if self.names_slope else self.choice
        found = choose_slope(given, passes, b, self.objective.needs, copied=self._copied, agreed=self._largest)
        self.why = found.why
        if not self.names_slope:
            self.choice = found.slope
            self.objective = self.objective.model_copy(update={"slope": found.slope})
        if ";" in self.why and not self.checked:
            log.warning("dumo: du/dt by %s", self.why)
        if found.steepness > STEEP:
            log.warning(
                "dumo: t du/dt is %.3g times v: this network is steep in t, and training on du/dt will not settle. "
                "Give dumo.Flow(time_scale=%.2g), which multiplies t, or embed t by waves of at most 10 radians",
                found.steepness,
                self.time_scale * STEEP / found.steepness / 10,
            )

    @property
    def _copied(self) -> bool:
        """Whether the check may copy the network: not where it is large, or one rank's share."""
        parameters = list(inner(self.net).parameters())
        whole = not any(isinstance(p, DTensor) for p in parameters)
        return whole and sum(p.numel() for p in parameters) <= COPIED

    def _largest(self, error: float) -> float:
        """The largest of a number over the ranks that train together. Every rank must call it."""
        if dist.world() == 1:
            return error
        errors: list[Any] = [None] * dist.world()
        torch.distributed.all_gather_object(errors, error)
        return max(errors)

    # -------------------------------------------------------------------------------------------- what a batch becomes

    def _record(
        self, x: Sample, c: Condition, at: int, *, progress: float = 0.0, z: Sample | None = None
    ) -> tuple[Noised, dropout.Keys]:
        """The record of this rank's rows, and their keys of dropout."""
        rank, ranks = self.shard or (dist.rank(), dist.world())
        first = rank * self.rows
        most = max(self.rows, len(x))
        rows = slice(first, first + len(x))
        draws = self.drawn(at, x.shape[1:], batch=max(ranks * most, rows.stop), rows=rows, z=z is None)
        index, null = self._index(len(x), c, x.device)
        b = self.noised(draws, x, index, null=null, z=z, progress=progress)
        if self.draws_itself:  # a pass of some rows would draw for them what it did not draw for all
            b = replace(b, moving=None)
        return b, to_device(draws.keys, x.device)

    def _index(self, n: int, c: Condition, device: torch.device) -> tuple[Cond, int]:
        """What an objective is given as the condition, and as none."""
        if is_table(c):
            return torch.arange(n, device=device), NONE
        if c is None:
            return torch.zeros(n, dtype=torch.long, device=device), 0
        return cast(Tensor, c).long(), self.classes

    def _drops(self, c: Condition) -> bool:
        """Whether there is something that stands for no condition."""
        return self.null is not None if is_table(c) else c is not None and self.classes > 0

    def _passes(self, c: Condition, key: int | None) -> Passes:
        """The network as objectives call it, under these conditions."""
        return Passes(
            self.net,
            self.objective.needs,
            self.call,
            labelled=self.classes > 0 and not is_table(c),
            time_scale=self.time_scale,
            table=table_of(c, self.null, self.call) if is_table(c) else None,
            key=key,
        )

    def _key(self, at: int) -> int:
        """Of what the network draws itself at a step."""
        rank = self.shard[0] if self.shard else dist.rank()
        return stream(self.seed, at, "net", rank).initial_seed()

    # ------------------------------------------------------------------------------------------------ what is read

    def _reads(self, net: Net, guide: CFG, null: int) -> Reads:
        return guide(reading(self.objective, net, self.knobs), null)

    def _read(self, name: str, x: Sample, c: Condition, *times: Time | float) -> Sample:
        """One reading, in evaluation mode."""
        index, null = self._index(len(x), c, x.device)
        passes = self._passes(c, None)
        read = getattr(self._reads(passes, self.guide, null), name)
        if read is None:
            raise UserError(f"objective '{self.objective.kind}' never teaches a {name.replace('_', ' ')}")
        rows = [s if isinstance(s, Tensor) else torch.full((len(x),), float(s), device=x.device) for s in times]
        with generate.evaluating(self.net):
            return read(x, *rows, index)

    def _samples(self, c: int | Sequence[int] | Condition) -> tuple[Condition, Cond]:
        """The conditions of samples, and what an objective is given for them."""
        if isinstance(c, int):
            return None, generate.labels(c, self.classes)
        if isinstance(c, Mapping):
            c = {name: v.to(self.device) for name, v in c.items()}
        elif isinstance(c, Tensor):
            c = c.to(self.device)
        if c is not None and is_table(cast(Condition, c)):
            n = len(next(iter(c.values()))) if isinstance(c, Mapping) else len(c)
            return cast(Condition, c), self._index(n, cast(Condition, c), torch.device("cpu"))[0]
        only = [int(k) for k in c or ()]
        return None, generate.labels(len(only), self.classes, only)

    def _guide(self, scale: float) -> CFG:
        """Guidance of this scale. Raises UserError where there is none to guide away from, or it is in the weights."""
        guided = GuidanceScale.of(self.objective.needs)
        if scale != 1 and guided.active:
            raise UserError(
                f"guidance = {scale:g}: objective '{self.objective.kind}' was guided in training, by "
                f"{guided.scale:.3g}: leave it out, or train with {guided.off}"
            )
        if scale != 1 and not self.objective.drop:
            raise UserError(
                f"guidance = {scale:g} needs what the network makes of no condition, and none was dropped in training: "
                "leave it out, or train with classes= or null="
            )
        return CFG(scale=scale)

    # ------------------------------------------------------------------------------------------------- what is kept

    def get_extra_state(self) -> Tensor:
        """Step, seed, rows of a rank, shape of a row and the chosen slope, as the bytes of a text."""
        slope = self.choice and self.choice.model_dump()
        text = json.dumps(
            {"step": self.step, "seed": self.seed, "rows": self.rows, "shape": self.shape, "slope": slope}
        )
        return torch.tensor(list(text.encode().ljust(STATE)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """As `get_extra_state` gave it."""
        kept = json.loads(bytes(state.tolist()))
        self.step = kept["step"]
        self.seed = kept["seed"]
        self.rows = kept["rows"]
        self.shape = kept["shape"] and tuple(kept["shape"])
        self.choice = kept["slope"] and TypeAdapter(Slope).validate_python(kept["slope"])

    def extra_repr(self) -> str:
        """What was found."""
        return f"objective={self.objective.kind}, classes={self.classes}, du/dt: {self.why or 'not chosen yet'}"


def without_drop(objective: Objective) -> Objective:
    """The same where nothing stands for no condition: none is dropped, and nothing guides away from it."""
    fields = dict(objective)
    off: dict[str, Any] = {}
    if fields.get("drop"):
        off["drop"] = 0.0
    if isinstance(guide := fields.get("guide"), Guide) and guide.active:
        off["guide"] = Guide()
    if isinstance(objective.needs.guide, int | float) and "scale" in fields:
        off["scale"] = 1.0
    return objective.model_copy(update=off)


def best_solver(reads: Reads) -> Solver:
    """The solver that makes most of few passes, of what was taught."""
    if reads.flow_map is not None:
        return Hop()
    return Euler() if reads.endpoint is None else Restart()


def tolerance(x: Sample) -> float:
    """By how much two passes on x may differ (`check.outputs_match`): on a CPU not at all."""
    if x.device.type == "cpu":
        return 0.0
    precision = precision_of(x)
    return MAX_DIFFERENCE["fp32" if precision == "fp32" else "tf32" if precision == "tf32" else "bf16"]


def _generators(x: Sample) -> bytes:
    """Where torch's generators stand."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(x.device)] if x.is_cuda else [])]
    return b"".join(state.numpy().tobytes() for state in states)
