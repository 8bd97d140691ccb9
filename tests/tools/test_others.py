"""Folders of others that say what nobody expects are refused in a line: what was once a traceback, and a few more."""

import pytest

from fuzz.folder import ModelFolder, folder_trials, model_folders
from fuzz.judge import try_all

pytestmark = pytest.mark.filterwarnings("ignore")
KNOWN = {  # each ended in a traceback, or never
    "sd3": [
        *("config.json: num_layers = x", "config.json: num_layers = -1", "config.json: num_layers = 1000000000"),
        *("config.json: sample_size = None", "config.json = []", "config.json: no in_channels"),
        *("diffusion_pytorch_model.safetensors.index.json = []",),
        *("diffusion_pytorch_model.safetensors.index.json: no weight_map",),
    ],
    "t5": [
        *("config.json: architectures = -1", "config.json = []", "config.json: num_heads = -1"),
        *("model.safetensors.index.json = []", "model.safetensors.index.json: no weight_map"),
        *("tokenizer_config.json: model_max_length = x", "tokenizer_config.json: eos_token = None"),
    ],
    "clip": ["tokenizer.json: vocab = {}", "config.json: layer_norm_eps = None"],
    "AutoencoderKL": ["config.json: layers_per_block = 1000000000", "config.json: latents_mean = x"],
    "pipeline": ["model_index.json = []", "model_index.json: vae = []", "vae/config.json: scaling_factor = x"],
}


@pytest.mark.nightly
@pytest.mark.parametrize("kind", [kind for kind in model_folders() if kind.name in KNOWN], ids=lambda kind: kind.name)
def test_folders_of_others(kind: ModelFolder) -> None:
    tally = try_all(folder_trials(kind, 4, KNOWN[kind.name]))
    assert not tally.faults
    assert tally.ends.total() >= 4 + len(KNOWN[kind.name]) - 1
    assert tally.ends["refused"] > len(KNOWN[kind.name]) / 2
