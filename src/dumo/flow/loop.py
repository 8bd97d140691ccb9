"""`LoopFlow`: a flow of anybody's network, in a training loop of anybody's. In public: `dumo.Flow`.

    flow = dumo.Flow(net, DuMo(), classes=10)
    loss = flow(x, c)                    # draws noise, times and dropped labels; takes du/dt
    images = flow.sample(16, nfe=1)

`flow(x, c)` is the loss, and the network may be wrapped (DistributedDataParallel, FSDP2, torch.compile, accelerate)
before or after.

The order of events in `loss`: the first call makes `check`, later ones look at the batch; `_record` draws the step's
numbers and makes the record; the objective's loss calls the network through `Passes`. `sample`, `velocity` and `jump`
read the network in evaluation mode; `teaching` makes a teacher of it; `get_extra_state` keeps what a resumed run needs.

Random numbers are functions of (seed, step, row of the global batch): other ones on every rank. Those that a network
draws itself, such as nn.Dropout's, are functions of (seed, step, rank), and the same in all passes of a step. So a
resumed run goes on to the bit.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from math import isfinite
from numbers import Integral
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dumo.flow import dropout, generate
from dumo.flow.check import (
    max_pass_difference,
    require_finite_heads,
    require_first_stage,
    require_formulas,
    require_parameters,
    require_precise_weights,
    require_prior,
    require_pure_net,
    require_rows_apart,
    require_some_rows,
    require_teacher,
    require_whole_groups,
    rows_to_try,
    try_pass,
)
from dumo.flow.condition import (
    Condition,
    Null,
    is_table,
    map_tensors,
    num_rows,
    require_batch,
    require_conditions,
    require_data,
    table_of,
)
from dumo.flow.derivative import choose_slope, copy_without_zero_layers
from dumo.flow.draw import Coupling
from dumo.flow.flow import Flow, require_terms
from dumo.flow.guide import CFG, GuidanceScale
from dumo.flow.null import guidance_of, require_guidable, without_drop
from dumo.flow.passes import Passes
from dumo.flow.path import Diffusion, FlowPath, Linear, Trig
from dumo.flow.precision import Precision, using
from dumo.flow.ranks import largest_of_ranks, on_every_rank
from dumo.flow.reading import reading, taught_readings, teacher_velocity
from dumo.flow.signature import CustomCall, Signature
from dumo.flow.slope import Slope, slope_of
from dumo.flow.solver import Solver, best_solver, solver_of
from dumo.flow.state import FlowState
from dumo.runtime import dist
from dumo.runtime.random import generator_states, seeded_generators, stream
from dumo.types import (
    Cond,
    Frozen,
    Heads,
    Net,
    Noised,
    Objective,
    Reads,
    Sample,
    Taught,
    Terms,
    Time,
    UserError,
    lift,
    unwrap,
)
from dumo.types.rows import to_device

log = logging.getLogger("dumo")
Moment = Tensor | float | int  # a time for all rows, or one for each

# The step at which a network that was not copied is checked once more, for its layers of zeros are trained then: ours
_SECOND_CHECK_STEP = 100
_ROUNDING = 1e-6  # of times that a caller added up: ours
_OVERSHOOT = 0.25  # past the ends, of adaptive solvers of an ODE, which then interpolate: ours


class LoopFlow(Flow):
    """A network and the objective that teaches it: `flow(x, c)` is the loss, `flow.sample(n)` samples.

    - `net`: any module. Its forward takes x (b, ...) first, and the time, a second time and a class by usual names
      (`dumo.flow.signature`); it returns the objective's heads. Or `call(net, x, t, c)` calls it.
    - `classes`: labels are 0 to classes - 1, and `classes` itself means none.
    - `null`: what stands for a dropped condition, a row, or a dict of rows. Without classes and null nothing is dropped
      or guided.
    - `time_scale` multiplies the times t and r on their way to the network.
    - `seed`: of all draws: times, noise, dropped conditions. The same seed and step draw the same.
    - `shard`: (rank, ranks) of the data; None: those of torch.distributed.
    - `path`: from data to noise; None: the straight line.
    - `coupling`: which noise meets which data, by optimal transport in groups of rows; None: any.
    - `ref`: theta^-, an average of the weights that you keep. Each loss puts it into evaluation mode, where it drops
      and routes nothing. None: the weights in training.
    - `teacher`: a flow, or a function of (x_t, t, c, v_t), whose velocity takes the place of the data's, on a share
      `prior` of the rows, between 0 and 1 (None: on all).
    - `precision`: of passes; None: as the caller's autocast has it.
    - `knobs`: values by name, for readings; None: the objective's own.
    - `guide`: guidance while sampling; None: none.

    An objective that names no slope gets the first of dual, jvp and central that runs on this network and is exact.
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
        teacher: "Taught | LoopFlow | None" = None,
        prior: float | None = None,
        ref: nn.Module | None = None,
        precision: Precision | None = None,
        knobs: Mapping[str, float] | None = None,
        guide: CFG | None = None,
    ) -> None:
        _require_settings(net, classes=classes, time_scale=time_scale, shard=shard, path=path)
        _require_choices(precision, guide, knobs, objective)
        if not classes and null is None:  # nothing stands for a dropped condition
            objective = without_drop(objective)
        teacher_flow = _teacher_flow(teacher, objective, classes, path or Linear())
        if teacher_flow is not None:
            teacher = teacher_flow.teaching()
        super().__init__(
            net,
            objective,
            classes=classes,
            seed=seed,
            path=path,
            coupling=coupling,
            teacher=cast("Taught | None", teacher),
            prior=prior,
            ref=ref,
            precision=precision,
            knobs=knobs,
            guide=guide,
        )
        self.null = null
        self.training_guidance = GuidanceScale.of(objective.needs)
        if teacher_flow is not None and teacher_flow.guide.active:
            self.training_guidance = GuidanceScale(teacher_flow.guide.scale, "teacher", "a teacher without guide=")
        self._require_guidable(self.guide)
        self.time_scale = time_scale
        self.own_call = call
        self.shard = shard
        # of conditions that are no labels, the teacher that reads them; None: the teacher is no flow
        self.teach_conditions = teacher_flow.teaching if teacher_flow else None

        self.step = 0  # losses so far
        self.rows = 0  # of a rank's batch, the largest in training so far
        self.first_rows = 0  # of the largest rank's batch in the first call, until one in training is counted
        self.shape: tuple[int, ...] | None = None  # of a row
        self.last: Terms | None = None  # of the last loss, detached: its parts say more than the loss
        self.has_named_slope = "slope" in getattr(objective, "model_fields_set", ("slope",))
        self.chosen_slope: Slope | None = None  # where the objective names none
        self.slope_reason = ""  # how du/dt is taken, and why
        self.is_checked = False
        self.is_checked_in_training = False  # in evaluation a network does not show what it draws and changes
        self.is_check_of_copy = False  # whether the check worked on a copy of the network
        self.is_warned_of_progress = False  # that the objective changes in training, and no progress is given
        self.net_draws = False  # whether the network draws random numbers
        self.condition_names: tuple[str, ...] = ()  # of conditions that are no labels

    # ------------------------------------------------------------------------------------- a training step, in a line

    def forward(self, x: Tensor, c: Condition = None, **how: Any) -> Tensor:  # noqa: ANN401, of `loss`
        """`loss`: what DistributedDataParallel, accelerate and Lightning wrap."""
        return self.loss(x, c, **how)

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

        c: None, class numbers (b,), numbers (b, ...), or a dict of tensors by the names of the network's forward.
        step: which random numbers are drawn, in evaluation mode the same whatever was trained; None: as many as losses
            so far, which are counted in training mode.
        progress: the share of the training that is done, for objectives that change with it; None: they stay as at the
            start, which a warning says.
        z: noise that goes with x, of its shape; None: drawn.

        Every rank must make the first call, and the first in training mode: these make `check`, and the ranks agree on
        how many rows each has. Raises UserError for what cannot be trained on.
        """
        # what can be wrong
        is_counted = step is None and self.training
        is_second_check = is_counted and self.step == _SECOND_CHECK_STEP and not self.is_check_of_copy
        is_checked = self.is_checked_in_training if self.training else self.is_checked
        if not is_checked or is_second_check:
            self.check(x, c)
        else:
            require_batch(x, c, self.classes, self.shape, self.call, null=self.null)
            require_whole_groups(self.objective, len(x))
        if x.requires_grad and torch.is_grad_enabled():
            raise UserError(
                "x carries gradients, so the loss would train what made it: give x.detach(), or encode under "
                "torch.no_grad()"
            )
        if progress is None:
            progress = 0.0
            self._warn_of_missing_progress()
        if not 0 <= progress <= 1:
            raise UserError(f"progress = {progress:g}: give the share of the training that is done, from 0 to 1")
        if z is not None and z.shape != x.shape:
            raise UserError(f"z has shape {tuple(z.shape)}, x {tuple(x.shape)}: give noise of the shape of x")

        # the record of this step
        self.shape = self.shape or tuple(x.shape[1:])
        if is_counted:
            rows = len(x) if self.rows else int(largest_of_ranks(len(x)))
            self.rows = max(self.rows, rows)  # a smaller last batch keeps its rank's rows
        at_step = self.step if step is None else step
        is_validation = step is not None and not self.training
        b, keys = self._record(x, c, at_step, progress=progress, z=z, is_validation=is_validation)

        # the objective's loss
        key = self._key(at_step) if self.training else None
        passes = self._passes(c, key)
        ref = Frozen(self._reference_passes(passes))
        masks = dropout.using(keys if self.training else None)
        with masks, seeded_generators(key, x.device), self._in_precision(x):  # a loss of yours may draw
            returned = self.objective.loss(passes, ref, b)
            terms = require_terms(returned, len(x), self.objective.kind)
        if is_counted:
            self.step += 1
        self.last = terms.detach()
        return terms.loss.mean()

    def passes(self, x: Sample, c: Condition = None, *, step: int | None = None) -> tuple[Passes, Noised]:
        """The network as an objective calls it at a step, and the record of this rank's rows x; None: the next step."""
        at_step = self.step if step is None else step
        b, _ = self._record(x, c, at_step)
        return self._passes(c, self._key(at_step) if self.training else None), b

    # --------------------------------------------------------------------------------------------------- how it is read

    def readings(self, guide: CFG | None = None, knobs: Mapping[str, float] | None = None) -> Reads:
        """What the network tells a solver, c being class numbers, with this guidance (None: none) and these knobs."""
        return self._reads(self._passes(None, None), guide or CFG(), knobs)

    @cached_property
    def call(self) -> CustomCall | Signature | None:
        """How the network is called; None: as dumo's own. Raises UserError where no argument of it is a time."""
        return self.own_call or Signature.of(unwrap(self.net))

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Moment, c: Condition = None) -> Sample:
        """dx_t/dt at x_t = x and t, one pass, x_t in units of `path.sd`.

        Raises UserError where the objective never taught it.
        """
        return self._read("velocity", x, c, t)

    @torch.no_grad()
    def jump(self, x: Tensor, t: Moment, s: Moment = 0.0, c: Condition = None) -> Sample:
        """x_s of the trajectory through x_t = x at t, one pass; s = 0 is data, in the data's own unit.

        At times above 0, x_t and x_s are in units of `path.sd`. Raises UserError where the jump was never taught.
        """
        reads = taught_readings(self.objective)
        ends_at_data = bool((torch.as_tensor(s).abs() < _ROUNDING).all())
        if reads.flow_map is None and ends_at_data:
            if bool((torch.as_tensor(t) < reads.lowest).any()):
                raise UserError(
                    f"objective '{self.objective.kind}' teaches jumps to the data from t = {reads.lowest:g} up alone: "
                    "give such a t, or train with 'dumo'"
                )
            return self.path.sd * self._read("endpoint", x, c, t)
        if reads.flow_map is None:
            raise UserError(
                f"objective '{self.objective.kind}' teaches no jump that ends at s = {s}: give s=0, or train with "
                "'dumo_any' or 'meanflow'"
            )
        # of tensors it is not known which jumps are taught
        if not isinstance(t, Tensor) and not isinstance(s, Tensor) and reads.hops and not reads.hops(t, s):
            raise UserError(
                f"objective '{self.objective.kind}' teaches no jump from t = {t:g} to s = {s:g}: ask "
                "flow.sample, which makes those that it teaches, or train with 'dumo_any' or 'meanflow'"
            )
        x_s = self._read("flow_map", x, c, t, s)
        is_data = lift(_row_times(s, x, _ROUNDING).abs() < _ROUNDING, x_s)
        return torch.where(is_data, self.path.sd * x_s, x_s)

    def teaching(self, given: Condition = None) -> Taught:
        """The velocity that a pupil learns from this flow, of (x_t, t, c, v_t).

        given: the pupil's conditions that are no labels; then c are numbers of their rows. None: c are labels.

        Raises UserError where the velocity was never taught.
        """
        read = self._taught_reading("velocity", self._passes(given, None))

        def velocity(x: Sample, t: Time, c: Cond) -> Sample:
            with generate.eval_mode(self.net), self._in_precision(x):
                return read(x, t, c)

        return teacher_velocity(Reads(velocity=velocity))

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

        Raises UserError for conditions that do not fit, and where solver, reading or nfe do not fit together.
        """
        shape = shape or self.shape
        if shape is None:
            raise UserError("the shape of the data is not known before the first loss: give flow.sample(shape=...)")
        if isinstance(c, Integral):  # of numpy, too
            c = int(c)
        table, index = self._sample_conditions(c)
        passes = self._passes(table, None)
        guide = self.guide
        if guidance is not None:
            guide = guidance_of(guidance)
            self._require_guidable(guide)
        reads = self._reads(passes, guide)
        solver = best_solver(reads) if solver is None else solver_of(solver)
        batches = generate.sample_batches(
            passes,
            reads,
            self.path,
            solver,
            index,
            nfe=nfe,
            seed=seed,
            shape=shape,
            device=self.device,
            precision=self.precision,
        )
        samples = generate.join_batches(batches)
        for part in self.net.modules():
            if isinstance(part, FSDPModule):  # whose root stays whole after a pass that has no backward pass
                part.reshard()
        return samples.x

    def of(self, net: nn.Module) -> "LoopFlow":
        """A copy of this flow over another network, such as an average of its weights or of the whole flow's."""
        averaged = unwrap(net)
        if isinstance(averaged, Flow):
            net = averaged.net
        other = cast(LoopFlow, super().of(net))
        other.__dict__.pop("call", None)  # cached, of this flow's network
        return other

    # ------------------------------------------------------------------------------------------------------ the check

    @torch.inference_mode(False)  # the slope is chosen for training, also where validation comes first
    def check(self, x: Tensor, c: Condition = None) -> str:
        """Try the network and the loss on a few rows, once, and say how du/dt is taken, and why.

        Weights, buffers and generators stay as they are, and gradients are recorded, whatever the caller's mode. Under
        torch.distributed every rank must call it. Raises UserError, with the way out, for outputs that the objective
        does not need, rows that mix, buffers that a pass changes, random numbers of unknown source, a loss that is not
        a number for each row, a wrong derivative.
        """
        on_every_rank(lambda: self._require(x, c))
        self.first_rows = int(largest_of_ranks(len(x)))
        num_tried = rows_to_try(self.objective)
        x = x[:num_tried].detach().clone()  # tensors of torch.inference_mode become plain ones
        c = map_tensors(c, lambda rows: rows[:num_tried].clone())
        b, keys = on_every_rank(lambda: self._record(x, c, self.step))
        needs = self.objective.needs
        passes = self._passes(c, self._key(self.step))
        generators_stay = torch.random.fork_rng([x.device] if x.is_cuda else [])
        with generators_stay, dropout.using(keys if self.training else None), self._in_precision(x):
            copied_passes = copy_without_zero_layers(passes)
            self.is_check_of_copy = copied_passes is not None
            probe = passes if copied_passes is None else copied_passes

            # a pass without a key moves torch's generators, if the network draws from them
            unkeyed_probe = self._passes(c, None).with_net(probe.net)
            states_before = generator_states(x.device)
            outputs = on_every_rank(lambda: try_pass(unkeyed_probe, b, needs))
            self.net_draws = generator_states(x.device) != states_before

            on_every_rank(lambda: require_pure_net(probe, b, needs, max_pass_difference(x)))
            on_every_rank(lambda: require_finite_heads(outputs, probe, needs))
            on_every_rank(lambda: require_rows_apart(probe, b, needs))
            if needs.slope is not None:
                self._take_slope(probe, replace(b, moving=None))
        self.condition_names = tuple(table_of(c, self.null, self.call).rows) if is_table(c) else ()
        self.is_checked = True
        self.is_checked_in_training = self.is_checked_in_training or self.training
        return self.slope_reason or "this objective takes no du/dt"

    def _require(self, x: Tensor, c: Condition) -> None:
        """Raise UserError for data, conditions or settings that cannot be trained on, before any pass."""
        require_batch(x, c, self.classes, self.shape, self.call, null=self.null, reads_values=True)
        if isinstance(self.call, Signature):
            self.call.require(self.objective.needs, classes=bool(self.classes))
        if is_table(c) and (self.coupling or self.objective.needs.compares_rows):
            subject = "coupling=" if self.coupling else f"objective '{self.objective.kind}'"
            fix = "leave out coupling=" if self.coupling else "take another objective"
            raise UserError(
                f"{subject} compares rows of one label, and c is no label: give labels and classes=, or {fix}"
            )
        require_formulas(self.objective, self.path.kind)
        require_teacher(self.objective, has_teacher=self.teacher is not None)
        if self.prior is not None:
            require_prior(self.prior, self.objective, has_teacher=self.teacher is not None)
            if self.training:  # a validation may have few rows
                _, ranks = self.shard or (dist.rank(), dist.world())
                require_some_rows(self.prior, ranks * len(x))
        require_first_stage(self.objective, has_ref=self.ref is not None)
        require_whole_groups(self.objective, len(x))
        require_parameters(self.net)
        require_precise_weights(self.objective, self.net)

    def _warn_of_missing_progress(self) -> None:
        """Say once, in training, that an objective which changes with progress stays as at the start."""
        if not self.training or not self.objective.needs.scheduled or self.is_warned_of_progress:
            return
        self.is_warned_of_progress = True
        if dist.is_main():
            log.warning(
                "dumo: objective '%s' changes in training, and stays as at the start without progress: give flow(x, c, "
                "progress=step / steps)",
                self.objective.kind,
            )

    def _take_slope(self, probe: Passes, b: Noised) -> None:
        """Choose how du/dt is taken, or try the slope that the objective names. Raises UserError where none serves."""
        choice = choose_slope(
            slope_of(self.objective) if self.has_named_slope else None,
            probe,
            b,
            self.objective.needs,
            is_copy=self.is_check_of_copy,
            chosen_before=self.chosen_slope,
        )
        self.slope_reason = choice.reason
        if not self.has_named_slope:
            self.chosen_slope = choice.slope
            self.objective = self.objective.model_copy(update={"slope": choice.slope})
        if dist.is_main():
            for line in choice.warnings(self.time_scale, again=self.is_checked):
                log.warning("dumo: %s", line)

    # -------------------------------------------------------------------------------------------- what a batch becomes

    def _record(
        self,
        x: Sample,
        c: Condition,
        at_step: int,
        *,
        progress: float = 0.0,
        z: Sample | None = None,
        is_validation: bool = False,
    ) -> tuple[Noised, dropout.Keys]:
        """The record of this rank's rows x at a step, and their keys of dropout.

        is_validation: draw as if these rows, and as many on each other rank, were the batch, whatever was trained.
        """
        rank, ranks = self.shard or (dist.rank(), dist.world())
        rows_of_rank = len(x)
        if not is_validation:
            rows_of_rank = max(self.rows or self.first_rows, rows_of_rank)
        first = rank * rows_of_rank
        rows = slice(first, first + len(x))
        batch = max(ranks * rows_of_rank, rows.stop)
        draws = self.make_draws(at_step, x.shape[1:], batch=batch, rows=rows, z=z is None)
        index = self._condition_index(len(x), c, x.device)
        null: Cond | int = self.classes
        teacher = None
        if is_table(c):
            null = table_of(c, self.null, self.call).drop_rows(index)
            if self.teach_conditions:
                teacher = self.teach_conditions(c)
        b = self.add_noise(draws, x, index, null=null, z=z, progress=progress, teacher=teacher)
        # a pass of some rows would draw for them what it did not draw for all
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
        """What an objective gets as c (n,): class numbers, or numbers of rows; zeros where there is no condition."""
        if is_table(c):
            return torch.arange(n, device=device)
        if c is None:
            return torch.zeros(n, dtype=torch.long, device=device)
        return cast(Tensor, c).long()

    def _passes(self, c: Condition, key: int | None) -> Passes:
        """The network as objectives call it; c: conditions that c numbers the rows of, if they are no labels."""
        return Passes(
            self.net,
            self.objective.needs,
            self.call,
            labelled=self.classes > 0 and not is_table(c),
            time_scale=self.time_scale,
            table=table_of(c, self.null, self.call) if is_table(c) else None,
            key=key,
        )

    def _reference_passes(self, passes: Passes) -> Passes:
        """Passes of theta^-: of the average given as `ref`, in evaluation mode, else of the weights in training."""
        if self.ref is None:
            return passes
        average = self.ref.module
        is_net_itself = unwrap(average) is unwrap(self.net)  # in training, so it stays in its mode
        if average.training and not is_net_itself:
            average.eval()
        return passes.with_net(average)

    def _key(self, at_step: int) -> int:
        """The key of the random numbers that the network draws itself, at a step on this rank."""
        rank = self.shard[0] if self.shard else dist.rank()
        return stream(self.seed, at_step, "net", rank).initial_seed()

    # ---------------------------------------------------------------------------------------- what a reading is made of

    def _reads(self, passes: Passes, guide: CFG, knobs: Mapping[str, float] | None = None) -> Reads:
        """What these passes tell a solver, with this guidance and these knobs (None: the flow's own)."""
        null = passes.table.drop_rows if passes.table else self.classes
        return guide(reading(self.objective, _in_weights_dtype(passes), knobs or self.knobs), null)

    def _read(self, name: str, x: Tensor, c: Condition, *times: Moment) -> Sample:
        """The reading `name` of x at these times, (b, ...), in evaluation mode. Raises as `_taught_reading`."""
        require_data(x, self.shape)
        require_conditions(c, len(x), self.classes, self.call, self.null, device=x.device)
        index = self._condition_index(len(x), c, x.device)
        read = self._taught_reading(name, self._passes(c, None))
        margin = _OVERSHOOT if name == "velocity" else _ROUNDING
        row_times = [_row_times(time, x, margin) for time in times]
        if name == "flow_map" and not self.objective.times.climbs:
            t, s = row_times
            if bool((s > t + _ROUNDING).any()):
                raise UserError(
                    f"objective '{self.objective.kind}' teaches no jumps up to the noise: give s up to t, or train "
                    "with 'f2d2'"
                )
        with generate.eval_mode(self.net), self._in_precision(x):
            return read(x, *row_times, index)

    def _taught_reading(self, name: str, passes: Passes) -> Callable[..., Any]:
        """A reading by its name. Raises UserError where it was never taught."""
        read = getattr(self._reads(passes, self.guide), name)
        if read is None:
            fix = "flow.jump" if name == "velocity" else "flow.velocity"
            raise UserError(f"objective '{self.objective.kind}' never teaches the {name.replace('_', ' ')}: ask {fix}")
        return read

    def _require_guidable(self, guide: CFG) -> None:
        """Raise UserError where this flow is not to be guided so while it is sampled."""
        has_null = bool(self.classes) or self.null is not None
        require_guidable(guide, self.objective, self.training_guidance, has_null=has_null)

    def _sample_conditions(self, c: int | Sequence[int] | Condition) -> tuple[Condition, Cond]:
        """The conditions of samples, and what an objective gets as c (n,).

        Of a table, its rows and their numbers; else None and labels. Raises UserError for what are no conditions.
        """
        if c is None or isinstance(c, str | float):
            raise UserError(f"flow.sample({c!r}): give how many samples, or a condition for each")
        if isinstance(c, Mapping) or (isinstance(c, Tensor) and c.ndim > 0 and is_table(c)):
            require_conditions(c, num_rows(c), self.classes, self.call, self.null)
            table = map_tensors(c, lambda rows: rows.to(self.device))
            return table, torch.arange(num_rows(table))
        if self.condition_names:
            raise UserError(
                f"this flow learned of conditions {', '.join(self.condition_names)}: give flow.sample(c) a row of them "
                "for each sample"
            )
        count_or_labels = c.tolist() if isinstance(c, Tensor) else c
        if isinstance(count_or_labels, int):
            return None, generate.labels_in_turn(count_or_labels, self.classes)
        labels = [int(label) for label in count_or_labels]
        return None, generate.labels_in_turn(len(labels), self.classes, labels)

    # ------------------------------------------------------------------------------------------------- what is kept

    def get_extra_state(self) -> Tensor:
        """Step, seed, rows of a rank, shape of a row and the chosen slope, as bytes."""
        state = FlowState(step=self.step, seed=self.seed, rows=self.rows, shape=self.shape, slope=self.chosen_slope)
        return state.to_tensor()

    def set_extra_state(self, state: Tensor) -> None:
        """Resume from what `get_extra_state` returned."""
        flow_state = FlowState.from_tensor(state)
        self.step = flow_state.step
        self.seed = flow_state.seed
        self.rows = flow_state.rows
        self.shape = flow_state.shape
        self.chosen_slope = flow_state.slope

    def extra_repr(self) -> str:
        """Objective, classes and how du/dt is taken, for print(flow)."""
        return (
            f"objective={self.objective.kind}, classes={self.classes}, du/dt: {self.slope_reason or 'not chosen yet'}"
        )


def _require_settings(net: object, *, classes: object, time_scale: float, shard: object, path: object) -> None:
    """Raise UserError for arguments of `LoopFlow` that no flow can be made of."""
    if not isinstance(net, nn.Module):
        raise UserError(f"net is a {type(net).__name__}: give an nn.Module, and then the objective")
    if path is not None and not isinstance(path, Linear | Trig | Diffusion):
        raise UserError(f"path is {path!r}: give one of dumo.flow.path, such as Trig(), or leave it out")
    if not isinstance(classes, int) or classes < 0:
        raise UserError(f"classes = {classes}: give how many labels there are, a whole number, 0 for none")
    if not time_scale or not isfinite(time_scale):
        raise UserError(f"time_scale = {time_scale:g}: give what times are multiplied by, such as 1 or 1000")
    is_shard = isinstance(shard, tuple) and len(shard) == 2 and 0 <= shard[0] < shard[1]
    if shard is not None and not is_shard:
        raise UserError(f"shard = {shard}: give (rank, ranks) of the data, with 0 <= rank < ranks")


def _require_choices(precision: object, guide: object, knobs: Mapping[str, float] | None, objective: Objective) -> None:
    """Raise UserError for a precision, a guidance and knobs of `LoopFlow` that are none of those there are."""
    if precision is not None and precision not in get_args(Precision):
        raise UserError(
            f"precision = {precision!r}: give 'fp32', 'tf32' or 'bf16', or leave it out for the caller's autocast"
        )
    if guide is not None and not isinstance(guide, CFG):
        raise UserError(f"guide = {guide!r}: give dumo.flow.guide.CFG(scale=2), or flow.sample(guidance=2)")
    for name in knobs or {}:
        if name not in objective.needs.knobs:
            knob_names = ", ".join(objective.needs.knobs) or "none"
            raise UserError(f"objective '{objective.kind}' has no knob '{name}': its knobs are {knob_names}")


def _teacher_flow(teacher: object, objective: Objective, classes: int, path: FlowPath) -> LoopFlow | None:
    """The flow that is the teacher, out of its wrappers; None for a function. Raises UserError if it cannot teach."""
    if teacher is None:
        return None
    flow = unwrap(teacher) if isinstance(teacher, nn.Module) else teacher
    if not isinstance(flow, LoopFlow):
        if isinstance(flow, nn.Module) or not callable(flow):
            raise UserError(
                f"teacher is a {type(flow).__name__}: give a dumo.Flow that was trained, or a function of "
                "(x_t, t, c, v_t)"
            )
        return None
    if taught_readings(flow.objective).velocity is None:
        raise UserError(
            f"teacher of objective '{flow.objective.kind}' never learned a velocity: give a flow of another "
            "objective, such as 'flow_matching'"
        )
    if flow.classes and flow.classes != classes:
        raise UserError(f"teacher has classes = {flow.classes}, and this flow {classes}: give both the same labels")
    if (flow.path.kind, flow.path.sd) != (path.kind, path.sd):
        raise UserError(
            f"teacher has path '{flow.path.kind}' of sd {flow.path.sd:g}, and this flow '{path.kind}' of sd "
            f"{path.sd:g}: give both the same path="
        )
    is_guided = GuidanceScale.of(objective.needs).active or bool(objective.needs.knobs)
    if flow.guide.active and is_guided:
        raise UserError(
            f"objective '{objective.kind}' would guide what the teacher's guide= of scale {flow.guide.scale:g} has "
            "guided: give a teacher without guide="
        )
    return flow


def _in_weights_dtype(passes: Passes) -> Net:
    """The passes on x in the floating-point type of the network's weights; what they return is in that of x."""
    weights = (p for p in unwrap(passes.net).parameters() if p.is_floating_point())
    weight = next(weights, None)
    if weight is None or weight.dtype == torch.float32:
        return passes

    def net(x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        return tuple(head.to(x.dtype) for head in passes(x.to(weight.dtype), c, **inputs))

    return net


def _row_times(time: Moment, x: Sample, margin: float) -> Time:
    """A time for each row of x. Raises UserError for another number of times, and for times past [0, 1] by `margin`."""
    if not isinstance(time, Tensor):
        time = torch.tensor(float(time))
    if time.shape not in ((), (1,), (len(x),)):
        raise UserError(f"a time of shape {tuple(time.shape)} for {len(x)} rows: give a number, or one for each row")
    is_inside = (time > -margin) & (time < 1 + margin)
    if not is_inside.all():
        raise UserError(f"a time of {time[~is_inside][0]:g}: times run from 0, data, to 1, noise")
    return time.to(x.device).expand(len(x))
