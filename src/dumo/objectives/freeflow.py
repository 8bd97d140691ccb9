"""FreeFlow (Tong et al. 2025, arXiv 2511.19428): a teacher's flow map from noise, learned without data.

All jumps start from noise z, at t = 1, where teacher and student have the same distribution, because data may lie where
the teacher's trajectories do not pass. A jump to r ends at X_r(z), which moves with the teacher's velocity v at its
position as r changes:

    X_r(z) = z - (1 - r) u(z, 1, r)                                                           (1)
    dX_r/dr = v(X_r, r)        so        u* = sg(v(X_r, r) + (1 - r) du/dr)                   (2)  prediction

The positions X_r are the student's, so errors accumulate as r decreases. To correct the distribution of samples
x' = X_0(z), they are diffused with fresh noise z', and a head w learns their velocity, which should be the teacher's:

    x'_t = t z' + (1 - t) x',        w* = z' - x'                                             (3)
    G = sg(w - v)    at x'_t,    which u(z, 1, 0) descends                                    (4)  correction

G is parallel to the gradient with respect to u of KL(samples || teacher), both diffused to t
(`dumo.objectives.twinflow` derives it).

The error e = u - u* of a row is down-weighted by its length, and G is scaled to the length of the result:

    e' = e / (mean(e^2) + FLOOR)^POWER,        G' = ALPHA E|e'| / (E|G| + FLOOR) G            (5)

LSD has the same equation (2), but differentiates through du/dr, and v is its own network's.

Sources: two descriptions of the paper, which agree in (1) to (5); the authors' code contains no training. Differences:

- w is a head of the student; theirs is a second network, or a LoRA of the teacher.
- Each row has a weighted prediction and correction loss; they use three quarters of a batch for prediction.
- E of (5) is over GROUP rows, theirs over a batch. That e' of (5) is weighted already is our interpretation.
- The descriptions do not specify the distribution of r (uniform here), the std of t in (3), and the constants that are
  marked as our choice.
- Guidance is the teacher's (`teacher.guide`), the same in (2) and (4); theirs is active at fewer times in (4).
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
FLOOR = 1e-3  # of the divisors in (5) (our choice)
ALPHA = 1.0  # of (5) (our choice, between 0.3 and 3, which they find equivalent)
CORRECTION_WEIGHT = 0.25  # the prediction has 1 - CORRECTION_WEIGHT: the authors' shares of a batch
GROUP = 8  # consecutive rows for the means of (5) (our choice)
HEAD_WEIGHT = 0.3  # of the loss of w (our choice, as `match`)


class FreeFlow(ObjectiveSpec):
    """The map from noise to data in one pass, from the teacher's velocity along the map and at its samples."""

    kind: Literal["freeflow"] = "freeflow"
    times: Uniform = Uniform(low=1.0, high=1.0)  # jumps start from noise
    drop: float = Field(default=0.0, ge=0, le=1)  # our choice, because the teacher provides guidance

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, the ends r of jumps, and the noise and times of x'_t."""
        noisy = LogitNormal(mean=0.8, std=1.0)  # t of (3), with their mean
        return Needs(
            inputs=("t", "r"),
            heads=("u", "w"),
            laws={"r": Uniform(), "w.z": Noise(), "w.t": noisy},
            teacher=FromTeacher("must", reads_v_t=False),
            group=GROUP,
        )

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Make two passes from noise and one at samples, and call the teacher twice. The data are not used.

        Without a teacher, as in a count of passes, v_t replaces its velocity.
        """
        ones = torch.ones_like(b.t)

        # Compute the prediction loss of jumps from noise to r.
        r = b.drawn["r"].to(b.t)
        (u_hat, _), (du_dr, _) = heads_and_end_derivatives(net, b.z, b.c, t=ones, r=r, recorded=False)
        gap = lift(1 - r, b.z)
        with torch.no_grad():
            x_r = b.z - gap * u_hat  # (1)
            u_star = b.velocity(x_r, r, b.v_t) + gap * du_dr  # (2)
        error = u_hat - u_star
        u_loss = mean_square(error)

        # Compute the correction loss of diffused samples.
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
        loss = (1 - CORRECTION_WEIGHT) * prediction + CORRECTION_WEIGHT * correction + HEAD_WEIGHT * w_loss
        return Terms(loss, {"u": u_loss, "w": w_loss}, {"pull_w": mean_square(g)})

    def readings(self, net: Net) -> Readings:
        """Return the endpoint, trained at t = 1 only."""

        def endpoint(x: Sample, t: Time, c: Cond) -> Sample:
            return x - lift(t, x) * net(x, c, t=t, r=0 * t)[0]

        return Readings(endpoint=endpoint, lowest=1.0)


def _balance(u_loss: PerSample, g_square: PerSample) -> PerSample:
    """Return ALPHA E|e'| / (E|G| + FLOOR) of each row's group, from the mean squares of e and G, (b,)."""
    weighted_error = u_loss.sqrt() / (u_loss + FLOOR) ** POWER
    error_length = weighted_error.view(-1, GROUP).mean(1)
    g_length = g_square.sqrt().view(-1, GROUP).mean(1)
    return (ALPHA * error_length / (g_length + FLOOR)).repeat_interleave(GROUP)
