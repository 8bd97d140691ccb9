"""Build the evaluator of a run: open the data that its protocol compares samples with.

`evaluator_of` is the entry point for training and `dumo evaluate`; `sample_conditions` returns the conditions of the
samples to score. Other callers use `reference_data` to open only the data, `require_likelihood` and `missing_to_judge`
to check that a run can be evaluated, and `bar_while_reading` for progress.

Modules that only some protocols need are imported inside functions.
"""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dumo.config.conditions import Conditions, shown_data, squares
from dumo.config.spec import Evaluation, Run
from dumo.data import Data, Images, Latents
from dumo.encoders.caption_ids import split_caption
from dumo.evaluation import Context, LikelihoodProtocol
from dumo.evaluation.protocol import Evaluator
from dumo.evaluation.small_sets import MAX_IMAGES, MIN_PHOTOS, SAMPLES_PER_CLASS
from dumo.io.data_source import DataSource
from dumo.runtime import signals
from dumo.runtime.progress import Bar, Tick
from dumo.types import UserError


def evaluator_of(
    run: Run, evaluation: Evaluation, device: torch.device, bar: Bar, stored: Path | None = None
) -> Evaluator:
    """Return the evaluator of a run for an evaluation's protocol, showing a progress bar while it reads the data.

    `stored` is a file of data features (`dumo.evaluation.stored`), used only if the images are not on this machine.

    Raise UserError if data or weights of the protocol are missing or damaged, or if the protocol needs a likelihood
    that the run does not have. Raise Stopped after a signal.
    """
    data = run.data

    def open_captions() -> tuple[DataSource, Tensor, list[str]]:
        # the decoded images, cropped to one size
        images = squares(shown_data(data)).open()
        return images, sample_conditions(data, evaluation), _plain_texts(data)

    with bar_while_reading(bar) as tick:
        if isinstance(evaluation.protocol, LikelihoodProtocol):
            require_likelihood(run)
        if stored is not None and _has_images_here(data):
            stored = None
        open_reference = partial(reference_data, data, evaluation.split)
        if evaluation.protocol.kind == "photos" and evaluation.split is None:
            open_reference = partial(_originals_for_photos, data)
        context = Context(
            data=open_reference,
            trained=trained_data(data, evaluation.split),
            classes=data.labels,
            seed=evaluation.seed,
            device=device,
            tick=tick,
            captions=open_captions,
            stored=stored,
            split=evaluation.split,
        )
        return evaluation.protocol.evaluator(context)


def missing_to_judge(run: Run, num_images: int | None) -> str | None:
    """Name the missing file, field or images without which the protocol cannot run. Return None if nothing is missing.

    `num_images` is the number of images in the data; None if it is infinite or the images are not on this machine.
    """
    protocol = run.evaluate.protocol
    if protocol.kind != "photos":
        return protocol.missing
    if run.evaluate.split is None and num_images is not None and num_images < MIN_PHOTOS:
        return f"{MIN_PHOTOS} images or more"
    if run.data.labels > protocol.total:
        return f"evaluate.protocol.samples={SAMPLES_PER_CLASS * run.data.labels}"
    return None


def _has_images_here(data: Data) -> bool:
    """Whether the images of the data are on this machine."""
    images = shown_data(data)
    return isinstance(images, Images) and images.is_here


def sample_conditions(data: Data, evaluation: Evaluation) -> Tensor:
    """Return the conditions (n,) of the samples to score: the protocol's classes, or captions of these classes.

    `evaluate.captions` selects training captions or held-out captions.
    """
    labels = evaluation.protocol.labels(data.labels)
    return Conditions(data).of_labels(labels, held_out=evaluation.captions == "held")


def _plain_texts(data: Data) -> list[str]:
    """Return the caption texts without image hashes. Raise UserError if the data have no captions."""
    from dumo.run.fill_caches import captions

    return [split_caption(caption)[0] for caption in captions(data)]


def reference_data(data: Data, split: str | None) -> DataSource:
    """Open the reference data: the training data, or another split of the same images.

    Raise UserError if the data have no splits, or if the split is not on this machine.
    """
    if split is None:
        return data.originals()
    images = shown_data(data)
    if not isinstance(images, Images):
        raise UserError(f"evaluate.split={split}: data {data.kind} has no splits: remove evaluate.split")
    split_images = images.model_copy(update={"split": split, "count": None})
    return split_images.with_facts().originals()


def _originals_for_photos(data: Data) -> DataSource:
    """Open the images for the photos protocol without decoding all of them if it reads only a subset."""
    as_read = {"memory": 0.0}
    if isinstance(data, Latents):
        undecoded = data.model_copy(update={"images": data.images.model_copy(update=as_read)})
    elif isinstance(data, Images):
        undecoded = data.model_copy(update=as_read)
    else:
        return data.originals()
    album = undecoded.originals()
    return album if album.size > MAX_IMAGES else data.originals()


def trained_data(data: Data, split: str | None) -> Callable[[], DataSource] | None:
    """Return a function that opens the training data if samples are compared with a held-out split, else None."""
    images = shown_data(data)
    is_trained_on = isinstance(images, Images) and images.split == split and images.count is None
    if split is None or is_trained_on:
        return None
    return data.originals


def require_likelihood(run: Run) -> None:
    """Raise UserError if a run has no likelihood of its data.

    This is the case for latents, captions, guidance, and solvers that cannot integrate from data to noise.
    """
    from dumo.flow.likelihood import climb_of

    if isinstance(run.data, Latents):
        raise UserError("protocol likelihood does not support latents: choose another protocol")
    if run.conditions.captions:
        raise UserError("protocol likelihood supports classes, not captions: choose another protocol")
    if run.sample.guide.active:
        raise UserError("protocol likelihood does not support guidance: set sample.guide.scale=1")
    # Raise UserError if the solver cannot integrate from data to noise with the functions that the net learned.
    climb_of(run.sample.solver, run.readings)


@contextmanager
def bar_while_reading(bar: Bar) -> Generator[Callable[[int, int], None]]:
    """Yield a function `report_progress(images_read, total)`, which shows the bar at its first call.

    The function raises Stopped after a signal.
    """
    advance_bar: Tick | None = None
    with ExitStack() as stack:

        def report_progress(images_read: int, total: int) -> None:
            nonlocal advance_bar
            signals.check()
            if advance_bar is None:
                advance_bar = stack.enter_context(bar("looking at the data", total))
            advance_bar(images_read, "")

        yield report_progress
