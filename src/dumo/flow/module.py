"""`Flow`: a network, the objective that trains it, and how it is sampled. In public: `dumo.Flow`.

    flow = dumo.Flow(net, "dumo", classes=10)
    loss = flow(x, c)                    # draws noise, times and dropped labels; computes du/dt
    images = flow.sample(16, nfe=1)

A loss is computed in three steps: `make_draws` draws the random numbers, `add_noise` makes the noisy batch, and
`compute_loss` calls the objective, which calls the network. `forward` runs all three in a user's training loop, and
checks the network first. `dumo.run.trainer` calls them separately, because it prefetches random numbers and splits a
batch into micro-batches.

`readings` interprets the network's heads as the objective defines them. `sample`, `velocity`, `jump` and `as_teacher`
call the readings in evaluation mode; a run passes them to `dumo.flow.sampling`.

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
from threading import get_ident
from typing import Any, cast, get_args

import torch
from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python
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
from dumo.flow.sampling import copy_for_evaluation, eval_mode, join_batches, labels_in_turn, sample_batches
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
    Spec,
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

# A time for all rows, or one for each.
Moment = Tensor | float | int
# (net, theta^-, batch) -> the loss of each row
Loss = Callable[[Net, Frozen, NoisyBatch], Terms]

UNGUIDED = CFG()
_STRAIGHT = Linear()
# At this step a network that could not be copied is checked again, because its layers of zeros are trained by then.
_SECOND_CHECK_STEP = 100
# Data that exceed these were not scaled to [-1, 1] or to standard deviation 1.
_MAX_VALUE = 100.0
_MAX_RMS = 4.0
# The tolerance for rounding of times.
_ROUNDING = 1e-6
# How far adaptive ODE solvers may step past the interval of times, to interpolate.
_OVERSHOOT = 0.25
# The size of the extra state, which is constant because a checkpoint is loaded into a tensor of its shape.
_NUM_STATE_BYTES = 4096


class Flow(nn.Module):
    """A network and the objective that trains it: `flow(x, c)` is the loss, `flow.sample(n)` samples.

    - `net`: any module, called as `net(x, t=t)`, with `r=r` if the objective has a second time, and `c=c` if there are
      conditions. It returns a tensor, or a tuple of the objective's heads. It may be wrapped (DistributedDataParallel,
      FSDP2, torch.compile, accelerate) before or after.
    - `objective`: its kind, a dict of its fields with the kind, or an instance.
    - `classes`: the number of classes; labels are 0 to classes - 1, and `classes` is the null label.
    - `null`: the row that replaces a dropped condition, or a dict of rows. Without classes and null, no conditions are
      dropped, and nothing is guided.
    - `call`: a function that calls the network, `call(net, x, t, c)` or `call(net, x, t, r, c)`.
    - `direct`: call the network as one of dumo's own, `net(x, c, t=t)`, without an adapter and checks of its outputs.
    - `time_scale`: a factor for the times t and r that the network gets.
    - `path`: weights of data and noise, and the unit `sd` of the data.
    - `coupling`: pairs noise with data by optimal transport in groups of rows.
    - `teacher`: a flow, or a function of (x_t, t, c, v_t), whose velocity replaces that of the data on a share `prior`
      of the rows, strictly between 0 and 1 (None means all).
    - `ref`: theta^-, an average of the weights that the caller updates; each loss sets it to evaluation mode. None
      means the weights in training.
    - `guide`: guidance while sampling. `knobs`: values by name while sampling; None means the objective's defaults.
    - `precision`: of passes; None means the caller's autocast.
    - `seed`: of all random numbers: times, noise, dropped conditions.
    - `shard`: (rank, ranks) of the data; None means those of torch.distributed.

    If `slope` of the objective was not set explicitly, du/dt uses dual numbers, or torch.func.jvp if the network does
    not support them. `step` counts the losses, `last` contains the detached terms of the last one, `shape` is that of a
    row, and `slope_report` describes how du/dt is computed.
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
        # torch's derivative of a scripted module is zero.
        if isinstance(net, torch.jit.ScriptModule):
            raise UserError("a torch.jit.script module has no du/dt: pass the module before scripting")
        if precision is not None and precision not in get_args(Precision):
            raise UserError(f"precision = {precision!r}: use 'fp32', 'tf32', 'bf16', or None for the caller's autocast")
        if shard is not None and not 0 <= shard[0] < shard[1]:
            raise UserError(f"shard = {shard}: use (rank, ranks) of the data, with 0 <= rank < ranks")
        if classes and null is not None:
            raise UserError(f"null= is for conditions that are not labels, but classes = {classes}: remove one of them")
        compatibility.require_names("knobs", knobs or {}, objective.needs.knobs, objective.kind)

        # Without a null condition nothing is dropped. A network that is called directly always gets a condition, with
        # the null label `classes`, even if classes = 0.
        has_null = bool(classes or direct) or null is not None
        compatibility.require_null(objective, has_null=has_null)
        if not has_null:
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
        # A Frozen is not a module, so these weights are not in parameters(), DDP and checkpoints.
        self.ref = Frozen(ref) if ref is not None else None
        self.guide = guide
        self.knobs = knobs
        self.precision: Precision | None = precision
        self.seed = seed
        self.shard = shard

        # Store the teacher as a function, for the same reason. If it is a flow, this is its velocity, and
        # `teach_conditions` returns the function for conditions that are not labels.
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
        # The largest batch of a rank in training so far; before that, `first_rows` is that of the first call.
        self.rows = 0
        self.first_rows = 0
        self.shape: tuple[int, ...] | None = None
        self.last: Terms | None = None
        # `chosen_slope` is used if the slope was not set explicitly.
        self.has_explicit_slope = "slope" in getattr(objective, "model_fields_set", ("slope",))
        self.chosen_slope: Slope | None = None
        self.slope_report = ""
        # The values of `training` in which the network was checked. A check in training mode is also valid for
        # evaluation mode.
        self.checked_modes: set[bool] = set()
        self.is_check_of_copy = False
        # Whether the network draws random numbers.
        self.net_draws = False
        # The thread that made the last training loss.
        self.training_thread: int | None = None

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
        """Return the mean loss of data x (b, ...), floats near [-1, 1], with conditions c.

        c: None, class labels (b,), numbers (b, ...), or a dict of tensors.
        step: selects the random numbers; in evaluation mode they do not depend on the training so far. None means the
            number of losses so far, which are counted in training mode.
        progress: the share of the training that is done, for objectives that change with it; None means 0.
        z: noise for x, of its shape; None means to draw it.

        Every rank must make the first call, and the first in training mode: these call `check`, and the ranks agree on
        their numbers of rows. Raises UserError for inputs that would train incorrectly without an error.
        """
        # Check the network once in each mode, unless it was checked in training mode, and at step 100 if not copied.
        is_counted = step is None and self.training
        is_second_check = is_counted and self.step == _SECOND_CHECK_STEP and not self.is_check_of_copy
        if not self.checked_modes & {True, self.training} or is_second_check:
            self.check(x, c)
        compatibility.require_conditions(c, self.classes, self.null)
        if x.requires_grad and torch.is_grad_enabled():
            raise UserError(
                "x requires a gradient, so the loss would train the module that computed x: pass x.detach()"
            )
        if progress is not None and not 0 <= progress <= 1:
            raise UserError(f"progress = {progress:g}: pass the completed fraction of training, from 0 to 1")
        if z is not None and z.shape != x.shape:
            raise UserError(f"z has shape {tuple(z.shape)}, x {tuple(x.shape)}: pass noise of the shape of x")

        # Draw the random numbers of the step, and make the noisy batch. The largest batch of a rank decides its rows in
        # the global batch, so that a smaller last batch keeps them.
        self.shape = self.shape or tuple(x.shape[1:])
        if self.training:
            self.training_thread = get_ident()
            self._require_no_growth(len(x))
        if is_counted:
            rows = len(x) if self.rows else int(dist.largest(len(x)))
            self.rows = max(self.rows, rows)
        at_step = self.step if step is None else step
        is_validation = step is not None and not self.training
        batch, dropout_keys = self._noisy_batch(x, c, at_step, z=z, progress=progress, is_validation=is_validation)

        # Compute the loss. A user's objective may draw random numbers, so the caller's generators are restored.
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
        """Draw the random numbers of some rows of a step's global batch, on the CPU, for samples of this shape.

        batch: the number of rows of the global batch.
        z: whether to draw noise.

        It does not depend on state that changes during training, so it may be called early, in any thread.
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
        """Make the noisy batch of data x (b, ...) and conditions c, with the draws of b rows, on the device of x.

        z: noise for x; None means that of the draws.
        between: points of a teacher's trajectory from x to z, (b, points - 1, ...).
        progress: the share of the training that is done, from 0 to 1.

        It does not synchronize with the device, unless there is a coupling that the draws have not applied.
        """
        # Pass conditions that are not labels to the objective as row numbers.
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
        """Compute the objective's loss of each row of a noisy batch, its parts and metrics, each (b,).

        dropout_keys: the keys of the rows (`dumo.flow.dropout`); None means those of the surrounding context, if any.
        conditions: the conditions of the batch, if they are not labels.
        generator_key: a seed for torch's generators in every pass; None means not to seed them.
        loss: a compiled loss; None means the objective's.
        cache_casts: whether autocast caches its casts of weights until the end of the loss. False saves memory if
            weights are gathered for one pass at a time.
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

    @torch.inference_mode(False)  # the slope is chosen for training, even if validation runs first
    def check(self, x: Tensor, c: Condition = None) -> str:
        """Check the network on a few rows, and return how du/dt is computed, and its error.

        Weights, buffers and generators are not changed, and gradients are enabled, whatever the caller's mode. Under
        torch.distributed every rank must call it. Raises UserError for incompatible settings, for data that were not
        scaled, for a network that has side effects, mixes rows or is not finite, and for a wrong derivative.
        """
        # Refuse combinations and data that would train incorrectly.
        self._require_compatible(len(x), c)
        if not bool(x.abs().max() <= _MAX_VALUE) or not bool(x.float().square().mean().sqrt() <= _MAX_RMS):
            raise UserError(
                f"x lies between {float(x.min()):.3g} and {float(x.max()):.3g}: scale the data to [-1, 1], or to "
                "standard deviation 1"
            )
        compatibility.require_conditions(c, self.classes, self.null, waits=True)

        # The ranks agree on how many rows each has. A loss of one rank alone would be paired with another loss.
        ranks = dist.all_values((self.training, len(x)))
        if len({training for training, _ in ranks}) > 1:
            raise UserError(
                "the first loss is a training loss on some ranks and a validation loss on others: validate on all "
                "ranks, or on one of them after the first step"
            )
        if self.shard is not None and self.shard[1] > len(ranks):
            raise UserError(
                f"shard = {self.shard}, but torch.distributed has ranks = {len(ranks)}: ranks with batches of unequal "
                "sizes would share noise, so call torch.distributed.init_process_group first, or give each rank "
                "another seed= instead of shard="
            )
        self.first_rows = max(rows for _, rows in ranks)

        # Make the noisy batch of a few rows, as a step does. Cloning converts inference tensors to normal ones.
        num_tried = rows_to_try(self.objective)
        x = x[:num_tried].detach().clone()
        c = map_tensors(c, lambda rows: rows[:num_tried].clone())
        batch, dropout_keys = self._noisy_batch(x, c, self.step)
        needs = self.objective.needs

        # Check a copy of the network with noise in its layers of zeros, or the network itself.
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
            # A pass without a key advances torch's generators, if the network draws random numbers.
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
        return self.slope_report or "this objective does not use du/dt"

    def _slopes_to_try(self) -> list[Slope]:
        """Return the slope that the objective names, or the candidates: that of a resumed run, dual, and jvp."""
        named_slope = slope_of(self.objective)
        if self.has_explicit_slope and named_slope is not None:
            return [named_slope]
        slopes: list[Slope] = [DualSlope(), JvpSlope()]
        if self.chosen_slope is not None:
            slopes = [self.chosen_slope, *(slope for slope in slopes if slope != self.chosen_slope)]
        return slopes

    def _require_compatible(self, batch: int, c: Condition) -> None:
        """Refuse settings that are incompatible with the objective (`dumo.flow.compatibility`), for this batch size."""
        objective = self.objective
        compatibility.require_path(objective, self.path.kind)
        compatibility.require_times(objective)
        compatibility.require_independent_noise(objective, has_coupling=self.coupling is not None)
        compatibility.require_teacher(objective, gives_velocity=self.teacher is not None)
        # A validation batch may have a single row.
        if self.prior is not None and self.training:
            compatibility.require_teacher_share(self.prior, batch, objective, gives_velocity=self.teacher is not None)
        compatibility.require_first_stage(objective, has_first_stage=self.ref is not None)
        compatibility.require_precise_weights(objective, self.net)
        if self._has_rows(c):
            compatibility.require_labels(objective, has_coupling=self.coupling is not None)

    def _require_teacher_flow(self, teacher: "Flow") -> None:
        """Refuse a teacher with other labels or another path, and a guided teacher of a guided objective."""
        fields: dict[str, object] = {"path": self.path.kind, "path.sd": self.path.sd}
        teacher_fields: dict[str, object] = {"path": teacher.path.kind, "path.sd": teacher.path.sd}
        if teacher.classes:
            fields["classes"] = self.classes
            teacher_fields["classes"] = teacher.classes
        compatibility.require_same_data("teacher=", teacher_fields, fields)
        compatibility.require_unguided_teacher(self.objective, teacher.guide.scale, "guide= of the teacher")

    def _require_guidable(self, guide: CFG) -> None:
        """Refuse guidance while sampling for a network that has no null condition or is guided already."""
        has_null = bool(self.classes) or self.null is not None
        compatibility.require_guidable(guide, self.objective, self.training_guidance, has_null=has_null)

    # --------------------------------------------------------------------------------------------- reading and sampling

    def readings(
        self, *, guide: CFG | None = None, knobs: Mapping[str, float] | None = None, conditions: Condition = None
    ) -> Readings:
        """Return the functions that a solver calls: velocity, endpoint and flow map, None if the objective has none.

        guide, knobs: None means the flow's own; CFG() disables guidance.
        conditions: conditions that are not labels, to which c then refers by row number. None means that c are labels.

        Gradients are recorded, and the network's mode and the caller's precision are not changed.
        """
        return self._readings(self._net_for_objective(conditions, None), guide or self.guide, knobs)

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Moment, c: Condition = None) -> Sample:
        """Return dx_t/dt at x_t = x and t, by one pass, with x_t in units of `path.sd`.

        Raises UserError if the objective does not train it.
        """
        return self._read("velocity", x, c, t)

    @torch.no_grad()
    def jump(self, x: Tensor, t: Moment, s: Moment = 0.0, c: Condition = None) -> Sample:
        """Return x_s of the trajectory through x_t = x at t, by one pass. s = 0 is data, in the data's own unit.

        At times above 0, x_t and x_s are in units of `path.sd`. Raises UserError if the objective does not train the
        jump.
        """
        available = available_readings(self.objective)
        ends_at_data = bool((torch.as_tensor(s).abs() < _ROUNDING).all())
        if available.flow_map is None and ends_at_data:
            if bool((torch.as_tensor(t) < available.lowest).any()):
                raise UserError(
                    f"objective '{self.objective.kind}' trains jumps to the data only from t >= {available.lowest:g}: "
                    "use such a t, or train with 'dumo'"
                )
            return self.path.sd * self._read("endpoint", x, c, t)
        # `hops` does not accept tensors.
        is_known = not isinstance(t, Tensor) and not isinstance(s, Tensor)
        if is_known and available.hops and not available.hops(cast(float, t), cast(float, s)):
            raise UserError(
                f"objective '{self.objective.kind}' does not train the jump from t = {t:g} to s = {s:g}: call "
                "flow.sample, which uses trained jumps only, or train with 'dumo_any' or 'meanflow'"
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
        """Return samples in float32 on the CPU. Sample i is a function of (seed, i, its condition).

        c: the number of samples, with the classes in turn; or a condition for each sample.
        nfe: passes through the network per sample.
        solver: a solver or its name, such as "heun"; None means the best for few passes.
        guidance: the scale w of classifier-free guidance, for plain targets; None means the flow's own.
        shape: of a sample; None means that of the data, known after the first loss.

        Every rank makes all samples, and under FSDP2 every rank must call it. Raises UserError for guidance, jumps and
        numbers of passes that the objective does not train.
        """
        shape = shape or self.shape
        if shape is None:
            raise UserError("the shape of the data is not known before the first loss: set flow.sample(shape=...)")
        guide = self.guide
        if guidance is not None:
            guide = CFG(scale=guidance)
            self._require_guidable(guide)
        if isinstance(c, Integral):
            c = int(c)
        if self._is_trained_by_another_thread:
            other = self.with_net(copy_for_evaluation(unwrap(self.net)))
            return other.sample(c, nfe=nfe, seed=seed, solver=solver, guidance=guidance, shape=shape)
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
        """Return the velocity that a student learns from this flow, a function of (x_t, t, c, v_t).

        conditions: the student's conditions that are not labels, to which c then refers by row number. None means that
            c are labels.

        Raises UserError if the objective does not train the velocity.
        """
        read = self._require_reading("velocity", self._net_for_objective(conditions, None))

        def velocity(x: Sample, t: Time, c: Cond) -> Sample:
            with eval_mode(self.net), self._in_precision(x):
                return read(x, t, c)

        return teacher_velocity(Readings(velocity=velocity))

    def with_net(self, net: nn.Module) -> "Flow":
        """Return a copy of this flow with another network, such as an averaged model of the network or of the flow."""
        averaged = unwrap(net)
        other = copy.copy(self)
        # Do not share the dict of modules, or setting the network would change this flow.
        other.__dict__["_modules"] = {}
        other.net = averaged.net if isinstance(averaged, Flow) else net
        return other

    @property
    def _is_trained_by_another_thread(self) -> bool:
        """Whether another thread trains the network now, for all that is known: its mode must stay as it is."""
        is_of_another = self.training_thread not in (None, get_ident())
        return is_of_another and any(part.training for part in self.net.modules())

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
        """Make the noisy batch of this rank's rows x at a step, and the keys of their dropout.

        is_validation: draw as if the global batch had len(x) rows per rank, independently of the training batch size.
            Ranks with batches of unequal sizes may share some noise then, which leaves the mean loss unbiased.
        """
        # Compute this rank's rows in the global batch.
        rank, ranks = self.shard or (dist.rank(), dist.world())
        rows_per_rank = len(x)
        if not is_validation:
            rows_per_rank = max(self.rows or self.first_rows, rows_per_rank)
        first = rank * rows_per_rank
        rows = slice(first, first + len(x))
        draws = self.make_draws(at_step, x.shape[1:], batch=ranks * rows_per_rank, rows=rows, z=z is None)
        batch = self.add_noise(x, c, draws, z=z, progress=progress or 0.0)

        # A network that draws random numbers would draw others in a pass of some rows, so compute du/dt on all rows.
        if self.net_draws or self._ranks_differ(len(x), rows_per_rank, ranks):
            batch = replace(batch, moving=None)
        return batch, to_device(draws.keys, x.device)

    def _require_no_growth(self, rows: int) -> None:
        """Refuse a batch of training that has grown, if there are several ranks.

        The rows of rank k are those from k times the largest batch so far, so the ranks would share random numbers, or
        disagree on which rows are whose.
        """
        largest = self.rows or self.first_rows
        rank, ranks = self.shard or (dist.rank(), dist.world())
        if ranks > 1 and largest and rows > largest:
            raise UserError(
                f"the batch has {rows} rows on rank {rank} of {ranks}, but earlier batches had at most {largest}: pass "
                "the largest batch first, or ranks would draw the same noise"
            )

    def _ranks_differ(self, rows: int, rows_per_rank: int, ranks: int) -> bool:
        """Whether ranks would make different passes: on one, all rows have r = t, or all r != t; on another, not.

        rows_per_rank: the rows of the global batch per rank, of which a smaller batch uses the first.
        """
        moving = self.objective.times.moving(ranks * rows_per_rank)
        if moving is None:
            return False
        kinds = {frozenset(moving[first : first + rows]) for first in range(0, len(moving), rows_per_rank)}
        return len(kinds) > 1

    def _condition_index(self, n: int, c: Condition, device: torch.device) -> Cond:
        """Return c (n,) for the objective: labels, row numbers of other conditions, or zeros without conditions."""
        if c is None:
            return torch.zeros(n, dtype=torch.long, device=device)
        if self._has_rows(c):
            return torch.arange(n, device=device)
        labels = cast(Tensor, c)
        return labels if self.direct else labels.long()

    def _has_rows(self, c: Condition) -> bool:
        """Whether the objective gets row numbers of the conditions, because they are not labels."""
        return c is not None and not self.direct and not is_labels(c)

    def _sample_conditions(self, c: int | Sequence[int] | Condition) -> tuple[Condition, Cond]:
        """Return the conditions of samples that are not labels, or None, and c (n,) for the objective."""
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
        """Return the network with the signature net(x, c, t=t): itself if it is called directly, else an adapter.

        An adapter would hide attributes of dumo's own networks, such as `compile_tangents`.
        """
        return self.net if self.direct else self._adapter(c, key)

    def _adapter(self, c: Condition, key: int | None) -> NetAdapter:
        """Return an adapter of the network, with the rows of c if these are not labels.

        It is not stored as an attribute, because every weight would then have two names.
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
        """Return theta^-: the average `ref` in evaluation mode, or the weights in training.

        Without `ref`, it is the same object as the network of the loss, so a slope can compute du/dt in the same pass.
        """
        if self.ref is None:
            return frozen(cast(Net, net))
        average = self.ref.module
        # If `ref` is the network in training, it stays in training mode.
        is_net_itself = unwrap(cast(Net, average)) is unwrap(self.net)
        if average.training and not is_net_itself:
            average.eval()
        return Frozen(net.with_net(average)) if isinstance(net, NetAdapter) else self.ref

    def _generator_key(self, at_step: int) -> int:
        """Return the seed of the random numbers that the network draws itself, at a step on this rank."""
        rank = self.shard[0] if self.shard else dist.rank()
        return stream(self.seed, at_step, "net", rank).initial_seed()

    def _in_precision(self, x: Sample) -> AbstractContextManager[None]:
        """Return a context for passes on x in the precision of this flow, if it has one."""
        return using(self.precision, x.device) if self.precision else nullcontext()

    def _readings(self, net: nn.Module, guide: CFG, knobs: Mapping[str, float] | None = None) -> Readings:
        """Return the readings of a network, as `_net_for_objective` returns it, with this guidance and these knobs."""
        null: int | Callable[[Cond], Cond] = self.classes
        called = cast(Net, net)
        if isinstance(net, NetAdapter):
            called = in_weights_dtype(net)
            if net.rows is not None:
                null = net.rows.drop
        return guide(readings_of(self.objective, called, knobs or self.knobs), null)

    def _require_reading(self, name: str, net: nn.Module) -> Callable[..., Any]:
        """Return a reading by its name. Raises UserError if the objective does not train it."""
        read = getattr(self._readings(net, self.guide), name)
        if read is None:
            raise UserError(
                f"objective '{self.objective.kind}' does not train the {name.replace('_', ' ')}: train with 'dumo_any' "
                "or 'meanflow', which train velocity and jumps"
            )
        return read

    def _read(self, name: str, x: Tensor, c: Condition, *times: Moment) -> Sample:
        """Call the reading `name` on x at these times, in evaluation mode. Returns (b, ...)."""
        if self._is_trained_by_another_thread:
            other = self.with_net(copy_for_evaluation(unwrap(self.net)))
            return other._read(name, x, c, *times)  # noqa: SLF001, it is this class
        compatibility.require_conditions(c, self.classes, self.null, may_be_null=True)
        index = self._condition_index(len(x), c, x.device)
        read = self._require_reading(name, self._net_for_objective(c, None))
        margin = _OVERSHOOT if name == "velocity" else _ROUNDING
        row_times = [_row_times(time, x, margin) for time in times]
        if name == "flow_map" and not self.objective.times.climbs:
            t, s = row_times
            if bool((s > t + _ROUNDING).any()):
                raise UserError(
                    f"objective '{self.objective.kind}' does not train jumps towards the noise: use s <= t, or train "
                    "with 'f2d2'"
                )
        with eval_mode(self.net), self._in_precision(x):
            return read(x, *row_times, index)

    # -------------------------------------------------------------------------------------------------------- the state

    def get_extra_state(self) -> Tensor:
        """Return step, seed, rows per rank, shape of a row, the chosen slope and what is trained, as JSON in uint8."""
        fields = {
            "step": self.step,
            "seed": self.seed,
            "rows": self.rows,
            "shape": self.shape,
            "slope": self.chosen_slope and self.chosen_slope.model_dump(),
            "trained": self._trained_facts(),
        }
        return torch.tensor(list(json.dumps(fields).encode().ljust(_NUM_STATE_BYTES)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the state that `get_extra_state` returned. Raises UserError for that of another objective or path."""
        fields = json.loads(bytes(state.tolist()))
        facts = self._trained_facts()
        differences: list[str] = []
        for name in dict.fromkeys((*fields["trained"], *facts)):
            before = fields["trained"].get(name)
            if before != facts.get(name):
                differences.append(f"{name} was {before}, and is {facts.get(name)}")
        if differences:
            raise UserError(
                f"this state belongs to another flow: {'; '.join(differences)}. Create the flow with the same "
                "arguments, or load only the weights into flow.net"
            )
        self.step = fields["step"]
        self.seed = fields["seed"]
        self.rows = fields["rows"]
        self.shape = fields["shape"] and tuple(fields["shape"])
        self.chosen_slope = fields["slope"] and TypeAdapter[Slope](Slope).validate_python(fields["slope"])

    def _trained_facts(self) -> dict[str, Any]:
        """What decides the meaning of the weights, by name, as values of JSON: objective, times and path."""
        facts: dict[str, Any] = {"objective.kind": self.objective.kind}
        parts: dict[str, object] = {"objective": self.objective, "path": self.path}
        for part, spec in parts.items():
            if isinstance(spec, Spec):  # an objective of a user's own may be none
                for name, value in to_jsonable_python(dict(spec)).items():
                    facts[f"{part}.{name}"] = value
        if not self.has_explicit_slope:
            facts.pop("objective.slope", None)
        return facts | {"time_scale": self.time_scale}

    def extra_repr(self) -> str:
        """Return the objective, the classes and the slope, for print(flow)."""
        return (
            f"objective={self.objective.kind}, classes={self.classes}, du/dt: {self.slope_report or 'not chosen yet'}"
        )


def _row_times(time: Moment, x: Sample, margin: float) -> Time:
    """Return a time for each row of x. Raises UserError for times outside of [0, 1] by more than `margin`."""
    time = torch.as_tensor(time, dtype=None if isinstance(time, Tensor) else torch.float32)
    is_inside = (time > -margin) & (time < 1 + margin)
    if not is_inside.all():
        raise UserError(f"time {time[~is_inside][0]:g} is out of range: times are between 0 (data) and 1 (noise)")
    return time.to(x.device).expand(len(x))
