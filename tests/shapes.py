"""Shapes are checked, but only where a function names some: to check all that has types takes twice as long."""

from inspect import get_annotations
from typing import Any, get_args

import jaxtyping

every = jaxtyping.jaxtyped


def names_shapes(annotation: object) -> bool:
    """Whether a type, or one within it, is an array's."""
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(names_shapes, get_args(annotation)))


def only_with_shapes(thing: Any = None, **how: Any) -> Any:  # noqa: ANN401, a class or a function
    """In the place of `jaxtyped`, which the import hook of jaxtyping puts before every class and function."""
    if thing is None:
        return lambda thing: only_with_shapes(thing, **how)
    annotations = get_annotations(thing).values()
    return every(thing, **how) if any(map(names_shapes, annotations)) else thing


jaxtyping.jaxtyped = only_with_shapes  # as this is imported, before dumo
