"""Another average of a run's weights, made after training of the averages that it kept (`dumo.training.snapshot`)."""

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

from dumo.config.load import load
from dumo.config.source import FILE
from dumo.io import file as files
from dumo.io.weights import apart, compare
from dumo.io.weights import load as load_weights
from dumo.training import checkpoint, frozen, snapshot
from dumo.training.ema import WIDEST, PowerEma
from dumo.training.snapshot import Profile
from dumo.types import UserError

FAR = 0.05  # a profile that is not met to this share of its norm is refused: ours


@dataclass(frozen=True)
class Averaged:
    """An average that was made: its file, of which step, of how many snapshots, and how far its profile is missed."""

    file: Path
    step: int
    count: int
    error: float  # a share of the profile's norm


def average(source: str, std: float, out: Path | None = None) -> Averaged:
    """Write the average of a width, as of a run's last snapshot, to `out`, or into averages/ in the run's folder.

    Raises UserError for a width that is none, that the snapshots do not give, or where there are none; OSError where
    nothing can be written.
    """
    if not 0 < std < WIDEST:
        raise UserError(f"--std {std:g}: a width lies between 0 and {WIDEST:.3f}, the plain mean of a run; try 0.1")
    if out and out.suffix != ".safetensors":
        raise UserError(f"--out {out}: give a file that ends in .safetensors")
    folder = Path(source)
    if not (folder / FILE).is_file():
        raise UserError(f"{source} is no run's folder (it has no {FILE}): train one first")
    run = load(source)
    kept = snapshot.kept(folder / snapshot.FOLDER, run.train)
    if not kept:
        ways = [f"--set train.snapshots={max(1, run.train.steps // 10)}"]
        if not any(isinstance(ema, PowerEma) for ema in run.train.ema):
            ways.insert(0, "--set 'train.ema=[{kind: power, std: 0.05}, {kind: power, std: 0.1}]'")
        raise UserError(f"{folder} kept no averages to make others of: train with {' '.join(ways)}")
    last, net = max(step for step, _ in kept), run.outline()
    x, error = snapshot.fit([*kept], Profile(last, std))
    if error > FAR:
        widths = ", ".join(f"{width:g}" for width in sorted({width for _, width in kept}))
        raise UserError(
            f"--std {std:g}: the nearest sum of {len(kept)} snapshots misses that average by {error:.0%}, and "
            f"{FAR:.0%} is the most: take a width nearer to theirs ({widths}), or train with more of them "
            "(train.snapshots)"
        )
    found = [load_weights(path) for path in kept.values()]
    for path, one in zip(kept.values(), found, strict=True):
        compare(path, one, frozen.trained(net), "the run", checkpoint.FIT)
    weights = snapshot.mixed(found, x, {name for name, _ in net.named_parameters(remove_duplicate=False)})
    file = out or folder / "averages" / f"std-{std:g}.safetensors"
    with files.whole(file) as half:
        safetensors.torch.save_file(apart(weights), half, metadata={"step": str(last)})
    return Averaged(file, last, len(kept), error)
