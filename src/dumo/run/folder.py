"""A run's folder: claimed and held, gone on with where its last checkpoint stands, and opened to read."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dumo.data import Images
from dumo.flow.generate import ROWS
from dumo.flow.path import Path as FlowPath
from dumo.flow.precision import single
from dumo.io import file as files
from dumo.io.weights import compare, outline, sha256
from dumo.nets import Net
from dumo.nets.dualized import Dualized
from dumo.run import deviation, published, shipped
from dumo.run.config.load import FILE, Difference, Written, difference, differences, dump, load
from dumo.run.config.resolve import require_same_code
from dumo.run.config.source import Noted, noted
from dumo.run.config.spec import Run
from dumo.run.config.teacher import Start
from dumo.run.origin import newest, require_own, require_same
from dumo.run.sampler import Sampler
from dumo.runtime import dist, typed
from dumo.runtime.heap import lean
from dumo.training import checkpoint, frozen, manifest
from dumo.training.deferred import Deferred
from dumo.training.log import read_log
from dumo.training.spec import Train
from dumo.training.state import State
from dumo.training.state import begin as begin_training
from dumo.types import Spec, UserError

LOCK = ".training.lock"  # a file that is held, and there, while the run is trained
NO_CHECKPOINT_YET = ".unsaved"  # empty file: from before the first step until the first checkpoint is written
CHECKPOINT_WRITTEN = ".saved"  # the same file from then on, renamed: a run without a checkpoint has lost it
# Parts of a net that an objective asks for: another may lack them.
PRIVATE = ("heads.", "gauges.", "scalars.", "own.", "gap.")
WRITTEN = (FILE, "data.json", "metrics.jsonl")  # by training, at the top of the folder
# Fields of a net that leave it the same function.
SAME = ("net.checkpoint:", "net.dropout:", "net.route:", "net.route.share:", "net.texts.drop:")


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, opened to read: the net that is shown (the first average), and where it stands."""

    run: Run
    folder: Path
    net: nn.Module
    step: int
    weights: str  # the file or folder of shards they came from, relative to the run's folder where it lies inside
    file: Path = Path()  # that file or folder
    checkpoint: Path = Path()  # the last one that is whole
    listed: str | None = None  # the SHA-256 that the checkpoint lists for the file; None: it lists none
    made: Deferred = field(default_factory=Deferred)  # makes the weights of a net that was not filled

    @cached_property
    def sha256(self) -> str:
        """The weights' SHA-256; where listed, known even after a concurrent training has removed the checkpoint."""
        return self.listed or sha256(self.file)

    @property
    def device(self) -> torch.device:
        """Where the net is."""
        return next(self.net.parameters()).device

    @cached_property
    def sampler(self) -> Sampler:
        """The net with all that its samples depend on."""
        return sampler(self.run, self.net)


def sampler(run: Run, net: nn.Module) -> Sampler:
    """A run's net with all that its samples depend on, made with no more rows at a time than it was trained with."""
    rows = min(ROWS, run.train.micro_batch or run.train.batch)
    return Sampler(net, run.objective, run.path, run.data, run.sample, run.precision, rows)


def open_run(
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    weights: str | None = None,
    device: str = "auto",
    fill: bool = True,
) -> RunFolder:
    """Open a run's folder, or by name a run that comes with dumo, to sample or judge it.

    `weights` are a file, or a folder of shards, other than it shows. Where it is trained meanwhile, a checkpoint may go
    while it is read: then a newer one is taken. Without `fill` `made` is left to read the weights. Raises UserError
    where it is none, or has no checkpoint yet, or none that is whole.
    """
    folder = shipped.find(source)
    if not (folder / FILE).is_file():
        raise UserError(
            f"{source} is no run's folder (it has no {FILE}): train one first, e.g. dumo train digits, or take "
            f"{' or '.join(shipped.names())}, which dumo brings"
        )
    run = load(folder, overrides)
    require_same_code(run, run.resolved, folder)
    if overrides:
        require_trained(load(folder), run, folder)
    while True:
        there = [*checkpoint.standing(folder / "checkpoints")]
        try:
            return open_weights(run, folder, weights, dist.device(device), fill=fill)
        except (UserError, OSError):
            if there == [*checkpoint.standing(folder / "checkpoints")]:
                raise


def require_trained(there: Run, run: Run, folder: Path) -> None:
    """Raise UserError where a run is opened with other fields than may be set, or its images lie where others are."""
    if differs := list(difference(there, run)):
        raise UserError(f"these fields of {folder} are as they were trained:\n  " + "\n  ".join(differs))
    if isinstance(run.data, Images) and run.data != there.data:
        undecoded = run.data.model_copy(update={"memory": 0.0, "buckets": None})  # its images are not looked at
        then, now = deviation.fingerprint(folder), undecoded.open().fingerprint()
        if then not in (None, now):
            raise UserError(
                f"data.root: {run.data.root} has other images than {folder} was trained on (fingerprint {now}, and "
                f"{then} in {deviation.FILE}): say where those are"
            )


def open_weights(run: Run, folder: Path, weights: str | None, device: torch.device, *, fill: bool = True) -> RunFolder:
    """The run with the weights that it shows now, or with others. Raises as `open_run`."""
    last = checkpoint.latest(folder / "checkpoints", {shown(run.train)} if weights is None else ())
    if last is None:
        raise UserError(f"{folder} has no checkpoint yet: train it first, dumo train {typed(folder)}")
    file = checkpoint.part(last, shown(run.train)) if weights is None else Path(weights)
    if weights is not None and (wrong := manifest.fault_of(file)):
        raise UserError(f"{wrong}: take other weights")
    require_own(run, folder, last if weights is None else file)
    net, made = load_net(run, file, device if fill else None)
    name, about = str(file.relative_to(folder)) if weights is None else weights, manifest.read(last)
    frozen.require(frozen.digest(net, made.made), about.frozen, folder)
    listed = about.files.get(file.name) if weights is None else None
    step = checkpoint.step_of(file, about.step)
    return RunFolder(run, folder, net, step, name, file, last, listed and listed.sha256, made)


def shown(train: Train) -> str:
    """The part of a checkpoint that is sampled and judged: the first average, or the net without any."""
    return f"ema-{train.ema[0].key}" if train.ema else "net"


def load_net(run: Run, file: Path, device: torch.device | None) -> tuple[nn.Module, Deferred]:
    """A run's net with what was trained, from a file or a folder of shards, and what reads its weights one by one.

    On a device they are read; None: not yet. Raises UserError where they do not fit.
    """
    if device is not None:
        run.require_room(device)
    net, made = run.sketch()
    there = {name: single(x) for name, x in outline(file).items()}  # what is trained in 16 bits is shown in float32
    compare(file, there, own := frozen.trained(net), "the run", checkpoint.FIT)
    found = {name: read for name, read in checkpoint.lazily(file).items() if name in own}
    lay_in(net, made, {name: lambda read=read: single(read()) for name, read in found.items()})
    if device is not None:
        made.fill(net, device)
    return net.eval(), made


@torch.no_grad()
def lay_in(net: nn.Module, made: Deferred, found: Mapping[str, Callable[[], Tensor]]) -> None:
    """Let a net have other numbers, by name; what is not made yet is, when it is wanted."""
    own = net.state_dict()
    for name, read in found.items():
        if own[name] in made:
            made.put(own[name], read)
        else:
            own[name].copy_(read())


def claim(run: Run, folder: Path, step: int | None = None, *, accept: bool = False) -> None:
    """See that the folder is free, or holds this run with no more steps behind it than it is to make. Writes nothing.

    `step` is that of the checkpoint to go on from; None: of the last one. `accept`: fields may differ. Raises
    UserError, with the difference if not, and where it has no checkpoint of that step.
    """
    if not str(folder).isascii() and str(folder) != str(folder).encode(errors="replace").decode():
        raise UserError(f"{folder} is no name in UTF-8, and no file of weights opens there: give another with --out")
    standing = checkpoint.standing(folder / "checkpoints")
    steps = [*standing]
    if step is not None and step not in steps:
        there = f"it has those of step {', '.join(f'{n}' for n in steps)}" if steps else "it has none"
        raise UserError(f"--from {step}: {folder} has no checkpoint of that step: {there}")
    if (done := max(steps, default=0) if step is None else step) > run.train.steps:
        raise UserError(f"{folder} has {done} steps behind it, so train.steps={run.train.steps} is no more to do")
    if (folder / FILE).exists():
        there = Written(load(folder), noted(folder))
        if not steps:
            require_no_lost_checkpoint(folder, there.run.train)
        require_same(there, run, folder, newest(standing, step), accept=accept)
    elif steps:
        raise UserError(
            f"{folder / FILE} was removed: restore it (each checkpoint that is left holds a copy, "
            f"checkpoints/step-*/{manifest.RUN}), then give the same command; or give another folder with --out"
        )
    elif folder.is_dir() and any(path.name != LOCK and not ours(path) for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no {FILE}: give another folder with --out")


def require_no_lost_checkpoint(folder: Path, train: Train) -> None:
    """Raise UserError where a run's checkpoints were lost, rather than train it anew.

    The folder's mark says whether one was written; where the log is gone, too, somebody has cleared the run. Of a run
    from before there were marks, the log says so where it goes on after the first step that is saved by its number.
    """
    file = folder / "metrics.jsonl"
    if not file.exists():
        return
    if (folder / CHECKPOINT_WRITTEN).exists():
        raise UserError(
            f"{folder} had checkpoints, and {folder / 'checkpoints'} has none: bring back what it was on. To train "
            f"from the start give another folder with --out, or move {folder} away"
        )
    if (folder / NO_CHECKPOINT_YET).exists():
        return
    last = max((row["step"] for row in read_log(file)), default=0)
    if last > min(train.save_every, train.steps):  # that one is saved once the slope has been examined on it
        raise UserError(
            f"{file} reaches step {last}, and {folder / 'checkpoints'} has no checkpoint: bring back what it was on. "
            f"To train from the start give another folder with --out, or move {file} away"
        )


def ours(path: Path) -> bool:
    """Whether a file of a run's folder is what a training that was killed left half-written."""
    return path.name.startswith(tuple(f".{name}." for name in WRITTEN)) and not path.is_dir()


def sweep(folder: Path) -> None:
    """Remove what a training that was killed left half-written. The folder must be held."""
    left = [path for path in folder.iterdir() if ours(path)]
    left += [path for place in manifest.places(folder) for path in place.glob(".step-*.tmp")]
    for path in left:
        files.remove(path)


@contextmanager
def held(run: Run, folder: Path, step: int | None = None, *, accept: bool = False) -> Generator[None, None, None]:
    """Claim the folder and keep every other training out of it; folders made for nothing are removed.

    Raises UserError as `claim`, and where another process is training there.
    """
    claim(run, folder, step, accept=accept)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with files.locked(folder / LOCK, f"{folder} is being trained by another process: wait for it, or give --out"):
            claim(run, folder, step, accept=accept)  # who held it before may have left another run
            sweep(folder)
            with guard_run_folder(folder):
                yield
    finally:
        with suppress(OSError):  # it is not empty: something was written
            for path in new:
                path.rmdir()


@contextmanager
def guard_run_folder(folder: Path) -> Generator[None, None, None]:
    """While inside, refuse writes into a run's folder, or to its other disks, that was removed, renamed or unmounted.

    Raises UserError where that was tried.
    """
    guarded = [folder, *(place for place in manifest.places(folder) if is_on_other_disk(place, folder))]
    with ExitStack() as stack:
        for place in guarded:
            stack.enter_context(files.guard_path(place))
        try:
            yield
        except (OSError, SafetensorError):
            for place in guarded:  # one may have gone while a file was written, which is why that failed
                files.require_in_place(place)
            raise


def is_on_other_disk(place: Path, folder: Path) -> bool:
    """Whether a place of a run is a folder on another disk than the run's folder, by a link or a mount."""
    return place.is_dir() and place.stat().st_dev != folder.stat().st_dev


def restore_run_file(folder: Path, text: str) -> bool:
    """Write run.yaml again where it was removed during training, and return whether it was.

    Raises UserError where the run's folder is no longer in its place (`files.require_in_place`).
    """
    file = folder / FILE
    files.require_in_place(file)
    if file.is_file():
        return False
    files.write(file, text.encode(), durable=True)
    return True


def mark_no_checkpoint_yet(folder: Path) -> None:
    """Write down, before the first step, that the run has no checkpoint yet."""
    mark = folder / NO_CHECKPOINT_YET
    files.require_in_place(mark)
    mark.touch()
    files.flush(folder)


def mark_checkpoint_written(folder: Path) -> None:
    """Write down that the run has a checkpoint: from now on one that is not there was lost."""
    before = folder / NO_CHECKPOINT_YET
    mark = folder / CHECKPOINT_WRITTEN
    files.require_in_place(mark)
    if before.exists():
        before.replace(mark)
    elif mark.exists():
        return
    else:  # of a run from before there were marks
        mark.touch()
    files.flush(folder)


def note(run: Run, folder: Path, changed: Sequence[Noted] = ()) -> None:
    """Write run.yaml, complete, and what was changed in it; it is on the disk then."""
    files.write(folder / FILE, dump(run, changed).encode(), durable=True)


@lean()
def begin(run: Run, folder: Path, device: torch.device, step: int | None = None) -> tuple[State, Path | None]:
    """The state that a run goes on from, and its checkpoint: that of `step`, or the last one that is whole and finite.

    Where there is none, the state is of another run (`start`), or as drawn. Raises UserError.
    """
    places = folder / "checkpoints"
    last = checkpoint.latest(places, together=True) if step is None else checkpoint.of_step(places, step)
    if run.start and not last and not run.has_subject:
        net, made = begin_from(run, run.start)
    elif dist.world() > 1:
        net, made = run.sketch()
    else:
        net, made = run.build(device), None
    if isinstance(net, Dualized) and not (run.start or last):
        net.refit(made)
    state = begin_training(net, run.train, device, made, restored=last is not None)
    if last:
        last = checkpoint.go_on(last, state, or_before=step is None)
    return state, last


def begin_from(run: Run, start: Start) -> tuple[nn.Module, Deferred]:
    """A run's net with other weights, by name, and what reads them; a head, as `start.heads` says, with another head's.

    What the source lacks of heads, gauges and embeddings of inputs stays as drawn. Raises UserError where it has not
    the rest, or not in these shapes, and where the same weights make another function there: another net or path.
    """
    net, made = run.sketch()
    if start.kind == "run":
        found, theirs = of_run(start, run.net, run.path)
    else:
        found, theirs = published.read(start, run.net, run.path, net), Deferred()
    wanted = net.state_dict()
    there = {f"heads.{new}.": f"heads.{old}." for new, old in start.heads.items()}

    def their_name(name: str) -> str:
        new = next((new for new in there if name.startswith(new)), None)
        return name if new is None else there[new] + name.removeprefix(new)

    if lacking := [new for new, old in there.items() if not any(name.startswith(old) for name in found)]:
        have = dict.fromkeys(name.split(".")[1] for name in found if name.startswith("heads."))
        old, said = there[lacking[0]].split(".")[1], f"its heads are {', '.join(have)}" if have else "it has none"
        raise UserError(f"start.heads: {start.source} has no head '{old}', {said}")
    fits = {
        name for name, w in wanted.items() if their_name(name) in found and found[their_name(name)].shape == w.shape
    }
    alien = [
        f"{start.source} has no {name} of shape {tuple(w.shape)}"
        for name, w in wanted.items()
        if name not in fits and not name.startswith(PRIVATE)
    ]
    alien += [f"this one has no {name}" for name in found if name not in wanted and not name.startswith(PRIVATE)]
    if alien:
        raise UserError(
            f"start: the nets differ, {alien[0]}: take a run of this net.route on data of this shape and number of "
            "classes, or set start=null"
        )
    lay_in(net, made, {name: partial(theirs.made, found[their_name(name)]) for name in fits})
    return net, made


def of_run(start: Start, net: Net, path: FlowPath) -> tuple[dict[str, Tensor], Deferred]:
    """The weights of another run, and what reads them.

    Raises UserError where they make another function of this net, or on this path.
    """
    source = open_run(start.source, device="cpu", fill=False)
    require_net(source.run, start, net, path, SAME)
    return source.net.state_dict(), source.made


def require_net(source: Run, start: Start, net: Net, path: FlowPath, same: tuple[str, ...]) -> None:
    """Raise UserError where a run has another net or path, but for fields that begin as one of `same`."""
    differs = [*differing("net", source.net, net), *differing("path", source.path, path)]
    same = same if "r" in source.objective.needs.names else (*same, "net.late:")  # of r no block knew
    if differs := [line for line in differs if not line.startswith(same)]:
        raise UserError(
            f"start: the nets differ, {start.source} has another {'; '.join(differs)}: set these fields as they are "
            "there, or start=null"
        )


def differing(name: str, was: Spec, now: Spec) -> list[str]:
    """A line per field in which two parts of a run of this name differ."""
    if type(was) is type(now):
        return [str(one) for one in differences(was, now, f"{name}.")]
    return [str(Difference(name, was.model_dump(mode="json"), now.model_dump(mode="json"), may=False))]
