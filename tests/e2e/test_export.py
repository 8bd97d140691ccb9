"""What is exported, stock programs run: the images are dumo's own."""

import ast
import json
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from comfyui import loaded, native
from dumo.config.place import EVALUATION_FILE
from dumo.export import lora, write
from dumo.export.model import INDEX, ExportedModel
from dumo.export.model_card import PROMPT
from dumo.flow.sampling import integrate
from dumo.flow.solver import Euler
from dumo.io import tensor_files
from dumo.report.evaluation_card import sample_settings
from dumo.run.weights import load_run
from e2e.shell import call, files, finish, refused, start
from forked import ENVIRONMENT
from hub import serving
from pipelines import PIPELINES, save
from stock.case import CODES, FULL, GUIDED, LIMITS, LORA, SHORT, Case, must, write_photographs
from tiers import tiered
from tiny import TinyRuns

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers about its own parts, and of peft about merges
RESTART = ["sample.solver={kind: restart, m: 0.7}"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
DMD2 = (
    "net.lowpass=null",
    "teacher={kind: base, guide: {scale: 3}}",
    "objective={kind: dmd2}",
    "train.steps=12",  # two of the generator
    "train.optimizer={kind: adamw, lr: 0.01, fake_lr: 0.003}",
    "sample.solver={kind: restart, m: 0.75}",
    "sample.nfe=[4]",
    "evaluate.nfe=[4]",
    "evaluate.contrast=[]",
)
TDM = (
    *DMD2,
    "objective={kind: dmd2, times: {kind: of_sampler, solver: hop}}",
    "sample.solver={kind: hop, m: 0.75}",
)
TWO = (  # times, by steps so long that the second counts
    "objective={kind: meanflow, slope: {kind: dual}, times: {kind: jumps}, guide: {zeta: 0}}",
    "train.optimizer.lr=0.01",
)

TWINFLOW = (
    "objective={kind: twinflow, slope: {kind: dual}, times: {kind: quarters}, guide: {zeta: 0}, barron: 0.001}",
    "train.optimizer.lr=0.01",
)


@pytest.fixture(scope="module")
def sd3(tiny_runs: TinyRuns, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A run of SD3, exported to `out`: to be read."""
    case = tiny_runs.case(tmp_path_factory.mktemp("sd3"), "SD3", *FULL)
    case.export("out")
    return case


@pytest.fixture(scope="module")
def tuned(tiny_runs: TinyRuns, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A run of SD3's adapters, exported to `out` as a LoRA: to be read."""
    case = tiny_runs.case(tmp_path_factory.mktemp("tuned"), "SD3", *LORA)
    case.export("out", "--to", "lora")
    return case


def on_a_copy_of_its_pipeline(case: Case, folder: Path) -> tuple[Path, Path]:
    """A copy of the run that opens a copy of the pipeline, and that: both may be changed."""
    run, source = shutil.copytree(case.run, folder / "run"), shutil.copytree(case.source, folder / case.name)
    spec = run / "run.yaml"
    spec.write_text(spec.read_text().replace(str(case.source), str(source)))
    return run, source


@pytest.mark.parametrize("name", tiered(PIPELINES, now=["SD3"]))
def test_the_card_of_an_exported_pipeline_makes_dumos_images(
    name: str, sd3: Case, tiny_runs: TinyRuns, tmp_path: Path
) -> None:
    """The release gate: what is typed from the folder of a pipeline on, and the block of the card, verbatim.

    In one pass, two and four, with words, at the trained size; guided, where a pass reads the row of no text, too.
    """
    case = sd3 if name == "SD3" else tiny_runs.case(tmp_path, name, *FULL)
    assert max(case.errors_over_limits("full", case.folder / "out" if case is sd3 else case.export("out"))) < 1
    if case.can_guide and case is not sd3:
        case.guide(GUIDED)
        assert max(case.errors_over_limits("guided", case.export("guided"), GUIDED)) < 1


@pytest.mark.parametrize("name", tiered(PIPELINES, ci=["SD3"]))
def test_the_card_of_adapters_makes_dumos_images(name: str, tuned: Case, tiny_runs: TinyRuns, tmp_path: Path) -> None:
    """Merged into a pipeline's folder, and as a LoRA on the untouched one."""
    case = tuned if name == "SD3" else tiny_runs.case(tmp_path, name, *LORA)
    assert max(case.errors_over_limits("merged", case.export("merged"))) < 1
    if case.stock.loads_lora:
        out = case.folder / "out" if case is tuned else case.export("out", "--to", "lora")
        assert max(case.errors_over_limits("lora", out)) < 1


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["SD1", "SDXL"])
def test_adapters_of_convolutions_are_a_stock_lora(name: str, tmp_path: Path) -> None:
    case = Case.of(name, tmp_path, "net.lora={rank: 4, convolutions: true}")
    assert max(case.errors_over_limits("merged", case.export("merged"))) < 1
    out = case.export("out", "--to", "lora")
    assert any("conv1.lora_down" in key for key in load_file(out / lora.FILE))
    assert max(case.errors_over_limits("lora", out)) < 1


@pytest.mark.parametrize("name", tiered(["SD3", "Flux", "Z-Image", "SD1"], ci=["SD3"]))
def test_the_card_of_two_times_makes_dumos_images(name: str, tmp_path: Path) -> None:
    """By jumps to the data, one list of 1, 2 and 4 passes; by jumps from time to time, a list for each number.

    Merged into a folder and as a LoRA; the card says how exactly, and dumo.json. Of families that count time forward,
    backward, that pack and of a diffusion: unit/nets/test_gap.py has all.
    """
    case = Case.of(name, tmp_path, *LORA, *TWO, "sample.solver={kind: restart, m: 0.7}")
    out = case.export("jumps", "--nfe", "1,2,4")
    assert max(case.image_errors(out, nfe=(1, 2, 4))) < LIMITS["merged"]
    said = json.loads((out / "dumo.json").read_text())
    assert [r for _, r in said["passes"]] == [0, 0, 0, 0]
    assert said["embedding"]["error"] < 1e-6 < said["embedding"]["half"] < 0.02
    assert f"condition number {said['embedding']['condition']:.3g}, error" in (out / "README.md").read_text()
    must(call("train", case.run, "sample.solver={kind: hop}"))
    if case.stock.indexed_times:
        done = call("export", case.run, "--out", tmp_path / "hops")
        assert (done.code, "sample.solver" in done.err) == (2, True)
        return
    case = replace(case)  # which samples otherwise
    for n, to in ((2, "diffusers"), (4, "lora" if case.stock.loads_lora else "diffusers")):
        assert max(case.image_errors(case.export(f"hops{n}", "--nfe", n, "--to", to), nfe=(n,))) < LIMITS["merged"]
    assert "1 to 0.5, 0.5 to 0 |" in (tmp_path / "hops2" / "README.md").read_text()


@pytest.mark.parametrize("name", tiered(["SD3", "SDXL", "Qwen-Image"], ci=["SD3"]))
def test_the_card_of_dmd2_makes_dumos_images(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its times in one, two and four passes, merged and as a LoRA, which holds the generator's adapters alone."""
    monkeypatch.setattr("stock.case.SHORT", SHORT[:-1])
    case = Case.of(name, tmp_path, *LORA, *DMD2)
    out = case.export("out", "--to", "lora")
    assert max(case.errors_over_limits("lora", out)) < 1
    assert max(case.errors_over_limits("merged", case.export("merged"))) < 1
    (checkpoint,) = (case.run / "checkpoints").iterdir()
    kept = tensor_files.load(next(checkpoint.glob("ema-*")))
    generator = [x for key, x in kept.items() if "lora_A.default" in key]
    assert len(generator) == sum("lora_A.fake" in key for key in kept)
    exported = [x for key, x in load_file(out / lora.FILE).items() if key.endswith(("lora_A.weight", "down.weight"))]
    assert len(exported) == len(generator)
    assert all(any(torch.equal(x, own) for own in generator) for x in exported)


@pytest.mark.parametrize("name", tiered(["SD3", "Qwen-Image", "Z-Image"], ci=["SD3"]))
def test_the_card_of_tdm_makes_dumos_images(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps along u at its four times, which keep their noise."""
    monkeypatch.setattr("stock.case.SHORT", SHORT[:-1])
    case = Case.of(name, tmp_path, *LORA, *TDM)
    for form, out in (("lora", case.export("out", "--to", "lora")), ("merged", case.export("merged"))):
        assert max(case.image_errors(out, nfe=(4,))) < LIMITS[form]


@pytest.mark.parametrize("form", tiered(["full", "merged", "lora"], ci=["lora"]))
def test_the_card_of_twinflow_makes_dumos_images(form: str, tmp_path: Path) -> None:
    """At one, two and four passes, of all weights and of adapters: negative times are for training alone."""
    case = Case.of("SD3", tmp_path, *(FULL if form == "full" else LORA), *TWINFLOW, *RESTART)
    assert case.opened.net.negative_time.any()
    out = case.export("out", "--nfe", "1,2,4", "--to", "lora" if form == "lora" else "diffusers")
    assert max(case.errors_over_limits(form, out)) < 1


@pytest.mark.nightly
def test_passes_that_a_stock_model_cannot_tell_apart_are_refused(here: Path, tmp_path: Path) -> None:
    """Two r at one t, and no number of passes. Nothing is written."""
    case = Case.of("SD3", tmp_path, *FULL, *TWO, "sample.solver={kind: hop}")
    for nfe, word in (("1,2", "t = 1"), ("0", "0")):
        refused("export", case.run, "--out", here / "out", "--nfe", nfe, named=(word,), lines=None)
        assert not (here / "out").exists()


@pytest.mark.nightly
def test_a_head_that_the_run_does_not_sample_by_is_refused(here: Path, tmp_path: Path) -> None:
    """Of three heads, m jumps from time to time; v is read at r = 0, and a stock model's velocity is at r = t."""
    three = "objective={kind: several, slope: {kind: dual}, guide: {zeta: 0}}"
    case = Case.of("SD3", tmp_path, *FULL, three, "sample.solver={kind: hop}")
    refused("export", case.run, "--out", here / "out", named=("sample.solver",))
    refused("export", case.run, "--out", here / "out", "--head", "v", named=("r != t",))
    must(call("train", case.run, "sample.solver={kind: restart}"))
    case = replace(case)  # which samples otherwise
    assert max(case.image_errors(case.export("out"), nfe=(1, 2))) < LIMITS["full"]


@pytest.mark.parametrize("name", tiered(PIPELINES, ci=["SD3"]))
def test_which_generator_draws_the_noise_between_passes(
    name: str, sd3: Case, tiny_runs: TinyRuns, tmp_path: Path
) -> None:
    case = sd3 if name == "SD3" else tiny_runs.case(tmp_path, name, *FULL)
    pipe = case.pipeline(case.folder / "out" if case is sd3 else case.export("out"))
    assert case.seeds_scheduler(pipe) == case.stock.seeds_scheduler


@pytest.mark.nightly
def test_the_card_of_a_run_on_buckets_asks_for_a_size_that_it_has(tmp_path: Path) -> None:
    """Counted, or where the images are gone the square: of these three write_photographs none went there."""
    case = Case.of("Flux", tmp_path, *LORA, "data.images.side=144", "data.images.buckets={step: 16}")
    card = (case.export("out", "--parts", "link") / "README.md").read_text("utf-8")
    assert "| images | pixels, width x height, and how many: 128 x 160 (3) |" in card
    assert 'prompt="a red fox in the snow", height=160, width=128, ' in card
    assert case.pipeline(case.folder / "out")(PROMPT, height=160, width=128, sigmas=[1.0]).images[0].size == (128, 160)
    (tmp_path / "latents").rename(tmp_path / "moved")
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    card = (case.export("bare", "--parts", "link") / "README.md").read_text("utf-8")
    assert "| images | pixels, width x height: 144 x 144, " in card
    assert "height=144, width=144, " in card


def scheduler_in(folder: Path) -> object:
    """The scheduler of an exported LoRA."""
    import diffusers

    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    return getattr(diffusers, config["_class_name"]).from_config(config)


def lora_part(case: Case) -> str:
    """The component that a LoRA is of."""
    pipeline = case.opened.spec.pipeline
    assert pipeline is not None
    return pipeline.model_part


LORAS = [name for name in PIPELINES if name not in ("PRX", "PixArt", "PixArt-alpha")]  # diffusers loads none for these


@pytest.mark.parametrize("name", tiered(LORAS, now=["SD3"], ci=["SDXL"]))
def test_a_lora_loads_fuses_unloads_and_loads_again(
    name: str, tuned: Case, tiny_runs: TinyRuns, tmp_path: Path
) -> None:
    """From the folder and from the file for ComfyUI, where there is one."""
    case = tuned if name == "SD3" else tiny_runs.case(tmp_path, name, *LORA)
    folder = case.folder / "out" if case is tuned else case.export("out", "--to", "lora")
    sources: list[Path] = [folder]
    if case.stock.comfyui_names is not None:
        sources.append(case.export("fused.safetensors", "--to", "comfyui"))
    pipe = case.pipeline()
    pipe.scheduler = scheduler_in(folder)  # those of some bases take no times
    base = case.pipeline_latent(pipe, 1)
    limit = 1e-5 * base.norm()
    for source in sources:
        pipe.load_lora_weights(source)
        tuned_latent = case.pipeline_latent(pipe, 1)
        assert (tuned_latent - base).norm() > 10 * limit
        pipe.fuse_lora([lora_part(case)])  # AuraFlow's own default names a part that it lacks
        assert (case.pipeline_latent(pipe, 1) - tuned_latent).norm() < limit
        pipe.unfuse_lora([lora_part(case)])
        assert (case.pipeline_latent(pipe, 1) - tuned_latent).norm() < limit
        pipe.unload_lora_weights()
        assert (case.pipeline_latent(pipe, 1) - base).norm() < limit


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["SD1", "SDXL"])
def test_a_unet_is_called_without_guidance_by_default(name: str, tiny_runs: TinyRuns, tmp_path: Path) -> None:
    """And diffusers does not call its scheduler outdated."""
    case = tiny_runs.case(tmp_path, name, *FULL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe = case.pipeline(case.export("out"))
    assert not [warning for warning in caught if "outdated" in str(warning.message)]
    expected = case.pipeline_latent(pipe, 2)
    for arguments in ({"guidance_scale": 7.5}, {"guidance_scale": 5.0, "negative_prompt": "a dog"}):
        assert torch.equal(case.pipeline_latent(pipe, 2, **arguments), expected)


@pytest.mark.nightly
def test_a_pipeline_under_an_older_name_of_its_class_is_exported_under_the_present_one(tmp_path: Path) -> None:
    """Lumina2Text2ImgPipeline is gone from diffusers 0.42; both cards open."""
    case = Case.of("Lumina2", tmp_path, *LORA, verbs=())
    index = case.source / INDEX
    index.write_text(index.read_text("utf-8").replace("Lumina2Pipeline", "Lumina2Text2ImgPipeline"), encoding="utf-8")
    case.train(*LORA)
    assert max(case.errors_over_limits("merged", case.export("merged"))) < 1
    assert max(case.errors_over_limits("lora", case.export("out", "--to", "lora"))) < 1


@pytest.mark.nightly
def test_a_loras_parts_all_count(tuned: Case) -> None:
    """Adapters, last layer and embedder: an image without one of them is another; unloaded, it is the model's own."""
    whole, pipe = load_file(tuned.folder / "out" / lora.FILE), tuned.pipeline()
    own = tuned.pipeline_latent(pipe, 1)
    pipe.load_lora_weights(whole)
    image = tuned.pipeline_latent(pipe, 1)
    for part in ("transformer_blocks", "proj_out", "timestep_embedder"):
        pipe.unload_lora_weights()
        pipe.load_lora_weights({name: 0 * x if part in name else x for name, x in whole.items()})
        assert (tuned.pipeline_latent(pipe, 1) - image).abs().max() > 1e-4, part
    pipe.unload_lora_weights()
    assert torch.equal(tuned.pipeline_latent(pipe, 1), own)


def test_one_file_holds_what_the_folder_holds(sd3: Case) -> None:
    file = sd3.folder / "model.safetensors"
    done = call("export", sd3.run, "--out", file, "--to", "safetensors")
    assert (done.code, done.out.strip()) == (0, str(file))
    one, other = load_file(file), load_file(sd3.folder / "out" / "transformer" / WEIGHTS)
    assert one.keys() == other.keys() == load_file(sd3.source / "transformer" / WEIGHTS).keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.nightly
def test_one_file_for_comfyui_makes_the_model_that_is_exported(tuned: Case) -> None:
    file, whole = tuned.folder / "comfyui.safetensors", tuned.folder / "whole.safetensors"
    for to, out in (("comfyui", file), ("safetensors", whole)):
        assert call("export", tuned.run, "--out", out, "--to", to).code == 0
    kind, before = "SD3Transformer2DModel", load_file(tuned.source / "transformer" / WEIGHTS)
    found, after = loaded(before, load_file(file), kind), native(load_file(whole), kind)
    assert max(float((found[name] - x).abs().max()) for name, x in after.items()) < 1e-6
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["class"] == kind


@pytest.mark.nightly
def test_half_precision_is_rounded_once(sd3: Case) -> None:
    out = sd3.export("half", "--dtype", "bfloat16")
    one, other = (load_file(folder / "transformer" / WEIGHTS) for folder in (out, sd3.folder / "out"))
    assert all(torch.equal(one[name], other[name].bfloat16()) for name in one)


@pytest.mark.slow
def test_the_velocity_is_an_ordinary_flow_model(sd3: Case) -> None:
    """By the card's own call, run at times of ours, which its own scheduler would shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = sd3.pipeline(out := sd3.export("velocity", "--head", "v"))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    [text] = re.findall(r"^image = (pipe\(.*\))\.images", (out / "README.md").read_text("utf-8"), re.M)
    call_of_card = ast.parse(text, mode="eval").body
    assert isinstance(call_of_card, ast.Call)
    arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call_of_card.keywords}
    image = pipe(**arguments, sigmas=[1, 0.75, 0.5, 0.25], latents=z, output_type="latent").images
    trained = sd3.opened
    c = trained.conditions(prompts=[PROMPT])
    ours = integrate(trained.readings, trained.spec.path, Euler(), c, 4, lambda _: z)[1]
    torch.testing.assert_close(image, ours, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_card_says_what_was_tuned(tuned: Case, tmp_path: Path) -> None:
    """The folder: a model that was tuned from another keeps that one's name in its files, and a LoRA fits its own."""
    run, source = on_a_copy_of_its_pipeline(tuned, tmp_path)
    index = json.loads((source / INDEX).read_text())
    (source / INDEX).write_text(json.dumps(index | {"_name_or_path": "owner/model"}))
    assert call("export", run, "--out", tmp_path / "out", "--to", "lora").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f'from_pretrained("{source.name}", ' in card
    assert f"| tuned from | {source.name}, " in card
    assert "base_model" not in card
    assert f"The files of `{source.name}` name `owner/model` as their origin" in card


@pytest.mark.slow
def test_parts_are_copied_linked_or_left_out(sd3: Case, tmp_path: Path) -> None:
    """Pickles next to safetensors of their name are left out."""
    run, source = on_a_copy_of_its_pipeline(sd3, tmp_path / "given")
    pickle = "diffusion_pytorch_model.bin"
    for name in (pickle, "diffusion_pytorch_model.fp16.bin", "statistics.pt"):
        (source / "vae" / name).touch()
    for parts in ("copy", "link", "none"):
        assert call("export", run, "--out", tmp_path / parts, "--parts", parts).code == 0
    assert {path.name for path in (tmp_path / "none").iterdir()} == {
        *("README.md", "dumo.json", "model_index.json", "scheduler", "transformer")
    }
    assert (tmp_path / "link" / "vae").is_symlink()
    copy = tmp_path / "copy" / "vae"
    assert not copy.is_symlink()
    assert {path.name for path in copy.iterdir()} == {path.name for path in (source / "vae").iterdir()} - {pickle}
    assert (copy / WEIGHTS).read_bytes() == (source / "vae" / WEIGHTS).read_bytes()


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "Flux-Kontext"])
def test_the_card_of_a_run_with_codes_runs(name: str, tmp_path: Path) -> None:
    """Of who asked for codes: a class of theirs takes the place of a prompt, and the images are dumo's."""
    case = Case.of(name, tmp_path, *FULL, *CODES)
    out = case.export("out")
    assert load_file(out / "codes.safetensors")["tokens"].shape[1] == 1
    pushed = write.export(case.opened, tmp_path / "pushed", name="owner/name", parts="none") / "README.md"
    assert 'load_file(snapshot_download("owner/name") + "/codes.safetensors")' in pushed.read_text("utf-8")
    assert max(case.errors_over_limits("full", out, c=torch.tensor([0]))) < 1


@pytest.mark.nightly
def test_the_card_of_a_lora_with_codes_for_a_model_alone_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuned model came without a pipeline around it, and its card builds one."""
    case = Case.of("SD3", tmp_path, *LORA, *CODES)
    monkeypatch.setattr(ExportedModel, "source_folder", None)
    out = write.export(case.opened, tmp_path / "out", to="lora")
    code = (out / "README.md").read_text("utf-8").split("```py\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.nightly
def test_what_a_pipeline_guides_otherwise_is_refused(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    case = tiny_runs.case(tmp_path, "Qwen-Image", *FULL)
    case.guide(2)
    done = call("export", case.run, "--out", tmp_path / "out")
    assert (done.code, "sample.guide.scale" in done.err) == (2, True), done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.nightly
def test_a_distilled_klein_is_exported_without_guidance(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    """Its pipeline ignores guidance, so a guided run is refused; its card makes dumo's images, and no warning."""
    folder = tmp_path / "distilled"
    _, source = on_a_copy_of_its_pipeline(tiny_runs.case(tmp_path, "Flux2-klein", *FULL), folder)
    index = source / INDEX
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": True}))
    case = Case("Flux2-klein", folder, folder)
    out = case.export("out")
    assert json.loads((out / INDEX).read_text())["is_distilled"]
    assert max(case.errors_over_limits("full", out)) < 1
    assert "is ignored for step-wise distilled models" not in (folder / "printed.txt").read_text()
    case.guide(GUIDED)
    done = call("export", case.run, "--out", folder / "guided")
    assert (done.code, "Flux2KleinPipeline" in done.err) == (2, True), done


@pytest.mark.nightly
def test_a_pixart_under_its_older_class_is_exported(tmp_path: Path) -> None:
    """PixArt-alpha was published as a Transformer2DModel, whose config does not say that it reads sizes."""
    case = Case("PixArt-alpha", tmp_path)
    save(case.name, case.source)
    file = case.source / "transformer/config.json"
    config = json.loads(file.read_text()) | {"_class_name": "Transformer2DModel"}
    del config["use_additional_conditions"]
    file.write_text(json.dumps(config))
    write_photographs(tmp_path / "photos")
    must(call("encode", "sd3-lora", *case.options(*FULL)))
    case.train(*FULL)
    assert max(case.errors_over_limits("full", case.export("out"))) < 1


@pytest.mark.slow
def test_parts_of_another_pipeline_are_refused(sd3: Case, tmp_path: Path) -> None:
    """A run's autoencoder, encoders and scheduler are those that it began with, wherever they lie now."""
    run, other = on_a_copy_of_its_pipeline(sd3, tmp_path)
    file = other / "vae" / WEIGHTS
    save_file({name: x + 1 for name, x in load_file(file).items()}, file)
    for words in (("sample", run, "--nfe", "1"), ("export", run, "--out", tmp_path / "out")):
        done = call(*words)
        assert done.code == 2
        assert "(weights) has changed since this run was started" in done.err
    shutil.rmtree(other / "vae")
    done = call("sample", run, "--nfe", "1")
    assert (done.code, "has no vae/config.json" in done.err) == (2, True), done.err


@pytest.mark.slow
def test_a_failure_leaves_nothing(sd3: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dumo.export.model_card.tuned_card", fails)
    assert call("export", sd3.folder / "run", "--out", tmp_path / "out").code == 2
    assert [*tmp_path.iterdir()] == []


def test_what_a_run_says_of_itself_is_text_on_its_card(trained: dict[str, Path], here: Path) -> None:
    """A hub shows the card as a page."""
    run, about = shutil.copytree(trained["digits"], here / "run"), "<script>alert(1)</script> a|b"
    (run / "run.yaml").write_text(re.sub("about: .*", f"about: '{about}'", (run / "run.yaml").read_text()))
    assert call("export", run, "--out", "out").code == 0
    card = (here / "out/README.md").read_text()
    assert r"| recipe | &lt;script&gt;alert(1)&lt;/script&gt; a\|b |" in card
    assert "<script" not in card


EVIL = "<img src=x> [a](b) `c` *d*|"
TEXT = r"&lt;img src=x&gt; \[a\](b) \`c\` \*d\*\|"


@pytest.mark.slow
def test_what_an_evaluation_says_is_text_on_the_card(trained: dict[str, Path], here: Path) -> None:
    """Its file may be somebody else's."""
    run = shutil.copytree(trained["digits"], here / "run")
    opened = load_run(run)
    card = {**sample_settings(opened, opened.spec), "codec": None, "samples": EVIL}
    scores = {"nfe": 1, "solver": EVIL, EVIL: 0.5, "fd_grey": 12.3}
    report = {"step": 20, "protocol": EVIL, "results": [scores], "contrast": [], "card": card}
    (run / EVALUATION_FILE).write_text(json.dumps(report), encoding="utf-8")
    assert call("export", run, "--out", "out").code == 0
    text = (here / "out/README.md").read_text("utf-8")
    assert f"| NFE | solver | {TEXT} | fd_grey |" in text
    assert f"| 1 | {TEXT} | 0.5 | 12.3 |" in text
    assert f"Protocol `` {EVIL} ``, {TEXT} samples, by dumo." in text


NAMES = ('a "b" \\ {{1}}', "it's\nçé`<b>", "\udcff")  # the last is a byte that is no UTF-8


@pytest.mark.parametrize("name", tiered(NAMES, ci=NAMES[:1], id=ascii))
def test_any_name_of_an_export_is_a_string_in_its_python(
    name: str, sd3: Case, tuned: Case, trained: dict[str, Path], tmp_path: Path
) -> None:
    for kind, run, words in (
        ("own", trained["digits"], ()),
        ("whole", sd3.run, ("--parts", "link")),
        ("alone", sd3.run, ("--parts", "none")),
        ("lora", tuned.run, ("--to", "lora")),
    ):
        out = tmp_path / kind / name
        assert call("export", run, "--out", out, *words).code == 0
        text = (out / "README.md").read_text("utf-8")
        strings: list[object] = []
        for block in re.findall("```py\n(.*?)\n```", text, re.S):
            strings += [node.value for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Constant)]
        assert name in strings
        assert "<b>" not in text.partition("# ")[2].partition("\n")[0]


@pytest.mark.nightly
def test_an_export_is_uploaded_as_it_is(trained: dict[str, Path], here: Path) -> None:
    """In a process that knows the hub by its environment alone; where that refuses, the folder stays, and is whole."""
    with serving() as hub:
        words = [sys.executable, "-m", "dumo", "export", str(trained["digits"]), "--out", "out", "--push", "owner/name"]
        environment = {**ENVIRONMENT, **hub.environment, "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, f"out\n{hub.address}/owner/name\n"), done.stderr
        assert hub.files == (there := files(here / "out"))
        assert 'dumo.load("owner/name")' in there["README.md"].decode()
        hub.refuses = "/preupload/main"
        done = subprocess.run(
            [*words[:6], "two", *words[7:]], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (2, "two\n")
        assert "403" in done.stderr
        assert files(here / "two") == there


@pytest.mark.slow
def test_a_killed_export_leaves_no_folder_of_its_name(trained: dict[str, Path], here: Path) -> None:
    kill = "from dumo.export import dumo_run; dumo_run.write = lambda *a, **k: os.kill(os.getpid(), 9)"
    killed = finish(start("export", trained["digits"], "--out", "out/one", cwd=here, first=f"import os; {kill}"))
    assert killed.code == -9
    assert not (here / "out/one").exists()
    assert call("export", trained["digits"], "--out", "out/one").code == 0


@pytest.mark.slow
def test_the_card_says_what_was_measured_of_these_weights_alone(sd3: Case, tmp_path: Path) -> None:
    run, file = sd3.folder / "run", sd3.folder / "run" / EVALUATION_FILE
    scores: dict[str, Any] = {"nfe": 1, "solver": "restart", "fd_grey": 12.345}
    card = {**sample_settings(sd3.opened, sd3.opened.spec), "codec": None, "samples": 500}
    for sha256, there in ((sd3.opened.sha256, True), ("0" * 64, False)):
        report = {"step": 2, "protocol": "digits", "results": [scores], "contrast": []}
        file.write_text(json.dumps({**report, "card": {**card, "weights_sha256": sha256}}), encoding="utf-8")
        assert call("export", run, "--out", tmp_path / sha256).code == 0
        text = (tmp_path / sha256 / "README.md").read_text("utf-8")
        assert ("| 1 | restart | 12.3 |" in text) == there
        assert "sigmas=[1.0, 0.7], guidance_scale=1.0" in text
    file.unlink()
