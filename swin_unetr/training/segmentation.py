"""The task of `swin-unetr train`: Dice losses on crops, and Dice of whole cases as validation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn as nn
from monai.losses import DeepSupervisionLoss
from monai.metrics import DiceMetric

from .. import distributed, sliding
from ..architecture import Architecture
from ..labels import Labels
from ..preprocessing import Preprocessing
from ..segmenter import Description
from . import losses
from .deep_supervision import DeeplySupervised
from .options import Loss, Validation


class LabelledCase(Protocol):
    """A case to validate on.

    Attributes:
        name: of the case.
    """

    @property
    def name(self) -> str: ...

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
        cases: Sequence[LabelledCase],
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
        self._parts = {name: DeepSupervisionLoss(part) for name, part in losses.parts(loss, labels.overlapping).items()}

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

        A class that a case does not have is ignored for that case; one that no case has is NaN and left out.

        Raises:
            ValueError: no case has any class.
        """
        everywhere = {i: dice for of_rank in scores for i, dice in of_rank.items()}
        if not everywhere:
            return {}
        rows = [dice for _, dice in sorted(everywhere.items())]  # in an order that does not depend on the ranks
        columns = zip(*rows, strict=True)
        classes = {f"dice of {name}": _mean(dice) for name, dice in zip(self.labels.names, columns, strict=True)}
        dice = _mean(classes.values())
        if math.isnan(dice):
            names = ", ".join(self.labels.names)
            raise ValueError(
                f"none of the {len(self.cases)} cases to validate on has a voxel of {names} once its label is "
                "resampled, so that no weights are better than others; accepted are labels with some class, and a "
                "spacing that keeps it (preprocessing.spacing)"
            )
        return {"dice": dice} | classes

    def _dice(self, core: nn.Module, case: LabelledCase) -> list[float]:
        """Of each class in one case; NaN where the case has none of it."""
        device = next(core.parameters()).device
        loaded = {name: value.to(device)[None] for name, value in case.load().items()}  # (1, C, *S), (1, 1, *S)
        logits = sliding.logits_of(
            loaded["image"], core, self.roi, self.validation.windows, self.validation.overlap
        )  # (1, channels, *S)
        channels = None if self.labels.overlapping else self.labels.channels
        metric = DiceMetric(include_background=self.labels.overlapping, reduction="none", num_classes=channels)
        dice = metric(self.labels.decide(logits), self.labels.target(loaded["label"]))  # (1, classes)
        return torch.as_tensor(dice[0]).tolist()

    def content(self) -> dict[str, object]:
        return Description(self.architecture, self.labels, self.preprocessing, self.roi).plain()


def _mean(values) -> float:
    """The mean of those that are not NaN; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
