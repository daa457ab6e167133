"""The deepest level of a network has few voxels, of which PyTorch's own gradients in bfloat16 are not always right."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from swin_kernels import convolution_blocks
from swin_unetr import SwinUNETR


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 2, 2), (2, 3, 3), (1, 3, 1), (3, 3, 3)])
@pytest.mark.parametrize("threads", [1, 2])
def test_gradient_of_a_convolution_in_bfloat16(threads, shape):
    """At 64 voxels the deepest level has two; PyTorch's gradient holds what was left in memory, here NaN."""
    block = SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)).encoder10.layer
    weight = block.conv1.conv.weight
    image, gradient = torch.randn(1, weight.shape[1], *shape), torch.randn(1, weight.shape[0], *shape)
    left_behind = [torch.full((size,), math.nan) for size in (100, 1000, 10_000, 100_000, 1_000_000)]
    del left_behind
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            out = convolution_blocks._convolve(block.conv1, image)
        assert out.dtype == torch.bfloat16
        out.backward(gradient.bfloat16())
    finally:
        torch.set_num_threads(before)
    wide = weight.detach().double().requires_grad_()
    F.conv3d(image.double(), wide, padding=1).backward(gradient.double())
    assert (weight.grad - wide.grad).norm() < 1e-2 * wide.grad.norm()
