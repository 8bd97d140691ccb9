"""A run for a folder of images: what fits the images, the machine and the time there is, measured before it trains.

The recipe `my-images` is for a GPU, and trains on one as it is. On a CPU a smaller net learns smaller images, in
float32, for as many steps as there are minutes for. What is proposed is set in the run like any other field, and
`resolved.proposed` of its run.yaml says which fields those are.

Images with captions train a net that reads them: a DiT, with a T5 over their bytes that is trained along and needs no
file. Other encoders are those of the recipes of text to image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dumo.config.change import override, shown
from dumo.config.load import FILE, load_recipe, parse
from dumo.config.source import PROPOSED, folder_of_images
from dumo.config.spec import Run
from dumo.config.word import method
from dumo.data import Data, Images, Memory
from dumo.data.caption import CaptionFiles
from dumo.data.pixel import ToSquare, Unreadable, short_side
from dumo.data.store import Store, some
from dumo.data.written import AUTO, NoCaptionsError, captions_of, table_names
from dumo.encoders.caption import Captions
from dumo.io.read import brief, user_path
from dumo.plan import machine, plan, rehearsal
from dumo.plan.findings import of_captions
from dumo.run import examination, outside
from dumo.run.net import outline, require_room
from dumo.run.resolve import resolve
from dumo.run.weights import build
from dumo.runtime import dist, install, installed, threads
from dumo.runtime.progress import Bar, no_bar, quiet, span
from dumo.runtime.stopwatch import WARM_UP, Stopwatch, wall_clock
from dumo.types import Spec, UserError

RECIPE = "my-images"
MINUTES = 6.0  # on a CPU, unless another time is asked for: ours
TIMED = 8  # steps that are timed: ours
LOOKED, DECODED = 256, 8  # images whose header is read, and that are decoded to time it: ours
FEWEST, WARMUP = 100, 10  # steps at least; one step in WARMUP warms up: ours
SLACK = 1.1  # logs, probes, sheets and checkpoints over the steps alone: ours, measured
LEAST_SIDE, GRID = 16, 8  # pixels: nets cut them by powers of two
# Ours: 0.7 M parameters, a quarter of a second for a step of 32 rows on two cores. In the same time on 150 photos a DiT
# of 1.3 M made mosaics, further from the photos (kernel distance 1.9, this one 1.2; docs/log.md).
NET = {"kind": "unet", "width": 16, "multipliers": [1, 2, 4], "depth": 1, "time_scale": 10.0}
ON_A_CPU = {"train.batch": 32, "train.precision": "fp32", "train.compile": "none"}
SIDES = {"cpu": 32, "cuda": 64}  # pixels at most: ours
# Ours: of captions on a CPU, for a U-Net reads none; the better of two that were tried on photos (docs/log.md).
READING = {"kind": "dit", "patch": 4, "width": 128, "depth": 4, "attention": 4, "time_scale": 10.0}
TEXTS = {"kind": "learned", "width": 32, "depth": 1, "drop": 0.1}  # ours, as cifar10-latents-words
LONGEST = 128  # bytes of a caption that are read: ours


class Place(Spec):
    """The part of a run that says what images to look at."""

    data: Data


@dataclass(frozen=True)
class Look:
    """What a place of images holds."""

    count: int
    headers: int  # images that were looked at
    bad: int  # how many of those cannot be read
    side: float  # pixels of the shorter side, the median
    decode_seconds: float  # of one image on one core
    captions: str = ""  # those that are there, if the run does not read them, and why


@dataclass(frozen=True)
class Proposal:
    """A run, and what it is expected to take."""

    run: Run
    look: Look
    machine: str
    step_seconds: float  # with what validation adds to one
    prepare_seconds: float  # until the first step

    @property
    def seconds(self) -> float:
        """The whole training."""
        return self.prepare_seconds + SLACK * self.run.train.steps * self.step_seconds

    def lines(self) -> Iterator[tuple[str, str]]:
        """What is proposed, by name."""
        run, look = self.run, self.look
        of = "all" if look.headers == look.count else f"{look.headers:,}"
        bad = f"; {look.bad:,} of {of} looked at cannot be read and are left out" if look.bad else ""
        classes = f" in {run.data.labels} classes" if run.data.labels else ""
        epochs = run.train.steps * run.train.batch / look.count
        yield "images", f"{look.count:,}{classes}, {look.side:.0f} pixels high or wide{bad}"
        if run.data.captions:
            read = [one.text for one in of_captions(run.data)]
            yield "captions", f"{', '.join(read)}; the net reads them, --set data.captions=null leaves them out"
        elif look.captions:
            yield "captions", look.captions
        yield "machine", self.machine
        yield "size", f"{' x '.join(map(str, run.pixels[1:]))} pixels (data.side)"
        parameters = sum(p.numel() for p in outline(run).parameters())
        yield "network", f"{run.net.kind}, {parameters:,} parameters"
        yield "objective", str(method(run.objective))
        yield "precision", f"{run.train.precision}, compile {run.train.compile}"
        least = "; the fewest proposed, less by --set train.steps" if run.train.steps == FEWEST else ""
        yield "steps", f"{run.train.steps:,} of {run.train.batch} images: each image {epochs:,.0f} times{least}"
        yield "time", f"{span(self.seconds)}, by {self.step_seconds:.2g} s a step, measured here"


def propose(
    place: str | None,
    sets: Sequence[str] = (),
    *,
    minutes: float | None = None,
    device: str = "auto",
    bar: Bar = no_bar,
) -> Proposal:
    """A run on these images that takes these minutes (None: on a CPU MINUTES, on a GPU as long as the recipe says).

    `sets`, as --set takes them, go before what is proposed; without a place they say which images in memory it is.
    Raises UserError where there are no images, or a field is wrong.
    """
    began = wall_clock()
    here = dist.device(device)
    fields: dict[str, Any] = {"data.root": place} if place else {}
    tree = {"data": set_fields(fields, ()).data.model_dump(mode="json")}
    override(tree, [text for text in sets if text.startswith("data")])
    images = parse(Place, tree).data
    if isinstance(images, Memory):
        found, more = Look(images.open().size, 0, 0, min(images.shape[1:]), 0.0), on_a(here, images.shape[-1])
    elif isinstance(images, Images):
        found, more = seen(images, here, sets, bar)
    else:
        raise UserError(f"{place} is a place of images, and data.kind={images.kind} reads none: leave it out")
    fields |= more
    run = resolve(set_fields(fields, sets))
    with bar("timing a step", 1) as tick, threads.fewer_when_busy(here, quiet):  # training says how many it takes
        judged = plan.validation(run)
        step = step_seconds(run, here) * (1 + (judged["share"] if judged else 0))
        tick(1, "")
    prepare = wall_clock() - began + found.count * found.decode_seconds / torch.get_num_threads()
    wanted = minutes or (MINUTES if here.type == "cpu" else None)
    if wanted is not None:
        steps = max(FEWEST, int((60 * wanted - prepare) / (SLACK * step)))
        fields |= {"train.steps": steps, "train.schedule.warmup": min(steps // WARMUP, 500)}
    run = resolve(set_fields(fields, sets))
    own = {field: value for field, value in fields.items() if field != "data.root"}
    run = run.model_copy(update={"resolved": run.resolved | {PROPOSED: own}})
    return Proposal(run, found, machine.hardware(here).text, step, prepare)


def on_a(here: torch.device, side: int) -> dict[str, Any]:
    """Fields for a machine, and images of this side."""
    return {**ON_A_CPU, "net": {**NET, "attend": [side // 4]}} if here.type == "cpu" else {}


def seen(images: Images, here: torch.device, sets: Sequence[str], bar: Bar) -> tuple[Look, dict[str, Any]]:
    """What files of images hold, and the fields for them: size, net, captions. Raises UserError as `propose`."""
    try:
        store = images.undecoded()
    except UserError as error:
        raise UserError(f"{images.root} is taken for a place of images, for it has no {FILE}: {error}") from error
    found = look(store, ToSquare(images.side, images.crop), bar)
    fields: dict[str, Any] = {"data.side": side(found.side, SIDES.get(here.type, SIDES["cuda"]))}
    fields |= on_a(here, fields["data.side"])
    why = unread(images, sets)
    try:
        captions = written(images, store, needed=not why)
    except NoCaptionsError as error:
        if not why:
            found = replace(found, captions=other_texts(error))
        return found, fields
    if captions is None:
        return found, fields
    if why:
        found = replace(found, captions=f"{len(captions):,} found, not used: {why}")
        return found, fields
    if not installed("transformers"):
        raise UserError(
            f"{images.root} has {len(captions):,} captions: {install('text')}  to train on them, or leave them "
            "out by --set data.captions=null"
        )
    return found, fields | reading(images.root, captions, on_a_cpu=here.type == "cpu")


def other_texts(error: NoCaptionsError) -> str:
    """What may be captions, and how to have it read; "": there is nothing of the kind."""
    if error.columns:
        way = f"--set 'data.captions={{kind: files, name: {error.columns[0]}}}'"
        return f"none read; of the columns {', '.join(error.columns)} one may be named, as by {way}"
    if error.tables:
        return (
            f"none read; a table of captions is called {table_names(error.tables)}, and there is {some(error.tables)}"
        )
    return ""


def written(images: Images, store: Store, *, needed: bool) -> Captions | None:
    """What was written of the images; None where it is damaged, and not needed.

    Raises NoCaptionsError where nothing was; UserError for what is damaged, or of other images, if it is needed.
    """
    name = images.captions.name if isinstance(images.captions, CaptionFiles) else AUTO
    try:
        texts = captions_of(user_path(images.root, "data.root"), store, name, require_pairs=needed)
    except NoCaptionsError:
        raise
    except UserError as error:
        if not needed:
            return None
        raise UserError(f"{error}; or leave captions out: --set data.captions=null") from error
    return Captions.of(texts)


def unread(images: Images, sets: Sequence[str]) -> str:
    """Which of these fields says that a run does not read what was written of its images; "": none."""
    other = () if isinstance(images.captions, CaptionFiles) else ("data.captions",)
    if chosen := [text for text in sets if text.partition("=")[0] in ("net", "net.kind") or text.startswith(other)]:
        return f"--set {brief(chosen[0])} says what the net reads"
    return ""


def reading(place: str, captions: Captions, *, on_a_cpu: bool) -> dict[str, Any]:
    """Fields of a net that reads these captions."""
    length = min(LONGEST, 1 + max(len(text.encode()) for text in captions.texts))  # with the end's token
    root = Path("runs/texts") / f"{folder_of_images(place).name}-{captions.digest()}"
    texts = {**TEXTS, "root": str(root), "tokenizer": {"kind": "tokens", "length": length}}
    net = {"net": {**READING, "texts": texts}} if on_a_cpu else {"net.texts": texts}
    return {"data.captions": {"kind": "files"}, **net}


def step_seconds(run: Run, here: torch.device) -> float:
    """A step of the training loop, on random numbers.

    Raises UserError where the net has no room here, or a user's own part cannot be trained.
    """
    if outside.has_own_parts(run):
        outside.require_contract(run, examination.drawn_net(run, here), here)
    run, rows = run.model_copy(update={"net": examination.readable(run.net)}), run.train.micro_batch or run.train.batch
    require_room(run, here, run.train.copies, rows)
    batch = rehearsal.random_rows(run.data, rows, here)
    step = rehearsal.make_step(run, build(run, here), batch, warm_up=WARM_UP, rounds=TIMED)
    return step.of_batch(run.train.batch)


def set_fields(fields: dict[str, Any], sets: Sequence[str]) -> Run:
    """The recipe with these fields, and then the user's own."""
    tree = load_recipe(RECIPE, [f"{field}={shown(value)}" for field, value in fields.items()]).model_dump(mode="json")
    override(tree, sets)
    return parse(Run, tree)


def look(store: Store, to_pixels: ToSquare, bar: Bar = no_bar) -> Look:
    """Some of the images, evenly. Raises UserError where none of them can be read."""
    places = sorted({round(i * (len(store) - 1) / (LOOKED - 1)) for i in range(LOOKED)})
    watch = Stopwatch(torch.device("cpu"))
    sides: list[int] = []
    decode_seconds: list[float] = []
    bad = 0
    with bar("looking at images", len(places)) as tick:
        for done, i in enumerate(places, start=1):
            try:
                data = store.read(i)
                sides.append(short_side(data))
                if len(decode_seconds) < DECODED:
                    decode_seconds.append(watch.seconds(partial(to_pixels, data)))
            except (OSError, ValueError, Unreadable):
                bad += 1
            tick(done, "")
    if not sides:
        raise UserError(f"none of the {bad} images that were looked at can be read: the first is {store.path(0)}")
    return Look(len(store), len(places), bad, median(sides), median(decode_seconds) if decode_seconds else 0.0)


def side(short: float, most: int) -> int:
    """The pixels to train at: as many as there are, up to `most`."""
    return max(LEAST_SIDE, min(most, int(short) // GRID * GRID))
