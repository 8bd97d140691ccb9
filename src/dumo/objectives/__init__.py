"""All objectives. To add one: write its file, import it here, name it in the union. `module:Class` needs neither.

Touches nothing: a loss draws nothing and changes nothing. Knows no net, no data and no trainer.
"""

from typing import Annotated

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
from dumo.objectives.imf import ImprovedMeanFlow as ImprovedMeanFlow
from dumo.objectives.imm import IMM as IMM
from dumo.objectives.match import Match as Match
from dumo.objectives.meanflow import MeanFlow as MeanFlow
from dumo.objectives.pi_flow import PiFlow as PiFlow
from dumo.objectives.rcgm import RCGM as RCGM
from dumo.objectives.sct import SCT as SCT
from dumo.objectives.several import Several as Several
from dumo.objectives.shortcut import Shortcut as Shortcut
from dumo.objectives.soflow import SoFlow as SoFlow
from dumo.objectives.split_meanflow import SplitMeanFlow as SplitMeanFlow
from dumo.objectives.tvm import TVM as TVM
from dumo.objectives.twinflow import TwinFlow as TwinFlow
from dumo.objectives.ucgm import UCGM as UCGM
from dumo.types.outside import ObjectiveSpec, OpenTo

Objective = Annotated[
    AlphaFlow
    | CMT
    | Consistency
    | Critic
    | Drift
    | DuMo
    | DuMoAny
    | F2D2
    | FACM
    | FlowMatching
    | IMM
    | ImprovedMeanFlow
    | Match
    | MeanFlow
    | PiFlow
    | RCGM
    | SCT
    | Several
    | Shortcut
    | SoFlow
    | SplitMeanFlow
    | TVM
    | TwinFlow
    | UCGM
    | ObjectiveSpec,
    OpenTo(ObjectiveSpec),
]
