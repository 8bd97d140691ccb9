"""Who gives no sign is named, and who is slow is waited for."""

import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed
from torch.distributed import HashStore

from dumo.runtime import dist, signals
from dumo.runtime.heartbeat import Lost, Peers, first_sentence
from dumo.types import UserError
from forked import ENVIRONMENT, Program, python


@pytest.fixture
def peers() -> list[Peers]:
    """Three processes that share a store."""
    store = HashStore()
    return [Peers(store, rank, 3, limit=2.0) for rank in range(3)]


def test_the_first_looks_for_all_and_they_for_the_first(peers: list[Peers]) -> None:
    assert [one.watched_ranks for one in peers] == [[1, 2], [0], [0]]
    for _ in range(3):
        for one in peers:
            one.beat()
    assert [one.find_missing(1) for one in peers] == [None] * 3
    for _ in range(4):
        for one in peers[:2]:
            one.beat()
    assert [one.missed_signs for one in peers[:2]] == [{1: 0, 2: 3}, {0: 0}]
    assert peers[0].find_missing(3) == 2
    peers[2].beat()
    peers[0].beat()
    assert peers[0].find_missing(2) is None


def test_a_process_that_was_stopped_itself_blames_nobody(peers: list[Peers]) -> None:
    """It counts its own looks, so hours in which nobody ran are none."""
    for _ in range(2):
        for one in peers:
            one.beat()
    assert peers[0].find_missing(2) is None
    assert peers[0].max_missed_signs == 10
    assert Peers(HashStore(), 0, 2, limit=600).max_missed_signs == 600


def test_all_meet_or_hear_why_not(peers: list[Peers]) -> None:
    order: list[str] = []

    def late() -> None:
        order.append("late")
        peers[2].wait_for_all()

    def early(one: Peers) -> None:
        one.wait_for_all()
        order.append("met")

    slow = threading.Timer(0.2, late)
    slow.start()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(early, peers[:2]))
    assert order == ["late", "met", "met"]

    peers[1].report(UserError("images/7.png is damaged"))
    with pytest.raises(Lost, match=r"^rank 1: images/7.png is damaged$"):
        peers[0].wait_for_all()


@pytest.mark.usefixtures("default_signals")
def test_who_waits_may_be_stopped(peers: list[Peers]) -> None:
    with signals.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(signals.Stopped):
            peers[0].wait_for_all()


def test_what_torch_says_is_told_in_short() -> None:
    said = "[/a/gloo/pair.cc:537] Read error [127.0.0.1]:5: Connection reset by peer. This is typically caused by x."
    assert first_sentence(RuntimeError(said)) == "Read error [127.0.0.1]:5: Connection reset by peer"


def test_a_failing_collective_names_who_is_gone(peers: list[Peers]) -> None:
    for one in peers:
        one.beat()
    for _ in range(4):
        peers[0].beat()
        peers[1].beat()
    with pytest.raises(Lost, match=r"^rank 2 is gone: start the same command again"), dist.report_failure(peers[0]):
        raise RuntimeError("[/x/gloo/pair.cc:537] Connection closed by peer")


@pytest.mark.parametrize("error", [UserError("gloo/ in a name"), ValueError("x"), RuntimeError("a defect")])
def test_what_is_no_talk_stays_as_it_is_and_is_told(error: Exception, peers: list[Peers]) -> None:
    with pytest.raises(type(error)) as raised, dist.report_failure(peers[1]):
        raise error
    assert raised.value is error
    assert peers[0].store.get("failed/1").decode() == str(error)


@pytest.mark.usefixtures("default_signals")
def test_a_stop_that_all_heard_is_a_stop(peers: list[Peers]) -> None:
    """The first to leave breaks the others' talk."""
    with signals.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(signals.Stopped), dist.report_failure(peers[0]):
            raise torch.distributed.DistBackendError("closed")


HANGS = """
import os, signal, sys, torch
from dumo.runtime import dist
with dist.join():
    x = torch.ones(3)
    torch.distributed.all_reduce(x)
    if dist.rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    torch.distributed.all_reduce(x)
"""


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_others_with_a_line(tmp_path: Path) -> None:
    """Though these are held in a collective, where they hear no signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DUMO_TIMEOUT": 1}
    both: list[Program] = []
    for rank in range(2):
        env = {name: str(value) for name, value in (told | {"RANK": rank}).items()}
        both.append(python(HANGS, cwd=tmp_path, env=ENVIRONMENT | env, merged=True))
    try:
        said, _ = both[0].communicate(timeout=60)
        assert both[1].poll() is None
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert both[0].returncode == 1
    assert said.startswith("error: rank 1 has not answered for 1 seconds (DUMO_TIMEOUT): start the same command again")
    assert said.count("\n") == 1
