"""Classes from outside (`module:Class`) in a run. It resumes only with the code that it began with.

`is_from_outside` says whether a part is of such a class, `has_own_net` and `has_own_parts` whether the user wrote the
net, or the net or the loss, and `names_code` whether a run takes consent.

`shell_command` adds to a command on a run what its classes need.

`codes_of` hashes what a spec uses, for `resolved` in run.yaml; `require_same_code` compares with it later.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import JsonValue

from dumo.config.source import CODE_KEY
from dumo.config.spec import Run
from dumo.types import Spec, UserError
from dumo.types.outside import OUTSIDE, branch, code_hash


def is_from_outside(part: object) -> bool:
    """Whether a part of a run is of a class that is not dumo's."""
    return branch(part) == OUTSIDE


def has_own_net(run: Run) -> bool:
    """Whether the net is a module of Python, or of a class from outside."""
    return run.net.kind == "module" or is_from_outside(run.net)


def has_own_parts(run: Run) -> bool:
    """Whether the net or the loss is a user's own."""
    return has_own_net(run) or is_from_outside(run.objective)


def names_code(run: Run) -> bool:
    """Whether training a run takes consent (`dumo.config.trust`): for a class from outside, or a teacher's function."""
    return _has_own_class(run) or (run.teacher is not None and run.teacher.kind == "python")


def shell_command(run: Run, command: str) -> str:
    """Return a command on a run, as one types it: with --trust-code if the run has a class from outside."""
    return f"{command} --trust-code" if _has_own_class(run) else command


def _has_own_class(run: Run) -> bool:
    """Whether a run has a class from outside, at any depth."""
    return any(True for _ in codes_of(run))


def codes_of(part: object) -> Iterator[tuple[str, str | None]]:
    """The name of each class from outside in a spec, at any depth, with the hash of its code; None: no source is there.

    What is no spec has none.
    """
    if isinstance(part, Spec):
        if is_from_outside(part):
            yield getattr(part, "kind", ""), code_hash(part)
        for name in type(part).model_fields:
            yield from codes_of(getattr(part, name))


def require_same_code(spec: Spec, resolved: Mapping[str, JsonValue], folder: Path) -> None:
    """Raise UserError if the code of a class from outside has changed since the run in `folder` began.

    `resolved` has the hashes of that time under `code`. A class that has none there came later, and is not compared.
    """
    hash_by_name = resolved.get(CODE_KEY)
    if not isinstance(hash_by_name, dict):
        return
    for name, hash_now in codes_of(spec):
        if name in hash_by_name and hash_by_name[name] != hash_now:
            raise UserError(
                f"{name} is not the code that {folder} was trained with: bring that back, or train in another folder"
            )
