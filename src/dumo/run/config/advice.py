"""Where a run departs from its sources: lines to read before it trains."""

from math import log

from dumo.run.config.change import shown
from dumo.run.config.tree import Tree
from dumo.training.ema import Ema

FAR = 1.2  # a standard deviation that is off by more than this factor is mentioned: ours


def advice(run: Tree, sd: float | None = None) -> list[str]:
    """A line per finding, each with the --set that follows the source; `sd` is the data's, if it was measured."""
    return [*of_reference(run), *(of_deviation(run, sd) if sd else ())]


def of_reference(run: Tree) -> list[str]:
    """theta^- is the weights in training, while the objective's source takes an average of them."""
    decay, averages = run.objective.needs.ref, run.train.ema
    if decay is None or run.train.ref != "self":
        return []
    way = f"--set train.ref={decay:g}"
    if decay not in [ema.key for ema in averages]:
        whole = [ema.model_dump(mode="json") for ema in (*averages, Ema(decay=decay))]
        way = f"--set 'train.ema={shown(whole)}' {way}"
    return [
        f"objective '{run.objective.kind}' takes theta^- in its source from an average of the weights, of decay "
        f"{decay:g}; this run takes the weights in training (train.ref: self). As the source:  {way}"
    ]


def of_deviation(run: Tree, sd: float) -> list[str]:
    """Constants are for data of standard deviation 1, and these data have another in units of `path.sd`."""
    scaled = {
        f"objective '{run.objective.kind}'": run.objective.needs.formulas.unit,
        f"net.precondition '{run.net.precondition}'": run.net.precondition != "none",
    }
    who = " and ".join(name for name, unit in scaled.items() if unit)
    if not who or abs(log(sd / run.path.sd)) <= log(FAR):
        return []
    units = "" if run.path.sd == 1 else f" in units of path.sd = {run.path.sd:g}"
    return [
        f"the constants of {who} are for data of standard deviation 1; these data have {sd / run.path.sd:.2g}{units}. "
        f"To train on them in units of it:  --set path.sd={sd:.2g}"
    ]
