"""One head of a run's net as a model of its source's class, and the stock pipeline that runs it.

The order of events in an export (`dumo.export.write`, `dumo.export.lora`):

1. `choose_exported_model` makes an `ExportedModel` of a head, chooses its numbers of passes, and refuses nets that no
   stock program knows.
2. `require_pipeline` refuses what no stock pipeline of diffusers runs as the run does.
3. `ExportedModel.build_model` makes the model with its weights; its other properties are for cards and settings.

`dumo.export.stock` says how each pipeline of diffusers is called.

A mean velocity u(x_t, t, r) is exported for a list of passes, `nfe`: Restart's, where r = 0, or those of Hop, which are
the scheduler's Euler steps, x_s = x_t - (t - s) u(x_t, t, s). One embedding of time says both times (`dumo.nets.gap`).
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

from dumo.encoders.part import DIFFUSERS, find_weights
from dumo.encoders.pipeline import TRANSFORMER, weights_name
from dumo.export.scheduler import restart_for_scheduler
from dumo.export.stock import TRAIN_TIMESTEPS, StockPipeline, find_stock_pipeline
from dumo.flow.path import Diffusion
from dumo.flow.reading import head_of, reading
from dumo.flow.solver import Hop, Restart, num_steps, uniform_times
from dumo.nets import Net, Pretrained
from dumo.nets.dualized import Dualized
from dumo.nets.gap import FixedTimes
from dumo.nets.rows import Codes
from dumo.run.sampler import Sampler
from dumo.runtime.door import option, settings
from dumo.types import Cond, Heads, Objective, Sample, Time, UserError

DTYPES = ("float32", "bfloat16", "float16")  # in which weights are written
INDEX = "model_index.json"  # lists the components of a pipeline
_DEFAULT_PASSES = (1, 2)  # for which an export is fixed where none are given: ours, as on its card
_DEFAULT_HOPS = (2,)  # for solver hop, whose pass from t = 1 may have one end only
Head = Literal["u", "v"]


@dataclass(frozen=True)
class ExportedModel:
    """One head of a tuned net, to be exported: u jumps to the data, v is the velocity of a flow."""

    sampler: Sampler
    spec: Pretrained
    net: Dualized
    head: Head
    nfe: tuple[int, ...] = ()  # the numbers of passes that it can make; (): any number, of a net of one time
    dtype: str = "float32"
    subject_only: bool = False  # without the adapters of the few-step run below it, for use on top of that run's export

    @property
    def makes_hops(self) -> bool:
        """Whether its passes are those of Hop, of a net of two times."""
        return bool(self.nfe) and isinstance(self.sampler.spec.solver, Hop)

    @property
    def pass_intervals(self) -> list[tuple[float, float]]:
        """The times (t, r) from and to which each pass goes, t falling. Raises UserError where one t has two r."""
        end_by_start: dict[float, float] = {}
        for n in sorted(self.nfe):
            starts = self.sampler.flow.path.nearest_net_times(self._start_times(n))
            ends = [*starts[1:], 0.0] if self.makes_hops else [0.0] * n
            for t, r in zip(starts, ends, strict=True):
                other_r = end_by_start.setdefault(t, r)
                if other_r != r:
                    raise UserError(
                        f"in {' and '.join(map(str, self.nfe))} passes of solver hop, the one from t = {t:g} goes to r "
                        f"= {other_r:g} and to r = {r:g}, and a stock model is given t alone: give one "
                        f"{option('nfe')}, and export each to a folder of its own"
                    )
        return sorted(end_by_start.items(), reverse=True)

    @cached_property
    def fixed_embedding(self) -> FixedTimes | None:
        """The embedding of t that also says r; None where any number of passes is made. Raises as `pass_intervals`."""
        if not self.nfe:
            return None
        t, r = zip(*self.pass_intervals, strict=True)
        path = self.sampler.flow.path
        if isinstance(path, Diffusion):
            model_times = torch.tensor([float(index) for index in path.nearest_indices(t)])
        else:
            model_times = self.net.model_times(self._scheduler_times(t))
        return self.net.fit_fixed_times(torch.tensor(t), torch.tensor(r), model_times, getattr(torch, self.dtype))

    @property
    def time_layer(self) -> nn.Linear | None:
        """The last layer of the embedder of time, which adds that of t - r; None of a net of one time.

        Raises UserError as `pass_intervals`.
        """
        if self.fixed_embedding:
            return self.fixed_embedding.layer
        return self.net.velocity_time_layer() if self.net.gap else None

    @property
    def facts(self) -> dict[str, Any]:
        """For dumo.json and a file's header: passes and errors of the embedding; {} for any number of passes."""
        if not self.fixed_embedding:
            return {}
        errors = {name: value for name, value in vars(self.fixed_embedding).items() if isinstance(value, float)}
        return {"passes": self.pass_intervals, "embedding": errors}

    @property
    def model_class(self) -> str:
        """The name of the model's class in diffusers."""
        return type(self.net.model).__name__

    @property
    def stock(self) -> StockPipeline | None:
        """The pipeline of diffusers that runs the model; None where no stock pipeline does."""
        return find_stock_pipeline(self.model_class, self.spec)

    @property
    def solver(self) -> Restart:
        """The solver that the scheduler imitates: the run's own, or the default where the run samples by v.

        Instead of Hop, a Restart that begins at its start. Raises UserError where no scheduler imitates the solver.
        """
        solver = self.sampler.spec.solver
        if self.nfe and isinstance(solver, Hop):
            return Restart(m=solver.start / 2, start=solver.start)
        return restart_for_scheduler(solver)

    def pipeline_times(self, passes: int) -> Sequence[float]:
        """The times at which passes begin, as the pipeline counts them: sigmas, or indices of a diffusion's table."""
        times = self._start_times(passes)
        path = self.sampler.flow.path
        return path.nearest_indices(times) if isinstance(path, Diffusion) else times

    @property
    def component_name(self) -> str:
        """The name that diffusers has for the model among a pipeline's components."""
        return self.spec.pipeline.model_part

    @property
    def source_folder(self) -> Path | None:
        """The folder of the whole pipeline that the model came from; None where it came alone."""
        pipeline = self.spec.pipeline
        if pipeline.is_published or not (pipeline.folder / INDEX).is_file():
            return None
        return pipeline.folder

    @cached_property
    def opened_dtype(self) -> str:
        """The dtype in which its card opens a pipeline: the one that was asked for, or that of the stored base model.

        Text encoders are loaded as they are stored unless a dtype is given, and the rest in float32, so that parts
        would not fit one another.
        """
        if self.dtype != "float32" or self.source_folder is None:
            return self.dtype
        return stored_dtype(self.source_folder / self.component_name)

    def weights_variant(self, parts: Iterable[str]) -> str:
        """The `variant` by which diffusers finds the weights of parts of the source; "": files of plain names."""
        if self.source_folder is None:
            return ""
        for part in parts:
            stored_weights = find_weights(self.source_folder / part, weights_name(part))
            if stored_weights is not None and stored_weights.variant:
                return stored_weights.variant
        return ""

    @property
    def base_name(self) -> str:
        """The name of the tuned model: its folder's, for a repository that it notes may be that of an ancestor."""
        return Path(self.spec.pipeline.source).name

    @property
    def base_subfolder(self) -> str:
        """The folder of the tuned model inside the folder `base_name`; "": it is that folder itself."""
        pipeline = self.spec.pipeline
        part_folder = pipeline.part_folder(TRANSFORMER)
        return "" if part_folder == pipeline.folder else part_folder.relative_to(pipeline.folder).as_posix()

    @property
    def class_embeddings(self) -> dict[str, Tensor]:
        """What the model reads for classes, (classes + 1, ...) each, by name; {} where it was tuned on texts.

        The rows were drawn before the training, and stay.
        """
        if not isinstance(self.spec.texts, Codes):
            return {}
        return {name: rows.contiguous() for name, rows in self.net.texts.named_buffers()}

    def build_model(self) -> Any:  # noqa: ANN401, a model of diffusers
        """Build the model of diffusers: adapters merged into their layers, no path of this machine in its config."""
        model = self.net.single_head_model(self.head, merged=self.spec.lora is not None, time_layer=self.time_layer)
        model.register_to_config(_name_or_path="")
        if self.dtype == "float32":
            return model
        return _cast_copy(model, getattr(torch, self.dtype))

    def _start_times(self, n: int) -> list[float]:
        """The times at which n passes begin."""
        if self.makes_hops:
            return uniform_times(n, self.solver.start)[:-1]
        return self.solver.times(n)

    def _scheduler_times(self, times: Sequence[float]) -> Tensor:
        """Times in [0, 1] as the pipeline's scheduler passes them to the model, in thousandths."""
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        scheduler: Any = FlowMatchEulerDiscreteScheduler()
        if self.stock and "timesteps" in self.stock.time_arguments:
            scheduler.set_timesteps(timesteps=[round(TRAIN_TIMESTEPS * t, 6) for t in times])
        else:
            scheduler.set_timesteps(sigmas=list(times))
        return scheduler.timesteps


def choose_exported_model(sampler: Sampler, spec: Net, head: Head, nfe: tuple[int, ...], dtype: str) -> ExportedModel:
    """Take one head of a run's net for export. A net of two times is fixed for `nfe` passes; (): the default.

    Raises UserError for a net that no stock program knows, a head that the run does not sample by, or reads at other
    times, and where `nfe` is given but the head makes any number of passes, or cannot make these.
    """
    if not isinstance(spec, Pretrained) or not isinstance(sampler.net, Dualized):
        raise UserError(
            f"this run trains net '{spec.kind}', for which others have no class: dumo exports nets of kind diffusers, "
            f"and of kind dit or unet {option('to', 'diffusers')}. Its weights are a safetensors file in its checkpoint"
        )
    net = sampler.net
    solver = sampler.spec.solver
    if nfe and head == "v":
        raise UserError(
            f"this head is a velocity, so what is exported makes any number of passes: leave {option('nfe')} out"
        )
    if nfe and net.gap is None:
        raise UserError(
            f"this net knows one time, so what is exported makes any number of passes: leave {option('nfe')} out"
        )
    if head == "v" and net.gap is not None and not _reads_velocity_at_rest(sampler.flow.objective):
        raise UserError(
            f"objective '{sampler.flow.objective.kind}' reads its velocity at another r than t, at which it is "
            f"exported: leave {option('head')} out"
        )
    if head == "v" and sampler.taught.velocity and head_of(sampler.flow.objective, "velocity") != head:
        raise UserError(
            f"objective '{sampler.flow.objective.kind}' reads its velocity by another head than v: leave "
            f"{option('head')} out"
        )
    if net.gap is None or head == "v":
        return ExportedModel(sampler=sampler, spec=spec, net=net, head=head, dtype=dtype)
    if net.diffusion and isinstance(solver, Hop):
        raise UserError(
            "sample.solver is hop, and no stock scheduler makes such steps of a model of a diffusion at given times: "
            "set kind: restart there, in the run's run.yaml"
        )
    if isinstance(solver, Hop):
        hop_head = head_of(sampler.flow.objective, "flow_map")
        if hop_head != head:
            raise UserError(
                f"this run jumps by head {hop_head}, and what is exported is {head}: "
                f"set {settings('sample.solver.kind=restart')}"
            )
    if not nfe:
        nfe = _DEFAULT_HOPS if isinstance(solver, Hop) else _DEFAULT_PASSES
    for n in nfe:
        num_steps(solver, n)  # raises where the solver does not make n passes
    distinct_nfe = tuple(sorted(set(nfe)))
    return ExportedModel(sampler=sampler, spec=spec, net=net, head=head, nfe=distinct_nfe, dtype=dtype)


def _reads_velocity_at_rest(objective: Objective) -> bool:
    """Whether an objective reads its velocity at r = t, as it is exported, of a net that is given r."""
    t = torch.ones(1)
    ends: list[Tensor] = []

    def net(x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        ends.append(inputs["r"])
        return (x,) * len(objective.needs.heads)

    read_velocity = reading(objective, net).velocity
    assert read_velocity is not None, "it has a head v"
    read_velocity(torch.zeros(1, 1), t, torch.zeros(1, dtype=torch.long))
    return all(torch.equal(r, t) for r in ends)


def require_pipeline(exported: ExportedModel, *, lora: bool = False) -> StockPipeline:
    """Return the pipeline that runs the model.

    Raises UserError where there is none, where it loads no `lora`, and where it guides otherwise than the run.
    """
    stock = exported.stock
    if stock is None:
        raise UserError(
            f"no stock pipeline runs a {exported.model_class} as this run's net is called: take "
            f"{option('to', 'safetensors')}"
        )
    if lora and exported.spec.lora is None:
        raise UserError(
            f"net.lora is null: all weights were tuned, which no LoRA holds: take {option('to', 'diffusers')}"
        )
    scale = exported.sampler.spec.guide.scale
    if exported.head == "u" and scale != 1 and stock.rescales_guidance:
        raise UserError(
            f"sample.guide.scale is {scale:g}, and {stock.pipeline} guides otherwise, so its images would differ. Set "
            f"it to 1, or take {option('to', 'safetensors')}"
        )
    if exported.head == "u" and scale != 1 and stock.guide_argument is None:
        raise UserError(
            f"sample.guide.scale is {scale:g}, and {stock.pipeline} has no guidance beyond that in the weights, so its "
            f"images would differ. Set it to 1, or take {option('to', 'safetensors')}"
        )
    if lora and not stock.loads_lora:
        raise UserError(
            f"no pipeline of diffusers loads a LoRA for {exported.model_class}: take {option('to', 'diffusers')}"
        )
    return stock


def stored_dtype(folder: Path) -> str:
    """The dtype of most numbers of a model's weights; float32 where there are none, or none of DTYPES."""
    stored_weights = find_weights(folder, DIFFUSERS)
    if stored_weights is None:
        return "float32"
    counts = Counter[str]()
    for tensor in stored_weights.load().values():
        counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    [(dtype, _)] = counts.most_common(1)
    return dtype if dtype in DTYPES else "float32"


def _cast_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy a model, with its floating-point weights and buffers in `dtype`; the model itself stays as it is."""
    copies: dict[int, object] = {}  # deepcopy takes these for tensors by their id, and copies the modules around them
    for parameter in model.parameters():
        copies[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
    for buffer in model.buffers():
        copies[id(buffer)] = buffer.to(dtype) if buffer.is_floating_point() else buffer
    return copy.deepcopy(model, copies)
