"""Every operator of the registry against plain PyTorch, the reference backend, on the call that the doctor times."""

from __future__ import annotations

import pytest
import torch
from peers import exact_gate, gate

from swin_kernels.backends import REFERENCE
from swin_kernels.doctor import evaluate
from swin_kernels.ops import OPERATORS


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(versus, name):
    operator = OPERATORS[name]
    example = operator.timed["cpu"]
    tensors = example.tensors(torch.float32)
    variants = {
        "PyTorch": lambda: evaluate(operator, example, tensors, REFERENCE),
        "ours": lambda: evaluate(operator, example, tensors, None),
    }
    ours, plain = ([*variant().values()] for variant in (variants["ours"], variants["PyTorch"]))
    versus(
        f"{name}, forward + backward",
        variants,
        gate=(exact_gate if operator.exact else gate)(ours, plain),
        sizes=example.name,
        dtype=torch.float32,
    )
