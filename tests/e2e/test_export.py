"""What is exported, stock programs run: the images are dumo's own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dumo.export import lora
from dumo.flow.generate import carried
from dumo.flow.solver import Euler
from dumo.run.evaluation.evaluate import FILE
from dumo.run.folder import open_run
from dumo.runtime.random import noise
from e2e.shell import call, finish, refused, sets, start
from stock.case import LORA, C, Case
from stock.family import PIXELS, ROWS

pytestmark = [  # of diffusers about its own parts, and of peft, which cannot merge what some LoRAs here say
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True`"),
]
FAMILIES = [name if name == "SD3" else pytest.param(name, marks=pytest.mark.slow) for name in ROWS]
TUNABLE = FAMILIES[:-2]  # but for PRX and Wan
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A run of SD3, exported: to be read."""
    return Case.of("SD3", tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A run of SD3's adapters, exported as a LoRA: to be read."""
    return Case.of("SD3", tmp_path_factory.mktemp("tuned"), LORA, to="lora")


def case_of(name: str, ready: Case, folder: Path, *fields: str, to: str = "diffusers") -> Case:
    return ready if name == "SD3" else Case.of(name, folder, *fields, to=to)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stock_pipeline_makes_dumos_images_to_the_bit(name: str, sd3: Case, tmp_path: Path) -> None:
    case = case_of(name, sd3, tmp_path)
    pipe = case.pipeline()
    assert [case.off(pipe, n) for n in (1, 2)] == [0, 0]
    assert case.seeded(pipe) == case.stock.seeded


@pytest.mark.parametrize("name", TUNABLE)
def test_a_lora_on_the_untouched_model_makes_dumos_images(name: str, tuned: Case, tmp_path: Path) -> None:
    case = case_of(name, tuned, tmp_path, LORA, to="lora")
    pipe = case.tuned()
    assert max(case.off(pipe, n) for n in (1, 2)) < 1e-5
    pipe.unload_lora_weights()
    assert case.off(pipe, 1) > 1e-2


def test_a_loras_parts_all_count(tuned: Case) -> None:
    """Adapters, last layer and embedder: an image without one of them is another."""
    whole = load_file(tuned.folder / "out" / lora.FILE)
    for part in ("transformer_blocks", "proj_out", "timestep_embedder"):
        left = {name: 0 * x if part in name else x for name, x in whole.items()}
        assert left.keys() == whole.keys()
        pipe = tuned.tuned()
        pipe.unload_lora_weights()
        pipe.load_lora_weights(left)
        assert tuned.off(pipe, 1) > 1e-4, part


def test_adapters_are_added_to_the_layers_of_a_pipelines_folder(tuned: Case, tmp_path: Path) -> None:
    done = call("export", tuned.folder / "run", tuned.folder / "merged")
    assert done.code == 0, done
    source, merged = tuned.folder / "source", tuned.folder / "merged" / "transformer"
    assert load_file(merged / WEIGHTS).keys() == load_file(source / WEIGHTS).keys()
    from diffusers import SD3Transformer2DModel

    pipe = tuned.pipeline(transformer=SD3Transformer2DModel.from_pretrained(merged), scheduler=tuned.tuned().scheduler)
    assert tuned.off(pipe, 2) < 1e-5


def test_one_file_holds_what_the_folder_holds(sd3: Case) -> None:
    file = sd3.folder / "model.safetensors"
    done = call("export", sd3.folder / "run", file, "--to", "safetensors")
    assert (done.code, done.out.strip()) == (0, str(file))
    one, other = load_file(file), load_file(sd3.folder / "out" / "transformer" / WEIGHTS)
    assert one.keys() == other.keys() == load_file(sd3.folder / "source" / WEIGHTS).keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_half_precision_is_rounded_once(sd3: Case) -> None:
    out = sd3.folder / "half"
    assert call("export", sd3.folder / "run", out, "--dtype", "bfloat16").code == 0
    one, other = (load_file(folder / "transformer" / WEIGHTS) for folder in (out, sd3.folder / "out"))
    assert all(torch.equal(one[name], other[name].bfloat16()) for name in one)


def test_the_velocity_is_an_ordinary_flow_model(sd3: Case) -> None:
    out = sd3.folder / "velocity"
    assert call("export", sd3.folder / "run", out, "--head", "v").code == 0
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    parts = {
        "transformer": SD3Transformer2DModel.from_pretrained(out / "transformer"),
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(out / "scheduler"),
    }
    image, _ = sd3.made(sd3.pipeline(**parts), {"sigmas": [1, 0.75, 0.5, 0.25], "guidance_scale": 1.0})
    reads, path = sd3.opened.sampler.reads, sd3.opened.run.path
    ours = carried(reads, path, Euler(), torch.tensor([C]), 4, lambda _: sd3.z)[1]
    torch.testing.assert_close(image, ours, rtol=0, atol=1e-5)


def fresh(program: str, *words: object, folder: Path) -> str:
    """What a new Python process without a network says; stderr, where it fails."""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(command, env=offline, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


ALONE = """
import sys

class NoDumo:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dumo":
            raise ImportError("dumo is not to be found")

sys.meta_path.insert(0, NoDumo())
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

given = load_file(sys.argv[2])
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
told = {"class_labels": [3, 7], "latents": given["z"], "noises": [given["fresh"]], "output_type": "latent"}
save_file({str(n): pipe(num_inference_steps=n, **told).images for n in (1, 2)}, sys.argv[2])
"""


@pytest.mark.slow
def test_dumos_own_net_runs_where_dumo_is_not(
    trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, file, run = tmp_path / "out", tmp_path / "given.safetensors", open_run(str(trained["digits"]), device="cpu")
    assert call("export", trained["digits"], out).code == 0
    z, other = (noise(run.run.sample.seed, [0, 1], k, run.run.data.shape) for k in (0, 1))
    save_file({"z": z, "fresh": other}, file)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    fresh(ALONE, out, file, folder=tmp_path)
    found = load_file(file)
    for n in (1, 2):
        assert torch.equal(found[str(n)], run.sampler.sample(torch.tensor([3, 7]), nfe=n).x)


def whole(folder: Path) -> None:
    """A whole pipeline of AuraFlow as diffusers saves it, tiny and random, that reads any text."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    diffusers.AuraFlowPipeline(
        tokenizer=transformers.ByT5Tokenizer(),
        text_encoder=transformers.T5EncoderModel(config),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8,) * 4, latent_channels=1, norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        transformer=ROWS["AuraFlow"].model.model(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
    ).save_pretrained(folder)  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_whole_pipeline_comes_along_and_its_card_runs(tmp_path: Path) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    whole(source)
    fields = sets("net.kind=diffusers", f"net.source={source}", "train.steps=2", "train.batch=4")
    assert call("train", "digits", "--out", run, *fields).code == 0
    for parts in ("copy", "link", "none"):
        assert call("export", run, tmp_path / parts, "--parts", parts).code == 0
    assert {path.name for path in (tmp_path / "none").iterdir()} == {
        *("README.md", "codes.safetensors", "dumo.json", "model_index.json", "scheduler", "transformer")
    }
    assert (tmp_path / "link" / "vae").is_symlink()
    assert not (tmp_path / "copy" / "vae").is_symlink()
    kept = (tmp_path / "copy" / "vae" / WEIGHTS).read_bytes()
    assert kept == (source / "vae" / WEIGHTS).read_bytes()
    for name in ("copy", "link"):
        code = re.search(r"```py\n(.*?)```", (tmp_path / name / "README.md").read_text("utf-8"), re.DOTALL)
        assert code
        said = fresh(code[1] + "\nprint(image.size, pipe.scheduler.config.shift)", folder=tmp_path)
        assert said.split() == ["(64,", "64)", "1.0"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_the_card_of_a_run_with_codes_makes_dumos_images(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As typed, with no other part of a pipeline; and told dumo's noise, what dumo makes of that class."""
    case, said = Case.of(name, tmp_path, "net.texts=null"), dict[str, Any]()
    code = re.search(r"```py\n(.*?)```", (tmp_path / "out" / "README.md").read_text("utf-8"), re.DOTALL)
    assert code
    monkeypatch.chdir(tmp_path)
    exec(code[1].replace(", 0  #", f", {C}  #"), said)
    assert case.row.back(said["image"][None]).numel() == case.z.numel()
    told = {**said["embeds"], **dict(case.row.more), **case.arguments(1), "latents": case.row.into(case.z)}
    image = said["pipe"](**told, height=PIXELS, width=PIXELS, output_type="latent", return_dict=False)[0]
    torch.testing.assert_close(case.row.back(image), case.dumo([], 1), rtol=0, atol=1e-5)


def test_refusals_are_lines_and_leave_nothing(sd3: Case, tuned: Case, trained: dict[str, Path], here: Path) -> None:
    run, out = sd3.folder / "run", here / "out"
    for words, said in (
        ((run, sd3.folder / "out"), "is there already"),
        ((run, out, "--to", "onnx"), "no --to 'onnx'; valid: diffusers"),
        ((run, out, "--to", "lora"), "all weights were tuned"),
        ((run, out, "--head", "w"), "has u, v"),
        ((run, out, "--parts", "move"), "no --parts 'move'"),
        ((run, out, "--dtype", "int4"), "no --dtype 'int4'"),
        ((trained["moons"], out), "net 'mlp'"),
        ((trained["digits"], out, "--to", "lora"), "of kind dit --to diffusers"),
        ((here, out), "no run's folder"),
    ):
        refused("export", *words, named=(said,), lines=None)


def test_a_failure_leaves_nothing(sd3: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dumo.export.card.of_tuned", fails)
    assert call("export", sd3.folder / "run", tmp_path / "out").code != 0
    assert [*tmp_path.iterdir()] == []


def test_what_a_run_says_of_itself_is_text_on_its_card(trained: dict[str, Path], here: Path) -> None:
    """A hub shows the card as a page."""
    run, about = shutil.copytree(trained["digits"], here / "run"), "<script>alert(1)</script> a|b"
    (run / "run.yaml").write_text(re.sub("about: .*", f"about: '{about}'", (run / "run.yaml").read_text()))
    assert call("export", run, "out").code == 0
    card = (here / "out/README.md").read_text()
    assert "| recipe | &lt;script&gt;alert(1)&lt;/script&gt; a\\|b |" in card
    assert "<script" not in card


def test_what_a_killed_export_left_goes_with_the_next_one(trained: dict[str, Path], here: Path) -> None:
    """A whole pipeline may be tens of GB; but what a name of ours might be, in a folder of the user's, stays."""
    kill = "from dumo.export import standalone; standalone.write = lambda *a, **k: os.kill(os.getpid(), 9)"
    killed = finish(start("export", trained["digits"], "out/one", cwd=here, first=f"import os; {kill}"))
    assert killed.code == -9
    assert [path.name.startswith(".one.") for path in (here / "out").iterdir()] == [True]
    (here / "out/.mine.old.tmp").write_bytes(b"")
    assert call("export", trained["digits"], "out/two").code == 0
    assert sorted(path.name for path in (here / "out").iterdir()) == [".mine.old.tmp", "two"]


def test_the_card_says_what_was_measured_of_these_weights_alone(sd3: Case, tmp_path: Path) -> None:
    run, file = sd3.folder / "run", sd3.folder / "run" / FILE
    scores: dict[str, Any] = {"nfe": 1, "solver": "restart", "fd_grey": 12.345}
    card = {"solver": {"kind": "restart"}, "codec": None, "samples": 500}
    for sha256, there in ((sd3.opened.sha256, True), ("0" * 64, False)):
        report = {"step": 2, "protocol": "digits", "results": [scores], "contrast": []}
        file.write_text(json.dumps({**report, "card": {**card, "weights_sha256": sha256}}), encoding="utf-8")
        assert call("export", run, tmp_path / sha256).code == 0
        text = (tmp_path / sha256 / "README.md").read_text("utf-8")
        assert ("| 1 | restart | 12.3 |" in text) == there
        assert "sigmas=[1.0, 0.5], guidance_scale=1.0" in text
    file.unlink()
