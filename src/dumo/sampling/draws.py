"""Noise drawn ahead: while a net works on a batch of samples, a thread draws for the next one.

Noise is a function of (seed, image, draw), so who draws it and when changes nothing in it.
"""

from collections.abc import Sequence
from concurrent.futures import Executor, Future

import torch

from dumo.random import noise
from dumo.types import Sample


class Draws:
    """The noise of some batches, given by the numbers of their images, that are made in this order.

    Which draws a solver asks for is its own affair: what a batch has asked for is drawn for the next one, and no more.
    """

    def __init__(
        self,
        thread: Executor,
        batches: Sequence[Sequence[int]],
        *,
        seed: int,
        shape: Sequence[int],
        device: torch.device | str,
    ) -> None:
        """Of this seed and shape, for a net on this device."""
        self.thread, self.batches, self.seed, self.shape = thread, batches, seed, shape
        self.device = torch.device(device)
        self.coming: dict[tuple[int, int], Future[Sample]] = {}

    def __call__(self, batch: int, k: int) -> Sample:
        """Draw k of a batch's images, on the device."""
        ready = self.coming.pop((batch, k), None)
        if batch + 1 < len(self.batches):
            self.coming[batch + 1, k] = self.thread.submit(self._draw, batch + 1, k)
        z = ready.result() if ready else self._draw(batch, k)
        return z.to(self.device, non_blocking=True)

    def _draw(self, batch: int, k: int) -> Sample:
        z = noise(self.seed, self.batches[batch], k, self.shape)
        return z.pin_memory() if self.device.type == "cuda" else z  # from where a GPU fetches it by itself
