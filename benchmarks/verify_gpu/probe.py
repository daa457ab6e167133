"""What this machine is, and the two ceilings for everything that runs on it: a copy, and a matrix product."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch

from swin_kernels.backends import decline_reason
from swin_kernels.ops.window_attention import WindowAttentionCall

from .children import ROOT
from .device import device_of
from .measure import announcing, guarded, timing_row
from .operators import backends_of
from .reporter import Reporter
from .result import Row
from .tasks import Task

LIBRARIES = ("libswin_kernels_cuda.so", "libswin_kernels_cpu.so")


def first_line(*command: str) -> str | None:
    """What `command` prints first; None if it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 and done.stdout.strip() else None


def commit_of(given: str | None) -> str:
    """The commit that is measured: `given`, or what git says about the sources; both where they differ.

    A copy of the sources may have come without the repository's last commits: a run on a machine that is hard to get
    should not end there.

    Raises:
        ValueError: neither is known.
    """
    found = first_line("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    if given is None:
        if found is None:
            raise ValueError(
                "--commit: not given, and git does not tell it here; accepted is the commit of these sources"
            )
        return found
    if found is not None and not found.removesuffix("-dirty").startswith(given[:12]):
        return f"{given}, where git says {found}"
    return found or given


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def digest(file: Path) -> str:
    """First digits of the SHA-256 of a library, which tell whether it is the one that was built elsewhere."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else "not built"


def host(commit: str, simulated: bool) -> dict:
    """What a result depends on, as far as that is known without the GPU."""
    return {
        "simulated": simulated,
        "commit": commit,
        "device": None,
        "libraries": {name: digest(ROOT / "swin_kernels" / "lib" / name) for name in LIBRARIES},
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version_of("triton"),
        "monai": version_of("monai"),
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def describing(simulated: bool) -> Task:
    return Task("probe.describe", {"simulated": simulated}, Row("probe", "device", "", "driver"), 2)


def describe(reporter: Reporter, row: dict, simulated: bool) -> None:
    """Say what the device is, and which backends run on it."""
    device = device_of(simulated)
    about = Row(**row)
    if not reporter.wants(about):
        return
    reporter.step(about, "describe")
    if simulated:
        reporter.about(device="simulated on the CPU", multiprocessors=device.multiprocessors)
    else:
        properties = torch.cuda.get_device_properties(0)
        told = {
            name: first_line("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader")
            for name, field in (("driver", "driver_version"), ("max_clock", "clocks.max.sm"))
        }
        reporter.about(
            device=properties.name,
            capability=f"{properties.major}.{properties.minor}",
            multiprocessors=properties.multi_processor_count,
            memory_gib=round(properties.total_memory / 2**30, 1),
            l2_mib=round(properties.L2_cache_size / 2**20, 1),
            cudnn=torch.backends.cudnn.version(),
            **{name: said or "nvidia-smi does not tell" for name, said in told.items()},
        )
    dtype = torch.float32 if simulated else torch.bfloat16
    call = WindowAttentionCall(device=device.name, dtype=dtype, head_dim=16, window=(7, 7, 7))
    for backend in backends_of(simulated):
        reason = decline_reason(backend, call)
        status = f"declined: {reason}" if reason else "ok"
        reporter.row(replace(about, measure="backend", variant=backend, status=status))
    device.check()
    reporter.row(about)


def ceilings(simulated: bool) -> Task:
    row = Row("probe", "ceiling", "", "PyTorch")
    return Task("probe.measure_ceilings", {"simulated": simulated}, row, 2, timed=True)


def _runs(call: Callable[[], torch.Tensor]) -> bool:
    """True, once the result of `call` was read."""
    call().any().item()
    return True


def measure_ceilings(reporter: Reporter, row: dict, simulated: bool, seconds: float) -> None:
    """How fast the device copies, and multiplies matrices."""
    device = device_of(simulated)
    about = Row(**row)
    extent = 64 if simulated else 8192
    flat = torch.empty((1 << 20) if simulated else (1 << 30), dtype=torch.uint8, device=device.name)
    copy = torch.empty_like(flat)
    left, right = (torch.randn(extent, extent, device=device.name).to(torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    calls = {
        "copy": (f"{flat.numel() >> 20} MiB", lambda: copy.copy_(flat), 2 * flat.numel() / 1e6, "GB/s"),
        "product": (f"{extent}³ bfloat16", lambda: torch.mm(left, right, out=product), 2 * extent**3 / 1e9, "TFLOP/s"),
    }
    for name, (size, call, amount, unit) in calls.items():
        mine = replace(about, measure=f"ceiling, {name}", shape=size)
        if not reporter.wants(mine) or guarded(reporter, device, mine, "check", partial(_runs, call)) is None:
            continue
        found = device.times({name: call}, seconds / 2, announcing(reporter, mine))[name]
        timed = timing_row(mine, device, found)
        timed.value, timed.unit = amount / timed.median, unit
        reporter.row(timed)
