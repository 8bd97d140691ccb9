"""What a command asks of a training: the same on all ranks, and obeyed once.

A `Request` goes back to a step, or trains for some minutes more. torchrun starts all ranks again with the words of
the first start, and so does Slurm with those of a job; a person types the same command again. So the run's folder has a
note of what was obeyed last.

1. `require_same_request` compares what the ranks were asked for.
2. `Request.was_obeyed` asks whether a start before this one has done it.
3. `run.history` calls `Request.note`, once it has.
4. `run.train` calls `note_end` after the last step, or where training diverged, and `dumo.train` where a callback ended
   it: from then on the same words are a new request.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from dumo.config.change import yaml_text
from dumo.config.spec import Run
from dumo.io.read import read_json, write_json
from dumo.run.folder import OBEYED_FILE
from dumo.runtime import dist
from dumo.training import agreement
from dumo.types import UserError, marks_of

_OF_LAST_COMMAND = "of_last_command"  # key of a note: whether the last start that is no restart asked for the same


@dataclass(frozen=True)
class Request:
    """What is asked of the run in a folder."""

    folder: Path
    step: int | None  # that of the checkpoint from which to go on; None: the last one
    changes: tuple[str, ...]  # of fields, each a.b=c
    accept: bool = False  # other fields or data than it was trained by

    @property
    def is_one_time(self) -> bool:
        """Whether to do it again would do something else."""
        return self.step is not None

    def was_obeyed(self) -> bool:
        """Whether a start before this one, with the same words, has obeyed it. Every rank must call it.

        Restart counters alone cannot tell: torchrun misses some restarts, and a start may die before it obeys. So the
        note decides; the counters only tell a restart from the same words typed anew after the training ended.
        """
        is_restart = any(agreement.gather_results(dist.is_restart))

        def find_note() -> bool:
            note = _read_note(self.folder) if self.is_one_time else None
            if note is None:
                return False
            if is_restart:  # its words are those of the first start; an unseeded net has other numbers, though
                return note.get(_OF_LAST_COMMAND, True) and note["from"] == self.step
            is_noted = note == {**note, **self._note(has_ended=False)}
            # A note of another request stays, since this one may be refused; no restart may take it for one of this.
            write_json(self.folder / OBEYED_FILE, {**note, _OF_LAST_COMMAND: is_noted})
            return is_noted

        return agreement.on_main_rank(find_note)

    def obeyed_line(self) -> str:
        """A line for a user who asks for it again."""
        return (
            f"{self.folder} has obeyed --from {self.step} already, and goes on from its last checkpoint: to obey it "
            f"again, remove {self.folder / OBEYED_FILE}"
        )

    def note(self) -> None:
        """Note in the folder that it is obeyed. One that may be obeyed again removes the note of the one before."""
        if self.is_one_time:
            write_json(self.folder / OBEYED_FILE, self._note(has_ended=False))
        else:
            (self.folder / OBEYED_FILE).unlink(missing_ok=True)

    def _note(self, *, has_ended: bool) -> dict[str, Any]:
        return {"from": self.step, "changes": [*self.changes], "has_ended": has_ended}


def note_end(folder: Path) -> None:
    """Note, where something was to be obeyed once, that the training has come to its end."""
    note = _read_note(folder)
    if note is not None:
        write_json(folder / OBEYED_FILE, {**note, "has_ended": True})


def _read_note(folder: Path) -> dict[str, Any] | None:
    """The note in a run's folder; None: there is none. Raises UserError for a damaged file."""
    file = folder / OBEYED_FILE
    return read_json(file) if file.exists() else None


def require_same_request(request: Request, run: Run) -> None:
    """Raise UserError, on all ranks, where one is asked for something else than rank 0. Every rank must call it.

    `run` is what is to be trained. Paths may differ: what lies there is compared by its hash.
    """

    def requested_values() -> dict[str, object]:
        values: dict[str, object] = {
            "--from": request.step,
            "--accept": request.accept,
        }
        values.update(_values_of(run.model_copy(update={"resolved": {}})))
        return values

    main_values, *other_values = agreement.gather_results(requested_values)
    for rank, values in enumerate(other_values, start=1):
        for name in {**main_values, **values}:
            main_value = main_values.get(name)
            value = values.get(name)
            if value != main_value:
                raise UserError(
                    f"{name} is {yaml_text(value)} on rank {rank}, and {yaml_text(main_value)} on rank 0: type the "
                    "same command on every node"
                )


def _values_of(spec: BaseModel, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The fields of a spec that are no paths, by dotted path, as JSON values. `prefix` stands before each path."""
    for name, field in type(spec).model_fields.items():
        value = getattr(spec, name)
        if marks_of(field).get("where"):
            continue
        if isinstance(value, BaseModel):
            yield from _values_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", to_jsonable_python(value)
