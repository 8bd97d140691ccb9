"""Numbers that pages say are those that are counted, or stored."""

import json
import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import beta

import dumo
from contract.case import kind, members
from dumo.config.load import load
from dumo.flow.guide import Guide
from dumo.flow.path import Linear, Trig
from dumo.flow.slope import CentralSlope, DualSlope
from dumo.flow.times import Beta, Dyadic, LogitNormal, Pair
from dumo.nets import DiT
from dumo.objectives import DuMo, Objective
from dumo.run.examination import example_point, slope_errors
from dumo.run.flops import forward_units
from dumo.types import Frozen, Spec
from tiers import tiered

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/objectives"
SHAPE = (4, 4, 4)
DEPTH = 500  # blocks, so that what is not a block hardly counts
OBJECTIVES = members(Objective)


@cache
def table() -> dict[str, tuple[str, ...]]:
    """The table of docs/objectives/index.md: the cells that follow the kind, by kind."""
    lines = (PAGES / "index.md").read_text(encoding="utf-8").splitlines()
    rows = [
        [cell.strip() for cell in line.split(" | ")] for line in lines if re.match(r"\| \[.*details.md#\w+\) \|", line)
    ]
    return {row[1].strip("`"): tuple(row[2:]) for row in rows}


@cache
def sections() -> dict[str, str]:
    """The sections of docs/objectives/details.md, by kind."""
    _, *found = re.split(r"^## (\w+)$", (PAGES / "details.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(found[::2], found[1::2], strict=True))


def told(name: str) -> tuple[float, float | None]:
    """What a step costs by the table, unguided and guided; None where it says no number."""
    plain, guided = table()[name][:2]
    return float(plain), float(guided) if guided[0].isdigit() else None


def counted(cls: type[Spec], *, guided: bool) -> float | None:
    """What a step costs with all labels kept and the slope that rides; None where guidance is not the objective's."""
    name, fields = kind(cls), cls.model_fields
    if "guide" in fields:
        guidance: dict[str, object] = {"guide": Guide(zeta=0.5 if guided else 0)}
    elif "scale" in fields and name != "dmd2":  # which guides with passes of the teacher alone
        guidance = {"scale": 1.5 if guided else 1}
    elif name == "imf":
        guidance = {} if guided else {"w": None}
    elif guided:
        return None
    else:
        guidance = {}
    objective = cls(
        **guidance,
        drop=0,
        **({"slope": DualSlope()} if "slope" in fields and fields["slope"].default is not None else {}),
    )
    with torch.device("meta"):
        net = DiT(width=256, depth=1, attention=1).build(objective.needs, SHAPE, 10)
    net.blocks.extend([net.blocks[0]] * (DEPTH - 1))
    return forward_units(net, objective, Trig() if objective.needs.formulas.paths == ("trig",) else Linear(), SHAPE)


def test_every_objective_has_a_row_and_a_section() -> None:
    assert table().keys() == sections().keys() == {kind(cls) for cls in OBJECTIVES}


@pytest.mark.parametrize("cls", tiered(OBJECTIVES, now=[c for c in OBJECTIVES if kind(c) in ("imm", "dumo")], id=kind))
def test_a_step_costs_what_the_table_says(cls: type[Spec]) -> None:
    """Each night all are counted; else one without a slope, and one with."""
    for number, guided in zip(told(kind(cls)), (False, True), strict=True):
        assert counted(cls, guided=guided) == (number and pytest.approx(number, abs=0.015))


@pytest.mark.parametrize("name", sorted(kind(cls) for cls in OBJECTIVES))
def test_a_section_says_what_the_table_says(name: str) -> None:
    plain, guided = told(name)
    said = re.search(r"[Aa] step costs \*\*([\d.]+) F\*\*(?:, or \*\*([\d.]+) F\*\* with guidance)?", sections()[name])
    assert said
    assert (float(said[1]), said[2] and float(said[2])) == (plain, guided)


@pytest.mark.parametrize("name", sorted(kind(cls) for cls in OBJECTIVES))
def test_a_section_trains_its_objective(name: str) -> None:
    lines = sections()[name].replace("\\\n", "")
    recipes = re.findall(r"^dumo train ([\w-]+)(?!.*objective=)", lines, re.MULTILINE)
    assert recipes
    assert {load(recipe).objective.kind for recipe in recipes} == {name}


@pytest.mark.nightly
def test_tables_are_those_of_the_results() -> None:
    tables = runpy.run_path(str(ROOT / "docs/tables.py"))
    pages = [path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]]
    assert {place["name"] for text in pages for place in tables["PLACE"].finditer(text)} == {*tables["TABLES"]}
    for text in pages:
        assert tables["with_tables"](text) == text, "python docs/tables.py writes it again"
    results = (ROOT / "docs/reproduce.md").read_text(encoding="utf-8")
    assert tables["with_tables"](results.replace("|10.18|", "|10.19|")) == results


def pages() -> list[str]:
    """README and the pages."""
    return [path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]]


def test_no_bold_number_is_worse_known_than_to_a_quarter() -> None:
    bold = [pair for text in pages() for pair in re.findall(r"\*\*(\d[\d.]*)&nbsp;±&nbsp;([\d.]+)\*\*", text)]
    assert len(bold) > 50
    for value, error in bold:
        assert float(error) <= 0.25 * float(value) + 0.007, (value, error)  # both are rounded


@pytest.mark.parametrize(
    ("row", "count"),
    [
        ("|[sCT](", "1 of 3"),
        ("|[DuMo + Shortcut](", ""),
    ],
)
def test_failed_seeds_have_a_column(row: str, count: str) -> None:
    lines = (ROOT / "docs/reproduce.md").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(row)]
    assert line.split("|")[-2] == count


def test_a_table_without_failed_seeds_has_no_column_of_them() -> None:
    tables = runpy.run_path(str(ROOT / "docs/tables.py"))
    table = tables["Table"](["a"])
    table.add("1")
    table.add("2")
    assert [*table.lines()] == ["|a|", "|---|", "|1|", "|2|"]
    table.add("3", failed="1 of 3")
    assert [*table.lines()] == ["|a|failed seeds|", "|---|---|", "|1||", "|2||", "|3|1 of 3|"]


def share_above(law: LogitNormal, x: torch.Tensor) -> torch.Tensor:
    """P(t > x)."""
    return torch.special.ndtr((law.mean - x.logit()) / law.std)


def share_far(law: Pair, *, least: float = 0.9) -> float:
    """P(t - r > 0.9) of rows that may move, by the trapezoidal rule over r."""
    later, earlier = law.of, law.to or law.of
    assert isinstance(later, LogitNormal)
    assert isinstance(earlier, LogitNormal)
    r = torch.linspace(1e-9, 1 - least - 1e-9, 200_001, dtype=torch.float64)
    normal = torch.distributions.Normal(earlier.mean, earlier.std)
    density = normal.log_prob(r.logit()).exp() / (r * (1 - r))
    both_orders = 1 if law.to else 2  # a pair of one law is sorted
    return both_orders * torch.trapezoid(density * share_above(later, r + least), r).item()


def pair_of(recipe: str) -> Pair:
    """The timestep distribution of a recipe that draws pairs."""
    law = getattr(load(recipe).objective, "times", None)
    assert isinstance(law, Pair)
    return law


def said(kind: str, pattern: str) -> float:
    """A number of a section, in its notation: 0.59, or 4 · 10⁻⁶."""
    match = re.search(pattern, sections()[kind])
    assert match, pattern
    digits, _, power = match[1].partition(" · 10⁻")
    return float(digits) * 10.0 ** -int(power.translate(str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")) or 0)


def test_shares_of_rows_are_those_of_the_distributions() -> None:
    beta_times = DuMo().times
    assert isinstance(beta_times, Beta)
    late = float(beta.sf(0.9, beta_times.a, beta_times.b))
    assert said("dumo", r"t > 0\.9 for ([\d.]+) % of training samples") == pytest.approx(100 * late, rel=0.03)

    meanflow = pair_of("digits-meanflow")
    assert isinstance(meanflow.of, LogitNormal)
    one = share_above(meanflow.of, torch.tensor(0.9, dtype=torch.float64)).item()
    rest = meanflow.velocity_ratio
    later_of_two = 1 - (1 - one) ** 2
    late = rest * one + (1 - rest) * later_of_two
    assert said("dumo", r"for ([\d.]+) % with MeanFlow's distribution") == pytest.approx(100 * late, rel=0.01)
    assert said("meanflow", r"t − r > 0\.9 for (\S+ · \S+) of training samples") == pytest.approx(
        (1 - rest) * share_far(meanflow), rel=0.15
    )


@pytest.mark.parametrize(
    ("kind", "recipe", "pattern", "unit"),
    [
        ("imf", "digits-imf", r"t − r > 0\.9 for (\S+ · \S+) of training samples", 1),
        ("soflow", "digits-soflow", r"which the recipe uses, for ([\d.]+) % of all samples", 100),
    ],
)
def test_far_jumps_of_recipes_are_as_rare_as_told(kind: str, recipe: str, pattern: str, unit: float) -> None:
    law = pair_of(recipe)
    share = (1 - law.velocity_ratio) * share_far(law)
    assert said(kind, pattern) == pytest.approx(unit * share, rel=0.15)


def test_far_jumps_of_soflow_on_imagenet_are_as_rare_as_told() -> None:
    law = kinds()["soflow"]().times
    assert said("soflow", r"t − r > 0\.9 for (\S+ · \S+) of the samples with r < t") == pytest.approx(
        share_far(law), rel=0.03
    )


def kinds() -> dict[str, Any]:
    """The classes of objectives, by kind."""
    return {kind(cls): cls for cls in OBJECTIVES}


def test_the_whole_jump_of_shortcut_is_as_rare_as_told() -> None:
    assert "One training sample in 56 trains the whole jump" in sections()["shortcut"]
    assert Dyadic.levels * Dyadic.every == 56


def test_rounding_grows_as_the_sections_say() -> None:
    for name in ("soflow", "rcgm"):
        assert said(name, r"Rounding errors grow up to (\d+) times") == kinds()[name]().needs.amplifies
    assert "3,200 times in the recipe" in sections()["soflow"]
    assert load("digits-soflow").objective.needs.amplifies == pytest.approx(3200)


@pytest.mark.nightly
def test_central_differences_err_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the trained models that come with dumo, against float64: relative, in the l2 norm over 16 points."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/mathematics.md").read_text(encoding="utf-8")
    for name in ("digits-trained", "cifar10-trained"):
        told = re.search(rf"([\d.]+) · 10⁻³ \(u of `{name}`\)", page)
        assert told
        run = dumo.load(name)
        objective = run.spec.objective.model_copy(update={"slope": CentralSlope()})
        point = example_point(objective, run.spec.path, run.spec.data, 0, 16)
        errors = slope_errors(objective, run.net, Frozen(run.net), point)
        assert errors["u"].item() == pytest.approx(1e-3 * float(told[1]), abs=0.06e-3)
        assert all(4e-4 < error < 3e-3 for error in errors.values())


@pytest.mark.nightly
def test_costs_of_xl2_are_those_of_the_page() -> None:
    page = (ROOT / "docs/mathematics.md").read_text(encoding="utf-8")
    assert "That is 5.05 F for XL/2 at 256 tokens, and 6 F with `central`" in page
    for slope, told in (("dual", 5.05), ("central", 6.0)):
        run = load(
            "imagenet256-xl2-routed",
            ["net.route=null", "objective.drop=0", f"objective.slope.kind={slope}", "train.precision=fp32"],
        )
        assert units(run) == pytest.approx(told, abs=0.005)


@pytest.mark.nightly
def test_routed_costs_are_those_of_the_module() -> None:
    text = (ROOT / "src/dumo/nets/route.py").read_text(encoding="utf-8")
    told = re.search(r"([\d.]+) F dense, ([\d.]+) with half of them, ([\d.]+) with a quarter", text)
    assert told
    settings = (["net.route=null"], [], ["net.route.share=0.75"])
    for setting, number in zip(settings, told.groups(), strict=True):
        assert units(load("imagenet256-xl2-routed", setting)) == pytest.approx(float(number), abs=0.005)


def units(run: Any) -> float:  # noqa: ANN401, a Run
    """What a step of a run costs, in F."""
    with torch.device("meta"):
        net = run.net.build(run.objective.needs, run.data.shape, run.data.classes)
    return forward_units(net, run.objective, run.path, run.data.shape)


def test_numbers_of_the_gpu_are_those_of_its_file() -> None:
    text = (ROOT / "tools/gpu.json").read_text(encoding="utf-8")
    rows = [*json_rows(json.loads(text))]
    off = {row["slope"]: row["du/dt off"] for row in rows if row.get("slope") and row.get("du/dt off")}
    assert "its error is 1.4 times du/dt" in (ROOT / "docs/mathematics.md").read_text(encoding="utf-8")
    assert off["central"] == pytest.approx(1.4, abs=0.05)
    guarantees = (ROOT / "docs/guarantees.md").read_text(encoding="utf-8")
    assert "Measured on one GPU, the peak was [82 to 99 %]" in guarantees
    taken = [row["measured / planned"] for row in rows if row.get("measured / planned")]
    assert (round(100 * min(taken)), round(100 * max(taken))) == (82, 99)
    assert "du/dt in bf16 was within 0.006 of float64" in guarantees
    exact = [row["du/dt off"] for row in rows if row.get("du/dt off") and row.get("slope") != "central"]
    assert max(exact) < 0.006


def json_rows(value: Any) -> Any:  # noqa: ANN401, of a file
    """All objects of a JSON file."""
    if isinstance(value, dict):
        yield value
        value = [*value.values()]
    if isinstance(value, list):
        for part in value:
            yield from json_rows(part)
