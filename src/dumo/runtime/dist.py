"""Several processes that work together: ranks, their collectives, and how they meet.

Inside `join` the processes that torchrun started work together: they meet at a store, watch one another's heartbeat
(`dumo.runtime.heartbeat`) and make a process group, which ends with it. `rank`, `world` and `is_main` number them.
`mean`, `all_reduce_max`, `all_gather_ragged`, `gather_ragged`, `num_synced_calls`, `barrier` and `wait_for_all` are
collectives: every rank must call them. `new_group` serves a second thread. `shorten_timeouts` is called once the first
step is done.

Without torch.distributed there is one rank, number 0, and every collective returns its own tensor.

`torchrun_rank_and_world` reads the numbers before `join`, too. `is_restart` says whether these processes were started
again. `require_one_process` and `require_distributed_torch` refuse what cannot run here. Which device a rank computes
on: `dumo.runtime.device`.
"""

import math
import os
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

from dumo.runtime import install_command, signals
from dumo.types import UserError

if TYPE_CHECKING:
    from dumo.runtime.heartbeat import Peers

MIN_TORCH = "2.13"  # whose sharded weights and checkpoints were tried
_START_TIMEOUT = 1800.0  # seconds that ranks wait for each other until a first step is done, which may compile: ours
_DEFAULT_TIMEOUT = 600.0  # seconds, afterwards: ours
POLL_INTERVAL = 0.01  # seconds between looks for the other ranks while they meet: ours
_MAX_RANKS = 1_000_000  # more is a typing error
_TIMEOUT_MARGIN = 1.5  # of a collective over DUMO_TIMEOUT, so that the heartbeat, which knows who is gone, ends first
_UNSET_HINT = "Start by torchrun, which sets it, or unset it"
# count how often the torchrun of this node has started its ranks again, and Slurm has requeued the job
_RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
_COMMUNICATION_ERROR = re.compile(r"^Dist\w*Error|gloo/|NCCL")  # in torch's errors where it cannot reach other ranks

has_joined = False  # whether this process ever met others; read by `dumo.cli.terminal`
_current_peers: "Peers | None" = None  # the ranks of the current `join`
# the process group in which this thread meets the same thread of other ranks (`dumo.training.agreement`); None: the
# default group
group: ContextVar[ProcessGroup | None] = ContextVar("group", default=None)


def rank() -> int:
    """The number of this process, in [0, world())."""
    return torch.distributed.get_rank() if is_initialized() else 0


def world() -> int:
    """How many processes work together; 1 without torch.distributed."""
    return torch.distributed.get_world_size() if is_initialized() else 1


def is_main() -> bool:
    """Whether this process is rank 0, which writes files and shows lines to the user."""
    return rank() == 0


def mean(x: Tensor) -> Tensor:
    """The mean of x over ranks, on every rank. Every rank must call it, with the same shape. x is not changed."""
    if world() == 1:
        return x
    total = x.clone()
    torch.distributed.all_reduce(total)  # the sum, because gloo has no mean
    return total / world()


def all_reduce_max(x: Tensor) -> Tensor:
    """The maximum of x over ranks, element by element, on every rank. Every rank must call it, with the same shape.

    x is on the CPU, and is not changed.
    """
    if world() == 1:
        return x
    maximum = x.clone()
    torch.distributed.all_reduce(maximum, torch.distributed.ReduceOp.MAX)
    return maximum


def num_synced_calls(net: nn.Module, num_rows: int) -> int:
    """How often every rank must call a net that takes its rows one by one, if this rank has `num_rows`.

    Under FSDP each call is a collective, so every rank must make as many as the rank with the most rows. Returns that
    maximum; without FSDP, `num_rows`. Every rank must call it under FSDP.
    """
    if world() == 1:
        return num_rows
    from torch.distributed.fsdp import FSDPModule

    if isinstance(net, FSDPModule):
        return int(all_reduce_max(torch.tensor(num_rows)))
    return num_rows


def all_gather_ragged(x: Tensor) -> list[Tensor]:
    """Gather x (n, *d) of every rank, in the order of ranks, on the CPU. n may differ. Every rank must call it.

    A rank that comes early waits for the others without a time-out, as long as they live.
    """
    if world() == 1:
        return [x.cpu()]
    padded, lengths = _pad_to_longest(x)
    parts = [torch.empty_like(padded) for _ in lengths]
    torch.distributed.all_gather(parts, padded)
    return [part[:n] for part, n in zip(parts, lengths, strict=True)]


def gather_ragged(x: Tensor) -> list[Tensor]:
    """As `all_gather_ragged`, but on rank 0 alone; [] on the others, which need no memory for it."""
    if world() == 1:
        return [x.cpu()]
    padded, lengths = _pad_to_longest(x)
    if not is_main():
        torch.distributed.gather(padded)
        return []
    parts = [torch.empty_like(padded) for _ in lengths]
    torch.distributed.gather(padded, parts)
    return [part[:n] for part, n in zip(parts, lengths, strict=True)]


def _pad_to_longest(x: Tensor) -> tuple[Tensor, list[int]]:
    """x (n, *d) on the CPU with as many rows as that of the rank with the most; and n by rank. Waits for all ranks."""
    wait_for_all()
    local = x.detach().cpu().contiguous()
    lengths = [torch.tensor(0) for _ in range(world())]
    torch.distributed.all_gather(lengths, torch.tensor(len(x)))
    longest = max(int(n) for n in lengths)
    padded = torch.cat([local, local.new_zeros(longest - len(x), *x.shape[1:])])
    return padded, [int(n) for n in lengths]


def wait_for_all() -> None:
    """Wait for all ranks without a time-out, as long as they live. Every rank must call it."""
    if _current_peers:
        _current_peers.wait_for_all()


def barrier() -> None:
    """Wait for all ranks. Every rank must call it."""
    if world() > 1:
        torch.distributed.barrier()


def new_group() -> ProcessGroup | None:
    """Make one more gloo group of all ranks, for another thread; None if there is one rank. Every rank must call it."""
    if world() == 1:
        return None
    thread_group = torch.distributed.new_group(backend="gloo")
    if not isinstance(thread_group, ProcessGroup):  # torch's type allows a number, which a rank outside of it gets
        return None
    return thread_group


def is_initialized() -> bool:
    """Whether this process is in a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def torchrun_rank_and_world() -> tuple[int, int]:
    """(rank, world) as torchrun sets them in the environment, before `join` too; (0, 1) without torchrun.

    Raises UserError where they are not whole numbers, or out of range.
    """
    world_size = _environment_integer("WORLD_SIZE", 1, low=1, high=_MAX_RANKS)
    own_rank = _environment_integer("RANK", 0, high=world_size - 1)
    return own_rank, world_size


def is_restart() -> bool:
    """Whether torchrun or Slurm says that it has started this process again. torchrun does not count all restarts.

    Raises UserError where a count is no whole number.
    """
    return any(_environment_integer(name, 0) > 0 for name in _RESTART_COUNTS)


def _environment_integer(name: str, default: int, *, low: int = 0, high: int | None = None) -> int:
    """A whole number from the environment. Raises UserError if it is not one, or outside [low, high]."""
    text = os.environ.get(name, str(default))
    is_integer = re.fullmatch(r"-?[0-9]{1,18}", text) is not None
    if not is_integer or int(text) < low or (high is not None and int(text) > high):
        limits = f"from {low:,}" if high is None else f"from {low:,} to {high:,}"
        raise UserError(f"{name}={text} is no whole number {limits}. {_UNSET_HINT}")
    return int(text)


def _timeout_seconds() -> float:
    """DUMO_TIMEOUT: after this many seconds without a sign of life a rank is taken to be gone. Raises UserError."""
    text = os.environ.get("DUMO_TIMEOUT", str(_DEFAULT_TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= 1e6:
        raise UserError(f"DUMO_TIMEOUT={text} is no number of seconds from 1 to 1,000,000: set it so, or unset it")
    return seconds


def require_one_process(work: str) -> None:
    """Raise UserError if torchrun started several processes, for `work` that processes do not share."""
    _, world_size = torchrun_rank_and_world()
    if world_size > 1:
        raise UserError(
            f"{work} takes one process, and {world_size} were started (WORLD_SIZE={world_size}): start it without "
            "torchrun; train, sample, evaluate and encode share their work"
        )


def require_distributed_torch(what: str) -> None:
    """Raise UserError below torch `MIN_TORCH`. `what`, which needs it, begins the message."""
    if TorchVersion(torch.__version__) < MIN_TORCH:
        fix = install_command(f"torch>={MIN_TORCH}")
        raise UserError(f"{what} needs torch {MIN_TORCH} or newer, here is {torch.__version__}: {fix}")


@contextmanager
def join() -> Generator[None, None, None]:
    """Work together, while inside, with the other processes that torchrun started; without torchrun do nothing.

    Each rank gets a GPU of its own if there are enough (`take_own_gpu`). Backends: nccl for CUDA tensors, gloo for CPU
    tensors; gloo for all where ranks share a GPU, which nccl rejects.

    Raises UserError below torch `MIN_TORCH`, and where torchrun's variables are incomplete or invalid; `Lost` where
    another rank is gone. A rank that gives no sign for DUMO_TIMEOUT seconds ends this process, with a line.
    """
    global has_joined, _current_peers
    _, world_size = torchrun_rank_and_world()
    if world_size == 1 or is_initialized():
        yield
        return
    from dumo.runtime.heartbeat import Peers

    require_distributed_torch(f"work on {world_size} ranks")
    take_own_gpu()
    backend = _choose_backend()
    timeout = _timeout_seconds()
    with signals.default_handlers():  # there is nothing to save yet
        store, own_rank = _rendezvous()
        has_joined = True
        peers = Peers(store, own_rank, world_size, timeout)
        torch.distributed.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=own_rank,
            world_size=world_size,
            timeout=timedelta(seconds=max(_START_TIMEOUT, timeout)),
        )
    _current_peers = peers
    try:
        with peers.watch(), report_failure(peers):
            yield
            peers.wait_for_all()
            torch.distributed.barrier()  # no rank leaves while another may still ask
    finally:
        _current_peers = None
        torch.distributed.destroy_process_group()


def take_own_gpu() -> None:
    """Make this rank's GPU the current one, if there is a GPU. Raises UserError for invalid variables."""
    num_gpus = torch.cuda.device_count()
    local_rank = _environment_integer("LOCAL_RANK", 0)
    if num_gpus:
        torch.cuda.set_device(local_rank % num_gpus)


def _choose_backend() -> str:
    """The backend, by whether each rank of this machine has a GPU. Raises UserError for invalid variables."""
    local_world_size = _environment_integer("LOCAL_WORLD_SIZE", 1, low=1)
    has_own_gpu = torch.cuda.device_count() >= local_world_size
    return "cpu:gloo,cuda:nccl" if has_own_gpu else "gloo"


def _rendezvous() -> tuple[Store, int]:
    """Wait for all ranks. Returns an empty store that they share, and the number of this rank.

    Raises UserError where torchrun's variables are incomplete, `Lost` where the ranks do not meet.
    """
    _, world_size = torchrun_rank_and_world()
    _environment_integer("MASTER_PORT", 1, low=1, high=65535)  # refuses a text that is no port
    try:
        store, own_rank, _ = next(rendezvous("env://", timeout=timedelta(seconds=_START_TIMEOUT)))
        return PrefixStore(_unique_run_id(store, own_rank, world_size), store), own_rank
    except ValueError as error:
        raise UserError(
            f"WORLD_SIZE={world_size} says {world_size} ranks: {error}. Start by torchrun, or unset it"
        ) from error
    except torch.distributed.DistError as error:
        from dumo.runtime.heartbeat import Lost

        address = os.environ.get("MASTER_ADDR", "")
        port = os.environ.get("MASTER_PORT", "")
        message = " ".join(str(error).split())
        raise Lost(
            f"{world_size} ranks did not meet at {address}:{port}: see that all were started. ({message})"
        ) from error


@contextmanager
def report_failure(peers: "Peers") -> Generator[None, None, None]:
    """Report to the other ranks why this one fails. Raises `Lost`, with the rank to blame, if communication failed."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RuntimeError) and _COMMUNICATION_ERROR.search(f"{type(error).__name__} {error}"):
            signals.check()  # a stop was asked of all ranks, and the others are gone already
            raise peers.diagnose(error) from error
        peers.report(error)
        raise


def shorten_timeouts() -> None:
    """From now on let collectives wait for about DUMO_TIMEOUT; further calls do nothing.

    It is called after the first step, which may compile and for which they wait `_START_TIMEOUT`.
    """
    if _current_peers and not _current_peers.is_first_step_done:
        _current_peers.is_first_step_done = True
        timeout = timedelta(seconds=_TIMEOUT_MARGIN * _current_peers.limit)
        for process_group in c10d._world.pg_map:  # there is no public API for this as of torch 2.13
            c10d._set_pg_timeout(timeout, process_group)


def _unique_run_id(store: Store, own_rank: int, world_size: int) -> str:
    """Agree on an id for this start of all ranks, under which their store holds nothing yet. Every rank must call it.

    torchrun keeps one store over its restarts, in which a rank may find the address of one that is dead (pytorch
    #135712, in 2.13 still). So rank 0 makes up an id. Every other rank asks for it under a token of its own, and
    confirms it. Rank 0 answers until all have confirmed.
    """
    token = token_hex(8)
    if own_rank > 0:
        store.set(f"asks/{own_rank}", token)
        run_id = store.get(f"answer/{token}").decode()
        store.set(f"heard/{run_id}/{own_rank}", "")
        return run_id
    run_id = token
    deadline = time.monotonic() + _START_TIMEOUT
    for other in range(1, world_size):
        while not store.check([f"heard/{run_id}/{other}"]):
            other_token = store.get(f"asks/{other}").decode()  # may be a dead process's, so look again
            store.set(f"answer/{other_token}", run_id)
            if time.monotonic() > deadline:
                raise torch.distributed.DistStoreError(f"rank {other} does not answer")
            time.sleep(POLL_INTERVAL)
    return run_id
