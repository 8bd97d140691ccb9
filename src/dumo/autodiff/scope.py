"""Values that hold inside a `with` statement, each thread for itself."""

import threading
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def held(state: threading.local, name: str, value: object) -> Generator[None, None, None]:
    """Inside, `state.name` is the value; after it, what it was before, None if nothing."""
    before = getattr(state, name, None)
    setattr(state, name, value)
    try:
        yield
    finally:
        setattr(state, name, before)
