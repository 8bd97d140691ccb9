"""The cache of latents of a proposed run, which its training makes (`dumo encode` makes all others).

`dumo.run.job` calls `ensure_proposed_cache` for a run whose folder of latents was proposed with it. It

1. refuses photos that have changed since they were planned
2. writes the run into its folder, so that the same command resumes it after a stop
3. encodes the photos in small shards, or waits for another process that encodes them; a stop keeps finished shards. For
   a run that ends by the clock it stops once too little time would be left for steps

A folder that the user set is the user's to fill. Where a run was moved with its cache, `dumo.config.source` finds that.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dumo.config.spec import Run
from dumo.data import Latents, cache
from dumo.data.image import errors_of_latents
from dumo.data.origin import has_key, new_run_hint
from dumo.io import table
from dumo.run import encode
from dumo.run.folder import write_run_file
from dumo.run.index import Index
from dumo.runtime import signals
from dumo.runtime.door import train_call
from dumo.runtime.progress import Bar, Tick
from dumo.runtime.text import duration_text
from dumo.training.deadline import MAX_PREPARATION_SHARE, PreparationTime, minutes_to_prepare
from dumo.types import UserError

SHARD_ROWS = 128  # photos to a shard, which a stop may lose: ours, some seconds of one core


def ensure_proposed_cache(
    run: Run,
    data: Latents,
    index: Index,
    *,
    time: PreparationTime | None,
    device: str,
    bar: Bar,
) -> None:
    """Make the cache of a proposed run if it is missing, or finish it.

    `data` are the run's, `index` is what its folder held. `time`: how long it may take; None: as long as it takes.
    Raises UserError as `encode.encode` does, and where the photos are not those that the folder was named after;
    Stopped after a signal, and where the time is over. Finished shards are kept.
    """
    folder = data.folder
    if cache.is_finished(folder):
        return
    with errors_of_latents():
        is_of_these_images = has_key(folder, data.images, data.codec.open("cpu").sha256)
    if not is_of_these_images:
        raise UserError(
            f"the photos in {data.images.root}, or the fields that say how they are encoded, have changed since this "
            f"run was planned: {new_run_hint()}"
        )
    if time is not None:
        bar = _bar_within(time, bar, folder, index.folder)

    def check_wait() -> None:
        signals.check()
        if time is not None and time.is_over:
            raise _stopped_in_wait(time, index.folder)

    _write_new_run(run, index, folder)
    encode.ensure_cache(data, device=device, bar=bar, new_shard_rows=SHARD_ROWS, while_waiting=check_wait)


def _write_new_run(run: Run, index: Index, cache_folder: Path) -> None:
    """Write a run that begins into its folder, where it stays after a stop. `run.job` removes one that is refused.

    Also makes the folder that the cache lies in.
    """
    if index.text is None:
        cache_folder.parent.mkdir(parents=True, exist_ok=True)  # a run without it counts as moved
        write_run_file(run, index.folder)


def _bar_within(time: PreparationTime, bar: Bar, cache_folder: Path, run_folder: Path) -> Bar:
    """A bar for the encoding of photos that shows what `bar` does, and raises Stopped once the time is over."""

    @contextmanager
    def bar_within(title: str, total: int, /) -> Generator[Tick, None, None]:
        rows_before = _finished_rows(cache_folder)
        seconds_before = time.seconds
        with bar(title, total) as tick:

            def tick_within(done: int, note: str) -> None:
                tick(done, note)
                num_encoded = done - _count_rows(rows_before, done)  # now, of the first `done` photos
                is_all_encoded = num_encoded == total - _count_rows(rows_before, total)
                if num_encoded == 0 or is_all_encoded or not time.is_over:
                    return
                seconds_per_image = (time.seconds - seconds_before) / num_encoded
                num_saved = _count_rows(_finished_rows(cache_folder), total)
                raise _stopped_while_encoding(time, run_folder, num_saved, total, seconds_per_image)

            yield tick_within

    return bar_within


def _stopped_while_encoding(
    time: PreparationTime, run_folder: Path, num_saved: int, total: int, seconds_per_image: float
) -> signals.Stopped:
    """What a command raises whose time is over while it encodes: `num_saved` of the `total` photos are on the disk."""
    seconds_to_go = seconds_per_image * (total - num_saved)
    minutes = max(minutes_to_prepare(seconds_to_go), time.minutes_left)
    more = train_call(run_folder, minutes=minutes)
    return signals.Stopped(
        signals.CLOCK,
        f"stopped: {num_saved:,} of {total:,} photos are encoded after {duration_text(time.seconds)}, and the others "
        f"take {duration_text(seconds_to_go)}, more than {MAX_PREPARATION_SHARE:.0%} in all of the "
        f"{duration_text(time.seconds_left)} that there were. With enough time:  {more}",
    )


def _stopped_in_wait(time: PreparationTime, run_folder: Path) -> signals.Stopped:
    """What a command raises whose time is over while another process encodes the photos."""
    again = train_call(run_folder, minutes=time.minutes_left)
    return signals.Stopped(
        signals.CLOCK,
        f"stopped: another process still encodes these photos after {duration_text(time.seconds)}, and the steps need "
        f"the rest of the {duration_text(time.seconds_left)} that there were. Once it is done:  {again}",
    )


def _finished_rows(folder: Path) -> list[range]:
    """The numbers of the photos in each finished shard of a cache. A damaged shard is not finished: it is made again.

    They need not be the first ones: another rank, or damage, leaves gaps.
    """
    contents = cache.read_index(folder)
    if contents is None:
        return []
    finished: list[range] = []
    for number, shard in table.written_shards(folder, contents).items():
        if shard.fault(folder, deep=True) is None:
            finished.append(contents.span(number))
    return finished


def _count_rows(ranges: Sequence[range], end: int) -> int:
    """How many numbers below `end` are in some ranges, which do not overlap."""
    return sum(len(range(numbers.start, min(numbers.stop, end))) for numbers in ranges)
