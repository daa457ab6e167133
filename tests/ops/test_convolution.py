"""`convolution`: every backend against PyTorch's convolution of the concatenation in float64, forward and backward."""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from swin_kernels import backends, convolution
from swin_kernels.backends.cpu import convolution as cpu_convolution
from swin_kernels.ops.convolution import ConvolutionCall

from .tolerances import assert_close, largest

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        name: id of the test.
        spatial: extents of the volume.
        channels, skip: channels of `x` and of `skip`; 0 for no skip.
        out: output channels.
        kernel: extent of the kernel.
        batch: instances.
        layout: memory of `x`, `skip` and the output's gradient: "channels_last", "contiguous" or "strided" (every
            second element of a larger buffer, NaN between).
    """

    name: str
    spatial: tuple[int, ...] = (5, 6, 7)
    channels: int = 5
    skip: int = 0
    out: int = 6
    kernel: int = 3
    batch: int = 1
    layout: str = "channels_last"


CASES = (
    Case("plain"),
    Case("skip", skip=3),
    Case("pointwise", kernel=1),
    Case("pointwise skip", kernel=1, skip=7, out=17),
    Case("batch", batch=3, skip=2),
    Case("one channel", channels=1, out=48),
    Case("one output", channels=20, out=1),
    *(Case(f"{out} outputs", channels=4, out=out) for out in (12, 16, 24, 32, 33, 48, 50, 96, 100)),
    *(Case(f"{out} outputs pointwise", channels=4, out=out, kernel=1) for out in (14, 48, 100)),
    *(Case(f"last axis {n}", (3, 4, n), 3, out=5) for n in (1, 2, 3, 4, 5, 8, 9)),
    *(Case(f"thin {s}", s, 3, skip=2) for s in ((1, 1, 1), (1, 9, 1), (9, 1, 4), (2, 1, 6), (1, 2, 2))),
    Case("several blocks", (3, 37, 10), 16, skip=16, out=16, batch=2),
    Case("feature size 24", (6, 6, 6), 24, skip=24, out=24),
    Case("wide", (4, 4, 4), 96, skip=96, out=96),
    Case("more planes than slabs of sums", (19, 5, 6), 3, out=5, batch=3),
    Case("many planes of one volume", (61, 2, 3), 9, skip=1, out=17),
    Case("wide pointwise", (7, 6, 9), 96, skip=96, out=48, kernel=1),
    *(
        Case(f"{layout}{k}", layout=layout, skip=3, kernel=k, batch=2)
        for layout in ("contiguous", "strided")
        for k in (1, 3)
    ),
)
CASES_2D = (Case("2d", (6, 7)), Case("2d skip", (6, 7), skip=3), Case("2d pointwise", (6, 7), skip=3, kernel=1))


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of `x` ``(B, C, *S)`` in memory of another `layout` (see `Case.layout`)."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        buffer = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)
        buffer[..., ::2] = x
        return buffer[..., ::2]
    return x.contiguous()


def make_inputs(case: Case, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """`x`, the weight, `skip` if there is one, and the gradient of the output."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x = laid_out(normal(case.batch, case.channels, *case.spatial), case.layout)
    weight = normal(case.out, case.channels + case.skip, *[case.kernel] * len(case.spatial))
    leaves = [x, weight]
    if case.skip:
        leaves.append(laid_out(normal(case.batch, case.skip, *case.spatial), case.layout))
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return leaves, laid_out(normal(case.batch, case.out, *case.spatial), case.layout)


def plain(x: torch.Tensor, weight: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
    both = x if skip is None else torch.cat([x, skip], 1)
    return (F.conv2d if x.dim() == 4 else F.conv3d)(both, weight, padding=weight.shape[-1] // 2)


def why_declined(backend: str, case: Case, dtype: torch.dtype) -> str | None:
    window = (case.kernel,) * len(case.spatial)
    channels = case.channels, case.skip, case.out
    return backends.decline_reason(
        backend, ConvolutionCall(device="cpu", dtype=dtype, window=window, channels=channels)
    )


# The weight's gradient of PyTorch 2.13's own bfloat16 convolution holds whatever was in memory (such as 1e36) for a
# volume of 1×9×1 voxels on processors with AMX and for one of 2×1×6 on one thread of a Zen 4.
UNDEFINED_IN_PYTORCH = ((1, 9, 1), (2, 1, 6))
PAIRS = [
    (c, d) for c in CASES + CASES_2D for d in DTYPES if d != torch.bfloat16 or c.spatial not in UNDEFINED_IN_PYTORCH
]


@pytest.mark.parametrize(("case", "dtype"), PAIRS, ids=lambda value: getattr(value, "name", str(value)))
def test_contract(backend, case, dtype):
    leaves, grad_out = make_inputs(case, dtype)
    if reason := why_declined(backend, case, dtype):
        assert backend == "cpu"
        assert dtype != torch.float32 or len(case.spatial) != 3
        with pytest.raises(RuntimeError, match=re.escape(reason)):
            convolution(*leaves, backend=backend)
        return
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    results = []
    for run, inputs in (
        (lambda *t: convolution(*t, backend=backend), leaves),
        (plain, leaves),
        (plain, wide),
    ):
        out = run(*inputs)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(out.dtype))])
    for name, value, p, t in zip(["out", "grad of x", "grad of weight", "grad of skip"], *results, strict=False):
        assert value.dtype == dtype
        assert_close(name, value, p, t, largest(t))


def test_result_is_channels_last(backend):
    for layout in ("channels_last", "contiguous", "strided"):
        (x, weight, skip), _ = make_inputs(Case("format", skip=2, layout=layout), torch.float32)
        out = convolution(x, weight, skip, backend=backend)
        assert out.movedim(1, -1).is_contiguous()
        gradients = torch.autograd.grad(out.sum(), (x, skip))
        assert all(g.movedim(1, -1).is_contiguous() for g in gradients)


def test_empty_batch(backend):
    (x, weight, skip), grad_out = make_inputs(Case("empty", batch=0, skip=2), torch.float32)
    out = convolution(x, weight, skip, backend=backend)
    assert out.shape == grad_out.shape
    gradients = torch.autograd.grad(out, (x, weight, skip), grad_out)
    assert [g.shape for g in gradients] == [x.shape, weight.shape, skip.shape]
    assert gradients[1].abs().sum() == 0


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_gradients_one_by_one(backend, wanted):
    leaves, grad_out = make_inputs(Case("some", skip=3), torch.float32)
    every = torch.autograd.grad(convolution(*leaves, backend=backend), leaves, grad_out)
    leaves = [leaf.detach().requires_grad_(i in wanted) for i, leaf in enumerate(leaves)]
    some = torch.autograd.grad(convolution(*leaves, backend=backend), [leaves[i] for i in wanted], grad_out)
    assert all(torch.equal(a, every[i]) for a, i in zip(some, wanted, strict=True))


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 2, 2), (2, 8, 8), (2, 1, 6), (1, 9, 1)])
@pytest.mark.parametrize("threads", [1, 2])
def test_bfloat16_gradients_of_thin_volumes(shape, threads):
    """The deepest level of a roi of 64 voxels, for which PyTorch's gradient holds uninitialised memory."""
    x, weight = torch.randn(1, 16, *shape).bfloat16(), torch.randn(16, 16, 3, 3, 3).bfloat16()
    gradient = torch.randn(1, 16, *shape).bfloat16()
    left_behind = [torch.full((size,), math.nan) for size in (100, 1000, 10_000, 100_000)]
    del left_behind
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = torch.autograd.grad(convolution(x.requires_grad_(), weight.requires_grad_()), (x, weight), gradient)
    finally:
        torch.set_num_threads(before)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = torch.autograd.grad(F.conv3d(*wide, padding=1), wide, gradient.double())
    for ours, right in zip(found, exact, strict=True):
        assert (ours.double() - right).norm() <= 4e-3 * right.norm()  # one rounding is up to 2⁻⁸ of each element


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_near(backend, value):
    """Within the kernel's reach, and the four outputs along the last axis that are computed together."""
    (x, weight), _ = make_inputs(Case("not finite", (8, 8, 24)), torch.float32)
    x = x.detach()
    expected = convolution(x, weight, backend=backend)
    x[0, 1, 4, 4, 13] = value
    out = convolution(x, weight, backend=backend)
    assert not out[0, :, 3:6, 3:6, 12:15].isfinite().any()
    far = torch.ones(8, 8, 24, dtype=torch.bool)
    far[3:6, 3:6, 12:16] = False
    assert torch.equal(out[:, :, far], expected[:, :, far])


@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=lambda case: case.name)
def test_opcheck(backend, case):
    leaves, _ = make_inputs(case, torch.float32)
    x, weight, skip = leaves
    torch.library.opcheck(torch.ops.swin_kernels.convolution.default, (x, skip, weight, backend))
    torch.library.opcheck(
        torch.ops.swin_kernels.convolution.default, (x, None, weight[:, : x.shape[1]].detach(), backend)
    )


def test_gradcheck_on_the_reference():
    leaves, _ = make_inputs(Case("gradcheck", (2, 3, 2), 2, skip=1, out=2), torch.float64)
    assert torch.autograd.gradcheck(lambda *t: convolution(*t, backend="reference"), leaves)


def test_differentiable_once(backend):
    leaves, _ = make_inputs(Case("twice", skip=2), torch.float32)
    (grad,) = torch.autograd.grad(convolution(*leaves, backend=backend).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="convolution: differentiable once"):
        grad.sum().backward()


def test_autocast(backend, monkeypatch):
    """Under autocast it computes what PyTorch's convolution computes there, on the reference."""
    monkeypatch.setattr(cpu_convolution, "converts", lambda dtype: False)
    leaves, grad_out = make_inputs(Case("autocast", skip=2), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        if backend == "cpu":
            with pytest.raises(RuntimeError, match=r"dtype torch\.bfloat16 has no kernel"):
                convolution(*leaves, backend=backend)
            backend = None
        out, expected = convolution(*leaves, backend=backend), plain(*leaves)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)
    for a, b in zip(*(torch.autograd.grad(o, leaves, grad_out.bfloat16()) for o in (out, expected)), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * largest(b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.spatial not in UNDEFINED_IN_PYTORCH], ids=lambda case: case.name
)
def test_16_bits_go_through_float32_where_the_processor_has_no_arithmetic(cpu_backend, monkeypatch, case, dtype):
    monkeypatch.setattr(cpu_convolution, "converts", lambda dtype: dtype != torch.float64)
    assert why_declined(cpu_backend, case, dtype) is None
    test_contract(cpu_backend, case, dtype)


def test_conversion_is_for_what_the_processor_lacks():
    assert cpu_convolution.converts(torch.bfloat16) is not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert cpu_convolution.converts(torch.float16) is not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    assert not cpu_convolution.converts(torch.float32)


def test_compile_and_export(backend):
    leaves, grad_out = make_inputs(Case("compile", skip=3), torch.float32)

    class Block(torch.nn.Module):
        def forward(self, x, weight, skip):
            return convolution(2 * x, weight, skip + 1, backend=backend)

    eager = Block()(*leaves)
    compiled = torch.compile(Block(), fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(*(torch.autograd.grad(out, leaves, grad_out) for out in (eager, compiled)), strict=True):
        torch.testing.assert_close(a, b)
    program = torch.export.export(Block(), tuple(leaves))
    torch.testing.assert_close(program.module()(*leaves), eager)


@pytest.mark.parametrize("kernel", [1, 3])
def test_bits_do_not_depend_on_threads(cpu_backend, threads, kernel):
    leaves, grad_out = make_inputs(Case("threads", (7, 19, 23), 17, skip=11, out=20, kernel=kernel), torch.float32)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        out = convolution(*leaves, backend=cpu_backend)
        ours = leaves if kernel == 3 else (leaves[0], leaves[2])  # the 1×1×1 weight's is PyTorch's
        gradients = torch.autograd.grad(out, ours, grad_out)
        results.append([out, *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
@pytest.mark.parametrize(
    "case", [CASES[1], CASES[3], Case("widths", (5, 6, 11), 24, 55, 50)], ids=lambda case: case.name
)
def test_vector_widths(cpu_backend, monkeypatch, isa, case):
    monkeypatch.setenv("SWIN_KERNELS_ISA", isa)
    try:
        torch.ops.swin_kernels_cpu.isa()
    except RuntimeError as error:
        pytest.skip(str(error))
    test_contract(cpu_backend, case, torch.float32)


X, WEIGHT = torch.zeros(2, 3, 4, 5, 6), torch.zeros(2, 3, 3, 3, 3)
BAD = [
    ("x", {"x": None}),
    ("x", {"x": X.to_sparse()}),
    ("x", {"x": X.long()}),
    ("x", {"x": torch.zeros(2, 3, 4)}),
    ("x", {"x": torch.zeros(2, 3, 0, 4, 5)}),
    ("weight", {"weight": None}),
    ("weight", {"weight": WEIGHT.double()}),
    ("weight", {"weight": torch.tensor(1.0)}),
    ("weight", {"weight": torch.zeros(2, 4, 3, 3, 3)}),
    ("weight", {"weight": torch.zeros(0, 3, 3, 3, 3)}),
    ("weight", {"weight": torch.zeros(2, 3, 5, 5, 5)}),
    ("weight", {"weight": torch.zeros(2, 3, 3, 3, 1)}),
    ("weight", {"weight": torch.zeros(2, 3, 3, 3)}),
    ("weight", {"weight": torch.zeros(2, 3, 3, 3, 3, device="meta")}),
    ("skip", {"skip": 1.0}),
    ("skip", {"skip": X.double()}),
    ("skip", {"skip": torch.zeros(1, 3, 4, 5, 6)}),
    ("skip", {"skip": torch.zeros(2, 3, 4, 5, 7)}),
    ("skip", {"skip": torch.zeros(2, 0, 4, 5, 6)}),
    ("skip", {"skip": torch.zeros(2, 3, 5, 6)}),
    ("weight", {"skip": X}),
    ("backend", {"backend": "gpu"}),
]


@pytest.mark.parametrize(("argument", "changes"), BAD, ids=[f"{name} {i}" for i, (name, _) in enumerate(BAD)])
def test_error_names_the_argument(backend, argument, changes):
    with pytest.raises((TypeError, ValueError), match=rf"convolution: (.*\b)?{argument}\b"):
        convolution(**({"x": X, "weight": WEIGHT, "backend": backend} | changes))


VOLUME = torch.zeros(1, 4, 5, 6, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((VOLUME.mT, None, WEIGHT), "x is not contiguous"),
        ((VOLUME.double(), None, WEIGHT), "x is not float32"),
        ((VOLUME[0], None, WEIGHT), "x has shape"),
        ((VOLUME[:0], None, WEIGHT), "x has shape"),
        ((VOLUME, VOLUME[:, :3].contiguous(), WEIGHT), "skip has shape"),
        ((VOLUME, VOLUME, WEIGHT), "x and skip have 6 channels"),
        ((VOLUME, None, torch.zeros(2, 3, 3, 3, 1)), "weight has shape"),
        ((VOLUME, None, torch.zeros(2, 3, 2, 2, 2)), "weight has shape"),
        ((VOLUME, None, torch.zeros(2)), "weight has shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_kernel_refuses_to_read_out_of_bounds(cpu_backend, arguments, message):
    with pytest.raises(RuntimeError, match=f"convolution: {message}"):
        torch.ops.swin_kernels_cpu.convolution_forward(*arguments)


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (0, 0), (2, 2), (2**62, 2**62)])
def test_gradient_kernel_refuses_channels_out_of_range(cpu_backend, first, count):
    with pytest.raises(RuntimeError, match="convolution_backward: channels out of range"):
        torch.ops.swin_kernels_cpu.convolution_backward_input(torch.zeros(1, 4, 5, 6, 2), WEIGHT, first, count)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((VOLUME, VOLUME.mT), "x is not contiguous"),
        ((VOLUME.double(), VOLUME), "grad_out is not float32"),
        ((VOLUME, VOLUME[:0]), "x has shape"),
        ((VOLUME[0], VOLUME[0]), "grad_out has shape"),
        ((VOLUME[:, :3].contiguous(), VOLUME), "grad_out has shape"),
        ((VOLUME.expand(2, -1, -1, -1, -1).contiguous(), VOLUME), "grad_out has shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weight_gradient_kernel_refuses_to_read_out_of_bounds(cpu_backend, arguments, message):
    with pytest.raises(RuntimeError, match=f"convolution_backward: {message}"):
        torch.ops.swin_kernels_cpu.convolution_backward_weight(*arguments)


def test_weight_gradient_is_a_sum_of_few_roundings(cpu_backend):
    """Sums over the voxels of a volume at the image's resolution, in which a running float32 sum would lose digits."""
    generator = torch.Generator().manual_seed(0)
    x, grad_out = (torch.randn(1, 48, 64, 64, c, generator=generator) + 1 for c in (2, 3))
    weight = torch.empty(3, 2, 3, 3, 3)
    arguments = ([1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1, [False, True, False])
    value = torch.ops.swin_kernels_cpu.convolution_backward_weight(grad_out, x)
    volumes = (t.double().movedim(-1, 1) for t in (grad_out, x))
    truth = torch.ops.aten.convolution_backward(*volumes, weight.double(), None, *arguments)[1]
    assert largest(value - truth) <= 5e-7 * largest(truth)
