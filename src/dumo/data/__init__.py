"""All data sets. A data set's spec knows the shape and the classes; `open()` gives its source.

Touches your images, read only, and the caches that it makes. Knows no net and no objective.
"""

from typing import Annotated

from dumo.data.image import Images as Images
from dumo.data.latents import Latents as Latents
from dumo.data.memory import Memory as Memory
from dumo.data.toy import Digits as Digits
from dumo.data.toy import Moons as Moons
from dumo.types.outside import DataSpec, OpenTo

Data = Annotated[Digits | Images | Latents | Memory | Moons | DataSpec, OpenTo(DataSpec)]
