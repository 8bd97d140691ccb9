"""What a proposal says of texts next to images that are not read as captions."""

from dumo.data.annotation import NoCaptionsError
from dumo.plan import photocaptions


def test_a_table_of_another_name_keeps_its_kind() -> None:
    for table, name in {"labels.parquet": "metadata.parquet", "a/x.TSV": "metadata.csv"}.items():
        line = photocaptions.caption_hint(NoCaptionsError("", tables=[table]))
        assert line == f"none read; a table of captions is called {name}, and there is {table}"
