"""DMD2 (Yin et al. 2024, arXiv 2405.14867): a few-step generator by distribution matching, for pretrained pipelines.

The generator u jumps from x_t to the data at the times t of a solver. Samples x' are made as by that solver from noise
z, so that u is trained on the inputs that it has in sampling (their backward simulation). With the solver `restart`:

    x_1 = z,    x' = x_t - t u(x_t, t),    x_s = s z_s + (1 - s) x'    at the next time s < t       (1)

The fake score w learns the velocity of the samples, diffused with fresh noise z' at fresh times t:

    x'_t = t z' + (1 - t) x',    w(x'_t, t)* = z' - x'                                              (2)

The real score v is that of a guided teacher; on a pipeline, of the frozen base model. With the mean m of |z' - x' - v|
over a row, samples move by the normalized difference of both scores:

    V = w - v,    loss = mean of (x' - x'*)^2 / 2    with    x'* = sg(x' + V / m)                   (3)

Both distances in (3) are t times those of the predictions of the data, so V / m is theirs for any prediction of the
network. V vanishes if samples have the distribution of the guided data; `dumo.objectives.match` explains its sign.

`fake_updates` steps train w by (2), then one step trains u by (3). On a pipeline u and w are two adapters of one frozen
model (`Needs.fake_score`); other networks have a head for each. Their code trains both at every fifth step; here each
step trains one, so that only one of them has activations. Their GAN loss is omitted: it needs data, and a critic on the
features of a full second network. The regression to a teacher's pairs, which they drop for several steps, is omitted
as well. Only the conditions of the data are used.

Related methods are settings:

- Phased DMD (arXiv 2510.27684), `phased`: (2) and (3) have times between s and t only, so that each jump learns from
  the noise levels that it removes. They train one network per phase; here one network learns all jumps.
- TDM (arXiv 2503.06674), `times.solver=hop`: jumps keep their noise, x_s = x_t - (t - s) u, and the points x_s of the
  trajectory are matched instead of x'. They are diffused to times tau between s and t, with a = (1 - tau) / (1 - s):

      x'_tau = a x_s + b z',    b^2 = tau^2 - (a s)^2                                               (4)
      w(x'_tau, tau)* = k z' - x_s / (1 - s),    k = (tau + (1 - tau) s^2 / (1 - s)^2) / b          (5)

  (5), of Phased DMD, has the velocity of the distribution of x'_tau as its mean. TDM's code fits x' instead, whose
  noise is not independent of it, with importance weights. Errors of w are divided by k, which grows as tau approaches s
  (our choice). m is the mean of |(x'_tau - x') / tau - v|, as in TDM. Its pseudo-Huber loss is omitted.
- SiD (arXiv 2404.04057; for few steps 2505.12674), `alpha`: samples descend the loss (5) of `dumo.objectives.match`,
  including the dependence of both scores on the sample. SIM (arXiv 2410.16794): `alpha` is 1 and `normalize` is huber.
- Diff-Instruct (arXiv 2305.18455): `normalize` is none, and `fake_updates` is 1.
- Decoupled DMD (arXiv 2511.22677), `scale`: the objective guides, not the teacher, at times tau of their own. With
  v_null, the velocity without the condition, samples move by V / m at t and by (scale - 1) (v_null - v) / m at tau.
"""

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator

from dumo.objectives.base import (
    STRAIGHT,
    Cond,
    Formulas,
    FromTeacher,
    Frozen,
    Law,
    LogitNormal,
    Needs,
    Net,
    Noise,
    NoisyBatch,
    ObjectiveSpec,
    OfSampler,
    PerSample,
    Readings,
    Sample,
    Terms,
    Time,
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
from dumo.runtime.limits import FACTOR
from dumo.types import QUIET, unwrap

# What V is divided by in each row: m (DMD2, SiD), sqrt(mean of V^2 + HUBER^2) (SIM), or nothing (Diff-Instruct).
Normalize = Literal["distance", "huber", "none"]
# The lower bound of m (our choice; DMD2 has none).
FLOOR = 1e-3
# SIM's c, per number of a row (our choice).
HUBER = 0.03


class DMD2(ObjectiveSpec):
    """Train the fake score for several steps, then the generator for one."""

    kind: Literal["dmd2"] = "dmd2"
    # The generator's times.
    times: OfSampler = OfSampler()
    drop: float = Field(default=0.0, ge=0, le=1)
    # Updates of the fake score for each update of the generator, as DMD2.
    fake_updates: int = Field(default=5, ge=1)
    # The loss (2) is the mean square of the velocity's error, or of the error of the noise that it predicts (SDXL).
    fake_loss: Literal["velocity", "noise"] = "velocity"
    # The times of (3), as DMD2; times of (2) are uniform.
    pull_times: Uniform | LogitNormal = Field(default=Uniform(low=0.02, high=0.98), discriminator="kind")
    # If true, times in (2) and (3) are drawn between s and t. Always the case for `hop`.
    phased: bool = Field(default=False, json_schema_extra=QUIET)
    normalize: Normalize = Field(default="distance", json_schema_extra=QUIET)
    # SiD's alpha, 1.2 in its code; None means (3).
    alpha: float | None = Field(default=None, ge=0, json_schema_extra=QUIET)
    # The guidance of (3) at times of its own, with an unguided teacher; 1 means none.
    scale: float = Field(default=1.0, gt=0, le=FACTOR, json_schema_extra=QUIET)
    scale_times: Uniform | LogitNormal = Field(
        default=Uniform(low=0.02, high=0.98), discriminator="kind", json_schema_extra=QUIET
    )

    @model_validator(mode="after")
    def _require_one_loss(self) -> "DMD2":
        if self.alpha is not None and self.scale != 1:
            raise ValueError("scale guides (3), and alpha replaces it by SiD's loss: set scale=1, or alpha=null")
        return self

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the other needs of the loss."""
        noises = {name: Noise() for name in ("fake.z", *self._names_of_noise())}
        # k of (5) is infinite at s.
        fake_times = Uniform(low=0.02) if self._matches_trajectory else Uniform()
        laws: dict[str, Law] = {**noises, "fake.t": fake_times, "pull.t": self.pull_times}
        if self.scale != 1:
            laws |= {"scale.z": Noise(), "scale.t": self.scale_times}
        steps = self.fake_updates + 1
        return Needs(
            heads=("u", "w"),
            formulas=Formulas() if self._matches_trajectory else STRAIGHT,
            laws=laws,
            guide=self.scale,
            teacher=FromTeacher(velocity="must", reads_v_t=False),
            diffuses_samples=True,
            fake_score=True,
            cycle=((0, self.fake_updates / steps), (self.fake_updates, 1 / steps)),
        )

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Return (2), or (3) in the last step of a cycle. Raises UserError if `times` do not fit the batch size."""
        if len(b.t) % self.times.group:
            raise UserError(
                f"objective '{self.kind}' assigns {self.times.group} different times to consecutive rows, so the "
                f"batch size must be a multiple of {self.times.group}, got {len(b.t)}: set train.batch and "
                f"train.micro_batch to multiples of {self.times.group} on each rank"
            )
        moves_samples = b.step % (self.fake_updates + 1) == self.fake_updates
        generator, scorer = (net, frozen(net)) if moves_samples else (frozen(net), net)

        # Make samples, of which only the last jump has gradients. Diffuse them.
        x_t = self._inputs(frozen(net), b)
        samples = _jump(generator, x_t, b)
        if moves_samples and self.alpha is not None:
            return self._implicit_loss(net, b, x_t, samples)
        diffused = self._diffuse(b, x_t, samples.detach(), "fake.z", "pull.t" if moves_samples else "fake.t")

        # Evaluate the fake score. From here on, use the precision of the data, because differences are small.
        with fake_score(net):
            w = scorer(diffused.x, b.c, t=diffused.t)[1].to(diffused.x)
        w_loss = mean_square(w - diffused.w_star) / diffused.variance
        if not moves_samples:
            # A velocity is wrong by the error of its noise, divided by the weight of the data.
            weight = b.path.gamma(diffused.t) ** 2 if self.fake_loss == "noise" else 1.0
            return Terms(weight * w_loss, {"w": w_loss})

        # Move samples by the difference of both scores.
        v = b.velocity(diffused.x, diffused.t, diffused.w_star)
        gap = w - v
        move = normalized(gap, diffused.straight - v, self.normalize)
        if self.scale != 1:
            move = move + self._guidance(b, x_t, samples.detach())
        pull = mean_square(descent_error(samples, -move)) / 2  # (3)
        return Terms(pull, {"w": w_loss.detach()}, {"pull_w": mean_square(gap)})

    def readings(self, net: Net) -> Readings:
        """Return the endpoint, or the jumps to the next time, at the times of training alone."""
        taught = tuple(self.times.taught)
        if not self._matches_trajectory:
            return Readings(endpoint=jump_to_data(net), only=taught)

        def flow_map(x: Sample, t: Time, s: Time, c: Cond) -> Sample:
            return x - lift(t - s, x) * net(x, c, t=t)[0]

        return Readings(flow_map=flow_map, only=taught)

    @property
    def _matches_trajectory(self) -> bool:
        """Whether jumps keep their noise, and the points x_s are matched (TDM)."""
        return self.times.solver == "hop"

    def _inputs(self, net: Frozen, b: NoisyBatch) -> Sample:
        """Return x_t at the time of each row, (b, ...). Rows of lower times pass through all higher times."""
        x_t = b.path.initial_std * b.z
        places = range(len(b.t))
        for k, (name, s) in enumerate(zip(self._names_of_noise(), self.times.taught[1:], strict=True)):
            rows = index([i for i in places if i % self.times.steps > k], b.t.device)
            carried = replace(b, t=torch.full_like(b.t, self.times.taught[k]))[rows]
            s_rows = torch.full_like(carried.t, s)
            with torch.no_grad(), dropout.rows(rows):
                samples = _jump(net, x_t[rows], carried)
            if self._matches_trajectory:
                x_s = _step(x_t[rows], samples, carried.t, s_rows)
            else:
                x_s, _ = b.path.at(samples, carried.drawn[name].to(b.z), s_rows)  # (1)
            x_t = x_t.index_copy(0, rows, x_s.to(x_t))
        return x_t

    def _names_of_noise(self) -> list[str]:
        """Return the names of the noises z_s in (1)."""
        return [f"z_{k}" for k in range(1, self.times.steps)]

    def _diffuse(self, b: NoisyBatch, x_t: Sample, samples: Sample, noise: str, times: str) -> "_Diffused":
        """Diffuse samples x', or their trajectories, with the noise and to the times of these names."""
        z = b.drawn[noise].to(b.z)
        t = b.drawn[times].to(b.t)
        s = b.r
        if self.phased or self._matches_trajectory:
            t = s + t * (b.t - s)
        if not self._matches_trajectory:
            x, w_star = b.path.at(samples, z, t)
            return _Diffused(x, t, w_star, straight=w_star, variance=torch.ones_like(t))
        x_s = _step(x_t, samples, b.t, s)
        a = (1 - t) / (1 - s)
        std = ((t - s) / (1 - s) * (t + a * s)).sqrt()  # b of (4), without a difference of squares
        k = (t + (1 - t) * s**2 / (1 - s) ** 2) / std
        x = lift(a, z) * x_s + lift(std, z) * z  # (4)
        w_star = lift(k, z) * z - x_s / lift(1 - s, z)  # (5)
        return _Diffused(x, t, w_star, straight=(x - samples) / lift(t, z), variance=k**2)

    def _guidance(self, b: NoisyBatch, x_t: Sample, samples: Sample) -> Sample:
        """Return the displacement of samples by guidance in (3), at times of its own, (b, ...)."""
        diffused = self._diffuse(b, x_t, samples, "scale.z", "scale.t")
        v = b.velocity(diffused.x, diffused.t, diffused.w_star)
        v_null = replace(b, c=b.null).velocity(diffused.x, diffused.t, diffused.w_star)
        gap = (self.scale - 1) * (v_null - v)
        return normalized(gap, diffused.straight - (v - gap), self.normalize)

    def _implicit_loss(self, net: Net, b: NoisyBatch, x_t: Sample, samples: Sample) -> Terms:
        """Return SiD's or SIM's loss of samples, whose gradient passes through the inputs of both scores."""
        assert self.alpha is not None
        inputs = samples.detach().requires_grad_()
        with torch.enable_grad():
            diffused = self._diffuse(b, x_t, inputs, "fake.z", "pull.t")
            with fake_score(net):
                w = unwrap(net)(diffused.x, b.c, t=diffused.t)[1].to(diffused.x)
            v = b.velocity(diffused.x, diffused.t, diffused.w_star)
            loss = diffused.t * sid_loss(self.alpha, w, v, diffused.w_star, diffused.straight, self.normalize)
            # Only samples get a gradient: the weights of both scores have none in this step.
            (slope,) = torch.autograd.grad(loss.sum(), inputs)
        descent = (samples * slope).flatten(1).sum(1)
        w_loss = mean_square((w - diffused.w_star).detach()) / diffused.variance
        notes = {"pull_w": mean_square((w - v).detach())}
        return Terms(loss.detach() + descent - descent.detach(), {"w": w_loss}, notes)


class _Diffused(NamedTuple):
    """Samples with fresh noise, the input of both scores, and the target of the fake score.

    x: the diffused samples, at the times t (b,).
    w_star: the target of the fake score, (2) or (5).
    straight: the velocity of the line from the samples to x.
    variance: k^2 of (5), (b,), by which errors of the fake score are divided; 1 for (2).
    """

    x: Sample
    t: Time
    w_star: Sample
    straight: Sample
    variance: PerSample


def normalized(gap: Sample, error: Sample, normalize: Normalize) -> Sample:
    """Return V divided by the divisor of its row, for error = z' - x' - v."""
    if normalize == "none":
        return gap
    if normalize == "huber":
        return gap / lift((mean_square(gap) + HUBER**2).sqrt(), gap)
    m = error.detach().abs().flatten(1).mean(1).clamp(min=FLOOR)
    return gap / lift(m, gap)


def sid_loss(alpha: float, w: Sample, v: Sample, w_star: Sample, straight: Sample, normalize: Normalize) -> PerSample:
    """Return (5) or (6) of `dumo.objectives.match` of each row, (b,), without their factor t.

    w_star is what w learns, and straight is z' - x', which differs from it for TDM. If w is the velocity of the
    samples, V (w_star - v) and V^2 have the same mean over noise. At alpha = 1/2 and without a divisor, twice the
    gradient of this loss is that of the mean of V^2 over samples, including the change of w (ours).
    """
    gap = w - v
    product = normalized(gap, straight - v, normalize) * (w_star - v - alpha * gap)
    return product.flatten(1).mean(1)


def _jump(net: Net, x_t: Sample, b: NoisyBatch) -> Sample:
    """Return x' of (1), from x_t at the times and with the conditions of b."""
    u = net(x_t, b.c, t=b.t)[0]
    return x_t - lift(b.t, x_t) * u.to(x_t)


def _step(x_t: Sample, samples: Sample, t: Time, s: Time) -> Sample:
    """Return x_s = x_t - (t - s) u, for samples x' = x_t - t u."""
    return samples + lift(s / t, x_t) * (x_t - samples)
