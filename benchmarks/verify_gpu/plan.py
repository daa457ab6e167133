"""The parts of a run, the most valuable first, and how long each may take."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BUDGET = 540
"""Seconds that a run takes at most, unless told otherwise."""

ENDING = 6.0
"""Seconds of the budget for the end: what is left is killed, the archive and the table are written."""


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: as ``--part`` takes it.
        seconds: out of a budget of `BUDGET`; of another budget, the same share.
        what: in words.
    """

    name: str
    seconds: int
    what: str


PARTS = (
    Part("probe", 30, "the machine and its ceilings; every kernel once, forward and backward, against float64"),
    Part("correctness", 110, "the GPU tests, and at the same time compilations for later parts"),
    Part("model", 90, "Swin UNETR, inference and training step, ours and MONAI's; the most expensive kernels"),
    Part("operators", 90, "attention at stages 1 to 4 beside floor, Triton, SDPA, FlexAttention; time per kernel"),
    Part("decoder", 20, "norms and convolutions, compared with PyTorch's"),
    Part("counters", 50, "hardware counters of the three hot kernels"),
    Part("sanitizers", 60, "four sanitizers over every kernel"),
    Part("sweeps", 50, "other cuts of the CUDA kernels, other tiles of the Triton kernels"),
    Part("rest", 40, "128³, feature size 24, partition"),
)
NAMES = tuple(part.name for part in PARTS)


def ends(chosen: list[Part], budget: float, elapsed: float) -> dict[str, float]:
    """When each of the chosen parts has to be over, in seconds from the start of the run.

    A part has its share of the budget and what the parts before it left over; `ENDING` comes last.

    Args:
        elapsed: seconds since the start.
    """
    whole, left = sum(part.seconds for part in chosen), budget - ENDING - elapsed
    found = {}
    for part in chosen:
        elapsed += part.seconds / whole * left
        found[part.name] = elapsed
    return found


def median_seconds(call: Callable[[], object], times: int = 3) -> float:
    taken = []
    for _ in range(times):
        began = time.monotonic()
        call()
        taken.append(time.monotonic() - began)
    return statistics.median(taken)


@dataclass(frozen=True)
class HostCosts:
    """What starting processes costs on this machine, in measured seconds.

    Attributes:
        imports: of this process: PyTorch and all that children use.
        fork: starting and ending a child that is a copy of this process.
        interpreter: starting a fresh one and importing PyTorch and the kernels, as tools need.
        collect: collecting the GPU tests.
        tests: how many there are.
    """

    imports: float
    fork: float
    interpreter: float
    collect: float
    tests: int

    @classmethod
    def measured(cls, imports: float, fork: Callable[[], object], tests: str, root: Path) -> HostCosts:
        def run(*arguments: str) -> str:
            command = [sys.executable, *arguments]
            return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout

        began = time.monotonic()
        listed = run("-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "--collect-only", tests)
        return cls(
            collect=time.monotonic() - began,
            tests=sum("::" in line for line in listed.splitlines()),
            imports=imports,
            fork=median_seconds(fork, 5),
            interpreter=median_seconds(lambda: run("-c", "import torch, swin_kernels"), 1),
        )
