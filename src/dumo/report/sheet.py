"""Sheets of samples as a run trains: what its sampled weights make of the same noise, by the run's own sampler.

    sheets/step-00001000-nfe1.png

`Sheets` is the entrance. `dumo.run.train` calls its `open` before the first step, and its `draw` after each step.

Sheets change nothing of the training: samples have random streams of their own (`dumo.runtime.random`), and the net
gets its mode back. Ranks make them together, each some of the images, so that no rank needs all weights. Sheets that a
stop leaves out are drawn when the run resumes from that step.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dumo.config.conditions import Conditions, shown
from dumo.config.spec import Run
from dumo.data import is_latents
from dumo.flow import generate
from dumo.io import file as files
from dumo.run.sampler import gather_samples, rank_indices, sampler_of
from dumo.runtime import dist, signals
from dumo.training import agreement, layout
from dumo.training.state import State
from dumo.training.step import Record
from dumo.types import Sample

COUNT = 64  # images on a sheet: ours
POINTS = 2000  # samples of a scatter: ours


class Sheets:
    """Draws sheets after the steps that `train.sheets` names."""

    def __init__(self, run: Run, folder: Path, log_line: Callable[[str], object]) -> None:
        """Check that sheets can be drawn. `log_line` is called with the reason where one is missing later.

        Every rank must call it. Raises UserError on all ranks where the codec cannot be opened.
        """
        self.run = run
        self.folder = folder / "sheets"
        self.log_line = log_line
        self.c = sheet_conditions(run.conditions)
        data = run.data
        if run.train.sheets and is_latents(data):

            def open_codec() -> None:
                data.codec.open(torch.device("cpu"))

            agreement.on_main_rank(open_codec)  # a missing codec ends the run now, not after weeks

    def draw(self, state: State, record: Record) -> None:
        """Draw a sheet for each of the run's numbers of passes, if this step has sheets. Every rank must call it.

        Draws nothing where the run is asked to stop: a checkpoint of this step is saved, from which `open` draws the
        sheets later. Sheets that are begun are finished, since the next checkpoint is of a later step.
        """
        if record.asked is None and self.run.train.is_sheet_due(state.step):
            with signals.uninterrupted():
                for nfe in self.run.sample.nfe:
                    self._draw_one(state, nfe)

    def open(self, state: State) -> None:
        """Draw the sheets of the step that the run resumes from, where they are missing. Every rank must call it."""
        agreement.on_main_rank(lambda: files.sweep(self.folder))
        if state.step and self.run.train.is_sheet_due(state.step):
            for nfe in self.run.sample.nfe:
                stem = self._stem(state, nfe)
                if agreement.on_main_rank(lambda stem=stem: not stem.with_suffix(".png").exists()):
                    self._draw_one(state, nfe)

    def _draw_one(self, state: State, nfe: int) -> None:
        """Draw the sheet of one number of passes. Every rank must call it."""
        if dist.world() == 1:  # then an error is no more than a missing sheet
            self._try_to_write(lambda: self.sample(state, nfe), state, nfe)
            return
        samples = self.sample(state, nfe)  # an error here must reach all ranks, which wait for one another
        if dist.is_main():
            self._try_to_write(lambda: samples, state, nfe)

    def _stem(self, state: State, nfe: int) -> Path:
        """A sheet's file, without its ending."""
        return self.folder / f"step-{state.step:08d}-nfe{nfe}"

    def sample(self, state: State, nfe: int) -> Sample:
        """The samples of a sheet (n, *shape), not decoded, on the CPU of every rank. Every rank must call it."""
        run = self.run
        net = state.shown
        indices = rank_indices(len(self.c))  # of this rank's images
        with torch.compiler.set_stance("force_eager"):
            rank_batches = generate.sample_batches(
                net,
                sampler_of(run, net).reads,
                run.path,
                run.sample.solver,
                self.c[torch.tensor(indices) % len(self.c)],
                nfe=nfe,
                seed=run.sample.seed,
                shape=run.data.shape,
                indices=indices,
                device=next(net.parameters()).device,
            )
            batches = list(rank_batches)
        layout.release(net)
        return gather_samples(batches, run.data.shape).x[: len(self.c)]

    def _try_to_write(self, make_samples: Callable[[], Sample], state: State, nfe: int) -> None:
        """Write a sheet, or log why there is none: a missing sheet is no reason to end a run."""
        from dumo.report.sample import write

        run = self.run
        stem = self._stem(state, nfe)
        try:
            pixels = sampler_of(run, state.shown).decode(make_samples())
            write(pixels, self.c, stem, "grid", run.data, run.sample.seed)
        except Exception as error:  # memory, disk, weights that have diverged
            self.log_line(f"warning: no sheet {stem.name}: {error}")


def sheet_conditions(conditions: Conditions) -> Tensor:
    """The condition (n,) of each sample on a sheet.

    All classes or captions in turn; where there are more of them than samples, evenly spaced ones.
    """
    is_image = len(shown(conditions.data).shape) == 3
    num_samples = COUNT if is_image else POINTS
    num_classes = conditions.data.labels
    spaced_classes = None
    if num_classes > num_samples:
        spaced_classes = [i * num_classes // num_samples for i in range(num_samples)]
    return conditions.of(generate.labels_in_turn(num_samples, num_classes, spaced_classes))
