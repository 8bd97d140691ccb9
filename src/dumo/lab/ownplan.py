"""A plan of the user's own, for `dumo reproduce mine.yaml`: arms that train at equal compute, in one short file.

    budget: 1200 steps of digits       # what each arm may cost; or 4860F, in forward passes of the first arm
    seeds: [0, 1, 2]
    set: ["evaluate.nfe=[1,2]"]        # settings of all arms; $seed is the run's seed
    arms:
      - {objective: DuMo, recipe: digits}
      - {objective: Mine, recipe: digits-flow-matching, set: [objective.kind=mine:Robust]}

An arm is one way to train, compared over all seeds. A budget counts forward passes of training (F); the NFE of a table
counts passes of sampling.

`is_file_name` tells a file from the name of a plan that dumo brings. `dumo.lab.reproduce` calls the other entrances in
this order: `read_file` reads the file as a `Plan`, the type of dumo's own plans. `require_fair` refuses runs that would
not be compared at equal compute and by one measure, before any is trained. `paired_table` makes the table, in which
arms are compared seed by seed (`dumo.lab.ranking`).
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from dumo.config import recipes, trust
from dumo.config.change import yaml_text
from dumo.config.load import load_recipe, parse
from dumo.config.spec import Run
from dumo.config.suggestion import require_known
from dumo.evaluation.metric import higher_is_better, metric
from dumo.io.read import brief, read_text
from dumo.io.yaml import parse_mapping
from dumo.lab.cell import Result, Row
from dumo.lab.plan import Arm, Cell, Cost, Plan, Scale, plan_names, slug
from dumo.lab.ranking import ArmScore, PairedDifference, is_level, paired_difference
from dumo.lab.table import average_by_arm, error_of_mean, group_by_arm, main_score, rows_of_all_passes
from dumo.run.resolve import resolve
from dumo.types import Spec, UserError

_SUFFIXES = (".yaml", ".yml")
MAX_BYTES = 2**20  # of a file: ours
_MAX_PASS_RATIO = 1.1  # of the operations of two arms' passes: ours; a head or an input more is within it
_SMOKE_STEPS = 20  # of the first arm at the scale `smoke`: ours
# Fields of a run that `set` may not give, and the key of the file that gives each.
_OWNERS = {"train.steps": "budget", "train.minutes": "budget", "train.seed": "seeds"}
_PASSES_PATTERN = re.compile(r"(\d[\d,]*(?:\.\d+)?) ?F")  # 8100F, 8,100 F
_STEPS_PATTERN = re.compile(r"(\d[\d,]*) steps of ([\w-]+)")  # 2000 steps of digits


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
        amount = _PASSES_PATTERN.fullmatch(budget) or _STEPS_PATTERN.fullmatch(budget)
        if amount is None:
            raise ValueError(f"{brief(budget)} is no budget: write 8100F, or 2000 steps of digits")
        if float(amount[1].replace(",", "")) == 0:
            raise ValueError(f"{budget} trains nothing: write more, such as 8100F, or 2000 steps of digits")
        return budget

    @field_validator("seeds")
    @classmethod
    def _require_distinct_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        for seed in seeds:
            if seed < 0:
                raise ValueError(f"{seed} is negative: write seeds such as [0, 1, 2]")
            if seeds.count(seed) > 1:
                raise ValueError(f"{seed} is there twice: write different seeds such as [0, 1, 2]")
        return seeds

    def require_names(self, file_name: str) -> None:
        """Raise UserError for a recipe that there is not, and for arms whose runs would have one name or none."""
        for arm in self.arms:
            require_known("recipe", arm.recipe, recipes.names())
        run_names = [slug(arm.objective) for arm in self.arms]
        for name, arm in zip(run_names, self.arms, strict=True):
            if not name:
                raise UserError(
                    f"{file_name}: objective {brief(arm.objective)} has no letter or digit: give each arm a name"
                )
            if run_names.count(name) > 1:
                raise UserError(f"{file_name}: objective '{name}' is there twice: give each arm a name of its own")

    def all_settings(self) -> tuple[str, ...]:
        """The settings of all arms, then those of each arm."""
        settings = self.set
        for arm in self.arms:
            settings += arm.set
        return settings

    def require_settings(self, file_name: str) -> None:
        """Raise UserError for a setting that is not FIELD=VALUE, and for one that the file's budget or seeds give."""
        for setting in self.all_settings():
            field, sign, _ = setting.partition("=")
            if not sign:
                raise UserError(f"{file_name}: set: {brief(setting)} is no setting: write FIELD=VALUE, as after --set")
            if field in _OWNERS:
                raise UserError(f"{file_name}: set: {brief(setting)}: leave it out, for `{_OWNERS[field]}` says it")
            if field == "train":
                raise UserError(f"{file_name}: set: {brief(setting)}: write its fields one by one, as train.batch=64")

    def budget_in_passes(self) -> float | None:
        """The budget in forward passes (F); None where it is in operations."""
        in_passes = _PASSES_PATTERN.fullmatch(self.budget)
        if in_passes:
            return float(in_passes[1].replace(",", ""))
        if self.cost == "operations":
            return None
        steps, step_cost = self._steps_of_recipe()
        return steps * step_cost.units

    def budget_in_operations(self) -> float | None:
        """The budget in floating-point operations, where it is steps of a recipe and arms differ in size; else None.

        A pass of the recipe's net may cost another number of operations than one of an arm's, so passes would not do.
        """
        if self.cost == "passes" or _PASSES_PATTERN.fullmatch(self.budget):
            return None
        steps, step_cost = self._steps_of_recipe()
        return steps * step_cost.operations

    def _steps_of_recipe(self) -> tuple[int, Cost]:
        """The steps in a budget "N steps of RECIPE", and the cost of one.

        The recipe counts as it ships, without the settings of this file.
        """
        in_steps = _STEPS_PATTERN.fullmatch(self.budget)
        assert in_steps, "the budget was validated"
        steps, recipe = in_steps.groups()
        require_known("recipe", recipe, recipes.names())
        return int(steps.replace(",", "")), Cost(resolve(load_recipe(recipe)))


def is_file_name(name: str) -> bool:
    """Whether what a user typed is a file, not the name of a plan that dumo brings."""
    return name.endswith(_SUFFIXES)


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
    own.require_names(name)
    own.require_settings(name)
    # The file may be somebody else's. Nobody typed its settings, and loading a recipe with them would trust their code.
    for setting in own.all_settings():
        trust.require(((code, sys.path) for code in trust.CODE_NAME.findall(setting)), name)

    laptop = Scale(
        seeds=own.seeds,
        cost=own.cost,
        passes=own.budget_in_passes(),
        operations=own.budget_in_operations(),
    )
    smoke = Scale(seeds=own.seeds[:1], cost=own.cost, steps=_SMOKE_STEPS, few_samples=True)
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
        samples=True,  # a picture shows what each arm makes in one pass
        follows_code=True,  # who compares an objective also mends it
        no_paper="a file of yours has the size that it says",  # the reason in the message for --scale paper
    )


def require_fair(cells: Sequence[Cell], cost: str) -> None:
    """Raise UserError where the budget does not pay for a step of a run, or runs would not be compared fairly.

    They would not where two of one seed are measured otherwise; nor where `cost` counts passes, and a pass of one run
    costs over _MAX_PASS_RATIO times that of another.
    """
    _require_one_measure(cells)
    operations_by_name: dict[str, float] = {}
    for cell in cells:
        if cell.spec.train.steps < 1:
            raise UserError(f"the budget does not pay for a step of {cell.name}: give a larger one")
        operations_by_name[cell.name] = cell.spec.train.batch * Cost(cell.spec).flops
    cheapest = min(operations_by_name, key=lambda run_name: operations_by_name[run_name])
    dearest = max(operations_by_name, key=lambda run_name: operations_by_name[run_name])
    ratio = operations_by_name[dearest] / operations_by_name[cheapest]
    if cost == "passes" and ratio > _MAX_PASS_RATIO:
        raise UserError(
            f"a forward pass of {dearest} costs {ratio:.3g} times that of {cheapest}, for its net or its batch is "
            "larger: make them equal, or count operations by cost: operations"
        )


def _require_one_measure(cells: Sequence[Cell]) -> None:
    """Raise UserError where two runs of one seed are measured otherwise, with the field in which they differ."""
    first_by_seed: dict[int, Cell] = {}
    for cell in cells:
        first = first_by_seed.setdefault(cell.spec.train.seed, cell)
        fields_of_first = _measuring_fields(first.spec)
        for field, value in _measuring_fields(cell.spec).items():
            if value != fields_of_first[field]:
                way_out = "take recipes that agree"
                if field != "data.classes":  # which no setting says
                    way_out = f"set it in `set` of all arms, or {way_out}"
                raise UserError(
                    f"{field} is {fields_of_first[field]} in {first.name} and {value} in {cell.name}, which one table "
                    f"cannot compare: {way_out}"
                )


def _measuring_fields(spec: Run) -> dict[str, str]:
    """The fields that say by what a run is measured, as YAML: by whom, against which data, and whether by class."""
    return {
        "evaluate.protocol": yaml_text(spec.evaluate.protocol),
        "evaluate.split": yaml_text(spec.evaluate.split),
        "evaluate.seed": yaml_text(spec.evaluate.seed),
        "data.held": yaml_text(getattr(spec.data, "held", 0)),
        "data.fold": yaml_text(getattr(spec.data, "fold", 0)),
        "data.classes": yaml_text(spec.data.classes),
    }


def paired_table(plan: Plan, results: list[Result]) -> list[Row]:
    """A row for each arm and NFE: means over seeds, and how the arm compares with the best one.

    `best` is * for the best arm and those level with it. `behind` is the mean difference from the best arm, seed by
    seed, and `margin` what such a difference may be by chance; both None for the best arm, and with fewer than two
    seeds. No arm is ranked if a higher score is better, or if an arm has one seed and its score no standard error.
    """
    rows = average_by_arm(results)
    score = main_score(rows[0])
    has_one_seed = any(len(results_of_arm) == 1 for results_of_arm in group_by_arm(results))
    rows_of_runs = [row for result in results for row in rows_of_all_passes(result.report)]
    has_errors = all(f"{score}_sd" in row for row in rows_of_runs) and not metric(score).sd_is_spread
    can_rank = not higher_is_better(score) and (has_errors or not has_one_seed)
    arm_scores = _arm_scores(results, score)
    table: list[Row] = []
    for row in rows:
        is_best = False
        difference = None
        if can_rank:
            comparison = _compare_at(row["nfe"], arm_scores)[row["objective"]]
            is_best = comparison.is_best
            difference = comparison.difference
        columns = {name: row[name] for name in ("objective", "steps", "F_per_step", "nfe") if name in row}
        columns["best"] = "*" if is_best else ""
        columns[score] = row[score]
        columns["behind"] = difference.mean if difference else None
        columns["margin"] = difference.margin if difference else None
        table.append(columns | row)
    return table


@dataclass(frozen=True)
class _Comparison:
    """How an arm compares with the best one."""

    is_best: bool  # or level with the best
    difference: PairedDifference | None  # None: of the best arm, or fewer than two seeds


def _compare_at(nfe: int, arm_scores: Mapping[str, Mapping[int, ArmScore]]) -> dict[str, _Comparison]:
    """Compare each arm that was sampled in `nfe` passes with the best of them; by the arm's name."""
    scores_at_nfe: dict[str, ArmScore] = {}
    for arm, score_by_nfe in arm_scores.items():
        if nfe in score_by_nfe:
            scores_at_nfe[arm] = score_by_nfe[nfe]
    best_arm = min(scores_at_nfe, key=lambda arm: scores_at_nfe[arm].mean)
    best_score = scores_at_nfe[best_arm]

    comparisons: dict[str, _Comparison] = {}
    for arm, arm_score in scores_at_nfe.items():
        difference = None
        if arm != best_arm:
            difference = paired_difference(arm_score.by_seed, best_score.by_seed)
        comparisons[arm] = _Comparison(is_level(arm_score, best_score), difference)
    return comparisons


def _arm_scores(results: Sequence[Result], score: str) -> dict[str, dict[int, ArmScore]]:
    """The scores of each arm, by its name and the NFE."""
    has_errors = not metric(score).sd_is_spread
    scores: dict[str, dict[int, ArmScore]] = {}
    for results_of_arm in group_by_arm(results):
        score_by_nfe = scores.setdefault(results_of_arm[0].cell.labels["objective"], {})
        rows_of_seeds = [rows_of_all_passes(result.report) for result in results_of_arm]
        for rows_at_nfe in zip(*rows_of_seeds, strict=True):  # a row of each seed: all have the same NFE in one order
            by_seed: dict[str, float] = {}
            values_and_errors: list[tuple[float, float]] = []
            for result, row in zip(results_of_arm, rows_at_nfe, strict=True):
                by_seed[str(result.cell.spec.train.seed)] = row[score]
                error = row.get(f"{score}_sd") if has_errors else None
                values_and_errors.append((row[score], error or 0.0))
            score_by_nfe[rows_at_nfe[0]["nfe"]] = ArmScore(by_seed, error_of_mean(values_and_errors))
    return scores
