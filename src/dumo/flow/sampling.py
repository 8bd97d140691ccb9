"""Sample in batches. Image i of a seed does not depend on its batch.

`sample_batches` yields the batches for `dumo.Flow` and for runs, and `join_batches` joins them. For each batch, it sets
the network to evaluation mode (`eval_mode`) and to a precision (`in_precision`), counts its passes (`counting_passes`),
and runs the solver (`integrate`).

For a teacher's pairs, `sample_with_noise` returns the noise as well, and `sample_trajectory` the points between.
`labels_in_turn` assigns a class to each image.
"""

import copy
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

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

# The default batch size.
BATCH = 256


@dataclass(frozen=True)
class Samples:
    """Images or points x (n, *shape) in float32 on the CPU, and the number of passes per image."""

    x: Sample
    nfe: int


@dataclass(frozen=True)
class Batch:
    """A batch of samples: indices (n,), x (n, *shape) in float32 on the CPU, and the number of passes per image."""

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
    """Yield batches of images, one image per row of c.

    net: the network. It is in evaluation mode while a batch is computed, and its mode is restored afterwards.
    readings: the readings of `net` (`Flow.readings`).
    path: the solver starts from `path.initial_std` times noise, in units of `path.sd`.
    c: the conditions, (n, ...).
    nfe: passes through the network per image.
    seed: of the noise, together with the index of the image.
    shape: of an image.
    indices: the indices of the images, one per row of c; None means 0, 1, ...
    batch: the largest batch size.
    device: of the network.
    precision: of the passes; None means the caller's autocast. The solver computes in float32.
    z: initial noise, (n, *shape); None means to draw it from seed and index, as the noise that a solver adds.

    Raises UserError if the solver does not support the readings or nfe, ValueError if the number of indices is not n,
    and Stopped after a signal, between two passes.
    """
    if indices is None:
        indices = range(len(c))
    if len(indices) != len(c):
        raise ValueError(f"{len(indices)} indices for {len(c)} rows of c: pass one index per row")

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
        # FSDP2 does not reshard the root module after a pass without a backward pass, and the next optimizer step would
        # not update it.
        for part in dist.sharded_parts(net):
            part.reshard()


def join_batches(batches: Iterable[Batch]) -> Samples:
    """Concatenate the batches in order."""
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
    """Return the noise of the images `indices`, and the images, both (n, *shape) in float32 on the device of c.

    The mode and precision of the network are not changed. Raises UserError if the solver does not support the readings
    or nfe.
    """
    return integrate(readings, path, solver, c, nfe, _fresh_noise(seed, indices, shape, c.device))


def _fresh_noise(
    seed: int,
    indices: Sequence[int],
    shape: Sequence[int],
    device: torch.device | str,
    first_draw: Sample | None = None,
) -> Fresh:
    """Return a function that draws the noise of the images `indices` by draw number. `first_draw` replaces draw 0."""

    def fresh(draw: int) -> Sample:
        if draw == 0 and first_draw is not None:
            return first_draw
        return noise(seed, indices, draw, shape).to(device)

    return fresh


@torch.no_grad()
def sample_trajectory(
    readings: Readings, path: FlowPath, solver: Stepper, z: Sample, c: Cond, *, nfe: int, points: int
) -> tuple[Sample, Trail]:
    """Return the images of noise z, and the intermediate points of the trajectory at `points` equal time steps.

    Images (n, *shape) are in float32. The intermediate points (n, points - 1, *shape) are ordered from data to noise,
    in units of the path's sd.

    Raises ValueError unless `points` is at least 2 and divides the number of steps, and UserError if the solver does
    not support the readings or nfe.
    """
    num_steps = nfe // solver.passes
    if points < 2 or num_steps % points:
        raise ValueError(f"points={points} must be at least 2 and divide the {num_steps} steps of nfe={nfe}")
    every = num_steps // points
    trail = solver.trail(readings, path.initial_std * z, c, nfe)
    xs = [x.float() for step, x in enumerate(trail, start=1) if step % every == 0]
    # Reverse xs, which is ordered from noise to data.
    return path.sd * xs[-1], torch.stack(xs[-2::-1], 1)


@torch.no_grad()
def integrate(
    readings: Readings, path: FlowPath, solver: Solver, c: Cond, nfe: int, fresh: Fresh
) -> tuple[Sample, Sample]:
    """Run the solver, and return the initial noise and the images, both (n, *shape) in float32.

    fresh: `fresh(k)` is draw k of noise from N(0, I); draw 0 is the initial noise, and some solvers use more.

    The solver starts from `path.initial_std` times noise, in units of `path.sd`. Raises UserError if it does not
    support the readings or nfe.
    """
    z = fresh(0)
    x = solver(readings, path, path.initial_std * z, c, nfe, fresh)
    return z, path.sd * x.float()


def labels_in_turn(n: int, classes: int, only: Sequence[int] | None = None) -> Int[Tensor, " n"]:
    """Return a class for each of n images: 0, 1, ... in turn, or `only` in turn; zeros without classes.

    Raises UserError for a label outside [0, classes), and unless n is between 1 and SAMPLES.
    """
    if not 1 <= n <= SAMPLES:
        raise UserError(
            f"the number of images must be between 1 and {SAMPLES:,}, got {n:,}: use several seeds for more images"
        )
    for label in only or ():
        if not classes:
            raise UserError(f"label {label} is out of range: this model has no classes, remove the labels")
        if not 0 <= label < classes:
            raise UserError(f"label {label} is out of range: labels are 0 to {classes - 1}")
    turn = torch.tensor(only or range(max(classes, 1)))
    return turn[torch.arange(n) % len(turn)]


@contextmanager
def eval_mode(net: nn.Module, *, training: bool = False) -> Generator[None, None, None]:
    """Set the network to evaluation mode, or to training mode, and restore the mode of every module afterwards."""
    modes = [(module, module.training) for module in net.modules()]
    net.train(training)
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def copy_for_evaluation(net: nn.Module) -> nn.Module:
    """A copy of the network in evaluation mode, with the same parameters and buffers: they are not copied."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    return copy.deepcopy(net, memo).eval()


@contextmanager
def counting_passes(net: nn.Module) -> Generator[list[int], None, None]:
    """Yield a list to which every pass through the network appends its number of rows."""
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
    """Set the precision of the network's passes, and convert their outputs to float32 for solvers and guidance.

    precision: None means the caller's.
    """

    def widen(_: nn.Module, __: object, heads: Heads) -> Heads:
        return tuple(head.float() if head.dtype == torch.bfloat16 else head for head in heads)

    hook = net.register_forward_hook(widen)
    try:
        with using(precision, device) if precision else nullcontext():
            yield
    finally:
        hook.remove()
