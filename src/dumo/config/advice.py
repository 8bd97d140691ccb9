"""Advice on a run before it trains: where it departs from its sources. Nothing here refuses a run.

`advice` is the entrance. It compares the images' size with the pipeline's, theta^- with that of the objective's source,
and the data's standard deviation with the one that constants were chosen for.
"""

from collections.abc import Sequence
from math import log

from dumo.config.change import yaml_text
from dumo.config.parts import RunParts
from dumo.flow.path import FlowPath
from dumo.nets import Net, is_pretrained
from dumo.objectives import Objective
from dumo.runtime.door import settings
from dumo.training.ema import Ema
from dumo.training.spec import Train

_MAX_SIDE_RATIO = 2.0  # of an image's side to the pipeline's, either way, about which nothing is said: ours
_MAX_DIFFUSION_SIDE_RATIO = 1.4  # of a diffusion, such as Stable Diffusion 2.1, of 768 pixels, at 512: ours
_MAX_SD_RATIO = 1.2  # of the data's standard deviation to that of the path, either way: ours


def advice(run: RunParts, sd: float | None = None) -> list[str]:
    """A line for each departure, with the setting that follows the source; [] if there is none.

    `sd` is the standard deviation of the data, in their own unit; None or 0: not measured, and not compared.
    """
    lines: list[str] = []
    if is_pretrained(run.net) and run.net.side:
        max_ratio = _MAX_DIFFUSION_SIDE_RATIO if run.path.kind == "diffusion" else _MAX_SIDE_RATIO
        lines += _size_advice(run.net.side, run.shown_shape, max_ratio)
    decay = run.objective.needs.ref
    if decay is not None and run.train.ref == "self":
        lines.append(_reference_advice(run.objective.kind, decay, run.train))
    if sd:
        lines += _deviation_advice(run.objective, run.net, run.path, sd)
    return lines


def _size_advice(side: int, pixels: Sequence[int], max_ratio: float) -> list[str]:
    """A line where a pretrained model is tuned on images far larger or smaller than its pipeline makes, else [].

    `side` is that of the pipeline's default image, `pixels` the shape of an image: channels, height, width.
    """
    if 1 / max_ratio <= pixels[1] / side <= max_ratio:
        return []
    return [
        f"the pipeline makes images of {side} x {side} pixels by default, and this run has {pixels[1]} x {pixels[2]}. "
        f"As the pipeline:  {settings(f'data.images.side={side}')}"
    ]


def _reference_advice(objective: str, decay: float, train: Train) -> str:
    """A line that theta^- is the weights in training, where the objective's source averages them by this `decay`."""
    fields = [f"train.ref={decay:g}"]
    if decay not in [ema.key for ema in train.ema]:
        averages = [ema.model_dump(mode="json") for ema in (*train.ema, Ema(decay=decay))]
        fields.insert(0, f"train.ema={yaml_text(averages)}")
    return (
        f"objective '{objective}' takes theta^- in its source from an average of the weights, of decay "
        f"{decay:g}; this run takes the weights in training (train.ref: self). As the source:  {settings(*fields)}"
    )


def _deviation_advice(objective: Objective, net: Net, path: FlowPath, sd: float) -> list[str]:
    """A line where constants of the objective or net are for data of standard deviation 1, and these differ; else [].

    The data's deviation is `sd / path.sd`, since the path divides them by `path.sd`.
    """
    owners: list[str] = []
    if objective.needs.formulas.unit:
        owners.append(f"objective '{objective.kind}'")
    if net.precondition != "none":
        owners.append(f"net.precondition '{net.precondition}'")
    if not owners or abs(log(sd / path.sd)) <= log(_MAX_SD_RATIO):
        return []
    units = "" if path.sd == 1 else f" in units of path.sd = {path.sd:g}"
    return [
        f"the constants of {' and '.join(owners)} are for data of standard deviation 1; these data have "
        f"{sd / path.sd:.2g}{units}. "
        f"To train on them in units of it:  {settings(f'path.sd={sd:.2g}')}"
    ]
