"""Recipes trained on ranks, held against one process that takes as many pieces. See test_layout.py.

`main(RANK, RANKS, FILE, CASE...)` is one of the processes, which meet in FILE. CASE is a recipe's name, with
`+field=value` for each field that is set. Rank 0 prints a JSON object per case and layout.
"""

import functools
import json
import warnings
from itertools import product

import torch
from torch import Tensor

from dumo.config.load import load
from dumo.config.spec import Run
from dumo.data import Data
from dumo.io.data_source import DataSource
from dumo.run.hooks import slope_of_time_embedding
from dumo.run.net import make_flow
from dumo.run.weights import build, build_deferred
from dumo.runtime import dist
from dumo.runtime.random import keyed_normal
from dumo.training import agreement
from dumo.training.state import begin
from dumo.types import Cond, Sample, Time
from meeting import meeting
from trained import ToyTrainer
from unit.training.toy import tensors

STEPS = {2: 2, 3: 30, 4: 30}  # by number of ranks: to the bit, and to rounding


def layouts(case: str, place: int, world: int) -> list[tuple[int, bool]]:
    """Ranks to a copy, and whether weights are given back. Two ranks have four; of a recipe as it is two of them, that
    differ in both, by turns: half of the recipes meet each. A case +once has the third: each rank has half of the
    weights, and gathers them once a step.
    """
    every = [*product({2: (1, 2), 3: (3,), 4: (2,)}[world], (False, True) if world == 2 else (False,))]
    if "+once" in case:
        return every[2:3]
    return every if "+" in case or world != 2 else [every[place % 2], every[3 - place % 2]]


def taught(x: Sample, t: Time, c: Cond, v: Sample) -> Sample:
    """What a teacher might say."""
    return 0.5 * v + 0.5 * x.tanh()


def spec(case: str, *more: str) -> Run:
    """The run of a case; +teacher, +pairs and +once are no fields."""
    name, *fields = [word for word in case.split("+") if word not in ("teacher", "pairs", "once")]
    lean = [] if name == "moons" else ["net.depth=2"]  # two blocks, and what is around them: what is given back in turn
    lean += {"digits-dmf": ["net.late=1"], "dumo-best": ["train.coupling.group=8"]}.get(name, [])  # a rank has half
    return load(name, [*lean, *fields, *more])


@functools.cache
def opened(data: Data) -> DataSource:
    """The data of several cases, read once."""
    return data.open()


def train(run: Run, case: str, steps: int) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """All numbers of a run after so many steps, each in one piece; losses; gradient norms and time slope."""
    if dist.world() == 1:
        state = begin(build(run), run.train)
    else:  # as `dumo train` begins
        net, made = build_deferred(run)
        state = begin(net, run.train, torch.device("cpu"), made)
    flow = make_flow(run, state, teacher=taught if "+teacher" in case else None)
    trainer = ToyTrainer(state, flow, run.train)
    rows = trainer.rows
    losses: list[float] = []
    norms: list[float] = []
    for step in range(steps):
        batch = [*opened(run.data).batch(step, run.train.batch, run.train.seed, rows)]
        if "+pairs" in case:
            batch.append(keyed_normal("pairs", step, rows=range(rows.start, rows.stop), shape=run.data.shape))
        metrics = trainer.step(batch)
        losses.append(metrics.loss)
        norms.append(metrics.grad_norm)
    assert all(hasattr(p, "full_tensor") for p in state.net.parameters()) == (dist.world() > 1)  # none is left gathered
    norms.append(slope_of_time_embedding(state) or 0.0)
    assert len(set(agreement.gather_results(lambda: repr(norms)))) == 1  # all ranks log the same
    return tensors(state), losses, norms


def main(rank: str, ranks: str, file: str, *cases: str) -> None:
    """Train each case alone, and in its layouts."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # 'dual' says that it makes a pass of its own where weights are given back
    world = int(ranks)
    alone, steps = dict[str, tuple[dict[str, Tensor], list[float], list[float]]](), STEPS[world]
    for case in cases:
        piece = spec(case).train.batch // world if world == 2 else None
        if rank == "0":
            alone[case] = train(spec(case, f"train.micro_batch={piece or 'null'}"), case, steps)
    with meeting(file, int(rank), world):
        every = ((case, *layout) for i, case in enumerate(cases) for layout in layouts(case, i, world))
        for case, share, reshard in every:
            found, losses, norms = train(spec(case, f"train.share={share}", f"train.reshard={reshard}"), case, steps)
            if dist.is_main():
                one, wanted, wanted_norms = alone[case]
                row = {
                    "case": case,
                    "share": share,
                    "reshard": reshard,
                    "numbers": len(one),
                    "differ": [name for name in one if not torch.equal(one[name], found[name])],
                    "loss": max(abs(a - b) / max(abs(b), 0.01) for a, b in zip(losses, wanted, strict=True)),
                    "norms": max(abs(a - b) / max(abs(b), 0.01) for a, b in zip(norms, wanted_norms, strict=True)),
                }
                print(json.dumps(row), flush=True)
