"""Choose the weight files of one component in a diffusers or transformers folder.

A component is a folder with a config and weights in safetensors. NAME is `diffusion_pytorch_model` for diffusers models
and `model` for transformers models. A folder may have several copies of its weights:

    NAME.safetensors                       in one file
    NAME-00001-of-00002.safetensors        in shards, which NAME.safetensors.index.json lists
    NAME.fp16.safetensors                  a variant in one file
    NAME.fp16-00001-of-00002.safetensors   a variant in shards, which NAME.safetensors.index.fp16.json lists

`find_weights` returns the first complete copy as `PartWeights`, and `require_weights` raises an error if there is none.
`PartWeights.build_model` loads it with its library, and `first_unfit_key` returns the first weight that does not match.
`choose_files` makes the same choice among the files of a repository on the Hub.
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

# NAME of the weight files of each library, and the names of unsharded files.
DIFFUSERS = "diffusion_pytorch_model"
TRANSFORMERS = "model"
DIFFUSERS_FILE = f"{DIFFUSERS}{SUFFIX}"
TRANSFORMERS_FILE = f"{TRANSFORMERS}{SUFFIX}"
# Configs and tokenizer vocabularies.
_TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja")
VARIANTS = (None, "fp16", "bf16")  # in order of preference; None means no variant
PICKLES = {  # dumo refuses pickled weights
    DIFFUSERS: ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.bin.index.json"),
    TRANSFORMERS: ("pytorch_model.bin", "pytorch_model.bin.index.json"),
}


@dataclass(frozen=True)
class PartWeights:
    """The weight files of a component, in one variant."""

    files: tuple[Path, ...]  # in the order of their names
    variant: str | None = None  # such as fp16
    index: Path | None = None  # None if there is one file

    @property
    def all_files(self) -> list[Path]:
        """The weight files and their index."""
        return [*self.files, self.index] if self.index else [*self.files]

    def load(self) -> dict[str, Tensor]:
        """Return the memory-mapped tensors by name. Raises UserError for a damaged file."""
        tensors: dict[str, Tensor] = {}
        for file in self.files:
            tensors |= tensor_files.load(file)
        return tensors

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the first tensor. Raises UserError if the first file is damaged."""
        tensors = tensor_files.load(self.files[0])
        return next(iter(tensors.values())).dtype

    def build_model(self, model_class: Any, **options: Any) -> tuple[Any, Mapping[str, Any]]:  # noqa: ANN401, of others
        """Load a diffusers or transformers model with these weights. Returns it, and the library's loading report.

        The library finds the files itself: restricted to this variant and to safetensors it takes `files`, because
        `_candidates` follows its order of preference. Raises the library's errors. Pickles and the network are never
        used.
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
        """Return the SHA-256 of the file in hexadecimal, or of the hashes of several files.

        Raises UserError, which ends in `hint`, for a damaged file.
        """
        hashes = [tensor_files.whole_digest(file, hint) for file in self.files]
        if len(hashes) == 1:
            return hashes[0]
        return digest.of_bytes(*(sha256.encode() for sha256 in hashes))


def choose_files(files: Collection[str], folder: str = "", name: str = DIFFUSERS) -> list[str]:
    """Choose the files to download for a model in a folder of a repository; `name` is the NAME of its weights.

    These are configs, tokenizer files, and the weights that `find_weights` would choose.
    """
    prefix = f"{folder}/" if folder else ""
    below = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
    here = {file for file in below if "/" not in file}
    chosen = [file for file in here if file.endswith(_TEXT_SUFFIXES) and ".index." not in file]
    for variant in VARIANTS:
        infix = f".{variant}" if variant else ""
        index = f"{name}{SUFFIX}.index{infix}.json"
        # Older files have the variant after the shard number.
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
    """Return the first missing, unexpected or mismatched key of a loading report, or None if all match."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        for key in report.get(kind, ()):
            return str(key)
    return None


def find_weights(folder: Path, name: str) -> PartWeights | None:
    """Return the preferred complete weights of a folder, or None; `name` is the NAME of their files.

    Raises UserError for an index that cannot be read.
    """
    for candidate in _candidates(folder, name):
        if all(file.is_file() for file in candidate.files):
            return candidate
    return None


def require_weights(folder: Path, name: str, field: str, hint: str) -> PartWeights:
    """Return the preferred complete weights of a folder; `name` is the NAME of their files.

    Raises UserError if there are none, shards are missing, or the weights are pickles. The message begins with `field`,
    a field of run.yaml, and ends with `hint`.
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
    """Yield possible weights of a folder, in order of preference. Their files may be missing, but not an index."""
    for variant in VARIANTS:
        infix = f".{variant}" if variant else ""
        one_file = PartWeights((folder / f"{name}{infix}{SUFFIX}",), variant)
        index = folder / f"{name}{SUFFIX}.index{infix}.json"
        shards = [PartWeights(_listed_files(index), variant, index)] if index.is_file() else []
        yield from [*shards, one_file] if name == DIFFUSERS else [one_file, *shards]  # as their libraries do


def _listed_files(index: Path) -> tuple[Path, ...]:
    """Return the files that an index lists. Raises UserError if it lists files outside of the folder."""
    names = sorted(set(read_json(index)["weight_map"].values()))
    if any(Path(name).name != name for name in names):
        raise UserError(f"{index} lists files outside its folder: download the folder again")
    return tuple(index.with_name(name) for name in names)
