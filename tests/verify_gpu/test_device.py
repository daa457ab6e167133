"""The use of a GPU, on stand-ins for the parts of `torch.cuda` that need one."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import weakref
from types import SimpleNamespace

import pytest
import torch

from benchmarks.verify_gpu import device
from benchmarks.verify_gpu.device import Cuda, short_kernel_name

MHZ = 1500


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose clock runs at `MHZ`, and on which a call takes as many ms as it returns."""
    now = 0.0
    made = torch.zeros

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    def spin(cycles: int) -> None:
        advance(cycles / MHZ / 1e3)

    def advance(ms: float) -> None:
        nonlocal now
        now += ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", spin)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: made(1, **options))  # what flushes the cache
    return advance


def test_times(gpu):
    """The first round is discarded; variants take turns, each announced; the clock is that of the spin."""
    first = {"slow": True, "fast": True}
    announced = []

    def call(name: str, ms: float) -> None:
        gpu(100.0 if first[name] else ms)
        first[name] = False

    calls = {"slow": lambda: call("slow", 3.0), "fast": lambda: call("fast", 2.0)}
    found = Cuda().times(calls, 60.0, announced.append)
    assert announced == ["slow", "fast"] * (device.ROUNDS + 1)
    for name, ms in (("slow", 3.0), ("fast", 2.0)):
        assert found[name].ms == pytest.approx([ms] * device.ROUNDS)
        assert found[name].clocks_mhz == pytest.approx([MHZ] * device.ROUNDS)


def test_times_end(gpu):
    """No more than the minimum number of rounds when the time is over."""
    [times] = Cuda().times({"ours": lambda: gpu(1.0)}, 0.0, lambda name: None).values()
    assert len(times.ms) == device.FEWEST_ROUNDS


def test_kernels(gpu, monkeypatch):
    """Time and launches of one call, summed by name, the most expensive first; what ran on the CPU does not count."""
    kind = torch.autograd.DeviceType

    def event(name: str, us: float, where=kind.CUDA) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=where, time_range=SimpleNamespace(elapsed_us=lambda: us))

    class Profile:
        def __init__(self, activities) -> None:
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            return None

        def events(self) -> list[SimpleNamespace]:
            call = [event("void swin::attend<__half, 16>(swin::Call)", 40.0), event("copy", 5.0), event("copy", 15.0)]
            return [*call * 5, event("aten::copy_", 1000.0, kind.CPU)]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    found = Cuda().kernels(lambda: None)
    assert [(one.kernel, one.ms, one.launches) for one in found] == [
        ("attend<Float16, 16>", pytest.approx(0.04), 1.0),
        ("copy", pytest.approx(0.02), 2.0),
    ]


def test_traced(gpu, monkeypatch, tmp_path):
    """Triton's kernels write their name before they start and are waited for, but not while a graph is captured."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    import swin_kernels.backends

    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append("wait"))
    monkeypatch.setattr(swin_kernels.backends.BACKENDS["cuda"], "unavailable", lambda: "no CUDA device")
    monkeypatch.setattr(swin_kernels.backends.BACKENDS["triton"], "unavailable", lambda: None)
    launched = SimpleNamespace(get=lambda: {"name": "attend"})
    file = os.open(tmp_path / "kernels", os.O_WRONLY | os.O_CREAT)
    with Cuda().traced(file):
        triton.knobs.runtime.launch_enter_hook(launched)
        triton.knobs.runtime.launch_exit_hook(launched)
        assert waits == ["wait"]
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        triton.knobs.runtime.launch_exit_hook(launched)
        assert waits == ["wait"]
    triton.knobs.runtime.launch_enter_hook(launched)
    os.close(file)
    assert (tmp_path / "kernels").read_text() == "attend\n"


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void swin::(anonymous namespace)::attend<__nv_bfloat16, (int)16>(swin::Call)", "attend<BFloat16, 16>"),
        ("attend", "attend"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int> >(int, F)", None),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD"),
        ("k<" + "a" * 200 + ">(int)", "k<" + "a" * 75 + "..."),
    ],
)
def test_short_kernel_name(name, short):
    assert short_kernel_name(name) == (short or "vectorized_elementwise_kernel<4, FillFunctor<int> >")


def test_graph_keeps_what_it_reads(gpu, monkeypatch):
    """Weights that only the captured call holds: if they were freed, unmapped memory would be read."""
    nothing = SimpleNamespace(wait_stream=lambda other: None, replay=lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: nothing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: nothing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: nothing)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda what: contextlib.nullcontext())
    network = torch.nn.Linear(2, 2)
    weight = weakref.ref(network.weight)
    replay = Cuda().graph(torch.no_grad()(functools.partial(network, torch.ones(1, 2))))
    del network
    gc.collect()
    assert replay().shape == (1, 2)
    assert weight() is not None
