"""Two ranks that train nets of many kinds, in every layout of their weights. See test_trained_ranks.py."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

import transformers_tiny as tiny
from dumo.encoders.tokens import ByteTokenizer
from dumo.flow.guide import Guide
from dumo.flow.path import Linear
from dumo.flow.slope import DualSlope
from dumo.flow.times import OfSampler, Pair
from dumo.io.deferred import Loaders
from dumo.nets.dit import DiT
from dumo.nets.learned import LearnedTexts
from dumo.nets.lora import Lora
from dumo.nets.route import Route
from dumo.nets.text_rows import Rows
from dumo.objectives import DMD2, DuMo, MeanFlow
from dumo.run.teacher import BaseNet
from dumo.run.trainer import Batch
from dumo.runtime import dist
from dumo.training import layout
from dumo.training.ema import Ema
from dumo.training.optim import AdamW, AdamW8bit
from dumo.training.settings import Train
from dumo.training.state import State, begin
from dumo.types import Cond, Objective, Sample, Time
from meeting import meeting
from rows_given import given_rows, load_captions
from trained import ToyTrainer
from transformers_saved import CLASSES, SHAPE, saved
from unit.nets.given import Given
from unit.training import toy
from unit.training.adapted import Adapted
from unit.training.by_path import save
from unit.training.toy import flow_of

OBJECTIVE = DuMo(slope=DualSlope(), drop=0.2, guide=Guide(zeta=0.5))
# Of tiny gradients Adam with a tiny eps takes the sign, and rounding decides it.
SPEC = Train(steps=3, batch=8, ema=(Ema(decay=0.9),), clip=1.0, optimizer=AdamW(lr=1e-2, eps=1e-3))
CAPTIONS, GREY = ("one", "two", "a three"), (1, 8, 8)
ADAPTERS = {"full": None, "lora": Lora(rank=4), "half": Lora(rank=4, frozen="bfloat16")}
EXACT = ("sdxl",)  # trained in float64, too: deep for its size, so rounding in float32 adds up
CODED = {"int8": Lora(rank=4, frozen="int8"), "nf4": Lora(rank=4, frozen="nf4")}  # in float64, as what has two times


def randoms(shape: tuple[int, ...], classes: int, step: int, dtype: torch.dtype = torch.float32) -> Batch:
    """Data of a step."""
    g = torch.Generator().manual_seed(step)
    return [torch.randn(SPEC.batch, *shape, generator=g, dtype=dtype), torch.arange(SPEC.batch) % classes]


Built = nn.Module | tuple[nn.Module, Loaders]  # with what reads its weights


@dataclass(frozen=True)
class Case:
    """A net and its training."""

    build: Callable[[Path], Built]  # it may write files into this folder
    taught: tuple[Objective, int]  # by which objective, on how many classes
    batch: Callable[[int], Batch]
    spec: Train = SPEC
    based: bool = False  # half of what it is taught is its own base
    layouts: tuple[tuple[int, bool], ...] = ((1, False), (2, True))  # ranks to a copy; whether weights are given back


def reader(way: str, place: Path) -> nn.Module:
    """A DiT that reads texts: by an encoder that learns too, or given ones."""
    learned = LearnedTexts(tokenizer=ByteTokenizer(length=8), width=8, depth=1, drop=0.2)
    net = DiT(patch=2, width=8, depth=3, attention=2, qk_norm=True)
    net = net.model_copy(update={"texts": learned if way == "learned" else Given()})
    built = net.build(OBJECTIVE.needs, GREY, len(CAPTIONS))
    load_captions(built, CAPTIONS)
    return built


def tuned(
    model: str,
    way: str,
    place: Path,
    stored: torch.dtype = torch.float32,
    objective: Objective = OBJECTIVE,
) -> Built:
    """A published transformer, in full or by adapters; of its weights each of two ranks reads its part."""
    spec = saved(place, model)
    if stored != torch.float32:
        tiny.TINY[model].model().to(stored).save_pretrained(spec.pipeline.folder)
    spec = spec.model_copy(update={"lora": (ADAPTERS | CODED)[way], "lowpass": 10.0})
    net, loaders = spec.build_deferred(objective.needs, SHAPE, CLASSES)
    assert loaders
    net.refit()
    if net.family.one_by_one:  # captions of several lengths go through it one by one
        rows = net.texts
        assert isinstance(rows, Rows)
        assert rows.tokens is not None
        mask = torch.arange(rows.tokens.shape[1]) < torch.tensor([[2], [3], [1]])
        net.texts = given_rows(rows.tokens, mask)
    if way in CODED or model in EXACT or objective is not OBJECTIVE:
        net.double()
        types = {name: p.dtype for name, p in net.named_parameters()}
        loaders = {name: partial(_load_as, types[name], load) for name, load in loaders.items()}
    return net, loaders


def _load_as(dtype: torch.dtype, load: Callable[[], Tensor]) -> Tensor:
    return load().to(dtype)


CASES = {
    "frozen": Case(
        lambda _: Adapted(),
        (toy.Toy(), toy.CLASSES),
        toy.batches(),
        Train(steps=4, batch=12, ema=toy.AVERAGES, ref=0.99, clip=0.5, optimizer=AdamW(lr=1e-2)),
        based=True,
        layouts=((1, False), (2, False), (2, True)),
    )
}
for one in ("learned", "given"):
    asked = (OBJECTIVE, len(CAPTIONS))
    CASES[one] = Case(partial(reader, one), asked, partial(randoms, GREY, len(CAPTIONS)))


def passing() -> nn.Module:
    """A net half of whose tokens skip its middle."""
    route = Route(share=0.5, first=1, last=1)
    return DiT(patch=2, width=8, depth=4, attention=2, route=route).build(OBJECTIVE.needs, GREY, 3)


CASES["tread"] = Case(
    lambda _: passing(),
    (OBJECTIVE, 3),
    partial(randoms, GREY, 3),
    layouts=((1, False), (2, False), (2, True)),
)
MODELS = {
    "sd3": (*ADAPTERS, *CODED),
    "flux": ("full", "lora"),
    "cogview4": ("full", "lora"),
    "sdxl": ("full", "lora"),
}  # blocks of one kind, of two, and of a UNet
for name, ways in MODELS.items():
    for one in ways:
        asked = (OBJECTIVE, CLASSES)
        data = partial(randoms, SHAPE, CLASSES, dtype=torch.float64 if one in CODED or name in EXACT else torch.float32)
        CASES[f"{name}-{one}"] = Case(partial(tuned, name, one), asked, data, based=one != "full")
two = MeanFlow(slope=DualSlope(), drop=0.2, guide=Guide(zeta=0.5), times=Pair(velocity_ratio=0.5), power=0)
for one in ("full", "lora"):
    build = partial(tuned, "sd3", one, objective=two)
    asked = (two, CLASSES)
    data = partial(randoms, SHAPE, CLASSES, dtype=torch.float64)
    CASES[f"sd3-two-{one}"] = Case(build, asked, data, based=one == "lora")


def scored(model: str, place: Path) -> Built:
    """A published transformer with adapters of a generator and of a fake score, in float64."""
    spec = saved(place, model).model_copy(update={"lora": Lora(rank=4)})
    net, loaders = spec.build_deferred(SCORES.needs, SHAPE, CLASSES)
    net.double()
    types = {name: p.dtype for name, p in net.named_parameters()}
    return net, {name: partial(_load_as, types[name], load) for name, load in loaders.items()}


SCORES = DMD2()
for name in ("sd3", "sdxl"):
    both = AdamW(lr=1e-2, eps=1e-3, fake_lr=3e-3)
    spec = SPEC.model_copy(update={"steps": 8, "optimizer": both})  # the sixth step moves samples
    data = partial(randoms, SHAPE, CLASSES, dtype=torch.float64)
    CASES[f"{name}-dmd2"] = Case(partial(scored, name), (SCORES, CLASSES), data, spec, based=True)
spec = spec.model_copy(update={"steps": 4})  # two steps move samples
settings = {"tdm": DMD2(times=OfSampler(solver="hop"), fake_updates=1), "sid": DMD2(alpha=1.2, fake_updates=1)}
for name, setting in settings.items():
    CASES[f"sd3-{name}"] = Case(partial(scored, "sd3"), (setting, CLASSES), data, spec, based=True)


# Clipped by a norm that is summed shard by shard, a weight of 16 bits would be rounded to its other neighbour.
EIGHT = SPEC.model_copy(update={"optimizer": AdamW8bit(lr=1e-2, eps=1e-3), "clip": None})
HALF = EIGHT.model_copy(update={"weights": "bfloat16", "precision": "bf16"})
for name, spec in {"eight": EIGHT, "half": HALF}.items():
    wide = DiT(patch=2, width=64, depth=2, attention=2)  # of some matrices rows are whole blocks
    make = partial(lambda wide, _: wide.build(OBJECTIVE.needs, GREY, len(CAPTIONS)), wide)
    CASES[name] = Case(
        make, (OBJECTIVE, 3), partial(randoms, GREY, 3), spec, layouts=((1, False), (2, False), (2, True))
    )
for one, spec in {
    "full": SPEC,
    "lora": SPEC,
    "half": SPEC,
    "full-half": HALF,
}.items():  # as models are mostly published
    build = partial(tuned, "sd3", one.removesuffix("-half") if spec is HALF else one, stored=torch.bfloat16)
    asked = (OBJECTIVE, CLASSES)
    CASES[f"sd3-mapped-{one}"] = Case(build, asked, partial(randoms, SHAPE, CLASSES), spec)


def trained(case: Case, place: Path, share: int, *, reshard: bool, ranks: int = 1) -> State:
    """A state after all steps, by passes of as many rows as each of so many ranks has."""
    rows = case.spec.batch // ranks if ranks > 1 else None
    spec = case.spec.model_copy(update={"share": share, "reshard": reshard, "micro_batch": rows})
    torch.manual_seed(0)  # as `Run.build` does
    net, weights = built if isinstance(built := case.build(place), tuple) else (built, None)
    state = begin(net, spec, torch.device("cpu"), weights)
    objective, classes = case.taught
    teacher = None
    if case.based:
        base = BaseNet(state.net, spec.precision)

        def taught(x: Sample, t: Time, c: Cond, v: Sample) -> Sample:
            return v + 0.5 * (base(x, c, **dict.fromkeys(objective.needs.names, t))[0] - v)

        teacher = taught
    flow = flow_of(state, spec, objective, Linear(), classes, teacher=teacher)
    trainer = ToyTrainer(state, flow, spec)
    while not state.is_over:
        trainer.step([part[trainer.rows] for part in case.batch(state.step)])
    return state


def shared(state: State, found: dict[str, Tensor]) -> None:
    """Of what is frozen, averages still have the net's own parameters, after passes of both; a net is gathered."""
    for average in state.averages.values():
        for name, p in state.net.named_parameters():
            assert (average.module.get_parameter(name) is p) != p.requires_grad, name
    piece = layout.gather_net(state.net, lambda _: Adapted(seed=1)).state_dict()
    assert all(torch.equal(x, found[f"net.{name}"]) for name, x in piece.items())


def main(rank: str, name: str, folder: str) -> None:
    """Train in each layout, save, and leave all numbers."""
    torch.set_num_threads(1)
    case = CASES[name]
    with meeting(f"{folder}/meet", int(rank)):
        for share, reshard in case.layouts:
            there = Path(folder) / f"{share}-{reshard}"
            state = trained(case, Path(folder) / rank, share, reshard=reshard)
            found = toy.tensors(state)
            if name == "frozen":
                shared(state, found)
                save(there, state, 1)
            if dist.is_main():
                safetensors.torch.save_file(found, there.with_suffix(".safetensors"))
        dist.barrier()
