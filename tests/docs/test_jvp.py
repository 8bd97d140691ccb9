"""docs/jvp.md: its table is what docs/jvp.py prints, its blocks run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from forked import ENVIRONMENT

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/jvp.md").read_text(encoding="utf-8")


def table(text: str) -> dict[str, list[str]]:
    """The cells by setting: the kind of error, or that it ran."""
    _, header, rows_of_settings = text.rpartition("| setting |")
    rows = re.findall(r"^\| (?!setting)(.+?) \| (.+?) \| (.+?) \| (.+?) \|$", header + rows_of_settings, re.M)
    return {name: [re.sub(r"^\de-\d+$", "ran", cell) for cell in cells] for name, *cells in rows}


def test_a_derivative_runs_in_every_row_of_the_page() -> None:
    rows = table(PAGE)
    assert len(rows) == 12
    assert {cells[2] for cells in rows.values()} == {"ran"}
    errors = re.findall(r"^\| (?!setting).* \| (\de-\d+) \|$", PAGE, re.M)
    assert sorted(map(float, errors))[-2] < 1e-6 < max(map(float, errors)) < 1e-2  # in bf16 one


def test_the_blocks_of_the_page_run() -> None:
    scope: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        exec(block, scope)
    step = scope["meanflow_step"]
    assert callable(step)
    x = torch.randn(4, 3)
    loss = step(Timed(), x, torch.rand(4), torch.randn(4, 3))
    assert isinstance(loss, torch.Tensor)
    loss.backward()


class Timed(nn.Module):
    """A small net of x and t."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.cat([x, t[:, None]], 1)).sin()


@pytest.mark.nightly
def test_the_table_is_what_the_script_prints() -> None:
    """On two ranks."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(ROOT / "docs/jvp.py")],
        env={**ENVIRONMENT, "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "two passes" not in done.stderr
    assert table(done.stdout) == table(PAGE)
