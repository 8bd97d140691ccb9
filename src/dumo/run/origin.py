"""The run that a checkpoint holds, and whether a folder's run.yaml still says the same.

A checkpoint has the run as it was up to its step, with what had changed by then; run.yaml may have been edited since. A
field that makes another function, training or sample must be the same in both, or be noted as changed at that step or
later. Files of weights alone have a hash of their run (`dumo.config.load.identity`).
"""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dumo.config.code import require_same_code
from dumo.config.load import Difference, Written, differences, identity, load
from dumo.config.source import FILE, Noted, noted
from dumo.config.spec import Run
from dumo.runtime import dist, typed
from dumo.training import checkpoint, manifest
from dumo.types import UserError

FUNCTION = ("data", "net", "objective", "path")  # parts of a run that say what its weights mean


@dataclass(frozen=True)
class Kept(Written):
    """The run that a checkpoint holds, with what was changed before its step."""

    name: str
    step: int

    @classmethod
    def of(cls, place: Path) -> "Kept | None":
        """That of a checkpoint; None, with a warning, of one from before they held any. Raises UserError if damaged."""
        if file := manifest.run_of(place):
            return cls(load(file), noted(file), place.name, manifest.read(place).step)
        if dist.is_main():
            words = f"{place} was written before checkpoints held their run: {FILE} is not compared with it"
            warnings.warn(words, stacklevel=2)
        return None

    def differs(self, there: Written) -> list[Difference]:
        """Where a run.yaml is not this run with the changes that it notes since."""
        now = self.replayed([one for one in there.past if one.step >= self.step])
        return [*meant(there.past, self.step), *differences(now, there.run)]

    def lines(self, found: Sequence[Difference], there: Written) -> list[str]:
        """Differences from a run.yaml in words."""
        since = {one.field for one in there.past if one.step >= self.step}
        here = f"in checkpoint {self.name}"
        return [one.between("as noted" if one.field in since else here, f"in {FILE}") for one in found]


def meant(past: Sequence[Noted], step: int) -> list[Difference]:
    """What was accepted later, and makes another function of weights of this step."""
    later = [one for one in past if one.accepted and one.step > step and one.field.split(".")[0] in FUNCTION]
    return [Difference(one.field, one.was, one.now, may=False) for one in later if not one.of_data]


def require_own(run: Run, folder: Path, place: Path) -> None:
    """Raise UserError where a checkpoint, a part of one, or a milestone is not of the run that run.yaml says."""
    there = Written(run, noted(folder))
    holder = next((one for one in (place, place.parent) if (one / manifest.NAME).is_file()), None)
    kept = Kept.of(holder) if holder else None
    if holder and holder.resolve().parent == (folder / "checkpoints").resolve():
        lines = kept.lines(kept.differs(there), there) if kept else []
    else:
        whose = identity(kept.run) if kept else checkpoint.facts_of(place).get("run")
        if whose not in (None, *there.identities()):
            raise UserError(f"{place} has weights of another run than {folder}: take others, or that run's folder")
        lines = [str(one) for one in meant(there.past, checkpoint.step_of(place, run.train.steps))]
    if lines:
        lines = [f"{folder / FILE} is not the run that {place} was trained by:", *lines]
        way = f"Put these fields back. To train on with them as they are:  dumo train {typed(folder)} --accept"
        raise UserError("\n  ".join(lines) + f"\n{way}")
    if kept:
        require_same_code(run, kept.run.resolved, folder)


def require_place(file: Path, there: Written, kind: str, step: int, **facts: object) -> None:
    """Raise UserError where a file of weights alone is of another run, or is not what its place in the folder says.

    What a file does not say is taken: it is from before it was written down.
    """
    said = checkpoint.facts_of(file)
    if said.get("run") not in (None, *there.identities()):
        raise UserError(
            f"{file} has weights of another run than {FILE} says: put back those that this run kept, or remove them"
        )
    expected = {"kind": kind, "step": step, **facts}
    said["step"] = checkpoint.step_of(file, step)
    for name, value in expected.items():
        if said.get(name, value) != value:
            raise UserError(
                f"{file} says that its {name} is {said[name]}, not {value}: put each file back in its place"
            )


def newest(standing: Mapping[int, Path], step: int | None) -> Kept | None:
    """The run that the checkpoint of `step` holds, or the last one that can be read; None: there is none."""
    for place in reversed([path for n, path in standing.items() if step in (None, n)]):
        with suppress(UserError):  # who begins there looks at the whole of it
            return Kept.of(place)
    return None


def require_same(there: Written, run: Run, folder: Path, kept: Kept | None, *, accept: bool) -> None:
    """Raise UserError where a folder's run.yaml is not what its checkpoint holds, or another run is asked for.

    What may change is noted, as is all with `accept`.
    """
    require_same_code(there.run, there.run.resolved | (kept.run.resolved if kept else {}), folder)
    edited = [one for one in kept.differs(there) if not one.may] if kept else []
    asked = [one for one in differences(there.run, run) if not one.may]
    if accept or not (edited or asked):
        return
    way = f"or take them as they are by --accept, which notes them in {FILE}"
    if kept and edited:
        lines = "\n  ".join([f"{folder / FILE} is not as it was trained:", *kept.lines(edited, there)])
        raise UserError(f"{lines}\nPut these fields back, {way}")
    lines = "\n  ".join([f"{folder} holds another run:", *map(str, asked)])
    raise UserError(f"{lines}\nGive another folder with --out, or remove this one, {way}")


def before_step(folder: Path, last: Path | None) -> Written | None:
    """The run that the steps up to a checkpoint were of, and what had changed in it; None: none was written down.

    The checkpoint says so; one from before they did leaves it to run.yaml.
    """
    if not (folder / FILE).is_file():
        return None
    past, kept = noted(folder), Kept.of(last) if last else None
    if kept is None:
        return Written(load(folder), past)
    return Written(kept.run, [*kept.past, *(one for one in past if one.of_data and one.step >= kept.step)])
