"""What a net is told in the place of c: the row of a table of texts, by its number."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from jaxtyping import Bool, Float
from torch import Tensor, nn

from dumo.types import Cond

Tokens = Float[Tensor, "b l d"]
Told = tuple[Tokens, Bool[Tensor, "b l"] | None, Float[Tensor, "b p"] | None]  # tokens; which there are; pooled


class Texts(nn.Module, ABC):
    """Rows of text by number: one per class or caption, then one for none, then those of prompts (`append`)."""

    width: int  # numbers of a token
    pooled_width: int  # numbers of the pooled embedding; 0: there is none
    length: int  # tokens of a row, padding among them
    lengths: tuple[int, ...] | None = None  # tokens of each row without padding; None: all are there, or unknown

    @abstractmethod
    def forward(self, c: Cond) -> Told:
        """The rows of c (b,): tokens, mask (None: every token is there), pooled."""

    @abstractmethod
    def append(self, texts: Sequence[str]) -> int:
        """Add a row per text behind all others; return the number of the first. Numbers so far stay.

        Raises UserError where no encoder is known, or it is another than that of the rows.
        """
