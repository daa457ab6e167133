"""Contract of `projected_window_attention`: one kernel where this processor has it, two operators elsewhere."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from swin_kernels import explain, modules, use_backend
from swin_kernels.geometry import bias_table_length
from swin_kernels.ops.projected_window_attention import projected_window_attention

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
    """The tensors of a case, in the order of the operator."""
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
        "out_weight": normal(channels, channels) * channels**-0.5,
        "out_bias": normal(channels) if case.pad else None,
    }


ONLY_INSIDE = dict.fromkeys(("norm_weight", "norm_bias", "out_weight", "out_bias"))
"""Neither a norm before the projection nor a layer after the attention."""

EPS = 1e-3


def attend(inputs: dict[str, torch.Tensor | None], case: Case) -> torch.Tensor:
    return projected_window_attention(**inputs, norm_eps=EPS, window_size=case.window, shift_size=case.shift)


def why_declined(backend: str, inputs: dict[str, torch.Tensor | None], case: Case) -> str | None:
    return explain(projected_window_attention, **inputs, norm_eps=EPS, window_size=case.window, shift_size=case.shift)[
        backend
    ]


def plainly(inputs: dict[str, torch.Tensor | None], case: Case) -> torch.Tensor:
    x = F.layer_norm(inputs["x"], inputs["x"].shape[-1:], inputs["norm_weight"], inputs["norm_bias"], EPS)
    qkv = F.linear(x, inputs["weight"], inputs["bias"])
    out = plain_attention(qkv, inputs["bias_table"], inputs["bias"], case)[0]
    return F.linear(out, inputs["out_weight"], inputs["out_bias"])


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
def test_without_norm_and_output_layer(case):
    inputs = make(case) | ONLY_INSIDE
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


def gradients(compute, inputs: dict[str, torch.Tensor | None], case: Case) -> dict[str, torch.Tensor]:
    """Gradients of every tensor given, for a fixed gradient of the output."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items() if t is not None}
    out = compute(inputs | leaves, case)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), cotangent), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_gradients(case, dtype):
    inputs = make(case, dtype)
    got, plain = gradients(attend, inputs, case), gradients(plainly, inputs, case)
    truth = gradients(plainly, in_float64(inputs), case)
    scale = max(largest(t) for t in truth.values())
    for name in truth:
        assert_close(f"grad of {name}", got[name], plain[name], truth[name], scale)


@pytest.mark.parametrize("norm_eps", [EPS, None])
@pytest.mark.parametrize("case", [CASES[2], CASES[6]], ids=lambda c: c.name)
def test_traced_operator_has_gradients_on_every_machine(case, norm_eps):
    """A graph holds the operator itself, and may run on a machine or a backend without the kernel."""
    inputs = make(case, torch.float64)
    if norm_eps is None:
        inputs |= ONLY_INSIDE
    leaves = {name: t.requires_grad_() for name, t in inputs.items() if t is not None}

    def run(*values):
        given = inputs | dict(zip(leaves, values, strict=True))
        settings = (norm_eps, case.window, case.shift, 0.25, True, "reference")  # True: for a backward
        return torch.ops.swin_kernels.projected_window_attention(*given.values(), *settings)[0]

    assert torch.autograd.gradcheck(run, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("case", [CASES[1], CASES[2]], ids=lambda c: c.name)
def test_gradients_in_16_bit_beside_parameters_in_float32(case):
    inputs = make(case, torch.bfloat16)
    inputs |= {name: inputs[name].float() for name in ("bias_table", "norm_weight", "norm_bias")}
    got = gradients(attend, inputs, case)
    plain = gradients(plainly, make(case, torch.bfloat16), case)
    truth = gradients(plainly, in_float64(inputs), case)
    scale = max(largest(t) for t in truth.values())
    for name in truth:
        assert got[name].dtype == inputs[name].dtype
        assert_close(f"grad of {name}", got[name].to(plain[name].dtype), plain[name], truth[name], scale)


def test_each_gradient_alone():
    case, inputs = CASES[1], make(CASES[1])
    full = gradients(attend, inputs, case)
    for name, expected in full.items():
        leaf = inputs[name].clone().requires_grad_()
        out = attend(inputs | {name: leaf}, case)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float())
        assert torch.equal(leaf.grad, expected), name


def test_gradients_without_norm_and_output_layer():
    case = CASES[2]
    inputs = make(case) | ONLY_INSIDE

    def compute(inputs, case):
        return projected_window_attention(**inputs, window_size=case.window, shift_size=case.shift)

    def compute_plainly(inputs, case):
        qkv = F.linear(inputs["x"], inputs["weight"], inputs["bias"])
        return plain_attention(qkv, inputs["bias_table"], inputs["bias"], case)[0]

    got, plain = gradients(compute, inputs, case), gradients(compute_plainly, inputs, case)
    truth = gradients(compute_plainly, in_float64(inputs), case)
    scale = max(largest(t) for t in truth.values())
    for name in truth:
        assert_close(f"grad of {name}", got[name], plain[name], truth[name], scale)


def test_gradients_do_not_depend_on_threads(threads):
    case = Case("several items of work", (21, 20, 13), (4, 4, 4), (2, 2, 2), heads=3, head_dim=16)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(gradients(attend, make(case), case))
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name
        assert torch.equal(results[2][name], expected), name


def test_qkv_is_not_kept_for_the_backward(cpu_backend):
    """Only the inputs, the attention's output and the log-sum-exp are kept, where the kernel runs."""
    inputs, case = make(CASES[1]), CASES[1]
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    assert why_declined("cpu", leaves, case) is None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        attend(leaves, case)
    given = sum(t.numel() for t in inputs.values())
    assert sum(kept) == given + inputs["x"].numel() // 48 * (48 + case.heads)


def test_second_derivative_raises(cpu_backend):
    inputs = make(CASES[1])
    x = inputs["x"].requires_grad_()
    (grad,) = torch.autograd.grad(attend(inputs, CASES[1]).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_contract_on_each_instruction_set(instruction_set):
    for case in CASES:
        test_contract(case, torch.float32)
        test_gradients(case, torch.float32)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(48)
        self.attention = modules.WindowAttention(48, 3, (4, 4, 4), qkv_bias=True)

    def forward(self, x):
        return self.attention(x, 2, norm=self.norm)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_break(dynamic):
    torch._dynamo.reset()
    block, x = Block(), torch.randn(1, 8, 9, 6, 48)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for volume in (x, torch.randn(1, 11, 9, 7, 48)):
        results = []
        for model in (block, compiled):
            block.zero_grad()
            leaf = volume.clone().requires_grad_()
            model(leaf).square().sum().backward()
            results.append([leaf.grad, *(p.grad.clone() for p in block.parameters())])
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("case", [CASES[1], CASES[10]], ids=lambda c: c.name)
def test_opcheck_of_inference(case):
    inputs = make(case)
    arguments = (*inputs.values(), EPS, case.window, case.shift, 0.25, False, "")
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.swin_kernels.projected_window_attention, arguments, test_utils=tests)


@pytest.mark.parametrize("case", [CASES[1], CASES[11]], ids=lambda c: c.name)
def test_opcheck(case):
    inputs = make(case)
    settings = (case.window, case.shift, 0.25)
    leaves = [t.detach().requires_grad_() for t in inputs.values()]
    arguments = (*leaves, EPS, *settings, True, "")
    torch.library.opcheck(torch.ops.swin_kernels.projected_window_attention.default, arguments)
    out, *kept = torch.ops.swin_kernels.projected_window_attention(*inputs.values(), EPS, *settings, True, "")
    torch.library.opcheck(
        torch.ops.swin_kernels.projected_window_attention_backward.default,
        (torch.randn_like(out), *kept, *inputs.values(), EPS, *settings, ""),
    )


def test_a_forced_backend_without_a_kernel_raises(cpu_backend):
    """It does not silently run the layers one after the other."""
    case, inputs = CASES[1], in_float64(make(CASES[1]))
    assert why_declined("cpu", inputs, case) == "dtype torch.float64 has no kernel"
    message = "projected_window_attention: backend 'cpu' cannot run this call: dtype torch.float64 has no kernel"
    with pytest.raises(RuntimeError, match=message):
        projected_window_attention(**inputs, window_size=case.window, shift_size=case.shift, backend="cpu")
    with pytest.raises(RuntimeError, match=message), use_backend("cpu"):
        attend(inputs, case)
    message = "projected_window_attention: backend 'cuda' cannot run this call: no CUDA device"
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=message):
            projected_window_attention(**make(case), window_size=case.window, backend="cuda")


def test_module_leaves_the_layers_apart_where_no_kernel_takes_them(cpu_backend, caplog):
    """A backend forced for the attention does not affect the linear layers, and the log names what runs."""
    caplog.set_level(logging.DEBUG, logger="swin_kernels")
    attention = modules.WindowAttention(48, 3, (4, 4, 4), qkv_bias=True).double()
    with use_backend("cpu"), torch.no_grad():
        attention(torch.randn(1, 8, 8, 8, 48, dtype=torch.float64), 2)
    assert re.search(r"WindowAttentionCall\(.*float64.*\) runs on cpu, which is forced", caplog.text)
    left = "is left to PyTorch's layers; cpu, which is forced, declined: dtype torch.float64 has no kernel"
    assert re.search(rf"ProjectedWindowAttentionCall\(.*float64.*\) {left}", caplog.text)
    caplog.clear()
    with torch.no_grad():
        attention.float()(torch.randn(1, 8, 8, 8, 48), 2)
    assert re.search(r"ProjectedWindowAttentionCall\(.*float32.*\) runs on cpu", caplog.text)


def test_wrong_weight_raises():
    inputs = make(CASES[1])
    with pytest.raises(ValueError, match=r"weight has shape \(48, 144\); accepted is \(144, 48\)"):
        projected_window_attention(**inputs | {"weight": inputs["weight"].T}, window_size=4)
    with pytest.raises(ValueError, match=r"bias has shape \(48,\); accepted is \(144,\)"):
        projected_window_attention(**inputs | {"bias": inputs["bias"][:48]}, window_size=4)
    with pytest.raises(ValueError, match=r"out_weight has shape \(48, 47\); accepted is \(48, 48\)"):
        projected_window_attention(**inputs | {"out_weight": inputs["out_weight"][:, :47]}, window_size=4)
    with pytest.raises(ValueError, match="out_bias is given without out_weight"):
        projected_window_attention(**inputs | {"out_weight": None}, window_size=4)


def test_module_uses_it_and_keeps_hooks(monkeypatch):
    calls = []
    original = projected_window_attention
    monkeypatch.setattr(modules, "projected_window_attention", lambda *a, **k: calls.append(1) or original(*a, **k))
    attention = modules.WindowAttention(48, 3, (4, 4, 4), qkv_bias=True)
    x = torch.randn(1, 8, 8, 8, 48)
    with_grad = attention(x, 2)
    assert len(calls) == 1
    with torch.no_grad():
        torch.testing.assert_close(attention(x, 2), with_grad, rtol=1e-4, atol=1e-5)
        assert len(calls) == 2
        seen = []
        attention.qkv.register_forward_hook(lambda *_: seen.append(1))
        attention(x, 2)
        assert seen == [1]

        class Adapted(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        attention.qkv = Adapted(48, 144)
        attention(x, 2)
    assert len(calls) == 2


@pytest.mark.parametrize("adapted", [True, False])
def test_layer_after_the_attention_that_is_more_than_linear_is_called(adapted):
    class Adapted(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    attention = modules.WindowAttention(48, 3, (4, 4, 4), qkv_bias=True)
    x = torch.randn(1, 8, 8, 8, 48)
    expected = 2 * attention(x, 2)
    if adapted:
        layer = Adapted(48, 48)
        layer.load_state_dict(attention.proj.state_dict())
        attention.proj = layer
    else:
        attention.proj.register_forward_hook(lambda module, inputs, out: 2 * out)
    torch.testing.assert_close(attention(x, 2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", ["qkv", "proj"])
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_the_projections_are_called(register, layer):
    attention, seen = modules.WindowAttention(48, 3, (4, 4, 4), qkv_bias=True), []
    getattr(getattr(attention, layer), register)(lambda *_: seen.append(1))
    attention(torch.randn(1, 8, 8, 8, 48, requires_grad=True), 2).sum().backward()
    assert seen == [1]


def test_kernel_is_used_where_the_processor_has_it(cpu_backend):
    if "amx_bf16" not in Path("/proc/cpuinfo").read_text() or os.environ.get("SWIN_KERNELS_ISA", "amx") != "amx":
        pytest.skip("this processor has no AMX, or SWIN_KERNELS_ISA keeps from it")
    inputs, case = make(CASES[1]), CASES[1]
    assert why_declined("cpu", inputs, case) is None
