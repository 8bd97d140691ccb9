"""The exported folder of dumo's own DiT or U-Net makes dumo's images, by code that is not dumo's."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import encoders
from autoencoder import taef2
from dumo.config.difference import identity
from dumo.config.load import load, parse
from dumo.config.recipes import names
from dumo.config.spec import Run, with_pipeline
from dumo.data import Latents
from dumo.data.caption import CaptionFiles
from dumo.data.image import Images
from dumo.encoders import PipelineVae, SdVae, Taef2
from dumo.encoders.pipeline import Pipeline
from dumo.encoders.texttable import encode
from dumo.export.card import label_list
from dumo.export.write import export
from dumo.flow.solver import Euler
from dumo.io import trained
from dumo.io.picture import to_rows
from dumo.nets import DiT
from dumo.nets.table import TextTable
from dumo.nets.text import LearnedTexts, TokenTexts
from dumo.run.index import Index
from dumo.run.prompt import conditions_of_prompts
from dumo.run.weights import RunFolder, build, open_run
from dumo.runtime.random import noise, stream
from dumo.types import UserError
from pipelines import PIPELINES
from unit.encoders.test_codec import vae_of
from unit.nets.given import Given

SMALL = ("net.width=16", "net.depth=2", "net.attention=2")
C = torch.tensor([3, 7, 1])
Opener = Callable[[Path], Any]


@pytest.fixture
def pipeline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Opener:
    """Opens a folder as stock diffusers does; the code that comes along is kept in a folder of the test."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))

    def opened(folder: Path) -> Any:  # noqa: ANN401
        return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, local_files_only=True)

    return opened


def drawn(run: Run, folder: Path) -> RunFolder:
    """The run with random weights, as if it had been trained."""
    net, g = build(run, "cpu"), stream("standalone")
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g) * 0.1
    return RunFolder(run, Index.read(folder), net.eval(), step=1, weights="net.safetensors", listed_sha256="0" * 64)


def off(run: RunFolder, pipe: Any, n: int, **more: Any) -> float:  # noqa: ANN401
    """How far the pipeline's images in n passes are from dumo's."""
    z, *noises = (noise(0, range(len(C)), k, run.run.data.shape) for k in range(n))
    solver = Euler() if pipe.config.solver == "euler" else run.run.sample.solver
    ours = run.sampler.sample(C, nfe=n, seed=0, solver=solver).x
    out = pipe(C.tolist(), n, latents=z, noises=noises, **({"output_type": "latent"} | more)).images
    return float((out - (ours / 2 + 0.5 if more else ours)).abs().max())


RESTART = "sample.solver={kind: restart, m: 0.3, start: 0.9}"


@pytest.mark.parametrize(
    ("recipe", "fields", "head"),
    [
        ("digits", ("net.time_scale=10", RESTART), None),
        ("digits", (), "v"),  # the velocity next to the flow map
        ("digits-meanflow", (RESTART,), None),
        ("digits-flow-matching", ("sample.solver.kind=euler",), None),
        ("dumo-best", (), None),  # preserved magnitudes, and jumps to any time
        ("digits", ("net.magnitude=preserved", "net.modern=true", "sample.solver.kind=hermite"), None),
        ("digits", ("net.qk_norm=true",), None),
    ],
)
def test_dumos_images_to_the_bit(
    recipe: str, fields: tuple[str, ...], head: str | None, pipeline: Opener, tmp_path: Path
) -> None:
    """And the card says how they are made."""
    run = drawn(load(recipe, [*SMALL, *fields]), tmp_path)
    pipe = pipeline(out := export(run, tmp_path / "out", head=head))
    assert [off(run, pipe, n) for n in (1, 2, 3)] == [0, 0, 0]
    text, index = (out / "README.md").read_text("utf-8"), json.loads((out / "model_index.json").read_text("utf-8"))
    assert 'from_pretrained("out", dtype=torch.float32, trust_remote_code=True)' in text
    assert "class_labels=[0, 5], num_inference_steps=" in text
    assert "| images | 8 x 8 pixels |" in text
    assert re.search(r"\| objective \| (DuMo|MeanFlow|Flow matching|DuMo-Any) \(.*(arXiv|ours).*\), \d+ steps", text)
    assert index["_class_name"] == ["pipeline", "DumoPipeline"]
    code = {path.name: path.read_text("utf-8") for path in out.rglob("*.py")}
    assert code.keys() == {"pipeline.py", "dumo_dit.py"}
    assert not any("import dumo" in text or "from dumo" in text for text in code.values())
    origin = json.loads((out / "dumo.json").read_text("utf-8"))
    assert (origin["weights_sha256"], origin["run_sha256"]) == ("0" * 64, identity(run.run))
    assert parse(Run, origin["run"]) == run.run


def codec(kind: str, folder: Path) -> SdVae | Taef2:
    """A codec with random weights in `folder`."""
    if kind == "taef2":
        return Taef2(weights=str(taef2(folder / "taef2.safetensors")))
    vae_of(folder / "vae")
    return SdVae(weights=str(folder / "vae"))


@pytest.mark.parametrize("kind", ["taef2", "sd-vae"])
def test_the_decoder_is_inside(kind: str, pipeline: Opener, tmp_path: Path) -> None:
    run = load("digits", [*SMALL, RESTART])
    images = Images(root="", side=32, classes=10, names=tuple("abcdefghij"))
    data = Latents(root=str(tmp_path), images=images, codec=codec(kind, tmp_path))
    opened = drawn(run.model_copy(update={"data": data}), tmp_path)
    pipe = pipeline(export(opened, tmp_path / "out"))
    assert [off(opened, pipe, n, output_type="pt") for n in (1, 2)] == pytest.approx([0, 0], abs=4e-6)


@pytest.mark.parametrize("family", ["Qwen-Image", "Flux2"])
def test_a_decoder_that_is_called_otherwise_is_refused(family: str, tmp_path: Path) -> None:
    """Of videos, or of normalized patches."""
    vae = PIPELINES[family].vae()
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    images = Images(root="", side=64, classes=10, names=tuple("abcdefghij"))
    pipeline = Pipeline(source=str(tmp_path / "pipeline"))
    data = with_pipeline(Latents(root=str(tmp_path), images=images, codec=PipelineVae()), pipeline)
    run = drawn(load("digits", SMALL).model_copy(update={"data": data, "pipeline": pipeline}), tmp_path)
    with pytest.raises(UserError, match=f"^data.codec is an {type(vae).__name__}, .*: sample it by dumo sample"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_generator_draws_all_noise(pipeline: Opener, tmp_path: Path) -> None:
    pipe = pipeline(export(drawn(load("digits", SMALL), tmp_path), tmp_path / "out"))
    g = torch.Generator().manual_seed(3)
    z, fresh = (torch.randn(2, 1, 8, 8, generator=g) for _ in range(2))
    given = pipe([3, 7], 2, latents=z, noises=[fresh], output_type="np").images
    assert (pipe([3, 7], 2, generator=torch.Generator().manual_seed(3), output_type="np").images == given).all()
    assert pipe(3).images[0].size == (8, 8)


def test_a_card_asks_for_no_more_passes_than_were_taught(tmp_path: Path) -> None:
    """Its net learned to jump from t = 1 alone."""
    export(drawn(load("digits-tbsm", SMALL), tmp_path), tmp_path / "out")
    assert re.findall(r"num_inference_steps=(\d+)", (tmp_path / "out/README.md").read_text("utf-8")) == ["1"]


def test_half_precision_is_rounded_once(pipeline: Opener, tmp_path: Path) -> None:
    run = drawn(load("digits", SMALL), tmp_path)
    full, half = (pipeline(export(run, tmp_path / dtype, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    for name, w in half.net.state_dict().items():
        assert torch.equal(w, full.net.state_dict()[name].bfloat16().float()), name
    assert 0 < off(run, half, 1) < 0.1


# Recipes of dumo's own nets whose runs are refused, and what says so.
REFUSED = {
    "digits-shortcut": "its net takes k",
    "digits-pi-flow": "has no head that can be exported",
    "digits-sct": "has no head that can be exported",
}
EARLY = [  # those that pages recommend, and one of each option of a net
    "digits",
    "dumo-best",
    "dumo-best-latents",
    "cifar10-overnight",
    "cifar10-small",  # a U-Net
    "my-images",
    "digits-meanflow",
    "digits-flow-matching",
    "digits-ect",  # EDM's frame
    "digits-dmf",  # r for t in late blocks
    "imagenet256-xl2-modern",
    "digits-words",  # a text encoder that is trained along
    "cifar10-latents-words",
    "text-256",  # a published one
]
RUN_CARDS = """
import ast, os, sys
import numpy

class NoDumo:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dumo":
            raise ImportError("dumo is not to be found")

sys.meta_path.insert(0, NoDumo())
for name in sys.argv[1:]:
    card = open(f"{name}/README.md", encoding="utf-8").read().partition("```py\\n")[2].partition("\\n```")[0]
    scope, calls = {}, []
    for statement in ast.parse(card).body:
        exec(compile(ast.Module([statement], []), name, "exec"), scope)
        if "images" in scope:
            calls.append(numpy.stack([numpy.asarray(image) for image in scope.pop("images")]))
    numpy.savez(f"{name}.npz", *calls)
"""


def opened_run(name: str, folder: Path, **encoder: Any) -> RunFolder:  # noqa: ANN401, fields of a text encoder
    """A run that comes with dumo; or of a recipe, with a narrow net, taef2's autoencoder and a narrow text encoder.

    All of their weights are random, as are the embeddings of captions that lie in files.
    """
    if name in trained.names():
        return open_run(name, device="cpu")  # by its copy in runs/
    run = load(name, ["train.precision=fp32"])  # as stock diffusers samples
    if isinstance(run.net, DiT):
        late = 1 if run.net.late else None
        net = run.net.model_copy(update={"width": 16, "depth": 2, "attention": 2, "late": late, "route": None})
        if net.texts:
            net = net.model_copy(update={"texts": texts_of(run, folder / f"{name}-texts", **encoder)})
    else:
        net = run.net.model_copy(update={"width": 8, "multipliers": (1, 2), "depth": 1, "attend": (8,)})
    data = run.data
    classes = data.classes or 0
    if isinstance(data.captions, CaptionFiles):
        classes = len(CAPTIONS)
    images = Images(root="", side=32, classes=classes, names=(), captions=data.captions)
    if isinstance(data, Images):
        data = images
    elif isinstance(data, Latents):
        data = Latents(root=str(folder), images=images, codec=codec("taef2", folder))
    return drawn(run.model_copy(update={"net": net, "data": data}), folder)


CAPTIONS = ("a red car", "a blue car", "cat")  # instead of those in files


def texts_of(run: Run, folder: Path, **encoder: Any) -> LearnedTexts | TextTable:  # noqa: ANN401
    """The texts of a run's net through a narrow encoder: its table is in `folder`. `encoder`: fields of a published."""
    from transformers import ByT5Tokenizer  # slow to import

    texts = run.net.texts
    if isinstance(texts, LearnedTexts):
        encode(run.data.caption_texts(), texts.tokenizer, folder)
        return texts.model_copy(update={"root": str(folder), "width": 8})
    assert isinstance(texts, TextTable)
    source = folder / "sana"
    if encoder.get("pooled"):
        encoders.clip(source)
    else:
        encoders.t5(source / "text_encoder")
        (source / "text_encoder/tokenizer_config.json").unlink()
        ByT5Tokenizer(extra_ids=0).save_pretrained(source / "tokenizer")
    reader = texts.encoder.model_copy(update={"source": str(source), "length": 40, **encoder})
    encode(CAPTIONS, reader, folder / "table")
    pooled = 8 if reader.pooled else 0
    sizes = {"width": encoders.WIDTH, "pooled": pooled}
    return texts.model_copy(update={"root": str(folder / "table"), "encoder": reader, **sizes})


def other_recipes() -> list[str]:
    """The recipes of dumo's own nets that are exported, without EARLY."""
    own = [name for name in names() if load(name).net.kind in ("dit", "unet")]
    return [name for name in own if name not in (*EARLY, *REFUSED)]


def card_pixels(run: RunFolder, n: int, card: str) -> np.ndarray:
    """Dumo's images of the card's two labels, or of its prompts, in n passes, from the noise of its generator."""
    sampler, g = run.sampler, torch.Generator().manual_seed(0)
    labels = torch.tensor([0, run.run.data.classes // 2])
    prompts = re.search(r"pipe\(prompt=(\[.*?\])", card)
    if prompts:
        labels = conditions_of_prompts(sampler, ast.literal_eval(prompts[1]))
    solver = Euler() if n == 50 else sampler.spec.solver  # the number of passes on cards of a velocity
    draws = [torch.randn(len(labels), *run.run.data.shape, generator=g) for _ in range(n)]
    with torch.no_grad():
        x = solver(sampler.reads, sampler.flow.path, draws[0], labels, n, draws.__getitem__)
    return to_rows(sampler.decode(sampler.flow.path.sd * x)).numpy()


@pytest.mark.parametrize(
    "recipes_of",
    [
        pytest.param(lambda: [*trained.names(), *EARLY], marks=pytest.mark.slow, id="early"),
        pytest.param(other_recipes, marks=pytest.mark.nightly, id="others"),
    ],
)
def test_the_card_of_every_recipe_makes_dumos_pixels(
    recipes_of: Callable[[], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands, in a process without dumo. So do those of the runs that come with dumo."""
    monkeypatch.chdir(tmp_path)
    recipes = recipes_of()
    runs = {name: opened_run(name, tmp_path) for name in recipes}
    for name, run in runs.items():
        export(run, tmp_path / name)
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(tmp_path / "code")}
    command = [sys.executable, "-c", RUN_CARDS, *recipes]
    done = subprocess.run(command, env=offline, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, run in runs.items():
        card = (tmp_path / name / "README.md").read_text("utf-8")
        calls = re.findall(r"num_inference_steps=(\d+)", card)
        images = np.load(tmp_path / f"{name}.npz")
        assert len(images.files) == len(calls) > 0, name
        for n, made in zip(map(int, calls), images.values(), strict=True):
            ours = card_pixels(run, n, card)
            assert ours.std() > 10, name  # not one colour
            colours = made if made.ndim == 4 else made[..., None]  # of grey images, all three are one
            assert (colours == ours).all(), (name, n)


@pytest.mark.parametrize(
    ("encoder", "parts"),
    [
        ({"length": 12, "pooled": True, "layer": -2, "pad": True}, "copy"),  # CLIP
        pytest.param({"template": "say: {}!", "skip": 5, "precision": "fp32"}, "none", marks=pytest.mark.slow),
        pytest.param({"dtype": "float16"}, "link", marks=pytest.mark.nightly),
    ],
)
def test_a_published_text_encoder_is_copied_linked_or_named(
    encoder: dict[str, Any], parts: str, pipeline: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card opens it, and the pipeline reads a prompt as dumo does."""
    run = opened_run("text-256", tmp_path, **encoder)
    source = tmp_path / "text-256-texts"
    out = export(run, source / "out", parts=parts)
    assert (out / "text_encoder").exists() == (out / "tokenizer").exists() == (parts != "none")
    assert (out / "text_encoder").is_symlink() == (parts == "link")
    card = (out / "README.md").read_text("utf-8")
    assert "`sana`" in card
    assert ("licence of their own" in card) == (parts != "none")
    monkeypatch.chdir(source)  # where the card finds sana
    scope: dict[str, Any] = {}
    exec(card.partition("```py\n")[2].partition("\nimages")[0], scope)
    prompts = ["a blue car of a cat", "a cat"]
    z = noise(0, range(2), 0, run.run.data.shape)
    ours = run.sampler.sample(conditions_of_prompts(run.sampler, prompts), nfe=1, z=z).x
    images = scope["pipe"](prompt=prompts, latents=z, output_type="pt").images
    assert float((2 * images - 1 - ours).abs().max()) < 1e-5
    if parts == "copy":  # the card's way to less memory
        dtypes = {"default": torch.float32, "text_encoder": torch.bfloat16}
        pipe = type(scope["pipe"]).from_pretrained(out, dtype=dtypes, trust_remote_code=True)
        assert (pipe.text_encoder.dtype, pipe.net.dtype) == (torch.bfloat16, torch.float32)
        assert pipe(prompt=prompts, latents=z, output_type="latent").images.isfinite().all()


@pytest.mark.nightly
def test_a_text_encoder_that_was_trained_along_is_rounded_with_the_net(pipeline: Opener, tmp_path: Path) -> None:
    run = opened_run("digits-words", tmp_path)
    pipe = pipeline(export(run, tmp_path / "out", dtype="bfloat16"))
    texts = run.sampler.texts
    assert isinstance(texts, TokenTexts)
    shipped = pipe.text_encoder.encoder.state_dict()
    for name, w in texts.encoder.state_dict().items():
        assert torch.equal(shipped[name].float(), w.bfloat16().float()), name
    assert texts.encoder.dtype == torch.float32  # the run's own is as it was


def test_an_encoder_that_was_trained_along_reads_prompts(pipeline: Opener, tmp_path: Path) -> None:
    """Its own, also as embeddings; "" is no caption. What is cut is said, and labels are refused."""
    run = opened_run("digits-words", tmp_path)
    pipe = pipeline(export(run, tmp_path / "out"))
    z = noise(0, range(3), 0, run.run.data.shape)
    null = torch.tensor([run.run.data.classes])
    c = torch.cat([conditions_of_prompts(run.sampler, ["please draw an eight", "the digit 8"]), null])
    ours = run.sampler.sample(c, nfe=1, z=z).x
    prompt = [" please draw an eight", "the digit 8", ""]
    images = pipe(prompt=prompt, latents=z, output_type="latent").images
    assert torch.equal(images, ours)
    embeddings, mask, pooled = pipe.encode_prompt(prompt)
    again = pipe(prompt_embeds=embeddings, prompt_attention_mask=mask, latents=z, output_type="latent").images
    assert torch.equal(images, again)
    assert pooled is None
    with pytest.raises(ValueError, match="reads texts, not labels"):
        pipe(3)
    with pytest.raises(ValueError, match="give a prompt, or prompt_embeds"):
        pipe(prompt="a", prompt_embeds=embeddings)
    pipe.register_modules(text_encoder=None)
    with pytest.raises(ValueError, match="there is no text encoder"):
        pipe(prompt="a")


def test_a_prompt_that_is_cut_is_said(pipeline: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(export(opened_run("digits-words", tmp_path), tmp_path / "out"))
    warnings: list[str] = []
    monkeypatch.setattr(sys.modules[type(pipe).__module__].logger, "warning", warnings.append)  # pyright: ignore
    pipe.encode_prompt(["a seven", "a seven with a long tail"])
    assert not warnings
    pipe.encode_prompt(["a seven with a very long tail"])
    assert warnings == ["'a seven with a very long tail' has 30 tokens, and is cut behind 26"]


def test_labels_are_read_where_no_text_is(pipeline: Opener, tmp_path: Path) -> None:
    pipe = pipeline(export(drawn(load("digits", SMALL), tmp_path), tmp_path / "out"))
    with pytest.raises(ValueError, match="reads labels of classes, not texts"):
        pipe(prompt="a seven")


def test_a_text_encoder_that_is_read_in_another_way_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dumo.export.shipped.pipeline import DumoPipeline

    run = opened_run("digits-words", tmp_path)
    monkeypatch.setattr(DumoPipeline, "_rounded", lambda self, x: 2 * x)  # pyright: ignore
    with pytest.raises(UserError, match="reads prompts through T5EncoderModel in another way"):
        export(run, tmp_path / "out")


def test_a_card_names_the_labels() -> None:
    assert label_list(open_run("cifar10-trained", device="cpu").sampler).startswith("0 airplane, 1 automobile, 2 bird")
    assert label_list(open_run("digits-trained", device="cpu").sampler) == "0 to 9"


def test_the_embedding_of_times_is_the_same_in_both_nets() -> None:
    """It stands in two files, because each lies in a folder by itself."""
    from dumo.export.shipped import dumo_dit, dumo_unet

    assert inspect.getsource(dumo_dit.Times) == inspect.getsource(dumo_unet.Times)


@pytest.mark.parametrize("name", REFUSED)
def test_recipes_that_no_code_knows_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(REFUSED[name])):
        export(drawn(load(name), tmp_path), tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


def test_texts_that_no_code_knows_are_refused(tmp_path: Path) -> None:
    net = load("digits", SMALL).net.model_copy(update={"texts": Given()})
    with pytest.raises(UserError, match=r"net\.texts\.kind is given"):
        export(drawn(load("digits").model_copy(update={"net": net}), tmp_path), tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("recipe", "field", "named"),
    [
        ("digits", "net.precondition=data", "net.precondition is data"),
        (
            "digits-flow-matching",
            "sample.guide.scale=2",
            r"sample.guide.scale is 2, which the exported code.*dumo sample",
        ),
    ],
)
def test_what_the_code_does_not_know_is_refused(recipe: str, field: str, named: str, tmp_path: Path) -> None:
    run = load(recipe, [*SMALL, field, "objective.drop=0.1"])
    with pytest.raises(UserError, match=named):
        export(drawn(run, tmp_path), tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


def test_a_preconditioned_unet_is_refused(tmp_path: Path) -> None:
    unet = "net={kind: unet, width: 16, multipliers: [1], depth: 1, precondition: edm}"
    with pytest.raises(UserError, match=r"net\.precondition is edm, which the exported code"):
        export(drawn(load("digits", [unet]), tmp_path), tmp_path / "out")


def test_other_code_than_dumos_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dumo.export.shipped import dumo_dit

    monkeypatch.setattr(dumo_dit, "norm", lambda h, rms: torch.nn.functional.layer_norm(h, h.shape[-1:], eps=1e-5))  # pyright: ignore
    with pytest.raises(UserError, match="in another way"):
        export(drawn(load("digits", SMALL), tmp_path), tmp_path / "out")
