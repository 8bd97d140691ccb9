"""The specs of texts that a net may read. Each is imported when its kind is read, for all but one need an encoder."""

from typing import TYPE_CHECKING, Annotated

from dumo.types import Spec
from dumo.types.family import SpecFamily

FAMILY = SpecFamily(
    {  # by kind
        "learned": "dumo.nets.text:Learned",
        "pipeline": "dumo.nets.table:PipelineTexts",
        "table": "dumo.nets.table:TextTable",
    }
)

if TYPE_CHECKING:
    from dumo.nets.table import PipelineTexts, TextTable
    from dumo.nets.text import Learned

    Text = Learned | PipelineTexts | TextTable
else:
    Text = Annotated[Spec, FAMILY]
