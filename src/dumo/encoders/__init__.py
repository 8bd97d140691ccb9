"""Nets that others trained, which dumo reads and does not train: autoencoders, text encoders, features of images.

Here are the codecs, autoencoders as a run names them: `Codec` is the union of their specs. All else is imported from
its module.

Touches files of weights, from disk or the Hub, and the cache of encoded texts. Knows no net that learns.
"""

from typing import Annotated

from pydantic import Field

from dumo.encoders.autoencoder import DcAe, PipelineVae, SdVae
from dumo.encoders.taesd import Taef2

Codec = Annotated[Taef2 | SdVae | DcAe | PipelineVae, Field(discriminator="kind")]
