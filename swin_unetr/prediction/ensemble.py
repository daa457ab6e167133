"""Trained networks from checkpoints, and what they agree on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from ..labels import Labels
from ..preprocessing import Preprocessing
from ..segmenter import Segmenter


@dataclass(frozen=True)
class Ensemble:
    """Networks that segment the same classes in images that are prepared in the same way.

    Attributes:
        roi: extents of a window, in voxels of the preprocessed grid.
        files: SHA-256 of each checkpoint, by path.
    """

    networks: tuple[nn.Module, ...]
    labels: Labels
    preprocessing: Preprocessing
    roi: tuple[int, ...]
    channels: int
    files: dict[str, str]


def load(paths: Sequence[Path], device: torch.device) -> Ensemble:
    """The networks in checkpoints of `swin-unetr train`, with averaged weights if they have any.

    Raises:
        ValueError: a checkpoint is missing, damaged, of pretraining or of a network for other images than volumes, or
            two differ in classes, preprocessing, roi or channels.
    """
    networks: list[nn.Module] = []
    files: dict[str, str] = {}
    agreed: dict[str, Any] = {}
    for path in paths:
        try:
            segmenter = Segmenter.read(path)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise ValueError(f"checkpoint: {path} does not exist or is not a file") from error
        description = segmenter.description
        if description.architecture.spatial_dims != 3:
            raise ValueError(f"checkpoint: {path} is of a network for 2-D images; accepted are those for volumes")
        facts = {
            "labels": description.labels,
            "preprocessing": description.preprocessing,
            "roi": description.roi,
            "channels": description.architecture.in_channels,
        }
        for name, value in facts.items():
            if agreed.setdefault(name, value) != value:
                raise ValueError(
                    f"checkpoint: {path} has {name} {value}, {paths[0]} has {agreed[name]}; accepted are checkpoints "
                    "that agree"
                )
        networks.append(segmenter.network.to(device).requires_grad_(False))
        files[str(path)] = segmenter.sha256
    return Ensemble(tuple(networks), files=files, **agreed)


class Mirrored(nn.Module):
    """The mean of a network's logits over mirrored windows, each mirrored back."""

    def __init__(self, network: nn.Module, axes: Sequence[int]) -> None:
        """
        Args:
            axes: spatial axes (0 is the first) to mirror, in all combinations.
        """
        super().__init__()
        self.network = network
        self.flips = [
            [axis + 2 for axis in chosen] for n in range(len(axes) + 1) for chosen in itertools.combinations(axes, n)
        ]

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        """Logits ``(B, channels, *roi)`` of ``window (B, C, *roi)``."""
        logits = (self.network(window.flip(flip)).flip(flip) for flip in self.flips)
        return reduce(torch.add, logits) / len(self.flips)
