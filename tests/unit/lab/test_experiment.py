"""Every arm of every plan loads; arms cost the same; a plan varies what it says and nothing else."""

import re
from functools import cache
from itertools import islice
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

from dumo.cli.lab import reproduce
from dumo.config import recipe_files, trust
from dumo.config.load import load
from dumo.lab.experiment import (
    Cell,
    Cost,
    Plan,
    plan_names,
    read_plan,
    require_fair,
    require_runnable,
    slug,
    training_settings,
)
from dumo.runtime.random import stream
from dumo.types import UserError
from recipe import recipe
from tiers import tiered

EVERY = [(name, scale) for name in plan_names() for scale in read_plan(name).scales]
QUICK = [("fig3", "smoke"), ("scaling", "smoke")]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step costs 3 F: counting takes long, and is a law of its own."""
    monkeypatch.setattr(Cost, "forwards_per_step", 3.0)
    monkeypatch.setattr(Cost, "flops_per_step", 3.0)


@cache
def cells_of(name: str, scale: str) -> list[Cell]:
    """The cells of a plan: to be asked for where steps are `free`."""
    return list(read_plan(name).cells(scale))


def test_help_lists_every_plan() -> None:
    """By hand, for help imports no plan."""
    (option,) = get_type_hints(reproduce, include_extras=True)["name"].__metadata__
    assert sorted(re.findall(r"[\w-]+", option.help.partition("; or ")[0].replace("ours:", ""))) == plan_names()


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize(("name", "scale"), tiered(EVERY, ci=QUICK, id="-".join))
def test_every_arm_loads(name: str, scale: str) -> None:
    cells = cells_of(name, scale)
    assert len({cell.name for cell in cells}) == len(cells) >= 2
    assert all(slug(cell.name) == cell.name for cell in cells)
    assert len({tuple(cell.labels) for cell in cells}) == 1  # one table
    assert len({(cell.spec.model_dump_json(), cell.weights, cell.refit_lowpass) for cell in cells}) == len(cells)
    if scale == "smoke" and name != "fig4b":
        assert all(cell.spec.train.steps <= 40 for cell in cells)


@pytest.mark.parametrize(
    ("name", "scale"),
    tiered([("sec43", "laptop"), ("stages", "laptop"), ("words", "smoke")], ci=[("words", "smoke")], id="-".join),
)
def test_arms_cost_the_same(name: str, scale: str) -> None:
    """Or a share of it, to half a step; the pairs that a teacher makes are part of it."""
    chosen, shares = read_plan(name), {arm.share for arm in read_plan(name).arms}
    unit = "flops_per_step" if chosen.get_scale(scale).cost == "operations" else "forwards_per_step"
    cells = list(chosen.cells(scale))
    first = load(chosen.steps_of or chosen.arms[0].recipe, [*chosen.set, *chosen.get_scale(scale).set])
    total = getattr(Cost(first), unit) * (chosen.get_scale(scale).steps or first.train.steps)
    for cell in cells:
        each = getattr(Cost(cell.spec), unit)
        spent = each * cell.spec.train.steps + Cost(cell.spec).forwards_for_pairs
        assert min(abs(spent - share * total) for share in shares) <= each / 2 + 1e-6 * total, cell.name
        assert cell.labels["steps"] == cell.spec.train.steps
        assert cell.labels["F_per_step"] == round(Cost(cell.spec).forwards_per_step, 2)


def small(**fields: object) -> Plan:
    """A plan of two arms on moons."""
    tree = {
        "name": "small",
        "title": "A test",
        "columns": ["objective", "ratio"],
        "set": ["net.width=8"],
        "scales": {"smoke": {"seeds": [3], "steps": 5, "values": {"batch": 4}, "cost": "steps"}},
        "arms": [
            {"objective": "DuMo", "recipe": "moons", "set": ["one-pass", "train.batch=$batch"]},
            {
                "objective": "MeanFlow",
                "recipe": "moons-meanflow",
                "set": ["objective.times.velocity_ratio=$ratio"],
                "vary": {"ratio": {0.2: [], 0.4: ["net.depth=1"]}},
            },
        ],
    }
    return Plan.model_validate(tree | fields)


def test_settings_are_spelled_out() -> None:
    dumo, first, second = small().cells("smoke")
    assert [cell.name for cell in (dumo, first, second)] == ["dumo-3", "meanflow-0.2-3", "meanflow-0.4-3"]
    sets = ["net.width=8", "evaluate.nfe=[1]", "evaluate.contrast=[]", "train.batch=4", "train.seed=3"]
    assert dumo.spec == load("moons", [*sets, "train.steps=5"])
    assert [one.labels for one in (dumo, second)] == [
        {"objective": "DuMo", "ratio": None, "steps": 5},
        {"objective": "MeanFlow", "ratio": 0.4, "steps": 5},
    ]
    ratios = [cell.spec.model_dump()["objective"]["times"]["velocity_ratio"] for cell in (first, second)]
    assert ratios == [0.2, 0.4]
    assert second.spec.model_dump()["net"]["depth"] == 1 != first.spec.model_dump()["net"]["depth"]


def test_an_outer_axis_is_all_arms_again() -> None:
    scale = {"seeds": [0, 1], "steps": 6, "vary": {"budget": {0.5: [], 1.0: [], 2.0: []}}, "cost": "steps"}
    arms = [
        {"objective": "a", "recipe": "moons"},
        {"objective": "b", "recipe": "moons-meanflow", "only": {"budget": [0.5]}},
        {"objective": "c", "recipe": "moons-flow-matching", "only": {"budget": [1.0, 2.0]}, "seeds": [0]},
    ]
    found = small(columns=["objective", "budget"], scales={"smoke": scale}, arms=arms).cells("smoke")
    names = "a-0.5-0 a-0.5-1 b-0.5-0 b-0.5-1 a-1-0 a-1-1 c-1-0 a-2-0 a-2-1 c-2-0"
    assert [cell.name for cell in found] == names.split()


@pytest.mark.usefixtures("free")
def test_an_arm_with_steps_of_its_own_begins_a_budget() -> None:
    arms = [
        {"objective": title, "recipe": "moons", "steps": steps, "share": share}
        for title, steps, share in (("a", 100, 1.0), ("b", None, 0.5), ("c", 40, 1.0), ("d", None, 1.0))
    ]
    scale = {"seeds": [0], "cost": "passes"}
    found = small(columns=["objective"], scales={"laptop": scale}, arms=arms).cells("laptop")
    assert [cell.spec.train.steps for cell in found] == [100, 50, 40, 40]


@pytest.mark.parametrize("cost", ["passes", "operations"])
def test_a_teachers_pairs_are_paid_from_the_budget(monkeypatch: pytest.MonkeyPatch, cost: str) -> None:
    """By their passes, of which a step takes three, of a hundred operations each."""
    monkeypatch.setattr(Cost, "forwards_per_step", 3.0)
    monkeypatch.setattr(Cost, "flops_per_step", 300.0)
    arms = [
        {"objective": "a", "recipe": "digits", "steps": 10_000},
        {"objective": "b", "recipe": "digits-cmt"},
    ]
    plan = small(columns=["objective"], set=[], scales={"laptop": {"seeds": [0], "cost": cost}}, arms=arms)
    _, taught = plan.cells("laptop")
    pair_forwards = Cost(taught.spec).forwards_for_pairs
    assert pair_forwards
    assert taught.spec.train.steps == round(10_000 - pair_forwards / 3)


def test_a_mistake_in_a_plan_is_found() -> None:
    with pytest.raises(ValueError, match="musli"):
        small(set=["musli"])
    with pytest.raises(ValueError, match="recipy"):
        small(arms=[{"recipe": "moons", "recipy": "moons"}])
    with pytest.raises(
        UserError, match=r"fig3 has no scale 'paper': the paper gives neither .*; it has smoke and laptop$"
    ):
        read_plan("fig3").get_scale("paper")


def test_an_objective_is_taken_onto_another_recipe() -> None:
    sct, host = recipe("digits-sct"), recipe("cifar10-latents")
    spec = load("cifar10-latents", training_settings("digits-sct", "cifar10-latents"))
    assert spec.objective.model_dump() == sct.objective.model_dump() | {"drop": host.objective.drop}
    assert (spec.path, spec.sample.solver, spec.net.precondition) == (sct.path, sct.sample.solver, sct.net.precondition)
    assert (spec.data, spec.train) == (host.data, host.train)
    assert spec.net.model_copy(update={"precondition": "none"}) == host.net


def test_the_deviation_of_the_data_stays_the_hosts() -> None:
    assert recipe("digits-ect").path.sd == 0.75
    assert load("cifar10-latents", training_settings("digits-ect", "cifar10-latents")).path.sd == 1
    assert load("digits-ect", training_settings("digits-sct", "digits-ect")).path.sd == 0.75


def test_a_precondition_goes_along_to_any_net_that_can_have_it() -> None:
    assert load("cifar10", training_settings("digits-ect", "cifar10")).net.precondition == "edm"
    with pytest.raises(UserError, match=r"net\.precondition"):
        load("moons", training_settings("digits-ect", "moons"))


@pytest.mark.slow
@pytest.mark.usefixtures("free")
def test_the_papers_batches_go_through_one_gpu_in_parts() -> None:
    assert {cell.spec.train.micro_batch for cell in cells_of("tab2", "paper")} == {128}


@pytest.mark.slow
def test_a_teacher_that_is_an_average_counts() -> None:
    """As a pass of its own."""
    alone, taught = (Cost(load("digits", ["net.width=8", "net.depth=1", *more])) for more in ([], ["train.ref=0.999"]))
    assert taught.forwards_per_step > alone.forwards_per_step


@pytest.mark.parametrize(
    ("name", "settings", "passes"),
    [
        ("digits-pi-flow", [], 3),  # at the source and at two places of the policy
        ("digits-freeflow", [], 2),  # on the way from noise, and at its samples
        ("digits-freeflow", ["teacher.guide.scale=2"], 4),
        ("digits-cmt", [], 1),  # next to the pairs
        ("digits-cmt", ["objective.of=meanflow"], 0),
        ("digits-ayf", ["teacher.source=flow"], 1),
        ("digits-twinflow", ["teacher.source=flow"], 0.5),  # for two of four tasks
        ("digits-twinflow", ["teacher.source=flow", "objective.times={kind: below}"], 2),  # at x_t, and at noise
        ("digits-ect", ["teacher.source=flow", "objective.discretization={kind: equal, count: 9}"], 1),  # LCM
    ],
)
def test_a_teacher_costs_as_many_passes_as_the_loss_asks_for(name: str, settings: list[str], passes: float) -> None:
    run = load(name, ["net.width=8", "net.depth=1", *settings])
    alone = run.model_copy(update={"teacher": None})
    assert Cost(run).forwards_per_step - Cost(alone).forwards_per_step == pytest.approx(passes)


def test_the_zoo_has_every_objective_that_begins_from_nothing() -> None:
    without = {"digits-guided", "digits-words", "digits-likelihood", "digits-match", "digits-critic"}  # no siblings
    found = {name for name in recipe_files.names() if name.partition("-")[0] == "digits"} - without
    alone = {name for name in found if (spec := recipe(name)).teacher is None and spec.start is None}
    assert {arm.recipe for arm in read_plan("zoo").arms} == alone
    assert read_plan("zoo").explanations.keys() <= {arm.labels["objective"] for arm in read_plan("zoo").arms}


@pytest.mark.slow
@pytest.mark.usefixtures("free")
def test_the_fair_ablation_varies_one_thing_at_a_time() -> None:
    """At the same law of (t, r) two heads and one draw the very same times; nothing else differs but the objective."""
    *cells, meanflow = cells_of("fair", "smoke")
    for two, one in zip(cells[::2], cells[1::2], strict=True):
        assert two.labels | {"heads": "one"} == one.labels
        assert [len(cell.spec.objective.needs.heads) for cell in (two, one)] == [2, 1]
        for a, b in zip(*(cell.spec.objective.times(64, stream("fair")) for cell in (two, one)), strict=True):
            assert torch.equal(a, b)
        for part in ("data", "net", "path", "sample", "evaluate"):
            assert getattr(two.spec, part) == getattr(one.spec, part)
    for one in cells:
        t, r = one.spec.objective.times(4000, stream("fair"))
        still = (t == r).double().mean().item()
        assert still == pytest.approx(0.75 if one.labels["rows"] == "a quarter" else 0, abs=1e-3)
        assert ((r == 0) | (r == t)).all() == (one.labels["jumps"] == "to data")
        tree = one.spec.objective.model_dump()
        assert (tree.get("power", 0), tree["drop"], tree["guide"]["zeta"]) == (0, 0, 0)
    assert meanflow.spec.objective == recipe("digits-meanflow").objective


@pytest.mark.slow
def test_the_papers_steps_make_as_many_passes_as_it_says() -> None:
    """DuMo three without gradients, MeanFlow four; one with gradients is three."""
    _, dumo, meanflow, _ = islice(read_plan("fig4b").cells("paper"), 4)
    assert Cost(dumo.spec).forwards_per_step == pytest.approx(3 + 3, abs=1e-2)
    assert Cost(meanflow.spec).forwards_per_step == pytest.approx(3 + 4, abs=1e-2)


@pytest.mark.usefixtures("free")
def test_settings_are_compared_by_other_seeds_than_chose_them() -> None:
    """Seed 0 did."""
    assert 0 not in {cell.spec.train.seed for cell in cells_of("best", "laptop")}


# --- plans of the user's own

OWN = """
title: Mine
scales: {laptop: {steps: 200, seeds: [3, 5], cost: COST}}
arms:
  - {objective: DuMo, recipe: moons}
  - {objective: MeanFlow, recipe: moons-meanflow, set: [train.clip=2.0]}
"""


def own_plan(tmp_path: Path, text: str = OWN, cost: str = "passes") -> Plan:
    """The plan in a file of this text."""
    (tmp_path / "mine.yaml").write_text(text.replace("COST", cost), encoding="utf-8")
    return read_plan(str(tmp_path / "mine.yaml"))


def test_a_file_holds_a_plan_as_dumos_are(tmp_path: Path) -> None:
    cells = list(own_plan(tmp_path).cells("laptop"))
    assert [cell.name for cell in cells] == ["dumo-3", "dumo-5", "meanflow-3", "meanflow-5"]
    dumo, _, meanflow, _ = cells
    total = 200 * Cost(dumo.spec).forwards_per_step
    meanflow_steps = round(total / Cost(meanflow.spec).forwards_per_step)
    assert (dumo.spec.train.steps, meanflow.spec.train.steps) == (200, meanflow_steps)
    assert (meanflow.spec.train.seed, meanflow.spec.train.clip) == (3, 2.0)
    require_runnable(cells)
    require_fair(cells, "operations")
    require_fair(list(own_plan(tmp_path, OWN.replace("moons-meanflow", "moons")).cells("laptop")), "passes")


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("kind", ["meanflow", "dumo_any", "imm"])
def test_another_objective_keeps_the_dropped_labels_and_the_guidance_of_its_recipe(tmp_path: Path, kind: str) -> None:
    """imm has no field `guide`."""
    text = OWN.replace("moons-meanflow, set: [train.clip=2.0]", f"moons, set: [objective.kind={kind}]")
    dumo, _, other, _ = own_plan(tmp_path, text).cells("laptop")
    assert other.spec.objective.kind == kind
    kept, brought = (cell.spec.objective.model_dump(include={"drop", "guide"}) for cell in (dumo, other))
    assert brought == {name: kept[name] for name in brought}


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("setting", ["evaluate.seed=$seed", "'evaluate.seed=${seed}'"])
def test_a_setting_may_hold_the_seed(tmp_path: Path, setting: str) -> None:
    cells = own_plan(tmp_path, f"set: [{setting}]{OWN}").cells("laptop")
    assert [cell.spec.evaluate.seed for cell in cells] == [3, 5, 3, 5]


@pytest.mark.usefixtures("free")
def test_an_arm_may_have_its_own_dropped_labels(tmp_path: Path) -> None:
    text = OWN.replace("moons-meanflow, set: [train.clip=2.0]", "moons, set: [objective.guide.zeta=0.2]")
    *_, cell = own_plan(tmp_path, f"set: [data.labelled=true, objective.drop=0.3]{text}").cells("laptop")
    assert cell.spec.objective.drop == 0.3
    assert cell.spec.objective.needs.guide.zeta == 0.2


@pytest.mark.usefixtures("free")
def test_a_run_that_would_end_by_the_clock_has_steps(tmp_path: Path) -> None:
    cells = own_plan(tmp_path, OWN.replace("recipe: moons}", "recipe: my-images}")).cells("laptop")
    assert {cell.spec.train.minutes for cell in cells} == {None}


def test_code_in_a_file_is_run_if_somebody_agreed(tmp_path: Path) -> None:
    """A setting in a file is not one that was typed."""
    text = OWN.replace("train.clip=2.0", "objective.kind=not_mine:Robust")
    with pytest.raises(UserError, match="not_mine:Robust"):
        own_plan(tmp_path, text)
    with trust.trusting():
        assert own_plan(tmp_path, text).arms[1].set == ("objective.kind=not_mine:Robust",)
