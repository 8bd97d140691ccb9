"""A net in closed form, with heads that can be written down anywhere, and the fixed inputs that it is shown.

Every head is a sum of numbers times terms, pixel by pixel, so that any framework computes it the same:

    u(x, c; t, r, ...) = a_0 + a_1 x + a_2 t x + a_3 x^2 + a_4 t^2 + a_5 mean(x) + a_6 sin(2 t - r) + a_7 r x
                         + (a_(8 + c) + a_12 w + a_13 low + a_14 high + a_15 k + a_16 beta) (1 + x)

An input that a net is not told of counts as 0. All numbers are those of parity.json; everything is float64.
"""

import json
from dataclasses import replace
from math import log
from pathlib import Path as File
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dumo.flow.path import FlowPath
from dumo.types import Cond, Frozen, Heads, Needs, NoisyBatch, Sample, Time

PARITY: dict[str, Any] = json.loads(File(__file__).with_name("parity.json").read_text())
KNOBS = ("w", "low", "high", "k", "beta")
NULL = 3


class Closed(nn.Module):
    """The heads of a case, with its weights `online` or, for theta^-, `average`."""

    def __init__(self, case: dict[str, Any], needs: Needs, weights: Literal["online", "average"] = "online") -> None:
        super().__init__()
        net = PARITY["net"]
        self.a = nn.Parameter(torch.tensor([net[weights][head] for head in case["heads"]], dtype=torch.float64))
        self.gauges = nn.Parameter(torch.tensor([net["gauge"] for _ in needs.gauges], dtype=torch.float64))
        assert len(self.a) == len(needs.heads)

    def forward(self, x: Sample, c: Cond, /, *, t: Time, **inputs: Time) -> Heads:
        """All heads, then one number per row for each gauge: g_0 + g_1 t + g_2 mean(x)."""
        mean = x.flatten(1).mean(1)
        heads = (self.head(a, x, c, mean, t=t, **inputs) for a in self.a)
        return *heads, *(g[0] + g[1] * t + g[2] * mean for g in self.gauges)

    def head(
        self, a: Tensor, x: Sample, c: Cond, mean: Time, *, t: Time, r: Time | None = None, **knobs: Time
    ) -> Sample:
        """One head, with its weights."""
        r = 0 * t if r is None else r
        flat = a[0] + a[4] * t * t + a[5] * mean + a[6] * (2 * t - r).sin()
        steep, both = a[1] + a[2] * t + a[7] * r, a[8:12][c]
        for i, name in enumerate(KNOBS):
            if name in knobs:
                both = both + a[12 + i] * knobs[name]
        flat, steep = ((s + both).view(-1, *(1,) * (x.ndim - 1)) for s in (flat, steep))  # of Duals, too
        return flat + steep * x + a[3] * x * x


def shown(case: dict[str, Any], path: FlowPath) -> NoisyBatch:
    """The record of a case: the fixed inputs, but for those that the case has of its own; one trail is every row's."""
    given = {k: torch.tensor(v, dtype=torch.float64) for k, v in (PARITY["given"] | case["own"]).items()}
    x, z = (given.pop(k).reshape(-1, 2, 2, 2) for k in "xz")
    t, r, kept, c = given.pop("t"), given.pop("r"), given.pop("kept") > 0, given.pop("c").long()
    trail = given.pop("trail", None)
    (x_t, v_t), null = path.at(x, z, t), torch.full_like(c, NULL)
    drawn = {k: a.reshape(x.shape) if a.ndim > 1 else a for k, a in given.items()}
    if "w" in drawn:
        drawn["w"] = drawn["w"].log() / log(8)  # which is uniform
    c, progress = c.where(kept, null), case.get("progress", 0.0)
    b = NoisyBatch(path, x, z, t, r, x_t, v_t, c, null, kept, drawn=drawn, progress=progress)
    if trail is not None:
        b = replace(b, trail=trail.reshape(1, -1, 2, 2, 2).expand(len(t), -1, -1, -1, -1))
        b = replace(b, x_t=b.on(t))
    if "teacher" in case:
        taught = Frozen(Closed({"heads": [case["teacher"]]}, Needs(), "average"))
        b = replace(b, teacher=lambda x, t, c, v: taught(x, c, t=t)[0])
    return b
