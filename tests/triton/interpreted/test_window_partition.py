"""`window_partition` and `window_reverse` on the Triton kernels: copies, so equal to the reference bit for bit."""

from __future__ import annotations

import pytest
import torch

from swin_kernels import window_partition, window_reverse

SHAPES = [
    pytest.param((5, 7), (3, 4), (1, 2), id="2D, padded, shifted"),
    pytest.param((3, 4, 5), (2, 4, 3), (1, 2, 0), id="3D, pads, clips, shifts"),
    pytest.param((2, 9, 8), (2, 9, 8), (0, 0, 0), id="one window of several token tiles"),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.bool, torch.int64]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize(("spatial", "window", "shift"), SHAPES)
def test_equals_reference(spatial, window, shift, dtype):
    x = torch.randn(2, *spatial, 5).mul(9).to(dtype)
    windows = window_partition(x, window, shift)
    assert torch.equal(windows, window_partition(x, window, shift, backend="reference"))
    assert torch.equal(window_reverse(windows, window, shift, spatial), x)


def test_more_channels_than_a_block():
    x = torch.randn(1, 3, 3, 200)
    windows = window_partition(x, 2, 1)
    assert torch.equal(windows, window_partition(x, 2, 1, backend="reference"))
    assert torch.equal(window_reverse(windows, 2, 1, (3, 3)), x)


def test_empty_batch():
    windows = window_partition(torch.randn(0, 3, 3, 5), 2)
    assert windows.shape == (0, 4, 5)
    assert window_reverse(windows, 2, 0, (3, 3)).shape == (0, 3, 3, 5)


def test_gradient():
    x = torch.randn(1, 3, 4, 2, requires_grad=True)
    weights = torch.randn(4, 4, 2)
    (window_partition(x, 2, 1) * weights).sum().backward()
    assert torch.equal(x.grad, window_reverse(weights, 2, 1, (3, 4), backend="reference"))
