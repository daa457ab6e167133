"""`window_attention`: every backend through one contract, and what surrounds the kernel."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from monai.networks.nets import swin_unetr as monai
from torch import nn

from swin_kernels import geometry, window_attention
from swin_kernels.backends.cpu import window_attention as cpu_attention
from swin_kernels.backends.reference import window_attention as reference

from . import cases as table
from .cases import (
    BASE,
    CASES,
    DTYPES,
    SATURATED_CASES,
    SEED,
    Case,
    Inputs,
    check_forward_backward,
    check_gradients_in_16_bits,
    gradients,
    make_inputs,
    run,
)
from .tolerances import ARITHMETIC, assert_close, largest

PAIRS = [pytest.param(case, dtype, id=f"{case.name}, {dtype}") for dtype in DTYPES for case in table.cases(dtype)]

# Small enough for finite differences; pads, clips and shifts.
TINY = (
    Case("2d padded shifted", (3, 4), (2, 3), (1, 1), head_dim=2),
    Case("3d clipped padded shifted", (2, 3, 3), (3, 2, 2), (1, 1, 0), head_dim=1),
    Case("batch 2 scaled", (3, 2), (2, 2), (1, 0), batch=2, heads=1, head_dim=3, scale=0.8),
    Case("without pad", (3, 3), (2, 2), (1, 1), pad=False, heads=1, head_dim=2),
    Case("dropout", (3, 4), (2, 3), (1, 1), head_dim=2, dropout_p=0.4),
)


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize(("case", "dtype"), PAIRS)
def test_contract(backend, case, dtype):
    check_forward_backward(backend, case, dtype)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SATURATED_CASES, ids=lambda case: case.name)
def test_gradients_where_the_softmax_is_saturated(backend, case, dtype, dropout_p):
    check_gradients_in_16_bits(backend, replace(case, dropout_p=dropout_p), dtype)


@st.composite
def random_cases(draw) -> Case:
    axes = draw(st.sampled_from([2, 3]))
    window = tuple(draw(st.integers(1, 7 if axes == 2 else 5)) for _ in range(axes))
    return Case(
        name="random",
        spatial=tuple(draw(st.integers(1, 11 if axes == 2 else 7)) for _ in range(axes)),
        window=window,
        shift=tuple(draw(st.integers(0, w - 1)) for w in window),
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 4)),
        head_dim=draw(st.integers(1, 40)),
        pad=draw(st.booleans()),
        layout=draw(st.sampled_from(["contiguous", "channels_first", "strided"])),
        dropout_p=draw(st.sampled_from([0.0, 0.2])),
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=random_cases(), dtype=st.sampled_from(DTYPES))
def test_contract_on_random_cases(backend, case, dtype):
    # Below a few thousand scores the 16-bit errors of plain PyTorch depend on a few elements' luck and are no measure.
    assume(case.scores > (3_000 if dtype.itemsize == 2 else 0) and case.scores < 400_000)
    check_forward_backward(backend, case, dtype)


# The truth itself


def naive_attention(qkv: np.ndarray, bias_table: np.ndarray, pad: np.ndarray, case: Case) -> np.ndarray:
    """The contract word by word, one score at a time: ``(B, *S, C)``."""
    spatial, width = case.spatial, case.heads * case.head_dim
    window = [s if s <= w else w for s, w in zip(spatial, case.window, strict=True)]
    shift = [0 if s <= w else d for s, w, d in zip(spatial, case.window, case.shift, strict=True)]
    padded = [math.ceil(s / w) * w for s, w in zip(spatial, window, strict=True)]
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    out = np.full((case.batch, *spatial, width), np.nan)
    corners = itertools.product(*(range(0, p, w) for p, w in zip(padded, window, strict=True)))
    for b, corner in itertools.product(range(case.batch), list(corners)):
        places, values, regions = [], [], []
        for offset in itertools.product(*(range(w) for w in window)):
            position = [c + o for c, o in zip(corner, offset, strict=True)]
            place = tuple((x + d) % p for x, d, p in zip(position, shift, padded, strict=True))
            places.append(place if all(x < s for x, s in zip(place, spatial, strict=True)) else None)
            values.append(pad if places[-1] is None else qkv[(b, *place)])
            regions.append(
                [0 if not d or x < p - w else 1 if x < p - d else 2
                 for x, w, d, p in zip(position, window, shift, padded, strict=True)]
            )  # fmt: skip
        for h in range(case.heads):
            q, k, v = (
                [x[part * width + h * case.head_dim : part * width + (h + 1) * case.head_dim] for x in values]
                for part in range(3)
            )
            for i, place in enumerate(places):
                if place is None:
                    continue
                scores = []
                for j in range(len(places)):
                    row = 0
                    for a, c, w in zip(
                        np.unravel_index(i, case.window), np.unravel_index(j, case.window), case.window, strict=True
                    ):
                        row = row * (2 * w - 1) + a - c + w - 1
                    mask = 0 if regions[i] == regions[j] else -100
                    scores.append(scale * (q[i] @ k[j]) + bias_table[row, h] + mask)
                weights = np.exp(np.array(scores) - max(scores))
                attended = weights @ np.array(v) / weights.sum()
                out[(b, *place)][h * case.head_dim : (h + 1) * case.head_dim] = attended
    return out


NAIVE = [case for case in CASES if case.scores < 30_000 and case.batch and not case.dropout_p]


@pytest.mark.parametrize("case", NAIVE, ids=lambda case: case.name)
def test_truth_is_the_contract(case):
    inputs = make_inputs(case, torch.float64)
    pad = torch.zeros(inputs.qkv.shape[-1]) if inputs.pad_qkv is None else inputs.pad_qkv
    naive = naive_attention(*(t.detach().numpy() for t in (inputs.qkv, inputs.bias_table, pad)), case)
    plain, _ = table.plain_attention(inputs.qkv, inputs.bias_table, inputs.pad_qkv, case)
    torch.testing.assert_close(plain.detach(), torch.from_numpy(naive), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name", [case.name for case in CASES if case.pad and not case.dropout_p and case.scale is None]
)
def test_equals_monai(backend, name):
    """The attention branch of MONAI's block without its projections: output and all gradients."""
    case = replace(case_named(name), batch=2)
    channels = case.heads * case.head_dim
    torch.manual_seed(0)
    block = monai.SwinTransformerBlock(channels, case.heads, case.window, case.shift, qkv_bias=True).double()
    block.norm1 = block.attn.proj = nn.Identity()
    nn.init.normal_(block.attn.relative_position_bias_table)
    x = torch.randn(case.batch, *case.spatial, channels, dtype=torch.float64)
    window, shift = monai.get_window_size(case.spatial, case.window, case.shift)
    padded = [-(-s // w) * w for s, w in zip(case.spatial, window, strict=True)]
    # MONAI never reads the mask of an unshifted volume.
    mask = monai.compute_mask(padded, window, shift, "cpu").double() if any(shift) else None
    theirs = block.forward_part1(x, mask)
    ours = window_attention(
        block.attn.qkv(x),
        block.attn.relative_position_bias_table,
        case.window,
        case.shift,
        pad_qkv=block.attn.qkv.bias,
        backend=backend,
    )
    parameters = [block.attn.qkv.weight, block.attn.qkv.bias, block.attn.relative_position_bias_table]
    grad = torch.randn_like(theirs)
    for name, t, o in zip(
        ["output", "grad of weight", "grad of bias", "grad of table"],
        [theirs, *torch.autograd.grad(theirs, parameters, grad)],
        [ours, *torch.autograd.grad(ours, parameters, grad)],
        strict=True,
    ):
        assert largest(o - t) <= 1e-12 * max(1.0, largest(t)), name


# The contract can fail: each of these is a mistake that a kernel could make.


def _without_masks(monkeypatch):
    monkeypatch.setattr(reference, "region_labels", lambda grid: 0 * geometry.region_labels(grid))


def _infinite_mask(monkeypatch):
    monkeypatch.setattr(reference, "MASK_VALUE", -1e9)


def _geometric_bias(monkeypatch):
    """Bias looked up in the clipped window's raster."""

    def index(nominal, tokens):
        window = [max(1, round(tokens ** (1 / len(nominal))))] * len(nominal)
        own = torch.stack(torch.meshgrid(*(torch.arange(w) for w in window), indexing="ij")).flatten(1)
        if own.shape[1] != tokens:
            return geometry.bias_index(nominal, tokens)
        rows = torch.zeros(tokens, tokens, dtype=torch.long)
        for c, w in zip(own, nominal, strict=True):
            rows = rows * (2 * w - 1) + c[:, None] - c[None, :] + w - 1
        return rows

    monkeypatch.setattr(reference, "bias_index", index)


def _transposed_bias(monkeypatch):
    monkeypatch.setattr(reference, "bias_index", lambda *a: geometry.bias_index(*a).T)


def _edit_arguments(monkeypatch, edit):
    forward = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *args: forward(*edit(list(args))))


def _ignored_pad(monkeypatch):
    _edit_arguments(monkeypatch, lambda a: [*a[:2], None, *a[3:]])


def _ignored_scale(monkeypatch):
    _edit_arguments(monkeypatch, lambda a: [*a[:5], (a[0].shape[-1] // (3 * a[1].shape[1])) ** -0.5, a[6]])


def _other_seed(monkeypatch):
    _edit_arguments(monkeypatch, lambda a: [*a[:3], a[3] if a[3] is None else a[3] + 2**40, *a[4:]])


def _edit_gradients(monkeypatch, edit):
    backward = reference.backward
    monkeypatch.setattr(reference, "backward", lambda *args: edit(*backward(*args)))


def _pad_gradient_lost(monkeypatch):
    _edit_gradients(monkeypatch, lambda qkv, bias, pad: (qkv, bias, 0 * pad))


def _gradient_slightly_off(monkeypatch):
    _edit_gradients(monkeypatch, lambda qkv, bias, pad: (qkv * 1.0001, bias, pad))


def _one_row_of_table_unwritten(monkeypatch):
    def edit(qkv, bias, pad):
        bias[0] = torch.empty_like(bias[0])
        return qkv, bias, pad

    _edit_gradients(monkeypatch, edit)


MISTAKES = [
    _without_masks,
    _infinite_mask,
    _geometric_bias,
    _transposed_bias,
    _ignored_pad,
    _ignored_scale,
    _other_seed,
    _pad_gradient_lost,
    _gradient_slightly_off,
    _one_row_of_table_unwritten,
]


FOUND = [
    pytest.param(mistake, dtype, id=f"{mistake.__name__.strip('_')}-{dtype}")
    for mistake in MISTAKES
    for dtype in (torch.float32, torch.bfloat16)
    # A factor of 1.0001 is below the rounding of bfloat16.
    if (mistake, dtype) != (_gradient_slightly_off, torch.bfloat16)
]


@pytest.mark.parametrize(("mistake", "dtype"), FOUND)
def test_contract_catches(monkeypatch, mistake, dtype):
    mistake(monkeypatch)
    failed = 0
    for case in table.cases(dtype, most_scores=100_000):
        try:
            check_forward_backward("reference", case, dtype)
        except AssertionError:
            failed += 1
    assert failed


def test_mask_is_finite(backend):
    """A bias of 200 wins against the mask of -100: two tokens of different regions attend to each other."""
    qkv = torch.zeros(1, 4, 1, 3, dtype=torch.float64)
    qkv[0, :, 0, 2] = torch.arange(4.0)
    bias_table = torch.zeros(3, 1, dtype=torch.float64)
    bias_table[[0, 2]] = 200.0
    out = window_attention(qkv, bias_table, (2, 1), (1, 0), backend=backend)
    # Shifted windows hold tokens (1, 2) and (3, 0); the latter two lie in different regions.
    torch.testing.assert_close(out.flatten(), torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64))
    out = window_attention(qkv, 0 * bias_table, (2, 1), (1, 0), backend=backend)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.0, 1.5, 1.5, 3.0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["3d padded shifted", "3d clipped padded shifted", "window 7", "large scores"])
def test_log_sum_exp(backend, name, dtype):
    """The operator's second result, which the backward reads: float32 for the 16-bit dtypes."""
    case = case_named(name)
    inputs = make_inputs(case, dtype)
    _, lse = torch.ops.swin_kernels.window_attention(
        *inputs.leaves, None, case.window, case.shift, case.head_dim**-0.5, 0.0, backend
    )
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    wide = inputs.double()
    _, truth = table.plain_attention(*wide.leaves, case)
    assert_close("log-sum-exp", lse, truth.to(lse.dtype), truth, largest(truth))


# Gradients


def as_function(case: Case, backend: str):
    """`window_attention` of (qkv, bias_table, pad_qkv) on `backend`."""

    def function(qkv, bias_table, pad_qkv=None):
        return run(backend, case, Inputs(qkv, bias_table, pad_qkv, qkv))

    return function


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_gradcheck(backend, case):
    inputs = make_inputs(case, torch.float64)
    assert torch.autograd.gradcheck(as_function(case, backend), inputs.leaves)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_each_gradient_alone(backend, wanted):
    inputs = make_inputs(BASE, torch.float64)
    full = gradients(run(backend, BASE, inputs), inputs)
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs.leaves)]
    out = run(backend, BASE, Inputs(*leaves, inputs.grad_out))
    got = torch.autograd.grad(out, [leaves[i] for i in wanted], inputs.grad_out)
    for i, g in zip(wanted, got, strict=True):
        torch.testing.assert_close(g, full[i], rtol=1e-12, atol=1e-12)


def test_no_grad_and_inference_mode(backend):
    inputs = make_inputs(BASE, torch.float32)
    expected = run(backend, BASE, inputs)
    assert expected.requires_grad
    with torch.no_grad():
        assert torch.equal(run(backend, BASE, inputs), expected)
    with torch.inference_mode():
        out = run(backend, BASE, inputs)
    assert torch.equal(out, expected)
    assert not out.requires_grad


def test_expanded_gradient(backend):
    """The gradient of a sum is one element with stride 0."""
    inputs = make_inputs(BASE, torch.float64)
    expected = torch.autograd.grad(run(backend, BASE, inputs), inputs.leaves, torch.ones_like(inputs.grad_out))
    got = torch.autograd.grad(run(backend, BASE, inputs).sum(), inputs.leaves)
    for e, g in zip(expected, got, strict=True):
        assert torch.equal(e, g)


def test_second_derivative_raises(backend):
    inputs = make_inputs(TINY[0], torch.float64)
    grad = torch.autograd.grad(run(backend, TINY[0], inputs).square().sum(), inputs.qkv, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="window_attention"):
        grad.square().sum().backward()


# Dropout


def test_dropout_is_the_same_on_every_backend(cpu_backend):
    case = replace(BASE, dropout_p=0.3, batch=2)
    inputs = make_inputs(case, torch.float64)

    def call(backend: str, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        arguments = {"pad_qkv": inputs.pad_qkv, "dropout_p": case.dropout_p, "backend": backend}
        return window_attention(inputs.qkv, inputs.bias_table, case.window, case.shift, **arguments)

    torch.testing.assert_close(call(cpu_backend, 3), call("reference", 3), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(call(cpu_backend, 3), call(cpu_backend, 4))


def test_dropout_keeps_the_mean(backend):
    """Over many seeds the mean is that without dropout, within four standard errors."""
    case = Case("one window", (3, 3), (3, 3), heads=1, head_dim=4)
    inputs = make_inputs(case, torch.float64)
    without = run(backend, case, inputs).detach()
    torch.manual_seed(0)
    arguments = {"pad_qkv": inputs.pad_qkv, "dropout_p": 0.4, "backend": backend}
    samples = torch.stack(
        [window_attention(inputs.qkv, inputs.bias_table, case.window, **arguments).detach() for _ in range(400)]
    )
    error = (samples.mean(0) - without) / (samples.std(0) / 20)
    assert error.abs().max() < 4.5
    assert samples.std(0).min() > 0.01


# Reproducibility of the C++ kernels


WIDE = Case("wide", (15, 9, 8), (7, 7, 7), (3, 3, 3), batch=2, heads=3, head_dim=16)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(cpu_backend, threads, dtype, dropout_p):
    case = replace(WIDE, dropout_p=dropout_p, spatial=(9, 9, 8))
    inputs = make_inputs(case, dtype)
    results = []
    for count in (1, 1, 2, 3, 7):
        threads(count)
        out = run(cpu_backend, case, inputs)
        results.append([out.detach(), *gradients(out, inputs)])
    for other in results[1:]:
        for name, a, b in zip(table.NAMES, results[0], other, strict=True):
            assert torch.equal(a, b), name


def test_concurrent_callers(cpu_backend):
    """Concurrent calls from several Python threads do not disturb each other."""
    case = replace(WIDE, spatial=(9, 8, 7), batch=1)
    inputs = [make_inputs(replace(case, name=f"caller {i}"), torch.float32) for i in range(4)]

    def work(own: Inputs) -> list[torch.Tensor]:
        out = run(cpu_backend, case, own)
        return [out.detach(), *gradients(out, own)]

    alone = [work(own) for own in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, inputs * 3))
    for i, results in enumerate(together):
        for a, b in zip(alone[i % 4], results, strict=True):
            assert torch.equal(a, b)


def test_contract_on_each_instruction_set(instruction_set):
    for dtype in DTYPES:
        for case in table.cases(dtype, most_scores=100_000):
            check_forward_backward("cpu", case, dtype)


ISA_PROGRAM = """
import swin_kernels, torch
swin_kernels.window_attention(torch.randn(1, 4, 4, 12), torch.randn(9, 1), 2, backend="cpu")
"""


def test_unknown_instruction_set_raises(cpu_backend):
    environment = os.environ | {"SWIN_KERNELS_ISA": "mmx", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", ISA_PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert "SWIN_KERNELS_ISA" in message
    assert "mmx" in message
    assert "baseline" in message


# PyTorch's machinery


def operator_arguments(case: Case, dtype: torch.dtype, backend: str) -> tuple:
    inputs = make_inputs(case, dtype)
    seed = torch.tensor([SEED]) if case.dropout_p else None
    scale = case.head_dim**-0.5
    tensors = (inputs.qkv, inputs.bias_table, inputs.pad_qkv, seed)
    return (*tensors, case.window, case.shift, scale, case.dropout_p, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", TINY[:2] + TINY[3:], ids=lambda case: case.name)
def test_opcheck(backend, case, dtype):
    torch.library.opcheck(torch.ops.swin_kernels.window_attention.default, operator_arguments(case, dtype, backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", TINY[:2] + TINY[3:], ids=lambda case: case.name)
def test_opcheck_of_backward(backend, case, dtype):
    *tensors, window, shift, scale, dropout_p, backend = operator_arguments(case, dtype, backend)
    tensors = [None if t is None else t.detach() for t in tensors]
    settings = (window, shift, scale, dropout_p, backend)
    out, lse = torch.ops.swin_kernels.window_attention(*tensors, *settings)
    torch.library.opcheck(
        torch.ops.swin_kernels.window_attention_backward.default,
        (torch.randn_like(out), *tensors, out, lse, *settings),
    )


class Block(nn.Module):
    """A user's module around the operator."""

    def __init__(self, case: Case, backend: str, dropout_p: float = 0.0):
        super().__init__()
        channels = case.heads * case.head_dim
        self.case, self.backend, self.dropout_p = case, backend, dropout_p
        self.qkv = nn.Linear(channels, 3 * channels)
        self.bias_table = nn.Parameter(torch.randn(geometry.bias_table_length(case.window), case.heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + window_attention(
            self.qkv(x),
            self.bias_table,
            self.case.window,
            self.case.shift,
            pad_qkv=self.qkv.bias,
            dropout_p=self.dropout_p,
            backend=self.backend,
        )


def block_and_input(backend: str, batch: int = 2, dropout_p: float = 0.0) -> tuple[Block, torch.Tensor]:
    torch.manual_seed(0)
    block = Block(BASE, backend, dropout_p)
    return block, torch.randn(batch, *BASE.spatial, BASE.heads * BASE.head_dim)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compile_without_graph_break(backend, dropout_p):
    block, x = block_and_input(backend, dropout_p=dropout_p)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for module in (block, compiled):
        torch.manual_seed(1)
        out = module(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(block.parameters()))])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_compile_with_dynamic_shapes(backend):
    block, x = block_and_input(backend)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x), block(x))
    larger = torch.randn(3, 7, 5, 6, x.shape[-1])
    torch.testing.assert_close(compiled(larger), block(larger))


def test_compile_with_inductor(backend):
    if not any(os.access(os.path.join(p, c), os.X_OK) for p in os.get_exec_path() for c in ("c++", "g++", "clang++")):
        pytest.skip("torch.compile's inductor needs a C++ compiler")
    block, x = block_and_input(backend)
    out = torch.compile(block, fullgraph=True)(x)
    torch.testing.assert_close(out, block(x))


def test_export(backend):
    block, x = block_and_input(backend)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},))
    targets = [str(node.target) for node in program.graph.nodes]
    assert "swin_kernels.window_attention.default" in targets
    other = torch.randn(5, *x.shape[1:])
    torch.testing.assert_close(program.module()(other), block(other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, dtype):
    inputs = make_inputs(BASE, torch.float32)
    with torch.autocast("cpu", dtype):
        out = run(backend, BASE, inputs)
    assert out.dtype == dtype
    narrow = Inputs(inputs.qkv.to(dtype), inputs.bias_table, inputs.pad_qkv.to(dtype), inputs.grad_out.to(dtype))
    expected = run(backend, BASE, narrow)
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out, inputs.leaves, narrow.grad_out)
    wanted = torch.autograd.grad(expected, inputs.leaves, narrow.grad_out)
    for grad, want in zip(grads, wanted, strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, want)


def test_autocast_leaves_float64(backend):
    inputs = make_inputs(BASE, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(backend, BASE, inputs)
    assert torch.equal(out, run(backend, BASE, inputs))


def test_autocast_inside_a_block(backend):
    """Linear layers produce bfloat16 under autocast while their parameters stay float32: the operator gets both."""
    block, x = block_and_input(backend)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    expected = block(x)
    assert largest(out - expected) < 0.05
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), list(block.parameters())))


def test_inputs_stay_untouched(backend):
    inputs = make_inputs(BASE, torch.float32)
    before = [t.detach().clone() for t in [*inputs.leaves, inputs.grad_out]]
    out = run(backend, BASE, inputs)
    gradients(out, inputs)
    for t, b in zip([*inputs.leaves, inputs.grad_out], before, strict=True):
        assert torch.equal(t, b)


def test_nan_stays_in_its_window(backend):
    """NaN in, NaN out, in the windows that read it and in no others."""
    qkv = torch.randn(1, 6, 6, 12)
    bias_table = torch.randn(25, 2)
    qkv[0, 0, 0, 5] = math.nan  # part of k, head 0
    out = window_attention(qkv, bias_table, 3, backend=backend)
    poisoned = out.isnan()
    assert poisoned[0, :3, :3, :2].all()
    assert poisoned.sum() == 9 * 2


def test_arithmetic_table_covers_every_dtype():
    assert set(ARITHMETIC) == set(DTYPES) == set(cpu_attention.DTYPES)
