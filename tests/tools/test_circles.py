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

RING = {  # a known circle of a and b; c reaches it, and d stands alone
    "__init__.py": "",
    "a.py": "from ring import b\n",
    "b.py": "def call():\n    from ring import a\n",
    "c.py": "import ring.a\nimport ring.d\n",
    "d.py": "",
}
KNOWN = {("ring.a", "ring.b"), ("ring.b", "ring.a")}
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"
PYPROJECT = circles.ROOT / "pyproject.toml"


def write_files(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def find_problems(folder: Path, monkeypatch: pytest.MonkeyPatch, **changed: str) -> list[str]:
    """Of the ring with other texts of files."""
    write_files(folder / "ring", RING | {f"{name}.py": text for name, text in changed.items()})
    monkeypatch.syspath_prepend(str(folder))
    return circles.find_problems(grimp.build_graph("ring", cache_dir=None), KNOWN)


def test_a_known_circle_passes_and_what_only_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_problems(tmp_path, monkeypatch) == []


@pytest.mark.parametrize(
    "text",
    [
        "\nimport ring.c\n",
        "def call():\n    import ring.c\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING: import ring.c\n",
    ],
)
def test_a_new_circle_is_named_wherever_its_imports_stand(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_problems(tmp_path, monkeypatch, d=text) == [
        "a circle of files: ring.c → ring.d → ring.c; new in it: ring.c:2 → ring.d, ring.d:2 → ring.c"
    ]


def test_an_import_more_in_a_known_circle_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_problems(tmp_path, monkeypatch, b="import ring.a\nimport ring.c\n") == [
        "a circle of files: ring.a → ring.b → ring.c → ring.a; new in it: ring.b:2 → ring.c, ring.c:1 → ring.a"
    ]


def test_a_package_and_a_file_in_it_can_make_a_circle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = find_problems(tmp_path, monkeypatch, __init__="import ring.d\n", d="from ring import x\n")
    assert problems == ["a circle of files: ring → ring.d → ring; new in it: ring:1 → ring.d, ring.d:1 → ring"]


def test_a_known_circle_that_is_gone_leaves_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_problems(tmp_path, monkeypatch, b="") == [
        "ring.a → ring.b lies on no circle any more: delete it from circles.toml",
        "ring.b → ring.a lies on no circle any more: delete it from circles.toml",
    ]


def test_a_list_of_circles_decides_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path, {f"ring/{name}": text for name, text in RING.items()})
    monkeypatch.syspath_prepend(str(tmp_path))
    known_circles = tmp_path / "circles.toml"
    known_circles.write_text('"ring.a" = ["ring.b"]\n', encoding="utf-8")
    assert circles.main("ring", known_circles) == 1
    assert capsys.readouterr().out.splitlines() == [
        "a circle of files: ring.a → ring.b → ring.a; new in it: ring.b:2 → ring.a"
    ]
    known_circles.write_text('"ring.a" = ["ring.b"]\n"ring.b" = ["ring.a"]\n', encoding="utf-8")
    assert circles.main("ring", known_circles) == 0
    assert capsys.readouterr().out == "No import cycle except the 2 known imports in circles.toml\n"


def write_contracted_package(folder: Path) -> None:
    """A package with all that our contracts name, and nothing else: each module is an empty one but for exceptions."""
    contracts: list[dict[str, Any]] = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    modules = {"dumo", "dumo.run.config.spec"}
    exceptions: list[tuple[str, str]] = []
    for contract in contracts:
        for layer in contract.get("layers", []):
            modules |= {f"dumo.{name.strip()}" for name in layer.split("|")}
        for field in ("modules", "protected_modules", "allowed_importers"):
            modules |= {name for name in contract.get(field, []) if "*" not in name}
        for exception in contract.get("ignore_imports", []):
            importer, imported = exception.split(" -> ")
            exceptions.append((importer, imported))
            modules |= {importer, imported}
    modules |= {module.rpartition(".")[0] for module in modules if module.count(".") > 1}
    texts = dict.fromkeys(modules, "")
    for importer, imported in exceptions:
        texts[importer] += f"import {imported}\n"
    write_files(folder, {f"{module.replace('.', '/')}/__init__.py": text for module, text in texts.items()})
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
            "nets/part.py": "import dumo.training.deferred\n",
            "report/union.py": "from dumo.objectives import Objective\n",
            "run/planned.py": "import dumo.run.plan.cost\n",
        },
    )
    broken = lint_imports(tmp_path)
    assert (broken.returncode, "0 kept, 4 broken" in broken.stdout) == (1, True), broken.stdout
    for planted in (
        "dumo.types.up -> dumo.run (l.1)",
        "dumo.nets.part -> dumo.training.deferred (l.1)",
        "dumo.report.union -> dumo.objectives (l.1)",
        "dumo.run.planned -> dumo.run.plan.cost (l.1)",
    ):
        assert planted in broken.stdout


def test_an_exception_that_is_gone_is_named(tmp_path: Path) -> None:
    write_contracted_package(tmp_path)
    write_files(tmp_path / "dumo", {"run/journal/__init__.py": ""})
    broken = lint_imports(tmp_path)
    assert broken.returncode == 1
    assert "dumo.run.journal -> dumo.run.plan.doctor" in broken.stdout
