"""Weights outside of checkpoints: milestones, and the best weights of a run, each in one safetensors file.

    milestones/step-00000200.safetensors   the weights that are sampled at a step of train.milestones; all stay

`save_weights` gathers them on rank 0. Their metadata have facts and a checksum (`dumo.io.tensor_files.write_weights`).
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
    """Write the sampled weights (of the first average, else the net) as this step's milestone; return its path.

    `run` is the identity of the run. Every rank must call it. Raises as `save_weights`.
    """
    return save_weights(folder, state, state.sampled_net, "milestone", run)


def save_weights(folder: Path, state: State, module: nn.Module, kind: str, run: str = "", **facts: object) -> Path:
    """Write the trained weights of the net, or of its average `module`, as one file of this step; return its path.

    The file says its kind, its step, the identity of its run, `run`, and `facts`. Replaces an older one. Every rank
    must call it. Raises OSError on all ranks if the disk is full; the older file then stays.
    """
    target = folder / f"{folder_of(state.step)}.safetensors"
    whole = tensor_files.unshared(_gather_on_main_rank(frozen.trained_state_dict(state.net, module)))

    def write() -> None:
        with atomic_write(target, writer="", durable=True) as temp_path:
            tensor_files.write_weights(temp_path, whole, kind=kind, step=state.step, run=run, **facts)

    agreement.on_main_rank(write)
    return target


def milestones(folder: Path) -> dict[int, Path]:
    """The milestones in `folder` by step, in order."""
    return paths_by_step(folder, ".safetensors")


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
