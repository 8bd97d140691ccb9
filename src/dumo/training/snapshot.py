"""Averages chosen after training, of averages by a power that were kept (EDM2: Karras et al. 2024, Sec. 3.2, App. C).

    snapshots/ema-std-0.05/step-00000500.safetensors ...

Each is an average with a profile p_i (`dumo.training.ema`). Another one, of profile p, is nearly their sum with the
weights x that make the square of p - sum_i x_i p_i, integrated over the run, least (Alg. 3). Ours: the x_i add up to 1,
so that weights that rest come out as they are. Where A_ij is the integral of p_i p_j, b_i that of p_i p, and l a
multiplier,

    A x + l = b,   sum_i x_i = 1.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dumo.training.checkpoint import lone
from dumo.training.ema import PowerEma, exponent
from dumo.training.retention import standing
from dumo.training.spec import Train
from dumo.training.state import State

FOLDER = "snapshots"


class Profile(NamedTuple):
    """Which average: after so many updates, by the power of this width."""

    step: int
    std: float


def keep(folder: Path, state: State) -> None:
    """Write each average by a power after this step, into a folder of its own in `folder`; as `checkpoint.lone`."""
    for key, average in state.averages.items():
        if isinstance(average.spec, PowerEma):
            lone(folder / f"ema-{key}", state, average.module, "snapshot")


def kept(folder: Path, spec: Train) -> dict[Profile, Path]:
    """The snapshots in `folder` of a run's averages, the first step first."""
    powers = [ema for ema in spec.ema if isinstance(ema, PowerEma)]
    found = {
        Profile(step, ema.std): path
        for ema in powers
        for step, path in standing(folder / f"ema-{ema.key}", ".safetensors").items()
    }
    return dict(sorted(found.items()))


def overlap(one: Profile, other: Profile) -> float:
    """The integral of the product of two profiles."""
    early, late = sorted((one, other))
    a, b = exponent(early.std), exponent(late.std)
    return (a + 1) * (b + 1) / (a + b + 1) * (early.step / late.step) ** b / late.step


def fit(found: Sequence[Profile], wanted: Profile) -> tuple[list[float], float]:
    """The weights of snapshots whose sum is nearest to a profile, and how far it is, as a share of its norm."""
    products = np.array([[overlap(one, other) for other in found] for one in found])
    with_wanted, ones = np.array([overlap(one, wanted) for one in found]), np.ones((len(found), 1))
    unit = overlap(wanted, wanted)  # which brings the rows of ones to the size of the others
    system = np.block([[products, unit * ones], [unit * ones.T, np.zeros((1, 1))]])
    x = np.linalg.solve(system, np.append(with_wanted, unit))[:-1]
    left = unit - 2 * x @ with_wanted + x @ products @ x
    return x.tolist(), float(np.sqrt(max(left, 0.0) / unit))


def mixed(snapshots: Sequence[Mapping[str, Tensor]], x: Sequence[float], averaged: set[str]) -> dict[str, Tensor]:
    """The sum of snapshots, the last one last, with weights x, of the tensors named in `averaged`, in their dtype.

    What else there is, buffers, is the last one's.
    """
    *_, last = snapshots
    out = {name: tensor.clone() for name, tensor in last.items()}
    for name in out.keys() & averaged:
        total = torch.zeros_like(out[name], dtype=torch.float64)
        for weight, one in zip(x, snapshots, strict=True):
            total += weight * one[name].double()
        out[name] = total.to(out[name].dtype)
    return out
