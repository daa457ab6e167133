"""What a run shows on the terminal: one line with loss, speed, memory and remaining time."""

from __future__ import annotations

import resource
import time

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..names import say

SECONDS_BETWEEN_LINES = 60
"""If the output is a file and not a terminal, a line of text is written this often, instead of a progress bar."""


class ProgressLine:
    """Used by all ranks; shows nothing on a quiet console."""

    def __init__(self, console: Console, step: int, steps: int) -> None:
        self._console, self._steps = console, steps
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[says]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=console.quiet or not console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=steps, completed=step, says="")
        self._started = self._said = time.monotonic()
        self._first = step

    def __enter__(self) -> ProgressLine:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def step(self, step: int, loss: float, voxels_per_second: float, memory_gib: float) -> None:
        """Report on the step that just ended."""
        says = f"loss {loss:.4f}  {_short(voxels_per_second)} voxels/s  {memory_gib:.1f} GiB"
        self._progress.update(self._task, completed=step, says=says)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            left = (now - self._started) / (step - self._first) * (self._steps - step)
            self.say(f"step {step} of {self._steps}  {says}  ETA {_clock(left)}")

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line that stays."""
        say(self._console, text, style)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: on a GPU what PyTorch allocated there, else that of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _short(number: float) -> str:
    """``12.3M``."""
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}G"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
