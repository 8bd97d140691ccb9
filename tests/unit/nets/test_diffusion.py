"""UNets and transformers that learned noise: velocities of the stock model, an exact step, heads, refusals."""

import copy
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import transformers_tiny as tiny
from dumo.flow.guide import Guide
from dumo.flow.noisy_batch import draw
from dumo.flow.path import Diffusion
from dumo.flow.precision import Precision
from dumo.flow.slope import DualSlope, JvpSlope, Slope
from dumo.nets import Pretrained
from dumo.nets.dualized import Dualized, time_embedder_paths
from dumo.nets.family import FAMILIES, PIXART, PIXART_ALPHA, Family, find_family
from dumo.nets.lora import Lora, adapters
from dumo.objectives import DuMo
from dumo.run import flops, memory
from dumo.types import Frozen, UserError
from tiers import tiered
from transformers_saved import CLASSES, NOISE, SHAPE, Saved, batch, built, of, saved, texts

LORA = Lora(rank=4)
CONVOLUTIONS = Lora(rank=4, convolutions=True)
SOME = tiered(NOISE, now=("sd1", "pixart"), ci=NOISE)


def scheduler(name: str, spec: Pretrained) -> Any:  # noqa: ANN401, of diffusers
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_pretrained(spec.pipeline.folder / "scheduler")


def answer(name: str, model: Any, x: Tensor, c: Tensor, index: Tensor) -> Tensor:  # noqa: ANN401
    """What the stock model says of x_vp at these indices, without a learned variance."""
    rows = texts(name)
    drawn = {3: rows["tokens"][c], 2: rows.get("pooled", rows["tokens"][:, 0])[c]}
    given = tiny.TINY[name].given(x, index / 1000, lambda *shape: drawn[len(shape)])
    if "encoder_attention_mask" in given:
        given["encoder_attention_mask"] = rows["mask"][c].to(x.dtype)
    if "added_cond_kwargs" in given and "time_ids" in given["added_cond_kwargs"]:
        given["added_cond_kwargs"]["time_ids"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * len(c))
    return model(**given | {"timestep": index}, return_dict=False)[0][:, : x.shape[1]]


@pytest.mark.parametrize("name", SOME)
def test_every_head_begins_as_the_model(folder: Saved, name: str) -> None:
    """At indices of the table: the data by diffusers' own scheduler are x_t - t v, from x_vp as from x_t."""
    spec, (x, c, _) = folder(name), batch()
    index = torch.tensor([999, 421])
    net, table = built(spec), scheduler(name, spec)
    frame = net.diffusion
    assert frame is not None
    t = torch.as_tensor(frame.schedule.times[index.numpy()] / frame.schedule.last_time).float()
    bars = table.alphas_cumprod[index].view(-1, 1, 1, 1)
    a, s = bars.sqrt(), (1 - bars).sqrt()
    said = answer(name, tiny.TINY[name].model(), x, c, index)
    v_type = table.config.prediction_type == "v_prediction"
    data = a * x - s * said if v_type else (x - s * said) / a
    x_t = x / (a + s)
    v, u = net(x_t, c, t=t)
    assert torch.equal(u, v)
    assert v.std() > 0.01
    guess = x_t - t.view(-1, 1, 1, 1) * v
    assert (guess - data).norm() / data.norm() < 1e-5


@pytest.mark.parametrize("name", SOME)
def test_heads_go_their_own_ways(folder: Saved, name: str) -> None:
    x, c, t = batch()
    net = built(folder(name))
    before = net(x, c, t=t)
    with torch.no_grad():
        net.heads["u"].out.bias.add_(1.0)
    v, u = net(x, c, t=t)
    assert torch.equal(v, before[0])
    assert not torch.allclose(u, before[1])


ADAPTED = [*product(NOISE, (None, LORA)), ("sd1", CONVOLUTIONS), ("sdxl", CONVOLUTIONS)]
FIRST, NEXT = [("sd1", LORA), ("pixart", None)], [("sdxl", CONVOLUTIONS)]


def tuned(lora: Lora | None) -> str:
    """How, in the name of a test."""
    if lora is None:
        return "full"
    return "convolutions" if lora.convolutions else "lora"


@pytest.mark.parametrize(
    ("name", "lora"),
    tiered(
        ADAPTED,
        now=[("sd1", LORA), ("pixart", None)],
        ci=[("sdxl", CONVOLUTIONS)],
        id=lambda case: f"{case[0]}-{tuned(case[1])}",
    ),
)
def test_one_guided_step_is_exact(folder: Saved, name: str, lora: Lora | None) -> None:
    """DuMo's gradient by the slope that rides is that by forward-mode differentiation, and every parameter has one."""
    nets = [built(folder(name), lora=lora, lowpass=10.0) for _ in range(2)]
    dual, jvp = (gradient(net, slope) for net, slope in zip(nets, (DualSlope(), JvpSlope()), strict=True))
    assert dual.keys() == jvp.keys() == {n for n, p in nets[0].named_parameters() if p.requires_grad}
    size = torch.stack([g.norm() for g in jvp.values()]).norm()
    assert torch.stack([(dual[n] - g).norm() for n, g in jvp.items()]).norm() / size < 1e-5


def gradient(net: Dualized, slope: Slope) -> dict[str, Tensor]:
    """Of every parameter that has one."""
    loss(net, DuMo(slope=slope, drop=0.1, guide=Guide(zeta=0.55))).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def loss(net: Dualized, objective: DuMo) -> Tensor:
    """That of a step."""
    x, c, _ = batch(4)
    assert net.diffusion is not None
    path = Diffusion(schedule=net.diffusion.schedule)
    record = draw(objective, path, x, c, torch.full_like(c, CLASSES), seed=0, step=0)
    return objective.loss(net.train(), Frozen(net), record).loss.mean()


def step(net: Dualized) -> None:
    """Two of AdamW."""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss(net, DuMo(slope=DualSlope(), drop=0.1)).backward()
        optimizer.step()


@pytest.mark.nightly
@pytest.mark.parametrize("name", SOME)
def test_the_pass_that_carries_a_tangent_has_the_bits_of_the_other(folder: Saved, name: str) -> None:
    net, (x, c, t) = built(folder(name)), batch()
    heads, along = DualSlope()(net, Frozen(net), x, c, t=t)
    assert all(torch.equal(a, b) for a, b in zip(heads, net(x, c, t=t), strict=True))
    w = torch.randn_like(x)
    (dv, _), jvp = along(w), JvpSlope().derivatives(Frozen(net), x, c, w, t=t)[0]
    assert (dv - jvp).norm() / jvp.norm() < 1e-5


@pytest.mark.nightly
@pytest.mark.parametrize("name", SOME)
def test_adapters_leave_the_model_as_it_is(folder: Saved, name: str) -> None:
    """A step moves adapters of attention and perceptrons, heads and embedder alone, and in `base` all is as it was."""
    x, c, t = batch()
    old = built(folder(name))(x, c, t=t)[0]
    net = built(folder(name), lora=LORA, lowpass=10.0)
    mine = {id(layer) for layer in adapters(net.model)}
    where = {path.split(".transformer_blocks")[-1] for path, layer in net.model.named_modules() if id(layer) in mine}
    assert where
    assert not [path for path in where if "time" in path or "resnets" in path]
    before = copy.deepcopy(net.state_dict())
    with net.base():
        begun = net(x, c, t=t)
    step(net)
    moved = {name for name, w in net.state_dict().items() if not torch.equal(w, before[name])}
    ours = ("heads.", *(f"model.{path}." for path in time_embedder_paths(net.model, net.family)))
    assert moved
    assert all("lora_" in name or name.startswith(ours) for name in moved)
    with net.base():
        assert all(torch.equal(head, then) for head, then in zip(net(x, c, t=t), begun, strict=True))
    assert torch.allclose(begun[0], old, rtol=0, atol=1e-4)  # a product's last bits depend on where its factors lie
    assert not torch.allclose(net(x, c, t=t)[1], old, atol=1e-3)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("lora", tiered([None, LORA], now=[LORA], id=tuned))
def test_stock_is_the_model_with_one_head(folder: Saved, name: str, lora: Lora | None, tmp_path: Path) -> None:
    """Of the old class, names and shapes; read by a net of its own it gives what the head gives."""
    x, c, t = batch()
    net = built(folder(name), lora=lora, lowpass=10.0)
    step(net)
    u = net(x, c, t=t)[1]
    stock = net.single_head_model("u", merged=True)
    stock.save_pretrained(tmp_path)
    (tmp_path / "scheduler").symlink_to(folder(name).pipeline.folder / "scheduler")
    assert set(stock.state_dict()) == set(tiny.TINY[name].model().state_dict())
    loaded = of(tmp_path, lowpass=None).model_copy(update={"texts": folder(name).texts})
    again = built(loaded)(x, c, t=t)[0]
    assert (again - u).norm() / u.norm() < 1e-5
    assert torch.equal(net(x, c, t=t)[1], u)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_convolutions_have_adapters_by_choice(folder: Saved, name: str) -> None:
    """All of the blocks, and no projection of time; the first and the last convolution are in no block."""
    net = built(folder(name), lora=CONVOLUTIONS)
    mine = {id(layer) for layer in adapters(net.model)}
    found = {path for path, layer in net.model.named_modules() if id(layer) in mine and layer.weight.ndim == 4}
    kinds = {re.sub(r"\.\d+", "", path).rpartition("s.")[2] for path in found}
    assert kinds >= {"conv1", "conv2", "conv_shortcut", "conv"}
    assert len(found) + 2 == sum(w.ndim == 4 for w in folder(name).load_model(net.config, net.family)[1].values())
    step(net)
    assert all(layer.lora_B["default"].weight.any() for layer in adapters(net.model))


CUTS = {  # of SDXL: SSD-1B's layers, KOALA's missing middle
    "ssd": {
        "transformer_layers_per_block": [1, [2, 1]], "reverse_transformer_layers_per_block": [[2, 1, 1], 1],
        "layers_per_block": 2, "mid_block_type": "UNetMidBlock2D",
    },
    "middle-less": {"mid_block_type": None},
}  # fmt: skip


CROSS = {
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}


@pytest.mark.parametrize(
    ("layers", "more"),
    tiered(
        [((1, 5), {}), ((3, 4), CROSS), ((3, 2), {**CROSS, "block_out_channels": [32, 32]}), ((2, 5), CUTS["ssd"])],
        now=[((1, 5), {})],
        id=lambda case: f"{case[0]} {len(case[1])}",
    ),
)
@pytest.mark.parametrize("lora", [None, LORA], ids=tuned)
def test_a_unet_is_counted_by_the_first_blocks_of_its_transformers(
    layers: tuple[int, int], more: dict[str, Any], lora: Lora | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last operation, at whatever depth, and with levels that are alike but for their size."""
    import diffusers

    spec, row = saved(tmp_path, "sdxl"), tiny.TINY["sdxl"]
    config: dict[str, Any] = {**row.config, "transformer_layers_per_block": [*layers], **more}
    diffusers.UNet2DConditionModel.from_config(config).save_pretrained(spec.pipeline.folder)
    net = built(spec, lora=lora)
    assert net.diffusion is not None
    path = Diffusion(schedule=net.diffusion.schedule)
    objective = DuMo(slope=DualSlope())
    counts: list[tuple[float, flops.StepCost]] = []
    for few in (1, 1000):
        monkeypatch.setattr(flops, "MAX_BLOCKS_RUN", few)
        passed = flops.forward_flops(net, objective, SHAPE)
        counts.append((passed, flops.step_cost(net, objective, path, SHAPE)))
    assert counts[0] == counts[1]
    assert counts[0][0] == counts[0][1].pass_flops


@pytest.mark.parametrize(
    ("layers", "more"),
    tiered(
        [((1, 5), {}), ((3, 4), CROSS), ((4, 9), CROSS)],
        now=[((1, 5), {})],
        id=lambda case: f"{case[0]} {len(case[1])}",
    ),
)
@pytest.mark.parametrize("lora", [None, LORA], ids=tuned)
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("precision", tiered(["fp32", "bf16"], now=["bf16"]))
def test_so_are_its_bytes(
    layers: tuple[int, int],
    more: dict[str, Any],
    lora: Lora | None,
    checkpoint: bool,
    precision: Precision,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the last byte, and all blocks are followed only where some are gone at the peak."""
    import diffusers

    spec, row = saved(tmp_path, "sdxl"), tiny.TINY["sdxl"]
    config: dict[str, Any] = {**row.config, "transformer_layers_per_block": [*layers], **more}
    diffusers.UNet2DConditionModel.from_config(config).save_pretrained(spec.pipeline.folder)
    net = built(spec.model_copy(update={"checkpoint": checkpoint}), lora=lora)
    assert net.diffusion is not None
    path = Diffusion(schedule=net.diffusion.schedule)
    objective = DuMo(slope=DualSlope())
    followed: list[int] = []
    follow_step = memory._follow_step

    def follow(net: nn.Module, *args: Any, **named: Any) -> Any:  # noqa: ANN401
        followed.append(sum(len(stretch.blocks) for stretch in flops.stretches(net)))
        return follow_step(net, *args, **named)

    monkeypatch.setattr(memory, "_follow_step", follow)

    def count() -> int:
        return memory.activation_bytes(net, objective, path, SHAPE, rows=2, precision=precision)

    few = count()
    monkeypatch.setattr(flops, "sample_blocks", lambda net: flops.SampledNet(net, {}))
    assert few == count()
    assert followed[0] < followed[-1]


@pytest.mark.nightly
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("lora", [None, LORA], ids=tuned)
def test_cuts_of_sdxl_are_trained_and_exported(cut: str, lora: Lora | None, tmp_path: Path) -> None:
    """Other numbers of layers in each block, no attention in the middle, or no middle: from a folder to a folder."""
    import diffusers

    (spec, (x, c, t)), row = (saved(tmp_path, "sdxl"), batch()), tiny.TINY["sdxl"]
    folder = spec.pipeline.folder
    model: Any = diffusers.UNet2DConditionModel.from_config({**row.config, **CUTS[cut]})
    model.save_pretrained(folder)
    assert not getattr(model.mid_block, "attentions", None)
    net = built(spec, lora=lora, lowpass=10.0)
    assert net.family.pipeline == "StableDiffusionXLPipeline"
    step(net)
    grads = list[dict[str, Tensor]]()
    for slope in (DualSlope(), JvpSlope()):
        net.zero_grad()
        grads.append(gradient(net, slope))
    dual, jvp = grads
    size = torch.stack([g.norm() for g in jvp.values()]).norm()
    assert torch.stack([(dual[n] - g).norm() for n, g in jvp.items()]).norm() / size < 1e-5
    assert built(spec.short(1))(x, c, t=t)[0].shape == x.shape
    out = tmp_path / "out"
    net.single_head_model("u", merged=True).save_pretrained(out)
    (out / "scheduler").symlink_to(folder / "scheduler")
    loaded = of(out, lowpass=None).model_copy(update={"texts": spec.texts})
    assert diffusers.UNet2DConditionModel.from_pretrained(out).config.mid_block_type == CUTS[cut]["mid_block_type"]
    u = net(x, c, t=t)[1]
    assert (built(loaded)(x, c, t=t)[0] - u).norm() / u.norm() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_sizes_stay_where_time_is_cut(folder: Saved, name: str) -> None:
    """The low-pass is of the embedder of time alone, and blocks include the middle of a UNet."""
    net = built(folder(name), lowpass=10.0)
    assert time_embedder_paths(net.model, net.family) == ["time_embedding"]
    assert len(net.lowpass_fits) == 1
    assert any(block is net.model.mid_block for block in net.blocks)


@pytest.mark.slow
def test_checkpointing_changes_no_gradient(folder: Saved) -> None:
    plain, lean = (gradient(built(folder("sd1"), checkpoint=c), DualSlope()) for c in (False, True))
    assert plain.keys() == lean.keys()
    size = torch.stack([g.norm() for g in plain.values()]).norm()
    assert torch.stack([(lean[n] - g).norm() for n, g in plain.items()]).norm() / size < 1e-5


@pytest.mark.parametrize("name", SOME)
def test_fewer_blocks_are_a_net_too(folder: Saved, name: str) -> None:
    x, c, t = batch()
    assert built(folder(name).short(1))(x, c, t=t)[0].shape == x.shape


@pytest.mark.parametrize(
    ("change", "pipeline", "found"),
    [
        ({}, "", FAMILIES[PIXART]),
        ({}, "PixArtAlphaPipeline", PIXART_ALPHA),  # of 512 pixels
        ({"sample_size": 128, "use_additional_conditions": None}, "", PIXART_ALPHA),  # its class reads sizes then
        ({"sample_size": 128, "use_additional_conditions": None}, "PixArtAlphaPipeline", PIXART_ALPHA),
        ({"sample_size": 128}, "PixArtSigmaPipeline", FAMILIES[PIXART]),
    ],
)
def test_a_pixart_is_alpha_by_its_pipeline_or_its_sizes(change: dict[str, Any], pipeline: str, found: Family) -> None:
    """Also under the older name of its class, by which it was published."""
    older = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"}
    for names in ({"_class_name": PIXART}, older):
        assert find_family(tiny.PIXART | names | change, pipeline) is found


def test_sizes_are_those_of_the_image_in_pixels(folder: Saved) -> None:
    """An oblong, height first, as its pipeline passes them to a model of 1024 pixels."""
    spec, (_, c, t) = folder("pixart-alpha"), batch()
    net, received = built(spec), list[dict[str, Tensor]]()
    keep = net.model.adaln_single.register_forward_pre_hook(lambda _, args: received.append(args[1]))
    x = torch.randn(2, SHAPE[0], 6, 12, generator=torch.Generator().manual_seed(5))
    v = net(x, c, t=t)[0]
    keep.remove()
    assert received[0]["resolution"].tolist() == [[48.0, 96.0]] * 2
    assert received[0]["aspect_ratio"].tolist() == [[0.5]] * 2
    with torch.no_grad():
        net.model.adaln_single.emb.aspect_ratio_embedder.linear_2.bias.add_(1.0)
    assert not torch.allclose(net(x, c, t=t)[0], v, atol=1e-3)


def test_what_it_learned_is_said_by_its_scheduler(folder: Saved, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder("sd1").pipeline.folder / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"has no scheduler/scheduler_config\.json"):
        built(of(tmp_path, weights="drawn"))


def test_a_convolution_is_a_last_layer(folder: Saved) -> None:
    net = built(folder("sd1"))
    assert all(isinstance(head.out, nn.Conv2d) for head in net._heads)
    assert net.channels == SHAPE[0]
