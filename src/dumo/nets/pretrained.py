"""The spec of a published model to be tuned, in a folder that diffusers has saved (docs/pretrained.md).

The order of events in `Pretrained.build`:

1. `family_of` returns the model's `Family` by its config.json, or raises UserError for an unsupported model.
2. `load_model` makes the model from its config.json, and loads the layers that `Dualized` copies or changes.
3. `_require_fit` and further checks compare fields, objective and data with the model.
4. `text_rows` makes the module of texts. Its rows are loaded after the net is built (`dumo.run.net`).
5. `Dualized` wraps the model and the texts.
6. `weight_loaders` returns, for each parameter that is not loaded yet, a function that loads it from the files. `build`
   calls all of them, which maps tensors that need no cast into memory; `build_deferred` leaves this to its caller.

`Pretrained.short` returns the spec of a smaller model, for checks that read no weights, and `with_uncoded_weights` one
for exports. `model_weights` finds the files of a pipeline's weights.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from math import inf
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dumo.encoders.part import DIFFUSERS, PartWeights, first_unfit_key, require_weights
from dumo.encoders.pipeline_folder import (
    CONFIG,
    FIELD,
    SECOND_TRANSFORMER,
    TRANSFORMER,
    VAE,
    Config,
    Pipeline,
    PipelineSpec,
    has_component,
)
from dumo.encoders.transformers_library import quietly
from dumo.io.deferred import Loaders, load_parameters
from dumo.nets.checkpointing import Checkpointing, mark_recomputed, run_as_marked
from dumo.nets.dualized import Dualized, time_embedder_paths
from dumo.nets.family import Family, family_of, is_unet
from dumo.nets.lora import Lora
from dumo.nets.lowbit import CodedLinear, Coding, encode, weight_digest
from dumo.nets.precondition import Precondition
from dumo.nets.text_rows import Codes, Texts, make_codes
from dumo.nets.text_spec import PipelineTexts
from dumo.nets.vp import DiffusionToVelocity, read_scheduler
from dumo.runtime import import_bitsandbytes, require
from dumo.runtime.limits import FACTOR
from dumo.types import QUIET, Needs, UserError

# The heads and time inputs that an objective may use.
HEADS = ("v", "u", "m")
TIMES = ("t", "r")
# The keys of a config.json for the numbers of blocks of each kind.
_DEPTH_KEYS = (
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
    """The model of the run's pipeline, tuned in full or with adapters. It has a head per velocity and flow map."""

    kind: Literal["diffusers"] = "diffusers"
    precondition: ClassVar[Precondition] = "none"
    augment: ClassVar[int] = 0
    # `drawn` means random weights for the config.json.
    weights: Literal["source", "drawn"] = "source"
    # None means full fine-tuning.
    lora: Lora | None = None
    # The highest frequency of the time embedding in rad per unit of t. None disables the low-pass filter.
    lowpass: float | None = Field(default=10.0, gt=0, le=FACTOR)
    # The guidance scale that a distilled model embeds.
    guidance: float | None = Field(default=None, ge=0, le=FACTOR)
    # Captions, encoded as in the pipeline, or one random code for each class.
    texts: Annotated[PipelineTexts | Codes, Field(discriminator="kind")]
    # Activation checkpointing: keep only each block's input, and recompute the rest in the backward pass.
    checkpoint: Checkpointing = Field(default=False, json_schema_extra=QUIET)

    @property
    def time_scale(self) -> float:
        """The highest frequency of the net's time embedding, in radians per unit of t."""
        frequency = min(self.lowpass or inf, self.family.max_frequency(self.pipeline.config(TRANSFORMER)))
        diffusion = self.diffusion
        if diffusion is None:
            return frequency
        return frequency * diffusion.max_index_slope

    @property
    def family(self) -> Family:
        """The family of the pipeline's model. Raises UserError as `family_of`."""
        return family_of(self.pipeline)

    @property
    def diffusion(self) -> DiffusionToVelocity | None:
        """The conversion of a diffusion model's output to a velocity. None means that the model predicts a velocity.

        Raises UserError as `family_of` and `read_scheduler`.
        """
        if not self.family.is_diffusion:
            return None
        return read_scheduler(self.pipeline.config("scheduler"))

    @property
    def side(self) -> int:
        """The side of the pipeline's default image in pixels, or 0 if it is not square or there is no autoencoder.

        Raises UserError as `family_of`.
        """
        if VAE not in self.pipeline.index:
            return 0
        return self.family.default_side(self.pipeline.config(TRANSFORMER))

    def short(self, depth: int) -> "Shortened":
        """Return a spec of up to `depth` blocks of each kind with random weights, for checks that read no weights."""
        fields: dict[str, Any] = {**dict(self), "weights": "drawn", "depth": depth}
        return Shortened.model_construct(None, **fields).within(self._pipeline)

    def with_uncoded_weights(self) -> "Pretrained":
        """Return a spec with frozen weights that are not quantised, but in bf16 if their file is, else in float32."""
        if self.lora is None or self.lora.coding is None:
            return self
        frozen = "float32"
        if self.weights == "source" and model_weights(self.pipeline).dtype == torch.bfloat16:
            frozen = "bfloat16"
        lora = self.lora.model_copy(update={"frozen": frozen})
        return self.model_copy(update={"lora": lora})

    def build(self, needs: Needs, shape: tuple[int, ...], classes: int) -> Dualized:
        """Make a net with the heads of `needs`, for images or latents of `shape`; on the meta device without weights.

        Raises UserError if the model, its weights, the data and the objective are not compatible.
        """
        return load_parameters(*self.build_deferred(needs, shape, classes))

    def build_deferred(self, needs: Needs, shape: tuple[int, ...], classes: int) -> tuple[Dualized, Loaders]:
        """Make the net of `build` with most parameters on the meta device, and return it with their loaders."""
        _require_known(needs)
        if has_component(self.pipeline.index.get(SECOND_TRANSFORMER)):
            raise UserError(
                f"{FIELD}: {self.pipeline.source} has two transformers, each for a range of times t, and only one "
                "would be trained: use a pipeline with one, such as Wan 2.1"
            )
        if len(shape) != 3:
            raise UserError(f"net 'diffusers' needs images, not samples of shape {shape}: use net.kind mlp")
        model_family = self.family
        config = self._build_config(self.pipeline.config(TRANSFORMER))
        model, stored = self.load_model(config, model_family)
        self._require_fit(model_family, model.config, needs)
        patch = model_family.patch(model.config, shape[0])
        if shape[1] % patch or shape[2] % patch:
            raise UserError(
                f"{FIELD} has a model with patches of {patch} x {patch}, which do not divide the data's sides "
                f"{shape[1:]}: use images of another size"
            )
        texts = self.text_rows(model_family, model.config, classes, shape)
        if self.checkpoint:
            self._checkpoint_blocks(model, model_family, texts)
        net = Dualized(
            model,
            model_family,
            texts,
            needs.heads,
            patch,
            guidance=self._embedded_guidance(model_family),
            lora=self.lora,
            lowpass_limit=self.lowpass,
            diffusion=self.diffusion,
            gap="r" in needs.names,
            signed=needs.signed,
            fake_score=needs.fake_score,
        )
        return net, weight_loaders(net, stored)

    def _embedded_guidance(self, family: Family) -> float | None:
        """Return the guidance scale that the model embeds, rounded as in a pipeline with the dtype of the weights.

        FLUX.1-dev in bf16 embeds 3504 for 1000 times 3.5. Without weights there is no rounding.
        """
        if self.guidance is None:
            return None
        has_weights = self.weights == "source" and torch.get_default_device().type != "meta"
        if not has_weights:
            return self.guidance
        dtype = model_weights(self.pipeline).dtype
        scale = family.time_part_scale
        rounded = scale * torch.tensor(self.guidance, dtype=dtype, device="cpu")
        return float(rounded) / scale

    def _checkpoint_blocks(self, model: Any, family: Family, texts: Texts) -> None:  # noqa: ANN401, a diffusers model
        """Enable activation checkpointing of blocks. Raises UserError if the model does not support it."""
        kind = model.config["_class_name"]
        if texts.has_mask and not family.keeps_mask_when_checkpointed:
            raise UserError(
                f"{FIELD} has a {kind}, which loses the text mask under activation checkpointing: set "
                "net.checkpoint=false"
            )
        if self.checkpoint > 1 and is_unet(model.config):
            raise UserError(
                f"net.checkpoint = {self.checkpoint} selects some blocks, but a UNet can only checkpoint all blocks "
                "or none: set net.checkpoint=true"
            )
        model.enable_gradient_checkpointing(run_as_marked)
        for part in model.children():
            if isinstance(part, nn.ModuleList):
                mark_recomputed(part, self.checkpoint)

    def text_rows(self, family: Family, config: Config, classes: int, shape: tuple[int, ...] = ()) -> Texts:
        """Make the module of texts, or codes for `classes`. Raises UserError for codes if the model edits images."""
        if isinstance(self.texts, Codes):
            if family.edits_images:
                raise UserError(
                    f"{FIELD} has a {family.pipeline}, which edits images and cannot be used with codes: use captions"
                )
            return make_codes(classes, config[family.text_width], family.pooled_width(config))
        if family.edits_images:
            return self.texts.build(classes, shape)
        return self.texts.build(classes)

    def _require_fit(self, family: Family, config: Config, needs: Needs) -> None:
        """Raise UserError if the fields or the objective are not compatible with the model."""
        kind = config["_class_name"]
        subject = f"{FIELD} has a {kind}"
        embeds_guidance = bool(config.get("guidance_embeds"))
        if embeds_guidance and self.guidance is None:
            raise UserError(f"{subject} that embeds its guidance: set net.guidance, such as 3.5 (FLUX.1-dev)")
        if self.guidance is not None and not embeds_guidance:
            raise UserError(f"{subject} that embeds no guidance: set net.guidance=null")
        if self.lora and self.lora.convolutions and not is_unet(config):
            raise UserError(f"{subject}, and adapters of convolutions are for UNets: set net.lora.convolutions=false")
        if self.lowpass and not family.time_embedder:
            raise UserError(
                f"{subject}, whose time embedding does not support a low-pass filter: set net.lowpass=null, and "
                "objective.slope.kind=dual if the objective has a slope"
            )
        if ("r" in needs.names or needs.signed) and not family.time_embedder:
            raise UserError(
                f"{subject}, which has no time embedder for a second or negative time: use an objective with one "
                "positive time, such as objective.kind=dumo"
            )

    def _build_config(self, config: Config) -> Config:
        """Return the config of the model that is built, given that of the pipeline's model."""
        return config

    def load_model(self, config: Config, family: Family) -> tuple[Any, dict[str, Tensor]]:
        """Make the model of a config in float32, and return it with the memory-mapped tensors of its files, by name.

        The last layer and the time embedders are loaded; all other parameters are on the meta device. There are no
        tensors if weights are random (`weights`), or if the default device is the meta device. Raises UserError if
        weights are missing or do not fit.
        """
        import_bitsandbytes()
        diffusers = require("diffusers", "pretrained", "net 'diffusers'")
        model_class = getattr(diffusers, config["_class_name"])
        with warnings.catch_warnings():
            # diffusers warns about its own code.
            warnings.simplefilter("ignore", FutureWarning)
            if torch.get_default_device().type == "meta" or self.weights == "drawn":
                return model_class.from_config(config), {}
            return self._load_stored_model(model_class, config, family)

    def _load_stored_model(self, model_class: Any, config: Config, family: Family) -> tuple[Any, dict[str, Tensor]]:  # noqa: ANN401, a diffusers model
        """Make the model with the weights of its folder, like `load_model`."""
        from accelerate import init_empty_weights

        stored_weights = model_weights(self.pipeline)
        folder = stored_weights.files[0].parent
        # diffusers maps tensors that it does not cast. Hide its progress bar.
        with quietly("diffusers"):
            model, report = stored_weights.build_model(model_class, torch_dtype=stored_weights.dtype)
        with init_empty_weights():
            # Compute buffers in float32, independent of the file's dtype.
            computed_buffers = dict(model_class.from_config(config).named_buffers())
        unfit_key = first_unfit_key(report)
        if unfit_key is not None:
            raise UserError(f"{folder}: the weights do not fit {CONFIG}: {unfit_key} is missing, unknown or misshapen")

        # diffusers has cast all tensors to one dtype, so use those of the files instead.
        stored = stored_weights.load()
        loaded_prefixes = tuple(f"{path}." for path in (family.last_layer, *time_embedder_paths(model, family)))
        for path, module in model.named_modules():
            for name, p in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
                tensor = stored[_full_name(path, name)]
                if f"{path}.".startswith(loaded_prefixes):
                    tensor = tensor.float()
                else:
                    tensor = torch.empty_like(tensor, dtype=torch.float32, device="meta")
                setattr(module, name, nn.Parameter(tensor, p.requires_grad))
            for name, _ in [*module.named_buffers(recurse=False, remove_duplicate=False)]:
                full_name = _full_name(path, name)
                if full_name in stored:
                    setattr(module, name, stored[full_name].float())
                else:
                    setattr(module, name, computed_buffers.get(full_name))
        return model, stored


class Shortened(Pretrained):
    """The spec of a model with at most `depth` blocks of each kind and random weights, made by `Pretrained.short`."""

    depth: int

    def _build_config(self, config: Config) -> Config:
        """Return the config of the pipeline's model, with fewer blocks."""
        short_config = dict(config)
        for key in _DEPTH_KEYS:
            if key in config:
                short_config[key] = self._limit_depth(config[key])
        return short_config

    def _limit_depth(self, num_blocks: Any) -> Any:  # noqa: ANN401, a number, a list of numbers, or null
        """Return a number of blocks of a config, limited to `depth`. null and 0 are unchanged."""
        if isinstance(num_blocks, list | tuple):
            return [self._limit_depth(number) for number in num_blocks]
        return min(num_blocks, self.depth) if num_blocks else num_blocks


def model_weights(pipeline: Pipeline) -> PartWeights:
    """Find the weights of a pipeline's model. Raises UserError if there are none, or only pickles."""
    pipeline.fetch()
    way_out = "set net.weights=drawn to start from random weights"
    return require_weights(pipeline.part_folder(TRANSFORMER), DIFFUSERS, FIELD, way_out)


def weight_loaders(net: Dualized, stored: Mapping[str, Tensor]) -> Loaders:
    """Return, by name, a function for each parameter on the meta device that loads it from the `stored` tensors.

    It returns the tensor of this name in the parameter's dtype, or the codes of a quantised layer, computed from the
    stored tensor. Without `stored`, return {}.
    """
    if not stored:
        return {}
    loaders: dict[str, Callable[[], Tensor]] = {}
    # A layer's codes and scales are computed together.
    encode_once = lru_cache(maxsize=1)(encode)

    def load_code(name: str, weight: Tensor, coding: Coding) -> Tensor:
        if name == "origin":
            return weight_digest(weight, coding)
        codes, scales = encode_once(weight, coding)
        return codes if name == "weight" else scales

    for path, layer in net.model.named_modules():
        # A layer that an adapter wraps has the adapter's path in the files.
        stored_path = path.removesuffix(".base_layer")
        for name, p in layer.named_parameters(recurse=False, remove_duplicate=False):
            if not p.is_meta:
                continue
            if isinstance(layer, CodedLinear) and name != "bias":
                load = partial(load_code, name, stored[f"{stored_path}.weight"], layer.coding)
            else:
                load = partial(stored[_full_name(stored_path, name)].to, p.dtype)
            loaders[_full_name(f"model.{path}" if path else "model", name)] = load
    return loaders


def _require_known(needs: Needs) -> None:
    """Raise UserError if an objective needs more than velocities and flow maps at two times."""
    heads = (*HEADS, "w") if needs.fake_score else HEADS
    unknown = [f"head '{name}'" for name in needs.heads if name not in heads]
    unknown += [f"input '{name}'" for name in needs.names if name not in TIMES]
    unknown += [f"gauge '{name}'" for name in needs.gauges]
    if unknown:
        raise UserError(
            f"net 'diffusers' has heads v, u and m, and the inputs t and r; this objective needs {unknown[0]}: set "
            "objective.kind to dumo, flow_matching, ucgm, consistency or meanflow"
        )


def _full_name(path: str, name: str) -> str:
    """Return the name of a tensor in a state dict, from the path of its module and its name there."""
    return f"{path}.{name}" if path else name
