"""DINOv2 and CLIP as judges: features as transformers gives them, distances as their authors write them."""

import json
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dumo.encoders import vision
from dumo.encoders.vision import FeatureKind, ImageEncoder
from dumo.evaluation import Context, FeatureProtocol
from dumo.evaluation.features import FeatureEvaluator
from dumo.evaluation.frechet import Moments, frechet_distance
from dumo.io.data_source import HeldOutSplit, TensorData
from dumo.io.picture import from_uint8
from dumo.io.read import CACHE_VARIABLE
from dumo.report.evaluate_images import judge
from dumo.runtime.random import stream
from dumo.types import UserError
from encoders import WIDTH, clip_of_both, dinov2
from forked import main_of
from meeting import outputs
from unit.evaluation import features_together
from unit.evaluation.extractor import Album

KINDS: tuple[FeatureKind, ...] = ("cmmd", "dinov2")
each_kind = pytest.mark.parametrize("kind", KINDS)


class Endless:
    """Data without end."""

    size = None

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        raise AssertionError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is kept beyond a test."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[FeatureKind, Path]:
    place = tmp_path_factory.mktemp("models")
    return {"cmmd": clip_of_both(place / "clip"), "dinov2": dinov2(place / "dinov2")}


def images(n: int, key: str = "made", height: int = 20, width: int = 20) -> Tensor:
    """Blocks of colours, each image about one of its own."""
    draws = stream("features", key)
    base = torch.randint(30, 226, (n, 3, 1, 1), generator=draws)
    return (base + torch.randint(-30, 30, (n, 3, height, width), generator=draws)).to(torch.uint8)


def opened(folder: Path, kind: FeatureKind, data: Tensor, **fields: object) -> FeatureEvaluator:
    protocol = FeatureProtocol.model_validate({"kind": kind, "model": str(folder), **fields})
    return protocol.evaluator(Context(lambda: Album(data)))


def scored(evaluator: FeatureEvaluator, pixels: Tensor, batch: int = 50) -> dict[str, float]:
    x = from_uint8(pixels)
    return evaluator.score([(rows, x[rows]) for rows in torch.arange(len(x)).flip(0).split(batch)])


def theirs(kind: FeatureKind, folder: Path, pixels: Tensor) -> Tensor:
    """The features by transformers' own processors of Pillow, and its own models."""
    from transformers import CLIPModel, Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    rows = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pixels]
    with torch.no_grad():
        if kind == "dinov2":
            sides, colours = (
                {"height": 224, "width": 224},
                {"image_mean": vision.IMAGENET_COLOURS[0], "image_std": vision.IMAGENET_COLOURS[1]},
            )
            process = BitImageProcessorPil(size=sides, do_center_crop=False, **colours)
            seen = process(images=rows, return_tensors="pt")["pixel_values"]
            return Dinov2Model.from_pretrained(folder).eval()(seen).last_hidden_state[:, 0]
        process = CLIPImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False)
        seen = process(images=rows, return_tensors="pt")["pixel_values"]
        x = CLIPModel.from_pretrained(folder).eval().get_image_features(seen)
        x = getattr(x, "pooler_output", x)
        return x / x.norm(dim=1, keepdim=True)


@each_kind
def test_features_are_those_of_transformers(kind: FeatureKind, folders: dict[FeatureKind, Path]) -> None:
    pixels, eye = images(9), vision.load(folders[kind], kind, "model")
    found = eye(pixels).pool
    torch.testing.assert_close(found, theirs(kind, folders[kind], pixels), rtol=1e-5, atol=1e-6)
    assert found.std(0).max() > 0.05
    assert eye(pixels[:0]).pool.shape == (0, found.shape[1])  # as a rank that has no image


@pytest.mark.parametrize(("height", "width"), [(20, 31), (300, 240)])
def test_dinov2_sees_all_of_an_image_and_cmmd_the_middle(
    height: int, width: int, folders: dict[FeatureKind, Path]
) -> None:
    (one,) = images(1, height=height, width=width).permute(0, 2, 3, 1).numpy()
    whole = Image.fromarray(one).resize((224, 224), Image.Resampling.BICUBIC)
    eye = vision.load(folders["dinov2"], "dinov2", "model")
    mean, sd = (np.array(numbers) for numbers in vision.IMAGENET_COLOURS)
    wanted = (np.asarray(whole) / 255 - mean) / sd
    pixels = torch.from_numpy(one).permute(2, 0, 1)[None]
    np.testing.assert_allclose(eye.preprocess(pixels)[0].permute(1, 2, 0).numpy(), wanted, atol=1e-5)
    short, middle = min(height, width), vision.load(folders["cmmd"], "cmmd", "model")
    top, left = (height - short) // 2, (width - short) // 2
    square = pixels[:, :, top : top + short, left : left + short]
    assert torch.equal(middle(pixels).pool, middle(square).pool)
    assert not torch.equal(eye(pixels).pool, eye(square).pool)


def test_positions_of_dinov2_are_those_of_the_published_model(tmp_path: Path) -> None:
    """A cubic of Keys with a = -0.75 at (i + 1/2) 7 / (4 + 0.1) - 1/2, the ends repeated, as torch's; by hand."""
    from transformers import Dinov2Model

    folder, pixels = dinov2(tmp_path / "dinov2", side=7 * 56), images(3)
    model: Any = Dinov2Model.from_pretrained(folder).eval()
    old = model.embeddings.position_embeddings.detach().double()
    weights = np.zeros((4, 7))
    for i in range(4):
        at = (i + 0.5) * 7 / 4.1 - 0.5
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            d, a = abs(at - j), -0.75
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            weights[i, min(max(j, 0), 6)] += near if d <= 1 else far
    w = torch.from_numpy(weights)
    grid = torch.einsum("ia,jb,abd->ijd", w, w, old[0, 1:].unflatten(0, (7, 7)))
    eye = vision.load(folder, "dinov2", "model")
    found = eye.model.embeddings.position_embeddings
    torch.testing.assert_close(found[0, 1:].double(), grid.flatten(0, 1), rtol=0, atol=1e-6)
    assert torch.equal(found[0, 0].double(), old[0, 0])
    with torch.no_grad():
        without = model(eye.preprocess(pixels)).pooler_output
    assert 1e-5 < (eye(pixels).pool - without).abs().max() < 0.5


def unbiased(x: Tensor, y: Tensor, width: float) -> tuple[float, float]:
    """MMD^2 as Gretton et al. 2012, Eq. 3, has it, and Eq. 5, which CMMD's code takes; pair by pair."""

    def k(a: Tensor, b: Tensor) -> float:
        return float(torch.exp(-(a - b).square().sum() / (2 * width**2)))

    n, m = len(x), len(y)
    xx, yy, xy = ([[k(a, b) for b in q] for a in p] for p, q in ((x, x), (y, y), (x, y)))
    off = [sum(map(sum, part)) - sum(part[i][i] for i in range(len(part))) for part in (xx, yy)]
    cross = 2 * sum(map(sum, xy)) / (n * m)
    return (
        off[0] / (n * (n - 1)) + off[1] / (m * (m - 1)) - cross,
        sum(map(sum, xx)) / n**2 + sum(map(sum, yy)) / m**2 - cross,
    )


@pytest.mark.slow
@each_kind
def test_the_kernel_distance_is_that_of_the_papers(kind: FeatureKind, folders: dict[FeatureKind, Path]) -> None:
    """And how far CMMD's own estimate is from it, which the page says."""
    made, data = images(24), images(30, "real") // 2
    evaluator, eye = opened(folders[kind], kind, data, samples=24), vision.load(folders[kind], kind, "model")
    scores = scored(evaluator, made)
    x, y = eye(made).pool.double(), eye(data).pool.double()
    width = 10 if kind == "cmmd" else float(f"{np.median([(a - b).norm().item() for a, b in combinations(y, 2)]):.3g}")
    value, biased = unbiased(x, y, width)
    assert next(iter(scores)) == "mmd"
    assert scores["mmd"] == pytest.approx(1000 * value, rel=1e-6)
    assert f"width {width:g}," in evaluator.facts["kernel"]
    if kind == "cmmd":
        cosines = [(a @ a.T - torch.eye(len(a), dtype=a.dtype)).sum().item() / (len(a) * (len(a) - 1)) for a in (x, y)]
        excess = sum(10 * (1 - cosine) / n for cosine, n in zip(cosines, (24, 30), strict=True))
        assert 1000 * (biased - value) == pytest.approx(excess, rel=1e-2)


@pytest.mark.slow
@each_kind
def test_a_frechet_distance_needs_more_images(kind: FeatureKind, folders: dict[FeatureKind, Path]) -> None:
    width = {"cmmd": 8, "dinov2": WIDTH}[kind]
    eye, data = vision.load(folders[kind], kind, "model"), images(40, "real")
    few, more = (scored(opened(folders[kind], kind, data, samples=n), images(n)) for n in (width, width + 1))
    assert few.keys() == more.keys() - {"fd"}
    wanted = frechet_distance(*(Moments.of(eye(x).pool) for x in (images(width + 1), data)))
    assert more["fd"] == pytest.approx(wanted, rel=1e-4)
    assert "fd" not in scored(opened(folders[kind], kind, data[:width], samples=40), images(40))
    assert ("kid" in more) == (kind == "dinov2")
    many = images(300, "real")
    perfect_of_few, perfect_of_more = (
        opened(folders[kind], kind, many, samples=n).baselines()["perfect"] for n in (width, width + 1)
    )
    assert perfect_of_few.keys() == perfect_of_more.keys() - {"fd", "fd_sd"}
    assert "fd" in perfect_of_more
    few_facts = opened(folders[kind], kind, data, samples=width).facts
    assert few_facts.get("kid", "").endswith(f"of {width} images") == (kind == "dinov2")


@pytest.mark.nightly
@each_kind
def test_new_images_are_as_far_as_a_perfect_sampler_and_damaged_ones_are_not(
    kind: FeatureKind, folders: dict[FeatureKind, Path]
) -> None:
    evaluator = opened(folders[kind], kind, images(300, "real"), samples=100)
    perfect = evaluator.baselines()["perfect"]
    assert abs(perfect["mean"]) < perfect["sd"]
    new, grey = scored(evaluator, images(100)), scored(evaluator, images(100) // 2)
    assert abs(new["mmd"]) < 3 * perfect["sd"]
    assert new["fd"] < perfect["fd"] + 5 * perfect["fd_sd"]
    assert grey["mmd"] > 10 * perfect["sd"]
    assert grey["mmd"] > 3 * grey["mmd_sd"]
    assert "fd" not in opened(folders[kind], kind, images(7, "real")).baselines()["perfect"]


def test_data_are_seen_once(folders: dict[FeatureKind, Path], monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    seen, call, data = list[int](), ImageEncoder.__call__, images(30, "real")
    monkeypatch.setattr(ImageEncoder, "__call__", lambda eye, pixels: (seen.append(len(pixels)), call(eye, pixels))[1])
    first = scored(opened(folders["cmmd"], "cmmd", data, samples=20), images(20))
    assert scored(opened(folders["cmmd"], "cmmd", data, samples=20), images(20)) == first
    assert sum(seen) == 30 + 2 * 20
    facts = opened(folders["cmmd"], "cmmd", data).facts
    assert {"features_sha256", "reference_sha256", "resize", "colours", "kernel"} < facts.keys()
    assert sum(seen) == 30 + 2 * 20
    opened(folders["cmmd"], "cmmd", data.flip(0))
    assert sum(seen) == 2 * 30 + 2 * 20
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'),
            "contains a vit, not a Dinov2Model",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 30), "model.safetensors is damaged"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), r"pytorch_model.bin"),
    ],
)
def test_another_folder_is_refused_with_a_line(
    folders: dict[FeatureKind, Path], tmp_path: Path, spoil: Callable[[Path], object], line: str
) -> None:
    shutil.copytree(folders["dinov2"], tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(UserError, match=line):
        opened(tmp_path / "model", "dinov2", images(4))


def test_images_in_memory_are_a_reference_and_those_held_out_where_some_are(folders: dict[FeatureKind, Path]) -> None:
    x, one_class = from_uint8(images(30)), torch.zeros(30, dtype=torch.long)
    split = HeldOutSplit.of(TensorData(x, one_class), torch.arange(10))
    facts = FeatureProtocol(kind="cmmd", model=str(folders["cmmd"])).evaluator(Context(lambda: split)).facts
    assert facts == opened(folders["cmmd"], "cmmd", images(30)[:10]).facts


@each_kind
def test_data_without_two_different_images_are_refused(kind: FeatureKind, folders: dict[FeatureKind, Path]) -> None:
    assert "evaluate.protocol.model" in (FeatureProtocol(kind=kind).missing or "")
    with pytest.raises(UserError):
        opened(folders[kind], kind, images(1).expand(1 if kind == "cmmd" else 3, -1, -1, -1))
    with pytest.raises(UserError):
        FeatureProtocol(kind=kind, model=str(folders[kind])).evaluator(Context(Endless))


@pytest.mark.nightly
def test_a_folder_is_judged_against_another_by_one_rank_as_by_two(
    folders: dict[FeatureKind, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders["dinov2"], "dinov2")
    for place, n in (("made", 140), ("real", 130)):
        Path(place).mkdir()
        for i, pixels in enumerate(images(n, place)):
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(f"{place}/{i:03}.png")
    with pytest.raises(UserError, match=r"protocol dinov2 needs a Dinov2Model, in evaluate\.protocol\.model"):
        judge("made", "dinov2", against="real")
    programs = [main_of("unit.evaluation.features_together", i, tmp_path / "meeting", cwd=tmp_path) for i in (0, 1)]
    outputs(programs, 300)
    together = json.loads(Path("together.json").read_text())
    shutil.rmtree(tmp_path / "cache")
    alone = json.loads(json.dumps(features_together.judged("alone.json")))
    assert together["card"] == alone["card"]
    assert alone["protocol"] == "dinov2 (140 samples)"
    assert list(alone["results"][0]) == ["mmd", "mmd_sd", "fd", "kid", "kid_sd"]
    for part in ("results", "baselines"):
        assert (
            json.loads(json.dumps(together[part]), parse_float=lambda x: pytest.approx(float(x), rel=1e-5))
            == alone[part]
        )
