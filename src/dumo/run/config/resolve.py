"""What disk and machine say of a run: found once, when it is opened, and recorded in its run.yaml as `resolved`."""

from collections.abc import Iterator
from pathlib import Path

from dumo.data import Data, Images, Latents
from dumo.data.caption import Files
from dumo.io import digest
from dumo.nets.table import Tabled
from dumo.run.conditions import Conditions
from dumo.run.config.check import check
from dumo.run.config.load import differences
from dumo.run.config.source import CODE
from dumo.run.config.spec import Run
from dumo.types import Spec, UserError
from dumo.types.outside import TAG, code, kind_of


def resolve(run: Run) -> Run:
    """The run with the classes and names of its data, its captions' digest, and the identity of its table of texts.

    And with a hash of the code of every class from outside. A run that has them, as one read from its folder, stays as
    it is; so does what is not there yet. Raises UserError where what is found contradicts the spec.
    """
    texts, net = run.net.texts, run.net
    data = found_data(run.data)
    if isinstance(texts, Tabled):
        net = net.model_copy(update={"texts": texts.found()})
        if texts.identity is None:
            require_captions(data, texts)
    found = run.model_copy(update={"data": data, "net": net})
    new = {one.field: one.now for one in differences(run, found)}
    if CODE not in run.resolved and (codes := dict(codes_of(run))):
        new[CODE] = codes
    if not new:
        return run
    check(found)
    return found.model_copy(update={"resolved": run.resolved | new})


def found_data(data: Data) -> Data:
    """The data with what their files say of them. Raises UserError as `resolve`, after the field of the images."""
    try:
        return data.found() if isinstance(data, Images | Latents) else data
    except UserError as error:
        raise UserError(f"data{'.images' * isinstance(data, Latents)}: {error}") from error


def require_captions(data: Data, texts: Tabled) -> None:
    """Raise UserError where there is a table of texts that is not of these data's captions."""
    captions, names = Conditions(data).captions, Conditions(data).names
    now = captions.digest if isinstance(captions, Files) else digest.short(*names) if names else None
    there = texts.digest() if captions and now else None  # else the data are not here
    if there not in (None, now):
        raise UserError(
            f"net.texts.root: {texts.folder} is of other captions (digest {there}) than the data's ({now}): encode "
            "these into another folder, dumo encode RECIPE --set net.texts.root=DIR"
        )


def codes_of(part: object) -> Iterator[tuple[str, str | None]]:
    """The name of every class from outside in a spec, at any depth, and a hash of its code."""
    if isinstance(part, Spec):
        if kind_of(part) == TAG:
            yield getattr(part, "kind", ""), code(part)
        for name in type(part).model_fields:
            yield from codes_of(getattr(part, name))


def require_same_code(run: Run, folder: Path) -> None:
    """Raise UserError if a class from outside is not as it was when the run in this folder began."""
    was = run.resolved.get(CODE)
    for name, now in codes_of(run):
        if isinstance(was, dict) and was.get(name) != now:
            raise UserError(
                f"{name} is not the code that {folder} was trained with: bring that back, or train in another folder"
            )
