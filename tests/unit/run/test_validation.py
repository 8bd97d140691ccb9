"""A run is judged as it trains, as `dumo evaluate` would judge it, and trains as it would without."""

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dumo.config.load import load
from dumo.config.spec import Run
from dumo.io.tensor_files import load_checked
from dumo.report import evaluation
from dumo.run import speed, validation
from dumo.run.folder import RunFolder
from dumo.run.trainer import Trainer
from dumo.run.validation import Validation
from dumo.run.weights import load_run
from dumo.runtime import signals
from dumo.training import log
from dumo.training.metrics import StepMetrics
from dumo.types import UserError
from forked import main_of
from meeting import outputs
from trained import After, train
from unit.run import known
from unit.run.judged import CASES

PATIENCE = 240  # seconds, on a busy machine
JUDGED = ("train.steps=6", "train.log_every=3", "evaluate.every=2", "evaluate.best=true", "train.keep=1")


def tiny(*more: str) -> Run:
    """DuMo on moons, in no time, judged at steps 2, 4 and 6."""
    return known.tiny("moons", *JUDGED, *more)


def rows(folder: Path) -> dict[int, log.Row]:
    """The log by step."""
    return {row["step"]: row for row in log.read_log(folder / "metrics.jsonl")}


def kept(folder: Path) -> dict[str, bytes]:
    """The best weights, by the names of their files."""
    return {path.name: path.read_bytes() for path in sorted((folder / "best").iterdir())}


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has the next scores be these, of this name; an error is raised."""

    def give(*values: float | Exception, name: str = "mmd") -> None:
        coming = iter(values)

        class Given:
            def score(self, made: Iterator[Any]) -> dict[str, float]:
                list(made)
                if isinstance(value := next(coming), Exception):
                    raise value
                return {name: value, "kid": -value, f"{name}_sd": 0.5}

        monkeypatch.setattr(validation, "evaluator_of", lambda *of: Given())

    return give


def test_training_is_judged_by_few_samples_of_another_seed() -> None:
    whole = load("digits").evaluate
    few = whole.validation
    assert few.seed != whole.seed
    assert few.protocol.total < whole.protocol.total
    assert few.nfe == whole.nfe[:1]


@pytest.mark.slow
def test_the_numbers_are_those_of_evaluate_and_the_training_is_the_same(tmp_path: Path) -> None:
    words = ("train.log_every=3", "train.steps=4", "train.milestones=[2]")
    train(known.tiny("digits", *words), tmp_path / "without")
    train(known.tiny("digits", *words, "evaluate.every=2"), tmp_path / "with")
    alone, judged = rows(tmp_path / "without"), rows(tmp_path / "with")
    assert ([*alone], [*judged]) == ([3], [2, 3, 4])
    assert judged[3] == alone[3]
    for file in (tmp_path / "without/checkpoints").rglob("*.safetensors"):
        assert (tmp_path / "with" / file.relative_to(tmp_path / "without")).read_bytes() == file.read_bytes(), file
    opened = load_run(str(tmp_path / "with"), weights=str(tmp_path / "with/milestones/step-00000002.safetensors"))
    found = evaluation.evaluate(opened, nfe=[1], seed=1)["results"][0]
    lead = next(key for key in found if key not in ("nfe", "solver"))
    assert judged[2]["val"] == {name: found[name] for name in (lead, f"{lead}_sd") if name in found}
    assert not (tmp_path / "with/best").exists()


@pytest.mark.nightly
def test_a_run_that_was_stopped_has_the_same_scores_and_keeps_the_same_weights(tmp_path: Path) -> None:
    train(tiny(), tmp_path / "whole")
    train(tiny("train.steps=3"), tmp_path / "parts")
    train(tiny(), tmp_path / "parts")
    assert known.bits(tmp_path / "parts") == known.bits(tmp_path / "whole")
    assert kept(tmp_path / "parts") == kept(tmp_path / "whole")
    assert [step for step, row in rows(tmp_path / "whole").items() if "val" in row] == [2, 4, 6]


@pytest.mark.nightly
@pytest.mark.parametrize(("where", "what"), [(Trainer, "train_step"), (Validation, "samples")])
def test_a_stop_at_a_step_that_is_judged_waits_for_its_score(
    where: object, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, calls = getattr(where, what), list[int]()

    def stopped(*given: object, **more: object) -> object:
        calls.append(1)
        if len(calls) == (1 if where is Validation else 2):  # both in step 2
            signal.raise_signal(signal.SIGTERM)
        return work(*given, **more)

    train(tiny(), tmp_path / "whole")
    monkeypatch.setattr(where, what, stopped)
    with suppress(signals.Stopped), signals.listening():
        train(tiny(), tmp_path / "parts")
    assert [path.name for path in (tmp_path / "parts/checkpoints").iterdir()] == [
        "step-00000003" if where is Validation else "step-00000002"
    ]
    train(tiny(), tmp_path / "parts")
    assert known.bits(tmp_path / "parts") == known.bits(tmp_path / "whole")
    assert kept(tmp_path / "parts") == kept(tmp_path / "whole")


@pytest.mark.slow
def test_the_best_is_kept_and_says_its_step(tmp_path: Path, scored: Callable[..., None]) -> None:
    said: list[str] = []
    scored(3.0, 1.0, 2.0)
    train(tiny(), tmp_path / "run", print_line=said.append)
    assert rows(tmp_path / "run")[4]["val"] == {"mmd": 1.0, "mmd_sd": 0.5}
    assert "step 4: mmd 1 ± 0.5" in said
    (name,) = kept(tmp_path / "run")
    assert said[-1] == f"the best mmd in training, 1, is of step 4: {tmp_path}/run/best/{name}"
    opened = load_run(str(tmp_path / "run"), weights=str(tmp_path / "run/best" / name))
    earlier = load_checked(tmp_path / "run/best" / name)
    assert opened.step == 4
    assert earlier.keys() == opened.net.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "name", "step"),
    [((1.0, 2.0, 3.0), "mmd", 2), ((1.0, 2.0, 3.0), "clip_score", 6), ((float("nan"), 5.0, 5.0), "mmd", 4)],
)
def test_which_is_the_best(
    values: tuple[float, ...], name: str, step: int, tmp_path: Path, scored: Callable[..., None]
) -> None:
    scored(*values, name=name)
    train(tiny(), tmp_path / "run")
    assert [*kept(tmp_path / "run")] == [f"step-{step:08d}.safetensors"]


@pytest.mark.nightly
def test_a_best_that_a_stop_undid_is_forgotten(tmp_path: Path, scored: Callable[..., None]) -> None:
    def die(state: object, metrics: StepMetrics) -> None:
        if metrics.step == 5:
            raise KeyboardInterrupt

    scored(3.0, 2.0)
    with suppress(KeyboardInterrupt):
        train(tiny("train.save_every=3"), tmp_path / "run", hooks=[After(die)])
    assert [*kept(tmp_path / "run")] == ["step-00000002.safetensors", "step-00000004.safetensors"]
    scored(4.0, 5.0)  # steps 4 and 6
    train(tiny("train.save_every=3"), tmp_path / "run")
    assert [*kept(tmp_path / "run")] == ["step-00000002.safetensors"]
    scored(9.0)
    train(tiny("train.steps=8", "evaluate.nfe=[2]"), tmp_path / "run")  # another number: no score stands
    assert [*kept(tmp_path / "run")] == ["step-00000008.safetensors"]


@pytest.mark.nightly
def test_best_weights_of_another_run_or_score_are_refused(tmp_path: Path, scored: Callable[..., None]) -> None:
    """By the name of the file, before the first step and at the end."""
    run, more = tmp_path / "run", "train.steps=8"
    scored(3.0, 1.0, 2.0)
    train(tiny(), run)
    scored(4.0, 3.0, 2.0)
    train(tiny("train.seed=1"), tmp_path / "other")
    (name,) = kept(run)
    best, good = run / "best" / name, (run / "best" / name).read_bytes()

    shutil.copy(tmp_path / "other/best/step-00000006.safetensors", best)
    with pytest.raises(UserError):
        train(tiny(more), run)
    best.write_bytes(good)
    scored(1.5)
    train(tiny(more), run)
    assert [*kept(run)] == [name]


def test_the_best_before_a_checkpoint_stays_until_a_later_one_stands(tmp_path: Path) -> None:
    """What became the best since goes with a stop."""
    folder = RunFolder(tmp_path)
    best = tmp_path / "best"
    best.mkdir()
    for step in (2, 3, 4, 6):
        (best / f"step-{step:08d}.safetensors").touch()
    folder.remove_older_best([3])
    assert [path.name[11:13] for path in sorted(best.iterdir())] == ["03", "04", "06"]
    folder.remove_older_best([3, 6])
    assert [path.name[11:13] for path in sorted(best.iterdir())] == ["03", "06"]
    folder.remove_older_best([6])
    assert [path.name[11:13] for path in sorted(best.iterdir())] == ["06"]


@pytest.mark.slow
def test_the_best_of_each_checkpoint_is_there_when_a_run_resumes_from_it(
    tmp_path: Path, scored: Callable[..., None]
) -> None:
    run = tiny("train.keep=2", "train.save_every=3")
    scored(1.0, 2.0, 0.5)
    train(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    scored(3.0, 4.0)  # steps 4 and 6, again
    train(run, tmp_path / "run")
    assert [*kept(tmp_path / "run")] == ["step-00000002.safetensors"]


def test_what_cannot_be_judged_is_said_and_ends_nothing(tmp_path: Path, scored: Callable[..., None]) -> None:
    said: list[str] = []
    scored(UserError("some samples are not finite"), 1.0, 1.0)
    assert train(tiny(), tmp_path / "run", print_line=said.append).step == 6
    assert "warning: step 2 is not judged: some samples are not finite" in said
    assert [step for step, row in rows(tmp_path / "run").items() if "val" in row] == [4, 6]


@pytest.mark.slow
def test_its_time_is_not_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[float] = []
    monkeypatch.setattr(speed.Meter, "leave_out", lambda self, seconds: left.append(seconds))
    train(tiny(), tmp_path / "run")
    assert len(left) == 3
    assert min(left) > 0


@pytest.mark.slow
def test_what_is_judged_is_opened_before_the_first_step_and_only_if_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*of: object) -> None:
        raise UserError("the weights are not there")

    monkeypatch.setattr(validation, "evaluator_of", fails)
    with pytest.raises(UserError):
        train(tiny(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(tiny("evaluate.every=7"), tmp_path / "run")


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate.best=true"],
        ["evaluate.every=5", "evaluate.few=20"],
        ["evaluate.every=5", "evaluate.protocol={kind: likelihood, levels: 17}", "sample.solver.kind=heun"],
    ],
)
def test_what_does_not_fit_is_refused(words: list[str]) -> None:
    with pytest.raises(UserError):
        load("digits", ["evaluate.nfe=[2]", "sample.nfe=[2]", *words])


def test_how_many_samples() -> None:
    def samples(name: str, *words: str) -> str:
        return load(name, ["evaluate.every=5", *words]).evaluate.validation.protocol.name

    assert samples("digits") == "digits (500 samples)"
    assert samples("digits", "evaluate.few=700") == "digits (700 samples)"
    assert samples("moons", "evaluate.protocol.samples=40") == "toy (40 samples)"
    assert samples("my-images") == "photos"
    assert samples("my-images", "evaluate.protocol.kind=folder") == "folder (500 samples, no Fréchet distances)"
    assert samples("imagenet256-xl2") == "adm-imagenet256-50k (1000 samples, no Fréchet distances)"


@pytest.mark.slow
def test_what_fails_on_one_rank_is_not_judged_on_any(tmp_path: Path) -> None:
    """Samples that are not made, and those that cannot be judged; what is a fault ends both."""
    processes = [main_of("unit.run.judged", rank, tmp_path / "meet", tmp_path, cwd=tmp_path) for rank in (0, 1)]
    for out, _ in outputs(processes, PATIENCE):
        assert out.splitlines()[-1] == f"{[*CASES][-1]} agrees"
