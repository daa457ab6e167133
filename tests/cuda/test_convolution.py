"""`csrc/cuda/convolution.cu` on the CPU, through the backend's Python, against PyTorch's convolution in float64."""

from __future__ import annotations

import os
import re
import types

import pytest
import torch

from swin_kernels.backends.cuda import convolution
from swin_kernels.backends.reference import convolution as reference
from swin_kernels.ops.convolution import ConvolutionCall

from ..ops.tolerances import assert_close, largest
from . import emulated

CASES = {  # spatial, batch, channels of x, of skip and of the output
    "one voxel": ((1, 1, 1), 1, 48, 0, 48),
    "less than a tile, two instances": ((2, 3, 5), 2, 48, 0, 48),
    "one tile": ((4, 4, 16), 1, 48, 0, 48),
    "beyond a tile along each axis": ((5, 5, 17), 1, 48, 0, 48),
    "beside a skip": ((3, 5, 4), 2, 48, 48, 48),
    "wide": ((2, 2, 3), 1, 96, 48, 96),
}


PAIRS = [(name, dtype) for name in CASES for dtype in (torch.bfloat16, torch.float16)]
if os.environ.get("SWIN_EMULATION") == "sanitized":
    # Slower by far, and both types have the same bytes at the same places: the larger cases are in one of them.
    ONE = {"beyond a tile along each axis": torch.bfloat16, "beside a skip": torch.float16, "wide": torch.bfloat16}
    PAIRS = [(name, dtype) for name, dtype in PAIRS if ONE.get(name, dtype) == dtype]


@pytest.fixture(autouse=True)
def emulation(monkeypatch):
    """The emulated kernel behind the backend."""
    library = types.SimpleNamespace(convolution_forward=emulated.convolution)
    monkeypatch.setattr(convolution, "operators", lambda: library)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize(("name", "dtype"), PAIRS, ids=str)
def test_convolution(name, dtype):
    spatial, batch, channels, beside, out = CASES[name]
    x, skip = normal(batch, *spatial, channels).to(dtype), None
    if beside:
        skip = normal(batch, *spatial, beside).to(dtype)
    weight = normal(out, channels + beside, 3, 3, 3).to(dtype)
    value, plain = convolution.forward(x, skip, weight), reference.forward(x, skip, weight)
    truth = reference.forward(x.double(), None if skip is None else skip.double(), weight.double())
    assert_close("out", value, plain, truth, largest(truth))


@pytest.mark.parametrize("beside", [0, 48])
def test_gradients(beside):
    dtype, spatial = torch.bfloat16, (3, 4, 5)
    x, grad_out = normal(1, *spatial, 96).to(dtype), normal(1, *spatial, 48).to(dtype)
    skip = normal(1, *spatial, beside).to(dtype) if beside else None
    weight = normal(48, 96 + beside, 3, 3, 3).to(dtype)
    given = grad_out, x, skip, weight
    wide = [None if t is None else t.double() for t in given]
    wanted = [True, skip is not None, True]
    results = convolution.backward(*given, wanted), reference.backward(*given, wanted)
    for name, value, plain, truth in zip(
        ("x", "skip", "weight"), *results, reference.backward(*wide, wanted), strict=True
    ):
        if truth is None:
            assert value is None
        else:
            assert_close(f"grad of {name}", value, plain, truth, largest(truth))


def test_empty_batch():
    assert convolution.forward(normal(0, 2, 2, 2, 48).bfloat16(), None, normal(48, 48, 3, 3, 3).bfloat16()).numel() == 0


@pytest.mark.parametrize(
    ("dtype", "window", "channels", "reason"),
    [
        (torch.float32, (3, 3, 3), (48, 0, 48), "dtype torch.float32"),
        (torch.float64, (3, 3, 3), (48, 0, 48), "dtype torch.float64"),
        (torch.bfloat16, (3, 3), (48, 0, 48), "by 3×3;"),
        (torch.bfloat16, (1, 1, 1), (48, 0, 48), "by 1×1×1;"),
        (torch.bfloat16, (3, 3, 3), (48, 24, 48), r"channels \(48, 24, 48\)"),
        (torch.bfloat16, (3, 3, 3), (48, 0, 14), r"channels \(48, 0, 14\)"),
        (torch.bfloat16, (3, 3, 3), (96, 0, 96), "as fast for 96 output channels"),
    ],
)
def test_declined(dtype, window, channels, reason):
    declined = convolution.declines(ConvolutionCall(device="cuda", dtype=dtype, window=window, channels=channels))
    assert re.search(reason, declined)


@pytest.mark.parametrize("channels", [(48, 0, 48), (96, 48, 48)], ids=str)
def test_accepted(channels):
    assert (
        convolution.declines(ConvolutionCall(device="cuda", dtype=torch.float16, window=(3, 3, 3), channels=channels))
        is None
    )
