"""The sliding window over whole images, the same for prediction, validation and the demo."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from monai.inferers import sliding_window_inference


def logits_of(
    image: torch.Tensor,
    network: Callable[[torch.Tensor], torch.Tensor],
    roi: Sequence[int],
    windows: int,
    overlap: float,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Logits ``(1, channels, *S)`` of ``image (1, C, *S)``; where windows overlap, weighted by a Gaussian.

    Args:
        roi: extents of a window.
        windows: how many go through the network at once.
        overlap: overlap of neighbouring windows, as a fraction of their extents.
        device: where the windows are summed up; by default that of `image`.
    """
    found = sliding_window_inference(
        image, roi, windows, network, overlap, mode="gaussian", sw_device=image.device, device=device
    )
    assert isinstance(found, torch.Tensor)  # MONAI also accepts networks of several outputs
    return found
