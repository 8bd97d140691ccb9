"""A few blocks of each kind tell of all, for every published transformer; its blocks are as wide as they are."""

from collections.abc import Callable

import pytest
import torch

from dumo.encoders.pipeline_folder import Pipeline
from dumo.flow.path import Linear
from dumo.flow.slope import DualSlope
from dumo.io.hub import PUBLISHED
from dumo.nets import Pretrained
from dumo.nets.dualized import Dualized
from dumo.nets.lora import Lora
from dumo.nets.text_rows import Codes
from dumo.objectives import DuMo, FlowMatching
from dumo.run import flops, memory
from dumo.run.flops import forward_flops, forward_units
from dumo.types import Objective
from tiers import tiered

SD3, SDXL = "stabilityai/stable-diffusion-3-medium-diffusers", "stabilityai/stable-diffusion-xl-base-1.0"
SD15, FLUX = "stable-diffusion-v1-5/stable-diffusion-v1-5", "black-forest-labs/FLUX.1-dev"
PIXART, SANA = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "Efficient-Large-Model/Sana_1600M_1024px_diffusers"
CHANNELS = {SANA: 32, SD15: 4, SDXL: 4, PIXART: 4}
DUAL, PLAIN = DuMo(slope=DualSlope()), FlowMatching()
DEPTH = 3
ALONE = [source for source in PUBLISHED if source not in (FLUX, SD15, SDXL)]  # with one stretch that is long
OTHERS = [(source, None if source == SD3 else Lora(rank=4)) for source in ALONE]


def net(
    source: str, *, objective: Objective = PLAIN, lora: Lora | None = None, checkpoint: bool = False, depth: int = DEPTH
) -> Dualized:
    """With at most `depth` blocks of each kind, without numbers."""
    guidance = 3.5 if source == FLUX else None
    spec = Pretrained(texts=Codes(), lora=lora, checkpoint=checkpoint, guidance=guidance)
    spec = spec.within(Pipeline(source=source)).short(depth)
    with torch.device("meta"):
        return spec.build(objective.needs, (CHANNELS.get(source, 16), 8, 8), 10)


def both(count: Callable[[], float], monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """By a few blocks, and by all."""
    monkeypatch.setattr(flops, "MAX_BLOCKS_RUN", 1)
    few = count()
    monkeypatch.setattr(flops, "MAX_BLOCKS_RUN", 1000)
    return few, count()


@pytest.mark.parametrize(
    ("source", "lora"),
    tiered([(FLUX, Lora(rank=4)), *OTHERS], ci=OTHERS[:1], id=lambda case: case[0]),
)
def test_a_few_blocks_of_each_kind_tell_of_all(source: str, lora: Lora | None, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = DUAL if source == FLUX else PLAIN
    whole, shape = net(source, objective=objective, lora=lora), (CHANNELS.get(source, 16), 8, 8)
    few, all_ = both(lambda: forward_flops(whole, objective, shape), monkeypatch)
    assert few == all_
    few, all_ = both(lambda: forward_units(whole, objective, Linear(), shape, rows=2), monkeypatch)
    assert few == pytest.approx(all_, rel=1e-12)


@pytest.mark.nightly
@pytest.mark.parametrize("source", ALONE)
def test_so_they_do_of_bytes(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step that keeps inputs alone; Flux is counted whole."""
    shape = (CHANNELS.get(source, 16), 8, 8)
    whole = net(source, lora=Lora(rank=4), checkpoint=True, depth=5)
    few, all_ = both(lambda: memory.activation_bytes(whole, PLAIN, Linear(), shape, rows=4), monkeypatch)
    assert few == all_


def test_what_is_cut_is_a_net_of_its_own_and_leaves_the_other() -> None:
    whole = net(FLUX)
    cut = flops.cut(whole, (1, 2))
    assert [len(s.blocks) for s in flops.stretches(cut)] == [1, 2]
    assert [len(s.blocks) for s in flops.stretches(whole)] == [DEPTH, DEPTH]
    assert cut.blocks[0] is whole.blocks[0]
    assert [len(s.blocks) for s in flops.stretches(net(SD3))] == [DEPTH - 1, 1]  # the last one tells no text
