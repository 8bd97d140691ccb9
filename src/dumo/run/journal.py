"""What a run writes down as it trains: log, milestones, checkpoints; and what has changed when it goes on."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from shlex import join
from typing import Any

import torch

from dumo.config.change import shown
from dumo.config.load import FILE, identity
from dumo.config.source import Noted
from dumo.config.spec import Run
from dumo.io.content import Hashes
from dumo.io.source import Source
from dumo.nets.embed import Scalars
from dumo.run import average, content, deviation, examination
from dumo.run.folder import mark_checkpoint_written, mark_no_checkpoint_yet, note, restore_run_file
from dumo.run.net import outline
from dumo.run.origin import before_step
from dumo.run.teacher import Coupled
from dumo.run.validation import BEST, Validation, set_best_aside
from dumo.run.weights import build
from dumo.runtime import dist, signals, typed
from dumo.runtime.progress import sized
from dumo.runtime.threads import StepThreads
from dumo.training import agreement, checkpoint, layout, log, loop, manifest
from dumo.training.burst import LASTS, WINDOW
from dumo.training.optim import Muon, embedders, halved
from dumo.training.saver import Saver
from dumo.training.spec import Train
from dumo.training.state import State
from dumo.training.step import Record

MINUTE = 60.0
PROGRAMS = ("dumo", "torch")  # whose versions change what a step computes
CALM = 8  # the rate of an embedder of times over this ended every burst that we measured (docs/log.md)
COPIES = 4  # of the weights in an examination: in one piece, to be asked, and in float64


@dataclass
class Journal:
    """What a run writes down. Every rank has one, and must call it alike."""

    run: Run
    folder: Path
    device: torch.device
    source: Source | Coupled
    tell: Callable[[str], None]
    hashes: Hashes | None = None  # of the data
    text: str = ""  # the run as its checkpoints hold it; of the main rank
    validation: Validation | None = None
    threads: StepThreads | None = None  # of the steps; None: nobody chooses
    saved: float = field(default_factory=time.monotonic)  # when the last checkpoint was taken
    saver: Saver = field(default_factory=Saver)

    @property
    def first(self) -> int:
        """The first step that is saved by its number: up to it weights are examined before they are saved."""
        return min(self.run.train.save_every, self.run.train.steps)

    @property
    def hooks(self) -> tuple[loop.Every, ...]:
        """What the loop calls after its steps, in this order."""
        return loop.Every(1, self.log), loop.Every(1, self.mark), loop.Every(1, self.keep)

    def due(self) -> bool:
        """Whether enough minutes have passed since the last checkpoint for another, by this rank's clock; or it failed.

        A failure is of all ranks, so that of the first one brings all to where it is raised.
        """
        minutes = self.run.train.save_minutes
        return self.saver.failed or (minutes is not None and time.monotonic() - self.saved >= MINUTE * minutes)

    def open(self, state: State) -> None:
        """Before the next step: refuse a slope that fails on what was saved unexamined; the milestone of this step.

        Raises Stopped if a rank was asked to stop meanwhile: there is nothing to save.
        """
        if number := next(filter(None, agreement.agreed(signals.poll)), None):
            raise signals.Stopped(number)
        if 0 < state.step <= self.first:
            self.examine(state)
        if state.step not in checkpoint.milestones(self.folder / "milestones"):
            self.mark(state)
        if state.step == self.run.train.steps:  # there is nothing to do but to keep no more than is asked
            self.save(state)
            self.saver.wait()

    def log(self, state: State, record: Record) -> None:
        """A line of the log, where one is due, as of a step that is judged, was skipped, or at which a burst begins.

        Of a skipped step and of a burst `tell` hears, too.
        """
        scores = self.validation.judge(state) if self.validation else {}
        scheduled = state.step % self.run.train.log_every == 0
        time_slope = slope_in_time(state) if scheduled else None
        if not dist.is_main():
            return
        if record.burst:
            embeds = embedders(state.net).issuperset(state.modules[next(iter(record.burst))])
            self.tell(burst_text(self.run.train, self.folder, record, embeds=embeds))
        if scheduled or record.skipped or record.burst or record.probe or scores:
            row = record.row()
            if time_slope is not None:
                row["time_slope"] = time_slope
            if scores:
                row["val"] = scores
            if record.skipped:
                row["skipped"]["rows"] = self.numbered(record)
                rows = "; ".join(row_text(row) for row in row["skipped"]["rows"][:3])
                self.tell(f"step {record.step:,} is skipped: {record.skipped}{rows and f': {rows}'}")
            log.append(self.folder / "metrics.jsonl", row)

    def numbered(self, record: Record) -> list[dict[str, Any]]:
        """The rows to blame for a skipped step, each with its number in the data set in place of that in the batch."""
        train, rows = self.run.train, record.skipped.rows if record.skipped else []
        numbers = self.source.numbers(record.step - 1, train.batch, train.seed) if rows else None
        return [
            {key: value for key, value in row.items() if key != "place"}
            | {"image": None if numbers is None else int(numbers[int(row["place"] or 0)])}
            for row in rows
        ]

    def mark(self, state: State, record: Record | None = None) -> None:
        """The weights that are shown, at a milestone; averages by a power, where a snapshot is due."""
        if state.step in self.run.train.milestones:
            checkpoint.mark(self.folder / "milestones", state, identity(self.run))
        if self.run.train.snaps(state.step):
            average.keep(self.folder, state, identity(self.run))

    def keep(self, state: State, record: Record) -> None:
        """A checkpoint, where one is due by step or clock, where the run is asked to stop, and at the end.

        Up to the first one its weights are examined before; not where somebody waits for it to stop.
        """
        asked, last = record.asked is not None, state.step == self.run.train.steps
        if asked or record.due or state.step % self.first == 0 or last:
            self.saver.wait()
            if state.step <= self.first and not asked:
                self.examine(state)
            self.save(state)
            if asked or last:
                self.saver.wait()

    def save(self, state: State) -> None:
        """A checkpoint of this step, written while the next ones are made; the log up to it is on the disk before."""
        self.saver.wait()  # its memory is filled anew
        file, step, keep = self.folder / "metrics.jsonl", state.step, self.run.train.keep
        logged = agreement.own(lambda: log.listed(file) if dist.is_main() else None)
        step_threads = self.threads.number if self.threads else None
        notes = checkpoint.Notes(self.text, content.seen(self.hashes), logged, step_threads)
        copy = checkpoint.copy(state, notes, self.saver.memory)

        def write() -> None:
            agreement.main(self.restore_run_file)
            agreement.main(lambda: log.flush(file))
            checkpoint.put(self.folder / "checkpoints", copy, keep)
            agreement.main(lambda: mark_checkpoint_written(self.folder))
            if validation := self.validation:
                agreement.main(lambda: validation.tidy(step))

        self.saver.start(write)
        self.saved = time.monotonic()

    def restore_run_file(self) -> None:
        """Before a checkpoint, which is of no use without run.yaml: write that again where it was removed, and say so.

        Raises UserError where the run's folder is no longer in its place.
        """
        if restore_run_file(self.folder, self.text):
            self.tell(f"warning: {self.folder / FILE} was removed during training, and is written again")

    def examine(self, state: State) -> None:
        """Refuse a slope that is not the derivative at the weights in training; say so where they are too many to look.

        A net of which little is trained may leave no room for copies, where the self-test of two blocks has to do.
        """
        size = COPIES * sum(p.nbytes for p in outline(self.run).parameters())
        most = agreement.main(lambda: dist.memory(self.device))
        if self.run.objective.needs.slope and size > most:
            what = f"copies of them take {sized(size)} of memory, and {self.device} has {sized(most)}"
            self.tell(f"the slope is not examined on the weights in training: {what}")
            return
        net = layout.gathered(state.net, partial(build, self.run))
        examination.examine_weights(self.run, net, self.device).require()


def row_text(row: dict[str, Any]) -> str:
    """A row of a batch in words."""
    image = [] if row["image"] is None else [f"image {row['image']}"]
    rank = [f"rank {row['rank']}"] if dist.world() > 1 else []
    return ", ".join([*image, *rank, f"t {row['t']:.3f}"])


def slope_in_time(state: State) -> float | None:
    """The slope of the net's embedding of time (`Scalars.slope`); None if it has none. Every rank must call it."""
    for module in state.net.modules():
        if isinstance(module, Scalars) and "t" in module.names:
            return module.slope({name: layout.whole(weight.detach()) for name, weight in module.named_parameters()})
    return None


def burst_text(train: Train, folder: Path, record: Record, *, embeds: bool = False) -> str:
    """That a burst begins, in which module, and what to type before it breaks the training.

    `embeds`: whether that module is an embedder of times.
    """
    name, times = next(iter(record.burst.items()))
    now = f"{record.grad_norms[name]:.3g}, {times:.2g} times its median of the last {WINDOW} steps"
    line = f"warning: step {record.step:,}: the gradient norm of {name} is {now}: the training may break here. "
    rate, rates = "half the rate", halved(train.optimizer)
    if embeds and isinstance(train.optimizer, Muon):
        rate, rates = "an eighth of its rate", {"time_lr": train.optimizer.embedders_lr / CALM}
    step = last_good(folder, record.step - LASTS)
    if step is None:
        return line + "No checkpoint is older: if u or v grow, stop it, and begin another run at a lower rate"
    return (
        f"{line}If the loss's parts grow, stop it, and go on from step {step:,} at {rate}:  "
        f"{lower_rate(folder, step, rates)}"
    )


def way_back(train: Train, folder: Path, step: int) -> str:
    """How to go on from the last good checkpoint up to a step, at half the rate; from the start where there is none."""
    good = last_good(folder, step)
    words = "from the start" if good is None else "from its last good checkpoint"
    return f"To go on {words} at half the rate:  {lower_rate(folder, good, halved(train.optimizer))}"


def last_good(folder: Path, step: int) -> int | None:
    """The step of the last good checkpoint up to a step; None if there is none."""
    for n, path in reversed([*manifest.standing(folder / "checkpoints").items()]):
        if n <= step and manifest.sound(path) and manifest.read(path).trend.good:
            return n
    return None


def lower_rate(folder: Path, step: int | None, rates: Mapping[str, float]) -> str:
    """The command that goes on at these rates, from the checkpoint of a step, or as the folder stands."""
    start = [] if step is None else ["--from", str(step)]
    sets = [word for name, rate in rates.items() for word in ("--set", f"train.optimizer.{name}={rate:g}")]
    return " ".join([join([*started(), "train"]), typed(folder), join([*start, *sets])])


def started() -> list[str]:
    """How this program was started, in words for a shell."""
    each = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return ["dumo"] if dist.world() == 1 else ["torchrun", "--nproc-per-node", each, "-m", "dumo"]


def stretched(was: Train, now: int, done: int) -> Iterator[str]:
    """That the steps already done had the rates of a schedule of another length, where those of this one differ."""
    if was.stretched(now, done):
        other = f"the {'shorter' if was.steps < now else 'longer'} {was.schedule.kind} schedule"
        yield f"train.steps is {now:,}, and was {was.steps:,}: the {done:,} steps already done had the rates of {other}"


@dataclass(frozen=True)
class History:
    """What of a folder's run has changed when it goes on after `step`; made and written by one process alone."""

    run: Run
    folder: Path
    source: Source
    step: int
    fingerprint: str | None  # of the data now
    changed: Sequence[Noted]
    versions: dict[str, str]  # that wrote the checkpoint
    was: Train | None  # how it was trained up to it; None: it begins
    logged: manifest.Listed | None = None  # the log up to it
    data_changed: bool = False

    @classmethod
    def of(
        cls,
        run: Run,
        folder: Path,
        source: Source,
        step: int,
        last: Path | None,
        *,
        accept: bool = False,
        change: content.Change | None = None,
    ) -> "History":
        """Look, and write nothing. Raises UserError if the data have changed, and that is not accepted (`accept`).

        `change`: how their content has.
        """
        was, now = deviation.fingerprint(folder), source.fingerprint()
        before = before_step(folder, last)
        changed = before.changes(run, step) if before else []
        if last and was is not None and was != now:
            if not accept:
                raise content.refusal(folder, f"fingerprint {was} in {deviation.FILE}, {now} now")
            change = content.Change(was, str(now))
        if change:
            changed = [*changed, Noted(step=step, field="data", was=change.was, now=change.now, accepted=True)]
        train, about = before.run.train if before and last else None, manifest.read(last) if last else None
        versions, logged = (about.versions, about.log) if about else ({}, None)
        return cls(run, folder, source, step, now, changed, versions, train, logged, change is not None)

    def write(self, *, rewound: bool = False) -> Iterator[str]:
        """Bring the folder to this state, and yield what there is to say of it, in lines.

        `rewound`: the checkpoints and milestones after the step go; what was logged after it goes anyhow.
        """
        file = self.folder / "metrics.jsonl"
        undone_rows = 0
        if rewound or self.step == 0:
            undone_rows = sum(row["step"] > self.step for row in log.read_log(file))
        if self.step == 0 and undone_rows:
            yield (
                f"{self.folder} has no checkpoint, so it starts again from step 0; {undone_rows:,} rows of its log are "
                f"kept in {log.cut(file)}"
            )
        if rewound:
            removed = [manifest.rewind(place, self.step) for place in manifest.places(self.folder)]
            steps = sorted({step for steps in removed for step in steps})
            if steps:
                listed = ", ".join(f"{step:,}" for step in steps)
                yield (
                    f"going on from step {self.step:,}: what came after it is removed, the checkpoints and milestones "
                    f"of steps {listed}"
                )
            if undone_rows:
                yield f"{undone_rows:,} rows of the log after it are kept in {log.cut(file)}"
        log.rewind(file, self.step)
        if self.step > 0:
            manifest.rewind(self.folder / BEST, self.step)
        else:
            aside = set_best_aside(self.folder)
            if aside:
                yield f"the best weights of before it starts again are kept in {aside}"
        if self.logged not in (None, log.listed(file)):
            yield f"{file} is not what was logged up to step {self.step:,}: weights do not depend on it, curves do"
        for first, last in log.gaps(log.read_log(file), self.run.train.log_every):
            yield f"{file}: rows between steps {first:,} and {last:,} are lost; the run goes on without them"
        note(self.run, self.folder, self.changed)
        if self.step == 0:
            mark_no_checkpoint_yet(self.folder)
        else:
            mark_checkpoint_written(self.folder)
        deviation.note(self.folder, self.source, self.fingerprint, anew=self.data_changed)
        for one in self.changed:
            if one.step == self.step:
                yield f"from step {self.step:,} on {one.field} is {shown(one.now)}, and was {shown(one.was)}"
        if self.was and self.was.schedule == self.run.train.schedule:
            yield from stretched(self.was, self.run.train.steps, self.step)
        here = dist.versions()
        for name in PROGRAMS:
            if (then := self.versions.get(name, here[name])) != here[name]:
                yield f"{name} is {here[name]}, and was {then} up to step {self.step:,}: numbers may round otherwise"
