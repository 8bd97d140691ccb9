"""Samples in batches: from noise to images, by a solver. Image i of a seed is the same in any batch.

`sample_batches` makes them for `dumo.Flow`, for runs and for their sheets and validation; `join_batches` joins the
batches. For each batch it puts the network into evaluation mode (`eval_mode`) and a precision (`in_precision`), and
`integrate` runs the solver. A hook counts the passes of the network (`counting_passes`).

For a teacher's pairs, `sample_with_noise` returns the noise, too, and `sample_trajectory` the points between.
`labels_in_turn` gives each image a class.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Int, Int64
from torch import Tensor, nn

from dumo.flow.path import FlowPath
from dumo.flow.precision import Precision, using
from dumo.flow.solver import Fresh, Solver, Stepper
from dumo.runtime import dist
from dumo.runtime.limits import SAMPLES
from dumo.runtime.random import noise
from dumo.types import Array, Cond, Heads, Readings, Sample, Trail, UserError

# The largest batch if the caller does not say.
BATCH = 256


@dataclass(frozen=True)
class Samples:
    """Images or points x (n, *shape) in float32 on the CPU, and the passes that each made through the network."""

    x: Sample
    nfe: int


@dataclass(frozen=True)
class Batch:
    """A batch of samples: their numbers (n,), x (n, *shape) in float32 on the CPU, and the passes that each made."""

    index: Int64[Tensor, " n"]
    x: Sample
    nfe: int


def sample_batches(
    net: nn.Module,
    readings: Readings,
    path: FlowPath,
    solver: Solver,
    c: Cond,
    *,
    nfe: int,
    seed: int,
    shape: Sequence[int],
    indices: Sequence[int] | None = None,
    batch: int = BATCH,
    device: torch.device | str = "cpu",
    precision: Precision | None = "fp32",
    z: Sample | None = None,
) -> Iterator[Batch]:
    """Yield images, one per row of c, a batch at a time.

    net: the network, whose passes are counted. It is in evaluation mode while a batch is made, then as before.
    readings: what `net` tells the solver (`Flow.readings`).
    path: the solver starts from `path.initial_std` times noise, and works in units of `path.sd`.
    c: the conditions, (n, ...).
    nfe: passes of each image through the net.
    seed: of the noise, with the number of the image.
    shape: of an image.
    indices: the numbers of the images, one per row of c; None: 0, 1, ...
    batch: images made at a time, at most.
    device: of the net.
    precision: of the passes; None: the caller's autocast. The solver computes in float32.
    z: noise to start from, (n, *shape); None: keyed by the numbers of the images, as is noise that a solver adds.

    Raises UserError if the solver cannot serve the reading or nfe, ValueError if there are more or fewer indices than
    rows of c, and Stopped after a signal, between two passes.
    """
    if indices is None:
        indices = range(len(c))
    if len(indices) != len(c):
        raise ValueError(f"{len(indices)} images for {len(c)} rows of c: give one index a row")

    try:
        for start in range(0, len(c), batch):
            batch_indices = indices[start : start + batch]
            batch_c = c[start : start + batch].to(device)
            first_draw = None if z is None else z[start : start + batch].to(device)
            fresh = _fresh_noise(seed, batch_indices, shape, device, first_draw)
            with eval_mode(net), counting_passes(net) as rows_per_pass, in_precision(net, precision, device):
                _, x = integrate(readings, path, solver, batch_c, nfe, fresh)
            num_passes, remainder = divmod(sum(rows_per_pass), len(batch_indices))
            assert not remainder, "a reading called the network for some rows more often than for others"
            yield Batch(torch.tensor(batch_indices), x.cpu(), num_passes)
    finally:
        # The root of a network that FSDP2 shards stays whole after a pass without a backward pass. The next optimizer
        # step would not update it.
        for part in dist.sharded_parts(net):
            part.reshard()


def join_batches(batches: Iterable[Batch]) -> Samples:
    """All batches as one, in their order."""
    all_batches = list(batches)
    (nfe,) = {batch.nfe for batch in all_batches}
    return Samples(torch.cat([batch.x for batch in all_batches]), nfe)


def sample_with_noise(
    readings: Readings,
    path: FlowPath,
    solver: Solver,
    c: Cond,
    *,
    nfe: int,
    seed: int,
    shape: Sequence[int],
    indices: Sequence[int],
) -> tuple[Sample, Sample]:
    """The noise of the images numbered `indices`, and the images: both (n, *shape), in float32, on the device of c.

    The net stays in the mode and precision that it has. Raises UserError if the solver cannot serve the reading or nfe.
    """
    return integrate(readings, path, solver, c, nfe, _fresh_noise(seed, indices, shape, c.device))


def _fresh_noise(
    seed: int,
    indices: Sequence[int],
    shape: Sequence[int],
    device: torch.device | str,
    first_draw: Sample | None = None,
) -> Fresh:
    """The noise of the images numbered `indices`, by draw. `first_draw` replaces draw 0."""

    def fresh(draw: int) -> Sample:
        if draw == 0 and first_draw is not None:
            return first_draw
        return noise(seed, indices, draw, shape).to(device)

    return fresh


@torch.no_grad()
def sample_trajectory(
    readings: Readings, path: FlowPath, solver: Stepper, z: Sample, c: Cond, *, nfe: int, points: int
) -> tuple[Sample, Trail]:
    """The images that the solver makes of noise z, and the points between, after each of `points` equal parts.

    Images (n, *shape) are in float32; the points between, (n, points - 1, *shape), run from the data to the noise, and
    are on the path, so in units of its sd.

    Raises ValueError unless `points` is at least 2 and divides the number of steps, and UserError if the solver cannot
    serve the reading or nfe.
    """
    num_steps = nfe // solver.passes
    if points < 2 or num_steps % points:
        raise ValueError(f"points={points}: give at least 2, and a divisor of the {num_steps} steps of nfe={nfe}")
    every = num_steps // points
    trail = solver.trail(readings, path.initial_std * z, c, nfe)
    xs = [x.float() for step, x in enumerate(trail, start=1) if step % every == 0]
    return path.sd * xs[-1], torch.stack(xs[-2::-1], 1)  # xs run from the noise to the data


@torch.no_grad()
def integrate(
    readings: Readings, path: FlowPath, solver: Solver, c: Cond, nfe: int, fresh: Fresh
) -> tuple[Sample, Sample]:
    """Noise, which is draw 0 of `fresh`, and the images that the solver makes of it: (n, *shape), in float32.

    `fresh(k)` is draw k of noise from N(0, I); some solvers use more than the first. The solver starts from
    `path.initial_std` times noise, and works in units of `path.sd`.

    Raises UserError if the solver cannot serve the reading or nfe.
    """
    z = fresh(0)
    x = solver(readings, path, path.initial_std * z, c, nfe, fresh)
    return z, path.sd * x.float()


def labels_in_turn(n: int, classes: int, only: Sequence[int] | None = None) -> Int[Tensor, " n"]:
    """A class for each of n images: 0, 1, ... in turn, or `only` in turn; zeros where there are no classes.

    Raises UserError for a label outside [0, classes), or no image at all.
    """
    if not 1 <= n <= SAMPLES:
        raise UserError(f"{n:,} images cannot be made at once: ask for 1 to {SAMPLES:,}, for more with another seed")
    for label in only or ():
        if not classes:
            raise UserError(f"label {label} is out of range: this model has no classes, so give no labels")
        if not 0 <= label < classes:
            raise UserError(f"label {label} is out of range: labels run from 0 to {classes - 1}")
    turn = torch.tensor(only or range(max(classes, 1)))
    return turn[torch.arange(n) % len(turn)]


@contextmanager
def eval_mode(net: nn.Module, *, training: bool = False) -> Generator[None, None, None]:
    """Hold the network in evaluation mode, or in training mode, then give every part of it its own mode back."""
    modes = [(part, part.training) for part in net.modules()]
    net.train(training)
    try:
        yield
    finally:
        for part, was_training in modes:
            part.training = was_training


@contextmanager
def counting_passes(net: nn.Module) -> Generator[list[int], None, None]:
    """Yield a list to which every pass through the net adds its number of rows."""
    rows_per_pass: list[int] = []

    def count_rows(_: nn.Module, inputs: tuple[Array, ...], __: object) -> None:
        rows_per_pass.append(len(inputs[0]))

    hook = net.register_forward_hook(count_rows)
    try:
        yield rows_per_pass
    finally:
        hook.remove()


@contextmanager
def in_precision(
    net: nn.Module, precision: Precision | None, device: torch.device | str
) -> Generator[None, None, None]:
    """Inside, the net's passes are in a precision, and return float32, in which solvers and guidance compute.

    precision: None: that of the caller.
    """

    def widen(_: nn.Module, __: object, heads: Heads) -> Heads:
        return tuple(head.float() if head.dtype == torch.bfloat16 else head for head in heads)

    hook = net.register_forward_hook(widen)
    try:
        with using(precision, device) if precision else nullcontext():
            yield
    finally:
        hook.remove()
