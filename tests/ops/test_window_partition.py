"""`window_partition` and `window_reverse`: every backend against pad, roll and partition written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monai.networks.nets import swin_unetr as monai

from swin_kernels import window_partition, window_reverse

from .cases import laid_out

ANY_DTYPE = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
)

# spatial, window, shift
GRIDS = [
    ((6, 4), (3, 2), (0, 0)),
    ((7, 5), (3, 2), (2, 1)),
    ((2, 8), (3, 3), (1, 1)),
    ((4, 4, 6), (2, 2, 3), (0, 0, 0)),
    ((4, 4, 6), (2, 2, 3), (1, 1, 1)),
    ((5, 4, 7), (2, 2, 3), (1, 1, 2)),
    ((2, 3, 3), (4, 3, 5), (2, 1, 2)),
    ((3, 7, 4), (4, 3, 4), (2, 2, 1)),
    ((5, 3, 3), (3, 3, 3), (2, 0, 0)),
    ((1, 1, 1), (1, 1, 1), (0, 0, 0)),
    ((9, 8, 7), (7, 7, 7), (3, 3, 3)),
]


def expected_windows(x: torch.Tensor, window: tuple[int, ...], shift: tuple[int, ...]) -> torch.Tensor:
    """MONAI's pad, roll and partition."""
    spatial = x.shape[1:-1]
    window, shift = monai.get_window_size(spatial, window, shift)
    ends = [extent for s, w in zip(reversed(spatial), reversed(window), strict=True) for extent in (0, -s % w)]
    padded = F.pad(x, (0, 0, *ends))  # (B, *padded, C)
    rolled = torch.roll(padded, [-s for s in shift], tuple(range(1, x.dim() - 1)))
    return monai.window_partition(rolled, window)  # (B·nW, n, C)


def values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    x = torch.arange(1, 1 + math.prod(shape)).reshape(shape)
    return x % 2 == 0 if dtype == torch.bool else (x % 251).to(dtype)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", ANY_DTYPE, ids=str)
@pytest.mark.parametrize(("spatial", "window", "shift"), GRIDS, ids=str)
def test_partition_and_back(backend, spatial, window, shift, dtype, batch):
    x = values((batch, *spatial, 5), dtype)
    windows = window_partition(x, window, shift, backend=backend)
    assert torch.equal(windows, expected_windows(x, window, shift))
    assert torch.equal(window_reverse(windows, window, shift, spatial, backend=backend), x)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_grids(backend, data):
    axes = data.draw(st.sampled_from([2, 3]))
    spatial = tuple(data.draw(st.integers(1, 12)) for _ in range(axes))
    window = tuple(data.draw(st.integers(1, 8)) for _ in range(axes))
    shift = tuple(data.draw(st.integers(0, w - 1)) for w in window)
    channels = data.draw(st.integers(1, 20))
    layout = data.draw(st.sampled_from(["contiguous", "channels_first", "strided"]))
    x = laid_out(torch.randn(data.draw(st.integers(1, 3)), *spatial, channels), layout)
    windows = window_partition(x, window, shift, backend=backend)
    assert torch.equal(windows, expected_windows(x, window, shift))
    assert torch.equal(window_reverse(windows, window, shift, spatial, backend=backend), x)
    # A transposed copy of the windows: same values, other strides.
    turned = windows.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(window_reverse(turned, window, shift, spatial, backend=backend), x)


def test_empty_batch(backend):
    x = torch.randn(0, 5, 4, 6, 3)
    windows = window_partition(x, (3, 2, 3), 1, backend=backend)
    assert windows.shape == (0, 18, 3)
    assert window_reverse(windows, (3, 2, 3), 1, (5, 4, 6), backend=backend).shape == x.shape


def test_result_is_a_copy(backend):
    """One window over the whole volume could be a view; writing to it must not reach the input."""
    x = torch.randn(1, 2, 2, 3)
    windows = window_partition(x, 2, backend=backend)
    windows.zero_()
    assert x.abs().min() > 0
    back = window_reverse(windows, 2, 0, (2, 2), backend=backend)
    back.fill_(1)
    assert windows.abs().max() == 0


@pytest.mark.parametrize(("spatial", "window", "shift"), GRIDS[:-1], ids=str)
def test_gradcheck_twice(backend, spatial, window, shift):
    """Both are linear and each other's backward, so they differentiate any number of times."""
    x = torch.randn(1, *spatial, 1, dtype=torch.float64, requires_grad=True)
    windows = window_partition(x, window, shift, backend=backend).detach().requires_grad_()
    for function, argument in (
        (lambda t: window_partition(t, window, shift, backend=backend), x),
        (lambda t: window_reverse(t, window, shift, spatial, backend=backend), windows),
    ):
        large = math.prod(spatial) > 40  # then along random directions instead of every element
        assert torch.autograd.gradcheck(function, argument, fast_mode=large)
        assert torch.autograd.gradgradcheck(function, argument, fast_mode=large)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("spatial", "window", "shift"), [GRIDS[1], GRIDS[7]], ids=str)
def test_opcheck(backend, spatial, window, shift, dtype):
    x = torch.randn(2, *spatial, 3).to(dtype).requires_grad_()
    ops = torch.ops.swin_kernels
    torch.library.opcheck(ops.window_partition.default, (x, window, shift, backend))
    windows = ops.window_partition(x, window, shift, backend).detach().requires_grad_()
    torch.library.opcheck(ops.window_reverse.default, (windows, window, shift, spatial, backend))


class RoundTrip(torch.nn.Module):
    """A user's own arithmetic between partition and reverse."""

    def __init__(self, backend: str):
        super().__init__()
        self.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        windows = window_partition(x, (3, 2, 3), 1, backend=self.backend)
        windows = windows - windows.mean(1, keepdim=True)
        return window_reverse(windows, (3, 2, 3), 1, (5, 4, 6), backend=self.backend)


def test_compile_and_export(backend):
    module = RoundTrip(backend)
    x = torch.randn(2, 5, 4, 6, 3, requires_grad=True)
    eager = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, eager)
    weight = torch.randn_like(eager)
    for a, b in zip(*(torch.autograd.grad(out, x, weight) for out in (eager, compiled)), strict=True):
        torch.testing.assert_close(a, b)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},))
    other = torch.randn(5, *x.shape[1:])
    torch.testing.assert_close(program.module()(other), module(other))


def test_bits_do_not_depend_on_threads(cpu_backend, threads):
    x = torch.randn(2, 15, 9, 8, 48)
    expected = expected_windows(x, (7, 7, 7), (3, 3, 3))
    for count in (1, 2, 3, 7):
        threads(count)
        windows = window_partition(x, 7, 3, backend=cpu_backend)
        assert torch.equal(windows, expected)
        assert torch.equal(window_reverse(windows, 7, 3, (15, 9, 8), backend=cpu_backend), x)
