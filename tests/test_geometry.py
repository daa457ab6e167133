"""`swin_kernels.geometry` against MONAI's roll, partition, mask and index; and against its C++ twin."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets import swin_unetr as monai

from swin_kernels import backends, geometry
from swin_kernels.geometry import WindowGrid

from .ops.cases import hashed_keep

EXAMPLES = settings(max_examples=150)


@st.composite
def grids(draw) -> WindowGrid:
    """Any grid of 2 or 3 axes: unpadded, padded, clipped, shifted or not."""
    axes = draw(st.sampled_from([2, 3]))
    spatial = [draw(st.integers(1, 15)) for _ in range(axes)]
    window = [draw(st.integers(1, 8)) for _ in range(axes)]
    return WindowGrid.of(spatial, window, [draw(st.integers(0, w - 1)) for w in window])


@EXAMPLES
@given(grid=grids(), shift=st.tuples(*[st.integers(0, 7)] * 3))
def test_clipping(grid, shift):
    shift = [s % w for s, w in zip(shift, grid.nominal, strict=False)]
    window, expected_shift = monai.get_window_size(grid.spatial, grid.nominal, shift)
    again = WindowGrid.of(grid.spatial, grid.nominal, shift)
    assert again.window == window
    assert again.shift == expected_shift
    assert again.is_shifted == any(expected_shift)


@EXAMPLES
@given(grid=grids())
def test_padding_and_counts(grid):
    volume = torch.zeros(1, *grid.spatial, 1)
    ends = [e for s, w in zip(reversed(grid.spatial), reversed(grid.window), strict=True) for e in (0, -s % w)]
    padded = F.pad(volume, (0, 0, *ends))
    assert grid.padded == tuple(padded.shape[1:-1])
    assert grid.is_padded == (padded.shape != volume.shape)
    windows = monai.window_partition(padded, grid.window)
    assert (grid.num_windows, grid.tokens) == tuple(windows.shape[:2])
    assert math.prod(grid.counts) == grid.num_windows


@EXAMPLES
@given(grid=grids())
def test_token_index(grid):
    raster = torch.arange(math.prod(grid.spatial)).view(1, *grid.spatial, 1)
    ends = [e for s, w in zip(reversed(grid.spatial), reversed(grid.window), strict=True) for e in (0, -s % w)]
    padded = F.pad(raster, (0, 0, *ends), value=-1)
    rolled = torch.roll(padded, [-s for s in grid.shift], tuple(range(1, 1 + len(grid.spatial))))
    index = geometry.token_index(grid)
    assert index.dtype == torch.long
    assert torch.equal(index, monai.window_partition(rolled, grid.window)[..., 0])


@EXAMPLES
@given(grid=grids())
def test_region_labels(grid):
    """Only whether two labels agree matters; MONAI numbers the regions differently."""
    labels = geometry.region_labels(grid)  # (nW, n)
    mask = geometry.MASK_VALUE * (labels[:, :, None] != labels[:, None, :])
    assert torch.equal(mask, monai.compute_mask(grid.padded, grid.window, grid.shift, "cpu"))


@EXAMPLES
@given(nominal=st.one_of(st.tuples(*[st.integers(1, 7)] * 2), st.tuples(*[st.integers(1, 5)] * 3)), data=st.data())
def test_bias_index(nominal, data):
    attention = monai.WindowAttention(4, 1, nominal)
    tokens = data.draw(st.integers(1, math.prod(nominal)))
    expected = attention.relative_position_index[:tokens, :tokens]
    index = geometry.bias_index(nominal, tokens)
    assert index.dtype == torch.long
    assert torch.equal(index, expected)
    assert geometry.bias_table_length(nominal) == attention.relative_position_bias_table.shape[0]


def test_bias_index_of_the_standard_window():
    index = geometry.bias_index((7, 7, 7), 343)
    assert torch.equal(index, monai.WindowAttention(4, 1, (7, 7, 7)).relative_position_index)


# Dropout

SEEDS = st.integers(0, 2**62 - 1)


@EXAMPLES
@given(seed=SEEDS, start=st.integers(0, 2**45), tokens=st.integers(1, 40), dropout_p=st.floats(0, 1, exclude_max=True))
def test_dropout_is_the_hash_in_32_bits(seed, start, tokens, dropout_p):
    rows = start + np.arange(6, dtype=np.int64).reshape(2, 3)
    keep = geometry.dropout_keep(torch.tensor([seed]), torch.from_numpy(rows), tokens, dropout_p)
    assert keep.dtype == torch.bool
    assert keep.shape == (2, 3, tokens)
    assert np.array_equal(keep.numpy(), hashed_keep(seed, rows, tokens, dropout_p))


def keep_sample(seed: int, dropout_p: float, rows: int = 2000, tokens: int = 343) -> np.ndarray:
    return geometry.dropout_keep(torch.tensor([seed]), torch.arange(rows), tokens, dropout_p).numpy()


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2**40 + 7, 2**62 - 1])
def test_dropout_rate(seed, dropout_p):
    """Rate overall, of every row and of every key, within five standard errors."""
    keep = keep_sample(seed, dropout_p)
    deviation = math.sqrt(dropout_p * (1 - dropout_p))
    for axis in (None, 0, 1):
        rate = keep.mean(axis=axis)
        count = keep.size if axis is None else keep.shape[axis]
        assert np.abs(rate - (1 - dropout_p)).max() < 5 * deviation / math.sqrt(count)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_dropout_is_uncorrelated():
    """Between neighbouring rows, neighbouring keys, and seeds that are one apart or differ only in the high word."""
    keep = keep_sample(11, 0.5)
    pairs = [
        (keep[:-1], keep[1:]),
        (keep[:, :-1], keep[:, 1:]),
        (keep, keep_sample(12, 0.5)),
        (keep, keep_sample(11 + 2**32, 0.5)),
    ]
    for a, b in pairs:
        assert abs(correlation(a, b)) < 5 / math.sqrt(a.size)


def test_dropout_of_nothing_keeps_everything():
    assert keep_sample(3, 0.0).all()


# The C++ twin


@pytest.fixture(scope="module")
def twin():
    if reason := backends.BACKENDS["cpu"].unavailable():
        pytest.skip(f"csrc/geometry.h is reached through the C++ library: {reason}")
    return torch.ops.swin_kernels_cpu


@EXAMPLES
@given(grid=grids())
def test_twin_windows(twin, grid):
    token_index, region_labels = twin.window_tokens(grid.spatial, grid.window, grid.shift)
    assert torch.equal(token_index, geometry.token_index(grid))
    ours = geometry.region_labels(grid)
    assert torch.equal(
        region_labels[:, :, None] == region_labels[:, None, :],
        ours[:, :, None] == ours[:, None, :],
    )


@EXAMPLES
@given(nominal=st.one_of(st.tuples(*[st.integers(1, 7)] * 2), st.tuples(*[st.integers(1, 5)] * 3)), data=st.data())
def test_twin_bias_index(twin, nominal, data):
    tokens = data.draw(st.integers(1, math.prod(nominal)))
    assert torch.equal(twin.bias_index(nominal, tokens), geometry.bias_index(nominal, tokens))


@EXAMPLES
@given(seed=SEEDS, start=st.integers(0, 2**45), tokens=st.integers(1, 40), dropout_p=st.floats(0, 1, exclude_max=True))
def test_twin_dropout(twin, seed, start, tokens, dropout_p):
    arguments = (torch.tensor([seed]), start + torch.arange(6).view(2, 3), tokens, dropout_p)
    assert torch.equal(twin.dropout_keep(*arguments), geometry.dropout_keep(*arguments))
