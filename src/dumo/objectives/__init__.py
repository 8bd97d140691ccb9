"""All objectives. To add one: write its file, its line in MEMBERS and its import below. `module:Class` needs neither.

Touches nothing: a loss draws nothing and changes nothing. Knows no net, no data and no trainer.
"""

from typing import TYPE_CHECKING, Annotated

from dumo.types import Spec
from dumo.types.family import SpecFamily, lazy_names
from dumo.types.outside import ObjectiveSpec

MEMBERS = {  # by kind
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
    "imm": "dumo.objectives.imm:IMM",
    "imf": "dumo.objectives.imf:ImprovedMeanFlow",
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
FAMILY = SpecFamily(MEMBERS, ObjectiveSpec)

if TYPE_CHECKING:
    from dumo.objectives.alpha_flow import AlphaFlow as AlphaFlow
    from dumo.objectives.cmt import CMT as CMT
    from dumo.objectives.consistency import Consistency as Consistency
    from dumo.objectives.critic import Critic as Critic
    from dumo.objectives.drift import Drift as Drift
    from dumo.objectives.dumo import DuMo as DuMo
    from dumo.objectives.dumo_any import DuMoAny as DuMoAny
    from dumo.objectives.f2d2 import F2D2 as F2D2
    from dumo.objectives.facm import FACM as FACM
    from dumo.objectives.flow_matching import FlowMatching as FlowMatching
    from dumo.objectives.freeflow import FreeFlow as FreeFlow
    from dumo.objectives.imf import ImprovedMeanFlow as ImprovedMeanFlow
    from dumo.objectives.imm import IMM as IMM
    from dumo.objectives.lsd import LSD as LSD
    from dumo.objectives.match import Match as Match
    from dumo.objectives.meanflow import MeanFlow as MeanFlow
    from dumo.objectives.pi_flow import PiFlow as PiFlow
    from dumo.objectives.rcgm import RCGM as RCGM
    from dumo.objectives.sct import SCT as SCT
    from dumo.objectives.several import Several as Several
    from dumo.objectives.shortcut import Shortcut as Shortcut
    from dumo.objectives.soflow import SoFlow as SoFlow
    from dumo.objectives.tbsm import TBSM as TBSM
    from dumo.objectives.twinflow import TwinFlow as TwinFlow
    from dumo.objectives.ucgm import UCGM as UCGM
    from dumo.types import Objective as Objective
else:
    Objective = Annotated[Spec, FAMILY]
    __getattr__ = lazy_names(__name__, MEMBERS.values())
