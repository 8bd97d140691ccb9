"""What a command's words name is looked up here before the command begins, and thus before torch is imported.

`Names`, in the annotation of a parameter, says what its word names: a run, a source of settings, images. Each
`require_...` here is such a look, which `dumo.cli.option.prepared` takes when the words are parsed: first at the place
(`dumo.config.place`), then at the names and types of the settings there and of --set (`dumo.config.fault`).

What is found here is refused by the same lines later on, when Python calls the same functions without a command line.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Options = Mapping[str, Any]  # of a command, by parameter


@dataclass(frozen=True)
class Names:
    """In an annotation: how to look up what a word names. `require` raises UserError for nothing, with the way out."""

    require: Callable[[Any, Options], None]


def require_run(word: str, options: Options) -> None:
    """Raise UserError unless a word names a run's folder, or a trained run that dumo brings, and --set its fields.

    The classes that --labels or --classes asks for must be there, and captions for --prompt.
    """
    from dumo.config.label import require_captions, require_labels
    from dumo.config.place import require_run_folder
    from dumo.run import shipped

    folder = shipped.find(word)
    require_run_folder(word, folder)
    tree = _require_fields(folder, options)
    if options.get("prompt"):
        require_captions(tree)
    for option in ("labels", "classes"):
        labels = options.get(option)
        if labels and labels != "all":
            require_labels(labels, tree)


def require_source(word: str, options: Options) -> None:
    """Raise UserError unless a word names a recipe, a file of settings or a run's folder, and --set their fields."""
    _require_fields(word, options)


def require_source_or_images(word: str, options: Options) -> None:
    """Raise UserError unless a word names a source of settings or images, and --set fields of their run."""
    from dumo.config.source import FILE, IMAGES_RECIPE, SHIPPED_PREFIX, choose

    chosen = choose(word, options.get("folder"))
    if chosen.kind != "images":
        _require_fields(chosen.word, options)
        return
    _require_images(word)
    if (chosen.folder / FILE).is_file():
        _require_fields(chosen.folder, options)
    else:
        _require_fields(f"{SHIPPED_PREFIX}{IMAGES_RECIPE}", options, is_net_open=True)


def require_source_or_data(word: str, options: Options) -> None:
    """Raise UserError unless a word names a source of settings, and --set their fields, or images alone."""
    from dumo.config.source import choose

    chosen = choose(word)
    if chosen.kind == "images":
        _require_images(word)
    else:
        _require_fields(chosen.word, options)


def require_plan(word: str, options: Options) -> None:
    """Raise UserError where a word ends as a YAML file does, and there is none."""
    from dumo.error import UserError

    if word.endswith((".yaml", ".yml")) and not Path(word).is_file():
        raise UserError(f"there is no file {word}: write a plan as docs/compare.md has it, or name one of dumo's")


def require_evaluated(word: str, options: Options) -> None:
    """Raise UserError unless a word names an evaluation, or a run's folder that has one."""
    from dumo.config.place import require_evaluation
    from dumo.run import shipped

    require_evaluation(shipped.find(word))


def require_logged(word: str, options: Options) -> None:
    """Raise UserError unless a word names the folder of a run that has a log."""
    from dumo.config.place import require_log
    from dumo.run import shipped

    require_log(shipped.find(word))


def _require_images(word: str) -> None:
    """Raise UserError where a folder has no images."""
    from dumo.config.place import require_images

    require_images(word)


def _require_fields(source: str | Path, options: Options, *, is_net_open: bool = False) -> dict[str, Any]:
    """The plain values of a run, with --set of `options`.

    `is_net_open`: the kind of the net is chosen later, for this machine, so its fields are not looked up unless --set
    says the kind. Raises UserError, one line per mistake, where they have fields that no run has.
    """
    from dumo.config.change import override
    from dumo.config.fault import faults
    from dumo.config.line import lines_of
    from dumo.config.source import read
    from dumo.error import UserError

    text = read(source)
    tree = deepcopy(text.tree)
    if is_net_open:
        tree["net"] = {}
    override(tree, options.get("set_") or ())
    found = faults(tree)
    if found:
        raise UserError(lines_of(found, text.name))
    return tree
