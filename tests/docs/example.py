"""Run an example of docs/examples as it is, and say whether its samples are finite.

python tests/docs/example.py docs/examples/plain.py 2
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """The example's own words follow its path."""
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # where Python looks when it runs the example
    names = runpy.run_path(sys.argv[0], run_name="__main__")
    print("finite" if names["samples"].isfinite().all() else "not finite")


if __name__ == "__main__":
    main()
