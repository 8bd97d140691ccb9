"""A run's net with its weights: drawn, of its own folder, of another run, or of a published file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dumo.config.code import require_same_code
from dumo.config.load import FILE, Difference, difference, differences, load
from dumo.config.spec import Run
from dumo.config.teacher import Start
from dumo.config.tree import Tree
from dumo.data import Images
from dumo.flow.generate import ROWS
from dumo.flow.path import Path as FlowPath
from dumo.flow.precision import single
from dumo.io.deferred import Deferred
from dumo.io.weights import compare, outline, sha256
from dumo.nets import Net, Pretrained
from dumo.nets.dualized import Dualized
from dumo.run import deviation, published, shipped
from dumo.run.net import deferred, drawn, require_room
from dumo.run.origin import require_own
from dumo.run.sampler import Sampler
from dumo.runtime import dist, typed
from dumo.runtime.heap import lean
from dumo.training import checkpoint, frozen, manifest
from dumo.training.spec import Train
from dumo.training.state import State
from dumo.training.state import begin as begin_training
from dumo.types import Spec, UserError

# Parts of a net that an objective asks for: another may lack them.
PRIVATE = ("heads.", "gauges.", "scalars.", "own.", "gap.")
# Fields of a net that leave it the same function.
SAME = ("net.checkpoint:", "net.dropout:", "net.route:", "net.route.share:", "net.texts.drop:")
# Fields of a net in which a subject's run may differ from its few-step run.
SUBJECT = ("net.lora.subject:", "net.lora.frozen:", "net.texts.identity:")


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
        require_room(run, device)
    net, made = sketch(run)
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


def build(run: Tree, device: torch.device | str = "cpu") -> nn.Module:
    """The net at step 0, its weights keyed by the run's seed: the same on every device.

    Raises UserError, before it is made, if the device has less memory than that.
    """
    require_room(run, device)
    if torch.device(device).type == "cpu" and not run.has_subject:
        return drawn(run)
    net, weights = sketch(run)
    return weights.fill(net, device)


def sketch(run: Tree) -> tuple[nn.Module, Deferred]:
    """The same net on the CPU, and what makes its weights one by one; one from outside has them."""
    net, weights = deferred(run)
    if run.has_subject:
        load_few_step_run(run, net, weights)
    return net, weights


def few_step_run(run: Tree) -> RunFolder:
    """The few-step run under adapters for a subject, its weights not read yet.

    Raises UserError where it is none, has another net, or other weights than when the subject's run began.
    """
    start = run.start
    assert start, "a run without one has no subject"
    source = open_run(start.source, device="cpu", fill=False)
    require_net(source.run, start, run.net, run.path, (*SAME, *SUBJECT))
    if start.sha256 not in (None, source.sha256):
        raise UserError(
            f"start.source: {start.source} has other weights ({source.weights}) than when this run began: put back "
            "its checkpoint of then, or begin a new run in another folder"
        )
    return source


def load_few_step_run(run: Tree, net: nn.Module, made: Deferred) -> None:
    """Let a net have what the few-step run trained, frozen; it is read when the net is made (`net.lora.subject`).

    Raises UserError as `few_step_run`, and where that run has other heads, or tuned other weights than the net has.
    """
    source = few_step_run(run)
    found, own = frozen.trained(source.net), net.state_dict()
    heads = {name for name in own if name.startswith(("heads.", "gap."))}
    if alien := sorted(heads ^ {name for name in found if name.startswith(("heads.", "gap."))}):
        raise UserError(
            f"start: {source.folder} and this run differ in {alien[0]}: take the objective of that run, "
            f"objective.kind={source.run.objective.kind}"
        )
    lay_in(net, made, {name: partial(source.made.made, x) for name, x in found.items()})
    there, here = source.run.net, run.net
    assert isinstance(there, Pretrained)
    assert isinstance(here, Pretrained)
    if there.lora and here.lora and there.lora.frozen == here.lora.frozen:
        now = frozen.digest(net, made.made, without=found)
        frozen.require(now, manifest.read(source.checkpoint).frozen, source.folder)


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
        net, made = sketch(run)
    else:
        net, made = build(run, device), None
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
    net, made = sketch(run)
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
