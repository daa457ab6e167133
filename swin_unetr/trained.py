"""A trained network as its checkpoint describes it."""

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
class Trained:
    """Weights, and what it takes to use them.

    Attributes:
        architecture: the network, without what serves training alone: dropout and recomputation.
        labels: what its channels mean.
        preprocessing: what it expects to be done to an image.
        roi: voxels of a window.
        state: its state dict, contiguous, on the CPU.
        averaged: whether these are the weights' moving average.
    """

    architecture: Architecture
    labels: Labels
    preprocessing: Preprocessing
    roi: tuple[int, ...]
    state: Mapping[str, torch.Tensor]
    averaged: bool

    @classmethod
    def read(cls, path: Path) -> Trained:
        """What a checkpoint of `swin-unetr train` holds; the moving average of the weights where there is one.

        Raises:
            ValueError: the file is damaged, of another command, does not describe its own weights, or has some that are
                NaN or infinite.
            FileNotFoundError: there is no such file.
        """
        content = checkpoints.read(path)
        if content.get("kind") != "train":
            raise ValueError(f"checkpoint: {path} is of {content.get('kind')!r}; accepted are those of 'train'")
        averaged = content.get("ema") is not None
        state = content["ema" if averaged else "model"]
        # The file is whole, but what it says may be missing, of another kind or of another shape.
        try:
            trained = cls.of(content, state, averaged)
            with torch.device("meta"):  # nothing is drawn and nothing copied
                trained.architecture.build().load_state_dict(state, assign=True)
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
        if trained.architecture.out_channels != trained.labels.channels:
            raise ValueError(
                f"checkpoint: {path} has {trained.architecture.out_channels} output channels and labels for "
                f"{trained.labels.channels}; accepted are as many"
            )
        return trained

    @classmethod
    def of(cls, description: Mapping[str, Any], state: Mapping[str, torch.Tensor], averaged: bool) -> Trained:
        """From plain values as `description` gives them."""
        architecture, labels, preprocessing = (
            _tuples(description[k]) for k in ("architecture", "labels", "preprocessing")
        )
        return cls(
            architecture=replace(
                Architecture(**architecture),
                use_checkpoint=False,
                drop_rate=0.0,
                attn_drop_rate=0.0,
                dropout_path_rate=0.0,
            ),
            labels=Labels(**labels),
            preprocessing=Preprocessing(**preprocessing),
            roi=tuple(int(extent) for extent in description["roi"]),
            state={name: value.contiguous() for name, value in state.items()},
            averaged=averaged,
        )

    @property
    def description(self) -> dict[str, Any]:
        """Everything but the weights, in plain values."""
        return {
            "architecture": asdict(self.architecture),
            "labels": {
                "classes": {name: list(values) for name, values in self.labels.classes.items()},
                "overlapping": self.labels.overlapping,
            },
            "preprocessing": asdict(self.preprocessing),
            "roi": list(self.roi),
        }

    def network(self) -> SwinUNETR:
        """The network on fused kernels, in evaluation mode."""
        network = self.architecture.build()
        network.load_state_dict(self.state)
        return network.eval()


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` with tuples for the lists that files hold."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
