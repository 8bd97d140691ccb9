"""The objectives that ship with dumo, by kind, each imported when it is first asked for."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from pydantic_core import to_json

from dumo.error import UserError
from dumo.types import Objective

# The class of each kind, as module:Class. `dumo.objectives` joins the same classes in a union for runs.
OBJECTIVES = {
    "alpha_flow": "dumo.objectives.alpha_flow:AlphaFlow",
    "cmt": "dumo.objectives.cmt:CMT",
    "consistency": "dumo.objectives.consistency:Consistency",
    "critic": "dumo.objectives.critic:Critic",
    "drift": "dumo.objectives.drift:Drift",
    "dumo": "dumo.objectives.dumo:DuMo",
    "dumo_any": "dumo.objectives.dumo_any:DuMoAny",
    "f2d2": "dumo.objectives.f2d2:F2D2",
    "facm": "dumo.objectives.facm:FACM",
    "flow_matching": "dumo.objectives.flow_matching:FlowMatching",
    "freeflow": "dumo.objectives.freeflow:FreeFlow",
    "imf": "dumo.objectives.imf:ImprovedMeanFlow",
    "imm": "dumo.objectives.imm:IMM",
    "lsd": "dumo.objectives.lsd:LSD",
    "match": "dumo.objectives.match:Match",
    "meanflow": "dumo.objectives.meanflow:MeanFlow",
    "pi_flow": "dumo.objectives.pi_flow:PiFlow",
    "rcgm": "dumo.objectives.rcgm:RCGM",
    "sct": "dumo.objectives.sct:SCT",
    "several": "dumo.objectives.several:Several",
    "shortcut": "dumo.objectives.shortcut:Shortcut",
    "soflow": "dumo.objectives.soflow:SoFlow",
    "tbsm": "dumo.objectives.tbsm:TBSM",
    "twinflow": "dumo.objectives.twinflow:TwinFlow",
    "ucgm": "dumo.objectives.ucgm:UCGM",
}


def make_objective(objective: str | Mapping[str, Any] | Objective) -> Objective:
    """Make the objective of a kind, or of a dict of fields with its `kind`; an instance is returned as it is.

    Raises UserError for an unknown kind, and pydantic's ValidationError for fields that do not fit.
    """
    if not isinstance(objective, str | Mapping):
        return objective
    fields = {"kind": objective} if isinstance(objective, str) else dict(objective)
    kind = fields.get("kind")
    if kind not in OBJECTIVES:
        raise UserError(
            f"there is no objective '{kind}': give one of {', '.join(OBJECTIVES)}, or an instance of a class of yours"
        )
    module, _, name = OBJECTIVES[kind].partition(":")
    cls = getattr(import_module(module), name)
    return cls.model_validate_json(to_json(fields, inf_nan_mode="constants"), strict=True)
