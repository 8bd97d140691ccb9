"""Checkpoints: what a run needs to go on, bit for bit, in safetensors and JSON only.

    checkpoints/step-00001000/   net.safetensors  ema-<decay>.safetensors ...  optimizer.safetensors  state.json
    milestones/step-00000200.safetensors

The optimizer's tensors are named `<state name>.<parameter name>`. A milestone is the weights alone that are shown after
a step, and stays. Each is written in a hidden place, flushed to the disk, then renamed: so what is named `step-...` is
always whole, whenever the process or the machine stops.
"""

import json
import re
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from dumo import dist
from dumo.io import file as files
from dumo.io.weights import compare, load, notes
from dumo.training.state import State
from dumo.types import UserError

FIT = "resume with the spec that wrote it"  # the way out for weights of another net


def save(folder: Path, state: State, keep: int) -> Path:
    """Write the checkpoint of this step into `folder`, then drop all but the last `keep`; return its path.

    A step that already stands is left alone. Raises UserError if the disk is full; the older checkpoints then stand.
    """
    target = folder / f"step-{state.step:08d}"
    if not target.exists():
        with made(target, "checkpoint", state.step) as temp:
            write(temp, state)
    older = [path for step, path in standing(folder).items() if step <= state.step]
    for old in older[:-keep]:
        shutil.rmtree(old.rename(files.hidden(old)))  # hidden first: half a checkpoint must not look like one
    return target


def mark(folder: Path, state: State) -> Path:
    """Write the weights that are shown, the first average or the net's own, as this step's milestone; return its path.

    One that stands is replaced. Raises UserError if the disk is full; what stood before then still stands.
    """
    target = folder / f"step-{state.step:08d}.safetensors"
    with made(target, "milestone", state.step) as temp:
        about = {"step": str(state.step)}  # and nothing else: two entries come in either order, so not the same bytes
        safetensors.torch.save_file(apart(state.shown.state_dict()), temp, metadata=about)
    return target


def milestones(folder: Path) -> dict[int, Path]:
    """The milestones in `folder` by step, the first one first."""
    return standing(folder, ".safetensors")


def latest(folder: Path) -> Path | None:
    """The checkpoint of the most steps in `folder`, or None."""
    return next(reversed(standing(folder).values()), None)


def restore(checkpoint: Path, state: State) -> None:
    """Load a checkpoint into a state built from the same spec; nothing is changed unless all of it fits.

    Raises UserError naming the file and the first tensor that is missing, unknown, or of another shape or dtype.
    """
    modules = {"net": state.net} | {f"ema-{decay}": average.module for decay, average in state.averages.items()}
    weights = {name: load(checkpoint / f"{name}.safetensors") for name in modules}
    for name, module in modules.items():
        compare(checkpoint / f"{name}.safetensors", weights[name], module.state_dict(), "the run", FIT)
    memory = unflatten(checkpoint / "optimizer.safetensors", state)
    step, images = counts(checkpoint / "state.json")

    for name, module in modules.items():
        module.load_state_dict(weights[name])
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": memory})
    state.step, state.images = step, images


def write(folder: Path, state: State) -> None:
    """Write all files of a checkpoint."""
    folder.mkdir()
    tensors = {"net": state.net.state_dict(), "optimizer": flatten(state)}
    tensors |= {f"ema-{decay}": average.module.state_dict() for decay, average in state.averages.items()}
    for name, named in tensors.items():
        safetensors.torch.save_file(apart(named), folder / f"{name}.safetensors", metadata={"format": "pt"})
    about = {"step": state.step, "images": state.images, "versions": dist.versions()}
    (folder / "state.json").write_text(json.dumps(about, indent=2) + "\n")


@contextmanager
def made(target: Path, kind: str, step: int) -> Generator[Path, None, None]:
    """Yield a hidden place to write to, which becomes `target` once all of it is on the disk (`dumo.io.file.whole`).

    Raises UserError if the disk is full, saying of which kind and step nothing was written.
    """
    folder = target.parent
    for left in folder.glob(".step-*.tmp"):
        files.remove(left)
    try:
        with files.whole(target, writer="", durable=True) as temp:
            yield temp
    except Exception as error:
        if files.full(error):
            last = next(reversed(standing(folder, target.suffix).values()), None)
            raise UserError(
                f"{folder}: the disk is full, so the {kind} of step {step} was not written; "
                f"{last.name if last else f'no {kind}'} still stands. Free some space and start again."
            ) from error
        raise


def step_of(file: Path, default: int) -> int:
    """The step that weights are of: as the file says, else as the checkpoint it lies in does, else the default."""
    step = notes(file).get("step", "")
    if step.isdecimal():
        return int(step)
    beside = file.with_name("state.json")
    return counts(beside)[0] if beside.is_file() else default


def flatten(state: State) -> dict[str, Tensor]:
    """The optimizer's memory as `<state name>.<parameter name>`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in state.net.named_parameters()}
    memory = state.optimizer.state
    return {f"{key}.{names[p]}": value for p, values in memory.items() for key, value in values.items()}


def unflatten(file: Path, state: State) -> dict[int, dict[str, Tensor]]:
    """The optimizer's memory as torch numbers it: by the place of each parameter in its groups.

    A parameter that never had a gradient has no memory. Raises UserError as `restore` does.
    """
    found, parameters = load(file), dict(state.net.named_parameters())
    keys = sorted({name.partition(".")[0] for name in found})
    named = sorted({name.partition(".")[2] for name in found} & parameters.keys())
    scalar = torch.zeros(())
    like = {f"{key}.{name}": scalar if key == "step" else parameters[name] for key in keys for name in named}
    compare(file, found, like, "the run", FIT)

    names = {parameter: name for name, parameter in parameters.items()}
    order = [names[p] for group in state.optimizer.param_groups for p in group["params"]]
    return {i: {key: found[f"{key}.{name}"] for key in keys} for i, name in enumerate(order) if name in named}


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values as safetensors wants them: contiguous, and no two in one memory (tied weights are cloned)."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().contiguous()
        place = whole.untyped_storage().data_ptr()
        out[name] = whole.clone() if place in seen else whole
        seen.add(place)
    return out


def counts(file: Path) -> tuple[int, int]:
    """Steps and images from a checkpoint's `state.json`. Raises UserError if it is damaged."""
    try:
        about = json.loads(file.read_text())
        return int(about["step"]), int(about["images"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is missing or damaged ({error}): remove that checkpoint to resume earlier") from error


def standing(folder: Path, suffix: str = "") -> dict[int, Path]:
    """The whole checkpoints in `folder`, or its files of this suffix, by step, the first one first."""
    name = re.compile(rf"step-(\d+){re.escape(suffix)}")
    found = {int(match[1]): path for path in folder.glob("step-*") if (match := name.fullmatch(path.name))}
    return dict(sorted(found.items()))
