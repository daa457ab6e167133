"""`graphed` without a GPU: which calls are graphs, and when one is captured; `test_on_gpu.py` has the rest."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn as nn

import swin_kernels
from swin_kernels import cuda_graph, graphed


class Meta(nn.Module):
    """A network on tensors without values, for which no GPU is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.sum()


@pytest.fixture
def captures(monkeypatch) -> list[tuple]:
    """Shapes that were captured; calls on the CPU count as calls on a GPU."""
    found = []

    def capture(model: nn.Module, x: torch.Tensor):
        found.append(tuple(x.shape))
        return lambda x: ("replayed", model(x))

    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(cuda_graph.Graphed, "_why_not", lambda self, x: None)
    return found


def test_captured_once_for_each_kind_of_input(captures):
    run = graphed(Meta().eval())
    x = torch.randn(2, 3)
    with torch.no_grad():
        for _ in range(3):
            replayed, out = run(x)
        assert replayed == "replayed"
        assert torch.equal(out, 3 * x)
        run(torch.randn(4, 3))
        run(x.double())
        run(x.mT.contiguous().mT)
    with torch.inference_mode():
        run(x)
    assert captures == [(2, 3), (4, 3), (2, 3), (2, 3), (2, 3)]


def test_captured_again_when_weights_move(captures):
    model = Meta().eval()
    run = graphed(model)
    x = torch.randn(2, 3)
    run(x)
    model.load_state_dict({"weight": torch.zeros(3)})  # written in place
    run(x)
    assert len(captures) == 1
    model.weight = nn.Parameter(torch.zeros(3))
    run(x)
    assert len(captures) == 2


def test_keeps_the_graphs_that_were_used_last(captures):
    run = graphed(Meta().eval(), most_graphs=2)
    for length in (1, 2, 1, 3, 1, 2):
        run(torch.randn(length, 3))
    assert captures == [(1, 3), (2, 3), (3, 3), (2, 3)]


def test_says_why_a_call_is_no_graph():
    run = graphed(Meta().eval())
    x = torch.randn(2, 3)
    with pytest.warns(UserWarning, match="graphed: this call runs without a CUDA graph: x is on cpu"):
        assert torch.equal(run(x), 3 * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(x)  # logged once


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1,), TypeError, "graphed: model is a int"),
        ((nn.Identity(), 0), ValueError, "graphed: most_graphs is 0"),
        ((nn.Identity(), "2"), ValueError, "graphed: most_graphs is '2'"),
    ],
)
def test_errors(arguments, error, message):
    model, *most = arguments
    with pytest.raises(error, match=message):
        swin_kernels.graphed(model, **({"most_graphs": most[0]} if most else {}))
