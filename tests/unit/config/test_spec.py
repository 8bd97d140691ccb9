"""Parts that do not fit one another are refused when a run is made, whichever way it is made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import dumo
from dumo.config.difference import difference_lines
from dumo.config.fit import check_ranks
from dumo.config.load import load
from dumo.config.spec import Run
from dumo.run.resolve import resolve
from dumo.types import UserError

READS = {"dumo": {"velocity", "endpoint"}, "flow_matching": {"velocity"}, "meanflow": {"velocity", "flow_map"}}
SOLVERS = {"velocity": ("euler", "heun"), "endpoint": ("restart",), "flow_map": ("hop",)}


@pytest.mark.parametrize("objective", READS)
@pytest.mark.parametrize(("reading", "solvers"), SOLVERS.items())
def test_a_solver_needs_what_the_objective_teaches(objective: str, reading: str, solvers: tuple[str, ...]) -> None:
    for solver in solvers:
        words = [f"objective.kind={objective}", f"sample.solver.kind={solver}", "sample.nfe=[2]", "evaluate.nfe=[2]"]
        if reading in READS[objective]:
            assert load("digits", words).sample.solver.kind == solver
        elif not (objective == "meanflow" and reading == "endpoint"):  # a flow map to time 0 may serve as one
            with pytest.raises(UserError, match=f"solver '{solver}' needs {reading}"):
                load("digits", words)


@pytest.mark.parametrize(
    ("times", "fix"),
    [
        ("{kind: uniform}", "nfe = 1, or use restart$"),
        ("{kind: jumps, data_ratio: 1}", "nfe = 1, or use restart or euler$"),
    ],
)
def test_jumps_in_turn_need_jumps_that_end_before_the_data(times: str, fix: str) -> None:
    unguided = ["objective.kind=meanflow", "objective.guide={}", f"objective.times={times}"]
    words = [*unguided, "sample.solver.kind=hop", "sample.nfe=[1]"]
    assert load("digits", [*words, "evaluate.nfe=[1]"]).sample.nfe == (1,)
    with pytest.raises(UserError, match=f"nfe = 2 .* never teaches: ask for {fix}"):
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


HEUN = ["sample.solver.kind=heun", "sample.nfe=[2]", "evaluate.nfe=[4]"]
TAUGHT = ["teacher.source=x", "objective.drop=0.1", "teacher.guide.scale=2"]
UNLABELLED = ["data.images.labelled=false", "data.images.classes=0", "objective.drop=0", "objective.guide.zeta=0"]
CAPTIONS, READ = (
    'data.captions={kind: templates, templates: ["{}"]}',
    "net.texts={kind: learned, root: runs/texts/here}",
)
PAIRS = ["teacher.source=somewhere", "teacher.pairs.count=100"]
IN_BF16 = ["train.precision=bf16", "objective.slope.kind=central", "net.time_scale=1"]
TO_DATA = "objective.times={kind: beta}"
GUIDED_MEAN = ["objective.guide.zeta=0.5", "objective.drop=0.1", "sample.nfe=[1]", "evaluate.nfe=[1]"]
CLIMBING = "objective.times={kind: jumps, both_ways: true}"
PLANE = ["data.kind=moons", "net.kind=mlp", "evaluate.protocol.kind=toy"]
EDM = "net.precondition=edm"
NEGATIVE = r"not for the negative times .* set net.precondition=none"
GUIDED = ["objective.drop=0.1", "sample.guide.scale=2"]


@pytest.mark.parametrize(
    ("recipe", "fits", "more", "said"),
    [
        ("digits", HEUN, "sample.nfe=[2, 3]", "nfe = 3"),
        ("digits", HEUN, "evaluate.nfe=[2, 3]", "nfe = 3"),
        ("digits-shortcut", PLANE, "objective.scale=2", "no classes to guide by: set objective.scale=1"),
        ("moons", ["objective.drop=0.5"], "objective.guide.zeta=0.5", "'moons' has no classes to guide by"),
        ("digits-shortcut", [GUIDED[0], "objective.scale=2"], GUIDED[1], "was trained at guidance scale 2;"),
        ("moons", [], "sample.guide.scale=2", "data 'moons' has no classes"),
        ("digits", GUIDED, "objective.drop=0", r"objective.drop = 0: .* with objective.drop=0.1"),
        ("digits-guided", [], "sample.guide.scale=2", r"this model was trained .*objective.guide"),
        ("digits", GUIDED, "objective.guide.zeta=0.44", r"was trained at guidance scale 1.79"),
        ("digits-meanflow", ["train.batch=8"], "train.batch=1", "without one with r = t"),
        ("digits-shortcut", ["train.batch=32"], "train.batch=4", "no multiple of 8, "),
        ("digits-imm", ["train.batch=48"], "train.batch=6", "no multiple of 4, "),
        (
            *("digits-meanflow", ["train.micro_batch=4"], "train.micro_batch=3"),  # of 2 and 3, some without r < t
            r"train.micro_batch = 3 on 1 rank has a pass of 3 rows without .* r < t .*: raise train.batch or",
        ),
        ("digits-meanflow", GUIDED_MEAN, TO_DATA, "objective.guide reads the velocity .* at r = t, and all of"),
        ("digits-imf", [], TO_DATA, "du/dt is along the net's velocity, which is learned at r = t: use times"),
        ("digits-meanflow", [CLIMBING], "objective.kind=alpha_flow", "both_ways makes jumps up to the noise"),
        ("digits-pi-flow", [], "objective.early.low=-3", "early.low: .*greater than or equal to 0"),
        ("digits-ict", [], "objective.discretization.first=1e9", "discretization"),
        ("digits-facm", [], EDM, NEGATIVE),
        ("digits-twinflow", [], EDM, NEGATIVE),
        ("digits-imm", [], PAIRS[0], "learns from no velocity"),
        ("digits-guided", TAUGHT[:2], TAUGHT[2], r"teacher\.guide has guided"),
        ("moons", TAUGHT[:2], TAUGHT[2], r"^teacher\.guide\.scale = 2: .*no classes .*set teacher\.guide\.scale=1$"),
        ("digits", TAUGHT, GUIDED[1], r"^sample\.guide\.scale = 2: this model was .* teacher\.guide\.scale=1$"),
        ("digits-imf", TAUGHT, "objective.w=8.0", r"^objective\.w would guide .*objective\.w=null"),
        ("digits", ["train.coupling.group=16"], "train.coupling.group=12", "32 is no multiple of 12, "),
        ("digits-imm", PAIRS, "train.coupling.group=4", r"train\.coupling would part .* train\.coupling=null"),
        ("digits-imf", [], "sample.knobs.w=4", r"sample\.knobs\.w: .*'imf'.* none.* sample\.knobs={}"),
        ("digits", [], "sample.knobs.w=4", r"sample\.knobs\.w: .*'dumo'.* none"),
        ("digits-imf", KNOBS := ["objective.drop=0.1", "objective.w=8.0"], "sample.knobs.weight=4", "w, low, high"),
        ("digits-imf", KNOBS, "sample.guide.scale=2", r"sample\.guide\.scale=1.* sample\.knobs"),
        ("cifar10", [], "net.augment=9", r"by 6 numbers, .* takes 9: set net\.augment=6, or data\.augment=null"),
        ("cifar10", [], "data.augment.yflip=true", r"by 7 numbers.*takes 6: set net\.augment=7"),
        ("cifar10", [], "data.augment=null", r"by 0 numbers, net 'unet' takes 6: set net\.augment=0$"),
        ("cifar10", [], "objective.drop=0.1", r"objective\.drop = 0\.1.*objective\.drop=0"),
        ("cifar10", [], "net={kind: dit, width: 8, attention: 1}", r"takes 0: set net\.kind=unet net\.augment=6"),
        ("cifar10-latents", UNLABELLED, "data.images.augment={kind: edm}", r"data\.images\.augment=null"),
        ("digits", [], CAPTIONS, "Here data 'digits' give some, and net 'dit' reads none"),
        ("digits", [], READ, r"data\.captions gives the captions that net\.texts reads: set both, or neither"),
        ("digits", [], "evaluate.protocol={kind: clip-score}", r"'digits' give none: set data\.captions, or choose an"),
        ("digits", [], "evaluate.captions=held", r"data\.captions\.held names none"),
        ("digits", [CAPTIONS, READ], "evaluate.captions=held", "held names none"),
        ("moons-flow-matching", GUIDED[:1], "objective.kind=imf", r"no classes.* objective\.w=null"),
    ],
)
def test_what_does_not_fit_is_refused_and_what_does_is_not(recipe: str, fits: list[str], more: str, said: str) -> None:
    load(recipe, fits)
    with pytest.raises(UserError, match=said):
        load(recipe, [*fits, more])


@pytest.mark.parametrize(
    ("recipe", "fits", "more", "said"),
    [
        ("digits-ucgm", IN_BF16[1:], IN_BF16[0], "slope 'central' needs precision fp32"),
        ("digits", [IN_BF16[2], "objective.slope={kind: central, h: 0.05}"], "objective.slope.h=0.06", "central"),
        ("digits", [], "net.patch=3", r"net\.patch 3"),
    ],
)
def test_what_takes_a_net_is_refused_when_a_run_is_opened(recipe: str, fits: list[str], more: str, said: str) -> None:
    resolve(load(recipe, fits))
    run = load(recipe, [*fits, more])
    with pytest.raises(UserError, match=said):
        resolve(run)


READ_ALL = """
import sys, torch
opened, dumo = [], sys.argv[1]
sys.addaudithook(lambda event, given: event == "open" and opened.append(str(given[0])))
from dumo.config import recipes
from dumo.config.load import load
for name in ("digits", "my-images"):
    load(name)  # imports what all of them need, and what reads pictures
opened.clear()
for name in recipes.names():
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


SMALL = ["train.batch=20", "train.micro_batch=7"]
UNFIT = [
    ("digits", ["train.batch=16"], 17, "train.batch = 16 .*17 ranks: raise it, or take fewer ranks"),
    ("digits-meanflow", ["train.batch=32"], 16, r"on 16 ranks has a pass of 2 rows .* r < t .*or take fewer ranks"),
    ("digits-meanflow", SMALL, 6, "train.micro_batch = 7 on 6 ranks .* raise train.batch or train.micro_batch"),
    ("digits-imm", ["train.batch=32"], 9, "8 groups of 4 rows, too few .*9 ranks"),
    ("digits", ["train.share=4"], 6, r"train.share = 4 does not divide 6 ranks: set train.share=1 or 2 or 3 or 6"),
    ("digits", ["train.compile=loss"], 2, "train.compile = loss .* 2: set train.compile=blocks"),
]


@pytest.mark.parametrize(("recipe", "words", "ranks", "said"), UNFIT)
def test_what_so_many_ranks_cannot_train(recipe: str, words: list[str], ranks: int, said: str) -> None:
    run = load(recipe, words)  # which one can
    with pytest.raises(UserError, match=said) as refused:
        check_ranks(run.train, run.objective, ranks)
    assert "\n" not in str(refused.value)


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
    assert not list(difference_lines(load("digits", GUIDED[:1]), run))
    assert not load("moons").sample.guide.active
