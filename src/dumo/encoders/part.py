"""The files of one part of a diffusers folder: which weights dumo opens.

A part is a folder with a config and weights in safetensors. NAME is `diffusion_pytorch_model` of models of diffusers,
and `model` of models of transformers. A folder may hold its weights several times:

    NAME.safetensors                       in one file
    NAME-00001-of-00002.safetensors        in shards, which NAME.safetensors.index.json lists
    NAME.fp16.safetensors                  a variant in one file
    NAME.fp16-00001-of-00002.safetensors   a variant in shards, which NAME.safetensors.index.fp16.json lists

Code that opens weights of a folder asks here: `find_weights` chooses the first of these that is complete, and
`require_weights` refuses a folder without any. `PartWeights` is the choice; `build_model` opens it by its library, and
`first_unfit_key` says whether it fits. `choose_files` makes the same choice among the files of a repository on the Hub.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dumo.io import digest, tensor_files
from dumo.io.hub import SUFFIX
from dumo.io.read import read_json
from dumo.types import UserError

DIFFUSERS = "diffusion_pytorch_model"  # NAME of models of diffusers
TRANSFORMERS = "model"  # NAME of models of transformers
DIFFUSERS_FILE = f"{DIFFUSERS}{SUFFIX}"  # plain weights in one file
TRANSFORMERS_FILE = f"{TRANSFORMERS}{SUFFIX}"
# Files of text: configs, and vocabularies of tokenizers.
_TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja")
VARIANTS = (None, "fp16", "bf16")  # in order of preference; None: plain
PICKLES = {  # pickled weights of these models; dumo refuses them
    DIFFUSERS: ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.bin.index.json"),
    TRANSFORMERS: ("pytorch_model.bin", "pytorch_model.bin.index.json"),
}


@dataclass(frozen=True)
class PartWeights:
    """The weights of a part, of one variant."""

    files: tuple[Path, ...]  # in the order of their names
    variant: str | None = None  # such as fp16; None: plain
    index: Path | None = None  # lists the files; None: there is one file

    @property
    def all_files(self) -> list[Path]:
        """The files of weights, and the index that lists them."""
        return [*self.files, self.index] if self.index else [*self.files]

    def load(self) -> dict[str, Tensor]:
        """The tensors by name, mapped. Raises UserError for a damaged file."""
        tensors: dict[str, Tensor] = {}
        for file in self.files:
            tensors |= tensor_files.load(file)
        return tensors

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first tensor; opens the first file. Raises UserError where that is damaged."""
        tensors = tensor_files.load(self.files[0])
        return next(iter(tensors.values())).dtype

    def build_model(self, model_class: Any, **options: Any) -> tuple[Any, Mapping[str, Any]]:  # noqa: ANN401, of others
        """A model of diffusers or transformers with these weights, and its library's report of how they fit.

        The library finds the files by itself. By the same variant and safetensors alone it takes those of `files`, for
        NAME is its own, and `_candidates` prefers what it prefers. Raises what the library does. Pickles and the
        network are never used.
        """
        return model_class.from_pretrained(
            self.files[0].parent,
            output_loading_info=True,
            variant=self.variant,
            use_safetensors=True,
            local_files_only=True,
            **options,
        )

    def require_undamaged(self) -> None:
        """Read the headers. Raises UserError for a damaged file."""
        for file in self.files:
            with tensor_files.open_safetensors(file):
                pass

    def sha256(self, hint: str = "") -> str:
        """The SHA-256 of the file, in hexadecimal; of several files, of all their hashes.

        Raises UserError, which ends in `hint`, for a damaged file.
        """
        hashes = [tensor_files.whole_digest(file, hint) for file in self.files]
        if len(hashes) == 1:
            return hashes[0]
        return digest.of_bytes(*(sha256.encode() for sha256 in hashes))


def choose_files(files: Collection[str], folder: str = "", name: str = DIFFUSERS) -> list[str]:
    """Choose what is read of a model, NAME being `name`, in a folder of a repository with these files.

    These are the configs, the files of a tokenizer, and the weights that `find_weights` would open.
    """
    prefix = f"{folder}/" if folder else ""
    below = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
    here = {file for file in below if "/" not in file}
    chosen = [file for file in here if file.endswith(_TEXT_SUFFIXES) and ".index." not in file]
    for variant in VARIANTS:
        infix = f".{variant}" if variant else ""
        index = f"{name}{SUFFIX}.index{infix}.json"
        # Older variants have the name of the variant behind the number.
        shard_name = re.compile(rf"{name}({infix}-\d+-of-\d+|-\d+-of-\d+{infix}){SUFFIX}")
        shards = [file for file in here if shard_name.fullmatch(file)]
        candidates = [[f"{name}{infix}{SUFFIX}"], [index, *shards]]
        if name == DIFFUSERS:
            candidates.reverse()
        complete = [files for files in candidates if here.issuperset(files)]
        if complete:
            chosen += complete[0]
            break
    return sorted(prefix + file for file in chosen)


def first_unfit_key(report: Mapping[str, Any]) -> str | None:
    """The name of a weight that is missing, unknown or misshapen, by a library's report; None: all fit."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        for key in report.get(kind, ()):
            return str(key)
    return None


def find_weights(folder: Path, name: str) -> PartWeights | None:
    """The weights of a folder that dumo opens, NAME being `name`; None: there are none that are complete.

    Raises UserError for an index that cannot be read.
    """
    for candidate in _candidates(folder, name):
        if all(file.is_file() for file in candidate.files):
            return candidate
    return None


def require_weights(folder: Path, name: str, field: str, hint: str) -> PartWeights:
    """The weights of a folder that dumo opens, NAME being `name`.

    Raises UserError where there are none, shards are missing, or the weights are pickles. `field` is the field of a run
    that the message names; `hint` ends the message with what to do.
    """
    part_weights = find_weights(folder, name)
    if part_weights is not None:
        return part_weights
    for candidate in _candidates(folder, name):
        missing = [file.name for file in candidate.files if not file.is_file()]
        if candidate.index is not None and len(missing) < len(candidate.files):
            raise UserError(f"{field}: {folder} lacks {missing[0]}, which {candidate.index.name} lists: {hint}")
    for pickle in PICKLES[name]:
        if (folder / pickle).is_file():
            raise UserError(f"{folder / pickle}: {tensor_files.NO_PICKLE}. {hint}")
    variants = " or ".join(f".{variant}" for variant in VARIANTS if variant)
    raise UserError(
        f"{field}: {folder} has no weights ({name}{SUFFIX}, in one file or in shards, plain or {variants}): {hint}"
    )


def _candidates(folder: Path, name: str) -> Iterator[PartWeights]:
    """The weights that may be in a folder, in order of preference; their files may be missing, an index is not."""
    for variant in VARIANTS:
        infix = f".{variant}" if variant else ""
        one_file = PartWeights((folder / f"{name}{infix}{SUFFIX}",), variant)
        index = folder / f"{name}{SUFFIX}.index{infix}.json"
        shards = [PartWeights(_listed_files(index), variant, index)] if index.is_file() else []
        yield from [*shards, one_file] if name == DIFFUSERS else [one_file, *shards]  # as their libraries do


def _listed_files(index: Path) -> tuple[Path, ...]:
    """The files that an index lists. Raises UserError if it lists files of another folder, which are not the run's."""
    names = sorted(set(read_json(index)["weight_map"].values()))
    if any(Path(name).name != name for name in names):
        raise UserError(f"{index} lists files of another folder: take another copy of the folder")
    return tuple(index.with_name(name) for name in names)
