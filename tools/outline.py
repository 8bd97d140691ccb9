"""Write src/dumo/config/outline.json: the names of all fields, kinds and choices of a run, to read without torch.

    python tools/outline.py     # after a field or a kind of a run has changed

`dumo.config.schema.outline_text` makes the text from the specs, `dumo.config.outline` reads the file. A test
(tests/unit/config/test_outline.py) compares the two, and fails where this was forgotten.
"""

from dumo.config.outline import FILE
from dumo.config.schema import outline_text

if __name__ == "__main__":
    FILE.write_text(outline_text(), encoding="utf-8")
    print(FILE)
