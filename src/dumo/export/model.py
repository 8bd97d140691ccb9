"""A model that is exported: one head of a run's net, of the class that its source had; how stock diffusers runs it.

A mean velocity u(x_t, t, r) is exported for a list of passes, `nfe`: Restart's, where r = 0, or those of Hop, which are
the scheduler's Euler steps, x_s = x_t - (t - s) u(x_t, t, s). One embedding of time says both times (`dumo.nets.gap`).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dumo.encoders.pipeline import TRANSFORMER, UNET, component_names
from dumo.export.scheduler import restart
from dumo.flow.path import Diffusion
from dumo.flow.solver import Hop, Restart, steps, uniform
from dumo.nets import Net, Pretrained
from dumo.nets.dualized import Dualized
from dumo.nets.family import class_of, family
from dumo.nets.gap import Fixed
from dumo.nets.rows import Codes
from dumo.run.sampler import Sampler
from dumo.types import UserError

THOUSAND = 1000  # by which schedulers and pipelines count times (num_train_timesteps)
INDEX = "model_index.json"  # of a pipeline
PAIR = 2  # passes for which an export is fixed where none are given: ours, as on its card
Head = Literal["u", "v"]
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Stock:
    """A pipeline of diffusers that calls a class of model."""

    pipeline: str  # its class
    off: str | None = "guidance_scale"  # the argument that guides beyond what is in the weights; None: there is none
    none: float = 1.0  # its value for no guidance
    times: tuple[str, ...] = ("sigmas",)  # the arguments that hold the times; (): no argument does
    seeded: bool = False  # its generator draws the noise between two passes, too
    lora: bool = True  # it has load_lora_weights
    mask: str = ""  # the argument that says which tokens there are, where embeddings are not taken without it
    lists: bool = False  # it takes embeddings as a list, a caption each
    side: int = 8  # pixels to a latent's side, where it has no decoder to ask
    more: tuple[str, ...] = ()  # words without which it makes an image of another size
    gives: str = "images[0]"  # where its image is
    named: bool = False  # it is guided where a negative prompt is named, and there alone
    rescaled: bool = False  # it brings what was guided back to the length of what was not
    edits: bool = False  # it takes an image, too
    whole: bool = False  # its times are indices of a diffusion's table
    served: str = ""  # the class of vLLM-Omni that makes the same jumps; "": none does

    def arguments(self, times: Sequence[float], *, embedded: float | None = None, scale: float = 1.0) -> Arguments:
        """Those of passes at these times, guided by `scale`, 1 for none; `embedded` is a number that the net takes.

        Where no argument says the times, their number is said, and the scheduler has them (`JUMPS`).
        """
        said: Arguments = {
            "sigmas": times,
            "timesteps": times if self.whole else [round(THOUSAND * t, 6) for t in times],
        }
        found = {name: said[name] for name in self.times} or {"num_inference_steps": len(times)}
        found |= {self.off: self.none + scale - 1} if self.off else {}
        return found if embedded is None else found | {"guidance_scale": embedded}

    @property
    def parts(self) -> list[str]:
        """The names of its parts other than model and scheduler."""
        import diffusers  # slow to import, and an extra

        kind = getattr(diffusers, self.pipeline)
        return sorted(component_names(kind) - {TRANSFORMER, UNET, "scheduler"})


BINS = ("use_resolution_binning=False",)
STOCKS: dict[str, Stock] = {
    "SD3Transformer2DModel": Stock("StableDiffusion3Pipeline"),
    "FluxTransformer2DModel": Stock("FluxPipeline", "true_cfg_scale", named=True, served="FluxDMD2Pipeline"),
    "Flux2Transformer2DModel": Stock("Flux2Pipeline", None),
    "ChromaTransformer2DModel": Stock("ChromaPipeline", mask="prompt_attention_mask"),
    "SanaTransformer2DModel": Stock("SanaPipeline", seeded=True, mask="prompt_attention_mask", side=32, more=BINS),
    "QwenImageTransformer2DModel": Stock(
        "QwenImagePipeline",
        "true_cfg_scale",
        mask="prompt_embeds_mask",
        named=True,
        rescaled=True,
        served="QwenImageDMD2Pipeline",
    ),
    "ZImageTransformer2DModel": Stock("ZImagePipeline", none=0.0, lists=True),
    "Lumina2Transformer2DModel": Stock(
        "Lumina2Pipeline", mask="prompt_attention_mask", more=("cfg_normalization=False",)
    ),
    "AuraFlowTransformer2DModel": Stock("AuraFlowPipeline", mask="prompt_attention_mask"),
    # given sigmas alone, it calls the net at other times
    "CogView4Transformer2DModel": Stock("CogView4Pipeline", times=("sigmas", "timesteps")),
    "PRXTransformer2DModel": Stock(
        "PRXPipeline", times=("timesteps",), lora=False, mask="prompt_attention_mask", more=BINS
    ),
    "WanTransformer3DModel": Stock("WanPipeline", times=(), lora=False, more=("num_frames=1",), gives="frames[0][0]"),
    "UNet2DConditionModel": Stock("StableDiffusionPipeline", times=("timesteps",), seeded=True, whole=True),
    "PixArtTransformer2DModel": Stock(
        "PixArtSigmaPipeline",
        times=("timesteps",),
        seeded=True,
        whole=True,
        lora=False,
        mask="prompt_attention_mask",
        more=BINS,
    ),
}


OTHERS: dict[str, Stock] = {  # by their own class: that of the model is another pipeline's, too
    "StableDiffusionXLPipeline": replace(STOCKS["UNet2DConditionModel"], pipeline="StableDiffusionXLPipeline"),
    "FluxKontextPipeline": Stock(
        "FluxKontextPipeline", "true_cfg_scale", named=True, edits=True, more=("_auto_resize=False",)
    ),
}


def forms(spec: Pretrained) -> list[str]:
    """What a run of this net can be exported to, so that stock pipelines take it; else a file of its weights."""
    stock = stock_of(class_of(spec.pipeline.config(TRANSFORMER)), spec)
    if stock is None:
        return ["safetensors"]
    return ["diffusers", *["lora"] * (spec.lora is not None and stock.lora)]


def stock_of(kind: str, spec: Pretrained) -> Stock | None:
    """The pipeline that runs a class of model, as its net is called; None where no stock pipeline does."""
    # of SANA the distilled ones alone take a guidance number, and their pipeline has another path
    none = kind == "SanaTransformer2DModel" and spec.guidance is not None
    row = family(spec.pipeline.config(TRANSFORMER), spec.pipeline.class_name)
    return None if none else OTHERS.get(row.pipeline) or STOCKS.get(kind)


@dataclass(frozen=True)
class Exported:
    """One head of a tuned net: u jumps to the data, v is the velocity of a flow."""

    sampler: Sampler
    spec: Pretrained
    net: Dualized
    head: Head
    nfe: tuple[int, ...] = ()  # the numbers of passes that it makes; (): any, of a net of one time
    dtype: str = "float32"
    alone: bool = False  # of adapters on top of a few-step run's, these alone, for that run's export

    @property
    def hops(self) -> bool:
        """Whether its passes are Hop's, of a net of two times."""
        return bool(self.nfe) and isinstance(self.sampler.spec.solver, Hop)

    @property
    def passes(self) -> list[tuple[float, float]]:
        """From where to where each goes, (t, r), falling. Raises UserError where one time has two r."""
        found = dict[float, float]()
        for n in sorted(self.nfe):
            times = self.sampler.flow.path.near(self.points(n))
            for t, r in zip(times, [*times[1:], 0.0] if self.hops else [0.0] * n, strict=True):
                if found.setdefault(t, r) != r:
                    raise UserError(
                        f"in {' and '.join(map(str, self.nfe))} passes of solver hop, the one from t = {t:g} goes to r "
                        f"= {found[t]:g} and to r = {r:g}, and a stock model is given t alone: give one --nfe, and "
                        "export each to a folder of its own"
                    )
        return sorted(found.items(), reverse=True)

    @cached_property
    def fixed(self) -> Fixed | None:
        """The embedding of both times in that of one; None where it makes any passes. Raises UserError as `passes`."""
        if not self.nfe:
            return None
        path, (t, r) = self.sampler.flow.path, zip(*self.passes, strict=True)
        if isinstance(path, Diffusion):
            stock = torch.tensor([float(k) for k in path.indices(t)])
        else:
            stock = self.net.own_time(self.at(t))
        return self.net.fixed(torch.tensor(t), torch.tensor(r), stock, getattr(torch, self.dtype))

    @property
    def last(self) -> nn.Linear | None:
        """The last layer of the embedder of time, with the gap's; None of a net of one time. Raises as `fixed`."""
        return self.fixed.layer if self.fixed else self.net.rest() if self.net.gap else None

    def at(self, times: Sequence[float]) -> Tensor:
        """These times as its scheduler has them, in thousandths."""
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        scheduler: Any = FlowMatchEulerDiscreteScheduler()
        if self.stock and "timesteps" in self.stock.times:
            scheduler.set_timesteps(timesteps=[round(THOUSAND * t, 6) for t in times])
        else:
            scheduler.set_timesteps(sigmas=list(times))
        return scheduler.timesteps

    @property
    def facts(self) -> Arguments:
        """What an export says of its passes, for programs; {} where it makes any."""
        if not self.fixed:
            return {}
        numbers = {name: value for name, value in vars(self.fixed).items() if isinstance(value, float)}
        return {"passes": self.passes, "embedding": numbers}

    def points(self, n: int) -> list[float]:
        """The times at which n passes begin."""
        return uniform(n, self.solver.start)[:-1] if self.hops else self.solver.times(n)

    @property
    def kind(self) -> str:
        """The model's class."""
        return type(self.net.model).__name__

    @property
    def stock(self) -> Stock | None:
        """The pipeline that runs it; None where no stock pipeline does."""
        return stock_of(self.kind, self.spec)

    @property
    def solver(self) -> Restart:
        """The run's own jumps; those of the default where it samples by v; of Hop, by their times, which are as those.

        Raises UserError as `restart`.
        """
        solver = self.sampler.spec.solver
        if self.nfe and isinstance(solver, Hop):
            return Restart(m=solver.start / 2, start=solver.start)
        return restart(solver)

    def times(self, passes: int) -> Sequence[float]:
        """Those of its jumps as its pipeline counts them: as sigmas, or as indices of a diffusion's table."""
        times, path = self.points(passes), self.sampler.flow.path
        return path.indices(times) if isinstance(path, Diffusion) else times

    @property
    def part(self) -> str:
        """What diffusers calls the model."""
        return self.spec.pipeline.model

    @property
    def source(self) -> Path | None:
        """The folder of the whole pipeline that the model came from; None where it came alone."""
        pipeline = self.spec.pipeline
        return pipeline.folder if not pipeline.is_published and (pipeline.folder / INDEX).is_file() else None

    @property
    def origin(self) -> str:
        """The name of what was tuned: on the hub, or that of its folder."""
        return self.spec.pipeline.repository or Path(self.spec.pipeline.source).name

    @property
    def codes(self) -> dict[str, Tensor]:
        """What stands for the classes instead of texts; {} where it was tuned on texts."""
        texts = self.net.texts
        return (
            {}
            if not isinstance(self.spec.texts, Codes)
            else {name: rows.contiguous() for name, rows in texts.named_buffers()}
        )

    def model(self) -> Any:  # noqa: ANN401, a model of diffusers
        """The model, its adapters added to their layers, without the name of a folder of this machine."""
        model = self.net.stock(self.head, merged=self.spec.lora is not None, last=self.last)
        model.register_to_config(_name_or_path="")
        return model if self.dtype == "float32" else cast(model, getattr(torch, self.dtype))


def of_net(sampler: Sampler, spec: Net, head: Head, nfe: tuple[int, ...] = (), dtype: str = "float32") -> Exported:
    """The head of a net with this spec, of two times for these numbers of passes; (): ours.

    Raises UserError for a net that no stock program knows, and for passes of which it can make others, or none.
    """
    if not isinstance(spec, Pretrained) or not isinstance(sampler.net, Dualized):
        raise UserError(
            f"this run trains net '{spec.kind}', for which others have no class: dumo exports nets of kind diffusers, "
            "and of kind dit --to diffusers. Its weights are a safetensors file in its checkpoint"
        )
    net, solver = sampler.net, sampler.spec.solver
    if nfe and (net.gap is None or head == "v"):
        why = "this head is a velocity" if head == "v" else "this net knows one time"
        raise UserError(f"{why}, so what is exported makes any number of passes: leave --nfe out")
    if net.gap is None or head == "v":
        return Exported(sampler, spec, net, head, dtype=dtype)
    if net.frame and isinstance(solver, Hop):
        raise UserError(
            "sample.solver is hop, and no stock scheduler makes such steps of a model of a diffusion at given times: "
            "set kind: restart there, in the run's run.yaml"
        )
    nfe = nfe or ((PAIR,) if isinstance(solver, Hop) else (1, PAIR))
    for n in nfe:
        steps(solver, n)
    return Exported(sampler, spec, net, head, tuple(sorted({*nfe})), dtype)


def require(exported: Exported, *, lora: bool = False) -> Stock:
    """The pipeline that runs the model.

    Raises UserError where there is none, or none that takes it as a LoRA or is guided as the run is.
    """
    stock, why = exported.stock, ""
    if stock is None:
        why = f"no stock pipeline runs a {exported.kind} as this run's net is called: take --to safetensors"
    elif lora and exported.spec.lora is None:
        why = "net.lora is null: all weights were tuned, which no LoRA holds: take --to diffusers"
    elif exported.head == "u" and exported.sampler.spec.guide.scale != 1 and (stock.off is None or stock.rescaled):
        does = "guides otherwise" if stock.rescaled else "has no guidance beyond that in the weights"
        why = (
            f"sample.guide.scale is {exported.sampler.spec.guide.scale:g}, and {stock.pipeline} {does}, so its images "
            "would differ. Set it to 1, or take --to safetensors"
        )
    elif lora and not stock.lora:
        why = f"no pipeline of diffusers loads a LoRA for {exported.kind}: take --to diffusers"
    if stock is None or why:
        raise UserError(why)
    return stock


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another precision; the model stays as it is."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.detach().to(dtype), False) for p in model.parameters()}
    memo |= {id(b): b.to(dtype) if b.is_floating_point() else b for b in model.buffers()}
    return copy.deepcopy(model, memo)
