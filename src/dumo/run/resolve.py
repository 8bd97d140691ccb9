"""Fill in the values of a run that depend on files (classes, captions, hashes), and record them as `resolved`.

When a run is opened for training, `Trainer.__init__` calls:

1. `find_commits` and `with_commits`, which pin Hub names to commits, `fetch_files`, which downloads the files for
   training, and `with_absolute_paths`
2. `resolve`, which fills in classes, captions, schedule and code hashes, and checks the net
3. `with_hashes`, which adds hashes of everything but the data that samples depend on: autoencoder, pipeline, text
   encoder, and the few-step run under a subject's adapters

The run.yaml is then complete. For readers on other machines, `without_paths` shortens each absolute path to its last
component.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

from pydantic.config import JsonDict

from dumo.config.check_spec import check
from dumo.config.code import codes_of
from dumo.config.conditions import shown_data
from dumo.config.difference import differences
from dumo.config.load import load, parse
from dumo.config.overrides import field_of, override
from dumo.config.source import CODE_KEY, RunText, read, without_resolved
from dumo.config.spec import Run
from dumo.data import Data, Images, Latents
from dumo.data.cache import is_finished, read_index
from dumo.data.images import rename_fields
from dumo.flow.path import Diffusion
from dumo.io import hub, run_places
from dumo.io.read import user_path
from dumo.io.yaml import yaml_text
from dumo.nets import Pretrained
from dumo.nets.text_spec import EmbeddedTexts
from dumo.run.check_network import check_built
from dumo.run.prompt_rows import sources_identity
from dumo.run.weights import few_step_run
from dumo.types import Spec, UserError

S = TypeVar("S", bound=Spec)
# The hash of a file, or the facts of a pipeline; None if unknown.
Pin = str | dict[str, str] | None


def load_resolved(source: str | RunText, changes: Sequence[str] = (), *, fetches: bool = False) -> Run:
    """Load a run with changes such as a.b=c and resolve it, for commands that do not train.

    If the data change, the resolved values of the old data are dropped. With `fetches`, Hub files are downloaded first.
    """
    text = source if isinstance(source, RunText) else read(source)
    if any(field_of(change).split(".")[0] == "data" for change in changes):
        text = without_resolved(text)
    run = load(text, changes)
    if fetches:
        run = with_commits(run, find_commits(run))
        fetch_files(run)
    return resolve(run)


def resolve(run: Run) -> Run:
    """Fill in the values that depend on files, and record them under `resolved`.

    These are the classes, class names and caption digest of the data, the schedule of the pipeline, and a hash of the
    code of every user-defined class. Missing files are skipped, and a run that is already resolved is returned
    unchanged. Raise UserError if the files contradict the spec, or if the network does not fit the run.
    """
    data = run.data
    path = run.path
    if isinstance(data, Images | Latents):
        data = data_with_facts(data)
    if isinstance(path, Diffusion) and path.schedule is None and isinstance(run.net, Pretrained) and run.net.diffusion:
        path = path.model_copy(update={"schedule": run.net.diffusion.schedule})
    resolved_run = run
    facts: dict[str, object] = {}
    if data is not run.data or path is not run.path:
        resolved_run = run.model_copy(update={"data": data, "path": path})
        facts = _new_facts(run, resolved_run)
    known_codes = run.resolved.get(CODE_KEY)
    if not isinstance(known_codes, dict):
        known_codes = {}
    codes = {**dict(codes_of(run)), **known_codes}
    if codes != known_codes:
        facts[CODE_KEY] = codes
    if not facts:
        check_built(run)
        return run
    check(resolved_run)
    check_built(resolved_run)
    return resolved_run.model_copy(update={"resolved": run.resolved | facts})


def _new_facts(run: Run, resolved_run: Run) -> dict[str, object]:
    """Return the fields that resolving a run has changed, with their new values."""
    facts: dict[str, object] = {}
    for difference in differences(run, resolved_run):
        if difference.decides:
            facts[difference.field] = difference.now
    titles = _titles_of(resolved_run.data)
    if titles != _titles_of(run.data):
        facts["data.images.titles" if isinstance(run.data, Latents) else "data.titles"] = [*titles]
    path = resolved_run.path
    if isinstance(path, Diffusion) and path.schedule and path != run.path:
        facts["path.schedule"] = path.schedule.model_dump(mode="json")
    return facts


def _titles_of(data: Data) -> tuple[str, ...]:
    """Return the class names from the data files if the spec gives only the number of classes; () if unknown."""
    images = shown_data(data)
    return images.titles if isinstance(images, Images) else ()


def data_with_facts(data: Data) -> Data:
    """Return the data with classes, names and captions read from their files.

    Raise UserError, naming the field of the images, if the files contradict the spec.
    """
    if not isinstance(data, Images | Latents):
        return data
    try:
        return data.with_facts()
    except UserError as error:
        message = f"data: {error}"
        if isinstance(data, Latents):
            message = f"data.images: {rename_fields(str(error))}"
        raise type(error)(message) from error


def find_commits(spec: Spec, before: Spec | None = None) -> dict[str, str]:
    """Return the pinned name (with its commit) of each field that names a Hub repository.

    The commit is the one in `before`, the run that is resumed, or else the newest. Data sets with a local copy are
    skipped. Before the Hub is queried, the run is checked with bundled configs and local images, because a download may
    take hours.
    """
    places_before = dict(places(before)) if before else {}
    commits: dict[str, str] = {}
    unpinned: dict[str, tuple[str, hub.Kind]] = {}
    for field, text, extra in _places(spec):
        kind = extra.get("hub")
        if kind is None or not hub.is_hub_name(text) or (kind == "dataset" and hub.local_copy(text)):
            continue
        known = places_before.get(field, "")
        if hub.repository_of(known) == text:
            commits[field] = known
        else:
            unpinned[field] = text, "dataset" if kind == "dataset" else "model"
    if unpinned and isinstance(spec, Run):
        check_built(spec)
        data_with_facts(spec.data)
    for field, (name, kind) in unpinned.items():
        commits[field] = hub.pin(name, kind)
    return commits


def with_commits(spec: S, commits: Mapping[str, str]) -> S:
    """Return the spec with the pinned names from `find_commits`."""
    return _with_places(spec, commits)


def fetch_files(run: Run) -> None:
    """Download the Hub files that training needs: images that are not encoded yet, and the pipeline."""
    data = run.data
    if isinstance(data, Images):
        data.fetch()
    elif isinstance(data, Latents) and not is_finished(data.folder):
        data.images.fetch()
    if run.pipeline and run.pipeline.is_on_hub:
        run.pipeline.fetch()


def with_absolute_paths(run: Run) -> Run:
    """Return the run with absolute paths in its path fields. Names without an existing path are kept."""
    return _with_places(run, {field: _absolute_place(text, extra) for field, text, extra in _places(run)})


def _absolute_place(place: str, extra: JsonDict) -> str:
    """Return the absolute path of a field's value, given the field's `json_schema_extra`. Names are kept."""
    names = cast(list[str], extra.get("names", ()))
    if place in names:
        return place
    if "hub" in extra and hub.is_hub_name(place):
        copy = hub.local_copy(place) if extra["hub"] == "dataset" else None
        return str(copy) if copy else place
    return absolute_path(place, maybe=extra["where"] == "maybe")


def without_paths(run: Run) -> Run:
    """Return the run with each path shortened to its last component, for other machines. Names are kept."""
    texts = {
        field: Path(text).name if extra["where"] == "always" else without_path(text)
        for field, text, extra in _places(run)
    }
    return _with_places(run, texts)


def without_path(place: str) -> str:
    """Return the last component of an absolute path, and any other text unchanged."""
    return Path(place).name if Path(place).is_absolute() else place


def places(spec: Spec) -> list[tuple[str, str]]:
    """Return the dotted names and values of a spec's path fields."""
    return [(field, text) for field, text, _ in _places(spec)]


def _places(part: Spec, prefix: str = "") -> Iterator[tuple[str, str, JsonDict]]:
    """Yield the dotted name, value and `json_schema_extra` of each path field of a spec, at any depth."""
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        extra = field.json_schema_extra
        if isinstance(value, Spec):
            yield from _places(value, f"{prefix}{name}.")
        elif isinstance(value, str) and isinstance(extra, dict) and "where" in extra:
            yield f"{prefix}{name}", value, extra


def _with_places(part: S, texts: Mapping[str, str], prefix: str = "") -> S:
    """Return the spec with these values in its path fields, by dotted name."""
    changes: dict[str, object] = {}
    for name in type(part).model_fields:
        value = getattr(part, name)
        if isinstance(value, Spec):
            new_value: object = _with_places(value, texts, f"{prefix}{name}.")
        elif f"{prefix}{name}" in texts:
            new_value = texts[f"{prefix}{name}"]
        else:
            continue
        if new_value != value:
            changes[name] = new_value
    return part.model_copy(update=changes) if changes else part


def absolute_path(text: str, *, maybe: bool = False) -> str:
    """Return an absolute path with expanded variables, or the unchanged text if a variable is not set.

    A file that ships with dumo keeps its name, dumo:NAME/FILE. With `maybe`, the text may be a name, and is kept if no
    such path exists.
    """
    shipped_path = run_places.path_in(text)
    if shipped_path is not None and shipped_path.is_file():
        return text
    try:
        path = user_path(text, "")
    except UserError:
        # Opening the path reports the error.
        return text
    return os.path.abspath(path) if path.exists() or not maybe else text


def with_hashes(run: Run, before: Run | None = None) -> Run:
    """Return the run with hashes of its codec, pipeline, text encoder and the run under a subject's adapters.

    Hashes of `before`, the run that is resumed, are kept.
    """
    pins_before = _pins(before) if before else {}
    new_pins: dict[str, Pin] = {}
    for field, pin_field in _pins(run).items():
        if pin_field.known is not None:
            continue
        pin = pins_before[field].known if field in pins_before else pin_field.take()
        if pin:
            new_pins[field] = pin
    if not new_pins:
        return run
    tree = run.model_dump(mode="json")
    override(tree, [f"{field}={yaml_text(pin)}" for field, pin in new_pins.items()])
    return parse(Run, tree | {"resolved": run.resolved | new_pins})


class _PinField(NamedTuple):
    """A field that contains a hash: its value, and a function that computes the hash."""

    known: Pin
    take: Callable[[], Pin]


def _pins(run: Run) -> dict[str, _PinField]:
    """Return the hash fields of a run by dotted name.

    If the codec is not on this machine, its hash is read from the cache of latents.
    """
    pins_by_field: dict[str, _PinField] = {}
    data = run.data
    if isinstance(data, Latents) and data.codec.kind != "pipeline":

        def find_codec_hash() -> str | None:
            cache = read_index(data.folder)
            codec_hash = data.codec.digest()
            if codec_hash or cache is None:
                return codec_hash
            return cache.weights

        pins_by_field["data.codec.sha256"] = _PinField(data.codec.sha256, find_codec_hash)
    pipeline = run.pipeline
    if pipeline:
        pins_by_field["pipeline.facts"] = _PinField(pipeline.facts, lambda: pipeline.with_facts().facts)
    texts = run.net.texts
    if isinstance(texts, EmbeddedTexts):
        identity = texts.identity
        pins_by_field["net.texts.identity"] = _PinField(identity, lambda: texts.find_identity(sources_identity(data)))
    if run.start and run.has_subject:
        pins_by_field["start.sha256"] = _PinField(run.start.sha256, lambda: few_step_run(run).sha256)
    return pins_by_field
