"""The examples of docs/loop.md run as the page types them, in processes of their own, with few steps."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from docs.page import ROOT, lines
from forked import ENVIRONMENT
from tiers import tiered

FOLDER = ROOT / "docs/examples"
TYPED = lines(ROOT / "docs/loop.md", "sh")
FEW = {"with_diffusers.py": "20"}  # steps; of the others two epochs
PLAIN = "python docs/examples/plain.py"
# with_fsdp2 runs at night: torch sometimes aborts while a rank exits (pytorch #190489, docs/log.md).
CI = (
    "python docs/examples/with_lightning.py",
    "python docs/examples/with_diffusers.py",
    "torchrun --nproc-per-node 2 docs/examples/with_accelerate.py",
)


@pytest.mark.parametrize("line", tiered(TYPED, now=[PLAIN], ci=CI, id=lambda line: line.replace("docs/examples/", "")))
def test_an_example_trains(line: str, tmp_path: Path) -> None:
    program, *words, example = shlex.split(line)
    launch = ["-m", "torch.distributed.run", "--standalone", *words] if program == "torchrun" else words
    file = ROOT / example
    done = subprocess.run(
        [sys.executable, *launch, str(Path(__file__).with_name("example.py")), str(file), FEW.get(file.name, "2")],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, *_, last = map(float, re.findall(r" loss (\S+)$", done.stdout, re.M))
    assert last < 0.95 * first
    assert len(re.findall(r"^samples \(\d+, \d+, \d+, \d+\)$", done.stdout, re.M)) == 1  # of one rank


def test_the_page_types_every_example() -> None:
    examples = {file.name for file in FOLDER.glob("*.py")} - {"digits.py"}  # which the others import
    assert {Path(shlex.split(line)[-1]).name for line in TYPED} == examples


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_an_example_is_read_at_a_glance(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 40
