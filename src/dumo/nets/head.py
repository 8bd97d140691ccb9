"""What a net gives beside the samples: one number per row and gauge, and what a block made."""

from torch import nn

from dumo.nets.embed import Scalars
from dumo.types import Array, Needs, Time


def block_of(needs: Needs, depth: int) -> int | None:
    """The block, counted from 1, after which to look inside; None: nobody asks."""
    return None if needs.inside is None else max(1, round(needs.inside * depth))


class Gauges(nn.Module):
    """One learned number per row and gauge, from the named scalars alone; zero at the start (ours)."""

    def __init__(self, needs: Needs, width: int, time_scale: float) -> None:
        """One linear layer over an embedding of its own, so that the trunk is left alone."""
        super().__init__()
        self.embed = Scalars(needs.shared, width, time_scale)
        self.out = nn.Linear(width, len(needs.gauges))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, **inputs: Time) -> tuple[Array, ...]:
        """Return one (b,) tensor per gauge."""
        return self.out(self.embed(**inputs)).unbind(1)
