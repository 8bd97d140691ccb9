"""Transformers of diffusers as nets: the old numbers at the start, an exact step, what is trained, what is refused."""

import copy
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import transformers_tiny as tiny
from dumo.autodiff import float64
from dumo.config.load import load
from dumo.encoders.pipeline_folder import Pipeline
from dumo.flow.guide import Guide
from dumo.flow.noisy_batch import draw
from dumo.flow.path import Linear
from dumo.flow.slope import DualSlope, JvpSlope, Slope
from dumo.io.deferred import load_parameters
from dumo.nets import Pretrained
from dumo.nets.checkpointing import mark_recomputed, run_as_marked
from dumo.nets.dualized import Dualized, time_embedder_paths
from dumo.nets.lora import Lora
from dumo.nets.lowbit import HalfLinear
from dumo.nets.text_rows import Codes
from dumo.objectives import DuMo, SelfE
from dumo.objectives.base import ObjectiveSpec
from dumo.training.compile import compile_blocks
from dumo.training.frozen import digest
from dumo.types import Frozen, Heads, Needs, NoisyBatch, UserError
from forked import python
from pipelines import PIPELINES
from tiers import tiered
from transformers_saved import (
    CLASSES,
    IMAGES,
    MASKED,
    NO_LOWPASS,
    NOISE,
    SHAPE,
    VU,
    Saved,
    asked,
    batch,
    built,
    of,
    saved,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning"),  # diffusers', of its Chroma
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),  # torch's, of autocast on a CPU
]
V = Needs(heads=("v",))
SUBJECT = Lora(rank=4, subject=2)
LORA, RESTS, DRAWN = Lora(rank=4), Lora(rank=4, frozen="bfloat16"), {"weights": "drawn"}
QUICK = ("sd3", "flux", "sana-masked", "qwen", "z-image")
SOME = tiered(IMAGES, now=QUICK[:3], ci=QUICK)
EVERY = tiered(IMAGES, now=QUICK)


FAMILIES_PAGE = Path(__file__).parents[3] / "docs/families.md"
ROW = re.compile(r"^\| `(\w+Pipeline)` \|[^|]*\| `([\w-]+)`(?: with `([^`]*)`)?", re.MULTILINE)
ROWS = ROW.findall(FAMILIES_PAGE.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize(("class_name", "recipe", "settings"), ROWS, ids=[row[0] for row in ROWS])
def test_the_recipe_that_the_page_names_builds_the_model(
    folder: Saved, class_name: str, recipe: str, settings: str
) -> None:
    (name, *_) = [row.tiny for row in PIPELINES.values() if row.pipeline == class_name]
    if f"{name}-masked" in MASKED:  # as captions are
        name += "-masked"
    run = load(recipe, settings.split())
    fields = {field: getattr(run.net, field) for field in ("lora", "lowpass", "checkpoint", "guidance")}
    assert built(folder(name), run.objective.needs, **fields).heads


def with_limit(spec: Pretrained, name: str) -> Pretrained:
    """With a low-pass, where there is one."""
    return spec if name in NO_LOWPASS else spec.model_copy(update={"lowpass": 10.0})


def record(objective: ObjectiveSpec) -> NoisyBatch:
    x, c, _ = batch(4)
    return draw(objective, Linear(), x, c, torch.full_like(c, CLASSES), seed=0, step=0)


@pytest.mark.parametrize(("dtype", "embedded"), [("float32", 3.5), ("float16", 3.5), ("bfloat16", 3.504)])
def test_guidance_is_what_a_pipeline_in_the_stored_dtype_embeds(tmp_path: Path, dtype: str, embedded: float) -> None:
    """FLUX.1 multiplies it by 1000 in the dtype of its weights, and bf16 has no 3500."""
    model: nn.Module = tiny.TINY["flux-guided"].model()
    nn.Module.to(model, getattr(torch, dtype)).save_pretrained(tmp_path)  # pyright: ignore
    spec = of(tmp_path, guidance=3.5)
    assert built(spec, V).guidance == embedded
    with torch.device("meta"):
        assert spec.build(V, SHAPE, CLASSES).guidance == 3.5
    assert built(spec, V, **DRAWN).guidance == 3.5


@pytest.mark.parametrize("name", EVERY)
def test_every_head_begins_as_the_model(folder: Saved, name: str) -> None:
    """To the bit, whatever the model is told and however it counts time."""
    x, c, t = batch()
    old = asked(name, tiny.TINY[name].model(), x, c, t)
    net = built(folder(name))
    v, u = net(x, c, t=t)
    (alone,) = built(folder(name), V)(x, c, t=t)
    assert torch.equal(v, old)
    assert torch.equal(u, old)
    assert torch.equal(alone, old)
    assert v.std() > 0.01


@pytest.mark.parametrize("name", EVERY)
def test_an_oblong_has_positions_of_its_own(folder: Saved, name: str) -> None:
    """Those that the model's pipeline gives it, in a net that was built for squares."""
    _, c, t = batch()
    sides = (4, 8) if name == "auraflow" else (6, 12)  # it has no place outside of its square
    x = torch.randn(2, SHAPE[0], *sides, generator=torch.Generator().manual_seed(5))
    v, u = built(folder(name))(x, c, t=t)
    assert torch.equal(v, asked(name, tiny.TINY[name].model(), x, c, t))
    assert torch.equal(u, v)


@pytest.mark.parametrize(
    ("name", "most"),
    [("sd3", 8), ("auraflow", 4), ("z-image", 16), ("lumina2", 16), ("cogview4", None), ("flux", None)],
)
def test_a_model_knows_how_far_its_positions_reach(folder: Saved, name: str, most: int | None) -> None:
    net, (_, c, t) = built(folder(name)), batch()
    assert net.max_patches == most
    side = 2 * (most or 40)
    assert net(torch.zeros(2, SHAPE[0], 4, side), c, t=t)[0].shape[-1] == side


@pytest.mark.parametrize("name", ["wan"])
def test_an_image_is_a_video_of_one_frame(folder: Saved, name: str) -> None:
    x, c, t = batch()
    v, u = built(folder(name))(x, c, t=t)
    assert v.shape == x.shape
    assert torch.equal(v, u)
    assert v.std() > 0.01


@pytest.mark.parametrize("name", ["sd3", "flux", "z-image", "prx"])
def test_heads_go_their_own_ways(folder: Saved, name: str) -> None:
    """A head's layer moves this head and no other, channel by channel."""
    x, c, t = batch()
    net = built(folder(name))
    before = net(x, c, t=t)
    with torch.no_grad():
        net.heads["u"].out.bias.add_(1.0)
    v, u = net(x, c, t=t)
    assert torch.equal(v, before[0])
    assert torch.allclose(u - before[1], torch.full_like(u, -1.0 if name == "z-image" else 1.0), atol=1e-5)


@pytest.mark.parametrize("name", SOME)
def test_one_guided_step_is_exact(folder: Saved, name: str) -> None:
    """DuMo's gradient by the slope that rides is that by forward-mode differentiation, and every parameter has one."""
    spec = with_limit(folder(name), name)
    dual, jvp = (gradient(built(spec), guided(slope)) for slope in (DualSlope(), JvpSlope()))
    assert dual.keys() == jvp.keys() == {n for n, p in built(spec).named_parameters() if p.requires_grad}
    size = torch.stack([g.norm() for g in jvp.values()]).norm()
    assert torch.stack([(dual[n] - g).norm() for n, g in jvp.items()]).norm() / size < 1e-5


def guided(slope: Slope) -> DuMo:
    return DuMo(slope=slope, drop=0.1, guide=Guide(zeta=0.55))


def gradient(net: Dualized, objective: ObjectiveSpec) -> dict[str, Tensor]:
    """Of every parameter that has one."""
    objective.loss(net.train(), Frozen(net), record(objective)).loss.mean().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [None, LORA, RESTS], ids=["full", "lora", "half"])
@pytest.mark.parametrize("name", tiered([*IMAGES, *NOISE], now=("sd3", "flux", "sdxl"), ci=QUICK))
def test_float64_of_a_block_at_a_time_has_the_bits_of_a_copy(
    folder: Saved, name: str, lora: Lora | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an examination of the slope, whose models may ask for their own type."""
    net = built(with_limit(folder(name), name), lora=lora).eval()
    x, c, t = batch()
    ours = float64.exact_derivative(net, x, torch.ones_like(x), c, t=t)
    monkeypatch.setattr(float64, "float64_copy", lambda net, device: copy.deepcopy(net).double())
    copied = float64.exact_derivative(net, x, torch.ones_like(x), c, t=t)
    for our_head, head in zip(ours, copied, strict=True):
        assert our_head.dtype == head.dtype
        assert torch.equal(our_head, head)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_adapters_leave_the_model_as_it_is(folder: Saved, name: str) -> None:
    """They begin at zero. A step moves them, heads and embedder alone; in `base` all is as it was, to the bit."""
    x, c, t = batch()
    old = asked(name, tiny.TINY[name].model(), x, c, t)
    net = built(with_limit(folder(name), name).model_copy(update={"lora": LORA}))
    before = copy.deepcopy(net.state_dict())
    assert not any(w.any() for name, w in before.items() if "lora_B" in name)
    step(net)
    moved = {name for name, w in net.state_dict().items() if not torch.equal(w, before[name])}
    ours = ("heads.", *(f"model.{path}." for path in time_embedder_paths(net.model, net.family)))
    assert moved
    assert all("lora_" in name or name.startswith(ours) for name in moved)
    assert not torch.allclose(net(x, c, t=t)[1], old, atol=1e-4)
    trained = {id(p) for p in net.parameters() if p.requires_grad}
    with net.base():
        assert all(torch.equal(head, old) for head in net(x, c, t=t))
        assert {id(p) for p in net.parameters() if p.requires_grad} <= trained
    assert {id(p) for p in net.parameters() if p.requires_grad} == trained
    assert not torch.allclose(net(x, c, t=t)[1], old, atol=1e-4)


@pytest.mark.slow
def test_a_subject_leaves_the_few_step_net_as_it_is(folder: Saved) -> None:
    """A step moves its own adapters alone, and in `base` each head is the few-step net's own, to the bit."""
    x, c, t = batch()
    few, net = (built(with_limit(folder("sd3"), "sd3").model_copy(update={"lora": lora})) for lora in (LORA, SUBJECT))
    step(few)
    before = few.state_dict()
    assert not net.load_state_dict(before, strict=False).unexpected_keys
    old = few(x, c, t=t)
    assert not torch.equal(*old)
    step(net)
    after = net.state_dict()
    assert all(torch.equal(after[name], w) for name, w in before.items())
    assert after.keys() - before.keys() == {name for name, p in net.named_parameters() if p.requires_grad}
    with net.base():
        assert all(map(torch.equal, net(x, c, t=t), old))
    assert not any(torch.allclose(new, head, atol=1e-4) for new, head in zip(net(x, c, t=t), old, strict=True))


def step(net: Dualized) -> None:
    """Two of AdamW: after the first, adapters that began at zero move all of themselves."""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 0.01, weight_decay=0.1)
    objective = DuMo(drop=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        objective.loss(net.train(), Frozen(net), record(objective)).loss.mean().backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux", "qwen", "z-image", "auraflow", "prx"])
@pytest.mark.parametrize("lora", [None, LORA])
def test_stock_is_the_model_with_one_head(folder: Saved, name: str, lora: Lora | None, tmp_path: Path) -> None:
    """Of the old class, names and shapes; saved and loaded by diffusers it gives what the head gives."""
    x, c, t = batch()
    net = built(with_limit(folder(name), name).model_copy(update={"lora": lora}))
    step(net)
    u = net(x, c, t=t)[1]
    stock = net.single_head_model("u", merged=True)
    stock.save_pretrained(tmp_path)
    loaded = type(stock).from_pretrained(tmp_path, use_safetensors=True)
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as new:
        assert set(new.keys()) == set(tiny.TINY[name].model().state_dict())
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        (folder(name).pipeline.folder / "config.json").read_text()
    ) | {"_name_or_path": folder(name).pipeline.source}
    assert (asked(name, loaded, x, c, t) - u).norm() / u.norm() < (1e-5 if lora else 1e-7)
    assert torch.equal(net(x, c, t=t)[1], u)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [guided(DualSlope()), SelfE()], ids=["dumo", "self_e"])
@pytest.mark.parametrize("lora", [None, LORA])
def test_checkpointing_changes_no_gradient(folder: Saved, lora: Lora | None, objective: ObjectiveSpec) -> None:
    spec = folder("sd3").model_copy(update={"lora": lora, "lowpass": 10.0})
    every = (spec.model_copy(update={"checkpoint": c}) for c in (False, True, 2))
    plain, lean, half = (gradient(built(spec, objective.needs), objective) for spec in every)
    for other in (lean, half):
        assert plain.keys() == other.keys()
        assert all(torch.allclose(plain[n], other[n], rtol=1e-4, atol=1e-6) for n in plain)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "frozen"), [*(("flux", coding) for coding in ("float32", "int8", "nf4")), ("sdxl", "float32")]
)
def test_compiled_blocks_teach_the_same(name: str, frozen: str, tmp_path: Path) -> None:
    """Of two kinds, Flux's; of a UNet the transformers in them. What checks shapes in tests cannot be compiled."""
    told, _ = python(f"from {__name__} import compiled; compiled('{name}', '{frozen}')", cwd=tmp_path).communicate()
    blocks, kinds, off = json.loads(told.splitlines()[-1])
    assert (blocks, kinds) == ((2, 2) if name == "flux" else (8, 1))
    assert off < 1e-5


def compiled(name: str, frozen: Any) -> None:  # noqa: ANN401
    """Print how many blocks are compiled, how many kinds of them, and how far gradients are off, relatively."""
    lora = LORA.model_copy(update={"frozen": frozen})
    spec = saved(Path("models"), name).model_copy(update={"lora": lora, "lowpass": 10.0})
    plain, net = built(spec), built(spec)
    for block in net.regions:
        block.compile = partial(block.compile, backend="eager")  # pyright: ignore[reportAttributeAccessIssue]
    torch.compile = partial(torch.compile, backend="eager")
    compile_blocks(net)
    there, found = (gradient(net, guided(DualSlope())) for net in (plain, net))
    assert found.keys() == there.keys()
    off = torch.stack([(found[n] - g).norm() for n, g in there.items()]).norm()
    size = torch.stack([g.norm() for g in there.values()]).norm()
    made = [block for block in net.regions if block._compiled_call_impl is not None]
    print(json.dumps([len(made), len({type(block) for block in made}), (off / size).item()]))


@pytest.mark.parametrize("name", ["qwen", "flux-guided", "flux2", "flux2-klein"])
def test_times_are_not_rounded_in_bf16(folder: Saved, name: str) -> None:
    """Two times that bf16 cannot tell apart make two velocities."""
    x, c, _ = batch()
    net = built(with_limit(folder(name), name))
    t = torch.tensor([0.7, 0.7])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        seen: list[Tensor] = []
        part = net.model.get_submodule(time_embedder_paths(net.model, net.family)[0])
        handle = part.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for shift in (0.0, 1e-4):
            net(x, c, t=t + shift)
        handle.remove()
    assert not torch.equal(*seen)


def test_without_texts_classes_are_codes(folder: Saved) -> None:
    """Rows that differ, the same in every net; no checkpoint holds them."""
    spec = folder("sd3").model_copy(update={"texts": Codes()})
    x, c, t = batch()
    net = built(spec)
    assert net.texts.tokens.shape == (CLASSES + 1, 1, 16)
    assert torch.equal(net.texts.tokens, built(spec, V).texts.tokens)
    assert not torch.allclose(net(x, c, t=t)[0], net(x, c.flip(0), t=t)[0])
    assert not any(name.startswith("texts") for name in net.state_dict())


@pytest.mark.parametrize("name", SOME)
def test_config_alone_is_an_outline(folder: Saved, name: str, tmp_path: Path) -> None:
    """The names and shapes of the net with weights, and which of them are trained."""
    spec = with_limit(folder(name), name).model_copy(update={"lora": LORA})
    (tmp_path / "config.json").write_text((spec.pipeline.folder / "config.json").read_text())
    with torch.device("meta"):
        outline = spec.within(Pipeline(source=str(tmp_path))).build(VU, SHAPE, CLASSES)
    assert all(p.is_meta for p in outline.parameters())
    assert sizes(outline) == sizes(built(spec))


def sizes(net: nn.Module) -> dict[str, tuple[torch.Size, bool]]:
    return {name: (p.shape, p.requires_grad) for name, p in net.named_parameters()}


def test_weights_may_be_in_several_files(folder: Saved, tmp_path: Path) -> None:
    x, c, t = batch()
    net = built(folder("sd3"))
    tiny.TINY["sd3"].model().save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    assert len([*(tmp_path / "transformer").glob("*.safetensors")]) > 1
    of_a_pipeline = built(folder("sd3").within(Pipeline(source=str(tmp_path))))
    assert torch.equal(of_a_pipeline(x, c, t=t)[0], net(x, c, t=t)[0])


@pytest.mark.parametrize(("lowpass", "scale"), [(10.0, 1.0), (None, 1.0), (0.5, 0.5)])
def test_a_model_without_quick_waves_has_the_scale_of_its_own(
    folder: Saved, lowpass: float | None, scale: float
) -> None:
    """Lumina 2 reads waves of up to 1 rad."""
    assert folder("lumina2").model_copy(update={"lowpass": lowpass}).time_scale == scale


def test_every_other_block_is_recomputed_where_a_model_hands_over_methods() -> None:
    """As PRX does."""
    calls: list[int] = []

    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(0)
            return x.sin()

    blocks = [Block() for _ in range(4)]
    mark_recomputed(blocks, 2)
    x = torch.ones(2, requires_grad=True)
    for block in blocks:
        x = run_as_marked(block.__call__, x)
    x.sum().backward()
    assert len(calls) == 4 + 2


def test_only_safetensors_are_read(folder: Saved, tmp_path: Path) -> None:
    """A folder with config.json alone, or a pickle beside it."""
    (tmp_path / "config.json").write_text((folder("sd3").pipeline.folder / "config.json").read_text())
    spec = of(tmp_path)
    with pytest.raises(UserError, match="no weights"):
        built(spec)
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="pickle files are not supported"):
        built(spec)
    built(spec.short(1))


# --- frozen weights in bf16: the bits that float32 gives, what stays as it was, and whose memory they are

VIDEOS = ("wan",)
HALF = tiered((*IMAGES, *VIDEOS), now=QUICK[:3])


def both(place: Path, name: str, dtype: torch.dtype) -> list[Dualized]:
    """With adapters that say something, frozen in float32 and in bf16; in the file linear layers are in `dtype`."""
    spec, model, found = saved(place, name), tiny.TINY[name].model(), list[Dualized]()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.to(dtype)
    model.save_pretrained(spec.pipeline.folder)
    for frozen in ("float32", "bfloat16"):
        net = built(spec.model_copy(update={"lora": LORA.model_copy(update={"frozen": frozen})}))
        g = torch.Generator().manual_seed(0)
        for p in net.parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=g) if p.requires_grad else 0
        found.append(net)
    return found


def passed(net: Dualized, *, low: bool) -> Heads:
    """The heads, and those of the base; `low`: in bf16."""
    x, c, t = batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        tuned = net(x, c, t=t)
        with net.base():
            return (*tuned, *net(x, c, t=t))


def same(one: Heads, other: Heads) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", HALF)
def test_a_pass_in_bf16_has_the_bits_of_float32_weights(tmp_path: Path, name: str) -> None:
    """Heads, base and gradients of a step, of every family."""
    whole, half = both(tmp_path, name, torch.float32)
    assert same(passed(whole, low=True), passed(half, low=True))
    assert not same(passed(whole, low=False), passed(half, low=False))  # what is stored in more bits is rounded
    with torch.autocast("cpu", torch.bfloat16):
        one, other = (gradient(net, guided(DualSlope())) for net in (whole, half))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("name", HALF)
def test_what_is_stored_in_bf16_is_rounded_nowhere(tmp_path: Path, name: str) -> None:
    whole, half = both(tmp_path, name, torch.bfloat16)
    assert same(passed(whole, low=False), passed(half, low=False))
    for name, p in half.named_parameters():
        rests = isinstance(half.get_submodule(name.rpartition(".")[0]), HalfLinear)
        assert p.dtype == (torch.bfloat16 if rests else torch.float32), name
        assert not (rests and p.requires_grad)
    assert all(b.dtype != torch.bfloat16 for b in half.buffers())
    merged = [net.single_head_model("u", merged=True).state_dict() for net in (whole, half)]
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(x, merged[1][name]) for name, x in merged[0].items())


@pytest.mark.slow
def test_a_file_in_bf16_is_mapped_and_shared(tmp_path: Path) -> None:
    """Weights that rest lie in the file's own pages."""
    _, net = both(tmp_path, "sd3", torch.bfloat16)
    mine = [p.data_ptr() for p in net.parameters() if p.dtype == torch.bfloat16]
    lines = Path("/proc/self/maps").read_text().splitlines()
    places = [line.split()[0].split("-") for line in lines if str(tmp_path) in line]
    assert mine
    assert all(any(int(low, 16) <= at < int(high, 16) for low, high in places) for at in mine)


@pytest.mark.parametrize("name", tiered(IMAGES, ci=["sd3"]))
def test_weights_that_are_read_one_by_one_are_those_of_a_whole_net(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored in either type, kept in either: the bits of diffusers' own model, and no block is there before."""
    spec, model = saved(tmp_path, name), tiny.TINY[name].model()
    for stored in (torch.float32, torch.bfloat16):
        nn.Module.to(model, stored).save_pretrained(spec.pipeline.folder)
        for lora in (None, LORA, RESTS, Lora(rank=4, frozen="int8"), Lora(rank=4, frozen="nf4")):
            kind = spec.model_copy(update={"lora": lora})
            whole_model = type(model).from_config(model.config)
            whole_model.load_state_dict(model.state_dict())
            if lora and lora.frozen != "float32":
                for p in whole_model.parameters():
                    p.data = p.data.to(stored)
            with monkeypatch.context() as patch:
                # Some models draw numbers when they are made, so the other is made, too.
                load_model = Pretrained.load_model

                def load_whole(*given: Any) -> tuple[nn.Module, dict[str, Tensor]]:  # noqa: ANN401
                    load_model(*given)  # noqa: B023, it is called at once
                    return whole_model, {}  # noqa: B023

                patch.setattr(Pretrained, "load_model", load_whole)
                torch.manual_seed(1)
                whole, end = kind.build(VU, SHAPE, CLASSES), torch.rand(1)
            torch.manual_seed(1)
            net, loaders = kind.build_deferred(VU, SHAPE, CLASSES)
            assert torch.equal(torch.rand(1), end)
            assert {name for name, p in net.named_parameters() if p.is_meta} == loaders.keys()
            assert not any("lora" in name or name.startswith(("heads", "old")) for name in loaders)
            assert all(any(p.is_meta for p in block.parameters()) for block in net.blocks)
            assert digest(net, loaders) == digest(whole)
            there = load_parameters(net, loaders).state_dict()
            for key, x in whole.state_dict().items():
                assert x.dtype == there[key].dtype, key
                assert torch.equal(x, there[key]), key
            for ours, theirs in zip(net.buffers(), whole.buffers(), strict=True):
                assert ours.dtype == theirs.dtype
                assert torch.equal(ours, theirs)
