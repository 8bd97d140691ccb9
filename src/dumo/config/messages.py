"""Pydantic's errors as one line each: the dotted path of the field, what is wrong, and the nearest valid name.

`explain` writes the lines for `dumo.config.load.parse`. The words are pydantic's own except for unknown keys and
kinds, where the nearest valid name is added.
"""

from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dumo.config.suggestion import nearest
from dumo.io.read import brief
from dumo.types.outside import BUNDLED, OUTSIDE, members

Location = tuple[int | str, ...]
# What other trainers (diffusers, accelerate, lightning, EDM) call a field that no spelling of ours is near to.
_OTHER_NAMES = {
    "batch_size": "train.batch",
    "cfg_scale": "sample.guide.scale",
    "epochs": "train.steps",
    "ema_decay": "train.ema",
    "gradient_accumulation_steps": "train.micro_batch",
    "gradient_checkpointing": "net.checkpoint",
    "guidance_scale": "sample.guide.scale",
    "image_size": "data.side",
    "learning_rate": "train.optimizer.lr",
    "lora_rank": "net.lora.rank",
    "lr": "train.optimizer.lr",
    "max_grad_norm": "train.clip",
    "max_train_steps": "train.steps",
    "mixed_precision": "train.precision",
    "num_inference_steps": "sample.nfe",
    "resolution": "data.side",
    "steps": "train.steps",
    "train_batch_size": "train.batch",
    "warmup_steps": "train.schedule.warmup",
    "weight_decay": "train.optimizer.weight_decay",
}


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Pydantic's error as lines, one per mistake; `root` is the spec that was validated."""
    return [_explain_one(mistake, root) for mistake in error.errors(include_url=False)]


def _explain_one(mistake: ErrorDetails, root: type[BaseModel]) -> str:
    """The line for one of pydantic's mistakes."""
    path, parent = _locate(mistake["loc"], root)
    context = mistake.get("ctx", {})
    value = brief(repr(mistake["input"]))
    match mistake["type"]:
        case "extra_forbidden":
            name = str(mistake["loc"][-1])
            if name in _OTHER_NAMES:
                return f"{path}: unknown key; did you mean '{_OTHER_NAMES[name]}'?"
            return f"{path}: unknown key; {nearest(name, sorted(parent.model_fields) if parent else [])}"
        case "union_tag_invalid":
            kinds = context["expected_tags"].replace("'", "").split(", ")
            return f"{path}.kind: unknown kind '{brief(context['tag'])}'; {nearest(context['tag'], kinds)}"
        case "union_tag_not_found":
            return f"{path}: Input should be a mapping with a kind; got {value}"
        case "missing":
            return f"{path}: field required"
        case "value_error":
            message = str(context["error"])
            has_path = not path or message.startswith(f"{path} ")
            return message if has_path else f"{path}: {message}"
        case _:
            return f"{path}: {mistake['msg']}; got {value}"


def _locate(loc: Location, root: type[BaseModel]) -> tuple[str, type[BaseModel] | None]:
    """The dotted path of pydantic's location, and the spec in which its last name was looked up, if it is known.

    Besides names of fields and numbers of a list's items, a location has the tags of unions, which the path leaves
    out: ("net", BUNDLED, "dit", "width") is the field net.width, and ("data", OUTSIDE, "folder") is data.folder of a
    class from outside.
    """
    names: list[str] = []
    parent: type[BaseModel] | None = None
    # What may stand at the location so far. It is Any inside a class from outside, whose fields are not known here,
    # and None below a field that holds a plain value.
    annotation: Any = root
    for part in loc:
        if part == BUNDLED:
            continue
        if part == OUTSIDE:
            annotation = Any
            continue
        chosen = _spec_of_kind(annotation, part)
        if chosen is not None:
            annotation = chosen
            continue
        spec = next(iter(members(annotation)), None)
        is_tag_of_plain_type = isinstance(part, str) and spec is None and annotation is not Any
        if is_tag_of_plain_type:
            continue
        names.append(brief(str(part)))
        parent = spec
        # An item of a list keeps the list's annotation, because `members` looks inside it.
        if isinstance(part, str) and annotation is not Any:
            field = spec.model_fields.get(part) if spec is not None else None
            annotation = None if field is None else field.rebuild_annotation()
    return ".".join(names), parent


def _spec_of_kind(annotation: object, kind: int | str) -> type[BaseModel] | None:
    """The spec of this kind where an annotation is a union by kind that has it, else None."""
    specs = members(annotation)
    if len(specs) > 1:
        for spec in specs:
            if kind in get_args(spec.model_fields["kind"].annotation):
                return spec
    return None
