"""A teacher's velocity replaces the data's, its pairs data and noise; another's is refused. It may be a function."""

import json
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save
from torch import Tensor
from torch.optim import SGD

from dumo.config.check_spec import check_guidance
from dumo.config.load import load
from dumo.config.spec import Run
from dumo.config.teacher_spec import Teacher
from dumo.flow.guide import CFG
from dumo.io.tensor_files import load as load_weights
from dumo.run import teacher
from dumo.run.weights import build
from dumo.runtime import dist
from dumo.runtime.progress import no_bar
from dumo.runtime.random import noise, stream
from dumo.training.duration import Duration
from dumo.training.state import State
from dumo.types import Readings, UserError
from trained import train
from unit.run.known import line, nan, same, shift, tiny

CPU = torch.device("cpu")
USER = ["teacher.kind=python", "teacher.source=unit.run.known:line"]
SHIFT = ["teacher.kind=python", "teacher.source=unit.run.known:shift"]
KNOBS = "objective.w=8.0"


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that can teach others on moons."""
    folder = tmp_path_factory.mktemp("teacher") / "fm"
    train(tiny("moons-flow-matching"), folder)
    return folder


def index_of(run: Run) -> teacher.PairsIndex:
    """The index of the run's pairs."""
    assert run.teacher
    assert run.teacher.pairs
    return teacher.PairsIndex.of(run.teacher.pairs, run.objective.needs.teacher.points, run.path, run.data, "")


def pairs_of(run: Run, readings: Readings, folder: Path) -> teacher.TeacherPairs:
    """The run's pairs, by one process."""
    return teacher.make_pairs(index_of(run), readings, folder, CPU, no_bar)


def shards(folder: Path) -> list[Path]:
    """The files of pairs."""
    return sorted(folder.glob("*.safetensors"))


def test_pairs_that_are_no_numbers_are_not_written(tmp_path: Path) -> None:
    """So a teacher who was mended makes them anew."""
    run = tiny("moons", *SHIFT, "teacher.pairs.count=6")
    with pytest.raises(UserError):
        pairs_of(run, nan(run, CPU), tmp_path)
    assert not shards(tmp_path)
    other = index_of(run).model_copy(update={"teacher": "mended"})
    teacher.make_pairs(other, shift(run, CPU), tmp_path, CPU, no_bar)
    with pytest.raises(UserError):
        pairs_of(run, shift(run, CPU), tmp_path)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda x: {**x, "z": x["z"].roll(1, 0)}, r"has changed \(different SHA-256\)"),
        (lambda x: {name: rows[:-1] for name, rows in x.items()}, r"has \d+ of \d+ bytes"),
        (lambda x: {**x, "x": 0 * x["x"]}, r"has changed \(different SHA-256\)"),
    ],
    ids=["rolled", "cut", "zeroed"],
)
def test_pairs_that_changed_are_refused(
    tmp_path: Path, damage: Callable[[dict[str, Tensor]], dict[str, Tensor]], fault: str
) -> None:
    run = tiny("moons", *SHIFT, "teacher.pairs.count=6")
    pairs_of(run, shift(run, CPU), tmp_path)
    (file,) = shards(tmp_path)
    file.write_bytes(save(damage(load_weights(file))))
    with pytest.raises(UserError):
        pairs_of(run, shift(run, CPU), tmp_path)


FEW = ("net.width=32", "train.steps=120", "train.batch=64", "train.optimizer.lr=0.01")


@pytest.mark.nightly
def test_the_net_learns_what_the_teacher_says(tmp_path: Path) -> None:
    """Of data that are two moons it learns one point, which is what its teacher knows."""
    run = tiny("moons-flow-matching", *USER, *FEW, "objective.times.low=0.05")
    net = train(run, tmp_path / "run").net
    velocity, wanted = run.objective.readings(net).velocity, line(run, CPU).velocity
    x, t, c = torch.randn(5, 2, generator=stream("x")), torch.tensor([0.5, 0.5, 0.5, 0.75, 1]), torch.zeros(5).long()
    near = torch.tensor([1.0, -2.0]) * (1 - t)[:, None] + t[:, None] * x
    assert velocity
    assert wanted
    with torch.no_grad():
        assert (velocity(near, t, c) - wanted(near, t, c)).abs().mean() < 0.3


def test_a_run_teaches_and_is_remembered(known: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    one = train(tiny("moons-meanflow", f"teacher.source={known}"), folder)
    plain = train(tiny("moons-meanflow"), tmp_path / "plain")
    assert not same(one.net, plain.net)
    about = json.loads((folder / "teacher.json").read_text())
    assert about["source"] == str(known)
    assert len(about["sha256"]) == 64


def test_a_step_evaluates_a_run_in_its_own_precision(tmp_path: Path) -> None:
    """Guidance computes in float32, and pairs are generated in it."""
    words = ["data.labelled=true", "objective.drop=0.5", "train.optimizer.lr=0.01"]
    train(tiny("moons-flow-matching", *words), tmp_path)
    words += [f"teacher.source={tmp_path}", "teacher.guide.scale=50"]
    x, t, c = torch.randn(4, 2, generator=stream("x")), torch.full((4,), 0.5), torch.arange(4) % 2
    asked: dict[str, Tensor] = {}
    exact: dict[str, Tensor] = {}
    for precision in ("fp32", "bf16"):
        run = tiny("moons-meanflow", *words, f"train.precision={precision}")
        assert run.teacher
        net = build(run)
        opened = teacher.open_teacher(run.teacher, run, State(net, SGD(net.parameters()), Duration(1)), CPU)
        assert opened.velocity
        assert opened.readings.velocity
        asked[precision] = opened.velocity(x, t, c, 0 * x)
        exact[precision] = opened.readings.velocity(x, t, c)
    assert torch.equal(asked["fp32"], exact["fp32"])
    assert torch.equal(exact["bf16"], exact["fp32"])
    assert not torch.equal(asked["bf16"], asked["fp32"])
    assert not torch.equal(asked["bf16"], asked["bf16"].bfloat16().float())


@pytest.mark.nightly
def test_stopped_and_resumed_is_the_same(known: Path, tmp_path: Path) -> None:
    for more in ([], ["teacher.pairs.count=24"]):
        name = f"{len(more)}"
        taught = [f"teacher.source={known}", *more]
        whole = train(tiny("moons", *taught), tmp_path / f"whole{name}")
        train(tiny("moons", *taught, "train.steps=2"), tmp_path / f"run{name}")
        again = train(tiny("moons", *taught), tmp_path / f"run{name}")
        assert same(whole.net, again.net)


@pytest.mark.nightly
def test_another_teacher_in_the_middle_is_refused(known: Path, tmp_path: Path) -> None:
    other = tmp_path / "teacher"
    train(tiny("moons-flow-matching"), other)
    taught = tiny("moons", f"teacher.source={other}", "train.steps=2")
    train(taught, tmp_path / "run")
    train(tiny("moons-flow-matching", "train.steps=6"), other)  # it has learned something since
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    with pytest.raises(UserError):
        train(tiny("moons", f"teacher.source={other}"), tmp_path / "run")
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*")) == before


@pytest.mark.slow
def test_a_teacher_that_was_moved_is_found_by_its_hash(known: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(known, tmp_path / "moved")
    train(tiny("moons", f"teacher.source={known}", "train.steps=2"), tmp_path / "run")
    train(tiny("moons", f"teacher.source={moved}"), tmp_path / "run")
    assert load(str(tmp_path / "run")).teacher == Teacher(source=str(moved))
    with pytest.raises(UserError):
        train(tiny("moons", f"teacher.source={tmp_path}/nowhere"), tmp_path / "run")


def test_pairs_are_joined_by_the_teachers_flow(tmp_path: Path) -> None:
    """Which moves the noise; kept, and made again to the same bits where a file is missing."""
    run = tiny("moons", *SHIFT, "teacher.pairs.count=1500")
    made = pairs_of(run, shift(run, CPU), tmp_path)
    files = shards(tmp_path)
    assert [len(load_weights(file)["x"]) for file in files] == [1024, 476]
    x, c, z = made.batch(3, 8, 0)
    assert torch.allclose(x, z - torch.tensor([1.0, -2.0]), atol=1e-5)
    assert torch.equal(made.z[:3], noise(0, range(3), 0, (2,)))
    assert (x.shape, c.shape, z.shape) == ((8, 2), (8,), (8, 2))
    second, first = files[1].read_bytes(), files[0].stat().st_mtime_ns
    files[1].unlink()
    pairs_of(run, shift(run, CPU), tmp_path)
    assert files[1].read_bytes() == second
    assert files[0].stat().st_mtime_ns == first


def test_pairs_are_made_with_as_many_rows_at_a_time_as_training_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    def counted(run: Run, device: torch.device) -> Readings:
        def velocity(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            rows.append(len(x))
            return x

        return Readings(velocity=velocity)

    monkeypatch.setattr("unit.run.known.shift", counted)
    train(tiny("moons", *SHIFT, "teacher.pairs.count=18", "train.batch=16", "train.micro_batch=8"), tmp_path)
    assert set(rows) == {2, 8}  # two are left at the end


class Ranks(threading.local):
    """Two ranks in threads, that meet where they agree."""

    rank = 0
    meeting = threading.Barrier(2, timeout=30)
    told: ClassVar[list[object]] = [None, None]

    def gather(self, answers: list[object], answer: object, group: None) -> None:
        """As `torch.distributed.all_gather_object`."""
        self.told[self.rank] = answer
        self.meeting.wait()
        answers[:] = self.told
        self.meeting.wait()  # nobody answers again before all have heard


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """What the package takes for its ranks."""
    ranks = Ranks()
    monkeypatch.setattr(dist, "world", lambda: 2)
    monkeypatch.setattr(dist, "rank", lambda: ranks.rank)
    monkeypatch.setattr(torch.distributed, "all_gather_object", ranks.gather)
    return ranks


def shared(
    ranks: Ranks, run: Run, readings: Readings, folder: Path
) -> list[tuple[teacher.TeacherPairs | str, list[int]]]:
    """What each of two ranks gets, pairs or an error, and the numbers of rows that it asked the teacher for."""

    def work(rank: int) -> tuple[teacher.TeacherPairs | str, list[int]]:
        ranks.rank, made = rank, list[int]()

        def noted(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            made.append(len(x))
            assert readings.velocity
            return readings.velocity(x, t, c)

        try:
            pairs = teacher.make_pairs(index_of(run), Readings(velocity=noted), folder, CPU, no_bar, rows=1024)
        except (UserError, OSError) as error:
            return str(error), made
        return pairs, made

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, range(2)))


COUPLED = [*SHIFT, "teacher.pairs.count=2100"]


@pytest.mark.slow
def test_ranks_share_the_making_of_pairs(ranks: Ranks, tmp_path: Path) -> None:
    """Each makes every other shard, once, and has all of them: the same as one process makes."""
    run = tiny("moons", *COUPLED)
    (one, first), (other, second) = shared(ranks, run, shift(run, CPU), tmp_path / "two")
    assert (first, second) == ([1024] * 32 + [52] * 32, [1024] * 32)
    assert isinstance(one, teacher.TeacherPairs)
    assert isinstance(other, teacher.TeacherPairs)
    assert torch.equal(one.z, noise(0, range(2100), 0, (2,)))
    for a, b in zip(one.batch(3, 8, 0), other.batch(3, 8, 0), strict=True):
        assert torch.equal(a, b)
    shards(tmp_path / "two")[1].unlink()
    assert [made for _, made in shared(ranks, run, shift(run, CPU), tmp_path / "two")] == [[], [1024] * 32]


def test_every_rank_hears_of_pairs_that_are_no_numbers(ranks: Ranks, tmp_path: Path) -> None:
    """Who made none of them would wait for the files; what is whole is kept."""
    run = tiny("moons", *COUPLED)

    def velocity(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return x if ranks.rank == 0 else x.index_fill(0, torch.tensor([7, 9]), torch.nan)

    (one, _), (other, _) = shared(ranks, run, Readings(velocity=velocity), tmp_path)
    assert one == other
    assert "2 of the teacher's pairs are not finite, the first is number 1031" in str(one)
    assert [file.stem for file in shards(tmp_path)] == ["shard-00000", "shard-00002"]


@pytest.mark.slow
def test_pairs_are_trained_on_as_they_are(tmp_path: Path) -> None:
    """Their slopes z - x have no scatter: a net that knows the shift has loss 0 to learn."""
    pairs = ["teacher.pairs.count=512"]
    train(tiny("moons-flow-matching", *SHIFT, *FEW, *pairs), tmp_path / "run")
    train(tiny("moons-flow-matching", *FEW), tmp_path / "plain")
    last = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("run", "plain")]
    assert last[0]["loss"] < 0.1 < 0.3 < last[1]["loss"]


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("digits", "objective.drop=0"),
        ("digits-guided", "train.seed=0"),
        ("digits-shortcut", "objective.scale=2"),
        ("digits-imf", KNOBS),
    ],
)
def test_a_teacher_is_guided_only_where_it_can_be(recipe: str, more: str) -> None:
    run = load(recipe, ["objective.drop=0.1", more])
    given = run.data, run.objective, run.training_guidance, "teacher.guide.scale", "runs/x"
    check_guidance(CFG(), *given)
    with pytest.raises(UserError):
        check_guidance(CFG(scale=2), *given)


def test_a_teacher_is_remembered_once_it_has_taught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One who failed before may be mended. The main process notes it."""
    with monkeypatch.context() as patch:
        patch.setattr(dist, "rank", lambda: 1)
        teacher.LoadedTeacher(Teacher(source="a"), Readings(), None, {"sha256": "a"}).write_record(tmp_path)
    assert not list(tmp_path.iterdir())
    first, second = (teacher.LoadedTeacher(Teacher(source=name), Readings(), None, {"sha256": name}) for name in "ab")
    first.write_record(tmp_path)
    second.require_same(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    first.require_same(tmp_path)
    with pytest.raises(UserError):
        second.require_same(tmp_path)


@pytest.mark.slow
def test_a_function_of_the_current_folder_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed command has its own folder on the path, not that where it is called."""
    monkeypatch.chdir(tmp_path)
    path, asked = list(sys.path), tiny("moons", "teacher.kind=python", "teacher.source=my_teacher:make")
    text = (
        "from dumo.types import Readings\n\ndef make(run, device):\n    return Readings(velocity=lambda x, t, c: -x)\n"
    )
    Path("my_teacher.py").write_text(text)
    train(asked, tmp_path / "run")
    assert len(json.loads((tmp_path / "run/teacher.json").read_text())["sha256"]) == 64
    assert sys.path == path
    train(asked, tmp_path / "run")
    del sys.modules["my_teacher"]
    Path("my_teacher.py").write_text(text.replace("-x", "2 * x"))
    with pytest.raises(UserError):
        train(asked, tmp_path / "run")
