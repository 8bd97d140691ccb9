"""A model that edits images: of pairs, by a text and an image, as its own pipeline reads both."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from dumo.export.model_card import PROMPT
from dumo.nets.text_rows import Texts
from dumo.run import prompt_rows
from dumo.run.weights import load_run
from e2e.shell import call, refused
from stock.case import CAPTIONS, EDITED, FULL, SHORT, Case

ALONE = ("data.images.captions.source=source", "data.images.flip=false")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.nightly]  # of diffusers about its own parts


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A run of FLUX.1 Kontext, exported to `out`: to be read."""
    made = Case.of("Flux-Kontext", tmp_path_factory.mktemp("kontext"), *FULL)
    made.export("out")
    return made


def texts_of(case: Case) -> Texts:
    """The rows of the run."""
    texts = prompt_rows.texts_of(case.opened.net)
    assert texts
    return texts


def test_the_card_makes_dumos_edits(case: Case) -> None:
    assert max(case.errors_over_limits("full", case.folder / "out")) < 1


def test_an_edit_depends_on_its_image(case: Case) -> None:
    other = case.folder / "before" / "0.png"
    noise = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    one, two = (
        case.dumo_image([noise], c=case.opened.conditions(prompts=[PROMPT], source=image))
        for image in (case.image, other)
    )
    assert (one - two).norm() / one.norm() > 0.01


def test_the_rows_are_what_the_pipeline_makes_of_the_images(case: Case) -> None:
    """Also of a prompt, and where they are looked up on disk."""
    pipe = case.pipeline()
    mapped = load_run(str(case.run), ["net.texts.memory=0"], device="cpu")
    files = [*(case.folder / "before" / f"{i}.png" for i in range(len(CAPTIONS))), case.image]
    for where in (case.opened, mapped):
        texts = prompt_rows.texts_of(where.net)
        assert texts
        c = torch.cat([torch.arange(len(CAPTIONS)), where.conditions(prompts=[PROMPT], source=case.image)])
        rows = texts.sources(c)
        assert rows is not None
        for row, file in zip(rows, files, strict=True):
            pixels = pipe.image_processor.preprocess(Image.open(file))
            with torch.no_grad():
                latent = pipe._encode_vae_image(pixels, torch.Generator())
            torch.testing.assert_close(row[None], latent, rtol=0, atol=1e-5)


def test_names_are_texts(case: Case) -> None:
    conditions = case.opened.spec.conditions
    assert [conditions.name(k) for k in range(conditions.count)] == [*CAPTIONS]


def test_an_image_that_changed_is_another_caption(case: Case, tmp_path: Path, here: Path) -> None:
    folder = shutil.copytree(case.folder / "photos", tmp_path / "photos").parent
    shutil.copytree(case.folder / "before", folder / "before")
    more = [f"data.root={folder / 'latents'}", f"data.images.root={folder / 'photos'}"]
    more += [f"net.texts.root={case.folder / 'texts'}", "net.texts.dtype=float32"]
    words = [*case.fields, *SHORT, *FULL, *more]
    assert call("encode", "sd3-lora", *words).code == 0  # a copy of all is the same
    Image.new("RGB", (64, 64)).save(folder / "before" / "1.png")
    shutil.rmtree(folder / "latents")
    assert "1 shards made now" in call("encode", "sd3-lora", *words).out.splitlines()[-1]
    (folder / "before" / "1.png").unlink()
    refused("encode", "sd3-lora", *words, named=("1.png is missing", "captions.source"))


def test_prompts_alone_edit_no_image(case: Case, here: Path) -> None:
    (here / "prompts.txt").write_text(PROMPT)
    refused("report", case.run, "--prompts", here / "prompts.txt", named=("edits images", "dumo sample"))
    (here / "prompts").mkdir()
    (here / "prompts/1.txt").write_text(PROMPT)
    words = ("--format", "dpg", "--prompts", here / "prompts")
    refused("sample", case.run, *words, named=("edits images", "--source FILE"))


def test_what_cannot_be_edited_is_refused(case: Case, here: Path) -> None:
    words = [*case.fields, *SHORT, *FULL, f"net.texts.root={here / 'texts'}"]
    for field, named in {
        "objective.drop=0.1": ("captions.source", "objective.drop"),
        "sample.guide.scale=2": ("sample.guide.scale needs the null condition",),
        "objective.guide.zeta=0.8": ("objective.guide needs the null condition", "zeta=0"),
        "data.images.flip=true": ("set flip=false",),
        "data.images.captions.source=null": ("captions.source", "FluxKontextPipeline"),
        "data.images.captions.source=before": ("no row with 'before' in metadata.csv", "outside data.images.root"),
    }.items():
        refused("encode", "sd3-lora", *words, field, named=named)
    refused("show", "sd3-lora", *ALONE, named=("captions.source", "objective.drop"))
    refused(
        "show",
        "sd3-lora",
        *EDITED,
        "objective.guide={omega: 1, zeta: 0}",
        named=("is a column of images to edit", "remove it"),
    )
    refused("sample", case.run, "--prompt", PROMPT, named=("edits images", "--source FILE"))
    assert call("sample", case.run, "--source", case.image).code == 2
    (here / "text.png").write_text("no image")
    refused("sample", case.run, "--prompt", PROMPT, "--source", here / "text.png", named=("text.png, which is to be",))
    refused(
        "sample",
        case.run,
        "--prompt",
        PROMPT,
        "--source",
        here / "none.png",
        named=("none.png",),
    )
