"""Early checks of a command's arguments: what they name is looked up and read here, before torch is imported.

A command calls one of these first:

- `read_run` is for a trained run, `read_source` for settings, `read_source_to_train` for settings or images to train,
  and `read_source_unless_images` for settings or images to encode or time. They return the text that they read
  (`RunText`), which the command hands on, so that no file is read twice.
- `require_plan` and `require_evaluated` look without reading.

What is read is checked as far as that takes no torch: the names and types of the settings there and of --set
(`dumo.config.fault`). Callers from Python get the same messages, from the functions that these call.

Most imports are inside the functions: a command is charged with those that it needs.
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
    """Read the text of the run whose folder `word` names, or of a trained run that dumo brings.

    `settings` are the values of --set, `labels` the value of --labels or --classes, `prompt` the values of --prompt.
    Raises UserError where there is no such run; where the run lacks a field of `settings` or a class of `labels`; and
    where `prompt` is given, and the run has no captions.
    """
    from dumo.config.label import require_captions, require_labels
    from dumo.config.place import require_run_folder
    from dumo.config.source import read
    from dumo.run import shipped

    folder = shipped.find(word)
    require_run_folder(word, folder)
    text = read(folder)
    tree = _checked_tree(text, settings)
    if prompt:
        require_captions(tree)
    if labels and labels != "all":
        require_labels(labels, tree)
    return text


def read_source(word: str, settings: Sequence[str] | None) -> "RunText":
    """Read the text of the recipe, file of settings or run's folder that `word` names.

    Raises UserError where there is none, or where it lacks a field of `settings`, the values of --set.
    """
    from dumo.config.source import read

    text = read(word)
    _checked_tree(text, settings)
    return text


def read_source_to_train(
    word: str, out: Path | None, settings: Sequence[str] | None
) -> "tuple[ChosenSource, RunText | None]":
    """Find out what a word to train means; return that, and the text of the run to train.

    `word` names a recipe, a file of settings, a run's folder or images. For images, the text is that of the run in
    `out`, the folder to train in (None: runs/NAME); it is None where no run is there yet, and one has to be proposed.
    Raises UserError where there is none of these, a folder has no images, or the run lacks a field of `settings`, the
    values of --set.
    """
    from dumo.config.place import require_images
    from dumo.config.source import IMAGES_RECIPE, RUN_FILE, SHIPPED_PREFIX, choose, read, settings_of_images

    chosen = choose(word, out)
    if chosen.kind != "images":
        return chosen, read_source(str(chosen.word), settings)
    require_images(word)
    folder = out or chosen.folder
    if (folder / RUN_FILE).is_file():
        text = read(folder)
        _checked_tree(text, settings_of_images(text.tree, settings or ()))
        return chosen, text
    _checked_tree(read(f"{SHIPPED_PREFIX}{IMAGES_RECIPE}"), settings, is_net_chosen_later=True)
    return chosen, None


def read_source_unless_images(word: str, settings: Sequence[str] | None) -> "RunText | None":
    """Read the text of the recipe, file of settings or run's folder that `word` names; None where it names images.

    Raises UserError where there is none of these, a folder has no images, or the run lacks a field of `settings`, the
    values of --set.
    """
    from dumo.config.place import require_images
    from dumo.config.source import choose

    if choose(word).kind != "images":
        return read_source(word, settings)
    require_images(word)
    return None


def require_plan(word: str) -> None:
    """Raise UserError where `word` ends in .yaml or .yml, and there is no such file."""
    from dumo.error import UserError

    if word.endswith((".yaml", ".yml")) and not Path(word).is_file():
        raise UserError(f"there is no file {word}: write a plan as docs/compare.md has it, or name one of dumo's")


def require_evaluated(words: Sequence[str]) -> None:
    """Raise UserError unless each word names an evaluation, or a run's folder that has one."""
    from dumo.config.place import require_evaluation
    from dumo.run import shipped

    for word in words:
        require_evaluation(shipped.find(word))


def _checked_tree(
    text: "RunText", settings: Sequence[str] | None, *, is_net_chosen_later: bool = False
) -> dict[str, Any]:
    """Return a copy of the plain values of a run's text, with `settings` of --set, once their fields are checked.

    `is_net_chosen_later`: the kind of net will be chosen for this machine. Then the net's fields are looked up only
    where --set says its kind. Raises UserError, one line per mistake, for fields that no run has.
    """
    from dumo.config.change import override
    from dumo.config.fault import faults

    tree = deepcopy(text.tree)
    if is_net_chosen_later:
        tree["net"] = {}
    override(tree, settings or ())
    mistakes = faults(tree)
    if mistakes:
        from dumo.config.line import lines_of
        from dumo.error import UserError

        raise UserError(lines_of(mistakes, text.name))
    return tree
