"""What the table of stock pipelines says of each is what the installed diffusers has."""

import inspect
from typing import Any

import pytest
from diffusers.loaders.lora_base import LoraBaseMixin

from dumo.encoders.pipeline_folder import component_names
from dumo.export.stock import DISTILLED_KLEIN, PIPELINE_BY_CLASS, PIPELINE_BY_MODEL, StockPipeline

ROWS = [*PIPELINE_BY_MODEL.values(), *PIPELINE_BY_CLASS.values(), DISTILLED_KLEIN]
# What a pipeline that runs CFG has: an argument, or for FLUX.2 [klein] the mark of a model that needs none.
GUIDANCE = ("negative_prompt", "true_cfg_scale", "is_distilled")


@pytest.fixture(params=ROWS, ids=lambda row: row.pipeline)
def row(request: pytest.FixtureRequest) -> StockPipeline:
    """A row of the table."""
    return request.param


def pipeline_class(row: StockPipeline) -> Any:  # noqa: ANN401, a class of diffusers
    """The class that the row is about."""
    import diffusers

    return getattr(diffusers, row.pipeline)


def arguments(row: StockPipeline) -> dict[str, inspect.Parameter]:
    """The arguments of a call of the pipeline, by name."""
    return dict(inspect.signature(pipeline_class(row).__call__).parameters)


def test_a_class_has_its_present_name(row: StockPipeline) -> None:
    """An older name of a class is a subclass that warns, or is gone."""
    assert pipeline_class(row).__name__ == row.pipeline


def test_it_loads_and_fuses_a_lora_or_not(row: StockPipeline) -> None:
    """Into its model: PRXPipeline has the loader of U-Nets, and no U-Net."""
    kind = pipeline_class(row)
    loadable = {*kind._lora_loadable_modules} if issubclass(kind, LoraBaseMixin) else set()
    models = {"transformer", "unet"} & component_names(kind)
    assert row.loads_lora == bool(models & loadable)


def test_times_are_passed_by_the_arguments_that_there_are(row: StockPipeline) -> None:
    """Where a pipeline takes sigmas, sigmas are passed; without any argument for times the scheduler has them."""
    taken = [name for name in ("sigmas", "timesteps") if name in arguments(row)]
    assert {*row.time_arguments} <= {*taken}
    assert bool(row.time_arguments) == bool(taken)
    assert "sigmas" not in taken or row.indexed_times or "sigmas" in row.time_arguments


def test_guidance_is_switched_off_by_the_argument_that_there_is(row: StockPipeline) -> None:
    """Only a pipeline without CFG has none: the argument of FLUX.2 is a number that its model embeds."""
    given = arguments(row)
    if row is DISTILLED_KLEIN:
        assert row.guide_argument is None
        return
    prompts = inspect.signature(pipeline_class(row).__init__).parameters.keys() | given.keys()
    assert (row.guide_argument is None) == (not {*GUIDANCE} & prompts)
    if row.guide_argument:
        assert row.guide_argument in given
        assert ("true_cfg_scale" in given) == (row.guide_argument == "true_cfg_scale")


def test_other_arguments_are_there(row: StockPipeline) -> None:
    given = arguments(row)
    assert not row.mask_argument or row.mask_argument in given
    assert bool(row.mask_argument) == any(name in given for name in ("prompt_attention_mask", "prompt_embeds_mask"))
    assert row.takes_image == ("image" in given and row.pipeline == "FluxKontextPipeline")
    for argument in row.extra_arguments:
        assert argument.partition("=")[0] in given
    assert ("use_resolution_binning" in given) == ("use_resolution_binning=False" in row.extra_arguments)
    assert ("cfg_normalization" in given) == ("cfg_normalization=False" in row.extra_arguments) or (
        row.pipeline == "ZImagePipeline"  # its default is False
    )
