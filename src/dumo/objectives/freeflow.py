"""FreeFlow (Tong et al. 2025, arXiv 2511.19428): a teacher's flow map from noise, learned without data.

All jumps begin at noise z, at t = 1, where teacher and student have the same distribution. Data would bring places that
the teacher's own paths do not visit. A jump down to r ends at X_r(z), which as r falls is to move with the teacher's
velocity v of the place that it is at:

    X_r(z) = z - (1 - r) u(z, 1, r)                                                           (1)
    dX_r/dr = v(X_r, r)        so        u* = sg(v(X_r, r) + (1 - r) du/dr)                   (2)  prediction

The places X_r are the student's, so an error at one r is inherited by all below. What samples x' = X_0(z) have become
is seen by diffusing them with fresh noise z'. There a head w learns their velocity, which should be the teacher's:

    x'_t = t z' + (1 - t) x',        w* = z' - x'                                             (3)
    G = sg(w - v)    at x'_t,    which u(z, 1, 0) descends                                    (4)  correction

G is along the gradient, by u, of KL(samples || teacher's), both diffused to t (`dumo.objectives.twinflow` derives it).

The error e = u - u* of a row counts less the longer it is, and G is brought to the length of what remains:

    e' = e / (mean(e^2) + FLOOR)^POWER,        G' = ALPHA E|e'| / (E|G| + FLOOR) G            (5)

Unlike LSD, which has the same equation (2), the end is held still in du/dr, too, and v is not the net's own.

Read: two accounts of the paper, which agree in (1) to (5). The authors' code has no training. Of ours:

- w is a head on the student's trunk; theirs is a second net, or a LoRA of the teacher.
- Each row is predicted and corrected, by weights; theirs parts a batch, three rows of four being predicted.
- E of (5) is over GROUP rows; theirs over a batch. That the e' of (5) is weighed already is our reading.
- The accounts do not give the law of r (uniform here), the std of t in (3), nor the constants that are marked ours.
- Guidance is the teacher's (`teacher.guide`), the same in (2) and (4); theirs acts at fewer times in (4).
"""

from typing import Literal

import torch
from pydantic import Field

from dumo.objectives.base import (
    Cond,
    FromTeacher,
    Frozen,
    LogitNormal,
    Needs,
    Net,
    Noise,
    NoisyBatch,
    ObjectiveSpec,
    PerSample,
    Readings,
    Sample,
    Terms,
    Time,
    Uniform,
    adaptive_l2,
    descent_error,
    heads_and_end_derivatives,
    lift,
    mean_square,
)

POWER = 1.0  # k of its ablation: the best with correction
FLOOR = 1e-3  # added to what divides, in (5); ours
ALPHA = 1.0  # of (5); ours, between the 0.3 and 3 that they find alike
CORRECTED = 0.25  # weight of the correction, 1 - CORRECTED that of the prediction: their shares of a batch
GROUP = 8  # neighbouring rows over which (5) takes its means; ours
FIT = 0.3  # weight of w's own loss; ours, as `match`


class FreeFlow(ObjectiveSpec):
    """The map from noise to data in one pass, by the teacher's velocity along it and at its samples."""

    kind: Literal["freeflow"] = "freeflow"
    times: Uniform = Uniform(low=1.0, high=1.0)  # jumps begin at noise; nothing is drawn
    drop: float = Field(default=0.0, ge=0, le=1)  # ours: the teacher has its own answer without a label

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the net, the ends of jumps (r), and the noises and times of x'_t."""
        noisy = LogitNormal(mean=0.8, std=1.0)  # t of (3) lies near noise: the mean is theirs
        return Needs(
            inputs=("t", "r"),
            heads=("u", "w"),
            laws={"r": Uniform(), "w.z": Noise(), "w.t": noisy},
            teacher=FromTeacher("must", reads_v_t=False),
            group=GROUP,
        )

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Two passes from noise and one at samples; the teacher is asked twice. Of the batch's data nothing is read.

        Without a teacher, which no run lacks, slopes of the batch stand for its velocity.
        """
        ones = torch.ones_like(b.t)

        # prediction, from noise to r
        r = b.drawn["r"].to(b.t)
        (u_hat, _), (du_dr, _) = heads_and_end_derivatives(net, b.z, b.c, t=ones, r=r, recorded=False)
        gap = lift(1 - r, b.z)
        with torch.no_grad():
            x_r = b.z - gap * u_hat  # (1)
            u_star = b.velocity(x_r, r, b.v_t) + gap * du_dr  # (2)
        error = u_hat - u_star
        u_loss = mean_square(error)

        # correction, of samples that are diffused again
        u_to_data, _ = net(b.z, b.c, t=ones, r=0 * ones)
        t = b.drawn["w.t"].to(b.t)
        z = b.drawn["w.z"].to(b.z.dtype)
        x_t, w_star = b.path.at((b.z - u_to_data).detach(), z, t)  # (3)
        _, w_hat = net(x_t, b.c, t=t, r=t)
        w_loss = mean_square(w_hat - w_star)
        with torch.no_grad():
            g = w_hat - b.velocity(x_t, t, w_star)  # (4)
            balance = _balance(u_loss, mean_square(g))

        prediction = adaptive_l2(error, POWER, FLOOR, mean=True)
        correction = balance * mean_square(descent_error(u_to_data, g))
        loss = (1 - CORRECTED) * prediction + CORRECTED * correction + FIT * w_loss
        return Terms(loss, {"u": u_loss, "w": w_loss}, {"pull_w": mean_square(g)})

    def readings(self, net: Net) -> Readings:
        """The head u jumps from noise, at t = 1 alone, to the data."""

        def endpoint(x: Sample, t: Time, c: Cond) -> Sample:
            return x - lift(t, x) * net(x, c, t=t, r=0 * t)[0]

        return Readings(endpoint=endpoint, lowest=1.0)


def _balance(u_loss: PerSample, g_square: PerSample) -> PerSample:
    """ALPHA E|e'| / (E|G| + FLOOR) of each row's group, by the mean squares of e and of G, (b,)."""
    weighted_error = u_loss.sqrt() / (u_loss + FLOOR) ** POWER
    error_length = weighted_error.view(-1, GROUP).mean(1)
    g_length = g_square.sqrt().view(-1, GROUP).mean(1)
    return (ALPHA * error_length / (g_length + FLOOR)).repeat_interleave(GROUP)
