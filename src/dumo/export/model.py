"""A model that is exported: one head of a run's net, of the class that its source had; how stock diffusers runs it.

A flow map u says where the data lie, x_0 = x_t - t u, so between two passes a pipeline must add fresh noise. Stock
`FlowMatchEulerDiscreteScheduler` does with `stochastic_sampling`:

    x_s = (1 - s) (x_t - t u) + s z,

which is Restart (`dumo.flow.solver`) at the times that the pipeline is given as sigmas. Without it the scheduler
makes an Euler step along u, which keeps the old noise and is wrong from the second pass on.

A net of a diffusion gives its own kind of output still, noise or v, from x_vp at whole indices. `LCMScheduler` makes

    x_vp = a_s (c_out x_0 + c_skip x_vp) + s_s z,   x_0 = (x_vp - s_t F) / a_t (for noise),

the same jumps: c_skip = .25 / (.25 + (c t)^2) is below 1e-9 where its `timestep_scaling` c is large.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dumo.encoders.pipeline import TRANSFORMER, UNET
from dumo.flow.path import Diffusion
from dumo.flow.solver import Hermite, Restart, Solver
from dumo.io.read import read_settings, write_json
from dumo.nets import Net, Pretrained
from dumo.nets.dualized import Dualized
from dumo.nets.family import class_of, family
from dumo.nets.rows import Codes
from dumo.nets.vp import Frame, settings
from dumo.run.sampler import Sampler
from dumo.types import UserError

THOUSAND = 1000  # by which schedulers and pipelines count times (num_train_timesteps)
INDEX = "model_index.json"  # of a pipeline
SCHEDULER, CONFIG = "scheduler", "scheduler_config.json"  # the folder of a scheduler, and its file
LCM, SHARP = "LCMScheduler", 1e4  # of a diffusion's flow map; its c, above: .25 / 1e8 at index 1
EULER = "FlowMatchEulerDiscreteScheduler"
OWN = ["jumps", "JumpScheduler"]  # the file and class of a scheduler that has its times
JUMPS = '''"""Times of jumps to the data, for a pipeline that takes none: the first START, the second of two M."""

from math import log2

from diffusers import FlowMatchEulerDiscreteScheduler

START, M = {start!r}, {m!r}


class JumpScheduler(FlowMatchEulerDiscreteScheduler):
    def set_timesteps(self, num_inference_steps=None, device=None, **given):
        n = num_inference_steps
        times = [START * (M / START) ** log2(n / (n - k)) for k in range(n or 0)]
        super().set_timesteps(device=device, **given or {{"sigmas": times}})
'''
Head = Literal["u", "v"]
Arguments = dict[str, Any]
Entry = list[str]  # of model_index.json: library or file, and class


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
        return sorted(set(kind._get_signature_keys(kind)[0]) - {TRANSFORMER, UNET, "scheduler"})


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


def restart(solver: Solver) -> Restart:
    """The solver as schedulers have it: those of other jumps, or of none, are the default.

    Raises UserError for jumps to the data between which no scheduler goes as the solver does.
    """
    if isinstance(solver, Hermite):
        raise UserError(
            f"sample.solver = {solver.model_dump(mode='json')}: schedulers add fresh noise alone between two "
            "passes. Set kind: restart there, in the run's run.yaml"
        )
    return solver if isinstance(solver, Restart) else Restart()


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
        """The run's own jumps; those of the default where it samples by v. Raises UserError as `restart`."""
        return restart(self.sampler.spec.solver)

    def times(self, passes: int) -> Sequence[float]:
        """Those of its jumps as its pipeline counts them: as sigmas, or as indices of a diffusion's table."""
        times, path = self.solver.times(passes), self.sampler.path
        return path.indices(times) if isinstance(path, Diffusion) else times

    @property
    def part(self) -> str:
        """What diffusers calls the model."""
        return self.spec.pipeline.model

    @property
    def source(self) -> Path | None:
        """The folder of the whole pipeline that the model came from; None where it came alone."""
        pipeline = self.spec.pipeline
        return pipeline.folder if not pipeline.known and (pipeline.folder / INDEX).is_file() else None

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

    def model(self, dtype: str = "float32") -> Any:  # noqa: ANN401, a model of diffusers
        """The model, its adapters added to their layers, without the name of a folder of this machine."""
        model = self.net.stock(self.head, merged=self.spec.lora is not None)
        model.register_to_config(_name_or_path="")
        return model if dtype == "float32" else cast(model, getattr(torch, dtype))


def of_net(sampler: Sampler, spec: Net, head: Head) -> Exported:
    """The head of a net with this spec. Raises UserError for a net that no stock program knows."""
    if not isinstance(spec, Pretrained) or not isinstance(sampler.net, Dualized):
        raise UserError(
            f"this run trains net '{spec.kind}', for which others have no class: dumo exports nets of kind diffusers, "
            "and of kind dit --to diffusers. Its weights are a safetensors file in its checkpoint"
        )
    return Exported(sampler, spec, sampler.net, head)


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


def write_scheduler(folder: Path, stock: Stock | None, solver: Restart, frame: Frame | None = None) -> Entry:
    """Write the scheduler of a flow map into `folder`; return its entry in model_index.json.

    A class of its own where the pipeline takes no times. `frame` is that of a model of a diffusion.
    """
    if frame:
        from diffusers.schedulers.scheduling_lcm import LCMScheduler

        steps = frame.schedule.steps
        LCMScheduler(**settings(frame), original_inference_steps=steps, timestep_scaling=SHARP).save_pretrained(folder)
        return ["diffusers", LCM]
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True).save_pretrained(folder)
    check_scheduler(folder)
    if stock is None or stock.times:
        return ["diffusers", EULER]
    (folder / f"{OWN[0]}.py").write_text(JUMPS.format(start=solver.start, m=solver.m), encoding="utf-8")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    write_json(folder / CONFIG, config | {"_class_name": OWN[1]})
    return OWN


def check_scheduler(folder: Path) -> None:
    """Raise UserError for a scheduler under which a flow map makes no images: one of plain Euler steps, or shifted."""
    config = read_settings(folder / CONFIG, "export the run anew")
    wanted = {"stochastic_sampling": True, "shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None}
    for name, value in wanted.items():
        if config.get(name) != value:
            raise UserError(
                f"{folder / CONFIG}: {name} is {config.get(name)}, and a flow map needs {value}: fresh noise between "
                "two passes, at the times as they are given. Set FlowMatchEulerDiscreteScheduler(shift=1.0, "
                "stochastic_sampling=True)"
            )


def write_euler(folder: Path, frame: Frame | None = None) -> Entry:
    """Write the scheduler of a velocity, with Euler steps, or DDIM's of a diffusion's `frame`; return its entry."""
    if frame:
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        DDIMScheduler(**settings(frame), clip_sample=False, timestep_spacing="trailing").save_pretrained(folder)
        return ["diffusers", "DDIMScheduler"]
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    FlowMatchEulerDiscreteScheduler().save_pretrained(folder)
    return ["diffusers", EULER]
