"""Rows that encoders make while a net is used have the bits of a table's, whatever surrounds the call."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dumo.encoders.pipeline import Pipeline
from dumo.encoders.texttable import encode
from dumo.nets.live import OnlineTexts
from dumo.nets.rows import Rows, Texts
from dumo.nets.table import PipelineTexts
from dumo.types import UserError
from pipelines import save

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers', of its own code
CAPTIONS = ("a red fox in the snow", "a dog", "")


def both(name: str, place: Path) -> tuple[OnlineTexts, Texts]:
    """The texts of a pipeline from its encoders, and from a table."""
    pipeline = Pipeline(source=str(save(name, place / name))).with_facts()
    spec = PipelineTexts(root=str(place / "texts"), dtype="float32", budget=0).within(pipeline)
    live = spec.build(len(CAPTIONS))
    assert isinstance(live, OnlineTexts)
    live.captions = CAPTIONS
    encode(CAPTIONS, spec.reader_spec, spec.folder, shard_rows=2)
    tabled = spec.with_identity().build(len(CAPTIONS))
    assert isinstance(tabled, Rows), "a table that is there is read"
    return live, tabled


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SD3", "Chroma", "Z-Image"])
def test_rows_are_those_of_a_table_whatever_surrounds_the_call(name: str, tmp_path: Path) -> None:
    live, tabled = both(name, tmp_path)
    c = torch.tensor([3, 0, 1, 2, 0])
    wanted = [tabled(c[i : i + 1]) for i in range(len(c))]
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
        tokens, mask, pooled = live(c)
    for i, (text, there, whole) in enumerate(wanted):
        n = tokens.shape[1]
        assert torch.equal(tokens[i], text[0][:n])
        assert not text[0][n:].any()
        assert (mask is None) == (there is None)
        assert mask is None or (there is not None and torch.equal(mask[i], there[0][:n]))
        assert pooled is None or (whole is not None and torch.equal(pooled[i], whole[0]))
    if name == "Z-Image":  # which reads captions by their lengths
        assert live.lengths(c) == tabled.lengths(c) == tuple(map(len, (text[0][there[0]] for text, there, _ in wanted)))
    assert (live.width, live.pooled_width, live.has_mask) == (tabled.width, tabled.pooled_width, tabled.has_mask)


def test_prompts_come_and_go_and_few_rows_are_kept(tmp_path: Path) -> None:
    live, tabled = both("SD3", tmp_path)
    live.encoders.max_rows = 2
    for texts in (live, tabled):
        first = texts.append(["a cat", "a bird", "a cow"])
        texts.prompts = {"a cat": first, "a bird": first + 1, "a cow": first + 2}
        texts.forget(2)
    assert live.prompts == tabled.prompts == {"a bird": 4, "a cow": 5}
    c = torch.tensor([5, 4, 0])
    assert torch.equal(live(c)[0], tabled(c)[0])
    assert [*live.encoders.rows] == ["a bird", CAPTIONS[0]]


@pytest.mark.nightly
def test_what_is_missing_or_another_is_refused(tmp_path: Path) -> None:
    live, tabled = both("SD3", tmp_path)
    live.captions = ()
    with pytest.raises(UserError, match="captions are not on this machine"):
        live(torch.tensor([0]))
    assert torch.equal(live(torch.tensor([3]))[0], tabled(torch.tensor([3]))[0]), "that of no caption is known"
    pipeline = Pipeline(source=str(tmp_path / "SD3")).with_facts()
    (tmp_path / "SD3" / "tokenizer_3" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="another texts"):
        PipelineTexts(root="none", budget=0).within(pipeline).build(3)
