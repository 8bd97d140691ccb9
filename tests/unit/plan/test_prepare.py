"""`dumo.train` takes data, a net and an objective as they lie in a notebook, and says what does not fit."""

import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import dumo
from dumo.cli.api import LoadedRun
from dumo.data import Digits, Moons
from dumo.data import in_memory as of_data
from dumo.flow.guide import Guide
from dumo.nets import user_module as of_nets
from dumo.objectives import FlowMatching, MeanFlow
from dumo.plan.prepare import prepare
from dumo.runtime import signals
from dumo.runtime.progress import no_bar
from dumo.training.metrics import StepMetrics
from dumo.training.state import State
from e2e.shell import call
from tiers import tiered

UNGUIDED = Guide(omega=1, zeta=0)
STEPS = {"train.steps": 2}
COLOURS = np.random.default_rng(0).integers(0, 256, (24, 3, 16, 16), dtype=np.uint8)
CLASSES = np.arange(24) % 3


class Net(nn.Module):
    """Two heads on one layer; with classes."""

    def __init__(self, numbers: int, classes: int, heads: int = 2, *, bare: bool = False) -> None:
        super().__init__()
        self.label = nn.Embedding(classes + 1, 8)
        self.first, self.last = nn.Linear(numbers + 1, 8), nn.Linear(8, heads * numbers)
        self.heads, self.bare = heads, bare

    def forward(self, x: Tensor, c: Tensor, t: Tensor) -> tuple[Tensor, ...] | Tensor:
        h = torch.tanh(self.first(torch.cat([x.flatten(1), t[:, None]], 1)) + self.label(c))
        heads = tuple(part.view_as(x) for part in self.last(h).chunk(self.heads, 1))
        return heads[0] if self.bare else heads


def train(tmp_path: Path, **parts: Any) -> LoadedRun:  # noqa: ANN401
    parts.setdefault("overrides", STEPS)
    return dumo.train(out=tmp_path / "run", device="cpu", **parts)


def test_an_array_and_a_module_make_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = Net(3 * 16 * 16, 3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    run = train(tmp_path, data=(COLOURS, CLASSES), net=net)
    assert run.spec.net.kind == "module"
    assert run.spec.data.classes == 3
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()), "a copy is trained"
    assert any(not torch.equal(value, before[name]) for name, value in run.net.state_dict().items())
    assert run.sample(labels=[0, 2], output="np").shape == (2, 16, 16, 3)
    assert run.evaluate(nfe=1)["protocol"].startswith("photos")
    assert run.report().is_file()

    for memory in ((of_nets, "MODULES"), (of_data, "SOURCES")):  # as in another process
        monkeypatch.setattr(*memory, {})
    with pytest.raises(dumo.UserError, match=r"the Python module .*test_prepare:Net"):
        dumo.load(tmp_path / "run")
    opened = dumo.load(tmp_path / "run", net=Net(3 * 16 * 16, 3))
    assert torch.equal(opened.sample(count=2), run.sample(count=2)), "of the run's weights, not of the module's"
    with pytest.raises(dumo.UserError, match=r"pass it again in Python, dumo.train\(RUN, data=...\)"):
        opened.evaluate(nfe=1)
    longer = train(tmp_path, data=(COLOURS, CLASSES), net=Net(3 * 16 * 16, 3), overrides={"train.steps": 4})
    assert longer.step == 4
    with_its_data = dumo.train(tmp_path / "run", {"train.steps": 5}, data=(COLOURS, CLASSES), device="cpu")
    assert (with_its_data.folder, with_its_data.step) == (tmp_path / "run", 5)
    with pytest.raises(dumo.UserError, match=r"differ from those the run was trained on"):
        dumo.train(tmp_path / "run", data=(COLOURS[::-1].copy(), CLASSES), device="cpu")


@pytest.mark.slow
def test_other_data_or_another_layout_are_another_run(tmp_path: Path) -> None:
    train(tmp_path, data=(COLOURS, CLASSES), net=Net(3 * 16 * 16, 3))
    with pytest.raises(dumo.UserError, match=r"net\.layout"):
        train(tmp_path, data=(COLOURS, CLASSES), net=Net(3 * 16 * 16, 5))
    with pytest.raises(dumo.UserError, match="data"):
        train(tmp_path, data=(COLOURS[::-1].copy(), CLASSES), net=Net(3 * 16 * 16, 3), overrides={"train.steps": 4})


@pytest.mark.parametrize(
    ("net", "error", "named"),
    [
        (Net(768, 3, heads=1), dumo.UserError, r"\(v, u\)"),
        (Net(768, 3, bare=True), dumo.UserError, r"\(v, u\)"),
        (Net(768, 2), IndexError, "out of range"),
        (Net(700, 3), RuntimeError, "shapes"),
        (nn.ReLU(), dumo.UserError, "ReLU"),
        (3, dumo.UserError, "net is a int"),
        ("dti", dumo.UserError, r"net\.kind"),
    ],
)
def test_a_net_that_does_not_fit_is_refused_before_anything_is_written(
    net: object, error: type[Exception], named: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=named):
        train(tmp_path, data=(COLOURS, CLASSES), net=net)
    assert not (tmp_path / "run").exists()


PARTS: list[tuple[dict[str, Any], str, str, str]] = [
    ({"objective": "meanflow"}, "meanflow", "digits", "hop"),
    ({"objective": "flow_matching", "data": "moons"}, "flow_matching", "moons", "heun"),
    ({"objective": "alpha_flow", "data": Moons()}, "alpha_flow", "moons", "hop"),
    ({"objective": MeanFlow(guide=UNGUIDED), "data": COLOURS}, "meanflow", "memory", "hop"),
    ({"source": "moons", "objective": FlowMatching()}, "flow_matching", "moons", "euler"),
    ({"source": "moons", "objective": "dumo"}, "dumo", "moons", "restart"),
    ({"data": Digits()}, "dumo", "digits", "restart"),
    ({"data": np.zeros((8, 2), dtype=np.float32)}, "dumo", "memory", "restart"),
    ({"source": "digits", "data": COLOURS[:, 0, :8, :8]}, "dumo", "memory", "restart"),
]


@pytest.mark.parametrize(
    ("parts", "objective", "data", "solver"),
    tiered(PARTS, ci=PARTS[2:3], id=lambda case: "-".join(case[1:])),
)
def test_parts_find_what_they_are_trained_with(
    parts: dict[str, Any], objective: str, data: str, solver: str, tmp_path: Path
) -> None:
    spec = train(tmp_path, **parts).spec
    assert (spec.objective.kind, spec.data.kind, spec.sample.solver.kind) == (objective, data, solver)


def test_the_folder_of_a_run_is_read_where_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{")  # no YAML
    settings: dict[str, Any] = {"net": None, "device": "cpu", "bar": no_bar}
    prepared = prepare(tmp_path, ["train.steps=3"], None, objective=None, data=None, **settings)
    assert (prepared.path, prepared.run, prepared.changes) == (tmp_path, None, ["train.steps=3"])


def test_a_recipe_is_compared_with_the_run_in_its_folder_as_on_the_command_line(tmp_path: Path) -> None:
    small = {"net.width": 16, "net.depth": 1, "train.batch": 8}
    run = train(tmp_path, source="moons", overrides=small | STEPS)
    sets = ["net.width=16", "net.depth=1", "train.batch=16", "train.steps=4"]
    other = small | {"train.batch": 16, "train.steps": 4}
    refused = call("train", "moons", "--out", run.folder, "--device", "cpu", *sets)
    with pytest.raises(
        dumo.UserError, match=r"belongs to a different run:\n  train\.batch: 8 recorded, 16 requested"
    ) as error:
        train(tmp_path, source="moons", overrides=other)
    assert refused.code == 2
    assert refused.err.splitlines()[:2] == f"error: {error.value}".splitlines()[:2]
    longer = train(tmp_path, source="moons", overrides=small | {"train.steps": 4})
    assert longer.step == 4
    new = dumo.train(run.folder, other | {"train.steps": 5}, step=4, out=tmp_path / "new", bar=no_bar, device="cpu")
    assert (new.step, new.spec.train.batch) == (5, 16)


@pytest.mark.slow
def test_rows_that_change_are_trained_on_as_they_come(tmp_path: Path) -> None:
    class Brighter:
        reads = 0

        def __len__(self) -> int:
            return 24

        def __getitem__(self, i: int) -> Tensor:
            self.reads += 1
            return torch.from_numpy(COLOURS[i] // 2 + torch.randint(2, ()).item() * 100)

    data = Brighter()
    changes = {"train.steps": 4, "train.batch": 8, "train.save_every": 2}
    run = train(tmp_path, data=data, net=Net(768, 0), overrides=changes)
    assert data.reads >= 24 + 4 * 8, "each step reads its rows"
    assert train(tmp_path, data=Brighter(), net=Net(768, 0), overrides=changes | {"train.steps": 6}).step == 6
    assert run.evaluate(nfe=1)["results"]


@pytest.mark.nightly
def test_a_folder_is_proposed_for_as_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for i, pixels in enumerate(COLOURS):
        Path("photos").mkdir(exist_ok=True)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(f"photos/{i}.png")
    run = dumo.train("photos", STEPS, device="cpu")
    assert run.folder == Path("runs/photos")
    assert run.spec.data.root == str(tmp_path / "photos")
    again = dumo.train(data=Path("photos"), overrides={"train.steps": 3}, device="cpu")
    assert (again.folder, again.step) == (run.folder, 3)


@pytest.mark.slow
def test_callbacks_hear_of_every_step(tmp_path: Path) -> None:
    every = list[tuple[int, float]]()

    def note(state: State, metrics: StepMetrics) -> None:
        every.append((state.step, float(metrics.loss)))

    train(
        tmp_path,
        source="moons",
        overrides={"train.steps": 4},
        callbacks=[note],
    )
    assert [step for step, _ in every] == [1, 2, 3, 4]
    assert all(loss > 0 for _, loss in every)


@pytest.mark.slow
def test_a_callback_stops_the_training_politely(tmp_path: Path) -> None:
    def stop(state: State, metrics: StepMetrics) -> None:
        if state.step >= 2:
            raise dumo.Stop

    small = {"net.width": 16, "net.depth": 1, "train.batch": 8, "train.steps": 6}
    run = train(tmp_path, source="moons", overrides=small, callbacks=[stop])
    assert run.step == 3, "the step after it is the last one, and is saved"
    longer = train(tmp_path, source="moons", overrides=small)
    straight = train(tmp_path / "straight", source="moons", overrides=small)
    assert longer.step == straight.step == 6
    for name, weight in straight.net.state_dict().items():
        assert torch.equal(weight, longer.net.state_dict()[name])
    last = train(tmp_path / "last", source="moons", overrides=small | {"train.steps": 2}, callbacks=[stop])
    assert last.step == 2
    assert signals.received_signal is None


@pytest.mark.slow
def test_a_signal_before_a_stop_is_the_reason(tmp_path: Path) -> None:
    def stop(state: State, metrics: StepMetrics) -> None:
        if state.step == 2:
            signal.raise_signal(signal.SIGINT)
            raise dumo.Stop

    small = {"net.width": 16, "net.depth": 1, "train.batch": 8, "train.steps": 6}
    # A process that a shell started in the background ignores SIGINT, and `listening` leaves it so.
    handler_before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with signals.listening(), pytest.raises(signals.Stopped) as stopped:
            train(tmp_path, source="moons", overrides=small, callbacks=[stop])
    finally:
        signal.signal(signal.SIGINT, handler_before)
    assert stopped.value.number == signal.SIGINT


@pytest.mark.slow
def test_a_training_that_a_callback_ended_is_resumed(tmp_path: Path) -> None:
    def stop(state: State, metrics: StepMetrics) -> None:
        if state.step == 5:
            raise dumo.Stop

    small = {
        "net.width": 16,
        "net.depth": 1,
        "train.batch": 8,
        "train.steps": 9,
        "train.save_every": 2,
        "train.keep": 9,
    }
    steps: list[int] = []

    def note(state: State, metrics: StepMetrics) -> None:
        steps.append(state.step)

    train(tmp_path, source="moons", overrides=small, callbacks=[note, stop])
    assert steps == [1, 2, 3, 4, 5, 6]
    train(tmp_path, source="moons", overrides=small, callbacks=[note])
    assert steps[6:] == [7, 8, 9]


@pytest.mark.slow
def test_a_spec_of_a_run_is_trained_on_other_images(tmp_path: Path) -> None:
    for name, classes in (("a", 2), ("b", 3)):
        for i in range(24):
            folder = tmp_path / name / str(i % classes)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(COLOURS[i].transpose(1, 2, 0)).save(folder / f"{i}.png")
    fields = {"data": {"kind": "images", "root": str(tmp_path / "a"), "side": 16}, "train.steps": 1}
    fields["evaluate.protocol"] = {"kind": "photos", "samples": 24}
    old = dumo.train("digits", fields, out=tmp_path / "old", device="cpu")
    assert old.spec.conditions.count == 2
    new = dumo.train(old.spec, {"data.root": str(tmp_path / "b")}, out=tmp_path / "new", device="cpu")
    assert new.spec.conditions.count == 3


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({}, "nothing to train"),
        ({"objective": "mean flow"}, "objective.kind"),
        ({"objective": 3}, "objective"),
        ({"data": "nowhere"}, "nowhere"),
        ({"data": 3}, "data"),
        ({"source": 3}, "data"),
        ({"data": {"train": COLOURS, "test": COLOURS}}, "data"),
        ({"objective": {"beta": 0.5}}, "objective"),
        ({"source": COLOURS, "data": COLOURS}, "data"),
        ({"source": "moons", "minutes": math.nan}, "minutes"),
    ],
)
def test_what_is_no_part_is_refused(parts: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(dumo.UserError, match=said):
        train(tmp_path, **parts)
    assert not (tmp_path / "run").exists()


def test_parts_of_your_own_need_a_folder() -> None:
    with pytest.raises(dumo.UserError, match='set out="runs/NAME"'):
        dumo.train(data=COLOURS)


@pytest.mark.parametrize("side", [16, 48])
def test_an_array_of_images_is_learned_in_pixels_at_full_size(side: int, tmp_path: Path) -> None:
    """On a CPU by a small network, and by the clock."""
    array = np.random.default_rng(0).integers(0, 256, (24, side, side, 3), dtype=np.uint8)
    settings: dict[str, Any] = {"objective": None, "net": None, "device": "cpu", "bar": no_bar}
    run = prepare(None, [], tmp_path / "run", data=(array, CLASSES), **settings).run
    assert run is not None
    assert (run.data.kind, run.data.shape, run.data.classes) == ("memory", (3, side, side), 3)
    assert (run.net.kind, run.net.attend, run.train.minutes) == ("unet", (side // 4,), 2.8)
    longer = prepare(None, ["net.width=8", "train.minutes=30"], tmp_path / "run", data=array, **settings).run
    assert longer is not None
    assert (longer.net.width, longer.train.minutes) == (8, 30)
