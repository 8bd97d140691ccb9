"""The memory that a run takes of its host: of each process, and of a node, at the most in each phase.

What is counted, for a rank that holds a share of the weights w, gradients, optimizer's memory o and averages a:

    start     on a CPU what it keeps, w + a; the largest tensor, made whole to be cut or moved to a GPU
    step      on a CPU all that `dumo.run.plan.cluster` counts for a step
    save      of one process w, a and o, and gradients; ranks write a part of a checkpoint from two copies of it, more
              than one process, which writes it as it lies
    resume    as start, with o
    export    of one process: the net that is shown; four of it where ranks wrote it, for its hash is that of one file

On a GPU what is kept is the GPU's: then the largest tensor, and what is copied to be written, count alone. PROCESS is
on top, of a process itself: Python, torch, diffusers, peft; MEETING of one of several ranks. Pages of files that are
mapped are the system's. Not counted: rows of texts (`net.texts.memory`), images in memory (`data.memory`), a milestone,
whole on rank 0, and an examination of the slope on a CPU, on copies of the net.
"""

from collections.abc import Mapping

from torch import nn

from dumo.training.layout import share_of
from dumo.training.spec import Train

DEVICES = ("GPU", "CPU")
PROCESS = 430 * 10**6  # bytes, measured: docs/pretrained.md#memory
MEETING = 120 * 10**6  # bytes more of one that meets others: what makes the measured start of two
GB = 1e9
PER_NODE = 8  # ranks of a node, at most
COPIES = 2  # of a part of a checkpoint, by torch.distributed.checkpoint and safetensors


def host(
    net: nn.Module, train: Train, ranks: int, held: Mapping[str, int], step: int, device: str
) -> dict[str, dict[str, int]]:
    """Bytes of each process, and of a node, by phase; `held` are as `plan.held` says, `step` the bytes of a step.

    `net` is an outline, `device` one of DEVICES.
    """
    gpu = device == "GPU"
    share, least = share_of(train.share, ranks), max((p.nbytes for p in net.parameters()), default=0)
    frozen = sum(p.nbytes for p in net.parameters() if not p.requires_grad)
    kept, learned = (held["weights"] + held["averages"]) // share, held["weights"] - frozen
    optimizer, largest = held["optimizer"] // share, max(held["optimizer"], learned) // share
    written = (COPIES if ranks > 1 else 0) * largest + (largest if gpu else 0)
    stays = 0 if gpu else kept
    own = {
        "start": stays + (least if gpu or ranks > 1 else 0),
        "step": 0 if gpu else step,
        "save": written + (0 if gpu else kept + optimizer + held["gradients"] // share),
        "resume": (least if gpu or ranks > 1 else 0) + (0 if gpu else kept + optimizer),
        "export": held["weights"] * (4 if ranks > 1 else 1),
    }
    meets = MEETING if ranks > 1 else 0
    processes = {name: size + PROCESS + (0 if name == "export" else meets) for name, size in own.items()}
    node = {name: size * (1 if name == "export" else min(ranks, PER_NODE)) for name, size in processes.items()}
    return {"process": processes, "node": node}


def line(found: Mapping[str, Mapping[str, Mapping[str, int]]], device: str) -> tuple[str, str]:
    """What a plan says of the host of such a device."""
    here = found[device]
    each = ", ".join(f"{name} {size / GB:.1f}" for name, size in here["process"].items())
    most = max(here["node"].values())
    return f"host of a {device}", f"GB of a process: {each}; {most / GB:.1f} of a node"
