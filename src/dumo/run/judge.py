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
from dumo.io.source import Source
from dumo.run.encode import captions
from dumo.run.sampler import Sampler
from dumo.runtime import signals, threads
from dumo.runtime.progress import Bar, Tick
from dumo.types import UserError


def evaluator_of(sampler: Sampler, evaluation: Evaluation, bar: Bar) -> Evaluator:
    """The evaluator of a protocol. Raises UserError as the protocol does, and for what has no likelihood."""
    data = sampler.data
    with looking(bar) as tick:
        if isinstance(evaluation.protocol, LikelihoodProtocol):
            demand(sampler)
        return evaluation.protocol.evaluator(
            Context(
                data=lambda: judged_data(data, evaluation.split),
                trained=(lambda: real_data(data)) if evaluation.split else None,
                classes=data.labels,
                seed=evaluation.seed,
                device=sampler.device,
                tick=tick,
                captions=lambda: (squares(shown(data)).open(), conditions(data, evaluation), words(data)),
            )
        )


@contextmanager
def looking(bar: Bar, what: str = "looking at the data") -> Generator[Callable[[int, int], None]]:
    """A bar that is there from the first look at the images of the data: how many have been seen, of how many."""
    ticks = list[Tick]()
    with ExitStack() as stack:

        def tick(done: int, total: int) -> None:
            signals.check()
            threads.check()
            if not ticks:
                ticks.append(stack.enter_context(bar(what, total)))
            ticks[0](done, "")

        yield tick


def words(data: Data) -> list[str]:
    """The texts of the captions of the data. Raises as `captions`."""
    return [parted(caption)[0] for caption in captions(data)]


def conditions(data: Data, evaluation: Evaluation) -> Tensor:
    """What samples are made of: the protocol's classes, or the captions of them that `evaluate.captions` asks for."""
    labels = evaluation.protocol.labels(data.labels)
    return Conditions(data).of(labels, held=evaluation.captions == "held")


def demand(sampler: Sampler) -> None:
    """Refuse, with a UserError, what has no likelihood of the data that are shown, and a solver that does not climb."""
    lacks = {
        "is of the data themselves, not of latents: choose another protocol": isinstance(sampler.data, Latents),
        "knows classes, not captions: choose another protocol": sampler.conditions.captions,
        "is of the flow without guidance: set sample.guide.scale=1": sampler.spec.guide.active,
    }
    if wrong := next((text for text, lacking in lacks.items() if lacking), None):
        raise UserError(f"protocol likelihood {wrong}")
    climbing(sampler.spec.solver, sampler.taught)


def real_data(data: Data) -> Source:
    """The data as images or points with their classes: of latents, the images that were encoded. Raises as opening."""
    return data.open() if isinstance(data, Moons) else data.originals()


def judged_data(data: Data, split: str | None) -> Source:
    """What samples are judged against: the data's images, or those of another split. Raises UserError, as opening."""
    if split is None:
        return real_data(data)
    images = shown(data)
    if not isinstance(images, Images):
        raise UserError(f"evaluate.split={split}: data {data.kind} has no splits; leave it out")
    try:
        return images.model_copy(update={"split": split}).found().originals()
    except UserError as error:
        raise UserError(f"{error}; or evaluate.split={split}, the images that samples are judged against") from error
