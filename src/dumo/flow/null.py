"""What an objective does where a network has no null, which stands for no condition.

`without_drop` is for training, `guidance_of` for sampling.

Dropped conditions and guidance go together: guidance needs what the network makes of no condition, and a network learns
that from dropped ones. Where nothing stands for no condition, none is dropped and nothing guides.
"""

from typing import Any

from dumo.flow.guide import CFG, GuidanceScale, Guide
from dumo.runtime.limits import FACTOR
from dumo.types import Objective, UserError


def without_drop(objective: Objective) -> Objective:
    """A copy of the objective that drops no condition and guides its target by none."""
    fields = dict(objective)
    changed: dict[str, Any] = {}
    if fields.get("drop"):
        changed["drop"] = 0.0
    guide = fields.get("guide")
    if isinstance(guide, Guide) and guide.active:
        changed["guide"] = Guide()
    if isinstance(objective.needs.guide, int | float) and "scale" in fields:
        changed["scale"] = 1.0
    return objective.model_copy(update=changed)


def guidance_of(objective: Objective, scale: float) -> CFG:
    """Guidance of this scale while sampling; 1 is none.

    Raises UserError where no condition was dropped in training, or the objective has guided its target itself.
    """
    if not 0 < scale <= FACTOR:
        raise UserError(f"guidance = {scale:g}: give a scale above 0, of which 1 is no guidance")
    if scale == 1:
        return CFG()
    in_training = GuidanceScale.of(objective.needs)
    if in_training.active:
        raise UserError(
            f"guidance = {scale:g}: {in_training.reason()}: leave guidance out, or train with {in_training.off}"
        )
    if not objective.drop:
        raise UserError(
            f"guidance = {scale:g} needs what the network makes of no condition, and none was dropped in training: "
            "leave it out, or train with classes= or null="
        )
    return CFG(scale=scale)
