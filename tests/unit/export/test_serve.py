"""What a server reads of an exported folder, and why it reads nothing where it would make other images."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dumo.export.serve import VLLM_KEY, reason_not_servable, vllm_index_entries
from dumo.export.stock import PIPELINE_BY_MODEL
from dumo.flow.solver import Restart
from dumo.types import Reads


def exported(*, guided: bool = False, lowest: float = 0.0, absent_parts: tuple[str, ...] = (), **other: object) -> Any:  # noqa: ANN401, a stand-in for ExportedModel
    """A flow map of FLUX, as far as a server asks, with some facts that are other ones."""
    facts = {
        "stock": PIPELINE_BY_MODEL["FluxTransformer2DModel"],
        "model_class": "FluxTransformer2DModel",
        "head": "u",
        "solver": Restart(m=0.7),
        "nfe": (),
        "makes_hops": False,
        "class_embeddings": {},
        "sampler": SimpleNamespace(
            spec=SimpleNamespace(guide=SimpleNamespace(active=guided, scale=2.0)), taught=Reads(lowest=lowest)
        ),
        "spec": SimpleNamespace(pipeline=SimpleNamespace(absent_parts=absent_parts)),
        "net": SimpleNamespace(guidance=None),
    }
    return SimpleNamespace(**facts | other)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"stock": None}, "has no class"),
        ({"stock": PIPELINE_BY_MODEL["SD3Transformer2DModel"]}, "has no class"),
        ({"head": "v"}, "is a velocity"),
        ({"nfe": (1, 4)}, "takes 2 steps, and this run was exported for nfe=1, 4"),
        ({"nfe": (2,), "makes_hops": True}, "for solver hop"),
        ({"lowest": 1.0}, "was not taught their times"),
        ({"guided": True}, "with guidance, of scale 2"),
        ({"class_embeddings": {"tokens": torch.zeros(1)}}, "reads prompts"),
        ({"absent_parts": ("text_encoder_2", "tokenizer_2")}, "has no text_encoder_2, tokenizer_2"),
        ({"solver": Restart(m=0.70001)}, "whole thousandths, and this run's are 1.0, 0.70001"),
    ],
)
def test_what_a_server_would_sample_otherwise_is_said(other: dict[str, Any], why: str) -> None:
    parts = {name: ["diffusers", "Class"] for name in ("transformer", "scheduler", "vae")}
    assert reason_not_servable(exported(), parts) is None
    assert "all parts" in (reason_not_servable(exported(), {**parts, "vae": [None, None]}) or "")
    assert why in (reason_not_servable(exported(**other), parts) or "")


def test_a_server_makes_the_steps_of_restart() -> None:
    """x_s = (1 - s) (x_t - t u) + s z, by diffusers' scheduler as a server sets it by its block."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    block = vllm_index_entries(exported())[VLLM_KEY]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=block["solver"] == "sde")
    scheduler.set_timesteps(sigmas=[time / 1000 for time in block["denoising_timesteps"]])
    x, u, z = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    z = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    found = scheduler.step(u, scheduler.timesteps[0], x, generator=torch.Generator().manual_seed(1)).prev_sample
    torch.testing.assert_close(found, 0.3 * (x - u) + 0.7 * z)


def test_diffusers_passes_over_what_a_server_reads(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import FluxPipeline

    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    index = {"_class_name": "FluxPipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    FluxPipeline.extract_init_dict({**index, "a_key_of_others": {}})
    assert "a_key_of_others" in caplog.text
    FluxPipeline.extract_init_dict({**index, **vllm_index_entries(exported())})
    assert VLLM_KEY not in caplog.text
