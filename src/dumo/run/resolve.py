"""What disk and machine say of a run: found once, when it is opened, and recorded in its run.yaml as `resolved`.

So a run is whole by itself: where things lie is written out (`placed`), and what no data is, but samples depend on, is
known by its hash (`pinned`). Where it moves to another machine, fields of places say where things are there.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar, cast

from pydantic import JsonValue
from pydantic.config import JsonDict

from dumo.config.change import override, shown
from dumo.config.check import check
from dumo.config.code import codes_of
from dumo.config.conditions import Conditions
from dumo.config.load import differences, load, parse
from dumo.config.need import ways_to_captions
from dumo.config.source import CODE, FILE, GIVEN
from dumo.config.spec import Run
from dumo.config.teacher import no_velocity
from dumo.data import Data, Images, Latents
from dumo.data.cache import read_contents
from dumo.data.caption import Files
from dumo.data.written import NoCaptionsError
from dumo.flow.path import Diffusion
from dumo.flow.reading import taught
from dumo.io import digest
from dumo.io.read import user_path
from dumo.nets import Pretrained
from dumo.nets.table import Tabled
from dumo.run.fit import check_opened
from dumo.run.weights import few_step_run
from dumo.types import Spec, UserError

S = TypeVar("S", bound=Spec)


def resolve(run: Run) -> Run:
    """The run with the classes and names of its data, its captions' digest, and the identity of its table of texts.

    And with the schedule of its pipeline, and a hash of the code of every class from outside. A run that has them, as
    one read from its folder, stays as it is; so does what is not there yet. Raises UserError where what is found
    contradicts the spec, or the net does not fit.
    """
    resolved = resolve_again(run)
    if resolved is run:
        check_opened(run)
    return resolved


def resolve_again(run: Run) -> Run:
    """A resolved run with what was made since; itself, and not checked again, where that is nothing.

    Raises UserError as `resolve`.
    """
    require_few_step_velocity(run)
    texts, net = run.net.texts, run.net
    try:
        data = found_data(run.data)
    except NoCaptionsError as error:
        if texts and texts.kind == "pipeline":
            raise UserError(f"{error}: {ways_to_captions(run.data)}") from error
        raise
    if isinstance(texts, Tabled):
        net = net.model_copy(update={"texts": texts.found()})
        if texts.identity is None:
            require_captions(data, texts)
    path = run.path
    if isinstance(path, Diffusion) and path.schedule is None and isinstance(net, Pretrained) and (frame := net.frame):
        path = path.model_copy(update={"schedule": frame.schedule})
    found = run.model_copy(update={"data": data, "net": net, "path": path})
    new = {one.field: one.now for one in differences(run, found)}
    if isinstance(texts, Tabled) and isinstance(net.texts, Tabled) and net.texts.identity != texts.identity:
        new["net.texts.identity"] = net.texts.identity
    if isinstance(path, Diffusion) and path.schedule and path != run.path:
        new["path.schedule"] = path.schedule.model_dump(mode="json")
    if CODE not in run.resolved and (codes := dict(codes_of(run))):
        new[CODE] = codes
    if not new:
        return run
    check(found)
    check_opened(found)
    return found.model_copy(update={"resolved": run.resolved | new})


def require_few_step_velocity(run: Run) -> None:
    """Raise UserError where a subject's few-step run is the teacher, and its objective has no velocity to learn from.

    Its objective is read from its folder, because the subject's run may have another one. A folder that is
    missing is skipped here, and refused where the run is opened.
    """
    if not run.start or not run.has_subject or run.teacher is None or run.teacher.kind != "base":
        return
    folder = whole(run.start.source, maybe=True)
    if not Path(folder, FILE).is_file():
        return
    objective = load(folder).objective
    if taught(objective).velocity is None:
        why = no_velocity("teacher.kind=base", folder, objective)
        raise UserError(f"{why}; or learn from the photographs alone, data.prior=null teacher=null")


def found_data(data: Data) -> Data:
    """The data with what their files say of them. Raises UserError as `resolve`, after the field of the images."""
    try:
        return data.found() if isinstance(data, Images | Latents) else data
    except UserError as error:
        raise type(error)(f"data{'.images' * isinstance(data, Latents)}: {error}") from error


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


def placed(run: Run, before: Run | None = None) -> Run:
    """The run with whole paths in fields that say where something lies; the words given for them are in `resolved`.

    `before` is the run of the folder it goes on in: what is given in the same words is where it was when that began,
    whatever variables and the working directory say now. What is not there, and may be a name, stays as it is.
    """
    old, words = (dict(places(before)), given(before.resolved)) if before else ({}, {})
    said = dict[str, str]()

    def place(field: str, text: str, extra: JsonDict) -> str:
        again = field in old and text in (old[field], words.get(field))
        said[field] = words.get(field, text) if again else text
        text = old[field] if again else text
        return text if text in cast(list[str], extra.get("names", ())) else whole(text, maybe=extra["where"] == "maybe")

    there = in_places(run, place)
    kept: dict[str, JsonValue] = {field: said[field] for field, text in places(there) if said[field] != text}
    rest = {name: value for name, value in run.resolved.items() if name != GIVEN}
    return there.model_copy(update={"resolved": rest | ({GIVEN: kept} if kept else {})})


def given(resolved: Mapping[str, JsonValue]) -> dict[str, str]:
    """The words that places were given in, by field, where these are not the whole paths."""
    found = resolved.get(GIVEN)
    return {field: str(text) for field, text in found.items()} if isinstance(found, dict) else {}


def as_given(run: Run) -> Run:
    """The run with its places in the words that they were given in, of a whole path the last part."""
    words = given(run.resolved)
    there = in_places(run, lambda field, text, _: without_path(words.get(field, text)))
    return there.model_copy(update={"resolved": {name: value for name, value in run.resolved.items() if name != GIVEN}})


def without_path(place: str) -> str:
    """The last part of a whole path; another place as it is."""
    return Path(place).name if Path(place).is_absolute() else place


def places(spec: Spec) -> list[tuple[str, str]]:
    """The fields that say where something lies, and what they say."""
    found = list[tuple[str, str]]()

    def note(field: str, text: str, _: JsonDict) -> str:
        found.append((field, text))
        return text

    in_places(spec, note)
    return found


def in_places(part: S, change: Callable[[str, str, JsonDict], str], prefix: str = "") -> S:
    """A spec with its places, at any depth, as `change` makes them of field, text, and what the field is marked by."""
    new = dict[str, object]()
    for name, field in type(part).model_fields.items():
        value, extra = getattr(part, name), field.json_schema_extra
        if isinstance(value, Spec):
            changed: object = in_places(value, change, f"{prefix}{name}.")
        elif isinstance(value, str) and isinstance(extra, dict) and "where" in extra:
            changed = change(f"{prefix}{name}", value, extra)
        else:
            continue
        if changed != value:
            new[name] = changed
    return part.model_copy(update=new) if new else part


def whole(text: str, *, maybe: bool = False) -> str:
    """A place as a whole path, with the values of variables; as it is where one is not set.

    `maybe`: also where nothing is there.
    """
    try:
        path = user_path(text, "")
    except UserError:  # said when it is opened
        return text
    return os.path.abspath(path) if path.exists() or not maybe else text


def pinned(run: Run, before: Run | None = None) -> Run:
    """The run with hashes of what no data is, but samples depend on: those of the run that it goes on as, if it has."""
    old = pins(before) if before else {}
    lacking = {field: find for field, (known, find) in pins(run).items() if known is None}
    found = {field: old[field][0] if field in old else None for field in lacking}
    new = {field: value for field, find in lacking.items() if (value := found[field] or find())}
    if not new:
        return run
    tree = run.model_dump(mode="json")
    override(tree, [f"{field}={shown(value)}" for field, value in new.items()])
    return parse(Run, tree | {"resolved": run.resolved | new})


Pin = str | dict[str, str] | None  # a hash, or the facts of a pipeline


def pins(run: Run) -> dict[str, tuple[Pin, Callable[[], Pin]]]:
    """The hashes that a run has a field for, and what finds each: of a codec that is not here, that of the cache."""
    found, data, pipeline = dict[str, tuple[Pin, Callable[[], Pin]]](), run.data, run.pipeline
    if isinstance(data, Latents) and data.codec.kind != "pipeline":

        def of_codec() -> str | None:
            there = read_contents(data.folder)
            return data.codec.digest() or (there and there.weights)

        found["data.codec.sha256"] = data.codec.sha256, of_codec
    if pipeline:
        found["pipeline.facts"] = pipeline.facts, lambda: pipeline.found().facts
    if run.start and run.has_subject:
        found["start.sha256"] = run.start.sha256, lambda: few_step_run(run).sha256
    return found
