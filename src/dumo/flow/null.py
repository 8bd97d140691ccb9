"""What an objective does where a network has no null, which stands for no condition.

`without_drop` is for training, `guidance_of` and `require_guidable` for sampling.

Dropped conditions and guidance go together: guidance needs what the network makes of no condition, and a network learns
that from dropped ones. Where nothing stands for no condition, none is dropped, and no guidance has an effect.
"""

from typing import Any

from dumo.flow.fit import guidance_refusal
from dumo.flow.guide import CFG, GuidanceScale, Guide
from dumo.runtime.limits import FACTOR
from dumo.types import Objective, UserError


def without_drop(objective: Objective) -> Objective:
    """A copy of the objective that drops no condition and guides its target by none.

    iMF keeps its knobs, but they guide nowhere: where V(null) is V(c), its v* settles at the unguided velocity.
    """
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


def guidance_of(scale: float) -> CFG:
    """Guidance of this scale while sampling; 1 is none. Raises UserError for what is no scale."""
    if not 0 < scale <= FACTOR:
        raise UserError(f"guidance = {scale:g}: give a scale above 0, of which 1 is no guidance")
    return CFG(scale=scale)


def require_guidable(guide: CFG, objective: Objective, trained: GuidanceScale, *, has_null: bool) -> None:
    """Raise UserError where a flow's network is not to be guided so while it is sampled.

    trained: how its target was guided in training.
    has_null: whether something stands for no condition.
    """
    if not guide.active:
        return
    if not has_null:
        raise UserError(
            f"guidance = {guide.scale:g} needs what the network makes of no condition, and none was dropped in "
            "training: leave it out, or train with classes= or null="
        )
    refusal = guidance_refusal(objective, trained, set_knobs="give dumo.Flow(knobs=...)")
    if refusal:
        raise UserError(f"guidance = {guide.scale:g}: {refusal.reason}: leave guidance out, {refusal.instead}")
