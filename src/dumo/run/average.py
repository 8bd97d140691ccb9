"""Averages of a run's weights that are chosen after training (EDM2: Karras et al. 2024, Sec. 3.2, App. C).

    snapshots/ema-std-0.05/step-00000500.safetensors ...

Each snapshot is an average with a profile p_i (`dumo.training.ema`). Another one, of profile p, is nearly their sum
with the weights x that make the square of p - sum_i x_i p_i, integrated over the run, least (Alg. 3). Ours: the x_i add
up to 1, so that weights that rest come out as they are. Where A_ij is the integral of p_i p_j, b_i that of p_i p, and l
a multiplier,

    A x + l = b,   sum_i x_i = 1.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dumo.config.load import Written, identity
from dumo.config.source import FILE
from dumo.io import file as files
from dumo.io.weights import apart, compare, sha256
from dumo.run.index import Index
from dumo.run.net import outline
from dumo.run.origin import require_place
from dumo.training import checkpoint, frozen
from dumo.training.ema import WIDEST, PowerEma, exponent
from dumo.training.manifest import paths_by_step
from dumo.training.spec import Train
from dumo.training.state import State
from dumo.types import UserError

FOLDER = "snapshots"
KIND = "snapshot"  # of a file of weights
FAR = 0.05  # a profile that is missed by more than this share of its norm is refused: ours


class Profile(NamedTuple):
    """Which average: after this many updates, by the power of this width."""

    step: int
    std: float


@dataclass(frozen=True)
class Averaged:
    """An average that was made: its file, of which step, of how many snapshots, and how far its profile is missed."""

    file: Path
    step: int
    count: int
    error: float  # a share of the profile's norm


def keep(run: Path, state: State, owner: str) -> None:
    """Write each average by a power as a snapshot of this step and run identity, as `checkpoint.save_weights`."""
    for key, average in state.averages.items():
        if isinstance(average.spec, PowerEma):
            checkpoint.save_weights(
                run / FOLDER / f"ema-{key}", state, average.module, KIND, owner, std=average.spec.std
            )


def kept(run: Path, spec: Train) -> dict[Profile, Path]:
    """The snapshots of a run's averages, the first step first."""
    powers = [ema for ema in spec.ema if isinstance(ema, PowerEma)]
    found = {
        Profile(step, ema.std): path
        for ema in powers
        for step, path in paths_by_step(run / FOLDER / f"ema-{ema.key}", ".safetensors").items()
    }
    return dict(sorted(found.items()))


def average(source: str, std: float, out: Path | None = None) -> Averaged:
    """Write the average of a width, as of a run's last snapshot, to `out`, or into averages/ in the run's folder.

    Raises UserError for a width outside (0, WIDEST), one that the snapshots do not give, or a run without snapshots;
    OSError where nothing can be written.
    """
    if not 0 < std < WIDEST:
        raise UserError(f"--std {std:g}: a width lies between 0 and {WIDEST:.3f}, the plain mean of a run; try 0.1")
    if out and out.suffix != ".safetensors":
        raise UserError(f"--out {out}: give a file that ends in .safetensors")
    folder = Path(source)
    if not (folder / FILE).is_file():
        raise UserError(f"{source} is no run's folder (it has no {FILE}): train one first")
    index = Index.read(folder)
    written = index.written
    assert written, "it has a run.yaml"
    run = written.run
    snapshots = kept(folder, run.train)
    if not snapshots:
        raise UserError(
            f"{folder} has no snapshots to make averages of: train with --set train.snapshots="
            f"{max(1, run.train.steps // 10)} --set 'train.ema=[{{kind: power, std: 0.05}}, {{kind: power, std: 0.1}}]'"
        )
    last, net = max(step for step, _ in snapshots), outline(run)
    x, error = fit([*snapshots], Profile(last, std))
    if error > FAR:
        widths = ", ".join(f"{width:g}" for width in sorted({width for _, width in snapshots}))
        raise UserError(
            f"--std {std:g}: the nearest sum of {len(snapshots)} snapshots misses that average by {error:.0%}, and "
            f"{FAR:.0%} is the most: take a width nearer to theirs ({widths}), or train with more of them "
            "(train.snapshots)"
        )
    sources = of_run(folder, written, snapshots)
    found = [checkpoint.load(path) for path in snapshots.values()]
    for path, one in zip(snapshots.values(), found, strict=True):
        compare(path, one, frozen.trained(net), "the run", checkpoint.FIT)
    weights = mixed(found, x, {name for name, _ in net.named_parameters(remove_duplicate=False)})
    file = out or folder / "averages" / f"std-{std:g}.safetensors"
    with files.whole(file) as half:
        facts: dict[str, object] = {"kind": "average", "step": last, "run": identity(run), "std": std}
        checkpoint.write_weights(half, apart(weights), **facts, sources=sources)
    return Averaged(file, last, len(snapshots), error)


def of_run(folder: Path, written: Written, snapshots: Mapping[Profile, Path]) -> dict[str, str]:
    """The SHA-256 of each snapshot, by its place in the folder.

    Raises UserError for one of another run, step or width. Those from before they said these are taken as their place
    says, with a warning.
    """
    unnamed: list[Path] = []
    identities = written.identities()
    for (step, std), path in snapshots.items():
        require_place(path, identities, KIND, step, std=std)
        if "std" not in checkpoint.facts_of(path):
            unnamed.append(path)
    if unnamed:
        warnings.warn(
            f"{unnamed[0]} is from before snapshots said their width ({len(unnamed)} of {len(snapshots)} are): it is "
            "taken to be what the name of its folder says",
            stacklevel=2,
        )
    return {path.relative_to(folder).as_posix(): sha256(path) for path in snapshots.values()}


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
