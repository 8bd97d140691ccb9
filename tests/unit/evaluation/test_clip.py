"""The CLIP score: the cosine of image and caption, by the CLIP that is named, and by no other."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dumo.evaluation import ClipProtocol, Context
from dumo.evaluation.clip import ClipEvaluator, mean_and_error
from dumo.io.picture import from_uint8, to_uint8
from dumo.report.score import verdict
from dumo.runtime.random import stream
from dumo.types import UserError
from encoders import clip_as_published, clip_of_both

TEXTS = ("a red car", "a blue car", "a photo of a cat")
SAMPLES = 30


@dataclass(frozen=True)
class Pairs:
    """Images, each with a caption; some without."""

    size: int = 20

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        return images(self.size), torch.arange(self.size) % 4


def images(n: int) -> Tensor:
    return torch.rand(n, 3, 12, 10, generator=stream("clip")) * 2 - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_of_both(tmp_path_factory.mktemp("clip"))


def judge(folder: Path, c: Tensor | None = None, **fields: object) -> ClipEvaluator:
    protocol = ClipProtocol.model_validate({"kind": "clip-score", "model": str(folder), "samples": SAMPLES, **fields})
    wanted = protocol.labels(3) if c is None else c
    return protocol.evaluator(Context(Pairs, captions=lambda: (Pairs(), wanted, TEXTS)))


@pytest.mark.slow
def test_it_is_the_mean_of_cosines_as_transformers_gives_them(folder: Path) -> None:
    """The images through transformers' own processor of Pillow, in other batches and another order."""
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    x, evaluator = images(SAMPLES), judge(folder)
    process = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    seen = process(images=list(to_uint8(x).numpy()), return_tensors="pt")["pixel_values"]
    ids, mask = evaluator.encoder.tokenizer([TEXTS[k] for k in evaluator.c.tolist()])
    with torch.no_grad():
        told = CLIPModel.from_pretrained(folder).eval()(input_ids=ids, attention_mask=mask.long(), pixel_values=seen)
    cosines = torch.cosine_similarity(told.image_embeds, told.text_embeds).clamp(min=0).double()
    order = torch.randperm(SAMPLES, generator=stream("order"))
    found = evaluator.score((part, x[part]) for part in order.split(7))
    assert found["clip_score"] == pytest.approx(100 * cosines.mean().item(), rel=1e-5)
    assert found["clip_score_sd"] == pytest.approx(100 * cosines.std().item() / SAMPLES**0.5, rel=1e-4)


@pytest.mark.slow
def test_it_is_forty_times_clipscore_by_the_stock_processor(tmp_path: Path) -> None:
    """torchmetrics clips the mean at 0, CLIPScore (Hessel et al. 2021) each cosine, times 2.5; no prefix.

    transformers' own model and processor read the same PNGs. One caption is cut at 16 tokens, with its end.
    """
    from transformers import CLIPModel, CLIPProcessor

    folder = clip_as_published(tmp_path / "clip")
    texts = ("a red car", "Blue  cats", "a photo of a bicycle")
    pixels, c = to_uint8(images(SAMPLES)), torch.arange(SAMPLES) % 3
    files = [tmp_path / f"{i}.png" for i in range(SAMPLES)]
    for file, x in zip(files, pixels, strict=True):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(file)
    model, process = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    opened = [Image.open(file) for file in files]
    seen = process(
        text=[texts[k] for k in c], images=opened, return_tensors="pt", padding=True, truncation=True, max_length=16
    )
    with torch.no_grad():
        output = model(**seen)
    cosines = torch.cosine_similarity(output.image_embeds, output.text_embeds).double()
    clipscore = 2.5 * cosines.clamp(min=0)
    assert seen["input_ids"].shape[1] == 16
    assert (cosines < 0).any()

    protocol = ClipProtocol(kind="clip-score", model=str(folder), samples=SAMPLES)
    evaluator = protocol.evaluator(Context(Pairs, captions=lambda: (Pairs(), c, texts)))
    read = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    with pytest.warns(UserWarning, match="cut at 16 tokens"):
        each = evaluator.score_pairs(from_uint8(read), c)
    torch.testing.assert_close(each.double(), 40 * clipscore, rtol=1e-5, atol=1e-5)
    assert mean_and_error(each)[0] == pytest.approx(40 * clipscore.mean().item(), rel=1e-5)
    agree = cosines > 0
    torchmetrics = max(100 * cosines[agree].mean().item(), 0)
    assert each[agree].double().mean().item() == pytest.approx(torchmetrics, rel=1e-5)


def test_one_without_a_caption_does_not_count(folder: Path) -> None:
    x, c = images(SAMPLES), torch.arange(SAMPLES) % 3
    some = torch.where(torch.arange(SAMPLES) < 10, c, 3)
    found = judge(folder, some).score([(torch.arange(SAMPLES), x)])
    fewer = judge(folder, c[:10], samples=10).score([(torch.arange(10), x[:10])])
    assert found == fewer
    with pytest.raises(UserError):
        judge(folder, torch.full((SAMPLES,), 3)).score([(torch.arange(SAMPLES), x)])


def test_real_images_stand_beside_it_with_their_captions_and_with_others(folder: Path) -> None:
    """Every fourth image has none, and counts to neither."""
    evaluator = judge(folder)
    x, c = Pairs().reference(20, 0)
    baselines, there = evaluator.baselines(), c < 3
    own = evaluator.score_pairs(x[there], c[there]).double()
    assert baselines["captions"]["mean"] == pytest.approx(own.mean().item())
    assert baselines["captions"]["splits"] == 15
    assert "FID" not in str(evaluator.facts).upper()
    assert baselines["others"]["mean"] != baselines["captions"]["mean"]
    assert verdict([{"clip_score": 0.0}], baselines) is None  # more is better, so it is not at the data


def test_some_of_many_real_images_are_not_the_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dumo.evaluation.clip.MAX_REAL", 8)
    evaluator = judge(folder)
    numbers = [next(i for i, image in enumerate(images(20)) if image.equal(real)) for real in evaluator.real_x]
    assert len(numbers) == 8
    assert max(numbers) > 8
    assert evaluator.real_c.tolist() == [i % 4 for i in numbers]


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'), "not a CLIPModel"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 30), "model.safetensors"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "has no tokenizer_config.json"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), r"pytorch_model.bin"),
    ],
)
def test_another_folder_is_refused_with_a_line(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], object], line: str
) -> None:
    copy = tmp_path / "clip"
    shutil.copytree(folder, copy)
    spoil(copy)
    with pytest.raises(UserError, match=line):
        judge(copy)
