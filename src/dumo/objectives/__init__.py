"""All objectives. To add one: write its file, import it here, name it in the union."""

from typing import Annotated

from pydantic import Field

from dumo.objectives.dumo import DuMo as DuMo
from dumo.objectives.flow_matching import FlowMatching as FlowMatching
from dumo.objectives.meanflow import MeanFlow as MeanFlow

Objective = Annotated[DuMo | FlowMatching | MeanFlow, Field(discriminator="kind")]
