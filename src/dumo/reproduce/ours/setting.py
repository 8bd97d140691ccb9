"""Settings to compare: what dumo offers beside the paper, the steps from its recipe to ours, and settings of rivals."""

import json
from collections.abc import Mapping
from typing import Any

from dumo.reproduce.ours.fair import LAWS, LOW

Sets = tuple[str, ...]
OURS, OURS_ON_LATENTS = "dumo-best", "dumo-best-latents"


def times(kind: str, **fields: Any) -> str:  # noqa: ANN401, fields of a law
    """A law of times, as a setting."""
    return law({"kind": kind, **fields})


def law(of: Mapping[str, Any]) -> str:
    """The same, of a law that has a name."""
    return f"objective.times={json.dumps(of)}"


def jumps(velocity_ratio: float, data_ratio: float) -> str:
    """Jumps from times that lean to the data, on some rows, and some of these to the data."""
    return times("jumps", of=LAWS[LOW], velocity_ratio=velocity_ratio, data_ratio=data_ratio)


def muon(lr: float, adamw_lr: float) -> str:
    """Muon, with the betas of the recipes' AdamW."""
    return f'train.optimizer={{"kind": "muon", "lr": {lr}, "adamw_lr": {adamw_lr}, "betas": [0.9, 0.99]}}'


def parts(*heads: Mapping[str, Any]) -> Sets:
    """DuMo by its parts, which have more to choose."""
    return (
        "objective.kind=several",
        f"objective.parts={json.dumps(heads)}",
        "objective.drop=0",
        "objective.guide.zeta=0",
        "objective.slope.kind=dual",
    )


V: dict[str, Any] = {"kind": "velocity", "weight": 0.7}
U: dict[str, Any] = {"kind": "endpoint", "weight": 0.3}
M: dict[str, Any] = {"kind": "average", "weight": 0.3}
UNIFORM, LEANING = times("uniform"), law(LAWS[LOW])
MIDDLE = times("logit_normal", mean=0.0, std=1.0)
TWO = (*parts(V, U), UNIFORM)
TRANSPORT = ('train.coupling={"group": 32}',)
DECAY = ('train.schedule={"kind": "wsd", "warmup": 100}',)
MAGNITUDE = "net.magnitude=preserved"


def weighed(beta: float, power: float = 1.0, *more: Mapping[str, Any]) -> Sets:
    """Both heads by MeanFlow's metric, and perhaps others."""
    own = {"power": power}
    return parts(V | {"weight": beta} | own, U | {"weight": 1 - beta} | own, *({**head, **own} for head in more))


GUIDED = ("objective.drop=0.1", "objective.guide.zeta=0.55")
OPTIONS: dict[str, Sets] = {
    "as in the paper": (),
    "times logit-normal(-0.4, 1)": (LEANING,),
    "times logit-normal(0, 1)": (MIDDLE,),
    "times stratified": (times("stratified", of={"kind": "uniform"}),),
    "a tenth of the rows at t = 1": (
        times("mixture", of={"kind": "uniform"}, other={"kind": "uniform", "low": 1.0, "high": 1.0}, share=0.1),
    ),
    "optimal transport in a batch": TRANSPORT,
    "Muon": (muon(0.012, 0.006),),
    "warm-up, stable, decay": DECAY,
    "an average by a power, 0.05": ('train.ema=[{"kind": "power", "std": 0.05}]',),
    "magnitude preserved": (MAGNITUDE,),
    "long skips": ("net.skips=true",),
    "RMSNorm": ("net.norm=rms",),
    "queries and keys normalised": ("net.qk_norm=true",),
    "SwiGLU": ("net.mlp=swiglu",),
    "rotary positions": ("net.position=rope",),
    "the last four": ("net.norm=rms", "net.qk_norm=true", "net.mlp=swiglu", "net.position=rope"),
    "half as wide again": ("net.width=96",),
    "six blocks": ("net.depth=6",),
    "half the batch": ("train.batch=16",),
    "beta 0.5": ("objective.beta=0.5",),
    "beta 0.85": ("objective.beta=0.85",),
    "v first, u later": (
        *parts(V | {"weight": {"first": 1.0, "last": 0.5}}, U | {"weight": {"first": 0.05, "last": 0.5}}),
        UNIFORM,
    ),
    "MeanFlow's metric": (*weighed(0.7), UNIFORM),
    "u over its variance": (*parts(V, U | {"variance": True}), UNIFORM),
    "du/dt along the net's own v": (*TWO, "objective.along=velocity"),
    "contrastive flow matching": (*parts(V | {"contrast": 0.05}, U), UNIFORM),
    "dispersive loss": (*TWO, 'objective.disperse={"weight": 0.25, "tau": 4.0}'),
    "one mean velocity for all jumps": (*parts(V, M), jumps(0.25, 0.75)),
    "three heads": (*parts(V, U, M), jumps(0.25, 0.5)),
    "guided in training, as in the paper": GUIDED,
}


HERMITE, HOP = ('sample.solver={"kind": "hermite"}',), ('sample.solver={"kind": "hop"}',)
ONE_MEAN = (  # v as it was, and a mean velocity for all jumps, in MeanFlow's metric
    *parts(V, M | {"power": 1.0}),
    jumps(0.25, 0.75),
    *HOP,
)
NET: dict[str, Sets] = {  # the steps that all data begin with
    "times logit-normal(-0.4, 1)": (LEANING,),
    "Muon": (muon(0.012, 0.006),),
    "magnitude preserved": (MAGNITUDE,),
}
LADDER: dict[str, Sets] = {  # from the paper's recipe to ours
    **NET,
    "one mean velocity for all jumps": ONE_MEAN,
    "optimal transport in a batch": TRANSPORT,
}
LATENT_LADDER: dict[str, Sets] = {**NET, "guided in training, as in the paper": (*GUIDED, *HERMITE)}
INDEPENDENT = ("train.coupling=null",)  # of noise and data: how settings below begin
EACH: dict[str, Sets] = {  # settings of the net's training, the same for all
    "as it is": (),
    "optimal transport": TRANSPORT,
    "warm-up, stable, decay": DECAY,
    "half the batch": ("train.batch=16",),
    "Muon 0.02": (muon(0.02, 0.006),),
    "magnitude free": ("net.magnitude=free",),
}
JUMPS = (jumps(0.5, 0.5),)  # half of the rows at rest, and of the jumps half to the data
LAW: dict[str, Sets] = {
    f"jumps {rest}, {data}": (jumps(rest, data),) for rest, data in ((0.25, 0.75), (0.75, 0.5), (0.5, 0.75))
}
BOTH = (*weighed(0.5), LEANING, *HERMITE)


def on(sets: Sets, settings: Mapping[str, Sets]) -> dict[str, Sets]:
    """Settings after others."""
    return {name: (*sets, *more) for name, more in settings.items()}


# by title: the recipe whose objective it is, and settings of it. What was tried later stands last.
SETTINGS: dict[str, tuple[str, dict[str, Sets]]] = {
    "DuMo": (
        OURS,
        on(BOTH, EACH)
        | {
            "beta 0.7": (*weighed(0.7), LEANING, *HERMITE),
            "beta 0.3": (*weighed(0.3), LEANING, *HERMITE),
            "power 0.75": (*weighed(0.5, 0.75), LEANING, *HERMITE),
            "mean square": (*parts(V, U), LEANING, *HERMITE),
            "uniform times": (*weighed(0.5), UNIFORM, *HERMITE),
            "one mean velocity": ONE_MEAN,
            "three heads": (*weighed(0.5, 1.0, M), jumps(0.25, 0.5), *HERMITE),
            "one mean velocity, optimal transport": (*ONE_MEAN, *TRANSPORT),
            "one mean velocity of half the weight": (
                *parts(V | {"weight": 0.5}, M | {"weight": 0.5, "power": 1.0}),
                jumps(0.25, 0.75),
                *HOP,
            ),
            "one mean velocity, jumps 0.1, 0.75, optimal transport": (*ONE_MEAN, jumps(0.1, 0.75), *TRANSPORT),
        },
    ),
    "MeanFlow": (
        "digits-meanflow",
        on(JUMPS, EACH)
        | LAW
        | {
            "its own times": (),
            "half of the rows at rest": ("objective.times.velocity_ratio=0.5",),
            "power 0.75": (*JUMPS, "objective.power=0.75"),
            "mean square": (*JUMPS, "objective.power=0"),
            "jumps 0.75, 0.5, optimal transport": (*LAW["jumps 0.75, 0.5"], *TRANSPORT),
            "jumps 0.5, 0.75, optimal transport": (*LAW["jumps 0.5, 0.75"], *TRANSPORT),
            "power 0.75, optimal transport": (*JUMPS, "objective.power=0.75", *TRANSPORT),
        },
    ),
    "α-Flow": (
        "digits-alpha-flow",
        on(JUMPS, EACH)
        | LAW
        | {
            "its own times": (),
            "a quarter of the rows at rest": ("objective.times.velocity_ratio=0.25",),
            "three quarters": ("objective.times.velocity_ratio=0.75",),
            "no clip": (*JUMPS, "objective.clip=null"),
            "jumps 0.5, 0.75, optimal transport": (*LAW["jumps 0.5, 0.75"], *TRANSPORT),
            "jumps 0.25, 0.75, optimal transport": (*LAW["jumps 0.25, 0.75"], *TRANSPORT),
            "Muon 0.02, optimal transport": (*JUMPS, muon(0.02, 0.006), *TRANSPORT),
        },
    ),
    "Flow matching": (
        "digits-flow-matching",
        on((LEANING,), EACH)
        | {
            "uniform times": (UNIFORM,),
            "times logit-normal(0, 1)": (MIDDLE,),
            "times stratified": (times("stratified", of=LAWS[LOW]),),
            "contrastive": (LEANING, "objective.contrast=0.05"),
            "an average by a power, 0.05": (LEANING, 'train.ema=[{"kind": "power", "std": 0.05}]'),
            "an average of 0.99": (LEANING, 'train.ema=[{"decay": 0.99, "ramp": true}]'),
            "Muon 0.006": (LEANING, muon(0.006, 0.006)),
            "contrastive, Muon 0.02": (LEANING, "objective.contrast=0.05", muon(0.02, 0.006)),
            "contrastive, optimal transport": (LEANING, "objective.contrast=0.05", *TRANSPORT),
            "contrastive, times logit-normal(0, 1)": (MIDDLE, "objective.contrast=0.05"),
        },
    ),
}
CHOSEN = {  # whose product of distances in one pass and in two is the least; flow matching's distance in fifty
    "DuMo": "one mean velocity, optimal transport",
    "MeanFlow": "jumps 0.75, 0.5, optimal transport",
    "α-Flow": "optimal transport",
    "Flow matching": "contrastive, optimal transport",
}
FOR_LATENTS: dict[str, Sets] = {  # settings of rivals on latents: of five each, by the same rule (docs/log.md)
    "MeanFlow": LAW["jumps 0.75, 0.5"],
    "α-Flow": LAW["jumps 0.5, 0.75"],
    "Flow matching": (MIDDLE,),
}
