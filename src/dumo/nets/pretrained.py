"""A flow transformer that others trained, from a folder as diffusers saves it, to be tuned (docs/pretrained.md)."""

import json
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from dumo.bound import BLOCKS, FACTOR
from dumo.io import weights
from dumo.io.json import read_json
from dumo.io.path import user_path
from dumo.nets import checkpointing
from dumo.nets.adapter import Lora
from dumo.nets.dualized import Dualized
from dumo.nets.family import TURN, Config, Family, family
from dumo.nets.precondition import Precondition
from dumo.nets.text import Text, Texts
from dumo.nets.text.file import codes
from dumo.types import Needs, Spec, UserError

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # of weights in several files
PICKLE = "diffusion_pytorch_model.bin"
HERE = files("dumo.nets") / "published"  # configs of models on the Hugging Face hub, and of small ones
PUBLISHED = ("sd3-medium", "sana-1600m", "flux-dev", "qwen-image", "z-image")
SMALL = ("sd3-small", "sd3-digits")  # ours: for latents of CIFAR-10, and for digits
HINT = f"net.source names a folder with {CONFIG} and {WEIGHTS}, as diffusers saves a transformer or a pipeline."
HEADS = ("v", "u")
LISTS = (  # keys of how many blocks a model has of a kind
    *("num_layers", "num_single_layers", "num_mmdit_layers", "num_single_dit_layers", "num_refiner_layers"),
    *("n_layers", "n_refiner_layers", "depth"),
)


class Pretrained(Spec):
    """A transformer of diffusers, tuned in full or by adapters; with a head for each velocity and flow map."""

    kind: Literal["diffusers"] = "diffusers"
    precondition: ClassVar[Precondition] = "none"
    source: str  # the folder of a transformer, or of a pipeline; or a name in PUBLISHED or SMALL, which has no weights
    weights: Literal["source", "drawn"] = "source"  # drawn: from config.json alone, anew
    depth: int | None = Field(default=None, ge=1, le=BLOCKS)  # so many blocks of each kind, drawn; None: all
    lora: Lora | None = None  # None: all weights are tuned
    lowpass: float | None = Field(default=10.0, gt=0, le=FACTOR)  # rad: quicker waves of time are cut; None: as it is
    guidance: float | None = Field(default=None, ge=0, le=FACTOR)  # the embedded number of a distilled model
    texts: Text | None = None  # what a text encoder made; None: codes for the classes
    own_norm: bool = False  # a norm of its own for every head, where a model has one that can be copied
    checkpoint: bool = False  # keep each block's input alone, and compute the rest again in the backward pass

    @property
    def time_scale(self) -> float:
        """The quickest wave of time that the net may read, in radians per unit of t."""
        return self.lowpass or TURN

    @property
    def short(self) -> "Pretrained":
        """With one block of each kind, drawn, where all fits a model or none does; else as it is."""
        if self.depth or (self.lora and self.lora.targets):
            return self
        return self.model_copy(update={"depth": 1, "weights": "drawn"})

    def build(self, needs: Needs, shape: tuple[int, ...], classes: int) -> Dualized:
        """A net with the heads of `needs`, for images or latents of `shape`; on the meta device from config.json alone.

        Raises UserError where the model, its weights, the data or the objective do not fit one another.
        """
        demand(needs)
        if len(shape) != 3:
            raise UserError(f"net 'diffusers' takes images, not samples of shape {shape}: use net.kind mlp")
        folder, given = read_config(self.source)
        row = family(given)
        model = self.model(folder, given)
        self.fit(row, config := model.config)
        p = row.patch(config, shape[0])
        if shape[1] % p or shape[2] % p:
            raise UserError(f"net.source cuts patches of {p} x {p}, which do not divide the data's sides {shape[1:]}")
        told = self.told(row, config, classes)
        if self.checkpoint and told.masked and not row.lean_masks:
            raise UserError(
                f"net.source is a {config['_class_name']}, which forgets the mask of its texts in blocks that are "
                "computed again: set net.checkpoint=false, or leave the mask out of net.texts"
            )
        if self.checkpoint:
            model.enable_gradient_checkpointing(checkpointing.leanly)
        return Dualized(
            *(model, row, told, needs.heads, p),
            guidance=self.guidance,
            lora=self.lora,
            limit=self.lowpass,
            own_norm=self.own_norm,
        )

    def told(self, row: Family, config: Config, classes: int) -> Texts:
        """The rows of text, or codes. Raises UserError where the rows are not what the model takes."""
        width, pooled = config[row.text], config[row.pooled] if row.pooled else 0
        if self.texts is None:
            return codes(classes, width, pooled)
        found = self.texts.build(classes)
        for what, has, takes in (("tokens", found.width, width), ("pooled", found.pooled_width, pooled)):
            if has != takes:
                said, wants = (f"{n} numbers" if n else "none" for n in (has, takes))
                raise UserError(f"net.texts has {what} of {said}, this model takes {wants}: take another text encoder")
        if found.masked and not row.masked:
            raise UserError(
                "net.texts has a mask, of which this model can be told nothing: leave it out, or set "
                "net.texts.encoder.pad=true"
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
        if self.own_norm and not row.norm:
            raise UserError(f"{what}, whose last norm cannot be copied: set net.own_norm=false")
        if self.lora and self.lora.dropout and self.checkpoint:
            raise UserError("net.lora.dropout and net.checkpoint do not go together: set one of them to 0 or false")

    def model(self, folder: Path | None, config: dict[str, Any]) -> Any:  # noqa: ANN401, a model of diffusers
        """The model as the source has it: in float32, or as it is stored, where what rests of it is kept in bf16.

        Raises UserError where weights are missing or do not fit.
        """
        try:
            import diffusers  # slow to import, and an extra
        except ImportError as error:
            raise UserError("net 'diffusers' needs diffusers: pip install 'dumo[pretrained]'") from error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its own, of its own code
            return self.loaded(getattr(diffusers, config["_class_name"]), folder, config)

    def loaded(self, kind: Any, folder: Path | None, config: dict[str, Any]) -> Any:  # noqa: ANN401, as `model`
        """The model of a class of diffusers. Raises as `model`."""
        if self.depth:
            if self.weights == "source":
                raise UserError(
                    "net.depth leaves blocks out, so a whole model's weights do not fit: set net.weights=drawn"
                )
            config = {key: min(value, self.depth) if key in LISTS else value for key, value in config.items()}
        if torch.get_default_device().type == "meta" or self.weights == "drawn":
            return kind.from_config(config)
        folder = with_weights(folder, self.source, config)
        halves = self.lora is not None and self.lora.frozen == "bfloat16"
        try:
            model, told = kind.from_pretrained(
                *(folder,),
                output_loading_info=True, use_safetensors=True, local_files_only=True,
                torch_dtype=torch.bfloat16 if halves else torch.float32,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
            raise UserError(
                f"{folder} holds no {config['_class_name']} that diffusers can load ({error}). {HINT}"
            ) from error
        names = ("missing_keys", "unexpected_keys", "mismatched_keys")
        if wrong := [key for name in names for key in told.get(name, ())]:
            raise UserError(f"{folder}: the weights do not fit {CONFIG}: {wrong[0]} is missing, unknown or misshapen")
        if halves:
            as_stored(model, folder)
        return model


def demand(needs: Needs) -> None:
    """Raise UserError where an objective asks for more than velocities and flow maps at a time."""
    strange = [f"head '{name}'" for name in needs.heads if name not in HEADS]
    strange += [f"input '{name}'" for name in needs.names if name != "t"] + [f"gauge '{name}'" for name in needs.gauges]
    strange += ["what its blocks make (objective.disperse)"] * (needs.inside is not None)
    if strange:
        raise UserError(
            f"net 'diffusers' has heads v and u, and is told t alone; this objective asks for {strange[0]}: take "
            "objective.kind dumo, flow_matching, ucgm or consistency"
        )


def read_config(source: str) -> tuple[Path | None, dict[str, Any]]:
    """The folder of a transformer, and its config.json; no folder for a published one that is known by name.

    Raises UserError where there is none.
    """
    if source in (*PUBLISHED, *SMALL):
        return None, json.loads((HERE / f"{source}.json").read_text(encoding="utf-8"))
    path = user_path(source, "net.source")
    folder = next((f for f in (path, path / "transformer") if (f / CONFIG).is_file()), None)
    if folder is None:
        why = f"has no {CONFIG}" if path.is_dir() else "is no folder"
        raise UserError(f"net.source: {source} {why}. {HINT}")
    config = read_json(folder / CONFIG, HINT)
    if not isinstance(config, dict):
        raise UserError(f"net.source: {folder / CONFIG} is no config. {HINT}")
    return folder, config


def as_stored(model: nn.Module, folder: Path) -> None:
    """Set what a folder holds in another dtype than the model to what is there: mapped, not read."""
    mine = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for file in folder.glob(f"{Path(WEIGHTS).stem}*.safetensors"):
        for name, x in weights.load(file).items():
            if name in mine and mine[name].dtype != x.dtype:
                mine[name].data = x


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
        with weights.opened(folder / PICKLE):
            pass
    raise UserError(
        f"net.source: {folder} has {CONFIG} and no weights: put {WEIGHTS} beside it, or set net.weights=drawn to begin "
        "anew"
    )
