"""`instance_norm_act` on the Triton kernels: the contract of `tests/ops/test_instance_norm_act.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops import test_instance_norm_act as contract
from tests.ops.test_instance_norm_act import (  # noqa: F401 - collected here too, with the `backend` below
    test_constant_channels,
    test_differentiable_once,
    test_inplace_refuses_to_lose_a_gradient,
    test_large_means,
    test_memory_kept_for_the_backward,
    test_opcheck,
    test_result_has_the_memory_format_of_x,
    test_what_is_not_finite_stays_in_its_channel,
)

MANY_PROGRAMS = 10_000
"""From this many channels on, a volume has too many programs for an interpreter."""


SMALLER = {(12, 13, 11): (6, 6, 6), (9, 9, 9): (5, 5, 5)}
"""Extents in place of those of the contract: the interpreter's tiles have an eighth of the elements of a GPU's."""


def fitting(case: contract.Case) -> contract.Case:
    """`case` with as many tiles as on a GPU."""
    return replace(case, shape=(*case.shape[:2], *SMALLER.get(case.shape[2:], case.shape[2:])))


@pytest.fixture
def backend() -> str:
    return "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case", [fitting(c) for c in contract.CASES if c.shape[1] < MANY_PROGRAMS], ids=lambda case: case.name
)
def test_contract(backend, case, dtype):
    contract.check(backend, case, dtype)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "strided"])
@pytest.mark.parametrize("residual", ["none", "plain", "normalized"])
def test_inplace(backend, residual, layout):
    contract.test_inplace(backend, torch.float32, residual, layout)


@pytest.mark.parametrize("voxels", [64, 65, 130])
def test_both_sides_of_a_small_volume(backend, voxels):
    """One launch up to 64 voxels, several parts beyond."""
    contract.check(backend, contract.Case("edge", (2, 20, voxels), "normalized"), torch.float32)


def test_repeats_bit_by_bit(backend):
    case = contract.Case("repeats", (2, 20, 9, 9, 9), "normalized")
    leaves, grad_out = contract.make_inputs(case, torch.float32)

    def run() -> list[torch.Tensor]:
        out = contract.fused(case, leaves, backend)
        return [out, *torch.autograd.grad(out, leaves, grad_out)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
