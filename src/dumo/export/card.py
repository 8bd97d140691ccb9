"""The model card beside an export, README.md: how to call it, what made it, and what it measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dumo.data import Latents
from dumo.export import scheduler
from dumo.export.model import Exported
from dumo.export.stock import Stock, at
from dumo.flow.cfg import CFG, GuidanceScale
from dumo.run.evaluation.card import FILE, read_report
from dumo.run.folder import RunFolder
from dumo.runtime import version
from dumo.types import UserError

HEAD = """---
library_name: diffusers
pipeline_tag: {tag}
tags: [dumo, few-step]
---
"""
PROMPT = '"a red fox in the snow"'
SEED = "torch.manual_seed(0)  # the noise between two passes is torch's own: generator= does not reach it"
RENOISES = (
    "The scheduler adds fresh noise between two passes. With plain Euler steps two passes are wrong, without an error."
)
SHORT = (
    "The .py files in the folder are all the code that it brings. They are short, and need torch and diffusers alone."
)
CODED = "codes.safetensors"
CODES = (
    f"It was tuned on classes that have codes, not on texts. In the place of a prompt it takes a row of `{CODED}`, one "
    "for each class and the last for none."
)
LATENT = (
    "The model came without the other parts of a pipeline, so `image` is what it makes, a tensor, packed where the "
    "pipeline packs: decode it where the run's data are latents."
)
PASSES = (1, 2)


def of_pipeline(exported: Exported, stock: Stock, index: Mapping[str, Any], name: str) -> str:
    """Of a folder called `name` that `from_pretrained` opens, or of its two parts that replace another pipeline's."""
    own, there = index["scheduler"] == scheduler.OWN, [key for key, entry in index.items() if isinstance(entry, list)]
    lines = ["import torch", "from diffusers import DiffusionPipeline", ""]
    if exported.codes and exported.source is None:
        lines[1] = f"from diffusers import {stock.pipeline}"
        parts = ", ".join(f"{part}=None" for part in stock.parts)
        lines += [
            f'pipe = {stock.pipeline}.from_pretrained("{name}", {parts}{", trust_remote_code=True" if own else ""})'
        ]
    elif len(there) > 2:
        lines.append(f'pipe = DiffusionPipeline.from_pretrained("{name}"{", trust_remote_code=True" if own else ""})')
    else:
        lines[1] += f", {exported.kind}" + ("" if own else ", FlowMatchEulerDiscreteScheduler")
        lines[1:1] = (
            ["import sys", f'sys.path.append("{name}/scheduler")', "from jumps import JumpScheduler"] if own else []
        )
        lines += [
            f'model = {exported.kind}.from_pretrained("{name}", subfolder="transformer")',
            f'scheduler = {index["scheduler"][1]}.from_pretrained("{name}", subfolder="scheduler")',
            f'pipe = DiffusionPipeline.from_pretrained("{origin(exported)}", transformer=model, scheduler=scheduler)',
        ]
    notes = ["`scheduler/jumps.py` has the times, for this pipeline is told none."] if own else []
    return tuned(exported, name, [*lines, *calls(exported, stock, name)], notes)


def of_lora(exported: Exported, stock: Stock, name: str) -> str:
    """Of a folder called `name` with a LoRA."""
    lines = ["import torch", "from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler", ""]
    lines += [f'pipe = DiffusionPipeline.from_pretrained("{origin(exported)}")', f'pipe.load_lora_weights("{name}")']
    if exported.head == "u":
        lines.append(
            f'pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained("{name}", subfolder="scheduler")'
        )
    notes = [
        "The LoRA holds the last layer and the embedding of time, too, and makes another function of the model: it "
        "counts whole or not at all: no `cross_attention_kwargs` scale between 0 and 1, and no second LoRA of "
        "this kind beside it."
    ]
    return tuned(exported, name, [*lines, *calls(exported, stock, name)], notes)


def calls(exported: Exported, stock: Stock, name: str) -> list[str]:
    """How the pipeline is called for an image."""
    scale, embedded = exported.opened.run.sample.guide.scale, exported.spec.guidance
    asked, first = (coded if exported.codes else prompted)(
        exported, stock, name, guided=scale != 1 and stock.off is not None
    )
    image = f"image = pipe({{}}).{stock.gives}[0]"
    if exported.head == "v":
        return [*first, image.format(", ".join(asked))]
    seed = [] if stock.seeded else [SEED]
    said = ["generator=torch.Generator().manual_seed(0)"] if stock.seeded else []
    lines = list[str]()
    for n, word in zip(PASSES, ("one pass", "two"), strict=True):
        told = stock.arguments(at(exported.solver, n), embedded=embedded, scale=scale)
        words = [*asked, *(f"{name}={value}" for name, value in told.items()), *said]
        lines.append(f"{image.format(', '.join(words))}  # {word}")
    return [*first, *seed, *lines]


def prompted(exported: Exported, stock: Stock, name: str, *, guided: bool) -> tuple[list[str], list[str]]:
    """What a pipeline is asked for an image of a prompt, and the lines before."""
    return [PROMPT], []


def coded(exported: Exported, stock: Stock, name: str, *, guided: bool) -> tuple[list[str], list[str]]:
    """The same for an image of a class that has a code; `guided`: away from the last row, that of none."""
    data, classes = exported.opened.run.data, exported.opened.run.data.classes
    rows = {"": "c", **({"negative_": "-1"} if guided else {})}
    told = ['"negative_prompt": None'] if guided else []
    for side, row in rows.items():
        tokens = f'[codes["tokens"][{row}]]' if stock.lists else f'codes["tokens"][[{row}]]'
        told.append(f'"{side}prompt_embeds": {tokens}')
        told += [f'"{side}pooled_prompt_embeds": codes["pooled"][[{row}]]'] if "pooled" in exported.codes else []
        told += [f'"{side}{stock.mask}": torch.ones(1, 1, dtype=torch.bool)'] if stock.mask else []
    pixels = data.codec.factor if isinstance(data, Latents) else stock.side
    height, width = (pixels * n for n in data.shape[1:])
    lines = [
        f'codes, c = load_file("{name}/{CODED}"), 0  # a class; there are {classes}',
        f"told = {{{', '.join(told)}}}",
    ]
    alone = [] if exported.source else ['output_type="latent"']
    return ["**told", f"height={height}", f"width={width}", *stock.more, *alone], lines


def tuned(exported: Exported, name: str, lines: list[str], notes: list[str]) -> str:
    """A card of a tuned model, with what all of them are told."""
    notes = [*[RENOISES] * (exported.head == "u"), *notes, *[CODES] * bool(exported.codes)]
    notes += [LATENT] * bool(exported.codes and exported.source is None)
    if exported.codes:
        lines.insert(lines.index(""), "from safetensors.torch import load_file")
    return page(exported.opened, name, lines, notes, made(exported))


def of_own(opened: RunFolder, name: str, head: str) -> str:
    """Of a folder called `name` with a net of dumo's own, and the code that runs it."""
    classes, net, drop = opened.run.data.classes, opened.run.net.kind, opened.run.objective.drop
    lines = ["import torch", "from diffusers import DiffusionPipeline", ""]
    lines += [f'pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)']
    for n, word in zip(PASSES, ("one pass", "two"), strict=True) if head == "u" else [(50, "Euler steps")]:
        told = f"class_labels={[0, classes // 2]}, num_inference_steps={n}, generator=torch.Generator().manual_seed(0)"
        lines.append(f"images = pipe({told}).images  # {word}")
    labels = f"0 to {classes - 1}" + f", and {classes} for none" * (drop > 0) if classes else "0: there are no classes"
    rows = {"net": f"{net}, {sum(p.numel() for p in opened.net.parameters()):,} parameters", "labels": labels}
    return page(opened, name, lines, [SHORT], recipe(opened, head, rows), "unconditional-image-generation")


def page(
    opened: RunFolder, name: str, lines: list[str], notes: list[str], table: str, tag: str = "text-to-image"
) -> str:
    """A card, for what the hub calls `tag`."""
    parts = [f"{HEAD.format(tag=tag)}\n# {name}", "```py\n" + "\n".join(lines) + "\n```", *notes]
    parts += ["## How it was made", table]
    found = measured(opened)
    return "\n\n".join([*parts, *(["## What it measured", found] if found else [])]) + "\n"


def made(exported: Exported) -> str:
    """The recipe of a tuned model, in lines."""
    spec = exported.spec
    part = "all weights" if spec.lora is None else f"LoRA of rank {spec.lora.rank}"
    lowpass = "as it was" if spec.lowpass is None else f"waves of up to {spec.lowpass:g} rad"
    rows = {"tuned from": f"{origin(exported)}, {exported.kind}, {part}", "embedding of time": lowpass}
    return recipe(exported.opened, exported.head, rows)


def recipe(opened: RunFolder, head: str, rows: Mapping[str, str]) -> str:
    """The recipe, in lines: `rows` of the net among them."""
    run = opened.run
    gives = "u, the flow map: a pass jumps to the data" if head == "u" else "v, the velocity of the flow"
    baked = GuidanceScale.of(run.objective.needs).scale
    taught = run.teacher.guide.scale if run.teacher else 1.0
    guided = [
        f"{scale:.3g} by {whose}" for scale, whose in ((baked, "its target"), (taught, "its teacher")) if scale != 1
    ]
    rows = {
        "recipe": run.about,
        **rows,
        "head": gives,
        "objective": f"{run.objective.kind}, {opened.step:,} steps of {run.train.batch} images",
        "guidance baked in": ", ".join(guided) or "none",
        "guidance when called": asked(run.sample.guide),
        "weights": f"{opened.weights}, SHA-256 {opened.sha256}",
        "made by": f"dumo {version()}",
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value)


def asked(guide: CFG) -> str:
    """What the run is sampled with; pipelines know no interval of times."""
    if not guide.active:
        return "none"
    low, high = guide.interval.low, guide.interval.high
    return f"{guide.scale:g}" + (
        "" if (low, high) == (0, 1) else f" in dumo at t from {low:g} to {high:g}, here at all"
    )


def measured(opened: RunFolder) -> str:
    """The run's evaluation, if it is of these weights; '' otherwise."""
    try:
        report = read_report(opened.folder / FILE)
    except UserError:
        return ""
    if report["card"].get("weights_sha256") != opened.sha256:
        return ""
    keys = [key for key in report["results"][0] if key not in ("nfe", "solver")]
    rows = [["passes", "solver", *keys]]
    rows += [[str(row["nfe"]), row["solver"], *(number(row.get(key)) for key in keys)] for row in report["results"]]
    table = [f"| {' | '.join(row)} |" for row in rows]
    table.insert(1, "|" + "---|" * len(rows[0]))
    about = f"Protocol `{report['protocol']}`, {report['card'].get('samples')} samples, by dumo."
    return "\n".join([about, "", *table])


def notes(exported: Exported) -> dict[str, str]:
    """What the header of a file of weights says of them."""
    return {
        "format": "pt",
        "class": exported.kind,
        "head": exported.head,
        "step": str(exported.opened.step),
        "weights_sha256": exported.opened.sha256,
        "dumo": version(),
    }


def origin(exported: Exported) -> str:
    """The name of what was tuned, without the folders above it."""
    return (exported.source or Path(exported.spec.source)).name


def number(value: float | None) -> str:
    """A score in a table."""
    return "" if value is None else f"{value:.3g}"
