"""docs/architecture.md draws the rooms as the import contract has them."""

import re
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


def contract_layers() -> list[list[str]]:
    """The rooms of each layer, from above, as the import contract has them."""
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    (contract,) = (one for one in settings["importlinter"]["contracts"] if one["type"] == "layers")
    assert "ignore_imports" not in contract
    return [[room.strip() for room in re.split("[|:]", layer)] for layer in contract["layers"]]


def drawn_arrows() -> list[tuple[list[str], list[str]]]:
    """The arrows of the diagram: rooms, and the rooms of the next layer."""
    (diagram,) = re.findall(r"```mermaid\nflowchart TB\n(.*?)```", PAGE, re.S)
    arrows: list[tuple[list[str], list[str]]] = []
    for line in diagram.splitlines():
        above, below = line.strip().split(" --> ")
        arrows.append((above.split(" & "), below.split(" & ")))
    return arrows


def test_the_diagram_has_the_layers_of_the_contract() -> None:
    layers = contract_layers()
    assert drawn_arrows() == list(pairwise(layers))


def test_the_table_has_every_room_once() -> None:
    rooms = [room for layer in contract_layers() for room in layer if room != "__main__"]
    assert sorted(re.findall(r"^\| `(\w+)` \|", PAGE, re.M)) == sorted(rooms)
    home = ROOT / "src/dumo"
    assert all((home / room / "__init__.py").is_file() or (home / f"{room}.py").is_file() for room in rooms)


def test_modules_that_the_page_names_are_there() -> None:
    rooms = "|".join(room for layer in contract_layers() for room in layer)
    named = set(re.findall(rf"`((?:{rooms})\.\w+(?:\.\w+)?)`", PAGE))
    assert len(named) > 10
    for name in named:
        room, module, *inside = name.split(".")
        text = (ROOT / "src/dumo" / room / f"{module}.py").read_text(encoding="utf-8")
        assert all(re.search(rf"^(def|class) {one}\b", text, re.M) for one in inside), name
