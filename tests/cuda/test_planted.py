"""The emulator itself: faults planted in small kernels are caught, and the same kernels without a fault pass."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

from . import builds

FLOATS = np.random.default_rng(0).standard_normal(64).astype(np.float32)
FACTORS = np.random.default_rng(1).integers(-8, 9, 16 * 16 + 16 * 8).astype(np.float32)  # exact in bfloat16
BFLOAT16 = (FACTORS.view(np.uint32) >> 16).astype(np.uint16)
PRODUCT = FACTORS[:256].reshape(16, 16) @ FACTORS[256:].reshape(16, 8)
EXPECTED = {
    "turn": FLOATS[::-1],
    "turn_warps": FLOATS.reshape(2, 32)[:, ::-1].ravel(),
    "turn_copies": FLOATS[::-1],
    "multiply": PRODUCT,
}

RACE = r"race: (reads|writes) byte \d+ of shared memory, which thread \d+ (read|wrote) at line \d+: no barrier between"
NO_WAIT = r"byte \d+ of shared memory while a copy by thread \d+ is on its way to it: no wait before"
REPORTED = {
    "turn": {
        "missing barrier": RACE,
        "early overwrite": RACE,
        "past shared memory": r"thread 63: writes 4 bytes at 256 of 256 bytes of shared memory",
        "misaligned": r"reads 4 bytes at 2 of 256 bytes of shared memory: not aligned",
    },
    "turn_warps": {
        "shuffle for barrier": RACE,
        "parted lanes": r"the lanes of a warp part: this one is at \w+, others at (warp_barrier|shuffle_xor)",
        "parted block": r"no thread can go on: thread 0 and on: block_barrier; thread 1 and on: warp_barrier",
    },
    "turn_copies": {
        "missing wait": f"reads {NO_WAIT}",
        "read before barrier": RACE,
        "overwrite in flight": f"thread 0: writes {NO_WAIT}",
    },
}
"""Faults that the emulator reports in words."""

OUT_OF_BOUNDS = {
    "past shared memory by hand": "something was written just before or behind shared memory",
    "past the output": "something was written just before or behind the output",
}
"""Faults of ``turn`` that only a red zone detects: at once under AddressSanitizer, after the launch without it."""


def run(kernel: str, fault: str) -> np.ndarray:
    source = BFLOAT16 if kernel == "multiply" else FLOATS
    out = np.empty(EXPECTED[kernel].shape, np.float32)
    builds.load().planted(kernel, fault, source, out)
    return out


@pytest.fixture(params=[False, True], ids=["in order", "reversed"])
def order(request):
    """Blocks and threads take turns from the first to the last, or the other way round."""
    device = builds.load().device()
    device.reversed = request.param
    yield
    device.reversed = False


@pytest.mark.parametrize("kernel", EXPECTED)
def test_healthy(order, kernel):
    np.testing.assert_array_equal(run(kernel, "none"), EXPECTED[kernel])


@pytest.mark.parametrize(("kernel", "fault"), [(kernel, fault) for kernel in REPORTED for fault in REPORTED[kernel]])
def test_reported(order, kernel, fault):
    """With the block, the thread and the line."""
    with pytest.raises(RuntimeError, match=r"^block \(0, 0, 0\), thread \d+: ") as error:
        run(kernel, fault)
    assert re.search(REPORTED[kernel][fault], str(error.value)), error.value
    assert fault.startswith("parted") or re.search(r" \(planted\.cu:\d+\)", str(error.value)), error.value


@pytest.mark.parametrize("fault", OUT_OF_BOUNDS)
def test_red_zones(fault):
    with pytest.raises(RuntimeError, match=OUT_OF_BOUNDS[fault]):
        run("turn", fault)


@pytest.mark.parametrize("fault", ["wrong fragment", "not transposed"])
def test_wrong_fragments_give_wrong_numbers(fault):
    wrong = run("multiply", fault)
    assert np.isfinite(wrong).all()
    assert np.count_nonzero(wrong != PRODUCT) > PRODUCT.size // 2


@pytest.mark.parametrize("fault", ["none", *OUT_OF_BOUNDS])
def test_sanitized(fault):
    """AddressSanitizer stops at the store itself and names the line."""
    builds.build("sanitized")
    program = f"from tests.cuda import test_planted; print(test_planted.run('turn', {fault!r}).sum())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=builds.sanitizer_environment(),
        cwd=builds.ROOT,
        capture_output=True,
        text=True,
    )
    if fault == "none":
        assert done.returncode == 0, done.stderr
        np.testing.assert_allclose(float(done.stdout), FLOATS.sum(), rtol=1e-5)
    else:
        assert done.returncode != 0
        assert "ERROR: AddressSanitizer: use-after-poison" in done.stderr
        assert re.search(r"#0 .* in .*turn<.*planted\.cu:\d+", done.stderr)
