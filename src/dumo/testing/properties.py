"""The properties of an objective, a function for each. It raises `PropertyError`, with the numbers and the usual cause.

`dumo.testing.check_objective` calls all of them, and dumo's own tests call each on every objective, slope and network.
Batches and networks are in float64, where rounding hides nothing.
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
MAX_EXACT_GRADIENT = 1e-12  # at the exact flow: measured at most 1e-14
MIN_STIFFNESS = 1e-3  # of a head of weight 1 it is about 1
MAX_BF16_ERROR = 0.01  # of the loss of a batch; measured at most 0.002, and 0.04 for a central difference


class PropertyError(AssertionError):
    """An objective lacks a property."""


def require(holds: object, message: str) -> None:
    """Raise PropertyError with the message unless it holds."""
    if not holds:
        raise PropertyError(message)


# ------------------------------------------------------------------------------------------------------------- batches


def random_batch(
    objective: ObjectiveSpec, n: int = 16, shape: tuple[int, ...] = SHAPE, rows: slice = slice(None)
) -> NoisyBatch:
    """Some rows of a batch of n: the data is noise in float64, and the classes take turns."""
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
    """The same rows with other values: without conditions, and at the ends of time. Any row may move."""
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
    """The tensors of a batch by name, those of `drawn` included."""
    named = {field.name: getattr(b, field.name) for field in fields(b)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)} | dict(b.drawn)


def cast_batch(b: NoisyBatch, dtype: torch.dtype, times: torch.dtype = torch.float32) -> NoisyBatch:
    """The batch with its data in one precision, and its times and further draws in another."""
    data: dict[str, Any] = {name: getattr(b, name).to(dtype) for name in ("x", "z", "x_t", "v_t")}
    drawn = {name: value.to(times) for name, value in b.drawn.items()}
    return replace(b, **data, t=b.t.to(times), r=b.r.to(times), drawn=drawn)


def loss_of(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> Terms:
    """The loss of a batch, where theta^- is the network itself."""
    return objective.loss(net, Frozen(net), b)


# ------------------------------------------------------------------------------------------- the objective as a value


def spec_is_a_value(objective: ObjectiveSpec) -> None:
    """It is frozen, can be hashed, and comes back from JSON equal."""
    again = type(objective).model_validate_json(objective.model_dump_json())
    require(
        again == objective,
        f"from JSON it comes back as {again!r}, not {objective!r}: make each field a number, a string or a Spec",
    )
    require(type(objective).model_config.get("frozen"), "its fields can be changed: keep frozen=True of Spec")
    try:
        hash(objective)
    except TypeError as error:
        raise PropertyError(f"it has no hash ({error}): make a field that is a list or dict a tuple") from error


def draws_are_keyed_by_row(objective: ObjectiveSpec, shape: tuple[int, ...] = SHAPE) -> None:
    """A row is drawn alike with and without the others, as each of several ranks draws its own."""
    n = 2 * group_rows(objective)
    whole = tensors_of(random_batch(objective, n, shape))
    for rows in (slice(0, 1), slice(1, n // 2), slice(n // 2, n)):
        for name, value in tensors_of(random_batch(objective, n, shape, rows)).items():
            require(
                torch.equal(value, whole[name][rows]),
                f"{name} of rows {rows.start} to {rows.stop - 1} differs when they are drawn alone: draw each row by "
                "its number (a Law by the numbers in `rows`, a TimeLaw all n rows by its generator)",
            )


def group_rows(objective: ObjectiveSpec) -> int:
    """At least 8 rows, in whole groups of those that belong together."""
    group = group_size(objective)
    return ceil(8 / group) * group


# ------------------------------------------------------------------------------------------------------------ the loss


def loss_is_one_number_per_row(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> None:
    """The loss, its parts and notes are finite and of shape (rows,). Notes have no gradient."""
    terms = loss_of(objective, net, b)
    rows = (len(b.t),)
    named = {"loss": terms.loss, **terms.parts, **terms.notes}
    require(terms.parts, "Terms has no parts, so nothing but the loss is logged: return Terms(loss, {'u': loss})")
    require(
        len(named) == 1 + len(terms.parts) + len(terms.notes),
        f"the names {[*terms.parts]} and {[*terms.notes]} repeat or are 'loss': they share a log",
    )
    for name, value in named.items():
        require(
            value.shape == rows,
            f"'{name}' has shape {tuple(value.shape)}, not {rows}: take means of each row only (mean_square), because "
            "the trainer takes the mean over rows",
        )
        require(value.isfinite().all(), f"'{name}' is not finite on {int((~value.isfinite()).sum())} of {rows[0]} rows")
    if not objective.needs.gauges:  # a gauge's logarithm is added
        for name, value in {"loss": terms.loss, **terms.parts}.items():
            require((value > 0).all(), f"'{name}' is {value.min():.3g} on a row: a squared error is above 0")
    require(terms.loss.requires_grad, "the loss has no gradient: make the trained pass by `net`, not by `ref`")
    for name, value in terms.notes.items():
        require(not value.requires_grad, f"note '{name}' has a gradient: detach it")


def loss_changes_nothing(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> None:
    """The batch and the weights are the same bits after a loss."""
    batch = deepcopy(tensors_of(b))
    weights = deepcopy(net.state_dict())
    loss_of(objective, net, b)
    for name, value in tensors_of(b).items():
        require(torch.equal(value, batch[name]), f"the loss changed b.{name}: write y = y + ..., not y += ...")
    for name, value in net.state_dict().items():
        require(torch.equal(value, weights[name]), f"the loss changed the weights '{name}' of the network")


def loss_draws_nothing(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> None:
    """torch's generator is in the same state after a loss."""
    state = torch.get_rng_state()
    loss_of(objective, net, b)
    drew = not torch.equal(state, torch.get_rng_state())
    torch.set_rng_state(state)
    require(
        not drew,
        "the loss draws by torch's generator, so a resumed run would differ: name the draw in Needs.laws, and read "
        "b.drawn[name]",
    )


def loss_is_the_same_twice(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> None:
    """The same batch gives the same bits, with torch's generator in the same state."""
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
        "for what changes with the training",
    )


def rows_are_independent(objective: ObjectiveSpec, net: nn.Module, shape: tuple[int, ...] = SHAPE) -> None:
    """A row has the same loss whatever other groups of rows are in its batch."""
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
                f"the loss of rows {first} to {first + half - 1} differs by {difference:.2g} of itself without the "
                "other rows, so a micro-batch would train differently: take no statistic over the batch, or set "
                "Needs.group to the number of rows that meet",
            )


def passes_do_not_depend_on_the_batch(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> None:
    """Equally many passes for any values, all finite: under sharding, a rank that skips a pass stops all others."""
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
        f"passes with and without gradients depend on the values of the batch: {counts}. Make every pass on all rows, "
        "and choose by torch.where",
    )


def every_parameter_learns(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> None:
    """Every parameter gets a finite gradient that is not 0, in one of the steps of a cycle."""
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
    """Passes without gradients are of theta^-, which gets no gradient, and a copy of the weights serves as theta^-.

    still_passes: passes without gradients of the network in training that the objective's source makes.
    """
    b = replace(b, moving=None)  # a derivative may take two passes where only some rows move
    ref = deepcopy(net)
    parameters = [*net.parameters()]

    # Who makes the passes.
    counted, counted_ref = CountedNet(net), CountedNet(ref)
    terms = objective.loss(counted, Frozen(counted_ref), b)
    require(
        counted.still == still_passes,
        f"{counted.still} passes without gradients are made by `net`: call `ref` for targets, since theta^- may be a "
        "moving average",
    )
    require(counted_ref.graded == 0, "theta^- makes a pass with gradients: call `ref`, not `ref.module`")

    # Where the gradients go.
    gradients = torch.autograd.grad(terms.loss.mean(), parameters, materialize_grads=True)
    same = loss_of(objective, net, b).loss
    same_gradients = torch.autograd.grad(same.mean(), parameters, materialize_grads=True)
    require(
        torch.equal(terms.loss, same) and all(map(torch.equal, gradients, same_gradients)),
        "loss or gradients differ when theta^- is a copy of the weights: a target carries a gradient",
    )
    objective.loss(net, Frozen(ref), b).loss.mean().backward()
    require(all(p.grad is None for p in ref.parameters()), "theta^- gets a gradient: call `ref`, not `ref.module`")
    net.zero_grad()


def graded_outputs(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> tuple[Terms, list[Heads]]:
    """The loss where any row may move, and what the passes with gradients returned."""
    outputs: list[Heads] = []

    def recording_net(x: Tensor, c: Tensor, /, **inputs: Tensor) -> Heads:
        heads = net(x, c, **inputs)
        if torch.is_grad_enabled():
            outputs.append(heads)
        return heads

    return objective.loss(recording_net, Frozen(net), replace(b, moving=None)), outputs


def one_pass_has_gradients(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> None:
    """Of the network's passes one is trained, and no other keeps activations."""
    _, outputs = graded_outputs(objective, net, b)
    require(
        len(outputs) == 1,
        f"{len(outputs)} passes of `net` have gradients: compute targets by `ref`, under torch.no_grad(). If more than "
        "one pass is trained, skip this check",
    )


def targets_have_no_gradient(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> None:
    """A part of the loss that has the name of a head has gradients of that head alone."""
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
                    f"part '{name}' of the loss has a gradient of head '{head}' as well: its target was not held "
                    "still, so compute it under torch.no_grad() or .detach() it",
                )


def guided_target_has_no_gradient(objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch) -> None:
    """What a `Guide` returns carries no gradient."""
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
    """Where there is only the null condition, 0, the loss is finite and every parameter learns."""
    only_null = torch.zeros(len(b.t), dtype=torch.long)
    b = replace(b, c=only_null, null=only_null)
    require(loss_of(objective, net, b).loss.isfinite().all(), "without classes the loss is not finite")
    every_parameter_learns(objective, net, b)


def points_are_served(objective: ObjectiveSpec, net: nn.Module) -> None:
    """The loss of points (b, 2) is finite."""
    b = random_batch(objective, 2 * group_rows(objective), (2,))
    require(
        loss_of(objective, net, b).loss.isfinite().all(),
        "the loss of points (b, 2) is not finite: shape numbers per row by lift, not by [:, None, None, None]",
    )


def bf16_is_served_or_refused(
    objective: ObjectiveSpec, net: nn.Module, b: NoisyBatch, dtype: torch.dtype = torch.float32
) -> None:
    """Under autocast the loss is that of float32 within 1 %, or UserError says that it needs fp32."""
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
        f"the loss under bf16 differs from that in float32 by {error:.2g} of it: a difference of two passes multiplies "
        "rounding, so call require_precise_passes, or take the slope 'dual'",
    )


# -------------------------------------------------------------------------------------------------------- the readings


def readings_of(objective: ObjectiveSpec, net: nn.Module) -> Readings:
    """The readings of a network at the defaults of its knobs."""
    return objective.readings(bind_knobs(net, **objective.needs.knobs))


def readings_make_one_pass_each(objective: ObjectiveSpec, net: nn.Module) -> None:
    """Readings are made without a pass, and each makes one, whose result is a sample."""
    counted = CountedNet(net)
    readings = readings_of(objective, counted)
    require(counted.graded + counted.still == 0, "`readings` calls the network: return functions that do")

    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, *SHAPE, generator=g, dtype=torch.float64)
    t = torch.rand(5, generator=g, dtype=torch.float64)
    c = torch.arange(5) % (CLASSES + 1)
    arguments = {"velocity": (x, t, c), "endpoint": (x, t, c), "flow_map": (x, t, t / 2, c), "both": (x, t, c)}
    taught = [name for name in arguments if getattr(readings, name) is not None]
    require(taught, "no reading is taught, so nothing can be sampled: return Readings(velocity=...)")
    for count, name in enumerate(taught, start=1):
        answer = getattr(readings, name)(*arguments[name])
        passes = counted.graded + counted.still - count + 1
        require(passes == 1, f"reading '{name}' makes {passes} passes, and solvers count on one")
        for sample in answer if name == "both" else (answer,):
            require(
                sample.shape == x.shape and sample.isfinite().all(),
                f"reading '{name}' gives shape {tuple(sample.shape)} for samples of {tuple(x.shape)}, or a number that "
                "is not finite",
            )
            require(sample.requires_grad, f"reading '{name}' loses gradients: leave torch.no_grad() to the solver")


def a_jump_of_no_time_stays(objective: ObjectiveSpec, net: nn.Module) -> None:
    """The endpoint at t = 0 and a flow map from t to t return x itself."""
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
        require(moved == 0, f"{name} moves x by {moved:.3g}: multiply the mean velocity by t - s (lift(t - s, x))")


# ------------------------------------------------------------------------------------------------ at the exact flow


def gradient_vanishes_at_the_flow(
    objective: ObjectiveSpec, flow: ExactFlow, heads: Mapping[str, Head] | None = None
) -> None:
    """At the exact flow no head is pulled anywhere."""
    grad = gradient(objective, ExactNet(flow, objective.needs, heads), exact_batch(objective, flow))
    worst = grad.abs().amax(1)
    require(
        worst.max() < MAX_EXACT_GRADIENT,
        "at the exact flow the gradient by a displacement of each head is "
        + ", ".join(f"{name}: {g:.2g}" for name, g in zip(objective.needs.heads, worst.tolist(), strict=True))
        + f", and should be below {MAX_EXACT_GRADIENT:g}: look for the sign of du/dt, a factor such as t - r, t in "
        "place of r, two heads exchanged, or du/dt along another velocity than the target's",
    )


def descent_leads_back_to_the_flow(
    objective: ObjectiveSpec, flow: ExactFlow, heads: Mapping[str, Head] | None = None
) -> None:
    """Near the flow the gradient is linear in the displacement of the heads, and all its eigenvalues are positive."""
    pull = stiffness(objective, ExactNet(flow, objective.needs, heads), exact_batch(objective, flow))
    require(pull.isfinite().all(), "near the exact flow the gradient is not finite")
    diagonal = pull.diag().min()
    eigenvalue = torch.linalg.eigvals(pull).real.min()
    require(
        diagonal > MIN_STIFFNESS and eigenvalue > MIN_STIFFNESS,
        f"a head that is displaced from the exact flow is not pulled back: the least pull is {diagonal:.2g}, the least "
        f"eigenvalue {eigenvalue:.2g}, and both should be above {MIN_STIFFNESS}. A loss of the wrong sign, or a target "
        "that moves with its head, does this",
    )


def readings_are_those_of_the_flow(
    objective: ObjectiveSpec, flow: ExactFlow, heads: Mapping[str, Head] | None = None
) -> None:
    """The velocity, the endpoint, and jumps to any time and back; of a flow map of some jumps, those."""
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
        errors["flow_map and back"] = 1e-3 * (readings.flow_map(x_s, s, b.t, b.c) - b.x_t)  # which multiplies rounding
    if readings.flow_map and readings.hops:
        b = b[[i for i, moves in enumerate((b.r < b.t).tolist()) if moves]]
        for t, r in zip(b.t.tolist(), b.r.tolist(), strict=True):
            require(readings.hops(t, r), f"hops says that the jump from {t:.3g} to {r:.3g} was not taught, but it was")
        errors["flow_map"] = readings.flow_map(b.x_t, b.t, b.r, b.c) - flow.carry(b.x_t, b.c, b.t, b.r)
    for name, error in errors.items():
        require(
            error.abs().max() < MAX_EXACT_GRADIENT,
            f"of the exact flow, reading '{name}' is off by {error.abs().max():.3g}: look for the wrong head, sign or "
            "time (u at r = t is the velocity, x_s = x_t - (t - s) u)",
        )
