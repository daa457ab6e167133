"""The whole Swin UNETR: inference, and a training step (forward, Dice + cross-entropy, backward, AdamW)."""

from __future__ import annotations

import pytest
import torch
from peers import CLASSES, FEATURE_SIZE, gate, models, training_batch, training_loss, training_step


@pytest.fixture(scope="module")
def sides():
    return models()


def sizes(extent: int) -> str:
    return f"{extent}³ image, f{FEATURE_SIZE}, 1→{CLASSES}, batch 1"


@torch.no_grad()
def test_inference(versus, sides, extent):
    image, _ = training_batch(extent)
    for model in sides.values():
        model.eval()
    versus(
        "whole model, inference",
        {side: lambda model=model: model(image) for side, model in sides.items()},
        gate=gate([sides["ours"](image)], [sides["MONAI"](image)]),
        sizes=sizes(extent),
        dtype=torch.float32,
        rounds=5,
    )


def loss_and_gradients(model: torch.nn.Module, image: torch.Tensor, label: torch.Tensor) -> list[torch.Tensor]:
    loss = training_loss(model, image, label)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def test_training_step(versus, sides, extent):
    image, label = training_batch(extent)
    trained = {side: sides[side].train() for side in ("MONAI", "ours")}
    compared = gate(*(loss_and_gradients(trained[side], image, label) for side in ("ours", "MONAI")))
    optimizers = {side: torch.optim.AdamW(model.parameters(), lr=1e-4) for side, model in trained.items()}
    versus(
        "whole model, training step",
        {side: lambda side=side: training_step(trained[side], optimizers[side], image, label) for side in trained},
        gate=compared,
        sizes=sizes(extent),
        dtype=torch.float32,
        rounds=5,
    )
