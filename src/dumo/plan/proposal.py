"""A run for images: what fits them, the machine and the time there is, measured before it trains.

`propose` is the entrance. It

1. drafts a run that fits the images and the machine (`dumo.plan.photodraft`),
2. times a step of it,
3. sets how long it trains (`train.minutes`), and about how many steps that is; where images are so few that they are
   learned in half the time, it sets the steps alone.

On a CPU a run ends by the clock, unless the user says otherwise, or images are so few. What is proposed is set in the
run like any other field, and `resolved.proposed` of its run.yaml says which fields those are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from dumo.config.change import field_of, override, sets_field
from dumo.config.code import has_own_parts
from dumo.config.load import load_recipe, parse
from dumo.config.source import IMAGES_RECIPE, PROPOSED_KEY
from dumo.config.spec import Run
from dumo.config.word import method
from dumo.data import Data, Images, Memory, is_latents
from dumo.evaluation.shipped import SAMPLES_PER_CLASS
from dumo.io.read import brief
from dumo.plan import machine, plan, rehearsal
from dumo.plan.findings import caption_findings
from dumo.plan.photodraft import Draft, draft_of_files, draft_of_memory
from dumo.plan.photolook import ImagesFound
from dumo.run import contract, trial_net
from dumo.run.net import num_parameters, outline, require_room_to_train
from dumo.run.resolve import resolve
from dumo.run.weights import draw_on_device
from dumo.runtime import dist, threads
from dumo.runtime.device import choose_device
from dumo.runtime.door import option, settings
from dumo.runtime.progress import Bar, ignore_line, no_bar
from dumo.runtime.stopwatch import WARM_UP
from dumo.runtime.text import duration_text, minutes_text
from dumo.training.deadline import ENOUGH_VISITS, SECONDS_PER_MINUTE, minutes_to_prepare
from dumo.types import Spec, UserError

DEFAULT_MINUTES = 6.0  # of a training on a CPU, unless another time is asked for: ours
_TIMED_STEPS = 8  # ours
_FEW_IMAGES = 200  # of fewer the plan says what they can give: ours
_FEWEST_STEPS = 500  # of a training, however few images there are: ours
WARMUP_SHARE = 10  # one in this many steps warms up, at most as many as the recipe says: ours
SLACK = 1.1  # the time of a training, with logs, probes, sheets and checkpoints, over that of its steps: ours, measured


class _ImagesOnly(Spec):
    """The part of a run that says which images it learns."""

    data: Data


@dataclass(frozen=True)
class Proposal:
    """A run, and the time that it is expected to take."""

    run: Run
    draft: Draft
    machine: str
    step_seconds: float  # with what validation adds to a step, and its images take to decode
    minutes: float | None  # that there are; None: nobody said any

    @property
    def lacks_time(self) -> bool:
        """Whether it ends by the clock before there is time for a step. It makes one all the same."""
        if self.run.train.minutes is None:
            return False
        return self._seconds_to_first_step > SECONDS_PER_MINUTE * self.run.train.minutes

    @property
    def seconds(self) -> float:
        """Seconds of the whole training."""
        minutes = self.run.train.minutes
        if minutes is not None:
            return SECONDS_PER_MINUTE * minutes
        return self.draft.prepare_seconds + SLACK * self.run.train.steps * self.step_seconds

    @property
    def early_end(self) -> str:
        """Why it ends before the minutes that there are, and what trains for all of them; "": it does not."""
        if self.minutes is None or self.run.train.minutes is not None:
            return ""
        all_minutes = settings(f"train.minutes={self.minutes:g}")
        return (
            f"before {minutes_text(self.minutes)}: more steps on so few images copy them, and in time training breaks. "
            f"All the time by {all_minutes}, in place of {option('minutes')}"
        )

    @property
    def _seconds_to_first_step(self) -> float:
        """Seconds until it has made a step."""
        return self.draft.prepare_seconds + SLACK * self.step_seconds

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield the proposal as lines: a name and a text."""
        run = self.run
        images = self.draft.images
        yield "images", _images_text(images, run.data.labels)
        if run.data.captions:
            captions = ", ".join(finding.text for finding in caption_findings(run.data))
            yield "captions", f"{captions}; the net reads them, {settings('data.captions=null')} leaves them out"
        elif self.draft.captions:
            yield "captions", self.draft.captions
        if images.readable < _FEW_IMAGES:
            yield "few", f"{images.readable:,} images: expect their colours and textures, and in time copies of them"
        yield "machine", self.machine
        yield "size", f"{' x '.join(map(str, run.shown_shape[1:]))} pixels (data.side)"
        if self.draft.space:
            yield "learned as", self.draft.space
        yield "network", f"{run.net.kind}, {num_parameters(outline(run)):,} parameters"
        yield "objective", str(method(run.objective))
        yield "precision", f"{run.train.precision}, compile {run.train.compile}"
        epochs = run.train.steps * run.train.batch / images.readable
        ends_by_clock = run.train.minutes is not None
        about = "about " if ends_by_clock else ""
        yield "steps", f"{about}{run.train.steps:,} of {run.train.batch} images: each image {about}{epochs:,.0f} times"
        measured = f"{self.step_seconds:.2g} s a step, measured here"
        if ends_by_clock:
            yield "time", f"{duration_text(self.seconds)}, then it ends, with as many steps as it made; {measured}"
        else:
            yield "time", f"{duration_text(self.seconds)}, by {measured}"
        if self.early_end:
            yield "ends early", self.early_end
        if self.lacks_time:
            yield (
                "too short",
                f"images take {duration_text(self.draft.prepare_seconds)} to prepare, and no time is left for steps: "
                f"give it more, as by {option('minutes', minutes_to_prepare(self._seconds_to_first_step))}",
            )


def _images_text(images: ImagesFound, classes: int) -> str:
    """How many images there are, in how many classes, how large, and how many cannot be read."""
    text = f"{images.count:,}"
    if classes:
        text += f" in {classes} classes"
    text += f", {images.side:.0f} pixels high or wide"
    if images.bad:
        headers = "all" if images.headers == images.count else f"{images.headers:,}"
        text += f"; {images.bad:,} of {headers} looked at cannot be read and are left out"
    return text


def propose(
    images: str | Memory | None,
    sets: Sequence[str] = (),
    *,
    minutes: float | None = None,
    device: str = "auto",
    bar: Bar = no_bar,
) -> Proposal:
    """Propose a run on images, in memory or at a place (a folder or file), that takes these minutes from now on.

    `minutes` None: as long as `sets` say, else DEFAULT_MINUTES on a CPU, and on a GPU as long as the recipe says.
    `sets`, as --set takes them, win over what is proposed. `images` None: they say which images.
    Raises UserError where there are no images, a field is wrong, minutes and `sets` both say how long, or torchrun
    started several processes.
    """
    # each would time a step, and propose another run
    dist.require_one_process("planning a run on images")
    torch_device = choose_device(device)
    minutes = _minutes_to_train(minutes, sets, torch_device)

    # the recipe and fields that fit the images and the machine
    training_seconds = None if minutes is None else SECONDS_PER_MINUTE * minutes
    if isinstance(images, Memory):
        draft = draft_of_memory(images, torch_device, sets, training_seconds, bar)
    else:
        draft = draft_of_files(_images_at(images, sets), images, torch_device, sets, training_seconds, bar)

    # the seconds of a step
    run = resolve(draft.run({}, sets))
    # without a line on the number of threads, which training prints
    with bar("timing a step", 1) as tick, threads.fewer_when_busy(torch_device, ignore_line):
        validation = plan.validation(run)
        step_seconds = _step_seconds(run, torch_device)
        if validation:
            step_seconds *= 1 + validation["share"]
        step_seconds = max(step_seconds, run.train.batch * draft.load_seconds)  # images are decoded meanwhile
        tick(1, "")

    # how long to train, about how many steps that is, and by how many samples it is judged
    fields: dict[str, Any] = {}
    steps = run.train.steps
    if minutes is not None:
        seconds_for_steps = SECONDS_PER_MINUTE * minutes - draft.prepare_seconds
        steps = max(1, int(seconds_for_steps / (SLACK * step_seconds)))
        enough_steps = max(ceil(ENOUGH_VISITS * draft.images.readable / run.train.batch), _FEWEST_STEPS)
        # half of the time to spare: on a machine that becomes slower it is over within the minutes, too
        if steps >= 2 * enough_steps and not sets_field(sets, "train.minutes"):
            steps = enough_steps
            fields |= {"train.steps": steps}
        else:
            fields |= {"train.minutes": minutes, "train.steps": steps}
    if run.data.labels > run.evaluate.protocol.total:  # some classes would have no sample
        enough_samples = SAMPLES_PER_CLASS * run.data.labels
        fields |= {"evaluate.protocol.samples": enough_samples, "evaluate.few": enough_samples}
    if run.train.schedule.warmup > steps // WARMUP_SHARE:
        fields["train.schedule.warmup"] = steps // WARMUP_SHARE
    run = resolve(draft.run(fields, sets))
    proposed = draft.fields | fields
    fields_of_user = ["data", "data.images.root" if is_latents(run.data) else "data.root"]
    if sets_field(sets, "data.root"):
        fields_of_user.append("data.root")
    for field in fields_of_user:
        proposed.pop(field, None)
    run = run.model_copy(update={"resolved": run.resolved | {PROPOSED_KEY: proposed}})
    return Proposal(run, draft, machine.hardware(torch_device).text, step_seconds, minutes)


def _images_at(place: str | None, sets: Sequence[str]) -> Images:
    """The images at a place, with the user's own changes `sets`, which alone say it where `place` is None.

    Raises UserError for data of another kind.
    """
    fields = load_recipe(IMAGES_RECIPE).data.model_dump(mode="json")
    if place:
        fields["root"] = place
    tree = {"data": fields}
    override(tree, [text for text in sets if text.startswith("data")])
    data = parse(_ImagesOnly, tree).data
    if not isinstance(data, Images):
        raise UserError(f"{place} is a place of images, and data.kind={data.kind} reads none: leave it out")
    return data


def _minutes_to_train(minutes: float | None, sets: Sequence[str], device: torch.device) -> float | None:
    """The minutes after which a run ends; None: it ends by its steps.

    `minutes` are those that were asked for, apart from the user's own changes `sets`. Raises UserError where both say
    how long it trains.
    """
    lengths = [text for text in sets if field_of(text) in ("train.steps", "train.minutes")]
    if lengths and minutes is not None:
        raise UserError(
            f"{option('minutes', minutes)} and {settings(*map(brief, lengths))} both say how long to train: "
            "give one of them"
        )
    if lengths:
        return load_recipe(IMAGES_RECIPE, lengths).train.minutes
    if minutes is None and device.type == "cpu":
        return DEFAULT_MINUTES
    return minutes


def _step_seconds(run: Run, device: torch.device) -> float:
    """The seconds of a step of the training loop on this device, measured on random numbers.

    Raises UserError where the net has no room here, or a user's own part cannot be trained.
    """
    run = run.model_copy(update={"net": trial_net.with_random_texts_if_missing(run.net)})
    rows = run.train.micro_batch or run.train.batch
    require_room_to_train(run, device, outline(run), rows=rows)
    if has_own_parts(run):
        contract.require_contract(run, trial_net.randomly_initialized_net(run, device), device)
    batch = rehearsal.random_rows(run.data, rows, device)
    step = rehearsal.make_step(run, draw_on_device(run, device), batch, warm_up=WARM_UP, rounds=_TIMED_STEPS)
    return step.of_batch(run.train.batch)
