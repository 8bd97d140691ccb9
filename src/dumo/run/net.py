"""Build the network of a run, without trained weights.

`meta_net` builds it on the meta device, for counting and checks. `deferred_net` initializes its weights, but leaves
those of a pipeline in their files and returns loaders. `dumo.run.weights` loads these, and trained weights.

`num_parameters` counts parameters. `require_room` and `require_room_to_train` check the memory of a device, counted by
`dumo.run.memory`. `make_flow` combines a network and its objective for training.
"""

from math import prod

import torch
from torch import nn

from dumo.config.spec import Run
from dumo.data import Latents
from dumo.flow.module import Flow
from dumo.io.deferred import Loaders
from dumo.nets import Pretrained
from dumo.nets.dualized import Dualized
from dumo.nets.lowbit import num_unstored_weights
from dumo.nets.text_rows import Texts, TextsSpec
from dumo.run.memory import held_bytes, weight_bytes
from dumo.runtime.device import require_memory
from dumo.runtime.random import stream
from dumo.training.state import State
from dumo.types import TeacherVelocity


def make_flow(run: Run, state: State, *, teacher: TeacherVelocity | None = None) -> Flow:
    """Combine the net of a state and the run's objective for training. `teacher` replaces the data's velocity."""
    train = run.train
    return Flow(
        state.net,
        run.objective,
        direct=True,
        classes=run.data.classes,
        path=run.path,
        coupling=train.coupling,
        teacher=teacher,
        prior=run.data.prior if isinstance(run.data, Latents) else None,
        ref=None if train.ref == "self" else state.averages[train.ref].module,
        precision=train.precision,
        seed=train.seed,
    )


def meta_net(run: Run, *, short: bool = False) -> nn.Module:
    """Build the net on the meta device. Raise UserError if it does not fit the data.

    With `short`, build only the first blocks of a pretrained net, because the whole net takes long.
    """
    spec = run.net
    if short and isinstance(spec, Pretrained):
        spec = spec.short(1)
    with torch.device("meta"):
        return spec.build(run.objective.needs, run.data.shape, run.data.classes)


def deferred_net(run: Run) -> tuple[nn.Module, Loaders]:
    """Build the net at step 0, and return it with the loaders of its pipeline weights, which are on the meta device.

    A net without a pipeline has all weights and no loaders.
    """
    needs = run.objective.needs
    loaders: Loaders = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(run.train.seed, "weights").initial_seed())
        if isinstance(run.net, Pretrained):
            net, loaders = run.net.build_deferred(needs, run.data.shape, run.data.classes)
        else:
            net = run.net.build(needs, run.data.shape, run.data.classes)
    _load_texts(run, net)
    return net, loaders


def _load_texts(run: Run, net: nn.Module) -> None:
    """Load the captions of the data into the text module of a net."""
    spec = run.net.texts
    if not isinstance(spec, TextsSpec):
        return
    for module in net.modules():
        if isinstance(module, Texts):
            spec.load(module, run.conditions.names)


def num_parameters(net: nn.Module) -> int:
    """Return the number of a net's parameters. Quantized weights count as the original weights."""
    total = sum(p.numel() for p in net.parameters())
    if isinstance(net, Dualized):
        total += num_unstored_weights(net)
    return total


def require_room(run: Run, device: torch.device | str) -> None:
    """Raise UserError if a device has too little memory for the net's weights."""
    require_memory(weight_bytes(meta_net(run)), "the net takes", "take a smaller net (net.width, net.depth)", device)


def require_room_to_train(
    run: Run, device: torch.device | str, net_outline: nn.Module, *, rows: int, share: int = 1
) -> None:
    """Raise UserError if a device has too little memory to train the net on batches of `rows` rows.

    `net_outline` is the net on the meta device. Weights, gradients, optimizer and averages are split into `share`
    parts; rows count with their noise. Activations come on top (`dumo show --cost`).
    """
    batch_bytes = 2 * rows * prod(run.data.shape) * torch.float32.itemsize
    require_memory(
        held_bytes(net_outline, run.train).total // share + batch_bytes,
        "weights, gradients, optimizer, averages and a batch need",
        "take a smaller net (net.width, net.depth) or batch (train.batch)",
        device,
    )
