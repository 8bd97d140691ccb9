"""What a run is and takes, counted on nets without numbers: sizes, work, memory, images; as facts and as lines.

Of memory the sum is an upper bound: weights, gradients, optimizer and averages stay, and on top comes the most that one
piece of a batch needs at one time.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import ceil, log2, prod
from typing import Any

import torch
from torch import Tensor, nn

from dumo.config.spec import Run
from dumo.data import Data, Latents
from dumo.data.cache import Plan, read_contents
from dumo.evaluation.reference import TRAIN, Standard
from dumo.io.read import user_path
from dumo.nets import Net, Pretrained
from dumo.nets.lowbit import saved
from dumo.nets.table import Embedded, PipelineTexts
from dumo.plan.host import DEVICES, host
from dumo.run import cost
from dumo.run.net import outline
from dumo.runtime import dist
from dumo.runtime.progress import number, sized
from dumo.runtime.random import stream
from dumo.training.frozen import frozen_weights
from dumo.training.spec import Train
from dumo.training.state import State, begin
from dumo.training.step import passes
from dumo.types import Objective, Path, UserError

GPU = 80 * 2**30  # bytes of an A100 or H100
GB = 1e9
Line = tuple[str, str]  # what, and how much


def show(run: Run, net: nn.Module | None = None) -> dict[str, Any]:
    """What a run is before it is run: its spec, its size, and what a step costs and teaches.

    `forward_units_per_step` counts floating-point operations; `slope` is the way of a slope that rides; `far` is
    P(t - r > 0.9), the share of rows where one-step sampling is taught, None where no jump is; `guidance_scale` is the
    effective one, 1 for none. `net`: its outline, if there is one already.
    """
    net = outline(run) if net is None else net
    jumps = run.reads.endpoint or run.reads.flow_map
    way = cost.way(net, run.objective, run.path, run.data.shape, ref=run.train.ref)
    return {
        "spec": run.model_dump(mode="json", exclude=None if run.resolved else {"resolved"}),
        "parameters": sum(p.numel() for p in net.parameters()) + saved(net),
        "parameters_trained": sum(p.numel() for p in net.parameters() if p.requires_grad),
        "forward_flops_per_image": cost.forward_flops(net, run.objective, run.data.shape),
        "forward_units_per_step": cost.forward_units(net, run.objective, run.path, run.data.shape, ref=run.train.ref),
        "slope": way and {**way._asdict(), "text": way.text},
        "far": far(run.objective) if jumps else None,
        "guidance_scale": run.guided.scale,
    }


def far(objective: Objective) -> float:
    """P(t - r > 0.9), of a million draws: the share of the rows where one-step sampling is taught."""
    t, r = objective.times(1_000_000, stream("show"))
    return (t - r > 0.9).double().mean().item()


def plan(spec: Run) -> dict[str, Any]:
    """What `show` says, and shapes, bytes, work, images, and whether the data are there.

    `parameters_total` counts fixed tables, too; `inputs` and `heads` are shapes of a row; `flops` and `images` are the
    whole run's; `side` is that of the pipeline's default image; `gpus` is as the function of that name says.
    """
    net, shape, needs, train = outline(spec), spec.data.shape, spec.objective.needs, spec.train
    shown, images, missing = show(spec, net), train.steps * train.batch, missing_data(spec.data)
    heads = cost.heads(net, spec.objective, shape, rows=1)
    holds = memory(net, spec.objective, spec.path, shape, train, most_rows(train, spec.objective))
    if encoders := of_encoders(spec.net, spec.data.classes):
        holds |= {"encoders": encoders, "total": holds["total"] + encoders}
    checkpoint = copied(net, holds)
    cached = None if missing or not isinstance(spec.data, Latents) else read_contents(spec.data.folder)
    standard: Standard | None = getattr(spec.evaluate.protocol, "standard", None)  # a set of images by its name
    epoch = cached.rows if cached else standard and (TRAIN if standard.url else standard.real)
    return {
        **shown,
        "parameters_total": sum(value.numel() for value in net.state_dict().values()) + saved(net),
        "pixels": list(spec.pixels),
        "inputs": {"x": list(shape), **{name: [] for name in ("c", *needs.names)}},
        "heads": {name: list(head.shape[1:]) for name, head in zip((*needs.heads, *needs.gauges), heads, strict=False)},
        "tokens": getattr(net, "grid", 0) ** 2 or None,
        "memory": holds,
        "host": {name: host(net, train, 1, holds, checkpoint["copy"], holds["total"], name) for name in DEVICES},
        "side": spec.net.side or None if isinstance(spec.net, Pretrained) else None,
        "gpus": gpus(holds),
        "checkpoint": checkpoint,
        "images": images,
        "epochs": epoch and images / epoch,
        "flops": shown["forward_units_per_step"] * shown["forward_flops_per_image"] * images,
        "validation": validation(spec, shown["forward_units_per_step"]),
        "buckets": [list(size) for size in getattr(spec.images, "sizes", ())],
        "cache": cache(spec.data, epoch) if isinstance(spec.data, Latents) else None,
        "texts": rows_of_text(spec.net.texts, spec.data) if isinstance(spec.net.texts, Embedded) else None,
        "missing_data": missing,
    }


def validation(run: Run, units: float | None = None) -> dict[str, Any] | None:
    """How a run in training is judged, and the operations of its samples over those of its steps; None: it is not.

    Features and decoders are not counted. `units`: a step's forward units, if they are known already.
    """
    every, one = run.evaluate.every, run.evaluate.validation
    if not every:
        return None
    if units is None:
        units = cost.forward_units(outline(run), run.objective, run.path, run.data.shape, ref=run.train.ref)
    passes = one.protocol.total * one.nfe[0] * (2 if run.sample.guide.active else 1)
    share = passes / (every * run.train.batch * units)
    return {"every": every, "samples": one.protocol.total, "nfe": one.nfe[0], "share": share}


def most_rows(train: Train, objective: Objective, ranks: int | None = None) -> int:
    """The rows of the largest pass on any rank, of those here or of `ranks`. Raises UserError as `passes`."""
    cuts = passes(train, objective, ranks or dist.world())
    return max(rows.stop - rows.start for rank in cuts for rows in rank)


def memory(
    net: nn.Module, objective: Objective, path: Path, shape: tuple[int, ...], train: Train, rows: int
) -> dict[str, int]:
    """Bytes that training holds on each rank, by what they are, `rows` rows at a time; `total`: the most at once.

    `net` is an outline, which is left with gradients.
    """
    found = held(net, train)  # of averages as they begin, before weights are rounded to 16 bits
    activations = cost.activation_bytes(
        net, objective, path, shape, rows=rows, ref=train.ref, precision=train.precision
    )
    parts = {**found, "activations": activations}
    return {"rows": rows, **parts, "total": sum(parts.values())}


def gpus(memory: Mapping[str, int]) -> int | None:
    """On how many GPUs of 80 GiB to look for a layout (`dumo.plan.cluster`), a power of two; None: one holds all.

    What stays between passes then fills at most half of each, and the rest is for the passes: ours.
    """
    if memory["total"] <= GPU:
        return None
    return 2 ** max(0, ceil(log2((memory["total"] - memory["activations"]) / (GPU / 2))))


def held(net: nn.Module, train: Train) -> dict[str, int]:
    """Bytes that training holds between passes, by what they are, where each rank holds all; `net` as in `memory`."""
    state = begin(net, train)
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


def copied(net: nn.Module, held: Mapping[str, int], ranks: int = 1) -> dict[str, int]:
    """Bytes of a checkpoint, and of the copy of it that each rank keeps in host memory (`dumo.training.saver`).

    `net` is an outline, `held` of it.
    """
    whole = held["weights"] + held["optimizer"] + held["averages"] - size(frozen_weights(net).values())
    return {"bytes": whole, "copy": ceil(whole / ranks)}


def cache(data: Latents, images: int | None) -> dict[str, int | None]:
    """Bytes that `dumo encode` writes for an image, as it is without options, and for all, if their number is known."""
    fields = Plan.model_fields
    moments = data.codec.gaussian and fields["store"].default == "moments"
    numbers = prod(data.shape) * (2 if moments else 1) * (2 if data.images.flip else 1)
    each: int = numbers * getattr(torch, fields["dtype"].default).itemsize
    return {"images": images, "bytes_per_image": each, "bytes": images and images * each}


def rows_of_text(texts: Embedded, data: Data) -> dict[str, Any]:
    """Bytes of the rows of a caption at most, and of all, if their number is known.

    `live`: they are encoded in training, by `encoders` of these bytes; of more than `most` captions they would be.
    """
    count, own = data.classes or None, texts if isinstance(texts, PipelineTexts) else None
    edits = own is not None and own.row.edits
    source = data.shape if edits else ()
    each = texts.bytes(0, source)
    return {
        "captions": count,
        "bytes_per_caption": each,
        "bytes": count and texts.bytes(count, source),
        "live": texts.live(data.classes),
        "most": None if own is None or edits else max(0, int(own.budget * GB / each) - 1),
        "encoders": own and own.encoders,
    }


def of_encoders(net: Net, captions: int) -> int:
    """Bytes of the encoders that each rank holds where it encodes this number of captions in training; 0: not known."""
    texts = net.texts
    return texts.encoders or 0 if isinstance(texts, PipelineTexts) and texts.live(captions) else 0


def missing_data(data: Data) -> str | None:
    """Why training could not begin here, as far as the data's place shows; None if it could."""
    root: str | None = getattr(data, "root", None)
    if root is None:
        return None
    try:
        path = user_path(root, "data.root")
        if isinstance(data, Latents):
            data.cache()  # whose rows are read when they are taken
    except UserError as error:
        return "; ".join(line.strip() for line in str(error).splitlines())
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


def lines(facts: Mapping[str, Any], *, alone: bool = True) -> Iterator[Line]:
    """What a plan says; of work and memory where one process trains `alone`, else `ranked` does."""
    train, memory = facts["spec"]["train"], facts["memory"]
    fixed = facts["parameters_total"] - facts["parameters"]
    part = facts["parameters_trained"]
    trained = f", {part / 1e6:,.3f} M trained" if part < facts["parameters"] else ""
    tables = f", {fixed / 1e6:,.3f} M fixed" if fixed else ""
    yield "parameters", f"{facts['parameters'] / 1e6:,.3f} M{trained}{tables}"
    yield "inputs", shapes(facts["inputs"])
    if (side := facts["side"]) and side != (here := facts["pixels"][1]):
        yield "size", f"{here} x {here} pixels; the pipeline's default is {side} x {side}"
    yield "outputs", shapes(facts["heads"]) + (f"; {facts['tokens']} tokens" if facts["tokens"] else "")
    yield "one pass", f"{facts['forward_flops_per_image'] / 2e9:,.4g} G multiply-adds per sample"
    way = facts["slope"]
    yield "one step", f"{facts['forward_units_per_step']:.2f} F" + (f"; slope dual, {way['text']}" if way else "")
    if sizes := facts["buckets"]:
        each = ", ".join(f"{width} x {height}" for height, width in sizes)
        yield "buckets", f"{each}; all else is counted for the square; dumo doctor says what they cut off"
    epochs = f", {number(facts['epochs'])} epochs" if facts["epochs"] else ""
    yield "in all", f"{train['steps']:,} steps of {train['batch']:,}: {facts['images']:,} images{epochs}"
    parts = ", ".join(f"{name} {memory[name] / GB:.2f}" for name in memory if name not in ("rows", "total"))
    if alone:
        yield "work", f"{number(facts['flops'] / 1e15)} PFLOP, two to a multiply-add"
        yield "memory", f"{memory['total'] / GB:.2f} GB at most, {memory['rows']} rows at a time: {parts}"
        yield "checkpoints", f"{facts['checkpoint']['bytes'] / GB:.2f} GB each, copied in host memory to be written"
    if judged := facts["validation"]:
        passes = "1 pass" if judged["nfe"] == 1 else f"{judged['nfe']} passes"
        what = f"{judged['samples']:,} samples in {passes} every {judged['every']:,} steps"
        yield "validation", f"{what}: {judged['share']:.2%} more work, decoding and features not counted"
    if cache := facts["cache"]:
        whole = f", {cache['bytes'] / GB:,.1f} GB of {cache['images']:,} images" if cache["bytes"] else ""
        yield "cache", f"{cache['bytes_per_image'] / 1e3:,.1f} kB an image{whole}"
    if texts := facts["texts"]:
        whole = f", {texts['bytes'] / GB:,.1f} GB of {texts['captions']:,} captions" if texts["bytes"] else ""
        size = f" of {texts['encoders'] / GB:,.1f} GB" if texts["encoders"] else ""
        live = f"encoders{size} run in training"
        how = f"more than net.texts.budget, so {live}" if texts["live"] else "in a table"
        if texts["most"] is not None and not texts["live"]:
            how += f"; above {texts['most']:,} captions (net.texts.budget) {live}"
        yield "texts", f"{texts['bytes_per_caption'] / 1e3:,.1f} kB a caption at most{whole}: {how}"
    yield "data", facts["missing_data"] or "there"


def ranked(plan: Mapping[str, Any], keep: int) -> Iterator[Line]:
    """What a plan for ranks says."""
    ranks, share, rows = plan["ranks"], plan["share"], f"{plan['rows']} rows at a time"
    lie = "each with all weights" if share == 1 else f"{share} with a copy of the weights between them"
    back = ", given back after each pass" if plan["reshard"] and share > 1 else ""
    passes = "" if plan["passes"] == 1 else f", in {plan['passes']} passes a step"
    yield "ranks", "1" if ranks == 1 else f"{ranks}, {lie}{back}"
    memory = plan["memory"]
    parts = ", ".join(f"{name} {sized(size, 1024)}" for name, size in memory.items() if size and name != "peak")
    yield "each holds", f"{sized(memory['peak'], 1024)} at most, {rows}{passes}: {parts}"
    sent = (f"{name} {sized(one['bytes'])} in {one['calls']} calls" for name, one in plan["sent"].items())
    yield "each step sends", ", ".join(sent) or "nothing"
    size = plan["checkpoint"]
    disk = f"{sized(size['bytes'])} each; {sized(size['most'])} for {keep} and one being written"
    yield "checkpoints", f"{disk}; {sized(size['copy'], 1024)} of host memory each, the copy that is written"
    each = f"{number(plan['flops'] / 1e15)} PFLOP, two to a multiply-add, at {plan['units']:.2f} F a step"
    yield "work", each + ("" if plan["hours"] else "; hours need --tflops, what a GPU makes of its peak")
    if plan["hours"]:
        gpus = "1 GPU" if ranks == 1 else f"{ranks} GPUs, each"
        yield "hours", f"{number(plan['hours'])} on {gpus} of {number(plan['tflops'])} TFLOP/s"


def rehearsed(step: Mapping[str, Any], batch: int) -> Iterator[Line]:
    """What a rehearsal found."""
    yield "rehearsed", f"one step of {step['rows']} rows of random numbers, on {step['machine']}"
    yield "slope here", step["examination"]
    took = f"{step['pass_seconds']:.3g} s for these rows, {step['update_seconds']:.3g} s to update"
    yield "took", f"{took}; loss {step['loss']:.4g}, gradient norm {step['grad_norm']:.4g}"
    passes = "1 pass" if step["sample_nfe"] == 1 else f"{step['sample_nfe']} passes"
    yield "a sample", f"{step['sample_seconds']:.3g} s in {passes}, not decoded"
    yield "peak", f"{step['peak_bytes'] / GB:.2f} GB with {step['rows']} rows at a time"
    yield "a batch", f"{number(step['step_seconds'])} s for {batch:,}: {number(step['images_per_second'])} images/s"
    off = f"; for a better guess take a multiple of {step['whole']} rows" if step["rows"] % step["whole"] else ""
    yield "the run", f"{number(step['hours'])} hours on this device alone{off}"


def shapes(named: Mapping[str, list[int]]) -> str:
    """'x 4x32x32, t': shapes of a row; a single number has none."""
    return ", ".join(" ".join([name, "x".join(map(str, shape))]).strip() for name, shape in named.items())
