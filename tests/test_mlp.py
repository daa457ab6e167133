"""A block's MLP runs once per step, as MONAI's does: the backward belongs to what the forward drew and read."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.networks.nets import swin_unetr as monai
from torch.nn.utils import parametrizations

from swin_kernels import accelerate


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return F.dropout(F.gelu(x), 0.3, self.training)


class Counting(nn.Module):
    """Batch norm over tokens: its statistics move at every call in training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, dtype=torch.float64)

    def forward(self, x):
        return self.norm(F.gelu(x).flatten(0, -2)).view_as(x)


def spectral(mlp: nn.Module) -> None:
    torch.manual_seed(0)
    parametrizations.spectral_norm(mlp.linear1)


def activation(make: Callable[[int], nn.Module]) -> Callable[[nn.Module], None]:
    def apply(mlp):
        mlp.fn = make(mlp.linear1.out_features)

    return apply


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "dropout that is no layer": activation(lambda channels: FunctionalDropout()),
    "random slopes": activation(lambda channels: nn.RReLU()),
    "alpha dropout": activation(lambda channels: nn.Sequential(nn.GELU(), nn.AlphaDropout(0.3))),
    "batch norm": activation(Counting),
    "spectral norm": spectral,
}


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    """The same stage of two blocks as MONAI's and ours, in training."""
    torch.manual_seed(0)
    theirs = monai.BasicLayer(12, 2, 3, (3, 3), [0.0, 0.0], qkv_bias=True).double()
    return theirs, accelerate(copy.deepcopy(theirs), strict=True)


def image() -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randn(1, 12, 6, 6, dtype=torch.float64, generator=random).requires_grad_()


def gradients(
    model: nn.Module, parameters: dict[str, torch.Tensor], between: Callable[[nn.Module], object] = lambda model: None
) -> dict[str, torch.Tensor]:
    """Gradients of the image and of `parameters`, with which `model` is called; `between` runs before the backward."""
    wanted = {"image": image(), **parameters}
    torch.manual_seed(3)
    loss = torch.func.functional_call(model, parameters, (wanted["image"],)).square().mean()
    between(model)
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


def assert_equal(own: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-12)


def test_gradients_are_those_of_the_parameters_given(pair):
    """`torch.func.functional_call` puts the module's own parameters back before the backward."""
    random = torch.Generator().manual_seed(2)
    given = {
        name: p.detach() + 0.1 * torch.randn(p.shape, dtype=p.dtype, generator=random)
        for name, p in pair[0].named_parameters()
    }
    theirs, own = (gradients(model, {name: p.clone().requires_grad_() for name, p in given.items()}) for model in pair)
    assert_equal(own, theirs)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_draws_or_counts_does_so_once(pair, change):
    results = []
    for model in map(copy.deepcopy, pair):
        for block in model.blocks:
            change(block.mlp)
        results.append({**gradients(model, dict(model.named_parameters())), **dict(model.named_buffers())})
    assert_equal(*reversed(results))


@pytest.mark.parametrize(
    "between", [nn.Module.eval, lambda model: model.requires_grad_(False)], ids=["put in evaluation", "frozen"]
)
def test_the_backward_is_that_of_the_forward(pair, between):
    model = copy.deepcopy(pair[1])
    for block in model.blocks:
        block.mlp.drop1.p = 0.2
    expected = gradients(model, {})
    assert_equal(gradients(model, {}, between), expected)


def test_parameters_stepped_before_the_backward_are_refused(pair):
    def step(model):
        with torch.no_grad():
            for p in model.blocks[0].mlp.parameters():
                p.add_(1)

    for model in map(copy.deepcopy, pair):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(model, dict(model.named_parameters()), step)


def test_no_hooks_on_saved_tensors_are_needed(pair):
    with torch.autograd.graph.disable_saved_tensors_hooks("there are none"):
        gradients(pair[1], dict(pair[1].named_parameters()))
