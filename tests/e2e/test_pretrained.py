"""A transformer of diffusers, from the folder that it was saved to: what a user types, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dumo.encoders.part import DIFFUSERS_FILE as WEIGHTS
from dumo.io.tensor_files import load
from dumo.nets import lowpass
from e2e.shell import call, files, refused, together

DIGITS: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 1, "out_channels": 1, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 4, "joint_attention_dim": 16, "caption_projection_dim": 32, "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
}  # fmt: skip
SHORT = ["train.steps=4", "train.save_every=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a transformer alone, for digits."""
    import diffusers

    place = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        diffusers.SD3Transformer2DModel(**DIGITS).save_pretrained(place / "transformer")
    return place


def net(folder: Path, *fields: str) -> list[str]:
    """As it is typed."""
    return ["net.kind=diffusers", "net.texts.kind=codes", f"pipeline={folder}", *fields]


@pytest.mark.slow
def test_from_a_folder_to_samples(here: Path, folder: Path) -> None:
    with patch.object(lowpass, "refit", wraps=lowpass.refit) as fitted:
        first = call("train", "digits", *net(folder), *SHORT, "--out", "tuned")
        assert (first.code, fitted.call_count) == (0, 1), "the time embedder is refitted before the first step"
        assert "low-pass at 10 rad: 128 of 256 waves of time are kept; the time embedding changes by" in first.err
        assert call("train", "tuned", "train.steps=6").code == 0
        assert call("sample", "tuned", "--nfe", "1").code == 0
        assert fitted.call_count == 1, "trained weights take its place"
    another = shutil.copytree(folder, here / "another")
    same = files(here / "tuned/samples")
    assert call("sample", "tuned", "--nfe", "1", f"pipeline.source={another}").code == 0
    assert files(here / "tuned/samples") == same
    file = another / "transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"qk_norm": "rms_norm"}))
    named = ("pipeline", "the transformer of", "(config.json) has changed", "pipeline.source")
    refused("sample", "tuned", f"pipeline.source={another}", named=named)
    done = call("show", "digits", *net(folder), "--json")
    assert (done.code, done.json["parameters"]) == (0, 75_976)


def trained_in_parts(here: Path, words: list[str]) -> dict[str, torch.Tensor]:
    """What is saved of a run of four steps, `whole`: to the bit as of one that was stopped after two and goes on."""
    assert call(*words, "--out", "whole").code == 0
    assert call(*words, "train.steps=2", "--out", "parts").code == 0
    assert call(*words, "--out", "parts").code == 0
    whole, parts = (load(here / name / "checkpoints/step-00000004/net") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    return whole


@pytest.mark.nightly
def test_adapters_alone_are_saved_and_taught_by_their_base(here: Path, folder: Path) -> None:
    """Stopped and gone on with, the same weights to the bit as in one go."""
    words = ["train", "digits", *net(folder, "net.lora.rank=4"), *SHORT, "teacher.kind=base"]
    words += ["teacher.guide.scale=2"]
    words += ["train.schedule.kind=constant"]
    whole = trained_in_parts(here, words)
    assert all(name.startswith("heads.") or "lora_" in name or "timestep_embedder" in name for name in whole)


BY_SLOPE = "slope: {kind: dual}, times: {kind: jumps}"
OF_TWO_TIMES = {
    "meanflow": [f"objective={{kind: meanflow, {BY_SLOPE}}}"],
    "dumo_any": [f"objective={{kind: dumo_any, {BY_SLOPE}}}", "teacher={kind: base}"],
    "self_e": ["objective={kind: self_e}", "net.lowpass=null", "net.checkpoint=true", "train.precision=bf16"],
}


@pytest.mark.nightly
@pytest.mark.parametrize("objective", OF_TWO_TIMES)
def test_two_times_are_trained_in_parts_and_jumped_between(here: Path, folder: Path, objective: str) -> None:
    """Beside adapters the embedding of the gap is trained, saved and gone on with, to the bit."""
    words = ["train", "digits", *net(folder, "net.lora.rank=4"), *SHORT, "train.schedule.kind=constant"]
    words += [*OF_TWO_TIMES[objective], "sample.solver={kind: hop}"]
    whole = trained_in_parts(here, words)
    assert whole["gap.layers.linear_2.weight"].any()
    assert call("sample", "whole", "--nfe", "2").code == 0
    assert call("show", "whole", "--check").code == 0


def twinflow(folder: Path) -> list[str]:
    """A training as by sd3-twinflow: adapters, a task on each row, negative times, the velocity of the frozen base."""
    words = ["train", "digits", *net(folder, "net.lora.rank=4"), *SHORT, "train.schedule.kind=constant"]
    words += ["teacher={kind: base, guide: {scale: 5}}", "sample.solver={kind: restart}"]
    words += ["objective={kind: twinflow, times: {kind: quarters}, drop: 0, guide: {zeta: 0}, order: 1}"]
    return [*words, "objective.barron=0.001", "objective.slope={kind: dual}"]


@pytest.mark.nightly
def test_twinflow_has_adapters_and_a_sign(here: Path, folder: Path) -> None:
    """In bf16, stopped and gone on with, the same weights to the bit as in one go."""
    whole = trained_in_parts(here, [*twinflow(folder), "train.precision=bf16"])
    assert whole["negative_time"].any()
    assert call("sample", "whole", "--nfe", "2").code == 0
    assert call("show", "whole", "--check").code == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "solver"),
    [
        ("", "restart"),
        pytest.param(", times: {kind: of_sampler, solver: hop}", "hop", marks=pytest.mark.nightly),
        pytest.param(", alpha: 1.2", "restart", marks=pytest.mark.nightly),
    ],
    ids=["dmd2", "tdm", "sid"],
)
def test_dmd2_has_two_adapters_and_resumes_in_mid_cycle(here: Path, folder: Path, setting: str, solver: str) -> None:
    """Stopped before the generator's first step and after it: weights and moments of both are the same to the bit."""
    words = ["train", "digits", *net(folder, "net.lora.rank=4", "net.lowpass=null"), "train.save_every=20"]
    words += ["train.schedule.kind=constant", "teacher={kind: base, guide: {scale: 3}}"]
    words += [f"objective={{kind: dmd2{setting}}}"]
    words += ["train.optimizer={kind: adamw, lr: 0.003, fake_lr: 0.001}", "train.batch=16"]
    words += [
        f"sample.solver={{kind: {solver}, m: 0.75}}",
        "sample.nfe=[4]",
        "evaluate.nfe=[4]",
        "evaluate.contrast=[]",
    ]
    assert call(*words, "train.steps=13", "--out", "whole").code == 0
    for steps in (4, 9, 13):
        assert call(*words, f"train.steps={steps}", "--out", "parts").code == 0
    for part in ("net", "optimizer", "ema-0.999"):
        whole, parts = (load(here / name / "checkpoints/step-00000013" / part) for name in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert sum(".fake." in name for name in whole) == sum(".default." in name for name in whole) == len(whole) / 2
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert call("sample", "whole", "--nfe", "4").code == 0
    refused("sample", "whole", "--nfe", "3", named=("untrained times", "objective.times"))


def self_e(folder: Path) -> list[str]:
    """A training of adapters that half of the rows pull by the velocities with and without a label."""
    words = ["train", "digits", *net(folder, "net.lora.rank=4", "net.lowpass=null"), *SHORT]
    return [*words, "train.schedule.kind=constant", "objective={kind: self_e}", "sample.solver={kind: hop}"]


@pytest.mark.slow
@pytest.mark.parametrize(("words_of", "own"), [(twinflow, "negative_time"), (self_e, "gap.layers.linear_2.weight")])
def test_two_ranks_train_what_one_process_trains_in_two_pieces(
    here: Path, folder: Path, words_of: Callable[[Path], list[str]], own: str
) -> None:
    """Kinds of rows alternate in the whole batch, so a rank has as many rows of each.

    Only to rounding: where blocks are sharded, gradients of the time embedding are summed block by block.
    """
    words = [*words_of(folder), "train.batch=16"]
    assert call(*words, "train.micro_batch=8", "--out", "one").code == 0
    together(2, *words, "--out", "two", cwd=here)
    for part in ("net", "ema-0.999"):
        one, two = (load(here / name / "checkpoints/step-00000004" / part) for name in ("one", "two"))
        assert one.keys() == two.keys()
        for name, weight in one.items():
            assert (weight - two[name]).norm() <= 1e-3 * weight.norm(), name
        assert one[own].any()


@pytest.mark.nightly
@pytest.mark.parametrize("coding", ["int8", "nf4"])
def test_a_coded_base_is_trained_on_sampled_and_merged_as_it_is_stored(here: Path, folder: Path, coding: str) -> None:
    """Also gone on with, to the bit; on another coding, or on other weights, it is refused."""
    words = net(folder, "net.lora.rank=4", f"net.lora.frozen={coding}")
    whole = ["train", "digits", *words, *SHORT, "train.schedule.kind=constant", "teacher.kind=base"]
    for done in (
        call(*whole, "--out", "whole"),
        call(*whole, "train.steps=2", "--out", "parts"),
        call(*whole, "--out", "parts"),
        call("sample", "whole", "--nfe", "1"),
        call("show", "digits", "--check", *words),
        call("export", "whole", "--out", "merged"),
        call("export", "whole", "--out", "adapters", "--to", "lora"),
    ):
        assert done.code == 0, done
    one, two = (load(here / name / "checkpoints/step-00000004/net") for name in ("whole", "parts"))
    assert all(torch.equal(x, two[name]) for name, x in one.items())
    assert not any("scales" in name for name in one)
    assert f"on a base in {coding}" in (here / "merged/README.md").read_text()
    assert "the weights as they are stored" in (here / "adapters/README.md").read_text()
    stored, merged = (load_file(f"{place}/transformer/{WEIGHTS}") for place in (folder, "merged"))
    own = load_file(next((here / "whole/checkpoints/step-00000004").glob("ema-*")))
    key, name = "model.transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q.weight"
    a, b = (own[f"{key}.lora_{part}.default.weight"] for part in "AB")
    assert torch.allclose(merged[name], stored[name] + b @ a, atol=1e-6)
    more = ("train", "whole", "train.steps=8", f"net.lora.frozen={'nf4' if coding == 'int8' else 'int8'}")
    refused(*more, named=(f"net.lora.frozen: {coding} there",), lines=None)
    named = ("was trained on other frozen weights", "keep net.lora.frozen unchanged")
    done = call(*more, "--from", "4", "--out", "new")
    assert (done.code, [name for name in named if name not in " ".join(done.err.split())]) == (2, [])


@pytest.mark.nightly
def test_a_check_looks_at_the_weights(here: Path, folder: Path) -> None:
    done = call("show", "digits", "--check", *net(folder), "--json")
    found = {line["name"]: line for line in done.json["check"]["findings"]}
    assert found["dual pass"]["state"] == "ok"
    assert "128 of 256 waves" in found["low-pass"]["text"]
    assert "at 0.98" in found["|t dv/dt| / |v|"]["text"]
    assert found["slope"]["state"] == "ok"


def test_what_older_runs_have_is_named(here: Path, folder: Path) -> None:
    refused("train", "digits", f"net.source={folder}", "net.kind=diffusers", named=("net.source",), lines=None)


def test_captions_are_what_a_pretrained_model_is_tuned_on(here: Path) -> None:
    """Codes are for who asks for them by name."""
    words = ["sd3-lora", f"data.images.root={here}"]
    ways = ("data.images.captions.kind=files", 'templates: ["a photo of a {}"]', "net.texts.kind=codes")
    refused("train", *words, "data.images.captions=null", named=ways)
    Image.new("RGB", (8, 8)).save(here / "one.png")
    refused("encode", *words, named=("no captions found",))


@pytest.mark.nightly
def test_codes_and_templates_take_the_place_of_captions(here: Path) -> None:
    codes = ["data.images.captions=null", "net.texts.kind=codes"]
    assert call("show", "sd3-lora", *codes).code == 0
    named = ["data.images.captions={kind: templates, templates: ['a photo of a {}']}"]
    assert call("show", "sd3-lora", *named).code == 0


@pytest.mark.parametrize(
    ("kind", "does"),
    [
        ("QwenImageEditPipeline", "edits an image"),
        ("QwenImageImg2ImgPipeline", "starts from an image"),
        ("FooPipeline", "is not supported"),
    ],
)
def test_variants_are_refused_with_the_reason(here: Path, kind: str, does: str) -> None:
    """Their config is that of their base; their pipeline's class is not."""
    from dumo.io.hub import published_config

    for part in ("transformer", "vae"):
        (here / "model" / part).mkdir(parents=True)
        (here / "model" / part / "config.json").write_text(json.dumps(published_config("Qwen/Qwen-Image")[part]))
    (here / "model" / "model_index.json").write_text(
        json.dumps({"_class_name": kind, "transformer": ["diffusers", "QwenImageTransformer2DModel"]})
    )
    refused("show", "qwen-image", "pipeline=model", named=(kind, does, "QwenImagePipeline"))


@pytest.mark.slow
def test_what_does_not_fit_is_refused(here: Path, folder: Path) -> None:
    refused("train", "digits", *net(here), named=("pipeline", "config.json"))
    refused("train", "digits-shortcut", *net(folder), named=("input 'k'", "objective.kind to dumo"))
    refused("train", "moons", *net(folder), named=("needs images",))
    central = ["net.lowpass=null", "objective.slope.kind=central"]
    refused("train", "digits", *net(folder), *central, named=("time_scale = 1000",))
    (here / "only").mkdir()
    (here / "only" / "config.json").write_text(json.dumps({"_class_name": "SD3Transformer2DModel", **DIGITS}))
    refused("train", "digits", *net(here / "only"), named=("no weights", "net.weights=drawn"))
    refused("train", "digits", *net(Path("stabilityai/stable-diffusion-3-medium-diffusers")), named=("16 channels",))


@pytest.mark.parametrize("verb", ["show", "encode", "train"])
def test_images_beyond_a_models_positions_are_refused(here: Path, verb: str) -> None:
    named = ("192 patches a side", "have 256", "data.images.side=3072")
    refused(verb, "sd3-lora", "data.images.side=4096", named=named)
    wide = ["data.images.side=2048", "data.images.buckets={step: 64, ratio: 4}"]
    refused(verb, "sd3-lora", *wide, named=("192 patches a side", "data.images.buckets.ratio"))
