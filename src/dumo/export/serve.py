"""The `dmd2_config` block of model_index.json, by which vLLM-Omni's few-step pipelines sample as this run does.

`dumo.export.write` asks `reason_not_servable` first, and adds `vllm_index_entries` to model_index.json where the answer
is None. The card (`dumo.export.card`) says the reason otherwise. `has_other_parts` is for the card.

The pipelines (`FluxDMD2Pipeline` and others, chosen by --model-class-name) make their scheduler from the block. With
`"solver": "sde"` that is diffusers' FlowMatchEulerDiscreteScheduler with stochastic_sampling and shift 1. From a time t
of the block to the next one, s, it steps by

    x_s = (1 - s) (x_t - t u) + s z,

where x_t is the noised image at t (1: noise, 0: data), u the model's output there and z fresh noise. That is a step of
the solver `Restart`, which an exported flow map samples by (`ExportedModel.solver`).

Source: vllm-project/vllm-omni, vllm_omni/diffusion/models: dmd2/config.py at 36c5bc6, dmd2/mixin.py at 23852d8.
"""

import math
from collections.abc import Mapping
from typing import Any

from dumo.encoders.pipeline import has_component
from dumo.export.model import ExportedModel
from dumo.export.stock import TRAIN_TIMESTEPS
from dumo.flow.solver import can_make

VLLM_KEY = "dmd2_config"  # in model_index.json: the block that vLLM-Omni reads
IGNORED_KEY = "_use_default_values"  # in model_index.json: names keys that diffusers ignores without a warning
NUM_STEPS = 2  # that vLLM-Omni makes by the block: ours, as a model's card shows its images in two steps
NUM_WRITTEN_PARTS = 2  # that each export writes: the model and its scheduler


def has_other_parts(index: Mapping[str, Any]) -> bool:
    """Whether a model_index.json names more parts than the model and its scheduler, such as text encoders."""
    num_parts = sum(has_component(entry) for entry in index.values())
    return num_parts > NUM_WRITTEN_PARTS


def reason_not_servable(exported: ExportedModel, index: Mapping[str, Any]) -> str | None:
    """Why vLLM-Omni would make other images of the exported folder than this run, or none; None: it makes the same.

    `index` is the folder's model_index.json.
    """
    stock = exported.stock
    if stock is None or not stock.vllm_class:
        return f"vLLM-Omni has no class for few steps of a {exported.model_class}"
    if exported.head != "u":
        return "vLLM-Omni makes few steps of a flow map, and what is exported is a velocity"
    if exported.makes_hops:
        return "vLLM-Omni steps by jumps to the data, and this run was exported for solver hop"
    if exported.nfe and NUM_STEPS not in exported.nfe:
        return f"vLLM-Omni takes {NUM_STEPS} steps, and this run was exported for nfe={_listed(exported.nfe)}"
    if not can_make(exported.solver, exported.sampler.taught, NUM_STEPS):
        return f"vLLM-Omni takes {NUM_STEPS} steps, and this run was not taught their times"
    guide = exported.sampler.spec.guide
    if guide.active:
        return f"vLLM-Omni guides no few-step model, and this run is sampled with guidance, of scale {guide.scale:g}"
    if exported.class_embeddings:
        return "vLLM-Omni reads prompts, and this model reads codes of classes"
    if not has_other_parts(index):
        return "vLLM-Omni needs a folder with all parts, and this one has the model and its scheduler alone"
    absent_parts = exported.spec.pipeline.absent_parts
    if absent_parts:
        return f"vLLM-Omni needs a folder with all parts, and this one has no {_listed(absent_parts)}"
    times = _scheduler_times(exported)
    if not all(math.isclose(time, round(time)) for time in times):
        exact_times = [time / TRAIN_TIMESTEPS for time in times]
        return f"vLLM-Omni takes times in whole thousandths, and this run's are {_listed(exact_times)}"
    return None


def vllm_index_entries(exported: ExportedModel) -> dict[str, Any]:
    """The entries of model_index.json that vLLM-Omni reads. Call it only where `reason_not_servable` is None."""
    guidance = exported.net.guidance  # the number that the net takes as an input; None: it takes none
    block = {
        "num_inference_steps": NUM_STEPS,
        "denoising_timesteps": [round(time) for time in _scheduler_times(exported)],
        "solver": "sde",
        "guidance_scale": 1.0 if guidance is None else guidance,
    }
    # A dict, where diffusers writes a list: on the hub, diffusers takes each list in model_index.json for a component.
    ignored_by_diffusers = {VLLM_KEY: True}
    return {VLLM_KEY: block, IGNORED_KEY: ignored_by_diffusers}


def _scheduler_times(exported: ExportedModel) -> list[float]:
    """The times at which the NUM_STEPS steps begin, falling, as the scheduler counts them: TRAIN_TIMESTEPS at noise."""
    times = exported.solver.times(NUM_STEPS)
    assert len(times) == NUM_STEPS
    return [TRAIN_TIMESTEPS * t for t in times]


def _listed(values: list[str] | list[float] | tuple[int, ...]) -> str:
    """Values with commas between them: `1, 0.7`."""
    return ", ".join(map(str, values))
