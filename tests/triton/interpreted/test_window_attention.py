"""The contract of `window_attention` on the Triton kernels."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch

from swin_kernels import explain
from swin_kernels.backends.reference import window_attention as reference
from swin_kernels.backends.triton import window_attention as kernels
from swin_kernels.backends.triton.tiles import Tile, override
from swin_kernels.geometry import WindowGrid
from tests.ops.cases import (
    CASES,
    SATURATED_CASES,
    Case,
    cases,
    check_forward_backward,
    check_gradients_in_16_bits,
    gradients,
    make_inputs,
    run,
)

DTYPES = (torch.float32, torch.float16)  # the interpreter multiplies bfloat16 wrongly


def steps(case: Case) -> int:
    """Score tiles of a pass, which determine the interpreter's time."""
    window = [min(s, w) for s, w in zip(case.spatial, case.window, strict=True)]
    windows = math.prod(-(-s // w) for s, w in zip(case.spatial, window, strict=True))
    tokens = math.prod(window)
    tile = 16 if tokens <= 16 else 32 if tokens <= 64 else 64
    return case.batch * windows * case.heads * (-(-tokens // tile)) ** 2


LONG = ("3d clipped padded shifted",)
EVERY_CASE = os.environ.get("SWIN_KERNELS_EVERY_CASE") == "1"
"""All cases in both dtypes: several minutes. Otherwise short cases, every second one in each dtype, and `LONG`."""

PAIRS = [
    pytest.param(case, dtype, id=f"{case.name}, {dtype}")
    for index, dtype in enumerate(DTYPES)
    for place, case in enumerate(cases(dtype))
    if EVERY_CASE or (place % 2 == index and (steps(case) <= 16 or case.name in LONG))
]


@pytest.mark.parametrize(("case", "dtype"), PAIRS)
def test_contract(case, dtype):
    check_forward_backward("triton", case, dtype)


@pytest.mark.parametrize("case", SATURATED_CASES, ids=lambda case: case.name)
def test_gradients_where_the_softmax_is_saturated(case):
    check_gradients_in_16_bits("triton", case, torch.float16)


def test_gradients_where_the_softmax_is_saturated_with_dropout():
    case = next(case for case in SATURATED_CASES if case.magnitude == 3)
    check_gradients_in_16_bits("triton", replace(case, dropout_p=0.3), torch.float16)


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


SMALL = case_named("2d padded shifted")
WIDE = Case("several tiles", (5, 8), (4, 8), (2, 3), heads=1)  # pads, shifts; 32 tokens in a window


@pytest.mark.parametrize(
    ("rows", "columns", "warps", "dtype"),
    [(16, 32, 1, torch.float16), (32, 16, 2, torch.float16), (32, 32, 1, torch.float16), (16, 32, 1, torch.float32)],
)
def test_any_tile(rows, columns, warps, dtype):
    with override(Tile(rows, columns, warps, programs=1)):
        check_forward_backward("triton", WIDE, dtype)


def test_bias_looked_up_in_the_table(monkeypatch):
    """Beyond `BIAS_LIMIT` no bias tile is stored, and its gradient is formed one head at a time."""
    monkeypatch.setattr(kernels, "BIAS_LIMIT", 0)
    check_forward_backward("triton", SMALL, torch.float32)


def test_tf32_reads_fragments_of_float32(monkeypatch):
    """The interpreter multiplies exactly, so only the order of the bias tiles differs."""
    monkeypatch.setattr(kernels, "fp32_precision", lambda: "tf32")
    check_forward_backward("triton", WIDE, torch.float32)


def test_repeats_bit_by_bit():
    inputs = make_inputs(SMALL, torch.float32)
    first, second = ([out := run("triton", SMALL, inputs), *gradients(out, inputs)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_log_sum_exp_serves_any_backend():
    inputs = make_inputs(SMALL, torch.float32)
    grid = WindowGrid.of(SMALL.spatial, SMALL.window, SMALL.shift)
    arguments = (inputs.qkv.detach(), inputs.bias_table.detach(), inputs.pad_qkv.detach(), None, grid, 0.5, 0.0)
    out, lse = kernels.forward(*arguments)
    expected_out, expected_lse = reference.forward(*arguments)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)


def test_nan_in_pad_stays_in_padded_windows():
    """A padding token that is NaN spoils the windows it lies in and no others."""
    inputs = make_inputs(SMALL, torch.float32)
    pad = torch.full_like(inputs.pad_qkv, math.nan)
    grid = WindowGrid.of(SMALL.spatial, SMALL.window, SMALL.shift)
    arguments = (inputs.qkv.detach(), inputs.bias_table.detach(), pad, None, grid, 0.5, 0.0)
    torch.testing.assert_close(kernels.forward(*arguments)[0], reference.forward(*arguments)[0], equal_nan=True)


def reason(dtype: torch.dtype, head_dim: int = 4, window: int = 2, extent: int = 4) -> str | None:
    qkv = torch.zeros(1, extent, extent, extent, 3 * head_dim, dtype=dtype)
    return explain(qkv, torch.zeros((2 * window - 1) ** 3, 1, dtype=dtype), window)["triton"]


def test_reasons():
    assert reason(torch.float32) is None
    assert "float64" in reason(torch.float64)
    assert "interpreter" in reason(torch.bfloat16)
    assert "head_dim 129" in reason(torch.float32, head_dim=129)
    assert "4913 tokens" in reason(torch.float32, window=17, extent=17)


@pytest.mark.parametrize(
    ("batch", "spatial", "named"),
    [(1, (2**16, 2**15), "the volume is"), (1, (2**24 + 1, 1), "the volume is"), (2**8, (2**15, 2**15), "windows")],
)
def test_more_than_the_kernels_count_is_refused(batch, spatial, named):
    """Before anything is allocated or launched: tensors without memory get that far."""
    qkv = torch.empty(batch, *spatial, 3, dtype=torch.float16, device="meta")
    grid = WindowGrid.of(spatial, (1, 1), (0, 0))
    with pytest.raises(RuntimeError, match=f"window_attention: .*{named}"):
        kernels.forward(qkv, qkv.new_empty(1, 1), None, None, grid, 1.0, 0.0)
