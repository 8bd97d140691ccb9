"""The lines that a training prints before its first step.

`training_summary` describes the training, and `empty_classes_line` names classes without images.
"""

from pathlib import Path

import torch
from torch import nn

from dumo.config.conditions import Conditions, shown_data
from dumo.config.spec import Run
from dumo.data import Data, Images
from dumo.data.images import Source
from dumo.data.latents import LatentSource
from dumo.io.read import first_few
from dumo.run.net import num_parameters
from dumo.runtime import dist
from dumo.runtime.formatting import duration_text
from dumo.training.duration import Timing
from dumo.training.layout import share_of


def empty_classes_line(data: Data, source: object) -> str:
    """Return a line that names the classes without a readable image, or "" if there are none."""
    if not isinstance(source, Source | LatentSource) or Conditions(data).captions:
        return ""
    labels = source.readable_labels()
    images = shown_data(data)
    # With `data.count`, images of the other classes may have been left out on purpose.
    is_cut = isinstance(images, Images) and images.count is not None
    if labels is None or is_cut:
        return ""
    counts = labels.bincount(minlength=data.labels).tolist()
    empty_classes = [c for c in range(data.labels) if not counts[c]]
    if not empty_classes:
        return ""
    return (
        f"no image can be read of class {first_few(empty_classes, Conditions(data).name)}, whose samples will be "
        "meaningless: convert its images (HEIC to JPEG), or remove its folder, and start a new run"
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
    """Return a line that names device, data, network, and length of a training.

    - `net`: the network on the meta device.
    - `size`: the number of rows of the data; None if they are generated.
    - `step`: the number of steps done.
    - `timing`: the elapsed time of a run with a time limit.
    """
    unit = "images" if len(run.shown_shape) == 3 else "points"
    length_text = f"steps {step:,} to {run.train.steps:,}"
    if timing is not None:
        length_text = _time_left_text(step, timing)
    return (
        f"training {folder} on {_layout_text(run.train.share, device)}: "
        f"data {run.data.kind} ({_data_text(run, size, unit)}), "
        f"net {run.net.kind} ({_weights_text(net)}), "
        f"{length_text} of {run.train.batch:,} {unit}"
    )


def _time_left_text(step: int, timing: Timing) -> str:
    """Format the remaining time of a run with a time limit."""
    promised = duration_text(timing.promised_seconds)
    return f"{duration_text(timing.seconds_left)} of {promised} are left, from step {step:,} on, each"


def _data_text(run: Run, size: int | None, unit: str) -> str:
    """Format the number of rows of the data, and their classes or captions."""
    conditions = run.conditions
    text = f"{size:,} {unit}" if size is not None else f"{unit} drawn anew"
    if not run.data.classes:
        return text
    if conditions.captions:
        return f"{text} with {run.data.classes:,} captions"
    text = f"{text} in {run.data.classes} classes"
    if conditions.names:
        text = f"{text}: {first_few(conditions.words, max_items=8)}"
    return text


def _weights_text(net: nn.Module) -> str:
    """Format the number of parameters of a network, and the number of trained ones if some are frozen."""
    total = num_parameters(net)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    text = f"{total:,} parameters"
    return text if trained == total else f"{text}, {trained:,} of them trained"


def _layout_text(share: int, device: torch.device) -> str:
    """Format the device, and the sharding of weights over ranks."""
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
