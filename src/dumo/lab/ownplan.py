"""A plan of the user's own, for `dumo reproduce mine.yaml`: arms that train at equal compute, in one short file.

    budget: 1200 steps of digits       # what each arm may cost; or 4860F, in forward passes of the first arm
    seeds: [0, 1, 2]
    set: ["evaluate.nfe=[1,2]"]        # settings of all arms; $seed is the run's seed
    arms:
      - {objective: DuMo, recipe: digits}
      - {objective: Mine, recipe: digits-flow-matching, set: [objective.kind=mine:Robust]}

`is_file_name` tells a file from the name of a plan that dumo brings. `dumo.lab.reproduce` calls the other entrances in
this order: `read_file` reads the file as a `Plan`, as those of dumo are. `require_fair` refuses runs that would not be
compared at equal compute, before any is trained. `paired_table` makes the table, in which arms are compared seed by
seed (`dumo.lab.ranking`).
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from dumo.config import recipes, trust
from dumo.config.load import load_recipe, parse
from dumo.config.suggestion import require_known
from dumo.io.read import brief, read_text
from dumo.io.yaml import parse_mapping
from dumo.lab.cell import Result, Row
from dumo.lab.plan import Arm, Cell, Cost, Plan, Scale, plan_names, slug
from dumo.lab.ranking import ArmScore, best_arms, paired_difference
from dumo.lab.table import average_by_arm, error_of_mean, group_by_arm, main_score, rows_by_passes
from dumo.run.resolve import resolve
from dumo.types import Spec, UserError

SUFFIXES = (".yaml", ".yml")
MAX_BYTES = 2**20  # of a file: ours
MAX_PASS_RATIO = 1.1  # of the passes of two arms, by operations: ours; a head or an input more is within it
SMOKE_STEPS = 20  # of the first arm at the scale `smoke`: ours
SMOKE_SETTINGS = ("evaluate.protocol.samples=1000",)  # the least that cifar10-features judges
PASSES = re.compile(r"(\d[\d,]*(?:\.\d+)?) ?F")  # 8100F, 8,100 F
STEPS = re.compile(r"(\d[\d,]*) steps of ([\w-]+)")  # 2000 steps of digits


class OwnArm(Spec):
    """One of the things that a file compares."""

    objective: str = Field(min_length=1)  # what the table calls it
    recipe: str  # one of dumo's
    set: tuple[str, ...] = ()  # settings FIELD=VALUE, after those of all arms


class OwnPlan(Spec):
    """The fields of a user's file."""

    title: str = ""  # "": the file's name
    budget: str  # of each arm: "8100F", or "2000 steps of RECIPE"
    cost: Literal["passes", "operations"] = "passes"  # operations: where nets or batches differ
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    set: tuple[str, ...] = ()  # settings FIELD=VALUE of all arms
    arms: tuple[OwnArm, ...] = Field(min_length=2)

    @field_validator("budget")
    @classmethod
    def _require_budget(cls, budget: str) -> str:
        if not (PASSES.fullmatch(budget) or STEPS.fullmatch(budget)):
            raise ValueError(f"{brief(budget)} is no budget: write 8100F, or 2000 steps of digits")
        return budget

    @field_validator("seeds")
    @classmethod
    def _require_other_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        for seed in seeds:
            if seed < 0 or seeds.count(seed) > 1:
                raise ValueError(f"{seed} is negative, or there twice: write [0, 1, 2]")
        return seeds

    def require_names(self) -> None:
        """Raise UserError for a recipe that there is not, and for two arms whose runs would have one name."""
        for arm in self.arms:
            require_known("recipe", arm.recipe, recipes.names())
        run_names = [slug(arm.objective) for arm in self.arms]
        for name in run_names:
            if not name or run_names.count(name) > 1:
                raise UserError(f"arms: the objective '{name}' is there twice, or has no letter: name each arm")

    def settings(self) -> tuple[str, ...]:
        """The settings of all arms and of each. Raises UserError for one that is not FIELD=VALUE."""
        settings = self.set
        for arm in self.arms:
            settings += arm.set
        for setting in settings:
            if "=" not in setting:
                raise UserError(f"set: {brief(setting)} is no setting: write FIELD=VALUE, as after --set")
        return settings

    def passes(self) -> float:
        """The budget in forward passes (F)."""
        in_passes = PASSES.fullmatch(self.budget)
        if in_passes:
            return float(in_passes[1].replace(",", ""))
        in_steps = STEPS.fullmatch(self.budget)
        assert in_steps, "the budget was validated"
        steps, recipe = in_steps.groups()
        require_known("recipe", recipe, recipes.names())
        return int(steps.replace(",", "")) * Cost(resolve(load_recipe(recipe))).units


def is_file_name(name: str) -> bool:
    """Whether what a user typed is a file, not the name of a plan that dumo brings."""
    return name.endswith(SUFFIXES)


def read_file(name: str) -> Plan:
    """Read a user's file as a plan with the scales `smoke`, of 20 steps and one seed, and `laptop`, as it is written.

    Raises UserError where it is missing, names what there is not, or names code that nobody agreed to run.
    """
    file = Path(name)
    if file.stem in plan_names():
        raise UserError(f"{name} would be taken for {file.stem}, which dumo brings: give the file another name")
    text = read_text(file, "write one as docs/compare.md has it", MAX_BYTES)
    tree = parse_mapping(text, name, "plan", "budget and arms, as docs/compare.md has them")
    own = parse(OwnPlan, tree, name)
    own.require_names()
    # The file may be somebody else's: its settings are not typed, and loading a recipe with them would trust them.
    for setting in own.settings():
        trust.require(((code, sys.path) for code in trust.CODE_NAME.findall(setting)), name)

    laptop = Scale(seeds=own.seeds, cost=own.cost, passes=own.passes())
    smoke = Scale(seeds=own.seeds[:1], cost=own.cost, steps=SMOKE_STEPS, set=SMOKE_SETTINGS)
    arms: list[Arm] = []
    for arm in own.arms:
        arms.append(Arm(labels={"objective": arm.objective}, recipe=arm.recipe, set=arm.set))
    return Plan(
        name=file.stem,
        title=own.title or file.stem,
        columns=("objective",),
        scales={"smoke": smoke, "laptop": laptop},
        arms=tuple(arms),
        set=own.set,
        samples=True,
        no_paper="a file of yours has the size that it says",
    )


def require_fair(cells: Sequence[Cell], cost: str) -> None:
    """Raise UserError where the budget does not pay for a step of a run.

    And, where `cost` counts passes, where a pass of one run costs over MAX_PASS_RATIO times that of another.
    """
    operations_by_name: dict[str, float] = {}
    for cell in cells:
        if cell.spec.train.steps < 1:
            raise UserError(f"the budget does not pay for a step of {cell.name}: give a larger one")
        operations_by_name[cell.name] = cell.spec.train.batch * Cost(cell.spec).flops
    small = min(operations_by_name, key=lambda name: operations_by_name[name])
    large = max(operations_by_name, key=lambda name: operations_by_name[name])
    ratio = operations_by_name[large] / operations_by_name[small]
    if cost == "passes" and ratio > MAX_PASS_RATIO:
        raise UserError(
            f"a forward pass of {large} costs {ratio:.3g} times that of {small}, for its net or its batch is larger: "
            "make them equal, or count operations by cost: operations"
        )


def paired_table(plan: Plan, results: list[Result]) -> list[Row]:
    """A row for each arm and number of passes: means over seeds, and how the arm compares with the best one.

    `best` is * for the best arm and those level with it. `behind` is the mean difference from the best arm, seed by
    seed, and `margin` what such a difference may be by chance; both None for the best arm, and with fewer than two
    seeds.
    """
    rows = average_by_arm(results)
    score = main_score(rows[0])
    arm_scores = _arm_scores(results, score)
    table: list[Row] = []
    for row in rows:
        of_passes = {arm: scores[row["nfe"]] for arm, scores in arm_scores.items() if row["nfe"] in scores}
        own = of_passes[row["objective"]]
        best = min(of_passes.values(), key=lambda arm_score: arm_score.mean)
        is_best = dict(zip(of_passes, best_arms([*of_passes.values()]), strict=True))
        difference = None if own is best else paired_difference(own.by_seed, best.by_seed)
        columns = {name: row[name] for name in ("objective", "steps", "F_per_step", "nfe") if name in row}
        columns["best"] = "*" if is_best[row["objective"]] else ""
        columns[score] = row[score]
        columns["behind"] = difference and difference.mean
        columns["margin"] = difference and difference.margin
        table.append(columns | row)
    return table


def _arm_scores(results: Sequence[Result], score: str) -> dict[str, dict[int, ArmScore]]:
    """The scores of each arm, by its name and the number of passes."""
    scores: dict[str, dict[int, ArmScore]] = {}
    for seeds in group_by_arm(results):
        by_passes = scores.setdefault(seeds[0].cell.labels["objective"], {})
        rows_of_seeds = [rows_by_passes(result.report) for result in seeds]
        for rows in zip(*rows_of_seeds, strict=True):  # those of one number of passes
            by_seed: dict[str, float] = {}
            points: list[tuple[float, float]] = []
            for result, row in zip(seeds, rows, strict=True):
                by_seed[str(result.cell.spec.train.seed)] = row[score]
                points.append((row[score], row.get(f"{score}_sd") or 0.0))
            by_passes[rows[0]["nfe"]] = ArmScore(by_seed, error_of_mean(points))
    return scores
