"""From captions to prompts: train and sample by words."""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import dumo
import encoders
from dumo.config import recipe_files
from dumo.data import Digits
from dumo.data.caption import Templates
from dumo.encoders.transformers_text import TextEncoder
from dumo.io import picture
from dumo.io.tensor_files import load
from dumo.report.name import name_part
from dumo.report.sample_to_files import sample_to_files
from dumo.run.fill_caches import encoding_work
from dumo.run.write_samples import write_samples
from e2e.shell import call, files

TEMPLATES = ["{}", "the digit {n}", "a handwritten {}"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder, a recipe of digits by words, and a run, which encoded its captions."""
    home = tmp_path_factory.mktemp("home")
    tree: dict[str, Any] = yaml.safe_load(recipe_files.text("digits"))
    tree["data"] = {"kind": "digits", "captions": {"kind": "templates", "templates": TEMPLATES}}
    encoder = {"kind": "transformers", "source": str(encoders.t5(home / "t5")), "length": 40}
    texts = {"kind": "encoder", "root": str(home / "texts"), "encoder": encoder, "width": encoders.WIDTH}
    tree["net"] = {"kind": "dit", "patch": 4, "width": 16, "depth": 1, "attention": 2, "texts": texts}
    tree["train"] |= {"steps": 2, "batch": 8}
    (home / "words.yaml").write_text(yaml.safe_dump(tree))
    done = call("train", home / "words.yaml", "--out", home / "run")
    assert done.code == 0, done.err
    return home


def refused(*words: object) -> str:
    """What a command says that ends with code 2."""
    done = call(*words)
    assert (done.code, done.out) == (2, ""), done
    return done.err


def test_a_prompt_that_is_a_caption_is_that_caption_and_another_one_is_told_apart(home: Path) -> None:
    run = dumo.load(home / "run")
    with torch.no_grad():  # a net that has learned little reads little of texts
        for name, p in run.net.named_parameters():
            if "read" in name or "pool" in name or "heads" in name:
                p.copy_(torch.linspace(-0.3, 0.3, p.numel()).view(p.shape))
    asked = ["seven", "the digit 7", "a red seven", "seven", "a red seven"]
    c = run.conditions(prompts=asked)
    assert c.tolist() == [21, 22, 31, 21, 31]  # 3 captions of a class; 30 is no caption
    assert run.conditions(prompts=["two", "a red seven", "a blue seven"]).tolist() == [6, 31, 32]
    assert run.names_of_conditions(c) == asked
    images = run.sample(prompts=["seven", "a red seven"], nfe=1)
    assert torch.equal(images[0], run.sample([21, 3], nfe=1)[0])
    noises = run.sample(prompts=["seven", "seven"], nfe=1)
    assert not torch.allclose(images[1], noises[1])
    assert run.sample(prompts="a red seven", count=3, nfe=1).shape == (3, 1, 8, 8)


@pytest.mark.slow
def test_wrong_prompts_are_refused_in_a_line(home: Path) -> None:
    run, sample = dumo.load(home / "run"), ("sample", home / "run", "--nfe", 1)
    for prompts, says in (([], "prompts"), (["a", " "], "a prompt is empty")):
        with pytest.raises(dumo.UserError, match=says):
            run.sample(prompts=prompts)
    with pytest.raises(dumo.UserError, match="give only one"):
        run.sample(3, prompts=["a"])
    assert refused(*sample, "--prompt", "").startswith("error: a prompt is empty")
    assert "--labels, --prompt and" in refused(*sample, "--prompt", "a", "--labels", "3")
    assert not (home / "run" / "samples").exists()
    moved = shutil.copytree(home / "run", home / "elsewhere")
    lost = f"net.texts.encoder.source={home / 'nowhere'}"
    assert "is no folder" in refused("sample", moved, "--nfe", 1, "--prompt", "a red seven", lost)


def test_a_long_prompt_is_cut_with_a_warning(home: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # tests take warnings for errors
        done = call("sample", home / "run", "--nfe", 1, "--out", tmp_path, "--prompt", 50 * "seven ", "--prompt", "two")
    assert done.code == 0
    assert "cut at 40 tokens" in done.err
    assert len(os.listdir(tmp_path)) == 1


def test_an_image_of_no_caption_has_a_blank_one_in_the_table_of_samples(tmp_path: Path) -> None:
    """As in the data, where it means that the image shall have none."""
    data = Digits(captions=Templates(templates=("a {}",)))
    c = torch.tensor([7, 10])
    write_samples(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), c, tmp_path, "images", data, 0, ["a seven", "no caption"])
    lines = (tmp_path / "metadata.csv").read_text().splitlines()
    assert lines == ["file_name,text", "000000.png,a seven", "000001.png,"]


def test_a_folder_of_images_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.zeros(3, 8, 8, 3, dtype=torch.uint8)
    write = picture.write_picture

    def write_two(path: Path, image: Image.Image) -> None:
        if path.name == "000002.png":
            raise KeyboardInterrupt
        write(path, image)

    monkeypatch.setattr(picture, "write_picture", write_two)
    with pytest.raises(KeyboardInterrupt):
        write_samples(rows, torch.arange(3), tmp_path / "images", "images", Digits(), 0)
    assert not any(tmp_path.iterdir())
    write_samples(rows[:2], torch.arange(2), tmp_path / "images", "images", Digits(), 0)
    with pytest.raises(KeyboardInterrupt):
        write_samples(255 - rows, torch.arange(3), tmp_path / "images", "images", Digits(), 0)
    images = [Image.open(path) for path in sorted(tmp_path.rglob("*.png"))]
    assert [image.getpixel((0, 0)) for image in images] == 2 * [(0, 0, 0)]


def test_other_prompts_and_other_images_that_are_edited_are_other_files(home: Path, tmp_path: Path) -> None:
    opened = dumo.load(home / "run")
    files: set[Path] = set()
    for text in ("a dog", "a dog!", "\N{DOG}", "\N{CAT}"):
        files.update(sample_to_files(opened, tmp_path, count=1, nfe=[1], prompts=[text]))
    assert len(files) == 4
    assert name_part("source", "1.png", b"of one folder") != name_part("source", "1.png", b"of another")


@pytest.mark.slow
def test_a_page_shows_a_prompt_that_is_given_alone(home: Path) -> None:
    assert "a red seven" in dumo.load(home / "run").report(prompts="a red seven").read_text()


def test_a_run_of_classes_reads_no_prompts(trained: dict[str, Path]) -> None:
    with pytest.raises(dumo.UserError, match="trained without captions"):
        dumo.load(trained["digits"]).sample(prompts=["seven"])


def test_an_encoder_that_is_missing_is_named_before_anything_is_encoded(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "t5", tmp_path / "t5")
    (tmp_path / "t5" / "tokenizer_config.json").unlink()
    for folder, says in (("t5", "tokenizer_config.json"), ("nowhere", "is no folder")):
        source = f"net.texts.encoder.source={tmp_path / folder}"
        with pytest.raises(dumo.UserError, match=says):
            encoding_work(str(home / "words.yaml"), [source], out=None, codec=None, side=None)


def test_encoding_ahead_fills_the_cache_that_training_reads(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it was copied to another place, where there is no encoder."""
    recipe, trained = home / "words.yaml", next((home / "run" / "checkpoints").glob("*/net/00000.safetensors"))
    root = f"net.texts.root={tmp_path / 'texts'}"
    (folder,) = (home / "texts").iterdir()
    done = call("encode", recipe, root)
    said = "30 captions and the empty text, 1 shards made now"
    assert (done.code, done.out) == (0, f"{tmp_path / 'texts' / folder.name}: {said}\n")
    assert call("encode", recipe, root).out.endswith("0 shards made now\n")
    assert files(tmp_path / "texts") == files(home / "texts")

    lost = (root, f"net.texts.encoder.source={tmp_path / 'nowhere'}")
    monkeypatch.setattr(TextEncoder, "open", None)
    assert call("train", recipe, "--out", tmp_path / "run", *lost).code == 0
    (again,) = (tmp_path / "run" / "checkpoints").glob("*/net/00000.safetensors")
    assert again.read_bytes() == trained.read_bytes()


def test_other_captions_and_another_use_of_the_encoder_are_encoded_and_trained_on(home: Path, tmp_path: Path) -> None:
    """Never a row of what was there before."""
    recipe, root = home / "words.yaml", f"net.texts.root={shutil.copytree(home / 'texts', tmp_path / 'texts')}"
    there = files(tmp_path / "texts")
    for i, field in enumerate(("data.captions.templates=['{}', '{n}', 'a {}']", "net.texts.encoder.template=so {}")):
        fields = (field, "train.steps=1")
        assert call("train", recipe, "--out", tmp_path / f"old{i}", root, *fields).code == 0
        fresh = f"net.texts.root={tmp_path / f'fresh{i}'}"
        assert call("train", recipe, "--out", tmp_path / f"new{i}", fresh, *fields).code == 0
        one, other = (
            load(next((tmp_path / f"{run}{i}" / "checkpoints").glob("*/net/00000.safetensors")))
            for run in ("old", "new")
        )
        assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in other)
    assert there.items() <= files(tmp_path / "texts").items()
    assert len([*(tmp_path / "texts").glob("*/*/index.json")]) == 3


@pytest.mark.slow
def test_rows_on_disk_train_the_same_net(home: Path, tmp_path: Path) -> None:
    recipe, disk = home / "words.yaml", "net.texts.memory=0"
    assert call("train", recipe, "--out", tmp_path / "run", disk).code == 0
    held, looked_up = (load(next((run / "checkpoints").glob("*/net"))) for run in (home / "run", tmp_path / "run"))
    assert held.keys() == looked_up.keys()
    assert all(torch.equal(held[name], looked_up[name]) for name in held)
