"""A published model, from a folder as diffusers saves it, to be tuned (docs/pretrained.md)."""

import warnings
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from dumo.encoders.pipeline import CONFIG, FIELD, HINT, TRANSFORMER, VAE, Config, Pipeline, PipelineSpec
from dumo.io import weights
from dumo.io.deferred import leaf, unnoted
from dumo.io.read import foreign
from dumo.nets.adapter import Lora
from dumo.nets.block import Lean, make_lean, run_lean
from dumo.nets.dualized import Dualized
from dumo.nets.family import TURN, Family, family
from dumo.nets.precondition import Precondition
from dumo.nets.route import Route
from dumo.nets.rows import Codes, Texts, codes
from dumo.nets.table import PipelineTexts
from dumo.nets.vp import DiffusionToVelocity, framed
from dumo.runtime import import_bitsandbytes, install
from dumo.runtime.bound import FACTOR
from dumo.types import QUIET, Needs, UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # of weights in several files
PICKLE = "diffusion_pytorch_model.bin"
HEADS, TIMES = ("v", "u", "m"), ("t", "r")
DEPTHS = (  # keys of a config: numbers of blocks
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
    checkpoint: Lean = Field(default=False, json_schema_extra=QUIET)

    @property
    def time_scale(self) -> float:
        """The quickest wave of time that the net may read, in radians per unit of t."""
        return (self.lowpass or TURN) * (frame.steepest if (frame := self.frame) else 1.0)

    @property
    def frame(self) -> DiffusionToVelocity | None:
        """How a model of a diffusion is a velocity; None: it learned one. Raises UserError as `family` and `framed`."""
        row = family(self.pipeline.config(TRANSFORMER), self.pipeline.class_name)
        return framed(self.pipeline.config("scheduler")) if row.noise else None

    @property
    def side(self) -> int:
        """The pixels along a side of the pipeline's default image; 0: it is no square, or there is no autoencoder.

        Raises UserError as `family`.
        """
        config = self.pipeline.config(TRANSFORMER)
        return 0 if VAE not in self.pipeline.index else family(config, self.pipeline.class_name).side(config)

    def short(self, depth: int) -> "Shortened":
        """The same model with up to `depth` blocks of each kind and random weights: for checks that read no weights."""
        fields: dict[str, Any] = {**dict(self), "weights": "drawn", "depth": depth, "route": None}
        made = Shortened.model_construct(None, **fields)  # unchecked: doctor's texts are in no recipe, either
        return made.within(self._pipeline)

    def uncoded(self) -> "Pretrained":
        """The same with a base as it is stored, where that is coded: in bf16, if it is, else in float32."""
        if self.lora is None or self.lora.coding is None:
            return self
        half = self.weights == "source" and stored(with_weights(self.pipeline)) == torch.bfloat16
        lora = self.lora.model_copy(update={"frozen": "bfloat16" if half else "float32"})
        return self.model_copy(update={"lora": lora})

    def build(self, needs: Needs, shape: tuple[int, ...], classes: int) -> Dualized:
        """A net with the heads of `needs`, for images or latents of `shape`; on the meta device from config.json alone.

        Raises UserError where the model, its weights, the data or the objective do not fit one another.
        """
        demand(needs)
        if len(shape) != 3:
            raise UserError(f"net 'diffusers' takes images, not samples of shape {shape}: use net.kind mlp")
        config = self.pipeline.config(TRANSFORMER)
        row = family(config, self.pipeline.class_name)
        with foreign(f"{FIELD}: {self.pipeline.source} describes no {config['_class_name']}", HINT):
            return self.made(row, config, needs, shape, classes)

    def made(self, row: Family, config: Config, needs: Needs, shape: tuple[int, ...], classes: int) -> Dualized:
        """The net of `build`, from a config that may say anything. Raises as that, and whatever diffusers does."""
        model = self.model(self.shaped(config))
        self.fit(row, config := model.config, needs)
        p = row.patch(config, shape[0])
        if shape[1] % p or shape[2] % p:
            raise UserError(
                f"{FIELD} has a model of patches of {p} x {p}, which do not divide the data's sides {shape[1:]}"
            )
        texts = self.text_rows(row, config, classes, shape)
        if self.checkpoint and texts.masked and not row.lean_masks:
            raise UserError(
                f"{FIELD} has a {config['_class_name']}, which forgets the mask of its texts in blocks that are "
                "computed again: set net.checkpoint=false"
            )
        if self.checkpoint > 1 and config["_class_name"].startswith("UNet"):
            raise UserError(
                f"net.checkpoint = {self.checkpoint} leaves blocks out, and of a UNet all are computed again or none: "
                "set net.checkpoint=true"
            )
        if self.checkpoint:
            model.enable_gradient_checkpointing(run_lean)
            for part in model.children():
                make_lean(part if isinstance(part, nn.ModuleList) else (), self.checkpoint)
        return Dualized(
            model, row, texts, needs.heads, p,
            guidance=self.guidance, lora=self.lora, limit=self.lowpass, frame=self.frame, gap="r" in needs.names,
            route=self.route,
        )  # fmt: skip

    def text_rows(self, row: Family, config: Config, classes: int, shape: tuple[int, ...] = ()) -> Texts:
        """The rows of text, or codes. Raises UserError as `PipelineTexts.build`, and for codes that edit images."""
        if isinstance(self.texts, Codes) and row.edits:
            raise UserError(f"{FIELD} has a {row.pipeline}, which edits images, and codes edit none: take captions")
        if isinstance(self.texts, Codes):
            return codes(classes, config[row.text], row.pooled_width(config))
        with unnoted():  # tables are files, which are mapped
            return self.texts.build(classes, shape) if row.edits else self.texts.build(classes)

    def fit(self, row: Family, config: Config, needs: Needs) -> None:
        """Raise UserError where the fields or the objective do not fit the model."""
        what, distilled = f"{FIELD} has a {config['_class_name']}", bool(config.get("guidance_embeds"))
        if distilled and self.guidance is None:
            raise UserError(f"{what} that embeds its guidance: set net.guidance, such as 3.5 (FLUX.1-dev)")
        if self.guidance is not None and not distilled:
            raise UserError(f"{what} that embeds no guidance: set net.guidance=null")
        if self.lora and self.lora.convolutions and not config["_class_name"].startswith("UNet"):
            raise UserError(f"{what}, and adapters of convolutions are for UNets: set net.lora.convolutions=false")
        if self.lowpass and not row.embedder:
            raise UserError(
                f"{what}, for whose embedding of time there is no low-pass: set net.lowpass=null, and an exact slope"
            )
        if self.route and not (row.routes and self.route.kind == "tread"):
            raise UserError(
                f"{what}, and net.route of kind {self.route.kind}: of the models of diffusers SD3 and Flux route, by "
                "kind tread: set net.route=null"
            )
        if "r" in needs.names and not row.embedder:
            raise UserError(
                f"{what}, which has no embedder of time that a second time could be added to: take an objective of one "
                "time, objective.kind=dumo"
            )

    def shaped(self, config: Config) -> Config:
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
            raise UserError(f"net 'diffusers' needs diffusers: {install('pretrained')}") from error
        kind = getattr(diffusers, config["_class_name"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers', of its own code
            if torch.get_default_device().type == "meta" or self.weights == "drawn":
                return kind.from_config(config)
            return self.load(kind, config, with_weights(self.pipeline))

    def load(self, kind: Any, config: Config, folder: Path) -> Any:  # noqa: ANN401, as `model`
        """The model with the weights of a folder, mapped from its files until they are made. Raises as `model`."""
        with foreign(f"{folder} holds no {kind.__name__} that diffusers can load", HINT), unnoted():
            from accelerate import init_empty_weights

            model, info = kind.from_pretrained(
                folder,
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
                torch_dtype=stored(folder),
            )
            with init_empty_weights():
                tables = dict(kind.from_config(config).named_buffers())  # in float32, whatever the file's type
        names = ("missing_keys", "unexpected_keys", "mismatched_keys")
        if wrong := [key for name in names for key in info.get(name, ())]:
            raise UserError(f"{folder}: the weights do not fit {CONFIG}: {wrong[0]} is missing, unknown or misshapen")
        found = {name: x for file in files_of(folder) for name, x in weights.load(file).items()}
        kept = self.lora is not None and self.lora.frozen != "float32"
        for place, module in model.named_modules():
            for name, p in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
                x = leaf(found[f"{place}.{name}".lstrip(".")])
                setattr(module, name, nn.Parameter(x if kept else x.float(), p.requires_grad))
            for name, _ in [*module.named_buffers(recurse=False, remove_duplicate=False)]:
                full = f"{place}.{name}".lstrip(".")
                setattr(module, name, found[full].float() if full in found else tables.get(full))
        return model


class Shortened(Pretrained):
    """`Pretrained.short`: in no recipe."""

    depth: int  # blocks of each kind at most

    def shaped(self, config: Config) -> Config:
        """The source's config, with fewer blocks."""

        def cut(value: Any) -> Any:  # noqa: ANN401, numbers, lists of them, or null
            return [cut(v) for v in value] if isinstance(value, list | tuple) else value and min(value, self.depth)

        return {key: cut(value) if key in DEPTHS else value for key, value in config.items()}


def demand(needs: Needs) -> None:
    """Raise UserError where an objective needs more than velocities and flow maps at two times."""
    strange = [f"head '{name}'" for name in needs.heads if name not in HEADS]
    strange += [f"input '{name}'" for name in needs.names if name not in TIMES] + [
        f"gauge '{name}'" for name in needs.gauges
    ]
    if strange:
        raise UserError(
            f"net 'diffusers' has heads v, u and m, and the inputs t and r; this objective needs {strange[0]}: take "
            "objective.kind dumo, flow_matching, ucgm, consistency or meanflow"
        )


def files_of(folder: Path) -> list[Path]:
    """The files of a model's weights, in order; not those of another precision, which may lie next to them."""
    whole = folder / WEIGHTS
    return [whole] if whole.is_file() else sorted(folder.glob(f"{Path(WEIGHTS).stem}-*-of-*.safetensors"))


def stored(folder: Path) -> torch.dtype:
    """The dtype of the first of a model's weights: diffusers maps what it need not cast."""
    return next(iter(weights.load(files_of(folder)[0]).values())).dtype


def with_weights(pipeline: Pipeline) -> Path:
    """The folder of the model, if it has weights. Raises UserError where there are none, or they are a pickle."""
    folder = pipeline.place(TRANSFORMER)
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return folder
    if (folder / PICKLE).is_file():
        with weights.open_safetensors(folder / PICKLE):
            pass
    raise UserError(
        f"{FIELD}: {folder} has {CONFIG} and no weights: {pipeline.fetch(TRANSFORMER)}; or set net.weights=drawn to "
        "start from random ones"
    )
