"""The Python of a card, as it stands, of pipelines stored in half precision, and with the lowest and newest diffusers.

Images are compared with dumo's own, which computes in fp32 on the weights as they are stored.
"""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from dumo.export.model_card import PROMPT
from e2e.shell import call
from pipelines import PIPELINES
from stock.case import LORA, STORED, Case, must
from tiers import tiered
from tiny import TinyRuns

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers about its own parts, and of peft about merges
ROOT = Path(__file__).parents[2]
NO_LORA = ("PRX", "PixArt", "PixArt-alpha")
FORMS = ("folder", "lora")
CASES = [
    (name, stored, form)
    for name in PIPELINES
    for stored in STORED
    for form in FORMS
    if stored != "float32" and not (form == "lora" and name in NO_LORA)  # test_export.py has float32
]


def exported(case: Case, form: str) -> Path:
    """The folder of a pipeline, or of a LoRA."""
    return case.export("out") if form == "folder" else case.export("out", "--to", "lora")


@pytest.mark.parametrize(
    ("name", "stored", "form"), tiered(CASES, ci=[("SD3", "bfloat16", "lora")], id=lambda case: "-".join(case))
)
def test_the_card_of_a_base_in_half_precision_makes_dumos_images(
    name: str, stored: str, form: str, tiny_runs: TinyRuns, tmp_path: Path
) -> None:
    case = tiny_runs.case(tmp_path, name, *LORA, stored=stored)
    assert max(case.errors_over_limits("merged", exported(case, form))) < 1


@pytest.mark.nightly
@pytest.mark.parametrize("stored", [stored for stored in STORED if stored != "float32"])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_base_in_half_precision_is_examined_and_sampled(
    name: str, stored: str, tiny_runs: TinyRuns, tmp_path: Path
) -> None:
    case = tiny_runs.case(tmp_path, name, *LORA, stored=stored)
    must(call("show", case.run, "--check"))
    edited = ["--source", case.image] if case.image else []
    must(call("sample", case.run, "--prompt", PROMPT, *edited, "--nfe", "1"))


def install_diffusers(requirement: str, folder: Path) -> None:
    """Install diffusers alone into a folder. Where pip cannot bring it, skip the test."""
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    words += ["--timeout", "10", "--retries", "1", "--target", str(folder), requirement]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    pytest.skip(f"pip cannot bring {requirement}: {reason}")


def diffusers_requirements() -> tuple[str, str]:
    """The lowest and the newest diffusers that pyproject.toml allows, as pip takes them."""
    allowed = re.search(r'"diffusers>=([\d.]+),(<[\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert allowed
    lowest, below = allowed.groups()
    return f"diffusers=={lowest}", f"diffusers>={lowest},{below}"


LOWEST, NEWEST = diffusers_requirements()


@pytest.mark.parametrize(
    "requirement",
    [pytest.param(LOWEST, marks=pytest.mark.slow), pytest.param(NEWEST, marks=pytest.mark.nightly)],  # mostly installed
)
def test_the_card_runs_with_all_allowed_diffusers(requirement: str, tiny_runs: TinyRuns, tmp_path: Path) -> None:
    """In a process that has this diffusers, and all else as it is installed here."""
    install_diffusers(requirement, tmp_path / "libraries")
    case = tiny_runs.case(tmp_path, "SD3", *LORA, stored="bfloat16")
    case = replace(case, libraries=str(tmp_path / "libraries"))
    assert max(case.errors_over_limits("lora", exported(case, "lora"))) < 1
    (installed,) = (tmp_path / "libraries").glob("diffusers-*.dist-info")
    with safe_open(case.folder / "made.safetensors", "pt") as made:
        assert made.metadata()["diffusers"] == installed.name.split("-")[1].removesuffix(".dist")
