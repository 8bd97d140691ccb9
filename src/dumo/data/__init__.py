"""All data sets. A data set's spec knows the shape and the classes; `open()` gives its source."""

from typing import Annotated

from pydantic import Field

from dumo.data.image import Images as Images
from dumo.data.latents import Latents as Latents
from dumo.data.toy import Digits as Digits
from dumo.data.toy import Moons as Moons

Data = Annotated[Digits | Images | Latents | Moons, Field(discriminator="kind")]
