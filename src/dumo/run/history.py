"""How a run that goes on stands to what it was: what has changed since, what is made anew, what is lost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dumo.io.source import Source
from dumo.run import deviation
from dumo.run.config.change import shown
from dumo.run.config.load import changes
from dumo.run.config.source import Noted
from dumo.run.config.spec import Run
from dumo.run.folder import note
from dumo.runtime import dist
from dumo.training import log, manifest
from dumo.types import UserError

PROGRAMS = ("dumo", "torch")  # whose versions change what a step computes


@dataclass(frozen=True)
class History:
    """What of a folder's run has changed when it goes on after `step`; made and written by one process alone."""

    run: Run
    folder: Path
    source: Source
    step: int
    fingerprint: str | None  # of the data now
    changed: Sequence[Noted]
    versions: dict[str, str]  # that wrote the checkpoint

    @classmethod
    def of(
        cls, run: Run, folder: Path, source: Source, step: int, last: Path | None, *, new_data: bool = False
    ) -> "History":
        """Look, and write nothing. Raises UserError if the data have changed, and may not (`new_data`)."""
        was, now, changed = deviation.fingerprint(folder), source.fingerprint(), changes(folder, run, step)
        if last and was is not None and was != now:
            if not new_data:
                raise UserError(
                    f"{folder}: the data are not those that it was trained on (fingerprint {was} in {deviation.FILE}, "
                    f"{now} now): put them back as they were, give another folder with --out, or go on with these by "
                    "--new-data"
                )
            changed = [*changed, Noted(step=step, field="data", was=was, now=now)]
        return cls(run, folder, source, step, now, changed, manifest.read(last).versions if last else {})

    def write(self, *, anew: bool = False) -> Iterator[str]:
        """Bring the folder to this state, and yield what there is to say of it, in lines.

        `anew`: the checkpoints and milestones after the step go; what was logged after it goes anyhow.
        """
        file = self.folder / "metrics.jsonl"
        if anew:
            gone = [manifest.rewind(place, self.step) for place in manifest.places(self.folder)]
            rows = sum(row["step"] > self.step for row in log.read_log(file))
            steps = sorted({step for steps in gone for step in steps})
            what = [f"the checkpoints and milestones of steps {', '.join(f'{n:,}' for n in steps)}"] if steps else []
            what += [f"{rows:,} rows of the log"] if rows else []
            if what:
                yield f"going on from step {self.step:,}: what came after it is removed, {' and '.join(what)}"
        log.rewind(file, self.step)
        for first, last in log.gaps(log.read_log(file), self.run.train.log_every):
            yield f"{file}: rows between steps {first:,} and {last:,} are lost; the run goes on without them"
        note(self.run, self.folder, self.changed)
        deviation.note(self.folder, self.source, self.fingerprint)
        for one in self.changed:
            if one.step == self.step:
                yield f"from step {self.step:,} on {one.field} is {shown(one.now)}, and was {shown(one.was)}"
        here = dist.versions()
        for name in PROGRAMS:
            if (then := self.versions.get(name, here[name])) != here[name]:
                yield f"{name} is {here[name]}, and was {then} up to step {self.step:,}: numbers may round otherwise"
