"""`main(RANK, FILE)` is one of two processes that gather their samples. They meet in FILE. See test_trained.py."""

import torch

from dumo.flow.sampling import Batch
from dumo.run.trained import gather_samples
from meeting import meeting

COUNT = 5


def main(number: str, file: str) -> None:
    """This rank's part."""
    rank = int(number)
    with meeting(file, rank):
        numbers = torch.arange(rank, COUNT, 2)
        samples = gather_samples([Batch(numbers, numbers[:, None].float(), nfe=3)], (1,))
        count = COUNT if rank == 0 else 0
        assert samples.x.tolist() == [[i] for i in range(count)]
        assert samples.nfe == 3
