"""What is wrong is refused before any work: one plain line that names it and the way out, exit code 2, no change."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from e2e.shell import TINY, call, refused, sets

FIELDS = [
    ("train.stpes=3", ("train.stpes", "unknown key", "'steps'")),
    ("trian.steps=3", ("trian", "unknown key", "'train'")),
    ("train.steps=many", ("train.steps", "integer", "'many'")),
    ("train.steps=1.5", ("train.steps", "integer", "1.5")),
    ("train.steps=", ("train.steps", "integer")),
    ("train.steps=0", ("train.steps", "greater than or equal to 1")),
    ("train.steps.more=3", ("train.steps", "20")),
    ("train=3", ("train", "got 3")),
    ("train.ema.0.decya=0.5", ("train.ema.0.decya", "'decay'")),
    ("train.ema.0.decay=2", ("train.ema.0.decay", "less than 1")),
    ("train.ema.1.decay=0.5", ("train.ema.1", "from 0 to 0")),
    ("train.ema.last.decay=0.5", ("train.ema.last",)),
    ("train.ema.²=1", ("train.ema.²",)),
    ("train.optimizer.betas=[0.9, 2]", ("train.optimizer.betas.1", "less than 1")),
    ("train.optimizer.lr=.nan", ("train.optimizer.lr", "finite")),
    ("train.optimizer.kind=adaw", ("train.optimizer.kind", "'adamw'")),
    ("train.seed=-1", ("train.seed", "greater than or equal to 0")),
    ("train.accumulate=200", ("train", "16", "200", "accumulate")),
    ("train.ref=0.5", ("ref", "0.5", "0.999")),
    ("train.precision=fp16", ("train.precision", "'bf16'")),
    ("train.precision=bf16", ("central", "fp32", "jvp")),
    ("net.time_scale=20", ("central", "h * time_scale", "0.0025", "jvp")),
    ("net.patch=3", ("net.patch 3", "8")),
    ("net.width=98", ("net.width", "multiple of 4")),
    ("net.attention=5", ("net.attention 5", "32")),
    ("net.kind=unet", ("net.kind", "'unet'", "dit", "mlp")),
    ("data.kind=moons", ("dit", "square images", "mlp")),
    ("data.kind=", ("data.kind", "digits", "moons")),
    ("objective.kind=dumbo", ("objective.kind", "'dumbo'", "'dumo'")),
    ("objective.kind=flow_matching", ("solver", "'restart'", "euler or heun")),
    ("objective.guide.zeta=1", ("objective.guide.zeta", "less than 1")),
    ("objective.guide.omega=.inf", ("objective.guide.omega", "finite")),
    ("objective.slope.kind=jpv", ("objective.slope.kind", "'jvp'")),
    ("sample.solver.kind=hop", ("'hop'", "flow_map", "euler, heun or restart")),
    ("sample.solver.kind=heun", ("'heun'", "nfe = 1", "2")),
    ("sample.nfe=[0]", ("nfe = 0", "at least 1")),
    ("sample.nfe=[]", ("sample.nfe",)),
    ("sample.nfe=[1, a]", ("sample.nfe.1", "integer")),
    ("sample.seed=-2", ("sample.seed",)),
    ("evaluate.nfe=[]", ("evaluate.nfe",)),
    ("evaluate.nfe=[-1]", ("nfe = -1",)),
    ("evaluate.protocol.kind=toy", ("protocol toy", "(1, 8, 8)")),
    ("evaluate.protocol.samples=10", ("evaluate.protocol.samples", "500")),
    ("path.kind=cosine", ("path.kind", "'linear'", "'cosine'")),
    ("about=", ("about", "string")),
    ("train.steps", ("train.steps", "a.b=c")),
    ("=3", ("=3", "a.b=c")),
    ("train.steps={", ("train.steps", "YAML")),
]


@pytest.mark.parametrize(("field", "named"), FIELDS, ids=[field for field, _ in FIELDS])
@pytest.mark.parametrize("command", ["train", "show"])
def test_field(command: str, field: str, named: tuple[str, ...], here: Path) -> None:
    refused(command, "digits", *TINY, "--set", field, named=named)


POINTS = [
    ("net.kind=dit", ("dit", "square images", "mlp")),
    ("objective.guide.zeta=0.5", ("guidance", "moons", "no classes", "objective.guide.zeta=0")),
    ("evaluate.protocol.kind=digits", ("protocol digits", "(2,)")),
    ("data.noise=.inf", ("data.noise", "finite")),
]


@pytest.mark.parametrize(("field", "named"), POINTS, ids=[field for field, _ in POINTS])
def test_field_that_does_not_fit_points(field: str, named: tuple[str, ...], here: Path) -> None:
    refused("train", "moons", *TINY, "--set", field, named=named)


def test_every_mistake_has_its_line(here: Path) -> None:
    words = sets("train.stpes=3", "train.batch=-1", "net.kind=unet")
    done = refused("train", "digits", *words, named=("train.stpes", "train.batch", "net.kind"), lines=3)
    lines = done.err.removeprefix("error: ").splitlines()
    assert {line.split(":")[0] for line in lines} == {"train.stpes", "train.batch", "net.kind"}


def test_text_is_shown_as_it_was_typed(here: Path) -> None:
    refused("show", "digits", "--set", "[/b]:x:=1", named=("[/b]:x:",))


SOURCES = [
    ("moon", "", ("'moon'", "'moons'")),
    ("xyzzy", "", ("'xyzzy'", "digits-meanflow")),
    ("", "", ("recipe",)),
    ("no.yaml", "", ("'no.yaml'",)),
    ("a.yaml", "a: [1, 2\nb: }", ("a.yaml", "YAML", "line 2")),
    ("a.yaml", "- 1\n- 2\n", ("a.yaml", "names to values")),
    ("a.yaml", "", ("a.yaml", "names to values")),
    ("a.yaml", "about: !!python/object/apply:os.getcwd []", ("a.yaml", "python")),
    ("a.txt", "about: me", ("a.txt", "YAML")),
]


@pytest.mark.parametrize(("source", "text", "named"), SOURCES)
def test_source(source: str, text: str, named: tuple[str, ...], here: Path) -> None:
    if text or source == "a.yaml":
        (here / source).write_text(text)
    refused("train", source, named=named)


def test_source_that_is_no_text(here: Path) -> None:
    (here / "a.yaml").write_bytes(b"\xff\xfe\x00")
    refused("train", "a.yaml", named=("a.yaml",))


def test_source_that_is_incomplete(here: Path) -> None:
    (here / "a.yaml").write_text("about: me\ndata: {kind: digits}\n")
    refused("train", "a.yaml", named=("net: missing", "objective: missing", "train: missing"), lines=5)


def test_folders_that_are_no_run(here: Path) -> None:
    (here / "empty").mkdir()
    (here / "full").mkdir()
    (here / "full/thesis.tex").write_text("years of work")
    refused("train", "empty", named=("empty", "run.yaml"))
    refused("train", "digits", "--out", "full", named=("full", "run.yaml", "--out"))
    for command in ("sample", "evaluate", "report"):
        refused(command, "empty", named=("empty", "run.yaml", "train"))
        refused(command, "digits", named=("digits", "train"))


def test_places_that_cannot_be_written(here: Path, trained: dict[str, Path]) -> None:
    (here / "file").write_text("mine")
    words = ["--count", "1", "--nfe", "1"]
    for out in ("file", "file/x", "/dev/null/x"):
        refused("train", "moons", *TINY, "--out", out, named=(out,))
        refused("sample", trained["moons"], *words, "--out", out, named=(out,), run=trained["moons"])


def test_another_run_lives_there(here: Path, trained: dict[str, Path]) -> None:
    run = shutil.copytree(trained["digits"], here / "run")
    words = [*TINY, *sets("net.depth=2", "objective.drop=0.25", "train.log_every=9")]
    done = refused("train", "digits", "--out", run, *words, named=("another run", "--out"), lines=4)
    assert "  net.depth: 1 there, 2 asked\n" in done.err
    assert " there, 0.25 asked\n" in done.err
    assert "log_every" not in done.err
    refused("train", "moons", "--out", run, named=("data: ", "digits", "moons"), lines=None)
    refused("sample", run, "--set", "net.width=64", named=("net.width: 32 there, 64 asked",), lines=2)
    refused("train", run, "--set", "train.ema=[]", named=("train.ema", "0.999"), lines=3)
    refused("train", run, "--set", "train.ema.0.decay=0.5", named=("train.ema", "0.5"), lines=3)


def test_fewer_steps_than_are_done(here: Path, trained: dict[str, Path]) -> None:
    shutil.copytree(trained["digits"], here / "run")
    refused("train", "run", "--set", "train.steps=5", named=("20", "5"))


@pytest.mark.parametrize("device", ["cuda:99", "tpu9", "meta", ""])
def test_device_that_is_not_there(device: str, here: Path, trained: dict[str, Path]) -> None:
    refused("train", "moons", *TINY, "--device", device, named=(f"device '{device}'", "cpu"))
    for command in ("sample", "evaluate", "report"):
        run = trained["moons"]
        refused(command, run, "--device", device, named=(f"device '{device}'", "cpu"), run=run)


ASKED = [
    (["--nfe", "0"], ("nfe = 0",)),
    (["--nfe", "-1"], ("nfe = -1",)),
    (["--nfe", ""], ("--nfe", "whole numbers")),
    (["--nfe", "1,,2"], ("--nfe", "'1,,2'")),
    (["--nfe", "one"], ("--nfe", "'one'")),
    (["--nfe", "1.5"], ("--nfe", "'1.5'")),
    (["--solver", "heun", "--nfe", "3"], ("'heun'", "nfe = 3", "4")),
    (["--solver", "heun"], ("'heun'", "nfe = 1")),
    (["--solver", "hop"], ("'hop'", "flow_map", "restart")),
    (["--solver", "huen"], ("'huen'", "'heun'")),
    (["--solver", ""], ("euler", "restart")),
    (["--seed", "-1"], ("--seed", "0")),
    (["--seed", "1.5"], ("--seed",)),
]


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize(("words", "named"), ASKED, ids=[" ".join(words) for words, _ in ASKED])
def test_what_no_run_can_do(
    command: str, words: list[str], named: tuple[str, ...], here: Path, trained: dict[str, Path]
) -> None:
    refused(command, trained["digits"], *words, named=named, run=trained["digits"])


SAMPLES = [
    ("digits", ["--labels", "10"], ("label 10", "0 to 9")),
    ("digits", ["--labels", "3,-1"], ("label -1", "0 to 9")),
    ("digits", ["--labels", "three"], ("--labels", "'three'")),
    ("digits", ["--labels", ""], ("--labels",)),
    ("moons", ["--labels", "0"], ("label 0", "no classes")),
    ("digits", ["--format", "gif"], ("'gif'", "grid, images", "npz")),
    ("moons", ["--format", "images"], ("'images'", "grid", "npz")),
    ("digits", ["--count", "0"], ("--count", "1")),
    ("digits", ["--count", "ten"], ("--count",)),
    ("digits", ["--json"], ("--json",)),
]


@pytest.mark.parametrize(("name", "words", "named"), SAMPLES)
def test_samples_that_cannot_be_made(
    name: str, words: list[str], named: tuple[str, ...], here: Path, trained: dict[str, Path]
) -> None:
    refused("sample", trained[name], *words, named=named, run=trained[name])


def net_of(run: Path) -> Path:
    """The weights of its last checkpoint."""
    return run / "checkpoints/step-00000020/net.safetensors"


def weights(kind: str, run: Path) -> None:
    """Write w.safetensors, or w.pth, that is not what it should be."""
    found = safetensors.torch.load_file(net_of(run))
    match kind:
        case "pth":
            torch.save(found, "w.pth")
        case "renamed":
            torch.save(found, "w.safetensors")
        case "old":
            torch.save(found, "w.safetensors", _use_new_zipfile_serialization=False)
        case "pickle":
            Path("w.safetensors").write_bytes(pickle.dumps({"a": 1}))
        case "cut":
            Path("w.safetensors").write_bytes(net_of(run).read_bytes()[:-100])
        case "stump":
            Path("w.safetensors").write_bytes(net_of(run).read_bytes()[:5])
        case "empty":
            Path("w.safetensors").write_bytes(b"")
        case "double":
            safetensors.torch.save_file({k: v.double() for k, v in found.items()}, "w.safetensors")
        case "nan":
            safetensors.torch.save_file({k: v * float("nan") for k, v in found.items()}, "w.safetensors")
        case "fewer":
            found.popitem()
            safetensors.torch.save_file(found, "w.safetensors")
        case _:
            raise ValueError(kind)


WEIGHTS = [
    ("pth", ("w.pth", "pickle", "save_file")),
    ("renamed", ("w.safetensors", "pickle", "save_file")),
    ("old", ("w.safetensors", "pickle", "save_file")),
    ("pickle", ("w.safetensors", "pickle", "save_file")),
    ("cut", ("w.safetensors", "damaged")),
    ("stump", ("w.safetensors", "damaged")),
    ("empty", ("w.safetensors", "damaged")),
    ("double", ("w.safetensors", "float64", "float32")),
    ("fewer", ("w.safetensors", "absent in the file")),
    ("nan", ("not finite",)),
]


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize(("kind", "named"), WEIGHTS, ids=[kind for kind, _ in WEIGHTS])
def test_weights(command: str, kind: str, named: tuple[str, ...], here: Path, trained: dict[str, Path]) -> None:
    run = trained["digits"]
    weights(kind, run)
    (file,) = here.iterdir()
    lines = None if "pickle" in named else 1
    refused(command, run, "--weights", file.name, named=named, lines=lines, run=run)


def test_weights_that_are_not_there_or_of_another_net(here: Path, trained: dict[str, Path]) -> None:
    run = trained["digits"]
    refused("sample", run, "--weights", "no.safetensors", named=("no.safetensors", "no such file"), run=run)
    other = net_of(trained["moons"])
    refused("sample", run, "--weights", other, named=(str(other), "absent in the file"), run=run)


def cut(file: Path) -> None:
    """Its first twenty bytes alone."""
    file.write_bytes(file.read_bytes()[:20])


LAST = "checkpoints/step-00000020"
DAMAGED: list[tuple[str, Callable[[Path], object]]] = [
    *[(f"{LAST}/{name}", harm) for name in ("net.safetensors", "state.json") for harm in (cut, Path.unlink)],
    (f"{LAST}/ema-0.999.safetensors", cut),
    (f"{LAST}/optimizer.safetensors", cut),
    (f"{LAST}/state.json", lambda file: file.write_text("[]")),
]


@pytest.mark.parametrize(("name", "harm"), DAMAGED)
def test_damaged_checkpoint(name: str, harm: Callable[[Path], object], here: Path, trained: dict[str, Path]) -> None:
    run = shutil.copytree(trained["digits"], here / "run")
    harm(run / name)
    refused("train", "run", "--set", "train.steps=25", named=(f"run/{name}",))
    if "ema" in name or "state" in name:  # all that samples need
        refused("sample", "run", named=(f"run/{name}",))


def test_run_without_a_checkpoint(here: Path, trained: dict[str, Path]) -> None:
    (here / "run").mkdir()
    shutil.copy(trained["digits"] / "run.yaml", here / "run/run.yaml")
    for command in ("sample", "evaluate", "report"):
        refused(command, "run", named=("run", "no checkpoint", "dumo train run"))


def edited(old: str, new: str) -> Callable[[str], str]:
    """A change of text that must take hold."""

    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return edit


EDITS = [
    (edited("steps: 20", "steps: -20"), ("run/run.yaml", "train.steps", "-20")),
    (edited("width: 32", "widht: 32"), ("run/run.yaml", "net.widht", "'width'")),
    (lambda text: text + "\n}", ("run/run.yaml", "YAML")),
    (lambda text: "", ("run/run.yaml", "names to values")),
]


@pytest.mark.parametrize(("edit", "named"), EDITS)
def test_run_edited_by_hand(
    edit: Callable[[str], str], named: tuple[str, ...], here: Path, trained: dict[str, Path]
) -> None:
    run = shutil.copytree(trained["digits"], here / "run")
    (run / "run.yaml").write_text(edit((run / "run.yaml").read_text()))
    refused("train", "run", named=named)
    refused("train", "digits", *TINY, "--out", "run", named=named)
    refused("sample", "run", named=named)


def test_run_edited_to_another_net(here: Path, trained: dict[str, Path]) -> None:
    run = shutil.copytree(trained["digits"], here / "run")
    (run / "run.yaml").write_text(edited("width: 32", "width: 64")((run / "run.yaml").read_text()))
    for command in ("train", "sample", "evaluate", "report"):
        refused(command, "run", named=(".safetensors", "(32,)", "(64,)"))


LINES = [("garbage", "line 1"), ("3", "line 1"), ('{"loss": 1}', "line 1")]


@pytest.mark.parametrize(("line", "named"), LINES)
def test_log_that_is_damaged_in_the_middle(line: str, named: str, here: Path, trained: dict[str, Path]) -> None:
    run = shutil.copytree(trained["moons"], here / "run")
    log = run / "metrics.jsonl"
    log.write_text(f"{line}\n{log.read_text()}")
    refused("train", "run", "--set", "train.steps=25", named=("run/metrics.jsonl", named))


FIGURES = [
    (["fgi3"], ("'fgi3'", "'fig3'")),
    (["xyzzy"], ("'xyzzy'", "fig3, zoo")),
    (["fig3", "--scale", "smok"], ("'smok'", "'smoke'")),
    (["fig3", "--scale", "galactic"], ("'galactic'", "smoke, laptop")),
]


@pytest.mark.parametrize(("words", "named"), FIGURES)
def test_figure_that_is_none(words: list[str], named: tuple[str, ...], here: Path) -> None:
    refused("reproduce", *words, named=named)


def test_command_and_flag_that_are_none(here: Path) -> None:
    refused("frobnicate", named=("frobnicate",))
    refused("train", named=("source",))
    refused("train", "digits", "--stes", "3", named=("--stes",))


def test_divergence_is_a_failure_not_a_mistake(here: Path) -> None:
    words = sets("train.optimizer.lr=1.0e+30", "train.schedule.kind=constant", "train.log_every=1")
    done = call("train", "digits", *TINY, *words)
    assert done.code == 1
    assert "error: step " in done.err
    assert "diverged" in done.err
    assert "Traceback" not in done.err
    rows = Path("runs/digits/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, len(rows) + 1))  # those before it
    assert 1 <= len(rows) < 20
