"""Run an example of docs/examples as it is; an error where its samples are not finite.

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
    if not names["samples"].isfinite().all():
        raise SystemExit("the samples are not finite")


if __name__ == "__main__":
    main()
