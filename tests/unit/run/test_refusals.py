"""What a run refuses: one case per row, with the name that the message must contain."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import dumo
from dumo.config.load import load
from dumo.run.fill_caches import captions, encoding_work
from dumo.run.folder import CHECKPOINT_MARK
from dumo.run.judge import reference_data, require_likelihood
from dumo.run.weights import load_run
from dumo.types import UserError
from trained import train
from unit.run.known import tiny

# Takes the folder of a trained run, which it may change, and a folder to write into.
Case = Callable[[Path, Path], object]

# The name that the message of each case must contain.
CASES: dict[Case, str] = {}


def refused(name: str) -> Callable[[Case], Case]:
    """Add a case whose message must contain `name`."""

    def add(case: Case) -> Case:
        CASES[case] = name
        return case

    return add


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on moons of four steps, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(tiny("moons", "train.log_every=1"), folder)
    return folder


# ------------------------------------------------------------------------------------------------ a run's folder


@refused("others")
def a_folder_of_other_files(run: Path, here: Path) -> None:
    (here / "others").mkdir()
    (here / "others/notes.txt").touch()
    train(tiny(), here / "others")


@refused("net.width")
def another_run_in_the_folder(run: Path, here: Path) -> None:
    train(tiny("moons", "net.width=9"), run)


@refused("train.steps=3")
def fewer_steps_than_are_done(run: Path, here: Path) -> None:
    train(tiny("moons", "train.steps=3"), run)


@refused("checkpoints")
def checkpoints_that_were_lost(run: Path, here: Path) -> None:
    assert (run / CHECKPOINT_MARK).exists()
    shutil.rmtree(run / "checkpoints")
    train(tiny(), run)


@refused("train.steps")
def steps_of_a_run_that_ends_by_the_clock(run: Path, here: Path) -> None:
    timed = tiny("moons", "train.minutes=0.0001")
    train(timed, here / "timed")
    train(timed.model_copy(update={"train": timed.train.model_copy(update={"steps": 3})}), here / "timed")


@refused("net.width")
def another_net_to_look_at(run: Path, here: Path) -> None:
    load_run(run, ["net.width=9"])


@refused("no checkpoint")
def a_run_without_checkpoints_to_look_at(run: Path, here: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    load_run(run)


@refused("another run")
def weights_of_another_run(run: Path, here: Path) -> None:
    train(tiny("moons", "train.seed=1"), here / "other")
    load_run(run, weights=str(here / "other/checkpoints/step-00000004/net"))


# ------------------------------------------------------------------------------------------ weights to begin with


@refused("net.depth")
def a_start_of_another_net(run: Path, here: Path) -> None:
    train(tiny("moons", f"start.source={run}", "net.depth=2"), here / "new")


@refused("path")
def a_start_on_another_path(run: Path, here: Path) -> None:
    train(tiny("moons", f"start.source={run}", "path.kind=trig"), here / "new")


@refused("start.heads")
def a_start_without_the_head(run: Path, here: Path) -> None:
    train(tiny("moons", f"start.source={run}", "start.heads.u=w"), here / "new")


# ------------------------------------------------------------------------------------------------------ a teacher


@refused("data.shape")
def a_teacher_of_other_data(run: Path, here: Path) -> None:
    train(tiny("digits", f"teacher.source={run}"), here / "new")


@refused("path.sd")
def a_teacher_of_another_deviation(run: Path, here: Path) -> None:
    train(tiny("moons", "path.sd=0.5", f"teacher.source={run}"), here / "new")


@refused("velocity")
def a_teacher_that_learned_jumps_alone(run: Path, here: Path) -> None:
    train(tiny("moons", "objective={kind: consistency}", "train.steps=1"), here / "jumps")
    train(tiny("moons", f"teacher.source={here / 'jumps'}"), here / "new")


@refused("was started with teacher")
def a_teacher_that_learned_more_since(run: Path, here: Path) -> None:
    taught = f"teacher.source={run}"
    train(tiny("moons", taught, "train.steps=2"), here / "new")
    train(tiny("moons", "train.steps=6"), run)
    train(tiny("moons", taught), here / "new")


@refused("velocity")
def a_function_whose_velocity_has_another_shape(run: Path, here: Path) -> None:
    train(tiny("moons", "teacher.kind=python", "teacher.source=unit.run.known:flat"), here / "new")


@refused("velocity=None")
def a_function_without_a_velocity(run: Path, here: Path) -> None:
    train(tiny("moons", "teacher.kind=python", "teacher.source=unit.run.known:mute"), here / "new")


@refused("not finite")
def pairs_that_are_not_finite(run: Path, here: Path) -> None:
    pairs = ["teacher.kind=python", "teacher.source=unit.run.known:nan", "teacher.pairs.count=6"]
    train(tiny("moons", *pairs), here / "new")


# ------------------------------------------------------------------------------------------- a net of the user's own


class Own(nn.Module):
    """A small net on points, with a module between its layers."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(3, 16)
        self.between = between
        self.last = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, c: torch.Tensor, *, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The heads v and u."""
        h = self.first(torch.cat([x, t[:, None]], 1))
        v, u = self.last(torch.tanh(self.between(h))).chunk(2, 1)
        return v, u


class Centred(nn.Module):
    """Each row depends on all rows of the batch."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """The rows without their mean."""
        return h - h.mean(0)


def train_own(here: Path, between: nn.Module) -> None:
    """Train a net with this module in it."""
    changes = {"train.steps": 2, "train.batch": 8, "evaluate.protocol.samples": 40}
    dumo.train("moons", changes, net=Own(between), out=here / "own", device="cpu")


@refused("two passes")
def a_net_that_draws(run: Path, here: Path) -> None:
    train_own(here, nn.Dropout(0.5))


@refused("running_mean")
def a_net_that_changes_in_a_pass(run: Path, here: Path) -> None:
    train_own(here, nn.BatchNorm1d(16))


@refused("row")
def a_net_whose_rows_mix(run: Path, here: Path) -> None:
    train_own(here, Centred())


# ------------------------------------------------------------------------------------------- sampling and judging


@refused("evaluate.split")
def a_split_of_data_without_splits(run: Path, here: Path) -> None:
    reference_data(load("moons").data, "test")


@refused("guide")
def a_likelihood_under_guidance(run: Path, here: Path) -> None:
    require_likelihood(load_run(run, ["sample.guide.scale=2"]).spec)


@refused("prompt")
def a_blank_prompt(run: Path, here: Path) -> None:
    load_run(run).conditions(prompts=[" "])


@refused("class")
def prompts_for_a_run_without_texts(run: Path, here: Path) -> None:
    load_run("digits-trained").conditions(prompts=["a seven"])


@refused("out of range")
def a_class_that_is_none(run: Path, here: Path) -> None:
    load_run("digits-trained").make_samples(torch.tensor([11]), nfe=1)


# ------------------------------------------------------------------------------------------------------- encoding


@refused("nothing to encode")
def a_recipe_that_needs_no_encoding(run: Path, here: Path) -> None:
    encoding_work("digits", out=None, codec=None, side=None)


@refused("captions")
def captions_of_data_without_any(run: Path, here: Path) -> None:
    captions(load("moons").data)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_it_is_refused_by_name(case: Case, trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(UserError) as caught:
        case(run, tmp_path)
    assert CASES[case] in str(caught.value)
