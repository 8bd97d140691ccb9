"""A plan: arms and seeds, each trained and measured once, at equal cost. The folder `plans` holds them as YAML.

    title: Share on the velocity (Fig. 4a)
    columns: [objective, share]               # of the table; every arm gives them, or varies over them
    set: [one-pass]                           # settings of all arms; a word without `=` is a name in sets.yaml
    scales:
      smoke: {steps: 20, seeds: [0], cost: passes, set: [small]}
      laptop: {steps: 2000, seeds: [0, 1], cost: passes}
    arms:
      - {objective: DuMo, recipe: digits, set: [objective.beta=$share], vary: {share: [0.0, 0.1]}}

`read` reads a plan, and `Plan.cells` gives its runs at a scale, arm by arm: settings are put together, the first arm
sets the `Budget`, and each arm gets as many steps as it pays for.

Equal cost is equal counted passes, in forward units, or operations, where nets differ: steps times what a step costs.
An objective that needs more passes a step gets fewer steps. At the paper's size arms have equal steps, as there.
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

from dumo.config.error import require_known
from dumo.config.load import load_recipe
from dumo.config.spec import Run
from dumo.io.yaml import parse
from dumo.run import cost
from dumo.run.net import outline
from dumo.run.resolve import resolve
from dumo.types import Spec, UserError

PLANS = files("dumo.lab") / "plans"
COUNTED: dict[str, float] = {}  # costs of runs, by all that they depend on
SCALES = ("smoke", "laptop", "paper")  # a minute; this machine's cores within an hour; the paper's size, on GPUs


def words(value: Any) -> list[str]:  # noqa: ANN401, as YAML has it
    """Settings as `--set` takes them, out of lists in lists and names of sets."""
    if isinstance(value, str):
        return [value] if "=" in value else words(sets()[value])
    settings: list[str] = []
    for part in value:
        settings += words(part)
    return settings


def axes(value: Any) -> dict[str, dict[Any, list[str]]]:  # noqa: ANN401, as YAML has it
    """The values of each axis, each with its settings; of an axis that is a list, without settings."""
    parsed: dict[str, dict[Any, list[str]]] = {}
    for name, axis in value.items():
        if isinstance(axis, dict):
            parsed[name] = {key: words(settings) for key, settings in axis.items()}
        else:
            parsed[name] = {key: [] for key in axis}
    return parsed


Words = Annotated[tuple[str, ...], BeforeValidator(words)]
Axes = Annotated[dict[str, dict[Any, tuple[str, ...]]], BeforeValidator(axes)]


@dataclass(frozen=True)
class Cost:
    """What a run costs, counted, and remembered by all it depends on: most runs of a plan differ in their training."""

    run: Run

    @property
    def units(self) -> float:
        """Forward units of a step. A teacher's pass counts as one of the net, with guidance as two."""

        def count() -> float:
            run = self.run
            units = cost.forward_units(outline(run), run.objective, run.path, run.data.shape, ref=run.train.ref)
            return self._teacher_passes() + units

        return self._once("units", count)

    def _teacher_passes(self) -> int:
        """Passes of the teacher in a step; 0 where it makes all its pairs before."""
        teacher = self.run.teacher
        if teacher is None or teacher.pairs:
            return 0
        return 1 if teacher.guide.scale == 1 else 2

    @property
    def flops(self) -> float:
        """Operations of a pass, per row."""
        run = self.run
        return self._once("flops", lambda: cost.forward_flops(outline(run), run.objective, run.data.shape))

    @property
    def operations(self) -> float:
        """Operations of a step."""
        return self.run.train.batch * self.units * self.flops

    @property
    def pairs(self) -> float:
        """Forward units, each of a batch, in which a teacher makes pairs of noise and data before the training."""
        pairs = self.run.teacher and self.run.teacher.pairs
        if not pairs:
            return 0.0
        points = self.run.objective.needs.teacher.points
        return pairs.count * pairs.passes(points) / self.run.train.batch

    def _once(self, name: str, count: Callable[[], float]) -> float:
        """A count, remembered by all parts of the run that it depends on."""
        parts = self.run.model_dump_json(include={"data", "net", "objective", "path", "teacher"})
        key = name + parts + repr(self.run.train.ref)
        if key not in COUNTED:
            COUNTED[key] = count()
        return COUNTED[key]


class Arm(Spec):
    """One thing compared with others; with `vary`, one for each combination of values."""

    labels: dict[str, Any]  # its columns in the table
    recipe: str
    by: str | None = None  # a recipe whose objective it trains by
    set: Words = ()
    vary: Axes = Field({})
    name: str = ""  # of its cells, if not its labels
    seeds: tuple[int, ...] | None = None  # if not the scale's
    steps: int | None = None  # the arms after it cost as much as these steps
    share: float = 1.0  # of that cost
    only: dict[str, list[Any]] = Field({})  # the scales, or values of an outer axis, at which there is this arm
    weights: str | None = None  # a cell: it begins from its net, as diffusers saves it; or a folder; may have $seed
    cut: float | None = None  # rad: behind a low-pass that is fitted once (`dumo.nets.lowpass`)


class Scale(Spec):
    """How large a plan is made."""

    set: Words = ()
    vary: Axes = Field({})  # outer axes: all arms for each value; `budget` multiplies the steps
    values: dict[str, Any] = Field({})  # of $names in settings
    recipes: dict[str, str] = Field({})  # those that stand for others here
    arms: tuple[Arm, ...] = ()  # if not the plan's
    seeds: tuple[int, ...] | None = None  # if not each recipe's own
    steps: int | None = None  # of the first arm, if not its recipe's
    cost: Literal["passes", "operations", "steps"] = "steps"


class Plan(Spec):
    """What a figure or table compares."""

    name: str
    title: str
    columns: tuple[str, ...]
    scales: dict[str, Scale]
    arms: tuple[Arm, ...] = ()
    arms_of: str | None = None  # another plan, whose arms follow
    set: Words = ()
    steps_of: str | None = None  # the recipe whose steps are counted, if not the first arm's
    samples: bool = False  # whether what arms make in one pass is drawn
    why: dict[str, str] = Field({})  # by arm: why it is far from the first
    no_paper: str = ""  # why there is no scale `paper`

    def at(self, scale: str) -> Scale:
        """The plan's scale. Raises UserError for one that it does not have."""
        if scale not in self.scales:
            raise UserError(f"{self.name} has no scale '{scale}': {self.no_paper}; it has {' and '.join(self.scales)}")
        return self.scales[scale]

    def cells(self, scale: str) -> "Iterator[Cell]":
        """All runs of the plan, arm by arm, seed by seed."""
        at = self.at(scale)
        for outer, outer_settings in _combinations(at.vary):
            budget = Budget(self, at, outer.get("budget", 1.0))
            for arm in at.arms or self.arms:
                case = {"scale": scale, **outer}
                if not all(case[name] in values for name, values in arm.only.items()):
                    continue
                for inner, inner_settings in _combinations(arm.vary):
                    settings = (*outer_settings, *arm.set, *inner_settings)
                    yield from self._cells(arm, at, budget, outer | inner, settings, scale)

    def _cells(
        self, arm: Arm, at: Scale, budget: "Budget", axes: dict[str, Any], sets: Sequence[str], scale: str
    ) -> "Iterator[Cell]":
        """The runs of one arm, at one value of each axis."""
        recipe = at.recipes.get(arm.recipe, arm.recipe)
        training = training_of(arm.by, recipe) if arm.by else ()
        sets = (*self.set, *at.set, *training, *sets)

        def load_spec(seed: int | None) -> Run:
            values = {**at.values, **axes, "seed": seed}
            return resolve(load_recipe(recipe, [Template(text).safe_substitute(values) for text in sets]))

        seeds = arm.seeds or at.seeds or (None,)
        run = load_spec(seeds[0])
        steps = budget.steps(Cost(run), run.train.steps, arm, smoke=scale == "smoke")
        labels = {name: axes.get(name, arm.labels.get(name)) for name in self.columns} | {"steps": steps}
        if at.cost != "steps":
            labels["F_per_step"] = round(Cost(run).units, 2)
        name = arm.name or _cell_name(labels, axes)
        depends_on_seed = any("$seed" in text for text in sets)
        for seed in seeds:
            if depends_on_seed:
                run = load_spec(seed)
            if seed is None:
                seed = run.train.seed
            train = run.train.model_copy(update={"steps": steps, "seed": seed})
            weights = arm.weights and Template(arm.weights).safe_substitute(seed=seed)
            yield Cell(f"{name}-{seed}", run.model_copy(update={"train": train}), labels, weights, arm.cut)


class Budget:
    """What each arm may cost: the first arm sets it, by its steps."""

    def __init__(self, plan: Plan, at: Scale, times: float) -> None:
        """`times` the steps of the scale."""
        self.at = at
        self.times = times
        self.total = 0.0  # of the first arm, once it is known
        if plan.steps_of:
            run = load_recipe(plan.steps_of, [*at.set])
            self.total = round(times * (at.steps or run.train.steps)) * self.each(Cost(run))

    def each(self, cost: Cost) -> float:
        """What a step costs, by the scale's own measure."""
        return cost.operations if self.at.cost == "operations" else cost.units

    def steps(self, cost: Cost, own: int, arm: Arm, *, smoke: bool) -> int:
        """How many steps of a run cost as much; `own` are those of its recipe."""
        if self.at.cost == "steps":
            return self.at.steps or own
        if arm.steps or not self.total:
            first = None if smoke else arm.steps
            self.total = round(self.times * (first or self.at.steps or own)) * self.each(cost)
        return round((arm.share * self.total - cost.pairs) / self.each(cost))


@dataclass(frozen=True)
class Cell:
    """One run of a plan: its name, its spec, and its columns in the table."""

    name: str
    spec: Run
    labels: dict[str, Any]
    weights: str | None = None  # as of its arm, of this seed
    cut: float | None = None


def _combinations(axes: Mapping[str, Mapping[Any, tuple[str, ...]]]) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Every combination of values, with its settings."""
    for values in product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        yield chosen, [word for name, value in chosen.items() for word in axes[name][value]]


def _cell_name(labels: Mapping[str, Any], axes: Mapping[str, Any]) -> str:
    """A name for the cells of an arm, of those of its labels that are texts or values of axes."""
    parts: list[str] = []
    for name, value in labels.items():
        if name in axes or isinstance(value, str):
            parts.append(f"{value:g}" if isinstance(value, float) else str(value))
    return slug("-".join(parts))


def slug(text: str) -> str:
    """A text as the name of a folder."""
    return re.sub(r"[^\w.]+", "-", text.lower()).strip("-")


@cache
def training_of(recipe: str, host: str) -> tuple[str, ...]:
    """What makes the recipe `host` train as `recipe`: objective, path, preconditioning, theta^- and solver.

    Dropped labels and guidance, if both objectives have them, stay the host's; so do its data, net and training.
    """
    host_tree = load_recipe(host).model_dump(mode="json")
    other_tree = load_recipe(recipe).model_dump(mode="json")
    objective = other_tree["objective"]
    for name in ("drop", "guide"):
        if name in objective and name in host_tree["objective"]:
            objective[name] = host_tree["objective"][name]
    parts = {
        "objective": objective,
        "path": other_tree["path"],
        "train.ref": other_tree["train"]["ref"],
        "sample.solver": other_tree["sample"]["solver"],
    }
    precondition = other_tree["net"].get("precondition", "none")
    if host_tree["net"].get("precondition", precondition) != precondition:
        parts["net.precondition"] = precondition
    return tuple(f"{name}={json.dumps(value)}" for name, value in parts.items())


@cache
def sets() -> dict[str, Any]:
    """Named settings."""
    return parse((PLANS / "sets.yaml").read_text(encoding="utf-8"))


def names() -> list[str]:
    """Every plan's name."""
    stems = [file.name.removesuffix(".yaml") for file in PLANS.iterdir()]
    return sorted(stem for stem in stems if stem != "sets")


def read(name: str) -> Plan:
    """A plan. Raises UserError where there is none of this name."""
    require_known("figure or table", name, names())
    tree = parse((PLANS / f"{name}.yaml").read_text(encoding="utf-8"))
    tree.pop("let", None)  # anchors
    for part in (tree, *tree["scales"].values()):
        part["arms"] = [_with_labels(arm, tree["columns"]) for arm in part.get("arms", ())]
    plan = Plan(name=name, **tree)
    if plan.arms_of is None:
        return plan
    own_labels = {tuple(arm.labels.values()) for arm in plan.arms}
    other_arms = [arm for arm in read(plan.arms_of).arms if tuple(arm.labels.values()) not in own_labels]
    return plan.model_copy(update={"arms": (*plan.arms, *other_arms)})


def _with_labels(arm: dict[str, Any], columns: list[str]) -> dict[str, Any]:
    """An arm, its columns in a mapping of their own."""
    labels = {name: arm[name] for name in columns if name in arm}
    return {"labels": labels, **{name: value for name, value in arm.items() if name not in columns}}
