"""What a segmentation network minimises, from its options."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.losses import DiceLoss, FocalLoss
from torch.nn.modules.loss import _Loss

from .options import Loss


def parts(loss: Loss, overlapping: bool) -> dict[str, _Loss]:
    """The losses to be added, by name; each takes logits ``(B, channels, *S)`` and `Labels.target` as float."""
    parts: dict[str, _Loss] = {
        "dice": DiceLoss(
            include_background=loss.include_background or overlapping,
            sigmoid=overlapping,
            softmax=not overlapping,
            to_onehot_y=not overlapping,
            squared_pred=loss.squared,
        )
    }
    if loss.kind == "dice_ce":
        parts["cross_entropy"] = nn.BCEWithLogitsLoss() if overlapping else CrossEntropy()
    if loss.kind == "dice_focal":
        parts["focal"] = FocalLoss(gamma=loss.gamma, use_softmax=not overlapping, to_onehot_y=not overlapping)
    return parts


class CrossEntropy(_Loss):
    """Cross-entropy of logits ``(B, channels, *S)`` and indices ``(B, 1, *S)``, which are given as floats."""

    def forward(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, index[:, 0].long())
