"""User-provided classes (`module:Class`) in a run, which can only be resumed with unchanged code.

`is_from_outside` is whether a spec is of such a class, `has_own_net` and `has_own_parts` whether the user wrote the
net, or the net or the loss, and `names_code` whether a run requires consent.

`shell_command` adds --trust-code to a command if it is needed.

`codes_of` hashes the code of a spec's classes for `resolved` in run.yaml; `require_same_code` compares the hashes.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import JsonValue

from dumo.config.source import CODE_KEY
from dumo.config.spec import Run
from dumo.types import Spec, UserError
from dumo.types.outside import OUTSIDE, branch, code_hash


def is_from_outside(part: object) -> bool:
    """Whether a part of a run is of a user-provided class."""
    return branch(part) == OUTSIDE


def has_own_net(run: Run) -> bool:
    """Whether the net is a Python module or of a user-provided class."""
    return run.net.kind == "module" or is_from_outside(run.net)


def has_own_parts(run: Run) -> bool:
    """Whether the net or the loss is user-provided."""
    return has_own_net(run) or is_from_outside(run.objective)


def names_code(run: Run) -> bool:
    """Whether training a run requires consent (`dumo.config.trust`), for a user's class or a teacher's function."""
    return _has_own_class(run) or (run.teacher is not None and run.teacher.kind == "python")


def shell_command(run: Run, command: str) -> str:
    """Return a command on a run, with --trust-code if it runs code that the run names.

    A teacher's function is only called in training.
    """
    is_training = command.startswith("dumo train ")
    runs_code = names_code(run) if is_training else _has_own_class(run)
    return f"{command} --trust-code" if runs_code else command


def _has_own_class(run: Run) -> bool:
    """Whether a run has a user-provided class, at any depth."""
    return any(True for _ in codes_of(run))


def codes_of(part: object) -> Iterator[tuple[str, str | None]]:
    """Yield the name of each user-provided class in a spec, at any depth, and the hash of its code, if available.

    Other values than specs have none.
    """
    if isinstance(part, Spec):
        if is_from_outside(part):
            yield getattr(part, "kind", ""), code_hash(part)
        for name in type(part).model_fields:
            yield from codes_of(getattr(part, name))


def require_same_code(spec: Spec, resolved: Mapping[str, JsonValue], folder: Path) -> None:
    """Raise UserError if the code of a user-provided class has changed since the run in `folder` started.

    `resolved` has the original hashes under `code`. A class without a hash was added later and is not compared.
    """
    hash_by_name = resolved.get(CODE_KEY)
    if not isinstance(hash_by_name, dict):
        return
    for name, hash_now in codes_of(spec):
        if name in hash_by_name and hash_by_name[name] != hash_now:
            raise UserError(
                f"{name} is not the code that {folder} was trained with: restore it, or train in another folder"
            )
