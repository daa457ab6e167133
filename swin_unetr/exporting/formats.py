"""What defines a format of `swin-unetr export`, and the check that all of them go through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ..segmenter import Segmenter

TOLERANCE = 1e-4
"""Largest accepted difference from the eager logits, as a fraction of the largest of them."""

Run = Callable[[torch.Tensor], torch.Tensor]
"""From an image ``(B, C, *S)`` to logits ``(B, channels, *S)``."""


class Format(Protocol):
    """A kind of file, or folder.

    Attributes:
        output: name of the file or folder it writes.
        packages: what has to be installed for it, beyond what this package depends on.
        portable: whether what it writes runs without this package.
    """

    @property
    def output(self) -> str: ...

    @property
    def packages(self) -> tuple[str, ...]: ...

    @property
    def portable(self) -> bool: ...

    def write(self, segmenter: Segmenter, folder: Path) -> None:
        """Write `output` into `folder`."""

    def load(self, folder: Path) -> Run:
        """What is in `folder`, ready to run."""


@dataclass(frozen=True)
class Inputs:
    """Images that a network is traced on and checked with.

    Attributes:
        channels: of an image.
        shape: its extents.
        batch: images at once; None for any number.
    """

    channels: int
    shape: tuple[int, ...]
    batch: int | None

    def example(self) -> torch.Tensor:
        """An image ``(B, C, *shape)`` to trace with; if the batch is free, B is 2: tracers turn 1 into a constant."""
        return self._draw(0, self.batch or 2)

    def checks(self) -> list[torch.Tensor]:
        """Two images that no network was traced with, each ``(B, C, *shape)``; if the batch is free, with different
        B."""
        return [self._draw(seed, self.batch or seed) for seed in (1, 2)]

    def _draw(self, seed: int, batch: int) -> torch.Tensor:
        return torch.randn(batch, self.channels, *self.shape, generator=torch.Generator().manual_seed(seed))


class CheckFailed(RuntimeError):
    """A file does not compute what the network computes."""


@torch.no_grad()
def check(run: Run, inputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest error of `run` over `inputs`, relative to the largest logit.

    Raises:
        CheckFailed: it is above `TOLERANCE`, or shapes differ.
    """
    errors = []
    for image, logits in zip(inputs, expected, strict=True):
        found = run(image)
        if found.shape != logits.shape:
            raise CheckFailed(f"its output is {tuple(found.shape)}; the network's is {tuple(logits.shape)}")
        errors.append(float((found - logits).abs().max() / logits.abs().max()))
    if not all(error <= TOLERANCE for error in errors):  # NaN is not
        raise CheckFailed(f"its relative error is {max(errors):.1e}; accepted is up to {TOLERANCE:.0e}")
    return max(errors)
