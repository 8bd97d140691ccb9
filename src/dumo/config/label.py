"""Find the number of a class by its name or number, and split lists of such labels.

`dumo.config.conditions` calls these with the classes or captions of a run.
"""

from collections.abc import Sequence
from unicodedata import normalize

from dumo.config.suggestion import nearest
from dumo.error import UserError
from dumo.io.read import brief


def label_index(text: str, names: Sequence[str], count: int, *, are_captions: bool = False) -> int:
    """Return the number of the class or caption with this name or number.

    Raises UserError if there is none.
    """
    # Normalize, because macOS stores folder names in Unicode form D, but keyboards produce form C.
    label = normalize("NFC", text.strip())
    names = [normalize("NFC", name) for name in names]
    if label in names:
        return names.index(label)
    word = brief(label)
    if word.isdecimal() and int(word) < count:
        return int(word)
    if not count:
        raise UserError(f"there is no label '{word}': this run has no classes: remove the labels")
    hint = ""
    if names and not are_captions and not word.isdecimal():
        hint = f" {nearest(word, names)};"
    fix = "; give another caption as a prompt" if are_captions else ""
    raise UserError(f"there is no label '{word}':{hint} labels run from 0 to {count - 1}{fix}")


def split_labels(text: str, names: Sequence[str]) -> list[str]:
    """Split a comma-separated list of labels.

    Names may contain commas; the longest matching name is used.
    """
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
