"""Fixtures of the operator tests."""

from __future__ import annotations

import pytest
import torch

from swin_kernels import backends


@pytest.fixture(params=["reference", "cpu"])
def backend(request) -> str:
    """Every backend that runs on CPU tensors; those missing on this machine are skipped, with the reason they give."""
    if reason := backends.BACKENDS[request.param].unavailable():
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture
def cpu_backend() -> str:
    """The C++ backend, for what only it promises."""
    if reason := backends.BACKENDS["cpu"].unavailable():
        pytest.skip(f"backend cpu: {reason}")
    return "cpu"


@pytest.fixture(params=["baseline", "avx2", "avx512", "amx"])
def instruction_set(request, cpu_backend, monkeypatch) -> str:
    """Every instruction set that the C++ kernels may be told to use; they read the setting at every call."""
    monkeypatch.setenv("SWIN_KERNELS_ISA", request.param)
    try:
        assert torch.ops.swin_kernels_cpu.isa() == request.param
    except RuntimeError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """Fill every tensor that PyTorch allocates, also from C++, with NaN, so that an unwritten element shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
