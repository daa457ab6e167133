"""The task of `swin-unetr train`: Dice losses on crops, and Dice of whole cases as validation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from monai.losses import DeepSupervisionLoss, DiceLoss, FocalLoss
from monai.metrics import DiceMetric

from .. import distributed
from ..architecture import Architecture
from ..labels import Labels
from ..preprocessing import Preprocessing
from .deep_supervision import DECODERS, DeeplySupervised


@dataclass(frozen=True)
class Loss:
    """What is minimised: of overlapping classes with a sigmoid each, of others with one softmax.

    Args:
        kind: Dice alone, or Dice plus cross-entropy or focal loss.
        include_background: whether Dice counts the background's channel, which overlapping classes have none of.
        squared: square predictions and labels in Dice's denominator.
        gamma: of the focal loss.
        deep_supervision: coarser maps of the decoder, 0 to 4, that are supervised too, each counting half of the next
            finer one; their heads serve training alone.
    """

    kind: Literal["dice", "dice_ce", "dice_focal"] = "dice_ce"
    include_background: bool = True
    squared: bool = False
    gamma: float = 2.0
    deep_supervision: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("dice", "dice_ce", "dice_focal"):
            raise ValueError(f"kind is {self.kind!r}; accepted are 'dice', 'dice_ce' and 'dice_focal'")
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(f"gamma is {self.gamma}; accepted is a number ≥ 0")
        if not 0 <= self.deep_supervision <= len(DECODERS):
            raise ValueError(f"deep_supervision is {self.deep_supervision}; accepted are 0 to {len(DECODERS)}")

    def parts(self, overlapping: bool) -> dict[str, nn.Module]:
        """Losses by name, to be added; each of logits ``(B, channels, *S)`` and `Labels.target`, as float."""
        parts: dict[str, nn.Module] = {
            "dice": DiceLoss(
                include_background=self.include_background or overlapping,
                sigmoid=overlapping,
                softmax=not overlapping,
                to_onehot_y=not overlapping,
                squared_pred=self.squared,
            )
        }
        if self.kind == "dice_ce":
            parts["cross_entropy"] = nn.BCEWithLogitsLoss() if overlapping else _CrossEntropy()
        if self.kind == "dice_focal":
            parts["focal"] = FocalLoss(gamma=self.gamma, use_softmax=not overlapping, to_onehot_y=not overlapping)
        return parts


class _CrossEntropy(nn.Module):
    """Of logits ``(B, channels, *S)`` and indices ``(B, 1, *S)``, which come as floats."""

    def forward(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, index[:, 0].long())


@dataclass(frozen=True)
class Validation:
    """Sliding window over whole cases.

    Args:
        overlap: of neighbouring windows, as a part of their extents.
        windows: how many go through the network at once.
    """

    overlap: float = 0.5
    windows: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap is {self.overlap}; accepted is 0 ≤ overlap < 1")
        if self.windows < 1:
            raise ValueError(f"windows is {self.windows}; accepted is a number ≥ 1")


class Case(Protocol):
    """A case to validate on.

    Attributes:
        name: of the case.
    """

    name: str

    def load(self) -> Mapping[str, torch.Tensor]:
        """``image (C, *S)`` and label values ``label (1, *S)``, preprocessed."""


class Segmentation:
    """A `Task` of the training loop."""

    kind = "train"
    figure = "dice"
    higher_is_better = True

    def __init__(
        self,
        architecture: Architecture,
        labels: Labels,
        preprocessing: Preprocessing,
        roi: Sequence[int],
        loss: Loss,
        validation: Validation,
        cases: Sequence[Case],
    ) -> None:
        """
        Args:
            roi: voxels of a crop and of a window.
            cases: to validate on.
        """
        self.architecture, self.labels, self.preprocessing = architecture, labels, preprocessing
        self.roi, self.validation, self.cases = tuple(roi), validation, cases
        self.core = architecture.build()
        self.network = DeeplySupervised(self.core, loss.deep_supervision) if loss.deep_supervision else self.core
        self._parts = {name: DeepSupervisionLoss(part) for name, part in loss.parts(labels.overlapping).items()}

    def losses(
        self, network: nn.Module, batch: Mapping[str, torch.Tensor], random: np.random.Generator
    ) -> dict[str, torch.Tensor]:
        """The loss of ``image (B, C, *roi)`` and label values ``label (B, 1, *roi)``, and its parts."""
        found = network(batch["image"])  # (B, channels, *roi), or a list of it and coarser ones
        target = self.labels.target(batch["label"]).float()  # (B, 1 or classes, *roi)
        parts = {name: part(found, target) for name, part in self._parts.items()}
        return {"loss": sum(parts.values()), **parts}

    def scores(self, core: nn.Module) -> dict[int, list[float]]:
        """Dice of each class in this rank's cases, by number of the case; NaN where a case has none of a class."""
        return {i: self._dice(core, self.cases[i]) for i in distributed.share(range(len(self.cases)))}

    def figures(self, scores: Sequence[dict[int, list[float]]]) -> dict[str, float]:
        """Mean Dice over cases and classes as ``dice``, and each class's as ``dice of NAME``.

        A class that a case does not have counts for that case not at all; one that no case has is NaN and left out.
        """
        everywhere = {i: dice for of_rank in scores for i, dice in of_rank.items()}
        if not everywhere:
            return {}
        rows = [dice for _, dice in sorted(everywhere.items())]  # in an order that ranks do not show in
        columns = zip(*rows, strict=True)
        classes = {f"dice of {name}": _mean(dice) for name, dice in zip(self.labels.names, columns, strict=True)}
        return {"dice": _mean(classes.values())} | classes

    def _dice(self, core: nn.Module, case: Case) -> list[float]:
        """Of each class in one case; NaN where the case has none of it."""
        device = next(core.parameters()).device
        loaded = {name: value.to(device)[None] for name, value in case.load().items()}  # (1, C, *S), (1, 1, *S)
        logits = sliding_window_inference(
            loaded["image"], self.roi, self.validation.windows, core, self.validation.overlap, mode="gaussian"
        )  # (1, channels, *S)
        channels = None if self.labels.overlapping else self.labels.channels
        metric = DiceMetric(include_background=self.labels.overlapping, reduction="none", num_classes=channels)
        return metric(self.labels.decide(logits), self.labels.target(loaded["label"]))[0].tolist()

    def content(self) -> dict[str, object]:
        return {
            "architecture": asdict(self.architecture),
            "roi": list(self.roi),
            "preprocessing": asdict(self.preprocessing),
            "labels": {
                "classes": {name: list(values) for name, values in self.labels.classes.items()},
                "overlapping": self.labels.overlapping,
            },
        }


def _mean(values) -> float:
    """Of those that are not NaN; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
