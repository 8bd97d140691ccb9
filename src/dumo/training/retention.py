"""Which checkpoints of a run stay: the newest, and the last from before the loss went astray."""

import re
import shutil
import warnings
from pathlib import Path
from shlex import quote

from dumo.io import file as files
from dumo.training import manifest
from dumo.training.trend import FAR


def standing(folder: Path, suffix: str = "") -> dict[int, Path]:
    """The checkpoints in `folder`, damaged ones included, or its files of this suffix, by step, the first one first."""
    name = re.compile(rf"step-(\d+){re.escape(suffix)}")
    found = {int(match[1]): path for path in folder.glob("step-*") if (match := name.fullmatch(path.name))}
    return dict(sorted(found.items()))


def places(run: Path) -> list[Path]:
    """Where a run keeps weights by step: its checkpoints, its milestones, and the snapshots of each average."""
    return [run / "checkpoints", run / "milestones", *sorted((run / "snapshots").glob("*"))]


def drop(folder: Path, step: int, keep: int) -> None:
    """Remove the checkpoints up to a step that come before the last `keep` whole ones.

    Where none of these is good (`dumo.training.trend`) the last good one before them stays, and a warning says so.
    """
    good = False
    for n, path in [found for found in reversed(standing(folder).items()) if found[0] <= step]:
        if keep:
            if manifest.sound(path):
                keep, good = keep - 1, good or manifest.read(path).trend.good
        elif not good and manifest.sound(path) and manifest.read(path).trend.good:
            good = True
            warnings.warn(
                f"{folder}: the loss has risen to more than {FAR:g} times its lowest, so {path.name}, from before, "
                f"is kept, too. To go on from it:  dumo train {quote(str(folder.parent))} --from {n}",
                stacklevel=2,
            )
        else:
            remove(path)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint: hidden first, for half of one must not look like one."""
    shutil.rmtree(checkpoint.rename(files.hidden(checkpoint)))


def rewind(folder: Path, step: int) -> list[int]:
    """Remove the checkpoints, or milestones, after a step; return their steps."""
    found = [one for suffix in ("", ".safetensors") for one in standing(folder, suffix).items()]
    later = {path: n for n, path in found if n > step}
    for path in later:
        remove(path) if path.is_dir() else path.unlink()
    return [*later.values()]
