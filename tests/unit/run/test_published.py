"""A run begins with another's weights, or a published SiT's, and is the same function then."""

from math import log
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dumo.config.load import load
from dumo.config.spec import Run
from dumo.io.deferred import load_parameters
from dumo.nets.dit_convert import from_diffusers
from dumo.nets.embed import grid_waves
from dumo.run.weights import build, init_from, load_run
from dumo.runtime.random import stream
from dumo.types import UserError
from trained import train
from unit.nets.given import Given
from unit.run.known import same, tiny

PATCH, WIDTH, DEPTH, ATTENTION, CLASSES, SIDE, CHANNELS = 2, 16, 2, 4, 10, 8, 1
CPU = torch.device("cpu")
Weights = dict[str, Tensor]


def published(sigma: bool, channels: int = CHANNELS) -> Weights:
    """Random weights of a tiny SiT or DiT by their authors' names; `sigma`: with twice the channels put out."""
    w, out = WIDTH, channels * (1 + sigma)
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (w, channels, PATCH, PATCH),
        "y_embedder.embedding_table.weight": (CLASSES + 1, w),
    }
    layers = {"t_embedder.mlp.0": (w, 256), "t_embedder.mlp.2": (w, w), "final_layer.linear": (PATCH**2 * out, w)}
    layers |= {"final_layer.adaLN_modulation.1": (2 * w, w)}
    for k in range(DEPTH):
        parts = {"adaLN_modulation.1": (6 * w, w), "attn.qkv": (3 * w, w), "attn.proj": (w, w)}
        parts |= {"mlp.fc1": (4 * w, w), "mlp.fc2": (w, 4 * w)}
        layers |= {f"blocks.{k}.{name}": shape for name, shape in parts.items()}
    shapes |= {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()} | {"x_embedder.proj.bias": (w,)}
    g = stream("published")
    found = {name: torch.randn(shape, generator=g) * 0.2 for name, shape in sorted(shapes.items())}
    return found | {"pos_embed": grid_waves(SIDE // PATCH, SIDE // PATCH, w)[None]}


def answer(w: Weights, x: Tensor, s: Tensor, c: Tensor) -> Tensor:
    """What a SiT of these weights puts out at its own time s, in float64: written from the papers."""
    w = {name: tensor.double() for name, tensor in w.items()}

    def linear(name: str, a: Tensor) -> Tensor:
        return a @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def shifted(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        mean, variance = h.mean(-1, keepdim=True), h.var(-1, unbiased=False, keepdim=True)
        return (h - mean) / (variance + 1e-6).sqrt() * (1 + scale[:, None]) + shift[:, None]

    b, g = len(x), SIDE // PATCH
    h = F.conv2d(x.double(), w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=PATCH)
    h = h.flatten(2).mT + w["pos_embed"]
    angles = s.double()[:, None] * torch.exp(-log(10_000.0) * torch.arange(128) / 128).double()
    e = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], -1))))
    e = F.silu(e + w["y_embedder.embedding_table.weight"][c])
    for k in range(DEPTH):
        m = linear(f"blocks.{k}.adaLN_modulation.1", e).chunk(6, -1)
        q, key, v = linear(f"blocks.{k}.attn.qkv", shifted(h, m[0], m[1])).chunk(3, -1)
        q, key, v = (part.unflatten(-1, (ATTENTION, -1)).transpose(1, 2) for part in (q, key, v))
        seen = (q @ key.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        h = h + m[2][:, None] * linear(f"blocks.{k}.attn.proj", seen.transpose(1, 2).flatten(2))
        a = F.gelu(linear(f"blocks.{k}.mlp.fc1", shifted(h, m[3], m[4])), approximate="tanh")
        h = h + m[5][:, None] * linear(f"blocks.{k}.mlp.fc2", a)
    y = linear("final_layer.linear", shifted(h, *linear("final_layer.adaLN_modulation.1", e).chunk(2, -1)))
    image = torch.zeros(b, y.shape[-1] // PATCH**2, SIDE, SIDE, dtype=torch.float64)
    for i in range(g):
        for j in range(g):
            patch = y[:, i * g + j].view(b, PATCH, PATCH, -1)  # row, column, channel
            image[:, :, i * PATCH : (i + 1) * PATCH, j * PATCH : (j + 1) * PATCH] = patch.permute(0, 3, 1, 2)
    return image[:, :CHANNELS]


def run_from(file: Path, *fields: str, kind: str = "sit") -> Run:
    """A run on digits that begins with the file."""
    sizes = (f"net.patch={PATCH}", f"net.width={WIDTH}", f"net.depth={DEPTH}", f"net.attention={ATTENTION}")
    return load("digits", [*sizes, "net.time_scale=1", f"start={{kind: {kind}, source: {file}}}", *fields])


def begun(run: Run, **start: object) -> nn.Module:
    """Its net, with the weights of its start."""
    assert run.start is not None
    net, loaders = init_from(run, run.start.model_copy(update=start))
    return load_parameters(net, loaders)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A SiT with a learned sigma."""
    save_file(published(sigma=True), tmp_path / "sit.safetensors")
    return tmp_path / "sit.safetensors"


@pytest.mark.parametrize("sigma", [True, False])
def test_the_velocity_is_the_published_one(sigma: bool, tmp_path: Path) -> None:
    weights, file = published(sigma), tmp_path / "sit.safetensors"
    save_file(weights | {"projectors.0.0.weight": torch.zeros(3, 3)}, file)
    run = run_from(file, "start.heads.u=v")
    net, g = begun(run).double().eval(), stream("at")
    x, c = torch.randn(3, CHANNELS, SIDE, SIDE, generator=g).double(), torch.tensor([0, 7, CLASSES])
    t = torch.tensor([0.05, 0.5, 0.97], dtype=torch.float64)
    with torch.no_grad():
        v, u = net(x, c, t=t)
    published_v = -answer(weights, x, 1 - t, c)
    assert float((v - published_v).abs().max() / published_v.abs().max()) < 1e-6
    assert torch.equal(u, v)


@pytest.fixture
def diffusers_dit(tmp_path: Path) -> Path:
    """A tiny DiT of diffusers, random but for the embeddings, of which every block has the first one's."""
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": ATTENTION, "attention_head_dim": WIDTH // ATTENTION, "num_layers": DEPTH}
    sizes |= {"sample_size": SIDE, "patch_size": PATCH, "in_channels": CHANNELS, "out_channels": 2 * CHANNELS}
    net, g = DiTTransformer2DModel(**sizes, num_embeds_ada_norm=CLASSES, norm_eps=1e-6), stream("diffusers")
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g) * 0.2
    net.transformer_blocks[1].norm1.emb.load_state_dict(net.transformer_blocks[0].norm1.emb.state_dict())
    net.save_pretrained(tmp_path / "dit")
    return tmp_path / "dit"


def test_diffusers_dit_says_the_same(diffusers_dit: Path) -> None:
    """A second witness, of all but the times: at its time 0, our 1, all waves are 1 and 0."""
    from diffusers import DiTTransformer2DModel

    theirs = DiTTransformer2DModel.from_pretrained(diffusers_dit).double().eval()
    weights = from_diffusers(load_file(diffusers_dit / "diffusion_pytorch_model.safetensors"))
    file = diffusers_dit / "authors.safetensors"
    save_file(weights, file)
    run = run_from(file)
    net, g = begun(run).double().eval(), stream("at")
    x, c = torch.randn(3, CHANNELS, SIDE, SIDE, generator=g).double(), torch.tensor([0, 7, CLASSES])
    with torch.no_grad():
        noise = theirs(x, timestep=torch.zeros(3).long(), class_labels=c).sample[:, :CHANNELS]
        ours, _ = net(x, c, t=torch.ones(3, dtype=torch.float64))
    assert float((ours + noise).abs().max() / noise.abs().max()) < 1e-6


def test_of_diffusers_folder_the_trunk(diffusers_dit: Path) -> None:
    run, found = run_from(diffusers_dit, kind="dit"), load_file(diffusers_dit / "diffusion_pytorch_model.safetensors")
    state = begun(run).state_dict()
    assert torch.equal(state["blocks.1.qkv.weight"][WIDTH : 2 * WIDTH], found["transformer_blocks.1.attn1.to_k.weight"])
    assert torch.equal(state["positions"], grid_waves(SIDE // PATCH, SIDE // PATCH, WIDTH))
    with pytest.raises(UserError):
        begun(run, kind="sit")


def test_of_a_dit_the_trunk_alone(file: Path) -> None:
    run = run_from(file, "net.time_scale=10", kind="dit")
    net, weights = begun(run), published(sigma=True)
    fresh = build(run, CPU).state_dict()
    for name, value in net.state_dict().items():
        if name.startswith(("heads.", "scalars.")):
            assert torch.equal(value, fresh[name]), name
    assert torch.equal(net.state_dict()["blocks.1.qkv.weight"], weights["blocks.1.attn.qkv.weight"])
    with pytest.raises(UserError):
        begun(run, heads={"u": "v"})


@pytest.mark.parametrize(
    "fields",
    [
        ["net.time_scale=10"],
        ["net.modern=true"],
        ["net.depth=1"],
        ["net.depth=3"],
        ["net.patch=4"],
        ["net.width=32"],
        ["net.width=384", "net.attention=4"],  # published nets of this width have 6 heads
    ],
)
def test_another_net_is_refused(fields: list[str], file: Path) -> None:
    with pytest.raises(UserError):
        begun(run_from(file, *fields))


def test_a_net_of_another_kind_or_that_reads_texts_is_refused(file: Path) -> None:
    with pytest.raises(UserError):
        begun(load("digits", ["net={kind: unet, width: 8, multipliers: [1]}", f"start={{kind: sit, source: {file}}}"]))
    run = run_from(file)
    with pytest.raises(UserError):
        begun(run.model_copy(update={"net": run.net.model_copy(update={"texts": Given()})}))


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on moons to begin with."""
    folder = tmp_path_factory.mktemp("start") / "fm"
    train(tiny("moons-flow-matching"), folder)
    return folder


@pytest.mark.slow
def test_a_start_is_another_runs_weights_by_name(known: Path, tmp_path: Path) -> None:
    asked = ["train.optimizer.lr=1e-12", "train.steps=1", f"start.source={known}"]
    there = load_run(str(known)).net.state_dict()
    state = train(tiny("moons", *asked, "start.heads.u=v"), tmp_path / "run")
    for name, value in state.net.state_dict().items():
        old = name.replace("heads.u.", "heads.v.")
        assert torch.allclose(value, there[old], atol=1e-6), name
    state = train(tiny("moons", *asked), tmp_path / "half")
    assert all(not value.abs().max() > 1e-6 for name, value in state.net.state_dict().items() if "heads.u" in name)


def test_a_start_that_does_not_fit_is_refused(known: Path, tmp_path: Path) -> None:
    for more in ("net.width=12", "net.time_scale=3", "start.heads.u=w"):
        with pytest.raises(UserError):
            train(tiny("moons", f"start.source={known}", more), tmp_path / "run")
    with pytest.raises(UserError):
        train(tiny("moons", f"start.source={known}", "objective.kind=sct", "path.kind=trig"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError):
        tiny("moons", f"start.source={known}", "start.heads.w=v")


@pytest.mark.nightly
def test_blocks_that_are_told_r_late_begin_as_a_velocity_that_knows_none(tmp_path: Path) -> None:
    small = (
        "data.held=360",
        "net.width=16",
        "net.attention=2",
        "train.batch=4",
        "train.steps=1",
    )
    train(load("digits-flow-matching", [*small]), tmp_path / "fm")
    asked = [*small, "train.optimizer.lr=1e-12", f"start.source={tmp_path / 'fm'}"]
    train(load("digits-dmf", asked), tmp_path / "late")
    before, after = (load_run(str(tmp_path / name)) for name in ("fm", "late"))
    x, t, c = torch.randn(2, *before.spec.data.shape), torch.tensor([0.3, 0.9]), torch.tensor([0, 1])
    assert torch.allclose(after.net(x, c, t=t, r=t)[0], before.net(x, c, t=t)[0], atol=1e-6)
    with pytest.raises(UserError):
        train(load("digits-meanflow", [*small, f"start.source={tmp_path / 'late'}"]), tmp_path / "all")


@pytest.mark.slow
def test_a_start_is_made_once(known: Path, tmp_path: Path) -> None:
    """A resumed run goes on from its own weights."""
    asked = [f"start.source={known}", "start.heads.u=v"]
    whole = train(tiny("moons", *asked), tmp_path / "whole")
    train(tiny("moons", *asked, "train.steps=2"), tmp_path / "run")
    again = train(tiny("moons", *asked), tmp_path / "run")
    assert same(whole.net, again.net)
