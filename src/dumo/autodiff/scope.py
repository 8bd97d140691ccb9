"""Values that hold inside a `with` statement, each thread for itself."""

import threading
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def held(state: threading.local, name: str, value: object) -> Generator[None, None, None]:
    """Inside, `state.name` is the value; after it, what it was before.

    It must be there from the start of the thread: a name that comes later would have a compiler begin again.
    """
    before = getattr(state, name)
    setattr(state, name, value)
    try:
        yield
    finally:
        setattr(state, name, before)
