"""Laws of the demo's answers: its samples are those of `run.sample`, and what a run cannot do says why."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import IO
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dumo.cli.terminal import explain
from dumo.config.conditions import Conditions
from dumo.config.load import load
from dumo.io import picture
from dumo.report import answer, demo, live
from dumo.report.answer import PASSES, Answer, AnswerCell, AnswerRow, answer_runs, noises_between
from dumo.report.demo import answers_html, error_html, guidance_html, write_downloads
from dumo.report.live import InteractiveRun, open_runs, require_fit, short_names
from dumo.run.train import train
from dumo.runtime.random import stream
from dumo.runtime.signals import Stopped
from dumo.types import UserError

NONSENSE = ["", " ", "abc", "-1", "1.5", "1e9", "٣", "nan", "9" * 19, "9" * 10_000, "<script>alert(1)</script>", "0\0"]
TINY = ["net.width=16", "net.depth=1", "train.batch=16", "train.steps=5", "train.optimizer.lr=0.02"]

STRONG = 300.5  # of guidance: after five steps a net hardly heeds its labels


def trained(folder: Path, recipe: str, *more: str) -> InteractiveRun:
    """A run of a recipe, made small."""
    train(load(recipe, [*TINY, *more]), folder)
    (live,) = open_runs([str(folder)], device="cpu", limit=60)
    return live


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> InteractiveRun:
    """DuMo, which jumps and has a velocity."""
    return trained(tmp_path_factory.mktemp("demo") / "digits", "digits")


@pytest.fixture(scope="session")
def free(tmp_path_factory: pytest.TempPathFactory) -> InteractiveRun:
    """The same, which can be guided."""
    return trained(tmp_path_factory.mktemp("demo") / "{free}", "digits", "objective.drop=0.1")


@pytest.fixture(scope="session")
def flow(tmp_path_factory: pytest.TempPathFactory) -> InteractiveRun:
    """Flow matching by Heun's steps, two passes each: no jumps, and no single pass."""
    folder = tmp_path_factory.mktemp("demo") / "flow"
    return trained(folder, "digits-flow-matching", "sample.solver.kind=heun", "sample.nfe=[2]", "evaluate.nfe=[2]")


@pytest.fixture(scope="session")
def moons(tmp_path_factory: pytest.TempPathFactory) -> InteractiveRun:
    """Points."""
    return trained(tmp_path_factory.mktemp("demo") / "moons", "moons")


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> InteractiveRun:
    """Digits by captions, with a small encoder."""
    folder = tmp_path_factory.mktemp("demo")
    return trained(folder / "words", "digits-words", f"net.texts.root={folder}/ids")


def pixels(cell: AnswerCell) -> np.ndarray:
    """Of a cell that has a picture."""
    assert cell.picture, cell.note
    return np.asarray(cell.picture)


def one(live: InteractiveRun, letter: str, nfe: int, c: int, seed: int) -> np.ndarray:
    """A sample's pixels, made alone."""
    x = live.sample(live.mode(letter), nfe, torch.tensor([c]), live.noises(seed)).x
    return picture.to_rows(x)[0].numpy()


def read(file: Path | IO[bytes]) -> np.ndarray:
    """A picture's pixels, grey in all three colours."""
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def near(a: np.ndarray, b: np.ndarray) -> bool:
    """But for a rounding to the next of 256 colours."""
    return bool((np.abs(a.astype(int) - b) <= 1).all())


@pytest.mark.nightly
def test_passes_stand_side_by_side_from_one_noise(digits: InteractiveRun) -> None:
    """In the order of their numbers, a row for each reading, and each as soon as it is made."""
    parts = [*answer.compare_passes(digits, "3", "8", 1)]
    assert len(parts) == 2 * len(PASSES)
    made = [sum(cell.picture is not None for row in part.rows for cell in row.cells) for part in parts]
    assert made == [*range(1, len(parts) + 1)]
    for letter, row in zip("uv", parts[-1].rows, strict=True):
        for nfe, cell in zip(PASSES, row.cells, strict=True):
            assert near(pixels(cell), one(digits, letter, nfe, 3, 8))
            assert cell.note.startswith(f"{nfe} NFE, ")
    assert parts[-1].line == ""


@pytest.mark.slow
def test_what_a_run_cannot_do_says_why(flow: InteractiveRun) -> None:
    *_, last = answer.compare_passes(flow, "3", "0", 1)
    (row,) = last.rows
    assert [cell.picture is None for cell in row.cells] == [True, False, False, False]
    assert "solver 'heun' makes 2 passes a step" in row.cells[0].note
    assert last.line == "Objective flow_matching teaches no jumps."


def test_the_way_between_seeds_begins_and_ends_at_them(digits: InteractiveRun) -> None:
    (found,) = answer.interpolate_seeds(digits, "5", "3", 1, "9", "u", 2)
    (row,) = found.rows
    assert near(pixels(row.cells[0]), one(digits, "u", 2, 5, 3))
    assert near(pixels(row.cells[-1]), one(digits, "u", 2, 5, 9))
    steps = [np.abs(pixels(a).astype(int) - pixels(b)).mean() for a, b in pairwise(row.cells)]
    whole = np.abs(pixels(row.cells[0]).astype(int) - pixels(row.cells[-1])).mean()
    assert 0 < max(steps) < whole / 2
    with pytest.raises(UserError, match="give another one"):
        next(answer.interpolate_seeds(digits, "5", "3", 1, "03", "u", 2))


def test_a_copy_of_the_data_is_found(digits: InteractiveRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight samples one stands among the data: it is below itself, at distance 0, and the others are farther."""
    some = digits.sample(digits.mode("u"), 1, digits.conditions("2", 8), digits.noises(0, 8)).x
    real = torch.cat([digits.data[0][:50], some[[6]], digits.data[0][50:99]])
    known = replace(digits)
    monkeypatch.setitem(known.__dict__, "data", (real, 5000))
    (found,) = answer.find_neighbours(known, "2", "0", 1, "u", 1)
    samples, nearest = found.rows
    assert near(pixels(nearest.cells[6]), pixels(samples.cells[6]))
    assert [cell.note == "distance 0.00" for cell in nearest.cells] == [k == 6 for k in range(8)]
    assert found.line.startswith("Looked for among 100 of 5,000 images of the data")
    assert "the pixels" in found.line


def test_without_the_data_there_are_samples_and_a_line(digits: InteractiveRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(run: object) -> None:
        raise UserError("there is no folder photos")

    monkeypatch.setattr("dumo.data.toy.Digits.originals", gone)
    (found,) = answer.find_neighbours(replace(digits), "2", "0", 1, "u", 1)
    (row,) = found.rows
    assert len(row.cells) == 8
    assert found.line.endswith("there is no folder photos")


def test_points_are_a_scatter(moons: InteractiveRun) -> None:
    first = next(answer.compare_passes(moons, "", "0", 1))
    drawn = pixels(first.rows[0].cells[0])
    for colour in ([255, 0, 0], [204, 204, 204]):  # the samples, the data behind them
        assert (drawn == colour).all(-1).sum() > 100


def test_a_seed_that_is_none_is_refused_in_a_line() -> None:
    assert [answer.parse_seed(text) for text in ("0", " 7\n", "007", "9" * 18)] == [0, 7, 7, 10**18 - 1]
    for text in NONSENSE:
        with pytest.raises(UserError, match="give a whole number") as found:
            answer.parse_seed(text)
        assert len(str(found.value)) < 160


def test_a_class_or_reading_that_is_none_is_refused(digits: InteractiveRun) -> None:
    for what in ("10", "-1", "seven", "<img src=x onerror=alert(1)>"):
        with pytest.raises(UserError, match="labels run from 0 to 9"):
            next(answer.compare_passes(digits, what, "0", 1))
    for letter in ("w", "", "<script>"):
        with pytest.raises(UserError, match="teaches no reading"):
            digits.mode(letter)


def test_what_is_said_of_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """What a person can mend, escaped; of a defect nothing, which the terminal has with its trace."""
    assert error_html(UserError("seed '<b>' is none"), explain) == "seed &#x27;&lt;b&gt;&#x27; is none"
    assert error_html(RuntimeError("CUDA out of memory"), explain).startswith(
        "out of memory: use a device with more memory"
    )
    assert error_html(Stopped(2), explain) == "this page is being closed"
    assert caplog.records == []
    assert "secret" not in error_html(KeyError("secret"), explain)
    assert "KeyError: 'secret'" in caplog.text


def test_words_are_escaped_and_pictures_are_inside() -> None:
    wrong = "<script>alert('x')</script>"
    tiny = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    text = answers_html(
        {
            wrong: Answer([AnswerRow(wrong, [AnswerCell(tiny, wrong), AnswerCell(None, wrong)])], wrong),
            "other": Answer([]),
        }
    )
    assert "<script" not in text
    assert (
        text.count("&lt;script&gt;") == 8
    )  # the name, the title, three words of the picture's other text, its note, the reason, the line
    assert text.count('src="data:image/png;base64,') == text.count("src=") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "what", "guidance", "letter", "sets"),
    [
        ("digits", "", 1, "u", ()),
        ("digits", " 7\n", 1, "v", ("sample.solver.m=0.3", "sample.precision=fp32")),
        ("free", "3", STRONG, "u", ("sample.guide.interval.high=0.7", "sample.guide.scale=3")),
        ("flow", "3", 1, "v", ()),
        ("words", "a blue 'seven'", 1, "u", ()),
    ],
)
def test_the_script_makes_what_is_shown(
    name: str,
    what: str,
    guidance: float,
    letter: str,
    sets: tuple[str, ...],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the pixel, in files of the same names as in the archive; a class as it was typed, all in turn if none was."""
    monkeypatch.chdir(tmp_path)
    (live,) = open_runs([str(request.getfixturevalue(name).opened.folder)], sets, device="cpu", limit=60)
    (found,) = answer.make_samples(live, what, "5", guidance, 7, 4, letter)
    archive, grid = write_downloads({live.name: found}, tmp_path)
    assert (read(grid) == np.asarray(found.sheet)).all()
    exec("import dumo\n" + found.script)
    with ZipFile(archive) as files:
        assert files.namelist() == [f"{live.name}-{i:06d}.png" for i in range(7)]
        for cell, file in zip(found.rows[0].cells, files.namelist(), strict=True):
            assert (pixels(cell) == read(Path(file))).all()
            with files.open(file) as kept:
                assert (pixels(cell) == read(kept)).all()
    assert len({pixels(cell).tobytes() for cell in found.rows[0].cells}) == 7


@pytest.mark.parametrize("word", ["digits-trained", "dumo:digits-trained"])
def test_the_script_opens_a_run_that_comes_with_dumo_by_the_word_that_was_given(word: str) -> None:
    """Not by the folder where dumo is installed here, which no other machine has."""
    (live,) = open_runs([word], device="cpu", limit=60)
    (found,) = answer.make_samples(live, "3", "5", 1, 1, 1, "u")
    assert found.script.splitlines()[0] == f"run = dumo.load({word!r}, device='cpu')"
    assert "digits-trained-{i:06d}.png" in found.script


def test_the_script_of_a_users_class_lets_its_code_run() -> None:
    run = load("digits", ["objective={kind: contract.outside:Outside}"])
    assert live._load_call(run, "runs/mine", [], None, "auto").endswith("/runs/mine', trust_code=True)")


def test_what_cannot_be_guided_says_why(digits: InteractiveRun, free: InteractiveRun, tmp_path: Path) -> None:
    """On the page in advance; and where it is tried, as `run.sample` does."""
    guided_run = trained(tmp_path / "guided", "digits-guided")
    reason = "this model was trained at guidance scale 2; the scale is part of its weights"
    assert free.guidance_refusal == guidance_html([free]) == ""
    assert guidance_html([guided_run]) == f"No guidance: {reason}."
    assert guidance_html([guided_run, free]) == f"No guidance of guided: {reason}."
    assert guidance_html([digits]) == (
        "No guidance: this model never learned without a label, since objective.drop = 0."
    )
    with pytest.raises(UserError, match=f"^guidance = 3: {reason}: set guidance=1, or train with objective.guide"):
        guided_run.guide(3)
    with pytest.raises(UserError, match="guidance = 3: this model never"):
        next(answer.make_samples(digits, "3", "0", 3, 1, 1, "u"))
    plain, guided = (
        next(answer.make_samples(free, "3", "0", scale, 1, 1, "u")).rows[0].cells[0] for scale in (1, STRONG)
    )
    assert (pixels(plain) != pixels(guided)).any()


@pytest.mark.slow
def test_two_runs_answer_one_after_the_other(digits: InteractiveRun, flow: InteractiveRun) -> None:
    """From the same noise; what one cannot make is its line, and no error while another can."""
    parts = [*answer_runs([digits, flow], answer.compare_passes, "3", "0", 1)]
    assert [[*part] for part in parts] == [["digits"]] * 8 + [["digits", "flow"]] * 4
    assert parts[-1]["digits"] == parts[7]["digits"]
    *_, last = answer_runs([flow, digits], answer.make_samples, "3", "0", 1, 4, 1, "u")
    assert (last["flow"].rows, last["flow"].line) == ([], "objective flow_matching teaches no jumps")
    assert len(last["digits"].rows[0].cells) == 4
    with pytest.raises(UserError, match="seed 'x'"):
        next(answer_runs([digits, flow], answer.compare_passes, "3", "x", 1))
    with pytest.raises(UserError, match="teaches no reading"):
        next(answer_runs([digits], answer.make_samples, "3", "0", 1, 4, 1, "w"))


def test_without_a_run_there_is_a_line() -> None:
    with pytest.raises(UserError, match="there is no run to answer"):
        next(answer_runs([], answer.compare_passes, "3", "0", 1))


def test_two_grids_stand_next_to_each_other(digits: InteractiveRun, free: InteractiveRun, tmp_path: Path) -> None:
    *_, shown = answer_runs([digits, free], answer.make_samples, "3", "0", 1, 4, 1, "u")
    archive, grid = write_downloads(shown, tmp_path)
    assert read(grid).shape[1] > 2 * np.asarray(shown["digits"].sheet).shape[1]
    with ZipFile(archive) as files:
        assert files.namelist() == [f"{name}-{i:06d}.png" for name in ("digits", "{free}") for i in range(4)]


def test_runs_that_do_not_fit_are_refused(
    digits: InteractiveRun, free: InteractiveRun, flow: InteractiveRun, moons: InteractiveRun, words: InteractiveRun
) -> None:
    for other in (free, flow):
        require_fit(digits, other)
    with pytest.raises(UserError, match="moons does not fit next to digits, its data: moons, not digits: give two"):
        require_fit(digits, moons)
    with pytest.raises(UserError, match="its classes: captions, not 10"):
        require_fit(digits, words)


def test_each_fact_that_is_known_of_both_must_be_the_same(
    digits: InteractiveRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, flow = replace(digits, name="free"), replace(digits, name="flow")
    for name, value in {"shape": "1 x 9 x 9", "fingerprint of the images": "a", "names of classes": "cat, dog"}.items():
        facts = {"digits": {name: "b"}, "free": {name: value}, "flow": {name: None}}
        with monkeypatch.context() as patched:
            patched.setattr(InteractiveRun, "facts", lambda self, facts=facts: facts[self.name])
            with pytest.raises(UserError, match=f"its {name}: {value}, not b"):
                require_fit(digits, free)
            require_fit(digits, flow)


def test_runs_are_called_by_what_tells_them_apart(digits: InteractiveRun) -> None:
    assert short_names([Path("/runs/a")]) == ["a"]
    assert short_names([Path("/runs/a"), Path("/b")]) == ["a", "b"]
    assert short_names([Path("/x/one/a"), Path("/x/two/a"), Path("/a")]) == ["one-a", "two-a", "/-a"]
    folder = digits.opened.folder
    with pytest.raises(UserError, match="both folders are the same run"):
        open_runs([str(folder), f"{folder}/../{folder.name}"], limit=60)
    with pytest.raises(UserError, match="--weights are of one run"):
        open_runs([str(folder), "other"], weights="w.safetensors", limit=60)


def test_between_two_noises_lies_noise() -> None:
    """Each of mean 0 and deviation 1, in every draw, and neighbours are equally far apart."""
    a, b = (lambda k, name=name: torch.randn(1, 200_000, generator=stream(name, k)) for name in "ab")
    for k in (0, 1):
        rows = noises_between(a, b, 5)(k)
        torch.testing.assert_close(rows[[0, -1]], torch.cat([a(k), b(k)]), atol=1e-6, rtol=0)
        torch.testing.assert_close(rows.std(1), torch.ones(5), atol=0.01, rtol=0)
        gaps = rows.diff(dim=0).norm(dim=1)
        torch.testing.assert_close(gaps / gaps.mean(), torch.ones(4), atol=0.01, rtol=0)


def test_what_takes_too_long_is_stopped_between_passes_and_says_so(digits: InteractiveRun) -> None:
    """And the net is as it was: without hooks, in its own mode."""
    late, mode = replace(digits, limit=0), digits.modes["u"]
    with pytest.raises(UserError, match="took too long"):
        late.sample(mode, 1, torch.tensor([0]), late.noises(0))
    *_, last = answer.compare_passes(late, "0", "0", 1)
    assert all("took too long" in cell.note for row in last.rows for cell in row.cells)
    net = digits.sampler.net
    assert [*net._forward_pre_hooks, *net._forward_hooks] == []
    assert digits.sample(mode, 1, torch.tensor([0]), digits.noises(0)).nfe == 1


def test_images_that_are_all_equally_far_apart_lie_so_far_from_the_nearest(
    digits: InteractiveRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(digits)
    monkeypatch.setitem(other.__dict__, "data", (torch.eye(12).view(12, 1, 3, 4), 12))
    assert other.spacing == pytest.approx(2**0.5)


def test_a_field_for_prompts_is_empty_where_captions_are_not_here(
    words: InteractiveRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = words.sampler.conditions.words
    assert demo._condition_field(words).value == captions[0]
    monkeypatch.setattr(Conditions, "names", ())
    assert demo._condition_field(words).value == ""


def test_a_run_of_captions_takes_prompts(words: InteractiveRun) -> None:
    """A caption of the data is its own number; another text has one behind all, the same every time."""
    conditions = words.sampler.conditions
    assert words.conditions(conditions.name(3), 2).tolist() == [3, 3]
    new = words.conditions("a red bicycle")
    assert new > conditions.count
    assert words.conditions(" a red bicycle ") == new
    made = [words.sample(words.mode("u"), 1, c, words.noises(1)).x for c in (new, torch.tensor([3]))]
    assert not torch.equal(*made)
    for wrong in ("", "  ", "7" * 10_001):
        with pytest.raises(UserError, match="a prompt"):
            words.conditions(wrong)


def test_of_prompts_the_last_ones_are_kept(words: InteractiveRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page is open for weeks, and a prompt of a large encoder takes megabytes."""
    monkeypatch.setattr(live, "MAX_ENCODED_PROMPTS", 3)
    texts = words.sampler.texts

    def made(text: str) -> Tensor:
        return words.sample(words.mode("u"), 1, words.conditions(text), words.noises(1)).x

    before = {text: made(text) for text in "abacad"}
    assert [*texts.prompts] == ["c", "a", "d"]
    assert len(texts.ids) == words.sampler.conditions.count + 1 + 3
    assert all(torch.equal(made(text), before[text]) for text in "abcd")
