"""How a network is optimised and for how long: options of every command that trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Optimization:
    """AdamW, and what happens between a loss and a step of it.

    Args:
        learning_rate: at the end of the warm-up; from there it falls to 0 as a cosine.
        weight_decay: of AdamW.
        accumulation: batches of a step, whose gradients are averaged.
        clip: longest gradient, as the norm over all parameters; null does not clip.
        precision: what convolutions and attention compute in; weights and optimizer are float32 always. fp16 scales the
            loss.
        ema: decay a step of a moving average of the weights, such as 0.999; it is what is validated and used for
            prediction. null keeps none.
        parallel: with several ranks, data parallel training with a whole network a rank (ddp) or with weights,
            gradients and optimizer sharded (fsdp).
    """

    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    accumulation: int = 1
    clip: float | None = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: float | None = None
    parallel: Literal["ddp", "fsdp"] = "ddp"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate is {self.learning_rate}; accepted is a number above 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay is {self.weight_decay}; accepted is a number ≥ 0")
        if self.accumulation < 1:
            raise ValueError(f"accumulation is {self.accumulation}; accepted is a number of batches ≥ 1")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; accepted is a norm above 0, or null")
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"precision is {self.precision!r}; accepted are 'fp32', 'bf16' and 'fp16'")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema is {self.ema}; accepted is 0 < decay < 1, or null")
        if self.parallel not in ("ddp", "fsdp"):
            raise ValueError(f"parallel is {self.parallel!r}; accepted are 'ddp' and 'fsdp'")
        if self.parallel == "fsdp" and self.precision == "fp16":
            raise ValueError("precision is 'fp16' and parallel 'fsdp'; accepted beside fsdp are 'bf16' and 'fp32'")


@dataclass(frozen=True)
class Schedule:
    """How many steps, and what happens every so many of them.

    Args:
        steps: of the optimizer.
        epochs: instead of `steps`: passes over the training cases.
        warm_up: part of all steps in which the learning rate rises linearly.
        validate_every: steps from one validation to the next; the last step is followed by one too.
        patience: validations without a better one after which training ends early; null never does.
        checkpoint_every: steps from one checkpoint to the next: what a crash can cost.
        keep: checkpoints that stay, newest first.
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
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; accepted is a number ≥ 1")
        if not 0 <= self.warm_up < 1:
            raise ValueError(f"warm_up is {self.warm_up}; accepted is a part of the steps, 0 ≤ warm_up < 1")

    def total(self, batches_per_epoch: int, accumulation: int) -> int:
        """Steps of the optimizer, `accumulation` batches each, of which `batches_per_epoch` are an epoch."""
        if self.epochs is None:
            return self.steps
        return math.ceil(self.epochs * batches_per_epoch / accumulation)
