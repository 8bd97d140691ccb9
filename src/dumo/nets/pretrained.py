"""A published flow transformer, from a folder as diffusers saves it, to be tuned (docs/pretrained.md)."""

import json
import warnings
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.config import JsonDict
from torch import nn

from dumo.io import digest, weights
from dumo.io.read import foreign, read_settings, user_path
from dumo.nets.adapter import Lora
from dumo.nets.block import run_lean
from dumo.nets.dualized import Dualized
from dumo.nets.family import TURN, Config, Family, family
from dumo.nets.precondition import Precondition
from dumo.nets.rows import Texts, codes
from dumo.nets.text import Text
from dumo.runtime import install
from dumo.runtime.bound import FACTOR
from dumo.types import MAYBE_PLACE, PINNED, QUIET, Needs, Spec, UserError

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # of weights in several files
PICKLE = "diffusion_pytorch_model.bin"
HERE = files("dumo.nets") / "published"  # configs of models on the Hugging Face hub, and of small ones
PUBLISHED = ("sd3-medium", "sana-1600m", "flux-dev", "qwen-image", "z-image")
SMALL = ("sd3-small", "sd3-digits")  # ours: for latents of CIFAR-10, and for digits
HINT = (
    f"--set net.source=... names a folder with {CONFIG} and {WEIGHTS}, as diffusers saves a transformer or a pipeline."
)
NAMED: JsonDict = {**MAYBE_PLACE, "names": [*PUBLISHED, *SMALL]}
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
)


class Pretrained(Spec):
    """A transformer of diffusers, tuned in full or by adapters; with a head for each velocity and flow map."""

    kind: Literal["diffusers"] = "diffusers"
    precondition: ClassVar[Precondition] = "none"
    augment: ClassVar[int] = 0
    # The folder of a transformer, or of a pipeline; or a name in PUBLISHED or SMALL, which has no weights.
    source: str = Field(json_schema_extra=NAMED)
    weights: Literal["source", "drawn"] = "source"  # drawn: random weights for the config.json
    lora: Lora | None = None  # None: all weights are tuned
    lowpass: float | None = Field(default=10.0, gt=0, le=FACTOR)  # rad: quicker waves of time are cut; None: none are
    guidance: float | None = Field(default=None, ge=0, le=FACTOR)  # the embedded number of a distilled model
    texts: Text | None = None  # embeddings of captions; None: codes for the classes
    # Of config.json, found when a run begins; frozen weights have a digest of their own (`dumo.training.frozen`).
    config: str | None = Field(default=None, exclude_if=lambda config: config is None, json_schema_extra=PINNED)
    # Keep each block's input alone, and compute the rest again in the backward pass.
    checkpoint: bool = Field(default=False, json_schema_extra=QUIET)

    @property
    def time_scale(self) -> float:
        """The quickest wave of time that the net may read, in radians per unit of t."""
        return self.lowpass or TURN

    def short(self, depth: int) -> "Shortened":
        """The same model with up to `depth` blocks of each kind and random weights: for checks that read no weights."""
        fields: dict[str, Any] = {**dict(self), "weights": "drawn", "depth": depth, "config": None}
        return Shortened.model_construct(None, **fields)  # unchecked: doctor's texts are in no recipe, either

    def found(self) -> "Pretrained":
        """The same with the hash of its config.json. Raises UserError as `read_config`."""
        return self.model_copy(update={"config": hashed(read_config(self.source)[1])})

    def build(self, needs: Needs, shape: tuple[int, ...], classes: int) -> Dualized:
        """A net with the heads of `needs`, for images or latents of `shape`; on the meta device from config.json alone.

        Raises UserError where the model, its weights, the data or the objective do not fit one another.
        """
        demand(needs)
        if len(shape) != 3:
            raise UserError(f"net 'diffusers' takes images, not samples of shape {shape}: use net.kind mlp")
        folder, config = read_config(self.source)
        if self.config not in (None, hashed(config)):
            raise UserError(
                f"net.source: {folder or self.source} has another {CONFIG} than when this run began: put that back, or "
                "say where the model is with --set net.source=..."
            )
        row = family(config)
        with foreign(f"net.source: {self.source} describes no {config['_class_name']}", HINT):
            return self.made(row, folder, config, needs, shape, classes)

    def made(
        self, row: Family, folder: Path | None, config: Config, needs: Needs, shape: tuple[int, ...], classes: int
    ) -> Dualized:
        """The net of `build`, from a config that may say anything. Raises as that, and whatever diffusers does."""
        model = self.model(folder, self.shaped(config))
        self.fit(row, config := model.config)
        p = row.patch(config, shape[0])
        if shape[1] % p or shape[2] % p:
            raise UserError(f"net.source cuts patches of {p} x {p}, which do not divide the data's sides {shape[1:]}")
        texts = self.text_rows(row, config, classes)
        if self.checkpoint and texts.masked and not row.lean_masks:
            raise UserError(
                f"net.source is a {config['_class_name']}, which forgets the mask of its texts in blocks that are "
                "computed again: set net.checkpoint=false, or leave the mask out of net.texts"
            )
        if self.checkpoint:
            model.enable_gradient_checkpointing(run_lean)
        return Dualized(model, row, texts, needs.heads, p, guidance=self.guidance, lora=self.lora, limit=self.lowpass)

    def text_rows(self, row: Family, config: Config, classes: int) -> Texts:
        """The rows of text, or codes. Raises UserError where the rows are not what the model takes."""
        width, pooled = config[row.text], config[row.pooled] if row.pooled else 0
        if self.texts is None:
            return codes(classes, width, pooled)
        found = self.texts.build(classes)
        for what, has, takes in (("tokens", found.width, width), ("pooled", found.pooled_width, pooled)):
            if has != takes:
                there, wants = (f"{n} numbers" if n else "none" for n in (has, takes))
                raise UserError(f"net.texts has {what} of {there}, this model takes {wants}: take another text encoder")
        if found.masked and not row.masked:
            raise UserError(
                "net.texts has a mask, and this model takes none: leave it out, or set net.texts.encoder.pad=true"
            )
        return found

    def fit(self, row: Family, config: Config) -> None:
        """Raise UserError where the fields do not fit the model."""
        what, distilled = f"net.source is a {config['_class_name']}", bool(config.get("guidance_embeds"))
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

    def model(self, folder: Path | None, config: Config) -> Any:  # noqa: ANN401, a model of diffusers
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
            return self.load(kind, with_weights(folder, self.source, config), config)

    def load(self, kind: Any, folder: Path, config: Config) -> Any:  # noqa: ANN401, as `model`
        """The model with the weights of a folder. Raises as `model`."""
        halves = self.lora is not None and self.lora.frozen == "bfloat16"
        with foreign(f"{folder} holds no {config['_class_name']} that diffusers can load", HINT):
            model, info = kind.from_pretrained(
                folder,
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
                torch_dtype=torch.bfloat16 if halves else torch.float32,
            )
        names = ("missing_keys", "unexpected_keys", "mismatched_keys")
        if wrong := [key for name in names for key in info.get(name, ())]:
            raise UserError(f"{folder}: the weights do not fit {CONFIG}: {wrong[0]} is missing, unknown or misshapen")
        if halves:
            as_stored(model, folder)
        return model


class Shortened(Pretrained):
    """`Pretrained.short`: in no recipe."""

    depth: int  # blocks of each kind at most

    def shaped(self, config: Config) -> Config:
        """The source's config, with fewer blocks."""
        return {key: min(value, self.depth) if key in DEPTHS else value for key, value in config.items()}


def demand(needs: Needs) -> None:
    """Raise UserError where an objective needs more than velocities and flow maps at a time."""
    strange = [f"head '{name}'" for name in needs.heads if name not in HEADS]
    strange += [f"input '{name}'" for name in needs.names if name != "t"] + [f"gauge '{name}'" for name in needs.gauges]
    if strange:
        raise UserError(
            f"net 'diffusers' has heads v and u, and the input t alone; this objective needs {strange[0]}: take "
            "objective.kind dumo, flow_matching, ucgm or consistency"
        )


def read_config(source: str) -> tuple[Path | None, dict[str, Any]]:
    """The folder of a transformer, and its config.json; no folder for a model in PUBLISHED or SMALL.

    Raises UserError where there is none.
    """
    if source in (*PUBLISHED, *SMALL):
        return None, json.loads((HERE / f"{source}.json").read_text(encoding="utf-8"))
    path = user_path(source, "net.source")
    folder = next((f for f in (path, path / "transformer") if (f / CONFIG).is_file()), None)
    if folder is None:
        why = f"has no {CONFIG}" if path.is_dir() else "is no folder"
        raise UserError(f"net.source: {source} {why}. {HINT}")
    return folder, read_settings(folder / CONFIG, HINT)


def hashed(config: Mapping[str, Any]) -> str:
    """A hash of what a config says of the model, not of who wrote it."""
    said = {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}
    return digest.short(json.dumps(said, sort_keys=True))


def as_stored(model: nn.Module, folder: Path) -> None:
    """Set the tensors whose dtype differs from the folder's to the folder's own: mapped, not read."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for file in folder.glob(f"{Path(WEIGHTS).stem}*.safetensors"):
        for name, x in weights.load(file).items():
            if name in own and own[name].dtype != x.dtype:
                own[name].data = x


def with_weights(folder: Path | None, source: str, config: Config) -> Path:
    """The folder, if it has weights. Raises UserError where there are none, or they are a pickle."""
    if folder is None:
        name = config["_name_or_path"]
        raise UserError(
            f"net.source: {source} is known without its weights. Fetch them, hf download {name} --include "
            f"'transformer/*' --local-dir DIR, and set net.source=DIR"
        )
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return folder
    if (folder / PICKLE).is_file():
        with weights.open_safetensors(folder / PICKLE):
            pass
    raise UserError(
        f"net.source: {folder} has {CONFIG} and no weights: put {WEIGHTS} next to it, or set net.weights=drawn to "
        "start from random ones"
    )
