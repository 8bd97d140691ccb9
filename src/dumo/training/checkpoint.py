"""Checkpoints, from which a run resumes bit-identically, in one layout for any number of ranks.

    checkpoints/step-00000200/
        net/00000.safetensors 00001.safetensors ...   one file per rank
        ema-0.999/...                                 each average of the weights
        optimizer/...                                 the optimizer state, named <key>.<parameter>
        run.yaml                                      the config when it was saved
        state.json                                    the facts, and the size and SHA-256 of every other file

- Save: `Checkpoints.save` copies this rank's tensors to host memory and returns. A thread writes the copy to a hidden
  folder, lists the files in state.json, renames the folder and removes old checkpoints. A folder named step-... is
  therefore complete.
- Load: `Checkpoints.latest` finds the newest checkpoint whose files match state.json, and `restore` loads it into a
  state on any number of ranks. `restore_last_finite` skips checkpoints with NaN.

torch.distributed.checkpoint reads overlapping shards (`dumo.io.tensor_files.fill`). It is not used for writing, because
its writer copies a rank's tensors once more while holding the GIL. A file records only the offsets of its own tensors,
so a missing file is detected only by state.json.

Frozen weights are not saved; state.json contains their digest (`dumo.training.frozen`).
"""

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from threading import Thread
from types import TracebackType

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from dumo.io import digest, tensor_files
from dumo.io import file as files
from dumo.io.guard import require_in_place
from dumo.runtime import dist, shell_path
from dumo.runtime.device import software_versions
from dumo.training import agreement, frozen, layout
from dumo.training.duration import Timing
from dumo.training.eightbit import AdamW8bitOptimizer
from dumo.training.muon import MOMENTUM_KEY, STACK_KEY
from dumo.training.state import FAR, Diverged, State, Trend
from dumo.types import UserError

STATE_FILE = "state.json"
RUN_FILE = "run.yaml"
# The fix in messages about weights of another network.
FIX = "resume with the run.yaml that wrote it"

# The tensors of a checkpoint by part (such as net) and by name.
Parts = Mapping[str, Mapping[str, Tensor]]


class Damaged(UserError):  # noqa: N818, a state of a file
    """Raised if a file of a checkpoint is missing, unexpected or damaged."""


class FileEntry(BaseModel):
    """The size and SHA-256 of a file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> "FileEntry":
        """Measure a file."""
        return cls(bytes=file.stat().st_size, sha256=digest.of_file(file))


class Facts(BaseModel):
    """The scalar state of a checkpoint."""

    step: int
    # Images seen up to this step, including repeats.
    images: int
    # Consecutive skipped steps up to this one.
    skips: int = 0
    trend: Trend = Trend()
    # The number of ranks that wrote it.
    ranks: int = 1
    versions: dict[str, str] = {}
    # The digest of the frozen weights, which are not saved; None if nothing is frozen.
    frozen: str | None = None
    # The number of torch's CPU threads, which affects the order of sums; None on a GPU.
    threads: int | None = None
    # The elapsed time of a run with a time limit, else None.
    timing: Timing | None = Field(default=None, exclude_if=lambda timing: timing is None)
    # The log of the run up to this step.
    log: FileEntry | None = None
    # The ledger of the images read up to this step (`dumo.data.ledger`).
    ledger: FileEntry | None = None


class Listing(BaseModel):
    """The content of state.json."""

    facts: Facts
    # All other files by their path inside the checkpoint.
    files: dict[str, FileEntry]
    # A digest of the other fields.
    sum: str = ""

    def checksum(self) -> str:
        """Return the expected value of `sum`."""
        return digest.short(self.model_dump_json(exclude={"sum"}))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, as its state.json describes it."""

    path: Path
    facts: Facts
    files: Mapping[str, FileEntry]

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Read the state.json of a checkpoint. Raise Damaged if it is missing or was changed."""
        file = path / STATE_FILE
        try:
            listing = Listing.model_validate_json(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError) as error:
            raise Damaged(f"{file} is missing or damaged") from error
        if listing.sum != listing.checksum() or path.name != folder_of(listing.facts.step):
            raise Damaged(f"{file} was modified, or belongs to another step")
        return cls(path, listing.facts, listing.files)

    @cached_property
    def run_text(self) -> str:
        """The text of its run.yaml, whose hash `find_fault` compares."""
        return (self.path / RUN_FILE).read_text(encoding="utf-8")

    def sha256(self, part: str) -> str:
        """Return the SHA-256 of a part from the listed hashes of its files, equal to `tensor_files.sha256`."""
        listed = {name: entry.sha256 for name, entry in self.files.items() if name.startswith(f"{part}/")}
        return tensor_files.combine_digests(listed)

    def find_fault(self, parts: Collection[str] | None = None, share: slice = slice(None)) -> str | None:
        """Return a message about the first missing, unexpected or damaged file; None if all files match.

        All sizes are compared. The files of `parts` (such as net or run.yaml; None means all) are hashed, or only the
        `share` of their sorted names.
        """
        # Unlisted tensor files in the folder of a part would be loaded as well.
        found = {file.relative_to(self.path).as_posix() for file in self.path.glob("*/*.safetensors")}
        for name in sorted(found | self.files.keys()):
            file = self.path / name
            entry = self.files.get(name)
            if entry is None:
                return f"{file} is not listed in {STATE_FILE}"
            try:
                size = file.stat().st_size
            except FileNotFoundError:
                return f"{file} is missing"
            if size != entry.bytes:
                return f"{file} has {size:,} bytes, not {entry.bytes:,}"

        names = sorted(self.files)
        if parts is not None:
            names = [name for name in names if name.split("/")[0] in parts]
        for name in names[share]:
            if digest.of_file(self.path / name) != self.files[name].sha256:
                return f"{self.path / name} is damaged: its SHA-256 is not the one in {STATE_FILE}"
        return None


class Checkpoints:
    """The checkpoints in a folder. To save, every rank creates one and calls the same methods."""

    def __init__(self, folder: Path) -> None:
        """Set the folder, without reading it."""
        self.folder = folder
        # Cache of state.json by step.
        self._read: dict[int, Checkpoint] = {}
        # Faults of damaged or non-finite checkpoints, by step.
        self._rejected: dict[int, str] = {}
        # The steps whose checkpoints were hashed and are whole.
        self._whole: set[int] = set()
        # Host buffers by part and name. Reusing a buffer is many times faster than allocating one.
        self._memory: dict[tuple[str, str], Tensor] = {}
        self._group: ProcessGroup | None = None
        self._work: Future[object] | None = None

    # ------------------------------------------------------------------------------------------------------------ find

    def steps(self) -> list[int]:
        """Return the steps with a checkpoint, including damaged ones, in ascending order."""
        return [*paths_by_step(self.folder)]

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.folder / folder_of(step)

    def read(self, step: int) -> Checkpoint:
        """Read the checkpoint of a step. Raise Damaged if its state.json is missing or was changed."""
        if step not in self._read:
            self._read[step] = Checkpoint.read(self.path(step))
        return self._read[step]

    def latest(self, parts: Collection[str] | None = None, *, together: bool = False) -> Checkpoint | None:
        """Return the newest undamaged checkpoint, or None if there are no checkpoints. Warn about damaged ones.

        run.yaml and `parts` are hashed, as in `Checkpoint.find_fault`. With `together`, all ranks must call it, hash a
        share of the files each, and get the same result. Raise UserError if all checkpoints are damaged.
        """
        if parts is not None:
            parts = {RUN_FILE, *parts}
        faults: list[str] = []
        for step in reversed(self.steps()):
            fault = self.find_fault(step, parts, together=together)
            if fault:
                faults.append(fault)
                continue
            if faults and dist.is_main():
                warnings.warn(f"{'; '.join(faults)}: using the previous checkpoint {folder_of(step)}", stacklevel=2)
            return self.read(step)
        if faults:
            raise UserError(
                f"{'; '.join(faults)}: {self.folder} has no complete checkpoint: restore its files, or use --out to "
                "train from the start in another folder"
            )
        return None

    def find_fault(self, step: int, parts: Collection[str] | None = None, *, together: bool = False) -> str | None:
        """Return a message about the fault of a step's checkpoint, or None. A whole checkpoint is not hashed again."""
        hashes_all = parts is None
        if step in self._whole:
            parts = ()
        share = slice(dist.rank(), None, dist.world()) if together else slice(None)

        def find() -> str | None:
            try:
                return self._rejected.get(step) or self.read(step).find_fault(parts, share)
            except Damaged as error:
                return str(error)

        faults = agreement.gather_results(find) if together else [find()]
        fault = next(filter(None, faults), None)
        if fault:
            self._rejected[step] = fault
        elif hashes_all:
            self._whole.add(step)
        return fault

    def reject(self, step: int, fault: str) -> None:
        """Treat the checkpoint of a step as damaged even if its files match state.json."""
        self._rejected[step] = fault

    def last_good(self, step: int) -> int | None:
        """Return the last step up to `step` with a checkpoint from before the loss diverged, or None."""
        good_steps = (checkpoint.facts.step for checkpoint in self._sound(step) if checkpoint.facts.trend.is_good)
        return next(good_steps, None)

    def _sound(self, step: int) -> list[Checkpoint]:
        """Return the checkpoints up to `step` whose files have the listed sizes, the newest first."""
        sound: list[Checkpoint] = []
        for older_step in reversed(self.steps()):
            if older_step <= step and self.find_fault(older_step, parts=()) is None:
                sound.append(self.read(older_step))
        return sound

    # ------------------------------------------------------------------------------------------------------------ save

    def save(
        self,
        state: State,
        run_text: str = "",
        *,
        keep: int = 2,
        threads: int | None = None,
        log: FileEntry | None = None,
        ledger: FileEntry | None = None,
        before: Callable[[], object] | None = None,
        after: Callable[[], object] | None = None,
    ) -> None:
        """Copy a state and write it in a thread while training continues. Every rank must call it.

        An existing undamaged checkpoint of the step is kept. Raise Diverged on all ranks if a value is not finite, and
        the error of the previous checkpoint if it could not be written.

        - `run_text`: the content of run.yaml, on rank 0
        - `keep`: the number of checkpoints to keep, as in `prune`
        - `threads`, `log`, `ledger`: fields of `Facts`
        - `before`, `after`: called in the thread before writing, and after the checkpoint was renamed
        """
        parts = parts_of(state)
        bad_tensor = find_nonfinite(parts, state.net)
        if bad_tensor:
            raise Diverged(f"step {state.step}: {bad_tensor} is not finite, so no checkpoint was saved.")
        facts = Facts(
            step=state.step,
            images=state.images,
            skips=state.skips,
            trend=state.trend,
            ranks=dist.world(),
            versions=software_versions(),
            frozen=state.frozen,
            threads=threads,
            timing=state.duration.timing,
            log=log,
            ledger=ledger,
        )
        self.wait()
        own_parts, offsets = agreement.on_each_rank(lambda: self._copy_own_parts(parts))
        # The thread needs its own process group, because its collectives would mix with those of training.
        if self._group is None:
            self._group = dist.new_group()
        work = Future[object]()

        def run() -> None:
            dist.group.set(self._group)
            try:
                if before:
                    before()
                self._write(facts, run_text, own_parts, offsets)
                agreement.on_main_rank(lambda: self.prune(facts.step, keep))
                if after:
                    after()
                work.set_result(None)
            except BaseException as error:
                # `wait` raises it in the main thread.
                work.set_exception(error)

        self._work = work
        # A daemon thread does not block the exit of the process.
        Thread(target=run, name="checkpoint", daemon=True).start()

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Raise its error once, on all ranks; older checkpoints stay."""
        work = self._work
        if work:
            # After an interrupt the next call waits again.
            wait([work])
            self._work = None
            work.result()

    @property
    def has_failed(self) -> bool:
        """Whether the last checkpoint could not be written; `wait` raises its error."""
        return self._work is not None and self._work.done() and self._work.exception() is not None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Wait for the last checkpoint. Raise its error, unless training has failed already."""
        if error is None:
            self.wait()
        elif self._work:
            wait([self._work])

    def _copy_own_parts(self, parts: Parts) -> tuple[Parts, Mapping[str, tensor_files.Offsets]]:
        """Copy the tensors that this rank writes to host memory. Return the copies and their offsets."""
        copies: dict[str, dict[str, Tensor]] = {}
        offsets = {part: assign_tensors(tensors) for part, tensors in parts.items()}
        for part, tensors in parts.items():
            copies[part] = {}
            for name in offsets[part]:
                source = layout.local_tensor(tensors[name].detach())
                buffer = self._memory.get((part, name))
                if buffer is None or (buffer.shape, buffer.dtype) != (source.shape, source.dtype):
                    buffer = torch.empty(source.shape, dtype=source.dtype)
                    self._memory[part, name] = buffer
                copies[part][name] = buffer.copy_(source)
        return copies, offsets

    def _write(
        self, facts: Facts, run_text: str, own_parts: Parts, offsets: Mapping[str, tensor_files.Offsets]
    ) -> None:
        """Write this rank's files to a hidden folder, which rank 0 then renames. Raise OSError on all ranks."""
        target = self.path(facts.step)
        temp_path = files.temp_path_for(target)
        exists = agreement.on_main_rank(target.exists)
        if exists and not self.find_fault(facts.step, together=True):
            return

        def prepare() -> None:
            require_in_place(target)
            self.folder.mkdir(parents=True, exist_ok=True)
            for half_written in self.folder.glob(".step-*.tmp"):
                files.remove(half_written)
            for part in own_parts:
                (temp_path / part).mkdir(parents=True)
            (temp_path / RUN_FILE).write_text(run_text, encoding="utf-8")

        def write_files() -> dict[str, FileEntry]:
            written = [temp_path / RUN_FILE] if dist.is_main() else []
            for part, tensors in own_parts.items():
                if tensors:
                    file = temp_path / part / f"{dist.rank():05d}.safetensors"
                    tensor_files.write_part(file, tensors, offsets[part])
                    written.append(file)
            return {file.relative_to(temp_path).as_posix(): FileEntry.of(file) for file in written}

        def commit() -> None:
            write_state_file(temp_path, facts, entries)
            # The files of other ranks may be on another disk.
            fault = Checkpoint(temp_path, facts, entries).find_fault(())
            if fault:
                raise UserError(f"{fault}: train in a folder on a file system that all ranks share")
            files.commit(temp_path, target, durable=True)

        try:
            agreement.on_main_rank(prepare)
            entries: dict[str, FileEntry] = {}
            for entries_of_rank in agreement.gather_results(write_files):
                entries |= entries_of_rank
            agreement.on_main_rank(commit)
        except BaseException:
            if dist.is_main():
                files.remove(temp_path)
            raise
        self._rejected.pop(facts.step, None)
        self._whole.discard(facts.step)
        self._read.pop(facts.step, None)

    def prune(self, step: int, keep: int) -> None:
        """Remove all checkpoints up to `step` but the last `keep` undamaged ones. Only one rank calls it.

        If the loss had diverged in all of these, also keep the last checkpoint from before, with a warning.
        """
        sound = self._sound(step)
        if len(sound) < keep:
            return
        oldest_step = sound[keep - 1].facts.step
        good_step = self.last_good(step)
        if good_step is not None and good_step < oldest_step:
            warnings.warn(
                f"{self.folder}: the loss has risen to more than {FAR:g} times its lowest, so {folder_of(good_step)}, "
                "from before the rise, is kept as well. To start a new run from it:  "
                f"dumo train {shell_path(self.folder.parent)} --from {good_step} --out NEW",
                stacklevel=2,
            )
        for path_step, path in paths_by_step(self.folder).items():
            if path_step < oldest_step and path_step != good_step:
                remove(path)


def assign_tensors(tensors: Mapping[str, Tensor]) -> tensor_files.Offsets:
    """Return the tensors whose shard this rank writes, with the shard's offset in the full tensor.

    A replicated shard is written by one rank. Tensors are assigned from the largest to the smallest, so that all ranks
    write about the same amount. Every rank computes the same assignment without communication.
    """
    # The number of values that each replica writes.
    load = Counter[int]()
    offsets: tensor_files.Offsets = {}
    for name, x in sorted(tensors.items(), key=lambda item: -item[1].numel()):
        replica, num_replicas = layout.replica_of(x)
        writer = min(range(num_replicas), key=lambda k: load[k])
        load[writer] += x.numel()
        # Skip empty shards, but write empty tensors.
        if writer == replica and (layout.local_tensor(x).numel() or not x.numel()):
            offsets[name] = layout.local_offset(x)
    return offsets


def write_state_file(folder: Path, facts: Facts, entries: Mapping[str, FileEntry]) -> None:
    """Write the state.json of a checkpoint, which lists its other files."""
    listing = Listing(facts=facts, files={**entries})
    listing.sum = listing.checksum()
    (folder / STATE_FILE).write_text(f"{listing.model_dump_json(indent=2)}\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------- the state of a training


def step_of(place: Path, default: int) -> int:
    """Return the step of weights, from their checkpoint or from their file's metadata, else `default`."""
    if (place.parent / STATE_FILE).is_file():
        return Checkpoint.read(place.parent).facts.step
    return tensor_files.facts_of(place).get("step", default)


def restore_last_finite(checkpoints: Checkpoints, checkpoint: Checkpoint, state: State) -> Checkpoint:
    """Restore a checkpoint, or the newest older one with finite values, and return it.

    Every rank must call it. Raise UserError if no checkpoint is finite.
    """
    while True:
        restore(checkpoint, state)
        bad_tensor = find_nonfinite(parts_of(state), state.net)
        if bad_tensor is None:
            return checkpoint
        fault = f"{checkpoint.path}: {bad_tensor} is not finite"
        checkpoints.reject(checkpoint.facts.step, fault)
        older = checkpoints.latest(together=True)
        # Without older checkpoints, this one belongs to another run, from which this run starts.
        if older is None:
            raise UserError(f"{fault}: start from another step")
        checkpoint = older


def restore(checkpoint: Checkpoint, state: State) -> None:
    """Load a checkpoint into a state of the same run, on any number of ranks. Every rank must call it.

    Nothing is changed unless everything matches. Raise UserError, naming the first tensor that is missing, unexpected,
    or of another shape or dtype, or if the frozen weights differ.
    """
    parts: dict[str, dict[str, Tensor]] = _weights_of(state)

    def require_fit() -> None:
        for part, tensors in parts.items():
            place = checkpoint.path / part
            tensor_files.compare(place, tensor_files.header(place), tensors, "the run", FIX)
        parts["optimizer"] = _empty_optimizer_state(checkpoint.path / "optimizer", state)
        frozen.require(state.frozen, checkpoint.facts.frozen, checkpoint.path)

    def fill() -> None:
        for part, tensors in parts.items():
            tensor_files.fill(checkpoint.path / part, tensors)

    agreement.gather_results(require_fit)
    agreement.gather_results(fill)
    optimizer_state = _by_parameter_index(parts["optimizer"], state)
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": optimizer_state})
    facts = checkpoint.facts
    state.step = facts.step
    state.images = facts.images
    state.skips = facts.skips
    state.trend = facts.trend


def parts_of(state: State) -> dict[str, dict[str, Tensor]]:
    """Return this rank's tensors of a checkpoint, by part and name."""
    # Get the weights first: a state dict reshards the gathered weights, and the optimizer state is keyed by shards.
    parts = _weights_of(state)
    names: dict[Tensor, str] = {p: name for name, p in state.net.named_parameters()}
    optimizer_state: dict[str, Tensor] = {}
    # A parameter that never had a gradient has no state.
    for p, values in state.optimizer.state.items():
        for key, value in values.items():
            optimizer_state[f"{key}.{names[p]}"] = value
    return {**parts, "optimizer": optimizer_state}


def _weights_of(state: State) -> dict[str, dict[str, Tensor]]:
    """Return the trained weights of the network and of its averages, by part and name."""
    parts = {"net": frozen.trained_state_dict(state.net)}
    for key, average in state.averages.items():
        parts[f"ema-{key}"] = frozen.trained_state_dict(state.net, average.module)
    return parts


def _empty_optimizer_state(place: Path, state: State) -> dict[str, Tensor]:
    """Return uninitialized tensors for the optimizer state in a checkpoint, each sharded like its parameter.

    Raise UserError if another optimizer wrote it.
    """
    saved = tensor_files.header(place)
    parameters = dict(state.net.named_parameters())
    names = {p: name for name, p in parameters.items()}
    empty: dict[str, Tensor] = {}
    for group in state.optimizer.param_groups:
        names_in_group = {names[p] for p in group["params"]}
        keys: set[str] = set()
        saved_names: set[str] = set()
        for full_name in saved:
            key, _, name = full_name.partition(".")
            if name in names_in_group:
                keys.add(key)
                saved_names.add(name)
        # The parameters of a group have the same keys. Muon's matrices only have a momentum, whatever the file
        # contains.
        if STACK_KEY in group:
            keys = {MOMENTUM_KEY}
        for key, name in product(keys, saved_names):
            template = _state_template(state.optimizer, key, parameters[name])
            empty[f"{key}.{name}"] = torch.empty_like(template, requires_grad=False)
    tensor_files.compare(place, saved, empty, "the run", FIX)
    return empty


def _state_template(optimizer: torch.optim.Optimizer, key: str, p: Tensor) -> Tensor:
    """Return a tensor with the shape, dtype and sharding of entry `key` of the optimizer state of parameter p."""
    if key == "step":
        return torch.zeros(())
    return optimizer.empty_state(key, p) if isinstance(optimizer, AdamW8bitOptimizer) else p


def _by_parameter_index(flat: Mapping[str, Tensor], state: State) -> dict[int, dict[str, Tensor]]:
    """Return the optimizer state in torch's format, by the index of each parameter in the optimizer's groups."""
    names = {p: name for name, p in state.net.named_parameters()}
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    indices = {names[p]: index for index, p in enumerate(parameters)}
    by_index: dict[int, dict[str, Tensor]] = {}
    for full_name, value in sorted(flat.items()):
        key, _, name = full_name.partition(".")
        by_index.setdefault(indices[name], {})[key] = value
    return by_index


def find_nonfinite(parts: Parts, net: nn.Module) -> str | None:
    """Return the part and name of the first tensor with a value that is not finite; None if all are finite.

    In buffers only NaN counts, because a mask may contain infinities by design, and broken running statistics become
    NaN. Synchronizes each device once. Every rank must call it and gets the same result.
    """
    buffers = {name for name, _ in net.named_buffers(remove_duplicate=False)}
    flags_by_device: dict[torch.device, dict[str, Tensor]] = {}
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            x = layout.local_tensor(tensor.detach())
            if x.is_floating_point() and x.numel():
                # Both ends are NaN if any value is NaN. This is nine times as fast as isfinite.
                ends = torch.stack(torch.aminmax(x))
                is_sound = ~ends.isnan() if name in buffers else ends.isfinite()
                flags_by_device.setdefault(x.device, {})[f"{part}: {name}"] = is_sound.all()

    def first_on_this_rank() -> str | None:
        for flags in flags_by_device.values():
            for name, is_finite in zip(flags, torch.stack([*flags.values()]).tolist(), strict=True):
                if not is_finite:
                    return name
        return None

    return next(filter(None, agreement.gather_results(first_on_this_rank)), None)


# ------------------------------------------------------------------------------------------------ folders by their step


def paths_by_step(folder: Path, suffix: str = "") -> dict[int, Path]:
    """Return the paths in `folder` named step-N and `suffix`, by step in ascending order.

    Raise OSError if the folder cannot be read, or is a broken link, because its disk may be missing.
    """
    pattern = re.compile(rf"step-(\d+){re.escape(suffix)}")
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        if folder.is_symlink():
            raise
        return {}
    paths: dict[int, Path] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if match:
            paths[int(match[1])] = folder / name
    return dict(sorted(paths.items()))


def folder_of(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint. Rename it first, so that a partially removed folder is never taken for a checkpoint.

    On NFS, a file that some process has mapped stays in the hidden folder until a later save. For a symbolic link, only
    the link is removed.
    """
    files.remove(checkpoint.rename(files.temp_path_for(checkpoint)))
