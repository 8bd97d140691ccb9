"""A published model, from a folder as diffusers saves it, to be tuned (docs/pretrained.md)."""

import warnings
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from dumo.encoders.pipeline import CONFIG, FIELD, HINT, TRANSFORMER, VAE, Config, Pipeline, Reading
from dumo.flow.precision import single
from dumo.io import weights
from dumo.io.read import foreign
from dumo.nets.adapter import Lora
from dumo.nets.block import run_lean
from dumo.nets.dualized import Dualized
from dumo.nets.family import TURN, Family, family
from dumo.nets.precondition import Precondition
from dumo.nets.rows import Codes, Texts, codes
from dumo.nets.table import PipelineTexts
from dumo.nets.vp import Frame, framed
from dumo.runtime import install
from dumo.runtime.bound import FACTOR
from dumo.types import QUIET, Needs, UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # of weights in several files
PICKLE = "diffusion_pytorch_model.bin"
HEADS = ("v", "u")
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


class Pretrained(Reading):
    """The transformer of the run's pipeline, tuned in full or by adapters; a head for each velocity and flow map."""

    kind: Literal["diffusers"] = "diffusers"
    precondition: ClassVar[Precondition] = "none"
    augment: ClassVar[int] = 0
    weights: Literal["source", "drawn"] = "source"  # drawn: random weights for the config.json
    lora: Lora | None = None  # None: all weights are tuned
    lowpass: float | None = Field(default=10.0, gt=0, le=FACTOR)  # rad: quicker waves of time are cut; None: none are
    guidance: float | None = Field(default=None, ge=0, le=FACTOR)  # the embedded number of a distilled model
    # Captions as the pipeline reads them; or codes for the classes, for who asks for them.
    texts: Annotated[PipelineTexts | Codes, Field(discriminator="kind")]
    # Keep each block's input alone, and compute the rest again in the backward pass.
    checkpoint: bool = Field(default=False, json_schema_extra=QUIET)

    @property
    def time_scale(self) -> float:
        """The quickest wave of time that the net may read, in radians per unit of t."""
        return (self.lowpass or TURN) * (frame.steepest if (frame := self.frame) else 1.0)

    @property
    def frame(self) -> Frame | None:
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
        fields: dict[str, Any] = {**dict(self), "weights": "drawn", "depth": depth}
        made = Shortened.model_construct(None, **fields)  # unchecked: doctor's texts are in no recipe, either
        return made.within(self._pipeline)

    def mapped(self) -> "Pretrained":
        """The same, its weights as they are stored and mapped from their files: of several ranks each reads its part.

        What is to be trained is in float32 only after it was sharded (`dumo.training.layout`). Adapters without a base
        in bf16 read all of it.
        """
        if self.lora or self.weights == "drawn":
            return self
        made = Mapped.model_construct(None, **dict(self))  # as `short`
        return made.within(self._pipeline)

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
        self.fit(row, config := model.config)
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
        if self.checkpoint:
            model.enable_gradient_checkpointing(run_lean)
        return Dualized(
            model, row, texts, needs.heads, p,
            guidance=self.guidance, lora=self.lora, limit=self.lowpass, frame=self.frame,
        )  # fmt: skip

    def text_rows(self, row: Family, config: Config, classes: int, shape: tuple[int, ...] = ()) -> Texts:
        """The rows of text, or codes. Raises UserError as `PipelineTexts.build`, and for codes that edit images."""
        if isinstance(self.texts, Codes) and row.edits:
            raise UserError(f"{FIELD} has a {row.pipeline}, which edits images, and codes edit none: take captions")
        if isinstance(self.texts, Codes):
            return codes(classes, config[row.text], row.pooled_width(config))
        return self.texts.build(classes, shape) if row.edits else self.texts.build(classes)

    def fit(self, row: Family, config: Config) -> None:
        """Raise UserError where the fields do not fit the model."""
        what, distilled = f"{FIELD} has a {config['_class_name']}", bool(config.get("guidance_embeds"))
        if distilled and self.guidance is None:
            raise UserError(f"{what} that embeds its guidance: set net.guidance, such as 3.5 (FLUX.1-dev)")
        if self.guidance is not None and not distilled:
            raise UserError(f"{what} that embeds no guidance: set net.guidance=null")
        if self.lowpass and not row.embedder:
            raise UserError(
                f"{what}, for whose embedding of time there is no low-pass: set net.lowpass=null, and an exact slope"
            )

    def shaped(self, config: Config) -> Config:
        """The config of the model that is built: the source's."""
        return config

    def model(self, config: Config) -> Any:  # noqa: ANN401, a model of diffusers
        """The model in float32, or as it is stored where its frozen weights are kept in bf16.

        Raises UserError where weights are missing or do not fit.
        """
        try:
            import diffusers  # slow to import, and an extra
        except ImportError as error:
            raise UserError(f"net 'diffusers' needs diffusers: {install('pretrained')}") from error
        kind = getattr(diffusers, config["_class_name"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers', of its own code
            if torch.get_default_device().type == "meta" or self.weights == "drawn":
                return kind.from_config(config)
            return self.load(kind, with_weights(self.pipeline))

    def load(self, kind: Any, folder: Path) -> Any:  # noqa: ANN401, as `model`
        """The model with the weights of a folder. Raises as `model`."""
        with foreign(f"{folder} holds no {kind.__name__} that diffusers can load", HINT):
            model, info = kind.from_pretrained(
                folder,
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
                torch_dtype=stored(folder) if self.kept else torch.float32,
            )
        names = ("missing_keys", "unexpected_keys", "mismatched_keys")
        if wrong := [key for name in names for key in info.get(name, ())]:
            raise UserError(f"{folder}: the weights do not fit {CONFIG}: {wrong[0]} is missing, unknown or misshapen")
        if self.kept:
            as_stored(model, folder)
        return model

    @property
    def kept(self) -> bool:
        """Whether weights stay as they are stored when they are read."""
        return self.lora is not None and self.lora.frozen == "bfloat16"


class Mapped(Pretrained):
    """`Pretrained.mapped`: in no recipe."""

    def build(self, needs: Needs, shape: tuple[int, ...], classes: int) -> Dualized:
        """As `Pretrained.build`. Buffers, and the few weights that are frozen, are in float32, of which a digest is."""
        net = super().build(needs, shape, classes)
        for x in (*net.model.buffers(), *(p for p in net.parameters() if not p.requires_grad)):
            x.data = single(x.data)
        return net

    @property
    def kept(self) -> bool:
        """They do."""
        return True


class Shortened(Pretrained):
    """`Pretrained.short`: in no recipe."""

    depth: int  # blocks of each kind at most

    def shaped(self, config: Config) -> Config:
        """The source's config, with fewer blocks."""

        def cut(value: Any) -> Any:  # noqa: ANN401, numbers, lists of them, or null
            return [cut(v) for v in value] if isinstance(value, list | tuple) else value and min(value, self.depth)

        return {key: cut(value) if key in DEPTHS else value for key, value in config.items()}


def demand(needs: Needs) -> None:
    """Raise UserError where an objective needs more than velocities and flow maps at a time."""
    strange = [f"head '{name}'" for name in needs.heads if name not in HEADS]
    strange += [f"input '{name}'" for name in needs.names if name != "t"] + [f"gauge '{name}'" for name in needs.gauges]
    if strange:
        raise UserError(
            f"net 'diffusers' has heads v and u, and the input t alone; this objective needs {strange[0]}: take "
            "objective.kind dumo, flow_matching, ucgm or consistency"
        )


def files_of(folder: Path) -> list[Path]:
    """The files of a model's weights, in order."""
    whole = folder / WEIGHTS  # next to which there may be the same in another precision
    return [whole] if whole.is_file() else sorted(folder.glob(f"{Path(WEIGHTS).stem}-*.safetensors"))


def stored(folder: Path) -> torch.dtype:
    """The dtype of the first of a model's weights: diffusers maps what it need not cast."""
    return next(iter(weights.load(files_of(folder)[0]).values())).dtype


def as_stored(model: nn.Module, folder: Path) -> None:
    """Set the tensors whose dtype differs from the folder's to the folder's own: mapped, not read."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for file in files_of(folder):
        for name, x in weights.load(file).items():
            if name in own and own[name].dtype != x.dtype:
                own[name].data = x


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
