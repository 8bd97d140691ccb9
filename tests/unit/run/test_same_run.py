"""A checkpoint owns its run: each field of run.yaml is as it was trained, or is free to change."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from dumo.config.difference import config_hash
from dumo.config.load import RUN_FILE, dump, load
from dumo.config.source import HASH_KEY, RESOLVED_KEY
from dumo.config.spec import Run
from dumo.io.tensor_files import facts_of
from dumo.io.yaml import yaml_text
from dumo.run.folder import RunFolder
from dumo.run.trained import TrainedRun
from dumo.run.weights import load_run
from dumo.types import UserError
from trained import train
from unit.run import known
from unit.run.known import claim

EMA = "[{decay: 0.9}, {kind: power, std: 0.1}]"
LAST = "checkpoints/step-00000004"
PHOTOS = "evaluate.protocol={kind: photos, samples: 20}"
# For fields of which no other value can be guessed: values of them, and of others that they go with.
OTHERS = {
    "train.weights": ["train.weights=bfloat16", "train.optimizer.kind=adamw8bit", "train.precision=bf16"],
    "data.kind": [
        "data={kind: images, root: ., side: 8, classes: 10}",
        "evaluate.protocol={kind: photos, samples: 20}",
    ],
    "net.kind": ["net={kind: unet, width: 32}"],
    "net.precondition": ["net.precondition=edm"],
    "objective.kind": ["objective.kind=flow_matching", "sample.solver.kind=euler"],
    "objective.times.kind": ["objective.times.kind=logit_normal"],
    "objective.slope.kind": ["objective.slope.kind=jvp"],
    "path.kind": ["objective.kind=sct", "path.kind=trig", "sample.solver.kind=restart"],
    "teacher": ["teacher.source=."],
    "start": ["start.source=."],
    "train.coupling": ["train.coupling.group=2"],
    "train.compile": ["train.compile=blocks"],
    "train.precision": ["train.precision=bf16"],
    "train.schedule.kind": ["train.schedule.kind=wsd"],
    "train.ema": ["train.ema=[{kind: power, std: 0.1}, {decay: 0.5}]"],
    "train.optimizer.betas": ["train.optimizer.betas=[0.9, 0.9]"],
    "train.optimizer.kind": ["train.optimizer.kind=adam"],
    "train.ref": ["train.ref=0.9"],
    "sample.solver.kind": ["sample.solver.kind=euler"],
    "evaluate.best": ["evaluate.best=true", "evaluate.every=2"],
    "evaluate.protocol.kind": [PHOTOS],
}
ALONE = ("sample.knobs", "evaluate.captions")  # have one value in this run


def tiny(*more: str) -> Run:
    """Digits in no time."""
    return known.tiny("digits", "net.attention=2", "objective.drop=0.1", f"train.ema={EMA}", *more)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, with checkpoints of 2 and 4. Not to be written to."""
    train(tiny("train.milestones=[2]"), folder := tmp_path_factory.mktemp("origin") / "run")
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "run")


def edit(folder: Path, *fields: str) -> None:
    """Change run.yaml as by hand."""
    changed = load(str(folder), fields)
    (folder / RUN_FILE).write_text(dump(changed))


def leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The fields that hold no others, and what they hold."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def guesses(value: object) -> Iterator[object]:
    """Other values that a field may have."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (2 * value, value + 1, value - 1, 2, 0.5)
    elif isinstance(value, float):
        yield from (value / 2, value * 0.9 + 0.01, 2 * value)
    elif isinstance(value, list):
        yield from (value[1:], [*value, 3], [3], [0.25])
    elif isinstance(value, dict):
        yield {"u": 1.0}
    elif value is None:
        yield from (2, 0.5, "bf16", "linear")
    else:
        yield from (f"{value}x", "b", 2, 0.5)


def marked(run: Run, field: str, mark: str) -> bool:
    """Whether a field, or one that it is a part of, has a mark."""
    part: Any = run
    for name in field.split("."):
        extra = type(part).model_fields[name].json_schema_extra
        if isinstance(extra, dict) and extra.get(mark):
            return True
        part = getattr(part, name)
    return False


def samples(folder: Path, base: Run) -> Tensor:
    """Of its weights as they are read now, drawn in one way."""
    net = load_run(str(folder), device="cpu").net
    return TrainedRun(base, RunFolder(folder), net).make_samples(torch.tensor([3, 7]), nfe=1).x


def other(folder: Path, field: str, value: object) -> Run:
    """Write another valid value into a field of run.yaml; return what it says then."""
    guessed = [[f"{field}={yaml_text(guess)}"] for guess in guesses(value) if guess != value]
    for sets in [OTHERS[field]] if field in OTHERS else guessed:
        try:
            changed = load(str(folder), sets)
        except UserError:
            continue
        (folder / RUN_FILE).write_text(dump(changed))
        return changed
    pytest.fail(f"no other value is known of {field}, which is {value}")


@pytest.mark.slow
def test_every_field_of_run_yaml_is_compared_or_makes_no_difference(run: Path) -> None:
    base, text = load(str(run)), (run / RUN_FILE).read_text()
    wanted, seen = samples(run, base), dict[str, list[str]]()
    tree = yaml.safe_load(text)
    for field, value in leaves(
        {name: part for name, part in tree.items() if name not in ("format", HASH_KEY, RESOLVED_KEY)}
    ):
        if field in ALONE:
            continue
        (run / RUN_FILE).write_text(text)
        changed = other(run, field, value)
        free, changes = (marked(base, field, mark) for mark in ("free", "changes"))
        seen.setdefault("free" if free else "changes" if changes else "fixed", []).append(field)
        if free or changes:
            claim(changed, run)
            if free:
                assert torch.equal(samples(run, base), wanted), field
            continue
        words = rf"(?s)step-00000004.* belongs to a different run:.*\n  {field.removesuffix('.kind')}"
        with pytest.raises(UserError, match=words):
            load_run(str(run), device="cpu")
        with pytest.raises(UserError, match=words):
            claim(changed, run)
    assert {"net.time_scale", "objective.kind", "train.batch", "train.seed"} <= {*seen["fixed"]}
    assert {"train.optimizer.lr", "train.clip", "train.precision"} <= {*seen["changes"]}
    assert {"about", "train.steps", "sample.seed"} <= {*seen["free"]}


def test_an_edited_run_yaml_is_refused_by_all(run: Path) -> None:
    edit(run, "net.time_scale=2")
    for use in (lambda: load_run(run), lambda: train(load(str(run)), run)):
        with pytest.raises(UserError, match=r"net\.time_scale: .* recorded, 2\.0 requested"):
            use()


def test_a_run_that_is_damaged_in_its_checkpoint_is_as_any_damage(run: Path) -> None:
    file = run / LAST / "run.yaml"
    file.write_text(file.read_text().replace("batch: 4", "batch: 6"))
    with pytest.warns(UserWarning, match=r"run\.yaml is damaged: .*using the previous checkpoint step-00000002"):
        assert load_run(str(run)).step == 2


@pytest.mark.slow
def test_weights_say_whose_they_are(run: Path, tmp_path: Path) -> None:
    train(tiny("train.seed=1", "train.milestones=[2]"), tmp_path / "other")
    about = facts_of(run / "milestones/step-00000002.safetensors")
    assert (about["step"], about["run"]) == (2, config_hash(tiny()))
    for place in ("milestones/step-00000002.safetensors", f"{LAST}/net"):
        with pytest.raises(UserError, match="has the weights of another run than"):
            load_run(str(run), weights=str(tmp_path / "other" / place))
        assert load_run(str(tmp_path / "other"), weights=str(tmp_path / "other" / place)).net
    shutil.copy(tmp_path / "other/milestones/step-00000002.safetensors", run / "milestones")
    with pytest.raises(UserError, match="another run"):
        load_run(str(run), weights=str(run / "milestones/step-00000002.safetensors"))
