"""The whole Swin UNETR: inference, and a training step (forward, Dice + cross-entropy, backward, AdamW)."""

from __future__ import annotations

import copy

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


def smooth(model: torch.nn.Module) -> torch.nn.Module:
    """A copy with SiLU for LeakyReLU, whose kink makes float32 gradients of equal models differ.

    Activations that round to either side of 0 flip the slope: MONAI's own float32 gradients are as far from
    its float64 ones. Everything else that the gate has to compare stays.
    """
    result = copy.deepcopy(model)
    for parent in list(result.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.LeakyReLU):
                setattr(parent, name, torch.nn.SiLU())
    return result


def loss_and_gradients(model: torch.nn.Module, image: torch.Tensor, label: torch.Tensor) -> list[torch.Tensor]:
    """The loss, and all gradients in one vector: a gradient that cancels to nearly 0 has no scale by itself."""
    loss = training_loss(model, image, label)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [loss.detach(), torch.cat([g.flatten() for g in gradients])]


def test_training_step(versus, sides, extent):
    image, label = training_batch(extent)
    trained = {side: sides[side].train() for side in ("MONAI", "ours")}
    compared = gate(*(loss_and_gradients(smooth(trained[side]), image, label) for side in ("ours", "MONAI")))
    optimizers = {side: torch.optim.AdamW(model.parameters(), lr=1e-4) for side, model in trained.items()}
    versus(
        "whole model, training step",
        {side: lambda side=side: training_step(trained[side], optimizers[side], image, label) for side in trained},
        gate=compared,
        sizes=sizes(extent),
        dtype=torch.float32,
        rounds=5,
    )
