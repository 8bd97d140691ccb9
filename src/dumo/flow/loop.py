"""`LoopFlow`: a network and the objective that trains it, for a user's own training loop. In public: `dumo.Flow`.

    flow = dumo.Flow(net, DuMo(), classes=10)
    loss = flow(x, c)                    # draws noise, times and dropped labels; takes du/dt
    images = flow.sample(16, nfe=1)

`flow(x, c)` is the loss, and the network may be wrapped (DistributedDataParallel, FSDP2, torch.compile, accelerate)
before or after.

`loss` shows the order of events: the first call makes `check`; `_noise` draws the step's random numbers and puts noise
to the batch; the objective's loss calls the network through a `NetAdapter`. `sample`, `velocity` and `jump` read the
network in evaluation mode, `teaching` makes a teacher of it, and `get_extra_state` is what a resumed run needs.

Random numbers are functions of (seed, step, row of the global batch), so ranks draw different ones. Those that a
network draws itself, such as nn.Dropout's, are functions of (seed, step, rank), and the same in all passes of a step. A
resumed run is therefore bit-identical to an uninterrupted one.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from numbers import Integral
from typing import Any, cast, get_args

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from dumo.flow import compatibility, dropout, sampling
from dumo.flow.adapter import Condition, ConditionRows, CustomCall, NetAdapter, Null, is_labels, map_tensors
from dumo.flow.derivative import choose_slope, copy_without_zero_layers
from dumo.flow.flow import Flow, require_loss_per_row
from dumo.flow.guide import CFG, GuidanceScale
from dumo.flow.noise import Coupling
from dumo.flow.path import FlowPath
from dumo.flow.precision import Precision, using
from dumo.flow.reading import available_readings, readings_of, teacher_velocity
from dumo.flow.slope import DualSlope, JvpSlope, Slope, slope_of
from dumo.flow.solver import Solver, best_solver, solver_of
from dumo.flow.trainable import inputs_of, require_trainable, rows_to_try
from dumo.runtime import dist
from dumo.runtime.random import generator_states, seeded_generators, stream
from dumo.types import (
    Cond,
    Frozen,
    Heads,
    Net,
    NoisyBatch,
    Objective,
    Readings,
    Sample,
    TeacherVelocity,
    Terms,
    Time,
    UserError,
    lift,
    unwrap,
)
from dumo.types.rows import to_device

Moment = Tensor | float | int  # a time for all rows, or one for each

# The step at which a network that was not copied is compared with its derivative again: its layers of zeros are trained
_SECOND_CHECK_STEP = 100
# Data beyond these were not scaled: they should lie near [-1, 1], or have deviation 1
_MAX_VALUE = 100.0
_MAX_RMS = 4.0
_ROUNDING = 1e-6  # of times that a caller added up
_OVERSHOOT = 0.25  # of adaptive solvers of an ODE past the ends, from where they interpolate
_NUM_STATE_BYTES = 512  # the same for every state, because a checkpoint is read into a tensor of its shape


class LoopFlow(Flow):
    """A network and the objective that trains it: `flow(x, c)` is the loss, `flow.sample(n)` samples.

    - `net`: any module, called as `net(x, t=t)`, with `r=r` if the objective has a second time, and `c=c` if there are
      conditions. It returns a tensor, or a tuple of the objective's heads. Or `call(net, x, t, c)` calls it
      (`dumo.flow.adapter`).
    - `classes`: labels are 0 to classes - 1, and `classes` itself means none.
    - `null`: the row that replaces a dropped condition, or a dict of rows. Without classes and null nothing is dropped
      or guided.
    - `time_scale` multiplies the times t and r before they reach the network.
    - `seed` of all random numbers: times, noise, dropped conditions.
    - `shard`: (rank, ranks) of the data; None: those of torch.distributed.
    - `path`: from data to noise; None: the straight line.
    - `coupling`: pairs noise with data by optimal transport in groups of rows; None: no pairing.
    - `ref`: theta^-, an average of the weights that you keep. Each loss puts it into evaluation mode. None: the weights
      in training.
    - `teacher`: a flow, or a function of (x_t, t, c, v_t), whose velocity replaces that of the data, on a share `prior`
      of the rows, between 0 and 1 (None: on all).
    - `precision` of passes; None: the caller's autocast.
    - `knobs`: values by name for sampling; None: the objective's own.
    - `guide`: guidance while sampling; None: none.

    If the objective names no slope, du/dt is taken by dual numbers, or by torch.func.jvp if the network admits no dual
    numbers.
    """

    def __init__(
        self,
        net: nn.Module,
        objective: Objective,
        *,
        classes: int = 0,
        null: Null = None,
        time_scale: float = 1.0,
        call: CustomCall | None = None,
        seed: int = 0,
        shard: tuple[int, int] | None = None,
        path: FlowPath | None = None,
        coupling: Coupling | None = None,
        teacher: "TeacherVelocity | LoopFlow | None" = None,
        prior: float | None = None,
        ref: nn.Module | None = None,
        precision: Precision | None = None,
        knobs: Mapping[str, float] | None = None,
        guide: CFG | None = None,
    ) -> None:
        if isinstance(net, torch.jit.ScriptModule):  # torch's derivative of one is zero
            raise UserError("a module of torch.jit.script has no du/dt: give it as it was before it was scripted")

        # Refuse settings that would be ignored without an error.
        if precision is not None and precision not in get_args(Precision):
            raise UserError(
                f"precision = {precision!r}: give 'fp32', 'tf32', 'bf16', or None for the caller's autocast"
            )
        if shard is not None and not 0 <= shard[0] < shard[1]:
            raise UserError(f"shard = {shard}: give (rank, ranks) of the data, with 0 <= rank < ranks")
        if classes and null is not None:
            raise UserError(f"null= replaces conditions that are not labels, and classes = {classes}: leave one out")
        compatibility.require_names("knobs", knobs or {}, objective.needs.knobs, objective.kind)

        # Without a null condition nothing is dropped.
        if not classes and null is None:
            objective = compatibility.without_drop(objective)

        # A flow teaches by its velocity.
        teacher_flow = unwrap(teacher) if isinstance(teacher, nn.Module) else None
        super().__init__(
            net,
            objective,
            classes=classes,
            seed=seed,
            path=path,
            coupling=coupling,
            teacher=teacher_flow.teaching()
            if isinstance(teacher_flow, LoopFlow)
            else cast("TeacherVelocity | None", teacher),
            prior=prior,
            ref=ref,
            precision=precision,
            knobs=knobs,
            guide=guide,
        )
        self.null = null
        self.time_scale = time_scale
        self.call = call
        self.shard = shard
        self.training_guidance = GuidanceScale.of(objective.needs)
        # Makes the teacher of conditions that are not labels; None: the teacher is a function.
        self.teach_conditions: Callable[[Condition], TeacherVelocity] | None = None
        if isinstance(teacher_flow, LoopFlow):
            self._require_teacher_flow(teacher_flow)
            self.teach_conditions = teacher_flow.teaching
            if teacher_flow.guide.active:
                self.training_guidance = GuidanceScale(teacher_flow.guide.scale, "teacher", "a teacher without guide=")
        self._require_guidable(self.guide)

        self.step = 0  # losses so far
        self.rows = 0  # the largest batch of a rank in training so far
        self.first_rows = 0  # the largest rank's batch in the first call, until one in training is counted
        self.shape: tuple[int, ...] | None = None  # of a row
        self.last: Terms | None = None  # of the last loss, detached
        self.has_named_slope = "slope" in getattr(objective, "model_fields_set", ("slope",))
        self.chosen_slope: Slope | None = None  # if the objective names none
        self.slope_reason = ""  # how du/dt is taken, and how far off it is
        self.checked_modes: set[bool] = set()  # True: in training, which counts for evaluation, too
        self.is_check_of_copy = False  # the check worked on a copy of the network
        self.net_draws = False  # the network draws random numbers

    # ---------------------------------------------------------------------------------------------------- training step

    def forward(self, x: Tensor, c: Condition = None, **options: Any) -> Tensor:  # noqa: ANN401, of `loss`
        """`loss`: what DistributedDataParallel, accelerate and Lightning wrap."""
        return self.loss(x, c, **options)

    def loss(
        self,
        x: Tensor,
        c: Condition = None,
        *,
        step: int | None = None,
        progress: float | None = None,
        z: Tensor | None = None,
    ) -> Tensor:
        """The mean loss of data x (b, ...), floats near [-1, 1], of conditions c.

        c: None, class labels (b,), numbers (b, ...), or a dict of tensors.
        step: which random numbers are drawn, in evaluation mode the same whatever was trained; None: the number of
            losses so far, which are counted in training mode.
        progress: the share of the training that is done, for objectives that change with it; None: 0.
        z: noise that goes with x, of its shape; None: drawn.

        Every rank must make the first call, and the first in training mode: these make `check`, and the ranks agree on
        how many rows each has. Raises UserError for what would train wrongly without an error.
        """
        # Check the network once in training mode, before that once in evaluation, and at step 100 if it was not copied.
        is_counted = step is None and self.training
        is_second_check = is_counted and self.step == _SECOND_CHECK_STEP and not self.is_check_of_copy
        if not self.checked_modes & {True, self.training} or is_second_check:
            self.check(x, c)
        self._require_conditions(c)
        if x.requires_grad and torch.is_grad_enabled():
            raise UserError("x requires a gradient, so the loss would train what made it: give x.detach()")
        if progress is not None and not 0 <= progress <= 1:
            raise UserError(f"progress = {progress:g}: give the share of the training that is done, from 0 to 1")
        if z is not None and z.shape != x.shape:
            raise UserError(f"z has shape {tuple(z.shape)}, x {tuple(x.shape)}: give noise of the shape of x")

        # Draw the random numbers of the step, and put noise to the batch.
        self.shape = self.shape or tuple(x.shape[1:])
        if is_counted:
            rows = len(x) if self.rows else int(dist.largest(len(x)))
            self.rows = max(self.rows, rows)  # a smaller last batch keeps its rank's rows
        at_step = self.step if step is None else step
        is_validation = step is not None and not self.training
        b, dropout_keys = self._noise(x, c, at_step, progress=progress or 0.0, z=z, is_validation=is_validation)

        # Call the objective's loss, which calls the network.
        key = self._generator_key(at_step) if self.training else None
        net = self._adapter(c, key)
        ref = Frozen(self._reference(net))
        masks = dropout.using(dropout_keys if self.training else None)
        with masks, seeded_generators(key, x.device), self._in_precision(x):  # a user's loss may draw
            terms = require_loss_per_row(self.objective.loss(net, ref, b), len(x), self.objective.kind)
        if is_counted:
            self.step += 1
        self.last = terms.detach()
        return terms.loss.mean()

    # --------------------------------------------------------------------------------------------- reading and sampling

    def readings(self, guide: CFG | None = None, knobs: Mapping[str, float] | None = None) -> Readings:
        """What the network tells a solver, c being class labels, with this guidance and these knobs."""
        return self._readings(self._adapter(None, None), guide or self.guide, knobs)

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Moment, c: Condition = None) -> Sample:
        """dx_t/dt at x_t = x and t, one pass, x_t in units of `path.sd`.

        Raises UserError if the objective never taught it.
        """
        return self._read("velocity", x, c, t)

    @torch.no_grad()
    def jump(self, x: Tensor, t: Moment, s: Moment = 0.0, c: Condition = None) -> Sample:
        """x_s of the trajectory through x_t = x at t, one pass; s = 0 is data, in the data's own unit.

        At times above 0, x_t and x_s are in units of `path.sd`. Raises UserError if the jump was never taught.
        """
        readings = available_readings(self.objective)
        ends_at_data = bool((torch.as_tensor(s).abs() < _ROUNDING).all())
        if readings.flow_map is None and ends_at_data:
            if bool((torch.as_tensor(t) < readings.lowest).any()):
                raise UserError(
                    f"objective '{self.objective.kind}' teaches jumps to the data from t = {readings.lowest:g} up "
                    "alone: give such a t, or train with 'dumo'"
                )
            return self.path.sd * self._read("endpoint", x, c, t)
        # Of tensors it is not known which jumps are taught.
        if not isinstance(t, Tensor) and not isinstance(s, Tensor) and readings.hops and not readings.hops(t, s):
            raise UserError(
                f"objective '{self.objective.kind}' teaches no jump from t = {t:g} to s = {s:g}: call flow.sample, "
                "which makes those that it teaches, or train with 'dumo_any' or 'meanflow'"
            )
        x_s = self._read("flow_map", x, c, t, s)
        is_data = lift(_row_times(s, x, _ROUNDING).abs() < _ROUNDING, x_s)
        return torch.where(is_data, self.path.sd * x_s, x_s)

    def teaching(self, conditions: Condition = None) -> TeacherVelocity:
        """The velocity that a student learns from this flow, of (x_t, t, c, v_t).

        conditions: the student's that are not labels; c are then their row numbers. None: c are labels.

        Raises UserError if the velocity was never taught.
        """
        read = self._taught_reading("velocity", self._adapter(conditions, None))

        def velocity(x: Sample, t: Time, c: Cond) -> Sample:
            with sampling.eval_mode(self.net), self._in_precision(x):
                return read(x, t, c)

        return teacher_velocity(Readings(velocity=velocity))

    @torch.no_grad()
    def sample(
        self,
        c: int | Sequence[int] | Condition = 1,
        *,
        nfe: int = 1,
        seed: int = 0,
        solver: Solver | str | None = None,
        guidance: float | None = None,
        shape: Sequence[int] | None = None,
    ) -> Tensor:
        """Samples in float32 on the CPU. Sample i is a function of (seed, i, its condition), whatever its batch.

        c: how many, of the classes in turn; or a condition for each.
        nfe: passes of each sample through the network.
        solver: or its name, such as "heun"; None takes the best for few passes.
        guidance: the scale w of classifier-free guidance, for plain targets; None: the flow's own.
        shape: of a sample; None: that of the data, known after the first loss.

        Raises UserError for guidance, jumps and numbers of passes that were never taught.
        """
        shape = shape or self.shape
        if shape is None:
            raise UserError("the shape of the data is not known before the first loss: give flow.sample(shape=...)")
        if isinstance(c, Integral):  # of numpy, too
            c = int(c)
        conditions, index = self._sample_conditions(c)
        net = self._adapter(conditions, None)
        guide = self.guide
        if guidance is not None:
            guide = CFG(scale=guidance)
            self._require_guidable(guide)
        readings = self._readings(net, guide)
        solver = best_solver(readings) if solver is None else solver_of(solver)
        batches = sampling.sample_batches(
            net,
            readings,
            self.path,
            solver,
            index,
            nfe=nfe,
            seed=seed,
            shape=shape,
            device=self.device,
            precision=self.precision,
        )
        samples = sampling.join_batches(batches)
        # The root of a sharded network stays whole after a pass that has no backward pass.
        for part in dist.sharded_parts(self.net):
            part.reshard()
        return samples.x

    def of(self, net: nn.Module) -> "LoopFlow":
        """A copy of this flow over another network, such as an average of its weights or of the whole flow's."""
        averaged = unwrap(net)
        if isinstance(averaged, Flow):
            net = averaged.net
        return cast(LoopFlow, super().of(net))

    # -------------------------------------------------------------------------------------------------------- the check

    @torch.inference_mode(False)  # the slope is chosen for training, also if validation comes first
    def check(self, x: Tensor, c: Condition = None) -> str:
        """Try the network on a few rows, once, and return how du/dt is taken, and how far off it is.

        Weights, buffers and generators stay as they are, and gradients are recorded, whatever the caller's mode. Under
        torch.distributed every rank must call it. Raises UserError if the objective cannot be combined with a setting,
        if data were not scaled, if the network is not pure, mixes rows or is not finite, and for a wrong derivative.
        """
        # Refuse combinations and data that would train wrongly.
        self._require_compatible(len(x), c)
        if not bool(x.abs().max() <= _MAX_VALUE) or not bool(x.float().square().mean().sqrt() <= _MAX_RMS):
            raise UserError(
                f"x lies between {float(x.min()):.3g} and {float(x.max()):.3g}: data lie near [-1, 1], or have "
                "deviation 1: scale them"
            )
        self._require_conditions(c, waits=True)

        # Put noise to a few rows, as a step does.
        self.first_rows = int(dist.largest(len(x)))
        num_tried = rows_to_try(self.objective)
        x = x[:num_tried].detach().clone()  # tensors of torch.inference_mode become plain ones
        c = map_tensors(c, lambda rows: rows[:num_tried].clone())
        b, dropout_keys = self._noise(x, c, self.step)
        needs = self.objective.needs

        # Try a copy of the network whose layers of zeros are noise, or the network itself.
        copied = copy_without_zero_layers(unwrap(self.net))
        self.is_check_of_copy = copied is not None
        net = self._adapter(c, self._generator_key(self.step))
        unkeyed_net = self._adapter(c, None)
        if copied is not None:
            net = net.with_net(copied)
            unkeyed_net = unkeyed_net.with_net(copied)
        generators_stay = torch.random.fork_rng([x.device] if x.is_cuda else [])
        with generators_stay, dropout.using(dropout_keys if self.training else None), self._in_precision(x):
            require_trainable(net, b, needs)
            # A pass without a key moves torch's generators, if the network draws from them.
            states_before = generator_states(x.device)
            with torch.no_grad():
                unkeyed_net(b.x_t, b.c, **inputs_of(b, needs))
            self.net_draws = generator_states(x.device) != states_before
            if needs.slope is not None:
                slope, self.slope_reason = choose_slope(
                    self._slopes_to_try(), net, replace(b, moving=None), needs, is_copy=copied is not None
                )
                if not self.has_named_slope:
                    self.chosen_slope = slope
                    self.objective = self.objective.model_copy(update={"slope": slope})
        self.checked_modes.add(self.training)
        return self.slope_reason or "this objective takes no du/dt"

    def _slopes_to_try(self) -> list[Slope]:
        """The slope that the objective names; else first the one of a resumed run, then dual, then jvp."""
        named_slope = slope_of(self.objective)
        if self.has_named_slope and named_slope is not None:
            return [named_slope]
        slopes: list[Slope] = [DualSlope(), JvpSlope()]
        if self.chosen_slope is not None:
            slopes = [self.chosen_slope, *(slope for slope in slopes if slope != self.chosen_slope)]
        return slopes

    def _require_compatible(self, batch: int, c: Condition) -> None:
        """Refuse what the objective cannot be combined with (`dumo.flow.compatibility`), for a batch of this size."""
        objective = self.objective
        compatibility.require_path(objective, self.path.kind)
        compatibility.require_times(objective)
        compatibility.require_teacher(objective, gives_velocity=self.teacher is not None)
        if self.prior is not None and self.training:  # a batch of validation may have a row
            compatibility.require_teacher_share(self.prior, batch, objective, gives_velocity=self.teacher is not None)
        compatibility.require_first_stage(objective, has_first_stage=self.ref is not None)
        compatibility.require_precise_weights(objective, self.net)
        if c is not None and not is_labels(c):
            compatibility.require_labels(objective, has_coupling=self.coupling is not None)

    def _require_teacher_flow(self, teacher: "LoopFlow") -> None:
        """Refuse a teacher of other labels or another path, and one that guides what the objective guides."""
        facts: dict[str, object] = {"path": self.path.kind, "path.sd": self.path.sd}
        teacher_facts: dict[str, object] = {"path": teacher.path.kind, "path.sd": teacher.path.sd}
        if teacher.classes:
            facts["classes"] = self.classes
            teacher_facts["classes"] = teacher.classes
        compatibility.require_same_data("teacher=", teacher_facts, facts)
        compatibility.require_unguided_teacher(self.objective, teacher.guide.scale, "guide= of the teacher")

    def _require_guidable(self, guide: CFG) -> None:
        """Refuse guidance while sampling of a network that has no null condition or is guided already."""
        has_null = bool(self.classes) or self.null is not None
        compatibility.require_guidable(guide, self.objective, self.training_guidance, has_null=has_null)

    def _require_conditions(self, c: Condition, *, waits: bool = False, may_be_null: bool = False) -> None:
        """Refuse conditions that would be ignored, or taken for others.

        waits: whether to read labels on a GPU, which must be waited for; those on a CPU always are.
        may_be_null: whether a label may be the one that means none, as it may if the network is read.
        """
        if c is None:
            if self.classes or self.null is not None:
                raise UserError("classes= and null= are for conditions, and there are none: give c, or leave them out")
        elif is_labels(c):
            labels = cast(Tensor, c)
            if not self.classes:
                raise UserError("c are labels, which would be ignored: give dumo.Flow(net, classes=...)")
            if waits or labels.device.type == "cpu":
                out_of_range = labels[(labels < 0) | (labels >= self.classes + may_be_null)]
                if len(out_of_range):
                    raise UserError(
                        f"label {int(out_of_range[0])} with classes = {self.classes}: labels are 0 to "
                        f"{self.classes - 1}, and {self.classes} means none"
                    )
        elif self.classes:
            raise UserError(f"classes = {self.classes} are for labels of integers (b,), and c is not: give c as such")
        else:
            rows = ConditionRows.of(c, self.null)
            compatibility.require_names("null", rows.null, rows.rows, "c")

    # -------------------------------------------------------------------------------------------- what a batch becomes

    def _noise(
        self,
        x: Sample,
        c: Condition,
        at_step: int,
        *,
        progress: float = 0.0,
        z: Sample | None = None,
        is_validation: bool = False,
    ) -> tuple[NoisyBatch, dropout.Keys]:
        """The noisy batch of this rank's rows x at a step, and the keys of their dropout.

        is_validation: draw as if these rows, and as many on each other rank, were the batch, whatever was trained.
        """
        # Find this rank's rows in the global batch.
        rank, ranks = self.shard or (dist.rank(), dist.world())
        rows_of_rank = len(x)
        if not is_validation:
            rows_of_rank = max(self.rows or self.first_rows, rows_of_rank)
        first = rank * rows_of_rank
        rows = slice(first, first + len(x))
        batch = max(ranks * rows_of_rank, rows.stop)
        draws = self.make_draws(at_step, x.shape[1:], batch=batch, rows=rows, z=z is None)

        # Conditions that are not labels go through the objective as row numbers.
        index = self._condition_index(len(x), c, x.device)
        null: Cond | int = self.classes
        teacher = None
        if c is not None and not is_labels(c):
            null = ConditionRows.of(c, self.null).drop(index)
            if self.teach_conditions:
                teacher = self.teach_conditions(c)
        b = self.add_noise(draws, x, index, null=null, z=z, progress=progress, teacher=teacher)

        # A pass of some rows would draw for them what it did not draw for all, so du/dt is taken on all rows.
        if self.net_draws or self._ranks_differ(len(x), rows_of_rank, ranks):
            b = replace(b, moving=None)
        return b, to_device(draws.keys, x.device)

    def _ranks_differ(self, rows: int, rows_of_rank: int, ranks: int) -> bool:
        """Whether some rank's `rows` all have r = t, or all r != t, and another's do not: these make other passes.

        rows_of_rank: the places of the batch that each rank has; a smaller batch takes the first of them.
        """
        moving = self.objective.times.moving(ranks * rows_of_rank)
        if moving is None:
            return False
        kinds = {frozenset(moving[first : first + rows]) for first in range(0, len(moving), rows_of_rank)}
        return len(kinds) > 1

    def _in_precision(self, x: Sample) -> AbstractContextManager[None]:
        """Passes on x in the precision of this flow, if it has one."""
        return using(self.precision, x.device) if self.precision else nullcontext()

    def _condition_index(self, n: int, c: Condition, device: torch.device) -> Cond:
        """What an objective gets as c (n,): labels, or row numbers of other conditions; zeros without conditions."""
        if c is None:
            return torch.zeros(n, dtype=torch.long, device=device)
        if is_labels(c):
            return cast(Tensor, c).long()
        return torch.arange(n, device=device)

    def _adapter(self, c: Condition, key: int | None) -> NetAdapter:
        """The network as objectives call it, with conditions of which row numbers are known, if c are not labels.

        It is made for each step and is no attribute, which would give every weight two names.
        """
        has_rows = c is not None and not is_labels(c)
        return NetAdapter(
            self.net,
            self.objective.needs,
            self.call,
            labelled=self.classes > 0 and not has_rows,
            time_scale=self.time_scale,
            rows=ConditionRows.of(c, self.null) if has_rows else None,
            key=key,
        )

    def _reference(self, net: NetAdapter) -> NetAdapter:
        """theta^-: the average given as `ref`, in evaluation mode, else the weights in training."""
        if self.ref is None:
            return net
        average = self.ref.module
        is_net_itself = unwrap(average) is unwrap(self.net)  # in training, so it stays in its mode
        if average.training and not is_net_itself:
            average.eval()
        return net.with_net(average)

    def _generator_key(self, at_step: int) -> int:
        """The key of the random numbers that the network draws itself, at a step on this rank."""
        rank = self.shard[0] if self.shard else dist.rank()
        return stream(self.seed, at_step, "net", rank).initial_seed()

    # ---------------------------------------------------------------------------------------- what a reading is made of

    def _readings(self, net: NetAdapter, guide: CFG, knobs: Mapping[str, float] | None = None) -> Readings:
        """What an adapter's network tells a solver, with this guidance and these knobs (None: the flow's own)."""
        null = net.rows.drop if net.rows else self.classes
        return guide(readings_of(self.objective, _in_weights_dtype(net), knobs or self.knobs), null)

    def _read(self, name: str, x: Tensor, c: Condition, *times: Moment) -> Sample:
        """The reading `name` of x at these times, (b, ...), in evaluation mode. Raises as `_require_reading`."""
        self._require_conditions(c, may_be_null=True)
        index = self._condition_index(len(x), c, x.device)
        read = self._taught_reading(name, self._adapter(c, None))
        margin = _OVERSHOOT if name == "velocity" else _ROUNDING
        row_times = [_row_times(time, x, margin) for time in times]
        if name == "flow_map" and not self.objective.times.climbs:
            t, s = row_times
            if bool((s > t + _ROUNDING).any()):
                raise UserError(
                    f"objective '{self.objective.kind}' teaches no jumps up to the noise: give s up to t, or train "
                    "with 'f2d2'"
                )
        with sampling.eval_mode(self.net), self._in_precision(x):
            return read(x, *row_times, index)

    def _taught_reading(self, name: str, net: NetAdapter) -> Callable[..., Any]:
        """A reading by its name. Raises UserError if it was never taught."""
        read = getattr(self._readings(net, self.guide), name)
        if read is None:
            raise UserError(
                f"objective '{self.objective.kind}' never teaches the {name.replace('_', ' ')}: train with 'dumo_any' "
                "or 'meanflow', which teach velocity and jumps"
            )
        return read

    def _sample_conditions(self, c: int | Sequence[int] | Condition) -> tuple[Condition, Cond]:
        """The conditions of samples that are not labels, or None, and what an objective gets as c (n,)."""
        if isinstance(c, Mapping) or (isinstance(c, Tensor) and c.ndim > 0 and not is_labels(c)):
            self._require_conditions(c)
            conditions = map_tensors(c, lambda rows: rows.to(self.device))
            return conditions, torch.arange(len(ConditionRows.of(conditions, None)))
        count_or_labels = c.tolist() if isinstance(c, Tensor) else c
        if isinstance(count_or_labels, int):
            return None, sampling.labels_in_turn(count_or_labels, self.classes)
        labels = [int(label) for label in cast("Sequence[int]", count_or_labels)]
        return None, sampling.labels_in_turn(len(labels), self.classes, labels)

    # -------------------------------------------------------------------------------------------------------- the state

    def get_extra_state(self) -> Tensor:
        """Step, seed, rows of a rank, shape of a row and the chosen slope, as JSON in a uint8 tensor (512,)."""
        fields = {
            "step": self.step,
            "seed": self.seed,
            "rows": self.rows,
            "shape": self.shape,
            "slope": self.chosen_slope and self.chosen_slope.model_dump(),
        }
        return torch.tensor(list(json.dumps(fields).encode().ljust(_NUM_STATE_BYTES)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Resume from what `get_extra_state` returned."""
        fields = json.loads(bytes(state.tolist()))
        self.step = fields["step"]
        self.seed = fields["seed"]
        self.rows = fields["rows"]
        self.shape = fields["shape"] and tuple(fields["shape"])
        self.chosen_slope = fields["slope"] and TypeAdapter[Slope](Slope).validate_python(fields["slope"])

    def extra_repr(self) -> str:
        """Objective, classes and how du/dt is taken, for print(flow)."""
        return (
            f"objective={self.objective.kind}, classes={self.classes}, du/dt: {self.slope_reason or 'not chosen yet'}"
        )


def _in_weights_dtype(adapter: NetAdapter) -> Net:
    """The adapter on x in the floating-point type of the network's weights; what it returns is in that of x."""
    weights = (p for p in unwrap(adapter.net).parameters() if p.is_floating_point())
    weight = next(weights, None)
    if weight is None or weight.dtype == torch.float32:
        return adapter

    def net(x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        return tuple(head.to(x.dtype) for head in adapter(x.to(weight.dtype), c, **inputs))

    return net


def _row_times(time: Moment, x: Sample, margin: float) -> Time:
    """A time for each row of x. Raises UserError for times outside of [0, 1] by more than `margin`."""
    time = torch.as_tensor(time, dtype=None if isinstance(time, Tensor) else torch.float32)
    is_inside = (time > -margin) & (time < 1 + margin)
    if not is_inside.all():
        raise UserError(f"a time of {time[~is_inside][0]:g}: times run from 0, data, to 1, noise")
    return time.to(x.device).expand(len(x))
