"""`layer_norm`: every backend against PyTorch's layer norm in float64, forward and backward."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from swin_kernels.ops.layer_norm import MOST_CHANNELS, autocast_layer_norm, layer_norm

from .tolerances import assert_close, largest

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        name: id of the test.
        shape: of `x`.
        weight, bias: whether there is one.
        eps: argument.
        mean, deviation: of the values, as multiples of a normal distribution's.
        strided: `x` and the output's gradient are every second row of a larger buffer, NaN between.
    """

    name: str
    shape: tuple[int, ...] = (2, 3, 4, 20)
    weight: bool = True
    bias: bool = True
    eps: float = 1e-5
    mean: float = 0.5
    deviation: float = 1.0
    strided: bool = False


CASES = (
    Case("weight and bias"),
    Case("no parameters", weight=False, bias=False),
    Case("weight alone", bias=False),
    Case("bias alone", weight=False),
    *(Case(f"{channels} channels", (3, 7, channels)) for channels in (1, 3, 16, 17, 48, 96, 192, 1536)),
    Case("one row", (5,)),
    Case("many rows", (3, 11, 13, 24)),
    Case("large means", mean=1e3),
    Case("small values", mean=0, deviation=1e-3),
    Case("large eps", eps=0.7),
    Case("strided", strided=True),
    Case("no rows", (0, 4, 20)),
)


@pytest.fixture
def backend() -> str:
    """The only backend that runs it on CPU tensors."""
    return "reference"


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu", parameters: torch.dtype | None = None):
    """`x`, weight and bias (None where there is none), and the gradient of the output."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def laid_out(t: torch.Tensor) -> torch.Tensor:
        t = t.to(device, dtype)
        if not case.strided:
            return t
        buffer = t.new_full((2 * t.shape[0], *t.shape[1:]), math.nan)
        buffer[::2] = t
        return buffer[::2]

    x, grad_out = laid_out(case.deviation * (normal(*case.shape) + case.mean)), laid_out(normal(*case.shape))
    weight, bias = (
        normal(case.shape[-1]).to(device, parameters or dtype).requires_grad_() if there else None
        for there in (case.weight, case.bias)
    )
    return (x.detach().requires_grad_(), weight, bias), grad_out


def results(run, inputs, grad_out) -> list[torch.Tensor]:
    out = run(*inputs)
    leaves = [t for t in inputs if t is not None]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_contract(backend, case, dtype):
    check(backend, case, dtype)


def check(backend: str, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """The contract, forward and backward."""
    inputs, grad_out = make_inputs(case, dtype, device)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in inputs]

    def plain(x, weight, bias):
        return F.layer_norm(x, x.shape[-1:], weight, bias, case.eps)

    value = results(lambda *t: layer_norm(*t, case.eps, backend=backend), inputs, grad_out)
    found, truth = results(plain, inputs, grad_out), results(plain, wide, grad_out)
    names = ["out", "grad of x", *(f"grad of {n}" for n in ("weight", "bias") if getattr(case, n))]
    # Means are subtracted from values and from gradients, whose sizes determine how much rounding that leaves.
    deviations = wide[0].detach() - wide[0].detach().mean(-1, keepdim=True)
    steepest = largest((deviations.square().mean(-1) + case.eps).rsqrt())
    factor = 1.0 if inputs[1] is None else largest(inputs[1].detach())
    scales = {"out": max(largest(truth[0]), case.mean), "grad of x": steepest * largest(grad_out) * factor}
    for name, v, p, t in zip(names, value, found, truth, strict=True):
        assert v.dtype == dtype
        assert_close(name, v, p, t, scales.get(name, max(largest(t), largest(grad_out))))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rounds_once(backend, dtype, out_dtype):
    check_rounding(backend, dtype, out_dtype)


def check_rounding(backend: str, dtype: torch.dtype, out_dtype: torch.dtype, device: str = "cpu") -> None:
    """The float32 norm of PyTorch rounded to `dtype`, also where parameters are float32 and `x` is not."""
    inputs, grad_out = make_inputs(Case("rounds"), dtype, device, parameters=torch.float32)
    value = results(lambda *t: layer_norm(*t, dtype=out_dtype, backend=backend), inputs, grad_out)
    wide = [t.detach().float().requires_grad_() for t in inputs]
    grad_out = grad_out.to(out_dtype)
    truth = results(lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b), wide, grad_out)
    assert [t.dtype for t in value] == [out_dtype, dtype, torch.float32, torch.float32]
    for v, t in zip(value, truth, strict=True):
        assert (v.float() - t).norm() <= (2 * torch.finfo(v.dtype).eps + 1e-6) * t.norm()


def test_constant_rows(backend):
    """Without any deviation eps keeps the norm at 0."""
    x = torch.full((3, 20), 7.25, requires_grad=True)
    out = layer_norm(x, backend=backend)
    assert torch.equal(out, torch.zeros_like(x))
    assert torch.autograd.grad(out, x, torch.ones_like(x))[0].abs().max() < 1e-2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(backend, value):
    x = torch.randn(5, 20)
    expected = layer_norm(x, backend=backend)
    x[2, 3] = value
    out = layer_norm(x, backend=backend)
    assert out[2].isnan().all()
    assert torch.equal(out[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


def test_gradcheck(backend):
    inputs, _ = make_inputs(Case("gradcheck", (2, 3, 5)), torch.float64)
    assert torch.autograd.gradcheck(lambda *t: layer_norm(*t, backend=backend), inputs)


@pytest.mark.parametrize("parameters", [True, False])
def test_opcheck(backend, parameters):
    inputs, _ = make_inputs(Case("opcheck", weight=parameters, bias=parameters), torch.float32)
    torch.library.opcheck(torch.ops.swin_kernels.layer_norm.default, (*inputs, 1e-5, torch.float16, backend))


def test_differentiable_once(backend):
    x = torch.randn(3, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(layer_norm(x, backend=backend).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="layer_norm: differentiable once"):
        grad.sum().backward()


def test_without_autocast_it_is_pytorchs():
    inputs, _ = make_inputs(Case("plain"), torch.float32)
    assert torch.equal(
        autocast_layer_norm(*inputs, for_linear=True), F.layer_norm(inputs[0], inputs[0].shape[-1:], *inputs[1:])
    )


X = torch.zeros(2, 3)
BAD = [
    ("x", {"x": None}),
    ("x", {"x": X.to_sparse()}),
    ("x", {"x": X.long()}),
    ("x", {"x": torch.zeros(())}),
    ("x", {"x": torch.zeros(2, 0)}),
    ("x", {"x": torch.zeros(1, MOST_CHANNELS + 1)}),
    ("weight", {"weight": 1.0}),
    ("weight", {"weight": torch.zeros(2)}),
    ("weight", {"weight": torch.zeros(3).long()}),
    ("bias", {"bias": torch.zeros(1, 3)}),
    ("bias", {"bias": torch.zeros(3, device="meta")}),
    *(("eps", {"eps": value}) for value in (-0.1, math.nan, math.inf, "1", None, True)),
    ("dtype", {"dtype": torch.int32}),
    ("backend", {"backend": "gpu"}),
]


@pytest.mark.parametrize(("argument", "changes"), BAD, ids=[f"{name} {i}" for i, (name, _) in enumerate(BAD)])
def test_error_names_the_argument(argument, changes):
    with pytest.raises((TypeError, ValueError), match=rf"layer_norm: (.*\b)?{argument}\b"):
        layer_norm(**({"x": X} | changes))
