"""Trains our recipes for a GPU, made small, compiled and not; prints losses and numbers of graphs, by case.

In a process of its own, for what checks shapes in tests cannot be compiled.
"""

import json
from functools import partial

import torch
from diffusers import SD3Transformer2DModel
from torch._dynamo.utils import counters

from contract.case import nets, one_each
from dumo.autodiff import tape
from dumo.config import recipe_files
from dumo.config.load import load
from dumo.config.spec import Run
from dumo.encoders.tokens import ByteTokenizer
from dumo.flow.guide import Guide
from dumo.flow.noisy_batch import draw, path_velocity
from dumo.flow.path import Linear, Trig
from dumo.lab.bench import PlainStep
from dumo.nets.dit import DiT
from dumo.nets.learned import LearnedTexts
from dumo.nets.route import Route
from dumo.run.net import make_flow
from dumo.run.resolve import resolve
from dumo.run.weights import init_on_device
from dumo.runtime.random import random_batch
from dumo.testing.network import randomise
from dumo.training.compile import compile_loss
from dumo.training.settings import Compile
from dumo.training.state import begin
from dumo.types import Frozen
from rows_given import load_captions
from trained import ToyTrainer
from unit.nets.given import Given

SMALL = ["net.width=8", "net.depth=2", "net.attention=2", "train.ema=[]", "data.root=x"]
STEPS = 6  # whose numbers of guided rows differ
FEW = ["net.depth=1", "net.patch=8", "train.batch=4", "train.micro_batch=4", "train.precision=fp32", "train.steps=2"]
TEXTS: dict[str, tuple[Compile, ...]] = {"learned": ("none", "loss"), "given": ("none", "blocks")}
COMPILE = torch.compile
SD3: dict[str, int] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 1, "out_channels": 1, "attention_head_dim": 8,
    "num_attention_heads": 4, "joint_attention_dim": 16, "caption_projection_dim": 32, "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
}  # fmt: skip


def kinds() -> dict[str, Run]:
    """Our compiled recipes made small, one of each kind: of a net, an objective, a slope, and guided or not."""
    found: dict[tuple[object, ...], tuple[str, Run]] = {}
    for name in recipe_files.names():
        if "\n  compile: " not in (text := recipe_files.text(name)) or "\n  compile: none" in text:
            continue
        classes = {"my-images": ["data.classes=3"], "my-images-256": ["data.images.classes=3"]}.get(name, [])
        run = load(name, [*SMALL, *classes, "train.batch=16", "train.micro_batch=8", f"train.steps={STEPS}"])
        needs = run.objective.needs
        assert needs.slope
        assert needs.guide
        kind = (run.net.kind, run.objective.kind, needs.slope.kind, needs.guide.active)
        found.setdefault(kind, (name, run))
    return dict(found.values())


def trained(run: Run, choice: Compile, backend: str = "eager", net: DiT | None = None) -> tuple[list[float], list[int]]:
    """The loss of each step, and how many graphs there were after it; of a net in the place of the run's, if given."""
    torch.compiler.reset()
    counters.clear()
    tape.compiled_evaluate.cache_clear()
    torch.compile = partial(COMPILE, backend=backend)
    spec = run.train.model_copy(update={"compile": choice})
    torch.manual_seed(0)
    built = init_on_device(run.model_copy(update={"net": net or run.net}), "cpu")
    load_captions(built, [f"a {n}" for n in range(run.data.classes)])
    state = begin(built, spec)
    x, c = random_batch("compile", spec.batch, run.data.shape, run.data.classes)
    seen = list[tuple[float, int]]()
    trainer = ToyTrainer(state, make_flow(run, state), spec)
    if choice != "none":
        trainer.loss = compile_loss(state.net, run.objective, choice)
    while not state.is_over:
        loss = trainer.step((x, c)).loss
        seen.append((loss, counters["stats"]["unique_graphs"]))
    losses, graphs = zip(*seen, strict=True)
    return list(losses), list(graphs)


def texts() -> dict[str, DiT]:
    """Nets that read texts, given ones and by an encoder that learns too, for the classes of digits."""
    learned = LearnedTexts(tokenizer=ByteTokenizer(length=8), width=8, depth=1, drop=0.2)
    tiny = DiT(patch=2, width=8, depth=2, attention=2)
    return {name: tiny.model_copy(update={"texts": of}) for name, of in (("learned", learned), ("given", Given()))}


def wholes() -> dict[str, bool]:
    """Whether the loss of each objective, and the yardstick of the benches, is the same compiled whole."""
    found: dict[str, bool] = {}
    x, c = torch.ones(16, 2, 4, 4), torch.arange(16) % 3
    objectives = one_each(guide=Guide(zeta=0.4), drop=0.3)
    for objective in (*objectives, PlainStep(of=objectives[0])):
        torch.compiler.reset()
        net = randomise(nets()[0].build(objective.needs, (2, 4, 4), 3))
        path = Trig() if objective.needs.formulas.paths == ("trig",) else Linear()
        b = draw(objective, path, x, c, 3, seed=0, step=0, progress=0.7, teacher=path_velocity)
        whole = COMPILE(objective.loss, fullgraph=True, backend="eager")
        one, other = (loss(net, Frozen(net), b).loss for loss in (whole, objective.loss))
        found[f"{type(objective).__name__} {len(found)}"] = torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    return found


def checkpointed() -> Run:
    """A transformer of diffusers with two kinds of blocks, which recompute their activations."""
    torch.manual_seed(0)
    SD3Transformer2DModel(**SD3, num_layers=4, dual_attention_layers=(0, 1), qk_norm="rms_norm").save_pretrained(
        "sd3/transformer"
    )
    fields = ["net.kind=diffusers", "net.texts.kind=codes", "pipeline=sd3", "net.checkpoint=true"]
    guided = ["objective.guide.zeta=0.4", "train.batch=16", "train.micro_batch=8", "train.ema=[]"]
    return resolve(load("digits", [*fields, *guided, f"train.steps={STEPS}"]))


def main() -> None:
    """Print all cases."""
    found: dict[str, object] = {}
    for name, run in kinds().items():
        found |= {f"{name} {choice}": trained(run, choice) for choice in ("none", "blocks")}
        small = run.net.model_copy(update={"depth": 1})  # a second block shows nothing new
        one = run.model_copy(update={"net": small})
        found |= {f"{name} none for loss": trained(one, "none"), f"{name} loss": trained(one, "loss")}
    few = load("imagenet256-xl2-dual", [*SMALL, *FEW])
    found |= {"inductor none": trained(few, "none"), "inductor loss": trained(few, "loss", "inductor")}
    guided = ["objective.guide.zeta=0.4", "train.batch=16", "train.micro_batch=8", "train.ema=[]"]
    digits = load("digits", [*guided, f"train.steps={STEPS}"])
    route = Route(share=0.5, first=1, last=1)
    routed = DiT(patch=2, width=8, depth=3, attention=2, modern=True, route=route)
    for choice in ("none", "blocks", "loss"):
        found[f"tread {choice}"] = trained(digits, choice, net=routed)
    found |= {f"checkpointed {choice}": trained(checkpointed(), choice) for choice in ("none", "blocks")}
    for name, net in texts().items():
        found |= {f"{name} {choice}": trained(digits, choice, net=net) for choice in TEXTS[name]}
    print(json.dumps([found, wholes()]))


if __name__ == "__main__":
    main()
