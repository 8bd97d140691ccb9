"""What a loss reads that is random: times, noise, dropped labels and further laws, all drawn here.

Every draw has a stream of its own, named after what it is. What else training draws has streams of its own, too: the
order of the data, augmentation, weights at step 0, and masks of dropout, whose keys are `dumo.flow.dropout`'s.

A stream's key is a hash of (seed, step, name). What is a number per row is drawn for the whole batch, of which each
caller takes its rows. What is shaped like the data is drawn for the caller's rows alone, each by its number in the
batch: else every rank would draw the noise of all, which takes longer than a step where ranks are many. Either way a
row is the same whoever draws it. So two ranks equal one, a resumed run needs no generator state, and an objective that
draws one thing more sees the same t, z and dropped labels as its sibling.
"""

import torch

from dumo.flow.law import Law
from dumo.random import keyed, stream
from dumo.types import Cond, Noised, Objective, Path, Sample, Taught


def draw(
    objective: Objective,
    path: Path,
    x: Sample,
    c: Cond,
    null: Cond | int,
    *,
    seed: int,
    step: int,
    batch: int | None = None,
    first: int = 0,
    progress: float = 0.0,
    z: Sample | None = None,
    teacher: Taught | None = None,
) -> Noised:
    """Rows `first : first + len(x)` of the record that a batch of `batch` rows (None: these rows) gets at this step.

    `null` is what a dropped label becomes, a row each, or one class index for all (`data.classes` of our data).
    `z` is noise that belongs to x, as a teacher paired them; None: drawn. What a `teacher` makes of
    (x_t, t, c, v_t) takes the place of v_t. Raises ValueError where the batch ends before these rows do.
    """
    n, rows, mine = batch or len(x), range(first, first + len(x)), slice(first, first + len(x))
    if mine.stop > n:
        raise ValueError(f"rows {first} to {mine.stop} are not of a batch of {n}")
    exact = torch.promote_types(x.dtype, torch.float32)  # times stay exact where the data is bf16

    t, r = (s[mine].to(x.device, exact) for s in objective.times(n, stream(seed, step, "times")))
    if z is None:
        z = keyed(seed, step, "z", rows=rows, shape=x.shape[1:]).to(x)
    kept = (torch.rand(n, generator=stream(seed, step, "kept")) >= objective.drop)[mine].to(x.device)
    coin = torch.rand(n, generator=stream(seed, step, "coin"))[mine].to(x.device, exact)
    moving = objective.times.moving(n)
    laws = {name: law for name, law in objective if isinstance(law, Law)}
    drawn = {k: law.rows((seed, step, "law", k), rows, n, x.shape[1:]) for k, law in laws.items()}
    drawn = {k: v.to(x.device, exact) for k, v in drawn.items()}

    x = x / path.sd
    x_t, v_t = path.at(x, z, t)
    null = torch.full_like(c, null) if isinstance(null, int) else null
    c = torch.where(kept.view(-1, *(1,) * (c.ndim - 1)), c, null)
    if teacher:
        v_t = teacher(x_t, t, c, v_t)
    return Noised(path, x, z, t, r, x_t, v_t, c, null, kept, coin, moving and moving[mine], drawn, progress, teacher)
