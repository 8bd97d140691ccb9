"""The fingerprint of a run's objective: its loss and gradient on a small net and a batch, the same for all runs.

`dumo reproduce` stores it with what a plan of dumo's measured. Where the code of today gives another fingerprint, a
table is older than the objective that it shows, and must be measured again.
"""

from math import ceil

import torch
from torch import nn

from dumo.config.spec import Run
from dumo.flow.draw import draw, path_velocity
from dumo.lab import random_net
from dumo.nets import DiT
from dumo.run.cost import exact_rows
from dumo.runtime.random import stream
from dumo.types import Needs, frozen

# All ours: small, so that a fingerprint takes a part of a second
_NET = DiT(patch=2, width=16, depth=1, attention=2)
_SHAPE = (1, 4, 4)
_CLASSES = 3
_MIN_ROWS = 16
_AVERAGE_SCALE = 0.9  # theta^- of a run with an average: the weights of the net times this
_PROGRESS = (0.0, 0.5, 0.9)  # of the training, where the loss is taken


def fingerprint(run: Run) -> dict[str, float]:
    """`loss` and `gradient`: the mean loss of a run's objective over three draws of noise, and its gradient's norm.

    The draws are at three points of a training, for objectives that change with it. Both numbers depend on the
    objective, its times and guidance, on the path, and on whether theta^- is an average: on nothing else of the run.
    Two machines agree to 1e-5 alone, because times are drawn in float32.
    """
    objective = run.objective
    row_multiple = exact_rows(objective)
    rows = ceil(_MIN_ROWS / row_multiple) * row_multiple
    x = torch.randn(rows, *_SHAPE, generator=stream("fingerprint", "x"), dtype=torch.float64)
    c = torch.arange(rows) % _CLASSES
    net = _small_net(objective.needs)
    ref = frozen(net) if run.train.ref == "self" else frozen(_small_net(objective.needs, scale=_AVERAGE_SCALE))
    mean_loss = 0.0
    for step, progress in enumerate(_PROGRESS):
        record = draw(objective, run.path, x, c, _CLASSES, seed=0, step=step, progress=progress, teacher=path_velocity)
        loss = objective.loss(net, ref, record).loss.mean() / len(_PROGRESS)
        loss.backward()
        mean_loss += loss.item()
    gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    return {"loss": mean_loss, "gradient": nn.utils.get_total_norm(gradients).item()}


def _small_net(needs: Needs, scale: float = 1.0) -> nn.Module:
    """The net of a fingerprint, in float64, with the same random weights at every call, times `scale`."""
    net = random_net.build(_NET, needs, _SHAPE, _CLASSES, torch.device("cpu")).double()
    for parameter in net.parameters():
        parameter.data *= scale
    return net
