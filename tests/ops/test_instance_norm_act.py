"""`instance_norm_act`: every backend against PyTorch's layers in float64, forward and backward."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from swin_kernels import instance_norm_act

from .tolerances import assert_close, largest

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        name: id of the test.
        shape: of `x`, ``(B, C, *S)``.
        residual: "none", "plain" or "normalized".
        slope, eps: arguments.
        mean, deviation: of the values of each channel, as multiples of a normal distribution's.
        layout: memory of `x`, of the residual and of the output's gradient: "channels_last", "contiguous" or "strided"
            (every second element of a larger buffer, NaN between).
    """

    name: str
    shape: tuple[int, ...] = (2, 5, 3, 4, 6)
    residual: str = "none"
    slope: float = 0.01
    eps: float = 1e-5
    mean: float = 0.5
    deviation: float = 1.0
    layout: str = "channels_last"


CASES = (
    *(Case(f"3d {residual}", residual=residual) for residual in ("none", "plain", "normalized")),
    *(Case(f"2d {residual}", (3, 4, 5, 7), residual) for residual in ("none", "plain", "normalized")),
    Case("1d", (2, 4, 9), "plain"),
    *(
        Case(f"{layout} {r}", residual=r, layout=layout)
        for layout in ("contiguous", "strided")
        for r in ("none", "normalized")
    ),
    Case("one channel", (2, 1, 4, 5, 3), "plain"),
    Case("one channel contiguous", (2, 1, 4, 5, 3), "normalized", layout="contiguous"),
    *(Case(f"{channels} channels", (1, channels, 4, 4, 3), "normalized") for channels in (3, 16, 17, 48, 96)),
    Case("two voxels", (2, 4, 1, 2, 1), "plain"),
    Case("many blocks", (1, 40, 12, 13, 11), "normalized"),
    Case("many blocks, several instances", (3, 130, 9, 9, 9)),
    Case("a block of one voxel", (1, 17000, 1, 1, 2), "plain"),
    *(Case(f"slope {slope} {r}", slope=slope, residual=r) for slope in (0.0, 0.5, 1.0, 2.0) for r in ("none", "plain")),
    Case("large eps", eps=0.7),
    Case("eps 0", eps=0.0),
    Case("small values", mean=0, deviation=1e-3, residual="normalized"),
    Case("batch 0", (0, 5, 3, 4, 6), "plain"),
)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of `x` ``(B, C, *S)`` in memory of another `layout` (see `Case.layout`)."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        buffer = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)
        buffer[..., ::2] = x
        return buffer[..., ::2]
    return x.contiguous()


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[list[torch.Tensor], torch.Tensor]:
    """`x`, the residual if there is one, and the gradient of the output."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))

    def normal() -> torch.Tensor:
        return torch.randn(case.shape, generator=generator, dtype=torch.float64)

    x, residual = (case.deviation * (normal() + case.mean) for _ in range(2))
    leaves = [x] if case.residual == "none" else [x, residual]
    leaves = [laid_out(t.to(device, dtype), case.layout).detach().requires_grad_() for t in leaves]
    return leaves, laid_out(normal().to(device, dtype), case.layout)


def plain(case: Case, leaves: list[torch.Tensor]) -> torch.Tensor:
    """PyTorch's layers, as MONAI's blocks run them."""
    out = F.instance_norm(leaves[0], eps=case.eps)
    if case.residual == "plain":
        out = out + leaves[1]
    elif case.residual == "normalized":
        out = out + F.instance_norm(leaves[1], eps=case.eps)
    return F.leaky_relu(out, case.slope)


def fused(case: Case, leaves: list[torch.Tensor], backend: str) -> torch.Tensor:
    return instance_norm_act(
        *leaves,
        normalize_residual=case.residual == "normalized",
        eps=case.eps,
        negative_slope=case.slope,
        backend=backend,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_contract(backend, case, dtype):
    check(backend, case, dtype)


def check(backend: str, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """The contract, forward and backward."""
    leaves, grad_out = make_inputs(case, dtype, device)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    results = {}
    for name, run, inputs in (
        ("fused", lambda t: fused(case, t, backend), leaves),
        ("plain", lambda t: plain(case, t), leaves),
        ("truth", lambda t: plain(case, t), wide),
    ):
        out = run(inputs)
        results[name] = [out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(out.dtype))]
    names = ["out", "grad of x", "grad of residual"]
    scales = [largest(results["truth"][0])] + [max(map(largest, results["truth"][1:]))] * 2
    for name, value, p, t, scale in zip(names, *results.values(), scales, strict=False):
        assert value.dtype == dtype
        assert_close(name, value, p, t, scale)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "strided"])
@pytest.mark.parametrize("shape", [(2, 5, 3, 4, 6), (2, 5, 4, 6), (2, 1, 4, 6), (1, 5, 1, 4, 1)], ids=str)
def test_result_has_the_memory_format_of_x(backend, shape, layout):
    x = laid_out(torch.randn(shape), layout).requires_grad_()
    out = instance_norm_act(x, backend=backend)
    assert out.stride() == torch.empty_like(x).stride()
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("residual", ["none", "plain", "normalized"])
def test_large_means(backend, residual):
    check_large_means(backend, residual)


def check_large_means(backend: str, residual: str, device: str = "cpu") -> None:
    """The variance is that of x minus its mean, however large the mean is."""
    case = Case("large mean", (1, 6, 20, 20, 20), residual, mean=1e4)
    leaves, _ = make_inputs(case, torch.float32, device)
    truth = plain(case, [leaf.detach().double() for leaf in leaves])
    # float32 holds the mean to 5e-4 of a deviation.
    assert largest(fused(case, leaves, backend) - truth) <= 2e-3
    truth_scale = 1 / leaves[0].detach().double().std((2, 3, 4), correction=0)
    statistics = torch.ops.swin_kernels.instance_norm_act(leaves[0], None, False, 0.0, 1.0, backend)[1]
    torch.testing.assert_close(statistics[:, 1].double(), truth_scale, rtol=1e-6, atol=0)


def test_constant_channels(backend):
    """Without any deviation eps keeps the norm at 0."""
    x = laid_out(torch.full((2, 3, 4, 4, 4), 7.25), "channels_last").requires_grad_()
    residual = torch.randn_like(x)
    assert torch.equal(instance_norm_act(x, residual, negative_slope=1.0, backend=backend), residual)
    out = instance_norm_act(x, backend=backend)
    assert torch.equal(out, torch.zeros_like(x))
    assert torch.autograd.grad(out, x, torch.ones_like(x))[0].abs().max() < 1e-2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_channel(backend, value):
    x = laid_out(torch.randn(2, 3, 4, 4, 4), "channels_last")
    expected = instance_norm_act(x, backend=backend)
    x[1, 2, 3, 0, 1] = value
    out = instance_norm_act(x, backend=backend)
    assert out[1, 2].isnan().all()
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1, :2], expected[1, :2])


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "strided"])
@pytest.mark.parametrize("residual", ["none", "plain", "normalized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inplace(backend, dtype, residual, layout):
    case = Case("in place", residual=residual, layout=layout)
    (x, *rest), _ = make_inputs(case, dtype)
    options = {"normalize_residual": residual == "normalized", "backend": backend}
    with torch.no_grad():
        expected = instance_norm_act(x, *rest, **options)
        kept = [t.clone() for t in rest]
        memory = x.data_ptr()
        out = instance_norm_act(x, *rest, inplace=True, **options)
    assert out is x
    assert x.data_ptr() == memory
    assert torch.equal(x, expected)
    assert all(torch.equal(a, b) for a, b in zip(rest, kept, strict=True))


def test_inplace_refuses_elements_that_share_memory(backend):
    x = torch.randn(1, 3, 1, 1).expand(1, 3, 4, 5)
    with pytest.raises(ValueError, match="instance_norm_act: inplace is True, but elements of x share memory"):
        instance_norm_act(x, inplace=True, backend=backend)


def test_switches_are_bools(backend):
    x = torch.randn(1, 3, 4, 5)
    with pytest.raises(TypeError, match=r"instance_norm_act: normalize_residual is \[\]; accepted is a bool"):
        instance_norm_act(x, x, normalize_residual=[], backend=backend)


def test_inplace_refuses_to_lose_a_gradient(backend):
    x = torch.randn(1, 2, 3, 3)
    residual = torch.randn(1, 2, 3, 3, requires_grad=True)
    before = x.clone()
    with pytest.raises(ValueError, match="instance_norm_act: inplace is True, but a gradient is recorded"):
        instance_norm_act(x, residual, inplace=True, backend=backend)
    assert torch.equal(x, before)


@pytest.mark.parametrize("recorded", ["x", "residual"])
@pytest.mark.parametrize(
    ("name", "backend"), [("swin_kernels.instance_norm_act_", [""]), ("swin_kernels_cpu.instance_norm_act_inplace", [])]
)
def test_raw_inplace_refuses_to_lose_a_gradient(cpu_backend, name, backend, recorded):
    namespace, operator = name.split(".")
    inplace = getattr(getattr(torch.ops, namespace), operator)
    x, residual = (torch.randn(1, 3, 3, 2, requires_grad=recorded == which) for which in ("x", "residual"))
    x = 1 * x
    before = x.detach().clone()
    with pytest.raises(RuntimeError, match=rf"torch\.ops\.{name}: writes to x, and a gradient is recorded"):
        inplace(x, residual, False, 1e-5, 0.01, *backend)
    assert torch.equal(x, before)
    with torch.no_grad():
        inplace(x, residual, False, 1e-5, 0.01, *backend)
    assert not torch.equal(x, before)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_autograd_sees_the_write(backend, layout):
    """Otherwise a product recorded before would take its gradient from overwritten values."""
    x = laid_out(torch.randn(1, 3, 4, 5), layout)
    weight = torch.ones_like(x, requires_grad=True)
    loss = (weight * x).sum()
    with torch.no_grad():
        instance_norm_act(x, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("given", ["x", "residual"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_inplace_of_what_is_negated_lazily(backend, layout, given):
    """The imaginary part of a conjugate is a view that PyTorch negates on reading and writing."""
    real = laid_out(torch.randn(1, 3, 4, 5), layout)
    negated = torch.complex(torch.zeros_like(real), -real).conj().imag
    assert negated.is_neg()
    assert torch.equal(negated, real)
    other = torch.randn(1, 3, 4, 5)
    x, residual = (negated, other) if given == "x" else (other, negated)
    expected = instance_norm_act(x.clone().resolve_neg(), residual.clone().resolve_neg(), backend=backend)
    out = instance_norm_act(x, residual, inplace=True, backend=backend)
    assert out is x
    torch.testing.assert_close(x.resolve_neg(), expected)


@pytest.mark.parametrize("residual", ["none", "plain", "normalized"])
@pytest.mark.parametrize("slope", [0.01, 0.0, 1.0])
def test_gradcheck(backend, residual, slope):
    case = Case("gradcheck", (2, 2, 2, 3, 2), residual, slope=slope)
    leaves, _ = make_inputs(case, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: fused(case, t, backend), leaves)


@pytest.mark.parametrize("residual", ["none", "plain", "normalized"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_opcheck(backend, layout, residual):
    case = Case("opcheck", residual=residual, layout=layout)
    leaves, _ = make_inputs(case, torch.float32)
    arguments = (leaves[0], leaves[1] if len(leaves) > 1 else None, residual == "normalized", 1e-5, 0.01, backend)
    torch.library.opcheck(torch.ops.swin_kernels.instance_norm_act.default, arguments)
    detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    torch.library.opcheck(torch.ops.swin_kernels.instance_norm_act_.default, detached)


def test_differentiable_once(backend):
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(instance_norm_act(x, backend=backend).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="instance_norm_act: differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize(("residual", "kept"), [("none", 1), ("plain", 2), ("normalized", 3)])
def test_memory_kept_for_the_backward(backend, residual, kept):
    """Volumes that autograd keeps: the output; with a residual also `x`; the residual only if it is normalized."""
    leaves, _ = make_inputs(Case("kept", residual=residual), torch.float32)
    volumes = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.numel() == leaves[0].numel():
            volumes.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        fused(Case("kept", residual=residual), leaves, backend)
    assert len(volumes) == kept


class Block(torch.nn.Module):
    def __init__(self, backend: str):
        super().__init__()
        self.backend = backend

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return instance_norm_act(2 * x, instance_norm_act(residual, backend=self.backend), backend=self.backend)


def test_compile_and_export(backend):
    block = Block(backend)
    inputs, grad_out = make_inputs(Case("compile", residual="plain"), torch.float32)
    eager = block(*inputs)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(*(torch.autograd.grad(out, inputs, grad_out) for out in (eager, compiled)), strict=True):
        torch.testing.assert_close(a, b)
    batch = {0: torch.export.Dim("batch", min=1, max=8)}
    program = torch.export.export(block, tuple(inputs), dynamic_shapes=(batch, batch))
    others, _ = make_inputs(Case("export", (5, *inputs[0].shape[1:]), "plain"), torch.float32)
    torch.testing.assert_close(program.module()(*others), block(*others))


@pytest.mark.parametrize("residual", ["none", "normalized"])
def test_bits_do_not_depend_on_threads(cpu_backend, threads, residual):
    case = Case("threads", (2, 40, 12, 13, 11), residual)
    leaves, grad_out = make_inputs(case, torch.float32)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        out = fused(case, leaves, cpu_backend)
        results.append([out, *torch.autograd.grad(out, leaves, grad_out)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vector_widths(cpu_backend, monkeypatch, isa, dtype):
    case = Case("widths", (2, 19, 5, 7, 6), "normalized")
    monkeypatch.setenv("SWIN_KERNELS_ISA", isa)
    try:
        torch.ops.swin_kernels_cpu.isa()
    except RuntimeError as error:
        pytest.skip(str(error))
    test_contract(cpu_backend, case, dtype)


X = torch.zeros(2, 3, 4, 5)
BAD = [
    ("x", {"x": None}),
    ("x", {"x": X.to_sparse()}),
    ("x", {"x": X.long()}),
    ("x", {"x": torch.zeros(2, 3)}),
    ("x", {"x": torch.zeros(2, 3, 1, 1, 1, 2)}),
    ("x", {"x": torch.zeros(2, 0, 4, 5)}),
    ("x", {"x": torch.zeros(2, 3, 0, 5)}),
    ("x", {"x": torch.zeros(2, 3, 1, 1)}),
    ("residual", {"residual": 1.0}),
    ("residual", {"residual": X.double()}),
    ("residual", {"residual": torch.zeros(2, 3, 5, 4)}),
    ("residual", {"residual": torch.zeros(3, 4, 5)}),
    ("residual", {"residual": torch.zeros(2, 3, 4, 5, device="meta")}),
    ("normalize_residual", {"normalize_residual": True}),
    *(
        (name, {name: value})
        for name in ("eps", "negative_slope")
        for value in (-0.1, math.nan, math.inf, "1", None, True)
    ),
    ("backend", {"backend": "gpu"}),
]


@pytest.mark.parametrize(("argument", "changes"), BAD, ids=[f"{name} {i}" for i, (name, _) in enumerate(BAD)])
def test_error_names_the_argument(backend, argument, changes):
    with pytest.raises((TypeError, ValueError), match=rf"instance_norm_act: (.*\b)?{argument}\b"):
        instance_norm_act(**({"x": X, "backend": backend} | changes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), None, False), "x has shape"),
        ((torch.zeros(2, 0, 3), None, False), "x has shape"),
        ((torch.zeros(2, 4, 3).mT, None, False), "x is not contiguous"),
        ((torch.zeros(2, 4, 3).long(), None, False), "x has a dtype"),
        ((torch.zeros(2, 4, 3), torch.zeros(2, 4, 2), False), "residual has shape"),
        ((torch.zeros(2, 4, 3), torch.zeros(2, 4, 3).double(), False), "residual must have the dtype"),
        ((torch.zeros(2, 4, 3), None, True), "residual is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("operator", ["instance_norm_act_forward", "instance_norm_act_inplace"])
def test_kernel_refuses_to_read_out_of_bounds(cpu_backend, operator, arguments, message):
    with pytest.raises(RuntimeError, match=f"instance_norm_act: {message}"):
        getattr(torch.ops.swin_kernels_cpu, operator)(*arguments, 1e-5, 0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad_y": torch.zeros(2, 5, 3)}, "grad_y has shape"),
        ({"x": None}, "x is missing"),
        ({"x": torch.zeros(1, 4, 3)}, "x has shape"),
        ({"residual": None}, "residual is missing"),
        ({"residual": torch.zeros(2, 4, 4)}, "residual has shape"),
        ({"statistics": torch.zeros(2, 2, 3)}, "statistics has shape"),
        ({"statistics": torch.zeros(2, 4, 3).double()}, "statistics has the wrong dtype"),
        ({"has_residual": False}, "normalize_residual needs a residual"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_backward_kernel_refuses_to_read_out_of_bounds(cpu_backend, changes, message):
    good = {name: torch.zeros(2, 4, 3) for name in ("grad_y", "y", "x", "residual")}
    good |= {
        "statistics": torch.zeros(2, 4, 3),
        "has_residual": True,
        "normalize_residual": True,
        "negative_slope": 0.1,
    }
    run = torch.ops.swin_kernels_cpu.instance_norm_act_backward
    assert run(**good)[0].shape == (2, 4, 3)
    with pytest.raises(RuntimeError, match=f"instance_norm_act_backward: {message}"):
        run(**(good | changes))
