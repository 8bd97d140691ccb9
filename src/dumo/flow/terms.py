"""What a loss returns: `require_terms` takes `Terms` of one number per row, and refuses all else in a line."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dumo.types import Terms, UserError


def require_terms(returned: object, rows: int, objective: str) -> Terms:
    """`returned`, which a loss gave for this many rows, as `Terms`.

    Raises UserError where it is no `Terms` of one number per row, or has no gradient.
    """
    subject = f"objective '{objective}': its loss"
    expected = f"one number per row, shape ({rows},)"
    if isinstance(returned, Tensor):
        raise UserError(
            f"{subject} returned a tensor of shape {tuple(returned.shape)}: return dumo.types.Terms(loss, parts), "
            f"where loss has {expected}; the trainer takes the mean"
        )
    if not isinstance(returned, Terms):
        raise UserError(
            f"{subject} returned a {type(returned).__name__}: return dumo.types.Terms(loss, parts), where loss has "
            f"{expected}"
        )
    for field in ("parts", "notes"):
        value: object = getattr(returned, field)
        if not isinstance(value, Mapping):
            raise UserError(
                f"{subject} returned Terms whose {field} are a {type(value).__name__}: give a dict of names and "
                f"tensors of {expected}"
            )
    values: dict[str, object] = {"loss": returned.loss, **returned.parts, **returned.notes}
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{subject} returned Terms where '{name}' is a {type(value).__name__}: give {expected}")
        if value.shape != (rows,):
            raise UserError(
                f"{subject} returned Terms where '{name}' has shape {tuple(value.shape)}: give {expected}, for squares "
                "dumo.types.mean_square(e); the trainer takes the mean over rows"
            )
    if torch.is_grad_enabled() and not returned.loss.requires_grad:
        raise UserError(
            f"{subject} has no gradient: the pass that learns is net(...), without torch.no_grad() and detach()"
        )
    return returned
