"""How far a run has come, in a word, by its scores beside the baselines: so that nobody takes noise for a result."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dumo.protocols.evaluator import Scores, rising

State = Literal["untrained", "far", "near", "like the data"]

UNTRAINED, FAR = 1 / 2, 1 / 20  # of the distance of noise. Ours
TIMES, SHARE = 20, 0.02  # of the baseline, and of samples among the data, where noise was not measured. Ours


def state(rows: Sequence[Mapping[str, Any]], baselines: Mapping[str, Scores]) -> State | None:
    """Where a run stands by the first score, lower being better, of its best row; both as an evaluation has them.

    `like the data`: within two deviations of the first baseline. `untrained`: at least half as far off as noise; where
    `noise` is not among the baselines, `TIMES` as far as data, and with a precision of at most `SHARE`. `far`: over a
    twentieth of noise, or `TIMES` as far as data. None: no baseline tells, or more is better.
    """
    if not baselines:
        return None
    real, noise = next(iter(baselines.values())), baselines.get("noise")
    told = [{key: x for key, x in row.items() if isinstance(x, float)} for row in rows]
    if not any(told):
        return None
    if rising(next(iter(told[0]), "")):
        return None
    scores = min(filter(None, told), key=_first)
    score = _first(scores)
    usual = abs(real["mean"]) + 2 * real["sd"]
    if score <= usual:
        return "like the data"
    if noise:
        return "untrained" if score >= UNTRAINED * noise["mean"] else "far" if score > FAR * noise["mean"] else "near"
    if score <= TIMES * usual:
        return "near"
    return "untrained" if scores.get("precision", 1.0) <= SHARE else "far"


def _first(scores: Scores) -> float:
    return next(iter(scores.values()))
