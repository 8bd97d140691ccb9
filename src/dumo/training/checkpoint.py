"""Checkpoints: what a run needs to go on, bit for bit, in safetensors and JSON only, on any number of ranks.

    checkpoints/step-00001000/   net.safetensors  ema-<decay>.safetensors ...  optimizer.safetensors  spec.yaml
                                 state.json; where it is trained on files, data.safetensors
    milestones/step-00000200.safetensors

So one process writes it. Several ranks write folders of shards instead of files: net/, ema-<decay>/ ..., optimizer/
(`dumo.io.shards`). A milestone is one file, the weights that are shown after a step, and is never removed. Frozen
weights are in neither: `state.json` has their digest (`dumo.training.frozen`). `spec.yaml` is the run that was trained
up to here, as text; a milestone's metadata have a hash of it.

Each is written to a hidden path, flushed to the disk, then renamed: so whatever is named `step-...` was once whole,
and `state.json` lists its files and their hashes (`dumo.training.manifest`).
"""

import json
from collections.abc import Callable, Generator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from dumo.io import digest, weights
from dumo.io import file as files
from dumo.runtime import dist, threads
from dumo.training import agreement, frozen, layout, manifest
from dumo.training.manifest import Checkpoint, Checkpoints, standing
from dumo.training.state import Diverged, State, blank, by_place, flatten
from dumo.types import UserError

FIT = "resume with the spec that wrote it"  # for weights of another net
DATA = "data.safetensors"  # of a checkpoint of a run on files: what was in them (`dumo.run.content`)
ONE_FILE = {"format": "pt"}  # one entry, as `facts`
ABOUT = "dumo"  # entry of the metadata of weights that are in no checkpoint: what they are, as JSON
SUM = "sum"  # in that entry: the checksum of the tensors
FACTS_SUM = "facts_sum"  # in that entry: the checksum of all else there; older files have none


Memory = MutableMapping[tuple[str, str], Tensor]  # in the host, by part and name


@dataclass(frozen=True)
class Notes:
    """What a checkpoint holds besides its state: the run as text (of the main rank), and what was in its data."""

    run: str = ""
    data: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])  # the same on all ranks
    log: manifest.Listed | None = None  # of the main rank
    threads: int | None = None  # of the next step on a CPU


@dataclass(frozen=True)
class Copy:
    """What a checkpoint holds, as it was at its step, in memory that no later step changes."""

    about: manifest.Manifest  # without its files
    notes: Notes
    size: int  # bytes of the checkpoint
    tensors: dict[str, dict[str, Tensor]]  # those that this rank writes, its parts of them, by part and name
    begin: dict[str, dict[str, tuple[int, ...]]]  # where they begin in the whole; empty of one process


def save(folder: Path, state: State, keep: int, notes: Notes = Notes()) -> Path:
    """Write the checkpoint of this step into `folder`, as `copy` and `put`; return its path."""
    return put(Checkpoints(folder), copy(state, notes, {}), keep)


def copy(state: State, notes: Notes, memory: Memory) -> Copy:
    """Copy what a checkpoint holds into `memory`, where it has that, or new memory, which it has then.

    All ranks together take one copy of it. Every rank must call it. Raises Diverged, on all ranks, if a number is not
    finite.
    """
    tensors = parts(state)
    if wrong := not_finite(tensors):
        raise Diverged(f"step {state.step}: {wrong} is not finite, so no checkpoint is written of it.")
    size = sum(tensor.nbytes for named in (*tensors.values(), notes.data) for tensor in named.values())
    about = manifest.Manifest(
        step=state.step,
        images=state.images,
        skips=state.skips,
        trend=state.trend,
        gradients=state.gradients,
        ranks=dist.world(),
        versions=dist.versions(),
        frozen=state.frozen,
        threads=notes.threads,
        cores=None if notes.threads is None else threads.cores(),
        log=notes.log,
        files={},
    )
    notes = replace(notes, data={name: x.clone() for name, x in notes.data.items()})
    begin = dict[str, dict[str, tuple[int, ...]]]()
    if dist.world() > 1:
        from dumo.io import shards  # slow to import

        begin = {part: shards.mine(named) for part, named in tensors.items()}
    mine = {part: {name: named[name] for name in begin.get(part, named)} for part, named in tensors.items()}
    taken = agreement.own(
        lambda: {part: {n: take(x, memory, (part, n)) for n, x in named.items()} for part, named in mine.items()}
    )
    return Copy(about, notes, size, taken, begin)


def take(x: Tensor, memory: Memory, key: tuple[str, str]) -> Tensor:
    """This rank's part of a tensor, copied. Memory that is there already is filled many times as fast as new memory."""
    here, there = layout.local(x.detach()), memory.get(key)
    if there is None or (there.shape, there.dtype) != (here.shape, here.dtype):
        there = memory[key] = torch.empty(here.shape, dtype=here.dtype)
    return there.copy_(here)


def put(checkpoints: Checkpoints, copy: Copy, keep: int) -> Path:
    """Write a checkpoint, then drop old ones (`Checkpoints.drop`); return its path.

    A checkpoint of the step is left alone, or replaced if it is damaged. Every rank must call it. Raises UserError, on
    all ranks, if the disk is full; older checkpoints then stay.
    """
    step = copy.about.step
    target = checkpoints.folder / manifest.folder_of(step)
    if not agreement.main(target.exists) or checkpoints.at(target).fault(together=True):
        with made(target, "checkpoint", step, copy.size) as temp:
            write(temp, copy)
        checkpoints.wrote(target)
    agreement.main(lambda: checkpoints.drop(step, keep))
    return target


def mark(folder: Path, state: State, run: str = "") -> Path:
    """Write the weights that are shown, the first average or the net's, as this step's milestone, as `lone`."""
    return lone(folder, state, state.shown, "milestone", run)


def lone(folder: Path, state: State, module: nn.Module, kind: str, run: str = "", **facts: object) -> Path:
    """Write the trained weights of the net, or of its average `module`, as one file of this step; return its path.

    The file says, under a checksum, its kind, its step, the identity of its run, `run`, and `facts`. Replaces an older
    one. Every rank must call it. Raises UserError on all ranks if the disk is full; the older file then stays.
    """
    target = folder / f"step-{state.step:08d}.safetensors"
    named = frozen.trained(state.net, module)
    with made(target, kind, state.step, sum(tensor.nbytes for tensor in named.values())) as temp:
        whole = weights.apart(gathered(named))
        agreement.main(lambda: keep_alone(temp, whole, kind=kind, step=state.step, run=run, **facts))
    return target


def milestones(folder: Path) -> dict[int, Path]:
    """The milestones in `folder` by step, in order."""
    return standing(folder, ".safetensors")


def part(checkpoint: Path, name: str) -> Path:
    """The path of a part of a checkpoint (net, ema-0.999, optimizer): a folder of shards, or a file."""
    folder = checkpoint / name
    return folder if folder.is_dir() else checkpoint / f"{name}.safetensors"


def go_on(checkpoints: Checkpoints, checkpoint: Checkpoint, state: State, *, or_before: bool = True) -> Checkpoint:
    """Restore a checkpoint, or, if a number of it is not finite, the last good one before it; return it.

    Every rank must call it. Raises UserError as `restore`, as `Checkpoints.latest` if none is left, and, without
    `or_before`, if a number is not finite.
    """
    while True:
        restore(checkpoint, state)
        problem = not_finite(parts(state))
        if problem is None:
            return checkpoint
        if not or_before:
            raise UserError(f"{checkpoint.path}: {problem} is not finite: go on from another step")
        checkpoint.not_finite = f"{checkpoint.path}: {problem} is not finite"
        checkpoint = checkpoints.latest(together=True) or checkpoint  # it raises if there is none


def restore(checkpoint: Checkpoint, state: State) -> None:
    """Load a checkpoint into a state built from the same spec, on any number of ranks.

    Changes nothing unless all of it fits. Every rank must call it. Raises UserError naming the file and the first
    tensor that is missing, unknown, or of another shape or dtype; or if the frozen weights differ.
    """
    tensors = weights_of(state)
    optimizer: dict[str, Tensor] = {}

    def require_fit() -> manifest.Manifest:
        for name, wanted in tensors.items():
            place = part(checkpoint.path, name)
            weights.compare(place, weights.outline(place), wanted, "the run", FIT)
        optimizer.update(blank(part(checkpoint.path, "optimizer"), state, FIT))
        frozen.require(state.frozen, checkpoint.manifest.frozen, checkpoint.path)
        return checkpoint.manifest

    def fill() -> None:
        for name, into in {**tensors, "optimizer": optimizer}.items():
            weights.fill(part(checkpoint.path, name), into)

    about, *_ = agreement.agreed(require_fit)
    agreement.agreed(fill)
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": by_place(optimizer, state)})
    state.step = about.step
    state.images = about.images
    state.skips = about.skips
    state.trend = about.trend
    state.gradients = about.gradients


def parts(state: State) -> dict[str, dict[str, Tensor]]:
    """All tensors of a checkpoint that this rank holds, by part and name."""
    net, *averages = weights_of(state).items()
    return dict([net, ("optimizer", flatten(state)), *averages])  # in this order: the first shards the net


def weights_of(state: State) -> dict[str, dict[str, Tensor]]:
    """The trained weights of the net and of its averages, by part and name."""
    averages = {f"ema-{key}": average.module for key, average in state.averages.items()}
    return {name: frozen.trained(state.net, module) for name, module in {"net": state.net, **averages}.items()}


def not_finite(tensors: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """The first tensor of a checkpoint with a number that is not finite; None if all are finite.

    Synchronizes each device once. Every rank must call it, and gets the same answer.
    """
    here: dict[torch.device, dict[str, Tensor]] = {}
    for part, named in tensors.items():
        for name, tensor in named.items():
            if (x := layout.local(tensor.detach())).is_floating_point() and x.numel():
                ends = torch.stack(torch.aminmax(x))  # NaN if one is; nine times as fast as isfinite
                here.setdefault(x.device, {})[f"{part}: {name}"] = ends.isfinite().all()
    good = {name: is_good for flags in here.values()
            for name, is_good in zip(flags, torch.stack([*flags.values()]).tolist(), strict=True)}  # fmt: skip
    answers = agreement.agreed(lambda: next((name for name, is_good in good.items() if not is_good), None))
    return next((answer for answer in answers if answer), None)


def write(folder: Path, copy: Copy) -> None:
    """Write each part as a file, or as a folder of shards, and `state.json` last. Every rank must call it."""
    agreement.main(folder.mkdir)
    agreement.main(lambda: note(folder, copy.notes))
    if dist.world() == 1:
        for name, named in copy.tensors.items():
            safetensors.torch.save_file(named, folder / f"{name}.safetensors", metadata=ONE_FILE)
        mine = sorted(folder.iterdir())
    else:
        from dumo.io import shards  # slow to import

        for name, named in copy.tensors.items():
            agreement.agreed(lambda name=name, named=named: shards.write(folder / name, named, copy.begin[name]))
        mine = sorted(folder.glob(f"*/{shards.names(dist.rank())}"))
        mine += filter(Path.is_file, folder.iterdir()) if dist.is_main() else ()
    lists = agreement.agreed(lambda: manifest.listed(folder, mine))
    listed = {name: file for list_of_rank in lists for name, file in list_of_rank.items()}
    agreement.main(lambda: manifest.write(folder, copy.about.model_copy(update={"files": listed})))


def note(folder: Path, notes: Notes) -> None:
    """Write what a checkpoint holds besides its state."""
    if notes.run:
        (folder / manifest.RUN).write_text(notes.run, encoding="utf-8")
    if notes.data:
        safetensors.torch.save_file(dict(notes.data), folder / DATA, metadata=ONE_FILE)


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole of each tensor on rank 0, nothing on others. Every rank must call it."""
    if dist.world() == 1:
        return dict(tensors)
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = layout.whole(tensor)
        if dist.is_main():
            out[name] = whole.cpu()
    return out


@contextmanager
def made(target: Path, kind: str, step: int, size: int) -> Generator[Path, None, None]:
    """Yield a hidden path to write `size` bytes to, which is renamed to `target` once all of it is on the disk.

    Every rank must enter it. Raises UserError if the disk has less room than that; `kind` and `step` are for its words.
    """
    half = files.hidden(target)
    try:
        agreement.main(lambda: prepare(target, kind, step, size))
        try:
            yield half
            agreement.main(lambda: files.settle(half, target, durable=True))
        except BaseException:
            if dist.is_main():
                files.remove(half)
            raise
    except Exception as error:
        if files.full(error):
            raise UserError(f"{target.parent}: the disk is full, {so(target, kind, step)}") from error
        raise


def prepare(target: Path, kind: str, step: int, size: int) -> None:
    """Make the folder, and remove half-written files in it.

    Raises UserError if there is no room, and as `require_in_place`.
    """
    folder = target.parent
    files.require_in_place(target)
    for left in folder.glob(".step-*.tmp"):
        files.remove(left)
    if (free := files.free(folder)) < size:
        what = f"takes {size / 1e9:,.3g} GB and the disk has {free / 1e9:,.3g} GB free"
        raise UserError(f"{folder}: the {kind} {what}, {so(target, kind, step)}")
    folder.mkdir(parents=True, exist_ok=True)


def so(target: Path, kind: str, step: int) -> str:
    """What a full disk means for the run, and the way out."""
    others = [path for path in standing(target.parent, target.suffix).values() if path != target]
    last = others[-1] if others else None
    stands = f"{last.name if last else f'no {kind}'} still stands"
    return f"so the {kind} of step {step} was not written; {stands}. Free some space and start again."


def keep_alone(file: Path, tensors: Mapping[str, Tensor], **facts: object) -> None:
    """Write weights in no checkpoint, with what they are and checksums: as one entry, for two come in any order."""
    facts = facts | {SUM: digest.of_tensors(tensors)}
    facts[FACTS_SUM] = sum_of_facts(facts)
    safetensors.torch.save_file(dict(tensors), file, metadata={ABOUT: json.dumps(facts, sort_keys=True)})


def sum_of_facts(facts: Mapping[str, object]) -> str:
    """The checksum of what a file of weights says of itself."""
    others = {name: value for name, value in facts.items() if name != FACTS_SUM}
    return digest.short(json.dumps(others, sort_keys=True))


def load(place: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights, or of a folder of shards. Raises UserError where the file held others."""
    found = weights.load(place)
    said = facts_of(place).get(SUM) if place.is_file() else None  # a checkpoint's parts are hashed by its list
    if said and said != digest.of_tensors(found):
        raise UserError(f"{place} has changed: its tensors have another checksum. Take another copy, or other weights")
    return found


def lazily(place: Path) -> dict[str, Callable[[], Tensor]]:
    """What reads each whole tensor of a file of weights, or of a folder of shards. Raises as `load`."""
    if place.is_dir():
        from dumo.io import shards  # slow to import

        return shards.lazily(place)
    return {name: partial(torch.detach, x) for name, x in load(place).items()}  # mapped


def facts_of(place: Path) -> dict[str, Any]:
    """What a file of weights says of itself: its step, and maybe its run; {}: nothing that can be read.

    Raises UserError where this metadata does not match its checksum.
    """
    notes = weights.notes(place)
    try:
        facts = json.loads(notes.get(ABOUT, "null"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(facts, dict):
        return dict(notes)
    if facts.get(FACTS_SUM) not in (None, sum_of_facts(facts)):
        raise UserError(
            f"{place}: its metadata does not match its checksum, so it was edited or damaged: take another copy, or "
            "other weights"
        )
    return facts


def step_of(place: Path, default: int) -> int:
    """The step of weights: as their file says, else as its checkpoint says, else the default."""
    step = str(facts_of(place).get("step", ""))
    if step.isdecimal() and len(step) < 20:  # longer texts are no step
        return int(step)
    return manifest.read(place.parent).step if (place.parent / manifest.NAME).is_file() else default
