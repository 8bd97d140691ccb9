"""`dumo grid`: pictures of a finished run as it was, and what cannot be drawn is refused."""

from pathlib import Path

from e2e.shell import TINY, call, sets


def test_grids_of_milestones(here: Path) -> None:
    words = [*TINY, *sets("train.milestones=[0,10]", "train.save_every=10", "train.keep=1")]
    assert call("train", "digits", "--out", "run", *words).code == 0
    done = call("grid", "run", "--nfe", "1,2", "--count", "2", "--steps", "0,20", "--reading", "v")
    names = ("v-step-00000000.png", "v-step-00000020.png", "trajectories.png")
    assert (done.code, done.out.split()) == (0, [f"run/grids/{name}" for name in names])
    done = call("grid", "run", "--classes", "3,7", "--count", "2", "--out", "mine")
    assert (done.code, done.out.split()) == (0, ["mine/classes-u-nfe1-step-00000020.png"])
    assert {path.name for path in (here / "mine").iterdir()} == {"classes-u-nfe1-step-00000020.png"}
    assert call("sample", "run", "--weights", "run/milestones/step-00000010.safetensors", "--nfe", "1").code == 0
