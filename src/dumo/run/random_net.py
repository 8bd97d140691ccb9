"""Build a run's network with random weights in all layers, to test or time it before training.

The last layers of a new network are zero, and so are its outputs and derivatives. A pretrained network is built from
its config with random text embeddings, so nothing is downloaded.
"""

import torch
from torch import nn

from dumo.config.spec import Run
from dumo.nets import Net, Pretrained
from dumo.nets.lora import SUBJECT
from dumo.nets.text_rows import TextsSpec
from dumo.run.weights import init_on_device
from dumo.runtime.random import stream

# The standard deviation of the noise added to biases and gains, so that gains stay near 1.
_VECTOR_NOISE = 0.1
# The scale of a subject's adapter weights, which are the third term of a layer.
_SUBJECT_SCALE = 0.1


def random_net(run: Run, device: torch.device) -> nn.Module:
    """Build the run's network with random weights from the run's seed.

    The caller checks the memory of the device (`dumo.run.net.require_room`).
    """
    spec = with_random_texts(run.net)
    if isinstance(spec, Pretrained):
        spec = spec.model_copy(update={"weights": "drawn"})
    net = init_on_device(run.model_copy(update={"net": spec}), device)
    subject_part = None
    if run.net.lora:
        subject_part = f".{SUBJECT}."
    with torch.no_grad():
        for name, p in net.named_parameters():
            noise = torch.randn(p.shape, generator=stream(run.train.seed, "random net", name)).to(p)
            if subject_part and subject_part in name:
                noise = _SUBJECT_SCALE * noise
            if p.ndim > 1:
                fan_in = p[0].numel()
                p.copy_(noise / fan_in**0.5)
            else:
                p.copy_(p + _VECTOR_NOISE * noise)
    return net


def short_run(run: Run) -> Run:
    """Return the run with a network of at most two blocks of each kind, to save memory and time."""
    return run.model_copy(update={"net": cut_to_two_blocks(run.net)})


def with_random_texts(net: Net) -> Net:
    """Return the spec of a network with random text embeddings."""
    if isinstance(net.texts, TextsSpec):
        return net.model_copy(update={"texts": net.texts.with_random_rows()})
    return net


def cut_to_two_blocks(net: Net) -> Net:
    """Return the spec of a network with at most two blocks of each kind."""
    if isinstance(net, Pretrained):
        return net.short(2)
    # Networks without blocks and user-defined networks do not have these fields.
    depth: int | None = getattr(net, "depth", None)
    route: object = getattr(net, "route", None)
    late: int | None = getattr(net, "late", None)
    if depth is None:
        return net
    short_depth = min(2, depth)
    update: dict[str, int | None] = {"depth": short_depth}
    if route:
        # The route refers to removed blocks.
        update["route"] = None
    if late is not None:
        update["late"] = min(late, short_depth - 1)
    return net.model_copy(update=update)
