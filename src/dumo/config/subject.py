"""Rules of a run that trains a subject: adapters for the images of one thing, on top of a few-step run.

`dumo.config.check` calls both. Each yields a line for each mismatch, with the fix.
"""

from collections.abc import Iterator

from dumo.config.teacher import Teacher
from dumo.config.tree import Tree
from dumo.data import Data, is_latents
from dumo.objectives import Objective
from dumo.training.spec import Train
from dumo.types import FromTeacher


def subject_faults(run: Tree) -> Iterator[str]:
    """Adapters for a subject need a few-step run to begin from, with the weights of its pipeline."""
    lora = run.net.lora
    if not lora or not lora.subject:
        return
    starts_from_run = run.has_subject and run.start and run.start.kind == "run" and not run.start.heads
    if not starts_from_run:
        yield (
            "net.lora.subject trains adapters on top of a few-step run's, on the weights of its pipeline: set "
            "start={kind: run, source: RUN}, its folder, and net.weights=source"
        )


def prior_faults(data: Data, teacher: Teacher | None, objective: Objective, train: Train) -> Iterator[str]:
    """Prior images need a teacher that answers them by its velocity, and a share of the batch that is some rows of it.

    `data.prior` is that share, in (0, 1).
    """
    prior_share = data.prior if is_latents(data) else None
    if not prior_share:
        return
    if not teacher or teacher.pairs or objective.needs.teacher != FromTeacher():
        yield (
            "data.prior has images for the teacher to answer by its velocity: set teacher={kind: base}, and an "
            "objective that may learn from one, objective.kind=dumo; or data.prior=null"
        )
    num_prior_rows = round(prior_share * train.batch)
    if num_prior_rows in (0, train.batch):
        yield f"data.prior = {prior_share:g} of train.batch = {train.batch} is no row, or all of them: change one"
