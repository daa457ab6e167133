"""The processes of one job: their ranks, what they exchange, and how work and network are shared among them.

Under ``torchrun`` each process has a rank; without it there is one process, of rank 0, and nothing to exchange.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
TIMEOUT = timedelta(minutes=int(os.environ.get("SWIN_UNETR_TIMEOUT_MINUTES", "30")))
"""How long a rank waits for the others before it gives up: longer than the slowest validation of a case."""


class RankLost(RuntimeError):
    """Another rank of the job died or does not answer, so that this one cannot continue."""


@contextmanager
def job(device: str | None = None) -> Iterator[torch.device]:
    """Join the job that ``torchrun`` started, if it did; yields this rank's device.

    Args:
        device: "cpu", "cuda" or "cuda:N"; None chooses CUDA if available. With several ranks on CUDA, each takes the
            device of its local rank.

    Raises:
        ValueError: the device cannot be used here.
        RankLost: within the context, a rank died or does not answer.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _device(device, ranks)
    if ranks == 1 and "RANK" not in os.environ:
        yield chosen
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_store(), rank=int(os.environ["RANK"]), world_size=ranks, timeout=TIMEOUT)
    try:
        yield chosen
    except RuntimeError as error:
        if not _is_of_communication(error):
            raise
        # gloo: "[/path/to/source:537] Read error [address]: Connection reset by peer. This is typically …"
        says = re.sub(r"^\[.*?\] *", "", str(error).strip()).splitlines()[0].partition(". ")[0]
        raise RankLost(f"rank {rank()} of {ranks} lost another rank, whose own output says why ({says})") from error
    finally:
        # Networks in reference cycles keep the group alive, whose threads must end before the interpreter does.
        gc.collect()
        dist.destroy_process_group()


def _store() -> dist.Store:
    """Where the ranks of this attempt find each other.

    ``torchrun`` restarts ranks with the store of the attempt that failed: without a prefix of its own, an attempt could
    read the addresses of dead processes.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"swin-unetr/{attempt}/{os.environ['WORLD_SIZE']}", store)


def _is_of_communication(error: RuntimeError) -> bool:
    """Whether `error` is about ranks that do not answer; gloo has no exception type of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _device(name: str | None, ranks: int) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)
        if device.type == "cuda" and device.index is None and ranks > 1:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device is {name!r}; accepted are cpu, cuda and cuda:N")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: cannot use {name!r}: {str(error).splitlines()[0]}") from error
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this rank writes what a job writes once: files, the log, the terminal."""
    return rank() == 0


def gather(value: T) -> list[T]:
    """The `value` of every rank, in order, on every rank. Meant for small objects: they are pickled."""
    if not dist.is_initialized():
        return [value]
    values: list = [None] * ranks()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Rank 0's `value`."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def first(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 alone, and return its result on every rank.

    Raises:
        OSError, ValueError: `function` raised it on rank 0; then every rank does.
    """
    outcome: tuple[T | None, OSError | ValueError | None] = (None, None)
    if is_first():
        try:
            outcome = function(), None
        except (OSError, ValueError) as error:
            outcome = None, error
    value, failed = broadcast(outcome)
    if failed is not None:
        raise failed
    return cast(T, value)


def sums(values: Iterable[float], device: torch.device) -> list[float]:
    """Sums over all ranks in float64; every rank passes equally many `values`."""
    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on any rank."""
    if not dist.is_initialized():
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's part of `items`, each of which goes to one rank: every `ranks()`-th."""
    return items[rank() :: ranks()]


def parallel(
    network: nn.Module, how: Literal["ddp", "fsdp"], device: torch.device, units: Iterable[nn.Module] | None = None
) -> nn.Module:
    """`network` on `device` as this job trains it: itself with one rank, else by data parallel (DDP) or FSDP2.

    FSDP2 shards each of `units`, modules inside of `network` that are called, and then what is left; it returns the
    same module, whose parameters are now DTensors. By default units are the children: Swin stages, convolution blocks.
    """
    network = network.to(device)
    if ranks() == 1:
        return network
    if how == "ddp":
        return DistributedDataParallel(
            network,
            device_ids=[device] if device.type == "cuda" else None,
            static_graph=True,
            gradient_as_bucket_view=True,
            # Running statistics are floating-point numbers. Others are constants, as the indices of relative positions:
            # written to before every step, each would be looked at again.
            broadcast_buffers=any(buffer.is_floating_point() for buffer in network.buffers()),
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # FSDP2 shards no other format.
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # PyTorch's stubs lack memory_format
    mesh = init_device_mesh(device.type, (ranks(),))
    for unit in network.children() if units is None else units:
        fully_shard(unit, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network
