"""Prompts: texts of the user's own, as rows behind those that a net was trained on.

A prompt that is a caption of the data is that caption; another is encoded as they were, once, and has a number from
then on, as long as the run is open. So whatever samples by numbers of classes samples by prompts.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from dumo.nets.rows import Texts
from dumo.run.folder import RunFolder
from dumo.types import UserError


def prompted(opened: RunFolder, prompts: Sequence[str]) -> Int64[Tensor, " b"]:
    """The condition of each prompt, to sample by. Warns where one is cut.

    Raises UserError for none, a blank one, a run that reads no texts, and where its encoder is not there, or another.
    """
    if not prompts:
        raise UserError("there are no prompts: give one at least")
    asked = [text.strip() for text in prompts]
    if "" in asked:
        raise UserError("a prompt is empty: say what the image shows, or leave the prompt out")
    texts = texts_of(opened)
    known = {text: k for k, text in enumerate(opened.run.class_names)} | texts.prompts
    if new := [text for text in dict.fromkeys(asked) if text not in known]:
        first = texts.append(new)
        texts.prompts |= {text: first + i for i, text in enumerate(new)}
    return torch.tensor([(known | texts.prompts)[text] for text in asked])


def texts_of(opened: RunFolder) -> Texts:
    """What reads texts in a run's net. Raises UserError where nothing does."""
    found = reader(opened)
    if found is None or opened.run.captions is None:
        raise UserError(
            f"{opened.folder} was trained without captions, so it reads no prompts: give classes (--labels)"
        )
    return found


def reader(opened: RunFolder) -> Texts | None:
    """The part of the net that has a row for every condition."""
    return next((part for part in opened.net.modules() if isinstance(part, Texts)), None)


def own(opened: RunFolder) -> dict[str, int]:
    """The prompts so far, and their conditions."""
    found = reader(opened)
    return found.prompts if found else {}


def highest(opened: RunFolder) -> int:
    """The largest condition there is: that of no class, or of the last prompt."""
    return max(own(opened).values(), default=opened.run.data.classes)


def names(opened: RunFolder, c: Tensor) -> list[str]:
    """What each of these conditions is called: a class's name, a caption, or a prompt."""
    said = {k: text for text, k in own(opened).items()}
    return [said.get(k) or opened.run.class_name(k) for k in c.tolist()]
