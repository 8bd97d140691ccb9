"""Import cycles between files: `make check` refuses a new one, a listed one that grew, and a listed import that is on
no cycle any more.

    python tools/circles.py

An import counts wherever it stands, as in import-linter's contracts: inside a function it lets Python start, under
TYPE_CHECKING it costs nothing, and yet neither file is understood without the other. circles.toml lists the imports of
known circles. A new one that lies on a circle fails; so does a listed one that lies on none, so the list only shrinks.
"""

import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
KNOWN = Path(__file__).with_name("circles.toml")
SHOWN_CIRCLES = 10

Import = tuple[str, str]  # importer, imported


def read_known(path: Path) -> set[Import]:
    """The imports of a list of known circles."""
    imports_by_file: Mapping[str, Sequence[str]] = tomllib.loads(path.read_text(encoding="utf-8"))
    return {(importer, imported) for importer, files in imports_by_file.items() for imported in files}


def find_circular_imports(graph: grimp.ImportGraph) -> set[Import]:
    """Imports by which a file is reached again from itself."""
    circular_imports: set[Import] = set()
    for imported in graph.modules:
        reached = graph.find_upstream_modules(imported)
        for importer in graph.find_modules_that_directly_import(imported):
            if importer in reached:
                circular_imports.add((importer, imported))
    return circular_imports


def find_circle(graph: grimp.ImportGraph, circular_import: Import) -> tuple[str, ...]:
    """The files of the shortest circle that has this import, the first in the alphabet first."""
    importer, imported = circular_import
    chain = graph.find_shortest_chain(importer=imported, imported=importer)
    assert chain is not None  # else the import lies on no circle
    first = chain.index(min(chain))
    return (*chain[first:], *chain[:first])


def find_new_circles(graph: grimp.ImportGraph, new_imports: Iterable[Import]) -> list[str]:
    """A line for each circle, smallest first: its files, and which of its imports are new."""
    places_by_circle: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for importer, imported in sorted(new_imports):
        line = graph.get_import_details(importer=importer, imported=imported)[0]["line_number"]
        circle = find_circle(graph, (importer, imported))
        places_by_circle[circle].append(f"{importer}:{line} → {imported}")
    lines: list[str] = []
    for circle in sorted(places_by_circle, key=lambda circle: (len(circle), circle)):
        path = " → ".join((*circle, circle[0]))
        lines.append(f"a circle of files: {path}; new in it: {', '.join(places_by_circle[circle])}")
    return lines


def find_problems(graph: grimp.ImportGraph, known: set[Import]) -> list[str]:
    """A line for each new circle, and for each import that the list has in vain."""
    circular_imports = find_circular_imports(graph)
    new_circles = find_new_circles(graph, circular_imports - known)
    problems = new_circles[:SHOWN_CIRCLES]
    if len(new_circles) > SHOWN_CIRCLES:
        problems.append(f"and {len(new_circles) - SHOWN_CIRCLES} more circles")
    for importer, imported in sorted(known - circular_imports):
        problems.append(f"{importer} → {imported} lies on no circle any more: delete it from {KNOWN.name}")
    return problems


def main(package: str = "dumo", known_circles: Path = KNOWN) -> int:
    """Print the problems of a package, or that there are none. Returns 1 where there are any."""
    graph = grimp.build_graph(package, cache_dir=None)
    known = read_known(known_circles)
    problems = find_problems(graph, known)
    if problems:
        print("\n".join(problems))
        return 1
    print(f"No import cycle except the {len(known)} known imports in {KNOWN.name}")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "src"))  # this tree's, whatever is installed
    sys.exit(main())
