"""The model card next to an export, README.md: how to call it, what made it, and what it measured."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, cast

import jinja2

from dumo.config.conditions import shown
from dumo.config.load import identity
from dumo.config.spec import Run
from dumo.config.word import method
from dumo.data import Data, Images, Latents
from dumo.data.pixel import Size
from dumo.encoders.pipeline import LICENSE
from dumo.export.model import Exported, Stock
from dumo.export.scheduler import EULER, LCM, OWN
from dumo.export.serve import is_whole, unserved
from dumo.flow.guide import GuidanceScale
from dumo.report.card import FILE, read_report
from dumo.run.resolve import as_given, without_path
from dumo.run.sampler import Sampler
from dumo.run.weights import RunFolder
from dumo.runtime import typed, version
from dumo.runtime.progress import inline
from dumo.types import UserError

PROMPT = "a red fox in the snow"
CODED = "codes.safetensors"
MARKDOWN = re.compile(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)")  # an underscore inside a word is one in Markdown, too
PASSES = {1: "one pass", 2: "two", 4: "four"}


@dataclass(frozen=True)
class Provenance:
    """What a card says of the run."""

    about: str
    step: int
    batch: int
    weights: str
    sha256: str
    baked: Mapping[str, float]  # scales of guidance in the weights, by what guided
    report: Mapping[str, Any] | None  # the evaluation of these weights
    run: Run
    version: str = version()

    @property
    def facts(self) -> dict[str, str]:
        """What an export says of its origin, for programs: the run with its places as they were given."""
        return {
            "dumo": self.version,
            "step": str(self.step),
            "weights": self.weights,
            "weights_sha256": self.sha256,
            "run": as_given(self.run).model_dump_json(),
            "run_sha256": identity(self.run),
        }

    @property
    def fewstep(self) -> str:
        """The name of the few-step run that it is on top of; empty: of none."""
        return Path(self.run.start.source).name if self.run.start and self.run.has_subject else ""

    @classmethod
    def of(cls, opened: RunFolder) -> "Provenance":
        """That of a run."""
        run = opened.run
        taught = run.teacher.guide.scale if run.teacher else 1.0
        scales = {"its target": GuidanceScale.of(run.objective.needs).scale, "its teacher": taught}
        try:
            report = read_report(opened.folder / FILE)
        except UserError:
            report = None
        if report and report["card"].get("weights_sha256") != opened.sha256:
            report = None
        baked = {what: scale for what, scale in scales.items() if scale != 1}
        file = without_path(opened.weights)
        return cls(run.about, opened.step, run.train.batch, file, opened.sha256, baked, report, run)


def of_tuned(
    exported: Exported, made: Provenance, stock: Stock, name: str, index: Mapping[str, Any] | None = None
) -> str:
    """Of a folder called `name` that `from_pretrained` opens, or of its two parts that replace another pipeline's.

    `index` is its model_index.json; None: it holds a LoRA.
    """
    if sizes := sizes_of(exported.sampler.data):
        exported = replace(exported, sampler=replace(exported.sampler, size=next(iter(sizes))))
    sampler, codes, parts = exported.sampler, exported.codes, index or {}
    scheduler = parts.get("scheduler", ["diffusers", LCM if exported.net.frame else EULER])
    return render(
        "tuned",
        sampler,
        made,
        name,
        sizes=sizes,
        exported=exported,
        stock=stock,
        codes=codes,
        calls=calls(exported, stock, words_of(exported, stock)),
        guided=sampler.spec.guide.scale != 1 and stock.off is not None,
        scheduler=scheduler[1],
        own=scheduler == OWN,
        whole=is_whole(parts),
        unserved=unserved(exported, whole=is_whole(parts)),
        lora=index is None,
        head=exported.head,
        tag="image-to-image" if stock.edits else "text-to-image",
        origin=origin_of(exported, adapter=index is None),
    )


def sizes_of(data: Data) -> dict[Size, int]:
    """How many images a run on buckets has of each size, most first; {} without buckets.

    Where the images are not there to be counted, it is 0 of every size, of the nearest to a square first.
    """
    images = shown(data)
    if not isinstance(images, Images) or not images.buckets:
        return {}
    assert isinstance(data, Images | Latents)
    try:
        crops = data.crops()
    except (UserError, OSError):
        crops = None
    if crops is None:
        return dict.fromkeys(sorted(images.sizes, key=lambda size: max(size) / min(size)), 0)
    return dict(sorted(crops.counts.items(), key=lambda entry: -entry[1]))


def origin_of(exported: Exported, *, adapter: bool) -> dict[str, str]:
    """What the head of a card says of the model that was tuned, as a hub reads it, in YAML."""
    pipeline, relation = exported.spec.pipeline, "adapter" if adapter else "finetune"
    known = {"base_model": pipeline.repository, "base_model_relation": relation} if pipeline.repository else {}
    facts = pipeline.facts or {}
    return {key: json.dumps(value) for key, value in (known | {k: facts[k] for k in LICENSE if k in facts}).items()}


def calls(exported: Exported, stock: Stock, words: list[str]) -> list[tuple[str, str]]:
    """What the pipeline is called with, after these words, and a note, call by call."""
    if exported.head == "v":
        return [(", ".join(words), "")]
    scale, embedded = exported.sampler.spec.guide.scale, exported.spec.guidance
    seed = ["generator=torch.Generator().manual_seed(0)"] if stock.seeded or exported.hops else []
    found: list[tuple[str, str]] = []
    for n, note in ({n: PASSES.get(n, str(n)) for n in exported.nfe} or PASSES).items():
        more = stock.arguments(exported.times(n), embedded=embedded, scale=scale)
        found.append((", ".join([*words, *(f"{key}={value}" for key, value in more.items()), *seed]), note))
    return found


def words_of(exported: Exported, stock: Stock) -> list[str]:
    """The words that ask for an image of a prompt, or of a class, at the size that the run has."""
    sampler = exported.sampler
    data, guided = sampler.data, sampler.spec.guide.scale != 1 and stock.off is not None
    pixels = data.codec.factor if isinstance(data, Latents) else stock.side
    height, width = (pixels * n for n in sampler.shape[1:])
    asks = (
        ["**embeds"] if exported.codes else [f'prompt="{PROMPT}"', *['negative_prompt=""'] * (guided and stock.named)]
    )
    alone = [] if exported.source else ['output_type="latent"']
    image = ["image=source", f"max_area={height * width}"] if stock.edits else []
    return [*image, *asks, f"height={height}", f"width={width}", *stock.more, *alone]


def of_own(sampler: Sampler, made: Provenance, kind: str, name: str, head: str) -> str:
    """Of a folder called `name` with a net of dumo's own, of this kind, and the code that runs it."""
    return render(
        "own",
        sampler,
        made,
        name,
        sizes=sizes_of(sampler.data),
        kind=kind,
        parameters=sum(p.numel() for p in sampler.net.parameters()),
        passes=PASSES if head == "u" else {50: "Euler steps"},
        head=head,
        tag="unconditional-image-generation",
        origin={},
    )


def render(template: str, sampler: Sampler, made: Provenance, name: str, **parts: object) -> str:
    """The card by a template."""
    rows = made.report["results"] if made.report else [{}]
    scores = [key for key in rows[0] if key not in ("nfe", "solver")]
    found = environment().get_template(f"{template}.md.j2")
    parts |= {"scores": scores, "codes_file": CODED, "method": method(sampler.flow.objective)}
    return found.render(sampler=sampler, made=made, name=name, **parts)


@cache
def environment() -> jinja2.Environment:
    """Where the templates are."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("dumo.export", "cards"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    cast(dict[str, Any], found.filters).update(form=format, plain=plain, code=code, literal=literal, typed=typed)
    return found


def plain(text: str) -> str:
    """What somebody wrote, as text in a cell of a table: neither HTML nor Markdown, which a page would show as such."""
    return MARKDOWN.sub(r"\\\g<0>", escape(inline(text), quote=False))


def code(text: str) -> str:
    """What somebody wrote, in a line of text, as code: between more backticks than it has in a row."""
    text = inline(text)
    inside = re.findall("`+", text)
    if not inside:
        return f"`{text}`"
    fence = "`" * (max(map(len, inside)) + 1)
    return f"{fence} {text} {fence}"


def literal(text: str) -> str:
    """A string of Python, by JSON's escapes. What is no Unicode is escaped, too, so that a file can hold it."""
    return json.dumps(text, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def notes(exported: Exported, made: Provenance) -> dict[str, str]:
    """What the header of a file of weights says of them."""
    return {
        "format": "pt",
        "class": exported.kind,
        "head": exported.head,
        "onto": f"the export of {made.fewstep}" if exported.alone else exported.origin,
        **made.facts,
        **{name: json.dumps(value) for name, value in exported.facts.items()},
    }
