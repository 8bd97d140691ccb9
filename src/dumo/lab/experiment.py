"""Experiment plans: YAML files of arms and seeds. Each arm is trained and evaluated once per seed, at equal cost.

    title: Share on the velocity (Fig. 4a)
    # Columns of the table. Each arm sets them or varies over them.
    columns: [objective, share]
    # Settings of all arms. A word without `=` is a name in plans/sets.yaml.
    set: [one-pass]
    scales:
      smoke: {steps: 20, seeds: [0], cost: passes, set: [small]}
      laptop: {steps: 2000, seeds: [0, 1], cost: passes}
    arms:
      - {objective: DuMo, recipe: digits, set: [objective.beta=$share], vary: {share: [0.0, 0.1]}}

`Plan`, `Scale` and `Arm` have the fields of the YAML. `read_plan` reads a bundled plan by its name, or a plan from a
file. `Plan.cells` yields the runs of a plan at a scale. `require_runnable` and `require_fair` validate them.

For each combination of the scale's outer axes, each arm, and each combination of the arm's axes, `Plan.cells`

1. joins the settings of plan, scale, `by`, axes and arm, and loads the recipe with them;
2. computes the arm's number of steps from the `Budget`, which defaults to the cost of the first arm's run;
3. yields a `Cell` for each seed.

Equal cost means the same number of forward passes (F), or of floating-point operations if networks differ in size. An
objective that needs more passes per step is trained for fewer steps. At the scale `paper`, each recipe keeps the number
of steps of the paper.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import product
from pathlib import Path
from string import Template
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from dumo.config import trust
from dumo.config.load import load_recipe
from dumo.config.spec import Run
from dumo.config.suggestion import require_known
from dumo.data import Latents
from dumo.io.yaml import parse_mapping, parse_yaml
from dumo.run import flops
from dumo.run.net import meta_net
from dumo.run.resolve import resolve
from dumo.types import Spec, UserError

_PLANS_FOLDER = files("dumo.lab") / "plans"
# The file in that folder with named settings that several plans share.
_SETS_FILE = "sets.yaml"
# `smoke` takes minutes, and `laptop` ten minutes to three hours on two cores; `paper` is the paper's size, on GPUs.
SCALES = ("smoke", "laptop", "paper")
# Costs per pass (or step) within this ratio count as equal. It tolerates an extra head or input.
_MAX_COST_RATIO = 1.1
# Fields that only the plan itself may set, and what to write instead.
_FIELDS_OF_PLANS = {
    "train.steps": "steps of the scale or the arm",
    "train.minutes": "steps of the scale or the arm",
    "train.seed": "seeds",
    "train": "its other fields one by one",
}

# Counts of `Cost` in this process, keyed by everything they depend on.
_counts: dict[str, float] = {}


# --------------------------------------------------------------------------------------------- fields of a plan's YAML


def _parse_settings(value: Any) -> list[str]:  # noqa: ANN401, any YAML value
    """Flatten nested lists of settings and names of sets into a list of settings `field=value`."""
    if isinstance(value, str):
        field, sign, _ = value.partition("=")
        if field in _FIELDS_OF_PLANS:
            raise ValueError(f"{value} would be overwritten by the plan: give {_FIELDS_OF_PLANS[field]}")
        if sign:
            return [value]
        if value not in _named_sets():
            raise ValueError(f"'{value}' is neither FIELD=VALUE nor a name in plans/{_SETS_FILE}")
        return _parse_settings(_named_sets()[value])
    settings: list[str] = []
    for item in value:
        settings += _parse_settings(item)
    return settings


def _parse_axes(value: Any) -> dict[str, dict[Any, list[str]]]:  # noqa: ANN401, any YAML value
    """Return the settings of each value of each axis. Values of an axis that is a list have no settings."""
    axes: dict[str, dict[Any, list[str]]] = {}
    for name, axis in value.items():
        if isinstance(axis, dict):
            axes[name] = {key: _parse_settings(settings) for key, settings in axis.items()}
        else:
            axes[name] = {key: [] for key in axis}
    return axes


Settings = Annotated[tuple[str, ...], BeforeValidator(_parse_settings)]
Axes = Annotated[dict[str, dict[Any, tuple[str, ...]]], BeforeValidator(_parse_axes)]


class Arm(Spec, extra="allow"):
    """A recipe with settings, compared with the other arms. With `vary`, one arm for each combination of values.

    Extra fields are the arm's values in the table's columns.
    """

    recipe: str
    # Train with the objective of this recipe instead; data and network stay those of `recipe` (`training_settings`).
    by: str | None = None
    set: Settings = ()
    # The arm's axes: the values of each axis, with the settings of each value.
    vary: Axes = Field(default={})
    # The prefix of the cells' names. The default joins the arm's labels.
    name: str = ""
    # The default is the scale's seeds.
    seeds: tuple[int, ...] | None = None
    # If set, this many steps of this arm become the budget for it and all later arms.
    steps: int | None = None
    # The arm's share of the budget.
    share: float = 1.0
    # Run the arm only at these scales, or at these values of an outer axis.
    only: dict[str, list[Any]] = Field(default={})
    # The name of another cell. The arm starts from its network, saved in diffusers' format.
    weights: str | None = None
    # If set, a low-pass filter with this limit, in rad, is fitted to that network first (`dumo.nets.lowpass`).
    refit_lowpass: float | None = None

    @property
    def labels(self) -> dict[str, Any]:
        """The arm's values in the table's columns."""
        return dict(self.model_extra or {})


class Scale(Spec):
    """The size at which a plan is run."""

    # What all arms spend equally: forward passes, floating-point operations (if networks differ in size), or steps.
    cost: Literal["passes", "operations", "steps"]
    set: Settings = ()
    # Outer axes: all arms are run for each value. The values of an axis `budget` multiply the budget.
    vary: Axes = Field(default={})
    # Values substituted for $names in settings.
    values: dict[str, Any] = Field(default={})
    # Recipes that replace recipes of the arms, by name.
    recipes: dict[str, str] = Field(default={})
    # The default is the plan's arms.
    arms: tuple[Arm, ...] = ()
    # The default is each recipe's own seed.
    seeds: tuple[int, ...] | None = None
    # Steps of the first arm, or of each arm with `cost: steps`. The default is the recipe's number.
    steps: int | None = None


class Plan(Spec):
    """The arms that a figure or table compares, and the scales at which it can be run."""

    name: str
    title: str
    columns: tuple[str, ...] = ("objective",)
    scales: dict[str, Scale]
    arms: tuple[Arm, ...] = ()
    # The name of another plan. Its arms are appended.
    arms_of: str | None = None
    set: Settings = ()
    # The recipe whose steps set the budget. The default is the first arm.
    steps_of: str | None = None
    # Whether to draw samples of each arm at its smallest NFE.
    samples: bool = False
    # For arms far from the first one, the reason, by the value of `objective`.
    explanations: dict[str, str] = Field(default={})
    # The reason why the plan has no scale `paper`.
    no_paper: str = ""

    @model_validator(mode="after")
    def _require_columns(self) -> "Plan":
        """Raise ValueError if an arm has a field that is neither declared in `Arm` nor a column."""
        for arm in self.all_arms():
            for name in arm.labels:
                if name not in self.columns:
                    raise ValueError(f"an arm has '{name}', which is neither a field of an arm nor in columns")
        return self

    def all_arms(self) -> list[Arm]:
        """Return the arms of the plan and of its scales."""
        arms = list(self.arms)
        for scale in self.scales.values():
            arms += scale.arms
        return arms

    def require_scale(self, scale: str) -> None:
        """Raise UserError if the scale is unknown, or missing in this plan."""
        require_known("scale", scale, SCALES)
        self.get_scale(scale)

    def get_scale(self, scale: str) -> Scale:
        """Return the scale of this name. Raises UserError if the plan has no such scale."""
        if scale not in self.scales:
            reason = f": {self.no_paper}" if self.no_paper else ""
            raise UserError(f"{self.name} has no scale '{scale}'{reason}; it has {' and '.join(self.scales)}")
        return self.scales[scale]

    def cells(self, scale: str) -> "Iterator[Cell]":
        """Yield all runs of the plan, arm by arm and seed by seed."""
        scale_spec = self.get_scale(scale)
        for outer_values, outer_settings in _combinations(scale_spec.vary):
            budget = Budget(self, scale_spec, factor=outer_values.get("budget", 1.0), is_smoke=scale == "smoke")
            for arm in scale_spec.arms or self.arms:
                current_values = {"scale": scale, **outer_values}
                is_included = all(current_values[name] in allowed for name, allowed in arm.only.items())
                if not is_included:
                    continue
                for arm_values, arm_settings in _combinations(arm.vary):
                    settings = (*outer_settings, *arm.set, *arm_settings)
                    yield from self._cells_of_arm(arm, scale_spec, budget, outer_values | arm_values, settings)

    def _cells_of_arm(
        self, arm: Arm, scale: Scale, budget: "Budget", axis_values: dict[str, Any], settings: Sequence[str]
    ) -> "Iterator[Cell]":
        """Yield the runs of one arm at one value of each axis, seed by seed, with the `settings` of axes and arm."""
        # Join the settings of plan, scale, `by`, axes and arm. Later settings override earlier ones.
        recipe = scale.recipes.get(arm.recipe, arm.recipe)
        settings_of_by = training_settings(arm.by, recipe) if arm.by else ()
        settings = (*self.set, *scale.set, *settings_of_by, *settings)

        def load_run(seed: int | None) -> Run:
            values = {**scale.values, **axis_values, "seed": seed}
            filled_settings = [Template(setting).safe_substitute(values) for setting in settings]
            return resolve(load_recipe(recipe, filled_settings))

        # Compute steps and columns from the run of the first seed.
        seeds = arm.seeds or scale.seeds or (None,)
        run = load_run(seeds[0])
        steps = budget.steps(Cost(run), run.train.steps, arm)
        labels = {name: axis_values.get(name, arm.labels.get(name)) for name in self.columns}
        labels["steps"] = steps
        if scale.cost != "steps":
            labels["F_per_step"] = round(Cost(run).forwards_per_step, 2)
        name = arm.name or _cell_name(labels, axis_values)

        depends_on_seed = any("seed" in Template(setting).get_identifiers() for setting in settings)
        for seed in seeds:
            if depends_on_seed:
                run = load_run(seed)
            run_seed = run.train.seed if seed is None else seed
            train = run.train.model_copy(update={"steps": steps, "minutes": None, "seed": run_seed})
            yield Cell(
                name=f"{name}-{run_seed}",
                spec=run.model_copy(update={"train": train}),
                labels=labels,
                weights=arm.weights,
                refit_lowpass=arm.refit_lowpass,
            )


# ------------------------------------------------------------------------------------------------- cost and budget


@dataclass(frozen=True)
class Cost:
    """The training cost of a run, in forward passes and floating-point operations.

    Counts are cached in this process, since most runs of a plan share them.
    """

    run: Run

    @property
    def forwards_per_step(self) -> float:
        """Forward passes per step, including the teacher's. Guided teacher passes count twice."""

        def count_forwards() -> float:
            run = self.run
            forwards = flops.forward_units(meta_net(run), run.objective, run.path, run.data.shape, ref=run.train.ref)
            return self._teacher_passes() + forwards

        return self._count_once("forwards", count_forwards)

    def _teacher_passes(self) -> float:
        """Return the teacher's passes per step; guided passes count twice."""
        run = self.run
        teacher = run.teacher
        if teacher is None or not teacher.gives_velocity(run.objective.needs.teacher):
            return 0.0
        passes = flops.teacher_passes(meta_net(run), run.objective, run.path, run.data.shape)
        if isinstance(run.data, Latents) and run.data.prior is not None:
            passes *= run.data.prior
        return 2 * passes if teacher.guide.active else passes

    @property
    def flops_per_forward(self) -> float:
        """Floating-point operations of a forward pass, per row."""

        def count_flops() -> float:
            return flops.forward_flops(meta_net(self.run), self.run.objective, self.run.data.shape)

        return self._count_once("flops", count_flops)

    @property
    def flops_per_step(self) -> float:
        """Floating-point operations of a training step."""
        return self.run.train.batch * self.forwards_per_step * self.flops_per_forward

    @property
    def forwards_for_pairs(self) -> float:
        """Forward passes, in batches, in which the teacher generates pairs of noise and data before training."""
        teacher = self.run.teacher
        if teacher is None or not teacher.pairs:
            return 0.0
        pairs = teacher.pairs
        points = self.run.objective.needs.teacher.points
        return pairs.count * pairs.passes(points) / self.run.train.batch

    def _count_once(self, name: str, count: Callable[[], float]) -> float:
        """Return `count()`, cached in this process by the fields of the run that it depends on."""
        fields = self.run.model_dump_json(include={"data", "net", "objective", "path", "teacher"})
        key = name + fields + repr(self.run.train.ref)
        if key not in _counts:
            _counts[key] = count()
        return _counts[key]


class Budget:
    """The training cost allowed to each arm at a scale, in forward passes or floating-point operations.

    It is the cost of the recipe `Plan.steps_of` or else of the first arm, and is reset by arms with `Arm.steps`. If
    `Scale.cost` is "steps", there is no budget: every arm is trained for `Scale.steps`, or for its recipe's steps.
    """

    def __init__(self, plan: Plan, scale: Scale, *, factor: float, is_smoke: bool) -> None:
        """Multiply the budget by `factor`. If `is_smoke`, arms that reset it use the scale's steps, not their own."""
        self.scale = scale
        self.factor = factor
        self.is_smoke = is_smoke
        self.total: float | None = None
        if plan.steps_of:
            run = load_recipe(plan.steps_of, [*scale.set])
            self.total = round(factor * (scale.steps or run.train.steps)) * self._step_cost(Cost(run))

    def steps(self, run_cost: Cost, recipe_steps: int, arm: Arm) -> int:
        """Return the number of training steps of an arm whose run costs `run_cost`; the recipe has `recipe_steps`."""
        if self.scale.cost == "steps":
            return self.scale.steps or recipe_steps
        step_cost = self._step_cost(run_cost)
        if arm.steps or self.total is None:
            steps = self.scale.steps or recipe_steps
            if arm.steps and not self.is_smoke:
                steps = arm.steps
            self.total = round(self.factor * steps) * step_cost
        pair_cost = run_cost.forwards_for_pairs * step_cost / run_cost.forwards_per_step
        return round((arm.share * self.total - pair_cost) / step_cost)

    def _step_cost(self, run_cost: Cost) -> float:
        """Return the cost of a step in the unit of `Scale.cost`."""
        return run_cost.flops_per_step if self.scale.cost == "operations" else run_cost.forwards_per_step


@dataclass(frozen=True)
class Cell:
    """One run of a plan, named ARM-SEED."""

    name: str
    spec: Run
    # Values of columns in the table.
    labels: dict[str, Any]
    # Copies of `Arm.weights` and `Arm.refit_lowpass`.
    weights: str | None = None
    refit_lowpass: float | None = None

    @property
    def arm(self) -> str:
        """The name without the seed: equal for all seeds of an arm at one value of each axis."""
        arm, _, _ = self.name.rpartition("-")
        return arm


# -------------------------------------------------------------------------------------- names, settings and validation


def _combinations(axes: Mapping[str, Mapping[Any, tuple[str, ...]]]) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Yield every combination of the axes' values: the value of each axis, and the settings of all values."""
    for combination in product(*axes.values()):
        values = dict(zip(axes, combination, strict=True))
        settings: list[str] = []
        for name, value in values.items():
            settings += axes[name][value]
        yield values, settings


def _cell_name(labels: Mapping[str, Any], axis_values: Mapping[str, Any]) -> str:
    """Return a name for the cells of an arm: all labels that are strings or values of axes, joined."""
    parts: list[str] = []
    for name, value in labels.items():
        if name in axis_values or isinstance(value, str):
            parts.append(f"{value:g}" if isinstance(value, float) else str(value))
    return slug("-".join(parts))


def slug(text: str) -> str:
    """Convert a text to a folder name."""
    return re.sub(r"[^\w.]+", "-", text.lower()).strip("-")


@cache
def training_settings(recipe: str, base_recipe: str) -> tuple[str, ...]:
    """Return the settings that make `base_recipe` train with the objective of `recipe`.

    They are the objective, path, preconditioning, theta^- and solver of `recipe`. Data, their standard deviation,
    network and optimization stay unchanged, as do label dropout and guidance if both objectives have them. A network
    without this preconditioning is refused when the settings are loaded.
    """
    base_run = load_recipe(base_recipe)
    recipe_run = load_recipe(recipe)
    base_tree = base_run.model_dump(mode="json")
    recipe_tree = recipe_run.model_dump(mode="json")
    objective = recipe_tree["objective"]
    for name in ("drop", "guide"):
        if name in objective and name in base_tree["objective"]:
            objective[name] = base_tree["objective"][name]
    path = recipe_tree["path"]
    if "sd" in type(recipe_run.path).model_fields:
        path["sd"] = base_run.path.sd
    fields = {
        "objective": objective,
        "path": path,
        "train.ref": recipe_tree["train"]["ref"],
        "sample.solver": recipe_tree["sample"]["solver"],
    }
    if base_run.net.precondition != recipe_run.net.precondition:
        fields["net.precondition"] = recipe_run.net.precondition
    return tuple(f"{name}={json.dumps(value)}" for name, value in fields.items())


@cache
def _named_sets() -> dict[str, Any]:
    """Return the named settings that several plans share."""
    return parse_yaml((_PLANS_FOLDER / _SETS_FILE).read_text(encoding="utf-8"))


def plan_names() -> list[str]:
    """Return the sorted names of all bundled plans."""
    names: list[str] = []
    for file in _PLANS_FOLDER.iterdir():
        if file.name != _SETS_FILE:
            names.append(file.name.removesuffix(".yaml"))
    return sorted(names)


def read_plan(name: str) -> Plan:
    """Read a bundled plan by its name, or a plan from a YAML file.

    Arms of the plan `arms_of` are appended, except arms with the same labels as one already present. Raises UserError
    if there is no plan of this name, or if a file names code that the user has not agreed to run.
    """
    if is_file_name(name):
        plan = Plan(name=Path(name).stem, **_read_mapping(Path(name).read_text(encoding="utf-8"), name))
        _require_trust(plan, name)
    else:
        require_known("figure or table", name, plan_names())
        text = (_PLANS_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
        plan = Plan(name=name, **_read_mapping(text, name))
    if plan.arms_of is None:
        return plan
    own_labels = [arm.labels for arm in plan.arms]
    other_arms = [arm for arm in read_plan(plan.arms_of).arms if arm.labels not in own_labels]
    return plan.model_copy(update={"arms": (*plan.arms, *other_arms)})


def is_file_name(name: str) -> bool:
    """Whether a plan is named by its YAML file."""
    return name.endswith((".yaml", ".yml"))


def _read_mapping(text: str, name: str) -> dict[str, Any]:
    """Parse a plan's YAML without `let`, which only holds YAML anchors."""
    tree = parse_mapping(text, name, "plan", "title, scales and arms, as docs/compare.md has them")
    tree.pop("let", None)
    return tree


def _require_trust(plan: Plan, name: str) -> None:
    """Raise UserError if the settings of a plan file name code that the user has not agreed to run.

    `load_recipe` trusts code named in settings, since the user typed them. A plan file may come from someone else.
    """
    settings = [*plan.set]
    for scale_or_arm in (*plan.scales.values(), *plan.all_arms()):
        settings += scale_or_arm.set
        for axis in scale_or_arm.vary.values():
            settings += [setting for value_settings in axis.values() for setting in value_settings]
    for setting in settings:
        trust.require(trust.CODE_NAME.findall(setting), name)


def require_runnable(cells: Sequence[Cell]) -> None:
    """Raise UserError if two cells have the same name, as with a repeated seed, or if a cell has no training step."""
    names = [cell.name for cell in cells]
    for cell in cells:
        if names.count(cell.name) > 1:
            raise UserError(f"the plan has {cell.name} twice: give each arm a name and each seed of an arm once")
        if cell.spec.train.steps < 1:
            raise UserError(f"the budget is less than the cost of one step of {cell.name}: increase it")


def require_fair(cells: Sequence[Cell], cost: str) -> None:
    """Raise UserError if a plan counts passes or steps, but their costs differ by more than _MAX_COST_RATIO."""
    if cost == "operations":
        return
    flops_by_name: dict[str, float] = {}
    for cell in cells:
        run_cost = Cost(cell.spec)
        flops_per_pass = cell.spec.train.batch * run_cost.flops_per_forward
        flops_by_name[cell.name] = run_cost.flops_per_step if cost == "steps" else flops_per_pass
    cheapest = min(flops_by_name, key=lambda name: flops_by_name[name])
    dearest = max(flops_by_name, key=lambda name: flops_by_name[name])
    ratio = flops_by_name[dearest] / flops_by_name[cheapest]
    if ratio > _MAX_COST_RATIO:
        raise UserError(
            f"{cost} of {dearest} cost {ratio:.3g} times as much as {cost} of {cheapest}: write cost: operations, or "
            "make networks and batches equal"
        )
