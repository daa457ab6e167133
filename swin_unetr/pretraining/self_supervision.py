"""The three tasks in the form that the training loop trains: losses of a step, validation over cases, content of a
checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch
import torch.nn as nn
from monai.transforms import RandWeightedCrop, SpatialPad

from .. import distributed
from ..architecture import Architecture
from ..datasets.dataset import ValidationCase
from ..preprocessing import Preprocessing
from .network import PretrainingNetwork
from .task import CaseAnswers, Tasks, answer, step_losses, validation_losses


class SelfSupervision:
    """A `swin_unetr.training.task.Task`: the encoder of a Swin UNETR with a head for each task."""

    kind = "pretrain"
    figure = "loss"
    higher_is_better = False

    def __init__(
        self,
        architecture: Architecture,
        preprocessing: Preprocessing,
        roi: Sequence[int],
        tasks: Tasks,
        embedding: int,
        cases: Sequence[ValidationCase],
        crops: int,
        seed: int,
    ) -> None:
        """
        Args:
            roi: voxels of a crop.
            embedding: length of the vectors that contrast compares.
            cases: cases to validate on, with `crops` crops of each.
            seed: for the crops and views of validation, which are the same every time.
        """
        self.architecture, self.preprocessing, self.roi = architecture, preprocessing, tuple(roi)
        self.tasks, self.cases, self.crops, self.seed = tasks, cases, crops, seed
        self.network = self.core = PretrainingNetwork(
            architecture.build().swinViT, architecture.in_channels, architecture.spatial_dims, embedding
        )

    def losses(
        self, network: nn.Module, batch: Mapping[str, torch.Tensor], random: np.random.Generator
    ) -> dict[str, torch.Tensor]:
        """The losses of two views of ``image (B, C, *roi)``, by task, and their weighted sum."""
        return step_losses(network, batch["image"], self.tasks, random)

    def scores(self, core: nn.Module) -> list[CaseAnswers]:
        """What the network answers to views of this rank's cases."""
        device = next(core.parameters()).device
        return [
            answer(core, index, self._crops(index).to(device), self.tasks, self.seed)
            for index in distributed.share(range(len(self.cases)))
        ]

    def figures(self, scores: Sequence[list[CaseAnswers]]) -> dict[str, float]:
        """The losses over views of the cases, and the fraction of rotations recognised."""
        everywhere = [answer for of_rank in scores for answer in of_rank]
        return validation_losses(everywhere, self.tasks) if everywhere else {}

    def _crops(self, index: int) -> torch.Tensor:
        """Crops of a case ``(crops, C, *roi)``, around voxels that are not air."""
        image = SpatialPad(self.roi)(self.cases[index].load()["image"])  # (C, *S)
        crop = RandWeightedCrop(self.roi, self.crops, weight_map=(image != 0).any(0, keepdim=True).float())
        crop.set_random_state(seed=np.random.SeedSequence([self.seed, index]).generate_state(1)[0])
        return torch.stack([torch.as_tensor(c) for c in crop(image)])  # (crops, C, *roi)

    def content(self) -> dict[str, object]:
        return {
            "architecture": asdict(self.architecture),
            "roi": list(self.roi),
            "preprocessing": asdict(self.preprocessing),
        }
