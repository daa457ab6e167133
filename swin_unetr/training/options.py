"""How a network is optimised and for how long: options of every command that trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

DECODERS = ("decoder2", "decoder3", "decoder4", "decoder5")
"""Blocks of `SwinUNETR` whose outputs have 1/2, 1/4, 1/8 and 1/16 of the image's extents."""
MOST_STEPS = 10**9
MOST_WINDOWS = 4096
MOST_VOXELS = 2**31
"""Most voxels of a crop: more fit into no machine's memory."""


@dataclass(frozen=True)
class Optimization:
    """AdamW, and what happens between a loss and an optimizer step.

    Args:
        learning_rate: learning rate at the end of the warm-up, from where it falls to 0 as a cosine.
        weight_decay: of AdamW.
        accumulation: batches per step, whose gradients are averaged.
        clip: largest norm of the gradient over all parameters; null does not clip.
        precision: type in which convolutions and attention compute; weights and optimizer are always float32. auto is
            bf16 on GPUs and processors with instructions for it, else fp32; on processors PyTorch's bf16 is not bitwise
            reproducible. fp16 scales the loss.
        ema: decay per step of a moving average of the weights, such as 0.999, which is then validated and used for
            prediction. null keeps none.
        parallel: with several ranks, data parallel training with a complete network on each (ddp), or with weights,
            gradients and optimizer sharded (fsdp).
    """

    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    accumulation: int = 1
    clip: float | None = 1.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    ema: float | None = None
    parallel: Literal["ddp", "fsdp"] = "ddp"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate is {self.learning_rate}; accepted is a number above 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay is {self.weight_decay}; accepted is a number ≥ 0")
        if not 1 <= self.accumulation <= MOST_STEPS:
            raise ValueError(
                f"accumulation is {self.accumulation}; accepted is a number of batches ≥ 1, up to {MOST_STEPS}"
            )
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; accepted is a norm above 0, or null")
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise ValueError(f"precision is {self.precision!r}; accepted are 'auto', 'fp32', 'bf16' and 'fp16'")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema is {self.ema}; accepted is 0 < decay < 1, or null")
        if self.parallel not in ("ddp", "fsdp"):
            raise ValueError(f"parallel is {self.parallel!r}; accepted are 'ddp' and 'fsdp'")
        if self.parallel == "fsdp" and self.precision == "fp16":
            raise ValueError(
                "precision is 'fp16' and parallel 'fsdp'; accepted beside fsdp are 'auto', 'bf16' and 'fp32'"
            )


@dataclass(frozen=True)
class Schedule:
    """How many steps to train, and how often to validate and save.

    Args:
        steps: number of optimizer steps.
        epochs: instead of `steps`: passes over the training cases.
        warm_up: fraction of all steps in which the learning rate rises linearly.
        validate_every: steps from one validation to the next; the last step is followed by one, too.
        patience: validations without improvement after which training ends early; null never ends early.
        checkpoint_every: steps from one checkpoint to the next, which is what a crash can cost.
        keep: how many of the newest checkpoints are kept.
    """

    steps: int = 20_000
    epochs: int | None = None
    warm_up: float = 0.01
    validate_every: int = 500
    patience: int | None = None
    checkpoint_every: int = 500
    keep: int = 3

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "validate_every", "patience", "checkpoint_every", "keep"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MOST_STEPS:
                raise ValueError(f"{name} is {value}; accepted is a number ≥ 1, up to {MOST_STEPS}")
        if not 0 <= self.warm_up < 1:
            raise ValueError(f"warm_up is {self.warm_up}; accepted is a part of the steps, 0 ≤ warm_up < 1")

    def total(self, batches_per_epoch: int, accumulation: int) -> int:
        """Optimizer steps of `accumulation` batches each, with `batches_per_epoch` batches in an epoch."""
        if self.epochs is None:
            return self.steps
        return math.ceil(self.epochs * batches_per_epoch / accumulation)


@dataclass(frozen=True)
class Loss:
    """The loss: for overlapping classes with a sigmoid each, otherwise with one softmax.

    Args:
        kind: Dice alone, or Dice plus cross-entropy or focal loss.
        include_background: whether Dice includes the background's channel; overlapping classes have none.
        squared: square predictions and labels in Dice's denominator.
        gamma: exponent of the focal loss.
        deep_supervision: number of coarser maps of the decoder, 0 to 4, that are supervised, too, each with half the
            weight of the next finer one; their heads are for training only.
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


@dataclass(frozen=True)
class Validation:
    """Sliding window over whole cases.

    Args:
        overlap: overlap of neighbouring windows, as a fraction of their extents.
        windows: how many windows go through the network at once.
    """

    overlap: float = 0.5
    windows: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap is {self.overlap}; accepted is 0 ≤ overlap < 1")
        if not 1 <= self.windows <= MOST_WINDOWS:
            raise ValueError(f"windows is {self.windows}; accepted is a number ≥ 1, up to {MOST_WINDOWS}")


def check_run(spatial_dims: int, roi: Sequence[int], seed: int, resume: str) -> None:
    """Raise `ValueError`, naming the option, unless a command that trains can run with these options."""
    if spatial_dims != 3:
        raise ValueError(f"architecture.spatial_dims is {spatial_dims}; accepted is 3: training is on volumes")
    if len(roi) != 3 or not 0 < math.prod(roi) <= MOST_VOXELS:
        raise ValueError(f"roi is {tuple(roi)}; accepted are 3 multiples of 32, together up to {MOST_VOXELS} voxels")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; accepted is a whole number from 0 to {2**63 - 1}")
    if resume not in ("auto", "never"):
        raise ValueError(f"resume is {resume!r}; accepted are 'auto' and 'never'")
