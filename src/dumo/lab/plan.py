"""A plan: arms and seeds, each trained and measured once, at equal cost. Plans are YAML files, dumo's own and yours.

    title: Share on the velocity (Fig. 4a)
    columns: [objective, share]               # of the table; each arm gives them or varies over them
    set: [one-pass]                           # fields of all arms; a word without `=` is a name in plans/sets.yaml
    scales:
      smoke: {steps: 20, seeds: [0], cost: passes, set: [small]}
      laptop: {steps: 2000, seeds: [0, 1], cost: passes}
    arms:
      - {objective: DuMo, recipe: digits, set: [objective.beta=$share], vary: {share: [0.0, 0.1]}}

The fields of `Plan`, `Scale` and `Arm` are those of the YAML. `read_plan` reads a plan by its name or from a file,
`Plan.cells` gives its runs at a scale, `require_runnable` refuses plans that are wrong, and `require_fair` those whose
arms do not cost the same.

For each combination of the scale's outer axes, and for each arm and combination of the arm's axes, `Plan.cells`

1. joins the settings of plan, scale, `by`, axes and arm, and loads the recipe with them;
2. asks the `Budget` how many steps the arm gets; the first arm sets the budget, by its steps;
3. gives a `Cell` for each seed.

Equal cost means as many forward passes (F), or as many floating-point operations if networks differ in size. An
objective whose step needs more passes gets fewer steps. At the paper's size each recipe keeps the steps of the paper.
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
from dumo.io.yaml import parse_mapping, parse_yaml
from dumo.run import flops
from dumo.run.net import meta_net
from dumo.run.resolve import resolve
from dumo.types import Spec, UserError

_PLANS_FOLDER = files("dumo.lab") / "plans"
# In that folder: settings that several plans share, by name.
_SETS_FILE = "sets.yaml"
# A few minutes; ten minutes to three hours of two cores; the paper's size, on GPUs.
SCALES = ("smoke", "laptop", "paper")
# The largest ratio of the costs of two passes, or steps, that counts as equal: a further head or input is within it.
_MAX_COST_RATIO = 1.1
# Fields that the plan itself gives, and what to write instead.
_FIELDS_OF_PLANS = {
    "train.steps": "steps of the scale or the arm",
    "train.minutes": "steps of the scale or the arm",
    "train.seed": "seeds",
    "train": "its other fields one by one",
}

# What `Cost` has counted in this process, by all that it depends on.
_counts: dict[str, float] = {}


# ---------------------------------------------------------------------------------------------------- the YAML's fields


def _parse_settings(value: Any) -> list[str]:  # noqa: ANN401, as YAML has it
    """Flatten nested lists of settings and names of sets into settings `field=value`."""
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
    for part in value:
        settings += _parse_settings(part)
    return settings


def _parse_axes(value: Any) -> dict[str, dict[Any, list[str]]]:  # noqa: ANN401, as YAML has it
    """The settings of each value of each axis. An axis that is a list of values has no settings."""
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
    """One of the things that a plan compares; with `vary`, one for each combination of values.

    Further fields are the values of its columns in the table.
    """

    recipe: str
    # Another recipe, by whose objective it is trained (`training_settings`).
    by: str | None = None
    set: Settings = ()
    # Its axes: the values of each, with the settings of each value.
    vary: Axes = Field(default={})
    # The first part of its cells' names; the default is made of its labels.
    name: str = ""
    # The default is the scale's seeds.
    seeds: tuple[int, ...] | None = None
    # A new budget: this arm and those after it cost as much as so many steps of this one.
    steps: int | None = None
    # The share of the budget that it gets.
    share: float = 1.0
    # The scales, or values of an outer axis, at which the arm exists.
    only: dict[str, list[Any]] = Field(default={})
    # The cell from whose network it starts, as diffusers saves that.
    weights: str | None = None
    # The limit, in rad, of the low-pass filter that is fitted to that network (`dumo.nets.lowpass`).
    cut: float | None = None

    @property
    def labels(self) -> dict[str, Any]:
        """The values of its columns in the table."""
        return dict(self.model_extra or {})


class Scale(Spec):
    """How large a plan is made."""

    # What is equal among arms: forward passes, floating-point operations (if networks differ in size), or steps.
    cost: Literal["passes", "operations", "steps"]
    set: Settings = ()
    # Outer axes: all arms are run for each value. The values of an axis `budget` multiply the budget.
    vary: Axes = Field(default={})
    # Values of $names in settings.
    values: dict[str, Any] = Field(default={})
    # Recipes that replace those of the arms.
    recipes: dict[str, str] = Field(default={})
    # The default is the plan's arms.
    arms: tuple[Arm, ...] = ()
    # The default is each recipe's own seed.
    seeds: tuple[int, ...] | None = None
    # Steps of the first arm, with `cost: steps` of each arm; the default is the recipe's.
    steps: int | None = None


class Plan(Spec):
    """The arms that a figure or table compares, and the scales at which it can be made."""

    name: str
    title: str
    columns: tuple[str, ...] = ("objective",)
    scales: dict[str, Scale]
    arms: tuple[Arm, ...] = ()
    # Another plan, whose arms follow.
    arms_of: str | None = None
    set: Settings = ()
    # The recipe whose steps set the budget; the default is the first arm's.
    steps_of: str | None = None
    # Whether to draw samples of each arm in its fewest passes.
    samples: bool = False
    # By arm, why it is far from the first.
    why: dict[str, str] = Field(default={})
    # Why there is no scale `paper`.
    no_paper: str = ""

    @model_validator(mode="after")
    def _require_columns(self) -> "Plan":
        """Refuse fields of arms that are neither `Arm`'s nor columns."""
        for arm in self.all_arms():
            for name in arm.labels:
                if name not in self.columns:
                    raise ValueError(f"an arm has '{name}', which is no field of an arm and not in columns")
        return self

    def all_arms(self) -> list[Arm]:
        """The arms of the plan and of its scales."""
        arms = list(self.arms)
        for scale in self.scales.values():
            arms += scale.arms
        return arms

    def require_scale(self, scale: str) -> None:
        """Raise UserError for a scale that no plan has, or this one has not."""
        require_known("scale", scale, SCALES)
        self.get_scale(scale)

    def get_scale(self, scale: str) -> Scale:
        """The scale of this name. Raises UserError for one that the plan does not have."""
        if scale not in self.scales:
            why = f": {self.no_paper}" if self.no_paper else ""
            raise UserError(f"{self.name} has no scale '{scale}'{why}; it has {' and '.join(self.scales)}")
        return self.scales[scale]

    def cells(self, scale: str) -> "Iterator[Cell]":
        """All runs of the plan, arm by arm, seed by seed."""
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
        """The runs of one arm at one value of each axis, seed by seed; `settings` are those of axes and arm."""
        # Join the settings of plan, scale, `by`, axes and arm: a later one wins.
        recipe = scale.recipes.get(arm.recipe, arm.recipe)
        settings_of_by = training_settings(arm.by, recipe) if arm.by else ()
        settings = (*self.set, *scale.set, *settings_of_by, *settings)

        def load_run(seed: int | None) -> Run:
            values = {**scale.values, **axis_values, "seed": seed}  # of $names in settings
            filled_settings = [Template(setting).safe_substitute(values) for setting in settings]
            return resolve(load_recipe(recipe, filled_settings))

        # Find steps and columns by the first seed's run.
        seeds = arm.seeds or scale.seeds or (None,)
        run = load_run(seeds[0])
        steps = budget.steps(Cost(run), run.train.steps, arm)
        labels = {name: axis_values.get(name, arm.labels.get(name)) for name in self.columns}
        labels["steps"] = steps
        if scale.cost != "steps":
            labels["F_per_step"] = round(Cost(run).units, 2)
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
                cut=arm.cut,
            )


# ------------------------------------------------------------------------------------------------- cost and budget


@dataclass(frozen=True)
class Cost:
    """What a run costs.

    A count is made once for all runs that agree in what it depends on, as most runs of a plan do.
    """

    run: Run

    @property
    def units(self) -> float:
        """Forward units of a step. A teacher's pass counts as one of the net, with guidance as two."""

        def count_units() -> float:
            run = self.run
            units = flops.forward_units(meta_net(run), run.objective, run.path, run.data.shape, ref=run.train.ref)
            return self._teacher_passes() + units

        return self._count_once("units", count_units)

    def _teacher_passes(self) -> float:
        """Passes of the teacher in a step: as many as the loss asks for, with guidance twice as many."""
        run = self.run
        teacher = run.teacher
        if teacher is None or not teacher.gives_velocity(run.objective.needs.teacher):
            return 0.0
        passes = flops.teacher_passes(meta_net(run), run.objective, run.path, run.data.shape)
        return 2 * passes if teacher.guide.active else passes

    @property
    def flops(self) -> float:
        """Floating-point operations of a pass, per row."""

        def count_flops() -> float:
            return flops.forward_flops(meta_net(self.run), self.run.objective, self.run.data.shape)

        return self._count_once("flops", count_flops)

    @property
    def operations(self) -> float:
        """Floating-point operations of a step."""
        return self.run.train.batch * self.units * self.flops

    @property
    def pair_units(self) -> float:
        """Forward units, of a batch each, in which a teacher makes its pairs of noise and data before the training."""
        teacher = self.run.teacher
        if teacher is None or not teacher.pairs:
            return 0.0
        pairs = teacher.pairs
        points = self.run.objective.needs.teacher.points
        return pairs.count * pairs.passes(points) / self.run.train.batch

    def _count_once(self, name: str, count: Callable[[], float]) -> float:
        """What `count` returns, called once in this process for all runs whose parts that it depends on are equal."""
        parts = self.run.model_dump_json(include={"data", "net", "objective", "path", "teacher"})
        key = name + parts + repr(self.run.train.ref)
        if key not in _counts:
            _counts[key] = count()
        return _counts[key]


class Budget:
    """What each arm of a plan may cost at a scale, in the scale's measure: forward passes or operations.

    The recipe `Plan.steps_of` sets it by its steps, or else the first arm. An arm with `Arm.steps` sets it anew. With
    `Scale.cost` "steps" there is no budget: arms have `Scale.steps`, or their recipes' steps.
    """

    def __init__(self, plan: Plan, scale: Scale, *, factor: float, is_smoke: bool) -> None:
        """`factor` multiplies the budget. With `is_smoke` an arm that sets it anew does so with the scale's steps."""
        self.scale = scale
        self.factor = factor
        self.is_smoke = is_smoke
        self.total: float | None = None
        if plan.steps_of:
            run = load_recipe(plan.steps_of, [*scale.set])
            self.total = round(factor * (scale.steps or run.train.steps)) * self._step_cost(Cost(run))

    def steps(self, run_cost: Cost, recipe_steps: int, arm: Arm) -> int:
        """How many steps an arm's run gets, whose cost is `run_cost`, and whose recipe has `recipe_steps`."""
        if self.scale.cost == "steps":
            return self.scale.steps or recipe_steps
        step_cost = self._step_cost(run_cost)
        if arm.steps or self.total is None:
            steps = self.scale.steps or recipe_steps
            if arm.steps and not self.is_smoke:
                steps = arm.steps
            self.total = round(self.factor * steps) * step_cost
        pair_cost = run_cost.pair_units * step_cost / run_cost.units
        return round((arm.share * self.total - pair_cost) / step_cost)

    def _step_cost(self, run_cost: Cost) -> float:
        """What a step costs, in the scale's measure."""
        return run_cost.operations if self.scale.cost == "operations" else run_cost.units


@dataclass(frozen=True)
class Cell:
    """One run of a plan, named ARM-SEED."""

    name: str
    spec: Run
    # Its columns in the table.
    labels: dict[str, Any]
    # As `Arm.weights` and `Arm.cut`.
    weights: str | None = None
    cut: float | None = None

    @property
    def arm(self) -> str:
        """Its name without the seed, which it shares with the cells of the same arm and axes."""
        arm, _, _ = self.name.rpartition("-")
        return arm


# ------------------------------------------------------------------------------------- names, settings and reading


def _combinations(axes: Mapping[str, Mapping[Any, tuple[str, ...]]]) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Yield every combination of the axes' values: the value of each axis, and the settings of these values."""
    for combination in product(*axes.values()):
        values = dict(zip(axes, combination, strict=True))
        settings: list[str] = []
        for name, value in values.items():
            settings += axes[name][value]
        yield values, settings


def _cell_name(labels: Mapping[str, Any], axis_values: Mapping[str, Any]) -> str:
    """A name for the cells of an arm: its labels that are texts or values of axes, joined."""
    parts: list[str] = []
    for name, value in labels.items():
        if name in axis_values or isinstance(value, str):
            parts.append(f"{value:g}" if isinstance(value, float) else str(value))
    return slug("-".join(parts))


def slug(text: str) -> str:
    """A text as the name of a folder."""
    return re.sub(r"[^\w.]+", "-", text.lower()).strip("-")


@cache
def training_settings(recipe: str, host: str) -> tuple[str, ...]:
    """The settings by which the recipe `host` trains as `recipe` does.

    They are the objective, the path, the preconditioning, theta^- and the solver of `recipe`. Data, their standard
    deviation, net and training stay the host's; so do dropped labels and guidance, if both objectives have them. A net
    that cannot have the preconditioning is refused as these settings are loaded.
    """
    host_run = load_recipe(host)
    recipe_run = load_recipe(recipe)
    host_tree = host_run.model_dump(mode="json")
    recipe_tree = recipe_run.model_dump(mode="json")
    objective = recipe_tree["objective"]
    for name in ("drop", "guide"):
        if name in objective and name in host_tree["objective"]:
            objective[name] = host_tree["objective"][name]
    path = recipe_tree["path"]
    if "sd" in type(recipe_run.path).model_fields:
        path["sd"] = host_run.path.sd
    parts = {
        "objective": objective,
        "path": path,
        "train.ref": recipe_tree["train"]["ref"],
        "sample.solver": recipe_tree["sample"]["solver"],
    }
    if host_run.net.precondition != recipe_run.net.precondition:
        parts["net.precondition"] = recipe_run.net.precondition
    return tuple(f"{name}={json.dumps(value)}" for name, value in parts.items())


@cache
def _named_sets() -> dict[str, Any]:
    """Settings that several plans share, by name."""
    return parse_yaml((_PLANS_FOLDER / _SETS_FILE).read_text(encoding="utf-8"))


def plan_names() -> list[str]:
    """The names of all plans, sorted."""
    names: list[str] = []
    for file in _PLANS_FOLDER.iterdir():
        if file.name != _SETS_FILE:
            names.append(file.name.removesuffix(".yaml"))
    return sorted(names)


def read_plan(name: str) -> Plan:
    """Read one of dumo's plans by its name, or a plan from a YAML file.

    The arms of the plan that it names in `arms_of` follow its own, except those whose labels equal the labels of one of
    its own. Raises UserError if there is no plan of this name, and for code that a file names and nobody agreed to run.
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
    """Whether a plan's name is that of a YAML file."""
    return name.endswith((".yaml", ".yml"))


def _read_mapping(text: str, name: str) -> dict[str, Any]:
    """The fields of a plan's YAML, without `let`, which holds anchors of YAML."""
    tree = parse_mapping(text, name, "plan", "title, scales and arms, as docs/compare.md has them")
    tree.pop("let", None)
    return tree


def _require_trust(plan: Plan, name: str) -> None:
    """Raise UserError for code in the settings of a plan's file that nobody agreed to run.

    Loading a recipe with settings trusts the code that they name, since a person typed them; those of a file may be
    somebody else's.
    """
    settings = [*plan.set]
    for part in (*plan.scales.values(), *plan.all_arms()):
        settings += part.set
        for axis in part.vary.values():
            settings += [setting for value_settings in axis.values() for setting in value_settings]
    for setting in settings:
        trust.require(trust.CODE_NAME.findall(setting), name)


def require_runnable(cells: Sequence[Cell]) -> None:
    """Raise UserError if two cells have one name, as for a seed that is given twice, or a cell has no step."""
    names = [cell.name for cell in cells]
    for cell in cells:
        if names.count(cell.name) > 1:
            raise UserError(f"the plan has {cell.name} twice: give each arm a name and each seed of an arm once")
        if cell.spec.train.steps < 1:
            raise UserError(f"the budget does not pay for a step of {cell.name}: increase it")


def require_fair(cells: Sequence[Cell], cost: str) -> None:
    """Raise UserError if arms do not cost the same, by a plan that counts passes or steps, whose costs differ.

    Costs of passes, or of steps, that differ by no more than _MAX_COST_RATIO count as equal.
    """
    if cost == "operations":
        return
    operations_by_name: dict[str, float] = {}
    for cell in cells:
        run_cost = Cost(cell.spec)
        operations_of_pass = cell.spec.train.batch * run_cost.flops
        operations_by_name[cell.name] = run_cost.operations if cost == "steps" else operations_of_pass
    cheapest = min(operations_by_name, key=lambda name: operations_by_name[name])
    dearest = max(operations_by_name, key=lambda name: operations_by_name[name])
    ratio = operations_by_name[dearest] / operations_by_name[cheapest]
    if ratio > _MAX_COST_RATIO:
        raise UserError(
            f"one of the {cost} of {dearest} costs {ratio:.3g} times one of {cheapest}: write cost: operations, or "
            "make networks and batches equal"
        )
