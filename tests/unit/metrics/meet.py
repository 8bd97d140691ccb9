"""`python tests/unit/metrics/meet.py RANK FILE WHOLE` is one of two processes that count images together.

They meet in FILE; the first writes what came out to WHOLE. See test_tally.py.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from dumo.metrics import truth
from dumo.metrics.judge import collect
from dumo.metrics.locked import LOCKED
from dumo.metrics.tally import count, gather, write
from meeting import meeting
from unit.metrics.eye import Album, eye, images

TOTAL, BATCH = 61, 7  # pieces of the data are as large as the batches


def main(rank: int, file: str, whole: Path) -> None:
    """This rank's batches, and all together; then the same of data whose number is not known before."""
    torch.set_num_threads(1)
    with meeting(file, rank):
        x, numbers = images(TOTAL), torch.arange(TOTAL)
        mine = numbers[numbers // BATCH % 2 == rank].flip(0)  # a rank's own order
        tally = gather(count(eye, ((rows, x[rows]) for rows in mine.split(BATCH)), TOTAL), TOTAL)
        truth.PIECE = BATCH
        album = Album(x)
        data, facts = truth.album_tally(eye, album), truth.album_facts(album, "folder", LOCKED["folder"])
        waited = collect(((rows, x[rows]) for rows in mine.split(BATCH)), TOTAL)
        assert torch.equal(waited, x)
        if rank == 0:
            write(whole, tally, {"of": "samples"})
            write(whole.with_suffix(".data"), data, facts)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
