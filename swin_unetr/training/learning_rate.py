"""The learning rate over a run."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR


def warm_up_and_cosine(optimizer: torch.optim.Optimizer, steps: int, warm_up: float) -> LRScheduler:
    """The learning rate rises linearly over a part `warm_up` of all `steps`, then falls to 0 as a cosine."""
    rising = round(warm_up * steps)
    falling = CosineAnnealingLR(optimizer, T_max=max(1, steps - rising))
    if not rising:
        return falling
    linear = LinearLR(optimizer, start_factor=1 / (rising + 1), total_iters=rising)
    return SequentialLR(optimizer, [linear, falling], milestones=[rising])
