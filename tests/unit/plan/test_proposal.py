"""What a proposal says of texts next to images that are not read as captions."""

import shlex
from typing import Any

from dumo.config.change import override
from dumo.data.annotation import NoCaptionsError
from dumo.plan import photocaptions
from dumo.runtime import door


def test_a_table_of_another_name_keeps_its_kind() -> None:
    for table, name in {"labels.parquet": "metadata.parquet", "a/x.TSV": "metadata.csv"}.items():
        line = photocaptions.caption_hint(NoCaptionsError("", tables=[table]))
        assert line == f"none read; a table of captions is called {name}, and there is {table}"


def test_a_column_of_any_name_may_be_typed() -> None:
    for column in ("words", "no", "what it shows: text", "it's #1"):
        with door.command_line():
            line = photocaptions.caption_hint(NoCaptionsError("", columns=[column]))
        option, setting = shlex.split(line.partition("as by ")[2])
        tree: dict[str, Any] = {}
        override(tree, [setting])
        assert (option, tree) == ("--set", {"data": {"captions": {"kind": "files", "name": column}}})
