"""The Triton kernels as machine code for sm_80, sm_90 and sm_100, compiled without a GPU."""

from __future__ import annotations

import pytest

from swin_kernels.backends import BACKENDS
from swin_kernels.ops import OPERATORS

triton = pytest.importorskip("triton", reason="Triton is not installed")

from . import compile_gate  # noqa: E402 - it imports Triton

SUBJECTS = compile_gate.subjects()
WORSE = 1.05
"""An instruction count may be this many times the committed one."""


@pytest.fixture(scope="module")
def reports():
    """The report of every subject; printed, so that ``pytest -s`` shows what the loops execute."""
    found = compile_gate.reports(SUBJECTS)
    for one in found:
        print(one)
    return dict(zip(SUBJECTS, found, strict=True))


@pytest.fixture(scope="module")
def committed():
    version, table = compile_gate.load()
    if version != triton.__version__:
        pytest.skip(f"the table was written with Triton {version}; this is {triton.__version__}")
    return table


def test_every_kernel_is_compiled():
    assert {subject.kernel for subject in SUBJECTS} == set(compile_gate.MODULES)
    kernels = (BACKENDS["triton"].kernel(operator.call_type.kernel) for operator in OPERATORS.values())
    kernels = {kernel for kernel in kernels if kernel is not None}
    jitted = {
        name
        for module in {*compile_gate.MODULES.values(), *kernels}
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and value.params[-1].is_constexpr and not name.startswith("_")
    }
    helpers = {"look_up", "padded_tokens", "to_fragments", "from_fragments", "locate"}
    assert jitted - helpers == set(compile_gate.MODULES)


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_fits(reports, subject):
    found = reports[subject]
    assert found.spills == 0, f"{found.spills} instructions spill registers"
    assert found.shared_bytes <= compile_gate.SHARED_MEMORY[subject.architecture]


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.kernel in compile_gate.SCORE_KERNELS], ids=str)
def test_scores_stay_on_chip(reports, subject):
    """One exponential per score, and far fewer memory instructions than scores."""
    found = reports[subject]
    assert 31 <= found.exp <= 48  # 1,000 scores are 31.25 warp instructions; the forward rescales one row per tile
    assert found.global_ <= (45 if subject.expanded and subject.head_dim <= 16 else 125)
    if subject.dtype != "fp32" and subject.architecture < 100:  # sm_100 issues them from a branch outside the loop
        assert found.tensor > 0


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_instruction_mix(reports, committed, subject):
    """Fails if the code got worse, or if the table lacks a row; write it again to accept the change."""
    found = reports[subject]
    if not found.loops and found.key not in committed:
        return
    assert found.key in committed, "run python -m tests.triton.compile_gate"
    before = committed[found.key]
    for name in ("registers", "shared_bytes", "tensor", "exp", "fp32", "shared", "global_", "all"):
        now, then = getattr(found, name), getattr(before, name)
        assert now <= max(WORSE * then, then + 2), f"{name}: {now}, was {then}; python -m tests.triton.compile_gate"
