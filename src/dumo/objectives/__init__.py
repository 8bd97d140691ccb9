"""All objectives. To add one: write its file, import it here, name it in the union."""

from typing import Annotated

from pydantic import Field

from dumo.objectives.alpha_flow import AlphaFlow as AlphaFlow
from dumo.objectives.cmt import CMT as CMT
from dumo.objectives.consistency import Consistency as Consistency
from dumo.objectives.dumo import DuMo as DuMo
from dumo.objectives.facm import FACM as FACM
from dumo.objectives.flow_matching import FlowMatching as FlowMatching
from dumo.objectives.imf import ImprovedMeanFlow as ImprovedMeanFlow
from dumo.objectives.imm import IMM as IMM
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

Objective = Annotated[
    AlphaFlow
    | CMT
    | Consistency
    | DuMo
    | FACM
    | FlowMatching
    | IMM
    | ImprovedMeanFlow
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
    | UCGM,
    Field(discriminator="kind"),
]
