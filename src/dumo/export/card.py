"""The model card next to an export, README.md: how to call it, what made it, and what it measured.

The entrances, in the order of use:

1. `Provenance.of` takes from an opened run what an export says of it: on its card, in dumo.json (`Provenance.facts`)
   and in the header of a file of weights (`header_metadata`).
2. `tuned_card` makes the text of the card of a pretrained model that was tuned, `own_card` that of a net of dumo's own.
   Each works out what its template in `cards` shows, and `_render` fills the template.

A user's texts are escaped by the templates' filters: `plain` (`_escape_markup`), `code` (`_as_code`) and `literal`
(`_python_literal`).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, cast

import jinja2

from dumo.config.conditions import shown_data
from dumo.config.difference import identity
from dumo.config.place import EVALUATION_FILE
from dumo.config.spec import Run
from dumo.config.word import method
from dumo.data import Data, Images, Latents
from dumo.data.caption import Templates
from dumo.data.pixel import Size
from dumo.encoders.pipeline import LICENSE
from dumo.export.model import ExportedModel
from dumo.export.scheduler import EULER, JUMP_SCHEDULER, LCM
from dumo.export.serve import has_other_parts, reason_not_servable
from dumo.export.stock import StockPipeline
from dumo.export.textencoder import ShippedTextEncoder
from dumo.flow.guide import GuidanceScale
from dumo.flow.solver import Euler, Hermite, Hop, Restart, can_make
from dumo.report.card import is_card_of, read_report
from dumo.run.resolve import as_given, without_path
from dumo.run.sampler import Sampler
from dumo.run.weights import RunFolder
from dumo.runtime import shell_path, version
from dumo.runtime.text import escape_line
from dumo.types import UserError

PROMPT = "a red fox in the snow"  # in the code of a card
CODES = "codes.safetensors"  # the file of the embeddings of classes, of a model that was tuned on them
FEW_STEPS = "few-steps"  # the folder of a few-step run's export, as docs/pretrained.md calls it
# what Markdown would read as marks; an underscore inside a word is none
_MARKDOWN = re.compile(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)")
_PASS_COMMENTS = {1: "one pass", 2: "two", 4: "four"}  # of the calls of a card, by their numbers of passes
_HEAD_TEXTS = {  # what is exported, by the solver that reads it
    "restart": "u, the flow map: a pass jumps to the data",
    "hop": "u, the flow map: a pass jumps to the next time",
    "hermite": "u, the flow map, and v: the last pass jumps to the data, others follow a parabola of both",
    "euler": "v, the velocity of the flow",
}


@dataclass(frozen=True)
class Provenance:
    """Which run, checkpoint and evaluation an export is of."""

    about: str  # the run in one line
    step: int
    batch: int  # images of a step
    weights: str  # the name of their file
    sha256: str  # of the weights
    baked: Mapping[str, float]  # scales of guidance in the weights, by what guided
    report: Mapping[str, Any] | None  # the evaluation of these weights
    run: Run
    version: str = version()  # of dumo

    @property
    def facts(self) -> dict[str, str]:
        """The origin of an export for programs, in dumo.json and a file's header; the run has its paths as typed."""
        return {
            "dumo": self.version,
            "step": str(self.step),
            "weights": self.weights,
            "weights_sha256": self.sha256,
            "run": as_given(self.run).model_dump_json(),
            "run_sha256": identity(self.run),
        }

    @property
    def few_step_name(self) -> str:
        """The name of the few-step run on top of which adapters were trained; "": there is none."""
        if self.run.start and self.run.has_subject:
            return Path(self.run.start.source).name
        return ""

    @classmethod
    def of(cls, opened: RunFolder) -> "Provenance":
        """Of an opened run. An evaluation of other weights, or of what is sampled otherwise now, is left out."""
        run = opened.run
        baked = dict[str, float]()
        target_scale = GuidanceScale.of(run.objective.needs).scale
        if target_scale != 1:
            baked["its target"] = target_scale
        if run.teacher and run.teacher.guide.scale != 1:
            baked["its teacher"] = run.teacher.guide.scale
        try:
            report = read_report(opened.folder / EVALUATION_FILE)
        except UserError:
            report = None
        if report and not is_card_of(report["card"], opened):
            report = None
        return cls(
            about=run.about,
            step=opened.step,
            batch=run.train.batch,
            weights=without_path(opened.weights),
            sha256=opened.sha256,
            baked=baked,
            report=report,
            run=run,
        )


def tuned_card(
    exported: ExportedModel,
    provenance: Provenance,
    stock: StockPipeline,
    name: str,
    index: Mapping[str, Any] | None = None,
) -> str:
    """The card of a pretrained model that was tuned: a folder called `name` that `from_pretrained` opens, or a LoRA.

    `index` is the folder's model_index.json; None: it holds a LoRA. A folder may have two parts alone, which replace
    another pipeline's.
    """
    sizes = _image_counts(exported.sampler.data)
    if sizes:
        most_frequent = next(iter(sizes))
        exported = replace(exported, sampler=replace(exported.sampler, size=most_frequent))
    sampler = exported.sampler
    parts = index or {}
    source_parts = [*stock.parts]
    if index is None and not exported.subject_only:  # else dumo wrote the model
        source_parts.append(exported.component_name)
    scheduler = parts.get("scheduler", ["diffusers", LCM if exported.net.diffusion else EULER])
    solver_kind = "restart"
    if exported.head == "v":
        solver_kind = "euler"
    elif exported.makes_hops:
        solver_kind = "hop"
    return _render(
        "tuned",
        sampler,
        provenance,
        name,
        sizes=sizes,
        exported=exported,
        stock=stock,
        codes=exported.class_embeddings,
        calls=_pipeline_calls(exported, stock),
        is_guided=_is_guided(stock, sampler),
        scheduler=scheduler[1],
        has_own_scheduler=scheduler == JUMP_SCHEDULER,
        absent_arguments="".join(f", {part}=None" for part in exported.spec.pipeline.absent_parts),
        few_steps_folder=FEW_STEPS,
        has_other_parts=has_other_parts(parts),
        variant=exported.weights_variant(source_parts),
        reason_not_servable=reason_not_servable(exported, parts),
        is_lora=index is None,
        head=exported.head,
        reads_velocity=exported.head == "v",
        head_text=_HEAD_TEXTS[solver_kind],
        tag="image-to-image" if stock.takes_image else "text-to-image",
        hub_metadata=license_metadata(exported.spec.pipeline.facts or {}),
    )


def _image_counts(data: Data) -> dict[Size, int]:
    """How many images a run on buckets has of each size, most first; {} without buckets.

    Where the images are not there to be counted, it is 0 of every size, of the nearest to a square first.
    """
    images = shown_data(data)
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


def license_metadata(facts: Mapping[str, str]) -> dict[str, str]:
    """The licence of a pipeline with these facts for the YAML head of a card, as a hub reads it, with values in JSON.

    A link to a file of the base's repository is left out, for the export does not have that file.
    """
    metadata = {key: json.dumps(facts[key]) for key in LICENSE if key in facts}
    if "://" not in facts.get("license_link", ""):
        metadata.pop("license_link", None)
    return metadata


def _is_guided(stock: StockPipeline, sampler: Sampler) -> bool:
    """Whether the pipeline's own argument guides the samples."""
    return sampler.spec.guide.scale != 1 and stock.guide_argument is not None


def _pipeline_calls(exported: ExportedModel, stock: StockPipeline) -> list[tuple[str, str]]:
    """The arguments of each call of the pipeline as text, and a comment on it."""
    condition = _image_arguments(exported, stock)
    embedded = exported.net.guidance
    scale = exported.sampler.spec.guide.scale
    if exported.head == "v":  # at the times of the pipeline's own
        guidance = stock.guidance_arguments(embedded=embedded, scale=scale)
        return [(", ".join([*condition, *_keywords(guidance)]), "")]
    calls: list[tuple[str, str]] = []
    reachable = [n for n in _PASS_COMMENTS if can_make(exported.solver, exported.sampler.taught, n)]
    for passes in exported.nfe or reachable:
        times = exported.pipeline_times(passes)
        arguments = [*condition, *_keywords(stock.arguments(times, embedded=embedded, scale=scale))]
        if stock.seeds_scheduler or exported.makes_hops:
            arguments.append("generator=torch.Generator().manual_seed(0)")
        calls.append((", ".join(arguments), _PASS_COMMENTS.get(passes, str(passes))))
    return calls


def _keywords(arguments: Mapping[str, Any]) -> list[str]:
    """The keyword arguments of a call as text."""
    return [f"{name}={value}" for name, value in arguments.items()]


def _image_arguments(exported: ExportedModel, stock: StockPipeline) -> list[str]:
    """The arguments that ask for an image of a prompt, or of a class, at the size that the run has."""
    sampler = exported.sampler
    pixels = sampler.data.codec.factor if isinstance(sampler.data, Latents) else stock.pixels_per_latent
    height, width = (pixels * n for n in sampler.shape[1:])
    arguments = list[str]()
    if stock.takes_image:
        arguments += ["image=source", f"max_area={height * width}"]
    if exported.class_embeddings:
        arguments.append("**embeds")
    else:
        arguments.append(f'prompt="{PROMPT}"')
        if stock.guided_by_negative and _is_guided(stock, sampler):
            arguments.append('negative_prompt=""')
    arguments += [f"height={height}", f"width={width}", *stock.extra_arguments]
    if exported.source_folder is None:  # then there is no decoder
        arguments.append('output_type="latent"')
    return arguments


def own_card(
    sampler: Sampler,
    provenance: Provenance,
    kind: str,
    name: str,
    solver: Restart | Hop | Hermite | Euler,
    encoder: ShippedTextEncoder | None,
    *,
    has_encoder: bool,
) -> str:
    """The card of a folder called `name` with a net of dumo's own, of this kind, and the code that runs it.

    `solver` makes the passes. The code calls it for the numbers of passes that it can make. `encoder` reads prompts;
    None: the net reads labels. `has_encoder`: it is in the folder.
    """
    comment_by_passes = {50: "Euler steps"}
    if not isinstance(solver, Euler):
        comment_by_passes = {n: comment for n, comment in _PASS_COMMENTS.items() if can_make(solver, sampler.taught, n)}
    return _render(
        "own",
        sampler,
        provenance,
        name,
        sizes=_image_counts(sampler.data),
        kind=kind,
        parameters=sum(p.numel() for p in sampler.net.parameters()),
        passes=comment_by_passes,
        solver=solver,
        encoder=encoder,
        has_encoder=has_encoder,
        condition_argument=_condition_argument(sampler),
        labels=label_list(sampler),
        reads_velocity=isinstance(solver, Euler),
        head_text=_HEAD_TEXTS[solver.kind],
        tag="text-to-image" if encoder else "unconditional-image-generation",
        hub_metadata={},
    )


def _condition_argument(sampler: Sampler) -> str:
    """The argument that asks for two images: labels of classes, or captions by templates; else one, of a prompt."""
    conditions = sampler.conditions
    numbers = [0, conditions.count // 2]
    if conditions.captions is None:
        return f"class_labels={numbers}"
    prompts = [PROMPT]
    if isinstance(conditions.captions, Templates):  # captions of images are their owner's, and may be private
        prompts = [conditions.names[k] for k in numbers]
    return f"prompt=[{', '.join(map(_python_literal, prompts))}]"


def label_list(sampler: Sampler) -> str:
    """The labels of classes, with their names where they have some: "0 to 9", or "0 airplane, 1 automobile"."""
    count = sampler.conditions.count
    names = sampler.conditions.names
    if not count:
        return "0: there are no classes"
    if not names or names == tuple(map(str, range(count))):
        return f"0 to {count - 1}"
    return ", ".join(f"{k} {_escape_markup(name)}" for k, name in enumerate(names))


def _render(
    template: str, sampler: Sampler, provenance: Provenance, name: str, *, reads_velocity: bool, **values: object
) -> str:
    """The card by a template in `cards`, filled with these values and those that all cards have."""
    rows = _rows_of_head(provenance.report, reads_velocity=reads_velocity) if provenance.report else []
    return (
        _templates()
        .get_template(f"{template}.md.j2")
        .render(
            sampler=sampler,
            provenance=provenance,
            name=name,
            reads_velocity=reads_velocity,
            rows=rows,
            scores=[key for key in rows[0] if key not in ("nfe", "solver")] if rows else [],
            codes_file=CODES,
            method=method(sampler.flow.objective),
            **values,
        )
    )


def _rows_of_head(report: Mapping[str, Any], *, reads_velocity: bool) -> list[Any]:
    """The rows of an evaluation whose solver reads the exported head: the velocity, or the flow map."""
    velocity_solvers = ("euler", "heun")
    rows = [*report["results"], *report["contrast"]]
    return [row for row in rows if (row["solver"] in velocity_solvers) == reads_velocity]


@cache
def _templates() -> jinja2.Environment:
    """The templates in `cards`, and the filters that they use."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("dumo.export", "cards"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    cast(dict[str, Any], templates.filters).update(
        form=format, plain=_escape_markup, code=_as_code, literal=_python_literal, shell_path=shell_path
    )
    return templates


def _escape_markup(text: str) -> str:
    """A user's text for a cell of a table: neither HTML nor Markdown, which a page would show as such."""
    return _MARKDOWN.sub(r"\\\g<0>", escape(escape_line(text), quote=False))


def _as_code(text: str) -> str:
    """A user's text as code in a line of Markdown: between more backticks than it has in a row."""
    text = escape_line(text)
    inside = re.findall("`+", text)
    if not inside:
        return f"`{text}`"
    fence = "`" * (max(map(len, inside)) + 1)
    return f"{fence} {text} {fence}"


def _python_literal(text: str) -> str:
    """A string of Python, by JSON's escapes. What is no Unicode is escaped, too, so that a file can hold it."""
    return json.dumps(text, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def header_metadata(exported: ExportedModel, provenance: Provenance) -> dict[str, str]:
    """The metadata in the header of a file of weights."""
    return {
        "format": "pt",
        "class": exported.model_class,
        "head": exported.head,
        "onto": f"the export of {provenance.few_step_name}" if exported.subject_only else exported.base_name,
        **provenance.facts,
        **{name: json.dumps(value) for name, value in exported.facts.items()},
    }
