"""Whether a subject that is trained on top of a few-step run fits together, as `dumo.config.check` asks."""

from collections.abc import Iterator

from dumo.config.teacher import Teacher
from dumo.config.tree import Tree
from dumo.data import Data, is_latents
from dumo.objectives import Objective
from dumo.training.spec import Train
from dumo.types import FromTeacher


def subject(run: Tree) -> Iterator[str]:
    """Adapters for a subject on top of no run."""
    lora = run.net.lora
    if not lora or not lora.subject:
        return
    starts_from_run = run.has_subject and run.start and run.start.kind == "run" and not run.start.heads
    if not starts_from_run:
        yield (
            "net.lora.subject trains adapters on top of a few-step run's, on the weights of its pipeline: set "
            "start={kind: run, source: RUN}, its folder, and net.weights=source"
        )


def prior(data: Data, teacher: Teacher | None, objective: Objective, train: Train) -> Iterator[str]:
    """Images for a teacher to answer without one, in no row of a batch, or for an objective that learns otherwise."""
    share = data.prior if is_latents(data) else None
    if not share:
        return
    if not teacher or teacher.pairs or objective.needs.teacher != FromTeacher():
        yield (
            "data.prior has images for the teacher to answer by its velocity: set teacher={kind: base}, and an "
            "objective that may learn from one, objective.kind=dumo; or data.prior=null"
        )
    if round(share * train.batch) in (0, train.batch):
        yield f"data.prior = {share:g} of train.batch = {train.batch} is no row, or all of them: change one"
