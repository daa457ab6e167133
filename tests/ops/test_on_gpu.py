"""The CUDA and the Triton kernels on a GPU: the contract, production shapes, and what a launch may not do."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from swin_kernels import (
    backends,
    convolution,
    graphed,
    instance_norm_act,
    use_backend,
    window_attention,
    window_partition,
    window_reverse,
)
from swin_kernels.backends import decline_reason
from swin_kernels.ops.convolution import ConvolutionCall
from tests.ops import test_contract as contract
from tests.ops import test_convolution as convolutions
from tests.ops import test_instance_norm_act, test_layer_norm
from tests.ops.cases import Case, cases, check_forward_backward, gradients, make_inputs, run

pytestmark = pytest.mark.gpu

BACKENDS = tuple(name for name in backends.order("cuda") if name != backends.REFERENCE)
HEAD_DIMS = {"cuda": (8, 16, 32, 64), "triton": range(1, 129)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

PRODUCTION = (
    Case("96³ stage 1", (48, 48, 48), (7, 7, 7), (3, 3, 3), heads=3, head_dim=16),
    Case("96³ stage 2", (24, 24, 24), (7, 7, 7), (3, 3, 3), heads=6, head_dim=16),
    Case("96³ stage 3", (12, 12, 12), (7, 7, 7), (3, 3, 3), batch=2, heads=12, head_dim=16),
    Case("96³ stage 4", (6, 6, 6), (7, 7, 7), (3, 3, 3), batch=2, heads=24, head_dim=16),
    Case("128³ stage 4", (8, 8, 8), (7, 7, 7), (3, 3, 3), heads=24, head_dim=16),
    Case("f24, 96³ stage 1", (48, 48, 48), (7, 7, 7), (3, 3, 3), heads=3, head_dim=8),
    Case("head_dim 32", (24, 24, 24), (7, 7, 7), (3, 3, 3), batch=2, heads=3, head_dim=32),
    Case("head_dim 64", (24, 24, 24), (7, 7, 7), (3, 3, 3), heads=3, head_dim=64),
    Case("head_dim 128", (9, 8, 7), (7, 7, 7), (3, 3, 3), heads=2, head_dim=128),
    Case("16³ window", (17, 16, 16), (16, 16, 16), (8, 0, 0), heads=1, head_dim=16),
)


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request) -> str:
    """Every operator runs on this backend; memory that PyTorch allocates starts as NaN, so that a gap shows."""
    if reason := backends.BACKENDS[request.param].unavailable():
        pytest.skip(f"backend {request.param}: {reason}")
    torch.use_deterministic_algorithms(True)
    with use_backend(request.param):
        yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "example"), contract.ROWS, ids=str)
def test_contract_of_every_operator(backend, name, example, dtype):
    contract.check_contract(*contract.example_of(name, example), backend, dtype, "cuda")


def fitting(backend: str, case: Case) -> Case:
    """`case`, with head_dim 8 if the backend does not support its own; whatever else it declines is skipped."""
    if backend == "cuda" and (case.dropout_p or math.prod(map(min, case.window, case.spatial)) > 1024):
        pytest.skip("backend cuda: declines attention dropout, and gradients in windows of more than 1024 tokens")
    return case if case.head_dim in HEAD_DIMS[backend] else replace(case, head_dim=8)


PAIRS = [pytest.param(case, dtype, id=f"{case.name}, {dtype}") for dtype in DTYPES for case in cases(dtype)]


@pytest.mark.parametrize(("case", "dtype"), PAIRS)
def test_contract(backend, case, dtype):
    check_forward_backward(backend, fitting(backend, case), dtype, device="cuda")


def on_gpu(case: Case, dtype: torch.dtype):
    return make_inputs(case, dtype, device="cuda")


def values(backend: str, case: Case, inputs) -> list[torch.Tensor]:
    out = run(backend, case, inputs)
    return [out.detach(), *gradients(out, inputs)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PRODUCTION, ids=lambda case: case.name)
def test_production_shapes(backend, case, dtype):
    """Against the reference in float64 on the same GPU; relative to the rounding of the dtype, in the mean."""
    case = fitting(backend, case)
    inputs = on_gpu(case, dtype)
    found, truth = values(backend, case, inputs), values("reference", case, inputs.double())
    limit = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for value, expected in zip(found, truth, strict=True):
        assert torch.isfinite(value).all()
        assert (value.double() - expected).norm() <= limit * expected.norm()


SHIFTED = PRODUCTION[2]


def test_repeats_bit_by_bit(backend):
    inputs = on_gpu(SHIFTED, torch.bfloat16)
    assert all(
        torch.equal(a, b)
        for a, b in zip(values(backend, SHIFTED, inputs), values(backend, SHIFTED, inputs), strict=True)
    )


def test_never_synchronises(backend):
    inputs = on_gpu(SHIFTED, torch.bfloat16)
    values(backend, SHIFTED, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        values(backend, SHIFTED, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph(backend):
    """Captured once, replayed on other values: forward and backward."""
    inputs = on_gpu(SHIFTED, torch.bfloat16)
    for _ in range(2):
        values(backend, SHIFTED, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = values(backend, SHIFTED, inputs)
    with torch.no_grad():
        inputs.qkv.copy_(inputs.qkv.flip(1))
        inputs.bias_table.mul_(-1)
    graph.replay()
    for value, expected in zip(captured, values(backend, SHIFTED, inputs), strict=True):
        assert torch.equal(value, expected)


class Attention(torch.nn.Module):
    """Window attention of a volume with weights; returns a nested result, which `graphed` has to handle."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(48, 144)
        self.table = torch.nn.Parameter(torch.randn(13**3, 3))

    def forward(self, x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        return {"out": [window_attention(self.qkv(x), self.table, 7, 3)]}


def test_graphed(backend):
    """The same results as without a graph, for each shape; weights written in place and weights that moved are seen."""
    net = Attention().cuda().eval()
    run_graph = graphed(net, most_graphs=2)
    results = []
    with torch.autocast("cuda", torch.bfloat16):
        for mode in (torch.no_grad, torch.inference_mode):
            for extent in (9, 14, 9):
                with mode():
                    x = torch.randn(1, extent, 9, 8, 48, device="cuda")
                    results.append((run_graph(x)["out"][0], net(x)["out"][0]))
        with torch.no_grad():
            net.table.mul_(-1)
            results.append((run_graph(x)["out"][0], net(x)["out"][0]))
            net.table = torch.nn.Parameter(torch.randn_like(net.table))
            results.append((run_graph(x)["out"][0], net(x)["out"][0]))
    for value, expected in results:  # none was overwritten by a later one
        assert torch.equal(value, expected)


def test_memory(backend):
    """Training keeps the output and one float per score row; scores are never stored."""
    case = PRODUCTION[0]
    inputs = on_gpu(case, torch.bfloat16)
    values(backend, case, inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = run(backend, case, inputs)
    kept = torch.cuda.memory_allocated() - before
    gradients(out, inputs)
    results = 2 * (out.numel() + inputs.qkv.numel())
    extra = torch.cuda.max_memory_allocated() - before - results
    assert kept <= out.numel() * 2 + out.numel() // 16 * 4 + (1 << 20)
    assert extra <= 0.05 * case.scores * 2 * 2  # 5 % of scores and weights in 16 bits, which eager attention keeps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(2, 24, 23, 25, 96), (1, 30, 17, 5)], ids=str)
def test_partition(shape, dtype):
    x = torch.randn(shape, device="cuda").mul(9).to(dtype)
    windows = window_partition(x, 7, 3)
    assert torch.equal(windows, window_partition(x, 7, 3, backend="reference"))
    assert torch.equal(window_reverse(windows, 7, 3, shape[1:-1]), x)


NORMS = {"instance_norm_act": test_instance_norm_act, "layer_norm": test_layer_norm}
NORM_CALLS = [
    pytest.param(name, case, dtype, id=f"{name}, {case.name}, {dtype}")
    for name, module in NORMS.items()
    for case in module.CASES
    for dtype in DTYPES
]


@pytest.fixture
def norms(backend) -> str:
    """The backend, which has kernels for norms."""
    if backends.BACKENDS[backend].kernel("layer_norm") is None:
        pytest.skip(f"backend {backend}: it has no kernels for norms")
    return backend


@pytest.mark.parametrize(("name", "case", "dtype"), NORM_CALLS)
def test_norm(norms, name, case, dtype):
    NORMS[name].check(norms, case, dtype, "cuda")


@pytest.mark.parametrize("residual", ["none", "normalized"])
def test_norm_of_large_means(norms, residual):
    test_instance_norm_act.check_large_means(norms, residual, "cuda")


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_norm_rounds_once(norms, out_dtype):
    test_layer_norm.check_rounding(norms, torch.bfloat16, out_dtype, "cuda")


VOLUMES = [(1, 48, 96, 96, 96), (2, 96, 24, 24, 24), (1, 768, 3, 3, 3)]


@pytest.mark.parametrize("residual", ["none", "plain", "normalized"])
@pytest.mark.parametrize("shape", VOLUMES, ids=str)
def test_instance_norms_of_production_shapes(norms, shape, residual):
    """Against PyTorch's layers in float64; twice the same; in place the same; and captured in a CUDA graph."""
    case = test_instance_norm_act.Case("production", shape, residual)
    leaves, grad_out = test_instance_norm_act.make_inputs(case, torch.bfloat16, "cuda")

    def compute(name: str) -> list[torch.Tensor]:
        out = test_instance_norm_act.fused(case, leaves, name)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]

    value, again = compute(norms), compute(norms)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out = test_instance_norm_act.plain(case, wide)
    truth = [out.detach(), *torch.autograd.grad(out, wide, grad_out.double())]
    for v, t in zip(value, truth, strict=True):
        assert (v.double() - t).norm() <= 1e-2 * t.norm()
    assert all(torch.equal(a, b) for a, b in zip(value, again, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compute(norms)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(value, captured, strict=True))
    with torch.no_grad():
        inplace = instance_norm_act(
            leaves[0], *leaves[1:], normalize_residual=residual == "normalized", inplace=True, backend=norms
        )
    assert torch.equal(inplace, value[0])


def test_instance_norm_beyond_32_bits(norms):
    """The last voxels of a volume of more than 2^31 elements."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.zeros(1, 48, 360, 360, 352, dtype=torch.float16, device="cuda").to(memory_format=torch.channels_last_3d)
    assert x.numel() > 2**31
    x[..., -1, -1] = 3
    expected = x[0, 0].double()
    expected = ((expected - expected.mean()) / expected.std(correction=0)).half()
    with torch.no_grad():
        instance_norm_act(x, inplace=True, negative_slope=1.0)
    assert (x[0, 47] - expected).abs().max() <= 1e-2 * expected.abs().max()
    assert (x[0, 0] - x[0, 47]).abs().max() == 0


CONVOLUTIONS = (
    convolutions.Case("the first", (96, 96, 96), 1, out=48),
    convolutions.Case("four channels", (20, 13, 30), 4, out=48, batch=2),
    convolutions.Case("48 channels", (96, 96, 96), 48, out=48),
    convolutions.Case("a concatenation", (20, 13, 30), 48, skip=48, out=48, batch=2),
    convolutions.Case("a wide concatenation", (24, 24, 24), 96, skip=96, out=64),
    convolutions.Case("1×1×1 of a concatenation", (20, 13, 30), 48, skip=48, out=48, kernel=1, batch=2),
    convolutions.Case("1×1×1 of the first", (96, 96, 96), 1, out=48, kernel=1),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: case.name)
def test_convolution(backend, case, dtype):
    """Against PyTorch's in float64; twice the same; captured in a CUDA graph; gradients where the backend has them."""
    channels = case.channels, case.skip, case.out
    call = ConvolutionCall(device="cuda", dtype=dtype, window=(case.kernel,) * 3, channels=channels)
    if reason := decline_reason(backend, call):
        pytest.skip(f"backend {backend}: {reason}")
    backward = decline_reason(backend, replace(call, backward=True)) is None
    leaves, grad_out = convolutions.make_inputs(case, dtype)
    leaves, grad_out = [leaf.detach().cuda().requires_grad_(backward) for leaf in leaves], grad_out.cuda()

    def compute(run, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        out = run(*inputs)
        found = torch.autograd.grad(out, inputs, grad_out.to(out.dtype)) if backward else ()
        return [out.detach(), *found]

    truth = compute(convolutions.plain, [leaf.detach().double().requires_grad_(backward) for leaf in leaves])
    value, again = compute(convolution, leaves), compute(convolution, leaves)
    for v, t in zip(value, truth, strict=True):
        assert (v.double() - t).norm() <= 1e-2 * t.norm()
    assert all(torch.equal(a, b) for a, b in zip(value, again, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compute(convolution, leaves)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(value, captured, strict=True))


def test_offsets_beyond_32_bits():
    """The last window of a tensor of more than 2^31 elements."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    extent, heads, head_dim = 252, 3, 16
    batch = math.ceil(2**31 / (extent**3 * 3 * heads * head_dim)) + 1
    qkv = torch.zeros(batch, extent, extent, extent, 3 * heads * head_dim, dtype=torch.float16, device="cuda")
    qkv[-1, -7:, -7:, -7:] = torch.randn(7, 7, 7, qkv.shape[-1], device="cuda")
    table = torch.randn(13**3, heads, device="cuda")
    out = window_attention(qkv, table, 7)
    last = window_attention(qkv[-1:, -7:, -7:, -7:].contiguous(), table, 7)
    assert torch.equal(out[-1:, -7:, -7:, -7:], last)
