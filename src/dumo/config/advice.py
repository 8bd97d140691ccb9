"""Where a run departs from its sources: lines to read before it trains."""

from collections.abc import Sequence
from math import log

from dumo.config.change import shown
from dumo.config.tree import Tree
from dumo.flow.path import Path
from dumo.nets import Net, is_pretrained
from dumo.objectives import Objective
from dumo.training.ema import Ema
from dumo.training.spec import Train

LARGER = 2.0  # factor between sides that is still near: ours
FAR = 1.2  # factor between standard deviations that is still near: ours


def advice(run: Tree, sd: float | None = None) -> list[str]:
    """A line per finding, each with the --set that follows the source; `sd` is the data's, if it was measured."""
    lines = [*of_size(run.net, run.pixels), *of_reference(run.objective, run.train)]
    if sd:
        lines += of_deviation(run.objective, run.net, run.path, sd)
    return lines


def of_size(net: Net, pixels: Sequence[int]) -> list[str]:
    """A pretrained model is tuned at a size that is far from its pipeline's."""
    side = net.side if is_pretrained(net) else None
    if not side or 1 / LARGER <= pixels[1] / side <= LARGER:
        return []
    return [
        f"the pipeline makes images of {side} x {side} pixels by default, and this run has {pixels[1]} x {pixels[2]}: "
        f"as the pipeline, data.images.side={side}"
    ]


def of_reference(objective: Objective, train: Train) -> list[str]:
    """theta^- is the weights in training, while the objective's source takes an average of them."""
    decay = objective.needs.ref
    if decay is None or train.ref != "self":
        return []
    fix = f"--set train.ref={decay:g}"
    if decay not in [ema.key for ema in train.ema]:
        averages = [ema.model_dump(mode="json") for ema in (*train.ema, Ema(decay=decay))]
        fix = f"--set 'train.ema={shown(averages)}' {fix}"
    return [
        f"objective '{objective.kind}' takes theta^- in its source from an average of the weights, of decay "
        f"{decay:g}; this run takes the weights in training (train.ref: self). As the source:  {fix}"
    ]


def of_deviation(objective: Objective, net: Net, path: Path, sd: float) -> list[str]:
    """Constants are for data of standard deviation 1, and these data have another in units of `path.sd`."""
    owners: list[str] = []
    if objective.needs.formulas.unit:
        owners.append(f"objective '{objective.kind}'")
    if net.precondition != "none":
        owners.append(f"net.precondition '{net.precondition}'")
    if not owners or abs(log(sd / path.sd)) <= log(FAR):
        return []
    units = "" if path.sd == 1 else f" in units of path.sd = {path.sd:g}"
    return [
        f"the constants of {' and '.join(owners)} are for data of standard deviation 1; these data have "
        f"{sd / path.sd:.2g}{units}. "
        f"To train on them in units of it:  --set path.sd={sd:.2g}"
    ]
