"""A subject on top of a few-step run: one LoRA of both for the stock model, or one of the subject for that run's."""

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dumo.export import lora
from dumo.flow.guide import Guide
from dumo.flow.module import Flow
from dumo.flow.noisy_batch import PRIOR, add_noise, make_draws
from dumo.flow.reading import readings_of, teacher_velocity
from dumo.io.tensor_files import load
from dumo.run.weights import load_run
from dumo.runtime.random import random_row_mask
from dumo.types import frozen
from e2e.shell import call, refused, together
from forked import ENVIRONMENT
from stock.case import CAPTIONS, SHORT, Case, must

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of diffusers about its own parts, and of peft about merges
    pytest.mark.slow,
]
LARGE = "train.optimizer.lr=0.01"  # steps so long that a few of them count
LR = [LARGE, "train.steps=4", "train.save_every=2", "train.schedule.warmup=0", "train.sheets=4"]


@dataclass(frozen=True)
class Personal(Case):
    """A run of the recipe `personal`; the few-step run is in `few`."""

    @property
    def run(self) -> Path:
        return self.folder / "personal"

    @property
    def few(self) -> Path:
        return self.folder / "run"

    def words(self) -> list[str]:
        """What is set of it."""
        return [*(f"{part}={self.folder / part.replace('.root', '')}" for part in ("data.root", "net.texts.root"))]


def personal(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Personal:
    """A few-step run, its images of prior prompts next to the photographs, and a run on top of it."""
    Case.of(name, folder, "net.lora={rank: 4}", LARGE)
    case, mine = Personal(name, folder), folder / "mine"
    shutil.copytree(folder / "photos", mine / "photos")
    (folder / "prior.txt").write_text("a castle\na boat, at sea\n", encoding="utf-8")
    made = ("--nfe", "2", "--count", "4", "--format", "images", "--out", mine / "prior")
    must(call("sample", case.few, "--prompts", folder / "prior.txt", *made))
    monkeypatch.setenv("FEW_STEPS", str(case.few))
    monkeypatch.setenv("MY_IMAGES", str(mine))
    must(call("encode", "personal", *case.words()))
    with patch("dumo.run.net.Flow", wraps=Flow) as flow:
        must(call("train", "personal", *case.words(), *LR, "--out", case.run))
    assert {made.kwargs["prior"] for made in flow.call_args_list} == {0.5}
    return case


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Personal:
    """To be read."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return personal("SD3", tmp_path_factory.mktemp("personal"), monkeypatch)


def test_it_begins_as_the_few_step_run_and_trains_its_own_adapters_alone(sd3: Personal) -> None:
    """Which are all that its checkpoints hold; without them it is the few-step run's net, head by head, to the bit."""
    before, after = load_run(str(sd3.few), device="cpu"), load_run(str(sd3.run), device="cpu")
    held = load(after.file)
    assert held.keys() == {n for n in after.net.state_dict() if ".subject." in n}
    assert all(x.any() for name, x in held.items() if "lora_B" in name and "attn.to_q" in name)
    x, t = torch.randn(2, *after.spec.data.shape), torch.tensor([0.3, 0.9])
    c, own = (torch.tensor([one.spec.conditions.names.index(text) for text in CAPTIONS[:2]]) for one in (before, after))
    with torch.no_grad(), after.net.base():  # pyright: ignore
        base = after.net(x, own, t=t)
    with torch.no_grad():
        wanted, now = before.net(x, c, t=t), after.net(x, own, t=t)
    assert all(torch.equal(a, b) for a, b in zip(base, wanted, strict=True))
    assert all((a - b).norm() > 0.01 * b.norm() for a, b in zip(now, wanted, strict=True))
    assert not torch.equal(*wanted), "heads differ, so that one in the other's place is seen"
    assert {path.name for path in (sd3.run / "sheets").iterdir()} == {f"step-00000004-nfe{n}.png" for n in (1, 2)}


def test_a_share_of_every_batch_is_what_the_few_step_run_made(sd3: Personal) -> None:
    """Half of each; each part goes through its own images, none left out; some rows of a batch are those of all."""
    opened = load_run(str(sd3.run), device="cpu").spec
    source, texts = opened.data.open(), opened.conditions.names
    seen = Counter[str]()
    for step in range(12):
        x, c = source.batch(step, 4, 0)
        part = source.batch(step, 4, 0, slice(1, 3))
        assert torch.equal(part[0], x[1:3])
        assert torch.equal(part[1], c[1:3])
        prior = [texts[k] in ("a castle", "a boat, at sea") for k in c.tolist()]
        assert prior == random_row_mask(0, step, PRIOR, 4, 0.5).tolist()
        assert sum(prior) == 2
        seen.update(texts[k] for k in c.tolist())
    assert seen == dict.fromkeys(CAPTIONS, 8) | {"a castle": 12, "a boat, at sea": 12}


def test_the_few_step_runs_own_images_ask_nothing_of_it(sd3: Personal) -> None:
    """Before the first step they have no loss of velocity, at any time, however guided; photographs have."""
    opened = load_run(str(sd3.few), device="cpu")
    net, run = opened.net, opened.spec
    teacher = teacher_velocity(readings_of(run.objective, net))
    x, c, _ = torch.randn(4, *run.data.shape), torch.tensor([0, 1, 2, 0]), None
    objective = run.objective.model_copy(update={"guide": Guide(zeta=0.8)})
    draws = make_draws(objective, x.shape[1:], seed=0, step=0, batch=4, prior=0.5)
    b = add_noise(draws, run.path, x, c, run.data.classes, teacher=teacher)
    terms = objective.loss(net, frozen(net), b)
    assert b.teacher_rows is not None
    assert terms.parts["v"][b.teacher_rows].max() < 1e-9
    assert terms.parts["v"][~b.teacher_rows].min() > 0.01
    later = b.at(0.25)
    assert torch.equal(later.v_t[~b.teacher_rows], run.path.at(x, b.z, later.t)[1][~b.teacher_rows])
    assert not torch.equal(later.v_t[b.teacher_rows], run.path.at(x, b.z, later.t)[1][b.teacher_rows])


@pytest.mark.nightly
def test_it_goes_on_and_is_trained_by_two_ranks_to_the_bit(
    sd3: Personal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEW_STEPS", str(sd3.few))
    monkeypatch.setenv("MY_IMAGES", str(sd3.folder / "mine"))
    words = ["train", "personal", *sd3.words(), *LR, "train.micro_batch=2"]
    must(call(*words, "--out", tmp_path / "whole"))
    must(call(*words, "train.steps=2", "--out", tmp_path / "parts"))
    must(call(*words, "--out", tmp_path / "parts"))
    env = {"FEW_STEPS": str(sd3.few), "MY_IMAGES": str(sd3.folder / "mine")}
    with patch.dict(ENVIRONMENT, env):
        together(2, *words, "train.share=1", "--out", tmp_path / "ranks", cwd=tmp_path)
    places = (tmp_path / name / "checkpoints/step-00000004" for name in ("whole", "parts", "ranks"))
    whole, parts, ranks = (load(place / "net") for place in places)
    assert whole.keys() == parts.keys() == ranks.keys()
    for key, x in whole.items():
        assert torch.equal(x, parts[key]), key
        assert torch.equal(x, ranks[key]), key


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["SD3", "Flux", "SDXL"])
def test_stock_pipelines_make_dumos_images_of_both_loras(
    name: str, sd3: Personal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused on the stock model, alone on the few-step run's export, merged; at one pass and two, by their cards."""
    case = sd3 if name == "SD3" else personal(name, tmp_path, monkeypatch)
    must(call("export", case.few, "--out", case.folder / "few-steps"))
    fused, alone = case.export("fused", "--to", "lora"), case.export("alone", "--to", "lora", "--alone")
    assert max(case.errors_over_limits("lora", fused)) < 1
    assert max(case.errors_over_limits("lora", alone)) < 1
    assert max(case.errors_over_limits("merged", case.export("merged"))) < 1
    assert {len(x) for key, x in load_file(alone / lora.FILE).items() if "lora_A" in key} == {16}
    assert not (alone / "scheduler").exists()
    assert "for the export of the few-step run `run`, not for the stock model" in (alone / "README.md").read_text()


@pytest.mark.nightly
def test_both_adapters_are_a_few_steps_lora_and_the_subjects_next_to_it(sd3: Personal) -> None:
    """As adapters of two names, too, on the stock model."""
    must(call("export", sd3.few, "--out", sd3.folder / "few-lora", "--to", "lora"))
    subject, whole = sd3.export("subject", "--to", "lora", "--alone"), sd3.export("whole", "--to", "lora")
    made = []
    for names in ({"whole": whole}, {"few": sd3.folder / "few-lora", "subject": subject}):
        pipe = sd3.pipeline()
        for name, place in names.items():
            pipe.load_lora_weights(place, adapter_name=name)
        pipe.set_adapters([*names])
        made.append(sd3.pipeline_latent(pipe, 1))
    assert (made[0] - made[1]).norm() < 1e-5 * made[0].norm()


@pytest.mark.nightly
def test_comfyui_gets_both_or_the_subject(sd3: Personal) -> None:
    """Both are the few-step run's LoRA and the subject's, rank after rank, and the layers that the former changed."""
    fused, alone = (sd3.export(f"{n}.safetensors", "--to", "comfyui", *w) for n, w in (("f", ()), ("a", ("--alone",))))
    must(call("export", sd3.few, "--out", first := sd3.folder / "first.safetensors", "--to", "comfyui"))
    both, few, one = map(load_file, (fused, first, alone))
    assert both.keys() == few.keys()
    assert one.keys() == {key for key in both if ".lora_" in key}
    for key, x in both.items():
        parts = [few[key], one[key]] if key in one else [few[key]]
        assert torch.equal(x, torch.cat(parts, 1 if "lora_up" in key else 0)), key
    for file, said in ((fused, sd3.name), (alone, "the export of run")):
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["onto"] == said


@pytest.mark.nightly
def test_another_few_step_run_is_refused(sd3: Personal, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was trained on, or of another net; and no run at all."""
    refused("sample", sd3.run, "start.source=nowhere", named=("start.source",), lines=None)
    monkeypatch.setenv("MY_IMAGES", str(sd3.folder / "mine"))
    words = [*sd3.words(), *SHORT, "--out", "new"]
    monkeypatch.setenv("FEW_STEPS", str(here))
    refused("train", "personal", *words, named=("FEW_STEPS",), lines=None)
    monkeypatch.setenv("FEW_STEPS", str(sd3.few))
    refused("train", "personal", *words, "net.lora.rank=3", named=("net.lora.rank: 4 recorded, 3 requested",))
    refused("train", "personal", *words, "start=null", named=("net.lora.subject", "set start="))
    refused("export", sd3.few, "--out", "out", "--to", "lora", "--alone", named=("net.lora.subject",))
    refused("export", sd3.run, "--out", "out", "--alone", named=("net.lora.subject",))
