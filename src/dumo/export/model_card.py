"""Write the model card of an export, README.md: how to load it, how it was trained, and its scores.

`Provenance.of` collects the metadata of a run for the card, for dumo.json (`Provenance.facts`) and for the header of a
weight file (`header_metadata`). `tuned_card` returns the card of a fine-tuned pretrained model, and `own_card` that of
a run with its own network. Both fill one template in `cards`; huggingface_hub writes the YAML metadata.

User-provided text is escaped by the template filters `plain`, `code` and `literal`.
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
from huggingface_hub import EvalResult, ModelCardData

from dumo.config.code import names_code
from dumo.config.conditions import shown_data
from dumo.config.difference import config_hash
from dumo.config.place import EVALUATION_FILE
from dumo.config.spec import Run
from dumo.config.word import method
from dumo.data import Data, Images, Latents
from dumo.data.caption import Templates
from dumo.data.pixel import Size
from dumo.encoders.pipeline_folder import LICENSE, UNET, has_component
from dumo.export.model import ExportedModel
from dumo.export.scheduler import EULER, JUMP_SCHEDULER, LCM
from dumo.export.stock import StockPipeline
from dumo.flow.guide import GuidanceScale
from dumo.flow.solver import can_make
from dumo.io.run_places import SHIPPED_PREFIX
from dumo.report.evaluation_card import is_card_of, read_report
from dumo.run.resolve import places, without_path, without_paths
from dumo.run.trained import TrainedRun, net_shape
from dumo.runtime import version
from dumo.runtime.formatting import escape_line
from dumo.types import UserError

# The prompt in example code.
PROMPT = "a red fox in the snow"
# The file of class embeddings, for a model that was tuned on classes.
CODES = "codes.safetensors"
# The folder of a few-step run's export, as docs/pretrained.md calls it.
FEW_STEPS = "few-steps"
# Markdown markup. An underscore inside a word is not markup.
_MARKDOWN = re.compile(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)")
# Comments on the calls in example code, by number of passes.
_PASS_COMMENTS = {1: "one pass", 2: "two", 4: "four"}


@dataclass(frozen=True)
class Provenance:
    """The run, checkpoint and evaluation of an export."""

    run: Run
    step: int
    # The name and the SHA-256 of the weight file.
    weights: str
    sha256: str
    # The guidance scales that were distilled into the weights, by target.
    baked: Mapping[str, float]
    # The evaluation of these weights, if there is one.
    report: Mapping[str, Any] | None
    version: str = version()

    @property
    def about(self) -> str:
        """A one-line description of the run."""
        return self.run.about

    @property
    def batch(self) -> int:
        """Images per training step."""
        return self.run.train.batch

    @property
    def facts(self) -> dict[str, str]:
        """The origin of an export for dumo.json and file headers, with paths as the user typed them."""
        return {
            "dumo": self.version,
            "step": str(self.step),
            "weights": self.weights,
            "weights_sha256": self.sha256,
            "run": without_paths(self.run).model_dump_json(),
            "run_sha256": config_hash(self.run),
        }

    @property
    def few_step_name(self) -> str:
        """The name of the few-step run on top of which the adapters were trained, or ""."""
        if self.run.start and self.run.has_subject:
            return Path(self.run.start.source).name
        return ""

    @classmethod
    def of(cls, trained: TrainedRun) -> "Provenance":
        """Return the provenance of an opened run, without evaluations of other weights or sampling settings."""
        run = trained.spec
        baked = dict[str, float]()
        target_scale = GuidanceScale.of(run.objective.needs).scale
        if target_scale != 1:
            baked["its target"] = target_scale
        if run.teacher and run.teacher.guide.scale != 1:
            baked["its teacher"] = run.teacher.guide.scale
        file = trained.find_output(EVALUATION_FILE)
        report = read_report(file) if file.is_file() else None
        if report and not is_card_of(report["card"], trained):
            report = None
        return cls(
            run=run,
            step=trained.step,
            weights=without_path(trained.weights),
            sha256=trained.sha256,
            baked=baked,
            report=report,
        )


def tuned_card(
    exported: ExportedModel,
    provenance: Provenance,
    stock: StockPipeline,
    name: str,
    index: Mapping[str, Any] | None = None,
) -> str:
    """Return the card of a fine-tuned pretrained model: a folder called `name` for `from_pretrained`, or a LoRA.

    `index` is the folder's model_index.json, or None for a LoRA. If the folder only has a model and a scheduler, they
    replace the components of another pipeline.
    """
    # Show the call for the most frequent of several image sizes.
    sizes = _image_counts(exported.run.data)
    if sizes:
        exported = replace(exported, size=next(iter(sizes)))
    run = exported.run

    # Choose the pipeline and its components that the example code loads.
    source_parts = [*stock.parts]
    if index is None and not exported.subject_only:
        source_parts.append(exported.component_name)
    parts = index or {}
    num_parts = sum(has_component(entry) for entry in parts.values())
    scheduler = parts.get("scheduler", ["diffusers", LCM if exported.net.diffusion else EULER])
    if index is None and exported.head == "u" and not stock.time_arguments and not exported.subject_only:
        scheduler = JUMP_SCHEDULER

    # Show only scores of the exported head, velocity or flow map.
    reads_velocity = exported.head == "v"
    rows = [row for row in _score_rows(provenance) if (row["solver"] in ("euler", "heun")) == reads_velocity]
    if reads_velocity:
        head_text = "v, the velocity of the flow"
    elif exported.makes_hops:
        head_text = "u, the flow map: a pass jumps to the next time"
    else:
        head_text = "u, the flow map: a pass jumps to the data"
    body = _render(
        run,
        provenance,
        name,
        rows=rows,
        sizes=sizes,
        exported=exported,
        stock=stock,
        codes=exported.class_embeddings,
        calls=_pipeline_calls(exported, stock),
        is_guided=_is_guided(stock, run),
        ignores_guidance=ignores_guidance(exported) and index is not None,
        scheduler=scheduler[1],
        has_own_scheduler=scheduler == JUMP_SCHEDULER,
        absent_arguments="".join(f", {part}=None" for part in exported.spec.pipeline.absent_parts),
        few_steps_folder=FEW_STEPS,
        # Every exported folder has a model and a scheduler.
        has_other_parts=num_parts > 2,
        variant=exported.weights_variant(source_parts),
        is_lora=index is None,
        head=exported.head,
        head_text=head_text,
        codes_file=CODES,
    )
    metadata = {
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image" if stock.takes_image else "text-to-image",
        "tags": ["dumo"] if reads_velocity else ["dumo", "few-step"],
        **license_metadata(exported.spec.pipeline.facts or {}),
    }
    return _with_head(body, metadata, name, provenance, rows)


def _image_counts(data: Data) -> dict[Size, int]:
    """Count the images of each bucket size, most frequent first; {} without buckets.

    If the images are not on this machine, all counts are 0 and the sizes nearest to a square come first.
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
    """Return the licence entries of a pipeline with these facts, for the YAML metadata of a card.

    A link to a file in the base model's repository is omitted, because the export does not have that file.
    """
    metadata = {key: facts[key] for key in LICENSE if key in facts}
    if "://" not in facts.get("license_link", ""):
        metadata.pop("license_link", None)
    return metadata


def ignores_guidance(exported: ExportedModel) -> bool:
    """Whether the export disables CFG: for a UNet with guidance distilled into the weights."""
    is_unguided = exported.head == "u" and exported.run.sample.guide.scale == 1
    return is_unguided and exported.component_name == UNET


def _is_guided(stock: StockPipeline, run: Run) -> bool:
    """Whether guidance is an argument of the pipeline call."""
    return run.sample.guide.scale != 1 and stock.guide_argument is not None


def _pipeline_calls(exported: ExportedModel, stock: StockPipeline) -> list[tuple[str, str]]:
    """Return the arguments of each pipeline call as text, and a comment."""
    condition = _image_arguments(exported, stock)
    embedded = exported.net.guidance
    scale = exported.run.sample.guide.scale
    # A velocity is sampled at the pipeline's default times.
    if exported.head == "v":
        guidance = stock.guidance_arguments(embedded=embedded, scale=scale)
        return [(", ".join([*condition, *_keywords(guidance)]), "")]
    calls: list[tuple[str, str]] = []
    solver = exported.run.sample.solver if exported.makes_hops else exported.solver
    reachable = [n for n in _PASS_COMMENTS if can_make(solver, exported.run.readings, n)]
    for passes in exported.nfe or reachable:
        times = exported.pipeline_times(passes)
        arguments = [*condition, *_keywords(stock.arguments(times, embedded=embedded, scale=scale))]
        if stock.seeds_scheduler or exported.makes_hops:
            arguments.append("generator=torch.Generator().manual_seed(0)")
        calls.append((", ".join(arguments), _PASS_COMMENTS.get(passes, str(passes))))
    return calls


def _keywords(arguments: Mapping[str, Any]) -> list[str]:
    """Format the keyword arguments of a call."""
    return [f"{name}={value}" for name, value in arguments.items()]


def _image_arguments(exported: ExportedModel, stock: StockPipeline) -> list[str]:
    """Return the arguments for an image of a prompt or a class, at the run's image size."""
    data = exported.run.data
    pixels = data.codec.factor if isinstance(data, Latents) else stock.pixels_per_latent
    height, width = (pixels * n for n in net_shape(data, exported.size)[1:])
    arguments = list[str]()
    if stock.takes_image:
        arguments += ["image=source", f"max_area={height * width}"]
    if exported.class_embeddings:
        arguments.append("**embeds")
    else:
        arguments.append(f'prompt="{PROMPT}"')
        if stock.cfg_needs_negative_prompt and _is_guided(stock, exported.run):
            arguments.append('negative_prompt=""')
    arguments += [f"height={height}", f"width={width}", *stock.extra_arguments]
    # A model without a pipeline has no decoder.
    if exported.source_folder is None:
        arguments.append('output_type="latent"')
    return arguments


def own_card(trained: TrainedRun, provenance: Provenance, name: str, *, dtype: str, has_pipeline: bool) -> str:
    """Return the card of a run with its own network: a folder called `name`, with weights in `dtype`.

    `has_pipeline` is whether diffusers can load the folder.
    """
    run = trained.spec
    argument, value = _condition_argument(run)
    pipeline_arguments = {
        "labels": f"class_labels={value}",
        "prompts": f"prompt={value}",
        "count": "class_labels=None",
    }
    rows = _score_rows(provenance)
    body = _render(
        run,
        provenance,
        name,
        rows=rows,
        sizes=_image_counts(run.data),
        exported=None,
        arguments=f"{argument}={value}",
        pipeline_arguments=pipeline_arguments[argument],
        nfe=run.sample.nfe[0],
        trusts_code=names_code(run),
        has_pipeline=has_pipeline,
        places=_places_to_sample(run),
        labels=label_list(run),
        parameters=sum(p.numel() for p in trained.net.parameters()),
        stored_dtype=dtype,
    )
    metadata: dict[str, Any] = {"library_name": "dumo", "tags": ["dumo"]}
    if trained.makes_images:
        reads_texts = run.conditions.captions is not None
        metadata["pipeline_tag"] = "text-to-image" if reads_texts else "unconditional-image-generation"
    return _with_head(body, metadata, name, provenance, rows)


def _condition_argument(run: Run) -> tuple[str, str]:
    """Return the name and value of the argument of `sample` for classes, captions or a count."""
    conditions = run.conditions
    if not conditions.count:
        return "count", "2"
    numbers = [0, conditions.count // 2]
    if conditions.captions is None:
        return "labels", str(numbers)
    prompts = [PROMPT]
    # Captions of images may be private; template captions are not.
    if isinstance(conditions.captions, Templates):
        prompts = [conditions.names[k] for k in numbers]
    return "prompts", f"[{', '.join(map(_python_literal, prompts))}]"


def _places_to_sample(run: Run) -> list[tuple[str, str]]:
    """Return the fields with paths of external autoencoders and text encoders, and their values."""
    return [
        (field, place)
        for field, place in places(without_paths(run))
        if field.startswith(("data.codec.", "net.texts.encoder.")) and place and not place.startswith(SHIPPED_PREFIX)
    ]


def label_list(run: Run) -> str:
    """Format the class labels, with names if there are any: "0 to 9", or "0 airplane, 1 automobile"."""
    count = run.conditions.count
    names = run.conditions.names
    if not count:
        return "none: there are no classes"
    if not names or names == tuple(map(str, range(count))):
        return f"0 to {count - 1}"
    return ", ".join(f"{k} {_escape_markup(name)}" for k, name in enumerate(names))


def _render(run: Run, provenance: Provenance, name: str, *, rows: list[Any], **values: object) -> str:
    """Return the body of a card: the template filled with these values and the common ones."""
    return (
        _templates()
        .get_template("card.md.j2")
        .render(
            run=run,
            provenance=provenance,
            name=name,
            rows=rows,
            scores=_score_names(rows),
            method=method(run.objective),
            **values,
        )
    )


def _with_head(body: str, metadata: dict[str, Any], name: str, provenance: Provenance, rows: list[Any]) -> str:
    """Return the card with YAML metadata, which has the main score of each row for the Hub."""
    results: list[EvalResult] = []
    for row in rows:
        # The first score is the main score of the protocol.
        score = _score_names(rows)[0]
        if row[score] is not None:
            results.append(
                EvalResult(
                    task_type=metadata.get("pipeline_tag", "other"),
                    dataset_type=provenance.run.data.kind,
                    dataset_name=provenance.run.data.kind,
                    metric_type=score,
                    metric_name=f"{score}, {row['nfe']} NFE, {row['solver']}",
                    metric_value=row[score],
                )
            )
    if results:
        metadata = {**metadata, "model_name": name, "eval_results": results}
    return f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n{body}"


def _score_rows(provenance: Provenance) -> list[Any]:
    """Return the rows of the evaluation of these weights, or []."""
    report = provenance.report
    return [*report["results"], *report["contrast"]] if report else []


def _score_names(rows: list[Any]) -> list[str]:
    """Return the names of the scores in the rows of an evaluation."""
    return [key for key in rows[0] if key not in ("nfe", "solver")] if rows else []


@cache
def _templates() -> jinja2.Environment:
    """Return the template environment of `cards`, with its filters."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("dumo.export", "cards"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    cast(dict[str, Any], templates.filters).update(
        form=format, plain=_escape_markup, code=_as_code, literal=_python_literal
    )
    return templates


def _escape_markup(text: str) -> str:
    """Escape HTML and Markdown in user-provided text for a table cell."""
    return _MARKDOWN.sub(r"\\\g<0>", escape(escape_line(text), quote=False))


def _as_code(text: str) -> str:
    """Format user-provided text as inline Markdown code, delimited by more backticks than it contains in a row."""
    text = escape_line(text)
    inside = re.findall("`+", text)
    if not inside:
        return f"`{text}`"
    fence = "`" * (max(map(len, inside)) + 1)
    return f"{fence} {text} {fence}"


def _python_literal(text: str) -> str:
    """Return a Python string literal with JSON escapes. Lone surrogates are escaped, so that it can be encoded."""
    return json.dumps(text, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def header_metadata(exported: ExportedModel, provenance: Provenance) -> dict[str, str]:
    """Return the metadata for the header of a weight file."""
    return {
        "format": "pt",
        "class": exported.model_class,
        "head": exported.head,
        "onto": f"the export of {provenance.few_step_name}" if exported.subject_only else exported.base_name,
        **provenance.facts,
        **{name: json.dumps(value) for name, value in exported.facts.items()},
    }
