"""Ranks, means over ranks, devices and their memory, versions: which processes work together, and where.

Inside `join` the processes that torchrun started work together. `rank` and `world` number them; `mean`, `largest`,
`gathered` and `barrier` are their collectives, which every rank must call. `device` chooses where a rank computes.
Without torch.distributed there is one rank, number 0, and a mean over ranks is the identity.
"""

import math
import os
import platform
import re
import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from secrets import token_hex
from typing import TYPE_CHECKING

import torch.distributed
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed import distributed_c10d as c10d
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.torch_version import TorchVersion

from dumo.runtime import install, signals, version
from dumo.types import UserError

if TYPE_CHECKING:
    from dumo.runtime.heartbeat import Peers

MIN_TORCH = "2.13"  # whose sharded weights and checkpoints were tried
START_TIMEOUT = 1800.0  # seconds that ranks wait for each other until a first step is done, which may compile: ours
DEFAULT_TIMEOUT = 600.0  # seconds, afterwards: ours
MAX_RANKS = 1_000_000  # more is a typing error
UNSET = "Start by torchrun, which sets it, or unset it"
COMMUNICATION_ERROR = re.compile(r"^Dist\w*Error|gloo/|NCCL")  # in torch's errors where it cannot reach others

joined = False  # whether this process ever met others
peers: "Peers | None" = None  # those it has met
# The process group of this thread and the same thread of other ranks (`dumo.training.agreement`); None: that of all.
group: ContextVar[ProcessGroup | None] = ContextVar("group", default=None)


def rank() -> int:
    """The number of this process, in [0, world())."""
    return torch.distributed.get_rank() if started() else 0


def world() -> int:
    """How many processes train together; 1 without torch.distributed."""
    return torch.distributed.get_world_size() if started() else 1


def is_main() -> bool:
    """Whether this process is rank 0, which writes files and shows lines to the user."""
    return rank() == 0


def mean(x: Tensor) -> Tensor:
    """The mean of x over ranks, on every rank; x itself is left alone. Every rank must call it, with the same shape."""
    if world() == 1:
        return x
    total = x.clone()
    torch.distributed.all_reduce(total)  # a sum: gloo knows no mean
    return total / world()


def largest(x: Tensor) -> Tensor:
    """The largest of x over ranks, on every rank; x is on the CPU. Every rank must call it, with the same shape."""
    if world() == 1:
        return x
    maximum = x.clone()
    torch.distributed.all_reduce(maximum, torch.distributed.ReduceOp.MAX)
    return maximum


def calls(net: nn.Module, rows: int) -> int:
    """How often a rank with these rows calls a net that takes them one by one: as often as the one with most of them.

    Each call gathers sharded weights from all ranks, forward and backward. Every rank must call it, if they are.
    """
    if world() == 1:
        return rows
    from torch.distributed.fsdp import FSDPModule

    if isinstance(net, FSDPModule):
        return int(largest(torch.tensor(rows)))
    return rows


def gathered(x: Tensor) -> list[Tensor]:
    """This tensor of every rank, by rank, on the CPU; first axes may differ in length. Every rank must call it.

    Ranks that come early wait for the others as long as these live.
    """
    if world() == 1:
        return [x.cpu()]
    if peers:
        peers.wait_for_all()
    local = x.detach().cpu().contiguous()
    lengths = [torch.tensor(0) for _ in range(world())]
    torch.distributed.all_gather(lengths, torch.tensor(len(x)))
    longest = max(int(n) for n in lengths)
    padded = torch.cat([local, local.new_zeros(longest - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in lengths]
    torch.distributed.all_gather(parts, padded)
    return [part[: int(n)] for part, n in zip(parts, lengths, strict=True)]


def barrier() -> None:
    """Wait for all ranks. Every rank must call it."""
    if world() > 1:
        torch.distributed.barrier()


def new_group() -> ProcessGroup | None:
    """One more group of all ranks, by gloo, for another thread; None where there is one rank.

    Every rank must call it.
    """
    if world() == 1:
        return None
    group = torch.distributed.new_group(backend="gloo")
    return group if isinstance(group, ProcessGroup) else None  # of some ranks alone it would be a number


def started() -> bool:
    """Whether a process group is there to ask."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def torchrun_rank_and_world() -> tuple[int, int]:
    """(rank, world) as torchrun sets them in the environment, before `join` too; (0, 1) without torchrun.

    Raises UserError where they are no such numbers.
    """
    world = _environment_integer("WORLD_SIZE", 1, low=1, high=MAX_RANKS)
    rank = _environment_integer("RANK", 0, high=world - 1)
    return rank, world


def _environment_integer(name: str, default: int, *, low: int = 0, high: int | None = None) -> int:
    """A whole number from the environment. Raises UserError where it is none, or out of [low, high]."""
    text = os.environ.get(name, str(default))
    is_integer = re.fullmatch(r"-?[0-9]{1,18}", text) is not None
    if not is_integer or int(text) < low or (high is not None and int(text) > high):
        limits = f"from {low:,}" if high is None else f"from {low:,} to {high:,}"
        raise UserError(f"{name}={text} is no whole number {limits}. {UNSET}")
    return int(text)


def _timeout_seconds() -> float:
    """Seconds without a sign of a rank, after which it is taken to be gone. Raises UserError for no such number."""
    text = os.environ.get("DUMO_TIMEOUT", str(DEFAULT_TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= 1e6:
        raise UserError(f"DUMO_TIMEOUT={text} is no number of seconds from 1 to 1,000,000: set it so, or unset it")
    return seconds


def require_one_process(work: str) -> None:
    """Refuse, where torchrun started several processes, work that they do not share. Raises UserError."""
    _, world = torchrun_rank_and_world()
    if world > 1:
        raise UserError(
            f"{work} takes one process, and {world} were started (WORLD_SIZE={world}): start it without torchrun; "
            "train, sample, evaluate and encode share their work"
        )


def require_ranks(what: str) -> None:
    """Refuse what sharded weights are needed for on a torch that was not tried with them. Raises UserError."""
    if TorchVersion(torch.__version__) < MIN_TORCH:
        fix = install(f"torch>={MIN_TORCH}")
        raise UserError(f"{what} needs torch {MIN_TORCH} or newer, here is {torch.__version__}: {fix}")


@contextmanager
def join() -> Generator[None, None, None]:
    """Work together with the processes that torchrun started while inside; without torchrun nothing changes.

    Each has a GPU of its own where there is one.

    What is on a GPU goes by nccl, all else by gloo; where ranks must share a GPU, which nccl would refuse, all by gloo.
    Raises UserError below torch 2.13, and where what torchrun sets is there in part or odd; `Lost` where another rank
    is gone. One that gives no sign for DUMO_TIMEOUT seconds ends this process, with a line (`dumo.runtime.heartbeat`).
    """
    _, world = torchrun_rank_and_world()
    if world == 1 or started():
        yield
        return
    from dumo.runtime.heartbeat import Peers

    require_ranks(f"work on {world} ranks")
    gpus = torch.cuda.device_count()
    local_rank = _environment_integer("LOCAL_RANK", 0)
    timeout = _timeout_seconds()
    if gpus:
        torch.cuda.set_device(local_rank % gpus)
    has_own_gpu = gpus >= _environment_integer("LOCAL_WORLD_SIZE", 1, low=1)
    global joined, peers
    with signals.default_handlers():  # there is nothing to save yet
        store, rank = meet()
        joined = True
        peers = Peers(store, rank, world, timeout)
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if has_own_gpu else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=max(START_TIMEOUT, timeout)),
        )
    try:
        with peers.watch(), report_failure(peers):
            yield
            peers.wait_for_all()
            torch.distributed.barrier()  # nobody leaves while another may still ask
    finally:
        peers = None
        torch.distributed.destroy_process_group()


def meet() -> tuple[Store, int]:
    """An empty store that all ranks share, and the number of this one. Raises UserError, Lost."""
    _, world = torchrun_rank_and_world()
    _environment_integer("MASTER_PORT", 1, low=1, high=65535)
    try:
        store, rank, _ = next(rendezvous("env://", timeout=timedelta(seconds=START_TIMEOUT)))
        return PrefixStore(_name_of_this_start(store, rank, world), store), rank
    except ValueError as error:
        raise UserError(f"WORLD_SIZE={world} says {world} ranks: {error}. Start by torchrun, or unset it") from error
    except torch.distributed.DistError as error:
        from dumo.runtime.heartbeat import Lost

        address = os.environ.get("MASTER_ADDR", "")
        port = os.environ.get("MASTER_PORT", "")
        message = " ".join(str(error).split())
        raise Lost(f"{world} ranks did not meet at {address}:{port}: see that all were started. ({message})") from error


@contextmanager
def report_failure(others: "Peers") -> Generator[None, None, None]:
    """Report to the others why this rank fails; raise Lost, with the rank to blame, where talking to them fails."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RuntimeError) and COMMUNICATION_ERROR.search(f"{type(error).__name__} {error}"):
            signals.check()  # the others were asked to stop, too, and are gone already
            raise others.diagnose(error) from error
        others.report(error)
        raise


def end_start() -> None:
    """Once the first step is done, which may have compiled: let ranks wait no longer than DUMO_TIMEOUT from now on."""
    if peers and not peers.settled:
        peers.settled = True
        for group in c10d._world.pg_map:
            c10d._set_pg_timeout(timedelta(seconds=1.5 * peers.limit), group)  # longer than the heartbeat's


def _name_of_this_start(store: Store, rank: int, world: int) -> str:
    """A name for this start of all ranks, under which no earlier one left anything in their store. All must call it.

    torchrun keeps one store over its restarts, in which a rank may find the address of one that is dead (pytorch
    #135712, in 2.13 still). So rank 0 makes up a name, and answers every process that asks under its own token, until
    all have confirmed it.
    """
    token = token_hex(8)
    if rank > 0:
        store.set(f"asks/{rank}", token)
        name = store.get(f"answer/{token}").decode()
        store.set(f"heard/{name}/{rank}", "")
        return name
    deadline = time.monotonic() + START_TIMEOUT
    for other in range(1, world):
        while not store.check([f"heard/{token}/{other}"]):
            other_token = store.get(f"asks/{other}").decode()  # may be a dead one's: ask again
            store.set(f"answer/{other_token}", token)
            if time.monotonic() > deadline:
                raise torch.distributed.DistStoreError(f"rank {other} does not answer")
            time.sleep(0.01)
    return token


def device(name: str) -> torch.device:
    """The device of this name; 'auto' is the GPU where there is one, of several ranks each rank's own, else the CPU.

    Raises UserError for a device that is not there.
    """
    if world() > 1 and ":" in name:
        raise UserError(f"device '{name}' is one for all {world()} ranks: use auto, which gives each its own, or cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        x = torch.zeros(0, device=name).sum()
        x.item()  # raises on `meta`
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"device '{name}' is not available: use auto or cpu") from error
    return x.device


def memory(device: torch.device) -> int:
    """Bytes of memory that a device has in all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_memory(size: int, what: str, fix: str, device: torch.device | str = "cpu") -> None:
    """Raise UserError where `size` bytes are more than the device has; 'meta' has room for all.

    The message begins with `what`, such as "the net takes", and ends with `fix`.
    """
    device = torch.device(device)
    if device.type == "meta":
        return
    total = memory(device)
    if size > total:
        raise UserError(f"{what} {size / 1e9:,.1f} GB of memory, and {device} has {total / 1e9:,.1f} GB: {fix}")


def versions() -> dict[str, str]:
    """The versions that a result depends on: of dumo, torch and Python."""
    return {"dumo": version(), "torch": torch.__version__, "python": platform.python_version()}
