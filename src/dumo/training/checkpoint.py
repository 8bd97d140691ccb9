"""Checkpoints: what a run needs to resume, to the bit, in safetensors and JSON only, on any number of ranks.

    checkpoints/step-00001000/   net.safetensors  ema-<decay>.safetensors ...  optimizer.safetensors  spec.yaml
                                 state.json
    milestones/step-00000200.safetensors

- Save: `copy` copies the state to host memory, and `save_copy` writes that copy, maybe in a thread
  (`dumo.training.saver`), and drops old checkpoints.
- Resume: `restore_last_finite` restores a checkpoint, or the last one before it whose values are finite.
- Weights alone: `save_milestone` and `save_weights` write one file, with facts and checksums in its metadata. `load`,
  `tensor_readers`, `facts_of` and `step_of` read such a file, or a part of a checkpoint (`part_path`).

One process writes a file for each part. Several ranks write folders of shards instead: net/, ema-<decay>/ ...,
optimizer/ (`dumo.io.shards`). Milestones, the weights that are sampled after a step, all stay, unless the run goes on
from a step before them. No file has frozen weights: `state.json` has their digest (`dumo.training.frozen`). `spec.yaml`
is the run that was trained up to here, as text; a milestone's metadata have a hash of those of its fields that may not
change (`dumo.config.difference.identity`).

Each is written to a hidden path, flushed to the disk, then renamed: so whatever is named `step-...` was once whole,
and `state.json` lists its files and their hashes (`dumo.training.manifest`).
"""

import json
from collections.abc import Callable, Collection, Generator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dumo.io import digest, weights
from dumo.io import file as files
from dumo.io.guard import require_in_place
from dumo.runtime import dist
from dumo.runtime.device import software_versions
from dumo.training import agreement, frozen, layout, manifest
from dumo.training.manifest import Checkpoint, Checkpoints, Manifest, paths_by_step
from dumo.training.state import Diverged, State, by_parameter_index, empty_optimizer_state, flat_optimizer_state
from dumo.types import UserError

FIX = "resume with the spec that wrote it"  # ends messages about weights of another net
_ONE_FILE = {"format": "pt"}  # metadata of a part: one entry, because two are written in any order
ABOUT = "dumo"  # key of the one metadata entry of weights outside a checkpoint: facts about them, as JSON
SUM = "sum"  # key, among these facts, of the checksum of the tensors
FACTS_SUM = "facts_sum"  # key of the checksum of all other facts; older files have none

HostMemory = MutableMapping[tuple[str, str], Tensor]  # buffers in the host, by part and name


@dataclass(frozen=True)
class CheckpointNotes:
    """What a checkpoint holds besides its state: the run as text (of the main rank), and how long its files were."""

    run: str = ""
    ledger: manifest.FileEntry | None = None  # what the images were (`dumo.data.ledger`)
    log: manifest.FileEntry | None = None  # of the main rank
    threads: int | None = None  # of torch on a CPU


@dataclass(frozen=True)
class CheckpointCopy:
    """What a checkpoint holds, as it was at its step, in host memory that no later step changes."""

    manifest: Manifest  # without its files
    notes: CheckpointNotes
    size: int  # bytes of the checkpoint
    tensors: dict[str, dict[str, Tensor]]  # what this rank writes, by part and name: its shard of each tensor
    offsets: dict[str, dict[str, tuple[int, ...]]]  # where each shard begins in its tensor; {} of one process


def copy(state: State, notes: CheckpointNotes, memory: HostMemory) -> CheckpointCopy:
    """Copy what a checkpoint holds to host memory, reusing the buffers in `memory` and keeping new ones there.

    All ranks together take one copy of it. Every rank must call it. Raises Diverged, on all ranks, if a value is not
    finite (`first_not_finite`).
    """
    tensors = _tensors_of(state)
    bad_tensor = first_not_finite(tensors, _buffer_names(state.net))
    if bad_tensor:
        raise Diverged(f"step {state.step}: {bad_tensor} is not finite, so no checkpoint is written of it.")
    size = 0
    for named in tensors.values():
        size += sum(tensor.nbytes for tensor in named.values())
    about = Manifest(
        step=state.step,
        images=state.images,
        skips=state.skips,
        trend=state.trend,
        ranks=dist.world(),
        versions=software_versions(),
        frozen=state.frozen,
        timing=state.duration.timing,
        threads=notes.threads,
        log=notes.log,
        ledger=notes.ledger,
        files={},
    )
    offsets: dict[str, dict[str, tuple[int, ...]]] = {}
    if dist.world() > 1:
        from dumo.io import shards  # slow to import

        offsets = {part: shards.parts_to_write(named) for part, named in tensors.items()}

    def copy_parts() -> dict[str, dict[str, Tensor]]:
        copies: dict[str, dict[str, Tensor]] = {}
        for part, named in tensors.items():
            written_here = offsets.get(part, named)
            copies[part] = {name: _copy_to_host(named[name], memory, (part, name)) for name in written_here}
        return copies

    return CheckpointCopy(about, notes, size, agreement.on_each_rank(copy_parts), offsets)


def _copy_to_host(x: Tensor, memory: HostMemory, key: tuple[str, str]) -> Tensor:
    """This rank's part of a tensor, copied. A buffer that exists is filled many times as fast as a new one."""
    source = layout.local_tensor(x.detach())
    buffer = memory.get(key)
    if buffer is None or (buffer.shape, buffer.dtype) != (source.shape, source.dtype):
        buffer = torch.empty(source.shape, dtype=source.dtype)
        memory[key] = buffer
    return buffer.copy_(source)


def save_copy(checkpoints: Checkpoints, copy: CheckpointCopy, keep: int) -> Path:
    """Write a checkpoint, then drop old ones (`Checkpoints.drop`); return its path.

    A checkpoint of this step that exists already is left alone, or replaced if it is damaged. Every rank must call it.
    Raises UserError, on all ranks, if the disk is full; older checkpoints then stay.
    """
    step = copy.manifest.step
    target = checkpoints.folder / manifest.folder_of(step)
    exists = agreement.on_main_rank(target.exists)
    if not exists or checkpoints.at(target).fault(together=True):
        with _path_to_write(target, "checkpoint", step, copy.size) as temp_path:
            _write_files(temp_path, copy)
        checkpoints.note_written(target)
    agreement.on_main_rank(lambda: checkpoints.drop(step, keep))
    return target


def save_milestone(folder: Path, state: State, run: str = "") -> Path:
    """Write the sampled weights (of the first average, else the net) as this step's milestone; return its path.

    `run` is the identity of the run. Every rank must call it. Raises as `save_weights`.
    """
    return save_weights(folder, state, state.sampled_net, "milestone", run)


def save_weights(folder: Path, state: State, module: nn.Module, kind: str, run: str = "", **facts: object) -> Path:
    """Write the trained weights of the net, or of its average `module`, as one file of this step; return its path.

    The file says, under a checksum, its kind, its step, the identity of its run, `run`, and `facts`. Replaces an older
    one. Every rank must call it. Raises UserError on all ranks if the disk is full; the older file then stays.
    """
    target = folder / f"{manifest.folder_of(state.step)}.safetensors"
    named = frozen.trained_state_dict(state.net, module)
    size = sum(tensor.nbytes for tensor in named.values())
    with _path_to_write(target, kind, state.step, size) as temp_path:
        whole = weights.unshared(_gather_on_main_rank(named))
        agreement.on_main_rank(lambda: write_weights(temp_path, whole, kind=kind, step=state.step, run=run, **facts))
    return target


def milestones(folder: Path) -> dict[int, Path]:
    """The milestones in `folder` by step, in order."""
    return paths_by_step(folder, ".safetensors")


def part_path(checkpoint: Path, name: str) -> Path:
    """The path of a part of a checkpoint (net, ema-0.999, optimizer): a folder of shards, or a file."""
    folder = checkpoint / name
    return folder if folder.is_dir() else checkpoint / f"{name}.safetensors"


def restore_last_finite(
    checkpoints: Checkpoints, checkpoint: Checkpoint, state: State, *, or_before: bool = True
) -> Checkpoint:
    """Restore a checkpoint, or, if a value in it is not finite, the last whole one before it; return it.

    Every rank must call it. Raises UserError as `restore`, as `Checkpoints.latest` if none is left, and, without
    `or_before`, if a value is not finite.
    """
    while True:
        restore(checkpoint, state)
        bad_tensor = first_not_finite(_tensors_of(state), _buffer_names(state.net))
        if bad_tensor is None:
            return checkpoint
        if not or_before:
            raise UserError(f"{checkpoint.path}: {bad_tensor} is not finite: go on from another step")
        checkpoint.value_fault = f"{checkpoint.path}: {bad_tensor} is not finite"
        checkpoint = checkpoints.latest(together=True) or checkpoint  # it raises if there is none


def restore(checkpoint: Checkpoint, state: State) -> None:
    """Load a checkpoint into a state built from the same spec, on any number of ranks.

    Changes nothing unless all of it fits. Every rank must call it. Raises UserError naming the file and the first
    tensor that is missing, unknown, or of another shape or dtype; or if the frozen weights differ.
    """
    weights_by_part = _weights_of(state)
    optimizer_state: dict[str, Tensor] = {}

    def require_fit() -> Manifest:
        for part, named in weights_by_part.items():
            place = part_path(checkpoint.path, part)
            weights.compare(place, weights.outline(place), named, "the run", FIX)
        optimizer_state.update(empty_optimizer_state(part_path(checkpoint.path, "optimizer"), state, FIX))
        frozen.require(state.frozen, checkpoint.manifest.frozen, checkpoint.path)
        return checkpoint.manifest

    def fill() -> None:
        for part, named in {**weights_by_part, "optimizer": optimizer_state}.items():
            weights.fill(part_path(checkpoint.path, part), named)

    saved, *_ = agreement.gather_results(require_fit)
    agreement.gather_results(fill)
    state.optimizer.load_state_dict(
        {**state.optimizer.state_dict(), "state": by_parameter_index(optimizer_state, state)}
    )
    state.step = saved.step
    state.images = saved.images
    state.skips = saved.skips
    state.trend = saved.trend


def _tensors_of(state: State) -> dict[str, dict[str, Tensor]]:
    """All tensors of a checkpoint that this rank holds, by part and name."""
    # before the optimizer: a state dict puts the shards of a gathered net in place, and the optimizer knows only these
    weights_by_part = _weights_of(state)
    tensors = {"net": weights_by_part.pop("net"), "optimizer": flat_optimizer_state(state)}
    return tensors | weights_by_part


def _weights_of(state: State) -> dict[str, dict[str, Tensor]]:
    """The trained weights of the net and of its averages, by part and name."""
    by_part = {"net": frozen.trained_state_dict(state.net)}
    for key, average in state.averages.items():
        by_part[f"ema-{key}"] = frozen.trained_state_dict(state.net, average.module)
    return by_part


def _buffer_names(net: nn.Module) -> set[str]:
    """The names of the buffers of a net, and so of its averages."""
    return {name for name, _ in net.named_buffers(remove_duplicate=False)}


def first_not_finite(tensors: Mapping[str, Mapping[str, Tensor]], buffers: Collection[str] = ()) -> str | None:
    """Return the part and name of the first tensor with a value that is not finite; None if all are finite.

    Of `buffers`, by name, only NaN counts: a mask may be infinite by design, and running statistics that break become
    NaN. Synchronizes each device once. Every rank must call it, and gets the same answer.
    """
    flags_by_device: dict[torch.device, dict[str, Tensor]] = {}
    for part, named in tensors.items():
        for name, tensor in named.items():
            x = layout.local_tensor(tensor.detach())
            if x.is_floating_point() and x.numel():
                ends = torch.stack(torch.aminmax(x))  # NaN if one is; nine times as fast as isfinite
                is_sound = ~ends.isnan() if name in buffers else ends.isfinite()
                flags_by_device.setdefault(x.device, {})[f"{part}: {name}"] = is_sound.all()

    def first_on_this_rank() -> str | None:
        for flags in flags_by_device.values():
            for name, is_finite in zip(flags, torch.stack([*flags.values()]).tolist(), strict=True):
                if not is_finite:
                    return name
        return None

    answers = agreement.gather_results(first_on_this_rank)
    return next((answer for answer in answers if answer), None)


def _write_files(folder: Path, copy: CheckpointCopy) -> None:
    """Write each part as a file, or as a folder of shards, and `state.json` last. Every rank must call it."""
    agreement.on_main_rank(folder.mkdir)
    agreement.on_main_rank(lambda: _write_notes(folder, copy.notes))
    if dist.world() == 1:
        for name, named in copy.tensors.items():
            safetensors.torch.save_file(named, folder / f"{name}.safetensors", metadata=_ONE_FILE)
        written_here = sorted(folder.iterdir())
    else:
        from dumo.io import shards  # slow to import

        for name, named in copy.tensors.items():
            agreement.gather_results(partial(shards.write, folder / name, named, copy.offsets[name]))
        written_here = sorted(folder.glob(f"*/{shards.file_pattern(dist.rank())}"))
        if dist.is_main():
            written_here += filter(Path.is_file, folder.iterdir())
    files_of_all: dict[str, manifest.FileEntry] = {}
    for files_of_rank in agreement.gather_results(lambda: manifest.file_entries(folder, written_here)):
        files_of_all |= files_of_rank
    full_manifest = copy.manifest.model_copy(update={"files": files_of_all})
    agreement.on_main_rank(lambda: manifest.write(folder, full_manifest))


def _write_notes(folder: Path, notes: CheckpointNotes) -> None:
    """Write what a checkpoint holds besides its state."""
    if notes.run:
        (folder / manifest.RUN).write_text(notes.run, encoding="utf-8")


def _gather_on_main_rank(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole of each tensor on rank 0, nothing on others. Every rank must call it."""
    if dist.world() == 1:
        return dict(tensors)
    gathered: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = layout.full_tensor(tensor)
        if dist.is_main():
            gathered[name] = whole.cpu()
    return gathered


@contextmanager
def _path_to_write(target: Path, kind: str, step: int, size: int) -> Generator[Path, None, None]:
    """Yield a hidden path to write `size` bytes to, which is renamed to `target` once all of it is on the disk.

    Every rank must enter it. Raises UserError if the disk has less room than that; `kind` and `step` are for the
    message.
    """
    temp_path = files.temp_path_for(target)
    try:
        agreement.on_main_rank(lambda: _prepare_folder(target, kind, step, size))
        try:
            yield temp_path
            agreement.on_main_rank(lambda: files.commit(temp_path, target, durable=True))
        except BaseException:
            if dist.is_main():
                files.remove(temp_path)
            raise
    except (OSError, SafetensorError) as error:
        if files.is_disk_full(error):
            raise UserError(f"{target.parent}: the disk is full, {_full_disk_text(target, kind, step)}") from error
        raise


def _prepare_folder(target: Path, kind: str, step: int, size: int) -> None:
    """Make the folder of a file or folder `target`, and remove half-written ones in it.

    Raises UserError if there is no room, and as `require_in_place`.
    """
    folder = target.parent
    require_in_place(target)
    for half_written in folder.glob(".step-*.tmp"):
        files.remove(half_written)
    free = files.free_bytes(folder)
    if free < size:
        raise UserError(
            f"{folder}: the {kind} takes {size / 1e9:,.3g} GB and the disk has {free / 1e9:,.3g} GB free, "
            f"{_full_disk_text(target, kind, step)}"
        )
    folder.mkdir(parents=True, exist_ok=True)


def _full_disk_text(target: Path, kind: str, step: int) -> str:
    """What a full disk means for the run, and what to do: the end of a message."""
    others = [path.name for path in paths_by_step(target.parent, target.suffix).values() if path != target]
    last = others[-1] if others else f"no {kind}"
    return f"so the {kind} of step {step} was not written; {last} still stands. Free some space and start again."


def write_weights(file: Path, tensors: Mapping[str, Tensor], **facts: object) -> None:
    """Write weights outside a checkpoint, with facts about them and checksums, all in one metadata entry."""
    facts = facts | {SUM: digest.of_tensors(tensors)}
    facts[FACTS_SUM] = _sum_of_facts(facts)
    safetensors.torch.save_file(dict(tensors), file, metadata={ABOUT: json.dumps(facts, sort_keys=True)})


def _sum_of_facts(facts: Mapping[str, object]) -> str:
    """The checksum of the facts in a file of weights, itself left out."""
    others = {name: value for name, value in facts.items() if name != FACTS_SUM}
    return digest.short(json.dumps(others, sort_keys=True))


def load(place: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights, or of a folder of shards. Raises UserError where its checksum differs."""
    tensors = weights.load(place)
    expected_sum = facts_of(place).get(SUM) if place.is_file() else None  # a checkpoint's parts are hashed by its list
    if expected_sum and expected_sum != digest.of_tensors(tensors):
        raise UserError(f"{place} has changed: its tensors have another checksum. Take another copy, or other weights")
    return tensors


def tensor_readers(place: Path) -> dict[str, Callable[[], Tensor]]:
    """A function for each tensor of a file of weights, or of a folder of shards, that reads it. Raises as `load`."""
    if place.is_dir():
        from dumo.io import shards  # slow to import

        return shards.tensor_readers(place)
    return {name: partial(torch.detach, x) for name, x in load(place).items()}  # memory-mapped


def facts_of(place: Path) -> dict[str, Any]:
    """The facts in a file of weights: its step, and maybe its run; {} if there are none that can be read.

    Raises UserError where this metadata does not match its checksum.
    """
    metadata = weights.read_metadata(place)
    try:
        facts = json.loads(metadata.get(ABOUT, "null"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(facts, dict):
        return dict(metadata)
    if facts.get(FACTS_SUM) not in (None, _sum_of_facts(facts)):
        raise UserError(
            f"{place}: its metadata does not match its checksum, so it was edited or damaged: take another copy, or "
            "other weights"
        )
    return facts


def step_of(place: Path, default: int) -> int:
    """The step of weights: in their file's facts, else in their checkpoint's `state.json`, else the default."""
    step = str(facts_of(place).get("step", ""))
    if step.isdecimal() and len(step) < 20:  # longer texts are no step
        return int(step)
    if (place.parent / manifest.NAME).is_file():
        return manifest.read(place.parent).step
    return default
