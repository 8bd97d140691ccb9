"""Parts that do not fit one another are refused when a run is made, whichever way it is made."""

import pytest
import torch
from pydantic import ValidationError

from dumo.run.config.check import check_pieces
from dumo.run.config.load import difference, load
from dumo.run.config.spec import Run
from dumo.types import UserError

READS = {
    "dumo": {"velocity", "endpoint"},
    "flow_matching": {"velocity"},
    "meanflow": {"velocity", "flow_map"},
}
SOLVERS = {"velocity": ("euler", "heun"), "endpoint": ("restart",), "flow_map": ("hop",)}


def changed(*overrides: str, of: str = "digits") -> Run:
    """A recipe with other fields."""
    return load(of, ["net.time_scale=1", *overrides])


@pytest.mark.parametrize("objective", READS)
def test_reads_are_known_before_there_is_a_net(objective: str) -> None:
    solver = {"dumo": "restart", "flow_matching": "euler", "meanflow": "hop"}[objective]
    reads = changed(f"objective.kind={objective}", f"sample.solver.kind={solver}").reads
    given = {name for name in ("velocity", "endpoint", "flow_map") if getattr(reads, name) is not None}
    assert READS[objective] <= given


@pytest.mark.parametrize("objective", READS)
@pytest.mark.parametrize(("reading", "solvers"), SOLVERS.items())
def test_a_solver_needs_what_the_objective_teaches(objective: str, reading: str, solvers: tuple[str, ...]) -> None:
    for solver in solvers:
        words = [f"objective.kind={objective}", f"sample.solver.kind={solver}", "sample.nfe=[2]", "evaluate.nfe=[2]"]
        if reading in READS[objective]:
            assert changed(*words).sample.solver.kind == solver
        elif not (objective == "meanflow" and reading == "endpoint"):  # a flow map to time 0 may serve as one
            with pytest.raises(UserError, match=f"solver '{solver}' needs {reading}"):
                changed(*words)


@pytest.mark.parametrize("times", ["{kind: uniform}", "{kind: jumps, data_ratio: 1}"])
def test_jumps_in_turn_need_jumps_that_end_before_the_data(times: str) -> None:
    words = ["objective.kind=meanflow", "sample.solver.kind=hop", f"objective.times={times}", "sample.nfe=[1]"]
    assert changed(*words, "evaluate.nfe=[1]").sample.nfe == (1,)
    with pytest.raises(UserError, match=r"nfe = 2 .* never teaches: ask for nfe = 1, or use euler"):
        changed(*words, "evaluate.nfe=[2]")
    assert changed(*words, "objective.times={kind: jumps, data_ratio: .5}", "evaluate.nfe=[2]").evaluate.nfe == (2,)


@pytest.mark.parametrize("field", ["sample.nfe", "evaluate.nfe"])
@pytest.mark.parametrize("nfe", ["[0]", "[2, -1]", "[]"])
def test_numbers_of_passes(field: str, nfe: str) -> None:
    with pytest.raises(UserError, match="nfe"):
        changed(f"{field}={nfe}")


@pytest.mark.parametrize("field", ["sample.nfe", "evaluate.nfe"])
def test_passes_of_a_solver_with_two_a_step(field: str) -> None:
    even = ["sample.solver.kind=heun", "sample.nfe=[2]", "evaluate.nfe=[4]"]
    assert changed(*even).sample.solver.kind == "heun"
    with pytest.raises(UserError, match="nfe = 3"):
        changed(*even, f"{field}=[2, 3]")


def test_slopes_that_are_no_derivative() -> None:
    for word in ("train.precision=bf16", "net.time_scale=11", "objective.slope.h=0.06"):
        with pytest.raises(UserError, match="central"):
            changed("objective.slope.kind=central", word)
    with pytest.raises(UserError, match="not tf32"):
        changed("objective.slope.kind=central", "train.precision=tf32")
    for kind in ("dual", "jvp"):
        assert changed("train.precision=bf16", "net.time_scale=11", f"objective.slope.kind={kind}").net.time_scale == 11
    assert changed("objective.slope.kind=central", "net.time_scale=10").net.time_scale == 10
    at_bound = changed("objective.slope.kind=jvp", "objective.slope.kind=central", "objective.slope.h=0.05")
    assert at_bound.objective.kind == "dumo"


def test_a_scale_of_guidance_needs_classes_and_is_not_guided_again() -> None:
    plain = ["data.kind=moons", "net.kind=mlp", "evaluate.protocol.kind=toy"]
    assert changed(*plain, of="digits-tvm").data.classes == 0
    with pytest.raises(UserError, match="no classes to guide by: set objective"):
        changed(*plain, "objective.scale=2", of="digits-tvm")
    with pytest.raises(UserError, match="guide once more"):
        changed("objective.scale=2", "objective.drop=0.1", "sample.guide.scale=2", of="digits-tvm")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.kind=moons"], "square images"),
        (["net.patch=3"], "net.patch 3"),
        (["net.attention=7"], "net.attention 7"),
        (["evaluate.protocol.kind=toy"], "protocol toy"),
    ],
)
def test_parts_of_digits(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        changed(*words)


def test_parts_of_moons() -> None:
    for word, said in (
        ("objective.guide.zeta=0.5", "no classes"),
        ("evaluate.protocol.kind=digits", "protocol digits"),
    ):
        with pytest.raises(UserError, match=said):
            changed(word, of="moons")
    assert changed("objective.drop=0.5", of="moons").objective.drop == 0.5


def test_a_run_made_in_python_is_held_to_the_same() -> None:
    good = load("moons")
    tree = good.model_dump()
    assert Run.model_validate(tree) == good
    tree["evaluate"]["protocol"] = {"kind": "digits"}
    with pytest.raises(ValidationError, match="protocol digits"):
        Run.model_validate(tree)


def test_checking_costs_no_memory_and_no_randomness() -> None:
    state = torch.random.get_rng_state()
    huge = changed("net.width=16384", "net.depth=200", "net.attention=4")  # 600 billion parameters, never made
    assert huge.net.depth == 200
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("recipe", "batch", "said"),
    [
        ("digits-meanflow", 1, "without one with r = t"),
        ("digits-split-meanflow", 1, "without one with r = t"),
        ("digits-shortcut", 4, "no multiple of 8, "),
        ("digits-imm", 6, "no multiple of 4, "),
    ],
)
def test_a_batch_that_could_not_teach_is_refused(recipe: str, batch: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(recipe, [f"train.batch={batch}"])
    load(recipe, [f"train.batch={8 * batch}"])


def test_passes_that_could_not_teach_are_refused() -> None:
    load("digits-meanflow", ["train.micro_batch=4"])
    with pytest.raises(
        UserError,
        match=r"train.micro_batch = 3 on 1 rank has a pass of 3 rows without .* r < t .*: raise train.batch or",
    ):
        load("digits-meanflow", ["train.micro_batch=3"])  # of 2 and 3, of which some have none with r < t
    load("digits", ["train.micro_batch=3"])  # whose rows are all alike


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
    check_pieces(run.train, run.objective, ranks)


UNFIT = [
    ("digits", ["train.batch=16"], 17, "train.batch = 16 .*17 ranks: raise it, or take fewer ranks"),
    ("digits-meanflow", ["train.batch=32"], 16, r"on 16 ranks has a pass of 2 rows .* r < t .*or take fewer ranks"),
    (
        "digits-meanflow",
        ["train.batch=20", "train.micro_batch=7"],
        6,
        r"train.micro_batch = 7 on 6 ranks .* raise train.batch or train.micro_batch, or take fewer ranks",
    ),
    ("digits-imm", ["train.batch=32"], 9, "8 groups of 4 rows, too few .*9 ranks"),
    ("digits", ["train.share=4"], 6, r"train.share = 4 does not divide 6 ranks: set train.share=1 or 2 or 3 or 6"),
    ("digits", ["train.compile=loss"], 2, "train.compile = loss .* 2: set train.compile=blocks"),
]


@pytest.mark.parametrize(("recipe", "words", "ranks", "said"), UNFIT)
def test_what_so_many_ranks_cannot_train(recipe: str, words: list[str], ranks: int, said: str) -> None:
    run = load(recipe, words)  # which one can
    with pytest.raises(UserError, match=said) as refused:
        check_pieces(run.train, run.objective, ranks)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("recipe", "word", "said"),
    [
        ("digits-split-meanflow", "times.velocity_ratio=0", "leaves no row that matches the data"),
        ("digits-pi-flow", "early.low=-3", "early.low: .*greater than or equal to 0"),
        ("digits-ict", "discretization.first=1e9", "discretization"),
    ],
)
def test_numbers_that_mean_nothing(recipe: str, word: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(recipe, [f"objective.{word}"])


def test_a_slope_that_is_not_taken_is_not_asked() -> None:
    words = ["net.time_scale=1", "train.precision=bf16", "objective.slope.kind=central", "objective.slope.h=0.005"]
    with pytest.raises(UserError, match="slope 'central' needs precision fp32"):
        load("digits-ucgm", words)
    load("digits-fm-plus", words)


@pytest.mark.parametrize("recipe", ["digits-facm", "digits-twinflow"])
def test_preconditioning_knows_no_negative_times(recipe: str) -> None:
    with pytest.raises(UserError, match=r"not for the negative times .* set net.precondition=none"):
        load(recipe, ["net.precondition=edm"])


def test_show_knows_all_guidance_in_training() -> None:
    for recipe, word, scale in (
        ("digits-shortcut", "objective.scale=1.5", 1.5),
        ("digits", "objective.guide.zeta=0.5", 2),
        ("digits", 'teacher={"source": "runs/teacher", "guide": {"scale": 3}}', 3),
        ("digits", "train.seed=1", 1),
    ):
        assert load(recipe, [word]).guided.scale == pytest.approx(scale)


def test_a_velocity_says_nothing_to_moments() -> None:
    with pytest.raises(UserError, match="learns from no velocity"):
        load("digits-imm", ["teacher.source=somewhere"])
    load("digits-imm", ["teacher.source=somewhere", "teacher.pairs.count=100"])


def test_noise_is_coupled_in_whole_groups_and_never_to_pairs() -> None:
    with pytest.raises(UserError, match=r"32 is no multiple of 12, "):
        load("digits", ["train.coupling.group=12"])
    with pytest.raises(UserError, match=r"train\.coupling would part .* train\.coupling=null"):
        load("digits-imm", ["teacher.source=somewhere", "teacher.pairs.count=100", "train.coupling.group=4"])


UNGUIDED = ["objective.drop=0.1"]  # digits, taught without guidance what no label is


def test_sampling_may_be_guided_where_training_was_not() -> None:
    run = load("digits", [*UNGUIDED, "sample.guide.scale=1.5", "sample.guide.interval.high=0.8"])
    assert (run.sample.guide.scale, run.sample.guide.interval.high) == (1.5, 0.8)
    assert not list(difference(load("digits", UNGUIDED), run))  # free to change, once it is trained
    assert not load("moons").sample.guide.active


@pytest.mark.parametrize(
    ("recipe", "words", "said"),
    [
        ("moons", [], "data 'moons' has no classes"),
        ("digits", ["objective.drop=0"], "objective.drop = 0 never"),
        ("digits-guided", [], r"sample.guide.scale = 2 .*objective.guide"),
        ("digits", [*UNGUIDED, "objective.guide.zeta=0.44"], r"objective.guide has guided in training, by 1.79"),
    ],
)
def test_sampling_is_not_guided_where_it_cannot_be(recipe: str, words: list[str], said: str) -> None:
    load(recipe, [*words, "sample.guide.scale=1"])
    with pytest.raises(UserError, match=said):
        load(recipe, [*words, "sample.guide.scale=2"])
