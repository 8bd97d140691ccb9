"""A pipeline of diffusers in a folder: what its model_index.json and the configs of its parts say.

A run names one folder, and takes everything from there: the model that it tunes, the autoencoder with its numbers, the
text encoders, the scheduler. `Pipeline.with_facts` pins each part by a hash when the run begins, so a run never
decodes, reads prompts or is exported with the parts of another. Parts of a run that read the pipeline are a
`PipelineSpec`, and get it by `with_pipeline`.

`Pipeline.weights` are the files of a part that dumo opens (`dumo.encoders.part`). What is no folder is refused with the
command that makes one: of a name on the Hugging Face hub (`dumo.io.hub`), of one file (`dumo.encoders.singlefile`).
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import Field, PrivateAttr, model_validator
from pydantic.config import JsonDict
from yaml import YAMLError

from dumo.encoders import part as parts
from dumo.encoders.part import PartWeights
from dumo.io import digest, hub
from dumo.io.hub import INDEX, PUBLISHED, SCHEDULER, SMALL, TRANSFORMER, UNET, VAE, published
from dumo.io.read import read_settings, read_text, user_path
from dumo.io.yaml import parse_yaml
from dumo.runtime.door import settings
from dumo.types import MAYBE_PLACE, PINNED, QUIET, Spec, UserError

S = TypeVar("S", bound=Spec)
P = TypeVar("P", bound="PipelineSpec")
Config = Mapping[str, Any]  # a part's config.json
FIELD = "pipeline"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"  # of a text encoder that can write, too
SCHEDULER_CONFIG = "scheduler_config.json"
SOURCE_SCHEMA: JsonDict = {**MAYBE_PLACE, "names": [*PUBLISHED, *SMALL]}
HINT = f"{FIELD}=DIR names a folder with {INDEX}, as diffusers saves a pipeline, or as hf download brings it"
TEXT_PARTS = re.compile(r"(text_encoder|tokenizer)(_\d)?")  # folders of what reads prompts
OptionalPart = Literal["text_encoder_3"]  # a pipeline of diffusers works without it: SD3's T5
OPTIONAL: tuple[OptionalPart, ...] = get_args(OptionalPart)
LICENSE = ("license", "license_name", "license_link")  # of a README.md's head
IS_DISTILLED = "is_distilled"  # in a Flux2KleinPipeline's model_index.json
FEW_STEP_NAMES = re.compile("turbo|schnell|lightning|sprint|distill|hyper|lcm|few-?step", re.I)


class Pipeline(Spec):
    """A folder of diffusers, or the name of a published one, whose configs are here and whose weights are not."""

    source: str = Field(json_schema_extra=SOURCE_SCHEMA)
    # Text encoders that are left out though the folder may have them, as by diffusers' text_encoder_3=None.
    without: tuple[OptionalPart, ...] = Field(default=(), exclude_if=lambda names: not names)
    # Whether it is distilled to few steps; None: not known, for its class and config are those of its base.
    distilled: bool | None = Field(default=None, json_schema_extra=QUIET)
    # Its class, its licence and the hashes of its parts: found when a run begins.
    facts: dict[str, str] | None = Field(default=None, exclude_if=lambda facts: facts is None, json_schema_extra=PINNED)

    @model_validator(mode="before")
    @classmethod
    def _from_source(cls, value: Any) -> Any:  # noqa: ANN401, it is checked after this
        if isinstance(value, str):
            return {"source": value}
        if isinstance(value, dict) and isinstance(value.get("without"), list):
            # JSON's lists are read as tuples, but not behind a validator that sees them as Python's
            return {**value, "without": tuple(value["without"])}
        return value

    @property
    def is_published(self) -> bool:
        """Whether it is a published name, without weights."""
        return self.source in PUBLISHED or self.source in SMALL

    @property
    def folder(self) -> Path:
        """Where it is.

        Raises UserError, with the command that makes the folder, for a published name, a name on the Hugging Face hub,
        one file of weights, and where nothing is.
        """
        if self.is_published:
            raise UserError(
                f"{FIELD}: {self.source} is known without its weights. Fetch them, {self.download_command()}, and set "
                f"{FIELD}=DIR"
            )
        path = user_path(self.source, FIELD)
        if path.suffix == parts.SUFFIX and path.is_file():
            from dumo.encoders.singlefile import unpack_hint

            raise UserError(f"{FIELD}: {unpack_hint(path)}, and set {FIELD}=DIR")
        if not path.is_dir():
            fetch = hub.fetch_hint(self.source)
            if fetch:
                raise UserError(f"{FIELD}: {fetch}, and set {FIELD}={Path(self.source).name}")
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

    def weights(self, part: str) -> PartWeights:
        """The weights of a part that dumo opens.

        Raises UserError, with the command that brings them, where there are none, and as `part_folder`.
        """
        folder = self.part_folder(part)
        return parts.require_weights(folder, weights_name(part), FIELD, self.download_command(part))

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
                f"that back, or say where the pipeline is with {settings(f'{FIELD}.source=...')}"
            )

    def download_command(self, part: str = "") -> str:
        """The command that brings what dumo reads of the whole pipeline, or of one part of it."""
        folder = "DIR" if self.is_published else self.source
        repository = self.repository or "REPOSITORY"
        if not part:
            return hub.pipeline_command(repository, folder, self.without)
        wanted = [part]
        if part == TRANSFORMER:
            wanted = hub.model_parts(repository)
        return hub.download_command(repository, wanted, [INDEX], folder)

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
            head = parse_yaml(text.split("---")[1]) if text.startswith("---") else None
        except (UserError, YAMLError):  # others wrote it
            return {}
        if not isinstance(head, dict):
            return {}
        return {key: str(head[key]) for key in LICENSE if key in head}

    @property
    def hint(self) -> str:
        """What is known of its being distilled, in words; `doctor` and an export's card print it."""
        if self.distilled is not None:
            return "distilled" if self.distilled else "not distilled"
        if IS_DISTILLED in self.index:
            words = "distilled" if self.index[IS_DISTILLED] else "not distilled"
            return f"{words}, by its {INDEX}"
        scheduler = str(self.index.get("scheduler", ""))
        names = " ".join((Path(self.source).name, self.repository, self.class_name, scheduler))
        if few_step_name := FEW_STEP_NAMES.search(names):
            return f"distilled, by its name ({few_step_name[0]}): if so, set {FIELD}.distilled=true"
        return f"not known whether it is distilled to few steps ({FIELD}.distilled)"

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
        for part in (TRANSFORMER, VAE, SCHEDULER):
            if self._find_part(part):
                yield part, config_hash(self.config(part))
        vae_weights = parts.find_weights(self.folder / VAE, parts.DIFFUSERS)
        if vae_weights is not None:
            yield "vae.weights", vae_weights.sha256()
        if self.text_parts:
            yield "texts", self.texts_hash()

    @property
    def text_parts(self) -> list[str]:
        """The parts that read prompts, by the names of their folders; not those that are null, or left out.

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
        """Bytes of the encoders of prompts, but those left out, at this size of a number; None: they are not here."""
        if self.is_published:
            if "_readers" not in self.index:
                return None
            optional_readers = self.index.get("_optional_readers", {})
            left_out = sum(optional_readers.get(name, 0) for name in self.without)
            return (self.index["_readers"] - left_out) * itemsize
        numbers = 0
        for part in self.text_parts:
            part_weights = parts.find_weights(self.folder / part, weights_name(part))
            if part_weights is not None:
                numbers += sum(tensor.numel() for tensor in part_weights.load().values())
        return numbers * itemsize or None

    def text_files(self, part: str) -> list[Path]:
        """The files of a text encoder or tokenizer that are read. Raises UserError where they are missing."""
        if part.startswith("tokenizer"):
            folder = self.folder / part
            visible = [file for file in folder.glob("*") if file.is_file() and not file.name.startswith(".")]
            if not visible:
                raise UserError(f"{FIELD}: {self.source} has no {part}: {self.download_command(part)}")
            return sorted(visible)
        if part in OPTIONAL and self._find_part(part) is None:
            raise UserError(
                f"{FIELD}: {self.source} has no {part}: {self.download_command(part)}; or go without it, "
                f"{settings(f'{FIELD}.without=[{part}]')}"
            )
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
        """A hash of all that reads prompts. Raises UserError where a part is missing."""
        lines: list[str] = []
        for part in self.text_parts:
            lines += [f"{part}/{file.name} {digest.of_file(file)}" for file in self.text_files(part)]
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


def has_component(entry: object) -> bool:
    """Whether model_index.json names a library and a class for a part; [null, null]: the pipeline has none."""
    return isinstance(entry, list) and len(entry) > 0 and entry[0] is not None


def weights_name(part: str) -> str:
    """NAME of the weights of a part (`dumo.encoders.part`)."""
    return parts.TRANSFORMERS if TEXT_PARTS.fullmatch(part) else parts.DIFFUSERS


def config_name(part: str) -> str:
    """The name of a part's config."""
    return SCHEDULER_CONFIG if part == SCHEDULER else CONFIG


@lru_cache(64)
def read_config(file: Path, changed: int, size: int) -> tuple[str, str]:
    """A config as JSON, and its hash; read again where the file has `changed`, in ns, or in size."""
    config = read_settings(file, HINT, infinite=file.name == SCHEDULER_CONFIG)  # diffusers' say -Infinity
    return json.dumps(config), config_hash(config)


def config_hash(config: Config) -> str:
    """A hash of what a config says of a part, not of who wrote it."""
    facts = {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}
    return digest.short(json.dumps(facts, sort_keys=True))
