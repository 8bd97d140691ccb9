"""A run whose files are damaged, edited or not what they claim to be is refused by the file's name, and left alone."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from e2e.shell import TINY, Done, call, refused, tree


def net_of(run: Path) -> Path:
    """The weights of its last checkpoint."""
    return run / "checkpoints/step-00000020/net/00000.safetensors"


def filed(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    """What writes w.safetensors, of the weights of a net."""
    return lambda net: safetensors.torch.save_file(change(safetensors.torch.load_file(net)), "w.safetensors")


WEIGHTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "pickle": (lambda net: torch.save(net.name, "w.safetensors"), ("not safetensors",)),
    "cut": (lambda net: Path("w.safetensors").write_bytes(net.read_bytes()[:-100]), ("damaged",)),
    "stump": (lambda net: Path("w.safetensors").write_bytes(net.read_bytes()[:5]), ("damaged",)),
    "empty": (lambda net: Path("w.safetensors").write_bytes(b""), ("damaged",)),
    "double": (filed(lambda found: {k: v.double() for k, v in found.items()}), ("float64", "float32")),
    "fewer": (filed(lambda found: dict([*found.items()][1:])), ("absent in the file",)),
    "nan": (filed(lambda found: {k: v * float("nan") for k, v in found.items()}), ("not finite",)),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights(kind: str, here: Path, trained: dict[str, Path]) -> None:
    run, (write, named) = trained["digits"], WEIGHTS[kind]
    write(net_of(run))
    refused("sample", run, "--weights", "w.safetensors", named=named, run=run)


def test_weights_of_another_net(here: Path, trained: dict[str, Path]) -> None:
    run, other = trained["digits"], net_of(trained["moons"])
    refused("sample", run, "--weights", other, named=(str(other.parent), "another run"), run=run)


def cut(file: Path) -> None:
    """Its first twenty bytes alone."""
    file.write_bytes(file.read_bytes()[:20])


LAST = "checkpoints/step-00000020"
DAMAGED: list[tuple[str, Callable[[Path], object]]] = [
    (f"{LAST}/net/00000.safetensors", cut),
    (f"{LAST}/net/00000.safetensors", Path.unlink),
    (f"{LAST}/ema-0.999/00000.safetensors", cut),
    (f"{LAST}/state.json", lambda file: file.write_text("[]")),
]


@pytest.mark.parametrize(("name", "harm"), DAMAGED)
@pytest.mark.filterwarnings("default")  # as a user's Python has it
def test_damaged_checkpoint(name: str, harm: Callable[[Path], object], here: Path, trained: dict[str, Path]) -> None:
    """The one before it is taken, and that is said; where there is none, nothing is done."""
    run = shutil.copytree(trained["digits"], here / "run")
    harm(run / name)
    before = tree(run)
    sampled = call("sample", run, "--count", "2", "--nfe", "1", "--out", here / "samples")
    assert sampled.code == 0, sampled
    warned(sampled, f"run/{name}")
    assert tree(run) == before
    shutil.rmtree(run / "checkpoints/step-00000010")
    refused("sample", "run", named=(f"run/{name}", "no complete checkpoint"), run=run)
    refused("train", "run", "train.steps=25", named=(f"run/{name}", "no complete checkpoint"))


def warned(done: Done, name: str) -> None:
    """One line names the file, and the checkpoint that is taken for it."""
    (line,) = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    assert name in line
    assert "using the previous checkpoint step-00000010" in line


@pytest.mark.parametrize("name", ["net", "ema-0.999"])
@pytest.mark.filterwarnings("default")
def test_weights_that_are_damaged_in_their_checkpoint(name: str, here: Path, trained: dict[str, Path]) -> None:
    run = shutil.copytree(trained["digits"], here / "run")
    file = run / LAST / name / "00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused("sample", run, "--weights", file.parent, named=(str(file), "SHA-256", "use other weights"), run=run)


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
    (edited("width: 32", "widht: 32"), ("run/run.yaml", "net.widht", "'net.width'")),
    (lambda text: text + "\n}", ("run/run.yaml", "YAML")),
    (lambda text: "", ("run/run.yaml", "names to values")),
]


@pytest.mark.parametrize(("edit", "named"), EDITS)
def test_run_edited_by_hand(
    edit: Callable[[str], str], named: tuple[str, ...], here: Path, trained: dict[str, Path]
) -> None:
    run = shutil.copytree(trained["digits"], here / "run")
    (run / "run.yaml").write_text(edit((run / "run.yaml").read_text()))
    for words in (["train", "run"], ["train", "digits", *TINY, "--out", "run"], ["sample", "run"]):
        refused(*words, named=named, lines=None)


@pytest.mark.nightly
def test_a_field_that_was_edited_is_refused_by_all(here: Path, trained: dict[str, Path]) -> None:
    run = shutil.copytree(trained["digits"], here / "run")
    file = run / "run.yaml"
    file.write_text(edited("time_scale: ", "time_scale: 2")(file.read_text()))
    named = ("step-00000020 belongs to a different run", "net.time_scale: ", "--from 20 --out NEW")
    for words in (
        ["sample", "run"],
        ["evaluate", "run"],
        ["export", "run", "--out", "out"],
        ["report", "run"],
        ["train", "run"],
    ):
        refused(*words, named=named, lines=None)


@pytest.mark.slow
def test_log_that_is_damaged_in_the_middle(here: Path, trained: dict[str, Path]) -> None:
    run = shutil.copytree(trained["moons"], here / "run")
    log = run / "metrics.jsonl"
    log.write_text(f'{{"loss": 1}}\n{log.read_text()}')
    refused("train", "run", "train.steps=25", named=("run/metrics.jsonl", "line 1"))
