"""Distributed processes: ranks, collectives and rendezvous.

Within `join`, the processes that torchrun started have a store and a process group. `rank`, `world` and `is_main`
return their numbers. `mean`, `all_reduce_max`, `largest`, `all_gather`, `gather`, `num_synced_calls`, `barrier` and
`wait_for_all` are collectives: every rank must call them. `new_group` creates a group for a second thread. If a rank
ends, torchrun stops all ranks; a collective that waits longer than `TIMEOUT` fails.

Without torch.distributed there is one rank, number 0, and collectives return the rank's own values.

`torchrun_rank_and_world` works even before `join`. `require_one_process` and `require_distributed_torch` raise
UserError for work that does not support the environment. `dumo.runtime.device` chooses the device of a rank.
"""

import os
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from secrets import token_hex
from typing import Any, TypeVar

import torch.distributed
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.torch_version import TorchVersion

from dumo.runtime import signals
from dumo.types import UserError

T = TypeVar("T")

# The oldest version with tested sharding and checkpoints.
MIN_TORCH = "2.13"
# The timeout of the rendezvous and of collectives: gloo's default, since the first step may compile.
TIMEOUT = timedelta(minutes=30)
# The polling intervals of the rendezvous and of `wait_for_all`, in seconds.
_MEETING_INTERVAL = 0.01
_WAITING_INTERVAL = 0.05

# Whether this process has ever been in a process group (read by `dumo.cli.terminal`).
has_joined = False
# The shared store, and the number of calls of `wait_for_all`, in the current `join`.
_store: Store | None = None
_num_waits = 0
# The process group of this thread and the same thread of other ranks (`dumo.training.agreement`); None means the
# default group.
group: ContextVar[ProcessGroup | None] = ContextVar("group", default=None)


def rank() -> int:
    """Return the number of this process, in [0, world())."""
    return torch.distributed.get_rank() if is_initialized() else 0


def world() -> int:
    """Return the number of processes; 1 without torch.distributed."""
    return torch.distributed.get_world_size() if is_initialized() else 1


def is_main() -> bool:
    """Whether this process is rank 0, which writes files and shows lines to the user."""
    return rank() == 0


def mean(x: Tensor) -> Tensor:
    """Return the mean of x over ranks, on every rank.

    Every rank must call it, with the same shape. x is not changed.
    """
    if world() == 1:
        return x
    total = x.clone()
    # Sum and divide, because gloo has no mean.
    torch.distributed.all_reduce(total)
    return total / world()


def all_reduce_max(x: Tensor) -> Tensor:
    """Return the elementwise maximum of x over ranks, on every rank. Every rank must call it, with the same shape.

    x is on the CPU, and is not changed.
    """
    if world() == 1:
        return x
    maximum = x.clone()
    torch.distributed.all_reduce(maximum, torch.distributed.ReduceOp.MAX)
    return maximum


def all_values(value: T) -> list[T]:
    """Return the `value` of each rank, in the order of ranks, with any backend. Every rank must call it."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    torch.distributed.all_gather_object(values, value)
    return values


def largest(value: float) -> float:
    """Return the largest `value` of all ranks, with any backend. Every rank must call it."""
    return max(all_values(value))


def sharded_parts(net: nn.Module) -> list[Any]:
    """Return the modules of a network that FSDP2 shards."""
    # The import is slow, and has happened already if modules are sharded.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    return [part for part in net.modules() if isinstance(part, fsdp.FSDPModule)]


def num_synced_calls(net: nn.Module, num_rows: int) -> int:
    """Return how often every rank must call a net that processes one row per call, if this rank has `num_rows`.

    Under FSDP each call is a collective, so the result is the maximum over ranks, and every rank must call this
    function. Without FSDP it is `num_rows`.
    """
    if world() == 1:
        return num_rows
    from torch.distributed.fsdp import FSDPModule

    if isinstance(net, FSDPModule):
        return int(all_reduce_max(torch.tensor(num_rows)))
    return num_rows


def all_gather(x: Tensor) -> list[Tensor]:
    """Gather x (n, *d) of every rank, in the order of ranks, on the CPU. n may differ. Every rank must call it.

    It waits for all ranks without a timeout.
    """
    if world() == 1:
        return [x.cpu()]
    wait_for_all()
    parts: list[Any] = [None] * world()
    torch.distributed.all_gather_object(parts, x.detach().cpu())
    return parts


def gather(x: Tensor) -> list[Tensor]:
    """Like `all_gather`, but only on rank 0; other ranks get [] and need no memory for it."""
    if world() == 1:
        return [x.cpu()]
    wait_for_all()
    parts: list[Any] | None = [None] * world() if is_main() else None
    torch.distributed.gather_object(x.detach().cpu(), parts)
    return parts or []


def wait_for_all() -> None:
    """Wait for all ranks without a timeout, for work that takes much longer on one rank. Every rank must call it.

    Raises Stopped after a signal.
    """
    global _num_waits
    if _store is None:
        return
    _num_waits += 1
    key = f"waited/{_num_waits}"
    _store.add(key, 1)
    while _store.add(key, 0) < world():
        signals.check()
        time.sleep(_WAITING_INTERVAL)


def barrier() -> None:
    """Wait for all ranks. Every rank must call it."""
    if world() > 1:
        torch.distributed.barrier()


def new_group() -> ProcessGroup | None:
    """Create a gloo group of all ranks for another thread; None if there is one rank. Every rank must call it."""
    if world() == 1:
        return None
    thread_group = torch.distributed.new_group(backend="gloo")
    # torch's return type includes a number, which it returns on ranks outside of the group.
    if not isinstance(thread_group, ProcessGroup):
        return None
    return thread_group


def is_initialized() -> bool:
    """Whether this process is in a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def torchrun_rank_and_world() -> tuple[int, int]:
    """Return (rank, world) from torchrun's environment variables, even before `join`; (0, 1) without torchrun."""
    return _environment_integer("RANK", 0), _environment_integer("WORLD_SIZE", 1)


def _environment_integer(name: str, default: int) -> int:
    """Return an integer from the environment. Raises ValueError for another value."""
    return int(os.environ.get(name, default))


def require_one_process(work: str) -> None:
    """Raise UserError if torchrun started several processes, for `work` that is not distributed."""
    _, world_size = torchrun_rank_and_world()
    if world_size > 1:
        raise UserError(
            f"{work} runs in one process, but WORLD_SIZE is {world_size}: run it without torchrun, which only train, "
            "sample, evaluate and encode support"
        )


def require_distributed_torch(what: str) -> None:
    """Raise UserError below torch `MIN_TORCH`. The message begins with `what`."""
    if TorchVersion(torch.__version__) < MIN_TORCH:
        raise UserError(
            f"{what} needs torch {MIN_TORCH} or newer, got {torch.__version__}: pip install 'torch>={MIN_TORCH}'"
        )


@contextmanager
def join() -> Generator[None, None, None]:
    """Create the process group of the processes that torchrun started; without torchrun, do nothing.

    Each rank gets its own GPU if there are enough (`take_own_gpu`). The backends are nccl for CUDA tensors and gloo for
    CPU tensors, or gloo for both if ranks share a GPU, which nccl rejects.

    Raises UserError below torch `MIN_TORCH`.
    """
    global has_joined, _store, _num_waits
    _, world_size = torchrun_rank_and_world()
    if world_size == 1 or is_initialized():
        yield
        return
    require_distributed_torch(f"work on {world_size} ranks")
    take_own_gpu()
    backend = _choose_backend()
    # A signal may end the process at once, because there is nothing to save yet.
    with signals.default_handlers():
        store, own_rank = _rendezvous()
        has_joined = True
        torch.distributed.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=own_rank,
            world_size=world_size,
            timeout=TIMEOUT,
        )
    _store = store
    _num_waits = 0
    try:
        yield
        wait_for_all()
        # Keep the store of rank 0 until no rank uses it.
        torch.distributed.barrier()
    finally:
        _store = None
        torch.distributed.destroy_process_group()


def take_own_gpu() -> None:
    """Make this rank's GPU the current one, if there is a GPU."""
    num_gpus = torch.cuda.device_count()
    local_rank = _environment_integer("LOCAL_RANK", 0)
    if num_gpus:
        torch.cuda.set_device(local_rank % num_gpus)


def _choose_backend() -> str:
    """Return the backend, depending on whether each rank of this machine has a GPU."""
    local_world_size = _environment_integer("LOCAL_WORLD_SIZE", 1)
    has_own_gpu = torch.cuda.device_count() >= local_world_size
    return "cpu:gloo,cuda:nccl" if has_own_gpu else "gloo"


def _rendezvous() -> tuple[Store, int]:
    """Wait for all ranks. Returns an empty shared store and the number of this rank."""
    _, world_size = torchrun_rank_and_world()
    store, own_rank, _ = next(rendezvous("env://", timeout=TIMEOUT))
    return PrefixStore(_unique_run_id(store, own_rank, world_size), store), own_rank


def _unique_run_id(store: Store, own_rank: int, world_size: int) -> str:
    """Return a new id for this start of all ranks, used as a prefix in their store. Every rank must call it.

    torchrun keeps one store across restarts, in which a rank may find the address of a dead process (pytorch #135712,
    still in 2.13). Rank 0 therefore creates an id. Every other rank requests it with its own token and confirms it.
    Rank 0 answers until all ranks have confirmed.
    """
    token = token_hex(8)
    if own_rank > 0:
        store.set(f"asks/{own_rank}", token)
        run_id = store.get(f"answer/{token}").decode()
        store.set(f"heard/{run_id}/{own_rank}", "")
        return run_id
    run_id = token
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    for other in range(1, world_size):
        while not store.check([f"heard/{run_id}/{other}"]):
            # The token may be that of a dead process, so read it again in each round.
            other_token = store.get(f"asks/{other}").decode()
            store.set(f"answer/{other_token}", run_id)
            if time.monotonic() > deadline:
                raise torch.distributed.DistStoreError(f"rank {other} does not answer")
            time.sleep(_MEETING_INTERVAL)
    return run_id
