"""DMD2 (Yin et al. 2024, arXiv 2405.14867): a few-step generator by distribution matching, for pretrained pipelines.

The generator u jumps from x_t to the data at the times t of the solver `restart`. Samples x' are made as by that solver
from noise z, so that u is trained on the inputs that it has in sampling (their backward simulation):

    x_1 = z,    x' = x_t - t u(x_t, t),    x_s = s z_s + (1 - s) x'    at the next time s < t       (1)

The fake score w learns the velocity of the samples, diffused with fresh noise z' at fresh times t:

    x'_t = t z' + (1 - t) x',    w(x'_t, t)* = z' - x'                                              (2)

The real score v is a teacher's, guided: on a pipeline that of the frozen base model. With the mean m of |z' - x' - v|
over a row, samples move by the normalized difference of both scores:

    V = w - v,    loss = mean of (x' - x'*)^2 / 2    with    x'* = sg(x' + V / m)                   (3)

Both distances in (3) are t times those of the predictions of the data, so V / m is theirs for any prediction of the
network. V vanishes if samples have the distribution of the guided data; `dumo.objectives.match` explains its sign.

`fake_updates` steps train w by (2), then one step trains u by (3). On a pipeline u and w are two adapters of one frozen
model (`Needs.fake_score`); other networks have a head for each. Their code trains both at every fifth step; here each
step trains one, so that only one of them has activations. Their GAN loss is omitted: it needs data, and a critic on the
features of a full second network. So is the regression to a teacher's pairs, which they drop for several steps. Data
are not used but for their conditions.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from dumo.objectives.base import (
    STRAIGHT,
    FromTeacher,
    Frozen,
    LogitNormal,
    Needs,
    Net,
    Noise,
    NoisyBatch,
    ObjectiveSpec,
    OfSampler,
    Readings,
    Sample,
    Terms,
    Uniform,
    UserError,
    descent_error,
    dropout,
    fake_score,
    frozen,
    index,
    jump_to_data,
    lift,
    mean_square,
)

FLOOR = 1e-3  # of m in (3); as `match` has for SiD (our choice), DMD2 has none


class DMD2(ObjectiveSpec):
    """Two time scales: several steps of the fake score, then one of the generator."""

    kind: Literal["dmd2"] = "dmd2"
    times: OfSampler = OfSampler()  # of the generator
    drop: float = Field(default=0.0, ge=0, le=1)
    fake_updates: int = Field(default=5, ge=1)  # for each update of the generator, as DMD2
    # The loss (2) is the mean square of the velocity's error, or of the error of the noise that it predicts (SDXL).
    fake_loss: Literal["velocity", "noise"] = "velocity"
    # Of (3), as DMD2; times of (2) are uniform.
    pull_times: Uniform | LogitNormal = Field(default=Uniform(low=0.02, high=0.98), discriminator="kind")

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the other needs of the loss."""
        noises = {name: Noise() for name in ("fake.z", *self._names_of_noise())}
        steps = self.fake_updates + 1
        return Needs(
            heads=("u", "w"),
            formulas=STRAIGHT,
            laws={**noises, "fake.t": Uniform(), "pull.t": self.pull_times},
            teacher=FromTeacher(velocity="must", reads_v_t=False),
            diffuses_samples=True,
            fake_score=True,
            cycle=((0, self.fake_updates / steps), (self.fake_updates, 1 / steps)),
        )

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Return (2), or in the last step of a cycle (3). Raises UserError if times do not go with their rows."""
        if len(b.t) % self.times.group:
            raise UserError(
                f"{len(b.t)} rows: objective '{self.kind}' gives neighbouring rows {self.times.group} times: set "
                f"train.batch and train.micro_batch to multiples of {self.times.group} on each rank"
            )
        moves_samples = b.step % (self.fake_updates + 1) == self.fake_updates
        generator, scorer = (net, frozen(net)) if moves_samples else (frozen(net), net)

        # Make samples, of which only the last jump has gradients. Diffuse them.
        x_t = self._inputs(frozen(net), b)
        samples = _jump(generator, x_t, b)
        t = b.drawn["pull.t" if moves_samples else "fake.t"].to(b.t)
        x_diffused, w_star = b.path.at(samples.detach(), b.drawn["fake.z"].to(b.z), t)

        # Evaluate the fake score, in the precision of the data from here on, because differences are small.
        with fake_score(net):
            w = scorer(x_diffused, b.c, t=t)[1].to(w_star)
        w_loss = mean_square(w - w_star)
        if not moves_samples:
            # A velocity is wrong by the error of its noise, divided by the weight of the data.
            weight = b.path.gamma(t) ** 2 if self.fake_loss == "noise" else 1.0
            return Terms(weight * w_loss, {"w": w_loss})

        # Move samples by the difference of both scores.
        v = b.velocity(x_diffused, t, w_star)
        m = (w_star - v).abs().flatten(1).mean(1).clamp(min=FLOOR)
        gap = w - v
        pull = mean_square(descent_error(samples, -gap / lift(m, gap))) / 2  # (3)
        return Terms(pull, {"w": w_loss.detach()}, {"pull_w": mean_square(gap)})

    def readings(self, net: Net) -> Readings:
        """Return the endpoint, at the times of training alone."""
        return Readings(endpoint=jump_to_data(net), only=tuple(self.times.taught))

    def _inputs(self, net: Frozen, b: NoisyBatch) -> Sample:
        """Return x_t at the time of each row by (1), (b, ...): rows of lower times are carried through higher ones."""
        x_t = b.path.initial_std * b.z
        places = range(len(b.t))
        for k, (name, s) in enumerate(zip(self._names_of_noise(), self.times.taught[1:], strict=True)):
            rows = index([i for i in places if i % self.times.steps > k], b.t.device)
            carried = replace(b, t=torch.full_like(b.t, self.times.taught[k]))[rows]
            with torch.no_grad(), dropout.rows(rows):
                samples = _jump(net, x_t[rows], carried)
            x_s, _ = b.path.at(samples, carried.drawn[name].to(b.z), torch.full_like(carried.t, s))
            x_t = x_t.index_copy(0, rows, x_s.to(x_t))
        return x_t

    def _names_of_noise(self) -> list[str]:
        """Return the names of the noises z_s in (1)."""
        return [f"z_{k}" for k in range(1, self.times.steps)]


def _jump(net: Net, x_t: Sample, b: NoisyBatch) -> Sample:
    """Return x' of (1), from x_t at the times and with the conditions of b."""
    u = net(x_t, b.c, t=b.t)[0]
    return x_t - lift(b.t, x_t) * u.to(x_t)
