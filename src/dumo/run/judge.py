"""The evaluator of a run: its protocol, opened with what it needs of the data, for training and `dumo evaluate`."""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager

from torch import Tensor

from dumo.config.conditions import Conditions, shown, squares
from dumo.config.tree import Evaluation
from dumo.data import Data, Images, Latents, Moons
from dumo.encoders.caption import parted
from dumo.evaluation import Context, LikelihoodProtocol
from dumo.evaluation.protocol import Evaluator
from dumo.flow.likelihood import climbing
from dumo.io.source import DataSource
from dumo.run.encode import captions
from dumo.run.sampler import Sampler
from dumo.runtime import signals, threads
from dumo.runtime.progress import Bar, Tick
from dumo.types import UserError


def evaluator_of(sampler: Sampler, evaluation: Evaluation, bar: Bar) -> Evaluator:
    """The evaluator of a protocol. Raises UserError as the protocol does, and for what has no likelihood."""
    data = sampler.data

    def open_judged_data() -> DataSource:
        return judged_data(data, evaluation.split)

    def open_trained_data() -> DataSource:
        return real_data(data)

    def open_captions() -> tuple[DataSource, Tensor, list[str]]:
        images = squares(shown(data)).open()
        return images, conditions(data, evaluation), caption_texts(data)

    with bar_while_reading(bar) as tick:
        if isinstance(evaluation.protocol, LikelihoodProtocol):
            require_likelihood(sampler)
        context = Context(
            data=open_judged_data,
            trained=open_trained_data if evaluation.split else None,
            classes=data.labels,
            seed=evaluation.seed,
            device=sampler.device,
            tick=tick,
            captions=open_captions,
        )
        return evaluation.protocol.evaluator(context)


@contextmanager
def bar_while_reading(bar: Bar, title: str = "looking at the data") -> Generator[Callable[[int, int], None]]:
    """Yield what to call with the images read so far and their total. The bar begins with the first call."""
    bar_tick: Tick | None = None
    with ExitStack() as stack:

        def tick(done: int, total: int) -> None:
            nonlocal bar_tick
            signals.check()
            threads.check()
            if bar_tick is None:
                bar_tick = stack.enter_context(bar(title, total))
            bar_tick(done, "")

        yield tick


def caption_texts(data: Data) -> list[str]:
    """The texts of the captions of the data. Raises as `captions`."""
    return [parted(caption)[0] for caption in captions(data)]


def conditions(data: Data, evaluation: Evaluation) -> Tensor:
    """What samples are made of: the protocol's classes, or the captions of them that `evaluate.captions` asks for."""
    labels = evaluation.protocol.labels(data.labels)
    return Conditions(data).of(labels, held=evaluation.captions == "held")


def require_likelihood(sampler: Sampler) -> None:
    """Refuse, with a UserError, what has no likelihood of the data that are shown, and a solver that does not climb."""
    if isinstance(sampler.data, Latents):
        raise UserError("protocol likelihood is of the data themselves, not of latents: choose another protocol")
    if sampler.conditions.captions:
        raise UserError("protocol likelihood knows classes, not captions: choose another protocol")
    if sampler.spec.guide.active:
        raise UserError("protocol likelihood is of the flow without guidance: set sample.guide.scale=1")
    climbing(sampler.spec.solver, sampler.taught)


def real_data(data: Data) -> DataSource:
    """The data as images or points with their classes: of latents, the images that were encoded. Raises as opening."""
    if isinstance(data, Moons):
        return data.open()
    return data.originals()


def judged_data(data: Data, split: str | None) -> DataSource:
    """What samples are judged against: the data's images, or those of another split. Raises UserError, as opening."""
    if split is None:
        return real_data(data)
    images = shown(data)
    if not isinstance(images, Images):
        raise UserError(f"evaluate.split={split}: data {data.kind} has no splits; leave it out")
    split_images = images.model_copy(update={"split": split})
    try:
        return split_images.found().originals()
    except UserError as error:
        raise UserError(f"{error}; or evaluate.split={split}, the images that samples are judged against") from error
