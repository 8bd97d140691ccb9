"""Whether a change of the code keeps every packaged recipe equal to the bit.

    python tools/bits.py OLD/src > old.json
    python tools/bits.py NEW/src [NAME ...] > new.json
    python tools/bits.py --compare old.json new.json

Each recipe, made small as bits.toml says, trains by the command line and makes samples by the Python door. Recorded are
hashes of weights, averages and samples, and of all that was logged, step by step. Names of parameters and of files do
not count, those of logged columns may change (`RENAMED`). Bits are those of one kind of CPU and one version of torch,
so record both trees on the same. Data are $DUMO_DATA/cifar10 and taef2. bits.json is the record of commit 9ebbef4.
"""

import argparse
import json
import os
import platform
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir
from fnmatch import fnmatchcase
from hashlib import sha256
from importlib import import_module
from itertools import zip_longest
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

TOGETHER, SAMPLES = 2, 4  # recipes at a time; of a recipe
NONE = {"error": "not recorded"}
NO_FIELDS = ("after", "encode")  # keys of the table that are no fields of a recipe
WEIGHTS, NEITHER = "net*.safetensors", ("optimizer*.safetensors", "data.safetensors")  # all others are averages
# Columns of metrics.jsonl that have another name now, by recipe and old name.
U = {f"{part}.m": f"{part}.u" for part in ("parts", "bins")}
RENAMED: dict[str, dict[str, str]] = {
    "digits-likelihood": U | {f"{part}.clipped_share_m": f"{part}.clipped_share_u" for part in ("notes", "bins")},
    "dumo-best": U | {f"{part}.clipped_share_m": f"{part}.clipped_share" for part in ("notes", "bins")},
}
FIRST = ("dumo.cli.api", "dumo.cli", "torch._dynamo", "scipy.stats")  # imported once, before processes are forked
OF_OTHERS = ("peft", "diffusers.models.transformers.transformer_flux", "diffusers.models.autoencoders", "transformers")

Fields = dict[str, Any]  # of a recipe, by dotted names
Record = dict[str, Any]  # what JSON holds


def flat(tree: Mapping[str, Any], before: str = "") -> Fields:
    """A tree as dotted names and values that are no mappings."""
    found: Fields = {}
    for key, value in tree.items():
        found |= flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return found


def shrink(table: Mapping[str, Any], name: str) -> Fields:
    """What the table says of a recipe."""
    fields: Fields = {}
    for patterns, section in table.items():
        fields |= flat(section) if any(fnmatchcase(name, one) for one in patterns.split()) else {}
    return {key: value.replace("{name}", name) if isinstance(value, str) else value for key, value in fields.items()}


def digest(*tensors: "Tensor") -> str:
    """A hash of tensors' types, shapes and bytes, whatever their order."""
    from torch import uint8

    told = [(f"{x.dtype} {tuple(x.shape)} ", x.contiguous().reshape(-1).view(uint8).numpy().tobytes()) for x in tensors]
    each = sorted(sha256(kind.encode() + content).hexdigest() for kind, content in told)
    return sha256(" ".join(each).encode()).hexdigest()


def logged(file: Path) -> dict[str, str]:
    """Every column of metrics.jsonl, a short hash for each row."""
    rows = [flat(json.loads(line)) for line in file.read_text().splitlines()]
    names = {name: None for row in rows for name in row}
    return {name: " ".join(sha256(repr(row.get(name)).encode()).hexdigest()[:6] for row in rows) for name in names}


def command(*words: str) -> None:
    """`dumo WORDS`, as the command line runs it. Raises RuntimeError where it ends badly."""
    from dumo.cli import main

    sys.argv = ["dumo", *words]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"dumo {words[0]} ended with {end.code}") from None


def record(name: str, fields: Fields) -> Record:
    """Train a recipe in this folder and sample it."""
    from safetensors.torch import load_file

    import dumo

    run, told = Path("runs") / name, {key: value for key, value in fields.items() if key not in NO_FIELDS}
    sets = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in told.items()]
    words = [*(word for one in sets for word in ("--set", one)), "--device", "cpu"]
    if fields.get("encode"):
        command("encode", name, *words)
    command("train", name, "--out", str(run), *words)
    files = [file for file in (run / "checkpoints").rglob("*.safetensors") if not any(map(file.match, NEITHER))]
    found = {file: digest(*load_file(file).values()) for file in files}
    opened = dumo.load(run, device="cpu")
    return {
        "set": sets,
        "weights": sorted(made for file, made in found.items() if file.match(WEIGHTS)),
        "averages": sorted(made for file, made in found.items() if not file.match(WEIGHTS)),
        "samples": {str(nfe): digest(opened.sample(n=SAMPLES, nfe=nfe)) for nfe in fields["sample.nfe"]},
        "log": logged(run / "metrics.jsonl"),
    }


def pictures(folder: str, width: int, height: int) -> None:
    """Pictures of nothing, three in each of ten classes, with captions beside them."""
    from PIL import Image

    for i in range(30):
        file = Path(folder, f"class-{i % 10}", f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        small = Image.frombytes("RGB", (8, 8), b"".join(sha256(bytes([i, k])).digest() for k in range(6)))
        small.resize((width, height), Image.Resampling.BICUBIC).save(file)
        file.with_suffix(".txt").write_text(f"picture {i} of kind {i % 10}")


def build(name: str, given: Fields) -> Record:
    """Save a model of others with random weights in models/."""
    import torch

    package, kind = given.pop("class").split(".")
    given.pop("like", None)
    folder = Path("models") / given.pop("place", name)
    made = getattr(import_module(package), kind)
    torch.manual_seed(0)
    model = made(made.config_class(**given)) if package == "transformers" else made(**given)
    for p in model.parameters():  # none are zero, or nothing would pass
        p.data = p.data + torch.randn(p.shape) / (10 if p.ndim == 1 else p[0].numel() ** 0.5)
    model.save_pretrained(folder)
    if package == "transformers":  # its tokenizer reads bytes, and needs no file of others
        import_module(package).ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return {}


def child(work: Callable[[str, Fields], Record], name: str, fields: Fields) -> None:
    """What a process does: it writes NAME.json, and what was said to NAME.txt."""
    with open(f"{name}.txt", "w") as said:
        for number in (1, 2):
            os.dup2(said.fileno(), number)
        try:
            found = work(name, fields)
        except BaseException as error:
            sys.stderr.flush()
            lines = [line for line in Path(said.name).read_text().splitlines() if line.startswith("error: ")]
            found = {"error": " ".join([f"{type(error).__name__}: {error}", *lines])}
        Path(f"{name}.json").write_text(json.dumps(found))


def together(work: Callable[[str, Fields], Record], asked: Mapping[str, Fields]) -> dict[str, Record]:
    """What comes of each name's work, done in a process of its own that is forked from this one."""
    waiting, running, records = [*asked.items()], dict[str, Any](), dict[str, Record]()
    while waiting or running:
        while waiting and len(running) < TOGETHER:
            name, fields = waiting.pop(0)
            running[name] = get_context("fork").Process(target=child, args=(work, name, fields))
            running[name].start()
        wait([process.sentinel for process in running.values()])
        for name in [name for name, process in running.items() if process.exitcode is not None]:
            made, code = Path(f"{name}.json"), running.pop(name).exitcode
            records[name] = json.loads(made.read_text()) if made.is_file() else {"error": f"ended with {code}"}
            print(f"{name} {records[name].get('error', '')}".rstrip(), file=sys.stderr)
    return records


def processor() -> str:
    """The name of this machine's CPU."""
    told = Path("/proc/cpuinfo")
    found = re.findall(r"model name\s*: (.*)", told.read_text()) if told.is_file() else []
    return found[0] if found else platform.processor()


def record_all(source: Path, patterns: Sequence[str]) -> Record:
    """The records of the recipes that are asked for, and what machine they are of."""
    sys.path.insert(0, str(source.resolve()))
    import torch

    from dumo.config import recipes

    torch.set_num_threads(1)
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    names = [name for name in recipes.names() if any(fnmatchcase(name, one) for one in patterns or "*")]
    if lost := [one for one in patterns if not any(fnmatchcase(name, one) for name in names)]:
        sys.exit(f"there is no recipe {', '.join(lost)}")
    asked = {name: shrink(table, name) for name in names}
    first = {name: shrink(table, name) for fields in asked.values() if (name := fields.get("after"))}
    named = {value for fields in asked.values() for value in fields.values() if isinstance(value, str)}
    models: dict[str, Fields] = table["models"]
    needed = {
        name: given for name, given in models.items() if f"models/{given.get('place', name).split('/')[0]}" in named
    }
    needed = {name: models[given["like"]] | given if "like" in given else given for name, given in needed.items()}
    for module in FIRST + (OF_OTHERS if needed else ()):
        import_module(module)
    with TemporaryDirectory() as scratch, chdir(scratch):
        pictures("pictures", 160, 136)
        pictures("pictures-32", 32, 32)
        together(build, needed)
        records = together(record, first)
        records |= together(record, {name: asked[name] for name in names if name not in first})
    on = f"torch {torch.__version__}, {processor()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"on": on, "asked": list(patterns), "recipes": {name: records[name] for name in names}}


def differences(old: Record, new: Record, renamed: dict[str, str]) -> list[str]:
    """The parts in which two records of a recipe differ."""
    if errors := [f"{which}: {one['error']}" for which, one in (("old", old), ("new", new)) if "error" in one]:
        return errors
    parts = [part for part in ("weights", "averages", "samples") if old[part] != new[part]]
    before = {renamed.get(name, name): rows.split() for name, rows in old["log"].items()}
    after = {name: rows.split() for name, rows in new["log"].items()}
    for name in before | after:
        a, b = before.get(name, []), after.get(name, [])
        rows = [i + 1 for i, (x, y) in enumerate(zip_longest(a, b)) if x != y]
        parts += [f"log {name} ({f'from row {rows[0]}' if a and b else 'gone' if a else 'new'})"] if rows else []
    return [*parts, "and in what was set"] if parts and old["set"] != new["set"] else parts


def compare(old: Record, new: Record) -> int:
    """Print a line for every recipe that differs; return how many do."""
    if old["on"] != new["on"]:
        print(f"bits may differ for this alone: {old['on']}; {new['on']}", file=sys.stderr)
    a, b = old["recipes"], new["recipes"]
    names = b if new["asked"] else sorted(a | b)
    found = {name: differences(a.get(name, NONE), b.get(name, NONE), RENAMED.get(name, {})) for name in names}
    found = {name: parts for name, parts in found.items() if parts}
    for name, parts in found.items():
        print(f"{name}: {', '.join(parts)}")
    print(f"{len(names) - len(found)} of {len(names)} recipes are equal", file=sys.stderr)
    return len(found)


def main() -> int:
    """Record, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, help="the folder in which a tree's dumo lies, such as src")
    parser.add_argument("names", nargs="*", help="recipes, or patterns of their names; all, if none are given")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two records")
    asked = parser.parse_args()
    if asked.compare:
        return min(compare(*(json.loads(file.read_text()) for file in asked.compare)), 1)
    if not asked.source or not (asked.source / "dumo").is_dir():
        parser.error("name the folder in which a tree's dumo lies, or --compare two records")
    print(json.dumps(record_all(asked.source, asked.names), indent=1))
    return 0


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}  # threads round otherwise
    sys.exit(main())
