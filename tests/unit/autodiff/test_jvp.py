"""dumo.jvp in the settings that people train in: exact, the value and its gradients those of the plain pass."""

import copy
import logging
import runpy
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import einops
import pytest
import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.nn import functional as F

import dumo
from dumo.autodiff import jvp
from dumo.autodiff.dual import pair
from dumo.autodiff.tape import DeferredTangent
from dumo.types import UserError

PAGE = runpy.run_path(str(Path(__file__).parents[3] / "docs/jvp.py"))  # whose nets are those of its table
Net: type[nn.Module] = PAGE["Net"]


def point() -> tuple[Tensor, Tensor, Tensor]:
    """x, t and the velocity."""
    g = torch.Generator().manual_seed(1)
    shape = (4, 8, 4)
    return torch.randn(shape, generator=g), torch.rand(4, generator=g), torch.randn(shape, generator=g)


def net_of(kind: str, *, lean: bool = False) -> nn.Module:
    """A net of such blocks, checkpointed where `lean`."""
    torch.manual_seed(0)
    return Net(kind, lean=lean)


def difference(net: nn.Module) -> Tensor:
    """du/dt in float64."""
    return PAGE["difference"](net, *point())


def gradients(net: nn.Module, u: Tensor, target: Tensor) -> list[Tensor]:
    """Of a MeanFlow loss."""
    net.zero_grad()
    (u - target).square().mean().backward()
    grads = [p.grad for p in net.parameters()]
    assert all(grad is not None for grad in grads)
    return [grad.clone() for grad in grads if grad is not None]


SETTINGS = [  # blocks, and whether they are checkpointed
    ("perceptron", False),
    ("attention", False),
    ("causal", False),
    ("multihead", False),
    ("perceptron", True),
    ("attention", True),
]


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "lean"), SETTINGS)
def test_the_derivative_is_exact_and_the_value_and_its_gradients_are_those_of_the_plain_pass(
    kind: str, lean: bool, half: bool, caplog: pytest.LogCaptureFixture
) -> None:
    net = net_of(kind, lean=lean)
    x, t, v = point()
    true = difference(net)
    with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
        plain = net(x, t)
        before = gradients(net, plain, torch.zeros_like(plain))
        u, du_dt = dumo.jvp(net, (x, t), (v, torch.ones_like(t)))
        assert torch.equal(u, plain)
        assert not du_dt.requires_grad
        for mine, theirs in zip(gradients(net, u, torch.zeros_like(u)), before, strict=True):
            assert torch.equal(mine, theirs)
    assert (du_dt.double() - true).norm() <= (2e-2 if half else 2e-6) * true.norm()
    assert caplog.text == ""  # in one pass


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("kind", ["attention", "perceptron"])
def test_beside_a_compiler(kind: str) -> None:
    net, (x, t, v) = net_of(kind), point()
    compiled = torch.compile(net, backend="aot_eager")
    u, du_dt = dumo.jvp(compiled, (x, t), (v, torch.ones_like(t)))
    assert (du_dt.double() - difference(net)).norm() <= 2e-6 * difference(net).norm()
    gradients(net, u, torch.zeros_like(u))


def test_what_rests_does_not_move() -> None:
    net, (x, t, v) = net_of("perceptron"), point()
    whole = dumo.jvp(net, (x, t), (v, torch.ones_like(t)))[1]
    along_x = dumo.jvp(net, (x, t), (v, None))[1]
    along_t = dumo.jvp(net, (x, t), (None, torch.ones_like(t)))[1]
    torch.testing.assert_close(along_x + along_t, whole)
    value, nothing = dumo.jvp(lambda x: {"a": x, "b": (torch.ones(2), 3)}, (x,), (v,))
    assert torch.equal(nothing["a"], v)
    assert torch.equal(nothing["b"][0], torch.zeros(2))
    assert value["b"][1] == 3


def test_einops_takes_what_moves() -> None:
    x, _, v = point()
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda x: einops.rearrange(x, "b (h w) c -> b c h w", h=2).sin(),
        lambda x: einops.reduce(x, "b t c -> b c", "mean"),
        lambda x: einops.repeat(x, "b t c -> b (r t) c", r=2),
        lambda x: einops.einsum(x, x, "b t c, b s c -> b t s"),
        Rearrange("b t c -> b (t c)"),
    ]
    for call in calls:
        assert torch.equal(dumo.jvp(call, (x,), (v,))[1], torch.func.jvp(call, (x,), (v,))[1])


@pytest.mark.slow
def test_a_unet_of_diffusers_which_asks_whether_its_time_is_a_tensor() -> None:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64)}
    net = UNet2DModel(**sizes, **blocks, layers_per_block=1, norm_num_groups=8).double()
    x, v = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    t = torch.tensor([0.25, 0.75], dtype=torch.float64)

    def u(x: Tensor, t: Tensor) -> Tensor:
        return net(x, t).sample

    h = 1e-4
    with torch.no_grad():
        true = (u(x + h * v, t + h) - u(x - h * v, t - h)) / (2 * h)
    du_dt = dumo.jvp(u, (x, t), (v, torch.ones_like(t)))[1]
    assert (du_dt - true).norm() <= 1e-4 * true.norm()  # it embeds times in float32, which the difference divides by h


def in_place(x: Tensor) -> Tensor:
    h = x * 2
    h += x.sin()
    return h


def asks_for_a_tensor(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(type(x))
    return x.sin()


def asserts_a_tensor(x: Tensor) -> Tensor:
    assert isinstance(x, Tensor)
    return x.sin()


def wants_the_value_of_a_tensor(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise ValueError(x)
    return x.sin()


@pytest.mark.parametrize("fn", [in_place, asks_for_a_tensor, asserts_a_tensor, wants_the_value_of_a_tensor])
def test_where_one_pass_does_not_do_two_are_made_and_said(
    fn: Callable[[Tensor], Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    x, _, v = point()
    x.requires_grad_()
    with caplog.at_level(logging.WARNING, "dumo"):
        y, dy = dumo.jvp(fn, (x,), (v,))
    assert f"two passes of {fn.__name__}" in caplog.text
    torch.testing.assert_close(dy, v * (2 * (fn is in_place) + x.detach().cos()))
    assert y.requires_grad
    assert not dy.requires_grad


class Kept:
    """A container that nobody knows."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Shifting(nn.Module):
    """Draws, counts its calls in a buffer, and writes in place."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        h = F.dropout(self.module(x), 0.5)
        h += 3 * x
        return h * self.calls


def test_two_passes_are_of_one_draw_and_change_buffers_once() -> None:
    """And are of the module itself, also where it has a part that is called as a wrapper's."""
    net, (x, _, v) = Shifting(), point()
    torch.manual_seed(3)
    plain = net(x)
    after = torch.get_rng_state()
    net.calls.zero_()
    torch.manual_seed(3)
    u, du = dumo.jvp(net, (x,), (v,))
    assert torch.equal(u, plain)
    assert torch.equal(torch.get_rng_state(), after)
    assert net.calls == 1
    net.calls.zero_()
    torch.manual_seed(3)
    torch.testing.assert_close(net(x + v), u + du, rtol=1e-4, atol=1e-5)  # linear but for its mask


def test_two_passes_are_of_one_draw_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here its generator is a number, which a draw moves on."""
    states = {torch.device("cuda:1"): 5}
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, gpu: states.update({gpu: state}))
    x = Mock(spec=Tensor, is_cuda=True, device=torch.device("cuda:1"))
    before = jvp._CallState.of(torch.sin, (x, torch.zeros(1)))
    states[x.device] += 1
    before.restore()
    assert states == {x.device: 5}


def writes_to_its_input(x: Tensor) -> Tensor:
    x += 1
    return x * x


def writes_inside_a_layer(x: Tensor) -> Tensor:
    return F.hardswish(x, inplace=True)


@pytest.mark.parametrize("fn", [writes_to_its_input, writes_inside_a_layer])
def test_what_is_written_to_is_written_to_once(fn: Callable[[Tensor], Tensor]) -> None:
    x, _, v = point()
    once = x.clone()
    plain = fn(once)
    truth = torch.func.jvp(lambda a: fn(a.clone()), (x.clone(),), (v,))[1]
    given = x.clone()
    u, du = dumo.jvp(fn, (given,), (v,))
    assert torch.equal(u, plain)
    assert torch.equal(given, once)
    torch.testing.assert_close(du, truth)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_layer_that_draws_by_itself_has_one_mask(kind: type[nn.LSTM]) -> None:
    torch.manual_seed(0)
    layer, (x, _, v) = kind(4, 3, num_layers=2, dropout=0.5, batch_first=True).double(), point()
    x, v = x.double(), v.double()

    def ends(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return layer(x)[0]

    du = dumo.jvp(ends, (x,), (v,))[1]
    with torch.no_grad():
        true = (ends(x + 1e-6 * v) - ends(x - 1e-6 * v)) / 2e-6
    assert (du - true).norm() <= 1e-6 * true.norm()


class Summed(nn.Module):
    """Attention with dropout, of a causal mask or none."""

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, 2 * x, dropout_p=0.3, is_causal=self.causal)


ATTENTION = {
    "an encoder's layer": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True),
    "weights": lambda: nn.TransformerDecoderLayer(4, 2, 8, dropout=0.3, batch_first=True),
    "causal": lambda: Summed(causal=True),
    "plain": lambda: Summed(causal=False),
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_with_dropout_keeps_its_value_and_its_draw(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """torch.func.jvp lays its tensors out otherwise, and so drops others."""
    torch.manual_seed(0)
    layer, (x, _, v) = ATTENTION[kind]().double(), point()
    x, v = x.double(), v.double()

    def ends(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return layer(x, 2 * x) if isinstance(layer, nn.TransformerDecoderLayer) else layer(x)

    u, du = dumo.jvp(ends, (x,), (v,))
    with torch.no_grad():
        true = (ends(x + 1e-6 * v) - ends(x - 1e-6 * v)) / 2e-6
    assert torch.equal(u, ends(x))
    assert (du - true).norm() <= 1e-7 * true.norm()
    assert caplog.text == ""


def test_two_passes_of_two_draws_are_refused() -> None:
    g = torch.Generator().manual_seed(0)

    def ends(x: Tensor) -> Tensor:
        h = x.clone().add_(1.0)  # which has no rule
        return h * torch.rand(4, generator=g)

    x, _, v = point()
    with pytest.raises(UserError, match="draws other random numbers"):
        dumo.jvp(ends, (x,), (v,))


def test_one_tensor_under_two_names_is_written_to_under_both() -> None:
    def write(x: Tensor) -> Tensor:
        h = x * 1
        same = h.cpu()
        same[0] = 5.0
        return h * 2

    x, _, v = point()
    u, du = dumo.jvp(write, (x,), (v,))
    assert torch.equal(u, write(x))
    assert not du[0].any()
    assert torch.equal(du[1:], 2 * v[1:])


def test_a_hook_of_what_moves_gets_the_gradient_of_its_value() -> None:
    """Sharded modules of torch put one on their outputs, if these are tensors."""
    gradients: list[Tensor] = []

    def hooked(x: Tensor) -> Tensor:
        assert torch.is_tensor(x)
        h = x.sin()
        h.register_hook(gradients.append)
        return h * 3

    x, _, v = point()
    dumo.jvp(hooked, (x.requires_grad_(),), (v,))[0].sum().backward()
    assert torch.equal(gradients[0], torch.full_like(x, 3.0))
    assert not torch.is_tensor(3)


def test_a_derivative_is_a_tensor_of_its_own() -> None:
    x, _, v = point()
    before = v.clone()
    dumo.jvp(lambda x: x, (x,), (v,))[1].mul_(0)
    assert torch.equal(v, before)


def test_mistakes_have_a_line() -> None:
    x, t, v = point()
    with pytest.raises(UserError, match="2 primals and 1 tangents"):
        dumo.jvp(torch.add, (x, x), (v,))
    with pytest.raises(UserError, match=r"primal 0 has shape \(4, 8, 4\), its tangent \(4,\)"):
        dumo.jvp(torch.sin, (x,), (t,))
    with pytest.raises(UserError, match=r"has no derivative.*cdist.*forward mode"):
        dumo.jvp(partial(torch.cdist, x), (x,), (v,))
    odd: list[tuple[Callable[..., object], object, object, str]] = [
        (torch.sin, x, v, "as tuples"),
        (torch.sin, (torch.arange(3),), (torch.arange(3),), "not a floating-point tensor"),
        (torch.sin, (2.0,), (1.0,), "not a floating-point tensor"),
        (Kept, (x,), (v,), "returned a Kept"),
        (lambda x: dumo.jvp(torch.sin, (x,), (v,))[1], (x,), (v,), "does not nest"),
    ]
    for fn, primals, tangents, line in odd:
        with pytest.raises(UserError, match=line):
            dumo.jvp(fn, primals, tangents)  # pyright: ignore[reportArgumentType]
    with pytest.raises(RuntimeError, match="size"):  # what is wrong without tangents, too, stays as it is
        dumo.jvp(lambda x: x + torch.ones(3), (x,), (v,))


MOVED_INTO_WHAT_RESTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # methods of a tensor of zeros, which rests
    "index_add_": lambda o, x: o.index_add_(0, torch.arange(4), x),
    "index_add": lambda o, x: o.index_add(0, torch.arange(4), x),
    "scatter_add": lambda o, x: o.scatter_add(1, torch.zeros(4, 8, 4, dtype=torch.long), x),
    "scatter_": lambda o, x: o.scatter_(1, torch.zeros(4, 1, 4, dtype=torch.long), x),
    "index_put": lambda o, x: o.index_put((torch.arange(4),), x),
    "copy_": lambda o, x: o.copy_(x),
    "add_": lambda o, x: o.add_(x),
    "masked_scatter": lambda o, x: o.masked_scatter(torch.ones_like(x) > 0, x),
    "maximum": lambda o, x: o.maximum(x),
    "addcdiv": lambda o, x: o.addcdiv(x, 1 + x * x),
    "atan2": lambda o, x: (o + 1).atan2(x),
}


@pytest.mark.parametrize("name", MOVED_INTO_WHAT_RESTS)
def test_what_moves_into_a_tensor_that_rests_is_seen(name: str) -> None:
    """A mixture of experts adds rows to zeros."""
    x, _, v = (y.double() for y in point())

    def net(x: Tensor) -> Tensor:
        return MOVED_INTO_WHAT_RESTS[name](torch.zeros_like(x), x.sin()).square()

    value, exact = torch.func.jvp(net, (x,), (v,))
    u, du = dumo.jvp(net, (x,), (v,))
    assert torch.equal(u, value)
    assert exact.any()
    assert torch.allclose(du, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "net",
    [
        lambda x: x.masked_fill(x > 1, x.mean()),
        lambda x: x.new_full((2,), x.mean()),
        lambda x: x.masked_fill(mask=x > 1, value=x.mean()),
    ],
)
def test_a_method_takes_other_operands_that_move(net: Callable[[Tensor], Tensor]) -> None:
    x, _, v = (y.double() for y in point())
    value, exact = torch.func.jvp(lambda x: net(x).square(), (x,), (v,))
    u, du = dumo.jvp(lambda x: net(x).square(), (x,), (v,))
    assert (type(u), type(du)) == (Tensor, Tensor)
    assert torch.equal(u, value)
    assert torch.allclose(du, exact, rtol=0, atol=1e-12)


class Product(torch.autograd.Function):
    """A product as a user's own function, which saves what it needs otherwise."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x * 2 * w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ANN401, torch's
        ctx.slope = 3 * torch.ones(3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # noqa: ANN401, torch's
        return None, grad * ctx.slope

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dw: Tensor | None) -> Tensor:  # noqa: ANN401, torch's
        return dx * 2


def test_weights_of_a_function_in_the_first_layer_keep_their_gradients() -> None:
    """Its first operand needs no gradient, and its weights do."""
    w = torch.ones(3, requires_grad=True)
    u, _ = dumo.jvp(lambda x: Product.apply(x, w), (torch.ones(3),), (torch.ones(3),))
    u.sum().backward()
    assert w.grad is not None
    assert w.grad.tolist() == [3, 3, 3]


class Growing(torch.autograd.Function):
    """A product with weights that it first makes others of."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x * w.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ANN401, torch's
        ctx.factor = inputs[1].exp()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # noqa: ANN401, torch's
        return None, grad * ctx.factor

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dw: Tensor | None) -> Tensor:  # noqa: ANN401, torch's
        return dx * ctx.factor


def test_weights_that_a_function_makes_others_of_keep_their_gradients() -> None:
    w = torch.ones(3, requires_grad=True)
    u, du = dumo.jvp(lambda x: Growing.apply(x, w), (torch.ones(3),), (torch.ones(3),))
    u.sum().backward()
    assert w.grad is not None
    assert torch.equal(w.grad, w.detach().exp())
    assert torch.equal(du, w.detach().exp())


def test_a_scripted_module_is_refused() -> None:
    """Torch's derivative of it is zero, without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its own
        net = torch.jit.script(nn.Linear(4, 4))
    x, _, v = point()
    with pytest.raises(UserError, match=r"a torch.jit.script module has no derivative"):
        dumo.jvp(net, (x,), (v,))


def test_a_frozen_part_without_gradients_moves(caplog: pytest.LogCaptureFixture) -> None:
    """In a block without gradients, weights that could have some lose none."""
    layer = nn.Linear(4, 4)

    def net(x: Tensor) -> Tensor:
        with torch.no_grad():
            return layer(x)

    x, _, v = point()
    with caplog.at_level(logging.WARNING, "dumo"):
        _, du = dumo.jvp(net, (x,), (v,))
    assert caplog.text == ""  # in one pass
    assert torch.allclose(du, v @ layer.weight.mT)


def test_two_passes_are_said_once_and_hold_nothing_of_the_first(caplog: pytest.LogCaptureFixture) -> None:
    made: list[weakref.ref[Any]] = []  # in each pass

    def net(x: Tensor) -> Tensor:
        assert not made or made[0]() is None
        y = x.sin()
        made.append(weakref.ref(y))
        y += x
        return y

    x, _, v = point()
    with caplog.at_level(logging.WARNING, "dumo"):
        for _ in range(3):
            made.clear()
            dumo.jvp(net, (x,), (v,))
    (message,) = caplog.messages
    assert message.startswith("dumo.jvp makes two passes of net: no tangent for ")
    assert "slope" not in message


def test_a_derivative_that_is_the_same_everywhere_can_be_written_to() -> None:
    t = torch.rand(4)
    _, du = dumo.jvp(lambda x, t: x + t.view(-1, 1, 1), (point()[0], t), (None, torch.ones(4)))
    assert torch.equal(du.mul_(2), torch.full((4, 8, 4), 2.0))


def test_axis_is_another_word_for_dim(caplog: pytest.LogCaptureFixture) -> None:
    x, _, v = point()
    with caplog.at_level(logging.WARNING, "dumo"):
        _, du = dumo.jvp(lambda x: torch.cat([x, x.mean(axis=1, keepdims=True)], axis=1), (x,), (v,))
        _, ds = dumo.jvp(lambda x: x.softmax(axis=1), (x,), (v,))
    assert caplog.text == ""  # in one pass
    assert torch.equal(du, torch.cat([v, v.mean(1, keepdim=True)], 1))
    torch.testing.assert_close(ds, torch.func.jvp(lambda x: x.softmax(1), (x,), (v,))[1])


def test_a_function_that_moves_with_a_pass_around_it_is_refused() -> None:
    """The direction of that pass is not known yet: zeros would be silently wrong."""
    x = torch.ones(3)
    around = pair(x, DeferredTangent(x.shape, x.dtype))
    with pytest.raises(UserError, match="does not nest"):
        dumo.jvp(lambda y: y * around, (x,), (x,))


def test_an_error_that_shows_an_address_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def asks_for_a_tensor(x: Tensor) -> Tensor:
        assert isinstance(x, Tensor), f"no tensor but {x}"
        return x.sin()

    x, _, v = point()
    with caplog.at_level(logging.WARNING, "dumo"):
        for _ in range(2):
            dumo.jvp(asks_for_a_tensor, (x,), (v,))
    assert len(caplog.messages) == 1


class Turning(nn.Module):
    """Multiplies by a buffer, counts its calls in one that the first call registers, and writes in place."""

    turn: Tensor
    calls: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("turn", torch.rand(4))
        self.register_buffer("calls", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.calls is None:
            self.calls = torch.zeros(())
        if not hasattr(self, "twice"):
            self.register_buffer("twice", torch.zeros(()))
        self.calls = self.calls + 1
        self.twice = self.twice + 2
        h = self.layer(x) * self.turn * self.calls
        h += 1
        return h * h


def test_two_passes_leave_alone_the_buffers_that_gradients_need() -> None:
    torch.manual_seed(0)
    net, (x, _, v) = Turning(), point()
    twin = copy.deepcopy(net)
    earlier = net.layer(x) * net.turn  # whose gradient needs the buffer, too
    u, du = dumo.jvp(net, (x,), (v,))
    (u.sum() + earlier.sum()).backward()
    plain = twin(x)
    (plain.sum() + (twin.layer(x) * twin.turn).sum()).backward()
    assert torch.equal(u, plain)
    assert torch.equal(net.layer.weight.grad, twin.layer.weight.grad)
    assert {name: b.tolist() for name, b in net.named_buffers()} == {n: b.tolist() for n, b in twin.named_buffers()}
    assert net.state_dict().keys() == twin.state_dict().keys()
    twin.calls = None
    torch.testing.assert_close(du, torch.func.jvp(twin, (x,), (v,))[1])


def test_two_passes_move_running_means_once() -> None:
    """Of a norm over the batch, which writes to them in a way that torch does not count."""
    torch.manual_seed(0)
    net, x, v = nn.BatchNorm1d(4), torch.randn(8, 4), torch.randn(8, 4)
    twin = copy.deepcopy(net)
    u, du = dumo.jvp(net, (x,), (v,))
    u.square().sum().backward()
    plain = twin(x)
    plain.square().sum().backward()
    assert torch.equal(u, plain)
    assert torch.equal(net.weight.grad, twin.weight.grad)
    for buffer, plain_buffer in zip(net.buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, plain_buffer)
    exact = torch.func.jvp(lambda x: F.batch_norm(x, None, None, twin.weight, twin.bias, training=True), (x,), (v,))[1]
    torch.testing.assert_close(du, exact)


def test_a_tangent_is_a_tensor() -> None:
    x, _, _ = point()
    with pytest.raises(UserError, match="tangent 0 is a float: give a tensor like primal 0, or None"):
        dumo.jvp(torch.sin, (x,), (1.0,))  # pyright: ignore[reportArgumentType]


def assigned_data(x: Tensor) -> Tensor:
    y = x * 2
    y.data = x * 3
    return y


def assigned_real(x: Tensor) -> Tensor:
    y = torch.complex(x, 2 * x)
    y.real = x * x
    y.imag = x.sin()
    return torch.view_as_real(y)


def swapped(x: Tensor) -> Tensor:
    """Both rows are the old second one: what is swapped are views."""
    y = x * 2
    y[0], y[1] = y[1], y[0]
    return y


def viewed_before(x: Tensor) -> Tensor:
    y = x * 2
    row = y[0]
    y[0] = x[1] ** 2
    return row * y


@pytest.mark.parametrize("fn", [assigned_real, swapped, viewed_before])
def test_views_and_assignments_are_those_of_torch(fn: Callable[[Tensor], Tensor]) -> None:
    x, d = torch.randn(2, 3, 3, dtype=torch.float64)
    value, derivative = dumo.jvp(fn, (x,), (d,))
    h = 1e-6
    assert torch.equal(value, fn(x))
    torch.testing.assert_close(derivative, (fn(x + h * d) - fn(x - h * d)) / (2 * h), rtol=1e-6, atol=1e-6)


def test_data_is_not_assigned_unseen() -> None:
    with pytest.raises(UserError, match="assignment to Tensor"):
        dumo.jvp(assigned_data, (torch.randn(3),), (torch.randn(3),))


class Remembering(nn.Module):
    """A module that keeps what it computes in attributes, a list and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.cache: Tensor | None = None
        self.history: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.layer(x)
        if self.cache is None:
            self.cache = x * 2
        self.history.append(self.hidden)
        return self.hidden * self.cache


@pytest.mark.parametrize("wrapped", [False, True])
def test_attributes_hold_plain_tensors_afterwards(wrapped: bool) -> None:
    """Whether the module is called itself, or by a function."""
    net = Remembering()
    x, d = torch.randn(2, 4, 3)
    dumo.jvp((lambda x: net(x) + 1) if wrapped else net, (x,), (d,))
    assert type(net.hidden) is type(net.cache) is type(net.history[0]) is Tensor
    copy.deepcopy(net.state_dict())
    assert type(net(x)) is Tensor


def test_what_has_no_derivative_is_never_zero() -> None:
    """torch.func.jvp takes the derivative of each for zero."""

    @torch.library.custom_op("dumo_test::cube", mutates_args=())
    def cube(a: Tensor) -> Tensor:
        return a**3

    x, d = torch.randn(2, 3, dtype=torch.float64)
    index = torch.tensor([0, 0, 1])
    _, found = dumo.jvp(lambda x: x.new_ones(2).scatter_reduce(0, index, x, "prod"), (x,), (d,))
    torch.testing.assert_close(found, torch.stack([d[0] * x[1] + x[0] * d[1], d[2]]))
    for fn in (lambda x: cube(x) + x, torch.special.airy_ai, torch.special.bessel_j0):
        with pytest.raises(UserError, match="no derivative"):
            dumo.jvp(fn, (x,), (d,))
    cube.register_autograd(
        lambda ctx, gradient: 3 * ctx.saved_tensors[0] ** 2 * gradient,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    )
    _, found = dumo.jvp(lambda x: cube(x) + x, (x,), (d,))
    torch.testing.assert_close(found, 3 * x**2 * d + d)


def test_the_norm_of_a_row_that_is_no_number_has_no_derivative() -> None:
    x = torch.tensor([[3.0, 4.0], [float("nan"), 1.0], [0.0, 0.0]])
    _, derivative = dumo.jvp(lambda x: torch.linalg.vector_norm(x, dim=1), (x,), (torch.ones_like(x),))
    assert derivative[0] == pytest.approx(1.4)
    assert derivative[1].isnan()
    assert derivative[2] == 0
