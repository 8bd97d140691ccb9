"""The first ten minutes on a GPU, tiny and on a CPU: every part gives rows, and none takes another along."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gpu
from tiers import tiered

SMOKE = gpu.Setting(torch.device("cpu"), smoke=True)
BY_COMMANDS = ("memory", "commands", "overnight")  # of `dumo`: they run in a smoke run alone
IN_PROCESS = [name for name in gpu.PARTS if name not in BY_COMMANDS]


@pytest.mark.parametrize("name", tiered(IN_PROCESS, now=["sample"], ci=["xl2"]))
def test_a_part_gives_rows(name: str) -> None:
    rows = list(gpu.PARTS[name].rows(SMOKE))
    assert rows
    assert all(row.get("du/dt off") is None or row["du/dt off"] < 1 for row in rows)
    json.dumps(rows)


def test_attention_is_compared_with_float64() -> None:
    rows = list(gpu.attention_kernel(SMOKE))
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert all(row["dO off"] < (1e-5 if row["dtype"] == "float32" else 0.02) for row in rows)


def broken(setting: gpu.Setting) -> Iterator[gpu.Row]:
    yield {"a": 1}
    raise RuntimeError("no such kernel")


def test_rows_before_a_failure_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(gpu.PARTS, "kernel", gpu.Part(60, "fails", broken))
    with pytest.raises(RuntimeError):
        gpu.make_part("kernel", tmp_path / "rows.jsonl", SMOKE)
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == {"a": 1}


def test_a_part_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "hang.py"
    child = "import time, pathlib, sys; time.sleep(2); pathlib.Path(sys.argv[1]).touch()"
    alive = tmp_path / "alive"
    program.write_text(
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}, {str(alive)!r}]); {child}"
    )
    monkeypatch.setattr(gpu, "__file__", str(program))
    began = time.monotonic()
    result = gpu.run_part("kernel", smoke=True, device="cpu", seconds=0.5)
    assert time.monotonic() - began < 30
    assert result["state"].startswith("stopped after")
    assert result["rows"] == []
    time.sleep(2.5)
    assert not alive.exists()  # what it had started ended, too


def test_a_command_that_fails_fails_its_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "part.py"
    program.write_text("import sys; open(sys.argv[3], 'w').write('{\"failed\": \"exit code 2\"}\\n')")
    monkeypatch.setattr(gpu, "__file__", str(program))
    assert gpu.run_part("commands", smoke=True, device="cpu", seconds=60)["state"] == "failed: exit code 2"


def test_what_is_done_is_not_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = list[str]()

    def run_part(name: str, smoke: bool, device: str, seconds: float) -> dict[str, object]:
        made.append(name)
        return {"state": "failed: for a test" if name == "xl2" else "done", "seconds": 1.0, "rows": [{"a": 1.0}]}

    monkeypatch.setattr(gpu, "run_part", run_part)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--out", str(tmp_path)])
    assert gpu.main() == 1
    assert made == [*gpu.PARTS]
    assert gpu.main() == 1
    assert made[len(gpu.PARTS) :] == ["xl2"]  # the one that failed
    monkeypatch.setattr(sys, "argv", ["gpu.py", "kernel", "--smoke", "--out", str(tmp_path)])
    assert gpu.main() == 0
    assert made[-1] == "kernel"  # named, so made again


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    assert "--smoke" in capsys.readouterr().err


def test_an_error_is_found_in_a_trace() -> None:
    trace = "Traceback\n  File x\ntriton.CompilationError: at 11:12:\n def f():\n     ^\n"
    assert gpu.last_error_line(trace) == "triton.CompilationError: at 11:12:"
    assert gpu.last_error_line("") == "it said nothing"
