"""Augmentation on its way from the data to the net: told in training, absent from samples, refused where untold.

The recipes are opened without their data, and trained on them where they are.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dumo.data.augment import Edm, changes
from dumo.flow.generate import labels
from dumo.run.config.load import load
from dumo.run.config.spec import Run
from dumo.run.folder import open_run
from dumo.run.train import train
from dumo.runtime.random import stream
from dumo.training.optim import AdamW, Constant
from dumo.training.state import begin
from dumo.training.step import Task, train_step
from dumo.types import UserError

TINY = (
    "data.root=/nowhere",
    "data.side=8",
    "net.width=8",
    "net.multipliers=[1,2]",
    "net.depth=1",
    "net.attend=[4]",
    "train.batch=6",
    "evaluate.protocol={kind: folder, samples: 4000}",
)


def tiny(*more: str, of: str = "cifar10") -> Run:
    """A recipe for images of 8 x 8, and a net of some thousand weights."""
    return load(of, [*TINY, *more])


def batch(run: Run, n: int = 6) -> tuple[Tensor, Tensor]:
    """Random images, augmented as the run says, more often."""
    augment: Edm | None = getattr(run.data, "augment", None)
    assert augment is not None
    g = stream("augmented")
    x = 2 * torch.rand(n, *run.data.shape, generator=g) - 1
    change = changes(dict.fromkeys(augment.shares, 0.7), n, g)
    return augment(x, change), change.numbers


def test_a_step_teaches_what_the_numbers_mean() -> None:
    """The layer that reads them moves; at zero they are worth nothing to it."""
    run = tiny()
    x, c = batch(run)
    fast = run.train.model_copy(update={"optimizer": AdamW(lr=1e-2), "schedule": Constant()})
    for told in (c, torch.zeros_like(c)):
        state = begin(run.build(), fast)
        before = [p.clone() for p in state.net.get_parameter("augment.weight")]
        for _ in range(3):  # all but the last layer are still at first: they start at zero
            train_step(state, Task(run.objective, run.path, 0), (x, told), fast)
        moved = any((a != b).any() for a, b in zip(before, state.net.get_parameter("augment.weight"), strict=True))
        assert moved == (told is c)


def test_samples_are_not_augmented() -> None:
    """An integer, as samplers give it, says the same as zeros; other numbers say something else."""
    run = tiny()
    net = run.build().eval()
    for p in net.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=stream("p", *p.shape))
    x, c = batch(run)
    t = torch.linspace(0.1, 1, 6)
    with torch.no_grad():
        plain, zeros, told = (net(x, c, t=t)[1] for c in (labels(6, run.data.classes), torch.zeros_like(c), c))
    assert torch.equal(plain, zeros)
    assert not torch.allclose(plain, told, atol=1e-4)


PLAIN = ["data.images.labelled=false", "data.images.classes=0", "objective.drop=0", "objective.guide.zeta=0"]


@pytest.mark.parametrize(
    ("recipe", "words", "says"),
    [
        ("cifar10", ["net.augment=9"], r"by 6 numbers, net 'unet' takes 9: set net\.augment=6, or data\.augment=null"),
        ("cifar10", ["net.augment=0"], "by 6 numbers, net 'unet' takes 0"),
        ("cifar10", ["data.augment.yflip=true"], r"by 7 numbers.*takes 6: set net\.augment=7"),
        ("cifar10", ["data.augment=null"], r"by 0 numbers, net 'unet' takes 6: set net\.augment=0$"),
        ("cifar10", ["objective.drop=0.1"], r"objective\.drop = 0\.1.*objective\.drop=0"),
        ("cifar10", ["data.labelled=auto", "data.classes=10"], r"data: augment.*10 classes.*labelled=false"),
        ("cifar10", ["data.augment.kind=edm2"], r"data\.augment.*edm"),
        ("cifar10", ["net={kind: dit, width: 8, attention: 1}"], r"takes 0: set net\.kind=unet net\.augment=6"),
        ("cifar10-latents", [*PLAIN, "data.images.augment={kind: edm}"], r"data\.images\.augment=null"),
    ],
)
def test_what_does_not_fit_is_refused(recipe: str, words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load(recipe, words)


@pytest.mark.data
def test_the_recipe_trains_on_its_data(tmp_path: Path) -> None:
    """On the test images, which are fewer, with a net of a few layers, and makes images in one pass."""
    small = ["net.width=8", "net.depth=1", "net.multipliers=[1]", "net.attend=[1]", "train.batch=4", "train.steps=2"]
    few = ["data.split=test", "data.memory=0", "train.log_every=1", "train.probe_every=0"]
    train(load("cifar10", [*small, *few]), tmp_path, device="cpu")
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["images"] for record in records] == [4, 8]
    assert all(0 < record["loss"] < 10 for record in records)
    (made,) = open_run(str(tmp_path), device="cpu").sampler.batches(labels(3, 0), nfe=1)
    assert made.x.shape == (3, 3, 32, 32)
