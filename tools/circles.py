"""Import cycles between files, which `make check` refuses.

    python tools/circles.py

An import counts wherever it stands, as in import-linter's contracts: inside a function it lets Python start, under
TYPE_CHECKING it costs nothing, and yet neither file is understood without the other.
"""

import sys
from collections import defaultdict
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
SHOWN_CIRCLES = 10

Import = tuple[str, str]  # importer, imported


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


def find_circles(graph: grimp.ImportGraph) -> list[str]:
    """A line for each circle, smallest first: its files, and where its imports stand."""
    places_by_circle: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for importer, imported in sorted(find_circular_imports(graph)):
        line = graph.get_import_details(importer=importer, imported=imported)[0]["line_number"]
        circle = find_circle(graph, (importer, imported))
        places_by_circle[circle].append(f"{importer}:{line} → {imported}")
    lines: list[str] = []
    for circle in sorted(places_by_circle, key=lambda circle: (len(circle), circle)):
        path = " → ".join((*circle, circle[0]))
        lines.append(f"a circle of files: {path}; its imports: {', '.join(places_by_circle[circle])}")
    return lines


def main(package: str = "dumo") -> int:
    """Print the circles of a package, or that there are none. Returns 1 where there are any."""
    circles = find_circles(grimp.build_graph(package, cache_dir=None))
    for line in circles[:SHOWN_CIRCLES]:
        print(line)
    if len(circles) > SHOWN_CIRCLES:
        print(f"and {len(circles) - SHOWN_CIRCLES} more circles")
    if circles:
        return 1
    print("No import cycle")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "src"))  # this tree's, whatever is installed
    sys.exit(main())
