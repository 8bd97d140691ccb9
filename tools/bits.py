"""Whether a change of the code keeps every packaged recipe equal to the bit.

    python tools/bits.py OLD/src > old.json
    python tools/bits.py NEW/src [NAME ...] > new.json
    python tools/bits.py --compare old.json new.json

The order of events of a recording (`record_all`):

1. One tree's folder src goes first on Python's path, and that tree's dumo is imported once.
2. In a scratch folder, pictures are written, and models of other libraries with random weights.
3. A process is forked for each recipe. There `record_recipe` trains the recipe by the command line, made small as
   bits.toml says, and makes samples by the Python API. Recipes that others begin with or learn from come first.
   Some recipes are recorded in other ways, too, such as digits@ranks: resumed from a checkpoint, in micro-batches, on
   two ranks, and with validation, sample sheets and milestones.
4. The records are printed as JSON. A record has hashes of weights, averages, the optimizer's moments and samples, and
   of all that was logged, step by step.

`compare` prints where two records differ. Names of parameters and of files do not count.

Bits are those of one kind of CPU and one version of torch, so record both trees on the same. Data are
$DUMO_DATA/cifar10. bits.json is the record of commit 45264c40, equal to that of 0a489642 but for columns of the log
that left; the recipes of LoRAs are of the commit since which biases of their layers stay fixed.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
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

MAX_PROCESSES = 2  # at a time: ours
NUM_SAMPLES = 4  # of a recipe: ours
NOT_FIELDS = ("after", "resume_from", "ranks")  # keys of the table that are no fields of a recipe
# Imported once, before processes are forked; the second where recipes need models of other libraries.
MODULES = ("dumo.cli.api", "dumo.cli", "torch._dynamo", "scipy.stats")
MODEL_MODULES = (
    "peft",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.models.autoencoders",
    "transformers",
)

Fields = dict[str, Any]  # of a recipe by dotted names, or of a model's config by names
Record = dict[str, Any]  # as JSON holds it: of a recipe, or of a tree with all its recipes
Work = Callable[[str, Fields], Record]  # what a forked process does with a name and its fields
NOT_RECORDED: Record = {"error": "not recorded"}


# ------------------------------------------------------------------------------------------------------------ the table


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Fields:
    """The leaves of a tree, by dotted names."""
    fields: Fields = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            fields |= _flatten(value, f"{prefix}{key}.")
        else:
            fields[f"{prefix}{key}"] = value
    return fields


def _recipe_fields(table: Mapping[str, Any], name: str) -> Fields:
    """The fields of RECIPE or RECIPE@WAY in bits.toml, `table`: those of all sections that have a pattern of its name.

    Later sections come over earlier ones.
    """
    recipe = name.partition("@")[0]
    fields: Fields = {}
    for patterns, section in table.items():
        if any(fnmatchcase(name, pattern) or fnmatchcase(recipe, pattern) for pattern in patterns.split()):
            fields |= _flatten(section)
    for key, value in fields.items():
        if isinstance(value, str):
            fields[key] = value.replace("{name}", name)
    return fields


def _needed_models(table: Mapping[str, Any], recipes: Mapping[str, Fields]) -> dict[str, Fields]:
    """The models of the table that these recipes read, by name."""
    texts = {value for fields in recipes.values() for value in fields.values() if isinstance(value, str)}
    models: dict[str, Fields] = table["models"]
    needed: dict[str, Fields] = {}
    for name, model in models.items():
        folder = model.get("place", name).split("/")[0]
        if f"models/{folder}" in texts:
            needed[name] = models[model["like"]] | model if "like" in model else model
    return needed


# ----------------------------------------------------------------------------------------------- what is done in a fork


def _tensors_hash(*tensors: "Tensor") -> str:
    """A hash of tensors' types, shapes and bytes, whatever their order."""
    from torch import uint8

    hashes: list[str] = []
    for x in tensors:
        header = f"{x.dtype} {tuple(x.shape)} ".encode()
        content = x.contiguous().reshape(-1).view(uint8).numpy().tobytes()
        hashes.append(sha256(header + content).hexdigest())
    return sha256(" ".join(sorted(hashes)).encode()).hexdigest()


def _log_hashes(file: Path) -> dict[str, str]:
    """Every column of metrics.jsonl: a short hash for each row, with spaces between."""
    rows = [_flatten(json.loads(line)) for line in file.read_text().splitlines()]
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns: dict[str, str] = {}
    for name in names:
        hashes = [sha256(repr(row.get(name)).encode()).hexdigest() for row in rows]
        columns[name] = " ".join(row_hash[:6] for row_hash in hashes)
    return columns


def _run_dumo(*words: str) -> None:
    """`dumo WORDS`, as the command line runs it. Raises RuntimeError where it ends badly."""
    from dumo.cli import main

    sys.argv = ["dumo", *words]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"dumo {words[0]} ended with {end.code}") from None


def _run_dumo_on_ranks(ranks: int, *words: str) -> None:
    """`torchrun ... -m dumo WORDS`, by the tree that is recorded. Raises CalledProcessError where it ends badly."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    subprocess.run([*command, "-m", "dumo", *words], check=True, env=os.environ | {"PYTHONPATH": sys.path[0]})


def record_recipe(name: str, fields: Fields) -> Record:
    """Train a recipe in this folder and sample it; return its record. `name`: RECIPE, or RECIPE@WAY."""
    from safetensors.torch import load_file

    import dumo

    # train
    run = Path("runs") / name
    recipe = name.partition("@")[0]
    settings: list[str] = []
    for key, value in fields.items():
        if key not in NOT_FIELDS:
            text = value if isinstance(value, str) else json.dumps(value)
            settings.append(f"{key}={text}")
    options = [*settings, "--device", "cpu"]
    training = ["train", recipe, "--out", str(run), *options]
    if "ranks" in fields:
        _run_dumo_on_ranks(fields["ranks"], *training)
    else:
        _run_dumo(*training)
    if "resume_from" in fields:
        # Lose what follows this step, as a kill does, and type the same command again.
        for checkpoint in (run / "checkpoints").iterdir():
            if checkpoint.name > f"step-{fields['resume_from']:08d}":
                shutil.rmtree(checkpoint)
        _run_dumo(*training)

    # hash
    weights: list[str] = []
    averages: list[str] = []
    moments: list[str] = []
    for file in (run / "checkpoints").rglob("*.safetensors"):
        # A checkpoint has a folder for each part, and those of averages have other names.
        hashes = averages
        if file.parent.name == "net":
            hashes = weights
        elif file.parent.name == "optimizer":
            hashes = moments
        hashes.append(_tensors_hash(*load_file(file).values()))
    trained = dumo.load(run, device="cpu")
    samples: dict[str, str] = {}
    for nfe in fields["sample.nfe"]:
        samples[str(nfe)] = _tensors_hash(trained.sample(count=NUM_SAMPLES, nfe=nfe))
    return {
        "set": settings,
        "weights": sorted(weights),
        "averages": sorted(averages),
        "moments": sorted(moments),
        "samples": samples,
        "log": _log_hashes(run / "metrics.jsonl"),
    }


def _build_model(name: str, fields: Fields) -> Record:
    """Save a model of another library, with random weights, in models/; return an empty record.

    fields: the model's "class", its "place" in models/ if that is not its name, and the arguments of its config.
    """
    import torch

    config = {key: value for key, value in fields.items() if key not in ("class", "like", "place")}
    package, class_name = fields["class"].split(".")
    folder = Path("models") / fields.get("place", name)
    model_class = getattr(import_module(package), class_name)
    is_transformers = package == "transformers"
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**config)) if is_transformers else model_class(**config)
    if isinstance(model, torch.nn.Module):  # a scheduler has no parameters
        # no parameter stays zero, or nothing would pass through it
        for p in model.parameters():
            p.data = p.data + torch.randn(p.shape) / (10 if p.ndim == 1 else p[0].numel() ** 0.5)
    model.save_pretrained(folder)
    if is_transformers:  # its tokenizer reads bytes, and needs no file of others
        import_module(package).ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return {}


def _write_pictures(folder: str, width: int, height: int) -> None:
    """Write 30 random pictures, three in each of ten classes, and a caption next to each."""
    from PIL import Image

    for i in range(30):
        file = Path(folder, f"class-{i % 10}", f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = b"".join(sha256(bytes([i, k])).digest() for k in range(6))  # 6 x 32 bytes: 8 x 8 pixels of 3
        small = Image.frombytes("RGB", (8, 8), pixels)
        small.resize((width, height), Image.Resampling.BICUBIC).save(file)
        file.with_suffix(".txt").write_text(f"picture {i} of kind {i % 10}")


# ------------------------------------------------------------------------------------------------------------ the forks


def _run_child(work: Work, name: str, fields: Fields) -> None:
    """Do the work of a forked process: its record goes to NAME.json, and what it prints to NAME.txt."""
    with open(f"{name}.txt", "w") as printed:
        for stream in (1, 2):  # stdout and stderr
            os.dup2(printed.fileno(), stream)
        try:
            result = work(name, fields)
        except BaseException as error:
            sys.stderr.flush()
            lines = [line for line in Path(printed.name).read_text().splitlines() if line.startswith("error: ")]
            result = {"error": " ".join([f"{type(error).__name__}: {error}", *lines])}
        Path(f"{name}.json").write_text(json.dumps(result))


def _run_forked(work: Work, fields_by_name: Mapping[str, Fields]) -> dict[str, Record]:
    """Do the work for each name in a fork of this process, MAX_PROCESSES at a time; return the records by name."""
    waiting = [*fields_by_name.items()]
    running: dict[str, Any] = {}
    records: dict[str, Record] = {}
    while waiting or running:
        while waiting and len(running) < MAX_PROCESSES:
            name, fields = waiting.pop(0)
            running[name] = get_context("fork").Process(target=_run_child, args=(work, name, fields))
            running[name].start()
        wait([process.sentinel for process in running.values()])
        for name, process in [*running.items()]:
            if process.exitcode is None:
                continue
            del running[name]
            file = Path(f"{name}.json")
            records[name] = {"error": f"ended with {process.exitcode}"}
            if file.is_file():
                records[name] = json.loads(file.read_text())
            print(f"{name} {records[name].get('error', '')}".rstrip(), file=sys.stderr)
    return records


def _processor_name() -> str:
    """The name of this machine's CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    return names[0] if names else platform.processor()


def _names_to_record(ways: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The packaged recipes, and `ways` (RECIPE@WAY), with one of these patterns, or all.

    Ends the program for a pattern that nothing has.
    """
    from dumo.config import recipe_files

    names = [*recipe_files.names(), *ways]
    if not patterns:
        return names
    unknown = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if unknown:
        sys.exit(f"there is no recipe {', '.join(unknown)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def record_all(source: Path, patterns: Sequence[str]) -> Record:
    """Record the recipes with one of these patterns, or all, by the dumo in the folder `source`.

    Returns a dict of "on", the machine; "asked", the patterns; and "recipes", a record by recipe.
    """
    sys.path.insert(0, str(source.resolve()))
    import torch

    torch.set_num_threads(1)
    # what to record, and what that needs
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    names = _names_to_record(table["ways"], patterns)
    recipes = {name: _recipe_fields(table, name) for name in names}
    first_recipes: dict[str, Fields] = {}  # those that others begin with or learn from
    for fields in recipes.values():
        first = fields.get("after")
        if first:
            first_recipes[first] = _recipe_fields(table, first)
    models = _needed_models(table, recipes)
    modules = [*MODULES, *MODEL_MODULES] if models else MODULES
    for module in modules:
        import_module(module)

    # record, in forks of this process
    other_recipes = {name: recipes[name] for name in names if name not in first_recipes}
    with TemporaryDirectory() as scratch, chdir(scratch):
        _write_pictures("pictures", 160, 136)
        _write_pictures("pictures-32", 32, 32)
        _run_forked(_build_model, models)
        records = _run_forked(record_recipe, first_recipes)
        records |= _run_forked(record_recipe, other_recipes)
    machine = f"torch {torch.__version__}, {_processor_name()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"on": machine, "asked": list(patterns), "recipes": {name: records[name] for name in names}}


# ------------------------------------------------------------------------------------------------------- the comparison


def _differences(old: Record, new: Record) -> list[str]:
    """The parts in which two records of a recipe differ."""
    errors: list[str] = []
    if "error" in old:
        errors.append(f"old: {old['error']}")
    if "error" in new:
        errors.append(f"new: {new['error']}")
    if errors:
        return errors

    parts = [part for part in ("weights", "averages", "moments", "samples") if old[part] != new[part]]
    old_log = {name: hashes.split() for name, hashes in old["log"].items()}
    new_log = {name: hashes.split() for name, hashes in new["log"].items()}
    for name in old_log | new_log:  # columns
        if name not in new_log:
            parts.append(f"log {name} (gone)")
        elif name not in old_log:
            parts.append(f"log {name} (new)")
        else:
            pairs = zip_longest(old_log[name], new_log[name])
            different_rows = [number for number, (a, b) in enumerate(pairs, 1) if a != b]
            if different_rows:
                parts.append(f"log {name} (from row {different_rows[0]})")
    if parts and old["set"] != new["set"]:
        parts.append("and in what was set")
    return parts


def compare(old: Record, new: Record) -> int:
    """Print a line for every recipe that differs; return how many do."""
    if old["on"] != new["on"]:
        print(f"bits may differ for this alone: {old['on']}; {new['on']}", file=sys.stderr)
    old_records = old["recipes"]
    new_records = new["recipes"]
    names = new_records if new["asked"] else sorted(old_records | new_records)
    num_different = 0
    for name in names:
        old_record = old_records.get(name, NOT_RECORDED)
        new_record = new_records.get(name, NOT_RECORDED)
        parts = _differences(old_record, new_record)
        if parts:
            num_different += 1
            print(f"{name}: {', '.join(parts)}")
    print(f"{len(names) - num_different} of {len(names)} recipes are equal", file=sys.stderr)
    return num_different


def main() -> int:
    """Record, or compare; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, help="the folder in which a tree's dumo lies, such as src")
    parser.add_argument("names", nargs="*", help="recipes, or patterns of their names; all, if none are given")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two records")
    options = parser.parse_args()
    if options.compare:
        old_file, new_file = options.compare
        num_different = compare(json.loads(old_file.read_text()), json.loads(new_file.read_text()))
        return 1 if num_different else 0
    if not options.source or not (options.source / "dumo").is_dir():
        parser.error("name the folder in which a tree's dumo lies, or --compare two records")
    print(json.dumps(record_all(options.source, options.names), indent=1))
    return 0


if __name__ == "__main__":
    # several threads round otherwise
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    sys.exit(main())
