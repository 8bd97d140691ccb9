"""All nets. A net takes (x, c, t=t, r=r ...) and returns the heads and gauges that an objective needs."""

from typing import Annotated

from pydantic import Field

from dumo.nets.dit import DiT as DiT
from dumo.nets.mlp import MLP as MLP
from dumo.nets.pretrained import Pretrained as Pretrained
from dumo.nets.unet import UNet as UNet

Net = Annotated[DiT | MLP | Pretrained | UNet, Field(discriminator="kind")]
