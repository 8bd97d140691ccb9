"""All objectives. To add one, write its file and add its class to the union below; `module:Class` needs neither.

A loss draws no random numbers and has no side effects. Objectives do not depend on networks, data or the trainer.
"""

from typing import Annotated

from pydantic import Discriminator, Field, Tag

from dumo.objectives.alpha_flow import AlphaFlow
from dumo.objectives.base import ObjectiveSpec
from dumo.objectives.cmt import CMT
from dumo.objectives.consistency import Consistency
from dumo.objectives.critic import Critic
from dumo.objectives.dmd2 import DMD2
from dumo.objectives.drift import Drift
from dumo.objectives.dumo import DuMo
from dumo.objectives.dumo_any import DuMoAny
from dumo.objectives.f2d2 import F2D2
from dumo.objectives.facm import FACM
from dumo.objectives.flow_matching import FlowMatching
from dumo.objectives.freeflow import FreeFlow
from dumo.objectives.imf import ImprovedMeanFlow
from dumo.objectives.imm import IMM
from dumo.objectives.lsd import LSD
from dumo.objectives.match import Match
from dumo.objectives.meanflow import MeanFlow
from dumo.objectives.pi_flow import PiFlow
from dumo.objectives.rcgm import RCGM
from dumo.objectives.sct import SCT
from dumo.objectives.self_e import SelfE
from dumo.objectives.several import Several
from dumo.objectives.shortcut import Shortcut
from dumo.objectives.soflow import SoFlow
from dumo.objectives.split_meanflow import SplitMeanFlow
from dumo.objectives.tbsm import TBSM
from dumo.objectives.tvm import TVM
from dumo.objectives.twinflow import TwinFlow
from dumo.objectives.ucgm import UCGM
from dumo.types.outside import BUNDLED, OUTSIDE, Outside, branch

BundledObjective = Annotated[
    AlphaFlow
    | CMT
    | Consistency
    | Critic
    | DMD2
    | Drift
    | DuMo
    | DuMoAny
    | F2D2
    | FACM
    | FlowMatching
    | FreeFlow
    | ImprovedMeanFlow
    | IMM
    | LSD
    | Match
    | MeanFlow
    | PiFlow
    | RCGM
    | SCT
    | SelfE
    | Several
    | Shortcut
    | SoFlow
    | SplitMeanFlow
    | TBSM
    | TVM
    | TwinFlow
    | UCGM,
    Field(discriminator="kind"),
    Tag(BUNDLED),
]
OutsideObjective = Annotated[ObjectiveSpec, Outside(ObjectiveSpec, BundledObjective), Tag(OUTSIDE)]
Objective = Annotated[BundledObjective | OutsideObjective, Discriminator(branch)]
