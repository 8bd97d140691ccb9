"""What a command's words name is looked up and read here as the command begins, and thus before torch is imported.

Each entrance `read_...` returns the text that it read (`RunText`), and the command hands that on, so that no file is
read twice. `require_evaluated` and `require_logged` look without reading. All look first at the place
(`dumo.config.place`), then at the names and types of the settings there and of --set (`dumo.config.fault`).

What is found here is refused by the same lines later on, when Python calls the same functions without a command line.
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dumo.config.source import ChosenSource, RunText


def read_run(
    word: str, settings: Sequence[str] | None, *, labels: str | None = None, prompt: Sequence[str] | None = None
) -> "RunText":
    """The text of the run whose folder a word names, or of a trained run that dumo brings.

    `settings` are those of --set, `labels` of --labels or --classes, `prompt` of --prompt. Raises UserError where there
    is no such run, or it has not these fields, these classes, or captions.
    """
    from dumo.config.label import require_captions, require_labels
    from dumo.config.place import require_run_folder
    from dumo.config.source import read
    from dumo.run import shipped

    folder = shipped.find(word)
    require_run_folder(word, folder)
    text = read(folder)
    tree = _require_fields(text, settings)
    if prompt:
        require_captions(tree)
    if labels and labels != "all":
        require_labels(labels, tree)
    return text


def read_source(word: str, settings: Sequence[str] | None) -> "RunText":
    """The text of the recipe, file of settings or run's folder that a word names.

    Raises UserError where there is none, or it has not the fields of `settings`, those of --set.
    """
    from dumo.config.source import read

    text = read(word)
    _require_fields(text, settings)
    return text


def read_source_or_images(
    word: str, out: Path | None, settings: Sequence[str] | None
) -> "tuple[ChosenSource, RunText | None]":
    """What a word to train means, and its text: of a source of settings, or of the run that images are trained in.

    `out` is the folder to train in; None: runs/NAME. The text is None where a run has yet to be proposed for images.
    Raises UserError as `read_source`, and for a folder without images.
    """
    from dumo.config.source import IMAGES_RECIPE, RUN_FILE, SHIPPED_PREFIX, choose, read, settings_of_images

    chosen = choose(word, out)
    if chosen.kind != "images":
        return chosen, read_source(str(chosen.word), settings)
    _require_images(word)
    folder = out or chosen.folder
    if (folder / RUN_FILE).is_file():
        text = read(folder)
        _require_fields(text, settings_of_images(text.tree, settings or ()))
        return chosen, text
    _require_fields(read(f"{SHIPPED_PREFIX}{IMAGES_RECIPE}"), settings, is_net_open=True)
    return chosen, None


def read_source_or_data(word: str, settings: Sequence[str] | None) -> "RunText | None":
    """The text of a source of settings; None where a word names images. Raises UserError as `read_source_or_images`."""
    from dumo.config.source import choose

    if choose(word).kind != "images":
        return read_source(word, settings)
    _require_images(word)
    return None


def require_plan(word: str) -> None:
    """Raise UserError where a word ends as a YAML file does, and there is none."""
    from dumo.error import UserError

    if word.endswith((".yaml", ".yml")) and not Path(word).is_file():
        raise UserError(f"there is no file {word}: write a plan as docs/compare.md has it, or name one of dumo's")


def require_evaluated(words: Sequence[str]) -> None:
    """Raise UserError unless each word names an evaluation, or a run's folder that has one."""
    from dumo.config.place import require_evaluation
    from dumo.run import shipped

    for word in words:
        require_evaluation(shipped.find(word))


def require_logged(words: Sequence[str]) -> None:
    """Raise UserError unless each word names the folder of a run that has a log."""
    from dumo.config.place import require_log
    from dumo.run import shipped

    for word in words:
        require_log(shipped.find(word))


def _require_images(word: str) -> None:
    """Raise UserError where a folder has no images."""
    from dumo.config.place import require_images

    require_images(word)


def _require_fields(text: "RunText", settings: Sequence[str] | None, *, is_net_open: bool = False) -> dict[str, Any]:
    """The plain values of a run's text, with `settings` of --set.

    `is_net_open`: the kind of the net is chosen later, for this machine, so its fields are not looked up unless --set
    says the kind. Raises UserError, one line per mistake, where they have fields that no run has.
    """
    from dumo.config.change import override
    from dumo.config.fault import faults

    tree = deepcopy(text.tree)
    if is_net_open:
        tree["net"] = {}
    override(tree, settings or ())
    found = faults(tree)
    if found:
        from dumo.config.line import lines_of
        from dumo.error import UserError

        raise UserError(lines_of(found, text.name))
    return tree
