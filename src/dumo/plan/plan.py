"""What a run is and takes, counted on meta models: sizes, work, memory, images; as facts and as lines.

`show` counts what a run is (`RunFacts`), `plan` that and what it takes; both are what --json prints. `lines`,
`rank_lines` and `rehearsal_lines` say facts in lines: of a plan, of a plan for ranks (`dumo.plan.cluster`), and of a
rehearsal (`dumo.plan.rehearsal`). `most_rows`, `text_bytes`, `validation` and `far_share` are single facts that
others need.

Of memory (`dumo.run.memory`) the sum is an upper bound: weights, gradients, optimizer and averages stay, and on top
comes the most that one piece of a batch needs at one time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import ceil, log2, prod
from typing import Any

import torch
from torch import nn

from dumo.config.spec import Run
from dumo.data import Data, Latents
from dumo.data.cache import CachePlan, is_finished, read_index
from dumo.evaluation.reference import IMAGENET_TRAIN_IMAGES, Standard
from dumo.io.read import user_path
from dumo.nets import Net, Pretrained
from dumo.nets.lowbit import num_unstored_weights
from dumo.nets.table import EmbeddedTexts, PipelineTexts
from dumo.plan.host import host_bytes
from dumo.run import cost, memory
from dumo.run.net import num_parameters, outline
from dumo.runtime import dist
from dumo.runtime.limits import GIGABYTE
from dumo.runtime.random import stream
from dumo.runtime.text import bytes_text, minutes_text, nfe_text, number_text
from dumo.training.deadline import SECONDS_PER_MINUTE
from dumo.training.spec import Train
from dumo.training.step import split_into_passes
from dumo.types import Objective, UserError

_GPU_BYTES = 80 * 2**30  # of an A100 or H100
FAR = 0.9  # t - r of rows where one-step sampling is taught: ours
_FAR_DRAWS = 1_000_000  # of times, to measure the share of such rows: ours
Line = tuple[str, str]  # a name, and a text


@dataclass(frozen=True)
class RunFacts:
    """What a run is before it is run: its spec, its size, and what a step costs and teaches.

    `dumo show --json` prints the fields.
    """

    spec: dict[str, Any]  # the run as plain values
    parameters: int
    parameters_trained: int
    forward_flops_per_image: float  # the floating-point operations of a pass, for an image or a point
    forward_units_per_step: float  # the floating-point operations of a step over those of a pass
    slope: dict[str, Any] | None  # how a dual slope takes its derivative: `Way`, and its `text`; None of other slopes
    far: float | None  # P(t - r > 0.9), the rows where one-step sampling is taught; None where no jump is taught
    guidance_scale: float  # the effective one in training; 1 for none


def show(run: Run) -> RunFacts:
    """Count what a run is, on its outline."""
    net = outline(run)
    return _run_facts(run, net, _step_cost(run, net))


def _step_cost(run: Run, net: nn.Module) -> cost.StepCost:
    """What a step of a run costs, counted on `net`, its outline."""
    return cost.step_cost(net, run.objective, run.path, run.data.shape, ref=run.train.ref)


def _run_facts(run: Run, net: nn.Module, step_cost: cost.StepCost) -> RunFacts:
    """What `show` says, of a run whose outline is `net`, and whose step costs `step_cost`."""
    learns_jumps = run.reads.endpoint or run.reads.flow_map
    way = step_cost.way
    return RunFacts(
        spec=run.model_dump(mode="json", exclude=None if run.resolved else {"resolved"}),
        parameters=num_parameters(net),
        parameters_trained=sum(p.numel() for p in net.parameters() if p.requires_grad),
        forward_flops_per_image=step_cost.pass_flops,
        forward_units_per_step=step_cost.units,
        slope=None if way is None else {**way._asdict(), "text": way.text},
        far=far_share(run.objective) if learns_jumps else None,
        guidance_scale=run.training_guidance.scale,
    )


def far_share(objective: Objective) -> float:
    """P(t - r > 0.9), measured on a million draws: the share of the rows where one-step sampling is taught."""
    t, r = objective.times(_FAR_DRAWS, stream("show"))
    return (t - r > FAR).double().mean().item()


def plan(spec: Run) -> dict[str, Any]:
    """The fields of `RunFacts`, and shapes, bytes, work, images, and whether the data are there.

    - `parameters_total`: with fixed tables
    - `inputs`, `heads`: shapes of a row, by name
    - `flops`, `images`: of the whole run
    - `side`: pixels of a side of the pipeline's default image; None of other nets
    - `gpus`: on how many GPUs to look for a layout; None where one holds all
    - `missing_data`: why training could not begin; None where it could
    """
    net = outline(spec)
    shape = spec.data.shape
    needs = spec.objective.needs
    train = spec.train
    step_cost = _step_cost(spec, net)
    run_facts = _run_facts(spec, net, step_cost)
    images = train.steps * train.batch
    missing = missing_data(spec.data)

    inputs: dict[str, list[int]] = {"x": list(shape), "c": []}
    for name in needs.names:
        inputs[name] = []
    head_names = (*needs.heads, *needs.gauges)
    heads = {name: list(head_shape) for name, head_shape in zip(head_names, step_cost.heads, strict=False)}

    rows = most_rows(train, spec.objective)
    training = memory.training_bytes(net, spec.objective, spec.path, shape, train, rows)
    total = training.total
    parts = training.parts
    bytes_by_text_part = text_bytes(spec.net, spec.data.classes)
    parts |= bytes_by_text_part
    total += sum(bytes_by_text_part.values())
    checkpoint = memory.checkpoint_bytes(net, training.held)
    bytes_by_device = host_bytes(
        net,
        train,
        ranks=1,
        held=training.held,
        checkpoint_copy=checkpoint.host_copy_per_rank,
        step=total,
        has_slope=needs.slope is not None,
    )

    epoch = _images_per_epoch(spec, has_data=missing is None)
    side = None
    if isinstance(spec.net, Pretrained):
        side = spec.net.side or None
    return {
        **asdict(run_facts),
        "parameters_total": sum(value.numel() for value in net.state_dict().values()) + num_unstored_weights(net),
        "pixels": list(spec.shown_shape),
        "inputs": inputs,
        "heads": heads,
        "tokens": getattr(net, "grid", 0) ** 2 or None,
        "memory": {"rows": rows, **parts, "total": total},
        "host": bytes_by_device,
        "side": side,
        "gpus": _num_gpus(total, training.activations),
        "checkpoint": {"bytes": checkpoint.on_disk, "copy": checkpoint.host_copy_per_rank},
        "images": images,
        "epochs": images / epoch if epoch else None,
        "flops": run_facts.forward_units_per_step * run_facts.forward_flops_per_image * images,
        "validation": validation(spec, run_facts.forward_units_per_step),
        "buckets": [list(size) for size in getattr(spec.shown_data, "sizes", ())],
        "cache": cache_bytes(spec.data, epoch) if isinstance(spec.data, Latents) else None,
        "texts": _text_rows(spec.net.texts, spec.data) if isinstance(spec.net.texts, EmbeddedTexts) else None,
        "missing_data": missing,
    }


def _images_per_epoch(run: Run, *, has_data: bool) -> int | None:
    """The number of images in the training data, by their cache, else by the protocol's standard; None: not known."""
    if isinstance(run.data, Latents) and has_data:
        contents = read_index(run.data.folder)
        if contents is not None:
            return contents.rows
    standard: Standard | None = getattr(run.evaluate.protocol, "standard", None)  # a set of images by its name
    if standard is None:
        return None
    return IMAGENET_TRAIN_IMAGES if standard.url else standard.reference_images


def validation(run: Run, units: float | None = None) -> dict[str, Any] | None:
    """How a run is judged while it trains; None where it is not.

    `share` is the operations of its samples over those of its steps; features and decoders are not counted. `units` are
    the forward units of a step, if they are known already.
    """
    every = run.evaluate.every
    if not every:
        return None
    if units is None:
        units = cost.forward_units(outline(run), run.objective, run.path, run.data.shape, ref=run.train.ref)
    evaluation = run.evaluate.validation
    samples = evaluation.protocol.total
    nfe = evaluation.nfe[0]
    passes = samples * nfe
    if run.sample.guide.active:
        passes *= 2
    share = passes / (every * run.train.batch * units)
    return {"every": every, "samples": samples, "nfe": nfe, "share": share}


def most_rows(train: Train, objective: Objective, ranks: int | None = None) -> int:
    """The rows of the largest pass on any rank, of `ranks`; None: of those that there are.

    Raises UserError where the batch cannot be divided among them.
    """
    passes_by_rank = split_into_passes(train, objective, ranks or dist.world())
    return max(rows.stop - rows.start for rank_passes in passes_by_rank for rows in rank_passes)


def _num_gpus(total: int, activations: int) -> int | None:
    """The number of GPUs of 80 GiB on which to look for a layout (`dumo.plan.cluster`); None: one holds all.

    It is the least power of two by which what stays between passes fills at most half of each: ours. `total` and
    `activations` are bytes of a step on one GPU.
    """
    if total <= _GPU_BYTES:
        return None
    between_passes = total - activations
    return 2 ** max(0, ceil(log2(between_passes / (_GPU_BYTES / 2))))


def cache_bytes(data: Latents, images: int | None) -> dict[str, int | None]:
    """The bytes that `dumo encode` writes, without options, for an image, and for all `images`; None: not known."""
    fields = CachePlan.model_fields
    dtype: torch.dtype = getattr(torch, fields["dtype"].default)
    values = prod(data.shape)
    if data.codec.is_gaussian and fields["store"].default == "moments":
        values *= 2  # two moments of each
    if data.images.flip:
        values *= 2  # the mirror image, too
    bytes_per_image = values * dtype.itemsize
    total = None if images is None else images * bytes_per_image
    return {"images": images, "bytes_per_image": bytes_per_image, "bytes": total}


def _text_rows(texts: EmbeddedTexts, data: Data) -> dict[str, Any]:
    """The bytes that texts take.

    - `bytes_per_caption`: of the rows of a caption, at most; `bytes`: of all `captions`, if their number is known
    - `live`: whether they are encoded in training, by `encoders` of these bytes
    - `most`: the number of captions above which they would be; None: they never would
    """
    captions = data.classes or None
    pipeline_texts = texts if isinstance(texts, PipelineTexts) else None
    edits_images = pipeline_texts is not None and pipeline_texts.family.edits_images
    source = data.shape if edits_images else ()
    bytes_per_caption = texts.memory_bytes(0, source)
    most = None
    if pipeline_texts is not None and not edits_images:
        most = max(0, int(pipeline_texts.budget * GIGABYTE / bytes_per_caption) - 1)
    return {
        "captions": captions,
        "bytes_per_caption": bytes_per_caption,
        "bytes": None if captions is None else texts.memory_bytes(captions, source),
        "live": texts.is_online(data.classes),
        "most": most,
        "encoders": None if pipeline_texts is None else pipeline_texts.encoder_bytes,
    }


def text_bytes(net: Net, captions: int) -> dict[str, int]:
    """The bytes that texts take on each rank and the net's outline does not have, by part; without parts of 0.

    - `encoders`: of the encoders, if this number of captions is encoded in training, and their size is known
    - `texts`: of rows on the device, at most, if the number of captions is not known yet, 0; else the outline has them
    """
    texts = net.texts
    parts: dict[str, int] = {}
    if isinstance(texts, PipelineTexts) and texts.is_online(captions) and texts.encoder_bytes:
        parts["encoders"] = texts.encoder_bytes
    if isinstance(texts, EmbeddedTexts) and not captions and not texts.is_mapped(captions):
        parts["texts"] = int(texts.memory * GIGABYTE)
    return parts


def missing_data(data: Data) -> str | None:
    """Why training could not begin here, as far as the place of the data shows; None where it could."""
    root: str | None = getattr(data, "root", None)
    if root is None:
        return None
    try:
        path = user_path(root, "data.root")
        if isinstance(data, Latents):
            if data.images.is_here and not is_finished(data.folder):
                return None  # training makes the cache
            data.cache()  # whose rows are read when they are taken
    except UserError as error:
        return "; ".join(line.strip() for line in str(error).splitlines())
    if not path.exists():
        return f"there is no {path}: set data.root"
    return None


def lines(facts: Mapping[str, Any], *, alone: bool = True) -> Iterator[Line]:
    """The facts of a plan as lines. Work and memory are among them where one process trains `alone`."""
    yield "parameters", _parameter_text(facts)
    yield "inputs", _shapes_text(facts["inputs"])
    default_side = facts["side"]
    if default_side:
        side = facts["pixels"][1]
        if side != default_side:
            yield "size", f"{side} x {side} pixels; the pipeline's default is {default_side} x {default_side}"
    outputs = _shapes_text(facts["heads"])
    if facts["tokens"]:
        outputs += f"; {facts['tokens']} tokens"
    yield "outputs", outputs
    yield "one pass", f"{facts['forward_flops_per_image'] / 2e9:,.4g} G multiply-adds per sample"
    step = f"{facts['forward_units_per_step']:.2f} F"
    if facts["slope"]:
        step += f"; slope dual, {facts['slope']['text']}"
    yield "one step", step
    if facts["buckets"]:
        sizes = ", ".join(f"{width} x {height}" for height, width in facts["buckets"])
        yield "buckets", f"{sizes}; all else is counted for the square; dumo doctor says what they cut off"
    train = facts["spec"]["train"]
    images = f"{train['steps']:,} steps of {train['batch']:,}: {facts['images']:,} images"
    if facts["epochs"]:
        images += f", {number_text(facts['epochs'])} epochs"
    minutes = train.get("minutes")
    if minutes is not None:
        images = f"{minutes_text(minutes)}, then it ends; guessed are {images}"
    yield "in all", images
    if alone:
        held_bytes = facts["memory"]
        part_names = [name for name in held_bytes if name not in ("rows", "total")]
        parts = ", ".join(f"{name} {held_bytes[name] / GIGABYTE:.2f}" for name in part_names)
        yield "work", f"{number_text(facts['flops'] / 1e15)} PFLOP, two to a multiply-add"
        yield "memory", f"{held_bytes['total'] / GIGABYTE:.2f} GB at most, {held_bytes['rows']} rows at a time: {parts}"
        checkpoint_gigabytes = facts["checkpoint"]["bytes"] / GIGABYTE
        yield "checkpoints", f"{checkpoint_gigabytes:.2f} GB each, copied in host memory to be written"
    judged = facts["validation"]
    if judged:
        samples = f"{judged['samples']:,} samples in {nfe_text(judged['nfe'])} every {judged['every']:,} steps"
        yield "validation", f"{samples}: {judged['share']:.2%} more work, decoding and features not counted"
    cached = facts["cache"]
    if cached:
        storage = f"{cached['bytes_per_image'] / 1e3:,.1f} kB an image"
        if cached["bytes"]:
            storage += f", {cached['bytes'] / GIGABYTE:,.1f} GB of {cached['images']:,} images"
        yield "cache", storage
    if facts["texts"]:
        yield "texts", _caption_text(facts["texts"])
    yield "data", facts["missing_data"] or "there"


def _parameter_text(facts: Mapping[str, Any]) -> str:
    """The parameters of a net in millions, those that are trained if not all are, and fixed tables if there are any."""
    parameters = facts["parameters"]
    trained = facts["parameters_trained"]
    fixed = facts["parameters_total"] - parameters
    text = f"{parameters / 1e6:,.3f} M"
    if trained < parameters:
        text += f", {trained / 1e6:,.3f} M trained"
    if fixed:
        text += f", {fixed / 1e6:,.3f} M fixed"
    return text


def _caption_text(texts: Mapping[str, Any]) -> str:
    """What the rows of captions take, and whether a table holds them, or encoders make them in training."""
    text = f"{texts['bytes_per_caption'] / 1e3:,.1f} kB a caption at most"
    if texts["bytes"]:
        text += f", {texts['bytes'] / GIGABYTE:,.1f} GB of {texts['captions']:,} captions"
    encoders = "encoders"
    if texts["encoders"]:
        encoders += f" of {texts['encoders'] / GIGABYTE:,.1f} GB"
    if texts["live"]:
        return f"{text}: more than net.texts.budget, so {encoders} run in training"
    text += ": in a table"
    if texts["most"] is not None:
        text += f"; above {texts['most']:,} captions (net.texts.budget) {encoders} run in training"
    return text


def rank_lines(facts: Mapping[str, Any], keep: int) -> Iterator[Line]:
    """The facts of a plan for ranks as lines. `keep` is the number of checkpoints that are kept."""
    ranks = facts["ranks"]
    share = facts["share"]
    if ranks == 1:
        layout = "1"
    elif share == 1:
        layout = f"{ranks}, each with all weights"
    else:
        layout = f"{ranks}, {share} with a copy of the weights between them"
        if facts["reshard"]:
            layout += ", given back after each pass"
    yield "ranks", layout
    sizes = facts["memory"]
    parts = ", ".join(f"{name} {bytes_text(size, 1024)}" for name, size in sizes.items() if size and name != "peak")
    rows = f"{facts['rows']} rows at a time"
    if facts["passes"] != 1:
        rows += f", in {facts['passes']} passes a step"
    yield "each holds", f"{bytes_text(sizes['peak'], 1024)} at most, {rows}: {parts}"
    sent = [
        f"{name} {bytes_text(traffic['bytes'])} in {traffic['calls']} calls" for name, traffic in facts["sent"].items()
    ]
    yield "each step sends", ", ".join(sent) or "nothing"
    checkpoint = facts["checkpoint"]
    disk = f"{bytes_text(checkpoint['bytes'])} each; {bytes_text(checkpoint['most'])} for {keep} and one being written"
    copy = f"{bytes_text(checkpoint['copy'], 1024)} of host memory each, the copy that is written"
    yield "checkpoints", f"{disk}; {copy}"
    work = f"{number_text(facts['flops'] / 1e15)} PFLOP, two to a multiply-add, at {facts['units']:.2f} F a step"
    if not facts["hours"]:
        yield "work", f"{work}; hours need --tflops, what a GPU makes of its peak"
        return
    yield "work", work
    gpus = "1 GPU" if ranks == 1 else f"{ranks} GPUs, each"
    yield "hours", f"{number_text(facts['hours'])} on {gpus} of {number_text(facts['tflops'])} TFLOP/s"


def rehearsal_lines(step: Mapping[str, Any], train: Train) -> Iterator[Line]:
    """The facts `step` of a rehearsal as lines. `train` is the run's own."""
    yield "rehearsed", f"one step of {step['rows']} rows of random numbers, on {step['machine']}"
    yield "slope here", step["examination"]
    seconds = f"{step['pass_seconds']:.3g} s for these rows, {step['update_seconds']:.3g} s to update"
    yield "took", f"{seconds}; loss {step['loss']:.4g}, gradient norm {step['grad_norm']:.4g}"
    yield "a sample", f"{step['sample_seconds']:.3g} s in {nfe_text(step['sample_nfe'])}, not decoded"
    yield "peak", f"{step['peak_bytes'] / GIGABYTE:.2f} GB with {step['rows']} rows at a time"
    yield (
        "a batch",
        f"{number_text(step['step_seconds'])} s for {train.batch:,}: {number_text(step['images_per_second'])} images/s",
    )
    if train.minutes is None:
        length = f"{number_text(step['hours'])} hours on this device alone"
    else:
        steps = SECONDS_PER_MINUTE * train.minutes / step["step_seconds"]
        length = f"{minutes_text(train.minutes)}, then it ends: at most {steps:,.0f} steps on this device alone"
    if step["rows"] % step["whole"]:
        length += f"; for a better guess take a multiple of {step['whole']} rows"
    yield "the run", length


def _shapes_text(named: Mapping[str, list[int]]) -> str:
    """Shapes by name as text, such as 'x 4x32x32, t': a single number has no shape."""
    texts: list[str] = []
    for name, shape in named.items():
        sides = "x".join(map(str, shape))
        texts.append(f"{name} {sides}" if shape else name)
    return ", ".join(texts)
