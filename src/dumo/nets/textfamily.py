"""The specs of texts that a net may read. Each is imported when its kind is read, for all but one need an encoder.

`is_tabled`, `is_embedded` and `is_learned` ask for a class of texts and import none.
"""

from typing import TYPE_CHECKING, Annotated

from dumo.types import Spec
from dumo.types.family import SpecFamily, is_instance_of

FAMILY = SpecFamily(
    {  # by kind
        "learned": "dumo.nets.text:Learned",
        "pipeline": "dumo.nets.table:PipelineTexts",
        "table": "dumo.nets.table:TextTable",
    }
)

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from dumo.nets.table import Embedded, PipelineTexts, Tabled, TextTable
    from dumo.nets.text import Learned

    Text = Learned | PipelineTexts | TextTable
else:
    Text = Annotated[Spec, FAMILY]


def is_tabled(texts: object) -> "TypeIs[Tabled]":
    """Whether texts are read from a table of captions, of embeddings or of tokens."""
    return is_instance_of(texts, "dumo.nets.table:Tabled")


def is_embedded(texts: object) -> "TypeIs[Embedded]":
    """Whether texts are read from a table of embeddings."""
    return is_instance_of(texts, "dumo.nets.table:Embedded")


def is_learned(texts: object) -> "TypeIs[Learned]":
    """Whether an encoder of the net's own reads tokens of captions."""
    return is_instance_of(texts, "dumo.nets.text:Learned")
