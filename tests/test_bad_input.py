"""Bad input gets an error that names the argument, or a defined result, and never a crash."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from swin_kernels import backends, window_attention, window_partition, window_reverse
from swin_kernels.geometry import WindowGrid
from swin_kernels.ops.projected_window_attention import projected_window_attention

ARGUMENTS = {
    "window_attention": (
        "qkv bias_table window_size shift_size pad_qkv scale dropout_p backend",
        window_attention,
    ),
    "projected_window_attention": (
        "x weight bias bias_table window_size shift_size norm_weight norm_bias norm_eps out_weight out_bias scale "
        "backend",
        projected_window_attention,
    ),
    "window_partition": ("x window_size shift_size backend", window_partition),
    "window_reverse": ("windows window_size shift_size spatial_shape backend", window_reverse),
}


@pytest.fixture(params=["reference", "cpu"])
def backend(request) -> str:
    if reason := backends.BACKENDS[request.param].unavailable():
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


def assert_named(error: Exception, operator: str) -> None:
    """The message says which operator and which of its arguments, in the first words."""
    names = ARGUMENTS[operator][0].replace(" ", "|")
    assert re.match(rf"{operator}: .*\b({names})\b", str(error)), f"{type(error).__name__}: {error}"


def attention(backend=None, **changes) -> torch.Tensor:
    """A good call of `window_attention` with some of its arguments changed."""
    arguments = {
        "qkv": torch.randn(2, 4, 5, 12),
        "bias_table": torch.randn(25, 2),
        "window_size": 3,
        "shift_size": 1,
        "pad_qkv": torch.randn(12),
    }
    return window_attention(**(arguments | {"backend": backend} | changes))


def projected(backend=None, **changes) -> torch.Tensor:
    """A good call of `projected_window_attention` with some of its arguments changed."""
    arguments = {
        "x": torch.randn(2, 4, 5, 16),
        "weight": torch.randn(48, 16),
        "bias": torch.randn(48),
        "bias_table": torch.randn(25, 2),
        "window_size": 3,
        "shift_size": 1,
        "norm_weight": torch.randn(16),
        "norm_bias": torch.randn(16),
        "norm_eps": 1e-5,
        "out_weight": torch.randn(16, 16),
        "out_bias": torch.randn(16),
    }
    return projected_window_attention(**(arguments | {"backend": backend} | changes))


def partition(backend=None, **changes) -> torch.Tensor:
    arguments = {"x": torch.randn(2, 4, 5, 3), "window_size": 3, "shift_size": 1}
    return window_partition(**(arguments | {"backend": backend} | changes))


def reverse(backend=None, **changes) -> torch.Tensor:
    arguments = {"windows": torch.randn(8, 9, 3), "window_size": 3, "shift_size": 1, "spatial_shape": (4, 5)}
    return window_reverse(**(arguments | {"backend": backend} | changes))


CALLS = {
    "window_attention": attention,
    "projected_window_attention": projected,
    "window_partition": partition,
    "window_reverse": reverse,
}

sparse = torch.eye(4).to_sparse()
meta = torch.device("meta")

# operator, the argument that the message has to name, the arguments changed
BAD = [
    # rank and shape
    ("window_attention", "qkv", {"qkv": torch.randn(4, 5, 12)}),
    ("window_attention", "qkv", {"qkv": torch.randn(2, 3, 3, 3, 3, 12)}),
    ("window_attention", "qkv", {"qkv": torch.tensor(1.0)}),
    ("window_attention", "qkv", {"qkv": torch.randn(2, 0, 5, 12)}),
    ("window_attention", "qkv", {"qkv": torch.randn(2, 4, 5, 0)}),
    ("window_attention", "qkv", {"qkv": torch.randn(2, 4, 5, 10)}),
    ("window_attention", "qkv", {"qkv": torch.randn(2, 4, 5, 9)}),
    ("window_attention", "bias_table", {"bias_table": torch.randn(24, 2)}),
    ("window_attention", "bias_table", {"bias_table": torch.randn(25)}),
    ("window_attention", "bias_table", {"bias_table": torch.randn(25, 0)}),
    ("window_attention", "bias_table", {"bias_table": torch.randn(25, 2, 1)}),
    ("window_attention", "pad_qkv", {"pad_qkv": torch.randn(11)}),
    ("window_attention", "pad_qkv", {"pad_qkv": torch.randn(1, 12)}),
    ("window_attention", "pad_qkv", {"pad_qkv": torch.tensor(0.0)}),
    ("window_partition", "x", {"x": torch.randn(5, 3)}),
    ("window_partition", "x", {"x": torch.randn(1, 4, 0, 3)}),
    ("window_partition", "x", {"x": torch.randn(1, 4, 4, 0)}),
    ("window_reverse", "windows", {"windows": torch.randn(8, 9)}),
    ("window_reverse", "windows", {"windows": torch.randn(7, 9, 3)}),
    ("window_reverse", "windows", {"windows": torch.randn(8, 8, 3)}),
    ("window_reverse", "windows", {"windows": torch.randn(8, 9, 0)}),
    ("window_reverse", "spatial_shape", {"spatial_shape": (4,)}),
    ("window_reverse", "spatial_shape", {"spatial_shape": (4, 0)}),
    ("window_reverse", "spatial_shape", {"spatial_shape": (4, -5)}),
    ("window_reverse", "spatial_shape", {"spatial_shape": (2, 2, 2, 2)}),
    ("window_reverse", "spatial_shape", {"spatial_shape": 4}),
    ("window_reverse", "spatial_shape", {"spatial_shape": None}),
    ("window_reverse", "spatial_shape", {"spatial_shape": "ab"}),
    ("window_reverse", "spatial_shape", {"spatial_shape": (4, 2**70)}),
    ("projected_window_attention", "x", {"x": torch.randn(4, 5, 16)}),
    ("projected_window_attention", "x", {"x": torch.randn(2, 0, 5, 16)}),
    ("projected_window_attention", "weight", {"x": torch.randn(2, 4, 5, 15)}),
    ("projected_window_attention", "weight", {"weight": torch.randn(16, 48)}),
    ("projected_window_attention", "bias", {"bias": torch.randn(16)}),
    ("projected_window_attention", "norm_weight", {"norm_weight": torch.randn(15)}),
    ("projected_window_attention", "out_weight", {"out_weight": torch.randn(16, 15)}),
    ("projected_window_attention", "out_bias", {"out_weight": None}),
    *(("projected_window_attention", "bias_table", {"bias_table": torch.randn(shape)})
      for shape in ((25,), (24, 2), (25, 0), (25, 2, 1), (), (9, 2))),
    ("projected_window_attention", "heads", {"bias_table": torch.randn(25, 3)}),
    # volumes of more elements than memory has addresses
    ("window_reverse", "spatial_shape", {"windows": torch.empty(0, 1, 1), "window_size": 1, "shift_size": 0,
                                         "spatial_shape": (2**30,) * 3}),
    ("window_reverse", "spatial_shape", {"windows": torch.empty(0, 1, 1), "window_size": 1, "shift_size": 0,
                                         "spatial_shape": (2**62, 4)}),
    # dtypes, layouts and types
    *(("window_attention", "qkv", {"qkv": torch.zeros(2, 4, 5, 12, dtype=dtype)})
      for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)),
    ("window_attention", "bias_table", {"bias_table": torch.zeros(25, 2, dtype=torch.float64)}),
    ("window_attention", "bias_table", {"bias_table": torch.zeros(25, 2, dtype=torch.bfloat16)}),
    ("window_attention", "bias_table", {"bias_table": torch.zeros(25, 2, dtype=torch.int64)}),
    ("window_attention", "pad_qkv", {"pad_qkv": torch.zeros(12, dtype=torch.float64)}),
    ("window_attention", "pad_qkv", {"pad_qkv": torch.zeros(12, dtype=torch.bfloat16)}),
    *(("window_attention", "qkv", {"qkv": value})
      for value in (None, [[1.0]], 3.0, "qkv", np.zeros((2, 4, 5, 12)), sparse)),
    *(("window_attention", "bias_table", {"bias_table": value}) for value in (None, [[1.0]], 3.0, sparse)),
    *(("window_attention", "pad_qkv", {"pad_qkv": value}) for value in ([0.0] * 12, 3.0, False, sparse)),
    *(("window_partition", "x", {"x": value}) for value in (None, [[1.0]], sparse)),
    *(("window_reverse", "windows", {"windows": value}) for value in (None, [[1.0]], sparse)),
    ("projected_window_attention", "x", {"x": torch.zeros(2, 4, 5, 16, dtype=torch.int64)}),
    ("projected_window_attention", "x", {"x": None}),
    *(("projected_window_attention", name, {name: torch.zeros(shape, dtype=dtype)})
      for name, shape in (("weight", (48, 16)), ("bias", 48), ("bias_table", (25, 2)), ("norm_weight", 16),
                          ("norm_bias", 16), ("out_weight", (16, 16)), ("out_bias", 16))
      for dtype in (torch.float64, torch.bfloat16, torch.int64)),
    *(("projected_window_attention", name, {name: value})
      for name in ("weight", "bias", "bias_table", "norm_weight", "out_weight") for value in ([1.0], 3.0, sparse)),
    *(("projected_window_attention", name, {name: None}) for name in ("weight", "bias_table")),
    # devices
    *(("projected_window_attention", name, {name: torch.zeros(shape, device=meta)})
      for name, shape in (("weight", (48, 16)), ("bias", 48), ("bias_table", (25, 2)), ("norm_weight", 16),
                          ("out_weight", (16, 16)), ("out_bias", 16))),
    ("window_attention", "bias_table", {"bias_table": torch.zeros(25, 2, device=meta)}),
    ("window_attention", "pad_qkv", {"pad_qkv": torch.zeros(12, device=meta)}),
    ("window_attention", "qkv", {"qkv": torch.zeros(2, 4, 5, 12, device=meta)}),
    # windows and shifts
    *((operator, "window_size", {"window_size": value})
      for operator in CALLS
      for value in (0, -1, (3, 0), (3,), (3, 3, 3), (), 3.0, "33", None, True, (3, None), (3, True), [[3], [3]],
                    torch.tensor(3), {3, 4}, math.inf, 2**63, 2**70)),
    *((operator, "shift_size", {"shift_size": value})
      for operator in CALLS
      for value in (-1, 3, (0, 3), (1,), (1, 1, 1), (), 1.0, "11", None, False, (1, None), 2**70, -(2**70))),
    # scalars
    *((operator, "scale", {"scale": value})
      for operator in ("window_attention", "projected_window_attention")
      for value in ("a", [1.0], 1j, torch.ones(2))),
    *(("projected_window_attention", "norm_eps", {"norm_eps": value})
      for value in ("a", [1.0], 1j, torch.ones(2), -1.0, math.nan, math.inf)),
    *(("window_attention", "dropout_p", {"dropout_p": value})
      for value in (-0.1, 1.0, 1.5, math.nan, math.inf, "a", None, [0.5], 0.5j, torch.ones(2))),
    *((operator, "backend", {"backend": value}) for operator in CALLS for value in ("", "gpu", 3, ["cpu"], b"cpu")),
]  # fmt: skip


def described(value: object) -> str:
    """A test id that is the same in every process: tensors by shape and dtype, not by their random elements."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}".removeprefix("torch.")
    if isinstance(value, dict):
        return ",".join(f"{name}={described(v)}" for name, v in value.items())
    if isinstance(value, tuple):
        return ",".join(map(described, value))
    return str(value)[:60]


@pytest.mark.parametrize(("operator", "argument", "changes"), BAD, ids=described)
def test_error_names_the_argument(backend, operator, argument, changes):
    with pytest.raises((TypeError, ValueError)) as caught:
        CALLS[operator](**({"backend": backend} | changes))
    assert_named(caught.value, operator)
    assert argument in str(caught.value)


@pytest.mark.parametrize("operator", CALLS)
def test_the_calls_that_are_changed_are_good(backend, operator):
    projected = operator == "projected_window_attention"  # not every processor has a kernel for so few channels
    CALLS[operator](backend=None if projected and backend == "cpu" else backend)


def test_empty_batch(backend):
    qkv = torch.randn(0, 4, 5, 12, requires_grad=True)
    bias_table = torch.randn(25, 2, requires_grad=True)
    pad_qkv = torch.randn(12, requires_grad=True)
    out = attention(backend, qkv=qkv, bias_table=bias_table, pad_qkv=pad_qkv)
    assert out.shape == (0, 4, 5, 4)
    grads = torch.autograd.grad(out.sum(), [qkv, bias_table, pad_qkv])
    assert grads[0].shape == qkv.shape
    assert torch.equal(grads[1], torch.zeros(25, 2))
    assert torch.equal(grads[2], torch.zeros(12))


EMPTY_PROGRAM = """
import sys, torch, swin_kernels as sk
from swin_kernels.ops.projected_window_attention import projected_window_attention
backend = sys.argv[1]
shape, table = (0, 2**18, 2**18), torch.randn(9, 1, requires_grad=True)
qkv = torch.empty(*shape, 6, requires_grad=True)
out = sk.window_attention(qkv, table, 2, 1, backend=backend)
assert out.shape == (*shape, 2)
grads = torch.autograd.grad(out.sum(), [qkv, table])
assert grads[0].shape == qkv.shape and torch.equal(grads[1], torch.zeros(9, 1))
x, weight = torch.empty(*shape, 16, requires_grad=True), torch.randn(48, 16, requires_grad=True)
out = projected_window_attention(x, weight, None, table, 2, 1, norm_eps=1e-5, backend=backend)
assert out.shape == x.shape
grads = torch.autograd.grad(out.sum(), [x, weight, table])
assert grads[0].shape == x.shape and not grads[1].any() and not grads[2].any()
windows = sk.window_partition(torch.empty(*shape, 3), 2, 1, backend=backend)
assert windows.shape == (0, 4, 3)
assert sk.window_reverse(windows, 2, 1, shape[1:], backend=backend).shape == (*shape, 3)
print("done")
"""


def test_an_empty_batch_of_huge_volumes_costs_nothing(backend):
    """The 2**34 windows of an empty batch would take minutes and gigabytes to list."""
    command = [sys.executable, "-c", EMPTY_PROGRAM, backend]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout.split() == ["done"], done.stderr


def test_meta_tensors_give_shapes():
    arguments = {"qkv": (2, 4, 5, 12), "bias_table": (25, 2), "pad_qkv": (12,)}
    out = attention(**{name: torch.zeros(shape, device=meta) for name, shape in arguments.items()})
    assert out.device == meta
    assert out.shape == (2, 4, 5, 4)
    assert partition(x=torch.zeros(2, 4, 5, 3, device=meta)).shape == (8, 9, 3)
    assert reverse(windows=torch.zeros(8, 9, 3, device=meta)).shape == (2, 4, 5, 3)


def test_windows_beyond_the_volume_are_clipped(backend):
    x = torch.randn(2, 4, 5, 3)
    for window in (5, 10**6, 2**31, 2**62, 2**63 - 1):
        windows = window_partition(x, window, 1, backend=backend)
        assert torch.equal(windows, x.flatten(1, 2))
        assert torch.equal(window_reverse(windows, window, 1, (4, 5), backend=backend), x)
    bias_table = torch.randn((2 * 1000 - 1) * 9, 2)
    out = attention(backend, bias_table=bias_table, window_size=(1000, 5), shift_size=0)
    assert out.isfinite().all()


def test_an_automatic_choice_never_fails_on_size():
    """The reference takes what the C++ kernels have no room for."""
    x = torch.randn(1, 260, 260, 1)
    assert window_partition(x, 260).shape == (1, 260 * 260, 1)
    x = torch.randn(1, 1, 2**16 + 1, 1)
    assert window_partition(x, (1, 2**16), 0).shape == (2, 2**16, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_non_finite_values_stay_in_their_window(backend, part, value):
    """A NaN or infinity reaches the windows that hold it, forward and backward, and no other."""
    torch.manual_seed(0)
    qkv = torch.randn(1, 6, 6, 12)
    qkv[0, 1, 1, 4 * part] = value  # head 0 of q, k or v
    qkv.requires_grad_()
    out = window_attention(qkv, torch.randn(25, 2), 3, backend=backend)
    out.sum().backward()
    for result in (out.detach(), qkv.grad):
        outside = result.clone()
        outside[:, :3, :3] = 0
        assert outside.isfinite().all()
    inside = out[0, :3, :3, :2].detach()  # head 0
    assert out[0, :3, :3, 2:].isfinite().all()
    if math.isnan(value):
        expected = {0: inside[1, 1], 1: inside, 2: inside[..., 0]}[part]  # a query's row, every row, every value
        assert expected.isnan().all()


def test_nan_in_the_padding_reaches_padded_windows_only(backend):
    qkv = torch.randn(1, 4, 3, 12)
    out = window_attention(qkv, torch.randn(25, 2), 3, pad_qkv=torch.full((12,), math.nan), backend=backend)
    assert out[:, :3].isfinite().all()
    assert out[:, 3:].isnan().all()


@pytest.mark.parametrize("magnitude", [1e4, 1e18, 1e38])
def test_scores_that_overflow(backend, magnitude):
    """Scores up to the largest float32 and beyond: the weights are 0, 1 or NaN, nothing crashes."""
    qkv = torch.randn(1, 4, 4, 12) * magnitude
    out = window_attention(qkv.requires_grad_(), torch.randn(25, 2), 3, 1, backend=backend)
    if magnitude < 1e18:
        assert out.isfinite().all()
    out.sum().backward()
    assert qkv.grad is None or qkv.grad.shape == qkv.shape


# Random calls: mostly good arguments, now and then a bad one.

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OTHERS = [torch.int64, torch.int8, torch.bool, torch.complex64]
VALUES = st.sampled_from([0.0, 1.0, -1.0, 1e4, 1e30, math.nan, math.inf, -math.inf])
SENSELESS = st.sampled_from(
    [None, True, "a", 1.5, math.nan, (), (1,), [[1]], {}, -1, 0, 2**31, 2**63, -(2**63), 2**70, object()]
)


def now_and_then(good: st.SearchStrategy, bad: st.SearchStrategy) -> st.SearchStrategy:
    return st.integers(0, 7).flatmap(lambda i: bad if i == 7 else good)


@st.composite
def tensors(draw, *shape: int) -> torch.Tensor:
    """A tensor of `shape`; sometimes of another shape, dtype, device, layout, with odd values or strides."""
    shape = list(shape)
    if draw(st.integers(0, 7)) == 7:
        for _ in range(draw(st.integers(1, 2))):
            at = draw(st.integers(0, len(shape)))
            edit = draw(st.sampled_from(["insert", "delete", "change"]))
            if edit == "insert":
                shape.insert(at, draw(st.integers(0, 3)))
            elif shape[at : at + 1]:
                shape[at : at + 1] = [] if edit == "delete" else [draw(st.integers(0, 9))]
    dtype = draw(now_and_then(st.just(torch.float32), st.sampled_from(FLOATS + OTHERS)))
    device = draw(now_and_then(st.just("cpu"), st.sampled_from(["cpu", "meta"])))
    x = torch.randn(shape).to(dtype).to(device)
    kind = draw(st.sampled_from(["plain"] * 5 + ["value", "strided", "expanded", "sparse", "overlapping", "grad"]))
    if kind == "value" and x.numel() and x.device.type == "cpu" and dtype.is_floating_point:
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(VALUES)
    elif kind == "strided" and x.dim():
        x = torch.stack([x, x], -1)[..., 0]
    elif kind == "expanded" and x.dim() and x.shape[0]:
        x = x[:1].expand(x.shape)
    elif kind == "sparse" and x.device.type == "cpu":
        x = x.to_sparse()
    elif kind == "overlapping" and x.device.type == "cpu":
        x = torch.zeros(max(1, x.numel()), dtype=dtype).as_strided(shape, [0] * len(shape))
    elif kind == "grad" and dtype.is_floating_point:
        x.requires_grad_()
    return x


@st.composite
def calls(draw):
    """Operator, arguments, backend."""
    operator = draw(st.sampled_from(list(ARGUMENTS)))
    axes = draw(st.sampled_from([2, 3]))
    spatial = [draw(st.integers(1, 7)) for _ in range(axes)]
    window = [draw(st.integers(1, 5)) for _ in range(axes)]
    shift = [draw(st.integers(0, w - 1)) for w in window]
    batch = draw(st.integers(0, 2))
    heads, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    channels = heads * head_dim
    grid = WindowGrid.of(spatial, window, shift)

    def ints(good: list[int]) -> st.SearchStrategy:
        edited = st.lists(st.one_of(st.integers(-1, 9), SENSELESS), max_size=4)
        return now_and_then(st.just(good), st.one_of(SENSELESS, edited, st.integers(-1, 9)))

    def tensor(*shape: int) -> st.SearchStrategy:
        return st.one_of(*[tensors(*shape)] * 9, SENSELESS)

    arguments = {"window_size": draw(ints(window)), "shift_size": draw(ints(shift))}
    if operator == "window_attention":
        arguments |= {
            "qkv": draw(tensor(batch, *spatial, 3 * channels)),
            "bias_table": draw(tensor(math.prod(2 * w - 1 for w in window), heads)),
            "pad_qkv": draw(st.one_of(st.none(), tensor(3 * channels))),
            "scale": draw(now_and_then(st.none(), st.one_of(SENSELESS, VALUES))),
            "dropout_p": draw(now_and_then(st.sampled_from([0.0, 0.0, 0.3]), st.one_of(SENSELESS, VALUES))),
        }
    elif operator == "projected_window_attention":
        arguments |= {
            "x": draw(tensor(batch, *spatial, channels)),
            "weight": draw(tensor(3 * channels, channels)),
            "bias": draw(st.one_of(st.none(), tensor(3 * channels))),
            "bias_table": draw(tensor(math.prod(2 * w - 1 for w in window), heads)),
            "norm_weight": draw(st.one_of(st.none(), tensor(channels))),
            "norm_bias": draw(st.one_of(st.none(), tensor(channels))),
            "norm_eps": draw(now_and_then(st.sampled_from([None, 1e-5]), st.one_of(SENSELESS, VALUES))),
            "out_weight": draw(st.one_of(st.none(), tensor(channels, channels))),
            "out_bias": draw(st.one_of(st.none(), tensor(channels))),
            "scale": draw(now_and_then(st.none(), st.one_of(SENSELESS, VALUES))),
        }
    elif operator == "window_partition":
        arguments["x"] = draw(tensor(batch, *spatial, channels))
    else:
        arguments["windows"] = draw(tensor(batch * grid.num_windows, grid.tokens, channels))
        arguments["spatial_shape"] = draw(ints(spatial))
    return operator, arguments, draw(st.sampled_from([None, "reference", "cpu"]))


def expected_shape(operator: str, arguments: dict) -> tuple[int, ...]:
    if operator == "window_attention":
        qkv = arguments["qkv"]
        return (*qkv.shape[:-1], qkv.shape[-1] // 3)
    x = arguments["windows" if operator == "window_reverse" else "x"]
    if operator == "projected_window_attention":
        return tuple(x.shape)
    spatial = x.shape[1:-1] if operator == "window_partition" else arguments["spatial_shape"]

    def axes(value) -> list[int]:
        return [value] * len(spatial) if isinstance(value, int) else value

    grid = WindowGrid.of(spatial, axes(arguments["window_size"]), axes(arguments["shift_size"]))
    if operator == "window_partition":
        return (x.shape[0] * grid.num_windows, grid.tokens, x.shape[-1])
    return (x.shape[0] // grid.num_windows, *spatial, x.shape[-1])


@settings(max_examples=600, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(call=calls())
def test_any_call_gives_a_result_or_a_named_error(call):
    operator, arguments, backend = call
    if backend == "cpu" and backends.BACKENDS["cpu"].unavailable():
        backend = None
    try:
        out = ARGUMENTS[operator][1](**arguments, backend=backend)
    except (TypeError, ValueError) as error:
        assert_named(error, operator)
        return
    except RuntimeError as error:
        if not str(error).startswith(f"{operator}: backend {backend!r} cannot run this call: "):
            raise
        return
    assert out.shape == expected_shape(operator, arguments)
    leaves = [t for t in arguments.values() if isinstance(t, torch.Tensor)]
    assert out.dtype == leaves[0].dtype
    if out.device.type == "cpu" and all(t.isfinite().all() and t.abs().max() < 1e5 for t in leaves if t.numel()):
        scale = arguments.get("scale")
        if scale is None or abs(scale) < 1e5:
            assert out.isfinite().all()
    if out.requires_grad and out.device.type == "cpu":
        for grad, leaf in zip(
            torch.autograd.grad(out.sum(), wanted := [t for t in leaves if t.requires_grad]), wanted, strict=True
        ):
            assert grad.shape == leaf.shape


# The operators below the public functions check themselves what would make them read or write out of bounds.


@st.composite
def raw_calls(draw):
    """An operator of the C++ library and arguments that fit its schema, good or bad."""
    operator = draw(
        st.sampled_from(
            ["window_attention_forward", "window_attention_backward", "projected_window_attention_forward",
             "projected_window_attention_backward", "window_partition", "window_reverse", "window_tokens", "bias_index",
             "dropout_keep", "projects"]
        )
    )  # fmt: skip
    axes = draw(st.sampled_from([2, 3]))
    spatial = [draw(st.integers(1, 6)) for _ in range(axes)]
    window = [draw(st.integers(1, s)) for s in spatial]
    shift = [draw(st.integers(0, w - 1)) for w in window]
    grid = WindowGrid(tuple(spatial), tuple(window), tuple(window), tuple(shift))
    batch, heads, head_dim = draw(st.integers(0, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 5))
    channels = heads * head_dim
    # Nothing between a few dozen and 2³¹, where a good call would fill the machine's memory.
    odd = st.sampled_from([-(2**63), -(2**31), -1, 0, 1, 7, 2**31, 2**40, 2**62, 2**63 - 1])

    def ints(good: list[int]) -> list[int]:
        return draw(now_and_then(st.just(good), st.lists(st.one_of(st.integers(-1, 9), odd), max_size=4)))

    def tensor(*shape: int) -> torch.Tensor:
        return draw(tensors(*shape))

    dropout_p = draw(now_and_then(st.sampled_from([0.0, 0.3]), st.one_of(VALUES, st.just(0.5))))
    seed = draw(st.sampled_from([torch.tensor([5]), torch.tensor([-1]), None, torch.zeros(0), torch.tensor(3)]))
    nominal = ints(window)
    if operator == "window_partition":
        return operator, (tensor(batch, *spatial, channels), ints(window), ints(shift))
    if operator == "window_reverse":
        windows = tensor(batch * grid.num_windows, grid.tokens, channels)
        return operator, (windows, ints(window), ints(shift), ints(spatial))
    if operator == "window_tokens":
        return operator, (ints(spatial), ints(window), ints(shift))
    if operator == "bias_index":
        return operator, (nominal, draw(now_and_then(st.just(grid.tokens), odd)))
    if operator == "dropout_keep":
        rows = draw(
            st.sampled_from([torch.arange(6).view(2, 3), torch.arange(0), torch.zeros(2), torch.arange(6)[::2]])
        )
        return operator, (seed, rows, draw(now_and_then(st.just(5), odd)), dropout_p)
    if operator == "projects":
        return operator, (*(draw(now_and_then(st.integers(1, 64), odd)) for _ in range(2)), draw(st.booleans()))
    if operator.startswith("projected"):
        channels = heads * draw(st.sampled_from([5, 8, 16, 32]))
        volume = (batch, *spatial, channels)
        inputs = [tensor(*volume), tensor(3 * channels, channels), tensor(3 * channels)]
        inputs += [tensor(math.prod(2 * w - 1 for w in window), heads), tensor(channels), tensor(channels)]
        inputs += [draw(st.sampled_from([None, 1e-5])), tensor(channels, channels), tensor(channels)]
        settings_ = (nominal, ints(window), ints(shift), draw(st.one_of(st.just(0.5), VALUES)))
        if operator.endswith("forward"):
            return operator, (*inputs, *settings_, draw(st.booleans()))
        return operator, (tensor(*volume), *inputs, tensor(*volume), tensor(*volume[:-1], heads), *settings_)
    tensors_ = [
        tensor(batch, *spatial, 3 * channels),
        tensor(math.prod(2 * w - 1 for w in window), heads),
        draw(st.one_of(st.none(), tensors(3 * channels))),
        seed,
    ]
    settings_ = (nominal, ints(window), ints(shift), draw(st.one_of(st.just(0.5), VALUES)), dropout_p)
    if operator == "window_attention_forward":
        return operator, (*tensors_, *settings_)
    out, lse = (tensor(batch, *spatial, c) for c in (channels, heads))
    return operator, (tensor(batch, *spatial, channels), *tensors_, out, lse, *settings_)


@pytest.fixture(scope="module")
def raw():
    if reason := backends.BACKENDS["cpu"].unavailable():
        pytest.skip(f"the operators of the C++ library: {reason}")
    return torch.ops.swin_kernels_cpu


@settings(max_examples=800, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@example(call=("window_reverse", (torch.empty(0, 1, 1), [1] * 3, [0] * 3, [2**30] * 3)))
@example(call=("window_tokens", ([2**30] * 3, [1] * 3, [0] * 3)))
@example(call=("projects", (0, 12, False)))
@example(call=("projects", (-1, -(2**63), False)))
@example(call=("dropout_keep", (torch.tensor([5]), torch.arange(3), 4, math.nan)))
@example(call=("dropout_keep", (torch.tensor([5]), torch.arange(3), 4, -1.0)))
@given(call=raw_calls())
def test_raw_operators_raise_or_return(raw, call):
    """They compute, or refuse with the operator's name; they may not crash or run out of memory."""
    operator, arguments = call
    try:
        getattr(raw, operator)(*(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments))
    except RuntimeError as error:
        if not is_accepted(error, operator, arguments):
            raise


def is_accepted(error: RuntimeError, operator: str, arguments: tuple) -> bool:
    """Whether an operator of the C++ library may refuse the arguments with this error."""
    wordings = {
        RuntimeError: [rf"{operator.removesuffix('_forward')}: "],
        NotImplementedError: [  # PyTorch, which finds no kernel for the layout or the device of a tensor
            f"Could not run 'swin_kernels_cpu::{operator}' with arguments from the 'Sparse",
            f"swin_kernels_cpu::{operator}: attempted to run this operator with Meta tensors",
        ],
    }
    if operator == "dropout_keep" and arguments[0] is None:  # PyTorch lets None through where the schema has a tensor
        wordings[RuntimeError].append(r"aoti_torch_get_device_type\(.*\) API call failed")
    return any(re.match(wording, str(error)) for wording in wordings.get(type(error), ()))


def test_more_windows_than_32_bits_count_are_refused(raw, tmp_path):
    """In a volume without memory: a file of 13 GB that nothing was written to."""
    shape = (1, 2**16, 2**15 + 1, 3)
    volume = torch.from_file(str(tmp_path / "volume"), shared=True, size=math.prod(shape), dtype=torch.float16)
    arguments = (torch.zeros(1, 1, dtype=torch.float16), None, None, [1, 1], [1, 1], [0, 0], 1.0, 0.0)
    with pytest.raises(
        RuntimeError, match=r"window_attention: window_size \(1, 1\) cuts a volume of .* more than 2147"
    ):
        raw.window_attention_forward(volume.view(shape), *arguments)


@pytest.mark.parametrize(("heads", "channels"), [(0, 12), (-1, 12), (-1, -(2**63)), (1, 0), (-(2**63), 1)])
def test_projects_names_what_it_refuses(raw, heads, channels):
    with pytest.raises(RuntimeError, match=f"projects: heads is {heads} and channels is {channels}; accepted are 1"):
        raw.projects(heads, channels, False)


# Below the public functions anyone may call the registered operators, in this namespace too.

X, TABLE, VOLUME = torch.randn(2, 4, 5, 12), torch.randn(25, 2), torch.randn(2, 3, 4, 5)
OUT, LSE = torch.randn(2, 4, 5, 4), torch.randn(2, 4, 5, 2)
PROJECTED = (
    *(X, LSE, X, torch.randn(36, 12), None, TABLE, None, None, torch.randn(12, 12), None),
    *(None, [3, 3], [1, 1], 0.5, ""),
)
"""What `projected_window_attention_backward` accepts after the gradient."""
RAW = [
    ("window_attention", "window_size", (X, TABLE, None, None, [0, 3], [0, 0], 0.5, 0.0, "")),
    ("window_attention", "window_size", (X, TABLE, None, None, [3], [1], 0.5, 0.0, "")),
    ("window_attention", "shift_size", (X, TABLE, None, None, [3, 3], [-1, 5], 0.5, 0.0, "")),
    ("window_attention", "bias_table", (X, torch.randn(25), None, None, [3, 3], [1, 1], 0.5, 0.0, "")),
    ("window_attention", "qkv", (X[0, 0], TABLE, None, None, [3, 3], [1, 1], 0.5, 0.0, "")),
    ("window_attention", "seed", (X, TABLE, None, None, [3, 3], [1, 1], 0.5, 0.3, "")),
    ("window_attention", "seed", (X, TABLE, None, torch.zeros(1), [3, 3], [1, 1], 0.5, 0.3, "")),
    ("window_attention", "dropout_p", (X, TABLE, None, torch.tensor([1]), [3, 3], [1, 1], 0.5, math.nan, "")),
    ("window_attention", "backend", (X, TABLE, None, None, [3, 3], [1, 1], 0.5, 0.0, "gpu")),
    ("window_attention_backward", "lse", (OUT, X, TABLE, None, None, OUT, OUT, [3, 3], [1, 1], 0.5, 0.0, "")),
    ("window_attention_backward", "grad_out", (X, X, TABLE, None, None, OUT, LSE, [3, 3], [1, 1], 0.5, 0.0, "")),
    ("window_attention_backward", "out", (OUT, X, TABLE, None, None, OUT.half(), LSE, [3, 3], [1, 1], 0.5, 0.0, "")),
    ("window_partition", "window_size", (X, [0, 3], [0, 0], "")),
    ("window_partition", "x", (torch.tensor(1.0), [3, 3], [0, 0], "")),
    ("window_reverse", "window_size", (torch.randn(8, 9, 3), [3], [1, 1], [4, 5], "")),
    ("window_reverse", "windows", (torch.randn(7, 9, 3), [3, 3], [1, 1], [4, 5], "")),
    ("projected_window_attention", "bias_table",
     (X, torch.randn(36, 12), None, torch.randn(25), None, None, None, None, None, [3, 3], [1, 1], 0.5, False, "")),
    ("projected_window_attention", "window_size",
     (X, torch.randn(36, 12), None, TABLE, None, None, None, None, None, [0, 3], [0, 0], 0.5, False, "")),
    ("instance_norm_act", "residual", (VOLUME, None, True, 1e-5, 0.01, "")),
    ("instance_norm_act", "x", (torch.tensor(1.0), None, False, 1e-5, 0.01, "")),
    ("instance_norm_act_", "eps", (VOLUME.clone(), None, False, math.nan, 0.01, "")),
    ("instance_norm_act_", "inplace", (VOLUME[:, :, :1].expand(2, 3, 4, 5), None, False, 1e-5, 0.01, "")),
    ("layer_norm", "x", (torch.tensor(1.0), None, None, 1e-5, torch.float32, "")),
    ("layer_norm", "weight", (X, torch.randn(11), None, 1e-5, torch.float32, "")),
    ("layer_norm", "dtype", (X, None, None, 1e-5, torch.int64, "")),
    ("convolution", "weight", (VOLUME, None, torch.randn(2, 3), "")),
    ("convolution", "skip", (VOLUME, torch.randn(2, 3), torch.randn(2, 6, 3, 3), "")),
    ("projected_window_attention_backward", "grad_out", (OUT, *PROJECTED)),
    ("projected_window_attention_backward", "attended", (X, OUT, *PROJECTED[1:])),
    ("projected_window_attention_backward", "lse", (X, X, LSE.double(), *PROJECTED[2:])),
    ("projected_window_attention_backward", "weight", (X, *PROJECTED[:3], torch.randn(36), *PROJECTED[4:])),
    ("instance_norm_act_backward", "grad_out",
     (OUT, VOLUME, None, None, torch.randn(2, 2, 3), False, False, 0.01, "")),
    ("instance_norm_act_backward", "x", (VOLUME, VOLUME, None, None, torch.randn(2, 2, 3), True, False, 0.01, "")),
    ("instance_norm_act_backward", "x", (VOLUME, VOLUME, None, None, torch.randn(2, 2, 3), False, False, 0.0, "")),
    ("instance_norm_act_backward", "x", (VOLUME, VOLUME, X, None, torch.randn(2, 2, 3), True, False, 0.0, "")),
    ("instance_norm_act_backward", "residual",
     (VOLUME, VOLUME, VOLUME, None, torch.randn(2, 4, 3), True, True, 0.01, "")),
    ("instance_norm_act_backward", "has_residual",
     (VOLUME, VOLUME, VOLUME, VOLUME, torch.randn(2, 4, 3), False, True, 0.01, "")),
    ("instance_norm_act_backward", "statistics",
     (VOLUME, VOLUME, None, None, torch.randn(2, 4, 3), False, False, 0.01, "")),
    ("instance_norm_act_backward", "out",
     (VOLUME, VOLUME.long(), None, None, torch.randn(2, 2, 3), False, False, 0.01, "")),
    ("layer_norm_backward", "grad_out", (OUT, X, None, None, 1e-5, "")),
    ("layer_norm_backward", "weight", (X, X, torch.randn(11), None, 1e-5, "")),
    ("convolution_backward", "grad_out", (VOLUME, VOLUME, None, torch.randn(2, 3, 3, 3), [True] * 3, "")),
    ("convolution_backward", "weight", (VOLUME, VOLUME, None, torch.randn(2, 3), [True] * 3, "")),
    ("convolution_backward", "wanted", (VOLUME, VOLUME, None, torch.randn(3, 3, 3, 3), [True], "")),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "argument", "arguments"), RAW, ids=described)
def test_raw_error_names_the_argument(operator, argument, arguments):
    with pytest.raises((TypeError, ValueError), match=rf"^{operator.removesuffix('_backward').rstrip('_')}") as caught:
        getattr(torch.ops.swin_kernels, operator)(*arguments)
    assert argument in str(caught.value)


@pytest.mark.parametrize(
    ("operator", "argument", "arguments"),
    [case for case in RAW if case[1] not in ("backend", "inplace")],  # with shapes alone nothing runs or is written
    ids=described,
)
def test_raw_error_names_the_argument_where_shapes_alone_are_known(operator, argument, arguments):
    """As where a graph is traced."""
    arguments = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in arguments]
    test_raw_error_names_the_argument(operator, argument, arguments)
