"""What the lab draws by way of other programs."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import trap
from dumo.lab import ours


class Ended(Exception):  # noqa: N818, it is no error
    """The program has run."""


@pytest.mark.slow
def test_no_module_of_the_working_folder_is_imported_by_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = subprocess.run

    def run_help(command: list[str], check: bool) -> None:
        run([*command[:-2], "--help"], check=check, stdout=subprocess.DEVNULL)
        raise Ended

    trap.lay(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ours.subprocess, "run", run_help)
    result = cast(Any, SimpleNamespace(trained=SimpleNamespace(folder=tmp_path / "run")))
    with pytest.raises(Ended):
        ours.sample_by_diffusers(result, tmp_path / "exported")
    assert trap.sprung(tmp_path) == []
