"""Averages of a run's weights that are chosen after training (EDM2: Karras et al. 2024, Sec. 3.2, App. C).

    snapshots/ema-std-0.05/step-00000500.safetensors ...

Each snapshot is an average with a profile p_i (`dumo.training.ema`). Another one, of profile p, is nearly their sum
with the weights x that make the square of p - sum_i x_i p_i, integrated over the run, least (Alg. 3). Ours: the x_i add
up to 1, so that weights that rest come out as they are. Where A_ij is the integral of p_i p_j, b_i that of p_i p, and l
a multiplier,

    A x + l = b,   sum_i x_i = 1.

Training calls `save_snapshots`, `dumo average` calls `average`: it finds the snapshots and fits their weights
(`fit_profile`), sees that all are of this run, and writes their sum.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dumo.config.difference import identity
from dumo.config.history import RecordedRun
from dumo.config.place import require_run_folder
from dumo.config.source import RunText, trained_name_of
from dumo.io import file as files
from dumo.io.weights import compare, sha256, unshared
from dumo.run import shipped
from dumo.run.index import Index
from dumo.run.net import outline
from dumo.run.provenance import require_own_file
from dumo.training import checkpoint, frozen
from dumo.training.ema import WIDEST, PowerEma, exponent
from dumo.training.manifest import paths_by_step
from dumo.training.spec import Train
from dumo.training.state import State
from dumo.types import UserError

FOLDER = "snapshots"
KIND = "snapshot"  # of a file of weights
_MAX_ERROR = 0.05  # a profile that is missed by more than this share of its norm is refused: ours


class Profile(NamedTuple):
    """Which average: after this many updates, by the power of this width."""

    step: int
    std: float


@dataclass(frozen=True)
class AverageResult:
    """An average that was made: its file, of which step, of how many snapshots, and how far its profile is missed."""

    file: Path
    step: int
    count: int
    error: float  # a share of the profile's norm


def save_snapshots(folder: Path, state: State, owner: str) -> None:
    """Write each average by a power after this step into the snapshots of a run's folder. Every rank must call it.

    `owner` is the identity of the run. Raises as `checkpoint.save_weights`.
    """
    for key, average in state.averages.items():
        if isinstance(average.spec, PowerEma):
            checkpoint.save_weights(
                folder / FOLDER / f"ema-{key}", state, average.module, KIND, owner, std=average.spec.std
            )


def _find_snapshots(folder: Path, spec: Train) -> dict[Profile, Path]:
    """The snapshots of a run's averages, the first step first."""
    snapshots: dict[Profile, Path] = {}
    for ema in spec.ema:
        if isinstance(ema, PowerEma):
            for step, path in paths_by_step(folder / FOLDER / f"ema-{ema.key}", ".safetensors").items():
                snapshots[Profile(step, ema.std)] = path
    return dict(sorted(snapshots.items()))


def average(source: str, std: float, out: Path | None = None, *, text: RunText | None = None) -> AverageResult:
    """Write the average of width `std`, as of a run's last snapshot, to `out`, or into averages/ in the run's folder.

    `text` is that of run.yaml, where it has been read. Raises UserError for a width outside (0, WIDEST), one that
    the snapshots do not give, or a run without snapshots; OSError where nothing can be written.
    """
    if not 0 < std < WIDEST:
        raise UserError(f"--std {std:g}: a width lies between 0 and {WIDEST:.3f}, the plain mean of a run; try 0.1")
    if out and out.suffix != ".safetensors":
        raise UserError(f"--out {out}: give a file that ends in .safetensors")
    folder = shipped.find(source)
    require_run_folder(source, folder)

    # find the snapshots
    index = Index.read(folder, text)
    recorded_run = index.recorded_run
    assert recorded_run, "it has a run.yaml"
    run = recorded_run.run
    snapshots = _find_snapshots(folder, run.train)
    if not snapshots:
        problem = f"{source} has no snapshots to make averages of"
        if trained_name_of(source) is not None:
            raise UserError(f"{problem}: dumo brings only the weights that it samples by")
        every = max(1, run.train.steps // 10)
        raise UserError(
            f"{problem}: train with --set train.snapshots={every} "
            "--set 'train.ema=[{kind: power, std: 0.05}, {kind: power, std: 0.1}]'"
        )

    # fit their weights
    net = outline(run)
    profiles = list(snapshots)
    last_step = max(profile.step for profile in profiles)
    x, error = fit_profile(profiles, Profile(last_step, std))
    if error > _MAX_ERROR:
        snapshot_widths = sorted({profile.std for profile in profiles})
        raise UserError(
            f"--std {std:g}: the nearest sum of {len(snapshots)} snapshots misses that average by {error:.0%}, and "
            f"{_MAX_ERROR:.0%} is the most: take a width nearer to theirs "
            f"({', '.join(f'{width:g}' for width in snapshot_widths)}), or train with more of them (train.snapshots)"
        )

    # read them
    hashes = _hash_snapshots(folder, recorded_run, snapshots)
    snapshot_weights = [checkpoint.load(path) for path in snapshots.values()]
    for path, weights in zip(snapshots.values(), snapshot_weights, strict=True):
        compare(path, weights, frozen.trained_state_dict(net), "the run", checkpoint.FIX)

    # write their sum
    parameter_names = {name for name, _ in net.named_parameters(remove_duplicate=False)}
    average_weights = weighted_sum(snapshot_weights, x, parameter_names)
    file = out or shipped.output_folder(source) / "averages" / f"std-{std:g}.safetensors"
    with files.atomic_write(file) as temp_path:
        checkpoint.write_weights(
            temp_path,
            unshared(average_weights),
            kind="average",
            step=last_step,
            run=identity(run),
            std=std,
            sources=hashes,
        )
    return AverageResult(file, last_step, len(snapshots), error)


def _hash_snapshots(folder: Path, recorded_run: RecordedRun, snapshots: Mapping[Profile, Path]) -> dict[str, str]:
    """The SHA-256 of each snapshot, by its path in the run's folder.

    Raises UserError for one of another run, step or width. A file from before snapshots said their width is taken as
    its place says, with a warning.
    """
    without_width: list[Path] = []
    identities = recorded_run.identities()
    for (step, std), path in snapshots.items():
        require_own_file(path, identities, KIND, step, std=std)
        if "std" not in checkpoint.facts_of(path):
            without_width.append(path)
    if without_width:
        warnings.warn(
            f"{without_width[0]} is from before snapshots said their width ({len(without_width)} of {len(snapshots)} "
            "are): it is taken to be what the name of its folder says",
            stacklevel=2,
        )
    return {path.relative_to(folder).as_posix(): sha256(path) for path in snapshots.values()}


def overlap(profile: Profile, other: Profile) -> float:
    """The integral of the product of two profiles."""
    early, late = sorted((profile, other))
    a = exponent(early.std)
    b = exponent(late.std)
    return (a + 1) * (b + 1) / (a + b + 1) * (early.step / late.step) ** b / late.step


def fit_profile(profiles: Sequence[Profile], target: Profile) -> tuple[list[float], float]:
    """The weights of snapshots of these profiles whose sum is nearest to the target, and how far it is from that.

    The distance is a share of the target's norm.
    """
    n = len(profiles)
    products = np.empty((n, n))  # A
    target_products = np.empty(n)  # b
    for i, profile in enumerate(profiles):
        products[i] = [overlap(profile, other) for other in profiles]
        target_products[i] = overlap(profile, target)
    square_norm = overlap(target, target)
    ones = square_norm * np.ones((n, 1))  # of the size of the other rows
    system = np.block([[products, ones], [ones.T, np.zeros((1, 1))]])
    x = np.linalg.solve(system, np.append(target_products, square_norm))[:-1]
    square_error = square_norm - 2 * x @ target_products + x @ products @ x
    return x.tolist(), float(np.sqrt(max(square_error, 0.0) / square_norm))


def weighted_sum(
    snapshots: Sequence[Mapping[str, Tensor]], x: Sequence[float], averaged: set[str]
) -> dict[str, Tensor]:
    """The sum of snapshots, with weights x, of the tensors named in `averaged`, each in its dtype.

    The snapshots are in the order of their steps. All other tensors, which are buffers, are those of the last one.
    """
    last = snapshots[-1]
    average_weights = {name: tensor.clone() for name, tensor in last.items()}
    for name in average_weights.keys() & averaged:
        total = torch.zeros_like(last[name], dtype=torch.float64)
        for weight, snapshot in zip(x, snapshots, strict=True):
            total += weight * snapshot[name].double()
        average_weights[name] = total.to(last[name].dtype)
    return average_weights
