"""`csrc/cuda/window_attention_*.cu` on the CPU: the contract of `window_attention` against the float64 truth."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ..ops.cases import (
    BASE,
    CASES,
    LOW_PRECISION_CASES,
    NAMES,
    SATURATED_CASES,
    Case,
    assert_gradients_in_16_bits,
    expected,
    expected_of,
    make_inputs,
    plain_attention,
)
from ..ops.test_window_attention import random_cases
from ..ops.tolerances import assert_close, largest
from . import builds, emulated

HEAD_DIMS = (8, 16, 32, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SANITIZED = {
    "2d padded shifted",
    "3d clipped padded shifted",
    "3d without pad",
    "padding only window",
    "window 1 on one axis",
    "window 6 clipped in 7",
    "batch 0",
    "batch 2",
    "float32 table",
    *(f"head_dim {d}" for d in HEAD_DIMS),
}
"""Cases of the sanitized build: each way in which a kernel can reach beyond a tensor."""


def contract_cases() -> list[Case]:
    """The cases of every backend, with head_dim 8 where the kernels do not support theirs."""
    taken = [
        case if case.head_dim in HEAD_DIMS else replace(case, head_dim=8)
        for case in (*CASES, *LOW_PRECISION_CASES)
        if case.dropout_p == 0 and case.layout == "contiguous" and not case.name.startswith("head_dim")
    ]
    taken += [replace(BASE, name=f"head_dim {d}", head_dim=d) for d in HEAD_DIMS]
    taken += [Case(f"head_dim {d} 2d", (9, 14), (7, 7), (3, 3), head_dim=d, batch=2) for d in HEAD_DIMS]
    # Windows that end just before, at and just after what a step of the forward or a warp of the backward takes.
    taken += [Case(f"{n} tokens", (1, n), (1, n), heads=1, head_dim=16) for n in (31, 32, 33, 47, 48, 49, 63)]
    # More keys than a block of the backward takes at a time: gradients of q are carried from block to block.
    taken += [Case("several blocks of keys", (13, 12), (12, 12), (6, 0), heads=1, head_dim=64)]
    if os.environ.get("SWIN_EMULATION") == "sanitized":  # much slower
        taken = [case for case in taken if case.name in SANITIZED]
        assert len(taken) == len(SANITIZED)
    return taken


CONTRACT = [(case, dtype) for case in contract_cases() for dtype in DTYPES]
CONTRACT = [(case, dtype) for case, dtype in CONTRACT if not (case.float_table and dtype == torch.float32)]
# The largest case in one dtype only: for the others there are smaller ones of every kernel, and windows of 7 in 2D.
CONTRACT = [(case, dtype) for case, dtype in CONTRACT if case.name != "window 7" or dtype == torch.bfloat16]


@pytest.fixture
def device():
    """The emulated GPU, as it was after the test."""
    device = builds.load().device()
    before = {name: getattr(device, name) for name in dir(device) if not name.startswith("_")}
    yield device
    for name, value in before.items():
        setattr(device, name, value)


def check(case: Case, dtype: torch.dtype) -> None:
    """Check output, log-sum-exp and all gradients against the float64 truth (`tolerances.assert_close`)."""
    inputs = make_inputs(case, dtype)
    plain, truth = expected(case, dtype)
    if case.float_table:  # the kernels keep the bias as float16
        with torch.no_grad():
            inputs.bias_table.copy_(inputs.bias_table.half())
        plain, truth = expected_of(case, inputs)
    out, lse = emulated.forward(case, inputs)
    assert_close(NAMES[0], out, plain[0], truth[0], largest(truth[0]))
    if case.batch:
        wide = inputs.double()
        rows = [plain_attention(i.qkv, i.bias_table, i.pad_qkv, case)[1].detach() for i in (inputs, wide)]
        assert_close("log-sum-exp", lse, rows[0].float(), rows[1], largest(rows[1]))
    grads = emulated.backward(case, inputs, out, lse)
    assert all(torch.isfinite(grad).all() for grad in grads)
    scale = max(map(largest, truth[1:]))
    for name, grad, p, t in zip(NAMES[1:], grads, plain[1:], truth[1:], strict=False):  # one less without pad_qkv
        assert_close(name, grad, p, t, scale)


@pytest.mark.parametrize(("case", "dtype"), CONTRACT, ids=lambda x: getattr(x, "name", str(x)))
def test_contract(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SATURATED_CASES, ids=lambda case: case.name)
def test_gradients_where_the_softmax_is_saturated(case, dtype):
    inputs = make_inputs(case, dtype)
    assert_gradients_in_16_bits(case, inputs, emulated.backward(case, inputs, *emulated.forward(case, inputs)))


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY], ids=str)
@pytest.mark.parametrize("place", ["q", "k", "v", "pad_qkv", "bias_table"])
def test_not_finite(place, value, dtype):
    """NaN appears where it does in plain PyTorch and nowhere else; nor does infinity spread."""
    case = Case("not finite", (9, 6), (7, 7), (3, 3), heads=2, head_dim=8, batch=2)
    inputs = make_inputs(case, dtype)
    with torch.no_grad():
        if place in "qkv":
            inputs.qkv[1, 2, 3, "qkv".index(place) * 16 + 5] = value
        elif place == "pad_qkv":
            inputs.pad_qkv[2 * 16 + 5] = value  # v of padding tokens
        else:
            inputs.bias_table[40, 1] = value
    out, _ = emulated.forward(case, inputs)
    expected_out, _ = plain_attention(inputs.qkv, inputs.bias_table, inputs.pad_qkv, case)
    assert torch.equal(out.isfinite(), expected_out.isfinite())
    finite = expected_out.isfinite()
    assert finite.sum() > 0
    torch.testing.assert_close(out[finite], expected_out.detach()[finite], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_minus_infinity(dtype):
    """All first keys of a window may have such scores: then the others have all the weight."""
    case = Case("minus infinity", (1, 49), (1, 49), heads=1, head_dim=8)
    inputs = make_inputs(case, dtype)
    with torch.no_grad():
        inputs.qkv[..., 0] = 1  # a channel of q
        inputs.qkv[0, 0, :32, 8] = -INFINITY  # and of k
    out, _ = emulated.forward(case, inputs)
    expected_out, _ = plain_attention(inputs.qkv, inputs.bias_table, inputs.pad_qkv, case)
    assert out.isfinite().all()
    torch.testing.assert_close(out, expected_out.detach(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_scores(dtype):
    """A bias shared by all pairs changes nothing; relative to it, keys beyond the window would have infinite weight."""
    case = Case("low scores", (1, 49), (1, 49), heads=1, head_dim=16, bias=0.0, batch=2)
    results = []
    for shift in (0, -200):
        inputs = make_inputs(case, dtype)
        with torch.no_grad():
            inputs.bias_table.add_(shift)
        out, lse = emulated.forward(case, inputs)
        results.append([out, lse - shift, *emulated.backward(case, inputs, out, lse)])
    for value, shifted in zip(*results, strict=True):
        torch.testing.assert_close(shifted, value, rtol=0.02, atol=0.02)


SHARED_MEMORY = {80: (163, 164), 89: (99, 100), 90: (227, 228)}
"""KiB that a block and a multiprocessor have, by compute capability."""


def use(device, shared_per_block: int, shared_per_multiprocessor: int, multiprocessors: int) -> None:
    device.shared_per_block, device.shared_per_multiprocessor = shared_per_block, shared_per_multiprocessor
    device.multiprocessors = multiprocessors


@pytest.mark.parametrize("compute_capability", SHARED_MEMORY)
@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize(
    "case",
    [
        Case("2d", (15, 9), (7, 7), (3, 3), heads=3, head_dim=16),
        Case("two blocks of keys", (1, 150), (1, 150), head_dim=64, heads=1),
    ],
    ids=lambda case: case.name,
)
def test_contract_on_other_devices(device, case, multiprocessors, compute_capability):
    """Multiprocessors and shared memory decide how windows and tokens are cut, in 16 bits; in float32 see below."""
    device.compute_capability = compute_capability
    use(device, *(kibibytes << 10 for kibibytes in SHARED_MEMORY[compute_capability]), multiprocessors)
    check(case, torch.bfloat16)


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_contract_in_float32_on_other_devices(device, multiprocessors):
    device.multiprocessors = multiprocessors
    check(Case("2d", (15, 9), (7, 7), (3, 3), heads=3, head_dim=16), torch.float32)


@pytest.mark.parametrize("scale", [0.25, 0.3], ids=["exact", "inexact"])
@pytest.mark.parametrize(
    ("shared", "warps", "pieces"),
    [(64 << 10, 4, "all keys"), (20 << 10, 4, "32 keys"), (9800, 2, "32 keys, bias from memory")],
    ids=lambda x: str(x),
)
def test_forward_in_little_shared_memory(device, shared, warps, pieces, scale):
    """The bias stays in memory, or keys pass by in chunks, or both: each loop of the kernel, each kind of scale."""
    use(device, shared, shared + 1024, 1)
    case = Case("little", (15, 9), (7, 7), (3, 3), heads=3, head_dim=16, scale=scale)
    (*_, (_, _, threads, bytes_)) = builds.load().plan_forward(emulated.attention(case, torch.bfloat16))
    stage, row = 4 * 32 * 48, 32 * 48  # bytes of 32 keys, twice k and v; of 16 queries, twice
    expected_bytes = {
        "all keys": 2 * stage + warps * (row + 4 * 512),
        "32 keys": stage + warps * (row + 4 * 512),
        "32 keys, bias from memory": stage + warps * row,
    }
    assert (threads, bytes_) == (32 * warps, expected_bytes[pieces])
    inputs = make_inputs(case, torch.bfloat16)
    out, _ = emulated.forward(case, inputs)
    plain, truth = expected(case, torch.bfloat16)
    assert_close(NAMES[0], out, plain[0], truth[0], largest(truth[0]))


def test_largest_window():
    check(Case("largest window", (1, 32, 32), (1, 32, 32), heads=1, head_dim=8), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_order_of_blocks(device, dtype):
    case = Case("order", (5, 5, 7), (3, 3, 4), (1, 1, 2), batch=2, head_dim=16)
    inputs = make_inputs(case, dtype)
    results = []
    for device.reversed in (False, True):
        out, lse = emulated.forward(case, inputs)
        results.append([out, lse, *emulated.backward(case, inputs, out, lse)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "case",
    [
        replace(BASE, name="head_dim 4", head_dim=4),
        replace(BASE, name="head_dim 128", head_dim=128),
        Case("window of 4913", (17, 17, 17), (17, 17, 17), head_dim=16),
    ],
    ids=lambda case: case.name,
)
def test_declines(case):
    """The kernels decline what they cannot run, with a reason, and the launchers run nothing."""
    call = emulated.attention(case, torch.bfloat16)
    for declines in (builds.load().forward_declines, builds.load().backward_declines):
        assert len(declines(call)) > 20
    inputs = make_inputs(case, torch.bfloat16)
    with pytest.raises(RuntimeError, match=builds.load().forward_declines(call)):
        emulated.forward(case, inputs)


@settings(max_examples=16, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=random_cases(), head_dim=st.sampled_from(HEAD_DIMS), dtype=st.sampled_from(DTYPES))
def test_contract_on_random_cases(case, head_dim, dtype):
    case = replace(case, head_dim=head_dim, layout="contiguous", dropout_p=0.0)
    # Below a few thousand scores the 16-bit errors of plain PyTorch depend on a few elements' luck and are no measure.
    assume(case.scores > (3_000 if dtype.itemsize == 2 else 0) and case.scores < 100_000)
    check(case, dtype)
