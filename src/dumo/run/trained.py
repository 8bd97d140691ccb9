"""A trained run: `TrainedRun` holds a network with its weights, and samples it.

`dumo.run.weights.load_run` opens one from a folder, from a run that ships with dumo, or from the Hub. The trainer makes
one for sheets and validation. A TrainedRun is immutable, so sampling options are arguments.

`TrainedRun.sample` takes class names or prompts and returns images. `make_batches`, `make_samples` and `make_file_rows`
take condition numbers, which `conditions` returns. Sample i depends on the seed, i and its condition, not on ranks or
batches.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, SupportsIndex, get_args

import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Generator, Tensor, nn

from dumo.config.check_spec import check_guidance
from dumo.config.conditions import shown_data
from dumo.config.load import parse
from dumo.config.spec import Run, Sampling
from dumo.data import Data, Images, Latents
from dumo.data.pixel import Size
from dumo.encoders.codec import LoadedCodec
from dumo.flow import sampling
from dumo.flow.guide import CFG
from dumo.flow.module import Flow
from dumo.flow.solver import Solver
from dumo.io import picture
from dumo.io.picture import PixelRows, Points
from dumo.io.read import user_path
from dumo.io.tensor_files import sha256
from dumo.run.data import recorded_facts
from dumo.run.folder import RunFolder
from dumo.run.prompt_rows import conditions_of_prompts, names_of_conditions, texts_of
from dumo.runtime import dist
from dumo.runtime.progress import Bar, no_bar
from dumo.training.checkpoint import Checkpoint
from dumo.training.settings import Train
from dumo.types import Readings, Sample, UserError

# Decoded images, or samples of a network without a codec.
Decoded = Float[Tensor, "b *pixels"]
# Class numbers or class names.
Labels = SupportsIndex | str | Iterable[SupportsIndex | str] | Tensor
Output = Literal["pt", "np", "pil"]
_OUTPUTS: tuple[Output, ...] = get_args(Output)
DEFAULT_COUNT = 100


@dataclass(frozen=True, repr=False, eq=False)
class TrainedRun:
    """A run with its weights. `dumo.cli.api.LoadedRun` adds evaluation, reports and export for Python users.

    spec: the config of the trained run, with the overrides applied
    run_folder: the folder that it was read from, or is trained in
    net: the network that is sampled (the first average), in evaluation mode: `net(x, c, t=t)` returns its heads
    step: the training step of its weights

    The remaining fields record where the weights were read, and keep their defaults during training.
    """

    spec: Run
    run_folder: RunFolder
    net: nn.Module
    step: int = 0
    # The name and path of the weights file, or of the weights in a checkpoint. A name in the run's folder is
    # relative to it.
    weights: str = ""
    file: Path = Path()
    # The newest whole checkpoint, even if another weights file was given.
    checkpoint: Checkpoint | None = None
    # The SHA-256 of the weights as listed in the checkpoint.
    listed_sha256: str | None = None
    # The arguments of `load_run`: fields a.b=c, and a weights file.
    overrides: tuple[str, ...] = ()
    given_weights: str | None = None
    # For a read-only run, which ships with dumo or is on the Hub: the output folder, and the name that opens it again.
    own_output: Path | None = None
    lasting_name: str | None = None

    def __repr__(self) -> str:
        """Return a one-line summary."""
        run = self.spec
        parts = f"{run.objective.kind} on {run.data.kind}, net {run.net.kind}"
        return f"<dumo run {self.folder}: {parts}, step {self.step:,}, on {self.device}>"

    # -------------------------------------------------------------------------------------------------- on the disk

    @property
    def folder(self) -> Path:
        """The folder that commands write to: the run's folder, or for a read-only run one in the current folder.

        Files are read from `run_folder.path`.
        """
        return self.own_output or self.run_folder.path

    @property
    def is_only_read(self) -> bool:
        """Whether the run ships with dumo, or is on the Hub."""
        return self.own_output is not None

    @property
    def source(self) -> str | Path:
        """The argument that opens this run again: its folder, or the name of a read-only run."""
        return self.lasting_name or self.run_folder.path

    def find_output(self, name: str) -> Path:
        """Return the path of this file in `folder` if it exists, and otherwise in the run's folder."""
        file = self.folder / name
        return file if file.is_file() else self.run_folder.path / name

    @property
    def spec_as_saved(self) -> Run:
        """The config of the run in its folder, without overrides."""
        return self.run_folder.run or self.spec

    @property
    def data_sd(self) -> float | None:
        """The standard deviation of the data, measured in training."""
        facts = recorded_facts(self.spec_as_saved)
        return facts.sd if facts else None

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the weights.

        The hash listed in the checkpoint stays available after a concurrent training has removed the checkpoint.
        """
        return self.listed_sha256 or sha256(self.file)

    # ---------------------------------------------------------------------------------------------------- properties

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self.flow.device

    @cached_property
    def flow(self) -> Flow:
        """The network and the objective, with the guidance, knobs and precision for sampling."""
        run = self.spec
        return Flow(
            self.net,
            run.objective,
            # dumo networks need no adapter.
            direct=True,
            classes=run.data.classes,
            path=run.path,
            guide=run.sample.guide,
            knobs=run.sample.knobs,
            precision=run.precision,
        )

    @cached_property
    def readings(self) -> Readings:
        """The functions that a solver calls, on the run's device; None for those that the objective does not train.

        `velocity(x_t, t, c)` is dx_t/dt, `endpoint(x_t, t, c)` is x_0, `flow_map(x_t, t, s, c)` is x_s, all in units
        of `spec.path.sd`. Knobs and guidance come from `spec.sample`; gradients are recorded.
        """
        return self.flow.readings()

    @cached_property
    def codec(self) -> LoadedCodec | None:
        """The autoencoder that decodes latents; None if the network generates images or points directly.

        Raises UserError if its weights are missing or differ from those used in training.
        """
        data = self.spec.data
        return data.codec.open(self.device) if isinstance(data, Latents) else None

    def decode(self, x: Sample) -> Decoded:
        """Decode latents to images in [-1, 1] on the CPU; return x itself if there is no codec."""
        return x if self.codec is None else self.codec.decode(x).cpu()

    @property
    def rows_per_pass(self) -> int:
        """The maximum batch size for sampling, at most that of training."""
        return max_rows_per_pass(self.spec.train)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names (or captions) by number, as accepted by `sample(labels=...)`; () if the run has none."""
        conditions = self.spec.conditions
        return conditions.words or tuple(str(number) for number in range(conditions.count))

    @property
    def makes_images(self) -> bool:
        """Whether a sample is an image, not a point."""
        return len(self.spec.shown_shape) == 3

    def pil(self, images: Sample) -> list[Image.Image]:
        """Convert images (n, 1 or 3, height, width) in [-1, 1] to PIL images. Raise UserError for points."""
        if not self.makes_images:
            kind = self.spec.data.kind
            raise UserError(f"data '{kind}' has points of shape {self.spec.shown_shape}, not images: plot them instead")
        is_grey = images.ndim == 4 and images.shape[1] == 1
        pictures = [Image.fromarray(pixels.numpy()) for pixels in picture.to_rows(images)]
        if is_grey:
            return [image.convert("L") for image in pictures]
        return pictures

    # -------------------------------------------------------------------------------------------------------- sampling

    def sample(
        self,
        labels: Labels | None = None,
        count: SupportsIndex | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        source: str | Path | None = None,
        nfe: SupportsIndex | None = None,
        seed: SupportsIndex | None = None,
        solver: Solver | str | None = None,
        guidance: float | None = None,
        noise: Tensor | None = None,
        generator: Generator | None = None,
        size: str | None = None,
        output: Output = "pt",
        bar: Bar = no_bar,
    ) -> Any:  # noqa: ANN401, by `output`
        """Generate `count` samples: images or points.

        `labels` are class numbers or names, used in turn; None means all classes. A str that names no class is read as
        a class number. For a run trained on captions, pass `prompts` instead, and for a run trained on edits also the
        image file `source` to edit. `count` defaults to the number of labels or prompts, or to 100. `nfe` is the number
        of function evaluations, and `guidance` the scale w (1 disables it); these, the seed and the solver default to
        those of the run. Sample i depends only on the seed, its class and i. `noise` (n, *data shape) replaces the
        initial noise, and a `generator` draws the seed. `size`, such as "320x192" (width x height), is one of the
        buckets that the run was trained on; None means the square. Every rank must call it, and only rank 0 gets the
        samples.

            output="pt"     float32 on the CPU: images (n, channels, height, width) in [-1, 1], or points (n, d)
            output="np"     a numpy array: images (n, height, width, channels) in [0, 1], or points
            output="pil"    a list of PIL images

        Raise UserError if the arguments contradict each other or the run.
        """
        if output not in _OUTPUTS:
            raise UserError(f"unknown output '{output}': use one of {', '.join(_OUTPUTS)}")
        if generator is not None:
            if seed is not None or noise is not None:
                raise UserError("generator cannot be combined with seed or noise: give only one")
            seed = int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device))
        height_width = parse_size(self.spec.data, size)
        shape = net_shape(self.spec.data, height_width)
        count = None if count is None else operator.index(count)
        if noise is not None:
            if noise.shape[1:] != shape or not len(noise):
                raise UserError(f"noise has shape {tuple(noise.shape)}: it must be (n, {', '.join(map(str, shape))})")
            if count not in (None, len(noise)):
                raise UserError(f"count = {count}, but noise has {len(noise)} rows: remove count")
            count = len(noise)
        x = self.make_samples(
            self.conditions(labels, count, prompts=prompts, source=source),
            nfe=operator.index(self.spec.sample.nfe[0] if nfe is None else nfe),
            seed=None if seed is None else operator.index(seed),
            solver=choose_solver(self.spec.sample, solver),
            guide=None if guidance is None else self.guide_of(guidance),
            noise=None if noise is None else noise.float().cpu(),
            size=height_width,
            bar=bar,
        ).x
        if self.makes_images:
            x = x.clamp(-1, 1)
        if output == "pil":
            return self.pil(x)
        if output == "np":
            return ((x.permute(0, 2, 3, 1) + 1) / 2).numpy() if self.makes_images else x.numpy()
        return x

    # ------------------------------------------------------------------------------------------ samples by condition

    def conditions(
        self,
        labels: Labels | None = None,
        count: int | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        source: str | Path | None = None,
    ) -> Int64[Tensor, " n"]:
        """Return the condition number of each sample. The arguments are those of `sample`.

        Prompts keep their numbers as long as the run is open.
        """
        if prompts is not None and labels is not None:
            raise UserError("prompts and labels cannot be combined: give only one")
        if source is not None and prompts is None:
            raise UserError("source needs prompts that describe the edit: add prompts")
        # The samples cycle through these labels or prompts, or through all classes if it is empty.
        given: list[Any] = []
        if prompts is not None:
            given = [prompts] if isinstance(prompts, str) else [*prompts]
        elif labels is not None:
            given = [*as_several(labels)]
            if not given:
                raise UserError("labels is empty: give at least one, or remove it to use all labels")
        if count is None:
            count = len(given) or DEFAULT_COUNT
        require_count(count, given, "labels" if prompts is None else "prompts")
        if prompts is not None:
            file = user_path(source, "source") if isinstance(source, str) else source
            c = conditions_of_prompts(self.net, self.spec.data, given, file)
            return c[torch.arange(count) % len(c)]
        conditions = self.spec.conditions
        numbers = [conditions.index(label) if isinstance(label, str) else operator.index(label) for label in given]
        return conditions.in_turn(count, numbers)

    def names_of_conditions(self, c: Int64[Tensor, " n"]) -> list[str]:
        """Return the class name, caption or prompt of each condition."""
        return names_of_conditions(self.net, self.spec.data, c)

    def guide_of(self, scale: object) -> CFG:
        """Return the run's guidance with another scale.

        Raise UserError if the scale is invalid or the network cannot be guided.
        """
        run = self.spec
        guide_fields = run.sample.guide.model_dump()
        guide_fields["scale"] = scale
        fields = run.sample.model_dump(mode="json")
        fields["guide"] = guide_fields
        try:
            guide = parse(Sampling, fields).guide
        except UserError as error:
            # Name the argument of `sample` instead of the field.
            raise UserError(str(error).replace("guide.scale", "guidance")) from error
        check_guidance(guide, run.data, run.objective, run.training_guidance, "guidance")
        return guide

    def make_batches(
        self,
        c: Int64[Tensor, " n"],
        *,
        nfe: int,
        seed: int | None = None,
        solver: Solver | None = None,
        guide: CFG | None = None,
        noise: Sample | None = None,
        size: Size | None = None,
        indices: Sequence[int] | None = None,
        decodes: bool = True,
    ) -> Iterator[sampling.Batch]:
        """Yield batches of samples, one sample per condition: those numbered `indices`, or by default this rank's.

        All ranks generate the same number of samples, as sharded weights require; surplus samples are not yielded.
        Seed, solver and guidance default to those of the run. Sample i always uses stream (seed, i), and starts from
        row i of `noise` (n, *shape) if given. With `decodes`, latents are decoded to images. Raise UserError if a class
        is out of range.
        """
        self._require_known(c)
        if indices is None:
            indices = rank_indices(len(c))
        rows = torch.tensor(indices, dtype=torch.long) % len(c)
        spec = self.spec.sample
        batches = sampling.sample_batches(
            self.net,
            self.flow.readings(guide=guide),
            self.spec.path,
            solver or spec.solver,
            c[rows],
            nfe=nfe,
            seed=spec.seed if seed is None else seed,
            shape=net_shape(self.spec.data, size),
            indices=indices,
            batch=self.rows_per_pass,
            device=self.device,
            precision=self.spec.precision,
            z=None if noise is None else noise[rows],
        )

        def finish(batch: sampling.Batch) -> sampling.Batch:
            x = self.decode(batch.x) if decodes else batch.x
            is_asked = batch.index < len(c)
            return replace(batch, x=x) if is_asked.all() else replace(batch, index=batch.index[is_asked], x=x[is_asked])

        return map(finish, batches)

    def make_samples(
        self,
        c: Int64[Tensor, " n"],
        *,
        nfe: int,
        seed: int | None = None,
        solver: Solver | None = None,
        guide: CFG | None = None,
        noise: Sample | None = None,
        size: Size | None = None,
        bar: Bar = no_bar,
    ) -> sampling.Samples:
        """Generate one decoded sample per condition. The arguments are those of `make_batches`.

        Every rank must call it. Rank 0 gets all samples, and the other ranks get x of shape (0, *pixels).
        """
        solver = solver or self.spec.sample.solver
        batches = self.make_batches(c, nfe=nfe, seed=seed, solver=solver, guide=guide, noise=noise, size=size)
        own_batches = list(_with_progress(batches, bar, f"sampling, {solver.kind} at {nfe}", len(c)))
        return gather_samples(own_batches, _shown_shape(self.spec, size))

    def make_file_rows(
        self,
        c: Int64[Tensor, " n"],
        *,
        nfe: int,
        seed: int | None = None,
        solver: Solver | None = None,
        size: Size | None = None,
        bar: Bar = no_bar,
    ) -> PixelRows | Points:
        """Generate one sample per condition in the format of `to_file_rows`, gathered as in `make_samples`.

        Each batch is converted at once, so that only one batch of images is held in float32.
        """
        solver = solver or self.spec.sample.solver
        no_rows = self.to_file_rows(torch.zeros(0, *_shown_shape(self.spec, size)))
        batches = self.make_batches(c, nfe=nfe, seed=seed, solver=solver, size=size)
        indices: list[Tensor] = []
        rows: list[Tensor] = []
        for batch in _with_progress(batches, bar, f"sampling, {solver.kind} at {nfe}", len(c)):
            indices.append(batch.index)
            rows.append(self.to_file_rows(batch.x))
        return _gather_in_order(indices, rows, no_rows)

    def to_file_rows(self, x: Decoded) -> PixelRows | Points:
        """Convert samples to their file format: images to uint8 (n, h, w, 3); points are unchanged.

        Raise UserError for images that are neither grey nor RGB.
        """
        return x if len(self.spec.shown_shape) == 1 else picture.to_rows(x)

    def _require_known(self, c: Int64[Tensor, " n"]) -> None:
        """Raise UserError for a condition that is neither a class, the unconditional number, nor a prompt."""
        num_classes = self.spec.data.classes
        texts = texts_of(self.net)
        highest = max(texts.prompts.values(), default=num_classes) if texts else num_classes
        out_of_range = c[(c < 0) | (c > highest)]
        if not len(out_of_range):
            return
        problem = f"class {int(out_of_range[0])} is out of range"
        if num_classes:
            raise UserError(f"{problem}: classes are 0 to {num_classes - 1}, and {num_classes} is the null class")
        raise UserError(f"{problem}: this data has no classes, so use c = 0")


# ------------------------------------------------------------------------------------------------- options of a sample


def choose_solver(spec: Sampling, solver: Solver | str | None) -> Solver:
    """Resolve a solver or its name. The spec's solver is used for None and for its name, defaults for other names.

    Raise UserError for an unknown name.
    """
    if solver in (None, spec.solver.kind):
        return spec.solver
    if not isinstance(solver, str):
        return solver
    return parse(Sampling, {"solver": {"kind": solver}}).solver


def parse_size(data: Data, text: str | None) -> Size | None:
    """Parse a size such as '320x192' (width x height in pixels); None stands for the square.

    Raise UserError for a size that the net was not trained on.
    """
    if text is None:
        return None
    images = shown_data(data)
    trained_sizes = ()
    if isinstance(images, Images):
        trained_sizes = images.sizes or (images.shape[1:],)
    size_by_text = {f"{width}x{height}": (height, width) for height, width in trained_sizes}
    if text in size_by_text:
        return size_by_text[text]
    sizes = ", ".join(size_by_text) or "none, because its data are not images"
    raise UserError(f"the network was not trained on size {text} (width x height): choose one of its sizes, {sizes}")


def require_count(count: int, conditions: Sequence[object], noun: str) -> None:
    """Raise UserError if `count` is less than the number of conditions. `noun` names them in the message."""
    if count < len(conditions):
        raise UserError(f"count = {count} is less than the {len(conditions)} {noun}: raise count, or give fewer {noun}")


def net_shape(data: Data, size: Size | None) -> tuple[int, ...]:
    """Return the shape of a network's samples for images of this size; None stands for the square."""
    if size is None:
        return data.shape
    return data.codec.shape(*size) if isinstance(data, Latents) else (3, *size)


def _shown_shape(run: Run, size: Size | None) -> tuple[int, ...]:
    """Return the shape of decoded samples of this size; None stands for the square."""
    return run.shown_shape if size is None else (3, *size)


def as_several(values: Any) -> Iterable[Any]:  # noqa: ANN401, one of what it holds, or many
    """Return an iterable of values as it is, and a single value (also a str or a 0-d tensor) as a list of one."""
    # A 0-d tensor is an instance of Iterable, but iterating over it fails.
    is_one_number = getattr(values, "ndim", None) == 0
    if isinstance(values, str) or is_one_number or not isinstance(values, Iterable):
        return [values]
    return values


# ------------------------------------------------------------------------------------------------------- several ranks


def max_rows_per_pass(train: Train) -> int:
    """Return the maximum batch size for sampling, at most that of training."""
    return min(sampling.BATCH, train.micro_batch or train.batch)


def rank_indices(count: int) -> range:
    """Return the indices, among `count` samples, that this rank generates.

    All ranks generate the same number of samples, so the last index may exceed `count - 1`.
    """
    rounds = -(-count // dist.world())
    return range(dist.rank(), rounds * dist.world(), dist.world())


def _with_progress(batches: Iterable[sampling.Batch], bar: Bar, label: str, count: int) -> Iterator[sampling.Batch]:
    """Yield this rank's batches, and show progress out of `count`, assuming that all ranks are equally fast."""
    num_done = 0
    with bar(label, count) as tick:
        for batch in batches:
            yield batch
            num_done += len(batch.x) * dist.world()
            tick(min(num_done, count), "")


def gather_samples(own_batches: Sequence[sampling.Batch], pixels: Sequence[int]) -> sampling.Samples:
    """Gather the samples of all ranks on rank 0, in the order of their indices. The other ranks get no rows.

    Every rank must call it, even if it has no batches. `pixels` is the shape of a sample.
    """
    indices = [batch.index for batch in own_batches]
    x = _gather_in_order(indices, [batch.x for batch in own_batches], torch.zeros(0, *pixels))
    passes = torch.tensor([batch.nfe for batch in own_batches], dtype=torch.long)
    passes = torch.cat(dist.all_gather(passes))
    return sampling.Samples(x, int(passes.unique().item()))


def _gather_in_order(own_indices: Sequence[Tensor], own_rows: Sequence[Tensor], no_rows: Tensor) -> Tensor:
    """Gather the rows of all ranks on rank 0, in the order of their indices; return `no_rows` on the other ranks."""
    rows = torch.cat([no_rows, *own_rows])
    if dist.world() == 1:
        # The indices are sorted already, and a sorted copy would double the memory.
        return rows
    no_index = torch.zeros(0, dtype=torch.long)
    index = torch.cat([no_index, *own_indices])
    index = torch.cat([no_index, *dist.gather(index)])
    rows = torch.cat([no_rows, *dist.gather(rows)])
    return rows[index.argsort()]
