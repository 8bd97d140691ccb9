"""What vLLM-Omni reads of an exported folder: a block of model_index.json, by which it makes the run's own jumps.

Its pipelines for models of few steps (`FluxDMD2Pipeline` and others, chosen by --model-class-name) take their scheduler
from there. `"solver": "sde"` is diffusers' scheduler with stochastic_sampling and shift 1, at the times of the block:

    x_s = (1 - s) (x_t - t u) + s z,

which is Restart, as `dumo.export.model` has it. Where anything differs there is no block (`unserved`). Facts of
vllm-project/vllm-omni, vllm_omni/diffusion/models: dmd2/config.py at 36c5bc6, dmd2/mixin.py at 23852d8.
"""

import math
from collections.abc import Mapping
from typing import Any

from dumo.encoders.pipeline import has_component
from dumo.export.model import TRAIN_TIMESTEPS, ExportedModel

KEY = "dmd2_config"
IGNORED_KEYS = "_use_default_values"  # lists what diffusers passes over in silence; of other keys it warns
PASSES = 2  # that a server makes, as the second call of a card: ours


def is_whole(index: Mapping[str, Any]) -> bool:
    """Whether a model_index.json has more parts than the model and its scheduler."""
    return sum(map(has_component, index.values())) > 2


def unserved(exported: ExportedModel, *, whole: bool) -> str:
    """Why vLLM-Omni would not make the run's images of the folder, in words; empty: it does. `whole`: as `is_whole`."""
    stock = exported.stock
    if stock is None or not stock.vllm_class:
        return "it has no class for a few jumps of this model"
    if exported.head != "u":
        return "it makes jumps of the flow map, and this is a velocity"
    if exported.nfe and (exported.makes_hops or PASSES not in exported.nfe):
        return "it makes two jumps to the data, which are not among this list"
    if exported.sampler.spec.guide.active:
        return "it guides no few-step model, and this run is sampled with guidance"
    if exported.class_embeddings:
        return "it reads prompts, and this model has codes"
    if not whole:
        return "it needs a folder with all parts"
    times = [TRAIN_TIMESTEPS * t for t in exported.solver.times(PASSES)]
    if not all(math.isclose(t, round(t)) for t in times):
        return "it counts time in whole thousandths"
    return ""


def served(exported: ExportedModel) -> dict[str, Any]:
    """The keys of model_index.json by which vLLM-Omni makes the run's jumps.

    Its solver `sde` is diffusers' scheduler of `write_flow_map_scheduler` at these times, without guidance.
    """
    times = [round(TRAIN_TIMESTEPS * t) for t in exported.solver.times(PASSES)]
    block: dict[str, Any] = {"num_inference_steps": PASSES, "denoising_timesteps": times, "solver": "sde"}
    embedded = exported.net.guidance  # the number that the net itself takes
    block["guidance_scale"] = 1.0 if embedded is None else embedded
    return {KEY: block, IGNORED_KEYS: {KEY: True}}  # no list: diffusers takes one for a part where it reads a hub
