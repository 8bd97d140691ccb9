"""What the captions of a run's data are: how many, of how many images, and how many images have none."""

import torch

from dumo.data import Images, Latents
from dumo.data.caption import Templates
from dumo.run.config.tree import Tree
from dumo.run.plan.machine import Finding
from dumo.types import UserError

LACK = 0.5  # of the images: with more that have no caption a net learns little of words. Ours


def line(run: Tree) -> str | None:
    """The captions in words; None where there are none, or they are not counted yet."""
    return next((finding.text for finding in findings(run)), None)


def findings(run: Tree) -> list[Finding]:
    """What doctor says of them, after reading those that were written of each image."""
    if run.conditions.captions is None or not run.conditions.known:
        return []
    if isinstance(run.conditions.captions, Templates):
        seen, held = run.conditions.captions.templates, run.conditions.captions.held
        out = f", and {len(held)} that are held out of training" if held else ""
        return [
            Finding(
                "captions", "ok", f"{run.data.classes:,}, of {run.data.labels} classes by {len(seen)} templates{out}"
            )
        ]
    assert isinstance(run.data, Images | Latents)
    try:
        told = run.data.all_captions()
    except UserError as error:
        return [Finding("captions", "failing", "not there, or others than the run was made with", str(error))]
    images, most = len(told.ends), int(told.counts.max())
    lacking = int((told.first(torch.arange(images)) == len(told)).sum())
    text = f"{len(told):,} of {images:,} images, {f'up to {most}' if most > 1 else 'one'} each"
    text += f"; {lacking:,} {'image has' if lacking == 1 else 'images have'} none" if lacking else ""
    if lacking > LACK * images:
        return [Finding("captions", "warning", text, "write captions of more images, or leave out those without")]
    return [Finding("captions", "ok", text)]
