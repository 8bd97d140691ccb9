"""Where a run departs from its sources: lines to read before it trains."""

from collections.abc import Sequence
from math import log

from dumo.config.change import shown
from dumo.config.tree import Tree
from dumo.flow.path import Path
from dumo.nets import Net, Pretrained
from dumo.objectives import Objective
from dumo.training.ema import Ema
from dumo.training.spec import Train

LARGER = 2.0  # sides that are further apart are mentioned: ours
FAR = 1.2  # a standard deviation that is off by more than this factor is mentioned: ours


def advice(run: Tree, sd: float | None = None) -> list[str]:
    """A line per finding, each with the --set that follows the source; `sd` is the data's, if it was measured."""
    lines = [*of_size(run.net, run.pixels), *of_reference(run.objective, run.train)]
    return [*lines, *of_deviation(run.objective, run.net, run.path, sd)] if sd else lines


def of_size(net: Net, pixels: Sequence[int]) -> list[str]:
    """A pretrained model is tuned at a size that is far from its pipeline's."""
    if not isinstance(net, Pretrained) or not (side := net.side):
        return []
    if 1 / LARGER <= pixels[1] / side <= LARGER:
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
    way = f"--set train.ref={decay:g}"
    if decay not in [ema.key for ema in train.ema]:
        whole = [ema.model_dump(mode="json") for ema in (*train.ema, Ema(decay=decay))]
        way = f"--set 'train.ema={shown(whole)}' {way}"
    return [
        f"objective '{objective.kind}' takes theta^- in its source from an average of the weights, of decay "
        f"{decay:g}; this run takes the weights in training (train.ref: self). As the source:  {way}"
    ]


def of_deviation(objective: Objective, net: Net, path: Path, sd: float) -> list[str]:
    """Constants are for data of standard deviation 1, and these data have another in units of `path.sd`."""
    scaled = {
        f"objective '{objective.kind}'": objective.needs.formulas.unit,
        f"net.precondition '{net.precondition}'": net.precondition != "none",
    }
    who = " and ".join(name for name, unit in scaled.items() if unit)
    if not who or abs(log(sd / path.sd)) <= log(FAR):
        return []
    units = "" if path.sd == 1 else f" in units of path.sd = {path.sd:g}"
    return [
        f"the constants of {who} are for data of standard deviation 1; these data have {sd / path.sd:.2g}{units}. "
        f"To train on them in units of it:  --set path.sd={sd:.2g}"
    ]
