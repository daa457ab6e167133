"""`convolution` on the Triton kernels, against PyTorch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from swin_kernels import convolution

CASES = [
    pytest.param((1, 1, 6, 5, 7), 0, 5, 3, id="one channel"),
    pytest.param((2, 4, 5, 6, 9), 0, 70, 3, id="four channels, two blocks of outputs"),
    pytest.param((1, 2, 1, 1, 1), 0, 3, 3, id="one voxel"),
    pytest.param((2, 1, 6, 5, 7), 0, 48, 1, id="1×1×1 of one channel"),
    pytest.param((0, 1, 4, 4, 4), 0, 3, 3, id="batch 0"),
    pytest.param((2, 48, 9, 6, 7), 0, 48, 3, id="48 channels"),
    pytest.param((1, 48, 5, 4, 20), 48, 48, 3, id="a concatenation"),
    pytest.param((1, 96, 3, 4, 5), 96, 64, 3, id="a wide concatenation"),
    pytest.param((1, 16, 1, 1, 1), 80, 5, 3, id="one voxel of a concatenation"),
    pytest.param((2, 16, 7, 6, 7), 32, 20, 1, id="1×1×1 of a concatenation"),
]


@pytest.mark.parametrize(("shape", "beside", "channels", "kernel"), CASES)
def test_contract(shape, beside, channels, kernel):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).half()
    skip = torch.randn(shape[0], beside, *shape[2:], generator=generator).half() if beside else None
    weight = torch.randn(channels, shape[1] + beside, *[kernel] * 3, generator=generator).half()
    out = convolution(x, weight, skip, backend="triton")
    both = x if skip is None else torch.cat([x, skip], 1)
    truth = F.conv3d(both.double(), weight.double(), padding=kernel // 2)
    assert out.shape == truth.shape
    assert (out.double() - truth).norm() <= 5e-4 * truth.norm()


def test_gradient_is_pytorchs():
    """The kernel is only for the forward: if no backend is forced, the backward goes to PyTorch's convolution."""
    x = torch.randn(1, 1, 6, 5, 7).half()
    weight = torch.randn(5, 1, 3, 3, 3).half().requires_grad_()
    with pytest.raises(RuntimeError, match="gradients of a convolution have no kernel"):
        convolution(x, weight, backend="triton").sum().backward()


@pytest.mark.parametrize(
    ("shape", "weight", "message"),
    [
        ((1, 5, 4, 4, 4), (2, 5, 3, 3, 3), "5 \\+ 0 input channels"),
        ((1, 16, 4, 4, 4), (65, 16, 3, 3, 3), "65 output channels"),
        ((1, 1, 4, 4), (2, 1, 3, 3), "2 axes"),
    ],
)
def test_declines(shape, weight, message):
    with pytest.raises(RuntimeError, match=message):
        convolution(torch.zeros(shape).half(), torch.zeros(weight).half(), backend="triton")
