"""Images by number: image i of a seed is one thing, whatever batch it is made in, and the net counts its own passes."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Set
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int, Int64
from torch import Tensor, nn

from dumo.flow.path import Path
from dumo.flow.precision import Precision, using
from dumo.flow.solver import Fresh, Solver, Stepper
from dumo.runtime import threads
from dumo.runtime.bound import SAMPLES
from dumo.runtime.random import noise
from dumo.types import Array, Cond, Heads, Reads, Sample, Trail, UserError

ROWS = 256  # images made at a time, at most: ours


@dataclass(frozen=True)
class Samples:
    """What was generated: x in float32 on the CPU, and the passes each row made through the net."""

    x: Sample
    nfe: int


@dataclass(frozen=True)
class Batch:
    """Some of the samples: their numbers (n,), x in float32 on the CPU, and the passes each row made."""

    index: Int64[Tensor, " n"]
    x: Sample
    nfe: int


class Draws:
    """The noise of batches that are made in this order, each given by the numbers of its images; drawn ahead.

    While a net works on a batch, a thread draws for the next one what this one has drawn. Noise is a function of (seed,
    image, draw), so who draws it and when changes nothing in it.
    """

    def __init__(
        self,
        thread: Executor,
        batches: Sequence[Sequence[int]],
        *,
        seed: int,
        shape: Sequence[int],
        device: torch.device | str,
    ) -> None:
        """Of this seed and shape, for a net on this device."""
        self.thread, self.batches, self.seed, self.shape = thread, batches, seed, shape
        self.device = torch.device(device)
        self.coming: dict[tuple[int, int], Future[Sample]] = {}

    def __call__(self, batch: int, k: int) -> Sample:
        """Draw k of a batch's images, on the device."""
        ready = self.coming.pop((batch, k), None)
        if batch + 1 < len(self.batches):
            self.coming[batch + 1, k] = self.thread.submit(self._draw, batch + 1, k)
        z = ready.result() if ready else self._draw(batch, k)
        return z.to(self.device, non_blocking=True)

    def _draw(self, batch: int, k: int) -> Sample:
        z = noise(self.seed, self.batches[batch], k, self.shape)
        return z.pin_memory() if self.device.type == "cuda" else z  # from where a GPU fetches it by itself


def generate(
    net: nn.Module,
    reads: Reads,
    path: Path,
    solver: Solver,
    c: Cond,
    *,
    nfe: int,
    seed: int,
    shape: Sequence[int],
    indices: Sequence[int] | None = None,
    batch: int = ROWS,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    on_batch: Callable[[int], object] | None = None,
) -> Samples:
    """All of `batches` in one; `on_batch` is called with the number of images made so far. Raises as that does."""
    parts = batches(
        net,
        reads,
        path,
        solver,
        c,
        nfe=nfe,
        seed=seed,
        shape=shape,
        indices=indices,
        batch=batch,
        device=device,
        precision=precision,
    )
    return joined(parts, on_batch)


def batches(
    net: nn.Module,
    reads: Reads,
    path: Path,
    solver: Solver,
    c: Cond,
    *,
    nfe: int,
    seed: int,
    shape: Sequence[int],
    indices: Sequence[int] | None = None,
    batch: int = ROWS,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    z: Sample | None = None,
) -> Iterator[Batch]:
    """Make one image of `shape` per row of c: those numbered `indices` (None: from 0), `batch` at a time on `device`.

    `reads` is a reading of `net`, which stays where it is and is in evaluation mode meanwhile; `precision` is that of
    its passes, and what a solver makes of them is in float32. An image begins with its row of z, or the noise of its
    number; noise that a solver adds later is always that of its number. Raises UserError if the solver cannot serve the
    reading or nfe, ValueError if there are more or fewer indices than rows of c, Stopped once a stop is asked for,
    between two passes.
    """
    indices = range(len(c)) if indices is None else indices
    if len(indices) != len(c):
        raise ValueError(f"{len(indices)} images for {len(c)} rows of c: give one index a row")

    parts = [indices[first : first + batch] for first in range(0, len(c), batch)]
    with ThreadPoolExecutor(1, thread_name_prefix="noise") as thread:
        draws = Draws(thread, parts, seed=seed, shape=shape, device=device)
        for i, (some, c_some) in enumerate(zip(parts, c.split(batch), strict=True)):
            threads.check()
            fresh = partial(draws, i) if z is None else partial(begun, z[i * batch :][:batch].to(device), draws, i)
            with evaluating(net), counting(net) as passed, passing(net, precision, device):
                _, x = carried(reads, path, solver, c_some.to(device), nfe, fresh)
            yield Batch(torch.tensor(some), x.cpu(), _agreed({sum(passed) / len(some)}))


def begun(z: Sample, draws: Draws, batch: int, k: int) -> Sample:
    """Draw k of a batch's images, of which draw 0 is z."""
    return draws(batch, k) if k else z


def solve(
    reads: Reads,
    path: Path,
    solver: Solver,
    c: Cond,
    *,
    nfe: int,
    seed: int,
    shape: Sequence[int],
    indices: Sequence[int],
) -> tuple[Sample, Sample]:
    """The noise of the images of these numbers, and what the solver makes of it, in float32 where c is.

    Raises UserError if the solver cannot serve the reading or nfe.
    """

    def fresh(k: int) -> Sample:
        return noise(seed, indices, k, shape).to(c.device)

    return carried(reads, path, solver, c, nfe, fresh)


@torch.no_grad()
def carried(reads: Reads, path: Path, solver: Solver, c: Cond, nfe: int, fresh: Fresh) -> tuple[Sample, Sample]:
    """Draw 0, and what the solver makes of it, in float32. Raises UserError as the solver does."""
    z = fresh(0)
    return z, path.sd * solver(reads, path, path.spread * z, c, nfe, fresh).float()


@torch.no_grad()
def trailed(
    reads: Reads, path: Path, solver: Stepper, z: Sample, c: Cond, *, nfe: int, points: int
) -> tuple[Sample, Trail]:
    """What the solver makes of noise z, and where it is between at the ends of `points` equal steps, data first.

    In float32; what is between is of the path, and so in units of its sd. Raises UserError as the solver does.
    """
    every = nfe // solver.passes // points
    xs = [x.float() for k, x in enumerate(solver.trail(reads, path.spread * z, c, nfe), start=1) if k % every == 0]
    return path.sd * xs[-1], torch.stack(xs[-2::-1], 1)


def joined(parts: Iterable[Batch], on_batch: Callable[[int], object] | None = None) -> Samples:
    """Batches, in their order, as one; `on_batch` is called with the number of images so far as each comes."""
    done, count = list[Batch](), 0
    for part in parts:
        done.append(part)
        count += len(part.x)
        if on_batch is not None:
            on_batch(count)
    return Samples(torch.cat([part.x for part in done]), _agreed({part.nfe for part in done}))


def labels(n: int, classes: int, only: Sequence[int] | None = None) -> Int[Tensor, " n"]:
    """A class for each of n images: 0, 1, ... in turn, or `only` in turn; zeros where there are no classes.

    Raises UserError for a label outside [0, classes), or no image at all.
    """
    if not 1 <= n <= SAMPLES:
        raise UserError(f"{n:,} images cannot be made at once: ask for 1 to {SAMPLES:,}, for more with another --seed")
    wrong = [label for label in only or () if not 0 <= label < classes]
    if wrong:
        there = f"labels run from 0 to {classes - 1}" if classes else "this model has no classes, so give no labels"
        raise UserError(f"label {wrong[0]} is out of range: {there}")
    turn = torch.tensor(only or range(max(classes, 1)))
    return turn[torch.arange(n) % len(turn)]


@contextmanager
def counting(net: nn.Module) -> Generator[list[int], None, None]:
    """Yield a list to which every pass through the net adds its number of rows."""
    passed: list[int] = []

    def note(_: nn.Module, inputs: tuple[Array, ...], __: object) -> None:
        passed.append(len(inputs[0]))

    hook = net.register_forward_hook(note)
    try:
        yield passed
    finally:
        hook.remove()


@contextmanager
def passing(net: nn.Module, precision: Precision, device: torch.device | str) -> Generator[None, None, None]:
    """Make the net's passes in a precision; what it answers is float32, in which solvers and guidance add up."""

    def widen(_: nn.Module, __: object, heads: Heads) -> Heads:
        return tuple(head.float() if head.dtype == torch.bfloat16 else head for head in heads)

    hook = net.register_forward_hook(widen)
    try:
        with using(precision, device):
            yield
    finally:
        hook.remove()


@contextmanager
def evaluating(net: nn.Module) -> Generator[None, None, None]:
    """Hold the net in evaluation mode, then give every part of it its own mode back."""
    modes = [(part, part.training) for part in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _agreed(counts: Set[float] | Set[int]) -> int:
    """The one whole number of passes that every row made. Anything else is a defect of the reading."""
    count = min(counts)
    if len(counts) > 1 or not float(count).is_integer():
        raise RuntimeError(f"rows went unequally often through the net: {sorted(counts)} times, by batch")
    return int(count)
