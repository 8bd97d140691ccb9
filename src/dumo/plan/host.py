"""The memory of a machine's host that a run takes: of each process, and of a node, at most in each phase.

`host_bytes` counts it for a training on GPUs and for one on CPUs, and `line` writes the counts as a line of a plan. A
rank holds its share of the weights w, of the gradients, of the optimizer's memory o and of the averages a
(`dumo.run.memory`). The phases of a run are:

    start         on a CPU w + a; the largest tensor, made whole to be cut or moved to a GPU; weights of 16 bits twice,
                  because they are in 32 until averages are made
    first step    on a CPU all that `dumo.plan.cluster` counts for a step, less o, which its update makes
    examination   before the first checkpoint, on a CPU w, a, o and gradients; with several ranks the net in one piece;
                  weights in float64 (`float64.copied_bytes`). Nothing where the objective takes no derivative
    save          on a CPU w, a, o and gradients; the copy of a checkpoint that is written (`memory.checkpoint_bytes`)
    step          on a CPU all that is counted for a step; that copy, whose memory stays for the next save
    resume        as the start, and o
    export        of one process: the net that samples are made with, in float32; with adapters a copy that they are
                  added to (not of a LoRA alone); with several ranks the largest tensor

On a GPU the training lies in the GPU's memory. The host then takes the largest tensor and the copy of a checkpoint.
PROCESS is on top: Python, torch, diffusers, peft. A mapped base counts as if it were read.

Not counted: rows of texts that stay on the host (`net.texts.memory`), images in memory (`data.memory`), a milestone,
which rank 0 writes in one piece, and the activations of an examination, of two rows.
"""

from torch import nn

from dumo.autodiff.float64 import copied_bytes
from dumo.nets.adapter import adapters
from dumo.run.memory import HeldBytes
from dumo.run.net import num_parameters
from dumo.runtime.limits import GIGABYTE
from dumo.training.layout import share_of
from dumo.training.spec import Train

DEVICES = ("GPU", "CPU")  # that a run may be trained on
PROCESS = 430 * 10**6  # bytes that a process takes before it trains, measured: docs/guarantees.md
_FLOAT32_BYTES = 4
_MAX_RANKS_PER_NODE = 8  # ours

# bytes by device, then by "process" (each of them) or "node" (all its ranks), then by phase
HostBytes = dict[str, dict[str, dict[str, int]]]


def host_bytes(
    net: nn.Module,
    train: Train,
    *,
    ranks: int,
    held: HeldBytes,
    checkpoint_copy: int,
    step: int,
    has_slope: bool,
) -> HostBytes:
    """Count the bytes of host memory that a training takes, on each of DEVICES.

    - `net`: an outline, without memory of its own
    - `held`: what training holds where a rank holds all
    - `checkpoint_copy`: bytes of a checkpoint that a rank copies to write it
    - `step`: bytes of a step
    - `has_slope`: whether the objective takes a derivative, which is examined
    """
    bytes_by_device: HostBytes = {}
    for device in DEVICES:
        process_bytes = _process_bytes(
            net,
            train,
            ranks=ranks,
            held=held,
            checkpoint_copy=checkpoint_copy,
            step=step,
            on_gpu=device == "GPU",
            has_slope=has_slope,
        )
        node_bytes: dict[str, int] = {}
        for phase, size in process_bytes.items():
            num_processes = 1 if phase == "export" else min(ranks, _MAX_RANKS_PER_NODE)
            node_bytes[phase] = num_processes * size
        bytes_by_device[device] = {"process": process_bytes, "node": node_bytes}
    return bytes_by_device


def _process_bytes(
    net: nn.Module,
    train: Train,
    *,
    ranks: int,
    held: HeldBytes,
    checkpoint_copy: int,
    step: int,
    on_gpu: bool,
    has_slope: bool,
) -> dict[str, int]:
    """Count the bytes of host memory of one process by phase, for a training on GPUs or on CPUs.

    Takes the other arguments of `host_bytes`.
    """

    # what training holds on the host
    if on_gpu:
        on_host = HeldBytes(0, 0, 0, 0)
        step_on_host = 0
    else:
        on_host = held.per_rank(share_of(train.share, ranks))
        step_on_host = step

    # a tensor in one piece
    largest = max((p.nbytes for p in net.parameters()), default=0)
    largest_at_start = largest if on_gpu or ranks > 1 else 0
    largest_at_export = largest if ranks > 1 else 0

    # copies of weights
    examined = 0
    if has_slope and not on_gpu:
        examined = copied_bytes(net)
        if ranks > 1:
            examined += held.weights
    rounded_weights = 0  # those of 16 bits, which are in 32 until averages are made
    exported_weights = held.weights
    if train.weights == "bfloat16":
        rounded_weights = on_host.weights
        exported_weights *= 2  # in float32
    merged_weights = 0  # with adapters added (`adapter.merge`)
    if adapters(net):
        merged_weights = _FLOAT32_BYTES * num_parameters(net)

    start = on_host.weights + on_host.averages + largest_at_start
    first_step = max(step_on_host - on_host.optimizer, on_host.total)
    return {
        "start": start + rounded_weights + PROCESS,
        "first step": first_step + PROCESS,
        "examination": on_host.total + examined + PROCESS,
        "save": on_host.total + checkpoint_copy + PROCESS,
        "step": step_on_host + checkpoint_copy + PROCESS,
        "resume": start + on_host.optimizer + PROCESS,
        "export": exported_weights + merged_weights + largest_at_export + PROCESS,
    }


def line(bytes_by_device: HostBytes, device: str) -> tuple[str, str]:
    """A line of a plan, a name and a text, on the host of a device. `bytes_by_device` is what `host_bytes` returns."""
    phases = bytes_by_device[device]
    process = ", ".join(f"{phase} {size / GIGABYTE:.1f}" for phase, size in phases["process"].items())
    node = max(phases["node"].values())
    return f"host of a {device}", f"GB of a process: {process}; {node / GIGABYTE:.1f} of a node"
