"""A run's log, as its owner looks at it."""

import shutil
from pathlib import Path

from PIL import Image

from e2e.shell import call, refused


def test_the_last_rows_of_runs(trained: dict[str, Path]) -> None:
    done = call("log", trained["digits"], trained["moons"], "--last", 2)
    assert done.code == 0, done
    for word in ("loss", "gradient norm", "learning rate", "images/s", str(trained["digits"]), " 15 ", " 20 "):
        assert word in done.out
    assert " 10 " not in done.out
    rows = call("log", trained["digits"], "--json").json["runs"][str(trained["digits"])]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert {"loss", "parts", "grad_norm", "lr", "speed"} <= rows[-1].keys()


def test_curves_of_one_run_and_of_several(here: Path, trained: dict[str, Path]) -> None:
    shutil.copytree(trained["digits"], "one")
    assert call("log", "one", "--plot").out == "one/log.png\n"
    assert call("log", "one", trained["moons"], "--plot").out == "log.png\n"
    assert call("log", "one", "--plot", "--out", "a/b.png").out == "a/b.png\n"
    assert Image.open("one/log.png").tobytes() == Image.open("a/b.png").tobytes()


def test_a_skipped_step_is_shown(here: Path) -> None:
    Path("run").mkdir()
    skipped = '{"step": 7, "loss": null, "grad_norm": null, "lr": 0.1, "skipped": {"count": 3, "rows": []}}\n'
    Path("run/metrics.jsonl").write_text('{"step": 5, "loss": 0.5, "grad_norm": 1, "lr": 0.1}\n' + skipped)
    out = call("log", "run").out
    assert "skipped for" in out
    assert "3 rows" in out
    Path("run/metrics.jsonl").write_text("")
    assert call("log", "run").out == "run: nothing is logged yet\n"
    refused("log", "run", "--plot", named=("run: nothing is logged yet",))


def test_a_plan_for_ranks(here: Path) -> None:
    words = ("dry", "digits-flow-matching", "--set", "net.width=32", "--set", "net.depth=1", "--ranks", 2)
    facts = call(*words, "--share", 2, "--tflops", 3, "--json").json["cluster"]
    assert (facts["ranks"], facts["share"], facts["fields"], facts["tflops"]) == (2, 2, {}, 3.0)
    done = call(*words, "--share", 2, "--fit", f"{facts['memory']['peak'] // 1024}KiB")
    assert done.code == 0, done
    flat = " ".join(done.out.split())
    assert "so set --set train.micro_batch=8" in flat
    assert "8 rows at a time, in 2 passes a step" in flat
    assert "hours need --tflops" in flat
    refused(*words, "--fit", "much", named=("'much' is no size such as 24GiB",), lines=None)
    refused(*words[:-1], 3, "--share", 2, named=("train.share = 2 does not divide 3 ranks",))
