"""Laws of the report: what is promised is there, nothing outside is needed, and no number is made up."""

import json
import math
import re
import shlex
from base64 import b64decode
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from docs.test_command import check
from dumo.config import word
from dumo.config.load import load
from dumo.flow.noisy_batch import draw
from dumo.flow.path import Linear
from dumo.io import picture, run_places
from dumo.objectives import Critic
from dumo.report import figure, judgement
from dumo.report import page as report
from dumo.report.evaluation_card import make_card
from dumo.run.folder import CHECKPOINT_MARK, RunFolder
from dumo.run.trained import TrainedRun
from dumo.run.weights import build, load_run
from dumo.runtime.progress import Tick, no_bar
from dumo.types import UserError
from trained import train

SMALL = ["train.batch=8", "train.save_every=20", "train.steps=20", "train.schedule.kind=constant", "train.log_every=4"]
DIGITS = [*SMALL, "train.optimizer.lr=0.02", "net.depth=1", "net.width=8", "net.attention=2"]
DIGITS += ["sample.nfe=[1,2]"]
VOID = ("meta", "link", "img", "source", "br", "col")

SECTIONS = ["samples", "trajectories", "neighbours", "loss", "evaluation", "run"]


def row(solver: str, **scores: float | None) -> dict[str, Any]:
    """Of an evaluation in one pass."""
    return {"nfe": 1, "solver": solver, **scores}


EVALUATION: dict[str, Any] = {
    "step": 20,
    "weights": "checkpoints/step-00000020/ema-0.999",
    "protocol": "digits",
    "samples": 2000,
    "seed": 0,
    "results": [row("restart", mmd=8.642, mmd_sd=0.206, fd=2.3456, recall=None)],
    "contrast": [row("euler", mmd=99.8, mmd_sd=0.5, fd=98.76, recall=0.0083)],
    "baselines": {"perfect": {"mean": 3.579, "sd": 0.1}, "noise": {"mean": 140.2, "sd": 1.5}},
}


class Page(HTMLParser):
    """What stands in a page: its sections, its tags, its pictures, its text. Refuses tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections, self.tags, self.pictures, self.words = [], set[str](), [], ""
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        self.tags.add(tag)
        if tag == "section":
            self.sections.append(of["id"])
        if tag == "img":
            self.pictures.append(of)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += " ".join(data.split()) + " "

    def picture(self, alt: str) -> np.ndarray:
        """The pixels of the one picture with this alt text."""
        (of,) = [of for of in self.pictures if of.get("alt") == alt]
        return decode(of["src"])


def decode(address: str) -> np.ndarray:
    """The pixels in a data: address."""
    kind, _, data = address.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(BytesIO(b64decode(data, validate=True))))


def make(folder: Path, recipe: str, overrides: list[str], evaluation: dict[str, Any] | None = None) -> Path:
    """Train a tiny run and write its report."""
    train(load(recipe, overrides), folder)
    opened = load_run(str(folder))
    if evaluation:
        (folder / "evaluation.json").write_text(
            json.dumps({**evaluation, "card": make_card(opened, opened.spec, {}, 2000)})
        )
    report.write(opened)
    return folder


def untrained(recipe: str, *overrides: str) -> TrainedRun:
    """A run at step 1, as its net begins."""
    run = load(recipe, ["net.depth=1", "net.width=8", "net.attention=2", *overrides])
    return TrainedRun(run, RunFolder(Path("runs/untrained")), build(run).eval(), 1, "net.safetensors")


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Generator[None, None, None]:
    """Fewer passes, points and dots than a report has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "PASSES", (1, 2, 7))
        patch.setattr(report, "MAX_DATA_ROWS", 100)
        patch.setattr(picture, "SCATTER_POINTS", 100)
        patch.setattr(figure, "PANEL_DPI", 40)
        yield


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("runs") / "digits", "digits", DIGITS, EVALUATION)


@pytest.fixture(scope="module")
def moons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("runs") / "moons", "moons", [*SMALL, "net.width=16", "sample.nfe=[1,2]"])


@pytest.fixture(params=["digits", "moons"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


def rendered(opened: TrainedRun) -> Page:
    """The words of a page, without its pictures."""
    evaluations = judgement.read_judgements(opened)
    return Page(report.render(opened, report.PageParts(size=1797, evaluations=evaluations)))


KEYS = ("fd", "kid", "fd_grey", "mmd2", "pixel_fd", "auc", "nfe", "null")


@pytest.mark.nightly
def test_what_every_page_has(folder: Path) -> None:
    """Nothing outside is needed, what to type comes first, every section and picture is there, and no key shows."""
    text, points = (folder / "report.html").read_text(), "moons" in folder.name
    for outside in ("http://", "https://", "url(", "@import", "<script", "<link", "<iframe", "javascript:"):
        assert outside not in text
    page = Page(text)
    assert len(page.pictures) > 9
    for of in page.pictures:
        assert decode(of["src"]).size > 0
        assert len(of["alt"]) > 10  # words for who cannot see it
    assert [path.name for path in folder.rglob(".*") if path.is_file()] == [CHECKPOINT_MARK]  # nothing half done
    sections = [name for name in SECTIONS if name != "neighbours" or not points]
    assert page.sections == sections
    assert {"header", "main", "h1", "h2", "figure", "figcaption"} <= page.tags
    top = text[: text.index("<main>")]
    assert f"dumo {'evaluate' if points else 'sample'} {folder}" in top
    assert "resumes" not in top  # it is done
    assert re.findall(r'href="#([^"]+)"', top) == sections
    above, _, below = page.words.partition("All there is to know")
    assert re.findall(rf"(?<![-\w])({'|'.join(KEYS)})(?![-\w])", above) == []
    lines = [line.strip() for line in (folder / "run.yaml").read_text().splitlines()]
    assert [line for line in lines if line not in below and not line.startswith("hash:")] == []
    assert torch.__version__ in page.words


@pytest.mark.nightly
def test_written_again_it_is_the_same(digits: Path) -> None:
    before = {path: path.read_bytes() for path in digits.rglob("*") if path.is_file()}
    seen: list[tuple[int, int]] = []

    @contextmanager
    def watch(title: str, total: int) -> Generator[Tick, None, None]:
        yield lambda done, note: seen.append((done, total))

    assert report.write(load_run(str(digits)), watch) == digits / "report.html"
    assert {path: path.read_bytes() for path in digits.rglob("*") if path.is_file()} == before
    assert seen[-1][0] == seen[-1][1] == 1 + 2 + 2 * sum(report.PASSES)


def test_lead_and_figures_are_facts(digits: Path) -> None:
    words = " ".join(page_of(digits).words.split())
    assert "One NFE of the u head makes these images." in words
    assert "was trained by DuMo on digits (1,797 images of 8 × 8 pixels in 10 classes) for 20 steps of 8." in words
    assert "Objective: DuMo (Duality Models, arXiv 2602.17682, Sec. 3 and Alg. 1): one input, two outputs." in words
    assert "images seen in training 160" in words
    for found in ("98.8", "8.64 ± 0.21", "0.00830", "new real images", "140.2 ± 1.5"):
        assert found in words
    assert "kernel distance · 10³, 1 NFE lower is better; 0 is equal at any number of samples 8.64" in words
    assert "a perfect sampler 3.58" in words
    assert "Restart 1 8.64 ± 0.21 – Euler 1 99.80 ± 0.50 0.00830" in words
    assert "Restart 1 8.64 ± 0.21 2.35 – Euler 1 99.80 ± 0.50 98.8" in words.partition("All scores")[2]
    assert "a perfect sampler 3.58 ± 0.10" in words


@pytest.mark.nightly
def test_a_perfect_sampler_stands_next_to_the_scores(tmp_path: Path, digits: Path) -> None:
    moved = replace(load_run(str(digits)), run_folder=RunFolder(tmp_path))
    card = make_card(moved, moved.spec, {}, 2000)
    for perfect, said in (
        ({"mean": 0.0, "sd": 0.027, "fd": 0.0475, "fd_sd": 0.008}, "a perfect sampler 0.000 ± 0.027"),
        (None, "A perfect sampler: unknown, because there are too few images."),
    ):
        baselines = {"perfect": perfect} if perfect else {}
        (tmp_path / "evaluation.json").write_text(json.dumps({**EVALUATION, "baselines": baselines, "card": card}))
        words = " ".join(rendered(moved).words.split())
        assert said in words
        assert ("a perfect sampler 0.000 ± 0.027 0.0475 ± 0.0080" in words) == bool(perfect)
        assert ("too few" in words) != bool(perfect)


@pytest.mark.slow
def test_a_run_that_is_not_done_says_so(digits: Path) -> None:
    words = rendered(load_run(str(digits), ["train.steps=5000"])).words
    assert f"Stopped at step 20 of 5,000. dumo train {digits} resumes it" in " ".join(words.split())
    assert "Stopped" not in page_of(digits).words


def test_first_row_of_a_sheet_is_where_the_trajectory_begins(digits: Path) -> None:
    """The same seeds and classes, so the same images, whatever number of them is made at once."""
    page = page_of(digits)
    for n in ("1 NFE", "2 NFE"):
        sheet = page.picture(f"Generated images at {n}.")
        strip = page.picture(f"u head, jumps (restart): the same seeds at {n}.")
        assert strip.shape == (64, 10 * 64 + 9 * picture.GAP, 4)
        assert sheet.shape == (8 * 64 + 7 * picture.GAP, *strip.shape[1:])
        assert (np.abs(sheet[:64].astype(int) - strip) <= 1).all()
    one, many = (page.picture(f"v head, Euler steps: the same seeds at {n}.") for n in ("1 NFE", "7 NFE"))
    assert np.abs(one.astype(int) - many).max() > 20
    alpha = page.picture("Images of the training data, in the same layout.")[..., 3]
    assert (alpha[:64, :64] == 255).all()
    assert (alpha[64 : 64 + picture.GAP] == 0).all()  # gaps are clear, and images are not
    assert (alpha[:, 64 : 64 + picture.GAP] == 0).all()


@pytest.mark.nightly
def test_the_size_is_that_of_the_run() -> None:
    """Not that of the recipe, whose words no setting changes."""
    for recipe, field in (("my-images", "data.side"), ("my-images-256", "data.images.side")):
        page = rendered(untrained(recipe, f"{field}=32", "train.batch=8", f"{field.replace('side', 'classes')}=0"))
        above, _, _ = page.words.partition("All there is to know")
        assert "images of 32 × 32 pixels" in above
        assert not re.search(r"\b(64|256)\b", above)


def next_command(opened: TrainedRun, parts: report.PageParts) -> str:
    """What a page proposes to type, which dumo must take."""
    html = report.render(opened, parts)
    line = unescape(html.partition('<p class="next">')[2].partition("<code>")[2].partition("</code>")[0])
    words = shlex.split(line)
    check(words[words.index("dumo") + 1 :])
    return line


@pytest.mark.slow
def test_a_page_proposes_what_can_be_typed() -> None:
    """A run that ships with dumo is named; a class of the user's needs consent."""
    done = untrained("digits", "train.steps=1")
    assert next_command(done, report.PageParts()) == "dumo evaluate runs/untrained"
    name = "digits-trained"
    shipped = replace(
        done, run_folder=RunFolder(run_places.folder(name)), own_output=Path(name), lasting_name=f"dumo:{name}"
    )
    evaluations = judgement.read_judgements(load_run(name))
    assert next_command(shipped, report.PageParts(evaluations=evaluations)) == f"dumo sample dumo:{name}"
    command = next_command(untrained("digits", "objective={kind: contract.outside:Outside}"), report.PageParts())
    assert command == "dumo train runs/untrained --trust-code"


@pytest.mark.slow
def test_velocity_alone_says_what_is_missing() -> None:
    page = rendered(untrained("digits-flow-matching"))
    assert "NFE of the velocity make the images below" in page.words
    assert "u head" not in page.words
    assert "Nothing is logged yet" in page.words
    assert "These weights have not been evaluated." in page.words


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "sets", "rows"),
    [
        ("digits-flow-matching", (), {"v head, Euler steps": [1, 2, 7]}),
        (
            "digits-meanflow", ("sample.solver.kind=restart",),  # one head at two times
            {"u head, jumps (restart)": [1, 2, 7], "v = u at r = t, Euler steps": [1, 2, 7]},
        ),
        ("digits-shortcut", (), {"u head, jumps (hop)": [1, 2], "v by the u head, Euler steps": [1, 2]}),
    ],
)  # fmt: skip
def test_each_reading_has_a_row_of_the_passes_that_its_solver_can_make(
    recipe: str, sets: tuple[str, ...], rows: dict[str, list[int]]
) -> None:
    opened = untrained(recipe, *sets)
    _, made = report.make_samples(opened, no_bar)
    assert {name: [*row] for name, row in made.items()} == rows


@pytest.mark.nightly
@pytest.mark.parametrize(("recipe", "head"), [("digits-imf", "u"), ("digits-three-heads", "u"), ("digits-sct", "f")])
def test_the_words_name_the_head_that_is_read(recipe: str, head: str) -> None:
    """Not the last of the objective's; and where no velocity is taught, there is none to fail."""
    words = rendered(untrained(recipe)).words
    assert f"One NFE of the {head} head makes these images." in words
    assert f"Look at one NFE: the {head} head jumps to the data" in words
    assert ("single Euler step" in words) is (recipe != "digits-sct")


@pytest.mark.nightly
def test_points_are_scattered(moons: Path) -> None:
    page = page_of(moons)
    assert "One NFE of the u head makes these points." in page.words
    rgb = page.picture("v head, Euler steps: samples before the data at 1 NFE.")[..., :3].astype(int)
    assert ((rgb[..., 0] > 200) & (rgb[..., 1:].max(-1) < 80)).sum() > 50  # red: samples
    assert ((np.ptp(rgb, axis=-1) == 0) & (rgb[..., 0] > 150) & (rgb[..., 0] < 230)).sum() > 200  # grey: truth


WATCHED = ("Gap between the heads", "Residuals beyond ±1")


def test_charts_are_explained(digits: Path) -> None:
    words = page_of(digits).words
    assert all(title in words for title in ("Loss", "Gradient norm", "Learning rate", *WATCHED))
    assert "t loss v u residuals beyond ±1 gap between the heads rows 0.0 – 0.1" in " ".join(words.split())
    assert all(f"{title.lower()}:" in words.lower() for title in WATCHED)


def test_notes_of_pulls_have_words_of_their_own() -> None:
    """Of one that has another name, too; and no page shows a key."""
    assert word.watched("accuracy_d").title == "pairs in the right order, d"
    assert word.watched("margin_other").meaning == word.WATCHED["margin"].meaning
    assert word.watched("head_gap") == word.WATCHED["head_gap"]
    assert word.watched("some_note") == word.Word("some note")
    x = torch.randn(8, 1, 4, 4)
    critic, c = Critic(), torch.arange(8)
    b = draw(critic, Linear(), x, c, 8, seed=0, step=0)
    notes = critic.pull(lambda x, c, **_: (x, x, x), b, x).notes
    assert notes
    assert all(word.watched(name).meaning for name in notes)


@pytest.mark.slow
def test_what_is_put_in_is_escaped(digits: Path) -> None:
    page = rendered(load_run(str(digits), ["about='<script>alert(1)</script> & <b>bold</b>'"]))
    assert "<script>alert(1)</script> & <b>bold</b>" in page.words
    assert not {"script", "b"} & page.tags


@pytest.mark.slow
def test_figures_of_other_weights_or_samples_are_not_shown(tmp_path: Path, digits: Path) -> None:
    """Of one file of weights, at one step: `--from` trains it again, and `sample` may be edited or set."""
    opened = load_run(str(digits))
    moved = replace(opened, run_folder=RunFolder(tmp_path))
    for name in ("evaluation.json", "evaluation-clip-score.json"):
        (tmp_path / name).write_text(json.dumps({**EVALUATION, "card": make_card(opened, opened.spec, {}, 2000)}))
    assert "2.35" in rendered(moved).words
    assert len(judgement.read_judgements(moved)) == 2
    trained_again = replace(moved, listed_sha256="0" * 64)
    sampled_otherwise = replace(load_run(str(digits), ["sample.solver.m=0.25"]), run_folder=RunFolder(tmp_path))
    for other in (trained_again, sampled_otherwise):
        words = rendered(other).words
        assert "2.35" not in words
        assert "These weights have not been evaluated." in words
        assert f"dumo evaluate {tmp_path}" in words
        assert judgement.read_judgements(other) == []


def test_a_damaged_evaluation_is_named(tmp_path: Path, digits: Path) -> None:
    opened = load_run(str(digits))
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation\.json"):
        report.write(TrainedRun(opened.spec, RunFolder(tmp_path), opened.net, opened.step, opened.weights))
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_late_loss_counts_rows_of_the_last_quarter() -> None:
    """Bin 0: (1 · 2 + 3 · 4) / 4 of three rows and one; bin 1: only the row with a number; bin 2: none."""
    rows = [
        {"step": 75, "counts": [9, 9, 9], "bins": {"loss": [100.0, 100.0, 100.0], "v": [7.0, 7.0, 7.0]}},
        {"step": 80, "counts": [3, 0, 0], "bins": {"loss": [2.0, None, None], "v": [1.0, None, None]}},
        {"step": 100, "counts": [1, 5, 0], "bins": {"loss": [4.0, 6.0, None], "v": [5.0, 2.0, None]}},
    ]
    found = report.late_losses(rows)
    assert found is not None
    assert (found["first"], found["logged"], found["counts"]) == (80, 2, [4.0, 5.0, 0.0])
    assert found["bins"]["loss"][:2] == [2.5, 6.0]
    assert found["bins"]["v"][:2] == [2.0, 2.0]
    assert math.isnan(found["bins"]["loss"][2])
    assert report.late_losses([]) is None


def test_a_loss_of_one_part_is_shown_once_also_where_a_bin_is_empty() -> None:
    means = [2.0, None]
    found = report.late_losses([{"step": 1, "counts": [3, 0], "bins": {"loss": means, "v": means}}])
    assert found is not None
    assert found["bins"].keys() == {"v"}


def test_first_samples_stand_next_to_their_nearest_images(digits: Path) -> None:
    """Copies lie at distance zero, and are shown as what they copy."""
    run = load_run(str(digits))
    truth, _ = run.spec.data.open().reference(1, 0)
    near = report.draw_nearest(run, truth[100:180].flip(0), truth)
    assert near.count == 10
    assert near.samples.tobytes() == near.nearest.tobytes()
    assert max(near.proximity.ratios) == 0
    assert near.proximity.num_copies > 70  # a few digits have a double
    words = " ".join(Page(report.render(load_run(str(digits)), report.PageParts(neighbours=near))).words.split())
    assert "distance 0 copy 0 copy" in words
    assert f"Of all 80 samples: {near.proximity.num_copies} copies, mean distance 0." in words


def test_data_are_laid_out_by_class(digits: Path) -> None:
    """A class without a row leaves its column grey."""
    run = load_run(str(digits))
    truth, c = run.spec.data.open().reference(1, 0)
    sheet = report.arrange_by_class(run, truth, c)
    for i in (0, 7, 13, 79):
        same = (truth[c == i % 10] == sheet[i]).all((1, 2, 3)).nonzero()
        assert same[0].item() == i // 10
    sheet = report.arrange_by_class(run, truth[c != 3], c[c != 3]).unflatten(0, (-1, 10))
    assert sheet.shape[:2] == (report.ROWS, 10)
    assert (sheet[:, 3] == 0).all()
    assert (sheet[:, [*range(3), *range(4, 10)]] != 0).flatten(2).any(-1).all()
    assert report.draw_samples(run, sheet.flatten(0, 1), truth).height > 0
    assert torch.equal(report.arrange_by_class(run, truth, c + 10), truth[:80])  # none of the first ten classes
