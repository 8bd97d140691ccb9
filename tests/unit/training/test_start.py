"""A start of 20 B weights on eight ranks that are not there."""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor.debug import CommDebugMode

from dumo.config.load import load
from dumo.plan.cluster import fake_ranks
from dumo.run.net import meta_net
from dumo.training import layout
from dumo.training.frozen import copy_net


@pytest.mark.nightly
@pytest.mark.parametrize("recipe", ["qwen-image"])
def test_a_start_of_20_b_on_eight_ranks_sends_nothing_and_makes_each_tensor_once(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load(recipe, ["train.share=8"])
    net, made, fake = meta_net(run), Counter[str](), FakeTensorMode(allow_non_fake_inputs=True)

    def make(name: str, like: Tensor) -> Tensor:
        made[name] += like.nbytes
        with fake:
            return torch.empty(like.shape, dtype=like.dtype, device="cpu")

    def put(module: nn.Module, names: Any, make: Any) -> None:  # noqa: ANN401, as `layout.replace_parameters`
        with fake:
            real(module, names, make)

    real = layout.replace_parameters
    loaders = {name: partial(make, name, p) for name, p in net.named_parameters()}
    wanted: dict[str, Any] = {name: p.nbytes for name, p in net.named_parameters()}
    assert sum(p.numel() for p in net.parameters()) > 20e9
    with fake_ranks(8):
        mesh, copy = layout.mesh_of(8, torch.device("cpu")), copy_net(net).requires_grad_(False)
        monkeypatch.setattr(layout, "replace_parameters", put)
        with CommDebugMode() as sent:
            layout.shard(net, mesh, [copy], loaders, reshard=False)
        parts = [layout.local_tensor(p) for p in net.parameters()]
    assert sent.get_total_counts() == 0
    assert made == wanted
    assert not any(x.is_meta for x in parts)
    assert sum(x.nbytes for x in parts) <= sum(wanted.values()) / 8 * 1.01
    for name, p in net.named_parameters():
        assert (copy.get_parameter(name) is p) != p.requires_grad, name
