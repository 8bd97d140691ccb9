"""Names on the Hugging Face Hub are typed where a folder would be: from an empty cache, and offline from a filled one.

Commands run in processes of their own, whose client reads the environment when it is imported. The Hub is on this
machine (`hub`).
"""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from dumo.io import run_places
from forked import ENVIRONMENT
from hub import COMMIT, Hub, Repository, serving
from pipelines import SIDE, save

OFFLINE = {"HF_HUB_OFFLINE": "1"}
UNREACHABLE = {"HF_ENDPOINT": "http://127.0.0.1:9"}
NO_TOKEN = {"HF_TOKEN": ""}
SMALL = [
    "train.steps=2",
    "train.batch=4",
    "net.width=16",
    "net.depth=2",
    "net.attention=2",
    "data.side=32",
    "data.split=train",
]
CARD = """---
configs:
- config_name: plain
  data_files:
  - {split: train, path: plain/train-*}
  - {split: test, path: plain/test-*}
---
"""
OTHER = "f" * 40


@dataclass
class Machine:
    """A working folder, a cache and a Hub."""

    here: Path
    hub: Hub

    def call(self, *words: object, code: int = 0, **env: str) -> str:
        """Run a command, which ends with this exit code. Returns what it printed."""
        variables = {
            **ENVIRONMENT,
            **self.hub.environment,
            "HF_HOME": str(self.here / "cache"),
            "COLUMNS": "200",
            **env,
        }
        variables.pop("DUMO_DATA", None)
        done = subprocess.run(
            [sys.executable, "-m", "dumo", *map(str, words)],
            cwd=self.here,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, (words, done.stdout, done.stderr)
        assert (code == 2) <= (done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr), done.stderr
        return done.stdout + done.stderr

    def sent(self) -> set[str]:
        """The names of files that were downloaded since the last time."""
        names = {*self.hub.sent}
        assert len(names) == len(self.hub.sent), "each once"
        self.hub.sent.clear()
        return names


def table(count: int) -> bytes:
    """Images of 32 x 32 pixels in three classes, as data sets on the Hub have them."""
    draws = np.random.default_rng(count)
    images: list[dict[str, object]] = []
    for i in range(count):
        Image.fromarray(draws.integers(0, 256, (32, 32, 3), np.uint8)).save(file := io.BytesIO(), "PNG")
        images.append({"bytes": file.getvalue(), "path": f"{i}.png"})
    columns = pa.table({"img": images, "kind": pa.array([i % 3 for i in range(count)], pa.int64())})
    features = {"img": {"_type": "Image"}, "kind": {"names": ["cat", "dog", "fox"], "_type": "ClassLabel"}}
    columns = columns.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(columns, written := io.BytesIO())
    return written.getvalue()


def pets(count: int, *, commit: str = COMMIT, is_gated: bool = False) -> Repository:
    """A data set of images."""
    files = {"README.md": CARD.encode(), "plain/train-0.parquet": table(count), "plain/test-0.parquet": table(6)}
    return Repository(files, commit, is_gated)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """With a data set, a run and what needs a token on the Hub, and nothing in the cache."""
    with serving() as hub:
        hub.datasets = {"owner/pets": pets(24), "owner/gated": pets(24, is_gated=True)}
        hub.models = {
            "owner/digits": Repository.of(run_places.folder("digits-trained")),
            "owner/gated": Repository({"model_index.json": b"{}"}, is_gated=True),
        }
        yield Machine(tmp_path, hub)


@pytest.mark.slow
def test_a_data_set_is_trained_on_by_name(machine: Machine) -> None:
    """Its classes are found by their type; the run resumes at its commit, offline and when the Hub has moved on."""
    words = ("train", "my-images", *SMALL, "data.root=owner/pets", "--out", "run")
    printed = machine.call(*words)
    assert f"downloading owner/pets at {COMMIT}" in printed
    assert "3 classes: cat, dog, fox" in printed
    assert machine.sent() == {"README.md", "plain/train-0.parquet", "plain/test-0.parquet"}
    text = (machine.here / "run/run.yaml").read_text()
    assert f"root: owner/pets@{COMMIT}\n" in text
    machine.hub.datasets["owner/pets"] = pets(48, commit=OTHER)
    assert "24 images" in machine.call(*words, "train.steps=3")
    for steps, env in ((4, OFFLINE), (5, UNREACHABLE)):
        assert "24 images" in machine.call("train", "run", f"train.steps={steps}", **env)
    assert "24 images" in machine.call(*words[:-1], "offline", **OFFLINE)
    assert machine.sent() == set()
    assert "48 images" in machine.call(*words[:-1], "new")
    assert f"root: owner/pets@{OTHER}\n" in (machine.here / "new/run.yaml").read_text()


@pytest.mark.slow
def test_a_run_is_opened_by_name(machine: Machine) -> None:
    """What a command writes goes to a folder here; the samples are those of the same run on this machine."""
    machine.call("sample", "owner/digits", "--nfe", "1", "--count", "4")
    assert machine.sent() == {"README.md", "run.yaml", "model.safetensors", "evaluation.json"}
    machine.call("sample", "digits-trained", "--nfe", "1", "--count", "4")
    name = "samples/hop-nfe1-count4.png"
    assert (machine.here / "digits" / name).read_bytes() == (machine.here / "digits-trained" / name).read_bytes()
    machine.call("export", "owner/digits", "--out", "exported", **OFFLINE)
    assert "digits" in machine.call("compare", "owner/digits", **OFFLINE)
    assert machine.sent() == set()


@pytest.mark.nightly
def test_a_pipeline_is_tuned_by_name(machine: Machine) -> None:
    """Counting reads its configs alone; the run names the commit; its weights are fetched once."""
    whole = Repository.of(save("SD3", machine.here / "sd3"))
    machine.hub.models["owner/sd3"] = whole
    for number in range(4):
        Image.new("RGB", (SIDE, SIDE), (60 * number, 9, 200)).save(machine.here / f"sd3/{number}.png")
        (machine.here / f"sd3/{number}.txt").write_text(f"number {number}")
    (machine.here / "sd3").rename(machine.here / "photos")
    fields = ["pipeline=owner/sd3", "data.images.root=photos", f"data.images.side={SIDE}", "train.steps=2"]
    fields += ["train.batch=2", "train.precision=fp32", "net.lora.rank=2", "net.lora.frozen=float32"]
    fields += ["net.texts.dtype=float32"]
    machine.call("show", "sd3-lora", *fields, "--cost")
    assert not [name for name in machine.sent() if name.endswith(".safetensors")]
    machine.call("encode", "sd3-lora", *fields)
    machine.call("train", "sd3-lora", *fields)
    assert machine.sent() == {name for name in whole.files if name.endswith(".safetensors")}
    assert f"source: owner/sd3@{COMMIT}\n" in (machine.here / "runs/sd3-lora/run.yaml").read_text()
    machine.call("train", "runs/sd3-lora", "train.steps=3", **OFFLINE)
    machine.call("sample", "runs/sd3-lora", "--prompt", "a dog", "--nfe", "1", **OFFLINE)
    machine.call("export", "runs/sd3-lora", "--out", "few", **OFFLINE)
    assert 'DiffusionPipeline.from_pretrained("few"' in (machine.here / "few/README.md").read_text()
    assert machine.sent() == set()


@pytest.mark.nightly
def test_one_of_two_ranks_downloads(machine: Machine) -> None:
    words = ["train", "my-images", *SMALL, "data.root=owner/pets", "--out", "run", "--device", "cpu"]
    env = {**ENVIRONMENT, **machine.hub.environment, "HF_HOME": str(machine.here / "cache")}
    env.pop("DUMO_DATA", None)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "dumo", *words]
    subprocess.run(command, cwd=machine.here, env=env, check=True, capture_output=True)
    assert machine.sent() == {"README.md", "plain/train-0.parquet", "plain/test-0.parquet"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "env", "said"),
    [
        (["train", "cifar10-small", "data.root=owner/gated"], NO_TOKEN, "gated"),
        (["train", "cifar10-small", "data.root=owner/none"], {}, "Repository Not Found"),
        (["train", "cifar10-small"], UNREACHABLE, "check your internet connection"),
        (["train", "cifar10-small"], OFFLINE, "HF_HUB_OFFLINE=0"),
        (["train", "sd3-lora", "pipeline=owner/gated", "data.images.root=."], NO_TOKEN, "gated"),
        (["sample", "owner/none"], {}, "Repository Not Found"),
        (["sample", "owner/gated"], {}, "is not a run's folder"),
        # A mistyped folder: the Hub is not asked.
        (["train", "here/pohtos"], {}, "there is no recipe, file or run's folder"),
        (["train", "my-images", "data.root=here/pohtos"], {}, "there is no folder or file"),
        (["train", "sd3-lora", "pipeline=here/sd3", "data.images.root=x"], {}, "here/sd3 does not exist"),
        (["sample", "runs/digist"], {}, "is not a run's folder"),
    ],
    ids=lambda case: " ".join(case[:3]) if isinstance(case, list) else None,
)
def test_what_cannot_be_fetched_is_one_line(machine: Machine, words: list[str], env: dict[str, str], said: str) -> None:
    (machine.here / "here").mkdir()
    assert said in machine.call(*words, code=2, **env)
    if "here/" in str(words) or "runs/" in str(words):
        assert machine.sent() == set()
