"""What was counted and measured, to read: torch is not needed for that."""

from collections.abc import Iterator, Mapping
from typing import Any

from dumo.runtime.progress import number, sized

GB = 1e9
Line = tuple[str, str]  # what, and how much


def lines(facts: Mapping[str, Any], *, alone: bool = True) -> Iterator[Line]:
    """What a plan says; of work and memory where one process trains `alone`, else `ranked` does."""
    train, memory = facts["spec"]["train"], facts["memory"]
    fixed = facts["parameters_total"] - facts["parameters"]
    part = facts["parameters_trained"]
    trained = f", {part / 1e6:,.3f} M trained" if part < facts["parameters"] else ""
    tables = f", {fixed / 1e6:,.3f} M fixed" if fixed else ""
    yield "parameters", f"{facts['parameters'] / 1e6:,.3f} M{trained}{tables}"
    yield "inputs", shapes(facts["inputs"])
    yield "outputs", shapes(facts["heads"]) + (f"; {facts['tokens']} tokens" if facts["tokens"] else "")
    yield "one pass", f"{facts['forward_flops_per_image'] / 2e9:,.4g} G multiply-adds per sample"
    way = facts["slope"]
    yield "one step", f"{facts['forward_units_per_step']:.2f} F" + (f"; slope dual, {way['text']}" if way else "")
    epochs = f", {number(facts['epochs'])} epochs" if facts["epochs"] else ""
    yield "in all", f"{train['steps']:,} steps of {train['batch']:,}: {facts['images']:,} images{epochs}"
    parts = ", ".join(f"{name} {memory[name] / GB:.2f}" for name in memory if name not in ("rows", "total"))
    if alone:
        yield "work", f"{number(facts['flops'] / 1e15)} PFLOP, two to a multiply-add"
        yield "memory", f"{memory['total'] / GB:.2f} GB at most, {memory['rows']} rows at a time: {parts}"
    if cache := facts["cache"]:
        whole = f", {cache['bytes'] / GB:,.1f} GB of {cache['images']:,} images" if cache["bytes"] else ""
        yield "cache", f"{cache['bytes_per_image'] / 1e3:,.1f} kB an image{whole}"
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
    yield "checkpoints", f"{sized(size['bytes'])} each; {sized(size['most'])} for {keep} and one being written"
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
