"""Where a run begins: at its last checkpoint, with the weights of another run, or anew."""

from pathlib import Path

import torch
from torch import nn

from dumo.config.load import difference
from dumo.config.spec import Run
from dumo.config.teacher import Start
from dumo.run.folder import open_run
from dumo.training import checkpoint
from dumo.training.state import State
from dumo.training.state import begin as begin_training
from dumo.types import UserError

PRIVATE = ("heads.", "gauges.", "scalars.", "own.")  # parts of a net that an objective asks for: another may lack them
SAME = ("net.checkpoint:", "net.dropout:")  # fields of a net that leave it the same function


def begin(run: Run, folder: Path, device: torch.device) -> State:
    """The state that a run goes on from. Raises UserError where it has more steps behind it than it is to make."""
    last = checkpoint.latest(folder / "checkpoints")
    net = begin_from(run, run.start, device) if run.start and not last else run.build(device)
    state = begin_training(net, run.train)
    if last:
        checkpoint.restore(last, state)
    if state.step > run.train.steps:
        raise UserError(f"{folder} has {state.step} steps behind it, so train.steps={run.train.steps} is no more to do")
    return state


def begin_from(run: Run, start: Start, device: torch.device) -> nn.Module:
    """A run's net with the weights of another, by name; a head, as `start.heads` says, with another head's.

    What the source lacks of heads, gauges and embeddings of inputs stays as drawn. Raises UserError where it has not
    the rest, or not in these shapes, and where the same weights make another function there: another net or path.
    """
    source = open_run(start.source, weights=start.weights, device=str(device))
    differs = [line for line in difference(source.run, run) if line.startswith(("net", "path"))]
    if differs := [line for line in differs if not line.startswith(SAME)]:
        raise UserError(
            f"start: the nets differ, {start.source} has another {'; '.join(differs)}: set these fields as they are "
            "there, or start=null"
        )
    net = run.build(device)
    found, wanted = source.net.state_dict(), net.state_dict()
    there = {f"heads.{new}.": f"heads.{old}." for new, old in start.heads.items()}

    def named(name: str) -> str:
        new = next((new for new in there if name.startswith(new)), None)
        return name if new is None else there[new] + name.removeprefix(new)

    if lacking := [new for new, old in there.items() if not any(name.startswith(old) for name in found)]:
        old, have = there[lacking[0]].split(".")[1], ", ".join(source.run.objective.needs.heads)
        raise UserError(f"start.heads: {start.source} has no head '{old}', its heads are {have}")
    fits = {name for name, w in wanted.items() if named(name) in found and found[named(name)].shape == w.shape}
    if alien := [name for name in wanted if name not in fits and not name.startswith(PRIVATE)]:
        raise UserError(
            f"start: the nets differ, {start.source} has no {alien[0]} of shape {tuple(wanted[alien[0]].shape)}: take "
            "a run on data of this shape and number of classes, or set start=null"
        )
    net.load_state_dict(wanted | {name: found[named(name)] for name in fits})
    return net
