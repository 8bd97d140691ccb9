"""What a run refuses: each row is a recipe, fields that it takes, a field more that it refuses, and what is named."""

from pathlib import Path

import pytest

from dumo.config.check_spec import check_ranks
from dumo.config.load import load
from dumo.run.resolve import resolve
from dumo.types import UserError

NESTED = "data={kind: latents, root: x, images: {kind: images, root: x, side: 8, sid: 3}, codec: {kind: taef2}}"
FIELDS = [
    # unknown keys and kinds: the dotted path, and the nearest valid name
    ("train.stpes=3", "train.stpes: unknown key; did you mean 'train.steps'"),
    ("train.xyzzy=1", "train.xyzzy: unknown key; valid: batch, clip, "),
    ("train.lr=1", "train.lr: unknown key; did you mean 'train.optimizer.lr'"),
    ("training.steps=1", "training: unknown key; did you mean 'train.steps'"),
    ("batch_size=1", "batch_size: unknown key; did you mean 'train.batch'"),
    ("learning_rate=1", "learning_rate: unknown key; `dumo show digits --all` lists all; short forms are steps, lr, "),
    ("train.=1", "train.: unknown key"),
    (NESTED, "data.images.sid: unknown key; did you mean 'data.images.side'"),
    ("evaluate.guide.omga=1", "evaluate.guide: unknown key"),
    ("train.ema.0.decya=0.5", "train.ema.0.decya: unknown key; did you mean 'train.ema.0.decay'"),
    ("base=moons", "base: unknown key"),
    ("format=2", "format: unknown key"),
    ("objective.kind=flow_matching; objective.beta=0.5", "objective.beta: unknown key; valid: drop, guide, "),
    ("net=unett", "net.kind: unknown kind 'unett'; did you mean 'unet'"),
    ("lr=many", "train.optimizer.lr"),
    ("500", "500 is not field=value"),
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
    ("objective=3", "objective: Input should be an object"),
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
    ("train.steps", "train.steps is not field=value"),
    ("=3", "=3 is not field=value"),
    ("", "an empty text is not field=value"),
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
    ("net.patch=3", "net.patch = 3"),
    ("net.width=98", "net.width"),
    ("net.attention=5", "net.attention = 5"),
    ("data.kind=moons", "protocol digits"),
    ("objective=flow_matching; sample.solver=restart", "'restart'"),
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


HEUN = ["sample.solver.kind=heun", "sample.nfe=[2]", "evaluate.nfe=[4]"]
TAUGHT = ["teacher.source=x", "objective.drop=0.1", "teacher.guide.scale=2"]
UNLABELLED = ["data.images.labelled=false", "data.images.classes=0", "objective.drop=0", "objective.guide.zeta=0"]
CAPTIONS = 'data.captions={kind: templates, templates: ["{}"]}'
READ = "net.texts={kind: learned, root: runs/texts/here}"
PAIRS = ["teacher.source=somewhere", "teacher.pairs.count=100"]
TIED = "teacher={source: somewhere, pairs: {count: 100}}"
IN_BF16 = ["train.precision=bf16", "objective.slope.kind=central", "net.time_scale=1"]
TO_DATA = "objective.times={kind: beta}"
GUIDED_MEAN = ["objective.guide.zeta=0.5", "objective.drop=0.1", "sample.nfe=[1]", "evaluate.nfe=[1]"]
CLIMBING = "objective.times={kind: jumps, both_ways: true}"
PLANE = ["data.kind=moons", "net.kind=mlp", "evaluate.protocol.kind=toy"]
EDM = "net.precondition=edm"
GUIDED = ["objective.drop=0.1", "sample.guide.scale=2"]
KNOBS = ["objective.drop=0.1", "objective.w=8.0"]

# A recipe, fields that it takes, a field more that does not fit these, and what the message names.
MISFITS = [
    ("digits", HEUN, "sample.nfe=[2, 3]", "nfe = 3"),
    ("digits", HEUN, "evaluate.nfe=[2, 3]", "nfe = 3"),
    ("digits-shortcut", PLANE, "objective.scale=2", "objective.scale"),
    ("moons", ["objective.drop=0.5"], "objective.guide.zeta=0.5", "objective.guide"),
    ("moons-flow-matching", ["objective.kind=imf"], "objective.w=8", "objective.w"),
    ("moons-flow-matching", GUIDED[:1], "objective.kind=self_e", "conditions must be dropped"),
    ("digits-self-e", [], "objective.drop=0", "objective.drop=0.1"),
    ("digits-shortcut", [GUIDED[0], "objective.scale=2"], GUIDED[1], "sample.guide.scale"),
    ("moons", [], "sample.guide.scale=2", "sample.guide.scale"),
    ("digits", GUIDED, "objective.drop=0", "objective.drop"),
    ("digits-guided", [], "sample.guide.scale=2", "sample.guide.scale"),
    ("digits", GUIDED, "objective.guide.zeta=0.44", "guidance scale 1.79"),
    ("digits-imf", KNOBS, "sample.guide.scale=2", "sample.knobs"),
    ("digits-imf", [], "sample.knobs.w=4", "sample.knobs.w"),
    ("digits", [], "sample.knobs.w=4", "sample.knobs.w"),
    ("digits-imf", KNOBS, "sample.knobs.weight=4", "sample.knobs.weight"),
    ("digits-meanflow", ["train.batch=8"], "train.batch=1", "r = t"),
    ("digits-meanflow", ["train.micro_batch=4"], "train.micro_batch=3", "train.micro_batch"),
    ("digits-shortcut", ["train.batch=32"], "train.batch=4", "train.batch"),
    ("digits-imm", ["train.batch=48"], "train.batch=6", "train.batch"),
    ("digits", ["train.coupling.group=16"], "train.coupling.group=12", "train.batch"),
    ("digits", PAIRS, "train.coupling.group=4", "train.coupling"),
    *((f"digits-{kind}", [], "train.coupling.group=8", f"'{kind}'") for kind in ("drift", "imm", "match", "twinflow")),
    *((f"digits-{kind}", [], TIED, "teacher.pairs") for kind in ("match", "twinflow")),
    ("digits-meanflow", GUIDED_MEAN, TO_DATA, "objective.guide"),
    ("digits-imf", [], TO_DATA, "du/dt"),
    ("digits-meanflow", [CLIMBING], "objective.kind=alpha_flow", "objective.times.both_ways"),
    ("digits-pi-flow", [], "objective.early.low=-3", "early.low"),
    ("digits-ict", [], "objective.discretization.first=1e9", "discretization"),
    ("digits-facm", [], EDM, "net.precondition"),
    ("digits-twinflow", [], EDM, "net.precondition"),
    ("digits-imm", [], PAIRS[0], "teacher"),
    ("digits-guided", TAUGHT[:2], TAUGHT[2], "teacher.guide"),
    ("moons", TAUGHT[:2], TAUGHT[2], "teacher.guide.scale"),
    ("digits", TAUGHT, GUIDED[1], "sample.guide.scale"),
    ("digits-imf", TAUGHT, "objective.w=8.0", "objective.w"),
    ("digits", [], "train.optimizer.fake_lr=0.001", "fake_lr"),
    ("sdxl-dmd2", [], "net.lowpass=10.0", "net.lowpass"),
    ("sdxl-dmd2", [], "net.lora=null", "net.lora"),
    ("sdxl-dmd2", [], "net.lora.subject=4", "net.lora.subject"),
    ("sdxl-dmd2", [], "sample.solver.m=0.5", "objective.times"),
    ("sdxl-dmd2", ["sample.nfe=[1, 2, 4]"], "sample.nfe=[8]", "nfe = 8"),
    ("sdxl-dmd2", [], "teacher=null", "teacher"),
    ("sdxl-dmd2", [], "train.batch=126", "train.batch"),
    ("sdxl-dmd2", ["sample.nfe=[1]", "evaluate.nfe=[1]"], "objective.times.steps=1", "objective.times.steps"),
    ("sdxl-dmd2", ["teacher.guide.scale=1"], "objective.scale=0.5; teacher.guide.scale=2", "objective.scale"),
    ("flux-lora", [], "teacher.guide.scale=2", "net.guidance"),
    ("sd3-tdm", [], "sample.solver.m=0.5", "objective.times"),
    ("sd3-tdm", [], "sample.nfe=[1]", "nfe = 1"),
    ("sd3-tdm", [], "sample.solver={kind: restart, m: 0.75}", "restart"),
    ("cifar10", [], "net.augment=9", "net.augment"),
    ("cifar10", [], "data.augment.yflip=true", "net.augment"),
    ("cifar10", [], "data.augment=null", "net.augment"),
    ("cifar10", [], "objective.drop=0.1", "objective.drop"),
    ("cifar10", [], "net={kind: dit, width: 8, attention: 1}", "net.augment"),
    ("cifar10-latents", UNLABELLED, "data.images.augment={kind: edm}", "data.images.augment"),
    ("digits", [], CAPTIONS, "data.captions"),
    ("digits", [], READ, "net.texts"),
]


@pytest.mark.parametrize(("recipe", "fits", "more", "named"), MISFITS)
def test_what_does_not_fit_is_refused_and_what_does_is_not(recipe: str, fits: list[str], more: str, named: str) -> None:
    load(recipe, fits)
    with pytest.raises(UserError) as refused:
        load(recipe, [*fits, more])
    assert named in str(refused.value)


@pytest.mark.parametrize(
    ("recipe", "fits", "more", "named"),
    [
        ("digits-ucgm", IN_BF16[1:], IN_BF16[0], "central"),
        ("digits", [IN_BF16[2], "objective.slope={kind: central, h: 0.05}"], "objective.slope.h=0.06", "central"),
        ("digits", [], "net.patch=3", "net.patch = 3"),
    ],
)
def test_what_takes_a_net_is_refused_when_a_run_is_opened(recipe: str, fits: list[str], more: str, named: str) -> None:
    resolve(load(recipe, fits))
    run = load(recipe, [*fits, more])
    with pytest.raises(UserError) as refused:
        resolve(run)
    assert named in str(refused.value)


@pytest.mark.parametrize(
    ("recipe", "fields", "ranks", "named"),
    [
        ("digits", ["train.batch=16"], 17, "train.batch"),
        ("digits-meanflow", ["train.batch=32"], 16, "r < t"),
        ("digits-meanflow", ["train.batch=20", "train.micro_batch=7"], 6, "train.micro_batch"),
        ("digits-imm", ["train.batch=32"], 9, "train.batch"),
        ("digits", ["train.share=4"], 6, "train.share"),
        ("digits", ["train.compile=loss"], 2, "train.compile"),
    ],
)
def test_what_so_many_ranks_cannot_train_is_refused(recipe: str, fields: list[str], ranks: int, named: str) -> None:
    run = load(recipe, fields)
    with pytest.raises(UserError) as refused:
        check_ranks(run.train, run.objective, ranks)
    assert named in str(refused.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("base: mine.yaml", "circular"),
        ("base: other.yaml", "other.yaml"),
        ("base: dgits", "did you mean 'digits'"),
        ("base: nowhere/run.yaml", "nowhere/run.yaml"),
        ("base: $NOWHERE/a.yaml", "NOWHERE"),
        ("base: 3", "base"),
        ("base: [digits, moons]", "base"),
        ("base:", "base"),
        ("base: ''", "base"),
        ("base: list.yaml", "list.yaml"),
        ("base: digits\nabout: {a: 1}", "about"),
        ("base: digits\ntrain: {stpes: 1}", "train.stpes"),
        ("base: digits\ntrain: {steps: 1, steps: 2}", "steps"),
        ("format: 1\nbase: digits", "format"),
        ("format:\nbase: digits", "format"),
        ("changed: 3\nbase: digits", "changed"),
    ],
)
def test_a_file_is_refused_by_its_name(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("base: mine.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        load(str(file))
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
