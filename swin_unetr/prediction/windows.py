"""Sliding windows over volumes of any extent, slab by slab, so that the sums fit in memory.

A slab holds rows of the first axis that no later window reaches; its windows are those of the whole volume, so that
slabs give the same result as one sliding window over everything. Windows that reach into two slabs are computed for
both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn

from .. import sliding
from ..files import GIB

FLOAT32 = 4  # bytes
SUMS = 3
"""Volumes of all channels in memory at once while a slab is summed up: sums, weights, and their quotient."""


@dataclass(frozen=True)
class Windows:
    """How a volume is cut.

    Args:
        overlap: overlap of neighbouring windows, as a fraction of their extents.
        batch: windows that go through the network at once.
        memory_limit: GiB for the sums of a slab; null allows half of the machine's free memory, which may be more than
            a container or a scheduler allows.
    """

    overlap: float = 0.5
    batch: int = 4
    memory_limit: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap is {self.overlap}; accepted is 0 ≤ overlap < 1")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; accepted is a number ≥ 1")
        if self.memory_limit is not None and not self.memory_limit > 0:
            raise ValueError(f"memory_limit is {self.memory_limit}; accepted is a size in GiB above 0, or null")


def starts_along(extent: int, roi: int, overlap: float) -> list[int]:
    """Where windows begin on an axis, as MONAI's `sliding_window_inference` places them; `extent` is at least `roi`."""
    step = max(1, int(roi * (1 - overlap)))
    starts = list(range(0, extent - roi + 1, step))
    return starts if starts[-1] == extent - roi else [*starts, extent - roi]


def slabs(
    image: torch.Tensor,
    networks: Sequence[nn.Module],
    channels: int,
    roi: Sequence[int],
    how: Windows,
    say: Callable[[str], None],
) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Logits of a volume, a slab at a time: the first row, and for each network ``(1, channels, rows, *S[1:])``.

    Args:
        image: ``(1, C, *S)`` on the networks' device, no shorter than `roi` on any axis.
        channels: channels of the output.
        say: is called when a volume does not fit at once.
    """
    extent = image.shape[2]
    starts = starts_along(extent, roi[0], how.overlap)
    row_bytes = image[0, 0, 0].numel() * channels * FLOAT32 * SUMS * len(networks)
    allowed = how.memory_limit * GIB if how.memory_limit is not None else _free(image.device) / 2
    room = allowed / row_bytes
    device = image.device
    if extent > room:
        say(
            f"in slabs: sums of the whole volume take {extent * row_bytes / GIB:.3g} GiB, of one window's rows "
            f"{roi[0] * row_bytes / GIB:.3g} GiB, and {allowed / GIB:.3g} GiB are allowed"
        )
    first = 0  # number of the first window of the slab
    while first < len(starts):
        low = starts[first]
        # Windows before the slab that reach into it.
        before = next(i for i, start in enumerate(starts) if start + roi[0] > low)
        last = first
        while last + 1 < len(starts) and starts[last + 1] + roi[0] - starts[before] <= room:
            last += 1
        high = starts[last + 1] if last + 1 < len(starts) else extent
        part = image[:, :, starts[before] : starts[last] + roi[0]]
        try:
            logits = [_slide(part, network, roi, how, device) for network in networks]
        except torch.cuda.OutOfMemoryError:
            if device.type == "cpu":
                raise
            torch.cuda.empty_cache()
            say("the GPU's memory does not hold the sums: they are kept in the processor's memory")
            device = torch.device("cpu")
            continue
        yield low, [whole[:, :, low - starts[before] : high - starts[before]] for whole in logits]
        first = last + 1


def _slide(part, network, roi, how: Windows, device: torch.device) -> torch.Tensor:
    return sliding.logits_of(part, network, roi, how.batch, how.overlap, device)


def _free(device: torch.device) -> int:
    """Bytes of free memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
