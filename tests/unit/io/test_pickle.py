"""No pickle is read or written: no module of dumo has a way to."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dumo

SOURCE = Path(dumo.__file__).parent
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}
CALLS = {("torch", "save"), ("torch", "load"), ("jit", "save"), ("jit", "load")}
NAMES = {"FileSystemWriter", "FileSystemReader", "enable_consolidation"}


def uses(text: str) -> Iterator[str]:
    """What a module's code, not its words, has to do with pickles."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import(names):
                yield from (alias.name for alias in names if alias.name.split(".")[0] in MODULES)
            case ast.ImportFrom(module=module, names=names):
                found = (module or "").split(".")[0]
                yield from (alias.name for alias in names if alias.name in NAMES or found in MODULES)
                yield from (f"{found}.{alias.name}" for alias in names if (found, alias.name) in CALLS)
            case ast.Attribute(ast.Name(id=owner), attr=name) if (owner, name) in CALLS:
                yield f"{owner}.{name}"
            case ast.keyword(arg="allow_pickle", value=value) if ast.unparse(value) != "False":
                yield "allow_pickle"
            case ast.Attribute(attr=name) | ast.Name(id=name) | ast.keyword(arg=name) if name in NAMES:
                yield str(name)
            case _:
                pass


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_no_module_can(file: Path) -> None:
    assert list(uses(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import a, pickle as p",
        "from pickle import loads",
        "from torch import load",
        "torch.load(x)",
        "x = torch.save",
        "from torch.distributed.checkpoint import FileSystemWriter",
        "dcp.FileSystemWriter(x)",
        "HuggingFaceStorageWriter(x, enable_consolidation=True)",
        "np.load(x, allow_pickle=True)",
    ],
)
def test_what_would_be_found(text: str) -> None:
    assert len(list(uses(text))) == 1
    words = '"""No pickle: torch.load(x)."""\nhint = "import pickle"\nx.load(y)\nnp.load(y, allow_pickle=False)'
    assert list(uses(words)) == []
