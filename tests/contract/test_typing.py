"""Type checkers know what the functions of `import dumo` return."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CALLS = Path(__file__).with_name("typed_calls.py")


@pytest.mark.nightly
def test_calls_have_the_types_that_they_are_used_by() -> None:
    """An ignore that is not needed is an error, so those in the file are mistakes that pyright sees."""
    pyright = Path(sys.executable).with_name("pyright")
    if not pyright.exists():
        pytest.skip("pyright is not installed")
    done = subprocess.run(
        [pyright, "--outputjson", "--pythonpath", sys.executable, CALLS],
        cwd=CALLS.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert json.loads(done.stdout)["generalDiagnostics"] == []
