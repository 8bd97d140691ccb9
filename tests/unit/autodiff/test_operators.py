"""`dumo.jvp` on PyTorch's own suites of operators and modules, in float64: right or refused, never wrong.

`op_db` has samples of the arguments of every operator of PyTorch, and `module_db` of every module. An operator is
called as a function, as a method, in place, and on views. A derivative is right if it is that of a central difference
or, where that crosses a kink or leaves the domain, that of PyTorch's double backward. To run this file prints the table
of docs/jvp.md, which has `torch.func.jvp`, too.
"""

# ruff: noqa: ANN401, PyTorch's suites are untyped

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

import dumo
from dumo.types import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # of samples: deprecated operators, layouts in beta
D = torch.float64
STEP = 1e-6
MAX_SAMPLES = 4  # of the arguments of an operator
EVERY = 12  # operators, of which `make test` takes one
Function = Callable[..., Any]

# Operators whose result depends on how their operand lies in memory, so that a view is another operand.
OF_LAYOUT = frozenset(("as_strided", "as_strided_copy", "as_strided_scatter", "view", "view_as", "view_copy"))

# Modules and operators that have no derivative here, mostly because PyTorch has none.
REFUSED_MODULES = frozenset(("nn.CTCLoss", "nn.MultiLabelMarginLoss", "nn.MultiMarginLoss"))
REFUSED = frozenset(
    (
        "cdist",
        "sparse.mm.reduce",
        "nn.functional.linear_cross_entropy.chunked_none",
        "native_layer_norm",  # its mean and deviation
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_batch_norm_with_update",
        "nn.functional.multi_margin_loss",
        "nn.functional.multilabel_margin_loss",
        "normal",
        "normal.number_mean",
        "to_sparse",
        "nn.functional.embedding_bag",
        "nn.functional.ctc_loss",
        "nn.functional.pdist",
        "_segment_reduce.lengths",
        "_segment_reduce.offsets",
        "acosh",  # this and the following in place alone
        "asinh",
        "atanh",
        "index_reduce.amax",
        "index_reduce.amin",
        "index_reduce.mean",
        "index_reduce.prod",
        "scatter_reduce.prod",
    )
)


@dataclass(frozen=True)
class Case:
    """A function of the tensors that move, and where these lie."""

    name: str
    fn: Function
    points: tuple[Tensor, ...]


def allow_flags() -> None:
    """Let others set flags such as TF32 again, which the import of PyTorch's suites forbids in the whole process."""
    torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True


@cache
def operators() -> tuple[Any, ...]:
    """The operators that have a derivative in float64, by PyTorch's word."""
    from torch.testing._internal.common_methods_invocations import op_db

    allow_flags()
    return tuple(op for op in op_db if op.supports_autograd and D in op.supported_dtypes("cpu"))


@cache
def modules() -> tuple[Any, ...]:
    from torch.testing._internal.common_modules import module_db

    allow_flags()
    return tuple(module_db)


def full_name(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def cases_of_call(name: str, fn: Function, args: Any, kwargs: Any) -> Iterator[Case]:
    """The case of a call, in which those of its operands move that PyTorch's sample lets move; none if none does."""
    leaves, spec = tree_flatten((args, kwargs))
    places = [i for i, x in enumerate(leaves) if is_moving(x)]

    def call(*moving: Tensor) -> Any:
        arguments = list(leaves)
        for i, x in zip(places, moving, strict=True):
            arguments[i] = x
        moved_args, moved_kwargs = tree_unflatten(arguments, spec)
        return fn(*moved_args, **moved_kwargs)

    if places:
        yield Case(name, call, tuple(leaves[i].detach().clone() for i in places))


def cases_of_operator(op: Any) -> Iterator[Case]:
    """The operator on each sample of its arguments, called as a function, as a method, in place, and on views."""
    for sample in list(op.sample_inputs("cpu", D, requires_grad=True))[:MAX_SAMPLES]:
        variants: dict[str, Function | None] = {"": op.get_op()}
        if isinstance(sample.input, Tensor):
            variants["method"] = method(op.method_variant)
            if not sample.broadcasts_input:
                variants["in place"] = in_place(op.inplace_variant)
        for variant_name, variant in variants.items():
            if variant is None:
                continue
            name = f"{full_name(op)} {variant_name}".strip()
            call = partial(call_of_sample, op, sample, variant)
            for case in cases_of_call(name, call, (sample.input, *sample.args), sample.kwargs):
                yield case
                if not variant_name and op.name not in OF_LAYOUT and any(x.ndim == 2 for x in case.points):
                    points = tuple(x.T.contiguous().T if x.ndim == 2 else x for x in case.points)
                    yield Case(f"{name} of views", case.fn, points)


def call_of_sample(op: Any, sample: Any, variant: Function, *args: Any, **kwargs: Any) -> Any:
    """Call a variant as PyTorch's own tests of gradients do: of a symmetric operand, say, on its symmetric part."""
    return sample.output_process_fn_grad(op.gradcheck_wrapper(variant, *args, **kwargs))


def method(variant: Function | None) -> Function | None:
    """The operator called as a method of its first operand."""
    name = getattr(variant, "__name__", "")
    if not hasattr(Tensor, name):  # some are functions that stand in for a method
        return None
    return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)


def in_place(variant: Function | None) -> Function | None:
    """The method that writes to its first operand, on a copy of it."""
    by_name = method(variant)
    if by_name is None:
        return None
    return lambda x, *args, **kwargs: by_name(x * 1, *args, **kwargs)


def is_moving(x: object) -> bool:
    return isinstance(x, Tensor) and x.requires_grad and x.is_floating_point() and x.layout == torch.strided


def floats(output: object) -> list[Tensor]:
    """The tensors of floats that a function returned, dense."""
    found = [x for x in tree_flatten(output)[0] if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())]
    return [x.detach().to_dense() if x.layout != torch.strided else x for x in found]


def seeded(fn: Function) -> Function:
    def call(*points: Tensor) -> Any:
        torch.manual_seed(7)
        return fn(*points)

    return call


@torch.no_grad()
def central_difference(case: Case, directions: tuple[Tensor, ...]) -> list[Tensor]:
    ends: list[list[Tensor]] = []
    for sign in (1, -1):
        points = [x + sign * STEP * d for x, d in zip(case.points, directions, strict=True)]
        ends.append(floats(seeded(case.fn)(*points)))
    return [(a - b) / (2 * STEP) for a, b in zip(*ends, strict=True)]


def double_backward(case: Case, directions: tuple[Tensor, ...]) -> list[Tensor] | None:
    """The derivative by PyTorch's gradient of its gradient; None where it has none."""
    try:
        points = [x.clone().requires_grad_() for x in case.points]
        found: list[Tensor] = []
        for output in floats(seeded(case.fn)(*[x.view_as(x) for x in points])):
            v = torch.zeros_like(output, requires_grad=True)
            gradients = torch.autograd.grad(output, points, v, create_graph=True, allow_unused=True)
            pairs = [(g, d) for g, d in zip(gradients, directions, strict=True) if g is not None and g.requires_grad]
            found += torch.autograd.grad([g for g, _ in pairs], v, [d for _, d in pairs], retain_graph=True)
    except (RuntimeError, NotImplementedError, ValueError):
        return None
    return found


def agree(found: Tensor, exact: Tensor, tolerance: float) -> bool:
    """Whether two derivatives are equal where the exact one is finite and not at a pole."""
    usable = exact.isfinite() & (exact.abs() < 1e4)
    scale = float(exact[usable].abs().max()) if usable.any() else 1.0
    return bool(((found - exact)[usable].abs() <= tolerance * max(scale, 1e-3)).all())


def directions_of(case: Case) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(x.shape, generator=generator, dtype=D) for x in case.points)


def ours(case: Case, directions: tuple[Tensor, ...]) -> Any:
    return dumo.jvp(seeded(case.fn), tuple(x.clone().requires_grad_() for x in case.points), directions)[1]


def verdict(case: Case, jvp: Function = ours) -> str:
    """`right`, `wrong`, `refused`, or `raised`; `""` where the operator itself fails on these arguments."""
    directions = directions_of(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exact = central_difference(case, directions)
        except (RuntimeError, ValueError):
            return ""
        try:
            found = floats(jvp(case, directions))
        except UserError:
            return "refused"
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
            return "raised"
        other = double_backward(case, directions)
    if [x.shape for x in found] != [x.shape for x in exact]:
        return "wrong"
    for k, derivative in enumerate(found):
        by_backward = other[k] if other is not None and other[k].shape == derivative.shape else None
        if agree(derivative, exact[k], 1e-4):
            continue
        if by_backward is None or not bool(derivative.any()) or not agree(derivative, by_backward, 1e-8):
            return "wrong"
    return "right"


def cases_of_module(info: Any) -> Iterator[Case]:
    """The module on each sample of its arguments, in training and not. What moves are tensors of floats, no weights."""
    for training in (False, True):
        name = f"{info.name} in training" if training else info.name
        samples = info.module_inputs_func(info, device="cpu", dtype=D, requires_grad=True, training=training)
        for sample in samples[:MAX_SAMPLES]:
            torch.manual_seed(1)
            construct, forward = sample.constructor_input, sample.forward_input
            module = info.module_cls(*construct.args, **construct.kwargs).double().train(training)
            yield from cases_of_call(name, module, forward.args, forward.kwargs)


def require_no_wrong(ops: tuple[Any, ...]) -> None:
    wrong: list[str] = []
    refused = set[str]()
    for op in ops:
        verdicts = {case.name: verdict(case) for case in cases_of_operator(op)}
        wrong += [name for name, said in verdicts.items() if said in ("wrong", "raised")]
        if "refused" in verdicts.values():
            refused.add(full_name(op))
    assert wrong == []
    assert refused <= REFUSED


@pytest.mark.slow
def test_one_operator_in_twelve_is_right_or_refused() -> None:
    require_no_wrong(operators()[::EVERY])


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(EVERY))
def test_operators_are_right_or_refused(part: int) -> None:
    require_no_wrong(operators()[part::EVERY])


@pytest.mark.nightly
def test_modules_are_right_or_refused() -> None:
    for info in modules():
        verdicts = {case.name: verdict(case) for case in cases_of_module(info)}
        assert set(verdicts.values()) <= ({"right", "refused"} if info.name in REFUSED_MODULES else {"right"}), verdicts


@pytest.mark.parametrize("planted", ["zero", "twice", "of another direction"])
def test_a_wrong_derivative_is_seen(planted: str) -> None:
    """What judges the operators is judged by three planted errors."""

    def wrong(case: Case, directions: tuple[Tensor, ...]) -> Any:
        if planted == "of another direction":
            directions = tuple(d.flip(0) for d in directions)
        derivative = ours(case, directions)
        return {"zero": 0 * derivative, "twice": 2 * derivative}.get(planted, derivative)

    case = Case("sin", torch.sin, (torch.linspace(-1, 1, 5, dtype=D),))
    assert verdict(case) == "right"
    assert verdict(case, wrong) == "wrong"


def print_table() -> None:
    """Count verdicts by variant: for `dumo.jvp` in one pass and in two, and for `torch.func.jvp`."""
    import dumo.autodiff.jvp as two_pass_file

    made_two: list[str] = []
    two_passes = two_pass_file._two_passes

    def noted(*args: Any) -> Any:
        made_two.append("")
        return two_passes(*args)

    def torch_func(case: Case, directions: tuple[Tensor, ...]) -> Any:
        return torch.func.jvp(seeded(case.fn), tuple(x.clone() for x in case.points), directions)[1]

    two_pass_file._two_passes = noted  # pyright: ignore[reportPrivateUsage]
    logging.getLogger("dumo").setLevel(logging.ERROR)
    counts: dict[str, Counter[str]] = {"dumo.jvp": Counter(), "torch.func.jvp": Counter()}
    worst_first = ("wrong", "raised", "refused", "right in two passes", "right")
    for of in (*operators(), *modules()):
        found: dict[str, dict[str, list[str]]] = {}
        for case in cases_of_module(of) if of in modules() else cases_of_operator(of):
            made_two.clear()
            said = verdict(case)
            if said:
                said = "right in two passes" if said == "right" and made_two else said
                by_way = found.setdefault(case.name, {"dumo.jvp": [], "torch.func.jvp": []})
                by_way["dumo.jvp"].append(said)
                by_way["torch.func.jvp"].append(verdict(case, torch_func))
        for by_way in found.values():
            for way, verdicts in by_way.items():
                counts[way][min(verdicts, key=worst_first.index)] += 1
    print(f"torch {torch.__version__}")
    print("| |", " | ".join(worst_first), "|")
    for way, count in counts.items():
        print(f"| `{way}` |", " | ".join(str(count[said]) for said in worst_first), "|")


if __name__ == "__main__":
    print_table()
