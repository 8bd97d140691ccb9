"""Read a diffusers pipeline from a folder or the Hub: model_index.json, and the configs and weights of its components.

A run has one `Pipeline`, which provides the model to fine-tune, the autoencoder with its scale and shift, the text
encoders and the scheduler. The order of events:

1. `dumo.config.spec.with_pipeline` passes the pipeline to each `PipelineSpec` of a run.
2. `Pipeline.with_facts` records a hash of each component when the run starts. From then on, `require_fact`, `config`
   and `verify` raise an error if a component has changed.
3. `config`, `part_folder` and `weights` open a component. `dumo.encoders.part` chooses the weight files. `text_parts`
   and `text_files` list the text encoders and tokenizers; `absent_parts` lists the components to pass as None.

A pipeline on the Hugging Face Hub is downloaded on demand (`dumo.io.hub`): configs when one is first read, weights when
a component is opened. The configs of some pipelines ship with dumo (`is_published`), so that parameters can be counted
without a download. Single-file checkpoints raise an error that explains how to convert them.
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

Config = Mapping[str, Any]  # the config.json of a component
FIELD = "pipeline"  # the field of run.yaml, for messages
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"  # in the folders of language models
COMPONENTS = (TRANSFORMER, UNET, VAE, SCHEDULER)  # without text encoders and tokenizers
CUSTOM_PIPELINE = "custom_pipeline"  # a key for custom code of the pipeline
SCHEDULER_CONFIG = "scheduler_config.json"
SECOND_TRANSFORMER = "transformer_2"  # in pipelines with two transformers
_SOURCE_SCHEMA: JsonDict = {**MAYBE_PLACE, **HUB_MODEL, "names": [*SMALL]}
HINT = f"{FIELD}=... must be a diffusers pipeline: OWNER/NAME on the Hugging Face Hub, or a folder with {INDEX}"
TEXT_PARTS = re.compile(r"(text_encoder|tokenizer)(_\d)?")  # component names
OptionalPart = Literal["text_encoder_3"]  # the T5 of SD3, which is optional in diffusers
_OPTIONAL_PARTS: tuple[OptionalPart, ...] = get_args(OptionalPart)
LICENSE = ("license", "license_name", "license_link")  # keys in the metadata of a model card
_LIBRARIES = ("diffusers", "transformers")  # libraries from which components are loaded
IS_DISTILLED = "is_distilled"  # a key of model_index.json of a Flux2KleinPipeline


class Pipeline(Spec):
    """A diffusers pipeline: a folder, a repository on the Hub, or a name in SMALL, which has configs only."""

    source: str = Field(json_schema_extra=_SOURCE_SCHEMA)
    # Text encoders to omit, like text_encoder_3=None in diffusers.
    without: tuple[OptionalPart, ...] = Field(default=(), exclude_if=lambda names: not names)
    # The class, the licence and the hashes of the components when the run started, by name.
    facts: dict[str, str] | None = Field(default=None, exclude_if=lambda facts: facts is None, json_schema_extra=PINNED)

    @model_validator(mode="before")
    @classmethod
    def _from_source(cls, value: Any) -> Any:  # noqa: ANN401, pydantic checks it after this
        """Accept a string as the source."""
        if isinstance(value, str):
            return {"source": value}
        if isinstance(value, dict) and isinstance(value.get("without"), list):
            # After a "before" validator, pydantic no longer converts JSON lists to tuples.
            return {**value, "without": tuple(value["without"])}
        return value

    @property
    def is_published(self) -> bool:
        """Return whether the configs ship with dumo. With a pinned commit they are read from the Hub instead."""
        return self.source in SMALL or (self.source in PUBLISHED and self.is_on_hub)

    @property
    def is_on_hub(self) -> bool:
        """Whether the source is a repository on the Hub."""
        return hub.is_hub_name(self.source)

    @property
    def folder(self) -> Path:
        """The pipeline's folder. A download from the Hub contains configs and tokenizers, but possibly no weights.

        Raises UserError for a name in SMALL, a single weight file or a missing folder, and the errors of the Hub.
        """
        return self._find_folder(with_weights=False)

    def fetch(self) -> Path:
        """Return the pipeline's folder, with the weights downloaded. Raises as `folder`."""
        return self._find_folder(with_weights=True)

    def _find_folder(self, *, with_weights: bool) -> Path:
        """Return the folder, fetched if the source is a name on the Hub. Raises as `folder`."""
        if self.source in SMALL:
            raise UserError(
                f"{FIELD}: {self.source} is a config without weights: set net.weights=drawn for random weights. {HINT}"
            )
        if self.is_on_hub:
            return hub.fetch(self.source, partial(_choose_files, without=self.without, with_weights=with_weights))
        path = user_path(self.source, FIELD)
        if path.suffix == SUFFIX and path.is_file():
            raise UserError(
                f"{FIELD}: {path} is a single file without the configs and tokenizers of a pipeline: convert it to a "
                "folder with PIPELINE.from_single_file(FILE).save_pretrained(DIR) of diffusers"
            )
        if not path.is_dir():
            raise UserError(f"{FIELD}: {self.source} does not exist. {HINT}")
        return path

    @property
    def index(self) -> dict[str, Any]:
        """The content of model_index.json, or {} for a single transformer.

        Raises UserError if the folder is missing (`folder`), or if a component is custom code of the pipeline.
        """
        if self.is_published:
            return published_config(self.source)
        file = self.folder / INDEX
        index = read_json(file) if file.is_file() else {}
        _require_known_libraries(index, file)
        return index

    @property
    def class_name(self) -> str:
        """The class name of the pipeline, or "" for a single transformer."""
        return str(self.index.get("_class_name", ""))

    # --- components ---

    def config(self, part: str) -> dict[str, Any]:
        """Read the config of a component. Raises UserError if it is missing, or has changed since the run started."""
        if self.is_published:
            config = self.index.get(part)
            if config is None:
                raise UserError(
                    f"{FIELD}: {self.source} is a transformer without a {part}: set {FIELD} to a whole pipeline"
                )
            return config
        file = self.part_folder(part) / _config_name(part)
        file_state = file.stat()
        text, current_hash = _read_config(file, file_state.st_mtime_ns, file_state.st_size)
        self.require_fact(part, current_hash, file.name)
        return json.loads(text)

    def weights(self, part: str) -> PartWeights:
        """Return the weight files of a component.

        Raises UserError if there are none, or as `part_folder`.
        """
        self.fetch()
        return parts.require_weights(self.part_folder(part), weights_name(part), FIELD, HINT)

    def part_folder(self, part: str) -> Path:
        """Return the folder of a component. Raises UserError if it is missing."""
        folder = self._find_part(part)
        if folder is None:
            raise UserError(f"{FIELD}: {self.source} has no {part}/{_config_name(part)}. {HINT}")
        return folder

    def _find_part(self, part: str) -> Path | None:
        """Return the folder of a component, or None. The model may be in `unet`, or in the pipeline's own folder."""
        candidates = [self.folder / part]
        if part == TRANSFORMER:
            candidates += [self.folder / UNET, self.folder]
        for folder in candidates:
            if (folder / _config_name(part)).is_file():
                return folder
        return None

    @property
    def model_part(self) -> str:
        """The component to fine-tune: "transformer" or "unet". Raises UserError as `config`."""
        class_name = str(self.config(TRANSFORMER).get("_class_name"))
        return UNET if class_name.startswith("UNet") else TRANSFORMER

    @property
    def repository(self) -> str:
        """The repository on the Hugging Face Hub, from the source or from model_index.json, or "" if unknown.

        Other components may be loaded from there, but not the model, because diffusers keeps `_name_or_path` when a
        fine-tuned model is saved.
        """
        if self.is_on_hub:
            return hub.repository_of(self.source)
        noted_name = str(self.index.get("_name_or_path", ""))
        return noted_name if hub.is_hub_name(noted_name) else ""

    # --- hashes recorded when a run starts ---

    def with_facts(self) -> "Pipeline":
        """Return the pipeline with the facts of its components, up to the first missing one.

        A pipeline that has facts already, or whose configs ship with dumo, is returned unchanged.
        """
        if self.is_published or self.facts is not None:
            return self
        facts: dict[str, str] = {}
        try:
            self.fetch()
            for name, value in self._read_facts():
                facts[name] = value
        except UserError:  # raised again when the component is used
            pass
        return self.model_copy(update={"facts": facts}) if facts else self

    def verify(self) -> None:
        """Raise UserError if a component other than the model's weights differs from the recorded facts."""
        without_facts = self.model_copy(update={"facts": None})
        for name, current in without_facts._read_facts():
            if name not in LICENSE:
                self.require_fact(name, current)

    def _read_facts(self) -> Iterator[tuple[str, str]]:
        """Yield the name and value of each fact, from the files. Raises UserError if a component is missing."""
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
        """Raise UserError if a fact has changed since the run started. The message calls it `described_as`.

        Facts that were not recorded are not compared.
        """
        facts = self.facts or {}
        if facts.get(name, current) != current:
            part, _, _ = name.partition(".")
            raise UserError(
                f"{FIELD}: the {part} of {self.source} ({described_as}) has changed since this run was started: "
                f"restore it, or set {FIELD}.source to the location of the original pipeline"
            )

    @property
    def license(self) -> dict[str, str]:
        """The licence entries of the folder's model card, by the keys of LICENSE."""
        from huggingface_hub import metadata_load  # slow to import

        card = self.folder / CARD
        head = (metadata_load(card) or {}) if card.is_file() else {}
        return {key: str(head[key]) for key in LICENSE if key in head}

    # --- text encoders and tokenizers ---

    @property
    def text_parts(self) -> list[str]:
        """The folder names of the text encoders and tokenizers that are neither null nor excluded by `without`.

        Raises UserError as `folder`, and if `without` names a component that the pipeline does not list.
        """
        for name in self.without:
            if not self.is_published and name not in self.index:
                raise UserError(f"{FIELD}.without: {self.source} has no {name} to omit: set {FIELD}.without=[]")
        left_out = {*self.without, *(name.replace("text_encoder", "tokenizer") for name in self.without)}
        names: list[str] = []
        for name, entry in self.index.items():
            if has_component(entry) and TEXT_PARTS.fullmatch(name) and name not in left_out:
                names.append(name)
        return names

    @property
    def absent_parts(self) -> list[str]:
        """The components to pass as None when diffusers loads the pipeline.

        These are text encoders and tokenizers that are null in model_index.json or excluded by `without`, and listed
        components that dumo does not use and that are not in the folder, such as a safety checker. The list is empty
        for a pipeline whose configs ship with dumo.
        """
        if self.is_published:
            return []
        text_parts = self.text_parts
        absent: list[str] = []
        for name, entry in self.index.items():
            if not isinstance(entry, list) or name in COMPONENTS:
                continue
            if TEXT_PARTS.fullmatch(name):
                is_absent = name not in text_parts
            else:
                is_absent = has_component(entry) and not (self.folder / name).is_dir()
            if is_absent:
                absent.append(name)
        return absent

    def text_encoder_bytes(self, itemsize: int) -> int | None:
        """Return the bytes of the used text encoders, at `itemsize` bytes per parameter. None means unknown.

        The entry `_readers` of an index that ships with dumo has the number of parameters of all text encoders and of
        each optional one.
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
        """Return the files of a text encoder or tokenizer that are read. Raises UserError if they are missing."""
        if part.startswith("tokenizer"):
            folder = self.folder / part
            visible = [file for file in folder.glob("*") if file.is_file() and not file.name.startswith(".")]
            if not visible:
                raise UserError(f"{FIELD}: {self.source} has no {part}. {HINT}")
            return sorted(visible)
        if part in _OPTIONAL_PARTS and self._find_part(part) is None:
            raise UserError(f"{FIELD}: {self.source} has no {part}: set {FIELD}.without=[{part}] to omit it")
        files = self.weights(part).all_files
        for name in (CONFIG, GENERATION_CONFIG):
            file = self.folder / part / name
            if file.is_file():
                files.append(file)
        return sorted(files)

    def require_text_files(self) -> None:
        """Raise UserError if a text encoder or tokenizer is missing. Reads no weights."""
        if self.is_published:
            return
        for part in self.text_parts:
            self.text_files(part)

    def texts_hash(self) -> str:
        """Return a hash of all text encoder and tokenizer files. Raises UserError if a component is missing."""
        lines: list[str] = []
        for part in self.text_parts:
            lines += [f"{part}/{file.name} {digest.of_file(file)}" for file in self.text_files(part)]
        return digest.short(*lines)


class PipelineSpec(Spec):
    """A spec that depends on the run's pipeline, which `within` sets (`dumo.config.spec`)."""

    _pipeline: Pipeline | None = PrivateAttr(default=None)

    @property
    def pipeline(self) -> Pipeline:
        """The run's pipeline. Raises UserError if the run has none."""
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
    """Choose the files to download from a repository that holds a pipeline or a single transformer."""
    if INDEX not in files:
        chosen = parts.choose_files(files)
    else:
        chosen = [INDEX]
        for part in {file.partition("/")[0] for file in files if "/" in file}:
            if part.replace("tokenizer", "text_encoder") in without:
                continue
            if part.startswith("tokenizer") and TEXT_PARTS.fullmatch(part):
                chosen += [file for file in files if file.startswith(f"{part}/")]
            elif part in COMPONENTS or TEXT_PARTS.fullmatch(part):
                chosen += parts.choose_files(files, part, weights_name(part))
    chosen += [CARD] if CARD in files else []
    return [file for file in chosen if with_weights or not file.endswith(SUFFIX)]


def component_names(pipeline_class: Any) -> set[str]:  # noqa: ANN401, a class of diffusers
    """Return the component names of a diffusers pipeline, including optional ones."""
    return set(pipeline_class._get_signature_keys(pipeline_class)[0])


def has_component(entry: object) -> bool:
    """Whether an entry of model_index.json names a library and a class; [null, null] means no component."""
    return isinstance(entry, list) and len(entry) > 0 and entry[0] is not None


def _require_known_libraries(index: Mapping[str, object], file: Path) -> None:
    """Raise UserError for a component that dumo loads from another library, or that is code next to its weights.

    Some versions of diffusers import any module that is named as a library, without consent. A malformed component and
    `custom_pipeline` would be ignored.
    """
    for name, entry in index.items():
        if name.startswith("_") or entry in (None, [None, None]):
            continue
        match entry:
            case [str(library), str()]:
                is_own_code = (file.parent / name / f"{library}.py").is_file()
                is_known = library in _LIBRARIES
            case _:
                is_own_code = False
                is_known = False
        is_loaded = TEXT_PARTS.fullmatch(name) or name in (*COMPONENTS, CUSTOM_PIPELINE)
        if is_own_code or (is_loaded and not is_known):
            raise UserError(
                f"{FIELD}: {name} = {json.dumps(entry)} in {file} is not a class of diffusers or transformers, and "
                "dumo does not run custom code of pipelines: use a pipeline without it"
            )


def weights_name(part: str) -> str:
    """Return the NAME of a component's weight files (`dumo.encoders.part`)."""
    return parts.TRANSFORMERS if TEXT_PARTS.fullmatch(part) else parts.DIFFUSERS


def _config_name(part: str) -> str:
    """Return the name of a component's config file."""
    return SCHEDULER_CONFIG if part == SCHEDULER else CONFIG


@lru_cache(64)
def _read_config(file: Path, time_changed: int, size: int) -> tuple[str, str]:
    """Return a config as JSON, and its hash.

    `time_changed` (in ns) and `size` are arguments so that a changed file misses the cache.
    """
    config = read_json(file)
    return json.dumps(config), _config_hash(config)


def _config_hash(config: Config) -> str:
    """Return a hash of a config's settings, without metadata such as the version of diffusers."""
    settings_of_part = {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}
    return digest.short(json.dumps(settings_of_part, sort_keys=True))
