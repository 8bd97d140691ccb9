"""Guided samples of a run that was trained without, from the command line."""

from pathlib import Path

import numpy as np

from e2e.shell import TINY, call, refused, sets


def test_a_run_is_sampled_at_any_scale(here: Path) -> None:
    run = here / "run"
    assert call("train", "digits-flow-matching", "--out", run, *TINY, *sets("objective.drop=0.1")).code == 0

    def made(name: str, *words: str) -> np.ndarray:
        done = call("sample", run, "--out", here / name, "--format", "npz", "--count", 4, "--nfe", 4, *sets(*words))
        assert done.code == 0, done
        (file,) = (here / name).glob("*.npz")
        with np.load(file) as archive:
            return archive["arr_0"].astype(int)

    plain, strong = made("plain"), made("strong", "sample.guide.scale=4")
    assert np.abs(strong - plain).max() > 0
    assert np.array_equal(made("one", "sample.guide.scale=1"), plain)
    assert np.array_equal(made("never", "sample.guide.scale=4", "sample.guide.interval.high=0.1"), plain)
    assert np.array_equal(made("again", "sample.guide.scale=4"), strong)
    refused("sample", run, *sets("sample.guide.scale=0"), named=("sample.guide.scale", "greater than 0"))
    refused("sample", run, *sets("objective.guide.zeta=0.44"), named=("objective.guide.zeta", "0.44"), lines=None)
