"""A new objective is one file and its name in the union: every contract test then finds it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dumo

pytestmark = pytest.mark.slow

BARE, ALONE = ("-o", "addopts=--import-mode=importlib"), {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # shapes unchecked
SRC, TESTS = Path(dumo.__file__).parents[1], Path(__file__).parents[1]
TOY = '''
"""Half of flow matching."""

from typing import Literal

from dumo.objectives.flow_matching import FlowMatching
from dumo.types import Frozen, Net, Noised, Terms


class Toy(FlowMatching):
    """Its loss is flow matching's, halved."""

    kind: Literal["toy"] = "toy"  # pyright: ignore

    def loss(self, net: Net, ref: Frozen, b: Noised) -> Terms:
        """Half of it."""
        terms = super().loss(net, ref, b)
        return Terms(terms.loss / 2, terms.parts)
'''


def test_the_contract_tests_find_a_new_objective(tmp_path: Path) -> None:
    src, tests = tmp_path / "src", tmp_path / "tests"
    ours = shutil.ignore_patterns("__pycache__")
    shutil.copytree(SRC / "dumo", src / "dumo", ignore=ours)
    for part in ("contract", "theory", "objectives"):
        shutil.copytree(TESTS / part, tests / part, ignore=ours)
    for part in ("browser.py", "conftest.py"):
        shutil.copy(TESTS / part, tests / part)
    shutil.copy(TESTS.parent / "pyproject.toml", tmp_path)
    (src / "dumo/objectives/toy.py").write_text(TOY)
    init = src / "dumo/objectives/__init__.py"
    text = init.read_text()
    union = re.sub(r"(Annotated\[\s*)", r"\1Toy | ", text)
    init.write_text(union.replace("\n\nObjective", "\nfrom dumo.objectives.toy import Toy as Toy\n\nObjective", 1))

    # Its tests, and those of flow matching but for what is said of that by name
    kinds = "(toy or flow_matching) and not out_of_range"
    where = [str(tests / "contract"), str(tests / "theory/test_fixed_point.py")]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *BARE, *where, "-k", kinds]
    env = {**os.environ, **ALONE, "PYTHONPATH": f"{src}{os.pathsep}{tests}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    passed = re.findall(r"::(\w+)\[(.+)\] PASSED", done.stdout)
    laws = {kind: {law for law, case in passed if kind in case} for kind in ("toy", "flow_matching")}
    plane = {"test_gradient_vanishes_in_the_plane"}  # of a kind or two that are named there
    assert laws["toy"] == laws["flow_matching"] - plane
    assert len(laws["toy"]) > 15
