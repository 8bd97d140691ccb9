"""What is wrong is refused before any work: one plain line that names it and the way out, exit code 2, no change."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from dumo.cli.api import recipe
from dumo.types import UserError
from e2e.shell import TINY, call, refused
from tiers import tiered


def test_half_a_character(here: Path) -> None:
    """Of a field's name or value: no text in UTF-8."""
    refused("show", "digits", "net.\udcff=1", named=("lone surrogate",))
    for field in ({"\ud800": 1}, {"net": {"\ud800": 1}}, {"about": "\ud800"}):
        with pytest.raises(
            UserError, match=r"lone surrogate|must be a number|not a YAML value|cannot be written as YAML"
        ):
            recipe("digits", field)


POINTS = [
    ("net.kind=dit", ("dit", "square images", "mlp")),
    ("objective.guide.zeta=0.5", ("guidance", "moons", "no classes", "objective.guide.zeta=0")),
    ("objective.kind=shortcut; objective.scale=2; sample.solver.kind=hop", ("moons", "has no classes")),
    ("evaluate.protocol.kind=digits", ("protocol digits", "(2,)")),
]


@pytest.mark.parametrize(("field", "named"), POINTS, ids=[field for field, _ in POINTS])
def test_field_that_does_not_fit_points(field: str, named: tuple[str, ...], here: Path) -> None:
    refused("show", "moons", *TINY, *field.split("; "), named=named)


def test_text_is_shown_as_it_was_typed(here: Path) -> None:
    refused("show", "digits", "[/b]:x:=1", named=("[/b]:x:",))


SOURCES = [
    ("moon", b"", ("'moon'", "'moons'")),
    ("xyzzy", b"", ("'xyzzy'", "dumo recipes")),
    ("", b"", ("the source is empty",)),
    ("no.yaml", b"", ("'no.yaml'",)),
    ("a.yaml", b"a: [1, 2\nb: }", ("a.yaml", "is not YAML", "line 2")),
    *(("a.yaml", text, ("a.yaml is not YAML",)) for text in (b"\t- x", b"a: *b", b"a: 1\n b: 2", b"\x00")),
    *(("a.yaml", text, ("a.yaml is not a run", "names to values")) for text in (b"- 1", b" ", b"3", b"2026-01-01")),
    ("a.yaml", b"about: !!python/object/apply:os.getcwd []", ("a.yaml", "python")),
    ("a.yaml", b"\xff\xfe\x00", ("a.yaml",)),
]


@pytest.mark.parametrize(("source", "text", "named"), SOURCES)
def test_source(source: str, text: bytes, named: tuple[str, ...], here: Path) -> None:
    if text:
        (here / source).write_bytes(text)
    refused("train", source, named=named)


def test_source_that_is_incomplete(here: Path) -> None:
    (here / "a.yaml").write_text("about: me\ndata: {kind: digits}\n")
    refused("train", "a.yaml", named=("net: ", "objective: ", "train: "), lines=5)


def test_folders_that_are_no_run(here: Path) -> None:
    (here / "empty").mkdir()
    (here / "full").mkdir()
    (here / "full/thesis.tex").write_text("years of work")
    refused("train", "empty", named=("empty",))
    refused("train", "digits", "--out", "full", named=("full", "run.yaml", "--out"))
    for command in ("sample", "evaluate", "report"):
        refused(command, "empty", named=("empty", "run.yaml", "train"))
        refused(command, "digits", named=("digits", "train"))


def digits_here(what: str, trained: dict[str, Path]) -> None:
    """A folder with a recipe's name that holds a run, or photos."""
    if what == "a run":
        shutil.copytree(trained["digits"], "digits")
        return
    Path("digits/class").mkdir(parents=True)
    for i in range(20):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(f"digits/class/{i}.png")


READING = (["show"], ["train", "--yes"], ["encode", "--codec", "taef2"])


@pytest.mark.parametrize("what", tiered(["a run", "images"], ci=["a run"]))
def test_a_folder_of_a_recipes_name_is_not_taken_for_it(what: str, here: Path, trained: dict[str, Path]) -> None:
    """By any command; each of the two has a name of its own."""
    digits_here(what, trained)
    both = ("write dumo:digits for the name, or ./digits for the folder",)
    for first, *rest in READING:
        refused(first, "digits", *rest, named=both)
    assert "kind: digits" in call("show", "dumo:digits").out
    assert call("train", "dumo:digits", *TINY).code == 0
    assert Path("runs/digits/run.yaml").is_file()
    if what == "a run":
        assert call("train", "./digits").code == 0
        assert call("train", "digits", *TINY, "--out", "digits").code == 0  # the same command again


@pytest.mark.nightly
def test_a_folder_of_a_recipes_name_that_holds_neither_is_no_rival(here: Path) -> None:
    """Of no command."""
    (here / "digits/notes").mkdir(parents=True)
    (here / "digits/notes/a.txt").touch()
    assert call("show", "digits").out == call("show", "dumo:digits").out
    assert call("train", "digits", *TINY).code == 0
    refused("encode", "digits", named=("digits trains on data 'digits', not on latents",))


@pytest.mark.slow
def test_places_that_cannot_be_written(here: Path, trained: dict[str, Path]) -> None:
    (here / "file").write_text("mine")
    words = ["--count", "1", "--nfe", "1"]
    for out in ("file", "file/x", "/dev/null/x"):
        refused("train", "moons", *TINY, "--out", out, named=(out,))
        refused("sample", trained["moons"], *words, "--out", out, named=(out,), run=trained["moons"])


@pytest.mark.slow
def test_another_run_lives_there(here: Path, trained: dict[str, Path]) -> None:
    run = shutil.copytree(trained["digits"], here / "run")
    words = [*TINY, "net.depth=2", "objective.drop=0.25", "train.log_every=9"]
    done = refused("train", "digits", "--out", run, *words, named=("a different run", "--out"), lines=None)
    assert "  net.depth: 1 recorded, 2 requested\n" in done.err
    assert " recorded, 0.25 requested\n" in done.err
    assert "log_every" not in done.err
    refused("train", "moons", "--out", run, named=("data: ", "digits", "moons"), lines=None)
    refused("sample", run, "net.width=64", named=("net.width: 32 recorded, 64 requested",), lines=2)
    refused("train", run, "train.ema=[]", named=("train.ema", "0.999"), lines=None)
    refused("train", run, "train.ema.0.decay=0.5", named=("train.ema", "0.5"), lines=None)


def test_fewer_steps_than_are_done(here: Path, trained: dict[str, Path]) -> None:
    shutil.copytree(trained["digits"], here / "run")
    refused("train", "run", "train.steps=5", named=("20", "5"))


@pytest.mark.parametrize("device", ["cuda:99", "meta", ""])
def test_device_that_is_not_there(device: str, here: Path) -> None:
    refused("train", "moons", *TINY, "--device", device, named=(f"device '{device}'", "cpu"))


@pytest.mark.slow
def test_divergence_is_a_failure_not_a_mistake(here: Path) -> None:
    words = ["train.optimizer.lr=1.0e+06", "train.schedule.kind=constant", "train.log_every=1"]
    done = call("train", "digits", *TINY, *words)
    assert done.code == 1
    assert "error: step " in done.err
    assert "diverged" in done.err
    assert "Traceback" not in done.err
    rows = Path("runs/digits/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, len(rows) + 1))  # those before it
    assert 1 <= len(rows) < 20
