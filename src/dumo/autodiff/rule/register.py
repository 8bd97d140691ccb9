"""The decorator that makes a function the rule of functions of torch."""

from collections.abc import Callable

from torch import Tensor

from dumo.autodiff.dual import ALONE, RULES, Dual, Name, NoRule, Rule

OPERATORS = (
    "abs add radd sub rsub mul rmul truediv rtruediv pow rpow matmul rmatmul neg getitem setitem eq ne lt le gt ge"
)


METHODS: dict[Name, list[str]] = {}  # the names that Tensor knows a function by
for _name in dir(Tensor):
    if callable(_f := getattr(Tensor, _name)) and (not _name.startswith("__") or _name.strip("_") in OPERATORS.split()):
        METHODS.setdefault(_f, []).append(_name)


def rule(*functions: Name) -> Callable[[Rule], Rule]:
    """Make the decorated function the rule of these functions of torch; of methods of Tensor, a method of Dual too.

    Where an argument is annotated as Dual, it is the first, and no other may move.
    """

    def register(f: Rule) -> Rule:
        for function in functions:
            RULES[function] = f
            if Dual in f.__annotations__.values():
                ALONE.add(function)
            for name in METHODS.get(function, ()):
                setattr(Dual, name, f)
        return f

    return register


def elsewhere(name: str, inplace: bool) -> None:
    """Raise NoRule where the result is to overwrite the input, which other Duals may be views of."""
    if inplace:
        raise NoRule(f"{name} with inplace=True")
