"""Nets that others trained, as readers: autoencoders, text encoders, features of images. Here: all codecs.

Touches files of weights, from disk or the Hub, and tables of texts. Knows no net that learns.
"""

from typing import Annotated

from pydantic import Field

from dumo.encoders.autoencoder import DcAe as DcAe
from dumo.encoders.autoencoder import PipelineVae as PipelineVae
from dumo.encoders.autoencoder import SdVae as SdVae
from dumo.encoders.taesd import Taef2 as Taef2

Codec = Annotated[Taef2 | SdVae | DcAe | PipelineVae, Field(discriminator="kind")]
