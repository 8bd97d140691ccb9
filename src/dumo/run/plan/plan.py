"""What a run takes, counted on nets without numbers: sizes, work, memory, images.

Of memory the sum is an upper bound: weights, gradients, optimizer and averages stay, and on top comes the most that one
piece of a batch needs at one time.
"""

from collections.abc import Iterable, Mapping
from math import ceil, log2, prod
from typing import Any

import torch
from torch import Tensor, nn

from dumo.data import Latents
from dumo.data.cache import Plan, read_contents
from dumo.evaluation.standard import TRAIN, Standard
from dumo.io.read import user_path
from dumo.io.table import FILE
from dumo.run.config.spec import Run
from dumo.run.plan import cost
from dumo.run.plan.show import show
from dumo.runtime import dist
from dumo.training.state import State, begin
from dumo.training.step import passes
from dumo.types import UserError

GPU = 80 * 2**30  # bytes of an A100 or H100


def plan(spec: Run) -> dict[str, Any]:
    """What `show` says, and shapes, bytes, work, images, and whether the data are there.

    `parameters_total` counts fixed tables, too; `inputs` and `heads` are shapes of a row; `flops` and `images` are the
    whole run's; `gpus` is as the function of that name says.
    """
    net, shape, needs, train = spec.outline(), spec.data.shape, spec.objective.needs, spec.train
    shown, images, missing = show(spec, net), train.steps * train.batch, missing_data(spec)
    heads = cost.heads(net, spec.objective, shape, rows=1)
    epoch = (not missing and cached_images(spec)) or protocol_images(spec)
    return {
        **shown,
        "parameters_total": sum(value.numel() for value in net.state_dict().values()),
        "inputs": {"x": list(shape), **{name: [] for name in ("c", *needs.names)}},
        "heads": {name: list(head.shape[1:]) for name, head in zip((*needs.heads, *needs.gauges), heads, strict=False)},
        "tokens": getattr(net, "grid", 0) ** 2 or None,
        "memory": (holds := memory(spec, most_rows(spec), net)),
        "gpus": gpus(holds),
        "images": images,
        "epochs": epoch and images / epoch,
        "flops": shown["forward_units_per_step"] * shown["forward_flops_per_image"] * images,
        "cache": cache(spec.data, epoch) if isinstance(spec.data, Latents) else None,
        "missing_data": missing,
    }


def most_rows(spec: Run, ranks: int | None = None) -> int:
    """The rows of the largest pass on any rank, of those here or of so many. Raises UserError as `passes`."""
    return max(
        rows.stop - rows.start for rank in passes(spec.train, spec.objective, ranks or dist.world()) for rows in rank
    )


def memory(spec: Run, rows: int, net: nn.Module | None = None) -> dict[str, int]:
    """Bytes that training holds on each rank, by what they are, `rows` rows at a time; `total`: the most at once.

    `net`: its outline, if there is one already, which is left with gradients.
    """
    train, data, net = spec.train, spec.data, spec.outline() if net is None else net
    activations = cost.activation_bytes(
        net, spec.objective, spec.path, data.shape, rows=rows, ref=train.ref, precision=train.precision
    )
    parts = {**held(spec, net), "activations": activations}
    return {"rows": rows, **parts, "total": sum(parts.values())}


def gpus(memory: Mapping[str, int]) -> int | None:
    """On how many GPUs of 80 GiB to look for a layout (`dumo.run.plan.fit`), a power of two; None where one holds all.

    What stays between passes then fills at most half of each, and the rest is for the passes: ours.
    """
    if memory["total"] <= GPU:
        return None
    return 2 ** max(0, ceil(log2((memory["total"] - memory["activations"]) / (GPU / 2))))


def held(spec: Run, net: nn.Module | None = None) -> dict[str, int]:
    """Bytes that training holds between passes, by what they are, where each rank holds all; `net` as of `memory`."""
    net = spec.outline() if net is None else net
    state = begin(net, spec.train)
    learns = [p for p in net.parameters() if p.requires_grad]
    for p in learns:
        p.grad = torch.empty_like(p)
    state.optimizer.step()  # its own tensors come with its first step
    own = (value for entry in state.optimizer.state.values() for value in entry.values())
    return {
        "weights": size(tensors(net)),
        "gradients": size(learns),
        "optimizer": size(value for value in own if isinstance(value, Tensor)),
        "averages": size(averaged(state)),
    }


def cache(data: Latents, images: int | None) -> dict[str, int | None]:
    """Bytes that `dumo encode` writes for an image, as it is without options, and for all, if their number is known."""
    fields = Plan.model_fields
    moments = data.codec.gaussian and fields["store"].default == "moments"
    numbers = prod(data.shape) * (2 if moments else 1) * (2 if data.images.flip else 1)
    each: int = numbers * getattr(torch, fields["dtype"].default).itemsize
    return {"images": images, "bytes_per_image": each, "bytes": images and images * each}


def cached_images(spec: Run) -> int | None:
    """How many images there are in the run's cache, which is there; None where that is not known, or there is none."""
    contents = read_contents(spec.data.folder) if isinstance(spec.data, Latents) else None
    return contents.rows if contents else None


def protocol_images(spec: Run) -> int | None:
    """How many images the set has that the run's protocol is named after; None where it is named after none."""
    standard: Standard | None = getattr(spec.evaluate.protocol, "standard", None)
    return standard and (TRAIN if standard.url else standard.real)


def missing_data(spec: Run) -> str | None:
    """Why training could not begin here, as far as a look at the data's place tells; None if it could."""
    root: str | None = getattr(spec.data, "root", None)
    if root is None:
        return None
    try:
        path = user_path(root, "data.root")
    except UserError as error:
        return str(error)
    if isinstance(spec.data, Latents) and not (path / FILE).is_file():
        return f"there is no cache in {path}: make it with dumo encode"
    return None if path.exists() else f"there is no {path}: set data.root"


def averaged(state: State) -> list[Tensor]:
    """The averages' tensors, but for those that they share with the net."""
    shared = {id(x) for x in tensors(state.net)}
    return [x for average in state.averages.values() for x in tensors(average.module) if id(x) not in shared]


def tensors(net: nn.Module) -> Iterable[Tensor]:
    """Parameters and buffers."""
    return (*net.parameters(), *net.buffers())


def size(values: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(value.nbytes for value in values)
