"""Which models of others are accepted, and how they are called: what needs no model."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dumo.export.stock import PIPELINE_BY_CLASS, PIPELINE_BY_MODEL
from dumo.nets import family
from dumo.nets.family import FAMILIES, FLUX2, KLEIN, PIPELINES, VARIANTS, Family, Inputs, find_family, kontext_arguments
from pipelines import PIPELINES as TINY_PIPELINES

PAGE = Path(__file__).parents[3] / "docs/families.md"
WITHOUT_GUIDANCE = {"_class_name": FLUX2, "guidance_embeds": False}


def test_the_page_lists_what_the_code_accepts() -> None:
    """In its order, which is that of messages, too."""
    rows = re.findall(r"^\| `(\w+Pipeline)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [*PIPELINES]
    assert len({*PIPELINES}) == len(PIPELINES) == len(FAMILIES) + len(VARIANTS)


def test_what_is_accepted_is_exported_and_tested() -> None:
    """Each class has a row for exports, and a tiny pipeline that goes the whole way (e2e/test_export.py)."""
    exported = {row.pipeline for row in (*PIPELINE_BY_MODEL.values(), *PIPELINE_BY_CLASS.values())}
    assert exported == {*PIPELINES} == {row.pipeline for row in TINY_PIPELINES.values()}
    assert all(name == row.pipeline for name, row in PIPELINE_BY_CLASS.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_setting_of_a_class_is_known(name: str) -> None:
    """What the installed diffusers may read of a config.json, but for sizes: dumo takes its value, or refuses it."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    known = {*family._LAYER_SETTINGS, *family._KNOWN_VALUES}
    for key, parameter in parameters.items():
        value = parameter.default
        is_size = isinstance(value, int | float | list | tuple) and not isinstance(value, bool)
        if key in ("self", *SIZES_OR_NULL) or is_size or value is inspect.Parameter.empty:
            continue
        assert key in known or value is False, f"{name}: dumo does not know {key}, which is {value} if it is not set"


# Sizes of layers inside a model, which are null if its class computes them.
SIZES_OR_NULL = (
    "out_channels", "axes_dim", "ffn_dim_multiplier", "interpolation_scale", "sample_size", "num_attention_heads",
    "addition_time_embed_dim", "projection_class_embeddings_input_dim", "reverse_transformer_layers_per_block",
    "class_embed_type", "encoder_hid_dim_type", "time_embedding_act_fn", "timestep_post_act",
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "pipeline", "found"),
    [
        ({"_class_name": FLUX2}, "", FAMILIES[FLUX2]),  # its class embeds guidance by default
        ({"_class_name": FLUX2}, "Flux2Pipeline", FAMILIES[FLUX2]),
        (WITHOUT_GUIDANCE, "Flux2Pipeline", FAMILIES[FLUX2]),
        (WITHOUT_GUIDANCE, "Flux2KleinPipeline", KLEIN),
        (WITHOUT_GUIDANCE, "", KLEIN),
    ],
)
def test_a_flux2_without_guidance_is_klein(config: dict[str, Any], pipeline: str, found: Family) -> None:
    assert find_family(config, pipeline) is found


def test_klein_reads_texts_by_its_own_defaults() -> None:
    """Three layers of Qwen3 side by side are the width of a token."""
    import diffusers

    defaults = inspect.signature(diffusers.Flux2KleinPipeline.__call__).parameters
    assert defaults["text_encoder_out_layers"].default == (9, 18, 27)
    assert "is_distilled" in inspect.signature(diffusers.Flux2KleinPipeline.__init__).parameters


def test_an_image_to_edit_has_places_of_its_own() -> None:
    """FLUX.1 Kontext tells its tokens from those of the sample by the first axis alone."""
    x, source = torch.zeros(2, 6, 4), torch.ones(2, 6, 4)
    inputs = Inputs(
        x=x,
        time=torch.zeros(2),
        tokens=torch.zeros(2, 5, 8),
        mask=None,
        pooled=None,
        guidance=None,
        grid=(2, 3),
        lengths=None,
        source=source,
    )
    given = kontext_arguments(inputs)
    assert torch.equal(given["hidden_states"], torch.cat([x, source], 1))
    sample, edited = given["img_ids"].split(6)
    assert sample[:, 0].tolist() == [0] * 6
    assert edited[:, 0].tolist() == [1] * 6
    assert torch.equal(sample[:, 1:], edited[:, 1:])
