"""Whether a run's du/dt is the derivative on this machine, examined before any training rests on it.

Few-step objectives regress on du/dt. Where that is wrong, training does not crash: the loss falls towards another
target, and the samples are poor for no reason that a log shows. And it is wrong easily. A difference quotient divides
the rounding of two passes by 2 h: under bf16 that is as large as the derivative. On a net that reads 1000 t, as image
models do, h = 0.005 spans more than a turn of the embedding. And a tangent rule or a kernel may be wrong, perhaps on
one device alone.

So the configured slope, in its precision and on its device, is compared with forward-mode differentiation in float64.
A fresh net will not do: its last layers are zero, u = du/dt = 0, and anything passes. The self-test draws every
parameter of a copy of two blocks (`examine`); a second one takes the true weights, at the first checkpoint
(`examine_weights`). Both return an `Examination`, whose `require` raises where the slope is off.

Neither copies the weights of dumo's nets: they share those that they examine, and float64 takes one block at a time
(`copied_bytes` counts it). A user's own net is copied whole, for its passes may write to its weights.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dumo.config.code import has_own_net, has_own_parts
from dumo.config.spec import Run
from dumo.data import Data
from dumo.flow import dropout
from dumo.flow.path import Path
from dumo.flow.precision import using
from dumo.flow.slope import MAX_SLOPE_ERROR, slope_of
from dumo.nets import Net, is_pretrained
from dumo.run.weights import build
from dumo.runtime import dist
from dumo.runtime.random import stream
from dumo.types import Cond, Frozen, Heads, Objective, Sample, Time, UserError

SMALL = 1e-6  # ours: the l2 error allowed where du/dt is zero


@dataclass(frozen=True)
class ExamplePoint:
    """Where a slope is compared: rows that a net takes, and the direction in which they move."""

    x_t: Sample
    direction: Sample  # dx_t/dt
    c: Cond
    inputs: dict[str, Time]  # t, and what else the net takes

    def to(self, device: torch.device) -> "ExamplePoint":
        """A copy on this device."""
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        return ExamplePoint(self.x_t.to(device), self.direction.to(device), self.c.to(device), inputs)


@dataclass(frozen=True)
class Examination:
    """How far a slope is from the derivative: the l2 error of d/dt over its l2 norm, by head."""

    slope: str | None  # None: the objective takes no derivative
    precision: str
    time_scale: float
    weights: str  # whose
    errors: Mapping[str, float]  # of two uses, direction known before the pass or after it, the worse
    limit: float = MAX_SLOPE_ERROR

    @property
    def passed(self) -> bool:
        """Whether every head is within the limit; NaN is not."""
        return all(error <= self.limit for error in self.errors.values())

    def __str__(self) -> str:
        """What was measured, in a line."""
        if self.slope is None:
            return "nothing to examine: this objective takes no derivative"
        head_errors = ", ".join(f"{head} {100 * error:.2g} %" for head, error in self.errors.items())
        return (
            f"slope '{self.slope}' in precision {self.precision} at time_scale {self.time_scale:g}, with "
            f"{self.weights}: d/dt is off float64 by {head_errors} (limit {100 * self.limit:g} %)"
        )

    @property
    def fix(self) -> str:
        """What to try where the examination failed."""
        other_slope = "jvp" if self.slope == "dual" else "dual"
        fixes = [f"objective.slope.kind={other_slope}"]
        if self.precision != "fp32":
            fixes.append("train.precision=fp32")
        if self.slope == "central":
            fixes += ["another objective.slope.h", "a smaller net.time_scale"]
        if not all(math.isfinite(error) for error in self.errors.values()):
            fixes.append("a lower train.optimizer.lr")
        return "train with " + ", or ".join(fixes)

    def require(self) -> None:
        """Raise UserError, with what to try, where the examination failed."""
        if not self.passed:
            raise UserError(f"{self}. Training on that is training on noise: {self.fix}")


def examine(run: Run, device: torch.device) -> Examination:
    """Examine the run's slope on its net, cut to two blocks, every parameter drawn.

    A user's own net or loss is tried first (`dumo.run.contract`). Raises UserError as that and the slope do.
    """
    net = drawn_net(run, device)
    if has_own_parts(run):
        from dumo.run.contract import require_contract

        require_contract(run, net, device)
    point = example_point(run.objective, run.path, run.data, run.train.seed, 4)
    return _compare(net, run, point, device, "drawn weights")


def examine_weights(run: Run, net: nn.Module, device: torch.device) -> Examination:
    """Examine the run's slope on a net in training, in one piece. Raises UserError as the slope does."""
    point = example_point(run.objective, run.path, run.data, run.train.seed, 2)
    return _compare(_copy(net), run, point, device, "the weights in training")


def drawn_net(run: Run, device: torch.device) -> nn.Module:
    """The run's net, cut to two blocks, with every parameter drawn."""
    net = build(run.model_copy(update={"net": short(readable(run.net))}), device)
    with torch.no_grad():
        for name, p in net.named_parameters():
            noise = torch.randn(p.shape, generator=stream(run.train.seed, "doctor", name)).to(p)
            if _is_of_subject(run.net, name):
                noise = 0.1 * noise  # three parts of a layer would add up to more
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(p + 0.1 * noise)  # gains stay near 1
    return net


def _is_of_subject(net: Net, name: str) -> bool:
    """Whether the weight of this name is of a subject's adapters."""
    if not net.lora:
        return False

    from dumo.nets.adapter import SUBJECT

    return f".{SUBJECT}." in name


def readable(net: Net) -> Net:
    """The spec of a net, with random texts if it reads a table that is not there yet."""
    if net.texts is None:
        return net

    from dumo.nets.text import or_drawn

    texts = or_drawn(net.texts)
    if texts is net.texts:
        return net
    return net.model_copy(update={"texts": texts})


def short(net: Net) -> Net:
    """The spec of a net with two blocks of each kind; of a pretrained net none of the weights are read."""
    if is_pretrained(net):
        return net.short(2)
    depth: int | None = getattr(net, "depth", None)
    if depth is None:
        return net
    short_depth = min(2, depth)
    update: dict[str, int | None] = {"depth": short_depth}
    if getattr(net, "route", None):
        update["route"] = None
    late: int | None = getattr(net, "late", None)
    if late is not None:
        update["late"] = min(late, short_depth - 1)
    return net.model_copy(update=update)


def example_point(objective: Objective, path: Path, data: Data, seed: int, rows: int) -> ExamplePoint:
    """Draw the rows on which a slope is examined, by the seed: t from 1 / rows up to 1, other times from t to 0."""
    needs = objective.needs
    generator = stream(seed, "doctor")
    x, z = torch.randn(2, rows, *data.shape, generator=generator).unbind()
    c = torch.randint(data.classes + 1, (rows,), generator=generator)  # the null class, too
    t = torch.linspace(0, 1, rows + 1)[1:]
    inputs: dict[str, Time] = {}
    for name in needs.names:
        inputs[name] = t if name == "t" else t * torch.linspace(1, 0, rows)
    for name, value in needs.knobs.items():
        inputs[name] = torch.full_like(t, value)
    x_t, direction = path.at(x, z, t)
    return ExamplePoint(x_t, direction, c, inputs)


def _compare(net: nn.Module, run: Run, point: ExamplePoint, device: torch.device, weights: str) -> Examination:
    """Compare the slope, used as training uses it, with float64. Ranks take the mean, so that all go on or none.

    dumo's nets are the same function in training but for dropout, so they are compared in evaluation mode. A user's own
    is in training mode, with the masks of a step. The mode of `net` is changed.
    """
    objective = run.objective
    train = run.train
    time_scale = run.net.time_scale
    slope = slope_of(objective)
    if slope is None:
        return Examination(None, train.precision, time_scale, weights, {})
    point = point.to(device)
    keys = None
    net.eval()
    if has_own_net(run) and device.type != "mps":  # whose float64 is another device's, without these keys
        net.train()
        keys = dropout.keys(train.seed, 0, len(point.x_t)).to(device)
    ref = Frozen(net if train.ref == "self" else _copy(net).eval())
    with using(train.precision, device), dropout.using(keys):
        errors = slope_errors(objective, net, ref, point.x_t, point.direction, point.c, **point.inputs)
    mean_errors = dist.mean(torch.stack([*errors.values()]).to(point.x_t))
    error_by_head = dict(zip(errors, mean_errors.tolist(), strict=True))
    return Examination(slope.kind, train.precision, time_scale, weights, error_by_head)


def slope_errors(
    objective: Objective, net: nn.Module, ref: Frozen, x: Sample, w: Sample, c: Cond, /, **inputs: Time
) -> dict[str, Tensor]:
    """The relative l2 error of the objective's slope against d/dt in float64, by head, in the precision around it.

    x (b, *shape) moves along w (b, *shape). A slope has two uses, with w known before the pass or after it: the worse
    error counts.
    """
    slope = slope_of(objective)
    assert slope is not None
    exact = _exact(ref.module, x, w, c, **inputs)
    errors_by_use: list[Tensor] = []
    for toward in (w, None):
        _, along = slope(net, ref, x, c, toward=toward, moving=None, **inputs)
        with torch.no_grad():
            derivatives = along(w)
        errors = [_relative_error(derivative, truth) for derivative, truth in zip(derivatives, exact, strict=True)]
        errors_by_use.append(torch.stack(errors))
    worse = torch.stack(errors_by_use).amax(0)
    return dict(zip(objective.needs.heads, worse, strict=False))  # without gauges


def _copy(net: nn.Module) -> nn.Module:
    """A copy of a net, which shares the parameters of one of dumo's own; a user's may write to them in a pass."""
    if not _is_from_dumo(net):
        return copy.deepcopy(net)
    return copy.deepcopy(net, {id(p): p for p in net.parameters()})


def _is_from_dumo(net: nn.Module) -> bool:
    """Whether a net's class is one of dumo's."""
    return type(net).__module__.partition(".")[0] == "dumo"


def _cast_blocks(net: nn.Module) -> Iterable[nn.Module]:
    """The blocks whose weights are cast to float64 while they run: none of a user's net, which may not call them."""
    return getattr(net, "blocks", ()) if _is_from_dumo(net) else ()


def copied_bytes(net: nn.Module) -> int:
    """The most bytes of weights that an examination of a net holds besides the net: in float64, and of a user's, as is.

    Of dumo's nets that is the largest block and all outside of blocks. `net` may be an outline.
    """
    bytes_of_blocks = [_bytes_in_float64(block) for block in _cast_blocks(net)]
    in_float64 = _bytes_in_float64(net) - sum(bytes_of_blocks) + max(bytes_of_blocks, default=0)
    return in_float64 if _is_from_dumo(net) else in_float64 + sum(p.nbytes for p in net.parameters())


def _bytes_in_float64(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers once floating-point ones are in float64."""
    sizes: list[int] = []
    for x in (*module.parameters(), *module.buffers()):
        itemsize = torch.float64.itemsize if x.is_floating_point() else x.itemsize
        sizes.append(x.numel() * itemsize)
    return sum(sizes)


def _in_float64(net: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a net on a device that computes in float64. It leaves the weights of the net as they are.

    The weights of blocks are cast when the block is called, and freed when it returns.
    """
    exact = _copy(net)
    of_blocks: set[nn.Module] = set()
    for block in _cast_blocks(exact):
        modules = [*block.modules()]
        of_blocks.update(modules)
        casting = _BlockCast(modules, device)
        block.register_forward_pre_hook(casting.cast)
        block.register_forward_hook(casting.restore)
    for module in exact.modules():
        if module not in of_blocks:
            _cast(module, device)
    return exact


class _BlockCast:
    """Casts a block's weights to float64 before it runs, and puts back the others afterwards."""

    def __init__(self, modules: list[nn.Module], device: torch.device) -> None:
        """Take all modules of a block, the block among them."""
        self.modules = modules
        self.device = device
        self.weights = [_own_weights(module) for module in modules]

    def cast(self, *_: object) -> None:
        """Cast the weights; a hook before a pass."""
        for module in self.modules:
            _cast(module, self.device)

    def restore(self, *_: object) -> None:
        """Put back the weights as they were; a hook after a pass."""
        for module, weights in zip(self.modules, self.weights, strict=True):
            for name, x in weights.items():
                setattr(module, name, x)


def _own_weights(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers by name, without those of modules in it."""
    named_parameters = module.named_parameters(recurse=False, remove_duplicate=False)
    named_buffers = module.named_buffers(recurse=False, remove_duplicate=False)
    return {**dict(named_parameters), **dict(named_buffers)}


def _cast(module: nn.Module, device: torch.device) -> None:
    """Replace a module's own parameters and buffers by copies on a device, floating-point ones in float64."""
    for name, x in _own_weights(module).items():
        values = x.detach().to(device, torch.float64 if x.is_floating_point() else x.dtype)
        setattr(module, name, nn.Parameter(values, False) if isinstance(x, nn.Parameter) else values)


def _exact(net: nn.Module, x: Sample, w: Sample, c: Cond, /, **inputs: Time) -> Heads:
    """d/dt of every output in float64, on the CPU where the device has none."""
    device = torch.device("cpu") if x.device.type == "mps" else x.device
    net = _in_float64(net, device)
    x = x.to(device).double()
    w = w.to(x)
    c = c.to(device)
    other_inputs = {name: value.to(device).double() for name, value in inputs.items()}
    t = other_inputs.pop("t")

    def f(x: Sample, t: Time) -> Heads:
        return net(x, c, t=t, **other_inputs)

    # no fused kernel has a forward derivative
    with torch.no_grad(), torch.autocast(device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        derivatives = torch.func.jvp(f, (x, t), (w, torch.ones_like(t)))[1]
    return cast(Heads, derivatives)


def _relative_error(derivative: Tensor, exact: Tensor) -> Tensor:
    """The l2 error over the l2 norm; where that is zero, MAX_SLOPE_ERROR stands for an l2 error of SMALL."""
    norm = exact.norm()
    return (derivative.to(exact) - exact).norm() / norm.where(norm > 0, SMALL / MAX_SLOPE_ERROR)
