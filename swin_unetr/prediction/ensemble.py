"""Trained networks from checkpoints, and what they agree on."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from .. import checkpoints
from ..architecture import Architecture
from ..labels import Labels
from ..preprocessing import Preprocessing


@dataclass(frozen=True)
class Ensemble:
    """Networks that segment the same classes of images prepared alike.

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
    """The networks in checkpoints of `swin-unetr train`, with their averaged weights where there are some.

    Raises:
        ValueError: a checkpoint is missing, damaged, of pretraining or of a network for other images than volumes, or
            two do not agree in classes, preprocessing, roi or channels.
    """
    networks, files, agreed = [], {}, {}
    for path in paths:
        try:
            content = checkpoints.read(path)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise ValueError(f"checkpoint: {path} does not exist or is no file") from error
        if content.get("kind") != "train":
            raise ValueError(f"checkpoint: {path} is of {content.get('kind')!r}; accepted are those of 'train'")
        network, facts = _network(path, content)
        for name, value in facts.items():
            if agreed.setdefault(name, value) != value:
                raise ValueError(
                    f"checkpoint: {path} has {name} {value}, {paths[0]} has {agreed[name]}; accepted are checkpoints "
                    "that agree"
                )
        networks.append(network.to(device).eval().requires_grad_(False))
        files[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return Ensemble(tuple(networks), files=files, **agreed)


def _network(path: Path, content: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The network in a checkpoint, and what all of an ensemble have to agree on."""
    try:
        architecture = Architecture(**content["architecture"])
        facts = {
            "labels": Labels(**content["labels"]),
            "preprocessing": Preprocessing(**_tuples(content["preprocessing"])),
            "roi": tuple(content["roi"]),
            "channels": architecture.in_channels,
        }
        network = architecture.build()
        network.load_state_dict(content["ema"] if content["ema"] is not None else content["model"])
    # The file is whole, but what it says is missing, of another kind or of another shape.
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"checkpoint: {path} has no network that can be built: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    if architecture.spatial_dims != 3:
        raise ValueError(f"checkpoint: {path} is of a network for 2-D images; accepted are those for volumes")
    if architecture.out_channels != facts["labels"].channels:
        raise ValueError(
            f"checkpoint: {path} has {architecture.out_channels} output channels and labels for "
            f"{facts['labels'].channels}; accepted are as many"
        )
    return network, facts


def _tuples(values: dict) -> dict:
    """Fields of `Preprocessing` as they were before they went through a file."""
    known = {field.name for field in fields(Preprocessing)}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in known}


class Mirrored(nn.Module):
    """The mean of a network's logits over mirrored windows, each mirrored back."""

    def __init__(self, network: nn.Module, axes: Sequence[int]) -> None:
        """
        Args:
            axes: spatial axes (0 is the first) that are mirrored, one by one and together.
        """
        super().__init__()
        self.network = network
        self.flips = [
            [axis + 2 for axis in chosen] for n in range(len(axes) + 1) for chosen in itertools.combinations(axes, n)
        ]

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        """Logits ``(B, channels, *roi)`` of ``window (B, C, *roi)``."""
        total = None
        for flip in self.flips:
            logits = self.network(window.flip(flip)).flip(flip)
            total = logits if total is None else total + logits
        return total / len(self.flips)
