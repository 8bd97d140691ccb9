"""The stock diffusers pipelines that run exported models, and their call arguments.

`find_stock_pipeline` finds the `StockPipeline` of a model by its pipeline's class in `PIPELINE_BY_CLASS`, or else by
the model's class in `PIPELINE_BY_MODEL`. `StockPipeline.arguments` returns the arguments of a call. `export_forms`
returns the formats that the command line proposes.

To add a model, add a row to `PIPELINE_BY_MODEL`, or to `PIPELINE_BY_CLASS` for a variant of another pipeline's model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dumo.encoders.pipeline_folder import IS_DISTILLED, TRANSFORMER, UNET, component_names
from dumo.encoders.transformers_library import quietly
from dumo.nets import Pretrained
from dumo.nets.family import class_of

# The timestep of t = 1 in schedulers and pipelines (num_train_timesteps).
TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class StockPipeline:
    """A diffusers pipeline that runs a model class, and its call arguments."""

    # The class name.
    pipeline: str
    # The argument for CFG, if there is one.
    guide_argument: str | None = "guidance_scale"
    # The value of `guide_argument` for no guidance.
    unguided_scale: float = 1.0
    # CFG runs only if negative_prompt is passed.
    cfg_needs_negative_prompt: bool = False
    # Rescales the CFG output to the norm of the conditional prediction.
    rescales_cfg: bool = False
    # The arguments for the times of passes.
    time_arguments: tuple[str, ...] = ("sigmas",)
    # Times are integer timesteps of a diffusion model.
    indexed_times: bool = False
    # The generator also draws the noise between two passes.
    seeds_scheduler: bool = False
    # The argument for the token mask, if it is required with embeddings.
    mask_argument: str = ""
    # Embeddings are passed as a list, one item per caption.
    lists_embeddings: bool = False
    takes_image: bool = False
    # Arguments that keep the image size or avoid a warning.
    extra_arguments: tuple[str, ...] = ()
    # The downsampling factor if the autoencoder is unknown.
    pixels_per_latent: int = 8
    # The expression for the image in the result of a call.
    image_at: str = "images[0]"
    # It has load_lora_weights and fuse_lora.
    loads_lora: bool = True
    # ComfyUI's names of the layers that it does not find by diffusers' names; None means it finds no layer by these.
    # See `model_lora_keys_unet` in comfy/lora.py at commit 17358c8, and the maps in comfy/utils.py at 09708ea.
    comfyui_names: Mapping[str, str] | None = None

    def arguments(self, times: Sequence[float], *, embedded: float | None = None, scale: float = 1.0) -> dict[str, Any]:
        """Return the keyword arguments for passes that start at `times`, including `guidance_arguments`.

        A pipeline without an argument for times gets their number, and its scheduler has the times
        (`dumo.export.shipped.jumps`).
        """
        values = {"sigmas": times, "timesteps": times}
        if not self.indexed_times:
            values["timesteps"] = [round(TRAIN_TIMESTEPS * t, 6) for t in times]
        arguments: dict[str, Any] = {name: values[name] for name in self.time_arguments}
        if not arguments:
            arguments["num_inference_steps"] = len(times)
        return arguments | self.guidance_arguments(embedded=embedded, scale=scale)

    def guidance_arguments(self, *, embedded: float | None = None, scale: float = 1.0) -> dict[str, float]:
        """Return the keyword arguments for CFG with `scale`; 1 means no guidance.

        They override the pipeline's default. `embedded` is the guidance scale that the net embeds.
        """
        arguments: dict[str, float] = {}
        if self.guide_argument:
            arguments[self.guide_argument] = self.unguided_scale + scale - 1
        if embedded is not None:
            arguments["guidance_scale"] = embedded
        return arguments

    @property
    def parts(self) -> list[str]:
        """The names of the pipeline's components other than model and scheduler."""
        import diffusers

        # Hide the warning about image processors without torchvision.
        with quietly():
            pipeline_class = getattr(diffusers, self.pipeline)
        return sorted(component_names(pipeline_class) - {TRANSFORMER, UNET, "scheduler"})


_KEEP_SIZE = ("use_resolution_binning=False",)
_SAME_NAMES: dict[str, str] = {}
_FLUX2_TIME = "time_guidance_embed.timestep_embedder"
_FLUX2_NAMES = {
    f"{_FLUX2_TIME}.linear_1": "lora_unet_time_in_in_layer",
    f"{_FLUX2_TIME}.linear_2": "lora_unet_time_in_out_layer",
}
PIPELINE_BY_MODEL: dict[str, StockPipeline] = {
    "SD3Transformer2DModel": StockPipeline("StableDiffusion3Pipeline", comfyui_names=_SAME_NAMES),
    "FluxTransformer2DModel": StockPipeline(
        "FluxPipeline",
        guide_argument="true_cfg_scale",
        cfg_needs_negative_prompt=True,
        comfyui_names=_SAME_NAMES,
    ),
    "Flux2Transformer2DModel": StockPipeline("Flux2Pipeline", guide_argument=None, comfyui_names=_FLUX2_NAMES),
    "ChromaTransformer2DModel": StockPipeline(
        "ChromaPipeline", mask_argument="prompt_attention_mask", comfyui_names=_SAME_NAMES
    ),
    "SanaTransformer2DModel": StockPipeline(
        "SanaPipeline",
        seeds_scheduler=True,
        mask_argument="prompt_attention_mask",
        extra_arguments=_KEEP_SIZE,
        pixels_per_latent=32,
    ),
    "QwenImageTransformer2DModel": StockPipeline(
        "QwenImagePipeline",
        guide_argument="true_cfg_scale",
        cfg_needs_negative_prompt=True,
        rescales_cfg=True,
        mask_argument="prompt_embeds_mask",
        comfyui_names=_SAME_NAMES,
    ),
    "ZImageTransformer2DModel": StockPipeline(
        "ZImagePipeline", unguided_scale=0.0, lists_embeddings=True, comfyui_names=_SAME_NAMES
    ),
    "Lumina2Transformer2DModel": StockPipeline(
        "Lumina2Pipeline",
        mask_argument="prompt_attention_mask",
        extra_arguments=("cfg_normalization=False",),
    ),
    "AuraFlowTransformer2DModel": StockPipeline(
        "AuraFlowPipeline", mask_argument="prompt_attention_mask", comfyui_names=_SAME_NAMES
    ),
    # With sigmas alone, it calls the net at different times.
    "CogView4Transformer2DModel": StockPipeline("CogView4Pipeline", time_arguments=("sigmas", "timesteps")),
    "PRXTransformer2DModel": StockPipeline(
        "PRXPipeline",
        time_arguments=("timesteps",),
        mask_argument="prompt_attention_mask",
        extra_arguments=_KEEP_SIZE,
        loads_lora=False,
    ),
    "WanTransformer3DModel": StockPipeline(
        "WanPipeline",
        time_arguments=(),
        extra_arguments=("num_frames=1",),
        image_at="frames[0][0]",
    ),
    "UNet2DConditionModel": StockPipeline(
        "StableDiffusionPipeline",
        time_arguments=("timesteps",),
        indexed_times=True,
        seeds_scheduler=True,
        comfyui_names=_SAME_NAMES,
    ),
    "PixArtTransformer2DModel": StockPipeline(
        "PixArtSigmaPipeline",
        time_arguments=("timesteps",),
        indexed_times=True,
        seeds_scheduler=True,
        mask_argument="prompt_attention_mask",
        extra_arguments=_KEEP_SIZE,
        loads_lora=False,
        comfyui_names=_SAME_NAMES,
    ),
}
# Pipelines whose model class is shared with another pipeline.
PIPELINE_BY_CLASS: dict[str, StockPipeline] = {
    "StableDiffusionXLPipeline": replace(
        PIPELINE_BY_MODEL["UNet2DConditionModel"], pipeline="StableDiffusionXLPipeline"
    ),
    "FluxKontextPipeline": StockPipeline(
        "FluxKontextPipeline",
        guide_argument="true_cfg_scale",
        cfg_needs_negative_prompt=True,
        takes_image=True,
        extra_arguments=("_auto_resize=False",),
        comfyui_names=_SAME_NAMES,
    ),
    "Flux2KleinPipeline": StockPipeline("Flux2KleinPipeline", comfyui_names=_FLUX2_NAMES),
    "PixArtAlphaPipeline": replace(PIPELINE_BY_MODEL["PixArtTransformer2DModel"], pipeline="PixArtAlphaPipeline"),
}
# FLUX.2 [klein] with is_distilled in model_index.json: its pipeline ignores guidance, and warns of its default scale.
DISTILLED_KLEIN = replace(
    PIPELINE_BY_CLASS["Flux2KleinPipeline"], guide_argument=None, extra_arguments=("guidance_scale=1.0",)
)


def export_forms(spec: Pretrained) -> list[str]:
    """Return the values of `dumo export --to` for a net: only a weight file if no stock pipeline runs it."""
    stock = find_stock_pipeline(class_of(spec.pipeline.config(TRANSFORMER)), spec)
    if stock is None:
        return ["safetensors"]
    forms = ["diffusers"]
    if spec.lora is not None and stock.loads_lora:
        forms.append("lora")
    # ComfyUI does not support class embeddings.
    if spec.lora is not None and stock.comfyui_names is not None and spec.texts.kind == "pipeline":
        forms.append("comfyui")
    return forms


def find_stock_pipeline(model_class: str, spec: Pretrained) -> StockPipeline | None:
    """Return the stock pipeline that runs a model class with the inputs of the net `spec`, or None."""
    # Only distilled SANA models embed the guidance scale, and their pipeline uses a different path.
    if model_class == "SanaTransformer2DModel" and spec.guidance is not None:
        return None
    model_family = spec.family
    if model_family.pipeline == DISTILLED_KLEIN.pipeline and spec.pipeline.index.get(IS_DISTILLED):
        return DISTILLED_KLEIN
    if model_family.pipeline in PIPELINE_BY_CLASS:
        return PIPELINE_BY_CLASS[model_family.pipeline]
    return PIPELINE_BY_MODEL.get(model_class)
