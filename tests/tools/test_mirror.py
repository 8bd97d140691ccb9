"""The mirror counts what it says, shows what a branch added, and fails on no source."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import mirror

SOURCE = '''"""Two lines
of a docstring."""

# a comment
left, right = 1, 2
found = [x for x in range(left if right else 3)]


def first():
    return 1


async def second(value):
    name = value

    return {y: found for y in name}
'''


def write_files(root: Path, **texts: str) -> None:
    for name, text in texts.items():
        path = root / "src" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def git(root: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


def test_figures_of_a_small_file() -> None:
    figures = mirror.measure({"src/a.py": SOURCE, "src/b.py": "def ("}, {"tests/test_a.py": "pass\n" * 8})
    assert (figures.files, figures.lines) == (1, 16)
    # of the docstring, the two assignments and the two functions
    assert figures.tokens == 1 + 7 + 17 + 7 + 19
    assert figures.tokens_per_line == figures.tokens / 16
    assert (figures.function_p90, figures.function_max) == (4, 4)
    lines_of_code = 9
    assert figures.packed == pytest.approx(1000 / lines_of_code)
    assert figures.conditions == pytest.approx(1000 / lines_of_code)
    assert figures.comprehensions == pytest.approx(2000 / lines_of_code)
    assert figures.empty_names == pytest.approx(100 * 2 / 6)  # left and found, of these and right, x, name, y
    assert figures.tests_per_src == 0.5


def test_nine_functions_in_ten() -> None:
    functions = [f"def f{n}():\n" + "    pass\n" * n for n in range(1, 21)]
    figures = mirror.measure({"src/a.py": "".join(functions)}, {})
    assert (figures.function_p90, figures.function_max) == (20, 21)


@pytest.mark.parametrize(
    ("line", "kinds"),
    [
        ("a, b = 1, 2", {"packed assignment"}),
        ("a = b, c = pair", set()),
        ('f"{a if b else c}"', {"condition in an f-string"}),
        ("a if b else c if d else e", {"condition in a condition"}),
        ("a if b else c", set()),
        ("[[x for x in y] for y in z]", {"comprehension in a comprehension"}),
        ("found, there = pair", {"the name found", "the name there"}),
        ("print(found)", set()),
    ],
)
def test_what_carries_several_thoughts(line: str, kinds: set[str]) -> None:
    tree = mirror.parse(f"\n{line}\n")
    assert tree
    assert mirror.crowded_lines(tree) == ({2: kinds} if kinds else {})


def test_no_source_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_files(tmp_path, bad="def (:\n", null="a = '\0'\n", escape='"\\d"\n', empty="", deep="(" * 9999)
    (tmp_path / "src/bytes.py").write_bytes(b"a = '\xff'\n")
    assert mirror.main([], tmp_path) == 0
    printed = capsys.readouterr().out
    assert [line.split()[2] for line in printed.splitlines() if line.startswith("Not counted")] == [
        "src/bad.py",
        "src/deep.py",
        "src/null.py",
    ]


def test_a_folder_that_is_no_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mirror.main([], tmp_path) == 0  # with no file at all
    write_files(tmp_path, a=SOURCE)
    assert mirror.main([], tmp_path) == 0
    assert "before" not in capsys.readouterr().out
    assert mirror.main(["HEAD"], tmp_path) == 2
    assert capsys.readouterr().err == "BASE=HEAD is no commit here: give a hash, a branch or a tag\n"


def test_what_a_branch_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    git(tmp_path, "init", "--initial-branch=main")
    write_files(tmp_path, a=SOURCE)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "a")
    assert mirror.main([], tmp_path) == 0
    assert "before" not in capsys.readouterr().out  # there is no origin/main
    git(tmp_path, "update-ref", "refs/remotes/origin/main", "HEAD")

    # moved and indented lines are no additions; of a file that git does not know all are
    (tmp_path / "src/a.py").unlink()
    write_files(tmp_path, b=SOURCE, c="if True:\n    left, right = 1, 2\n    found, c = f(found if left else 2), 3\n")
    write_files(tmp_path, d="".join(f"there = {n}\n" for n in range(20)))
    assert mirror.main([], tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["before", "now", *mirror.PEERS]
    assert [line.split()[-6:-4] for line in lines if line.startswith("files")] == [["1", "3"]]
    assert "Of 21 added lines that carry several thoughts, or a name that says nothing:" in lines
    shown = [line for line in lines if line.startswith("  src/")]
    assert len(shown) == 10
    assert shown[0] == "  src/c.py:3 (packed assignment, the name found): found, c = f(found if left else 2), 3"
    assert shown[1] == "  src/d.py:1 (the name there): there = 0"


@pytest.mark.parametrize(("version", "lines"), [((3, 11), 0), ((3, 12), 1), ((3, 13), 1)])
def test_tokens_of_later_pythons_are_said_to_be_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], version: object, lines: int
) -> None:
    monkeypatch.setattr(mirror, "sys", SimpleNamespace(version_info=version))
    assert mirror.main([], tmp_path) == 0
    assert capsys.readouterr().out.count("tokens do not compare with the peers'") == lines
