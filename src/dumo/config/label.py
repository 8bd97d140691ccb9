"""The number of the class that a person asks for by name or number.

`label_index` is for who knows the classes, and `split_labels` parts several labels. `require_labels` and
`require_captions` are for who has the plain values of a run alone, and import no torch. `dumo.config.conditions` knows
the data, and captions, too.
"""

from collections.abc import Sequence
from typing import Any
from unicodedata import normalize

from dumo.config.suggestion import nearest
from dumo.error import UserError
from dumo.io.read import brief
from dumo.runtime.door import option

TOY_CLASSES = {"digits": 10, "moons": 0}  # by kind of data: those whose classes no run.yaml counts


def label_index(text: str, names: Sequence[str], count: int, *, are_captions: bool = False) -> int:
    """The number of the class, or caption, with this name, else this number. Raises UserError if there is none."""
    # macOS names folders in form D of Unicode, a letter and its accent apart; keyboards write form C
    label = normalize("NFC", text.strip())
    names = [normalize("NFC", name) for name in names]
    if label in names:
        return names.index(label)
    word = brief(label)
    if word.isdecimal() and int(word) < count:
        return int(word)
    if not count:
        raise UserError(f"there is no label '{word}': this run has no classes, so give no labels")
    hint = ""
    if names and not are_captions and not word.isdecimal():
        hint = f" {nearest(word, names)};"
    fix = "; give another caption as a prompt" if are_captions else ""
    raise UserError(f"there is no label '{word}':{hint} labels run from 0 to {count - 1}{fix}")


def split_labels(text: str, names: Sequence[str]) -> list[str]:
    """The labels in a text with commas between them. A name may have commas, too: the longest that fits is taken."""
    known_names = {normalize("NFC", name) for name in names}
    max_parts = 1 + max((name.count(",") for name in names), default=0)
    parts = text.split(",")
    labels: list[str] = []
    while parts:
        for num_parts in range(min(max_parts, len(parts)), 0, -1):
            label = ",".join(parts[:num_parts])
            if num_parts == 1 or normalize("NFC", label.strip()) in known_names:
                labels.append(label)
                parts = parts[num_parts:]
                break
    return labels


def require_labels(text: str, tree: dict[str, Any]) -> None:
    """Raise UserError for labels, with commas between them, that no class of a run has.

    `tree` has the run's plain values. Where these do not say its classes, nothing is raised.
    """
    classes = _classes_of(tree)
    if classes is not None:
        count, names = classes
        for label in split_labels(text, names):
            label_index(label, names, count)


def require_captions(tree: dict[str, Any]) -> None:
    """Raise UserError where the plain values of a run say that it was trained on classes: it reads no prompts."""
    classes = _classes_of(tree)
    if classes is not None:
        raise UserError(no_prompts(classes[0]))


def no_prompts(count: int) -> str:
    """The message that refuses prompts for a run with this number of classes, and without captions."""
    fix = f"give classes ({option('labels')})" if count else "leave them out, or train a run with captions"
    return f"this run was trained without captions, so it reads no prompts: {fix}"


def _classes_of(tree: dict[str, Any]) -> tuple[int, Sequence[str]] | None:
    """The number of classes of a run, and their names if they have some; None: captions, or it does not say them."""
    data = tree.get("data")
    path = "data"
    if isinstance(data, dict) and isinstance(data.get("images"), dict):  # latents
        data = data["images"]
        path = "data.images"
    if not isinstance(data, dict) or data.get("captions"):
        return None
    resolved = tree.get("resolved")
    resolved_fields = resolved if isinstance(resolved, dict) else {}
    count = data.get("classes") or resolved_fields.get(f"{path}.classes")
    if not count:
        count = TOY_CLASSES.get(str(data.get("kind")))
    names: Sequence[str] = ()
    for field in ("names", "titles"):  # as `Conditions.names` takes them
        names = names or data.get(field) or resolved_fields.get(f"{path}.{field}") or ()
    return (count, names) if isinstance(count, int) else None
