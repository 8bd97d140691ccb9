"""A run's likelihoods stand in the place of samples: by its solver, and by Heun's many steps beside."""

from pathlib import Path

import pytest
import torch

from dumo.config.load import load
from dumo.evaluation import Context, LikelihoodProtocol
from dumo.flow.sampling import join_batches
from dumo.flow.solver import Heun
from dumo.report.evaluation import current_report, evaluate, likelihoods
from dumo.run.judge import require_likelihood
from dumo.run.trained import TrainedRun
from dumo.run.weights import load_run
from dumo.types import UserError
from trained import train
from unit.run.known import tiny

ASKED = ["evaluate.protocol={kind: likelihood, samples: 300, passes: 4, probes: 2}"]
BOTH = ["objective={kind: f2d2, drop: 0, times: {kind: jumps, both_ways: true}, slope: {kind: dual}}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "moons"
    train(tiny("moons", *BOTH), path)
    return path


def opened(folder: Path, *overrides: str) -> TrainedRun:
    return load_run(str(folder), [*ASKED, *overrides], device="cpu")


@pytest.mark.nightly
def test_jumps_stand_beside_the_flow(folder: Path) -> None:
    """Passes as the net counts them: one a jump, one a direction and reading of the velocity."""
    report = evaluate(run := opened(folder, "sample.solver.kind=hop"), nfe=[1, 3])
    assert [(row["solver"], row["nfe"]) for row in report["results"]] == [("hop", 1), ("hop", 3)]
    assert [(row["solver"], row["nfe"]) for row in report["contrast"]] == [("heun", 8)]
    assert all(1.5 < row["bits"] < 3 for row in (*report["results"], *report["contrast"]))  # about N(0, I)
    assert (report["protocol"], report["baselines"]) == ("likelihood (300 samples)", {})
    assert (report["card"]["labels"], report["card"]["contrast"]) == ("those of the data", [4])
    assert current_report(run) is None
    euler = evaluate(opened(folder, "evaluate.protocol.probes=0"), solver="euler", nfe=[4])
    assert euler["results"][0]["nfe"] == 8  # two axes


def test_ranks_share_the_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's likelihood does not depend on who asks for it, but for rounding."""
    run = opened(folder)
    judge = LikelihoodProtocol(samples=50).evaluator(Context(run.spec.data.open))
    whole = join_batches(likelihoods(run, judge, Heun(), 4)).x
    monkeypatch.setattr("dumo.runtime.dist.world", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr("dumo.runtime.dist.rank", lambda rank=rank: rank)
        mine = join_batches(likelihoods(run, judge, Heun(), 4)).x
        assert torch.allclose(mine, whole[rank::2], atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["sample.solver.kind=restart"], "'restart' cannot integrate from data to noise"),
        (["sample.solver.kind=hop", "objective.times.both_ways=false"], "both_ways=true"),
    ],
)
def test_what_has_no_likelihood_is_refused(folder: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        evaluate(opened(folder, *overrides))


GUIDED = ["objective.drop=0.1", "sample.guide.scale=2"]


@pytest.mark.parametrize(
    ("recipe", "words", "says"),
    [
        ("cifar10-latents", [], "not support latents"),
        ("digits-words", [], "not captions"),
        ("digits-flow-matching", GUIDED, "scale=1"),
    ],
)
def test_other_data_are_refused(recipe: str, words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        require_likelihood(load(recipe, words))
