"""The network in PyTorch's own operators, for files that run without this package: MONAI's, which computes the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn as nn
from monai.networks.nets import SwinUNETR, swin_unetr

from swin_kernels.modules import PatchMergingLegacy

from ..segmenter import Segmenter


@contextmanager
def plain_network(segmenter: Segmenter, example: torch.Tensor) -> Iterator[nn.Module]:
    """MONAI's network with the weights of `segmenter`, to be traced within the context on `example`, without gradients.

    MONAI masks shifted windows by up to 27 assignments a stage on the device of the input. A trace would remember them
    one by one, and the device. Within the context the masks come from constants: half the operators, on any device.
    """
    arguments = dict(segmenter.description.architecture.__dict__)
    if segmenter.description.architecture.downsample == "merging_legacy":
        arguments["downsample"] = PatchMergingLegacy
    network = SwinUNETR(**arguments).eval()
    network.load_state_dict(segmenter.state)
    regions: dict[tuple, torch.Tensor] = {}

    def mask(dims, window_size, shift_size, device) -> torch.Tensor:
        key = tuple(tuple(int(extent) for extent in extents) for extents in (dims, window_size, shift_size))
        if key not in regions:
            regions[key] = _regions(*key)
        region = regions[key]  # (nW, n)
        return torch.where(region[:, :, None] != region[:, None, :], -100.0, 0.0)  # (nW, n, n)

    upstream, swin_unetr.compute_mask = swin_unetr.compute_mask, mask
    try:
        with torch.no_grad():
            network(example)  # what is computed in a trace is not a constant, so the regions must exist before
            yield network
    finally:
        swin_unetr.compute_mask = upstream


def _regions(dims: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> torch.Tensor:
    """Region of every token of a padded volume of extents `dims`, by window: ``(nW, n)``, as in MONAI's `compute_mask`.

    An axis is cut at its last window and at the shift. Where it is not shifted, neither cuts a window.
    """
    volume = torch.zeros(1, *dims, 1)
    for axis, (extent, width, step) in enumerate(zip(dims, window, shift, strict=True), start=1):
        position = torch.arange(extent)
        region = (position >= extent - width).float() + (position >= extent - step).float()
        volume = 3 * volume + region.view([-1 if other == axis else 1 for other in range(volume.dim())])
    return swin_unetr.window_partition(volume, window)[..., 0]
