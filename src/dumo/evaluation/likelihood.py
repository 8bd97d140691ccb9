"""The log-likelihoods of a protocol's own data by a run's flow, made as samples are: by rank, batch by batch."""

from collections.abc import Iterator

import torch

from dumo import dist
from dumo.config.spec import Run
from dumo.data import Latents
from dumo.flow.divergence import axes
from dumo.flow.reading import reading
from dumo.protocols.likelihood import LikelihoodEvaluator
from dumo.run.folder import RunFolder
from dumo.sampling.generate import Batch, counting, evaluating, passing
from dumo.sampling.likelihood import climbing, log_likelihood
from dumo.sampling.solver import Solver
from dumo.types import UserError

ROWS = 256  # of a pass, as where samples are made


def demand(run: Run) -> None:
    """Refuse, with a UserError, what has no likelihood of the data that are shown, and a solver that does not climb."""
    if isinstance(run.data, Latents):
        raise UserError("protocol likelihood is of the data themselves, not of latents: choose another protocol")
    if run.captions:
        raise UserError("protocol likelihood knows classes, not captions: choose another protocol")
    if run.sample.guide.active:
        raise UserError("protocol likelihood is of the flow without guidance: set sample.guide.scale=1")
    climbing(run.sample.solver, run.reads)


def likelihoods(opened: RunFolder, evaluator: LikelihoodEvaluator, solver: Solver, nfe: int) -> Iterator[Batch]:
    """log p(x | c) in nats of this rank's share of the data, in place of samples; passes in fp32.

    Raises UserError as the solver does.
    """
    run, net, device = opened.run, opened.net, opened.device
    reads = reading(run.objective, net, run.sample.knobs)
    for numbers in torch.arange(dist.rank(), len(evaluator.x), dist.world()).split(ROWS):
        x, c = (one[numbers].to(device) for one in (evaluator.x, evaluator.c))
        along = [e.to(x) for e in evaluator.directions(numbers.tolist())] or axes(x)
        with evaluating(net), counting(net) as passed, passing(net, "fp32", device):
            found = log_likelihood(reads, run.path, solver, x, c, nfe, along)
        yield Batch(numbers, found.cpu(), sum(passed) // len(numbers))
