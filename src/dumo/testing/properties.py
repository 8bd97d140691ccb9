"""Checks of the properties of an objective, one function per property.

Each raises `PropertyError` with the numbers and the usual cause. `dumo.testing.check_objective` calls all of them, and
dumo's own tests call them for every objective, slope and network. Batches and networks are in float64, so that rounding
does not hide errors.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import fields, replace
from math import ceil
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from dumo.autodiff.dual import primal
from dumo.flow.guide import Guide
from dumo.flow.noisy_batch import draw, path_velocity
from dumo.flow.path import Linear
from dumo.flow.reading import bind_knobs
from dumo.flow.trainable import group_size
from dumo.objectives.base import ObjectiveSpec
from dumo.testing.exact import ExactFlow, ExactNet, Head, exact_batch, gradient, stiffness
from dumo.testing.network import CountedNet
from dumo.types import Frozen, Heads, NoisyBatch, Readings, Terms, UserError

SHAPE = (2, 4, 4)
CLASSES = 3
# Largest gradient at the exact flow. The largest measured one is 1e-14.
MAX_EXACT_GRADIENT = 1e-12
# Smallest stiffness. It is about 1 for a head of weight 1.
MIN_STIFFNESS = 1e-3
# Largest relative error of the loss of a batch in bf16. At most 0.002 was measured, and 0.04 for a central difference.
MAX_BF16_ERROR = 0.01


class PropertyError(AssertionError):
    """An objective does not have a property."""


def require(holds: object, message: str) -> None:
    """Raise PropertyError with the message unless `holds` is true."""
    if not holds:
        raise PropertyError(message)


# ------------------------------------------------------------------------------------------------------------- batches


def random_batch(
    objective: ObjectiveSpec, n: int = 16, shape: tuple[int, ...] = SHAPE, rows: slice = slice(None)
) -> NoisyBatch:
    """Return the slice `rows` of a batch of n samples. The data are float64 noise, and the classes alternate."""
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    c = torch.arange(n) % CLASSES
    return draw(
        objective,
        Linear(),
        x[rows],
        c[rows],
        CLASSES,
        seed=1,
        step=2,
        batch=n,
        first=rows.start or 0,
        progress=0.5,
        teacher=path_velocity,
    )


def altered_batches(b: NoisyBatch) -> dict[str, NoisyBatch]:
    """Return the batch with other conditions and times, such as t = 0 and t = 1, by a description of each."""
    one = torch.ones_like(b.t)
    b = replace(b, moving=None)
    return {
        "as drawn": b,
        "all conditions dropped": replace(b, c=b.null, kept=torch.zeros_like(b.kept)),
        "no condition dropped": replace(b, c=torch.zeros_like(b.c), kept=torch.ones_like(b.kept)),
        "t = r = 0": replace(b.at(0 * one), r=0 * one),
        "t = 1, r = 0": replace(b.at(one), r=0 * one),
        "t = r = 1": replace(b.at(one), r=one),
        "t = r": replace(b.at(b.t), r=b.t),
        "t = 1/2, r = 1/4": replace(b.at(one / 2), r=one / 4),
        "t and r rounded to bf16": replace(b.at(b.t.bfloat16().to(b.t)), r=b.r.bfloat16().to(b.r)),
    }


def tensors_of(b: NoisyBatch) -> dict[str, Tensor]:
    """Return the tensors of a batch, including `drawn`, by name."""
    named = {field.name: getattr(b, field.name) for field in fields(b)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)} | dict(b.drawn)


def cast_batch(b: NoisyBatch, dtype: torch.dtype, times: torch.dtype = torch.float32) -> NoisyBatch:
    """Return the batch with its data in `dtype`, and its times and further random numbers in `times`."""
    data: dict[str, Any] = {name: getattr(b, name).to(dtype) for name in ("x", "z", "x_t", "v_t")}
    drawn = {name: value.to(times) for name, value in b.drawn.items()}
    return replace(b, **data, t=b.t.to(times), r=b.r.to(times), drawn=drawn)


def loss_of(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> Terms:
    """Return the loss of a batch, with the network itself as theta^-."""
    return objective.loss(net, Frozen(net), b)


# ------------------------------------------------------------------------------------------- the objective as a value


def spec_is_a_value(objective: ObjectiveSpec) -> None:
    """Check that the objective is frozen, hashable, and unchanged by a round trip through JSON."""
    again = type(objective).model_validate_json(objective.model_dump_json())
    require(
        again == objective,
        f"a round trip through JSON changes {objective!r} to {again!r}: make each field a number, a string or a Spec",
    )
    require(type(objective).model_config.get("frozen"), "the fields are mutable: do not override frozen=True of Spec")
    try:
        hash(objective)
    except TypeError as error:
        raise PropertyError(
            f"the objective is not hashable ({error}): use tuples instead of lists and dicts"
        ) from error


def draws_are_keyed_by_row(objective: ObjectiveSpec, shape: tuple[int, ...] = SHAPE) -> None:
    """Check that a row's random numbers do not depend on which other rows are drawn, as on several ranks."""
    n = 2 * group_rows(objective)
    whole = tensors_of(random_batch(objective, n, shape))
    for rows in (slice(0, 1), slice(1, n // 2), slice(n // 2, n)):
        for name, value in tensors_of(random_batch(objective, n, shape, rows)).items():
            require(
                torch.equal(value, whole[name][rows]),
                f"{name} of rows {rows.start} to {rows.stop - 1} changes if only these rows are drawn: key the random "
                "numbers by row (in a Law by the numbers in `rows`; a TimeLaw draws all n rows from its generator)",
            )


def group_rows(objective: ObjectiveSpec) -> int:
    """Return the smallest multiple of the group size that is at least 8."""
    group = group_size(objective)
    return ceil(8 / group) * group


# ------------------------------------------------------------------------------------------------------------ the loss


def loss_is_one_number_per_row(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> None:
    """Check that the loss, its parts and notes are finite, of shape (rows,), and that notes have no gradient."""
    terms = loss_of(objective, net, b)
    rows = (len(b.t),)
    named = {"loss": terms.loss, **terms.parts, **terms.notes}
    require(terms.parts, "Terms has no parts, so only the loss would be logged: return Terms(loss, {'u': loss})")
    require(
        len(named) == 1 + len(terms.parts) + len(terms.notes),
        f"the names of parts {[*terms.parts]} and notes {[*terms.notes]} must be unique and not 'loss', because they "
        "share a log",
    )
    for name, value in named.items():
        require(
            value.shape == rows,
            f"'{name}' has shape {tuple(value.shape)}, not {rows}: average within each row only (mean_square), because "
            "the trainer averages over rows",
        )
        require(value.isfinite().all(), f"'{name}' is not finite on {int((~value.isfinite()).sum())} of {rows[0]} rows")
    # With gauges the loss contains logarithms, which may be negative.
    if not objective.needs.gauges:
        for name, value in {"loss": terms.loss, **terms.parts}.items():
            require((value > 0).all(), f"'{name}' is {value.min():.3g} on a row, but a squared error is positive")
    require(terms.loss.requires_grad, "the loss has no gradient: call `net`, not `ref`, for the trained pass")
    for name, value in terms.notes.items():
        require(not value.requires_grad, f"note '{name}' has a gradient: detach it")


def loss_changes_nothing(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> None:
    """Check that computing a loss does not modify the batch or the weights."""
    batch = deepcopy(tensors_of(b))
    weights = deepcopy(net.state_dict())
    loss_of(objective, net, b)
    for name, value in tensors_of(b).items():
        require(torch.equal(value, batch[name]), f"the loss modifies b.{name}: write y = y + ..., not y += ...")
    for name, value in net.state_dict().items():
        require(torch.equal(value, weights[name]), f"the loss modifies the weights '{name}' of the network")


def loss_draws_nothing(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> None:
    """Check that computing a loss does not advance torch's generator."""
    state = torch.get_rng_state()
    loss_of(objective, net, b)
    drew = not torch.equal(state, torch.get_rng_state())
    torch.set_rng_state(state)
    require(
        not drew,
        "the loss draws from torch's generator, so a resumed run would differ: declare the random numbers in "
        "Needs.laws and read b.drawn[name]",
    )


def loss_is_the_same_twice(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> None:
    """Check that two calls on the same batch, with torch's generator in the same state, are bit-identical."""
    state = torch.get_rng_state()
    first = loss_of(objective, net, deepcopy(b))
    torch.set_rng_state(state)
    second = loss_of(objective, net, deepcopy(b))
    torch.set_rng_state(state)
    difference = (first.loss - second.loss).abs().max()
    require(
        torch.equal(first.loss, second.loss)
        and all(torch.equal(value, second.parts[name]) for name, value in first.parts.items()),
        f"two calls on the same batch differ by {difference:.3g}: keep no state between calls, and use `b.progress` "
        "for schedules",
    )


def rows_are_independent(objective: ObjectiveSpec, net: nn.Module, shape: tuple[int, ...] = SHAPE) -> None:
    """Check that the loss of a row does not depend on other groups of rows in the batch."""
    half = group_rows(objective)
    b = random_batch(objective, 2 * half, shape)
    whole = loss_of(objective, net, b).loss
    for first in (0, half):
        rows = slice(first, first + half)
        for part in (random_batch(objective, 2 * half, shape, rows), b[rows]):
            loss = loss_of(objective, net, part).loss
            difference = ((loss - whole[rows]) / whole[rows]).abs().max()
            require(
                torch.allclose(loss, whole[rows], rtol=1e-9, atol=0),
                f"the losses of rows {first} to {first + half - 1} have a relative error of {difference:.2g} without "
                "the other rows, so micro-batches would change the training: compute no statistics over the batch, or "
                "set Needs.group to the number of rows that are compared",
            )


def passes_do_not_depend_on_the_batch(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> None:
    """Check that the loss is finite and the number of passes constant, since with FSDP a rank must not skip a pass."""
    counts: dict[str, tuple[int, int]] = {}
    for name, batch in altered_batches(b).items():
        counted = CountedNet(net)
        loss = loss_of(objective, counted, batch).loss
        require(
            loss.isfinite().all(),
            f"with {name} the loss is not finite: look for a division by t, t - r or a standard deviation",
        )
        counts[name] = (counted.graded, counted.still)
    require(
        len({*counts.values()}) == 1,
        f"the number of passes with and without gradients depends on the values in the batch: {counts}. Evaluate every "
        "pass on all rows, and select with torch.where",
    )


def every_parameter_learns(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> None:
    """Check that every parameter gets a finite, nonzero gradient in some step of the cycle."""
    net.zero_grad()
    for step, _ in objective.needs.cycle:
        loss_of(objective, net, replace(b, step=step)).loss.mean().backward()
    for name, p in net.named_parameters():
        require(
            p.grad is not None and p.grad.any(),
            f"parameter '{name}' gets no gradient: every head of Needs.heads must be in the loss (heads: "
            f"{', '.join(objective.needs.heads)})",
        )
        assert p.grad is not None
        require(p.grad.isfinite().all(), f"the gradient of '{name}' is not finite")
    net.zero_grad()


def targets_are_of_the_reference(
    objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch, *, still_passes: int = 0
) -> None:
    """Check that passes without gradients use theta^-, which gets no gradient and may be a copy of the weights.

    still_passes: the number of passes without gradients for which the objective intentionally uses `net`.
    """
    # If only some rows move, a derivative may take two passes.
    b = replace(b, moving=None)
    ref = deepcopy(net)
    parameters = [*net.parameters()]

    # Count the passes of net and ref.
    counted, counted_ref = CountedNet(net), CountedNet(ref)
    terms = objective.loss(counted, Frozen(counted_ref), b)
    require(
        counted.still == still_passes,
        f"`net` makes {counted.still} passes without gradients, expected {still_passes}: call `ref` for targets, "
        "because theta^- may be an EMA",
    )
    require(counted_ref.graded == 0, "theta^- makes a pass with gradients: call `ref`, not `ref.module`")

    # Compare the gradients with those of a copy as theta^-.
    gradients = torch.autograd.grad(terms.loss.mean(), parameters, materialize_grads=True)
    same = loss_of(objective, net, b).loss
    same_gradients = torch.autograd.grad(same.mean(), parameters, materialize_grads=True)
    # Both may round differently, because a pass with gradients of the same weights may serve as a target, too.
    pairs = [(terms.loss, same), *zip(gradients, same_gradients, strict=True)]
    require(
        all(torch.allclose(one, other, rtol=1e-9, atol=1e-12) for one, other in pairs),
        "the loss or its gradients change if theta^- is a copy of the weights: a target has a gradient",
    )
    objective.loss(net, Frozen(ref), b).loss.mean().backward()
    require(all(p.grad is None for p in ref.parameters()), "theta^- gets a gradient: call `ref`, not `ref.module`")
    net.zero_grad()


def graded_outputs(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> tuple[Terms, list[Heads]]:
    """Return the loss with `moving` unset, and the outputs of the passes with gradients."""
    outputs: list[Heads] = []

    def recording_net(x: Tensor, c: Tensor, /, **inputs: Tensor) -> Heads:
        heads = net(x, c, **inputs)
        if torch.is_grad_enabled():
            outputs.append(heads)
        return heads

    return objective.loss(recording_net, Frozen(net), replace(b, moving=None)), outputs


def one_pass_has_gradients(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> None:
    """Check that exactly one pass of the network records gradients."""
    _, outputs = graded_outputs(objective, net, b)
    require(
        len(outputs) == 1,
        f"{len(outputs)} passes of `net` have gradients: compute targets with `ref`, under torch.no_grad(). If the "
        "objective trains more than one pass, skip this check",
    )


def targets_have_no_gradient(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> None:
    """Check that a part of the loss that is named after a head has gradients of this head only."""
    terms, outputs = graded_outputs(objective, net, b)
    for name, part in terms.parts.items():
        if name not in objective.needs.heads or not part.requires_grad:
            continue
        for heads in outputs:
            for head, value in zip(objective.needs.heads, heads, strict=False):  # gauges follow the heads
                if head == name or not primal(value).requires_grad:
                    continue
                grads = torch.autograd.grad(part.sum(), primal(value), retain_graph=True, materialize_grads=True)
                require(
                    not grads[0].any(),
                    f"part '{name}' of the loss also has a gradient with respect to head '{head}': compute the target "
                    "under torch.no_grad(), or detach it",
                )


def guided_target_has_no_gradient(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> None:
    """Check that the output of `Guide` has no gradient."""
    carries: list[bool] = []
    guide = Guide.__call__

    def recorded(self: Guide, *arguments: Any, **named: Any) -> Tensor:  # noqa: ANN401, as a Guide takes them
        v_star = guide(self, *arguments, **named)
        carries.append(v_star.requires_grad)
        return v_star

    with patch.object(Guide, "__call__", recorded):
        loss_of(objective, net, b)
    require(
        not any(carries),
        "the guided target v* has a gradient, which trains the network through its own guidance: call the guide under "
        "torch.no_grad()",
    )


def data_without_classes_is_served(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> None:
    """Check that with the null condition 0 alone, the loss is finite and every parameter gets a gradient."""
    only_null = torch.zeros(len(b.t), dtype=torch.long)
    b = replace(b, c=only_null, null=only_null)
    require(loss_of(objective, net, b).loss.isfinite().all(), "the loss without classes is not finite")
    every_parameter_learns(objective, net, b)


def points_are_served(objective: ObjectiveSpec, net: nn.Module) -> None:
    """Check that the loss of points (b, 2) is finite."""
    b = random_batch(objective, 2 * group_rows(objective), (2,))
    require(
        loss_of(objective, net, b).loss.isfinite().all(),
        "the loss of points (b, 2) is not finite: reshape values per row with lift, not with [:, None, None, None]",
    )


def bf16_is_served_or_refused(
    objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch, dtype: torch.dtype = torch.float32
) -> None:
    """Check that the loss under autocast agrees with float32 to 1 %, or raises UserError."""
    net = deepcopy(net).float()
    b = cast_batch(b, dtype)
    exact = loss_of(objective, net, cast_batch(b, torch.float32)).loss
    with torch.autocast("cpu", torch.bfloat16):
        try:
            loss = loss_of(objective, net, b).loss
        except UserError:
            return
        loss.mean().backward()
    for p in net.parameters():
        require(p.grad is None or p.grad.isfinite().all(), "a gradient under bf16 is not finite")
    error = (loss.float() - exact).norm() / exact.norm()
    require(
        error < MAX_BF16_ERROR,
        f"the relative error of the loss in bf16 is {error:.2g}, above {MAX_BF16_ERROR}: a difference of two passes "
        "amplifies rounding errors, so call require_precise_passes, or use the slope 'dual'",
    )


# -------------------------------------------------------------------------------------------------------- the readings


def readings_of(objective: ObjectiveSpec, net: nn.Module) -> Readings:
    """Return the readings of a network with the default knobs."""
    return objective.readings(bind_knobs(net, **objective.needs.knobs))


def readings_make_one_pass_each(objective: ObjectiveSpec, net: nn.Module) -> None:
    """Check that `readings` evaluates nothing, and that each reading makes one pass and returns a sample."""
    counted = CountedNet(net)
    readings = readings_of(objective, counted)
    require(counted.graded + counted.still == 0, "`readings` evaluates the network: return functions that do")

    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, *SHAPE, generator=g, dtype=torch.float64)
    t = torch.rand(5, generator=g, dtype=torch.float64)
    c = torch.arange(5) % (CLASSES + 1)
    arguments = {"velocity": (x, t, c), "endpoint": (x, t, c), "flow_map": (x, t, t / 2, c), "both": (x, t, c)}
    trained = [name for name in arguments if getattr(readings, name) is not None]
    require(trained, "`readings` returns no function, so nothing can be sampled: return Readings(velocity=...)")
    for count, name in enumerate(trained, start=1):
        answer = getattr(readings, name)(*arguments[name])
        passes = counted.graded + counted.still - count + 1
        require(passes == 1, f"reading '{name}' makes {passes} passes, but solvers expect one")
        for sample in answer if name == "both" else (answer,):
            require(
                sample.shape == x.shape and sample.isfinite().all(),
                f"reading '{name}' returns shape {tuple(sample.shape)} for samples of shape {tuple(x.shape)}, or "
                "values that are not finite",
            )
            require(sample.requires_grad, f"reading '{name}' has no gradient: leave torch.no_grad() to the solver")


def a_jump_of_no_time_stays(objective: ObjectiveSpec, net: nn.Module) -> None:
    """Check that the endpoint at t = 0 and the flow map from t to t return x."""
    readings = readings_of(objective, net)
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    half = torch.full_like(zero, 0.5)
    c = torch.zeros(3, dtype=torch.long)
    jumps: dict[str, Callable[[], Tensor]] = {}
    if (endpoint := readings.endpoint) is not None:
        jumps["endpoint at t = 0"] = lambda: endpoint(x, zero, c)
    if (flow_map := readings.flow_map) is not None:
        jumps["flow_map from t = 1/2 to s = 1/2"] = lambda: flow_map(x, half, half, c)
    for name, jump in jumps.items():
        moved = (jump() - x).abs().max()
        require(moved == 0, f"{name} changes x by {moved:.3g}: multiply the mean velocity by t - s (lift(t - s, x))")


# ------------------------------------------------------------------------------------------------ at the exact flow


def gradient_vanishes_at_the_flow(
    objective: ObjectiveSpec, flow: ExactFlow, heads: Mapping[str, Head] | None = None
) -> None:
    """Check that the gradient with respect to every head is zero at the exact flow."""
    grad = gradient(objective, ExactNet(flow, objective.needs, heads), exact_batch(objective, flow))
    worst = grad.abs().amax(1)
    require(
        worst.max() < MAX_EXACT_GRADIENT,
        f"at the exact flow the gradient should be below {MAX_EXACT_GRADIENT:g} for every head, but is "
        + ", ".join(f"{g:.2g} for {name}" for name, g in zip(objective.needs.heads, worst.tolist(), strict=True))
        + ": check the sign of du/dt, factors such as t - r, t and r, the order of the heads, and that du/dt follows "
        "the velocity of the target",
    )


def descent_leads_back_to_the_flow(
    objective: ObjectiveSpec, flow: ExactFlow, heads: Mapping[str, Head] | None = None
) -> None:
    """Check that the gradient near the exact flow, as a linear map of the heads' errors, has positive eigenvalues."""
    pull = stiffness(objective, ExactNet(flow, objective.needs, heads), exact_batch(objective, flow))
    require(pull.isfinite().all(), "the gradient near the exact flow is not finite")
    diagonal = pull.diag().min()
    eigenvalue = torch.linalg.eigvals(pull).real.min()
    require(
        diagonal > MIN_STIFFNESS and eigenvalue > MIN_STIFFNESS,
        f"gradient descent does not return to the exact flow: the smallest diagonal entry is {diagonal:.2g} and the "
        f"smallest eigenvalue {eigenvalue:.2g}, but both should be above {MIN_STIFFNESS}. Check the sign of the loss, "
        "and that targets are detached",
    )


def readings_are_those_of_the_flow(
    objective: ObjectiveSpec, flow: ExactFlow, heads: Mapping[str, Head] | None = None
) -> None:
    """Check velocity, endpoint and flow map against the exact flow, for all jumps that are trained."""
    net = ExactNet(flow, objective.needs, heads)
    b = exact_batch(objective, flow, 64)
    flow = net.flow
    readings = objective.readings(net)
    errors: dict[str, Tensor] = {}
    if readings.velocity:
        errors["velocity"] = readings.velocity(b.x_t, b.t, b.c) - flow.guided(b.x_t, b.c, b.t)
    if readings.endpoint:
        errors["endpoint"] = readings.endpoint(b.x_t, b.t, b.c) - flow.carry(b.x_t, b.c, b.t, 0 * b.t)
    if readings.both:
        velocity, endpoint = readings.both(b.x_t, b.t, b.c)
        errors["both, velocity"] = velocity - flow.guided(b.x_t, b.c, b.t)
        errors["both, endpoint"] = endpoint - flow.carry(b.x_t, b.c, b.t, 0 * b.t)
    if readings.flow_map and not readings.hops:
        s = b.t.flip(0)
        x_s = readings.flow_map(b.x_t, b.t, s, b.c)
        errors["flow_map"] = x_s - flow.carry(b.x_t, b.c, b.t, s)
        errors["flow_map and back"] = 1e-3 * (readings.flow_map(x_s, s, b.t, b.c) - b.x_t)  # amplifies rounding
    if readings.flow_map and readings.hops:
        b = b[[i for i, moves in enumerate((b.r < b.t).tolist()) if moves]]
        for t, r in zip(b.t.tolist(), b.r.tolist(), strict=True):
            require(readings.hops(t, r), f"`hops` rejects the jump from {t:.3g} to {r:.3g}, which is trained")
        errors["flow_map"] = readings.flow_map(b.x_t, b.t, b.r, b.c) - flow.carry(b.x_t, b.c, b.t, b.r)
    for name, error in errors.items():
        require(
            error.abs().max() < MAX_EXACT_GRADIENT,
            f"reading '{name}' differs from the exact flow by {error.abs().max():.3g}: check the head, sign and time "
            "(u at r = t is the velocity, x_s = x_t - (t - s) u)",
        )
