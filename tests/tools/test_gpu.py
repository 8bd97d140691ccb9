"""tools/gpu.py runs on a CPU, with everything tiny."""

import json
import sys
from pathlib import Path

import pytest

import gpu


@pytest.mark.nightly
def test_a_smoke_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--out", "gpu.json"])
    gpu.main()
    results = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert {row["dtype"] for row in results["kernel"]} == {"float32", "bfloat16"}
    for row in results["kernel"]:
        assert row["dO off"] < (1e-5 if row["dtype"] == "float32" else 0.02)
    assert [row["waits"] for row in results["waits"]] == [0, 0, 0, 0]
    assert [row["optimizer"] for row in results["optimizer"]] == ["adamw", "adamw8bit", "muon"]
    assert [row["slope"] for row in results["step"]] == ["none", "dual"]
    assert results["step"][1]["du/dt off"] < 0.1
    assert [row["checkpointed"] for row in results["memory"]] == [False, True]
    assert results["training"][0]["step"] == 2
