"""What tests of runs share: a run in no time, what it left, a bar; and teachers, as a user's function returns them."""

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from dumo.config.load import load
from dumo.config.spec import Run
from dumo.run.folder import CHANGES_FILE, RunFolder
from dumo.run.memory import StepBytes
from dumo.run.storages import LiveStorages
from dumo.runtime.progress import Tick
from dumo.types import Cond, Readings, Sample, Time, lift
from unit.training.by_path import latest

TINY = (
    "net.width=8",
    "net.depth=1",
    "train.batch=4",
    "train.steps=4",
    "train.save_every=2",
    "train.schedule.kind=constant",
)


def follow_bytes(work: Callable[[], object]) -> StepBytes:
    """Bytes of all tensors that some work uses, on whatever device they are, fake ones too."""
    with LiveStorages() as live:
        work()
    return StepBytes(live.preexisting, live.peak)


def tiny(name: str = "moons", *more: str) -> Run:
    """A recipe in no time."""
    return load(name, [*TINY, f"evaluate.protocol.samples={40 if name.startswith('moons') else 500}", *more])


def noted(folder: Path) -> list[tuple[int, str, object, object]]:
    """The changes that a run's folder lists: the step, the field, what it was and is."""
    file = folder / CHANGES_FILE
    rows = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return [(row["step"], row["field"], row["was"], row["now"]) for row in rows]


def claim(run: Run, folder: Path) -> None:
    """Raise UserError where training would refuse this run in a folder."""
    place = RunFolder(folder)
    place.require_free()
    place.require_resumable()
    place.require_same_config(run, place.checkpoints.latest(()))


def same(one: nn.Module, two: nn.Module) -> bool:
    """Whether all numbers of both are."""
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def bits(folder: Path) -> dict[str, bytes]:
    """The files of the last checkpoint, and the log."""
    last = latest(folder / "checkpoints")
    assert last is not None
    files = [folder / "metrics.jsonl", *filter(Path.is_file, last.rglob("*"))]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


class Seen:
    """A bar that keeps what it hears."""

    def __init__(self) -> None:
        self.titles: list[tuple[str, int]] = []
        self.ticks: list[int] = []
        self.notes: list[str] = []

    @contextmanager
    def __call__(self, title: str, total: int, /) -> Generator[Tick, None, None]:
        self.titles.append((title, total))

        def tick(done: int, note: str) -> None:
            self.ticks.append(done)
            self.notes.append(note)

        yield tick


def line(run: Run, device: torch.device) -> Readings:
    """A velocity known in closed form: of data that are one point, (1, -2), v = (x_t - point) / t."""

    def velocity(x: Sample, t: Time, c: Cond) -> Sample:
        return (x - torch.tensor([1.0, -2.0])) / lift(t, x)

    return Readings(velocity=velocity)


def shift(run: Run, device: torch.device) -> Readings:
    """A velocity that is (1, -2) everywhere: of data that are noise moved by (-1, 2)."""
    return Readings(velocity=lambda x, t, c: torch.tensor([1.0, -2.0]).expand_as(x))


without_source = partial(line)  # a run notes a hash of its teacher's source


def mute(run: Run, device: torch.device) -> Readings:
    """It tells nothing."""
    return Readings()


CPU = torch.device("cpu")  # no function


def flat(run: Run, device: torch.device) -> Readings:
    """One number per row, which would be broadcast to the shape of x."""
    return Readings(velocity=lambda x, t, c: x.flatten(1)[:, :1])


def nan(run: Run, device: torch.device) -> Readings:
    """Its velocity is no number."""
    return Readings(velocity=lambda x, t, c: x * torch.nan)
