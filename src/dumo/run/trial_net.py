"""Make a run's net cheap to try: two blocks, random weights, and no text table needed.

`randomly_initialized_net` does all three. `with_trial_net`, `cut_to_two_blocks` and `with_random_texts_if_missing`
change the spec alone, and build nothing. A pretrained net is not downloaded or loaded: it is built from its config with
random weights.
"""

import torch
from torch import nn

from dumo.config.spec import Run
from dumo.nets import Net, is_pretrained
from dumo.run.weights import draw_on_device
from dumo.runtime.random import stream

_VECTOR_NOISE = 0.1  # the standard deviation of what is added to biases and gains, so that gains stay near 1: ours
_SUBJECT_SCALE = 0.1  # of the random weights of a subject's adapter, which adds a third part to a layer: ours
STREAM_KEY = "doctor"  # of all draws: a command's name. Another key would draw other numbers


def randomly_initialized_net(run: Run, device: torch.device) -> nn.Module:
    """Build the run's net, cut to two blocks, with random weights by the run's seed.

    Layers that training starts at zero get random weights, too. Texts without a table are random. The device must have
    room for it (`dumo.run.net.require_room`).
    """
    net = draw_on_device(with_trial_net(run), device)
    subject_part = None  # of the name of a weight in an adapter of a subject
    if run.net.lora:
        from dumo.nets.adapter import SUBJECT

        subject_part = f".{SUBJECT}."
    with torch.no_grad():
        for name, p in net.named_parameters():
            noise = torch.randn(p.shape, generator=stream(run.train.seed, STREAM_KEY, name)).to(p)
            if subject_part and subject_part in name:
                noise = _SUBJECT_SCALE * noise
            if p.ndim > 1:
                fan_in = p[0].numel()
                p.copy_(noise / fan_in**0.5)
            else:
                p.copy_(p + _VECTOR_NOISE * noise)
    return net


def with_trial_net(run: Run) -> Run:
    """The run with the spec of its net cut to two blocks, and random texts where it has no text table yet."""
    return run.model_copy(update={"net": cut_to_two_blocks(with_random_texts_if_missing(run.net))})


def with_random_texts_if_missing(net: Net) -> Net:
    """The spec of a net, with random texts in place of a text table that does not exist yet."""
    if net.texts is None:
        return net

    from dumo.nets.text import drawn_if_missing

    texts = drawn_if_missing(net.texts)
    if texts is net.texts:
        return net
    return net.model_copy(update={"texts": texts})


def cut_to_two_blocks(net: Net) -> Net:
    """The spec of a net, with at most two blocks of each kind."""
    if is_pretrained(net):
        return net.short(2)
    # a net without blocks, or a user's own, has none of these fields
    depth: int | None = getattr(net, "depth", None)
    route: object = getattr(net, "route", None)
    late: int | None = getattr(net, "late", None)
    if depth is None:
        return net
    short_depth = min(2, depth)
    update: dict[str, int | None] = {"depth": short_depth}
    if route:
        update["route"] = None  # it names blocks that are cut
    if late is not None:
        update["late"] = min(late, short_depth - 1)
    return net.model_copy(update=update)
