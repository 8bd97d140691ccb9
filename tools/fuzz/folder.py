"""Folders of models that others made: every value of every JSON in them replaced, one at a time, by what is none.

`model_folders` lists the kinds of folders: each is made tiny, with random weights, and read as a run would read it.
`folder_trials` changes one value, reads the folder and puts the value back. A folder is taken, or refused in a line.
"""

import json
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from logging import CRITICAL
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

import encoders
from dumo.encoders import clip
from dumo.encoders.autoencoder import DcAe, DiffusersCodec, PipelineVae, SdVae
from dumo.encoders.pipeline import Pipeline
from dumo.encoders.text import TextEncoder
from dumo.export import write
from dumo.objectives import DuMo
from fuzz.judge import Trial, outcome_of
from fuzz.mutation import places
from pipelines import save
from transformers_saved import of
from transformers_tiny import TINY

MAX_ALIKE = 60  # entries of a list or an object, above which its first TRIED_ALIKE are changed: they are alike
TRIED_ALIKE = 3
STRANGE_VALUES = (None, [], "x", -1, 10**9, 10**30, {})
ENCODE_DECODE = ("encoder", "decoder")
# by diffusers' class: ours, and the config of a tiny one
VAES: dict[str, tuple[type[DiffusersCodec], dict[str, Any]]] = {
    "AutoencoderKL": (
        SdVae,
        {
            "latent_channels": 4,
            "block_out_channels": [4] * 4,
            "norm_num_groups": 2,
            "scaling_factor": 0.18215,
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        },
    ),
    "AutoencoderDC": (
        DcAe,
        {
            "latent_channels": 32,
            "scaling_factor": 0.3189,
            "attention_head_dim": 4,
            **{f"{half}_block_out_channels": [4] * 6 for half in ENCODE_DECODE},
            **{f"{half}_layers_per_block": [1] * 6 for half in ENCODE_DECODE},
            **{f"{half}_block_types": "ResBlock" for half in ENCODE_DECODE},
        },
    ),
    "AutoencoderKLQwenImage": (
        PipelineVae,
        {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    ),
}


@dataclass(frozen=True)
class ModelFolder:
    """A kind of folder: how a tiny one is made, and read."""

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]


class FileChange(NamedTuple):
    """One file of a folder with another content."""

    name: str  # such as "config.json: num_layers = x"
    file: Path
    content: bytes


def model_folders() -> list[ModelFolder]:
    """All kinds of folders."""
    nets = [ModelFolder(name, partial(make_net, name), partial(read_net, name)) for name in TINY]
    vaes = [ModelFolder(name, partial(make_vae, name), partial(read_vae, name)) for name in VAES]
    return [
        *nets,
        ModelFolder("meta", partial(make_net, "sd3"), partial(read_net, "sd3", device="meta")),
        ModelFolder("t5", make_sharded_t5, read_text_encoder),
        ModelFolder("clip-text", encoders.clip, partial(read_text_encoder, pooled=True)),
        ModelFolder("clip", encoders.clip_of_both, read_clip),
        *vaes,
        ModelFolder("pipeline", partial(save, "SD3"), read_pipeline),
    ]


def folder_trials(
    kind: ModelFolder, count: int | None = None, names: Sequence[str] = (), *, seed: int = 0
) -> Iterator[Trial]:
    """A trial for each change of a folder; `count`: of so many, drawn (None: all), and of those with one of `names`."""
    with TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(place)
        kind.make(folder)
        kind.read(folder)
        changes = list(_changes(folder))
        chosen = range(len(changes))
        if count is not None:
            chosen = random.Random(f"{seed}/{kind.name}").sample(chosen, min(count, len(changes)))
        for number, change in enumerate(changes):
            if number not in chosen and change.name not in names:
                continue
            content_before = change.file.read_bytes()
            change.file.write_bytes(change.content)
            yield f"{kind.name}, {change.name}", partial(outcome_of, partial(kind.read, folder))
            change.file.write_bytes(content_before)


def _changes(folder: Path) -> Iterator[FileChange]:
    """Every change of a folder's files of JSON: all of it replaced, each value replaced, each value gone."""
    for file in sorted(folder.rglob("*.json")):
        name = file.relative_to(folder)
        tree = json.loads(file.read_bytes())
        for strange in STRANGE_VALUES:
            yield FileChange(f"{name} = {strange}", file, json.dumps(strange).encode())
        for holder, key in list(places(tree)):
            if _is_one_of_many(holder, key):
                continue
            value = holder[key]
            for strange in STRANGE_VALUES:
                holder[key] = strange
                yield FileChange(f"{name}: {key} = {strange}", file, json.dumps(tree).encode())
            del holder[key]
            yield FileChange(f"{name}: no {key}", file, json.dumps(tree).encode())
            if isinstance(holder, list):
                holder.insert(key, value)
            else:
                holder[key] = value


def _is_one_of_many(holder: Any, key: object) -> bool:  # noqa: ANN401, a list or an object
    """Whether a place is in a long list or object, and not among its first."""
    keys = list(range(len(holder)) if isinstance(holder, list) else holder)
    return len(keys) > MAX_ALIKE and key not in keys[:TRIED_ALIKE]


def silence_libraries() -> None:
    """Let diffusers and transformers log nothing."""
    for library in ("diffusers", "transformers"):
        logging = import_module(f"{library}.utils.logging")
        logging.set_verbosity(CRITICAL)
        logging.disable_progress_bar()


# ----------------------------------------------------------------------------------------------- how folders are made


def make_net(name: str, folder: Path) -> None:
    """A transformer of TINY, its weights in several files."""
    model: Any = TINY[name].model()
    model.save_pretrained(folder, max_shard_size="20KB")


def make_sharded_t5(folder: Path) -> None:
    """A text encoder, its weights in several files."""
    from transformers import AutoModelForTextEncoding

    encoders.t5(folder)
    model = AutoModelForTextEncoding.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")


def make_vae(name: str, folder: Path) -> None:
    """An autoencoder; one that is read from a pipeline lies in `vae`."""
    import diffusers

    spec, config = VAES[name]
    vae_folder = folder / "vae" if spec is PipelineVae else folder
    getattr(diffusers, name)(**config).save_pretrained(vae_folder)


# ----------------------------------------------------------------------------------------------- how they are read


def read_net(name: str, folder: Path, device: str = "cpu") -> None:
    """Build a net from a transformer, for latents of 4 channels, with and without embedded guidance."""
    with torch.device(device):
        for guidance in (None, 3.5):
            try:
                of(folder, lowpass=None, guidance=guidance).build(DuMo().needs, (4, 8, 8), 2)
            except ValueError as error:
                if "guidance" not in str(error):  # a model takes it or does not
                    raise


def read_text_encoder(folder: Path, *, pooled: bool = False) -> None:
    """Encode two texts."""
    spec = TextEncoder(source=str(folder), length=16, pooled=pooled)
    spec.model_type()
    spec.open()(["a red car", "cat"])


def read_clip(folder: Path) -> None:
    """Compare an image with a text."""
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    clip.load(folder, "model").cosines(image, ["a cat"])


def read_vae(name: str, folder: Path) -> None:
    """Open an autoencoder."""
    spec, _ = VAES[name]
    if spec is PipelineVae:
        PipelineVae().within(Pipeline(source=str(folder))).open()
    else:
        spec(weights=str(folder)).open()


def read_pipeline(folder: Path) -> None:
    """Read what a run records of a pipeline, and the parts that an export copies; not its weights."""
    pipeline = Pipeline(source=str(folder))
    pipeline.with_facts()
    write.other_parts(write.read_index(folder))
    PipelineVae().within(pipeline).shape(64)
