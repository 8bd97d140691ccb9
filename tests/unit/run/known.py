"""Teachers of the tests: what a user's function returns; and a run that they teach."""

import torch

from dumo.run.config.load import load
from dumo.run.config.spec import Run
from dumo.types import Cond, Reads, Sample, Time, lift

TINY = (
    "net.width=8",
    "net.depth=1",
    "train.batch=4",
    "train.steps=4",
    "train.save_every=2",
    "train.schedule.kind=constant",
    "train.probe_every=0",
    "evaluate.protocol.samples=40",
)


def tiny(name: str = "moons", *more: str) -> Run:
    """A recipe in no time."""
    return load(name, [*TINY, *more])


def line(run: Run, device: torch.device) -> Reads:
    """A velocity known in closed form: of data that are one point, (1, -2), v = (x_t - point) / t."""

    def velocity(x: Sample, t: Time, c: Cond) -> Sample:
        return (x - torch.tensor([1.0, -2.0])) / lift(t, x)

    return Reads(velocity=velocity)


def shift(run: Run, device: torch.device) -> Reads:
    """A velocity that is (1, -2) everywhere: of data that are noise moved by (-1, 2)."""
    return Reads(velocity=lambda x, t, c: torch.tensor([1.0, -2.0]).expand_as(x))


def mute(run: Run, device: torch.device) -> Reads:
    """It tells nothing."""
    return Reads()


def wrong(run: Run, device: torch.device) -> int:
    """No reading at all."""
    return 7


CPU = torch.device("cpu")  # no function


def line_of_one(run: Run) -> Reads:
    """It takes no device."""
    return Reads()


def failing(run: Run, device: torch.device) -> Reads:
    """It has an error."""
    raise KeyError("x")


def flat(run: Run, device: torch.device) -> Reads:
    """One number per row, which would be broadcast to the shape of x."""
    return Reads(velocity=lambda x, t, c: x.flatten(1)[:, :1])


def untimed(run: Run, device: torch.device) -> Reads:
    """Its velocity takes no time."""
    return Reads(velocity=lambda x, c: x)  # pyright: ignore[reportArgumentType, reportCallIssue]


def nan(run: Run, device: torch.device) -> Reads:
    """Its velocity is no number."""
    return Reads(velocity=lambda x, t, c: x * torch.nan)
