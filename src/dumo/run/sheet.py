"""Render sheets of samples during training, after the steps in `train.sheets`.

A sheet, such as sheets/step-00001000-nfe1.png, shows samples of the averaged weights from the same noise every time,
with the run's solver. `RenderSheets` renders them.

Sheets do not affect training: samples have separate random streams (`dumo.runtime.random`), and the network's mode is
restored. The samples are divided over ranks, so that no rank needs all weights. Sheets that are missing after an
interruption are rendered when the run resumes from that step.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dumo.config.conditions import Conditions, shown_data
from dumo.config.spec import Run
from dumo.data import Latents
from dumo.flow import sampling
from dumo.io.picture import SCATTER_POINTS
from dumo.run.hooks import Hook
from dumo.run.trained import TrainedRun, gather_samples
from dumo.run.write_samples import write_samples
from dumo.runtime import dist, signals
from dumo.training import agreement
from dumo.training.metrics import StepMetrics
from dumo.types import Sample

if TYPE_CHECKING:
    from dumo.run.trainer import Trainer

SHEET_COUNT = 64


class RenderSheets(Hook):
    """Renders sheets of samples after the steps in `train.sheets`."""

    def __init__(self, run: Run) -> None:
        """Open the codec once, so that a missing codec fails before training. Every rank must call it.

        Raise UserError on all ranks if the codec cannot be opened.
        """
        self.run = run
        data = run.data
        if run.train.sheets and isinstance(data, Latents):

            def open_codec() -> None:
                data.codec.open(torch.device("cpu"))

            agreement.on_main_rank(open_codec)

    @cached_property
    def c(self) -> Tensor:
        """The condition (n,) of each sample."""
        return sheet_conditions(self.run.conditions)

    def before_training(self, trainer: "Trainer") -> None:
        """Render missing sheets of the step from which the run resumes."""
        missing: list[tuple[Path, int]] = []
        if trainer.state.step:
            for file, nfe in self._sheets_due(trainer):
                if agreement.on_main_rank(lambda file=file: not file.exists()):
                    missing.append((file, nfe))
        self._render_sheets(trainer, missing)

    def after_step(self, trainer: "Trainer", metrics: StepMetrics) -> None:
        """Render the sheets that are due after this step.

        After a signal nothing is rendered: the checkpoint of this step is saved, and the resumed run renders the
        sheets. A signal during rendering waits, because the next checkpoint belongs to a later step.
        """
        if metrics.received_signal is None:
            with signals.uninterrupted():
                self._render_sheets(trainer, list(self._sheets_due(trainer)))

    def _sheets_due(self, trainer: "Trainer") -> Iterator[tuple[Path, int]]:
        """Yield the file and the NFE of each sheet that is due after this step."""
        step = trainer.state.step
        if self.run.train.is_sheet_due(step):
            for nfe in self.run.sample.nfe:
                yield trainer.folder.path / "sheets" / f"step-{step:08d}-nfe{nfe}.png", nfe

    def _render_sheets(self, trainer: "Trainer", sheets: Sequence[tuple[Path, int]]) -> None:
        """Render the sheets of a step, given as files and NFE. They share an autoencoder, which is freed afterwards."""
        if not sheets:
            return
        trained = TrainedRun(self.run, trainer.folder, trainer.state.sampled_net, trainer.state.step)
        for file, nfe in sheets:
            self._render_sheet(trainer, trained, file, nfe)

    def _render_sheet(self, trainer: "Trainer", trained: TrainedRun, file: Path, nfe: int) -> None:
        """Render one sheet. Every rank must call it. If the disk is full, print a warning."""
        run = self.run
        x = self.sample(trained, nfe, len(self.c))
        if dist.is_main():
            rows = trained.to_file_rows(trained.decode(x))
            try:
                write_samples(rows, self.c, file.with_suffix(""), "grid", run.data, run.sample.seed)
            except OSError as error:
                trainer.print_line(f"warning: no sheet {file.stem}: {error}")

    def sample(self, trained: TrainedRun, nfe: int, count: int) -> Sample:
        """Return the first `count` samples (count, *shape), not decoded, on rank 0's CPU. Every rank must call it."""
        with _without_compiling(self.run):
            batches = list(trained.make_batches(self.c[:count], nfe=nfe, decodes=False))
        return gather_samples(batches, self.run.data.shape).x


def _without_compiling(run: Run) -> AbstractContextManager[object]:
    """Return a context in which a compiled network runs eagerly, to avoid recompilation for a few samples."""
    if run.train.compile == "none":
        # The stance imports the compiler, which takes a second.
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def sheet_conditions(conditions: Conditions) -> Tensor:
    """Return the condition (n,) of each sample on a sheet.

    The samples cycle through all classes or captions, or use evenly spaced ones if there are too many.
    """
    is_image = len(shown_data(conditions.data).shape) == 3
    num_samples = SHEET_COUNT if is_image else SCATTER_POINTS
    num_classes = conditions.data.labels
    spaced_classes = None
    if num_classes > num_samples:
        spaced_classes = [i * num_classes // num_samples for i in range(num_samples)]
    return conditions.of_labels(sampling.labels_in_turn(num_samples, num_classes, spaced_classes))
