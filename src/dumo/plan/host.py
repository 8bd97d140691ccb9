"""The memory that a run takes of its host: of each process, and of a node, at the most in each phase.

What is counted, for a rank that holds a share of the weights w, gradients, optimizer's memory o and averages a
(`dumo.run.memory`):

    start         on a CPU what it keeps, w + a; the largest tensor, made whole to be cut or moved to a GPU; weights of
                  16 bits twice, for they are in 32 until averages are made
    first step    on a CPU all that `dumo.plan.cluster` counts for a step, but o, which comes with its update
    examination   before the first checkpoint, on a CPU w, a, o and gradients; of several ranks the net in one piece;
                  weights in float64 (`float64.copied_bytes`). Nothing where no slope is taken
    save          on a CPU w, a, o and gradients; the copy that is written (`memory.checkpoint_bytes`)
    step          on a CPU all that is counted for a step; that copy, whose memory is kept
    resume        as start, with o
    export        of one process: the net that is shown, in float32, and with adapters a copy that they are added to
                  (not of a LoRA alone); the largest tensor where ranks wrote it

On a GPU what is kept is the GPU's: then the largest tensor and the copy count alone. PROCESS is on top: Python, torch,
diffusers, peft. A mapped base counts as if it were read. Not counted: rows of texts (`net.texts.memory`), images in
memory (`data.memory`), a milestone, whole on rank 0, and what a pass of an examination takes, of two rows.
"""

from collections.abc import Mapping

from torch import nn

from dumo.autodiff.float64 import copied_bytes
from dumo.nets.adapter import adapters
from dumo.nets.lowbit import saved
from dumo.run.memory import HeldBytes
from dumo.training.layout import share_of
from dumo.training.spec import Train

DEVICES = ("GPU", "CPU")  # that a run is trained on
PROCESS = 430 * 10**6  # bytes, measured: docs/guarantees.md
GB = 1e9  # bytes
PER_NODE = 8  # ranks of a node, at most: ours


def host(
    net: nn.Module,
    train: Train,
    ranks: int,
    held: HeldBytes,
    copy: int,
    step: int,
    device: str,
    *,
    has_slope: bool,
) -> dict[str, dict[str, int]]:
    """Bytes of each process, and of a node, by phase.

    `net` is an outline, `held` what its training holds, `copy` the bytes of a checkpoint that a rank copies, `step` the
    bytes of a step, `device` one of DEVICES, `has_slope` whether the objective takes a derivative, to be examined.
    """
    on_gpu = device == "GPU"
    examined = 0
    if on_gpu:
        kept = HeldBytes(0, 0, 0, 0)
        step = 0
    else:
        if has_slope:
            examined = copied_bytes(net)
            if ranks > 1:
                examined += held.weights
        kept = held.part(share_of(train.share, ranks))
    largest = max((p.nbytes for p in net.parameters()), default=0)
    largest_made_whole = largest if on_gpu or ranks > 1 else 0
    largest_exported = largest if ranks > 1 else 0
    rounded_weights = 0  # those of 16 bits, which are in 32 until averages are made
    exported_weights = held.weights
    if train.weights == "bfloat16":
        rounded_weights = kept.weights
        exported_weights *= 2
    merged_weights = 0
    if adapters(net):
        parameters = sum(p.numel() for p in net.parameters()) + saved(net)
        merged_weights = 4 * parameters  # in float32: `adapter.merge`
    start = kept.weights + kept.averages + largest_made_whole
    processes = {
        "start": start + rounded_weights + PROCESS,
        "first step": max(step - kept.optimizer, kept.total) + PROCESS,
        "examination": kept.total + examined + PROCESS,
        "save": kept.total + copy + PROCESS,
        "step": step + copy + PROCESS,
        "resume": start + kept.optimizer + PROCESS,
        "export": exported_weights + merged_weights + largest_exported + PROCESS,
    }
    node: dict[str, int] = {}
    for phase, size in processes.items():
        node[phase] = size if phase == "export" else size * min(ranks, PER_NODE)
    return {"process": processes, "node": node}


def line(host_bytes: Mapping[str, Mapping[str, Mapping[str, int]]], device: str) -> tuple[str, str]:
    """A line of a plan, a name and a text, on the host of a device; `host_bytes` has what `host` returns, by device."""
    phases = host_bytes[device]
    process = ", ".join(f"{phase} {size / GB:.1f}" for phase, size in phases["process"].items())
    node = max(phases["node"].values())
    return f"host of a {device}", f"GB of a process: {process}; {node / GB:.1f} of a node"
