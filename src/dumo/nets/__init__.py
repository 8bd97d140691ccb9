"""All nets. A net takes (x, c, t=t, r=r ...) and returns the heads and gauges that an objective needs.

Touches weights, read only. Knows no data and no objective by name.
"""

from typing import Annotated

from dumo.nets.dit import DiT as DiT
from dumo.nets.mlp import MLP as MLP
from dumo.nets.module import Module as Module
from dumo.nets.pretrained import Pretrained as Pretrained
from dumo.nets.unet import UNet as UNet
from dumo.types.outside import NetSpec, OpenTo

Net = Annotated[DiT | MLP | Module | Pretrained | UNet | NetSpec, OpenTo(NetSpec)]
