"""Samples as a run trains: what its sampled weights make of the same noise, by the run's own sampler.

    sheets/step-00001000-nfe1.png                       64 images, after the steps that `train.sheets` names
    strip/step-00001024-nfe1-seed0.safetensors          6 samples, not decoded, after steps 8, 16, 32, ... of any run

`Sheets` writes both: `dumo.run.train` calls its `draw_missing` before the first step, and its `draw` after each step.
The report reads the strip (`read_strip`), and shows how images became what they are.

Both change nothing of the training: samples have random streams of their own (`dumo.runtime.random`), and the net gets
its mode back. Ranks make them together, each some of the images, so that no rank needs all weights. What a stop leaves
out is drawn when the run resumes from that step.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dumo.config.conditions import Conditions, shown_data
from dumo.config.spec import Run, Sampling
from dumo.data import is_latents
from dumo.flow import generate
from dumo.io import file as files
from dumo.io.picture import SCATTER_POINTS
from dumo.run.sampler import gather_samples, rank_indices, sampler_of
from dumo.runtime import dist, signals
from dumo.training import agreement, layout
from dumo.training.state import State
from dumo.training.step import Record
from dumo.types import Sample

SHEET_COUNT = 64  # images on a sheet: ours
STRIP_FOLDER = "strip"  # the folder, in that of a run
STRIP_COUNT = 6  # samples of each moment of the strip: ours
FIRST_STRIP_STEP = 8  # of the strip: what a net makes before is noise. Ours


class Sheets:
    """Draws sheets after the steps that `train.sheets` names, and the strip of a run that makes images."""

    def __init__(self, run: Run, folder: Path, log_line: Callable[[str], object]) -> None:
        """Check that sheets can be drawn. `log_line` is called with the reason where one is missing later.

        Every rank must call it. Raises UserError on all ranks where the codec cannot be opened.
        """
        self.run = run
        self.folder = folder / "sheets"
        self.strip_folder = folder / STRIP_FOLDER
        self.log_line = log_line
        data = run.data
        self.has_strip = len(shown_data(data).shape) == 3
        if run.train.sheets and is_latents(data):

            def open_codec() -> None:
                data.codec.open(torch.device("cpu"))

            agreement.on_main_rank(open_codec)  # a missing codec ends the run now, not after weeks

    @cached_property
    def c(self) -> Tensor:
        """The condition (n,) of each sample."""
        return sheet_conditions(self.run.conditions)

    def draw(self, state: State, record: Record) -> None:
        """Draw what is due after this step: sheets, and samples of the strip. Every rank must call it.

        Draws nothing where the run is asked to stop: a checkpoint of this step is saved, and `draw_missing` draws it
        when the run resumes from there. What is begun is finished, since the next checkpoint is of a later step.
        """
        if record.received_signal is None:
            with signals.uninterrupted():
                for file, nfe, count in self._files_due(state.step):
                    self._draw_file(state, file, nfe, count)

    def draw_missing(self, state: State) -> None:
        """Draw what is due at the step that the run resumes from, and missing. Every rank must call it."""
        agreement.on_main_rank(lambda: files.sweep(self.folder))
        agreement.on_main_rank(lambda: files.sweep(self.strip_folder))
        if state.step:
            for file, nfe, count in self._files_due(state.step):
                if agreement.on_main_rank(lambda file=file: not file.exists()):
                    self._draw_file(state, file, nfe, count)

    def _files_due(self, step: int) -> Iterator[tuple[Path, int, int]]:
        """Yield what is drawn after this step: a file, and the number of passes and of samples."""
        sampling = self.run.sample
        if self.run.train.is_sheet_due(step):
            for nfe in sampling.nfe:
                yield self.folder / f"step-{step:08d}-nfe{nfe}.png", nfe, len(self.c)
        if self.has_strip and is_strip_due(step):
            nfe = min(sampling.nfe)
            yield self.strip_folder / f"step-{step:08d}-{_noise_name(nfe, sampling.seed)}", nfe, STRIP_COUNT

    def _draw_file(self, state: State, file: Path, nfe: int, count: int) -> None:
        """Draw one file, of `count` samples of `nfe` passes. Every rank must call it."""
        if dist.world() == 1:  # then an error is no more than a missing file
            self._try_to_write(lambda: self.sample(state, nfe, count), state, file)
            return
        samples = self.sample(state, nfe, count)  # an error here must reach all ranks, which wait for one another
        if dist.is_main():
            self._try_to_write(lambda: samples, state, file)

    def sample(self, state: State, nfe: int, count: int) -> Sample:
        """The first `count` samples (count, *shape), not decoded, on the CPU of rank 0. Every rank must call it."""
        run = self.run
        sampler = sampler_of(run, state.sampled_net)
        indices = rank_indices(count)  # of this rank's images
        with _without_compiling(run):
            rank_batches = sampler.flow.batches(
                sampler.reads,
                run.sample.solver,
                self.c[torch.tensor(indices) % count],
                nfe=nfe,
                seed=run.sample.seed,
                shape=run.data.shape,
                indices=indices,
                batch=sampler.rows,
            )
            batches = list(rank_batches)
        layout.release(sampler.net)
        return gather_samples(batches, run.data.shape).x[:count]

    def _try_to_write(self, make_samples: Callable[[], Sample], state: State, file: Path) -> None:
        """Write a file, or log why there is none: a missing one is no reason to end a run."""
        run = self.run
        try:
            x = make_samples()
            if file.parent == self.strip_folder:  # the report decodes them: training needs no decoder
                files.write(file, safetensors.torch.save({"x": x.half()}))
                return
            from dumo.report.sample import write_samples

            sampler = sampler_of(run, state.sampled_net)
            rows = sampler.to_file_rows(sampler.decode(x))
            write_samples(rows, self.c, file.with_suffix(""), "grid", run.data, run.sample.seed)
        except Exception as error:  # memory, disk, weights that have diverged
            self.log_line(f"warning: no sheet {file.stem}: {error}")


def _without_compiling(run: Run) -> AbstractContextManager[object]:
    """Inside, a compiled net runs uncompiled, so that it is not compiled again for a few samples."""
    if run.train.compile == "none":
        return nullcontext()  # the stance imports the compiler, which takes a second
    return torch.compiler.set_stance("force_eager")


def is_strip_due(step: int) -> bool:
    """Whether samples of the strip are drawn after this step: 8, 16, 32 and so on, each twice the one before."""
    is_power_of_two = step & (step - 1) == 0
    return step >= FIRST_STRIP_STEP and is_power_of_two


def _noise_name(nfe: int, seed: int) -> str:
    """The end of the name of a file of the strip: all files that end alike begin with the same noise."""
    return f"nfe{nfe}-seed{seed}.safetensors"


def read_strip(folder: Path, sampling: Sampling, shape: Sequence[int], last_step: int) -> dict[int, Sample]:
    """The samples of a run's strip, (6, *shape) as the net made them, by step up to `last_step`, in its order.

    All are of one noise: that of `sampling`, by its seed and fewest passes. A file that cannot be read, or holds other
    than finite samples of this `shape`, is left out.
    """
    samples: dict[int, Sample] = {}
    ending = _noise_name(min(sampling.nfe), sampling.seed)
    for file in sorted((folder / STRIP_FOLDER).glob(f"step-*-{ending}")):
        _, step_text, *_ = file.name.split("-")
        if not step_text.isdecimal() or int(step_text) > last_step:  # of a run that was taken back
            continue
        try:
            x = safetensors.torch.load_file(file)["x"].float()
        except (OSError, SafetensorError, KeyError):
            continue
        if x.shape == (STRIP_COUNT, *shape) and x.isfinite().all():
            samples[int(step_text)] = x
    return samples


def sheet_conditions(conditions: Conditions) -> Tensor:
    """The condition (n,) of each sample on a sheet.

    All classes or captions in turn; where there are more of them than samples, evenly spaced ones.
    """
    is_image = len(shown_data(conditions.data).shape) == 3
    num_samples = SHEET_COUNT if is_image else SCATTER_POINTS
    num_classes = conditions.data.labels
    spaced_classes = None
    if num_classes > num_samples:
        spaced_classes = [i * num_classes // num_samples for i in range(num_samples)]
    return conditions.of_labels(generate.labels_in_turn(num_samples, num_classes, spaced_classes))
