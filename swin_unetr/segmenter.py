"""A trained segmentation network as its checkpoint describes it, ready to be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import checkpoints
from .architecture import Architecture
from .labels import Labels
from .model import SwinUNETR
from .preprocessing import Preprocessing


@dataclass(frozen=True)
class Description:
    """What is needed to use weights.

    Attributes:
        architecture: the network.
        labels: what its channels mean.
        preprocessing: what it expects to be done to an image.
        roi: voxels of a window.
    """

    architecture: Architecture
    labels: Labels
    preprocessing: Preprocessing
    roi: tuple[int, ...]

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Description:
        """From a mapping that contains what `plain` returns."""
        architecture, labels, preprocessing = (_tuples(plain[k]) for k in ("architecture", "labels", "preprocessing"))
        return cls(
            architecture=Architecture(**architecture),
            labels=Labels(**labels),
            preprocessing=Preprocessing(**preprocessing),
            roi=tuple(int(extent) for extent in plain["roi"]),
        )

    def plain(self) -> dict[str, Any]:
        """The same as plain values, for files."""
        return {
            "architecture": asdict(self.architecture),
            "labels": {
                "classes": self.labels.groups,
                "overlapping": self.labels.overlapping,
            },
            "preprocessing": asdict(self.preprocessing),
            "roi": list(self.roi),
        }


@dataclass(frozen=True)
class Segmenter:
    """A trained network, and what is needed to use it.

    Attributes:
        description: its architecture is without what only training needs: dropout and recomputation.
        network: on fused kernels and the CPU, in evaluation mode.
        state: its state dict, contiguous.
        averaged: whether its weights are the moving average.
        sha256: of the checkpoint's file, in hexadecimal.
    """

    description: Description
    network: SwinUNETR
    state: Mapping[str, torch.Tensor]
    averaged: bool
    sha256: str

    @classmethod
    def read(cls, path: Path) -> Segmenter:
        """The network in a checkpoint of `swin-unetr train`, with averaged weights if it has any.

        Raises:
            ValueError: the file is damaged, of another command, does not describe its own weights, or has some that are
                NaN or infinite.
            FileNotFoundError: there is no such file.
        """
        saved = checkpoints.read(path)
        kind = saved.content.get("kind")
        if kind != "train":
            raise ValueError(f"checkpoint: {path} is of {kind!r}; accepted are those of 'train'")
        weights, averaged = checkpoints.weights(saved.content)
        # The file is whole, but what it says may be missing, of another kind or of another shape.
        try:
            description = _for_use(Description.of(saved.content))
            state = {name: value.contiguous() for name, value in weights.items()}
            network = description.architecture.build(state)
            worthless = [
                f"{name} ({int((~value.isfinite()).sum())} of {value.numel()})"
                for name, value in state.items()
                if not value.isfinite().all()
            ]
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise ValueError(f"checkpoint: {path} does not describe its own weights: {reason}") from error
        if worthless:
            raise ValueError(
                f"checkpoint: {path} has weights that are NaN or infinite, such as {worthless[0]}; accepted are finite "
                "ones"
            )
        channels, classes = description.architecture.out_channels, description.labels.channels
        if channels != classes:
            raise ValueError(
                f"checkpoint: {path} has {channels} output channels and labels for {classes}; accepted are as many"
            )
        return cls(description, network.eval(), state, averaged, saved.sha256)


def _for_use(description: Description) -> Description:
    """`description` without what only training needs."""
    architecture = replace(
        description.architecture, use_checkpoint=False, drop_rate=0.0, attn_drop_rate=0.0, dropout_path_rate=0.0
    )
    return replace(description, architecture=architecture)


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` with tuples in place of the lists that files hold."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
