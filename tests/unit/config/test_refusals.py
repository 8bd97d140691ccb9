"""What a run refuses: each row is a recipe, fields that it takes, a field more that it refuses, and what is named."""

import pytest

from dumo.config.load import load
from dumo.run.resolve import resolve
from dumo.types import UserError

NESTED = "data={kind: latents, root: x, images: {kind: images, root: x, side: 8, sid: 3}, codec: {kind: taef2}}"
FIELDS = [
    # unknown keys and kinds: the dotted path, and the nearest valid name
    ("train.stpes=3", "train.stpes: unknown key; did you mean 'steps'"),
    ("train.xyzzy=1", "train.xyzzy: unknown key; valid: batch, clip, "),
    ("train.max_grad_norm=1", "train.max_grad_norm: unknown key; did you mean 'train.clip'"),
    ("learning_rate=1", "learning_rate: unknown key; did you mean 'train.optimizer.lr'"),
    ("train.=1", "train.: unknown key"),
    (NESTED, "data.images.sid: unknown key; did you mean 'side'"),
    ("evaluate.guide.omga=1", "evaluate.guide: unknown key"),
    ("train.ema.0.decya=0.5", "train.ema.0.decya: unknown key; did you mean 'decay'"),
    ("base=moons", "base: unknown key"),
    ("format=2", "format: unknown key"),
    ("objective.kind=flow_matching; objective.beta=0.5", "objective.beta: unknown key"),
    ("train.ema=[{kind: stone}]", "train.ema.0.kind: unknown kind 'stone'"),
    ("objective.kind=dumbo", "objective.kind: unknown kind 'dumbo'; did you mean 'dumo'"),
    ("data.kind=", "data"),
    ("objective.kind=meanflow; objective.times={kind: pair, of: {kind: beto}}", "objective.times.of.kind"),
    # values of a wrong type or out of range, in pydantic's words
    ("train.steps=many", "train.steps"),
    ("train.steps=1.5", "train.steps"),
    ("train.steps=", "train.steps"),
    ("train.steps=0", "train.steps"),
    ("train.batch=true", "train.batch"),
    ("about=", "about"),
    ("objective=meanflow", "objective: Input should be a mapping with a kind"),
    ("train.ema.0.decay=2", "train.ema.0.decay"),
    ("train.optimizer.betas=[0.9, 2]", "train.optimizer.betas.1"),
    ("train.optimizer.lr=.nan", "train.optimizer.lr"),
    ("train.milestones=[-1]", "train.milestones.0"),
    ("train.precision=fp16", "train.precision"),
    ("net.depth=9223372036854775808", "net.depth"),
    ("objective.guide.zeta=1", "objective.guide.zeta"),
    ("sample.nfe=[]", "sample.nfe"),
    ("sample.nfe=[1, 1000000]", "sample.nfe.1"),
    # overrides that set nothing
    ("train.steps", "train.steps is no field"),
    ("=3", "=3 is no field"),
    ("", "an empty text is no field"),
    ("train.steps={", "train.steps"),
    ("net={depth: 1, depth: 2}", "net"),
    ("train.steps.more=3", "train.steps"),
    ("train=3", "train"),
    ("about.more=1", "about"),
    ("train.ema.1.decay=0.5", "train.ema.1"),
    ("train.ema.last.decay=0.5", "train.ema.last"),
    ("train.ema.²=1", "train.ema.²"),
    ("train.ema=[]; train.ema.0.decay=0.5", "train.ema.0"),
    ("train.ema.1=0.5", "train.ema.1"),
    ("sample.nfe.0.x=1", "sample.nfe.0"),
    # parts that do not fit each other
    ("train.ref=0.5", "0.999"),
    ("objective.slope.kind=central; train.precision=tf32", "central"),
    ("objective.slope.kind=central; net.time_scale=20", "time_scale"),
    ("net.patch=3", "net.patch 3"),
    ("net.width=98", "net.width"),
    ("net.attention=5", "net.attention 5"),
    ("data.kind=moons", "protocol digits"),
    ("objective.kind=flow_matching", "'restart'"),
    ("sample.solver.kind=hop", "'hop'"),
    ("sample.solver.kind=heun", "nfe = 1"),
    ("sample.nfe=[0]", "nfe = 0"),
    ("evaluate.nfe=[-1]", "nfe = -1"),
    ("evaluate.protocol.kind=toy", "protocol toy"),
    ("evaluate.protocol.samples=10", "evaluate.protocol.samples"),
]


@pytest.mark.parametrize(("fields", "named"), FIELDS, ids=[fields for fields, _ in FIELDS])
def test_a_field_is_refused_by_its_path(fields: str, named: str) -> None:
    with pytest.raises(UserError) as refused:
        resolve(load("digits", fields.split("; ")))
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_mistake_has_a_line() -> None:
    with pytest.raises(UserError) as refused:
        load("digits", ["train.stpes=3", "train.batch=-1", "net.kind=xyzzy"])
    assert {line.split(":")[0] for line in str(refused.value).splitlines()} == {
        "train.stpes",
        "train.batch",
        "net.kind",
    }
