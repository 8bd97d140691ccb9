"""All data sets. A data set's spec knows the shape and the classes; `open()` gives its source."""

from typing import Annotated

from pydantic import Field

from dumo.data.digits import Digits
from dumo.data.toy import Moons

Data = Annotated[Digits | Moons, Field(discriminator="kind")]
