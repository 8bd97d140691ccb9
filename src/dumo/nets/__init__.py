"""All nets. A net takes (x, c, t=t, r=r ...) and returns the heads and gauges that an objective needs.

Touches weights, read only. Knows no data and no objective by name.
"""

from typing import TYPE_CHECKING, Annotated

from dumo.types import Spec
from dumo.types.family import SpecFamily, is_instance_of, lazy_names
from dumo.types.outside import NetSpec

MEMBERS = {  # by kind
    "dit": "dumo.nets.dit:DiT",
    "mlp": "dumo.nets.mlp:MLP",
    "module": "dumo.nets.module:ModuleSpec",
    "diffusers": "dumo.nets.pretrained:Pretrained",
    "unet": "dumo.nets.unet:UNet",
}
FAMILY = SpecFamily(MEMBERS, NetSpec)

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from dumo.nets.dit import DiT as DiT
    from dumo.nets.dualized import Dualized
    from dumo.nets.mlp import MLP as MLP
    from dumo.nets.module import ModuleSpec as ModuleSpec
    from dumo.nets.pretrained import Pretrained as Pretrained
    from dumo.nets.unet import UNet as UNet

    Net = DiT | MLP | ModuleSpec | Pretrained | UNet | NetSpec
else:
    Net = Annotated[Spec, FAMILY]
    __getattr__ = lazy_names(__name__, MEMBERS.values())


def is_pretrained(net: object) -> "TypeIs[Pretrained]":
    """Whether a net's spec is that of a pipeline's model."""
    return is_instance_of(net, "dumo.nets.pretrained:Pretrained")


def is_dualized(net: object) -> "TypeIs[Dualized]":
    """Whether a net is a pipeline's model with two heads."""
    return is_instance_of(net, "dumo.nets.dualized:Dualized")
