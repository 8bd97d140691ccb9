"""Save weights outside of checkpoints: milestones and best weights, each in one safetensors file.

    milestones/step-00000200.safetensors   the sampled weights at a step of train.milestones; never removed

`save_weights` gathers the weights on rank 0. The metadata contain facts and a checksum
(`dumo.io.tensor_files.write_weights`).
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from dumo.io import tensor_files
from dumo.io.file import atomic_write
from dumo.runtime import dist
from dumo.training import agreement, frozen, layout
from dumo.training.checkpoint import folder_of, paths_by_step
from dumo.training.state import State


def save_milestone(folder: Path, state: State, run: str = "") -> Path:
    """Write the sampled weights (the first average, or else the net) as this step's milestone; return its path.

    `run` is the config hash of the run. Every rank must call it.
    """
    return save_weights(folder, state, state.sampled_net, "milestone", run)


def save_weights(folder: Path, state: State, module: nn.Module, kind: str, run: str = "", **facts: object) -> Path:
    """Write the trained weights of the net, or of its average `module`, to one file of this step; return its path.

    The metadata contain kind, step, `run` (the config hash) and `facts`. An existing file is replaced. Every rank must
    call it. Raise OSError on all ranks if the disk is full; an existing file is then kept.
    """
    target = folder / f"{folder_of(state.step)}.safetensors"
    whole = tensor_files.unshared(_gather_on_main_rank(frozen.trained_state_dict(state.net, module)))

    def write() -> None:
        with atomic_write(target, writer="", durable=True) as temp_path:
            tensor_files.write_weights(temp_path, whole, kind=kind, step=state.step, run=run, **facts)

    agreement.on_main_rank(write)
    return target


def milestones(folder: Path) -> dict[int, Path]:
    """Return the milestones in `folder` by step, in ascending order."""
    return paths_by_step(folder, ".safetensors")


def _gather_on_main_rank(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the full tensors on rank 0, and nothing on other ranks. Every rank must call it."""
    if dist.world() == 1:
        return dict(tensors)
    gathered: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = layout.full_tensor(tensor)
        if dist.is_main():
            gathered[name] = whole.cpu()
    return gathered
