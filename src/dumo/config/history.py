"""A run as its run.yaml records it, with the changes that were made to it while it trained.

`RecordedRun.from_text` makes it of the text of a run.yaml (`dumo.config.source`). It answers three questions:

- `changes_to_record`: which changes must run.yaml list if the run goes on with other fields?
- `replayed`: what is the run with some changes applied, or undone?
- `identities`: by which hashes are the run's files recognized?
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dumo.config.change import override, yaml_text
from dumo.config.difference import differences, identity
from dumo.config.load import parse, run_of
from dumo.config.source import RecordedChange, RunText
from dumo.config.spec import Run


@dataclass(frozen=True)
class RecordedRun:
    """A run, and the changes that were made to it while it trained."""

    run: Run  # with the changes
    past: Sequence[RecordedChange]  # the changes, in order of their steps

    @classmethod
    def from_text(cls, text: RunText) -> "RecordedRun":
        """The run that a text describes, and the changes that it lists. Raises UserError where a field is wrong."""
        return cls(run_of(text), text.changed)

    def changes_to_record(self, new_run: Run, step: int) -> list[RecordedChange]:
        """The changes that run.yaml has to list if the run goes on after `step` as `new_run`.

        Changes after `step` are listed at `step`, since later steps are trained anew. [] where no step is trained yet.
        """
        if step == 0:
            return []
        earlier = [change for change in self.past if change.step < step]
        changes_from_here = [change for change in self.past if change.step >= step]
        for diff in differences(self.run, new_run):
            change = RecordedChange(
                step=step, field=diff.field, was=diff.was, now=diff.now, accepted=not diff.may_change
            )
            changes_from_here.append(change)

        # one change for each field, from what it was at first to what it is now
        change_by_field: dict[str, RecordedChange] = {}
        for change in changes_from_here:
            first = change_by_field.get(change.field, change)
            change_by_field[change.field] = change.model_copy(update={"step": step, "was": first.was})
        merged = [change for change in change_by_field.values() if change.was != change.now]
        return [*earlier, *merged]

    def replayed(self, changes: Sequence[RecordedChange], *, back: bool = False) -> Run:
        """The run with these changes applied in order; with `back`, with them undone from the last to the first."""
        if not changes:
            return self.run
        tree = self.run.model_dump(mode="json")
        for change in reversed(changes) if back else changes:
            if change.is_of_data:  # of the images, not of a field
                continue
            value = change.was if back else change.now
            override(tree, [f"{change.field}={yaml_text(value)}"])
        return parse(Run, tree)

    def identities(self) -> set[str]:
        """The `identity` of the run as it is now, and as it was before each change that --accept allowed."""
        identities = {identity(self.run)}
        for step in {change.step for change in self.past if change.accepted}:
            changes_since = [change for change in self.past if change.step >= step]
            identities.add(identity(self.replayed(changes_since, back=True)))
        return identities
