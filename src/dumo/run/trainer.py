"""Train one run: build it or resume it, take optimizer steps, and call hooks after each step.

    with open_trainer(run, folder) as trainer:
        trainer.train()

The file follows the order of events. `Trainer.__init__` builds everything, or restores it from the newest whole
checkpoint, and rejects runs that cannot be trained. It writes only missing caches. `train` rewinds the folder to the
step of the checkpoint, then takes steps (`train_step`) and calls hooks (`dumo.run.hooks`) until the run's duration is
over.

All ranks execute the same code, but only rank 0 locks the folder, writes and prints. Operations that may fail on one
rank while a run is opened, a checkpoint is saved or samples are scored run within `agreement`, so that they fail on all
ranks. If a training step fails, torchrun stops the other ranks.

A batch and its random numbers depend only on the step number. They can therefore be prefetched by any thread, and N
steps, a stop and M more steps equal N + M steps, including skipped steps. The gradient is that of the mean loss over
the global batch: each micro-batch adds the gradient of its summed loss times ranks / batch, and gradients are averaged
over ranks after the last micro-batch. The split therefore affects only rounding, and two ranks are bit-identical to
one rank with two micro-batches. For pretrained models, whose blocks accumulate gradients of one time embedding, they
agree up to rounding.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel
from pydantic_core import to_jsonable_python
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dumo.config import trust
from dumo.config.check_spec import advice, check_ranks
from dumo.config.load import run_of
from dumo.config.place import RUN_FILE
from dumo.config.source import Origin
from dumo.config.spec import Run
from dumo.config.word import method
from dumo.data import Data
from dumo.data.ledger import ledger_of
from dumo.flow.module import Loss
from dumo.flow.noisy_batch import Draws
from dumo.flow.precision import product_precision
from dumo.io.data_source import Bucketed, DataSource
from dumo.io.yaml import yaml_text
from dumo.nets.dualized import Dualized
from dumo.nets.text_rows import Rows, StepTexts, using_step_texts
from dumo.run import examination
from dumo.run.data import begin_ledger, compare_data, recorded_facts, require_same_fingerprint, with_data_facts
from dumo.run.fill_caches import encode_what_is_missing
from dumo.run.folder import RunFolder
from dumo.run.hooks import Hook, SaveCheckpoints, SaveMilestones, ShowProgress, WriteLog
from dumo.run.net import make_flow, meta_net, require_room_to_train
from dumo.run.resolve import fetch_files, find_commits, resolve, with_absolute_paths, with_commits, with_hashes
from dumo.run.sheet import RenderSheets
from dumo.run.summary import empty_classes_line, training_summary
from dumo.run.teacher import TeacherPairs, open_teacher
from dumo.run.validation import Validation
from dumo.run.weights import build_deferred, init_from
from dumo.runtime import dist, shell_path, stopwatch
from dumo.runtime.device import choose_device
from dumo.runtime.formatting import duration_text, minutes_text
from dumo.runtime.heap import low_memory_heap
from dumo.runtime.limits import STEPS
from dumo.runtime.progress import Bar, ignore_line, no_bar
from dumo.runtime.signals import Stopped, uninterrupted
from dumo.runtime.threads import cores, restored_threads, set_threads
from dumo.training import agreement, layout
from dumo.training.checkpoint import restore_last_finite
from dumo.training.compile import compile_loss
from dumo.training.duration import Clock, Duration, Timing
from dumo.training.metrics import StepMetrics, find_bad_rows, join_terms
from dumo.training.micro_batch import rows_of_rank
from dumo.training.optim import half_rates
from dumo.training.prefetch import BATCHES_AHEAD, Prefetch
from dumo.training.state import Diverged, State, begin
from dumo.types import Terms, Time, UserError, marks_of
from dumo.types.batch_rows import pin, to_device

# This rank's rows of a batch: (x, c), (x, c, z) with paired noise, or (x, c, z, between) with points between x and z.
Batch = Sequence[Tensor]


class StepInputs(NamedTuple):
    """What a step needs and can be prepared ahead: this rank's rows of the batch, and their random numbers.

    texts: the rows of their captions, if they are read from host memory.
    """

    batch: Batch
    draws: Draws
    texts: StepTexts | None


@contextmanager
def open_trainer(
    path: Path,
    run: Run | None = None,
    *,
    changes: Sequence[str] = (),
    origin: Origin | None = None,
    device: str = "auto",
    print_line: Callable[[str], None] = ignore_line,
    bar: Bar = no_bar,
    began: float | None = None,
) -> "Generator[Trainer, None, None]":
    """Join the ranks, lock the run's folder at `path`, and open a `Trainer` in it. Every rank must enter it.

    - `run`: the run to train; None means the run in the folder, with `changes` (each `a.b=c`).
    - `origin`, `device`, `print_line`, `bar`, `began`: see `Trainer`.

    The process group is initialized before the folder is locked, so that a failure to lock is raised on all ranks. The
    folder is locked before anything in it is read.
    """
    began = stopwatch.wall_clock() if began is None else began
    with dist.join(), RunFolder(path).lock() as folder, restored_threads():
        if run is None:
            trust.accept(changes)
            if folder.text is None:
                raise UserError(f"{path} has no {RUN_FILE}")
            run = run_of(folder.text, changes)
        yield Trainer(run, folder, origin=origin, device=device, print_line=print_line, bar=bar, began=began)


class Trainer:
    """A training run: its data, network, objective, optimizer and averages, and its folder.

    - `run`: the run to train.
    - `folder`: the run's folder, locked. Training resumes from its newest whole checkpoint, if there is one.
    - `origin`: the checkpoint of another run to start from; None means the one recorded in run.yaml.
    - `print_line`: called with lines for the user, on rank 0.
    - `bar`: shows progress, on rank 0.
    - `began`: the start of `train.minutes`, in seconds of `stopwatch.wall_clock`.

    Raise UserError if the run does not fit the machine or its ranks, if the folder holds another run, if the data have
    changed, or if the configured du/dt deviates from the exact derivative.
    """

    def __init__(
        self,
        run: Run,
        folder: RunFolder,
        *,
        origin: Origin | None = None,
        device: str = "auto",
        print_line: Callable[[str], None] = ignore_line,
        bar: Bar = no_bar,
        began: float,
    ) -> None:
        self.folder = folder
        self.print_line = print_line if dist.is_main() else ignore_line
        self.bar = bar if dist.is_main() else no_bar
        self.device = choose_device(device)
        require_same_on_all_ranks(run)

        # Download Hub files on rank 0; the other ranks read its cache. This does not count towards train.minutes.
        recorded_run = folder.run if folder.text and folder.text.hash else None
        fetching_began = stopwatch.wall_clock()
        commits = agreement.on_main_rank(lambda: find_commits(run, recorded_run))
        pinned_run = with_commits(run, commits)
        agreement.on_main_rank(lambda: fetch_files(pinned_run), is_long=True)
        began += stopwatch.wall_clock() - fetching_began

        # Read classes, captions and hashes from the data files. Check the network, the memory and the ranks.
        run = resolve(with_absolute_paths(pinned_run))
        self.meta_net = meta_net(run)
        world_size = dist.world()
        shards = layout.share_of(run.train.share, world_size)
        rows = ceil(run.train.batch / world_size)
        require_room_to_train(run, self.device, self.meta_net, rows=rows, share=shards)
        check_ranks(run.train, run.objective, world_size)
        self.run = run = with_hashes(run, recorded_run)
        self.config = config = run.train

        # Choose the newest whole checkpoint, or for a new run the one given by --from.
        agreement.on_main_rank(lambda: folder.require_resumable(origin))
        checkpoint = folder.newest_checkpoint()
        self.origin = None
        if checkpoint is None:
            self.origin = origin or folder.origin
        if self.origin:
            checkpoint = folder.origin_checkpoint(self.origin)

        # Refuse a different run, or a duration shorter than the checkpoint's, before any expensive work.
        own_checkpoint = None if self.origin else checkpoint
        agreement.on_each_rank(lambda: folder.require_same_config(run, own_checkpoint))
        recorded = recorded_run.train if recorded_run else None
        if checkpoint:
            Duration.resolve(config, recorded, checkpoint.facts)

        # Encode missing latents and texts before the network takes the memory; this does not count towards
        # train.minutes. Open the data.
        encoding_began = stopwatch.wall_clock()
        encode_what_is_missing(run, device=device, bar=bar, print_line=self.print_line)
        began += stopwatch.wall_clock() - encoding_began
        self.data = open_data(run.data)

        # Compare du/dt with the derivative in float64, on a small network with random weights.
        examination.examine(run, self.device).require()

        # Build the network with weights from another run or a published file (`start`), or initialize it from the
        # seed. The low-pass filter of a published model is fitted once, before the first step.
        with low_memory_heap():
            if run.start and not run.has_subject and checkpoint is None:
                net, loaders = init_from(run, run.start)
            else:
                net, loaders = build_deferred(run)
            if isinstance(net, Dualized) and not run.start and checkpoint is None:
                net.refit()

            # Create the averages and the optimizer, sharded over ranks. Load the newest checkpoint with finite values.
            self.state = begin(net, config, self.device, loaders, restored=checkpoint is not None)
            self.resumed_from = None
            if checkpoint:
                self.resumed_from = restore_last_finite(folder.checkpoints, checkpoint, self.state)
                self.state.duration = Duration.resolve(config, recorded, self.resumed_from.facts)
        self.state.net.train()
        facts = self.resumed_from.facts if self.resumed_from else None
        timing = self.state.duration.timing
        self.clock = Clock(timing, began) if timing else None

        # From here on use the number of threads with which the checkpoint was trained.
        self.threads = set_threads(self.state.net, self.device, facts.threads if facts else None)

        # Check that the data have not changed since the checkpoint.
        compare_data(run.data, self.data, folder.path, self.resumed_from)
        if self.resumed_from and recorded_run and not self.origin:
            agreement.on_each_rank(lambda: require_same_fingerprint(recorded_run, self.data, folder.path))

        # Combine network and objective. A teacher's velocity replaces the velocity target of the data.
        self.teacher = None
        if run.teacher:
            spec = run.teacher
            self.teacher = agreement.on_each_rank(lambda: open_teacher(spec, run, self.state, self.device))
            self.teacher.require_same(folder.path)
        self.flow = make_flow(run, self.state, teacher=self.teacher.velocity if self.teacher else None)
        self.source: DataSource | TeacherPairs = self.data
        self.rows, self.micro_batches = rows_of_rank(config, run.objective)
        self.loss: Loss = run.objective.loss
        # The captions of the network and of its averages.
        self.text_rows: list[Rows] = []
        for module in (self.state.net, *(average.module for average in self.state.averages.values())):
            self.text_rows += [part for part in module.modules() if isinstance(part, Rows)]

        # Create the hooks in the order in which they are called (`dumo.run.hooks`).
        self.show_progress = ShowProgress(self)
        validation = Validation.open(self)
        self.write_log = WriteLog(validation)
        self.save_checkpoints = SaveCheckpoints(ledger_of(self.data))
        self.hooks: list[Hook] = [self.show_progress]
        if validation:
            self.hooks.append(validation)
        self.hooks += [self.write_log, SaveMilestones(), self.save_checkpoints, RenderSheets(run)]

    # ----------------------------------------------------------------------------------------------------------- train

    def train(self) -> State:
        """Train until the last step or the time limit, and return the final state. Every rank must call it.

        Raise Diverged after `train.max_skips` consecutive steps with a non-finite loss or gradient, Stopped after a
        signal once a checkpoint is saved, and OSError if the disk is full.
        """
        state = self.state
        config = self.config
        for line in self.describe():
            self.print_line(line)

        # Rewind the folder to this step once every rank has read it. Generate the pairs of a teacher.
        dist.barrier()
        for line in agreement.on_main_rank(self._begin_in_folder, is_long=True):
            self.print_line(line)
        if self.teacher:
            self.source = self.teacher.training_source(self.data, self.run, self.folder.path, self.device, self.bar)
        for hook in self.hooks:
            hook.before_training(self)

        # Compile the loss, and start the threads that prefetch batches, random numbers and captions.
        if config.compile != "none":
            self.loss = compile_loss(state.net, self.flow.objective, config.compile)
        last_step = config.steps if config.minutes is None else STEPS
        with (
            self.folder.checkpoints,
            Prefetch(self.prepare_inputs, last=last_step, depth=BATCHES_AHEAD) as inputs,
            self.show_progress.shown(self),
            product_precision(config.precision, self.device),
        ):
            # Take steps. Stop on divergence or a signal only after the hooks, because one of them saves checkpoints.
            while not state.is_over:
                batch, draws, texts = inputs(state.step)
                batch = [to_device(part, self.device) for part in batch]
                timing = self.clock.read() if self.clock else None
                checkpoint_due = self.save_checkpoints.is_due_by_clock(self)
                with using_step_texts(self.text_rows, texts):
                    metrics = self.train_step(batch, draws, timing=timing, checkpoint_due=checkpoint_due)
                for hook in self.hooks:
                    hook.after_step(self, metrics)
                if metrics.skipped and state.skips >= config.max_skips:
                    raise Diverged(
                        f"step {metrics.step} diverged: {metrics.skipped}, the last of {state.skips} skipped steps. "
                        "Try a lower learning rate, gradient clipping, another slope, or precision fp32."
                    )
                if metrics.received_signal is not None and not state.is_over:
                    raise Stopped(metrics.received_signal)

        # Report the end of the training.
        for hook in self.hooks:
            hook.after_training(self)
        if self.clock and self.clock.late_seconds is not None:
            self.print_line(
                f"startup took {duration_text(self.clock.late_seconds)}, so there was only time for one step: "
                "increase train.minutes"
            )
        return state

    def describe(self) -> list[str]:
        """Return lines that describe the training. Every rank must call it."""
        state = self.state
        lines = [
            training_summary(
                self.run,
                self.meta_net,
                self.folder.path,
                size=self.data.size,
                step=state.step,
                timing=state.duration.timing,
                device=self.device,
            )
        ]
        if isinstance(self.data, Bucketed):
            lines.append(f"images are in {self.data.about}")
        empty_classes = empty_classes_line(self.run.data, self.data)
        if empty_classes:
            lines.append(empty_classes)
        lines.append(f"objective: {method(self.run.objective)}")
        if self.threads is not None and self.threads < cores():
            lines.append(f"threads: {self.threads} of {cores()} cores; OMP_NUM_THREADS=N sets another number")
        if isinstance(state.net, Dualized) and not self.resumed_from:
            lines += map(str, state.net.lowpass_fits)
        if state.is_over:
            lines.append(train_more_hint(self.folder.path, self.run))
        return lines

    def restart_hint(self) -> str:
        """Return the command that restarts a diverged run from its last good checkpoint at half the learning rate.

        Every rank must call it.
        """
        checkpoints = self.folder.checkpoints
        good_step = agreement.on_main_rank(lambda: checkpoints.last_good(self.state.step - self.state.skips))
        start = "To begin anew" if good_step is None else "To start a new run from the last good checkpoint"
        command = f"dumo train {shell_path(self.folder.path)}"
        if good_step is not None:
            command += f" --from {good_step}"
        command += " --out NEW"
        for name, rate in half_rates(self.config.optimizer).items():
            command += f" train.optimizer.{name}={rate:g}"
        return f"{start} at half the learning rate:  {command}"

    def _begin_in_folder(self) -> list[str]:
        """Rewind the folder to the step on rank 0, and record run and data. Return lines that describe the changes."""
        # A new run measures its data again, because run.yaml may come from an attempt that was killed.
        recorded = self.folder.run if self.resumed_from and not self.origin else None
        run = with_data_facts(self.run, recorded, self.data)
        lines = [*self.folder.begin_at(run, self.resumed_from, self.state.step, self.origin)]
        begin_ledger(self.folder.path, self.data, self.resumed_from)
        facts = recorded_facts(run)
        return [*lines, *advice(run, facts.sd if facts else None)]

    def prepare_inputs(self, step: int) -> StepInputs:
        """Read this rank's rows of a step's batch and draw its random numbers, into pinned memory for a GPU.

        Any thread may call it.
        """
        batch = self.source.batch(step, self.config.batch, self.config.seed, self.rows)
        x, c, *_ = batch
        # Pairs of a teacher include the noise.
        draws_z = not isinstance(self.source, TeacherPairs)
        draws = self.flow.make_draws(step, x.shape[1:], batch=self.config.batch, rows=self.rows, z=draws_z)
        if self.config.coupling:
            draws = draws.couple(self.config.coupling, self.run.path, x, c)
        texts = self.text_rows[0].read_step(c) if self.text_rows else None
        if self.device.type != "cuda":
            return StepInputs(batch, draws, texts)
        return StepInputs([pin(part) for part in batch], draws.pin(), texts.map_tensors(pin) if texts else None)

    # ------------------------------------------------------------------------------------------------------------ step

    def train_step(
        self, batch: Batch, draws: Draws, *, timing: Timing | None = None, checkpoint_due: bool = False
    ) -> StepMetrics:
        """Take one optimizer step and return its metrics. Every rank must call it.

        - `batch`: this rank's rows of the global batch, on the device of the network.
        - `draws`: their random numbers.
        - `timing`, `checkpoint_due`: the progress of a run with a time limit, and whether the clock makes a checkpoint
          due. The values of rank 0 are distributed to all ranks with the metrics.

        If the loss or gradient norm is not finite, the step is counted but not applied, on all ranks.
        """
        state = self.state
        config = self.config
        x, c, *paired = batch
        z = paired[0] if paired else None
        between = paired[1] if len(paired) > 1 else None

        # Accumulate the gradients of the micro-batches. The last one averages them over ranks.
        if not state.net.training:
            state.net.train()
        state.optimizer.zero_grad()
        dropout_keys = to_device(draws.keys, x.device)
        caches_casts = not layout.frees_gathered_weights(config.reshard)
        times: list[Time] = []
        terms_of_micro_batches: list[Terms] = []
        for rows in self.micro_batches:
            layout.prepare_backward(state.net, rows is self.micro_batches[-1], reshard=config.reshard)
            noisy_batch = self.flow.add_noise(
                x[rows],
                c[rows],
                draws[rows],
                z=None if z is None else z[rows],
                between=None if between is None else between[rows],
                progress=state.progress,
            )
            terms = self.flow.compute_loss(noisy_batch, dropout_keys[rows], loss=self.loss, cache_casts=caches_casts)
            (terms.loss.sum() / (config.batch / dist.world())).backward()
            times.append(noisy_batch.t)
            terms_of_micro_batches.append(terms.detach())

        # Reduce all metrics over ranks at once. This is the only synchronization with the device.
        norm = get_total_norm([p.grad for p in state.trained_parameters if p.grad is not None])
        learning_rate = config.optimizer.lr * state.duration.rate_factor(config.schedule, state.step)
        t = torch.cat(times)
        terms = join_terms(terms_of_micro_batches)
        metrics = StepMetrics.reduce(
            t,
            terms,
            layout.full_tensor(norm),
            step=state.step + 1,
            images=state.images + config.batch,
            lr=learning_rate,
            checkpoint_due=checkpoint_due,
            timing=timing,
        )

        # Count the step even if it is skipped, so that later batches and random numbers do not depend on skips.
        state.step = metrics.step
        state.images = metrics.images
        if metrics.timing:
            state.duration = replace(state.duration, timing=metrics.timing)
        if not metrics.is_finite:
            state.skips += 1
            # A signal received meanwhile takes effect once the checkpoint of this step is saved.
            with uninterrupted():
                return replace(metrics, skipped=find_bad_rows(metrics, t, c, terms))
        state.skips = 0

        # Update the weights, then their averages. Some networks normalize their weights after each update.
        if config.clip is not None:
            clip_grads_with_norm_(state.trained_parameters, config.clip, norm)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("ratio", 1.0)
        state.optimizer.step()
        normalize_weights = getattr(state.net, "normalize_weights", None)
        if normalize_weights:
            normalize_weights()
        for average in state.averages.values():
            average.update(state.net, state.step)
        state.trend = state.trend.after(metrics.error)
        return metrics


def open_data(data: Data) -> DataSource:
    """Open the data on every rank.

    Raise UserError on all ranks if one rank cannot open the data, or if the ranks see different numbers of rows.
    """
    source = agreement.on_each_rank(data.open)
    sizes = agreement.gather_results(lambda: source.size)
    if len(set(sizes)) > 1:
        sizes_text = ", ".join(f"{size:,}" for size in sizes if size is not None)
        raise UserError(
            f"the ranks have different data, with {sizes_text} rows by rank: give all of them the same files"
        )
    return source


def train_more_hint(path: Path, run: Run) -> str:
    """Return a line that reports the end of a run, and the command to train it longer."""
    command = f"dumo train {shell_path(path)}"
    steps = run.train.steps
    minutes = run.train.minutes
    if minutes is None:
        return f"{path} has trained its {steps:,} steps. For more:  {command} steps={2 * steps}"
    return f"{path} has trained its {minutes_text(minutes)}. For more:  {command} minutes={2 * minutes:.4g}"


def require_same_on_all_ranks(run: Run) -> None:
    """Raise UserError on all ranks if a rank has another run than rank 0. Every rank must call it.

    Paths may differ, because file contents are compared by hash.
    """

    def requested_values() -> dict[str, object]:
        return dict(_values_of(run.model_copy(update={"resolved": {}})))

    main_values, *other_values = agreement.gather_results(requested_values)
    for rank, values in enumerate(other_values, start=1):
        for name in {**main_values, **values}:
            main_value = main_values.get(name)
            value = values.get(name)
            if value != main_value:
                raise UserError(
                    f"{name} is {yaml_text(value)} on rank {rank}, but {yaml_text(main_value)} on rank 0: run the "
                    "same command on every node"
                )


def _values_of(spec: BaseModel, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted names and JSON values of a spec's fields, except for paths. `prefix` precedes each name."""
    for name, field in type(spec).model_fields.items():
        value = getattr(spec, name)
        if marks_of(field).get("where"):
            continue
        if isinstance(value, BaseModel):
            yield from _values_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", to_jsonable_python(value)
