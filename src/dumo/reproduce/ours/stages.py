"""What is a trained net good for? Objectives that begin from one, each after a first stage that costs as much.

Two first stages, by flow matching and by ECT, and what goes on from them; beside these DuMo and ECT from nothing, for
the cost of both stages. CMT is a start for others: two fifths of its second stage are its teacher's pairs and its own
steps, and DuMo has the rest. Digits as in `dumo.reproduce.ours.best`: some are held out, seeds 1 to 3.
"""

from collections.abc import Iterator

from dumo.config.load import load
from dumo.config.spec import Run
from dumo.reproduce import arm, start
from dumo.reproduce.ours.best import FOLLOWED, ON_DIGITS, SMALL
from dumo.reproduce.ours.setting import Sets
from dumo.reproduce.plan import Cell, Plan, trained_as, units
from dumo.reproduce.start import begins

STEPS = 2000  # of DuMo, whose cost a stage has
FLOW, ECT = "flow-0", "ect-0"  # cells from which others begin
MAPPED = ("evaluate.nfe=[1,2,4]", "evaluate.contrast=[]")
SHARE = 0.4  # of a stage, which a start by CMT has
PAIRS = {"smoke": 8, "laptop": 1024}  # of noise and data, which CMT's teacher makes
FROM_FLOW = begins(FLOW, {"u": "v"})
NOTHING = {"DuMo, from nothing": "digits", "ECT, from nothing": "digits-ect"}
SECOND: dict[str, tuple[str, Sets]] = {  # whose objective, and what else
    "flow matching, then DuMo": ("digits", (FROM_FLOW,)),
    "flow matching, then MeanFlow": ("digits-meanflow", (FROM_FLOW,)),
    "flow matching, then decoupled MeanFlow": ("digits-dmf", (FROM_FLOW,)),
    "flow matching, then AYF": ("digits-ayf", (FROM_FLOW, f"teacher.source={FLOW}")),
    "flow matching, then π-Flow": (
        "digits-pi-flow",
        (f"start.source={FLOW}", f"teacher.source={FLOW}", "evaluate.nfe=[2]"),
    ),
    "ECT, then TCM": ("digits-tcm", (f"start.source={ECT}", "evaluate.nfe=[1,2]")),
}


def cells(scale: str) -> Iterator[Cell]:
    """First stages, of one seed; then second ones, of several."""
    small = (*SMALL, "net.depth=4") if scale == "smoke" else ()
    pairs = f"teacher.pairs.count={PAIRS[scale]}"
    stage = (arm.SMOKE // 2 if small else STEPS) * units(load("digits", small))

    def cell(name: str, title: str, recipe: str, sets: Sets, stages: float = 1.0) -> Cell:
        spec = load(recipe, [*ON_DIGITS.common, *small, *sets])
        count = round((stages * stage - teaching(spec)) / units(spec))
        labels = {"stages": title, "steps": count, "F_per_step": round(units(spec), 2)}
        return Cell(name, trained_as(spec, steps=count, seed=int(name.rpartition("-")[2])), labels)

    yield cell(FLOW, "flow matching", "digits-flow-matching", FOLLOWED)
    yield cell(ECT, "ECT", "digits-ect", MAPPED)
    for seed in (1,) if small else (1, 2, 3):
        for title, recipe in NOTHING.items():
            yield cell(f"{recipe}-alone-{seed}", title, recipe, MAPPED, 2)
        for title, (recipe, sets) in SECOND.items():
            yield cell(f"{recipe}-{seed}", title, recipe, (*MAPPED, *sets))
        title, sets = "flow matching, then CMT", (*MAPPED, FROM_FLOW, f"teacher.source={FLOW}", pairs)
        yield cell(f"digits-cmt-{seed}", title, "digits-cmt", sets)
        yield cell(by_cmt := f"start-{seed}", f"{title} for {SHARE:.0%} of a stage", "digits-cmt", sets, SHARE)
        sets = (*MAPPED, begins(by_cmt, {}))
        yield cell(f"digits-after-{seed}", f"{title}, then DuMo", "digits", sets, 1 - SHARE)


def teaching(spec: Run) -> float:
    """Forward units, each of a batch, in which a teacher makes pairs."""
    pairs = spec.teacher and spec.teacher.pairs
    return pairs.count * pairs.nfe / spec.train.batch if pairs else 0.0


PLAN = Plan(
    "What begins from a trained net, on digits at equal counted cost (ours)",
    cells,
    lambda done: list(arm.averaged(done)),
    finish=start.finish,
    charts=lambda table: {"stages": arm.ranking(PLAN.title, table)},
    unpublished="the paper has no second stages",
)
