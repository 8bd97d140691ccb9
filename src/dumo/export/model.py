"""Convert one head of a fine-tuned pretrained model to its diffusers model class, and find the pipeline that runs it.

An export calls `choose_exported_model`, then `require_pipeline`, which raises an error if no stock pipeline samples as
the run does, then `ExportedModel.build_model`. `dumo.export.stock` has the call arguments of each pipeline.

A mean velocity u(x_t, t, r) is exported for fixed numbers of passes, `nfe`: with r = 0 for Restart, or for Hop as Euler
steps of the scheduler, x_s = x_t - (t - s) u(x_t, t, s). One time embedding then encodes both times (`dumo.nets.gap`).
"""

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dumo.config.spec import Run
from dumo.data.pixel import Size
from dumo.encoders.part import DIFFUSERS, find_weights
from dumo.encoders.pipeline_folder import TRANSFORMER, weights_name
from dumo.export.scheduler import restart_for_scheduler
from dumo.export.stock import TRAIN_TIMESTEPS, StockPipeline, find_stock_pipeline
from dumo.flow.path import Diffusion
from dumo.flow.reading import head_of, readings_of
from dumo.flow.solver import Hop, Restart, num_steps
from dumo.nets import Pretrained
from dumo.nets.dualized import Dualized
from dumo.nets.gap import FixedTimes
from dumo.nets.text_rows import Codes
from dumo.types import Cond, Heads, Objective, Sample, Time, UserError

# The dtypes in which weights are written.
DTYPES = ("float32", "bfloat16", "float16")
# Lists the components of a pipeline.
INDEX = "model_index.json"
# The default numbers of passes for a net of two times. There can be only one hop from t = 1.
_DEFAULT_PASSES = (1, 2)
_DEFAULT_HOPS = (2,)
Head = Literal["u", "v"]


@dataclass(frozen=True)
class ExportedModel:
    """One head of a fine-tuned net to export: the flow map u, or the velocity v."""

    run: Run
    spec: Pretrained
    net: Dualized
    head: Head
    # The supported numbers of passes; () means any number, for a net of one time.
    nfe: tuple[int, ...] = ()
    dtype: str = "float32"
    # Omit the adapters of the few-step run, for use on top of its export.
    subject_only: bool = False
    # The image size in the example on the model card; None means square.
    size: Size | None = None

    @property
    def makes_hops(self) -> bool:
        """Whether the flow map is sampled with Hop."""
        return self.head == "u" and isinstance(self.run.sample.solver, Hop)

    @property
    def pass_intervals(self) -> list[tuple[float, float]]:
        """The start and end times (t, r) of each pass, by decreasing t. Raises UserError if a t has several r."""
        end_by_start: dict[float, float] = {}
        for n in sorted(self.nfe):
            starts = self.run.path.nearest_net_times(self._start_times(n))
            ends = [*starts[1:], 0.0] if self.makes_hops else [0.0] * n
            for t, r in zip(starts, ends, strict=True):
                other_r = end_by_start.setdefault(t, r)
                if other_r != r:
                    raise UserError(
                        f"with nfe = {' and '.join(map(str, self.nfe))}, solver hop jumps from t = {t:g} both to r = "
                        f"{other_r:g} and to r = {r:g}, but a stock model has only the input t: export each nfe to a "
                        "separate folder"
                    )
        return sorted(end_by_start.items(), reverse=True)

    @cached_property
    def fixed_embedding(self) -> FixedTimes | None:
        """The embedding of t that also encodes r, or None for any number of passes. Raises as `pass_intervals`."""
        if not self.nfe:
            return None
        t, r = zip(*self.pass_intervals, strict=True)
        path = self.run.path
        if isinstance(path, Diffusion):
            model_times = torch.tensor([float(index) for index in path.nearest_indices(t)])
        else:
            model_times = self.net.model_times(self._scheduler_times(t))
        return self.net.fit_fixed_times(torch.tensor(t), torch.tensor(r), model_times, getattr(torch, self.dtype))

    @property
    def time_layer(self) -> nn.Linear | None:
        """The last layer of the time embedder, with the embedding of t - r added; None for a net of one time.

        Raises UserError as `pass_intervals`.
        """
        if self.fixed_embedding:
            return self.fixed_embedding.layer
        return self.net.velocity_time_layer() if self.net.gap else None

    @property
    def facts(self) -> dict[str, Any]:
        """The passes and errors of the embedding for dumo.json and file headers, or {} for any number of passes."""
        if not self.fixed_embedding:
            return {}
        errors = {name: value for name, value in vars(self.fixed_embedding).items() if isinstance(value, float)}
        return {"passes": self.pass_intervals, "embedding": errors}

    @property
    def model_class(self) -> str:
        """The model's class name in diffusers."""
        return type(self.net.model).__name__

    @property
    def stock(self) -> StockPipeline | None:
        """The pipeline of diffusers that runs the model; None if no stock pipeline does."""
        return find_stock_pipeline(self.model_class, self.spec)

    @property
    def solver(self) -> Restart:
        """The solver that the scheduler reproduces: the run's solver, or the default if the run samples with v.

        A Hop is replaced by a Restart with the same start. Raises UserError if no scheduler reproduces the solver.
        """
        solver = self.run.sample.solver
        if self.makes_hops and isinstance(solver, Hop):
            return Restart(m=solver.m or solver.start / 2, start=solver.start)
        return restart_for_scheduler(solver)

    def pipeline_times(self, passes: int) -> Sequence[float]:
        """Return the start times of passes for the pipeline: sigmas, or indices of a diffusion's table."""
        times = self._start_times(passes)
        path = self.run.path
        return path.nearest_indices(times) if isinstance(path, Diffusion) else times

    @property
    def component_name(self) -> str:
        """The name of the model's pipeline component in diffusers."""
        return self.spec.pipeline.model_part

    @property
    def source_folder(self) -> Path | None:
        """The folder of the model's pipeline, or None if the model came without one."""
        pipeline = self.spec.pipeline
        if pipeline.is_published or not (pipeline.folder / INDEX).is_file():
            return None
        return pipeline.folder

    @cached_property
    def opened_dtype(self) -> str:
        """The dtype in which the card loads a pipeline: the requested one, or the dtype of the stored base model.

        Without a dtype, diffusers loads text encoders in their stored dtype and the rest in float32, which fails.
        """
        if self.dtype != "float32" or self.source_folder is None:
            return self.dtype
        return stored_dtype(self.source_folder / self.component_name)

    def weights_variant(self, parts: Iterable[str]) -> str:
        """Return the `variant` with which diffusers finds the weights of these components, or ""."""
        if self.source_folder is None:
            return ""
        for part in parts:
            stored_weights = find_weights(self.source_folder / part, weights_name(part))
            if stored_weights is not None and stored_weights.variant:
                return stored_weights.variant
        return ""

    @property
    def base_name(self) -> str:
        """The base model's repository, or the name of its folder, whose files may name an ancestor's repository."""
        pipeline = self.spec.pipeline
        return pipeline.repository if pipeline.is_on_hub else Path(pipeline.source).name

    @property
    def base_subfolder(self) -> str:
        """The folder of the base model inside `base_name`, or "" if it is that folder itself."""
        pipeline = self.spec.pipeline
        part_folder = pipeline.part_folder(TRANSFORMER)
        return "" if part_folder == pipeline.folder else part_folder.relative_to(pipeline.folder).as_posix()

    @property
    def class_embeddings(self) -> dict[str, Tensor]:
        """The fixed class embeddings by name, (classes + 1, ...) each, or {} if the model was tuned on texts."""
        if not isinstance(self.spec.texts, Codes):
            return {}
        codes = self.net.texts
        return {name: rows.contiguous() for name, rows in codes.named_buffers() if len(rows)}

    def build_model(self) -> Any:  # noqa: ANN401, a diffusers model
        """Build the diffusers model, with merged adapters and without local paths in its config."""
        model = self.net.single_head_model(self.head, merged=self.spec.lora is not None, time_layer=self.time_layer)
        model.register_to_config(_name_or_path="")
        if self.dtype == "float32":
            return model
        return _cast_copy(model, getattr(torch, self.dtype))

    def _start_times(self, n: int) -> list[float]:
        """Return the start times of n passes."""
        solver = self.run.sample.solver
        if self.makes_hops and isinstance(solver, Hop):
            return solver.times(n)[:-1]
        return self.solver.times(n)

    def _scheduler_times(self, times: Sequence[float]) -> Tensor:
        """Convert times in [0, 1] to the scheduler's timesteps, in thousandths."""
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        scheduler: Any = FlowMatchEulerDiscreteScheduler()
        if self.stock and "timesteps" in self.stock.time_arguments:
            scheduler.set_timesteps(timesteps=[round(TRAIN_TIMESTEPS * t, 6) for t in times])
        else:
            scheduler.set_timesteps(sigmas=list(times))
        return scheduler.timesteps


def choose_exported_model(
    run: Run, spec: Pretrained, net: Dualized, head: Head, nfe: tuple[int, ...], dtype: str
) -> ExportedModel:
    """Choose one head of a pretrained model for export. A flow map of two times is fixed to `nfe` passes.

    Other models support any number of passes and ignore `nfe`. () means the default. Raises UserError for a head that
    the run does not sample with or evaluates at other times than a stock model, and for passes that the solver does not
    support.
    """
    solver = run.sample.solver
    if head == "v" and net.gap is not None and not _reads_velocity_at_rest(run.objective):
        raise UserError(
            f"objective '{run.objective.kind}' has its velocity at r != t, but head v is exported at r = t: use "
            "--head u"
        )
    if head == "v" and run.readings.velocity and head_of(run.objective, "velocity") != head:
        raise UserError(f"objective '{run.objective.kind}' takes its velocity from another head: use --head u")
    if head == "u" and net.diffusion and isinstance(solver, Hop):
        raise UserError(
            "sample.solver is hop, which no stock scheduler supports for a diffusion model: set "
            "sample.solver.kind=restart"
        )
    if net.gap is None or head == "v":
        return ExportedModel(run=run, spec=spec, net=net, head=head, dtype=dtype)
    if isinstance(solver, Hop):
        hop_head = head_of(run.objective, "flow_map")
        if hop_head != head:
            raise UserError(
                f"sample.solver is hop, which uses head {hop_head}, but head {head} is exported: set "
                "sample.solver.kind=restart"
            )
    if not nfe:
        nfe = _DEFAULT_HOPS if isinstance(solver, Hop) else _DEFAULT_PASSES
    for n in nfe:
        # Raises if the solver does not make n passes.
        num_steps(solver, n)
    distinct_nfe = tuple(sorted(set(nfe)))
    return ExportedModel(run=run, spec=spec, net=net, head=head, nfe=distinct_nfe, dtype=dtype)


def _reads_velocity_at_rest(objective: Objective) -> bool:
    """Whether an objective evaluates its velocity at r = t, as a stock model does."""
    t = torch.ones(1)
    ends: list[Tensor] = []

    def net(x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        ends.append(inputs["r"])
        return (x,) * len(objective.needs.heads)

    read_velocity = readings_of(objective, net).velocity
    assert read_velocity is not None, "it has a head v"
    read_velocity(torch.zeros(1, 1), t, torch.zeros(1, dtype=torch.long))
    return all(torch.equal(r, t) for r in ends)


def require_pipeline(exported: ExportedModel) -> StockPipeline:
    """Return the pipeline that runs the model.

    Raises UserError if there is none, or if its guidance differs from the run's.
    """
    stock = exported.stock
    if stock is None:
        raise UserError(f"no stock pipeline calls a {exported.model_class} as this run does: export to safetensors")
    scale = exported.run.sample.guide.scale
    if exported.head == "u" and scale != 1 and stock.rescales_cfg:
        raise UserError(
            f"sample.guide.scale is {scale:g}, but {stock.pipeline} rescales guided predictions, so its images would "
            "differ: set it to 1, or export to safetensors"
        )
    if exported.head == "u" and scale != 1 and stock.guide_argument is None:
        raise UserError(
            f"sample.guide.scale is {scale:g}, but {stock.pipeline} does not support guidance, so its images would "
            "differ: set it to 1, or export to safetensors"
        )
    return stock


def stored_dtype(folder: Path) -> str:
    """Return the most frequent dtype of a model's parameters, or float32 if there are none or it is not in DTYPES."""
    stored_weights = find_weights(folder, DIFFUSERS)
    if stored_weights is None:
        return "float32"
    counts = Counter[str]()
    for tensor in stored_weights.load().values():
        counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    [(dtype, _)] = counts.most_common(1)
    return dtype if dtype in DTYPES else "float32"


def _cast_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy a model with its floating-point weights and buffers in `dtype`."""
    # deepcopy uses these values for the tensors with these ids instead of copying them.
    copies: dict[int, object] = {}
    for parameter in model.parameters():
        copies[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
    for buffer in model.buffers():
        copies[id(buffer)] = buffer.to(dtype) if buffer.is_floating_point() else buffer
    return copy.deepcopy(model, copies)
