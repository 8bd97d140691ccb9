"""Parts that do not fit one another are refused when a run is made, whichever way it is made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import dumo
from dumo.config.check_spec import check_ranks
from dumo.config.difference import differences
from dumo.config.load import load
from dumo.config.spec import Run
from dumo.run.resolve import resolve
from dumo.types import UserError

READS = {"dumo": {"velocity", "endpoint"}, "flow_matching": {"velocity"}, "meanflow": {"velocity", "flow_map"}}
GUIDED = ["objective.drop=0.1", "sample.guide.scale=2"]
IN_BF16 = ["train.precision=bf16", "objective.slope.kind=central", "net.time_scale=1"]
SOLVERS = {"velocity": ("euler", "heun"), "endpoint": ("restart",), "flow_map": ("hop",)}


@pytest.mark.parametrize("objective", READS)
@pytest.mark.parametrize(("reading", "solvers"), SOLVERS.items())
def test_a_solver_needs_what_the_objective_teaches(objective: str, reading: str, solvers: tuple[str, ...]) -> None:
    for solver in solvers:
        words = [f"objective.kind={objective}", f"sample.solver.kind={solver}", "sample.nfe=[2]", "evaluate.nfe=[2]"]
        if reading in READS[objective]:
            assert load("digits", words).sample.solver.kind == solver
        elif not (objective == "meanflow" and reading == "endpoint"):  # a flow map to time 0 may serve as one
            with pytest.raises(UserError, match=solver):
                load("digits", words)


@pytest.mark.parametrize("times", ["{kind: uniform}", "{kind: jumps, data_ratio: 1}"])
def test_jumps_in_turn_need_jumps_that_end_before_the_data(times: str) -> None:
    unguided = ["objective.kind=meanflow", "objective.guide={}", f"objective.times={times}"]
    words = [*unguided, "sample.solver.kind=hop", "sample.nfe=[1]"]
    assert load("digits", [*words, "evaluate.nfe=[1]"]).sample.nfe == (1,)
    with pytest.raises(UserError, match="'hop' with nfe = 2"):
        load("digits", [*words, "evaluate.nfe=[2]"])
    load("digits", [*words, "objective.times={kind: jumps, data_ratio: .5}", "evaluate.nfe=[2]"])


def test_a_run_made_in_python_is_held_to_the_same() -> None:
    good = load("moons")
    tree = good.model_dump()
    assert Run.model_validate(tree) == good
    tree["evaluate"]["protocol"] = {"kind": "digits"}
    with pytest.raises(ValidationError, match="protocol digits"):
        Run.model_validate(tree)


def test_checking_costs_no_memory_and_no_randomness() -> None:
    state = torch.random.get_rng_state()
    huge = resolve(load("digits", ["net.width=16384", "net.depth=200", "net.attention=4"]))  # 600 billion parameters
    assert huge.net.depth == 200
    assert torch.equal(torch.random.get_rng_state(), state)


READ_ALL = """
import sys, torch
opened, dumo = [], sys.argv[1]
sys.addaudithook(lambda event, given: event == "open" and opened.append(str(given[0])))
from dumo.config import recipe_files
from dumo.config.load import load
for name in ("digits", "my-images"):
    load(name)  # imports what all of them need, and what reads pictures
opened.clear()
for name in recipe_files.names():
    load(name)
print(*{"diffusers", "transformers", "torch._dynamo"} & {*sys.modules})
print(*(path for path in opened if not path.startswith(dumo)))
"""


@pytest.mark.slow
def test_reading_a_recipe_opens_nothing_but_dumos_own_texts_and_makes_no_net(tmp_path: Path) -> None:
    """Of a published model a config is such a text."""
    package = str(Path(dumo.__file__).parent)
    clean = {name: value for name, value in os.environ.items() if name != "FEW_STEPS"}  # a base of `personal`
    words = [sys.executable, "-B", "-c", READ_ALL, package]  # -B: no compiled modules are written
    done = subprocess.run(words, cwd=tmp_path, env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("digits", ["train.micro_batch=3"]),  # whose rows are all alike
        ("digits-fm-plus", [*IN_BF16, "objective.slope.h=0.005"]),  # a slope that is not taken is not asked
        ("digits", ["train.precision=bf16", "net.time_scale=11", "objective.slope.kind=jvp"]),
    ],
)
def test_what_does_no_harm_is_let_be(recipe: str, words: list[str]) -> None:
    load(recipe, words)


FITS = [
    ("digits", ["train.batch=16"], 3),  # 5, 5 and 6 rows
    ("digits", ["train.batch=16", "train.micro_batch=2"], 8),
    ("digits", ["train.share=4"], 2),  # of fewer ranks, all
    ("digits", ["train.share=2", "train.compile=blocks"], 4),
    ("digits", ["train.share=3", "train.compile=loss"], 1),
    ("digits-meanflow", [], 8),  # 4 rows each
    ("digits-imm", ["train.batch=32"], 8),
]


@pytest.mark.parametrize(("recipe", "words", "ranks"), FITS)
def test_what_so_many_ranks_can_train(recipe: str, words: list[str], ranks: int) -> None:
    run = load(recipe, words)
    check_ranks(run.train, run.objective, ranks)


@pytest.mark.parametrize(
    ("recipe", "word", "scale"),
    [
        ("digits-shortcut", "objective.scale=1.5", 1.5),
        ("digits", "objective.guide.zeta=0.5", 2),
        ("digits", 'teacher={"source": "runs/teacher", "guide": {"scale": 3}}', 3),
        ("digits", "train.seed=1", 1),
    ],
)
def test_show_knows_all_guidance_in_training(recipe: str, word: str, scale: float) -> None:
    assert load(recipe, [word]).training_guidance.scale == pytest.approx(scale)


def test_guidance_in_sampling_is_free_to_change() -> None:
    run = load("digits", [*GUIDED, "sample.guide.interval.high=0.8"])
    assert (run.sample.guide.scale, run.sample.guide.interval.high) == (2, 0.8)
    assert all(one.is_free for one in differences(load("digits", GUIDED[:1]), run))
    assert not load("moons").sample.guide.active
