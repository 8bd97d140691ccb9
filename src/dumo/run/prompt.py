"""Prompts: texts of the user's own, as rows behind those that a net was trained on.

A prompt that is a caption of the data is that caption; another is encoded as they were, once, and has a number from
then on, as long as the run is open. So whatever samples by numbers of classes samples by prompts.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from dumo.run.sampler import Sampler
from dumo.types import UserError


def prompted(sampler: Sampler, prompts: Sequence[str]) -> Int64[Tensor, " b"]:
    """The condition of each prompt, to sample by. Warns where one is cut.

    Raises UserError for none, a blank one, a run that reads no texts, and where its encoder is not there, or another.
    """
    if not prompts:
        raise UserError("there are no prompts: give one at least")
    wanted = [text.strip() for text in prompts]
    if "" in wanted:
        raise UserError("a prompt is empty: say what the image shows, or leave the prompt out")
    texts = sampler.texts
    if texts is None or sampler.conditions.captions is None:
        raise UserError("this run was trained without captions, so it reads no prompts: give classes (--labels)")
    texts.prompts |= {text: texts.prompts.pop(text) for text in wanted if text in texts.prompts}  # the last used
    known = {text: k for k, text in enumerate(sampler.conditions.names)} | texts.prompts
    if new := [text for text in dict.fromkeys(wanted) if text not in known]:
        first = texts.append(new)
        texts.prompts |= {text: first + i for i, text in enumerate(new)}
    return torch.tensor([(known | texts.prompts)[text] for text in wanted])


def names(sampler: Sampler, c: Tensor) -> list[str]:
    """What each of these conditions is called: a class's name, a caption, or a prompt."""
    prompts = {k: text for text, k in sampler.prompts.items()}
    return [prompts.get(k) or sampler.conditions.name(k) for k in c.tolist()]
