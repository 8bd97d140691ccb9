"""`main(RANK, FILE, WHOLE)` is one of two processes that count images together.

They meet in FILE; the first writes what came out to WHOLE. See test_statistics.py.
"""

from pathlib import Path

import pytest
import torch

from dumo.evaluation import reference
from dumo.evaluation.reference import STANDARDS
from dumo.evaluation.statistics import gather, save_statistics, statistics_of
from dumo.evaluation.wholeset import collect
from dumo.types import UserError
from meeting import meeting
from unit.evaluation.extractor import Album, extractor, images

TOTAL, BATCH = 61, 7  # pieces of the data are as large as the batches


def main(number: str, file: str, to: str) -> None:
    """This rank's batches, and all together; then the same of data whose number is not known before."""
    rank, whole = int(number), Path(to)
    torch.set_num_threads(1)
    with meeting(file, rank):
        x, numbers = images(TOTAL), torch.arange(TOTAL)
        mine = numbers[numbers // BATCH % 2 == rank].flip(0)  # a rank's own order
        found = gather(statistics_of(extractor, ((rows, x[rows]) for rows in mine.split(BATCH)), TOTAL), TOTAL)
        reference.BATCH_SIZE = BATCH
        album = Album(x)
        data, facts = (
            reference.data_statistics(extractor, album),
            reference.data_facts(album, "folder", STANDARDS["folder"]),
        )
        waited = collect(((rows, x[rows]) for rows in mine.split(BATCH)), TOTAL)
        assert torch.equal(waited, x)
        with pytest.raises(UserError, match="a rank has no samples"):  # on both ranks: neither waits
            collect([(numbers, x)] if rank == 0 else [], TOTAL)
        if rank == 0:
            save_statistics(whole, found, {"of": "samples"})
            save_statistics(whole.with_suffix(".data"), data, facts)
