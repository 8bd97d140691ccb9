"""The number of threads of a training: by the size of the network, recorded in checkpoints and kept on resume."""

from pathlib import Path
from threading import current_thread, main_thread

import pytest
import torch

from dumo.runtime import threads
from dumo.runtime.threads import restored_threads, set_threads
from dumo.training.checkpoint import Checkpoint
from trained import After, train
from unit.run import known

CPU = torch.device("cpu")
NET = torch.nn.Linear(4, 4)


class Torch:
    """torch's number of threads on a machine of two cores; no thread is made."""

    def __init__(self) -> None:
        self.threads = 2

    def use(self, number: int) -> None:
        if current_thread() is main_thread():  # threads that make batches ahead have their own number
            self.threads = number


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> Torch:
    made = Torch()
    monkeypatch.setattr(torch, "get_num_threads", lambda: made.threads)
    monkeypatch.setattr(torch, "set_num_threads", made.use)
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return made


def test_a_small_network_gets_one_thread_and_a_large_one_all(two_cores: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    with restored_threads():
        assert set_threads(NET, CPU) == two_cores.threads == 1
    assert two_cores.threads == 2
    assert set_threads(NET, CPU, recorded=2) == 2
    assert set_threads(NET, torch.device("meta")) is None
    monkeypatch.setattr(threads, "MAX_SMALL_PARAMETERS", 19)  # of the network's 20
    assert set_threads(NET, CPU) == two_cores.threads == 2


@pytest.mark.parametrize("name", threads.VARIABLES)
def test_the_environment_overrides_the_rule(name: str, two_cores: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    assert set_threads(NET, CPU, recorded=1) == two_cores.threads == 2


@pytest.mark.slow
def test_the_number_is_recorded_and_a_resumed_run_keeps_it(
    two_cores: Torch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken: list[int] = []
    seen = After(lambda state, metrics: taken.append(two_cores.threads))
    for steps, max_small in ((2, threads.MAX_SMALL_PARAMETERS), (4, 0)):
        monkeypatch.setattr(threads, "MAX_SMALL_PARAMETERS", max_small)
        run = known.tiny("moons", "train.batch=8", f"train.steps={steps}")
        said: list[str] = []
        train(run, tmp_path / "run", print_line=said.append, hooks=[seen])
        checkpoint = tmp_path / f"run/checkpoints/step-{steps:08d}"
        assert Checkpoint.read(checkpoint).facts.threads == 1
        assert two_cores.threads == 2
    assert taken == [1] * 4
