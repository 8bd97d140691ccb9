"""The lines that a training shows before its first step.

`training_summary` says what is trained on what, and `empty_classes_line` which classes lack images. `misfits` warns of
what does not fit this machine, each time with the setting that does. Only a run that `may_take_a_day` needs its
operations counted for that.
"""

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import torch
from torch import nn

from dumo.config.conditions import Conditions, shown_data
from dumo.config.spec import Run
from dumo.data import Data, is_images
from dumo.data.album import Album
from dumo.data.latents import LatentSource
from dumo.flow.slope import CentralSlope, DualSlope
from dumo.io.read import first_few
from dumo.run.net import num_parameters
from dumo.runtime import dist
from dumo.runtime.device import operations_per_second
from dumo.runtime.door import settings
from dumo.runtime.text import SECONDS_PER_HOUR, duration_text
from dumo.training.deadline import Timing
from dumo.training.layout import share_of
from dumo.training.spec import Train
from dumo.types import UserError

_HOURS_PER_DAY = 24.0
MAX_UNITS = 10  # forward passes that a step costs at most: ours
_MIN_FLOPS_PER_SECOND = 1e10  # floating-point operations that any machine makes: ours


def empty_classes_line(data: Data, source: object) -> str:
    """A line that names the classes of which `source` has no image that can be read; "" where that is not so."""
    if not isinstance(source, Album | LatentSource) or Conditions(data).captions:
        return ""
    labels = source.readable_labels()
    images = shown_data(data)
    is_cut = is_images(images) and images.count is not None  # images that are left out may be of the other classes
    if labels is None or is_cut:
        return ""
    counts = labels.bincount(minlength=data.labels).tolist()
    empty_classes = [c for c in range(data.labels) if not counts[c]]
    if not empty_classes:
        return ""
    return (
        f"no image can be read of class {first_few(empty_classes, Conditions(data).name)}, whose samples will mean "
        "nothing: convert its images (HEIC to JPEG), or remove its folder, and begin a new run"
    )


def training_summary(
    run: Run,
    net: nn.Module,
    folder: Path,
    *,
    size: int | None,
    step: int,
    device: torch.device,
    timing: Timing | None,
) -> str:
    """What is trained on what, in a line.

    `net` is on the meta device, `size` the number of rows of the data (None: they are drawn anew), `step` the number of
    steps done, and `timing` how far it is by the clock, if it ends by that.
    """
    unit = "images" if len(run.shown_shape) == 3 else "points"
    cost_text = ""
    if isinstance(run.objective.needs.slope, CentralSlope):
        cost_text = _dual_hint(net, run)
    length_text = f"steps {step:,} to {run.train.steps:,}"
    if timing is not None:
        length_text = _time_left_text(step, timing)
    return (
        f"training {folder} on {_layout_text(run.train.share, device)}: "
        f"data {run.data.kind} ({_data_text(run, size, unit)}), "
        f"net {run.net.kind} ({_weights_text(net)}), "
        f"{cost_text}{length_text} of {run.train.batch:,} {unit}"
    )


def _time_left_text(step: int, timing: Timing) -> str:
    """For how long a run goes on that ends by the clock."""
    promised = duration_text(timing.promised_seconds)
    return f"{duration_text(timing.seconds_left)} of {promised} are left, from step {step:,} on, each"


def _data_text(run: Run, size: int | None, unit: str) -> str:
    """How many rows the data have, and of which classes or captions."""
    conditions = run.conditions
    text = f"{size:,} {unit}" if size is not None else f"{unit} drawn anew"
    if not run.data.classes:
        return text
    if conditions.captions:
        return f"{text} with {run.data.classes:,} captions"
    text = f"{text} in {run.data.classes} classes"
    if conditions.names:
        from dumo.data.store import first_sorted

        text = f"{text}: {first_sorted(conditions.words)}"
    return text


def _weights_text(net: nn.Module) -> str:
    """How many parameters a net has, and how many are trained, if not all."""
    total = num_parameters(net)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    text = f"{total:,} parameters"
    return text if trained == total else f"{text}, {trained:,} of them trained"


def _dual_hint(net: nn.Module, run: Run) -> str:
    """What a step of central differences costs, and what it would with dual numbers; "" if the net takes none."""
    from dumo.run import cost

    dual = run.objective.model_copy(update={"slope": DualSlope()})
    try:
        dual_units = cost.forward_units(net, dual, run.path, run.data.shape, ref=run.train.ref)
    except UserError:  # an operation of the net has no rule for dual numbers
        return ""
    units = cost.forward_units(net, run.objective, run.path, run.data.shape, ref=run.train.ref)
    return (
        f"{units:.2f} F a step (1 F: one forward pass; objective.slope.kind=dual takes {dual_units:.2f} F, is exact "
        "and may run in bf16), "
    )


def _layout_text(share: int, device: torch.device) -> str:
    """The device, and how the weights are split over several ranks."""
    device_name = str(device)
    if device.type == "cuda":
        device_name += f" ({torch.cuda.get_device_name(device)})"
    world_size = dist.world()
    if world_size == 1:
        return device_name
    shards = share_of(share, world_size)
    if shards == 1:
        layout = "each with all weights"
    elif shards == world_size:
        layout = "the weights in parts over all"
    else:
        layout = f"the weights in parts over {shards}"
    return f"{world_size} ranks of {device_name}, {layout}"


def may_take_a_day(train: Train, net: nn.Module, shape: Sequence[int]) -> bool:
    """Whether a run might take a day here, by a bound on its operations; False if it ends by the clock.

    The bound holds because few nets use a weight more than once for each number of a sample, of this `shape`.
    """
    if train.minutes is not None:
        return False
    weights = sum(p.numel() for p in net.parameters())
    pass_flops = 2 * weights * prod(shape)
    flops = train.steps * train.batch * MAX_UNITS * pass_flops
    return flops > _HOURS_PER_DAY * SECONDS_PER_HOUR * _MIN_FLOPS_PER_SECOND


def misfits(run: Run, operations: float | None, device: torch.device, step: int = 0) -> Iterator[str]:
    """Yield a line for each reason why a run does not fit this machine, with the setting that does.

    `operations` are the floating-point operations, on this device, of the steps after `step`; None: they are few.
    """
    train = run.train
    lora = run.net.lora
    has_bfloat16_weights = train.weights == "bfloat16" or (lora is not None and lora.frozen == "bfloat16")
    cpu_values: dict[str, str] = {}  # by the fields of `train` whose values are for a GPU
    if train.precision == "bf16" and not has_bfloat16_weights:  # which take no other precision
        cpu_values["precision"] = "fp32"
    if train.compile != "none":
        cpu_values["compile"] = "none"
    if device.type == "cpu" and cpu_values:
        now = " and ".join(f"train.{name}={getattr(train, name)}" for name in cpu_values)
        ways = settings(*(f"train.{name}={value}" for name, value in cpu_values.items()))
        yield f"{now}: for a GPU. A CPU compiles for minutes and gains little:  {ways}"
    if operations is None:
        return
    hours = operations / operations_per_second(device) / SECONDS_PER_HOUR
    if hours > _HOURS_PER_DAY:
        steps_left = train.steps - step
        steps_a_day = max(1, int(steps_left * _HOURS_PER_DAY / hours))
        yield (
            f"{steps_left:,} steps take {hours:,.0f} hours here, at the speed of a product of matrices: take a smaller "
            f"net, other images or fewer steps; a day is  {settings(f'train.steps={step + steps_a_day}')}"
        )
