"""A run's folder, opened to read: the net that is shown, with its weights and its codec."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from dumo import dist
from dumo.codecs.scaled import Opened
from dumo.config.load import FILE, difference, dump, load
from dumo.config.spec import Run
from dumo.data import Latents
from dumo.io import file as files
from dumo.io.weights import compare
from dumo.io.weights import load as load_weights
from dumo.training import checkpoint
from dumo.types import Sample, UserError


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, opened to read: the net that is shown (the first average), and where it stands."""

    run: Run
    folder: Path
    net: nn.Module
    step: int
    weights: str  # the file they came from, relative to the folder where it lies inside
    file: Path = Path()  # that file

    @property
    def device(self) -> torch.device:
        """Where the net is."""
        return next(self.net.parameters()).device

    @cached_property
    def codec(self) -> Opened | None:
        """The codec that decodes what the net makes, with its weights; None where nothing is decoded.

        Raises UserError where they are missing or others than those meant.
        """
        return self.run.data.codec.open(self.device) if isinstance(self.run.data, Latents) else None

    def decode(self, x: Sample) -> Sample:
        """What the net makes as images in [-1, 1], on the CPU; x itself where there is no codec. Raises as `codec`."""
        return x if self.codec is None else self.codec.decode(x).cpu()


def open_run(
    source: str, overrides: Sequence[str] = (), *, weights: str | None = None, device: str = "auto"
) -> RunFolder:
    """Open a run's folder to sample or judge it. Raises UserError where it is none, or has no checkpoint yet."""
    folder = Path(source)
    if not (folder / FILE).is_file():
        raise UserError(f"{source} is no run's folder (it has no {FILE}): train one first, e.g. dumo train digits")
    run = load(source, overrides)
    if differs := list(difference(load(source), run)):
        raise UserError(f"these fields of {source} are as they were trained:\n  " + "\n  ".join(differs))
    own = shown(folder, run)
    file = own if weights is None else Path(weights)
    net = load_net(run, file, dist.device(device))
    step, _ = checkpoint.counts(own.parent / "state.json")
    name = str(file.relative_to(folder)) if weights is None else weights
    return RunFolder(run, folder, net, checkpoint.step_of(file, step), name, file)


def shown(folder: Path, run: Run) -> Path:
    """The weights of a run that are sampled and judged: the first average of the last checkpoint, the net's of none.

    Raises UserError where there is no checkpoint yet.
    """
    last = checkpoint.latest(folder / "checkpoints")
    if last is None:
        raise UserError(f"{folder} has no checkpoint yet: train it first, dumo train {folder}")
    return last / (f"ema-{run.train.ema[0].decay}.safetensors" if run.train.ema else "net.safetensors")


def load_net(run: Run, file: Path, device: torch.device) -> nn.Module:
    """A run's net with the weights of a file. Raises UserError where they do not fit."""
    net, found = run.build(device), load_weights(file)
    compare(file, found, net.state_dict(), "the run", checkpoint.FIT)
    net.load_state_dict(found)
    return net.eval()


def claim(run: Run, folder: Path) -> None:
    """See that the folder is free, or holds this run. Writes nothing. Raises UserError, with the difference if not."""
    if (folder / FILE).exists():
        if differs := list(difference(load(str(folder)), run)):
            lines = "\n  ".join([f"{folder} holds another run:", *differs])
            raise UserError(f"{lines}\nGive another folder with --out, or remove this one")
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no {FILE}: give another folder with --out")


def note(run: Run, folder: Path) -> None:
    """Write run.yaml, complete."""
    files.write(folder / FILE, dump(run).encode())
