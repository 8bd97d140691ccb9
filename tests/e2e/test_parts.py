"""Pipelines whose parts are absent, or lie otherwise than `save_pretrained` leaves them: from photos to images."""

import json
import shutil
from pathlib import Path

import pytest

from e2e.shell import call
from pipelines import save
from stock.case import LORA, Case, must, write_photographs

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers about its own parts, and of peft about merges
T5 = ("text_encoder_3", "tokenizer_3")
ABSENT = ", text_encoder_3=None, tokenizer_3=None"


def remove_t5(folder: Path, *, from_index: bool) -> None:
    """Remove SD3's T5 from the folder of a pipeline, and from its model_index.json."""
    for part in T5:
        shutil.rmtree(folder / part)
    if from_index:
        file = folder / "model_index.json"
        index = json.loads(file.read_text())
        file.write_text(json.dumps(index | {part: [None, None] for part in T5}))


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("null in the index", marks=pytest.mark.slow),
        pytest.param("left out", marks=pytest.mark.nightly),
        pytest.param("left out and missing", marks=pytest.mark.nightly),
    ],
)
def test_sd3_goes_without_t5(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded, examined, trained, sampled and exported; the cards pass None for it, and make dumo's images."""
    monkeypatch.chdir(tmp_path)
    case = Case("SD3", tmp_path)
    save("SD3", case.source)
    write_photographs(tmp_path / "photos")
    fields = [*LORA]
    if how == "null in the index":
        remove_t5(case.source, from_index=True)
    else:
        fields.append("pipeline.without=[text_encoder_3]")
    if how == "left out and missing":
        remove_t5(case.source, from_index=False)
        done = call("encode", "sd3-lora", *case.options(*LORA))
        assert done.code == 2, done
        assert "has no text_encoder_3: set pipeline.without" in done.err
        assert "pipeline.without=[text_encoder_3]" in done.err
    must(call("encode", "sd3-lora", *case.options(*fields)))
    must(call("show", "sd3-lora", "--check", *case.options(*fields)))
    case.train(*fields)
    must(call("sample", case.run, "--prompt", "a dog", "--nfe", "1"))
    whole = case.export("whole")
    lora = case.export("lora", "--to", "lora")
    bare = case.export("bare", "--parts", "none")
    assert f'from_pretrained("whole", dtype=torch.float32{ABSENT})' in (whole / "README.md").read_text()
    assert f'from_pretrained("SD3", dtype=torch.float32{ABSENT})' in (lora / "README.md").read_text()
    assert (
        f'from_pretrained("SD3", transformer=model, scheduler=scheduler, dtype=torch.float32{ABSENT})'
        in (bare / "README.md").read_text()
    )
    assert json.loads((whole / "model_index.json").read_text())[T5[0]] == [None, None]
    assert not (whole / T5[0]).exists()
    assert max(case.errors_over_limits("merged", whole)) < 1
    assert max(case.errors_over_limits("lora", lora)) < 1


@pytest.mark.nightly
def test_an_export_goes_without_parts_that_are_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after the download that dumo prints for SD 1.5: its index lists a safety checker, which is not fetched."""
    monkeypatch.chdir(tmp_path)
    case = Case("SD1", tmp_path)
    file = save("SD1", case.source) / "model_index.json"
    index = json.loads(file.read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    file.write_text(json.dumps(index))
    write_photographs(tmp_path / "photos")
    must(call("encode", "sd3-lora", *case.options(*LORA)))
    case.train(*LORA)
    whole = case.export("whole")
    assert (
        'from_pretrained("whole", dtype=torch.float32, feature_extractor=None, safety_checker=None)'
        in (whole / "README.md").read_text()
    )
    assert max(case.errors_over_limits("merged", whole)) < 1
