"""A trained net with all that its samples depend on: `Sampler`. `sampler_of` makes it of a run and a net.

`Sampler.batches` makes a rank's share of the samples, batch by batch, through the net's `Flow`, and decodes them;
`Sampler.sample` gathers those of all ranks on rank 0, and `Sampler.file_rows` as files hold them. Sample i depends on
the seed, i and its condition, not on ranks or batches.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dumo.config.conditions import Conditions, shown_data
from dumo.config.spec import Run, Sampling
from dumo.data import Data, Latents
from dumo.data.pixel import Size
from dumo.encoders.codec import LoadedCodec
from dumo.flow import sampling
from dumo.flow.guide import CFG
from dumo.flow.module import Flow
from dumo.flow.precision import Precision
from dumo.flow.reading import available_readings
from dumo.flow.solver import Solver
from dumo.io import picture
from dumo.io.picture import PixelRows, Points
from dumo.nets.rows import Texts
from dumo.runtime import dist
from dumo.runtime.progress import Bar, no_bar
from dumo.training.spec import Train
from dumo.types import Readings, Sample, UserError

Decoded = Float[Tensor, "b *pixels"]  # images, or samples as the net makes them


@dataclass(frozen=True)
class Sampler:
    """A net and its objective, and how samples are made of them by default."""

    flow: Flow
    data: Data
    spec: Sampling
    rows: int = sampling.BATCH  # of a pass
    size: Size | None = None  # one of the data's buckets; None: the square

    @property
    def net(self) -> nn.Module:
        """The net."""
        return self.flow.net

    @property
    def precision(self) -> Precision:
        """The precision of the net's passes; decoders stay in float32."""
        assert self.flow.precision is not None, "a run has a precision"
        return self.flow.precision

    @property
    def device(self) -> torch.device:
        """Where the net is."""
        return self.flow.device

    @property
    def conditions(self) -> Conditions:
        """The classes or captions of the data."""
        return Conditions(self.data)

    @property
    def pixels(self) -> tuple[int, ...]:
        """The shape of what is shown: a decoded image, or a sample of the net."""
        return (3, *self.size) if self.size else shown_data(self.data).shape

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what the net makes."""
        if self.size is None:
            return self.data.shape
        if isinstance(self.data, Latents):
            return self.data.codec.shape(*self.size)
        return self.pixels

    @property
    def is_image(self) -> bool:
        """Whether a sample is an image, for a sheet, rather than a point, for a scatter."""
        return len(self.pixels) == 3

    @property
    def available_readings(self) -> Readings:
        """The readings that the objective teaches, of no net: for checks."""
        return available_readings(self.flow.objective)

    @cached_property
    def codec(self) -> LoadedCodec | None:
        """The codec that decodes what the net makes, with its weights; None where nothing is decoded.

        Raises UserError where they are missing or others than those meant.
        """
        return self.data.codec.open(self.device) if isinstance(self.data, Latents) else None

    def decode(self, x: Sample) -> Decoded:
        """What the net makes as images in [-1, 1], on the CPU; x itself where there is no codec. Raises as `codec`."""
        return x if self.codec is None else self.codec.decode(x).cpu()

    @property
    def texts(self) -> Texts | None:
        """The part of the net that has a row for every condition."""
        for module in self.net.modules():
            if isinstance(module, Texts):
                return module
        return None

    @property
    def prompts(self) -> dict[str, int]:
        """The prompts so far, and their conditions."""
        return self.texts.prompts if self.texts else {}

    def batches(
        self,
        c: Int64[Tensor, " n"],
        *,
        nfe: int,
        seed: int | None = None,
        solver: Solver | None = None,
        indices: Sequence[int] | None = None,
        guide: CFG | None = None,
        z: Sample | None = None,
    ) -> Iterator[sampling.Batch]:
        """One sample per condition, decoded, batch by batch: those numbered `indices`, or this rank's share of all.

        Image i always comes from stream (seed, i), and begins with row i of z, if that is given. Raises UserError for a
        class out of range, and as the solver does.
        """
        self._require_known(c)
        if indices is None:
            indices = range(dist.rank(), len(c), dist.world())
        rows = torch.tensor(indices, dtype=torch.long)
        batches = sampling.sample_batches(
            self.net,
            self.flow.readings(guide=guide),
            self.flow.path,
            solver or self.spec.solver,
            c[rows],
            nfe=nfe,
            seed=self.spec.seed if seed is None else seed,
            shape=self.shape,
            indices=indices,
            batch=self.rows,
            device=self.device,
            precision=self.precision,
            z=None if z is None else z[rows],
        )
        return (replace(batch, x=self.decode(batch.x)) for batch in batches)

    def sample(
        self,
        c: Int64[Tensor, " n"],
        *,
        nfe: int,
        seed: int | None = None,
        solver: Solver | None = None,
        guide: CFG | None = None,
        z: Sample | None = None,
        bar: Bar = no_bar,
    ) -> sampling.Samples:
        """One sample per condition, decoded, image i always from stream (seed, i). Takes and raises as `batches`.

        Several ranks share the work, and each must call it. Rank 0 gets all samples, the others none: x (0, *pixels).
        """
        solver = solver or self.spec.solver
        batches = self.batches(c, nfe=nfe, seed=seed, solver=solver, guide=guide, z=z)
        own_batches = list(_with_progress(batches, bar, f"sampling, {solver.kind} at {nfe}", len(c)))
        return gather_samples(own_batches, self.pixels)

    def file_rows(self, c: Int64[Tensor, " n"], *, nfe: int, bar: Bar = no_bar) -> PixelRows | Points:
        """One sample per condition by the sampler's own spec, as `to_file_rows`, gathered as `sample` does.

        Of images no more than a batch is held as floats. Raises UserError as `batches` and `to_file_rows`.
        """
        no_rows = self.to_file_rows(torch.zeros(0, *self.pixels))
        batches = self.batches(c, nfe=nfe)
        indices: list[Tensor] = []
        rows: list[Tensor] = []
        for batch in _with_progress(batches, bar, f"sampling, {self.spec.solver.kind} at {nfe}", len(c)):
            indices.append(batch.index)
            rows.append(self.to_file_rows(batch.x))
        return _gather_in_order(indices, rows, no_rows)

    def to_file_rows(self, x: Decoded) -> PixelRows | Points:
        """Samples as files hold them: images as colours (n, h, w, 3), points as they are.

        Raises UserError for what has no colour.
        """
        return x if len(self.pixels) == 1 else picture.to_rows(x)

    def _require_known(self, c: Int64[Tensor, " n"]) -> None:
        """Raise UserError for a condition that is no class, not the number that stands for none, and no prompt."""
        num_classes = self.data.classes
        highest = max(self.prompts.values(), default=num_classes)
        out_of_range = c[(c < 0) | (c > highest)]
        if not len(out_of_range):
            return
        problem = f"class {int(out_of_range[0])} is out of range"
        if num_classes:
            raise UserError(f"{problem}: classes run from 0 to {num_classes - 1}, {num_classes} is no class")
        raise UserError(f"{problem}: these data have none, so c is 0")


def sampler_of(run: Run, net: nn.Module) -> Sampler:
    """A run's net with all that its samples depend on, made with no more rows at a time than it was trained with."""
    flow = Flow(
        net,
        run.objective,
        direct=True,
        classes=run.data.classes,
        path=run.path,
        guide=run.sample.guide,
        knobs=run.sample.knobs,
        precision=run.precision,
    )
    return Sampler(flow, run.data, run.sample, max_rows_per_pass(run.train))


def max_rows_per_pass(train: Train) -> int:
    """How many rows a pass that makes samples takes, at most: no more than one in training."""
    return min(sampling.BATCH, train.micro_batch or train.batch)


def rank_indices(count: int) -> range:
    """The numbers of the samples, of `count`, that this rank makes.

    All ranks make equally many, so the last number may be beyond them.
    """
    rounds = -(-count // dist.world())
    return range(dist.rank(), rounds * dist.world(), dist.world())


def _with_progress(batches: Iterable[sampling.Batch], bar: Bar, label: str, count: int) -> Iterator[sampling.Batch]:
    """Yield this rank's batches, and show how many of the `count` samples are done, if the other ranks are as far."""
    num_done = 0
    with bar(label, count) as tick:
        for batch in batches:
            yield batch
            num_done += len(batch.x) * dist.world()
            tick(min(num_done, count), "")


def gather_samples(own_batches: Sequence[sampling.Batch], pixels: Sequence[int]) -> sampling.Samples:
    """What all ranks made, on rank 0, in the order of their numbers; some may have made none. The others get no rows.

    Every rank must call it. `pixels` is the shape of a sample.
    """
    indices = [batch.index for batch in own_batches]
    x = _gather_in_order(indices, [batch.x for batch in own_batches], torch.zeros(0, *pixels))
    passes = torch.tensor([batch.nfe for batch in own_batches], dtype=torch.long)
    passes = torch.cat(dist.all_gather(passes))
    return sampling.Samples(x, int(passes.unique().item()))


def _gather_in_order(own_indices: Sequence[Tensor], own_rows: Sequence[Tensor], no_rows: Tensor) -> Tensor:
    """The rows of all ranks' batches on rank 0, in the order of their numbers; `no_rows` (0, ...) on the others."""
    rows = torch.cat([no_rows, *own_rows])
    if dist.world() == 1:
        return rows  # its numbers rise; a sorted copy would take as much memory again
    no_index = torch.zeros(0, dtype=torch.long)
    index = torch.cat([no_index, *own_indices])
    index = torch.cat([no_index, *dist.gather(index)])
    rows = torch.cat([no_rows, *dist.gather(rows)])
    return rows[index.argsort()]
