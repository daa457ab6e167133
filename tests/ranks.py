"""Several ranks of a test, forked from one process that has imported what they need."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import torch.multiprocessing

from .fuzz.driver import PRELOADED


def on_ranks(function: Callable[..., None], arguments: tuple, ranks: int) -> None:
    """Run ``function(rank, *arguments)`` in that many processes; raises what one of them raises.

    Importing PyTorch and MONAI takes five seconds, so one process does it for all. Where the fuzzers have started it,
    it has imported what they need, and each rank imports the rest.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOADED, function.__module__])
    torch.multiprocessing.start_processes(function, arguments, nprocs=ranks, start_method="forkserver")
