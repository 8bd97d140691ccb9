"""A pipeline of diffusers in a folder: what its model_index.json and the configs of its parts say.

A run names one folder, and takes everything from there: the model that it tunes, the autoencoder with its numbers, the
text encoders, the scheduler. `Pipeline.with_facts` pins each part by a hash when the run begins, so a run never
decodes, reads prompts or is exported with the parts of another. Parts of a run that read the pipeline are a
`PipelineSpec`, and get it by `with_pipeline`.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, PrivateAttr, model_validator
from pydantic.config import JsonDict
from yaml import YAMLError

from dumo.io import digest, weights
from dumo.io.read import read_settings, read_text, user_path
from dumo.io.yaml import parse
from dumo.types import MAYBE_PLACE, PINNED, QUIET, Spec, UserError

S = TypeVar("S", bound=Spec)
P = TypeVar("P", bound="PipelineSpec")
Config = Mapping[str, Any]  # a part's config.json
FIELD = "pipeline"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
TRANSFORMER = "transformer"
UNET = "unet"  # where a UNet is the model
VAE = "vae"
# Configs of models on the Hugging Face hub, and of small ones; `_readers` are the parameters of the text encoders.
CONFIGS = files("dumo.encoders") / "published"
PUBLISHED = ("sd3-medium", "sana-1600m", "flux-dev", "qwen-image", "z-image", "sd15", "sdxl", "pixart-sigma")
SMALL = ("sd3-small", "sd3-digits", "unet-small")  # ours: for latents of CIFAR-10, but for digits the second
SOURCE_SCHEMA: JsonDict = {**MAYBE_PLACE, "names": [*PUBLISHED, *SMALL]}
HINT = f"--set {FIELD}=DIR names a folder with {INDEX}, as diffusers saves a pipeline, or as hf download brings it"
TEXT_PARTS = re.compile(r"(text_encoder|tokenizer)(_\d)?")  # folders of what reads prompts
# In files of the original layout: the beginning of a tensor's name, and the pipeline of such a file; else it is sd15.
SINGLE_FILES = {"conditioner.embedders.1.": "sdxl"}
LICENSE = ("license", "license_name", "license_link")  # of a README.md's head
FEW_STEP_NAMES = re.compile("turbo|schnell|lightning|sprint|distill|hyper|lcm|few-?step", re.I)


class Pipeline(Spec):
    """A folder of diffusers, or the name of a published one, whose configs are here and whose weights are not."""

    source: str = Field(json_schema_extra=SOURCE_SCHEMA)
    # Whether it is distilled to few steps; None: not known, for its class and config are those of its base.
    distilled: bool | None = Field(default=None, json_schema_extra=QUIET)
    # Its class, its licence and the hashes of its parts: found when a run begins.
    facts: dict[str, str] | None = Field(default=None, exclude_if=lambda facts: facts is None, json_schema_extra=PINNED)

    @model_validator(mode="before")
    @classmethod
    def _from_source(cls, value: Any) -> Any:  # noqa: ANN401, it is checked after this
        return {"source": value} if isinstance(value, str) else value

    @property
    def is_published(self) -> bool:
        """Whether it is a published name, without weights."""
        return self.source in PUBLISHED or self.source in SMALL

    @property
    def folder(self) -> Path:
        """Where it is. Raises UserError for a published name, whose folder is to be fetched, and where none is."""
        if self.is_published:
            raise UserError(
                f"{FIELD}: {self.source} is known without its weights. Fetch them, {self.download_command()}, and set "
                f"{FIELD}=DIR"
            )
        path = user_path(self.source, FIELD)
        if path.suffix == ".safetensors" and path.is_file():
            raise UserError(
                f"{FIELD}: {self.source} is one file, without the configs and tokenizers of a pipeline. Make a folder "
                f"DIR of it, {unpack_command(path)}, and set {FIELD}=DIR"
            )
        if not path.is_dir():
            raise UserError(f"{FIELD}: {self.source} is no folder. {HINT}")
        return path

    @property
    def index(self) -> dict[str, Any]:
        """What model_index.json says; {} for a transformer alone. Raises UserError as `folder`."""
        if self.is_published:
            return published(self.source)
        file = self.folder / INDEX
        return read_settings(file, HINT) if file.is_file() else {}

    @property
    def class_name(self) -> str:
        """The class of the pipeline; empty for a transformer alone."""
        return str(self.index.get("_class_name", ""))

    def part_folder(self, part: str) -> Path:
        """The folder of a part. Raises UserError, with the command that brings it, where it is missing."""
        folder = self._find_part(part)
        if folder is None:
            raise UserError(f"{FIELD}: {self.source} has no {part}/{config_name(part)}: {self.download_command(part)}")
        return folder

    def _find_part(self, part: str) -> Path | None:
        """The folder of a part, if it is there; that of a model may be a UNet's, or the pipeline's own."""
        candidates = [self.folder / part]
        if part == TRANSFORMER:
            candidates += [self.folder / UNET, self.folder]
        for folder in candidates:
            if (folder / config_name(part)).is_file():
                return folder
        return None

    def config(self, part: str) -> dict[str, Any]:
        """The config of a part. Raises UserError where it is missing, or another than the run began with."""
        if self.is_published:
            config = self.index.get(part)
            if config is None:
                raise UserError(f"{FIELD}: {self.source} is a transformer alone and has no {part}: name a folder")
            return config
        file = self.part_folder(part) / config_name(part)
        about = file.stat()
        text, current_hash = read_config(file, about.st_mtime_ns, about.st_size)
        self.require(part, current_hash, file.name)
        return json.loads(text)

    @property
    def model(self) -> str:
        """What diffusers calls the model that is tuned. Raises UserError as `config`."""
        class_name = str(self.config(TRANSFORMER).get("_class_name"))
        return UNET if class_name.startswith("UNet") else TRANSFORMER

    def require(self, part: str, current_hash: str, what: str = "weights") -> None:
        """Raise UserError where the hash of a part is another than the run began with."""
        facts = self.facts or {}
        if facts.get(part, current_hash) != current_hash:
            raise UserError(
                f"{FIELD}: {self.source} has another {part.partition('.')[0]} ({what}) than when this run began: put "
                f"that back, or say where the pipeline is with --set {FIELD}.source=..."
            )

    def download_command(self, part: str = "") -> str:
        """The command that brings the whole pipeline, or a part of it."""
        folder = "DIR" if self.is_published else self.source
        patterns = [INDEX, f"'{part}/*'"] if part else [INDEX, "README.md", "'*/*'"]
        includes = "".join(f" --include {pattern}" for pattern in patterns)
        return f"hf download {self.repository or 'REPOSITORY'}{includes} --local-dir {folder}"

    @property
    def repository(self) -> str:
        """Its name on the Hugging Face hub, where a folder is one that we know; else empty."""
        if self.is_published:
            return str(published(self.source).get("_name_or_path", ""))
        folder = self._find_part(TRANSFORMER)
        if folder is not None:
            own_hash = config_hash(read_settings(folder / CONFIG, HINT))
            for name in reversed(PUBLISHED):
                base = published(name)
                same_class = self.class_name in ("", base["_class_name"])  # Kontext's config is FLUX.1-dev's
                if same_class and config_hash(base[TRANSFORMER]) == own_hash:
                    return str(base["_name_or_path"])
        noted_name = str(self.index.get("_name_or_path", ""))
        return noted_name if re.fullmatch(r"[\w.-]+/[\w.-]+", noted_name) else ""

    @property
    def license(self) -> dict[str, str]:
        """What its README.md says of the licence, by the keys of LICENSE; {}: nothing."""
        try:
            text = read_text(self.folder / "README.md", HINT)
            head = parse(text.split("---")[1]) if text.startswith("---") else None
        except (UserError, YAMLError):  # others wrote it
            return {}
        if not isinstance(head, dict):
            return {}
        return {key: str(head[key]) for key in LICENSE if key in head}

    @property
    def hint(self) -> str:
        """What is known of its being distilled, in words."""
        if self.distilled is not None:
            return "distilled" if self.distilled else "not distilled"
        scheduler = str(self.index.get("scheduler", ""))
        names = " ".join((Path(self.source).name, self.repository, self.class_name, scheduler))
        if few_step_name := FEW_STEP_NAMES.search(names):
            return f"distilled, by its name ({few_step_name[0]}): if so, set {FIELD}.distilled=true"
        return f"unknown whether the base is distilled: set {FIELD}.distilled to true or false"

    def with_facts(self) -> "Pipeline":
        """The same with its facts; as it is where it is not here."""
        if self.is_published or self.facts is not None:
            return self
        try:
            facts = dict(self.read_facts())
        except UserError:  # raised again where the part is used
            return self
        return self.model_copy(update={"facts": facts})

    def verify(self) -> None:
        """Read all parts but the model's weights. Raises UserError where one is another than the run began with."""
        without_facts = self.model_copy(update={"facts": None})
        for name, current in without_facts.read_facts():
            if name not in LICENSE:
                self.require(name, current)

    def read_facts(self) -> Iterator[tuple[str, str]]:
        """Read the facts from the files, by name. Raises UserError where a part is missing."""
        yield "class", self.class_name
        yield from self.license.items()
        for part in (TRANSFORMER, VAE, "scheduler"):
            if self._find_part(part):
                yield part, config_hash(self.config(part))
        vae_weights = self.folder / VAE / WEIGHTS
        if vae_weights.is_file():
            yield "vae.weights", digest.of_file(vae_weights)
        if self.text_parts:
            yield "texts", self.texts_hash()

    @property
    def text_parts(self) -> list[str]:
        """The parts that read prompts, by the names of their folders."""
        parts: list[str] = []
        for name, entry in self.index.items():
            is_present = isinstance(entry, list) and entry and entry[0]  # [null, null]: it has none
            if is_present and TEXT_PARTS.fullmatch(name):
                parts.append(name)
        return parts

    def text_encoder_bytes(self, itemsize: int) -> int | None:
        """Bytes of the encoders of prompts, at this size of a number; None: they are not here."""
        if self.is_published:
            return self.index["_readers"] * itemsize if "_readers" in self.index else None
        numbers: dict[tuple[Path, str], int] = {}  # a folder may hold the same weights in two precisions
        for part in self.text_parts:
            folder = self.folder / part
            for file in folder.glob("*.safetensors"):
                for name, tensor in weights.load(file).items():
                    numbers[folder, name] = tensor.numel()
        return sum(numbers.values()) * itemsize or None

    def texts_hash(self) -> str:
        """A hash of all that reads prompts. Raises UserError where a part is missing."""
        lines: list[str] = []
        for part in self.text_parts:
            folder = self.folder / part
            part_files = sorted(file for file in folder.glob("*") if file.is_file() and not file.name.startswith("."))
            if not part_files:
                raise UserError(f"{FIELD}: {self.source} has no {part}: {self.download_command(part)}")
            lines += [f"{part}/{file.name} {digest.of_file(file)}" for file in part_files]
        return digest.short(*lines)


class PipelineSpec(Spec):
    """A part of a run that reads its pipeline, which the run hands over (`with_pipeline`)."""

    _pipeline: Pipeline | None = PrivateAttr(default=None)

    @property
    def pipeline(self) -> Pipeline:
        """The run's. Raises UserError where it names none."""
        if self._pipeline is None:
            raise UserError(f"{FIELD} is missing: {HINT}")
        return self._pipeline

    def within(self: P, pipeline: Pipeline | None) -> P:
        """The same, of a run with this pipeline."""
        if pipeline == self._pipeline:
            return self
        spec = self.model_copy()
        spec._pipeline = pipeline
        return spec


def component_names(pipeline_class: Any) -> set[str]:  # noqa: ANN401, a class of diffusers
    """The parts that a pipeline of diffusers is made of, those that it can do without, too."""
    return set(pipeline_class._get_signature_keys(pipeline_class)[0])


def with_pipeline(part: S, pipeline: Pipeline | None) -> S:
    """A part of a run, all of whose own parts that read a pipeline read this one."""
    changed: dict[str, Spec] = {}
    for name in type(part).model_fields:
        field = getattr(part, name)
        if isinstance(field, Spec):
            new_field = with_pipeline(field, pipeline)
            if new_field is not field:
                changed[name] = new_field
    if changed:
        part = part.model_copy(update=changed)
    return part.within(pipeline) if isinstance(part, PipelineSpec) else part


def unpack_command(file: Path) -> str:
    """The command that makes a folder of a file of the original layout (LDM), which has no configs and no tokenizers.

    config may be a folder of these, where there is no network. Raises UserError for a file that is damaged.
    """
    with weights.open_safetensors(file) as opened:
        tensor_names = list(opened.keys())
    name = "sd15"
    for prefix, pipeline_name in SINGLE_FILES.items():
        if any(tensor.startswith(prefix) for tensor in tensor_names):
            name = pipeline_name
            break
    kind = published(name)["_class_name"]
    config = published(name)["_name_or_path"]
    code = f"from diffusers import {kind} as P; P.from_single_file('{file}', config='{config}').save_pretrained('DIR')"
    return f'python -c "{code}"'


def config_name(part: str) -> str:
    """The name of a part's config."""
    return SCHEDULER_CONFIG if part == "scheduler" else CONFIG


@lru_cache(64)
def read_config(file: Path, changed: int, size: int) -> tuple[str, str]:
    """A config as JSON, and its hash; read again where the file has `changed`, in ns, or in size."""
    config = read_settings(file, HINT, infinite=file.name == SCHEDULER_CONFIG)  # diffusers' say -Infinity
    return json.dumps(config), config_hash(config)


@lru_cache
def published(name: str) -> dict[str, Any]:
    """What is here of a published pipeline."""
    return json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))


def config_hash(config: Config) -> str:
    """A hash of what a config says of a part, not of who wrote it."""
    facts = {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}
    return digest.short(json.dumps(facts, sort_keys=True))
