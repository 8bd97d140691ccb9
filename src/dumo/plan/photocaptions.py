"""Whether the captions of a folder of images are read, and by what net.

`choose_captions` is the entrance. Images with captions train a net that reads them: a DiT, with a T5 over their bytes
that is trained along and needs no file. Other encoders are those of the recipes of text to image. The user may choose
otherwise by settings.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dumo.config.change import field_of, yaml_text
from dumo.config.place import RUNS_FOLDER, TEXTS_FOLDER
from dumo.config.source import folder_of_images
from dumo.data import Images
from dumo.data.annotation import NoCaptionsError, captions_of
from dumo.data.caption import CaptionFiles
from dumo.data.column import AUTO
from dumo.data.metadata import table_names
from dumo.data.store import Store, first_sorted
from dumo.encoders.caption import Captions
from dumo.io.read import brief, user_path
from dumo.runtime import install_command, package_problem
from dumo.runtime.door import settings
from dumo.types import UserError

# The encoder of captions: ours, as cifar10-latents-words
_CAPTION_ENCODER = {"kind": "learned", "width": 32, "depth": 1, "drop": 0.1}
_MAX_CAPTION_BYTES = 128  # that are read of a caption: ours
# Ours: for captions on a CPU, since a U-Net reads none; the better of two that were tried on photos (docs/log.md).
_CPU_CAPTION_NET = {"kind": "dit", "patch": 4, "width": 128, "depth": 4, "attention": 4, "time_scale": 10.0}


@dataclass(frozen=True)
class CaptionChoice:
    """What becomes of the captions of some images."""

    fields: dict[str, Any] = field(default_factory=dict)  # of a run whose net reads them; {}: none are read
    line: str = ""  # on captions that exist and are not read, and why; "" where there are none


def choose_captions(images: Images, store: Store, sets: Sequence[str], *, on_a_cpu: bool) -> CaptionChoice:
    """Decide whether a net reads the captions of images. `store` has their files, `sets` are the user's own changes.

    Raises UserError where captions that would be read are damaged, or their package is missing or of another version.
    """
    reason_not_to_read = _reason_not_to_read(images, sets)
    try:
        captions = _read_captions(images, store, needed=not reason_not_to_read)
    except NoCaptionsError as error:
        return CaptionChoice(line="" if reason_not_to_read else caption_hint(error))
    if captions is None:
        return CaptionChoice()
    if reason_not_to_read:
        return CaptionChoice(line=f"{len(captions):,} found, not used: {reason_not_to_read}")
    problem = package_problem("transformers", "text")
    if problem:
        raise UserError(
            f"{images.root} has {len(captions):,} captions, and to train on them needs {problem}: "
            f"{install_command('text')}  or leave them out by {settings('data.captions=null')}"
        )
    return CaptionChoice(_caption_fields(images.root, captions, on_a_cpu=on_a_cpu))


def caption_hint(error: NoCaptionsError) -> str:
    """A line on what may be captions, and how to have it read; "" where there is nothing of the kind."""
    if error.columns:
        name_column = settings(f"data.captions={yaml_text({'kind': 'files', 'name': error.columns[0]})}")
        return f"none read; of the columns {', '.join(error.columns)} one may be named, as by {name_column}"
    if error.tables:
        table = first_sorted(error.tables)
        return f"none read; a table of captions is called {table_names(error.tables)}, and there is {table}"
    return ""


def _read_captions(images: Images, store: Store, *, needed: bool) -> Captions | None:
    """The captions of the images; None where they are damaged, or of other images, and not `needed`.

    Raises NoCaptionsError where there are none; and UserError where they are damaged, or of other images, if `needed`.
    """
    name = images.captions.name if isinstance(images.captions, CaptionFiles) else AUTO
    try:
        texts = captions_of(user_path(images.root, "data.root"), store, name, require_pairs=needed)
    except NoCaptionsError:
        raise
    except UserError as error:
        if not needed:
            return None
        raise UserError(f"{error}; or leave captions out: {settings('data.captions=null')}") from error
    return Captions.from_images(texts)


def _reason_not_to_read(images: Images, sets: Sequence[str]) -> str:
    """Which of the user's changes `sets` keeps a run from reading the captions of its images; "" where none does."""
    reads_captions = isinstance(images.captions, CaptionFiles)
    for text in sets:
        chooses_net = field_of(text) in ("net", "net.kind")
        chooses_captions = text.startswith("data.captions") and not reads_captions
        if chooses_net or chooses_captions:
            return f"{settings(brief(text))} says what the net reads"
    return ""


def _caption_fields(place: str, captions: Captions, *, on_a_cpu: bool) -> dict[str, Any]:
    """The fields of a net that reads these captions, which are of the images at `place`."""
    longest = max(len(text.encode()) for text in captions.texts)
    length = min(_MAX_CAPTION_BYTES, longest + 1)  # with the end's token
    root = Path(RUNS_FOLDER) / TEXTS_FOLDER / f"{folder_of_images(place).name}-{captions.digest()}"
    texts = {**_CAPTION_ENCODER, "root": str(root), "tokenizer": {"kind": "tokens", "length": length}}
    fields: dict[str, Any] = {"data.captions": {"kind": "files"}}
    if on_a_cpu:
        fields["net"] = {**_CPU_CAPTION_NET, "texts": texts}
    else:
        fields["net.texts"] = texts
    return fields
