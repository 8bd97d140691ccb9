"""What stands for the condition c in a net that reads text: rows by number, and one for none."""

from typing import Annotated

from pydantic import Field

from dumo.nets.text.file import TextFile as TextFile
from dumo.nets.text.learned import Learned as Learned
from dumo.nets.text.rows import Texts as Texts
from dumo.nets.text.table import TextTable as TextTable

Text = Annotated[Learned | TextFile | TextTable, Field(discriminator="kind")]
