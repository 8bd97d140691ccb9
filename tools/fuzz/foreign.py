"""Folders of models that others made: every value of every JSON in them replaced, one at a time, by what is none.

    python tools/fuzz/foreign.py [--only NAME] [--some 20]

Whatever it says, a folder is taken or refused in a line. Exit code 1 where anything else came. The models are tiny.
"""

import argparse
import json
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from logging import CRITICAL
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # where this is started as a script

import torch

import encoders
from dumo.encoders import clip
from dumo.encoders.autoencoder import DcAe, Model, PipelineVae, SdVae
from dumo.encoders.pipeline import Pipeline
from dumo.encoders.text import Encoder
from dumo.export import write
from dumo.objectives import DuMo
from fuzz.judge import GOOD, wrong
from fuzz.mutation import paths
from pipelines import save
from transformers_saved import of
from transformers_tiny import TINY

MANY = 60  # values in a list or an object, of which some are tried
STRANGE = (None, [], "x", -1, 10**9, 10**30, {})
VAES: dict[str, tuple[type[Model], dict[str, Any]]] = {
    "AutoencoderKL": (
        SdVae,
        {
            **{"latent_channels": 4, "block_out_channels": [4] * 4, "norm_num_groups": 2, "scaling_factor": 0.18215},
            **{"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4},
        },
    ),
    "AutoencoderDC": (
        DcAe,
        {
            **{"latent_channels": 32, "scaling_factor": 0.3189, "attention_head_dim": 4},
            **{f"{half}_block_out_channels": [4] * 6 for half in ("encoder", "decoder")},
            **{f"{half}_layers_per_block": [1] * 6 for half in ("encoder", "decoder")},
            **{f"{half}_block_types": "ResBlock" for half in ("encoder", "decoder")},
        },
    ),
    "AutoencoderKLQwenImage": (
        PipelineVae,
        {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    ),
}


@dataclass(frozen=True)
class Folder:
    """A kind of folder: how it is made, and read."""

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]


def folders() -> list[Folder]:
    """All of them."""
    return [
        *(Folder(name, partial(net, name), partial(build, name)) for name in TINY),
        Folder("meta", partial(net, "sd3"), partial(build, "sd3", device="meta")),
        Folder("t5", sharded, texts),
        Folder("clip-text", encoders.clip, partial(texts, pooled=True)),
        Folder("clip", encoders.clip_of_both, lambda folder: clip.load(folder, "model").cosines(IMAGES, ["a cat"])),
        *(Folder(name, partial(vae, name), partial(codec, name)) for name in VAES),
        Folder("pipeline", pipeline, parts),
    ]


IMAGES = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)


def net(name: str, folder: Path) -> None:
    """A transformer, its weights in several files."""
    model: Any = TINY[name].model()
    model.save_pretrained(folder, max_shard_size="20KB")


def build(name: str, folder: Path, device: str = "cpu") -> None:
    """The net, of latents of 4 channels, by its codes."""
    with torch.device(device):
        for guidance in (None, 3.5):
            try:
                of(folder, lowpass=None, guidance=guidance).build(DuMo().needs, (4, 8, 8), 2)
            except ValueError as error:
                if "guidance" not in str(error):
                    raise


def sharded(folder: Path) -> None:
    """A text encoder with its weights in several files."""
    from transformers import AutoModelForTextEncoding

    encoders.t5(folder)
    model = AutoModelForTextEncoding.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")


def texts(folder: Path, *, pooled: bool = False) -> None:
    """Two texts, through it."""
    spec = Encoder(source=str(folder), length=16, pooled=pooled)
    spec.model_type()
    spec.open()(["a red car", "cat"])


def vae(name: str, folder: Path) -> None:
    """An autoencoder."""
    import diffusers

    of_a_pipeline = VAES[name][0] is PipelineVae
    getattr(diffusers, name)(**VAES[name][1]).save_pretrained(folder / "vae" if of_a_pipeline else folder)


def codec(name: str, folder: Path) -> None:
    """It, opened."""
    if VAES[name][0] is PipelineVae:
        PipelineVae().within(Pipeline(source=str(folder))).open()
    else:
        VAES[name][0](weights=str(folder)).open()


def pipeline(folder: Path) -> None:
    """A pipeline whose weights are not read."""
    save("SD3", folder)


def parts(folder: Path) -> None:
    """What a run says of it, and the parts that are copied."""
    of = Pipeline(source=str(folder))
    of.found()
    write.other_parts(write.read_index(folder))
    PipelineVae().within(of).shape(64)


def changes(folder: Path) -> Iterator[tuple[str, Path, bytes]]:
    """A name for each, its file, and what that holds then."""
    for file in sorted(folder.rglob("*.json")):
        whole = json.loads(file.read_bytes())
        for strange in STRANGE:
            yield f"{file.relative_to(folder)} = {strange}", file, json.dumps(strange).encode()
        for holder, key in list(paths(whole)):
            if len(holder) > MANY and key not in list(range(len(holder)) if isinstance(holder, list) else holder)[:3]:
                continue  # they are alike
            before = holder[key]
            for strange in STRANGE:
                holder[key] = strange
                yield f"{file.relative_to(folder)}: {key} = {strange}", file, json.dumps(whole).encode()
            del holder[key]
            yield f"{file.relative_to(folder)}: no {key}", file, json.dumps(whole).encode()
            holder.insert(key, before) if isinstance(holder, list) else holder.update({key: before})


def tried(kind: Folder, some: int | None = None, wanted: Sequence[str] = ()) -> tuple[Counter[str], list[str]]:
    """How often each end was seen, and a line for every one that should not be; `wanted` are tried in any case."""
    ends, found = Counter[str](), dict[str, str]()
    with TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(place)
        kind.make(folder)
        kind.read(folder)
        every = list(changes(folder))
        chosen = set(range(len(every)) if some is None else random.Random(kind.name).sample(range(len(every)), some))
        for n, (name, file, data) in enumerate(every):
            if n in chosen or name in wanted:
                before = file.read_bytes()
                file.write_bytes(data)
                end, words = wrong(partial(kind.read, folder))
                file.write_bytes(before)
                ends[end] += 1
                if end not in GOOD:
                    found.setdefault(f"{end} {words[-60:]}", f"{kind.name}, {name}: {end}: {words[:400]}")
    return ends, list(found.values())


def main() -> int:
    """All kinds, in turn."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--only", default="")
    asked.add_argument("--some", type=int)
    options = asked.parse_args()
    for library in ("diffusers", "transformers"):
        logging = import_module(f"{library}.utils.logging")
        logging.set_verbosity(CRITICAL)
        logging.disable_progress_bar()
    started, all_found, count = time.perf_counter(), list[str](), 0
    for kind in folders():
        if options.only in kind.name:
            ends, found = tried(kind, options.some)
            count += ends.total()
            print(f"{kind.name:24} {', '.join(f'{end} {n}' for end, n in ends.most_common())}", flush=True)
            print(*found, sep="\n", end="\n" * bool(found), flush=True)
            all_found += found
    print(f"{len(all_found)} found in {count:,}, {time.perf_counter() - started:.0f} s")
    return 1 if all_found else 0


if __name__ == "__main__":
    sys.exit(main())
