"""What may happen to a run's files while they still look like files of a run, and what dumo must make of it.

A `Harm` changes what lies in the folder that `furnish` fills. The command must then end with exit code 2 and name what
is wrong, having written nothing; or its end must be what it would have been.
"""

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
import yaml
from PIL import Image
from pyarrow import parquet
from torch import Tensor

import encoders
from autoencoder import taef2
from dumo.config import recipe_files
from dumo.data import Latents
from dumo.io import digest, tensor_files
from dumo.run import fill_caches
from e2e.shell import Done, call, files

COUNT, SHARD = 24, 8  # images, and those in a shard
LEAN = ["net.width=16", "net.depth=1", "train.batch=8", "train.steps=4", "train.save_every=2", "train.keep=3"]
LEAN += ["train.log_every=1", "train.milestones=[2, 4]", "evaluate.protocol={kind: photos, samples: 24}"]
End = dict[str, str]


@dataclass(frozen=True)
class Harm:
    """What happens to an artifact, the command that meets it, and what that must say."""

    artifact: str
    damage: str
    do: Callable[[], object]
    words: tuple[str, ...]
    names: tuple[str, ...] = ()  # what the refusal names; of a harmless one, what is said nevertheless
    harmless: bool = False
    older: bool = False  # an older checkpoint is taken, and that is said


def train(run: str, *more: str) -> tuple[str, ...]:
    """Two steps more."""
    return ("train", f"runs/{run}", "train.steps=6", *more)


def sample(run: str) -> tuple[str, ...]:
    """Four images, in two passes."""
    return ("sample", f"runs/{run}", "--nfe", "1,2", "--count", "4")


def evaluate(run: str) -> tuple[str, ...]:
    """In one pass."""
    return ("evaluate", f"runs/{run}", "--nfe", "1")


def furnish() -> None:
    """Fill the folder we are in: images in each container, what is derived of them, and a run of each."""
    paint("photos", 0, 8), paint("others", 1, 8), paint("large", 0, 32), paint("strange", 1, 32)
    pack_tar("photos", "tars"), pack_parquet("photos", "tables")
    taef2(Path("taef2.safetensors"))
    for name in ("photos", "others", "tars", "tables"):
        begin(name, f"data={{kind: images, root: {name}, side: 8, crop: none}}")
    begin("digits", "data={kind: digits}", "evaluate.protocol={kind: digits, samples: 500}")
    begin("teacher", "data={kind: digits}", "train.seed=1")
    begin("paired", "data={kind: digits}", "teacher={source: runs/digits, pairs: {count: 64}}", "train.batch=16")
    begin("repaired", "data={kind: digits}", "teacher={source: runs/teacher, pairs: {count: 64}}", "train.batch=16")
    for name in ("large", "strange"):
        encode_images(name)
    images = "{root: large, side: 32, flip: true}"
    latents = (
        f"{{kind: latents, root: latents/large, images: {images}, codec: {{kind: taef2, weights: taef2.safetensors}}}}"
    )
    begin("latents", f"data={latents}", "net.patch=1")
    words()


CODEC = ["data.codec.weights=taef2.safetensors"]


def encode_images(name: str, rank: int = 0, world: int = 1) -> None:
    """Encode a folder of images to latents, in shards of a few."""
    work = fill_caches.encoding_work(name, CODEC, out=f"latents/{name}", codec="taef2", side=32)
    assert isinstance(work.data, Latents)
    fill_caches.encode(work.data, shard_rows=SHARD, rank=rank, world=world)


def begin(name: str, *fields: str) -> None:
    """Train a run of a few steps."""
    done("train", "digits", "--out", f"runs/{name}", *LEAN, *fields)


def words() -> None:
    """A run whose net reads texts, from a cache."""
    tree: dict[str, Any] = yaml.safe_load(recipe_files.text("digits"))
    encoder = {"kind": "transformers", "source": str(encoders.t5(Path("t5"))), "length": 40}
    texts = {"kind": "encoder", "root": "texts", "encoder": encoder, "width": encoders.WIDTH}
    tree["data"] = {"kind": "digits", "captions": {"kind": "templates", "templates": ["{}", "the digit {n}"]}}
    tree["net"] = {"kind": "dit", "patch": 4, "width": 16, "depth": 1, "attention": 2, "texts": texts}
    Path("words.yaml").write_text(yaml.safe_dump(tree))
    done("train", "words.yaml", "--out", "runs/words", "train.steps=4", "train.batch=8", "train.save_every=2")


def done(*words: object) -> None:
    """A command that must end well."""
    ended = call(*words)
    assert ended.code == 0, (words, ended)


def paint(folder: str, seed: int, side: int) -> None:
    """Images of noise in two classes, of one size on disk."""
    pixels = np.random.default_rng(seed).integers(0, 256, (COUNT, side, side, 3), dtype=np.uint8)
    for i, one in enumerate(pixels):
        file = Path(folder) / "ab"[i % 2] / f"{i:02}.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(one).save(file)


def pack_tar(images: str, folder: str) -> None:
    """The images of a folder as archives of samples."""
    Path(folder).mkdir(exist_ok=True)
    every = sorted(Path(images).rglob("*.bmp"), key=lambda file: file.name)
    for k in range(2):
        with tarfile.open(f"{folder}/train-{k:05}.tar", "w") as tar:
            for file in every[k * COUNT // 2 :][: COUNT // 2]:
                for name, data in ((file.name, file.read_bytes()), (f"{file.stem}.cls", b"%d" % (int(file.stem) % 2))):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def pack_parquet(images: str, folder: str) -> None:
    """The images of a folder as tables."""
    Path(folder).mkdir(exist_ok=True)
    every = sorted(Path(images).rglob("*.bmp"), key=lambda file: file.name)
    for k in range(2):
        some = every[k * COUNT // 2 :][: COUNT // 2]
        rows = {"image": [{"bytes": file.read_bytes()} for file in some], "label": [int(f.stem) % 2 for f in some]}
        parquet.write_table(pa.table(rows), f"{folder}/train-{k:05}.parquet", compression="none", use_dictionary=False)


# What happens to files.


def tensors(file: str, change: Callable[[str, Tensor], Tensor]) -> Callable[[], None]:
    """Each tensor of a file changed, in a file of the same names and notes."""

    def do() -> None:
        found, notes = tensor_files.read(place := one(file))
        changed = {name: change(name, x.clone()).contiguous() for name, x in found.items()}
        safetensors.torch.save_file(changed, place, notes or None)

    return do


def rolled(name: str, x: Tensor) -> Tensor:
    """Every row in the place of its neighbour."""
    return x.roll(1, 0) if x.ndim else x


def scaled(name: str, x: Tensor) -> Tensor:
    """Twice the numbers, where they are no labels."""
    return 2 * x if x.is_floating_point() else x


def zeroed(name: str, x: Tensor) -> Tensor:
    """Nothing."""
    return torch.zeros_like(x)


def relabelled(name: str, x: Tensor) -> Tensor:
    """Labels of the neighbours alone."""
    return x if x.is_floating_point() else x.roll(1, 0)


def halved(name: str, x: Tensor) -> Tensor:
    """The first half of the rows."""
    return x[: len(x) // 2] if x.ndim else x


def swapped(a: str, b: str) -> Callable[[], None]:
    """Two files, or folders, each under the name of the other."""

    def do() -> None:
        first, second = one(a), one(b)
        spare = first.with_name("spare")
        first.rename(spare)
        second.rename(first)
        spare.rename(second)

    return do


def taken(a: str, b: str) -> Callable[[], None]:
    """What lies at b, in place of what lay at a."""

    def do() -> None:
        place = one(a)
        if place.is_dir():
            shutil.rmtree(place)
            shutil.copytree(one(b), place)
        else:
            shutil.copyfile(one(b), place)

    return do


def quietly(do: Callable[[], object], *folders: str) -> Callable[[], None]:
    """Do it, and give each file that is there again the time it had, on a new inode, as a tool that copies does."""

    def quiet() -> None:
        were = {file: file.stat() for folder in folders for file in sorted(Path(folder).rglob("*")) if file.is_file()}
        do()
        for file, was in were.items():
            if file.is_file():
                copy = file.with_name("copy")
                shutil.copyfile(file, copy)
                os.utime(copy, ns=(was.st_atime_ns, was.st_mtime_ns))
                copy.replace(file)

    return quiet


def edited(file: str, change: Callable[[Any], object]) -> Callable[[], None]:
    """A file of JSON with another value."""

    def do() -> None:
        tree = json.loads((place := one(file)).read_text())
        change(tree)
        place.write_text(json.dumps(tree))

    return do


def lines(file: str, change: Callable[[list[str]], list[str]]) -> Callable[[], None]:
    """The lines of a file, others or in another order."""

    def do() -> None:
        place = one(file)
        place.write_text("".join(change(place.read_text().splitlines(keepends=True))))

    return do


def one(pattern: str) -> Path:
    """The last file or folder of this pattern."""
    return sorted(Path().glob(pattern))[-1]


# What must come of it.


def end(words: tuple[str, ...]) -> End:
    """What a command that went well has left, without what tells of the hour: hashes by name."""
    run = Path(words[1])
    if words[0] == "train":
        last = one(f"{run}/checkpoints/step-*")
        return {file.stem: digest.of_file(file) for file in sorted(last.glob("*.safetensors"))}
    if words[0] == "sample":
        return {name: digest.of_bytes(data) for name, data in files(run / "samples").items()}
    if words[0] == "evaluate":
        results = json.loads(one(f"{run}/evaluation*.json").read_text())["results"]
        return {"results": json.dumps([{k: v for k, v in row.items() if "seconds" not in k} for row in results])}
    return {name: digest.of_bytes(data) for name, data in files(Path(words[3])).items()}


ENDS: dict[tuple[str, ...], End] = {}  # of undisturbed commands


def meet(case: Harm) -> Done:
    """Do the harm in the folder we are in, and see what the command makes of it: fails if it is not as it must be."""
    if case.harmless and case.words not in ENDS:
        ENDS[case.words] = undisturbed(case.words)
    case.do()
    before = standing()
    ended = call(*case.words)
    assert "Traceback" not in ended.err, ended
    assert all(word in ended.err for word in case.names), (case.names, ended)
    if case.harmless:
        assert (ended.code, end(case.words)) == (0, ENDS[case.words]), ended
    elif case.older:
        assert (ended.code, "using the previous checkpoint step-00000002" in ended.err) == (0, True), ended
    else:
        assert (ended.code, standing()) == (2, before), ended
    return ended


def undisturbed(words: tuple[str, ...]) -> End:
    """The end of a command that nothing happened to; the folder is as before."""
    here = Path.cwd()
    spare = here.with_name("untouched")
    shutil.copytree(here, spare)
    done(*words)
    found = end(words)
    restore(here, spare)
    shutil.rmtree(spare)
    return found


def restore(here: Path, spare: Path) -> None:
    """Make a folder what its copy is."""
    for place in here.iterdir():
        shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink()
    shutil.copytree(spare, here, dirs_exist_ok=True)


def standing() -> dict[str, bytes]:
    """Every file but hidden ones: notes on what was looked at."""
    return {name: data for name, data in files(Path.cwd()).items() if "/." not in f"/{name}"}


def cases() -> Iterator[Harm]:
    """All, by artifact."""
    yield from of_images()
    yield from of_latents()
    yield from of_texts()
    yield from of_pairs()
    yield from of_checkpoints()
    yield from of_records()


def of_images() -> Iterator[Harm]:
    """Images in each container, and what reads them."""
    repainted = {
        "photos": lambda: paint("photos", 1, 8),
        "tars": lambda: pack_tar("others", "tars"),
        "tables": lambda: pack_parquet("others", "tables"),
    }
    what = {"photos": "image files", "tars": "images in tar", "tables": "images in parquet"}
    for name, do in repainted.items():
        yield Harm(what[name], "content replaced at equal size", do, train(name), (name,))
        said = "content replaced at equal size and time"
        yield Harm(what[name], said, quietly(do, name), train(name), (name,))
    yield Harm(
        "image files", "two swapped", swapped("photos/a/00.bmp", "photos/a/02.bmp"), train("photos"), ("photos",)
    )
    move = swapped("photos/a/00.bmp", "photos/b/01.bmp")
    yield Harm("image files", "relabelled: two swapped between classes", move, train("photos"), ("photos",))
    yield Harm(
        "image files",
        "one renamed",
        lambda: one("photos/a/00.bmp").rename("photos/a/99.bmp"),
        train("photos"),
        ("photos",),
    )
    yield Harm("image files", "one gone", lambda: one("photos/a/00.bmp").unlink(), train("photos"), ("photos",))
    yield Harm(
        "image files", "copied elsewhere and back", quietly(lambda: None, "photos"), train("photos"), harmless=True
    )
    touch = lambda: [os.utime(file) for file in Path("photos").rglob("*.bmp")]  # noqa: E731
    yield Harm("image files", "touched", touch, train("photos"), harmless=True)
    yield Harm("images in tar", "archives swapped", swapped("tars/*0.tar", "tars/*1.tar"), train("tars"), ("tars",))
    tables = swapped("tables/*0.parquet", "tables/*1.parquet")
    yield Harm("images in parquet", "tables swapped", tables, train("tables"), ("tables",))


def of_latents() -> Iterator[Harm]:
    """A cache, and the images behind it."""
    shard, other = "latents/large/shard-00000.safetensors", "latents/large/shard-00001.safetensors"
    for how in (rolled, scaled, zeroed, halved):
        yield Harm("latents", how.__name__, tensors(shard, how), train("latents"), ("shard-00000",))
    yield Harm("latents", "relabelled", tensors(other, relabelled), train("latents"), ("shard-00001",))
    yield Harm("latents", "equal-sized shards swapped", swapped(shard, other), train("latents"), ("shard-0000",))
    strange = "latents/strange/shard-00000.safetensors"
    yield Harm("latents", "a shard of other images", taken(shard, strange), train("latents"), ("shard-00000",))
    yield Harm("latents", "a cache of other images", taken("latents/large", "latents/strange"), train("latents"), ("",))
    encode_again = ("encode", "large", "--out", "latents/large", "--codec", "taef2", "--side", "32", *CODEC)
    repaint = lambda: paint("large", 1, 32)  # noqa: E731
    for words in (encode_again, train("latents"), evaluate("latents")):
        yield Harm("latents", "their images replaced at equal size", repaint, words, ("large",))

    def half() -> None:
        shutil.rmtree("latents/large")
        encode_images("large", rank=0, world=2)
        paint("large", 1, 32)

    yield Harm("latents", "half made of other images", half, encode_again, ("large",))
    yield Harm(
        "latents", "another autoencoder's", tensors("taef2.safetensors", scaled), train("latents"), harmless=True
    )
    yield Harm("latents", "another autoencoder's", tensors("taef2.safetensors", scaled), sample("latents"), ("taef2",))


def of_texts() -> Iterator[Harm]:
    """A cache of encoded texts, and the encoder behind it."""
    shard = "texts/*/*/shard-00000.safetensors"
    prompt = ("sample", "runs/words", "--nfe", "1,2", "--prompt", "seven")  # a caption of the data
    for how in (rolled, scaled, zeroed, halved):
        harm = tensors(shard, how)
        yield Harm(
            "cache of texts", how.__name__, harm, train("words"), ("shard-00000", "encoded again"), harmless=True
        )
        yield Harm("cache of texts", how.__name__, harm, prompt, ("shard-00000",))
    gone = lambda: shutil.rmtree("texts")  # noqa: E731
    yield Harm("cache of texts", "gone", gone, train("words"), harmless=True)
    yield Harm("cache of texts", "gone", gone, prompt, harmless=True)
    texts = "texts/*/*/texts.jsonl"
    back = lines(texts, lambda rows: rows[::-1])
    yield Harm("cache of texts", "texts in another order", back, train("words"), ("texts.jsonl",))
    encoder = tensors("t5/model.safetensors", scaled)
    yield Harm("text encoder", "another in its place", encoder, train("words"), harmless=True)
    new_prompt = ("sample", "runs/words", "--nfe", "1,2", "--prompt", "a seven, please")
    yield Harm("text encoder", "another in its place", encoder, new_prompt, ("t5",))


def of_pairs() -> Iterator[Harm]:
    """A teacher's pairs, and the teacher."""
    shard = "runs/paired/pairs/shard-00000.safetensors"
    for how in (rolled, scaled, zeroed, relabelled, halved):
        yield Harm("pairs", how.__name__, tensors(shard, how), train("paired"), ("shard-00000",))

    def lacks() -> None:
        found = tensor_files.load(place := one(shard))
        safetensors.torch.save_file({name: x for name, x in found.items() if name != "c"}, place)

    yield Harm("pairs", "without their classes", lacks, train("paired"), ("shard-00000",))
    mixed = taken(shard, "runs/repaired/pairs/shard-00000.safetensors")
    yield Harm("pairs", "a shard of another teacher's", mixed, train("paired"), ("shard-00000",))
    whole = taken("runs/paired/pairs", "runs/repaired/pairs")
    yield Harm("pairs", "another teacher's", whole, train("paired"), ("pairs",))
    teacher = taken("runs/digits", "runs/teacher")
    yield Harm("teacher", "another run in its place", teacher, train("paired"), ("teacher",))


def of_checkpoints() -> Iterator[Harm]:
    """Weights, averages, moments and the notes on them."""
    last = "runs/digits/checkpoints/step-00000004"
    for part in ("net", "ema-0.999", "optimizer"):
        for how in (rolled, scaled, zeroed):
            harm = tensors(f"{last}/{part}/00000.safetensors", how)
            yield Harm(f"checkpoint: {part}", how.__name__, harm, train("digits"), (part,), harmless=True)
    shown = tensors(f"{last}/ema-0.999/00000.safetensors", scaled)
    yield Harm(
        "checkpoint: ema-0.999",
        "scaled",
        shown,
        ("evaluate", "runs/digits", "--nfe", "1"),
        ("ema-0.999", "previous checkpoint"),
        older=True,
    )
    swap = swapped(f"{last}/net/00000.safetensors", f"{last}/ema-0.999/00000.safetensors")
    yield Harm("checkpoint", "net and average swapped", swap, train("digits"), ("safetensors",), harmless=True)
    alien = taken(last, "runs/teacher/checkpoints/step-00000004")
    for words in (train("digits"), sample("digits"), evaluate("digits"), ("export", "runs/digits", "--out", "out")):
        yield Harm("checkpoint", "another run's", alien, words, ("train.seed",))
    steps = swapped(last, "runs/digits/checkpoints/step-00000002")
    yield Harm("checkpoint", "two steps swapped", steps, train("digits"), ("step-0000000",))
    later = edited(f"{last}/state.json", lambda state: state["facts"].update(step=3))
    yield Harm("checkpoint: state.json", "another step", later, train("digits"), ("state.json",), harmless=True)
    seen = edited(f"{last}/state.json", lambda state: state["facts"].update(images=1))
    yield Harm("checkpoint: state.json", "other counts", seen, train("digits"), ("state.json",), harmless=True)

    milestone = "runs/digits/milestones/step-00000002.safetensors"
    shown = ("sample", "runs/digits", "--nfe", "1,2", "--weights", milestone)
    for how in (rolled, scaled, zeroed):
        yield Harm("milestone", how.__name__, tensors(milestone, how), shown, (milestone,))
    alien = taken(milestone, "runs/teacher/milestones/step-00000002.safetensors")
    yield Harm("milestone", "another run's", alien, shown, (milestone,))
    grid = ("sample", "runs/digits", "--checkpoints", "all", "--nfe", "1", "--count", "2")
    later = taken(milestone, "runs/digits/milestones/step-00000004.safetensors")
    yield Harm("milestone", "another step's", later, grid, (milestone, "its step is 4"))


def of_records() -> Iterator[Harm]:
    """What a run wrote down: run.yaml, the log, the data's facts."""
    spec = "runs/digits/run.yaml"

    other = lines(spec, lambda rows: [re.sub(r"time_scale: .*", "time_scale: 7.0", row) for row in rows])
    for words in (train("digits"), sample("digits"), evaluate("digits"), ("export", "runs/digits", "--out", "out")):
        yield Harm("run.yaml", "another net.time_scale", other, words, ("net.time_scale",))
    yield Harm("run.yaml", "another run's", taken(spec, "runs/photos/run.yaml"), sample("digits"), ("data",))
    log = "runs/digits/metrics.jsonl"
    yield Harm(
        "log", "rows permuted", lines(log, lambda rows: rows[::-1]), train("digits"), ("metrics",), harmless=True
    )
    alien = taken(log, "runs/teacher/metrics.jsonl")
    yield Harm("log", "another run's", alien, train("digits"), ("metrics",), harmless=True)
    sd = lines("runs/photos/run.yaml", lambda rows: [re.sub(r" sd: .*", " sd: 7.0", row) for row in rows])
    yield Harm("run.yaml", "another deviation of the data", sd, train("photos"), harmless=True)
