"""The verdict of a page: where a run stands, in one sentence that ends with what to type next and what that costs.

`reach_verdict` is the entrance. It decides in this order, and the first that is true counts:

1. the run is untrained
2. its samples copy the training images
3. its training was stopped before its end
4. its evaluation says where it stands (`dumo.report.score.state`), or, without one, its nearest images do
5. nothing is known: it is to be judged, where this machine can do that
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import NamedTuple

from dumo.config.spec import Evaluation, Run
from dumo.config.word import STATES
from dumo.flow.path import Linear
from dumo.nets import is_pretrained
from dumo.report.judgement import Judgement
from dumo.report.proximity import Proximity
from dumo.report.score import decisive_comparison, duration, error, number
from dumo.run.judge import missing_to_judge
from dumo.run.prompt import edits_images
from dumo.run.speed import seconds_between
from dumo.run.weights import RunFolder
from dumo.runtime import shell_path
from dumo.runtime.text import minutes_text, minutes_to_type
from dumo.training.deadline import SECONDS_PER_MINUTE, Timing

# The distance of samples to their nearest images over that of real images, beyond which samples are not like the data:
# on digits it is 4.1 after 20 steps, 1.9 after 500, 1.2 after 5,000.
FAR_FROM_NEAREST = 1.5
MANY_COPIES = 0.1  # the share of samples that are copies, over that of real images, from which they are many: ours
MINUTES_PER_HOUR = 60
PROPOSED_MINUTES = (10, 30, 60, 120, 240, 480, 960)  # of more training; beyond them whole hours: ours
GOOD_COUNT = 16  # samples to make with a run that is good: ours


@dataclass(frozen=True)
class NextStep:
    """What to type next."""

    command: str
    effect: str  # what it does and costs, as the end of a sentence that begins with the command


@dataclass(frozen=True)
class Verdict:
    """Where a run stands."""

    head: str  # a few words
    reason: str  # the numbers behind them; "" where there are none
    next_steps: Sequence[NextStep]  # what to type next, and what else there is to do
    is_good: bool = False


def reach_verdict(
    opened: RunFolder,
    name: str,
    evaluation: Judgement | None,
    proximity: Proximity | None,
    num_images: int | None = None,
    *,
    has_data: bool = True,
) -> Verdict:
    """The verdict on a run. `name` is what a user types for it: its folder, or its name.

    `num_images` are those of its data; None: they never end, or are not here. `has_data`: what an evaluation compares
    with is here. An evaluation of other weights, or of what is sampled otherwise now, does not count.
    """
    run = opened.run
    step = opened.step
    if evaluation and not evaluation["fresh"]:
        evaluation = None

    if step == 0:
        length = f"{run.train.steps:,} steps" if run.train.minutes is None else minutes_text(run.train.minutes)
        training = _suggest_training(name, f"trains it, for {length}")
        return Verdict("Untrained: these are the weights that training starts from", "", [training])

    copies_reason = _describe_copies(evaluation, proximity)
    if copies_reason and not opened.is_shipped:
        return Verdict("It copies the training images", copies_reason, [_suggest_less_training(opened, name)])

    quality = _describe_quality(evaluation, proximity)
    stop = _describe_stop(opened)
    if stop:
        stopped, effect = stop
        head = f"{quality.head}, and {stopped}" if quality.head else stopped.capitalize()
        return Verdict(head, quality.reason, [_suggest_training(name, effect)])
    if quality.is_good or (quality.head and opened.is_shipped):
        return Verdict(quality.head, quality.reason, _suggest_uses(run, name), quality.is_good)
    if quality.head:
        return Verdict(quality.head, quality.reason, [_suggest_more_training(opened, name)])
    if evaluation is None and has_data and missing_to_judge(run, num_images) is None:
        return Verdict("Trained, and not judged yet", "", [_suggest_evaluation(run.evaluate, name)])
    return Verdict("Trained", "", _suggest_uses(run, name))


class _Quality(NamedTuple):
    """How like the data the samples are."""

    head: str  # a few words; "" where nothing tells
    reason: str  # the numbers behind them
    is_good: bool


def _describe_quality(evaluation: Judgement | None, proximity: Proximity | None) -> _Quality:
    """How like the data the samples are, by the evaluation, or without one by their nearest images."""
    state = evaluation.get("state") if evaluation else None
    if evaluation and state:
        reason = decisive_comparison(evaluation)
        if state == "like the data":
            return _Quality("Like the data, as far as the scores tell", reason, is_good=True)
        head = STATES.get(str(state), "Near the data, but not like them")
        return _Quality(head, reason, is_good=False)
    if proximity and proximity.mean_ratio > FAR_FROM_NEAREST:
        times = number(proximity.mean_ratio)
        reason = f"samples are {times} times as far from the nearest training image as real images are"
        return _Quality(STATES["far"], reason, is_good=False)
    return _Quality("", "", is_good=False)


def _describe_copies(evaluation: Judgement | None, proximity: Proximity | None) -> str:
    """The share of samples that are copies, where they are many; "" where they are not, or nothing tells.

    The evaluation goes before the samples of the page, which are few.
    """
    real_share = 0.0
    if evaluation and "copies" in evaluation["results"][0]:
        share = max(row["copies"] for row in evaluation["results"])
        perfect = evaluation["baselines"].get("perfect") or {}
        real_share = perfect.get("copies", 0.0) + 2 * (error(perfect, "copies") or 0.0)
    elif proximity:
        share = proximity.num_copies / len(proximity.is_copy)
    else:
        return ""
    if share < real_share + MANY_COPIES:
        return ""
    return f"{share:.0%} of the samples are a training image again"


def _describe_stop(opened: RunFolder) -> tuple[str, str] | None:
    """Where a training was stopped, and what it does when it goes on; None: it came to its end, or nothing tells.

    How long a run has trained that ends by the clock (`train.minutes`) is in its last checkpoint. Its
    `train.steps` are a guess until it has ended.
    """
    train = opened.run.train
    if train.minutes is None:
        if opened.step >= train.steps:
            return None
        effect = f"goes on to step {train.steps:,}"
        seconds = seconds_between(opened.folder, opened.step, train.steps)
        if seconds is not None:
            effect += f", in about {duration(seconds)}"
        return f"stopped at step {opened.step:,} of {train.steps:,}", effect
    if opened.is_shipped:
        return None
    timing = opened.checkpoint.manifest.timing if opened.checkpoint else None
    is_given_more = timing is None or timing.minutes != train.minutes  # since that checkpoint
    if timing and timing.is_over and not is_given_more:
        return None
    current_timing = Timing(minutes=train.minutes, seconds=timing.seconds if timing else 0.0)
    stopped = f"stopped after {duration(current_timing.seconds)} of {duration(current_timing.promised_seconds)}"
    return stopped, f"goes on for the {duration(current_timing.seconds_left)} that are left"


def _suggest_evaluation(evaluate: Evaluation, name: str) -> NextStep:
    """The evaluation of the run."""
    passes = ",".join(map(str, evaluate.nfe))
    effect = f"makes {evaluate.protocol.total:,} samples at each NFE, and compares them with the data"
    return NextStep(f"dumo evaluate {name} --nfe {passes}", effect)


def _suggest_training(name: str, effect: str) -> NextStep:
    """The training of the run, or the rest of it."""
    return NextStep(f"dumo train {name}", effect)


def _suggest_more_training(opened: RunFolder, name: str) -> NextStep:
    """More training of a run whose training is done.

    A run that ends by the clock gets some more minutes; any other, as many steps again.
    """
    run = opened.run
    seconds = seconds_between(opened.folder, 0, opened.step)
    if run.train.minutes is not None:
        minutes = _more_minutes(seconds or 0.0)
        return NextStep(f"dumo train {name} --minutes {minutes}", f"goes on for {minutes:,} minutes")
    effect = f"goes on for {opened.step:,} more steps"
    if seconds is not None:
        effect += f", in about {duration(seconds)}"
    return NextStep(f"dumo train {name} --set train.steps={2 * opened.step}", effect)


def _more_minutes(seconds: float) -> int:
    """The minutes to go on for, after a training of these seconds: at least twice as long, for less shows little."""
    for minutes in PROPOSED_MINUTES:
        if SECONDS_PER_MINUTE * minutes >= 2 * seconds:
            return minutes
    hours = ceil(2 * seconds / (SECONDS_PER_MINUTE * MINUTES_PER_HOUR))
    return MINUTES_PER_HOUR * hours


def _suggest_less_training(opened: RunFolder, name: str) -> NextStep:
    """What makes fewer copies: an earlier checkpoint, where one is kept, else a training of half the length."""
    weights = Path(opened.weights)
    for step, checkpoint in opened.index.checkpoints.by_step().items():
        earlier_weights = checkpoint.path / weights.name
        if step < opened.step and weights.parts[:1] == ("checkpoints",) and earlier_weights.exists():
            command = f"dumo sample {name} --weights {shell_path(earlier_weights)}"
            return NextStep(command, f"takes the weights of step {step:,}; more photos help more")
    command = f"dumo train {name}/run.yaml --out {name}-shorter --set "
    minutes = opened.run.train.minutes
    if minutes is not None:
        # its images are encoded already: what is halved is the time of its steps
        seconds = seconds_between(opened.folder, 0, opened.step)
        if seconds is not None:
            minutes = min(minutes, seconds / SECONDS_PER_MINUTE)
        shorter_minutes = minutes_to_type(minutes / 2)
        command += f"train.minutes={shorter_minutes:g}"
        return NextStep(command, f"makes a run of {minutes_text(shorter_minutes)}; more photos help more")
    steps = max(1, opened.step // 2)
    command += f"train.steps={steps}"
    effect = f"makes a run of {steps:,} steps"
    seconds = seconds_between(opened.folder, 0, steps)
    if seconds is not None:
        effect += f", in about {duration(seconds)}"
    return NextStep(command, f"{effect}; more photos help more")


def _suggest_uses(run: Run, name: str) -> list[NextStep]:
    """What to do with a run that is good, as far as it can be shown on a page and exported."""
    steps = [NextStep(f"dumo sample {name} --count {GOOD_COUNT}", f"makes {GOOD_COUNT} more")]
    if not edits_images(run.data):
        steps.append(NextStep(f"dumo demo {name}", "is a page to play with"))
    if _can_export(run):
        steps.append(NextStep(f"dumo export {name}", "writes files for other programs"))
    return steps


def _can_export(run: Run) -> bool:
    """Whether `dumo export` takes a run, as far as its spec tells: it has a head and a net that others can use."""
    needs = run.objective.needs
    has_head = bool({"u", "v"} & {*needs.heads})
    has_known_path = run.path == Linear() or run.path.kind == "diffusion"
    if not (has_head and has_known_path):
        return False
    if is_pretrained(run.net):
        return True
    if run.net.kind not in ("dit", "unet") or run.sample.guide.active:
        return False
    return {*needs.names} <= {"t", "r"} and getattr(run.net, "precondition", None) != "data"
