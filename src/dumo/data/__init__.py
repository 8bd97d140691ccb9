"""Data sets. A spec has the shape and the classes of a data set, and its `open()` returns the source of batches.

This subpackage reads the user's images without changing them, and writes caches. It depends on neither networks nor
objectives.
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
# Data that can be displayed: all but latents.
ShownData = Digits | Images | Memory | Moons | DataSpec
