"""Arguments that a function of `import dumo` does not have, answered with the one that it has.

`with_known_arguments` wraps a function. What other libraries call an argument is refused, too: one thing has one name.
"""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeVar

from dumo.config.foreign import ours
from dumo.config.suggestion import nearest

P = ParamSpec("P")
R = TypeVar("R")
# By what diffusers and others call an argument, or dumo did: its names here. The first counts that a function has.
_FOREIGN_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "batch_size": ("count", "c"),
    "cfg_scale": ("guidance",),
    "class_labels": ("labels", "c"),
    "classes": ("labels", "c"),
    "count": ("c",),
    "guidance_scale": ("guidance",),
    "image": ("source",),
    "labels": ("c",),
    "latents": ("noise",),
    "n": ("count", "c"),
    "num_images": ("count", "c"),
    "num_inference_steps": ("nfe",),
    "num_samples": ("count", "c"),
    "num_steps": ("nfe",),
    "output_dir": ("out",),
    "output_type": ("output",),
    "prompt": ("prompts",),
    "report_to": ("track",),
    "resume_from_checkpoint": ("step",),
    "sampler": ("solver",),
    "scheduler": ("solver",),
    "steps": ("nfe",),
}


def with_known_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """The function; a keyword that it does not have raises TypeError with the name to write."""
    known = [*signature(function).parameters]

    @wraps(function)
    def call(*values: P.args, **keywords: P.kwargs) -> R:
        for name in keywords:
            if name not in known:
                raise TypeError(f"{function.__name__}() has no argument '{name}': {_hint(name, known)}")
        return function(*values, **keywords)

    return call


def _hint(name: str, known: list[str]) -> str:
    """What to write instead of an argument, of a function that has those in `known`."""
    for other in _FOREIGN_ARGUMENTS.get(name, ()):
        if other in known:
            return f"here it is {other}"
    field = ours(name, as_option=True) if "changes" in known else None
    return field or nearest(name, [other for other in known if other != "self"])
