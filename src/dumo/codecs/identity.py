"""No codec: the net learns pixels."""

from typing import Literal

import torch
from pydantic import Field

from dumo.codecs.scaled import Images, Latent, Moments, Opened, Scaled


class Identity(Scaled):
    """Images as they are."""

    kind: Literal["identity"] = "identity"
    channels: int = Field(default=3, ge=3, le=3)
    factor: int = Field(default=1, ge=1, le=1)

    def open(self, device: str | torch.device = "cpu") -> Opened:
        """There is nothing to load."""
        return Opened(self, Through(), None, torch.device(device))


class Through:
    """Gives what it gets."""

    def encode(self, images: Images) -> Moments:
        """The images."""
        return images

    def decode(self, raw: Latent) -> Images:
        """The images."""
        return raw
