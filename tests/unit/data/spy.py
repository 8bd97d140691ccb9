"""What is called from here on, and with what."""

from collections.abc import Callable
from typing import Any

import pytest


def spied(patch: pytest.MonkeyPatch, owner: object, name: str, note: Callable[..., Any]) -> list[Any]:
    """What `note` makes of the arguments of each call of `owner`'s `name`, which goes on as it was."""
    seen, real = list[Any](), getattr(owner, name)

    def noted(*given: Any, **named: Any) -> Any:  # noqa: ANN401, of any function
        seen.append(note(*given))
        return real(*given, **named)

    patch.setattr(owner, name, noted)
    return seen
