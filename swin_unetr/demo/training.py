"""Training on random views of one patient, and sliding-window prediction of another."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from monai.data import DataLoader
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks import one_hot
from torch import nn

from ..model import SwinUNETR
from .data import CLASSES, Patient, random_views


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how. Settings were chosen by scores on slices of patient 2 that were held out."""

    steps: int = 260
    batch_size: int = 2
    window: tuple[int, int, int] = (64, 64, 32)  # voxels: 192 × 192 × 160 mm
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    warm_up: float = 0.1  # part of the steps
    overlap: float = 0.25  # of neighbouring windows in prediction
    feature_size: int = 12
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)

    def model(self, architecture: type[nn.Module] = SwinUNETR) -> nn.Module:
        """A network of this recipe; `architecture` is `SwinUNETR` here or MONAI's.

        Its weights are in channels-last order: convolutions of few channels run faster in it on a CPU.
        """
        network = architecture(
            in_channels=1, out_channels=len(CLASSES), feature_size=self.feature_size, depths=self.depths
        )
        return network.to(memory_format=torch.channels_last_3d)


def loss_function() -> nn.Module:
    """DiceCE of logits ``(B, classes, *window)`` and labels ``(B, 1, *window)``."""
    return DiceCELoss(to_onehot_y=True, softmax=True, batch=True)


class Trainer:
    """One optimisation step at a time: DiceCE loss, AdamW, one learning-rate cycle."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model = model.train()
        self.loss = loss_function()
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            max_lr=recipe.learning_rate,
            total_steps=recipe.steps + 1,
            pct_start=recipe.warm_up,
            cycle_momentum=False,
        )

    def step(self, image: torch.Tensor, label: torch.Tensor) -> float:
        """Train on ``image (B, 1, *window)`` and ``label (B, 1, *window)``; returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.model(image), label)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def train(
    patient: Patient,
    recipe: Recipe,
    device: torch.device,
    seed: int,
    on_step: Callable[[float, float], None],
) -> nn.Module:
    """Train a model of `recipe` on `patient`.

    Args:
        on_step: called after each step with its loss and its seconds (the making of the view not counted).

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    views = random_views(patient, recipe.window, recipe.steps * recipe.batch_size, seed)
    trainer = Trainer(recipe.model().to(device), recipe)
    for batch in DataLoader(views, batch_size=recipe.batch_size):
        image, label = batch["image"].to(device), batch["label"].to(device)
        started = time.perf_counter()
        loss = trainer.step(image, label)
        seconds = time.perf_counter() - started  # the loss was read, so the device has finished
        if not np.isfinite(loss):
            raise FloatingPointError(f"the training loss is {loss}")
        trainer.schedule.step()
        on_step(loss, seconds)
    return trainer.model


@torch.inference_mode()
def predict(model: nn.Module, image: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Logits ``(classes, X, Y, Z)`` of ``image (1, X, Y, Z)``, from overlapping windows with Gaussian weights."""
    model.eval()
    logits = sliding_window_inference(
        image[None], recipe.window, 4, model, overlap=recipe.overlap, mode="gaussian"
    )  # (1, classes, X, Y, Z)
    return logits[0]


def dice(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Dice of every class but the background, by class name; label maps ``(X, Y, Z)``."""
    metric = DiceMetric(include_background=False)
    pair = [one_hot(torch.as_tensor(m.astype(np.int64))[None, None], len(CLASSES)) for m in (found, expected)]
    metric(*pair)  # each (1, classes, X, Y, Z)
    return dict(zip(CLASSES[1:], metric.aggregate("mean_batch").tolist(), strict=True))
