"""Which name a person may have meant: the nearest of the valid ones. All of dumo asks here, of settings to commands.

`require_known` refuses a name that is not valid. `nearest` and `nearest_few` are the ends of messages of others.
`dumo.config.foreign` has the words of other programs, which no spelling is near to. Imports no torch.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from dumo.error import UserError
from dumo.io.read import brief


def nearest(name: str, names: list[str]) -> str:
    """A hint: the one of the valid names that is nearest, or all of them where none is near."""
    near_names = get_close_matches(brief(name), names, n=1)
    return f"did you mean '{near_names[0]}'?" if near_names else f"valid: {', '.join(names)}"


def require_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raise UserError where `name` is not known, with the nearest known name. `what` is a noun: "recipe"."""
    names = [*known]
    if name not in names:
        raise UserError(f"there is no {what} '{name}'; {nearest(name, names)}")


def nearest_few(name: str, names: Iterable[str]) -> str:
    """A hint of up to three near names, for where all names would be too many; "" if none is near."""
    return did_you_mean(nearest_names(name, names))


def nearest_names(name: str, names: Iterable[str]) -> list[str]:
    """Up to three near names, the nearest first."""
    return get_close_matches(brief(name), list(dict.fromkeys(names)), n=3, cutoff=0.5)


def did_you_mean(names: Sequence[str]) -> str:
    """The question which of these names was meant, with a space at its end; "" for none."""
    quoted = [f"'{name}'" for name in names]
    if not quoted:
        return ""
    if len(quoted) == 1:
        return f"did you mean {quoted[0]}? "
    return f"did you mean {', '.join(quoted[:-1])} or {quoted[-1]}? "


def nearest_option(option: str, options: Iterable[str]) -> str:
    """A hint of the nearest option, dashes apart; "" if none is near."""
    option_by_name = {name.lstrip("-"): name for name in options}
    near_names = get_close_matches(option.lstrip("-"), option_by_name, n=1)
    return f"did you mean {option_by_name[near_names[0]]}?" if near_names else ""
