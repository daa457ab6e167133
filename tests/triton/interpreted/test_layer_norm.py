"""`layer_norm` on the Triton kernels: the contract of `tests/ops/test_layer_norm.py`."""

from __future__ import annotations

import pytest
import torch

from tests.ops import test_layer_norm as contract
from tests.ops.test_layer_norm import (  # noqa: F401 - collected here too, with the `backend` below
    test_constant_rows,
    test_differentiable_once,
    test_opcheck,
    test_what_is_not_finite_stays_in_its_row,
)


@pytest.fixture
def backend() -> str:
    return "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", contract.CASES, ids=lambda case: case.name)
def test_contract(backend, case, dtype):
    contract.check(backend, case, dtype)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16], ids=str)
def test_rounds_once(backend, out_dtype):
    contract.check_rounding(backend, torch.float16, out_dtype)


def test_repeats_bit_by_bit(backend):
    inputs, grad_out = contract.make_inputs(contract.Case("repeats", (9, 50, 20)), torch.float32)

    def run() -> list[torch.Tensor]:
        return contract.results(lambda *t: contract.layer_norm(*t, backend=backend), inputs, grad_out)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
