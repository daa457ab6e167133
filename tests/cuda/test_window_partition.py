"""`csrc/cuda/window_partition.cu` on the CPU: every element lands where the reference puts it, and no other moves."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from swin_kernels.backends.reference import window_partition as reference
from swin_kernels.geometry import WindowGrid

from ..ops.test_window_partition import GRIDS
from . import emulated

DTYPES = (torch.uint8, torch.int16, torch.float32, torch.float64, torch.complex128)
"""One for each size of an element."""


@pytest.mark.parametrize(("spatial", "window", "shift"), GRIDS, ids=str)
def test_partition_and_back(spatial, window, shift):
    for dtype, channels in itertools.product(DTYPES, (1, 3, 8, 48)):
        shape = (2, *spatial, channels)
        x = (torch.arange(1, 1 + math.prod(shape)) % 251).reshape(shape).to(dtype)
        windows = emulated.window_partition(x, window, shift)
        assert torch.equal(windows, reference.forward(x, WindowGrid.of(spatial, window, shift)))
        assert torch.equal(emulated.window_reverse(windows, window, shift, spatial), x)


def test_empty_batch():
    windows = emulated.window_partition(torch.empty(0, 5, 4, 6, 3), (3, 2, 3), (1, 1, 0))
    assert windows.shape == (0, 18, 3)
    assert emulated.window_reverse(windows, (3, 2, 3), (1, 1, 0), (5, 4, 6)).shape == (0, 5, 4, 6, 3)
