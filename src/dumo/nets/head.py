"""The outputs of a net besides samples: one number per row and gauge."""

from torch import nn

from dumo.nets.embed import Scalars
from dumo.types import Array, Needs, Time


class Gauges(nn.Module):
    """One learned number per row and gauge, from times and knobs alone; zero at the start (ours)."""

    def __init__(self, needs: Needs, width: int, time_scale: float) -> None:
        """One linear layer over an embedding of its own, so the trunk stays as it is without gauges."""
        super().__init__()
        self.embed = Scalars(needs.shared, width, time_scale)
        self.out = nn.Linear(width, len(needs.gauges))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, **inputs: Time) -> tuple[Array, ...]:
        """Return one (b,) tensor per gauge."""
        return self.out(self.embed(**inputs)).unbind(1)
