"""A published model, from a folder as diffusers saves it, to be tuned (docs/pretrained.md).

`Pretrained` is the spec. The order of events in `Pretrained.build`:

1. `dumo.nets.family` finds the model's `Family`, or refuses the model.
2. `Pretrained.model` makes the model from its config.json and weights, which are mapped from their files until used.
3. `_require_fit` and others check that fields, objective and data fit the model.
4. `text_rows` opens the texts, and `Dualized` takes over all of it.

`Pretrained.short` is a smaller model for checks that read no weights.
"""

import warnings
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from dumo.encoders.library import quietly
from dumo.encoders.part import DIFFUSERS, PartWeights, first_unfit_key, require_weights
from dumo.encoders.pipeline import CONFIG, FIELD, HINT, TRANSFORMER, VAE, Config, Pipeline, PipelineSpec
from dumo.io.deferred import not_deferred, read_later
from dumo.io.read import foreign
from dumo.nets.adapter import Lora
from dumo.nets.block import Checkpointing, mark_recomputed, run_as_marked
from dumo.nets.dualized import Dualized
from dumo.nets.family import MAX_FREQUENCY, Family, family
from dumo.nets.precondition import Precondition
from dumo.nets.route import Route
from dumo.nets.rows import Codes, Texts, codes
from dumo.nets.table import PipelineTexts
from dumo.nets.vp import DiffusionToVelocity, read_scheduler
from dumo.runtime import import_bitsandbytes, install_command
from dumo.runtime.limits import FACTOR
from dumo.types import QUIET, Needs, UserError

HEADS = ("v", "u", "m")  # of an objective: velocities and flow maps
TIMES = ("t", "r")
DEPTH_KEYS = (  # of a config.json: how many blocks of each kind a model has
    "num_layers",
    "num_single_layers",
    "num_mmdit_layers",
    "num_single_dit_layers",
    "num_refiner_layers",
    "n_layers",
    "n_refiner_layers",
    "depth",
    "layers_per_block",
    "transformer_layers_per_block",
)


class Pretrained(PipelineSpec):
    """The transformer of the run's pipeline, tuned in full or by adapters; a head for each velocity and flow map."""

    kind: Literal["diffusers"] = "diffusers"
    precondition: ClassVar[Precondition] = "none"
    augment: ClassVar[int] = 0
    weights: Literal["source", "drawn"] = "source"  # drawn: random weights for the config.json
    lora: Lora | None = None  # None: all weights are tuned
    lowpass: float | None = Field(default=10.0, gt=0, le=FACTOR)  # rad: quicker waves of time are cut; None: none are
    guidance: float | None = Field(default=None, ge=0, le=FACTOR)  # the embedded number of a distilled model
    # some of the image's tokens skip the middle blocks in training; None: none
    route: Route | None = Field(default=None, exclude_if=lambda route: route is None)
    # Captions as the pipeline reads them; or codes for the classes, for who asks for them.
    texts: Annotated[PipelineTexts | Codes, Field(discriminator="kind")]
    # Keep each block's input alone, and compute the rest again in the backward pass.
    checkpoint: Checkpointing = Field(default=False, json_schema_extra=QUIET)

    @property
    def time_scale(self) -> float:
        """The quickest wave of time that the net may read, in radians per unit of t."""
        frequency = self.lowpass or MAX_FREQUENCY
        frame = self.frame
        return frequency if frame is None else frequency * frame.steepest

    @property
    def family(self) -> Family:
        """The family of the pipeline's model. Raises UserError as `family`."""
        return family(self.pipeline.config(TRANSFORMER), self.pipeline.class_name)

    @property
    def frame(self) -> DiffusionToVelocity | None:
        """How a model of a diffusion is a velocity; None: it learned one.

        Raises UserError as `family` and `read_scheduler`.
        """
        if not self.family.diffusion:
            return None
        return read_scheduler(self.pipeline.config("scheduler"))

    @property
    def side(self) -> int:
        """The pixels along a side of the pipeline's default image; 0: it is no square, or there is no autoencoder.

        Raises UserError as `family`.
        """
        config = self.pipeline.config(TRANSFORMER)
        if VAE not in self.pipeline.index:
            return 0
        return self.family.side(config)

    def short(self, depth: int) -> "Shortened":
        """The same model with up to `depth` blocks of each kind and random weights: for checks that read no weights."""
        fields: dict[str, Any] = {**dict(self), "weights": "drawn", "depth": depth, "route": None}
        shortened = Shortened.model_construct(None, **fields)  # unchecked: doctor's texts are in no recipe, either
        return shortened.within(self._pipeline)

    def uncoded(self) -> "Pretrained":
        """Return a spec whose frozen weights are not coded: in bf16 if their file is, else in float32."""
        if self.lora is None or self.lora.coding is None:
            return self
        frozen = "float32"
        if self.weights == "source" and model_weights(self.pipeline).dtype == torch.bfloat16:
            frozen = "bfloat16"
        lora = self.lora.model_copy(update={"frozen": frozen})
        return self.model_copy(update={"lora": lora})

    def build(self, needs: Needs, shape: tuple[int, ...], classes: int) -> Dualized:
        """Make a net with the heads of `needs`, for images or latents of `shape`; on the meta device without weights.

        Raises UserError where the model, its weights, the data or the objective do not fit one another.
        """
        _require_known(needs)
        if len(shape) != 3:
            raise UserError(f"net 'diffusers' takes images, not samples of shape {shape}: use net.kind mlp")
        config = self.pipeline.config(TRANSFORMER)
        model_family = family(config, self.pipeline.class_name)
        with foreign(f"{FIELD}: {self.pipeline.source} describes no {config['_class_name']}", HINT):
            return self._built(model_family, config, needs, shape, classes)

    def _built(self, family: Family, config: Config, needs: Needs, shape: tuple[int, ...], classes: int) -> Dualized:
        """The net of `build`, from a config that may say anything. Raises as that, and whatever diffusers does."""
        model = self.model(self.build_config(config))
        self._require_fit(family, model.config, needs)
        patch = family.patch(model.config, shape[0])
        if shape[1] % patch or shape[2] % patch:
            raise UserError(
                f"{FIELD} has a model of patches of {patch} x {patch}, which do not divide the data's sides {shape[1:]}"
            )
        texts = self.text_rows(family, model.config, classes, shape)
        if self.checkpoint:
            self._checkpoint_blocks(model, family, texts)
        return Dualized(
            model,
            family,
            texts,
            needs.heads,
            patch,
            guidance=self._embedded_guidance(family),
            lora=self.lora,
            lowpass_limit=self.lowpass,
            frame=self.frame,
            gap="r" in needs.names,
            route=self.route,
        )

    def _embedded_guidance(self, family: Family) -> float | None:
        """The number of guidance that the model embeds, rounded as a pipeline in the dtype of the weights rounds it.

        FLUX.1-dev in bf16 embeds 3504 for 1000 times 3.5. Without weights it is `guidance`.
        """
        has_weights = self.weights == "source" and torch.get_default_device().type != "meta"
        if self.guidance is None or not has_weights:
            return self.guidance
        dtype = model_weights(self.pipeline).dtype
        scale = family.time_part_scale
        with not_deferred():
            rounded = scale * torch.tensor(self.guidance, dtype=dtype, device="cpu")
            return float(rounded) / scale

    def _checkpoint_blocks(self, model: Any, family: Family, texts: Texts) -> None:  # noqa: ANN401, of diffusers
        """Let blocks be computed again in the backward pass. Raises UserError for a model that cannot."""
        kind = model.config["_class_name"]
        if texts.masked and not family.lean_masks:
            raise UserError(
                f"{FIELD} has a {kind}, which forgets the mask of its texts in blocks that are computed again: set "
                "net.checkpoint=false"
            )
        if self.checkpoint > 1 and kind.startswith("UNet"):
            raise UserError(
                f"net.checkpoint = {self.checkpoint} leaves blocks out, and of a UNet all are computed again or none: "
                "set net.checkpoint=true"
            )
        model.enable_gradient_checkpointing(run_as_marked)
        for part in model.children():
            if isinstance(part, nn.ModuleList):
                mark_recomputed(part, self.checkpoint)

    def text_rows(self, family: Family, config: Config, classes: int, shape: tuple[int, ...] = ()) -> Texts:
        """The rows of text, or codes. Raises UserError as `PipelineTexts.build`, and for codes that edit images."""
        if isinstance(self.texts, Codes):
            if family.edits:
                raise UserError(
                    f"{FIELD} has a {family.pipeline}, which edits images, and codes edit none: take captions"
                )
            return codes(classes, config[family.text_width], family.pooled_width(config))
        with not_deferred():  # tables are files, which are mapped
            return self.texts.build(classes, shape) if family.edits else self.texts.build(classes)

    def _require_fit(self, family: Family, config: Config, needs: Needs) -> None:
        """Raise UserError where the fields or the objective do not fit the model."""
        kind = config["_class_name"]
        subject = f"{FIELD} has a {kind}"
        embeds_guidance = bool(config.get("guidance_embeds"))
        if embeds_guidance and self.guidance is None:
            raise UserError(f"{subject} that embeds its guidance: set net.guidance, such as 3.5 (FLUX.1-dev)")
        if self.guidance is not None and not embeds_guidance:
            raise UserError(f"{subject} that embeds no guidance: set net.guidance=null")
        if self.lora and self.lora.convolutions and not kind.startswith("UNet"):
            raise UserError(f"{subject}, and adapters of convolutions are for UNets: set net.lora.convolutions=false")
        if self.lowpass and not family.embedder:
            raise UserError(
                f"{subject}, for whose embedding of time there is no low-pass: set net.lowpass=null, and an exact slope"
            )
        if self.route and not family.routes:
            raise UserError(f"{subject}, and of the models of diffusers SD3 and Flux alone route: set net.route=null")
        if "r" in needs.names and not family.embedder:
            raise UserError(
                f"{subject}, which has no embedder of time that a second time could be added to: take an objective of "
                "one time, objective.kind=dumo"
            )

    def build_config(self, config: Config) -> Config:
        """The config of the model that is built: the source's."""
        return config

    def model(self, config: Config) -> Any:  # noqa: ANN401, a model of diffusers
        """The model in float32, or as it is stored where its frozen weights are kept in fewer bits (`adapter.adapt`).

        Raises UserError where weights are missing or do not fit.
        """
        import_bitsandbytes()
        try:
            import diffusers  # slow to import, and an extra
        except ImportError as error:
            raise UserError(f"net 'diffusers' needs diffusers: {install_command('pretrained')}") from error
        model_class = getattr(diffusers, config["_class_name"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers', of its own code
            if torch.get_default_device().type == "meta" or self.weights == "drawn":
                return model_class.from_config(config)
            return self._load(model_class, config, model_weights(self.pipeline))

    def _load(self, model_class: Any, config: Config, stored_weights: PartWeights) -> Any:  # noqa: ANN401, as `model`
        """The model with the weights of its folder, mapped from its files until they are made. Raises as `model`."""
        folder = stored_weights.files[0].parent
        with foreign(f"{folder} holds no {model_class.__name__} that diffusers can load", HINT), not_deferred():
            from accelerate import init_empty_weights

            # diffusers maps what it need not cast
            with quietly("diffusers"):  # it would show a bar of shards
                model, report = stored_weights.build_model(model_class, torch_dtype=stored_weights.dtype)
            with init_empty_weights():
                buffers = dict(model_class.from_config(config).named_buffers())  # float32, whatever the file's type
        unfit_key = first_unfit_key(report)
        if unfit_key is not None:
            raise UserError(f"{folder}: the weights do not fit {CONFIG}: {unfit_key} is missing, unknown or misshapen")
        stored = stored_weights.load()
        keeps_dtype = self.lora is not None and self.lora.frozen != "float32"
        for path, module in model.named_modules():
            for name, p in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
                tensor = read_later(stored[f"{path}.{name}".lstrip(".")])
                setattr(module, name, nn.Parameter(tensor if keeps_dtype else tensor.float(), p.requires_grad))
            for name, _ in [*module.named_buffers(recurse=False, remove_duplicate=False)]:
                full_name = f"{path}.{name}".lstrip(".")
                if full_name in stored:
                    setattr(module, name, stored[full_name].float())
                else:
                    setattr(module, name, buffers.get(full_name))
        return model


class Shortened(Pretrained):
    """`Pretrained.short`: in no recipe."""

    depth: int  # blocks of each kind at most

    def build_config(self, config: Config) -> Config:
        """The source's config, with fewer blocks."""
        return {key: self._cut(value) if key in DEPTH_KEYS else value for key, value in config.items()}

    def _cut(self, blocks: Any) -> Any:  # noqa: ANN401, a number, a list of them, or null
        if isinstance(blocks, list | tuple):
            return [self._cut(part) for part in blocks]
        return min(blocks, self.depth) if blocks else blocks


def _require_known(needs: Needs) -> None:
    """Raise UserError where an objective needs more than velocities and flow maps at two times."""
    unknown = [f"head '{name}'" for name in needs.heads if name not in HEADS]
    unknown += [f"input '{name}'" for name in needs.names if name not in TIMES]
    unknown += [f"gauge '{name}'" for name in needs.gauges]
    if unknown:
        raise UserError(
            f"net 'diffusers' has heads v, u and m, and the inputs t and r; this objective needs {unknown[0]}: take "
            "objective.kind dumo, flow_matching, ucgm, consistency or meanflow"
        )


def model_weights(pipeline: Pipeline) -> PartWeights:
    """The weights of a pipeline's model. Raises UserError where there are none, or they are a pickle."""
    way_out = f"{pipeline.download_command(TRANSFORMER)}; or set net.weights=drawn to start from random ones"
    return require_weights(pipeline.part_folder(TRANSFORMER), DIFFUSERS, FIELD, way_out)
