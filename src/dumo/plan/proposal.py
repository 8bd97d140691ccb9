"""A run for a folder of images: what fits the images, the machine and the time there is, measured before it trains.

`propose` is the entrance. It

1. looks at the images (`_look_at`), and at their captions (`_read_captions`),
2. chooses fields that fit them and the machine (`_examine`),
3. times a step (`_step_seconds`),
4. sets how long to train (`train.minutes`), and about how many steps that is.

The recipe `my-images` is for a GPU, and trains on one as it is. On a CPU a run ends by the clock, unless the user sets
`train.steps`. It learns photos in the latents of the autoencoder that comes with dumo, by the recipe `my-images-64`,
and the training encodes them first; where the autoencoder does not suit the images (`dumo.plan.photolatents`), a small
U-Net learns small images in pixels. What is proposed is set in the run like any other field, and `resolved.proposed` of
its run.yaml says which fields those are.

Images with captions train a net that reads them: a DiT, with a T5 over their bytes that is trained along and needs no
file. Other encoders are those of the recipes of text to image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dumo.config.change import override, shown
from dumo.config.code import has_own_parts
from dumo.config.load import RUN_FILE, load_recipe, parse
from dumo.config.source import IMAGES_LATENTS_RECIPE, PROPOSED, folder_of_images, settings_of_images
from dumo.config.source import IMAGES_RECIPE as RECIPE
from dumo.config.spec import Run
from dumo.config.word import method
from dumo.data import Data, Images, Memory, cache, is_latents
from dumo.data.annotation import NoCaptionsError, captions_of
from dumo.data.caption import CaptionFiles
from dumo.data.column import AUTO
from dumo.data.metadata import table_names
from dumo.data.pixel import ToSquare, Unreadable, short_side
from dumo.data.store import Store, first_sorted
from dumo.encoders.caption import Captions
from dumo.io.read import brief, user_path
from dumo.plan import machine, photolatents, plan, rehearsal
from dumo.plan.findings import caption_findings
from dumo.run import contract, trial_net
from dumo.run.net import outline, require_room
from dumo.run.resolve import resolve
from dumo.run.weights import build
from dumo.runtime import install_command, installed_version, threads
from dumo.runtime.device import choose_device
from dumo.runtime.door import option, settings
from dumo.runtime.progress import Bar, ignore_line, no_bar
from dumo.runtime.stopwatch import WARM_UP, Stopwatch
from dumo.runtime.text import duration_text
from dumo.training.deadline import SECONDS_PER_MINUTE
from dumo.types import Spec, UserError

MINUTES = 6.0  # of a training on a CPU, unless another time is asked for: ours
TIMED_STEPS = 8  # ours
MAX_HEADERS = 256  # images whose header is read: ours
MAX_DECODED = 8  # images that are decoded, to time it and to try the autoencoder: ours
FEW_IMAGES = 200  # of fewer the plan says what they can give: ours
WARMUP_SHARE = 10  # one in this many steps warms up, at most as many as the recipe says: ours
SLACK = 1.1  # the time of a training, with logs, probes, sheets and checkpoints, over that of its steps: ours, measured
MIN_SIDE = 16  # pixels: ours
SIDE_STEP = 8  # pixels of which a side is a multiple, since nets halve it several times
MAX_SIDES = {"cpu": 32, "cuda": 64}  # pixels, by device: ours
CPU_FIELDS = {"train.batch": 32, "train.precision": "fp32", "train.compile": "none"}
# Ours, for pixels: 0.7 M parameters, a quarter of a second for a step of 32 rows on two cores. In the same time on 150
# photos a DiT of 1.3 M made mosaics, further from the photos (kernel distance 1.9, this one 1.2; docs/log.md).
CPU_NET = {"kind": "unet", "width": 16, "multipliers": [1, 2, 4], "depth": 1, "time_scale": 10.0}
# Ours: for captions on a CPU, since a U-Net reads none; the better of two that were tried on photos (docs/log.md).
CPU_CAPTION_NET = {"kind": "dit", "patch": 4, "width": 128, "depth": 4, "attention": 4, "time_scale": 10.0}
TEXTS = {
    "kind": "learned",
    "width": 32,
    "depth": 1,
    "drop": 0.1,
}  # the encoder of captions: ours, as cifar10-latents-words
MAX_CAPTION_BYTES = 128  # that are read of a caption: ours
# Of latents whose images have classes: ours, as dumo-best-latents; without classes there is nothing to guide towards.
CLASS_FIELDS = {"objective.drop": 0.1, "objective.guide.zeta": 0.55}


class _ImagesOnly(Spec):
    """The part of a run that says which images it learns."""

    data: Data


@dataclass(frozen=True)
class ImagesFound:
    """What is known of the images of a folder, from some of them."""

    count: int  # of all images
    headers: int  # images whose header was read
    bad: int  # of these, images that cannot be read
    side: float  # pixels of the shorter side, the median
    decode_seconds: float  # of one image on one core
    captions: str = ""  # a line on captions that exist and are not read, and why; "" where there are none
    space: str = ""  # a line on whether they are learned in latents or pixels, and why; "" where it is not chosen
    encode_seconds: float = 0.0  # of one image through the autoencoder, and mirrored where that is; 0: in pixels

    @property
    def prepare_seconds(self) -> float:
        """Seconds until all of them are decoded, and encoded where they are, with the threads there are now."""
        return self.count * (self.decode_seconds / torch.get_num_threads() + self.encode_seconds)


@dataclass(frozen=True)
class _Draft:
    """A recipe, and the fields in it that fit some images and the machine."""

    images: ImagesFound
    recipe: str = RECIPE
    fields: dict[str, Any] = field(default_factory=dict)

    def with_line(self, **lines: str) -> "_Draft":
        """With a line on captions or space."""
        return replace(self, images=replace(self.images, **lines))

    def run(self, fields: dict[str, Any], sets: Sequence[str]) -> Run:
        """The recipe with its fields, these, and the user's own changes `sets`, which count most."""
        texts = [f"{name}={shown(value)}" for name, value in (self.fields | fields).items()]
        tree = load_recipe(self.recipe, texts).model_dump(mode="json")
        override(tree, settings_of_images(tree, sets))
        return parse(Run, tree)


@dataclass(frozen=True)
class Proposal:
    """A run, and the time that it is expected to take."""

    run: Run
    images: ImagesFound
    machine: str
    step_seconds: float  # with what validation adds to a step
    prepare_seconds: float  # until the first step

    @property
    def lacks_time(self) -> bool:
        """Whether it ends by the clock before there is time for a step. It makes one all the same."""
        if self.run.train.minutes is None:
            return False
        return self.prepare_seconds + SLACK * self.step_seconds > SECONDS_PER_MINUTE * self.run.train.minutes

    @property
    def seconds(self) -> float:
        """Seconds of the whole training."""
        minutes = self.run.train.minutes
        if minutes is not None:
            return SECONDS_PER_MINUTE * minutes
        return self.prepare_seconds + SLACK * self.run.train.steps * self.step_seconds

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield the proposal as lines: a name and a text."""
        run = self.run
        images = self.images
        text = f"{images.count:,}"
        if run.data.labels:
            text += f" in {run.data.labels} classes"
        text += f", {images.side:.0f} pixels high or wide"
        if images.bad:
            headers = "all" if images.headers == images.count else f"{images.headers:,}"
            text += f"; {images.bad:,} of {headers} looked at cannot be read and are left out"
        yield "images", text
        if run.data.captions:
            captions = ", ".join(finding.text for finding in caption_findings(run.data))
            yield "captions", f"{captions}; the net reads them, {settings('data.captions=null')} leaves them out"
        elif images.captions:
            yield "captions", images.captions
        if images.count < FEW_IMAGES:
            yield "few", f"{images.count:,} images: expect their colours and textures, and in time copies of them"
        yield "machine", self.machine
        yield "size", f"{' x '.join(map(str, run.shown_shape[1:]))} pixels (data.side)"
        if images.space:
            yield "learned as", images.space
        parameters = sum(p.numel() for p in outline(run).parameters())
        yield "network", f"{run.net.kind}, {parameters:,} parameters"
        yield "objective", str(method(run.objective))
        yield "precision", f"{run.train.precision}, compile {run.train.compile}"
        epochs = run.train.steps * run.train.batch / images.count
        ends_by_clock = run.train.minutes is not None
        about = "about " if ends_by_clock else ""
        yield "steps", f"{about}{run.train.steps:,} of {run.train.batch} images: each image {about}{epochs:,.0f} times"
        measured = f"{self.step_seconds:.2g} s a step, measured here"
        if ends_by_clock:
            yield "time", f"{duration_text(self.seconds)}, then it ends, with as many steps as it made; {measured}"
        else:
            yield "time", f"{duration_text(self.seconds)}, by {measured}"
        if self.lacks_time:
            yield "too short", self._describe_lack()

    def _describe_lack(self) -> str:
        """What takes the time of a run that has none for its steps, and how to give it enough."""
        least_seconds = self.prepare_seconds + SLACK * self.step_seconds
        enough_minutes = ceil(2 * least_seconds / SECONDS_PER_MINUTE)  # so that half of them is for steps
        return (
            f"images take {duration_text(self.prepare_seconds)} to prepare, and no time is left for steps: give it "
            f"more, as by {option('minutes', enough_minutes)}"
        )


def propose(
    place: str | None,
    sets: Sequence[str] = (),
    *,
    minutes: float | None = None,
    device: str = "auto",
    bar: Bar = no_bar,
) -> Proposal:
    """Propose a run on the images at `place`, a folder or file, that takes these minutes from now on.

    `minutes` None is MINUTES on a CPU, and on a GPU as long as the recipe says. `sets`, as --set takes them, win over
    what is proposed: with `train.steps` among them it ends by these. Without a place they say which images in memory it
    is. Raises UserError where there are no images, or a field is wrong.
    """
    torch_device = choose_device(device)
    ends_by_steps = any(text.startswith("train.steps=") for text in sets)
    if not minutes and torch_device.type == "cpu":
        minutes = MINUTES

    # the images, and the recipe and fields that fit them
    tree = {"data": load_recipe(RECIPE, [f"data.root={place}"] if place else []).data.model_dump(mode="json")}
    override(tree, [text for text in sets if text.startswith("data")])
    data = parse(_ImagesOnly, tree).data
    if isinstance(data, Memory):
        images = ImagesFound(data.open().size, headers=0, bad=0, side=min(data.shape[1:]), decode_seconds=0.0)
        draft = _Draft(images, fields=_machine_fields(torch_device, data.shape[-1]))
    elif isinstance(data, Images):
        training_seconds = SECONDS_PER_MINUTE * minutes if minutes and not ends_by_steps else None
        draft = _examine(data, place, torch_device, sets, training_seconds, bar)
    else:
        raise UserError(f"{place} is a place of images, and data.kind={data.kind} reads none: leave it out")
    images = draft.images
    fields: dict[str, Any] = {}

    # the seconds of a step
    run = resolve(draft.run(fields, sets))
    # without a line on the number of threads, which training prints
    with bar("timing a step", 1) as tick, threads.fewer_when_busy(torch_device, ignore_line):
        validation = plan.validation(run)
        seconds_per_step = _step_seconds(run, torch_device)
        if validation:
            seconds_per_step *= 1 + validation["share"]
        tick(1, "")
    prepare_seconds = images.prepare_seconds

    # how long to train, and about how many steps that is
    if minutes:
        seconds_for_steps = SECONDS_PER_MINUTE * minutes - prepare_seconds
        steps = max(1, int(seconds_for_steps / (SLACK * seconds_per_step)))
        fields["train.steps"] = steps
        fields["train.schedule.warmup"] = min(steps // WARMUP_SHARE, run.train.schedule.warmup)
        if not ends_by_steps:
            fields["train.minutes"] = minutes
    run = resolve(draft.run(fields, sets))
    proposed = draft.fields | fields
    proposed.pop("data.images.root" if is_latents(run.data) else "data.root", None)
    run = run.model_copy(update={"resolved": run.resolved | {PROPOSED: proposed}})
    return Proposal(run, images, machine.hardware(torch_device).text, seconds_per_step, prepare_seconds)


def _machine_fields(device: torch.device, side: int) -> dict[str, Any]:
    """Fields for a device, and images of this side: those of a smaller net on a CPU; {} on a GPU."""
    if device.type != "cpu":
        return {}
    return {**CPU_FIELDS, "net": {**CPU_NET, "attend": [side // 4]}}


def _examine(
    images: Images,
    place: str | None,
    device: torch.device,
    sets: Sequence[str],
    training_seconds: float | None,
    bar: Bar,
) -> _Draft:
    """Look at files of images, and choose a recipe and fields for them: latents or pixels, size, net, captions.

    `place` is where the user says that they are; None: `sets` alone, the user's own changes, say it.
    `training_seconds` None: it ends by steps. Raises UserError where there are no images, captions are damaged, or the
    package that reads captions is not installed.
    """
    try:
        store = images.undecoded()
    except UserError as error:
        raise UserError(f"{images.root} is taken for a place of images, for it has no {RUN_FILE}: {error}") from error
    images_found, decodable = _look_at(store, ToSquare(images.side, images.crop), bar)

    # captions, which a net in pixels reads
    pixels_draft = _pixels_draft(images, images_found, place, device)
    captions: Captions | None = None
    line = ""
    reason_not_to_read = _reason_not_to_read_captions(images, sets)
    try:
        captions = _read_captions(images, store, needed=not reason_not_to_read)
    except NoCaptionsError as error:
        if not reason_not_to_read:
            line = caption_hint(error)
    if captions is not None and not reason_not_to_read:
        if not installed_version("transformers"):
            raise UserError(
                f"{images.root} has {len(captions):,} captions: {install_command('text')}  to train on them, or leave "
                f"them out by {settings('data.captions=null')}"
            )
        caption_fields = _caption_fields(images.root, captions, on_a_cpu=device.type == "cpu")
        draft = replace(pixels_draft, fields=pixels_draft.fields | caption_fields)
        return draft.with_line(space="pixels: captions are read there") if device.type == "cpu" else draft
    if captions is not None:
        line = f"{len(captions):,} found, not used: {reason_not_to_read}"

    # latents, or pixels
    draft = pixels_draft
    if device.type == "cpu" and place:
        latents_draft = _latents_draft(images, images_found, decodable, place, sets, training_seconds, bar)
        if isinstance(latents_draft, _Draft):
            draft = latents_draft
        else:
            draft = pixels_draft.with_line(space=f"pixels: {latents_draft}")
    return draft.with_line(captions=line)


def _pixels_draft(images: Images, images_found: ImagesFound, place: str | None, device: torch.device) -> _Draft:
    """The recipe and fields for images that are learned in pixels."""
    side = _side_to_train(images_found.side, MAX_SIDES.get(device.type, MAX_SIDES["cuda"]))
    fields: dict[str, Any] = {"data.root": place} if place else {}
    return _Draft(images_found, RECIPE, {**fields, "data.side": side, **_machine_fields(device, side)})


def _latents_draft(
    images: Images,
    images_found: ImagesFound,
    decodable: Sequence[bytes],
    place: str,
    sets: Sequence[str],
    training_seconds: float | None,
    bar: Bar,
) -> "_Draft | str":
    """The recipe and fields for images that are learned in latents; or why they are learned in pixels, in words.

    `decodable` are some of the images, as files.
    """
    reason = photolatents.reason_by_settings(images, sets)
    if reason:
        return reason
    latents = load_recipe(IMAGES_LATENTS_RECIPE).data
    assert is_latents(latents)
    side = images.side
    if not photolatents.is_side_set(sets) and images.crop != "none":
        side = photolatents.side_of_latents(images_found.side, latents.images.side)
    to_pixels = ToSquare(max(side, photolatents.SIDE_STEP), images.crop)
    pixels = torch.stack([to_pixels(data) for data in decodable])
    reason = photolatents.reason_by_images(images_found.side, pixels)
    if reason:
        return reason

    # what the autoencoder makes of them, and how long it takes
    codec = latents.codec.open("cpu")
    with bar("trying the autoencoder", 1) as tick, threads.fewer_when_busy(torch.device("cpu"), ignore_line):
        trial = photolatents.try_autoencoder(codec, pixels)
        tick(1, "")
    reason = photolatents.reason_by_reconstruction(trial)
    if reason:
        return reason

    # whether there is time to encode them, unless that is done
    encode_seconds = trial.encode_seconds * (2 if images.flip else 1)
    images_found = replace(images_found, encode_seconds=encode_seconds)
    reason = photolatents.reason_by_time(images_found.prepare_seconds, training_seconds)
    if reason and not photolatents.has_caches(place):
        return reason
    encoded_images = images.model_copy(update={"side": side}).with_facts()
    cache_folder = photolatents.cache_folder(place, encoded_images, codec)
    if cache.is_whole(Path(cache_folder)):
        images_found = replace(images_found, decode_seconds=0.0, encode_seconds=0.0)
    elif reason:
        return reason

    fields: dict[str, Any] = {
        "data.root": cache_folder,
        "data.images.root": place,
        "data.images.side": side,
    }
    if encoded_images.labels > 1:
        fields |= CLASS_FIELDS
    line = f"latents by {latents.codec.kind}, which makes {trial.decibels:.1f} dB of these images; in pixels by "
    line += settings("data.kind=images")
    return _Draft(replace(images_found, space=line), IMAGES_LATENTS_RECIPE, fields)


def caption_hint(error: NoCaptionsError) -> str:
    """A line on what may be captions, and how to have it read; "" where there is nothing of the kind."""
    if error.columns:
        way = settings(f"data.captions={{kind: files, name: {error.columns[0]}}}")
        return f"none read; of the columns {', '.join(error.columns)} one may be named, as by {way}"
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


def _reason_not_to_read_captions(images: Images, sets: Sequence[str]) -> str:
    """Which of the user's changes `sets` keeps a run from reading the captions of its images; "" where none does."""
    reads_captions = isinstance(images.captions, CaptionFiles)
    for text in sets:
        chooses_net = text.partition("=")[0] in ("net", "net.kind")
        chooses_captions = text.startswith("data.captions") and not reads_captions
        if chooses_net or chooses_captions:
            return f"{settings(brief(text))} says what the net reads"
    return ""


def _caption_fields(place: str, captions: Captions, *, on_a_cpu: bool) -> dict[str, Any]:
    """The fields of a net that reads these captions, which are of the images at `place`."""
    length = min(MAX_CAPTION_BYTES, 1 + max(len(text.encode()) for text in captions.texts))  # with the end's token
    root = Path("runs/texts") / f"{folder_of_images(place).name}-{captions.digest()}"
    texts = {**TEXTS, "root": str(root), "tokenizer": {"kind": "tokens", "length": length}}
    fields: dict[str, Any] = {"data.captions": {"kind": "files"}}
    if on_a_cpu:
        fields["net"] = {**CPU_CAPTION_NET, "texts": texts}
    else:
        fields["net.texts"] = texts
    return fields


def _step_seconds(run: Run, device: torch.device) -> float:
    """The seconds of a step of the training loop on this device, measured on random numbers.

    Raises UserError where the net has no room here, or a user's own part cannot be trained.
    """
    if has_own_parts(run):
        contract.require_contract(run, trial_net.randomly_initialized_net(run, device), device)
    run = run.model_copy(update={"net": trial_net.with_random_texts_if_missing(run.net)})
    rows = run.train.micro_batch or run.train.batch
    require_room(run, device, run.train.copies, rows)
    batch = rehearsal.random_rows(run.data, rows, device)
    step = rehearsal.make_step(run, build(run, device), batch, warm_up=WARM_UP, rounds=TIMED_STEPS)
    return step.of_batch(run.train.batch)


def _look_at(store: Store, to_pixels: ToSquare, bar: Bar = no_bar) -> tuple[ImagesFound, list[bytes]]:
    """Read the headers of some images, evenly spread, and decode a few, evenly spread, too.

    Returns what is found, and the few that could be decoded, as files. Raises UserError where no image can be read.
    """
    indices = sorted({round(i * (len(store) - 1) / (MAX_HEADERS - 1)) for i in range(MAX_HEADERS)})
    watch = Stopwatch(torch.device("cpu"))
    sides: list[int] = []
    decode_seconds: list[float] = []
    decodable: list[bytes] = []
    bad = 0
    with bar("looking at images", len(indices)) as tick:
        for done, i in enumerate(indices, start=1):
            try:
                data = store.read(i)
                sides.append(short_side(data))
                if len(decodable) * len(indices) < MAX_DECODED * done:  # is due by now
                    decode_seconds.append(watch.seconds(partial(to_pixels, data)))
                    decodable.append(data)
            except (OSError, ValueError, Unreadable):
                bad += 1
            tick(done, "")
    if not decodable:
        raise UserError(f"none of the {bad} images that were looked at can be read: the first is {store.path(0)}")
    images_found = ImagesFound(
        count=len(store), headers=len(indices), bad=bad, side=median(sides), decode_seconds=median(decode_seconds)
    )
    return images_found, decodable


def _side_to_train(shorter_side: float, max_side: int) -> int:
    """The pixels of a side to train at: those of the images' shorter side, between MIN_SIDE and `max_side`."""
    return max(MIN_SIDE, min(max_side, int(shorter_side) // SIDE_STEP * SIDE_STEP))
