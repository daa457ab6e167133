"""Contract of `projected_window_attention`: one kernel where this processor has it, two operators elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from swin_kernels import backends, modules
from swin_kernels.geometry import bias_table_length
from swin_kernels.ops.projected_window_attention import declined, projected_window_attention

from .cases import Case, plain_attention
from .tolerances import assert_close, largest

CASES = (
    Case("one window", (3, 4, 2), (3, 4, 2), heads=3, head_dim=16),
    Case("3d padded shifted", (9, 8, 10), (4, 4, 4), (2, 2, 2), heads=3, head_dim=16, batch=2),
    Case("3d clipped and padded", (3, 9, 4), (4, 4, 4), (2, 2, 2), heads=1, head_dim=16),
    Case("window 7", (9, 8, 7), (7, 7, 7), (3, 3, 3), heads=3, head_dim=16),
    Case("window 6 clipped in 7", (6, 6, 6), (7, 7, 7), (3, 3, 3), heads=2, head_dim=16),
    Case("2d padded shifted", (15, 9), (7, 7), (3, 3), heads=4, head_dim=16),
    Case("without bias", (9, 8, 10), (4, 4, 4), (2, 2, 2), heads=3, head_dim=16, pad=False),
    Case("scores too large for one offset", (8, 8, 8), (4, 4, 4), (2, 2, 2), heads=3, head_dim=16, magnitude=12.0),
    Case("scores that reach over the mask", (8, 8, 8), (4, 4, 4), (2, 2, 2), heads=3, head_dim=16, magnitude=6.0),
    Case("large bias", (8, 8, 8), (4, 4, 4), (2, 2, 2), heads=3, head_dim=16, bias=60.0),
    Case("many heads, no kernel", (5, 4, 6), (3, 2, 3), (1, 1, 0), heads=12, head_dim=16),
    Case("head_dim without a kernel", (5, 4, 6), (3, 2, 3), (1, 1, 0), heads=2, head_dim=5),
    Case("batch 0", (5, 4, 6), (3, 2, 3), heads=3, head_dim=16, batch=0),
)


def make(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor | None]:
    """x, weight, bias and bias_table of a case."""
    generator = torch.Generator().manual_seed(len(case.name))
    channels = case.heads * case.head_dim

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": normal(case.batch, *case.spatial, channels),
        "weight": normal(3 * channels, channels) * case.magnitude * channels**-0.5,
        "bias": normal(3 * channels) if case.pad else None,
        "bias_table": normal(bias_table_length(case.window), case.heads) * case.bias,
        "norm_weight": normal(channels) if case.pad else None,
        "norm_bias": normal(channels) if case.pad else None,
    }


EPS = 1e-3


def attend(inputs: dict[str, torch.Tensor | None], case: Case) -> torch.Tensor:
    return projected_window_attention(**inputs, norm_eps=EPS, window_size=case.window, shift_size=case.shift)


def plainly(inputs: dict[str, torch.Tensor | None], case: Case) -> torch.Tensor:
    x = F.layer_norm(inputs["x"], inputs["x"].shape[-1:], inputs["norm_weight"], inputs["norm_bias"], EPS)
    qkv = F.linear(x, inputs["weight"], inputs["bias"])
    return plain_attention(qkv, inputs["bias_table"], inputs["bias"], case)[0]


def in_float64(inputs: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    return {name: None if t is None else t.double() for name, t in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_contract(case, dtype):
    inputs = make(case, dtype)
    with torch.no_grad():
        value = attend(inputs, case)
        truth = plainly(in_float64(inputs), case)
        assert_close("out", value, plainly(inputs, case), truth, largest(truth))


def test_result_does_not_depend_on_threads(threads):
    case = CASES[1]
    inputs = make(case)
    results = []
    for count in (1, 2, 3):
        threads(count)
        with torch.no_grad():
            results.append(attend(inputs, case))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("case", CASES[1:3], ids=lambda c: c.name)
def test_without_norm(case):
    inputs = make(case) | {"norm_weight": None, "norm_bias": None}
    with torch.no_grad():
        value = projected_window_attention(**inputs, window_size=case.window, shift_size=case.shift)
        wide = in_float64(inputs)
        truth, plain = (
            plain_attention(F.linear(i["x"], i["weight"], i["bias"]), i["bias_table"], i["bias"], case)[0]
            for i in (wide, inputs)
        )
    assert_close("out", value, plain, truth, largest(truth))


def test_not_finite_is_as_in_plain_pytorch():
    case = CASES[3]
    for name, value in (("x", float("nan")), ("x", float("inf")), ("bias_table", float("nan"))):
        inputs = make(case)
        inputs[name].view(-1)[5] = value
        with torch.no_grad():
            got = attend(inputs, case)
            wanted = plainly(inputs, case)
        assert torch.equal(got.isfinite(), wanted.isfinite()), name


def test_gradients_are_those_of_the_two_operators():
    case = CASES[1]
    inputs = {name: t.requires_grad_() for name, t in make(case, torch.float64).items()}
    out = attend(inputs, case)
    wanted = plainly(inputs, case)
    cotangent = torch.randn_like(out)
    for name, got, expected in zip(
        inputs,
        torch.autograd.grad(out, list(inputs.values()), cotangent),
        torch.autograd.grad(wanted, list(inputs.values()), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("case", [CASES[1], CASES[10]], ids=lambda c: c.name)
def test_opcheck(case):
    inputs = make(case)
    arguments = (*inputs.values(), EPS, case.window, case.shift, 0.25, "")
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.swin_kernels.projected_window_attention, arguments, test_utils=tests)


def test_reason_is_named(monkeypatch):
    inputs, case = make(CASES[1]), CASES[1]
    arguments = inputs["x"], inputs["bias_table"], case.window, case.shift
    assert declined(*arguments, "reference") == "backend 'reference' has no kernel for it"
    monkeypatch.setenv("SWIN_KERNELS_BACKEND", "reference")
    assert declined(*arguments) == "backend 'reference' has no kernel for it"
    monkeypatch.delenv("SWIN_KERNELS_BACKEND")
    assert "dtype" in (declined(inputs["x"].double(), *arguments[1:]) or "") or backends.load("cpu").unavailable()


def test_wrong_weight_raises():
    inputs = make(CASES[1])
    with pytest.raises(ValueError, match=r"weight has shape \(48, 144\); accepted is \(144, 48\)"):
        projected_window_attention(**inputs | {"weight": inputs["weight"].T}, window_size=4)
    with pytest.raises(ValueError, match=r"bias has shape \(48,\); accepted is \(144,\)"):
        projected_window_attention(**inputs | {"bias": inputs["bias"][:48]}, window_size=4)


def test_module_uses_it_in_inference_only_and_keeps_hooks(monkeypatch):
    calls = []
    original = projected_window_attention
    monkeypatch.setattr(modules, "projected_window_attention", lambda *a, **k: calls.append(1) or original(*a, **k))
    attention = modules.WindowAttention(48, 3, (4, 4, 4), qkv_bias=True)
    x = torch.randn(1, 8, 8, 8, 48)
    with_grad = attention(x, 2)
    assert not calls
    with torch.no_grad():
        torch.testing.assert_close(attention(x, 2), with_grad, rtol=1e-4, atol=1e-5)
        assert len(calls) == 1
        seen = []
        attention.qkv.register_forward_hook(lambda *_: seen.append(1))
        attention(x, 2)
        assert seen == [1]

        class Adapted(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        attention.qkv = Adapted(48, 144)
        attention(x, 2)
    assert len(calls) == 1


def test_kernel_is_used_where_the_processor_has_it(cpu_backend):
    if "amx_bf16" not in Path("/proc/cpuinfo").read_text() or os.environ.get("SWIN_KERNELS_ISA", "amx") != "amx":
        pytest.skip("this processor has no AMX, or SWIN_KERNELS_ISA keeps from it")
    inputs, case = make(CASES[1]), CASES[1]
    assert declined(inputs["x"], inputs["bias_table"], case.window, case.shift) is None
