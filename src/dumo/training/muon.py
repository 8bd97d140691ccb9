"""The Muon optimizer (Jordan et al. 2024), which updates matrices along their orthogonalized momentum.

The spec `dumo.training.optim.Muon` creates a `MuonOptimizer` for the matrices that `block_matrices` finds in a net, and
another optimizer for all other parameters. `orthogonalize` is the equation of the update.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dumo.training.layout import full_tensor, shard_like

Matrices = Float[Tensor, "matrices rows columns"]

STACK_KEY = "parts"  # in a group: the number of matrices stacked in each parameter. State dicts of users have it.
MOMENTUM_KEY = "momentum_buffer"  # in the state of a matrix: its momentum, and nothing else is there
_COEFFICIENTS = 3.4445, -4.7750, 2.0315  # a, b, c: Jordan et al.'s
_ITERATIONS = 5  # Newton-Schulz iterations: Jordan et al.'s
_EPS = 1e-7  # the least norm that is divided by: Jordan et al.'s
_ADAMW_UPDATE_RMS = 0.2  # of a matrix's update, so that one lr serves both: Moonlight (Liu et al. 2025), Eq. 4
# Matrices that are orthogonalized at once. A CPU gains nothing by larger batches, and its products round differently.
_MAX_BATCH_BYTES = {"cpu": 2**20, "cuda": 2**28}


def orthogonalize(m: Matrices) -> Matrices:
    """Bring the singular values of each matrix near 1 by Newton-Schulz iterations, in its dtype.

    Each of five iterations maps a singular value s, as a share of the matrix's norm, to a s + b s^3 + c s^5. Values
    from .0015 to 1 end between .68 and 1.2; lower ones stay smaller, .001 ends at .47. The result approximates U V^T.
    """
    a, b, c = _COEFFICIENTS
    is_tall = m.shape[1] > m.shape[2]
    x = m.mT if is_tall else m
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_EPS)  # so that no singular value is above 1
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram^2
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + polynomial x
    return x.mT if is_tall else x


class MuonOptimizer(torch.optim.Optimizer):
    """Muon for matrices combined with another optimizer for other parameters; both share groups and state.

    A matrix is updated by its orthogonalized momentum (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon):
    for the momentum U S V^T the step is along U V^T, equally far in rare and common directions. `torch.optim.Muon`
    takes the same steps, but treats fused matrices as one, and rounds to bf16 on a CPU as well, so that sharded and
    unsharded matrices get different steps.

    A group of matrices records how many are stacked in each of its parameters. They are orthogonalized separately,
    which Jordan et al. find better for queries, keys and values. The filters of a convolution are rows. The momentum of
    sharded matrices is gathered, so that the step equals that of a single process.
    """

    def __init__(
        self,
        params_by_stack: Mapping[int, Sequence[nn.Parameter]],
        other_optimizer: torch.optim.Optimizer | None,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        """Create the groups of `params_by_stack`, keyed by the number of matrices stacked in each parameter.

        `other_optimizer` updates all other parameters; None if there are none.
        """
        self.other_optimizer = other_optimizer
        groups: list[dict[str, Any]] = []
        for num_stacked, params in params_by_stack.items():
            options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
            groups.append({"params": [*params], STACK_KEY: num_stacked, **options})
        if other_optimizer:
            groups += other_optimizer.param_groups
        super().__init__(groups, {})

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies, because torch's method keeps only the fields of its own class."""
        return {**super().__getstate__(), "other_optimizer": self.other_optimizer}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # noqa: ANN401, as torch's
        """Update all parameters that have a gradient. `closure` is not called."""
        for group in self.param_groups:
            if STACK_KEY not in group:
                continue
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p][MOMENTUM_KEY] = torch.zeros_like(p)
            for same_shape in _batches_of_one_shape(params):
                self._update_matrices(same_shape, group)
        if self.other_optimizer:
            # `load_state_dict` replaces state and groups of this optimizer, so share them with the other one again.
            self.other_optimizer.state = self.state
            self.other_optimizer.param_groups = [group for group in self.param_groups if STACK_KEY not in group]
            self.other_optimizer.step()

    def _update_matrices(self, params: Sequence[nn.Parameter], group: Mapping[str, Any]) -> None:
        """Update matrices of one shape: weight decay, then a step along their orthogonalized momentum."""
        momentum = group["momentum"]
        directions: list[Tensor] = []
        for p in params:
            grad = cast(Tensor, p.grad)
            momentum_buffer = self.state[p][MOMENTUM_KEY].lerp_(grad, 1 - momentum)
            # Nesterov's momentum.
            directions.append(full_tensor(grad.lerp(momentum_buffer, momentum)))

        # Orthogonalize all of them in one batch. On a GPU in bf16, in which the iterations are stable (Jordan et al.).
        num_stacked = group[STACK_KEY]
        stack = torch.cat([direction.flatten(1).unflatten(0, (num_stacked, -1)) for direction in directions])
        updates = orthogonalize(stack.bfloat16() if stack.is_cuda else stack)
        step_size = group["lr"] * (_ADAMW_UPDATE_RMS * sqrt(max(updates.shape[1:])))
        for p, update in zip(params, updates.to(params[0].dtype).split(num_stacked), strict=True):
            if group["weight_decay"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(shard_like(update.reshape(p.shape), p), alpha=-step_size)


def _batches_of_one_shape(params: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group parameters of the same shape, up to _MAX_BATCH_BYTES in a batch."""
    by_shape: dict[torch.Size, list[nn.Parameter]] = {}
    for p in params:
        by_shape.setdefault(p.shape, []).append(p)
    batches: list[list[nn.Parameter]] = []
    for same_shape in by_shape.values():
        first = same_shape[0]
        max_bytes = _MAX_BATCH_BYTES["cuda" if first.is_cuda else "cpu"]
        size = max(1, max_bytes // (first.numel() * first.element_size()))
        batches += [same_shape[start : start + size] for start in range(0, len(same_shape), size)]
    return batches


def block_matrices(net: nn.Module) -> dict[nn.Parameter, int]:
    """Return the trained weights of linear layers and convolutions in a net's blocks, with their numbers of matrices.

    The attribute `fused` of a module gives the number of stacked matrices of its layers, such as 3 for fused qkv.
    """
    num_stacked: dict[nn.Parameter, int] = {}
    blocks = getattr(net, "blocks", getattr(net, "layers", ()))
    for parent in nn.ModuleList(blocks).modules():
        fused: Mapping[str, int] = getattr(parent, "fused", {})
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.requires_grad:
                num_stacked[cast(nn.Parameter, layer.weight)] = fused.get(name, 1)
    return num_stacked
