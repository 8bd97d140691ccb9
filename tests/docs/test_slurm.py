"""docs/slurm/train.sh runs as the page says, with stand-ins for Slurm's commands and for the environment."""

import os
import subprocess
from pathlib import Path

import pytest

from docs.page import ROOT

ACTIVATE = "source /shared/dumo/.venv/bin/activate"  # a line marked SITE
PLACES = (("DUMO_DATA", "data"), ("HF_HOME", "huggingface"))
VARIABLES = tuple(name for name, _ in PLACES)


def submitted(folder: Path, **environment: str) -> tuple[list[str], list[str]]:
    """The words that srun is called with, and the values that it sees of VARIABLES."""
    script = (ROOT / "docs/slurm/train.sh").read_text(encoding="utf-8")
    assert ACTIVATE in script
    show = "\n".join(f'echo "${name}"' for name in VARIABLES)
    for name, body in {"srun": f'printf "%s\\n" "$@" > words\n{{\n{show}\n}} > values', "scontrol": "echo a"}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "a,b", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "64"}
    unset = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    subprocess.run(
        ["bash", "-c", script.replace(ACTIVATE, ""), "train.sh", "digits", "--out", "run"],
        cwd=folder,
        env=unset | job | {"PATH": f"{folder}:{os.environ['PATH']}"} | environment,
        check=True,
    )
    words, values = ((folder / name).read_text().splitlines() for name in ("words", "values"))
    return words, values


def test_srun_starts_a_torchrun_with_all_cores_of_the_node(tmp_path: Path) -> None:
    """srun of Slurm 22.05 and later does not take the cores that sbatch was given for a task."""
    words, _ = submitted(tmp_path)
    assert words.index("--cpus-per-task=64") < words.index("torchrun")
    assert words[-6:] == ["-m", "dumo", "train", "digits", "--out", "run"]


@pytest.mark.parametrize("name", VARIABLES)
def test_a_place_that_the_user_set_stays(name: str, tmp_path: Path) -> None:
    _, values = submitted(tmp_path, **{name: "/mine"})
    assert values == ["/mine" if name == other else f"/shared/{place}" for other, place in PLACES]
