"""Which backend runs a call, how it is forced, and what is said about the choice."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from importlib import import_module

import pytest
import torch

import swin_kernels
from swin_kernels import backends, explain, use_backend, window_attention, window_partition, window_reverse
from swin_kernels.backends import BACKENDS, decline_reason, order, select
from swin_kernels.backends.cuda import library
from swin_kernels.backends.cuda import window_attention as cuda_attention
from swin_kernels.modules import SwinTransformerBlock
from swin_kernels.ops.window_attention import WindowAttentionCall
from swin_kernels.ops.window_partition import PartitionCall

CALL = WindowAttentionCall(device="cpu", dtype=torch.float32, head_dim=4, window=(2, 2))


def arguments() -> tuple[torch.Tensor, torch.Tensor, int]:
    return torch.randn(1, 4, 4, 24), torch.randn(9, 2), 2


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Names of the backends that `select` returns, in order."""
    names = []
    original = backends.select

    def recording(call, forced=""):
        engine = original(call, forced)
        names.append(engine.name)
        return engine

    monkeypatch.setattr("swin_kernels.ops._operator.select", recording)
    return names


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv("SWIN_KERNELS_BACKEND", raising=False)


def test_every_backend_answers():
    assert {"reference", "cpu", "cuda", "triton"} <= set(BACKENDS)
    for name in BACKENDS:
        for answer in (BACKENDS[name].unavailable(), decline_reason(name, CALL)):
            assert answer is None or (isinstance(answer, str) and answer)


def test_orders_end_in_the_reference():
    for device in ("cpu", "cuda", "xpu"):
        assert order(device)[-1] == "reference", device
    assert BACKENDS["reference"].unavailable() is None
    assert BACKENDS["reference"].declines(CALL) is None


def test_first_that_supports_the_call_runs(ran):
    window_attention(*arguments())
    expected = "reference" if BACKENDS["cpu"].unavailable() else "cpu"
    assert ran == [expected]
    assert select(CALL).name == expected


def test_an_unknown_device_runs_on_the_reference():
    call = replace(CALL, device="xpu")
    assert select(call).name == "reference"


def test_an_automatic_choice_declines_what_is_not_supported(monkeypatch, caplog):
    monkeypatch.setattr(BACKENDS["cpu"], "unavailable", lambda: None)
    monkeypatch.setattr(BACKENDS["cpu"], "declines", lambda call: "it is Sunday")
    with caplog.at_level(logging.DEBUG, logger="swin_kernels"):
        assert select(CALL).name == "reference"
    assert "reference" in caplog.text
    assert "cpu declined: it is Sunday" in caplog.text
    with pytest.raises(RuntimeError, match="window_attention: backend 'cpu' cannot run this call: it is Sunday"):
        select(CALL, "cpu")


def test_no_backend_at_all_says_every_reason(monkeypatch):
    for name in order("cpu"):
        monkeypatch.setattr(BACKENDS[name], "unavailable", lambda name=name: f"no {name} today")
    with pytest.raises(RuntimeError, match="cpu declined: no cpu today; reference declined: no reference today"):
        select(CALL)


def test_argument_forces(ran):
    qkv, bias_table, window = arguments()
    window_attention(qkv, bias_table, window, backend="reference")
    windows = window_partition(qkv, window, backend="reference")
    window_reverse(windows, window, 0, (4, 4), backend="reference")
    assert ran == ["reference"] * 3


def test_backward_runs_on_the_forced_backend(ran):
    qkv, bias_table, window = arguments()
    out = window_attention(qkv.requires_grad_(), bias_table, window, backend="reference")
    out.sum().backward()
    assert ran == ["reference"] * 2


def test_context_forces_nests_and_ends(ran):
    free = "reference" if BACKENDS["cpu"].unavailable() else "cpu"
    with use_backend("reference"):
        window_attention(*arguments())
        with use_backend("reference"):
            window_attention(*arguments())
        window_attention(*arguments())
    window_attention(*arguments())
    assert ran == ["reference"] * 3 + [free]
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    window_attention(*arguments())
    assert ran[-1] == free


def test_context_is_of_the_thread(ran):
    free = "reference" if BACKENDS["cpu"].unavailable() else "cpu"
    with use_backend("reference"):
        other = threading.Thread(target=lambda: window_attention(*arguments()))
        other.start()
        other.join()
        window_attention(*arguments())
    assert ran == [free, "reference"]


def test_a_gradient_runs_where_its_forward_was_forced(ran):
    qkv, bias_table, window = arguments()
    with use_backend("reference"):
        out = window_attention(qkv.requires_grad_(), bias_table, window)
    out.sum().backward()
    assert ran == ["reference"] * 2


def test_a_checkpointed_block_repeats_where_it_was_forced(ran):
    block = SwinTransformerBlock(24, 2, (2, 2), (0, 0), use_checkpoint=True)
    with use_backend("reference"):
        out = block(torch.randn(1, 4, 4, 24, requires_grad=True))
    out.sum().backward()
    assert set(ran) == {"reference"}
    assert len(ran) == 3  # forward, forward again, backward


def test_a_checkpointed_block_repeats_as_often_as_it_is_asked(ran):
    """Also where nothing was forced, and something is when the gradient is asked for."""
    block, free = SwinTransformerBlock(24, 2, (2, 2), (0, 0), use_checkpoint=True), BACKENDS["cpu"].unavailable()
    with use_backend("reference"):
        loss = block(torch.randn(1, 4, 4, 24, requires_grad=True)).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert set(ran) == {"reference"}
    assert len(ran) == 5
    ran.clear()
    loss = block(torch.randn(1, 4, 4, 24, requires_grad=True)).sum()
    with use_backend("reference"):
        loss.backward()
    assert ran.count("reference" if free else "cpu") >= 3  # the module asks for a kernel that there is not, too


def test_a_gradient_of_a_free_forward_stays_free(ran):
    qkv, bias_table, window = arguments()
    out = window_attention(qkv.requires_grad_(), bias_table, window)
    with use_backend("reference"):
        out.sum().backward()
    assert ran[1] == ran[0]


def test_a_gradient_of_a_compiled_forward_runs_where_that_was_forced(ran):
    compiled = torch.compile(lambda qkv, table: window_attention(qkv, table, 2), backend="aot_eager", fullgraph=True)
    qkv, table, _ = arguments()
    compiled(qkv.requires_grad_(), table)
    ran.clear()
    with use_backend("reference"):
        out = compiled(qkv, table)
    out.sum().backward()
    assert ran == ["reference"] * 2


def test_a_compiled_function_may_force(ran):
    def forcing(qkv, table):
        with use_backend("reference"):
            forced = window_attention(qkv, table, 2)
        return forced, window_attention(qkv, table, 2)

    torch.compile(forcing, backend="eager", fullgraph=True)(*arguments()[:2])
    assert ran == ["reference", "reference" if BACKENDS["cpu"].unavailable() else "cpu"]


def test_a_compiled_function_obeys_when_it_runs(ran):
    free = "reference" if BACKENDS["cpu"].unavailable() else "cpu"
    compiled = torch.compile(lambda qkv, table: window_attention(qkv, table, 2), backend="eager", fullgraph=True)
    inputs = arguments()[:2]
    compiled(*inputs)
    with use_backend("reference"):
        compiled(*inputs)
    compiled(*inputs)
    assert ran == [free, "reference", free]


def test_argument_wins_over_context_and_context_over_environment(ran, monkeypatch):
    monkeypatch.setattr(BACKENDS["cpu"], "unavailable", lambda: None)
    monkeypatch.setattr(BACKENDS["cpu"], "kernel", BACKENDS["reference"].kernel)
    monkeypatch.setattr(BACKENDS["cpu"], "declines", lambda call: None)
    monkeypatch.setenv("SWIN_KERNELS_BACKEND", "cpu")
    window_attention(*arguments())
    with use_backend("reference"):
        window_attention(*arguments())
        window_attention(*arguments(), backend="cpu")
    assert ran == ["cpu", "reference", "cpu"]


def test_environment_forces(ran, monkeypatch):
    monkeypatch.setenv("SWIN_KERNELS_BACKEND", "reference")
    window_attention(*arguments())
    assert ran == ["reference"]


@pytest.mark.parametrize("name", ["nonsense", "", "CPU"])
def test_unknown_names(name, monkeypatch):
    qkv, bias_table, window = arguments()
    accepted = "accepted are .*reference"
    with pytest.raises(ValueError, match=f"window_attention: backend: got '{name}'; {accepted}"):
        window_attention(qkv, bias_table, window, backend=name)
    with pytest.raises(ValueError, match=f"window_partition: backend: got '{name}'; {accepted}"):
        window_partition(qkv, window, backend=name)
    with pytest.raises(ValueError, match=f"use_backend: name: got '{name}'; {accepted}"), use_backend(name):
        pass
    if name:
        monkeypatch.setenv("SWIN_KERNELS_BACKEND", name)
        with pytest.raises(ValueError, match=f"SWIN_KERNELS_BACKEND: got '{name}'; {accepted}"):
            window_attention(qkv, bias_table, window)


def test_a_forced_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr(BACKENDS["cpu"], "unavailable", lambda: "the library is at the tailor's")
    qkv, bias_table, window = arguments()
    message = "backend 'cpu' cannot run this call: the library is at the tailor's"
    with pytest.raises(RuntimeError, match=message):
        window_attention(qkv, bias_table, window, backend="cpu")
    with pytest.raises(RuntimeError, match=message), use_backend("cpu"):
        window_partition(qkv, window)


def test_explain_gives_the_reasons(monkeypatch):
    qkv, bias_table, window = arguments()
    reasons = explain(qkv, bias_table, window)
    assert set(reasons) == set(BACKENDS)
    assert reasons["reference"] is None
    assert reasons["cpu"] == BACKENDS["cpu"].unavailable()
    monkeypatch.setattr(BACKENDS["cpu"], "unavailable", lambda: "not here")
    assert explain(qkv, bias_table, window)["cpu"] == "not here"
    with pytest.raises(ValueError, match="window_attention: window_size is"):
        explain(qkv, bias_table, 0)


@pytest.mark.parametrize("answer", [False, True, "", 3])
def test_an_answer_is_a_reason_or_none(monkeypatch, answer):
    monkeypatch.setattr(BACKENDS["cpu"], "unavailable", lambda: None)
    monkeypatch.setattr(BACKENDS["cpu"], "declines", lambda call: answer)
    for forced in ("", "cpu"):
        with pytest.raises(
            TypeError, match=f"backend 'cpu': declines gave {answer!r}; accepted are a reason, and None"
        ):
            select(CALL, forced)


def test_explain_sees_what_autocast_makes_of_a_call(cpu_backend):
    x, weight, table = torch.randn(1, 4, 4, 48), torch.randn(144, 48), torch.randn(9, 3)
    with torch.autocast("cpu", torch.bfloat16):
        reasons = explain("projected_window_attention", x, weight, None, table, 2)
    assert reasons["cpu"] == "dtype torch.bfloat16 has no kernel"


def test_public_names():
    for name in ("window_attention", "window_partition", "window_reverse", "use_backend", "explain"):
        assert name in swin_kernels.__all__
        assert getattr(swin_kernels, name).__doc__


# The CUDA backend's answers, even without a GPU


@pytest.fixture
def a100(monkeypatch):
    """The CUDA backend as on a GPU of compute capability 8.0, with kernels that accept every call."""
    engine = BACKENDS["cuda"]
    monkeypatch.setattr(engine, "unavailable", lambda: None)
    monkeypatch.setattr(library, "capability", lambda device: (8, 0))
    monkeypatch.setattr(cuda_attention, "kernels_decline", lambda *call: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return engine


ON_GPU = WindowAttentionCall(device="cuda", dtype=torch.bfloat16, head_dim=16, window=(7, 7, 7))
PARTITION_ON_GPU = PartitionCall(device="cuda", dtype=torch.uint8, window=(7, 7, 7))


def test_cuda_comes_first_on_a_gpu(a100):
    assert order("cuda") == ("cuda", "triton", "reference")
    assert select(ON_GPU) is a100
    assert select(PARTITION_ON_GPU) is a100


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (replace(ON_GPU, device="cpu"), "the volume is on cpu, the kernels run on cuda"),
        (replace(ON_GPU, dtype=torch.float64), "dtype torch.float64 has no kernel"),
        (replace(ON_GPU, dropout=True), "attention dropout has no kernel"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_cuda_says_why_it_declines(a100, call, reason):
    assert decline_reason("cuda", call) == reason


def test_cuda_declines_old_gpus(a100, monkeypatch):
    monkeypatch.setattr(library, "capability", lambda device: (7, 5))
    assert decline_reason("cuda", ON_GPU) == "compute capability (7, 5) is below (8, 0)"
    assert "compute capability" in decline_reason("cuda", PARTITION_ON_GPU)


def test_cuda_passes_on_what_its_kernels_answer(a100, monkeypatch):
    monkeypatch.setattr(
        cuda_attention, "kernels_decline", lambda device, dtype, head_dim, window, backward: f"no head_dim {head_dim}"
    )
    assert decline_reason("cuda", replace(ON_GPU, head_dim=5)) == "no head_dim 5"


def test_a_call_measured_to_be_faster_elsewhere_goes_there(a100, monkeypatch):
    preference = import_module("swin_kernels.backends.cuda.preference")
    line = preference.Measured((8, 0), True, 2, 16, (216, 343), "triton", 0.4, 0.3, "results/a100.json at 0123abc")
    monkeypatch.setattr(preference, "MEASURED", (line,))
    backward = replace(ON_GPU, backward=True)
    reason = "triton took 0.3 ms where this took 0.4 ms (results/a100.json at 0123abc)"
    assert decline_reason("cuda", backward) == reason
    assert decline_reason("cuda", ON_GPU) is None
    for other in ({"head_dim": 8}, {"dtype": torch.float32}, {"window": (5, 5, 5)}, {"window": (8, 8, 8)}):
        assert decline_reason("cuda", replace(backward, **other)) is None, other
    monkeypatch.setattr(library, "capability", lambda device: (9, 0))
    assert decline_reason("cuda", backward) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_unavailable_without_a_device():
    assert BACKENDS["cuda"].unavailable() == "no CUDA device"
