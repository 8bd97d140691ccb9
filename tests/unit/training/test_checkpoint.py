"""A checkpoint is whole or not there, comes back bit for bit, and refuses what does not fit."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dumo.training.checkpoint import paths_by_step
from dumo.training.duration import Duration
from dumo.training.settings import Train
from dumo.training.state import Diverged, State, Trend, begin
from dumo.types import UserError
from forked import python
from unit.training.by_path import fault, latest, restore, restore_last_finite, save
from unit.training.sharded import sign
from unit.training.toy import AVERAGES, OPTIMIZERS, Small, same, tensors, trained

SPEC = Train(steps=3, batch=12, ema=AVERAGES)


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_comes_back_bit_for_bit(tmp_path: Path, optimizer: object, dtype: torch.dtype) -> None:
    spec = SPEC.model_copy(update={"optimizer": optimizer})
    old, new = trained(spec), begin(Small(1), spec)
    for state in (old, new):
        state.net.to(dtype)
        for average in state.averages.values():
            average.module.to(dtype)
    for memory in old.optimizer.state.values():
        memory.update({key: value.to(dtype) for key, value in memory.items() if key != "step"})

    old.skips = 2
    restore(save(tmp_path, old, 1), new)
    assert (new.step, new.images, new.skips, new.trend) == (3, 36, 2, old.trend)
    assert old.trend.level is not None
    assert same(tensors(old), tensors(new))
    assert all(memory["step"].dtype == torch.float32 for memory in new.optimizer.state.values())


@pytest.mark.parametrize("stepped", [False, True])
def test_a_parameter_without_gradient_has_no_memory(tmp_path: Path, stepped: bool) -> None:
    """Before the first step none has."""
    old, new = begin(Small(0), SPEC), begin(Small(1), SPEC)
    (name, parameter), *_ = old.net.named_parameters()
    if stepped:
        parameter.grad = torch.ones_like(parameter)
        old.optimizer.step()
    target = save(tmp_path, old, 1)
    restore(target, new)
    assert same(tensors(old), tensors(new))
    assert [p is new.net.get_parameter(name) for p in new.optimizer.state] == [True] * stepped
    before = contents(target)
    for value in (p for memory in new.optimizer.state.values() for p in memory.values()):
        value.fill_(7)  # and what is restored does not write into the file
    assert contents(target) == before


def test_tied_and_transposed_weights(tmp_path: Path) -> None:
    def tied(value: float) -> State:
        net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 3))
        net[1].weight = net[0].weight
        net[2].weight = nn.Parameter(torch.arange(6.0).view(2, 3).T)
        net[0].weight.data.fill_(value)
        return State(net, torch.optim.Adam(net.parameters()), Duration(9))

    old, new = tied(1), tied(2)
    restore(save(tmp_path, old, 1), new)
    assert same(tensors(old), tensors(new))
    assert new.net.get_parameter("0.weight") is new.net.get_parameter("1.weight")


def test_keeps_the_last(tmp_path: Path) -> None:
    state = trained()
    every = [(1, 2, [1]), (2, 2, [1, 2]), (10, 2, [2, 10]), (11, 1, [11]), (123456789, 3, [11, 123456789])]
    for step, keep, left in every:
        state.step = step
        target = save(tmp_path, state, keep)
        assert listing(tmp_path) & {path.name for path in tmp_path.iterdir()} == {f"step-{n:08d}" for n in left}
        assert latest(tmp_path) == target
    state.step = 3  # later ones do not push it out
    assert save(tmp_path, state, 2).is_dir()


def test_of_a_checkpoint_that_is_a_link_the_link_goes(tmp_path: Path) -> None:
    """What it leads to is kept elsewhere, and stays."""
    state = trained(SPEC)
    for state.step in (1, 2):
        save(tmp_path / "run", state, 2)
    elsewhere = (tmp_path / "run/step-00000001").rename(tmp_path / "elsewhere")
    (tmp_path / "run/step-00000001").symlink_to(elsewhere)
    for state.step in (3, 4):
        save(tmp_path / "run", state, 2)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-00000003", "step-00000004"]
    assert (elsewhere / "state.json").exists()


def test_half_written_folders_are_ignored_then_removed(tmp_path: Path) -> None:
    assert latest(tmp_path / "none") is None
    state = trained()
    whole = save(tmp_path, state, 2)
    shutil.copytree(whole, tmp_path / ".step-00000009.tmp")
    (tmp_path / "notes").mkdir()
    assert latest(tmp_path) == whole
    state.step = 4
    save(tmp_path, state, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000003", "step-00000004", "notes"}


def test_a_step_that_stands_is_left_alone(tmp_path: Path) -> None:
    before = contents(save(tmp_path, trained(), 1))
    assert contents(save(tmp_path, trained(seed=1), 1)) == before


def test_interrupted_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = trained()
    whole = save(tmp_path, state, 1)
    before = contents(tmp_path)

    def stop(path: Path) -> None:
        assert path.is_file()
        assert latest(tmp_path) == whole  # as it would be if the machine stopped here
        raise KeyboardInterrupt

    monkeypatch.setattr("dumo.io.file.flush", stop)
    state.step = 4
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, state, 1)
    assert contents(tmp_path) == before
    assert latest(tmp_path) == whole


FILL = """
import resource, sys
from pathlib import Path
from unit.training.toy import Small, run
from dumo.training.settings import Train
from dumo.training.state import begin
from unit.training.by_path import save

folder, spec = Path(sys.argv[1]), Train(steps=3, batch=12)
state = run(begin(Small(width=64), spec), spec)
whole = save(folder, state, 1)
net, optimizer = (next((whole / part).iterdir()).stat().st_size for part in ("net", "optimizer"))
assert (whole / "state.json").stat().st_size < net < optimizer
before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
for step, limit in enumerate((0, net - 1, optimizer - 1), 4):
    state.step = step
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save(folder, state, 1)
    except OSError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]
print("then", save(folder, state, 1).name, *(path.name for path in folder.iterdir()))
"""


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    process = python(FILL, folder, cwd=tmp_path, merged=True)
    out, _ = process.communicate(timeout=60)
    *errors, last = out.splitlines()
    assert process.returncode == 0, out
    assert last == "then step-00000006 step-00000006"
    assert len(errors) == 3
    assert all(error.startswith(("[Errno 27]", "[Errno 28]")) for error in errors)


@pytest.mark.parametrize("part", ["net", "ema-0.99", "optimizer"])
def test_what_is_not_finite_is_not_saved(tmp_path: Path, part: str) -> None:
    whole, state = save(tmp_path, trained(), 1), trained()
    state.step = 4
    with torch.no_grad():
        match part:
            case "net":
                state.net.get_parameter("last.bias")[1] = torch.inf
            case "optimizer":
                state.optimizer.state[state.net.get_parameter("last.bias")]["exp_avg_sq"][0] = torch.nan
            case _:
                state.averages[0.99].module.get_parameter("last.bias")[0] = torch.nan
    name = "exp_avg_sq.last.bias" if part == "optimizer" else "last.bias"
    with pytest.raises(Diverged, match=rf"step 4: {part}: {name} is not finite, so no checkpoint was saved"):
        save(tmp_path, state, 1)
    assert [*tmp_path.iterdir()] == [whole]


def masked(value: float) -> State:
    """A state whose net has a buffer with this value above its diagonal."""
    net = Small()
    net.register_buffer("mask", torch.full((3, 3), value).triu(1))
    return begin(net, SPEC)


def test_a_buffer_may_be_infinite(tmp_path: Path) -> None:
    """As a mask of attention is."""
    old, new = masked(-torch.inf), masked(0.0)
    target = save(tmp_path, old, 1)
    assert restore_last_finite(target, new) == target
    assert same(tensors(old), tensors(new))


def test_a_buffer_that_is_no_number_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="step 0: net: mask is not finite"):
        save(tmp_path, masked(torch.nan), 1)


def test_what_is_loaded_is_finite(tmp_path: Path) -> None:
    """Else the checkpoint before it is taken, and it is replaced when its step comes again."""
    state = trained()
    first = save(tmp_path, state, 3)
    wanted, state.step = tensors(state), 4
    last = save(tmp_path, state, 3)
    file = last / "optimizer/00000.safetensors"
    moments = load_file(file)
    moments["exp_avg.last.bias"][0] = torch.inf
    save_file(moments, file)
    sign(last)
    assert fault(last) is None
    new = begin(Small(1), SPEC)
    with pytest.warns(
        UserWarning, match=r"exp_avg.last.bias is not finite: using the previous checkpoint step-00000003"
    ):
        assert restore_last_finite(last, new) == first
    assert same(tensors(new), wanted)
    assert new.step == 3
    state.step = 4
    assert fault(save(tmp_path, state, 3)) is None


def test_the_last_good_one_stays_besides_those_that_are_kept(tmp_path: Path) -> None:
    state, kept = trained(), list[list[int]]()
    for step, level in enumerate([1.0, 2.0, 30.0, 40.0, 50.0, 5.0, 60.0], 4):
        state.step, state.trend = step, Trend(level=level, lowest=1.0)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            save(tmp_path, state, 2)
        kept.append([*paths_by_step(tmp_path)])
        assert len(told) == (5 in kept[-1] and step > 6)
    assert kept == [[4], [4, 5], [5, 6], [5, 6, 7], [5, 7, 8], [8, 9], [9, 10]]


@pytest.mark.parametrize(
    ("part", "name", "value", "words"),
    [
        ("net", "last.weight", torch.zeros(3, 8, dtype=torch.float64), r"last.weight is \(3, 8\).*\(2, 8\)"),
        ("net", "last.weight", torch.zeros(2, 8), r"last.weight is \(2, 8\) float32.*float64"),
        ("net", "last.weight", None, r"last.weight is absent"),
        ("net", "more", torch.zeros(1), r"more is \(1,\) float32 in the file, absent in the run"),
        ("ema-0.9", "passes", torch.zeros(()), r"passes is \(\) float32.*int64"),
        ("optimizer", "exp_avg.last.bias", torch.zeros(3, dtype=torch.float64), r"exp_avg.last.bias is \(3,\)"),
        ("optimizer", "exp_avg.last.bias", torch.zeros(2), r"exp_avg.last.bias is \(2,\) float32.*float64"),
        ("optimizer", "exp_avg.last.bias", None, r"exp_avg.last.bias is absent"),
        ("optimizer", "exp_avg.more", torch.zeros(2), r"exp_avg.more is .* absent in the run"),
        ("optimizer", "step.last.bias", torch.zeros(2), r"step.last.bias is \(2,\) float32.*\(\) float32"),
    ],
)
def test_what_does_not_fit_changes_nothing(
    tmp_path: Path, part: str, name: str, value: torch.Tensor | None, words: str
) -> None:
    target, new = save(tmp_path, trained(), 1), begin(Small(1), SPEC)
    before = tensors(new)
    place = target / part / "00000.safetensors"
    weights = load_file(place)
    weights.pop(name, None)
    save_file(weights if value is None else weights | {name: value}, place)
    with pytest.raises(UserError, match=words) as caught:
        restore(target, new)
    assert str(target / part) in str(caught.value)
    assert same(tensors(new), before)
    assert new.step == 0
