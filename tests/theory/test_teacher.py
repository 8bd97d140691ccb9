"""A velocity is a velocity, whoever teaches it: at the exact flow, rows that a teacher answers move no head.

Of every objective, and every kind of teacher: another run, whose first head may be a jump; a function; the model under
a net's adapters, untuned, or a few-step run's, as the prior rows of a subject have it.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from contract.case import name, objectives, one_each
from dumo.config.load import load
from dumo.config.teacher_spec import Start, Teacher
from dumo.flow.guide import Guide
from dumo.flow.module import Flow
from dumo.flow.reading import available_readings, teacher_velocity
from dumo.flow.slope import DualSlope
from dumo.objectives import FACM, DuMo, FlowMatching, Objective
from dumo.run.folder import RunFolder
from dumo.run.teacher import base_flow
from dumo.testing.exact import APART, ExactNet, exact_batch
from dumo.types import Frozen, Heads, NoisyBatch, Readings, TeacherVelocity, UserError
from theory.test_fixed_point import BENT, STEPS

ROWS = 12  # half of them are taught; the first are at the corners of time


class UnderAdapters(nn.Module):
    """A net that knows its flow, under adapters that change it; `base()` turns them off."""

    def __init__(self, net: ExactNet) -> None:
        super().__init__()
        self.net = net
        self.on = True

    def forward(self, x: Tensor, c: Tensor, /, **inputs: Tensor) -> Heads:
        heads = self.net(x, c, **inputs)
        return tuple(1 - 2 * head for head in heads) if self.on else heads

    @contextmanager
    def base(self) -> Generator[None]:
        """Without them inside."""
        self.on = False
        yield
        self.on = True


def run_of(objective: Objective) -> TeacherVelocity:
    return teacher_velocity(
        Flow(ExactNet(APART, objective.needs), objective, direct=True, classes=APART.classes).readings()
    )


def of_function() -> TeacherVelocity:
    return teacher_velocity(Readings(velocity=lambda x, t, c: APART.velocity(x, c, t)))


def untuned() -> TeacherVelocity:
    run = load("moons", ["data.labelled=true"])
    return teacher_velocity(
        base_flow(Teacher(kind="base"), run, UnderAdapters(ExactNet(APART, FlowMatching().needs))).readings()
    )


def under_a_subject(folder: Path, monkeypatch: pytest.MonkeyPatch) -> TeacherVelocity:
    run = load("moons", ["data.labelled=true", "objective={kind: facm}", "sample.solver={kind: euler}"])
    RunFolder(folder).write_run(run)
    monkeypatch.setattr(type(run), "has_subject", True)
    subject = run.model_copy(update={"start": Start(source=str(folder))})
    return teacher_velocity(
        base_flow(Teacher(kind="base"), subject, UnderAdapters(ExactNet(APART, FACM().needs))).readings()
    )


TEACHERS: dict[str, Callable[[Path, pytest.MonkeyPatch], TeacherVelocity]] = {
    "flow matching's run": lambda *_: run_of(FlowMatching()),
    "DuMo's run": lambda *_: run_of(DuMo()),
    "FACM's run": lambda *_: run_of(FACM()),
    "a function": lambda *_: of_function(),
    "untuned": lambda *_: untuned(),
    "under a subject": under_a_subject,
}
PUPILS = [o for o in objectives(exact=True, guide=Guide(), drop=0.0) if o.kind not in (*STEPS, *BENT)]
PUPILS = [o for o in PUPILS if o.needs.teacher.velocity != "no" and not o.needs.knobs]
ONE_EACH = [*{o.kind: o for o in PUPILS}.values()]
CASES = [(o, "FACM's run") for o in ONE_EACH] + [
    (DuMo(guide=Guide(), slope=DualSlope()), teacher) for teacher in TEACHERS
]
OTHERS = [(o, teacher) for o in PUPILS for teacher in TEACHERS if (o, teacher) not in CASES]


def label(case: tuple[Objective, str]) -> str:
    return f"{name(case[0])}-{case[1]}"


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.nightly) for case in OTHERS)], ids=label
)
def test_rows_that_a_teacher_answers_move_no_head(
    case: tuple[Objective, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others do: their v_t is one of many."""
    objective, teacher = case
    velocity = TEACHERS[teacher](tmp_path, monkeypatch)
    b = exact_batch(objective, APART, ROWS)
    rows = torch.arange(ROWS) % 2 == 0
    v_t = torch.where(rows[:, None], velocity(b.x_t, b.t, b.c, b.z - b.x), b.z - b.x)
    b = replace(b, v_t=v_t, teacher=velocity, teacher_rows=rows)
    gradients = by_row(objective, b)
    assert gradients[rows].abs().max() < 1e-6, "a row that is taught moves"
    assert gradients[~rows].abs().max() > 1e-3


def by_row(objective: Objective, b: NoisyBatch) -> Tensor:
    """The gradient of each row's loss by what each of its heads is off, (rows, heads)."""
    net = ExactNet(APART, objective.needs)
    found: list[Tensor] = []
    for row in torch.eye(ROWS, dtype=torch.float64):
        net.zero_grad()
        (objective.loss(net, Frozen(net), b).loss * row).sum().backward()
        found.append(net.probe.grad[:, 0].clone())
    return torch.stack(found)


NO_VELOCITY = [o for o in one_each() if available_readings(o).velocity is None]


@pytest.mark.parametrize("objective", NO_VELOCITY, ids=name)
def test_what_has_no_velocity_teaches_none(objective: Objective) -> None:
    with pytest.raises(UserError, match="has no velocity"):
        run_of(objective)
