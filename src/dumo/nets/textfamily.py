"""The family of texts that a net may read: `Text` is the type of a spec's field, and FAMILY finds a spec by its kind.

A class is imported when its kind is read, because encoders take long to import. `has_table` and `is_learned_texts` say
what a spec is without importing any.
"""

from typing import TYPE_CHECKING, Annotated

from dumo.types import Spec
from dumo.types.family import SpecFamily, is_instance_of

FAMILY = SpecFamily(
    {  # by kind
        "learned": "dumo.nets.text:LearnedTexts",
        "pipeline": "dumo.nets.table:PipelineTexts",
        "table": "dumo.nets.table:TextTable",
    }
)

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from dumo.nets.table import PipelineTexts, TableTexts, TextTable
    from dumo.nets.text import LearnedTexts

    Text = LearnedTexts | PipelineTexts | TextTable
else:
    Text = Annotated[Spec, FAMILY]


def has_table(texts: object) -> "TypeIs[TableTexts]":
    """Whether texts lie in a table, of embeddings or of token ids."""
    return is_instance_of(texts, "dumo.nets.table:TableTexts")


def is_learned_texts(texts: object) -> "TypeIs[LearnedTexts]":
    """Whether texts go, as token ids, through an encoder that is trained with the net."""
    return is_instance_of(texts, "dumo.nets.text:LearnedTexts")
