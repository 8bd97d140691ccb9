"""The strip: what the net made of the same noise, step by step of its training, as a report shows it.

`draw_strip` is the entrance. It reads the samples that were made while training (`dumo.report.sheet`), adds those of
the weights that the report is of, and draws them: on the page each of these moments is a column.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from dumo.io import picture
from dumo.report.sheet import STRIP_COUNT, read_strip, sheet_conditions
from dumo.run import speed
from dumo.run.weights import RunFolder
from dumo.types import Sample

MAX_MOMENTS = 8  # of a strip, the last ones: ours, so that a telephone shows them side by side


@dataclass(frozen=True)
class StripMoment:
    """What the net made after a step."""

    step: int
    seconds: float | None  # that training took up to it; None: nothing was measured
    images: Sequence[Image.Image]  # one of each noise


def strip_samples(opened: RunFolder) -> dict[int, Sample]:
    """The samples of the strip, (6, *pixels) as images, by step; the last are of the weights that are open.

    All begin with the same noise and have the same conditions. {} of points, and where no sample was made in training.
    """
    sampler = opened.sampler
    if not sampler.is_image:
        return {}
    samples_by_step = read_strip(opened.folder, sampler.spec, opened.run.data.shape, opened.step - 1)
    steps = [*samples_by_step][1 - MAX_MOMENTS :]
    if not steps:
        return {}
    c = sheet_conditions(sampler.conditions)[:STRIP_COUNT]
    images = sampler.decode(torch.cat([samples_by_step[step] for step in steps]))
    images_by_step = dict(zip(steps, images.split(STRIP_COUNT), strict=True))
    images_by_step[opened.step] = sampler.sample(c, nfe=min(sampler.spec.nfe)).x
    return images_by_step


def draw_strip(opened: RunFolder) -> list[StripMoment]:
    """The moments of the strip, in order; [] where `strip_samples` has none."""
    moments: list[StripMoment] = []
    for step, x in strip_samples(opened).items():
        images = [picture.sheet(pixels, columns=1) for pixels in picture.to_rows(x).split(1)]
        moments.append(StripMoment(step, speed.seconds_between(opened.folder, 0, step), images))
    return moments
