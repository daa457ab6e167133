"""What a training loop needs from the thing it trains, and from the data it trains on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn as nn


class Task(Protocol):
    """What is trained, by which losses, and how well it does.

    Attributes:
        kind: "train" or "pretrain", as checkpoints name it.
        network: what losses are computed with, including heads that are only for training.
        core: the part of `network` that checkpoints keep as ``model`` and that is averaged and validated; `network`
            itself if there is nothing else.
        figure: the one of `figures` by which validations are compared.
        higher_is_better: whether higher values of `figure` are better.
    """

    kind: str
    figure: str
    higher_is_better: bool

    @property
    def network(self) -> nn.Module: ...

    @property
    def core(self) -> nn.Module: ...

    def losses(
        self, network: nn.Module, batch: Mapping[str, torch.Tensor], random: np.random.Generator
    ) -> dict[str, torch.Tensor]:
        """The scalar to minimise as ``loss``, and its parts by name: means over this rank's batch.

        Args:
            network: `network`, wrapped as this job trains it; called once.
            batch: on the network's device.
            random: depends on seed, step and rank alone.
        """

    def scores(self, core: nn.Module) -> Any:
        """This rank's part of a validation; small, since it is pickled. It may be interrupted at any point.

        Args:
            core: like `core`, with the weights to validate; calling it involves no other rank.
        """

    def figures(self, scores: Sequence[Any]) -> dict[str, float]:
        """Figures by name, from the `scores` of all ranks in order; {} if there was nothing to validate on."""

    def content(self) -> dict[str, object]:
        """What a checkpoint says about its weights: architecture, roi, preprocessing, labels."""


class Batches(Protocol):
    """Training data as numbered batches.

    Attributes:
        batches_per_epoch: batches of this rank in one pass over the cases.
    """

    @property
    def batches_per_epoch(self) -> int: ...

    def stream(self, start: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches number `start`, `start` + 1, … without end; a batch depends only on seed, number and rank."""
