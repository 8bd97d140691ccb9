"""All data sets. A data set's spec knows the shape and the classes; `open()` gives its source.

Touches your images, read only, and the caches that it makes. Knows no net and no objective.
"""

from typing import TYPE_CHECKING, Annotated

from dumo.types import Spec
from dumo.types.family import SpecFamily, is_instance_of, lazy_names
from dumo.types.outside import DataSpec

MEMBERS = {  # by kind
    "digits": "dumo.data.toy:Digits",
    "images": "dumo.data.image:Images",
    "latents": "dumo.data.latents:Latents",
    "memory": "dumo.data.memory:Memory",
    "moons": "dumo.data.toy:Moons",
}
FAMILY = SpecFamily(MEMBERS, DataSpec)

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from dumo.data.image import Images as Images
    from dumo.data.latents import Latents as Latents
    from dumo.data.memory import Memory as Memory
    from dumo.data.toy import Digits as Digits
    from dumo.data.toy import Moons as Moons

    ShownData = Digits | Images | Memory | Moons | DataSpec
    Data = ShownData | Latents
else:
    Data = Annotated[Spec, FAMILY]
    ShownData = Spec
    __getattr__ = lazy_names(__name__, MEMBERS.values())


def is_images(data: object) -> "TypeIs[Images]":
    """Whether data are images of files."""
    return is_instance_of(data, "dumo.data.image:Images")


def is_latents(data: object) -> "TypeIs[Latents]":
    """Whether data are encoded images."""
    return is_instance_of(data, "dumo.data.latents:Latents")


def has_images(data: object) -> "TypeIs[Images | Latents]":
    """Whether data are images of files, as pixels or encoded."""
    return is_images(data) or is_latents(data)
