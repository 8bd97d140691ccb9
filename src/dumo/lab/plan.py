"""A plan: arms and seeds, each trained and measured once, at equal cost. The folder `plans` holds them as YAML.

    title: Share on the velocity (Fig. 4a)
    columns: [objective, share]               # of the table; every arm gives them, or varies over them
    set: [one-pass]                           # settings of all arms; a word without `=` is a name in sets.yaml
    scales:
      smoke: {steps: 20, seeds: [0], cost: passes, set: [small]}
      laptop: {steps: 2000, seeds: [0, 1], cost: passes}
    arms:
      - {objective: DuMo, recipe: digits, set: [objective.beta=$share], vary: {share: [0.0, 0.1]}}

The fields of `Plan`, `Scale` and `Arm` are those of the YAML. `plan_names` lists the plans, `read_plan` reads one, and
`Plan.cells` gives its runs at a scale. For each combination of the scale's outer axes, and for each arm and combination
of the arm's axes, it

1. puts the settings together, of plan, scale, `by`, axes and arm, and loads the recipe with them;
2. asks the `Budget` how many steps the arm gets. The first arm sets the budget, by its steps;
3. gives a `Cell` for each seed.

Equal cost means equal counted passes, in forward units, or equal operations, where nets differ: steps times the `Cost`
of a step. An objective that needs more passes a step gets fewer steps. At the paper's size each recipe has the steps of
its paper.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import product
from string import Template
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dumo.config.change import yaml_text
from dumo.config.code import codes_of
from dumo.config.load import load_recipe, objective_of
from dumo.config.spec import Run
from dumo.config.suggestion import require_known
from dumo.io.yaml import parse_yaml
from dumo.run import cost
from dumo.run.net import outline
from dumo.run.resolve import resolve
from dumo.types import Spec, UserError
from dumo.types.outside import code_hash

_PLANS_FOLDER = files("dumo.lab") / "plans"
_SETS_FILE = "sets.yaml"  # in that folder: settings that several plans share, by name
SCALES = ("smoke", "laptop", "paper")  # a minute; ten minutes to three hours of two cores; the paper's size, on GPUs

_counts: dict[str, float] = {}  # what `Cost` has counted in this process, by all that it depends on


# ---------------------------------------------------------------------------------------------------- the YAML's fields


def _parse_settings(value: Any) -> list[str]:  # noqa: ANN401, as YAML has it
    """Flatten nested lists of settings and names of sets into settings `field=value`, as `--set` takes them."""
    if isinstance(value, str):
        is_setting = "=" in value
        return [value] if is_setting else _parse_settings(_named_sets()[value])
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


class Arm(Spec):
    """One of the things that a plan compares; with `vary`, one for each combination of values."""

    labels: dict[str, Any]  # its columns in the table; in YAML they stand among the other fields
    recipe: str
    by: str | None = None  # another recipe, by whose objective it is trained (`training_settings`)
    set: Settings = ()
    vary: Axes = Field(default={})  # its axes: the values of each, with the settings of each value
    name: str = ""  # the beginning of its cells' names; "": its labels
    seeds: tuple[int, ...] | None = None  # None: the scale's
    steps: int | None = None  # sets the budget anew: the arms after it cost as much as these steps. None: it does not
    share: float = 1.0  # of the budget
    only: dict[str, list[Any]] = Field(default={})  # the scales, or values of an outer axis, at which there is this arm
    weights: str | None = None  # the cell from whose net it begins, as diffusers saves that
    # Rad, of the low-pass that is fitted to that net (`dumo.nets.lowpass`); None: there is none.
    cut: float | None = None


class Scale(Spec):
    """How large a plan is made."""

    set: Settings = ()
    vary: Axes = Field(default={})  # outer axes: all arms for each value; `budget` multiplies what arms may cost
    values: dict[str, Any] = Field(default={})  # of $names in settings
    recipes: dict[str, str] = Field(default={})  # by a recipe of the arms, the one that takes its place here
    arms: tuple[Arm, ...] = ()  # (): the plan's
    seeds: tuple[int, ...] | None = None  # None: each recipe's own
    steps: int | None = None  # of the first arm, with `cost: steps` of every arm; None: the recipe's
    passes: float | None = None  # what each arm may cost, in forward passes of the first arm; None: by its steps
    operations: float | None = None  # what each arm may cost, in floating-point operations; needs cost: operations
    cost: Literal["passes", "operations", "steps"] = "steps"  # what is equal: see `Budget`
    few_samples: bool = False  # whether cells are judged by as few samples as a run in training


class Plan(Spec):
    """The arms that a figure or table compares, and the scales at which it can be made."""

    name: str
    title: str
    columns: tuple[str, ...]
    scales: dict[str, Scale]
    arms: tuple[Arm, ...] = ()
    arms_of: str | None = None  # another plan, whose arms follow
    set: Settings = ()
    steps_of: str | None = None  # the recipe whose steps set the budget; None: the first arm's
    samples: bool = False  # whether a picture shows what arms make in one pass
    follows_code: bool = False  # whether cells are trained anew where the code of their objective has changed
    why: dict[str, str] = Field(default={})  # by arm: why it is far from the first
    no_paper: str = ""  # why there is no scale `paper`

    def require_scale(self, scale: str) -> None:
        """Raise UserError for a scale that no plan has, or this one has not."""
        require_known("scale", scale, SCALES)
        self.get_scale(scale)

    def get_scale(self, scale: str) -> Scale:
        """The scale of this name. Raises UserError for one that the plan does not have."""
        if scale not in self.scales:
            raise UserError(f"{self.name} has no scale '{scale}': {self.no_paper}; it has {' and '.join(self.scales)}")
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
        # the settings of plan, scale, `by`, axes and arm, where a later one wins
        recipe = scale.recipes.get(arm.recipe, arm.recipe)
        settings_of_by = training_settings(arm.by, recipe) if arm.by else ()
        settings = (*self.set, *scale.set, *settings_of_by, *settings)

        def load_run(seed: int | None) -> Run:
            values = {**scale.values, **axis_values, "seed": seed}  # of $names in settings
            filled_settings = [Template(setting).safe_substitute(values) for setting in settings]
            run = resolve(load_recipe(recipe, [*guidance_settings(recipe, filled_settings), *filled_settings]))
            if not scale.few_samples:
                return run
            evaluation = run.evaluate.model_copy(update={"protocol": run.evaluate.validation.protocol})
            return run.model_copy(update={"evaluate": evaluation})

        # steps and columns, by the first seed's run
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
            train = run.train.model_copy(update={"steps": steps, "seed": run_seed})
            yield Cell(
                name=f"{name}-{run_seed}",
                spec=run.model_copy(update={"train": train}),
                labels=labels,
                weights=arm.weights,
                cut=arm.cut,
                code=_code_of(run) if self.follows_code else None,
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
            units = cost.forward_units(outline(run), run.objective, run.path, run.data.shape, ref=run.train.ref)
            return self._teacher_passes() + units

        return self._count_once("units", count_units)

    def _teacher_passes(self) -> float:
        """Passes of the teacher in a step: as many as the loss asks for, with guidance twice as many."""
        run = self.run
        teacher = run.teacher
        if teacher is None or not teacher.gives_velocity(run.objective.needs.teacher):
            return 0.0
        passes = cost.teacher_passes(outline(run), run.objective, run.path, run.data.shape)
        return 2 * passes if teacher.guide.active else passes

    @property
    def flops(self) -> float:
        """Floating-point operations of a pass, per row."""

        def count_flops() -> float:
            return cost.forward_flops(outline(self.run), self.run.objective, self.run.data.shape)

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
    """What each arm of a plan may cost at a scale, in the scale's measure: forward units or operations.

    It is set once, by the first of these that there is: the recipe `Plan.steps_of`, `Scale.operations`, the passes
    `Scale.passes`, the first arm's steps. An arm with `Arm.steps` sets it anew. With `Scale.cost` "steps" there is no
    budget: arms have `Scale.steps`, or their recipes' steps.
    """

    def __init__(self, plan: Plan, scale: Scale, *, factor: float, is_smoke: bool) -> None:
        """`factor` multiplies the budget. With `is_smoke` an arm that sets it anew does so with the scale's steps."""
        self.scale = scale
        self.factor = factor
        self.is_smoke = is_smoke
        self.total = 0.0  # 0: not set yet
        if plan.steps_of:
            run = load_recipe(plan.steps_of, [*scale.set])
            self.total = round(factor * (scale.steps or run.train.steps)) * self._step_cost(Cost(run))

    def steps(self, run_cost: Cost, recipe_steps: int, arm: Arm) -> int:
        """How many steps an arm's run gets, whose cost is `run_cost`, and whose recipe has `recipe_steps`."""
        if self.scale.cost == "steps":
            return self.scale.steps or recipe_steps
        step_cost = self._step_cost(run_cost)
        if arm.steps or not self.total:
            self.total = self._total_by(run_cost, recipe_steps, arm)
        pair_cost = run_cost.pair_units * step_cost / run_cost.units
        return round((arm.share * self.total - pair_cost) / step_cost)

    def _total_by(self, run_cost: Cost, recipe_steps: int, arm: Arm) -> float:
        """The budget that an arm sets, which is the first one or has steps of its own."""
        step_cost = self._step_cost(run_cost)
        if not arm.steps:
            if self.scale.operations:
                return self.factor * self.scale.operations
            if self.scale.passes:
                return self.factor * self.scale.passes * step_cost / run_cost.units
        steps = self.scale.steps or recipe_steps
        if arm.steps and not self.is_smoke:
            steps = arm.steps
        return round(self.factor * steps) * step_cost

    def _step_cost(self, run_cost: Cost) -> float:
        """What a step costs, in the scale's measure."""
        return run_cost.operations if self.scale.cost == "operations" else run_cost.units


@dataclass(frozen=True)
class Cell:
    """One run of a plan."""

    name: str  # ARM-SEED
    spec: Run
    labels: dict[str, Any]  # its columns in the table
    weights: str | None = None  # as `Arm.weights`
    cut: float | None = None  # as `Arm.cut`
    code: str | None = None  # hashes of the code that it runs (`_code_of`); None: the plan does not follow that

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


def _code_of(run: Run) -> str:
    """Hashes of the code that a run's results depend on, as text: of its objective, and of each class from outside."""
    return yaml_text({"objective": code_hash(run.objective), **dict(codes_of(run))})


def guidance_settings(recipe: str, settings: Sequence[str]) -> list[str]:
    """The settings that keep a recipe's dropped labels and guidance where `settings` give it another objective.

    Without them the objective would have the defaults of its kind, and differ from other arms in more than its loss.
    """
    kind = None
    for setting in settings:
        field, _, value = setting.partition("=")
        if field == "objective.kind":
            kind = value.strip(" '\"")
    if kind is None:
        return []
    recipe_objective = load_recipe(recipe).objective
    objective_class = type(objective_of(kind))
    assert isinstance(recipe_objective, Spec)
    assert issubclass(objective_class, Spec)
    fields = objective_class.model_fields
    recipe_fields = type(recipe_objective).model_fields
    kept_settings: list[str] = []
    for name in ("drop", "guide"):
        in_both = name in fields and name in recipe_fields
        if in_both and fields[name].annotation == recipe_fields[name].annotation:
            kept_settings.append(f"objective.{name}={yaml_text(getattr(recipe_objective, name))}")
    return kept_settings


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
    """Read a plan.

    The arms of the plan that it names in `arms_of` follow its own, except those whose labels equal the labels of one of
    its own. Raises UserError where there is no plan of this name.
    """
    require_known("figure or table", name, plan_names())
    tree = parse_yaml((_PLANS_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    tree.pop("let", None)  # anchors of YAML
    for part in (tree, *tree["scales"].values()):
        part["arms"] = [_with_labels(arm, tree["columns"]) for arm in part.get("arms", ())]
    plan = Plan(name=name, **tree)
    if plan.arms_of is None:
        return plan
    own_labels = {tuple(arm.labels.values()) for arm in plan.arms}
    other_arms = [arm for arm in read_plan(plan.arms_of).arms if tuple(arm.labels.values()) not in own_labels]
    return plan.model_copy(update={"arms": (*plan.arms, *other_arms)})


def _with_labels(arm: dict[str, Any], columns: list[str]) -> dict[str, Any]:
    """An arm of the YAML, with its columns in a mapping of their own."""
    labels = {name: arm[name] for name in columns if name in arm}
    fields = {name: value for name, value in arm.items() if name not in columns}
    return {"labels": labels, **fields}
