"""MONAI's side and ours, built with the same weights, and the gate that compares their results."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import SwinUNETR
from monai.networks.nets.swin_unetr import SwinTransformer, SwinTransformerBlock, compute_mask, get_window_size

import swin_kernels

FEATURE_SIZE, WINDOW, CLASSES = 48, 7, 14
STAGES = (1, 2, 3, 4)

RELATIVE_ERROR_LIMIT = 1e-4
"""Largest deviation from MONAI over the largest magnitude of MONAI's tensor, float32."""

LOW_PRECISION_LIMIT = 2.0
"""Error against float32 as a multiple of the error MONAI makes in the same dtype."""


@dataclass(frozen=True)
class Gate:
    """How far our result is from MONAI's, and how far it may be. No ratio is computed if it fails."""

    measure: str
    value: float
    limit: float

    def require(self) -> None:
        """Raise `AssertionError` unless the value is within the limit; NaN is not."""
        assert self.value <= self.limit, f"correctness gate failed, nothing is compared: {self}"

    def __str__(self) -> str:
        return (
            f"{self.measure} {self.value:.2g} ≤ {self.limit:g}"
            if self.value <= self.limit
            else (f"{self.measure} {self.value:.3g}, allowed {self.limit:g}")
        )


def relative_error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute deviation over the largest magnitude of `truth`."""
    return ((result.double() - truth.double()).abs().max() / truth.double().abs().max()).item()


def gate(
    ours: Sequence[torch.Tensor], monai: Sequence[torch.Tensor], truth: Sequence[torch.Tensor] | None = None
) -> Gate:
    """The worst tensor of `ours` (outputs and gradients).

    Args:
        ours, monai: corresponding tensors.
        truth: the same in float32 where `ours` and `monai` were computed in a lower precision.
    """
    if truth is None:
        errors = [relative_error(a, b) for a, b in zip(ours, monai, strict=True)]
        return Gate("relative error", max(errors), RELATIVE_ERROR_LIMIT)
    multiples = [relative_error(a, t) / relative_error(b, t) for a, b, t in zip(ours, monai, truth, strict=True)]
    return Gate("error as a multiple of MONAI's own", max(multiples), LOW_PRECISION_LIMIT)


def exact_gate(ours: Sequence[torch.Tensor], monai: Sequence[torch.Tensor]) -> Gate:
    """For operators that only move data: elements that differ."""
    return Gate("elements that differ", sum((a != b).sum().item() for a, b in zip(ours, monai, strict=True)), 0)


def encoders() -> dict[str, torch.nn.Module]:
    """The Swin encoder of Swin UNETR (f48, window 7): MONAI's, MONAI's with flash attention, ours."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "in_chans": 1,
        "embed_dim": FEATURE_SIZE,
        "window_size": (WINDOW,) * 3,
        "patch_size": (2, 2, 2),
        "depths": (2, 2, 2, 2),
        "num_heads": (3, 6, 12, 24),
    }
    eager = SwinTransformer(**settings)
    flash = SwinTransformer(**settings, use_flash_attention=True)
    flash.load_state_dict(eager.state_dict())
    return {"MONAI": eager, "MONAI flash": flash, "ours": swin_kernels.accelerate(copy.deepcopy(eager))}


def models() -> dict[str, torch.nn.Module]:
    """Swin UNETR, f48, one channel to 14: MONAI's, MONAI's with flash attention, ours."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"in_channels": 1, "out_channels": CLASSES, "feature_size": FEATURE_SIZE}
    eager = SwinUNETR(**settings)
    flash = SwinUNETR(**settings, use_flash_attention=True)
    flash.load_state_dict(eager.state_dict())
    return {"MONAI": eager, "MONAI flash": flash, "ours": swin_kernels.accelerate(copy.deepcopy(eager))}


def block_of(encoder: torch.nn.Module, stage: int, shifted: bool) -> SwinTransformerBlock:
    """The plain or the shifted block of a stage (1 to 4)."""
    return getattr(encoder, f"layers{stage}")[0].blocks[int(shifted)]


def stage_tokens(image_extent: int, stage: int) -> int:
    """Tokens on an axis of a stage: the patch embedding halves the image, each merging halves again."""
    return image_extent // 2**stage


def mask_of(tokens: int, shifted: bool) -> torch.Tensor | None:
    """The mask that MONAI's layer would pass to its block, built outside the measurement: ``(nW, n, n)``."""
    if not shifted:
        return None
    window, shift = get_window_size((tokens,) * 3, (WINDOW,) * 3, (WINDOW // 2,) * 3)
    padded = [-(-tokens // w) * w for w in window]
    return compute_mask(padded, window, shift, "cpu")


def training_loss(model: torch.nn.Module, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """The loss of upstream's fine-tuning recipe: Dice + cross-entropy over the classes."""
    return DiceCELoss(to_onehot_y=True, softmax=True)(model(image), label)


def training_batch(image_extent: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random image ``(1, 1, *S)`` and label ``(1, 1, *S)``."""
    generator = torch.Generator().manual_seed(1)
    shape = (1, 1, *(image_extent,) * 3)
    return torch.randn(shape, generator=generator), torch.randint(CLASSES, shape, generator=generator).float()


def training_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, image: torch.Tensor, label: torch.Tensor
) -> float:
    """Forward, loss, backward, AdamW step; returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = training_loss(model, image, label)
    loss.backward()
    optimizer.step()
    return loss.item()
