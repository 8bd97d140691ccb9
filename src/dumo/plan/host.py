"""The memory that a run takes of its host: of each process, and of a node, at the most in each phase.

What is counted, for a rank that holds a share of the weights w, gradients, optimizer's memory o and averages a:

    start         on a CPU what it keeps, w + a; the largest tensor, made whole to be cut or moved to a GPU; weights of
                  16 bits twice, for they are in 32 until averages are made
    first step    on a CPU all that `dumo.plan.cluster` counts for a step, but o, which comes with its update
    save          on a CPU w, a, o and gradients; the copy that is written (`dumo.plan.plan.copied`)
    step          on a CPU all that is counted for a step; that copy, whose memory is kept
    resume        as start, with o
    export        of one process: the net that is shown, in float32, and with adapters a copy that they are added to
                  (not of a LoRA alone); the largest tensor where ranks wrote it

On a GPU what is kept is the GPU's: then the largest tensor and the copy count alone. PROCESS is on top: Python, torch,
diffusers, peft. A mapped base counts as if it were read. Not counted: rows of texts (`net.texts.memory`), images in
memory (`data.memory`), a milestone, whole on rank 0, and an examination of the slope on a CPU, on copies of the net.
"""

from collections.abc import Mapping

from torch import nn

from dumo.nets.adapter import adapters
from dumo.nets.lowbit import saved
from dumo.training.layout import share_of
from dumo.training.spec import Train

DEVICES = ("GPU", "CPU")
PROCESS = 430 * 10**6  # bytes, measured: docs/guarantees.md
GB = 1e9
PER_NODE = 8  # ranks of a node, at most


def host(
    net: nn.Module, train: Train, ranks: int, held: Mapping[str, int], copy: int, step: int, device: str
) -> dict[str, dict[str, int]]:
    """Bytes of each process, and of a node, by phase; `held` are as `plan.held` says, `step` the bytes of a step.

    `net` is an outline, `copy` the bytes of a checkpoint that a rank copies, `device` one of DEVICES.
    """
    share, gpu = share_of(train.share, ranks), device == "GPU"
    largest = max((p.nbytes for p in net.parameters()), default=0) if gpu or ranks > 1 else 0
    here = dict.fromkeys(held, 0) if gpu else {name: size // share for name, size in held.items()}
    step, kept = 0 if gpu else step, here["weights"] + here["averages"]
    after = kept + here["gradients"] + here["optimizer"]  # all that stays after an update
    halved = train.weights == "bfloat16"
    numbers = sum(p.numel() for p in net.parameters()) + saved(net)
    added = 4 * numbers if adapters(net) else 0  # in float32: `adapter.merge`
    processes = {
        "start": kept + halved * here["weights"] + largest + PROCESS,
        "first step": max(step - here["optimizer"], after) + PROCESS,
        "save": after + copy + PROCESS,
        "step": step + copy + PROCESS,
        "resume": kept + here["optimizer"] + largest + PROCESS,
        "export": (1 + halved) * held["weights"] + added + (largest if ranks > 1 else 0) + PROCESS,
    }
    node = {name: size * (1 if name == "export" else min(ranks, PER_NODE)) for name, size in processes.items()}
    return {"process": processes, "node": node}


def line(found: Mapping[str, Mapping[str, Mapping[str, int]]], device: str) -> tuple[str, str]:
    """What a plan says of the host of such a device."""
    here = found[device]
    each = ", ".join(f"{name} {size / GB:.1f}" for name, size in here["process"].items())
    most = max(here["node"].values())
    return f"host of a {device}", f"GB of a process: {each}; {most / GB:.1f} of a node"
