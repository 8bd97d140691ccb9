"""A pipeline of diffusers in a folder: what its model_index.json and the configs of its parts say.

A run names one folder, and takes everything from there: the model that it tunes, the autoencoder with its numbers, the
text encoders, the scheduler. `Pipeline.found` pins each part by a hash when the run begins, so a run never decodes,
reads prompts or is exported with the parts of another.
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
R = TypeVar("R", bound="PipelineSpec")
Config = Mapping[str, Any]  # a part's config.json
FIELD = "pipeline"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
TRANSFORMER, VAE = "transformer", "vae"
UNET = "unet"  # where a UNet is the model
# Configs of models on the Hugging Face hub, and of small ones; `_readers` are the parameters of the text encoders.
HERE = files("dumo.encoders") / "published"
PUBLISHED = ("sd3-medium", "sana-1600m", "flux-dev", "qwen-image", "z-image", "sd15", "sdxl", "pixart-sigma")
SMALL = ("sd3-small", "sd3-digits", "unet-small")  # ours: for latents of CIFAR-10, but for digits the second
NAMED: JsonDict = {**MAYBE_PLACE, "names": [*PUBLISHED, *SMALL]}
HINT = f"--set {FIELD}=DIR names a folder with {INDEX}, as diffusers saves a pipeline, or as hf download brings it"
TEXTS = re.compile(r"(text_encoder|tokenizer)(_\d)?")  # folders of what reads prompts
SINGLE = {"conditioner.embedders.1.": "sdxl"}  # names in files of the original layout: the pipeline; else sd15
LICENSE = ("license", "license_name", "license_link")  # of a README.md's head
FAST = re.compile("turbo|schnell|lightning|sprint|distill|hyper|lcm|few-?step", re.I)  # in names of distilled models


class Pipeline(Spec):
    """A folder of diffusers, or the name of a published one, whose configs are here and whose weights are not."""

    source: str = Field(json_schema_extra=NAMED)
    # Whether it is distilled to few steps; None: not known, for its class and config are those of its base.
    distilled: bool | None = Field(default=None, json_schema_extra=QUIET)
    # Its class, its licence and the hashes of its parts: found when a run begins.
    facts: dict[str, str] | None = Field(default=None, exclude_if=lambda facts: facts is None, json_schema_extra=PINNED)

    @model_validator(mode="before")
    @classmethod
    def _a_folder(cls, given: Any) -> Any:  # noqa: ANN401, whatever was given is checked after this
        return {"source": given} if isinstance(given, str) else given

    @property
    def known(self) -> bool:
        """Whether it is a published name, without weights."""
        return self.source in (*PUBLISHED, *SMALL)

    @property
    def folder(self) -> Path:
        """Where it is. Raises UserError for a published name, whose folder is to be fetched, and where none is."""
        if self.known:
            raise UserError(
                f"{FIELD}: {self.source} is known without its weights. Fetch them, {self.fetch()}, and set {FIELD}=DIR"
            )
        path = user_path(self.source, FIELD)
        if path.suffix == ".safetensors" and path.is_file():
            raise UserError(
                f"{FIELD}: {self.source} is one file, without the configs and tokenizers of a pipeline. Make a folder "
                f"DIR of it, {unpacking(path)}, and set {FIELD}=DIR"
            )
        if not path.is_dir():
            raise UserError(f"{FIELD}: {self.source} is no folder. {HINT}")
        return path

    @property
    def index(self) -> dict[str, Any]:
        """What model_index.json says; {} for a transformer alone. Raises UserError as `folder`."""
        if self.known:
            return published(self.source)
        file = self.folder / INDEX
        return read_settings(file, HINT) if file.is_file() else {}

    @property
    def class_name(self) -> str:
        """The class of the pipeline; empty for a transformer alone."""
        return str(self.index.get("_class_name", ""))

    def place(self, part: str) -> Path:
        """The folder of a part. Raises UserError, with the command that brings it, where it is missing."""
        found = self._there(part)
        if found is None:
            raise UserError(f"{FIELD}: {self.source} has no {part}/{settings_of(part)}: {self.fetch(part)}")
        return found

    def _there(self, part: str) -> Path | None:
        """The folder of a part, if it is there; that of a model may be a UNet's, or the pipeline's own."""
        places = [self.folder / part, *([self.folder / UNET, self.folder] if part == TRANSFORMER else [])]
        return next((place for place in places if (place / settings_of(part)).is_file()), None)

    def config(self, part: str) -> dict[str, Any]:
        """The config of a part. Raises UserError where it is missing, or another than the run began with."""
        if self.known:
            found = self.index.get(part)
            if found is None:
                raise UserError(f"{FIELD}: {self.source} is a transformer alone and has no {part}: name a folder")
            return found
        file = self.place(part) / settings_of(part)
        stat = file.stat()
        text, now = read_config(file, stat.st_mtime_ns, stat.st_size)
        self.require(part, now, file.name)
        return json.loads(text)

    @property
    def model(self) -> str:
        """What diffusers calls the model that is tuned. Raises UserError as `config`."""
        return UNET if str(self.config(TRANSFORMER).get("_class_name")).startswith("UNet") else TRANSFORMER

    def require(self, part: str, now: str, what: str = "weights") -> None:
        """Raise UserError where the hash of a part is another than the run began with."""
        then = (self.facts or {}).get(part, now)
        if then != now:
            raise UserError(
                f"{FIELD}: {self.source} has another {part.partition('.')[0]} ({what}) than when this run began: put "
                f"that back, or say where the pipeline is with --set {FIELD}.source=..."
            )

    def fetch(self, part: str = "") -> str:
        """The command that brings the whole pipeline, or a part of it."""
        where = "DIR" if self.known else self.source
        files = [INDEX, f"'{part}/*'"] if part else [INDEX, "README.md", "'*/*'"]
        only = "".join(f" --include {file}" for file in files)
        return f"hf download {self.repository or 'REPOSITORY'}{only} --local-dir {where}"

    @property
    def repository(self) -> str:
        """Its name on the Hugging Face hub, where a folder is one that we know; else empty."""
        if self.known:
            return str(published(self.source).get("_name_or_path", ""))
        there = self._there(TRANSFORMER)
        mine = hashed(read_settings(there / CONFIG, HINT)) if there else ""
        alike = (found for name in PUBLISHED if self.class_name in ("", (found := published(name))["_class_name"]))
        known = {hashed(found[TRANSFORMER]): found["_name_or_path"] for found in alike}  # Kontext's is FLUX.1-dev's
        said = str(self.index.get("_name_or_path", ""))
        return known.get(mine) or (said if re.fullmatch(r"[\w.-]+/[\w.-]+", said) else "")

    @property
    def license(self) -> dict[str, str]:
        """What its README.md says of the licence, by the keys of LICENSE; {}: nothing."""
        try:
            text = read_text(self.folder / "README.md", HINT)
            head = parse(text.split("---")[1]) if text.startswith("---") else None
        except (UserError, YAMLError):  # what others wrote
            head = None
        found = head if isinstance(head, dict) else {}
        return {key: str(found[key]) for key in LICENSE if key in found}

    @property
    def hint(self) -> str:
        """What is known of its being distilled, in words."""
        if self.distilled is not None:
            return "distilled" if self.distilled else "not distilled"
        names = " ".join(
            (Path(self.source).name, self.repository, self.class_name, str(self.index.get("scheduler", "")))
        )
        if named := FAST.search(names):
            return f"distilled, by its name ({named[0]}): if so, set {FIELD}.distilled=true"
        return f"unknown whether the base is distilled: set {FIELD}.distilled to true or false"

    def found(self) -> "Pipeline":
        """The same with its facts; as it is where it is not here."""
        if self.known or self.facts is not None:
            return self
        try:
            facts = dict(self.read_facts())
        except UserError:  # said where the part is used
            return self
        return self.model_copy(update={"facts": facts})

    def verify(self) -> None:
        """Read all parts but the model's weights. Raises UserError where one is another than the run began with."""
        for name, now in self.model_copy(update={"facts": None}).read_facts():
            if name not in LICENSE:
                self.require(name, now)

    def read_facts(self) -> Iterator[tuple[str, str]]:
        """Read the facts from the files, by name. Raises UserError where a part is missing."""
        yield "class", self.class_name
        yield from self.license.items()
        for part in (TRANSFORMER, VAE, "scheduler"):
            if self._there(part):
                yield part, hashed(self.config(part))
        if (file := self.folder / VAE / WEIGHTS).is_file():
            yield "vae.weights", digest.of_file(file)
        if self.readers:
            yield "texts", self.texts()

    @property
    def readers(self) -> list[str]:
        """The parts that read prompts, by the names of their folders."""
        parts = (name for name, entry in self.index.items() if isinstance(entry, list) and entry and entry[0])
        return [name for name in parts if TEXTS.fullmatch(name)]

    def reading(self, itemsize: int) -> int | None:
        """Bytes of the encoders of prompts, at this size of a number; None: they are not here."""
        if self.known:
            return self.index["_readers"] * itemsize if "_readers" in self.index else None
        files = [file for part in self.readers for file in (self.folder / part).glob("*.safetensors")]
        found = {(file.parent, name): x.numel() for file in files for name, x in weights.load(file).items()}
        return sum(found.values()) * itemsize or None  # a folder may hold the same weights in two precisions

    def texts(self) -> str:
        """A hash of all that reads prompts. Raises UserError where a part is missing."""
        found: list[str] = []
        for part in self.readers:
            folder = self.folder / part
            names = sorted(file for file in folder.glob("*") if file.is_file() and not file.name.startswith("."))
            if not names:
                raise UserError(f"{FIELD}: {self.source} has no {part}: {self.fetch(part)}")
            found += [f"{part}/{file.name} {digest.of_file(file)}" for file in names]
        return digest.short(*found)


class PipelineSpec(Spec):
    """A part of a run that reads its pipeline, which the run hands over (`handed`)."""

    _pipeline: Pipeline | None = PrivateAttr(default=None)

    @property
    def pipeline(self) -> Pipeline:
        """The run's. Raises UserError where it names none."""
        if self._pipeline is None:
            raise UserError(f"{FIELD} is missing: {HINT}")
        return self._pipeline

    def within(self: R, pipeline: Pipeline | None) -> R:
        """The same, of a run with this pipeline."""
        if pipeline == self._pipeline:
            return self
        made = self.model_copy()
        made._pipeline = pipeline
        return made


def component_names(pipeline_class: Any) -> set[str]:  # noqa: ANN401, a class of diffusers
    """The parts that a pipeline of diffusers is made of, those that it can do without, too."""
    return set(pipeline_class._get_signature_keys(pipeline_class)[0])


def handed(part: S, pipeline: Pipeline | None) -> S:
    """A part of a run, all of whose own parts that read a pipeline read this one."""
    now = {name: value for name in type(part).model_fields if isinstance(value := getattr(part, name), Spec)}
    new = {name: made for name, value in now.items() if (made := handed(value, pipeline)) is not value}
    part = part.model_copy(update=new) if new else part
    return part.within(pipeline) if isinstance(part, PipelineSpec) else part


def unpacking(file: Path) -> str:
    """The command that makes a folder of a file of the original layout (LDM), which has no configs and no tokenizers.

    config may be a folder of these, where there is no network. Raises UserError for a file that is damaged.
    """
    with weights.open_safetensors(file) as found:
        names = list(found.keys())
    known = (name for key, name in SINGLE.items() if any(one.startswith(key) for one in names))
    base = published(next(known, "sd15"))
    kind, config = base["_class_name"], base["_name_or_path"]
    code = f"from diffusers import {kind} as P; P.from_single_file('{file}', config='{config}').save_pretrained('DIR')"
    return f'python -c "{code}"'


def settings_of(part: str) -> str:
    """The name of a part's config."""
    return SCHEDULER if part == "scheduler" else CONFIG


@lru_cache(64)
def read_config(file: Path, changed: int, size: int) -> tuple[str, str]:
    """A config as JSON, and its hash; read again where the file has `changed`, in ns, or in size."""
    found = read_settings(file, HINT, infinite=file.name == SCHEDULER)  # diffusers' say -Infinity
    return json.dumps(found), hashed(found)


@lru_cache
def published(name: str) -> dict[str, Any]:
    """What is here of a published pipeline."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def hashed(config: Config) -> str:
    """A hash of what a config says of a part, not of who wrote it."""
    said = {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}
    return digest.short(json.dumps(said, sort_keys=True))
