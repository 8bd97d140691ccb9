"""All networks. A network takes (x, c, t=t, r=r ...) and returns the heads and gauges that an objective needs.

Networks do not depend on data or on particular objectives.
"""

from typing import Annotated

from pydantic import Discriminator, Field, Tag

from dumo.nets.dit import DiT
from dumo.nets.mlp import MLP
from dumo.nets.pretrained import Pretrained
from dumo.nets.unet import UNet
from dumo.nets.user_module import ModuleSpec
from dumo.types.outside import BUNDLED, OUTSIDE, NetSpec, Outside, branch

BundledNet = Annotated[DiT | MLP | ModuleSpec | Pretrained | UNet, Field(discriminator="kind"), Tag(BUNDLED)]
OutsideNet = Annotated[NetSpec, Outside(NetSpec, BundledNet), Tag(OUTSIDE)]
Net = Annotated[BundledNet | OutsideNet, Discriminator(branch)]
