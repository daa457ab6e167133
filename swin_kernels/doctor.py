"""Which backends run on this machine, whether each computes what it should, and how fast.

Every backend that is available is held to the reference backend in float64, forward and backward, on shapes that pad,
clip and shift, in every dtype; then timed against the reference on the same device, the two interleaved. A speed-up is
shown only beside checks that passed.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import __version__, window_attention, window_partition, window_reverse
from .backends import IMPLEMENTED, ORDER, Call, decline_reason, load
from .geometry import bias_table_length

ACCEPTED = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest error of a sound kernel, relative to the largest true element. Wide of what kernels reach: the doctor
is there to find a broken build or machine; the tests hold the kernels to a tighter rule."""

REPEATS = 5


@dataclass(frozen=True)
class Shape:
    """A call to verify. Extents and windows have one entry per axis."""

    name: str
    spatial: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]
    heads: int
    head_dim: int
    dropout_p: float = 0.0


SHAPES = (
    Shape("2D, padded, shifted", (10, 9), (7, 7), (3, 3), heads=2, head_dim=8),
    Shape("3D, padded, shifted", (9, 8, 7), (7, 7, 7), (3, 3, 3), heads=1, head_dim=16),
    Shape("3D, clipped", (6, 6, 6), (7, 7, 7), (3, 3, 3), heads=1, head_dim=16),
    Shape("3D, pads one axis, clips one", (3, 9, 8), (4, 4, 4), (2, 2, 2), heads=2, head_dim=32),
    Shape("3D, odd head_dim", (5, 4, 6), (3, 2, 3), (1, 1, 0), heads=3, head_dim=5),
    Shape("3D, dropout", (5, 8, 4), (4, 4, 4), (2, 2, 2), heads=2, head_dim=16, dropout_p=0.2),
)

TIMED = {
    "cpu": Shape("12³ tokens, window 7³", (12, 12, 12), (7, 7, 7), (3, 3, 3), heads=3, head_dim=16),
    "cuda": Shape("48³ tokens, window 7³", (48, 48, 48), (7, 7, 7), (3, 3, 3), heads=3, head_dim=16),
}
"""Per device, the shifted block that is timed: stage 1 of Swin UNETR (feature_size 48) at 24³ and 96³ voxels."""


@dataclass(frozen=True)
class Check:
    """One operator of one backend, in one dtype, over all shapes it takes.

    Attributes:
        operator: public name.
        dtype: element type.
        error: largest error relative to the largest true element, over outputs and gradients; for partition and
            reverse 0 or infinity, as they copy.
        accepted: what `error` may be.
        failure: the first thing that was wrong; "" if nothing.
        declined: reasons of the backend for shapes it does not take.
        speedup: time of the reference over time of this backend, forward + backward; None where it was not timed or
            the check failed.
    """

    operator: str
    dtype: torch.dtype
    error: float
    accepted: float
    failure: str = ""
    declined: tuple[str, ...] = ()
    speedup: float | None = None

    @property
    def passed(self) -> bool:
        return not self.failure


@dataclass(frozen=True)
class Backend:
    """A backend on one device. `reason` says why it does not run here, "" if it does."""

    name: str
    device: str
    reason: str = ""
    checks: tuple[Check, ...] = ()

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


@dataclass(frozen=True)
class Report:
    """What `run` found."""

    machine: dict[str, str]
    backends: tuple[Backend, ...]
    seconds: float = field(compare=False)

    @property
    def passed(self) -> bool:
        """Whether every check of every available backend passed."""
        return all(backend.passed for backend in self.backends)


def run(quick: bool = False) -> Report:
    """Verify and time every backend on this machine.

    Args:
        quick: float32 alone on half the shapes.

    Returns:
        The report; `show` prints it.
    """
    start = time.perf_counter()
    threads = torch.get_num_threads()
    generators = torch.random.get_rng_state()
    try:
        backends = tuple(_examine(name, device, quick) for device in _devices() for name in IMPLEMENTED)
    finally:
        torch.random.set_rng_state(generators)
        torch.set_num_threads(threads)
    # A backend that has no business on a device is not news; one that could run there but does not is.
    told = tuple(b for b in backends if b.checks or b.name in ORDER[b.device] or b.device == "cpu")
    return Report(_machine(), told, time.perf_counter() - start)


def _devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _examine(name: str, device: str, quick: bool) -> Backend:
    """The backend's checks on `device`, or the reason why there are none."""
    calls = {dtype: Call("window_attention", device, dtype, head_dim=16, window=(7, 7, 7)) for dtype in ACCEPTED}
    reasons = {dtype: decline_reason(name, call) for dtype, call in calls.items()}
    if all(reasons.values()):
        return Backend(name, device, reason=reasons[torch.float32])
    wanted = [torch.float32] if quick else [dtype for dtype, reason in reasons.items() if reason is None]
    if name == "reference":  # in float64 it is what the others are held to
        wanted = [dtype for dtype in wanted if dtype != torch.float64]
    checks = [_check_attention(name, device, dtype, SHAPES[1::2] if quick else SHAPES) for dtype in wanted]
    checks.append(_check_partition(name, device))
    if name != "reference":
        checks = [_timed(check, name, device) for check in checks]
    return Backend(name, device, checks=tuple(checks))


# Verification


def _inputs(shape: Shape, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """qkv, bias_table, pad_qkv and the gradient of the output, the same values on every call."""
    generator = torch.Generator().manual_seed(0)
    channels = shape.heads * shape.head_dim
    sizes = [
        (2 if len(shape.spatial) == 2 else 1, *shape.spatial, 3 * channels),
        (bias_table_length(shape.window), shape.heads),
        (3 * channels,),
        (2 if len(shape.spatial) == 2 else 1, *shape.spatial, channels),
    ]
    return [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]


def _attend(backend: str, shape: Shape, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients of qkv, bias_table and pad_qkv."""
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    torch.manual_seed(0)  # the same dropout on every backend
    out = window_attention(
        leaves[0],
        leaves[1],
        shape.window,
        shape.shift,
        pad_qkv=leaves[2],
        dropout_p=shape.dropout_p,
        backend=backend,
    )
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]


RESULTS = ("output", "gradient of qkv", "gradient of bias_table", "gradient of pad_qkv")


def _check_attention(name: str, device: str, dtype: torch.dtype, shapes: tuple[Shape, ...]) -> Check:
    worst, failure, declined = 0.0, "", []
    for shape in shapes:
        inputs = _inputs(shape, dtype, device)
        window = tuple(map(min, shape.window, shape.spatial))
        call = Call("window_attention", device, dtype, shape.head_dim, window, dropout=shape.dropout_p > 0)
        if reason := decline_reason(name, call) or decline_reason(name, _backward_of(call)):
            declined.append(reason)
            continue
        truth = _attend("reference", shape, [t.double() for t in inputs])
        try:
            results = _attend(name, shape, inputs)
        except Exception as error:  # whatever a broken build raises is the finding
            worst, failure = math.inf, failure or f"{shape.name}: {type(error).__name__}: {error}"
            continue
        # Gradients share a scale: that of pad_qkv is 0 where nothing is padded.
        scales = [_largest(truth[0]), *[max(map(_largest, truth[1:]))] * 3]
        for what, result, true, scale in zip(RESULTS, results, truth, scales, strict=True):
            error = _largest(result.double() - true) / scale if result.shape == true.shape else math.inf
            worst = max(worst, error)
            if not error <= ACCEPTED[dtype]:
                failure = failure or f"{shape.name}: {what}: error {error:.1e}"
    return Check("window_attention", dtype, worst, ACCEPTED[dtype], failure, tuple(dict.fromkeys(declined)))


def _backward_of(call: Call) -> Call:
    return Call(call.operator, call.device, call.dtype, call.head_dim, call.window, call.dropout, backward=True)


def _largest(x: torch.Tensor) -> float:
    """``max |x|``, infinite where `x` has a NaN."""
    value = x.abs().max().item()
    return math.inf if math.isnan(value) else value


def _check_partition(name: str, device: str) -> Check:
    """Partition must copy every value to its place, and reverse bring it back, bit by bit."""
    failure = ""
    for shape in SHAPES:
        x = _inputs(shape, torch.float32, device)[0]
        try:
            windows = window_partition(x, shape.window, shape.shift, backend=name)
            back = window_reverse(windows, shape.window, shape.shift, shape.spatial, backend=name)
        except Exception as error:  # as above
            failure = failure or f"{shape.name}: {type(error).__name__}: {error}"
            continue
        if not torch.equal(windows, window_partition(x, shape.window, shape.shift, backend="reference")):
            failure = failure or f"{shape.name}: window_partition differs from the reference"
        if not torch.equal(back, x):
            failure = failure or f"{shape.name}: window_reverse does not undo window_partition"
    return Check("window_partition", torch.float32, math.inf if failure else 0.0, 0.0, failure)


# Timing


def _timed(check: Check, name: str, device: str) -> Check:
    """`check` with its speed-up, if it passed."""
    shape = TIMED[device]
    call = Call(check.operator, device, check.dtype, shape.head_dim, shape.window)
    if not check.passed or decline_reason(name, call):
        return check
    inputs = _inputs(shape, check.dtype, device)

    def attend(backend: str) -> Callable[[], object]:
        return lambda: _attend(backend, shape, inputs)

    def partition(backend: str) -> Callable[[], object]:
        def call() -> torch.Tensor:
            windows = window_partition(inputs[0], shape.window, shape.shift, backend=backend)
            return window_reverse(windows, shape.window, shape.shift, shape.spatial, backend=backend)

        return call

    make = attend if check.operator == "window_attention" else partition
    speedup = _speedup(make("reference"), make(name), device)
    return Check(check.operator, check.dtype, check.error, check.accepted, check.failure, check.declined, speedup)


def _speedup(reference: Callable[[], object], fused: Callable[[], object], device: str) -> float:
    """Median seconds of `reference` over median seconds of `fused`, the two taken in turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(REPEATS + 1):  # the first turn warms up
        for function, taken in zip((reference, fused), seconds, strict=True):
            _wait_for(device)
            start = time.perf_counter()
            function()
            _wait_for(device)
            if repeat:
                taken.append(time.perf_counter() - start)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# The machine


def _machine() -> dict[str, str]:
    """Versions and hardware, in the order they are shown."""
    facts = {
        "swin-kernels": __version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "MONAI": _version("monai"),
        "Triton": _version("triton"),
        "processor": _processor(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} logical cores",
    }
    if not load("cpu").unavailable():
        forced = " (forced by SWIN_KERNELS_ISA)" if os.environ.get("SWIN_KERNELS_ISA") else ""
        facts["C++ kernels for"] = f"{_isa()}{forced}"
    facts["CUDA kernels"] = "built" if load("cuda").LIBRARY.is_file() else "not built"
    if torch.cuda.is_available():
        facts["GPU"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return facts


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The processor's model, or its architecture where the system does not tell."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _isa() -> str:
    """The instruction set that the C++ kernels picked, or why they refuse."""
    try:
        return torch.ops.swin_kernels_cpu.isa()
    except RuntimeError as error:
        return str(error)


# Output


def _label(backend: Backend) -> str:
    return backend.name if backend.device == "cpu" else f"{backend.name} ({backend.device})"


def _dtype(check: Check) -> str:
    return str(check.dtype).removeprefix("torch.")


def show(report: Report, console=None) -> None:
    """Print `report` on a rich console (standard output if None); readable in 80 columns and in a pipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False)
    width = max(map(len, report.machine))
    for name, value in report.machine.items():
        console.print(Text.assemble((f"{name:<{width}}  ", "dim"), value))

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column, justify in (
        ("backend", "left"),
        ("operator", "left"),
        ("dtype", "left"),
        ("error", "right"),
        ("limit", "right"),
        ("check", "left"),
        ("speed-up", "right"),
    ):
        table.add_column(column, justify=justify, no_wrap=True)
    for backend in report.backends:
        label = _label(backend)
        for number, check in enumerate(backend.checks):
            exact = check.operator == "window_partition"
            table.add_row(
                "" if number else label,
                check.operator,
                _dtype(check),
                "exact" if exact and check.passed else "wrong" if exact else f"{check.error:.1e}",
                "exact" if exact else f"{check.accepted:.0e}",
                Text("ok", style="green") if check.passed else Text("FAILED", style="bold red"),
                "" if check.speedup is None else f"{check.speedup:.1f}×",
            )
    console.print()
    console.print(table)

    console.print()
    for backend in report.backends:
        if backend.reason:
            console.print(Text(f"{backend.name} does not run here: {backend.reason}", style="yellow"))
        for check in backend.checks:
            what = f"{_label(backend)}, {check.operator}, {_dtype(check)}"
            if check.failure:
                console.print(Text(f"FAILED {what}: {check.failure}", style="bold red"))
            for reason in check.declined:
                console.print(Text(f"{what}: some shapes are left to another backend: {reason}", style="yellow"))
    devices = dict.fromkeys(backend.device for backend in report.backends)
    timed = "; ".join(f"{device}: {TIMED[device].name}" for device in devices)
    console.print(
        Text(
            "Errors are against the reference in float64, outputs and gradients, relative to the largest element. "
            f"Speed-up is over the reference backend, forward and backward, median of {REPEATS} in turns ({timed}).",
            style="dim",
        )
    )
    verdict = "every check passed" if report.passed else "a check FAILED"
    console.print(Text(f"{verdict} ({report.seconds:.0f} s)", style="bold green" if report.passed else "bold red"))
