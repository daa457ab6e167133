"""The emulator's instructions: rounding, accuracy and layouts of the PTX ISA."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from . import builds


def floats() -> np.ndarray:
    """float32 values of every exponent, ties of both 16-bit types and their neighbours, zeros, infinities."""
    random = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    top = random[:2000].astype(np.int64) & 0xFFFFE000
    near = np.concatenate([(top | tie) + step for tie in (0x8000, 0x1000) for step in (-1, 0, 1)])
    special = np.array([0.0, -0.0, np.inf, -np.inf, 65504, 65519.996, 65520, 2**-24, 2**-25, 3 * 2**-26], np.float32)
    found = np.concatenate([random.view(np.float32), near.astype(np.uint32).view(np.float32), special])
    return found[~np.isnan(found)]


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_conversion_rounds_to_nearest_even(name, dtype):
    x = floats()
    expected = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(getattr(builds.load(), f"to_{name}")(x), expected)


def test_exp2_is_as_inaccurate_as_the_hardware():
    x = np.linspace(-126, 127, 100_001, dtype=np.float32)
    truth = np.exp2(x.astype(np.float64))
    error = np.abs(builds.load().exp2_approx(x) / truth - 1)
    assert 2**-23 < error.max() < 2**-22 + 2**-24
    exp2 = builds.load().exp2_approx
    assert exp2(np.float32(-126.5)) == 0  # subnormal results are flushed
    assert exp2(np.float32(-np.inf)) == 0
    assert exp2(np.float32(1e-40)) == 1
    assert exp2(np.float32(128.5)) == np.inf


def test_log2_and_reciprocal_are_as_inaccurate_as_the_hardware():
    module, x = builds.load(), np.geomspace(2.0**-126, 2.0**126, 100_001, dtype=np.float32)
    error = np.abs(module.reciprocal_approx(x) * x.astype(np.float64) - 1)
    assert 2**-24 < error.max() < 2**-23 + 2**-24
    truth = np.log2(x.astype(np.float64))
    error = np.abs(module.log2_approx(x) - truth) / np.where((x > 0.5) & (x < 2), 1, np.abs(truth))
    assert 2**-23 < error.max() < 2**-22 + 2**-24
    assert module.log2_approx(np.float32(1)) == 0
    assert module.log2_approx(np.float32(0)) == -np.inf
    assert module.reciprocal_approx(np.float32(0)) == np.inf
    assert module.reciprocal_approx(np.float32(np.inf)) == 0


def pack(pairs: np.ndarray) -> np.ndarray:
    """Pairs of integers that bfloat16 holds exactly, as registers; the first in the lower half."""
    bits = pairs.astype(np.float32).view(np.uint32) >> 16
    return bits[..., 0] | bits[..., 1] << 16


def test_fragments_of_mma():
    """Registers filled by the formulas of the PTX ISA, section "Matrix Fragments for mma.m16n8k16"."""
    a = np.random.default_rng(0).integers(-8, 9, (16, 16))
    b = np.random.default_rng(1).integers(-8, 9, (16, 8))
    c = np.random.default_rng(2).integers(-8, 9, (16, 8))
    registers = np.zeros((32, 10), np.uint32)
    result = np.zeros((32, 4), np.float32)
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        values = []
        for i in range(8):  # a0 to a7
            row = group if i < 2 or 4 <= i < 6 else group + 8
            values.append(a[row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)])
        for i in range(4):  # b0 to b3
            values.append(b[thread * 2 + (i & 1) + (8 if i >= 2 else 0), group])
        registers[lane, :6] = pack(np.reshape(values, (6, 2)))
        c_of_lane = [c[group if i < 2 else group + 8, thread * 2 + (i & 1)] for i in range(4)]
        registers[lane, 6:] = np.array(c_of_lane, np.float32).view(np.uint32)
    builds.load().planted("mma", "none", registers, result)
    found = np.zeros((16, 8))
    for lane in range(32):
        for i in range(4):
            found[lane // 4 if i < 2 else lane // 4 + 8, lane % 4 * 2 + (i & 1)] = result[lane, i]
    np.testing.assert_array_equal(found, a @ b + c)


def test_fragments_of_mma_of_half_the_depth():
    """The same formulas for m16n8k8."""
    a = np.random.default_rng(0).integers(-8, 9, (16, 8)).astype(np.float16)
    b = np.random.default_rng(1).integers(-8, 9, (8, 8)).astype(np.float16)
    c = np.random.default_rng(2).integers(-8, 9, (16, 8)).astype(np.float32)
    registers, result = np.zeros((32, 7), np.uint32), np.zeros((32, 4), np.float32)
    for lane in range(32):
        group, pair = lane // 4, slice(lane % 4 * 2, lane % 4 * 2 + 2)
        for i, values in enumerate((a[group, pair], a[group + 8, pair], b[pair, group])):
            registers[lane, i] = np.ascontiguousarray(values).view(np.uint32)[0]
        registers[lane, 3:] = np.concatenate([c[group, pair], c[group + 8, pair]]).view(np.uint32)
    builds.load().planted("mma_half", "none", registers, result)
    expected = a.astype(np.float32) @ b.astype(np.float32) + c
    for lane in range(32):
        group, pair = lane // 4, slice(lane % 4 * 2, lane % 4 * 2 + 2)
        np.testing.assert_array_equal(result[lane], np.concatenate([expected[group, pair], expected[group + 8, pair]]))


@pytest.mark.parametrize("transposed", [False, True])
def test_fragments_of_ldmatrix(transposed):
    """Lane 4 g + t takes elements 2t and 2t+1 of row g of each matrix, or of its transpose."""
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    result = np.zeros((32, 4), np.uint32)
    builds.load().planted("ldmatrix", "transposed" if transposed else "none", matrices, result)
    seen = matrices.transpose(0, 2, 1) if transposed else matrices
    for lane in range(32):
        pair = seen[:, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2].astype(np.uint32)
        np.testing.assert_array_equal(result[lane], pair[:, 0] | pair[:, 1] << 16)


def test_sums_of_tensor_cores_are_cut():
    """Anything below 24 bits of the largest term is cut off, towards zero; float32 addition would round it up."""
    registers = np.zeros((32, 10), np.uint32)
    registers[:, 6:] = np.float32(1).view(np.uint32)  # C = 1
    registers[:, 0] = pack(np.array([2.0**-12, 0]))  # A[g][2t] for all t
    registers[:, 4] = pack(np.array([1.75 * 2.0**-13, 0]))  # B[2t][g]: four products of 1.75 · 2^-25, cut to 2^-25 … 0
    result = np.zeros((32, 4), np.float32)
    builds.load().planted("mma", "none", registers, result)
    assert (result[:, :2] == 1).all()
    assert np.float32(1 + 4 * 1.75 * 2.0**-25) > 1
