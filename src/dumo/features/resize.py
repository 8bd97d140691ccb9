"""Bilinear interpolation as the first TensorFlow did it: the input of every published FID.

Output pixel i lies at i n / m of the n input pixels, not at (i + 1/2) n / m - 1/2 (half a pixel off), and only its two
neighbours count even where the image shrinks (no antialiasing). Both are defects by now, and part of the measure: with
another resize the FID is another number (Parmar et al. 2022). Columns are interpolated before rows, as there, and
positions are rounded to float32, so the numbers are the same to the last bits.
"""

import torch
from jaxtyping import Float
from torch import Tensor

Image = Float[Tensor, "n 3 h w"]


def resize_tf1(x: Image, size: int) -> Float[Tensor, "n 3 s s"]:
    """Stretch or shrink to `size` x `size`: tf.image.resize_bilinear of TensorFlow 1 with its defaults."""
    return _along(_along(x, size, 3), size, 2)


def _along(x: Tensor, size: int, dim: int) -> Tensor:
    """Along one axis: a + (b - a) w, of the neighbours a before and b after, the last of which repeats."""
    n = x.shape[dim]
    position = torch.arange(size, dtype=torch.float32) * torch.tensor(n / size, dtype=torch.float32)
    low = position.long()
    share = (position - low).to(x).view(-1, *(1,) * (3 - dim))
    a, b = (x.index_select(dim, i.to(x.device)) for i in (low, (low + 1).clamp(max=n - 1)))
    return a + (b - a) * share
