"""What `make check` says of imports: planted circles of files, and contracts of import-linter that are broken."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import grimp
import pytest

import circles

CHAIN = {"__init__.py": "", "a.py": "", "b.py": "from chain import a\n", "c.py": "import chain.b\n", "d.py": ""}
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"
PYPROJECT = circles.ROOT / "pyproject.toml"


def write_files(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def find_circles(folder: Path, monkeypatch: pytest.MonkeyPatch, **changed: str) -> list[str]:
    """Of the chain with other texts of files."""
    write_files(folder / "chain", CHAIN | {f"{name}.py": text for name, text in changed.items()})
    monkeypatch.syspath_prepend(str(folder))
    return circles.find_circles(grimp.build_graph("chain", cache_dir=None))


def test_a_chain_is_no_circle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_circles(tmp_path, monkeypatch) == []


@pytest.mark.parametrize(
    "text",
    [
        "\nimport chain.b\n",
        "def call():\n    import chain.b\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING: import chain.b\n",
    ],
)
def test_a_circle_is_named_wherever_its_imports_stand(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_circles(tmp_path, monkeypatch, a=text) == [
        "a circle of files: chain.a → chain.b → chain.a; its imports: chain.a:2 → chain.b, chain.b:1 → chain.a"
    ]


def test_an_import_more_makes_a_circle_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_circles(tmp_path, monkeypatch, a="import chain.b\nimport chain.c\n") == [
        "a circle of files: chain.a → chain.b → chain.a; its imports: chain.a:1 → chain.b, chain.b:1 → chain.a",
        "a circle of files: chain.a → chain.c → chain.b → chain.a; its imports: chain.a:2 → chain.c, "
        "chain.c:1 → chain.b",
    ]


def test_a_package_and_a_file_in_it_can_make_a_circle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_circles(tmp_path, monkeypatch, __init__="import chain.d\n", d="from chain import x\n")
    assert found == ["a circle of files: chain → chain.d → chain; its imports: chain:1 → chain.d, chain.d:1 → chain"]


def test_a_circle_decides_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path, {f"whole/{name}": text.replace("chain", "whole") for name, text in CHAIN.items()})
    write_files(
        tmp_path, {"broken/__init__.py": "", "broken/a.py": "import broken.b\n", "broken/b.py": "import broken.a\n"}
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert circles.main("whole") == 0
    assert capsys.readouterr().out == "No import cycle\n"
    assert circles.main("broken") == 1
    assert "a circle of files: broken.a → broken.b → broken.a" in capsys.readouterr().out


def write_contracted_package(folder: Path) -> None:
    """A package with all that our contracts name, and nothing else: each module is an empty one."""
    contracts: list[dict[str, Any]] = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    modules = {"dumo", "dumo.config.spec"}
    for contract in contracts:
        for layer in contract.get("layers", []):
            modules |= {f"dumo.{name.strip()}" for name in layer.split("|")}
        for field in ("modules", "protected_modules", "allowed_importers"):
            modules |= {name for name in contract.get(field, []) if "*" not in name}
        assert "ignore_imports" not in contract
    modules |= {module.rpartition(".")[0] for module in modules if module.count(".") > 1}
    write_files(folder, {f"{module.replace('.', '/')}/__init__.py": "" for module in modules})
    write_files(folder, {"pyproject.toml": PYPROJECT.read_text(encoding="utf-8")})


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, for this one has imported another dumo."""
    return subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache", "--no-logo"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


@pytest.mark.slow
def test_an_arrow_up_and_each_broken_law_are_named(tmp_path: Path) -> None:
    write_contracted_package(tmp_path)
    kept = lint_imports(tmp_path)
    assert (kept.returncode, "0 broken" in kept.stdout) == (0, True), kept.stdout
    write_files(
        tmp_path / "dumo",
        {
            "types/up.py": "import dumo.run\n",
            "nets/part.py": "import dumo.training\n",
            "report/union.py": "from dumo.objectives import Objective\n",
            "run/planned.py": "import dumo.plan\n",
        },
    )
    broken = lint_imports(tmp_path)
    assert (broken.returncode, "0 kept, 2 broken" in broken.stdout) == (1, True), broken.stdout
    for planted in (
        "dumo.types.up -> dumo.run (l.1)",
        "dumo.nets.part -> dumo.training (l.1)",
        "dumo.report.union -> dumo.objectives (l.1)",
        "dumo.run.planned -> dumo.plan (l.1)",
    ):
        assert planted in broken.stdout
