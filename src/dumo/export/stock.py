"""The stock pipelines of diffusers, a row for each class of model: how one is called so that it jumps as dumo does.

A flow map u says where the data lie, x_0 = x_t - t u, so between two passes a pipeline must add fresh noise. Stock
`FlowMatchEulerDiscreteScheduler` does with `stochastic_sampling`:

    x_s = (1 - s) (x_t - t u) + s z,

which is Restart (`dumo.flow.solver`) at the times that the pipeline is told as sigmas. Without it the scheduler
makes an Euler step along u, which keeps the old noise and is wrong from the second pass on.
"""

from dataclasses import dataclass
from typing import Any

from dumo.flow.solver import Hermite, Restart, Solver
from dumo.types import UserError

THOUSAND = 1000  # by which schedulers and pipelines count times (num_train_timesteps)
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Stock:
    """A pipeline of diffusers that calls a class of model."""

    pipeline: str  # its class
    off: str | None = "guidance_scale"  # the argument that guides beyond what is in the weights; None: there is none
    none: float = 1.0  # its value for no guidance
    told: tuple[str, ...] = ("sigmas",)  # the arguments that say the times; (): no argument does
    seeded: bool = False  # its generator draws the noise between two passes, too
    lora: bool = True  # it has load_lora_weights
    mask: str = ""  # the argument that says which tokens there are, where embeddings are not taken without it
    lists: bool = False  # it takes embeddings as a list, a caption each
    side: int = 8  # pixels to a latent's side, where it has no decoder to ask
    more: tuple[str, ...] = ()  # words without which it makes an image of another size
    gives: str = "images"  # where its images are

    def arguments(self, times: list[float], *, embedded: float | None = None, scale: float = 1.0) -> Arguments:
        """Those of passes at these times, guided by `scale`, 1 for none; `embedded` is a number that the net is told.

        Where no argument says the times, their number is said, and the scheduler has them (`scheduler.JUMPS`).
        """
        said: Arguments = {"sigmas": times, "timesteps": [round(THOUSAND * t, 6) for t in times]}
        found = {name: said[name] for name in self.told} or {"num_inference_steps": len(times)}
        found |= {self.off: self.none + scale - 1} if self.off else {}
        return found if embedded is None else found | {"guidance_scale": embedded}

    @property
    def parts(self) -> list[str]:
        """The names of its other parts, beside model and scheduler."""
        import diffusers  # slow to import, and an extra

        kind = getattr(diffusers, self.pipeline)
        return sorted(set(kind._get_signature_keys(kind)[0]) - {"transformer", "scheduler"})


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


def at(solver: Restart, passes: int) -> list[float]:
    """The times of so many passes, the first at noise."""
    return solver.times(passes)


BINS = ("use_resolution_binning=False",)
STOCKS: dict[str, Stock] = {
    "SD3Transformer2DModel": Stock("StableDiffusion3Pipeline"),
    "FluxTransformer2DModel": Stock("FluxPipeline", "true_cfg_scale"),
    "Flux2Transformer2DModel": Stock("Flux2Pipeline", None),
    "ChromaTransformer2DModel": Stock("ChromaPipeline", mask="prompt_attention_mask"),
    "SanaTransformer2DModel": Stock("SanaPipeline", seeded=True, mask="prompt_attention_mask", side=32, more=BINS),
    "QwenImageTransformer2DModel": Stock("QwenImagePipeline", "true_cfg_scale", mask="prompt_embeds_mask"),
    "ZImageTransformer2DModel": Stock("ZImagePipeline", none=0.0, lists=True),
    "Lumina2Transformer2DModel": Stock("Lumina2Pipeline", mask="prompt_attention_mask"),
    "AuraFlowTransformer2DModel": Stock("AuraFlowPipeline", mask="prompt_attention_mask"),
    # told sigmas alone, it tells the net other times
    "CogView4Transformer2DModel": Stock("CogView4Pipeline", told=("sigmas", "timesteps")),
    "PRXTransformer2DModel": Stock(
        "PRXPipeline", told=("timesteps",), lora=False, mask="prompt_attention_mask", more=BINS
    ),
    "WanTransformer3DModel": Stock("WanPipeline", told=(), lora=False, more=("num_frames=1",), gives="frames"),
}
