"""All data sets. A data set's spec knows the shape and the classes; `open()` gives its source.

Touches your images, read only, and the caches that it makes. Knows no net and no objective.
"""

from typing import Annotated

from pydantic import Discriminator, Field, Tag

from dumo.data.images import Images
from dumo.data.in_memory import Memory
from dumo.data.latents import Latents
from dumo.data.toy import Digits, Moons
from dumo.types.outside import BUNDLED, OUTSIDE, DataSpec, Outside, branch

BundledData = Annotated[Digits | Images | Latents | Memory | Moons, Field(discriminator="kind"), Tag(BUNDLED)]
OutsideData = Annotated[DataSpec, Outside(DataSpec, BundledData), Tag(OUTSIDE)]
Data = Annotated[BundledData | OutsideData, Discriminator(branch)]
ShownData = Digits | Images | Memory | Moons | DataSpec  # data that people look at: all but latents
