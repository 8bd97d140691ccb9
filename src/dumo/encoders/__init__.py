"""Nets that others trained, which dumo reads and does not train: autoencoders, text encoders, features of images.

Here are the codecs, autoencoders as a run names them: `Codec` is the union of their specs. All else is imported from
its module.

Touches files of weights, from disk or the Hub, and tables of texts. Knows no net that learns.
"""

from typing import TYPE_CHECKING, Annotated

from dumo.types import Spec
from dumo.types.family import SpecFamily, lazy_names

MEMBERS = {  # by kind
    "taef2": "dumo.encoders.taesd:Taef2",
    "sd-vae": "dumo.encoders.autoencoder:SdVae",
    "dc-ae": "dumo.encoders.autoencoder:DcAe",
    "pipeline": "dumo.encoders.autoencoder:PipelineVae",
}
FAMILY = SpecFamily(MEMBERS)

if TYPE_CHECKING:
    from dumo.encoders.autoencoder import DcAe as DcAe
    from dumo.encoders.autoencoder import PipelineVae as PipelineVae
    from dumo.encoders.autoencoder import SdVae as SdVae
    from dumo.encoders.taesd import Taef2 as Taef2

    Codec = Taef2 | SdVae | DcAe | PipelineVae
else:
    Codec = Annotated[Spec, FAMILY]
    __getattr__ = lazy_names(__name__, MEMBERS.values())
