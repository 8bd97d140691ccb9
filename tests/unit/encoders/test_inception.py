"""Inception against torch-fidelity's, and what does not depend on its weights."""

import pytest
import torch
from torch import Tensor

from dumo.encoders.inception import BLOCKS, Inception, InceptionFeatures
from golden import inception as recipe

NAMES = {"64": "f64", "192": "f192", "768": "f768", "2048": "pool", "logits_unbiased": "logits", "spatial": "spatial"}


@pytest.fixture(scope="module")
def net() -> Inception:
    return recipe.net()


@pytest.mark.parametrize("size", [64, 256])
def test_every_output_is_torch_fidelitys(net: Inception, size: int) -> None:
    """The same weights on the same images: here bit for bit, and 1e-4 of the largest number on any machine."""
    seen = net(recipe.images(size))._asdict()
    for name, golden in recipe.golden()[str(size)].items():
        found = recipe.summary(seen[NAMES[name]])
        assert found["shape"] == golden["shape"]
        scale = max(abs(value) for row in golden["slice"] for value in row)
        for key in ("mean", "norm"):
            assert found[key] == pytest.approx(golden[key], rel=1e-4), name
        torch.testing.assert_close(
            torch.tensor(found["slice"]), torch.tensor(golden["slice"]), rtol=0, atol=1e-4 * scale
        )


def test_names_and_sizes_are_those_of_the_published_file() -> None:
    with torch.device("meta"):
        net = Inception()
    assert len(net.state_dict()) == 566 - 94  # of every convolution, but for a counter of batches each
    assert sum(p.numel() for p in net.parameters()) == 23_850_960
    assert sum(part.startswith("Mixed") for part, _ in net.named_children()) == len(BLOCKS) == 11
    assert net.get_parameter("Mixed_7b.branch3x3dbl_3b.conv.weight").shape == (384, 384, 3, 1)
    assert not any(p.requires_grad for p in net.parameters())


def test_the_map_of_sfid_keeps_places_channels_last(net: Inception) -> None:
    """A change in the lower right corner does not reach the 7 numbers of the upper left place."""
    x = recipe.images(299)[1:]
    changed = x.clone()
    changed[:, :, -20:, -20:] = 255 - changed[:, :, -20:, -20:]
    before, after = (net(images).spatial.view(17, 17, 7) for images in (x, changed))
    assert (before[-1, -1] != after[-1, -1]).any()
    assert (before != after).any(2).sum() > 10
    kept: list[Tensor] = []
    hook = net.get_submodule("Mixed_6d.branch1x1").register_forward_hook(lambda _, __, out: kept.append(out))
    net(x)
    hook.remove()
    torch.testing.assert_close(before, kept[0][0, :7].permute(1, 2, 0))


def test_precision_and_batch_around_it_change_nothing(net: Inception) -> None:
    x = recipe.images(64)
    two: InceptionFeatures = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        one: InceptionFeatures = net(x[:1])
    for alone, among in zip(one, two, strict=True):
        assert alone.dtype == torch.float32
        torch.testing.assert_close(alone, among[:1], rtol=1e-5, atol=1e-4)
