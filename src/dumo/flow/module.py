"""`Flow`: a network, the objective that trains it, and how it is sampled. In public: `dumo.Flow`.

    flow = dumo.Flow(net, "dumo", classes=10)
    loss = flow(x, c)                    # draws noise, times and dropped labels; takes du/dt
    images = flow.sample(16, nfe=1)

A loss is made in three steps: `make_draws` draws the random numbers, `add_noise` makes the noisy batch, and
`compute_loss` calls the objective, which calls the network. `forward` makes all three in a user's training loop, and
checks the network first. `dumo.run.trainer` makes them one by one, because a run prefetches random numbers and splits
a batch into micro-batches.

The network is sampled by what its objective says that its heads mean: `readings`. `sample`, `velocity`, `jump` and
`as_teacher` call these in evaluation mode; a run passes them to `dumo.flow.sampling`.

All random numbers are functions of (seed, step, row of the global batch), so ranks draw different ones. Numbers that a
network draws itself, such as nn.Dropout's masks, are functions of (seed, step, rank), and equal in all passes of a
step. A resumed run is therefore bit-identical to an uninterrupted one.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from numbers import Integral
from typing import Any, cast, get_args

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from dumo.flow import compatibility, dropout
from dumo.flow.adapter import (
    Condition,
    ConditionRows,
    CustomCall,
    NetAdapter,
    Null,
    in_weights_dtype,
    is_labels,
    map_tensors,
)
from dumo.flow.derivative import choose_slope, copy_without_zero_layers
from dumo.flow.guide import CFG, GuidanceScale
from dumo.flow.noisy_batch import Coupling, Draws, add_noise, make_draws
from dumo.flow.path import FlowPath, Linear
from dumo.flow.precision import Precision, autocast, using
from dumo.flow.reading import available_readings, readings_of, teacher_velocity
from dumo.flow.sampling import eval_mode, join_batches, labels_in_turn, sample_batches
from dumo.flow.slope import DualSlope, JvpSlope, Slope, slope_of
from dumo.flow.solver import Solver, best_solver, solver_of
from dumo.flow.trainable import inputs_of, require_loss_per_row, require_trainable, rows_to_try
from dumo.runtime import dist
from dumo.runtime.random import generator_states, seeded_generators, stream
from dumo.types import (
    Cond,
    Frozen,
    Net,
    NoisyBatch,
    Objective,
    Readings,
    Sample,
    TeacherVelocity,
    Terms,
    Time,
    Trail,
    UserError,
    frozen,
    lift,
    unwrap,
)
from dumo.types.batch_rows import to_device
from dumo.types.outside import make_objective

Moment = Tensor | float | int  # a time for all rows, or one for each
Loss = Callable[[Net, Frozen, NoisyBatch], Terms]  # of (net, theta^-, batch)

UNGUIDED = CFG()
_STRAIGHT = Linear()
# The step at which a network that was not copied is compared with its derivative again: its layers of zeros are trained
_SECOND_CHECK_STEP = 100
# Data beyond these were not scaled: they should lie near [-1, 1], or have deviation 1
_MAX_VALUE = 100.0
_MAX_RMS = 4.0
_ROUNDING = 1e-6  # of times that a caller added up
_OVERSHOOT = 0.25  # of adaptive solvers of an ODE past the ends, from where they interpolate
_NUM_STATE_BYTES = 512  # the same for every state, because a checkpoint is read into a tensor of its shape


class Flow(nn.Module):
    """A network and the objective that trains it: `flow(x, c)` is the loss, `flow.sample(n)` samples.

    - `net`: any module, called as `net(x, t=t)`, with `r=r` if the objective has a second time, and `c=c` if there are
      conditions. It returns a tensor, or a tuple of the objective's heads. It may be wrapped (DistributedDataParallel,
      FSDP2, torch.compile, accelerate) before or after.
    - `objective`: its kind, a dict of its fields with the kind, or an instance.
    - `classes`: labels are 0 to classes - 1, and `classes` itself means no label.
    - `null`: the row that replaces a dropped condition, or a dict of rows. Without classes and null nothing is dropped
      or guided.
    - `call`: calls the network, `call(net, x, t, c)`, or `call(net, x, t, r, c)`. None: by the names above.
    - `direct`: call the network as dumo calls its own, `net(x, c, t=t)`, with no adapter and no checks of its outputs.
    - `time_scale`: multiplies the times t and r before they reach the network.
    - `path`: weights of data and noise, and the unit `sd` of the data.
    - `coupling`: pairs noise with data by optimal transport in groups of rows; None: no pairing.
    - `teacher`: a flow, or a function of (x_t, t, c, v_t), whose velocity replaces that of the data, on a share `prior`
      of the rows, between 0 and 1 (None: on all).
    - `ref`: theta^-, an average of the weights that you keep; each loss puts it into evaluation mode. None: the weights
      in training.
    - `guide`: guidance while sampling. `knobs`: values by name while sampling; None: the objective's own.
    - `precision`: of passes; None: the caller's autocast.
    - `seed`: of all random numbers: times, noise, dropped conditions.
    - `shard`: (rank, ranks) of the data; None: those of torch.distributed.

    If `slope` of the objective was not set explicitly, its default is replaced: du/dt is taken by dual numbers, or by
    torch.func.jvp if the network does not support dual numbers. `step` counts the losses, `last` has the detached terms
    of the last one, `shape` is that of a row, and `slope_report` says how du/dt is taken.
    """

    def __init__(
        self,
        net: nn.Module,
        objective: str | Mapping[str, Any] | Objective = "dumo",
        *,
        classes: int = 0,
        null: Null = None,
        call: CustomCall | None = None,
        direct: bool = False,
        time_scale: float = 1.0,
        path: FlowPath = _STRAIGHT,
        coupling: Coupling | None = None,
        teacher: "Flow | TeacherVelocity | None" = None,
        prior: float | None = None,
        ref: nn.Module | None = None,
        guide: CFG = UNGUIDED,
        knobs: Mapping[str, float] | None = None,
        precision: Precision | None = None,
        seed: int = 0,
        shard: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        objective = make_objective(objective)

        # Refuse settings that would be ignored without an error.
        if isinstance(net, torch.jit.ScriptModule):  # torch's derivative of one is zero
            raise UserError("a module of torch.jit.script has no du/dt: give it as it was before it was scripted")
        if precision is not None and precision not in get_args(Precision):
            raise UserError(
                f"precision = {precision!r}: give 'fp32', 'tf32', 'bf16', or None for the caller's autocast"
            )
        if shard is not None and not 0 <= shard[0] < shard[1]:
            raise UserError(f"shard = {shard}: give (rank, ranks) of the data, with 0 <= rank < ranks")
        if classes and null is not None:
            raise UserError(f"null= replaces conditions that are not labels, and classes = {classes}: leave one out")
        compatibility.require_names("knobs", knobs or {}, objective.needs.knobs, objective.kind)

        # Without a null condition nothing is dropped. A network that is called directly always gets a condition, and
        # learns the label `classes` as the null, even if it is the only one.
        if not (classes or direct) and null is None:
            objective = compatibility.without_drop(objective)

        self.net = net
        self.objective = objective
        self.classes = classes
        self.null = null
        self.call = call
        self.direct = direct
        self.time_scale = time_scale
        self.path: FlowPath = path
        self.coupling = coupling
        self.prior = prior
        # In a Frozen, which is no module: as a submodule its weights would enter parameters(), DDP and checkpoints.
        self.ref = Frozen(ref) if ref is not None else None
        self.guide = guide
        self.knobs = knobs
        self.precision: Precision | None = precision
        self.seed = seed
        self.shard = shard

        # A teacher is kept as a function, for the same reason. If it is a flow, it teaches by its velocity, and
        # `teach_conditions` makes the function for conditions that are not labels.
        self.training_guidance = GuidanceScale.of(objective.needs)
        self.teach_conditions: Callable[[Condition], TeacherVelocity] | None = None
        teacher_flow = unwrap(teacher) if isinstance(teacher, nn.Module) else None
        if isinstance(teacher_flow, Flow):
            self._require_teacher_flow(teacher_flow)
            self.teacher: TeacherVelocity | None = teacher_flow.as_teacher()
            self.teach_conditions = teacher_flow.as_teacher
            if teacher_flow.guide.active:
                self.training_guidance = GuidanceScale(teacher_flow.guide.scale, "teacher", "a teacher without guide=")
        else:
            self.teacher = cast("TeacherVelocity | None", teacher)
        self._require_guidable(guide)

        self.step = 0
        self.rows = 0  # the largest batch of a rank in training so far
        self.first_rows = 0  # the largest rank's batch in the first call, until one in training is counted
        self.shape: tuple[int, ...] | None = None
        self.last: Terms | None = None
        self.has_explicit_slope = "slope" in getattr(objective, "model_fields_set", ("slope",))
        self.chosen_slope: Slope | None = None  # if the objective was given none
        self.slope_report = ""
        self.checked_modes: set[bool] = set()  # True: in training, which counts for evaluation, too
        self.is_check_of_copy = False  # the check worked on a copy of the network
        self.net_draws = False  # the network draws random numbers

    # --------------------------------------------------------------------------------------------------------- the loss

    def forward(
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
        compatibility.require_conditions(c, self.classes, self.null)
        if x.requires_grad and torch.is_grad_enabled():
            raise UserError("x requires a gradient, so the loss would train what made it: give x.detach()")
        if progress is not None and not 0 <= progress <= 1:
            raise UserError(f"progress = {progress:g}: give the share of the training that is done, from 0 to 1")
        if z is not None and z.shape != x.shape:
            raise UserError(f"z has shape {tuple(z.shape)}, x {tuple(x.shape)}: give noise of the shape of x")

        # Draw the random numbers of the step, and add noise to the batch.
        self.shape = self.shape or tuple(x.shape[1:])
        if is_counted:
            rows = len(x) if self.rows else int(dist.largest(len(x)))
            self.rows = max(self.rows, rows)  # a smaller last batch keeps its rank's rows
        at_step = self.step if step is None else step
        is_validation = step is not None and not self.training
        batch, dropout_keys = self._noisy_batch(x, c, at_step, z=z, progress=progress, is_validation=is_validation)

        # Compute the loss. A user's objective may draw random numbers: the caller's generators stay as they are.
        key = self._generator_key(at_step) if self.training else None
        with seeded_generators(key, x.device), self._in_precision(x):
            terms = self.compute_loss(batch, dropout_keys if self.training else None, conditions=c, generator_key=key)
        if is_counted:
            self.step += 1
        self.last = terms.detach()
        return terms.loss.mean()

    def make_draws(
        self, step: int, shape: Sequence[int], *, batch: int, rows: slice = slice(None), z: bool = True
    ) -> Draws:
        """Draw the random numbers of these rows of a step's global batch, on the CPU, for samples of this shape.

        batch: the number of rows of the global batch. z: whether to draw noise. It reads nothing that changes during a
        training, so it may be called early, in any thread.
        """
        return make_draws(
            self.objective, shape, seed=self.seed, step=step, batch=batch, rows=rows, z=z, prior=self.prior
        )

    def add_noise(
        self,
        x: Sample,
        c: Condition,
        draws: Draws,
        *,
        z: Sample | None = None,
        between: Trail | None = None,
        progress: float = 0.0,
    ) -> NoisyBatch:
        """Put noise to data x (b, ...) of conditions c, by the draws of as many rows; on the device of x.

        z: noise that goes with x; None: that of the draws.
        between: points of a teacher's trajectory from x to z, (b, points - 1, ...).
        progress: the share of the training that is done, from 0 to 1.

        It waits for no device, unless there is a coupling.
        """
        # Conditions that are not labels go through the objective as row numbers.
        index = self._condition_index(len(x), c, x.device)
        null: Cond | int = self.classes
        teacher = self.teacher
        if self._has_rows(c):
            null = ConditionRows.of(c, self.null).drop(index)
            if self.teach_conditions:
                teacher = self.teach_conditions(c)
        return add_noise(
            draws,
            self.path,
            x,
            index,
            null,
            progress=progress,
            z=z,
            teacher=teacher,
            coupling=self.coupling,
            between=between,
            asks_teacher=self.objective.needs.teacher.reads_v_t,
        )

    def compute_loss(
        self,
        batch: NoisyBatch,
        dropout_keys: dropout.Keys | None = None,
        *,
        conditions: Condition = None,
        generator_key: int | None = None,
        loss: Loss | None = None,
        cache_casts: bool = True,
    ) -> Terms:
        """Call the objective's loss on a noisy batch: the loss of each row, its parts and notes, each (b,).

        dropout_keys: of the rows' masks (`dumo.flow.dropout`); None: the surrounding context has them, or there are
            none.
        conditions: those of the batch, if they are not labels.
        generator_key: seeds torch's generators in every pass, for networks that draw by them; None: they continue.
        loss: a compiled one; None: the objective's.
        cache_casts: whether autocast keeps casts of weights to the end of the loss. Casts of weights that are gathered
            for one pass would keep them in memory.
        """
        net = self._net_for_objective(conditions, generator_key)
        ref = self._theta_minus(net)
        masks = nullcontext() if dropout_keys is None else dropout.using(dropout_keys)
        casts = nullcontext()
        if self.precision is not None:
            casts = autocast(self.precision, batch.x_t.device, keep=cache_casts)
        with casts, masks:
            terms = (loss or self.objective.loss)(cast(Net, net), ref, batch)
        return require_loss_per_row(terms, len(batch.t), self.objective.kind)

    # -------------------------------------------------------------------------------------------------------- the check

    @torch.inference_mode(False)  # the slope is chosen for training, also if validation comes first
    def check(self, x: Tensor, c: Condition = None) -> str:
        """Try the network on a few rows, choose the slope, and return how du/dt is taken and how far off it is.

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
        compatibility.require_conditions(c, self.classes, self.null, waits=True)

        # Add noise to a few rows, as a step does. Tensors of torch.inference_mode become plain ones.
        self.first_rows = int(dist.largest(len(x)))
        num_tried = rows_to_try(self.objective)
        x = x[:num_tried].detach().clone()
        c = map_tensors(c, lambda rows: rows[:num_tried].clone())
        batch, dropout_keys = self._noisy_batch(x, c, self.step)
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
        masks = dropout.using(dropout_keys if self.training else None)
        with generators_stay, masks, self._in_precision(x):
            require_trainable(net, batch, needs)
            # A pass without a key moves torch's generators, if the network draws from them.
            states_before = generator_states(x.device)
            with torch.no_grad():
                unkeyed_net(batch.x_t, batch.c, **inputs_of(batch, needs))
            self.net_draws = generator_states(x.device) != states_before
            if needs.slope is not None:
                slope, self.slope_report = choose_slope(
                    self._slopes_to_try(), net, replace(batch, moving=None), needs, is_copy=copied is not None
                )
                if not self.has_explicit_slope:
                    self.chosen_slope = slope
                    self.objective = self.objective.model_copy(update={"slope": slope})
        self.checked_modes.add(self.training)
        return self.slope_report or "this objective takes no du/dt"

    def _slopes_to_try(self) -> list[Slope]:
        """The slope that the objective names; else first the one of a resumed run, then dual, then jvp."""
        named_slope = slope_of(self.objective)
        if self.has_explicit_slope and named_slope is not None:
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
        if self._has_rows(c):
            compatibility.require_labels(objective, has_coupling=self.coupling is not None)

    def _require_teacher_flow(self, teacher: "Flow") -> None:
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

    # --------------------------------------------------------------------------------------------- reading and sampling

    def readings(
        self, *, guide: CFG | None = None, knobs: Mapping[str, float] | None = None, conditions: Condition = None
    ) -> Readings:
        """What the network tells a solver: its velocity, endpoint and flow map, None if the objective teaches none.

        guide, knobs: None: the flow's own; CFG() guides nowhere.
        conditions: those that are not labels; c are then their row numbers. None: c are labels.

        Gradients are recorded, and the network stays in its mode and in the caller's precision.
        """
        return self._readings(self._net_for_objective(conditions, None), guide or self.guide, knobs)

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
        available = available_readings(self.objective)
        ends_at_data = bool((torch.as_tensor(s).abs() < _ROUNDING).all())
        if available.flow_map is None and ends_at_data:
            if bool((torch.as_tensor(t) < available.lowest).any()):
                raise UserError(
                    f"objective '{self.objective.kind}' teaches jumps to the data from t = {available.lowest:g} up "
                    "alone: give such a t, or train with 'dumo'"
                )
            return self.path.sd * self._read("endpoint", x, c, t)
        # Of tensors it is not known which jumps are taught.
        is_known = not isinstance(t, Tensor) and not isinstance(s, Tensor)
        if is_known and available.hops and not available.hops(cast(float, t), cast(float, s)):
            raise UserError(
                f"objective '{self.objective.kind}' teaches no jump from t = {t:g} to s = {s:g}: call flow.sample, "
                "which makes those that it teaches, or train with 'dumo_any' or 'meanflow'"
            )
        x_s = self._read("flow_map", x, c, t, s)
        is_data = lift(_row_times(s, x, _ROUNDING).abs() < _ROUNDING, x_s)
        return torch.where(is_data, self.path.sd * x_s, x_s)

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

        Every rank makes all samples, and under FSDP2 every rank must call it. Raises UserError for guidance, jumps and
        numbers of passes that were never taught.
        """
        shape = shape or self.shape
        if shape is None:
            raise UserError("the shape of the data is not known before the first loss: give flow.sample(shape=...)")
        guide = self.guide
        if guidance is not None:
            guide = CFG(scale=guidance)
            self._require_guidable(guide)
        if isinstance(c, Integral):  # of numpy, too
            c = int(c)
        conditions, index = self._sample_conditions(c)
        net = self._net_for_objective(conditions, None)
        readings = self._readings(net, guide)
        batches = sample_batches(
            net,
            readings,
            self.path,
            best_solver(readings) if solver is None else solver_of(solver),
            index,
            nfe=nfe,
            seed=seed,
            shape=shape,
            device=self.device,
            precision=self.precision,
        )
        return join_batches(batches).x

    def as_teacher(self, conditions: Condition = None) -> TeacherVelocity:
        """The velocity that a student learns from this flow, of (x_t, t, c, v_t).

        conditions: the student's that are not labels; c are then their row numbers. None: c are labels.

        Raises UserError if the velocity was never taught.
        """
        read = self._require_reading("velocity", self._net_for_objective(conditions, None))

        def velocity(x: Sample, t: Time, c: Cond) -> Sample:
            with eval_mode(self.net), self._in_precision(x):
                return read(x, t, c)

        return teacher_velocity(Readings(velocity=velocity))

    def with_net(self, net: nn.Module) -> "Flow":
        """A copy of this flow over another network, such as an average of its weights or of the whole flow's."""
        averaged = unwrap(net)
        other = copy.copy(self)
        other.__dict__["_modules"] = {}  # the copy would share them, and give its network to this flow
        other.net = averaged.net if isinstance(averaged, Flow) else net
        return other

    @property
    def device(self) -> torch.device:
        """The device of the network's first parameter; the CPU if it has none."""
        parameter = next(unwrap(self.net).parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    # -------------------------------------------------------------------------------------------------- the noisy batch

    def _noisy_batch(
        self,
        x: Sample,
        c: Condition,
        at_step: int,
        *,
        z: Sample | None = None,
        progress: float | None = None,
        is_validation: bool = False,
    ) -> tuple[NoisyBatch, dropout.Keys]:
        """The noisy batch of this rank's rows x at a step, and the keys of their dropout.

        is_validation: draw as if these rows, and as many on each other rank, were the batch, whatever was trained.
        """
        # Find this rank's rows in the global batch.
        rank, ranks = self.shard or (dist.rank(), dist.world())
        rows_per_rank = len(x)
        if not is_validation:
            rows_per_rank = max(self.rows or self.first_rows, rows_per_rank)
        first = rank * rows_per_rank
        rows = slice(first, first + len(x))
        draws = self.make_draws(at_step, x.shape[1:], batch=ranks * rows_per_rank, rows=rows, z=z is None)
        batch = self.add_noise(x, c, draws, z=z, progress=progress or 0.0)

        # A pass of some rows would draw for them what it did not draw for all, so du/dt is taken on all rows.
        if self.net_draws or self._ranks_differ(len(x), rows_per_rank, ranks):
            batch = replace(batch, moving=None)
        return batch, to_device(draws.keys, x.device)

    def _ranks_differ(self, rows: int, rows_per_rank: int, ranks: int) -> bool:
        """Whether some rank's `rows` all have r = t, or all r != t, and another's do not: these make other passes.

        rows_per_rank: the places of the batch that each rank has; a smaller batch takes the first of them.
        """
        moving = self.objective.times.moving(ranks * rows_per_rank)
        if moving is None:
            return False
        kinds = {frozenset(moving[first : first + rows]) for first in range(0, len(moving), rows_per_rank)}
        return len(kinds) > 1

    def _condition_index(self, n: int, c: Condition, device: torch.device) -> Cond:
        """What an objective gets as c (n,): labels, or row numbers of other conditions; zeros without conditions."""
        if c is None:
            return torch.zeros(n, dtype=torch.long, device=device)
        if self._has_rows(c):
            return torch.arange(n, device=device)
        labels = cast(Tensor, c)
        return labels if self.direct else labels.long()

    def _has_rows(self, c: Condition) -> bool:
        """Whether conditions go through the objective as row numbers: those that are not labels."""
        return c is not None and not self.direct and not is_labels(c)

    def _sample_conditions(self, c: int | Sequence[int] | Condition) -> tuple[Condition, Cond]:
        """The conditions of samples that are not labels, or None, and what an objective gets as c (n,)."""
        if isinstance(c, Mapping) or (isinstance(c, Tensor) and c.ndim > 0 and not is_labels(c)):
            compatibility.require_conditions(c, self.classes, self.null)
            conditions = map_tensors(c, lambda rows: rows.to(self.device))
            return conditions, torch.arange(len(ConditionRows.of(conditions, None)))
        count_or_labels = c.tolist() if isinstance(c, Tensor) else c
        if isinstance(count_or_labels, int):
            return None, labels_in_turn(count_or_labels, self.classes)
        labels = [int(label) for label in cast("Sequence[int]", count_or_labels)]
        return None, labels_in_turn(len(labels), self.classes, labels)

    # ------------------------------------------------------------------------------------------------------ the network

    def _net_for_objective(self, c: Condition, key: int | None) -> nn.Module:
        """The network as an objective calls it, net(x, c, t=t): itself if it is called directly, else in an adapter.

        An adapter would hide attributes that dumo reads off its own networks, such as `compile_tangents`.
        """
        return self.net if self.direct else self._adapter(c, key)

    def _adapter(self, c: Condition, key: int | None) -> NetAdapter:
        """An adapter of the network, with conditions of which row numbers are known, if c are not labels.

        It is made for each loss and is no attribute, which would give every weight two names.
        """
        has_rows = self._has_rows(c)
        return NetAdapter(
            self.net,
            self.objective.needs,
            self.call,
            labelled=self.classes > 0 and not has_rows,
            time_scale=self.time_scale,
            rows=ConditionRows.of(c, self.null) if has_rows else None,
            key=key,
        )

    def _theta_minus(self, net: nn.Module) -> Frozen:
        """theta^-: the average given as `ref`, in evaluation mode, else the weights in training.

        Without `ref` it is the same object as the network of the loss: a slope then takes du/dt in the same pass.
        """
        if self.ref is None:
            return frozen(cast(Net, net))
        average = self.ref.module
        is_net_itself = unwrap(cast(Net, average)) is unwrap(self.net)  # in training, so it stays in its mode
        if average.training and not is_net_itself:
            average.eval()
        return Frozen(net.with_net(average)) if isinstance(net, NetAdapter) else self.ref

    def _generator_key(self, at_step: int) -> int:
        """The key of the random numbers that the network draws itself, at a step on this rank."""
        rank = self.shard[0] if self.shard else dist.rank()
        return stream(self.seed, at_step, "net", rank).initial_seed()

    def _in_precision(self, x: Sample) -> AbstractContextManager[None]:
        """Passes on x in the precision of this flow, if it has one."""
        return using(self.precision, x.device) if self.precision else nullcontext()

    def _readings(self, net: nn.Module, guide: CFG, knobs: Mapping[str, float] | None = None) -> Readings:
        """What a network, as objectives call it, tells a solver with this guidance and these knobs."""
        null: int | Callable[[Cond], Cond] = self.classes
        called = cast(Net, net)
        if isinstance(net, NetAdapter):
            called = in_weights_dtype(net)
            if net.rows is not None:
                null = net.rows.drop
        return guide(readings_of(self.objective, called, knobs or self.knobs), null)

    def _require_reading(self, name: str, net: nn.Module) -> Callable[..., Any]:
        """A reading by its name. Raises UserError if it was never taught."""
        read = getattr(self._readings(net, self.guide), name)
        if read is None:
            raise UserError(
                f"objective '{self.objective.kind}' never teaches the {name.replace('_', ' ')}: train with 'dumo_any' "
                "or 'meanflow', which teach velocity and jumps"
            )
        return read

    def _read(self, name: str, x: Tensor, c: Condition, *times: Moment) -> Sample:
        """The reading `name` of x at these times, (b, ...), in evaluation mode."""
        compatibility.require_conditions(c, self.classes, self.null, may_be_null=True)
        index = self._condition_index(len(x), c, x.device)
        read = self._require_reading(name, self._net_for_objective(c, None))
        margin = _OVERSHOOT if name == "velocity" else _ROUNDING
        row_times = [_row_times(time, x, margin) for time in times]
        if name == "flow_map" and not self.objective.times.climbs:
            t, s = row_times
            if bool((s > t + _ROUNDING).any()):
                raise UserError(
                    f"objective '{self.objective.kind}' teaches no jumps up to the noise: give s up to t, or train "
                    "with 'f2d2'"
                )
        with eval_mode(self.net), self._in_precision(x):
            return read(x, *row_times, index)

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
            f"objective={self.objective.kind}, classes={self.classes}, du/dt: {self.slope_report or 'not chosen yet'}"
        )


def _row_times(time: Moment, x: Sample, margin: float) -> Time:
    """A time for each row of x. Raises UserError for times outside of [0, 1] by more than `margin`."""
    time = torch.as_tensor(time, dtype=None if isinstance(time, Tensor) else torch.float32)
    is_inside = (time > -margin) & (time < 1 + margin)
    if not is_inside.all():
        raise UserError(f"a time of {time[~is_inside][0]:g}: times run from 0, data, to 1, noise")
    return time.to(x.device).expand(len(x))
