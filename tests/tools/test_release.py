"""A release is checked before it is built: versions that agree, and a section that says what changed."""

import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import release

WORKFLOWS = sorted((release.ROOT / ".github/workflows").glob("*.yml"))
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+|\./\.github/workflows/(ci|nightly)\.yml")

PICTURE = "The web page that dumo demo serves"  # of README.md

CHANGE = "### New\n\n- [This](docs/photos.md)."
CHANGES = f"""# Changelog

## [Unreleased]

## [1.2.3] - unreleased

{CHANGE}

## [1.2.2] - 2026-11-01

- That.
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What a release reads, of version 1.2.3."""
    for name, text in {
        "pyproject.toml": '[project]\nversion = "1.2.3"\n',
        "CITATION.cff": "version: 1.2.3\n",
        "CHANGELOG.md": CHANGES,
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def shell(flow: dict[str, Any]) -> str:
    """All that a workflow types."""
    return "\n".join(step.get("run", "") for job in flow["jobs"].values() for step in job.get("steps", ()))


def test_a_version_that_all_files_have_can_be_released(tree: Path) -> None:
    assert list(release.faults("1.2.3", tree)) == []
    assert release.notes("1.2.3", tree) == CHANGE
    assert release.notes("1.2.2", tree) == "- That."


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("pyproject.toml", "1.2.3", "1.2.4", "pyproject.toml has version 1.2.4, not 1.2.3"),
        ("CITATION.cff", "1.2.3", "1.2.2", "CITATION.cff does not have version 1.2.3"),
        ("CHANGELOG.md", CHANGE, "", "no section '## [1.2.3] - unreleased', or an empty one"),
        ("CHANGELOG.md", "[1.2.3] - unreleased", "[1.2.3]", "no section"),
        ("CHANGELOG.md", "[1.2.3] - unreleased", "[1.2.3] - soon", "no section"),
    ],
)
def test_a_version_that_one_lacks_cannot(tree: Path, file: str, old: str, new: str, said: str) -> None:
    text = (tree / file).read_text(encoding="utf-8")
    (tree / file).write_text(text.replace(old, new), encoding="utf-8")
    (found,) = release.faults("1.2.3", tree)
    assert said in found


def test_this_tree_can_be_released() -> None:
    version = tomllib.loads((release.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert list(release.faults(version)) == []


def test_what_is_released_has_a_date_and_addresses(tmp_path: Path) -> None:
    """PyPI shows README.md without the files next to it. Its code and the rest of the files stay as they are."""
    names = ("README.md", "pyproject.toml", "CITATION.cff")
    for name in names:
        shutil.copy(release.ROOT / name, tmp_path)
    (tmp_path / "CHANGELOG.md").write_text(CHANGES, encoding="utf-8")
    before = (tmp_path / "README.md").read_text(encoding="utf-8")
    release.stamp("1.2.3", "someone/dumo", tmp_path)
    assert re.search(r"^## \[1\.2\.3\] - \d{4}-\d\d-\d\d$", (tmp_path / "CHANGELOG.md").read_text(), re.MULTILINE)
    shown = "### New\n\n- [This](https://github.com/someone/dumo/blob/v1.2.3/docs/photos.md)."
    assert release.notes("1.2.3", tmp_path) == shown  # on the page of a release, where no file lies next to it

    after = (tmp_path / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", after)
    assert [target for target in targets if not target.startswith("https://")] == []
    paths = [re.sub(r"https://.*someone/dumo/(?:blob/)?v1\.2\.3/", "", target) for target in targets]
    assert paths == re.findall(r"\]\(([^)]+)\)", before)
    assert f"![{PICTURE}](https://raw.githubusercontent.com/someone/dumo/v1.2.3/docs/demo.png)" in after
    assert "git clone https://github.com/someone/dumo dumo" in after
    assert "REPOSITORY" not in after
    extras = [f"pip install 'dumo[{extra}]'" for extra in ("demo", "pretrained")]
    assert re.findall(r"pip install \S+", after) == ["pip install dumo", *extras]
    python = re.compile(r"^```python\n.*?^```$", re.DOTALL | re.MULTILINE)
    assert python.findall(after) == python.findall(before)
    urls = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    assert urls == {"Repository": "https://github.com/someone/dumo"}


def test_what_is_wrong_is_returned() -> None:
    assert "pyproject.toml has version" in (release.main("check", "0.0.0") or "")
    assert release.main("chekc") == release.__doc__


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_a_workflow_runs_known_code_with_few_rights(file: Path) -> None:
    """Actions are pinned by their commits; what a job may write is said; no input is pasted into a shell."""
    text = file.read_text(encoding="utf-8")
    flow = yaml.safe_load(text)
    assert [name for name in re.findall(r"uses: (.*)", text) if not PINNED.fullmatch(name)] == []
    assert flow["permissions"] == {"contents": "read"}
    assert [line for line in shell(flow).splitlines() if "${{" in line] == []
    for script in re.findall(r"(?:tools|\.ci)/[\w.]+", shell(flow)):
        assert (release.ROOT / script).is_file(), script


def test_the_systems_and_pythons_that_are_promised_are_tried_at_night() -> None:
    project = tomllib.loads((release.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    flow = yaml.safe_load((release.ROOT / ".github/workflows/nightly.yml").read_text(encoding="utf-8"))
    matrix = flow["jobs"]["run"]["strategy"]["matrix"]
    newest = max(re.findall(r"Python :: 3\.(\d+)", " ".join(project["classifiers"])), key=int)
    assert f"3.{newest}" in [row["python"] for row in matrix["include"]]
    assert "Operating System :: MacOS" in project["classifiers"]
    assert any(row["system"].startswith("macos") for row in matrix["include"])


def test_a_release_is_a_button_and_ends_with_what_it_tested() -> None:
    flow = yaml.safe_load((release.ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))
    jobs = flow["jobs"]
    assert list(flow[True]) == ["workflow_dispatch"]  # YAML 1.1 reads `on` as true
    wants = {name: job.get("needs") for name, job in jobs.items()}
    assert wants == {
        "check": None,
        **dict.fromkeys(("test", "slow", "build"), "check"),
        "publish": ["test", "slow", "build"],
        "tag": "publish",
    }
    assert jobs["test"]["uses"] == "./.github/workflows/ci.yml"
    assert jobs["slow"]["uses"] == "./.github/workflows/nightly.yml"
    assert jobs["publish"]["environment"] == "pypi"
    writes = {
        (name, right)
        for name, job in jobs.items()
        for right, how in job.get("permissions", {}).items()
        if how == "write"
    }
    assert writes == {("publish", "id-token"), ("tag", "contents")}
    assert set(re.findall(r"release\.py (\w+)", shell(flow))) == {"check", "stamp", "notes"}
    assert "release.py" not in shell({"jobs": {"publish": jobs["publish"]}})  # what was tried is what PyPI gets
