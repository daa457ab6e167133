"""The learning rate over a run."""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LambdaLR


def warm_up_and_cosine(optimizer: torch.optim.Optimizer, steps: int, warm_up: float, done: int = 0) -> LambdaLR:
    """The learning rate rises linearly over the fraction `warm_up` of all `steps`, then falls to 0 as a cosine.

    It depends only on the number of steps done: a run that resumes needs no state of it, and may resume with a longer
    schedule.

    Args:
        done: steps already done by the optimizer, whose learning rate is the peak one.
    """
    rising = round(warm_up * steps)
    falling = max(1, steps - rising)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - rising) / falling))

    if done:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return LambdaLR(optimizer, factor, last_epoch=done - 1)
