"""A pipeline of diffusers in a folder: what its model_index.json and the configs of its parts say.

A run names one folder, as `Pipeline`, and takes everything from there: the model that it tunes, the autoencoder with
its numbers, the text encoders, the scheduler. The order of events:

1. `dumo.config.spec.with_pipeline` hands the pipeline to those parts of a run that read it, each a `PipelineSpec`.
2. `Pipeline.with_facts` notes a hash of each part when the run begins. From then on `require_fact`, `config` and
   `verify` refuse other parts, so a run never decodes, reads prompts or is exported with the parts of another.
3. `config`, `part_folder` and `weights` open a part. The files of weights are chosen in `dumo.encoders.part`. Of text
   encoders and tokenizers, `text_parts` are the names and `text_files` the files; `absent_parts` are those that the
   pipeline goes without.

A name on the Hugging Face Hub is fetched (`dumo.io.hub`): the configs when one is read, the weights when a part is
opened. Some pipelines are known without any file (`is_published`): dumo has their configs, in `published`, so that a
recipe can be counted without a download. A model in one file is refused with the way to unpack it.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, PrivateAttr, model_validator
from pydantic.config import JsonDict

from dumo.encoders import part as parts
from dumo.encoders.part import PartWeights
from dumo.io import digest, hub
from dumo.io.hub import CARD, INDEX, PUBLISHED, SCHEDULER, SMALL, SUFFIX, TRANSFORMER, UNET, VAE, published_config
from dumo.io.read import read_json, user_path
from dumo.types import HUB_MODEL, MAYBE_PLACE, PINNED, Spec, UserError

Config = Mapping[str, Any]  # a part's config.json
FIELD = "pipeline"  # of a run, for messages
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"  # of a text encoder that can write, too
SCHEDULER_CONFIG = "scheduler_config.json"
SECOND_TRANSFORMER = "transformer_2"  # of a pipeline that has two models
_SOURCE_SCHEMA: JsonDict = {**MAYBE_PLACE, **HUB_MODEL, "names": [*SMALL]}
HINT = f"{FIELD}=... names a pipeline of diffusers on the Hugging Face Hub, OWNER/NAME, or a folder with {INDEX}"
TEXT_PARTS = re.compile(r"(text_encoder|tokenizer)(_\d)?")  # names of parts that read prompts
OptionalPart = Literal["text_encoder_3"]  # SD3's T5, without which diffusers runs the pipeline, too
_OPTIONAL_PARTS: tuple[OptionalPart, ...] = get_args(OptionalPart)
LICENSE = ("license", "license_name", "license_link")  # keys in the head of a README.md on the hub
IS_DISTILLED = "is_distilled"  # a key of a Flux2KleinPipeline's model_index.json


class Pipeline(Spec):
    """A pipeline of diffusers by its folder or its name on the Hub, or one of SMALL, which are configs alone."""

    source: str = Field(json_schema_extra=_SOURCE_SCHEMA)
    # Text encoders that are left out though the folder may have them, as by diffusers' text_encoder_3=None.
    without: tuple[OptionalPart, ...] = Field(default=(), exclude_if=lambda names: not names)
    # The class, the licence and the hashes of the parts, by name, as they were when the run began.
    facts: dict[str, str] | None = Field(default=None, exclude_if=lambda facts: facts is None, json_schema_extra=PINNED)

    @model_validator(mode="before")
    @classmethod
    def _from_source(cls, value: Any) -> Any:  # noqa: ANN401, pydantic checks it after this
        """Accept a text as the source alone."""
        if isinstance(value, str):
            return {"source": value}
        if isinstance(value, dict) and isinstance(value.get("without"), list):
            # JSON's lists are read as tuples, but not behind a validator that sees them as Python's
            return {**value, "without": tuple(value["without"])}
        return value

    @property
    def is_published(self) -> bool:
        """Whether dumo has the configs. A name with a commit, as a run pins it when it begins, is read from the Hub."""
        return self.source in SMALL or (self.source in PUBLISHED and self.is_on_hub)

    @property
    def is_on_hub(self) -> bool:
        """Whether the source is a name on the Hub."""
        return hub.is_hub_name(self.source)

    @property
    def folder(self) -> Path:
        """The pipeline's folder; of a name on the Hub one that has the configs and tokenizers, maybe without weights.

        Raises UserError for one of SMALL, one file of weights, and a folder that is missing; and the Hub's errors.
        """
        return self._find_folder(with_weights=False)

    def fetch(self) -> Path:
        """Return the pipeline's folder with all that dumo reads of it, as `folder` otherwise."""
        return self._find_folder(with_weights=True)

    def _find_folder(self, *, with_weights: bool) -> Path:
        """Return the folder, fetched if the source is a name on the Hub. Raises as `folder`."""
        if self.source in SMALL:
            raise UserError(f"{FIELD}: {self.source} is a config without weights: set net.weights=drawn. {HINT}")
        if self.is_on_hub:
            return hub.fetch(self.source, partial(_choose_files, without=self.without, with_weights=with_weights))
        path = user_path(self.source, FIELD)
        if path.suffix == SUFFIX and path.is_file():
            raise UserError(
                f"{FIELD}: {path} is one file, without the configs and tokenizers of a pipeline: make a folder of it "
                "by PIPELINE.from_single_file(FILE).save_pretrained(DIR) of diffusers"
            )
        if not path.is_dir():
            raise UserError(f"{FIELD}: there is no folder {self.source}. {HINT}")
        return path

    @property
    def index(self) -> dict[str, Any]:
        """What model_index.json says; {} for a transformer alone. Raises UserError as `folder`."""
        if self.is_published:
            return published_config(self.source)
        file = self.folder / INDEX
        return read_json(file) if file.is_file() else {}

    @property
    def class_name(self) -> str:
        """The class of the pipeline; empty for a transformer alone."""
        return str(self.index.get("_class_name", ""))

    # --- parts ---

    def config(self, part: str) -> dict[str, Any]:
        """Read the config of a part. Raises UserError where it is missing, or another than the run began with."""
        if self.is_published:
            config = self.index.get(part)
            if config is None:
                raise UserError(f"{FIELD}: {self.source} is a transformer alone and has no {part}: name a folder")
            return config
        file = self.part_folder(part) / _config_name(part)
        file_state = file.stat()
        text, current_hash = _read_config(file, file_state.st_mtime_ns, file_state.st_size)
        self.require_fact(part, current_hash, file.name)
        return json.loads(text)

    def weights(self, part: str) -> PartWeights:
        """Return the files of a part's weights that dumo opens.

        Raises UserError if there are none, and as `part_folder`.
        """
        self.fetch()
        return parts.require_weights(self.part_folder(part), weights_name(part), FIELD, HINT)

    def part_folder(self, part: str) -> Path:
        """Return the folder of a part. Raises UserError if it is missing."""
        folder = self._find_part(part)
        if folder is None:
            raise UserError(f"{FIELD}: {self.source} has no {part}/{_config_name(part)}. {HINT}")
        return folder

    def _find_part(self, part: str) -> Path | None:
        """Return the folder of a part, or None. The model may be in the folder of a UNet, or in the pipeline's own."""
        candidates = [self.folder / part]
        if part == TRANSFORMER:
            candidates += [self.folder / UNET, self.folder]
        for folder in candidates:
            if (folder / _config_name(part)).is_file():
                return folder
        return None

    @property
    def model_part(self) -> str:
        """The name in diffusers of the part that is tuned: transformer, or unet. Raises UserError as `config`."""
        class_name = str(self.config(TRANSFORMER).get("_class_name"))
        return UNET if class_name.startswith("UNet") else TRANSFORMER

    @property
    def repository(self) -> str:
        """The name on the Hugging Face Hub, or the one that its index notes as its origin; "": not known.

        Other parts may come from there, but not the model: diffusers keeps this name in what was tuned from it. Its
        config does not tell, for tuned models have it, too.
        """
        if self.is_on_hub:
            return hub.repository_of(self.source)
        noted_name = str(self.index.get("_name_or_path", ""))
        return noted_name if hub.is_hub_name(noted_name) else ""

    # --- what a run notes when it begins ---

    def with_facts(self) -> "Pipeline":
        """Return the pipeline with the facts of the parts that are there, up to the first that is missing.

        It stays as it is if it has facts, or no folder.
        """
        if self.is_published or self.facts is not None:
            return self
        facts: dict[str, str] = {}
        try:
            self.fetch()
            for name, value in self._read_facts():
                facts[name] = value
        except UserError:  # raised again where the part is used
            pass
        return self.model_copy(update={"facts": facts}) if facts else self

    def verify(self) -> None:
        """Compare all parts but the model's weights with the facts. Raises UserError where one has changed."""
        without_facts = self.model_copy(update={"facts": None})
        for name, current in without_facts._read_facts():
            if name not in LICENSE:
                self.require_fact(name, current)

    def _read_facts(self) -> Iterator[tuple[str, str]]:
        """Read the facts from the files: yields name and value. Raises UserError where a part is missing."""
        yield "class", self.class_name
        yield from self.license.items()
        for part in (TRANSFORMER, VAE, SCHEDULER):
            if self._find_part(part):
                yield part, _config_hash(self.config(part))
        vae_weights = parts.find_weights(self.folder / VAE, parts.DIFFUSERS)
        if vae_weights is not None:
            yield "vae.weights", vae_weights.sha256()
        if self.text_parts:
            yield "texts", self.texts_hash()

    def require_fact(self, name: str, current: str, described_as: str = "weights") -> None:
        """Raise UserError if a fact is another than when the run began. The message calls it `described_as`.

        Facts that were not noted are not compared.
        """
        facts = self.facts or {}
        if facts.get(name, current) != current:
            part, _, _ = name.partition(".")
            raise UserError(
                f"{FIELD}: {self.source} has another {part} ({described_as}) than when this run began: put "
                f"that back, or set {FIELD}.source to where the pipeline is"
            )

    @property
    def license(self) -> dict[str, str]:
        """What the folder's model card says of the licence, by the keys of LICENSE; {} if it says nothing."""
        from huggingface_hub import metadata_load  # slow to import

        card = self.folder / CARD
        head = (metadata_load(card) or {}) if card.is_file() else {}
        return {key: str(head[key]) for key in LICENSE if key in head}

    # --- text encoders and tokenizers ---

    @property
    def text_parts(self) -> list[str]:
        """The parts that read prompts, by the names of their folders, without those that are null or left out.

        Raises UserError as `folder`, and where `without` names a part that the pipeline does not list.
        """
        for name in self.without:
            if not self.is_published and name not in self.index:
                raise UserError(
                    f"{FIELD}.without: {self.source} has no {name} that could be left out: set {FIELD}.without=[]"
                )
        left_out = {*self.without, *(name.replace("text_encoder", "tokenizer") for name in self.without)}
        names: list[str] = []
        for name, entry in self.index.items():
            if has_component(entry) and TEXT_PARTS.fullmatch(name) and name not in left_out:
                names.append(name)
        return names

    @property
    def absent_parts(self) -> list[str]:
        """The parts that diffusers opens the pipeline without, if each is passed as None.

        They are text encoders and tokenizers that are null in model_index.json or left out by `without`, and parts
        that model_index.json lists, that dumo reads nothing of, and that are not in the folder, such as a safety
        checker. [] for a published name.
        """
        if self.is_published:
            return []
        text_parts = self.text_parts
        absent: list[str] = []
        for name, entry in self.index.items():
            if not isinstance(entry, list) or name in (TRANSFORMER, UNET, VAE, SCHEDULER):
                continue
            if TEXT_PARTS.fullmatch(name):
                is_absent = name not in text_parts
            else:
                is_absent = has_component(entry) and not (self.folder / name).is_dir()
            if is_absent:
                absent.append(name)
        return absent

    def text_encoder_bytes(self, itemsize: int) -> int | None:
        """Return the bytes of the text encoders that are not left out, at `itemsize` bytes a weight; None: not known.

        The index of a published name has the number of weights of all its text encoders, in the entry `_readers`, and
        those of each optional one.
        """
        if self.is_published:
            if "_readers" not in self.index:
                return None
            optional_readers = self.index.get("_optional_readers", {})
            left_out = sum(optional_readers.get(name, 0) for name in self.without)
            return (self.index["_readers"] - left_out) * itemsize
        num_weights = 0
        for part in self.text_parts:
            part_weights = parts.find_weights(self.folder / part, weights_name(part))
            if part_weights is not None:
                num_weights += sum(tensor.numel() for tensor in part_weights.load().values())
        return num_weights * itemsize or None

    def text_files(self, part: str) -> list[Path]:
        """Return the files of a text encoder or tokenizer that are read. Raises UserError where they are missing."""
        if part.startswith("tokenizer"):
            folder = self.folder / part
            visible = [file for file in folder.glob("*") if file.is_file() and not file.name.startswith(".")]
            if not visible:
                raise UserError(f"{FIELD}: {self.source} has no {part}. {HINT}")
            return sorted(visible)
        if part in _OPTIONAL_PARTS and self._find_part(part) is None:
            raise UserError(f"{FIELD}: {self.source} has no {part}: set {FIELD}.without=[{part}] to go without it")
        files = self.weights(part).all_files
        for name in (CONFIG, GENERATION_CONFIG):
            file = self.folder / part / name
            if file.is_file():
                files.append(file)
        return sorted(files)

    def require_text_files(self) -> None:
        """Raise UserError where a text encoder or a tokenizer is missing. Reads no weights."""
        if self.is_published:
            return
        for part in self.text_parts:
            self.text_files(part)

    def texts_hash(self) -> str:
        """Return a hash of all files that read prompts. Raises UserError where a part is missing."""
        lines: list[str] = []
        for part in self.text_parts:
            lines += [f"{part}/{file.name} {digest.of_file(file)}" for file in self.text_files(part)]
        return digest.short(*lines)


class PipelineSpec(Spec):
    """A part of a run that reads its pipeline, which the run hands over (`dumo.config.spec`)."""

    _pipeline: Pipeline | None = PrivateAttr(default=None)

    @property
    def pipeline(self) -> Pipeline:
        """The run's pipeline. Raises UserError where the run names none."""
        if self._pipeline is None:
            raise UserError(f"{FIELD} is missing: {HINT}")
        return self._pipeline

    def within(self, pipeline: Pipeline | None) -> Self:
        """Return this spec for a run with this pipeline."""
        if pipeline == self._pipeline:
            return self
        spec = self.model_copy()
        spec._pipeline = pipeline
        return spec


def _choose_files(files: Collection[str], *, without: Collection[str], with_weights: bool) -> list[str]:
    """Choose what dumo reads of a repository that holds a pipeline, or a transformer alone."""
    if INDEX not in files:
        chosen = parts.choose_files(files)
    else:
        chosen = [INDEX]
        for part in {file.partition("/")[0] for file in files if "/" in file}:
            if part.replace("tokenizer", "text_encoder") in without:
                continue
            if part.startswith("tokenizer") and TEXT_PARTS.fullmatch(part):
                chosen += [file for file in files if file.startswith(f"{part}/")]
            elif part in (TRANSFORMER, UNET, VAE, SCHEDULER) or TEXT_PARTS.fullmatch(part):
                chosen += parts.choose_files(files, part, weights_name(part))
    chosen += [CARD] if CARD in files else []
    return [file for file in chosen if with_weights or not file.endswith(SUFFIX)]


def component_names(pipeline_class: Any) -> set[str]:  # noqa: ANN401, a class of diffusers
    """Return the names of the parts of a pipeline of diffusers, with those that it can do without."""
    return set(pipeline_class._get_signature_keys(pipeline_class)[0])


def has_component(entry: object) -> bool:
    """Whether model_index.json names a library and a class for a part; [null, null]: the pipeline has none."""
    return isinstance(entry, list) and len(entry) > 0 and entry[0] is not None


def weights_name(part: str) -> str:
    """Return the NAME of the files of a part's weights (`dumo.encoders.part`)."""
    return parts.TRANSFORMERS if TEXT_PARTS.fullmatch(part) else parts.DIFFUSERS


def _config_name(part: str) -> str:
    """Return the name of the file with a part's config."""
    return SCHEDULER_CONFIG if part == SCHEDULER else CONFIG


@lru_cache(64)
def _read_config(file: Path, time_changed: int, size: int) -> tuple[str, str]:
    """Read a config, and return it as JSON, with its hash.

    The cache reads it again if the file's time of change, in ns, or its size is another.
    """
    config = read_json(file)
    return json.dumps(config), _config_hash(config)


def _config_hash(config: Config) -> str:
    """Return a hash of what a config says of a part, not of who wrote it."""
    settings_of_part = {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}
    return digest.short(json.dumps(settings_of_part, sort_keys=True))
