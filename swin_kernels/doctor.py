"""Which backends run on this machine, whether each computes what it should, and how fast.

Every operator of every available backend is compared with the reference backend in float64, forward and backward, on
the operator's examples, in every dtype; then it is timed against the reference on the same device, the two interleaved.
A speed-up is shown only where the check passed.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from . import __version__
from .backends import BACKENDS, REFERENCE, Call, decline_reason, order
from .backends.cuda.library import LIBRARY as CUDA_LIBRARY
from .ops import OPERATORS
from .ops._operator import Example, Operator

ACCEPTED = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest error of a sound kernel, relative to the largest true element. Kernels stay far below it: the doctor is there
to find a broken build or machine; the tests are stricter."""

REPEATS = 5


@dataclass(frozen=True)
class Check:
    """One operator of one backend, in one dtype, over all examples that the backend takes.

    Attributes:
        operator: public name.
        dtype: element type.
        error: largest error relative to the largest true element, over outputs and gradients; 0 or infinity for an
            operator that copies.
        accepted: what `error` may be.
        failure: the first thing that was wrong, or "".
        declined: the backend's reasons for not taking an example, or its gradients.
        speedup: time of the reference over time of this backend, forward and backward; None if it was not timed or the
            check failed.
        exact: whether the operator only copies, so that no bit may differ.
        taken: whether the backend took any of the examples.
    """

    operator: str
    dtype: torch.dtype
    error: float
    accepted: float
    failure: str = ""
    declined: tuple[str, ...] = ()
    speedup: float | None = None
    exact: bool = False
    taken: bool = True

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
        quick: only float32, on half the examples.

    Returns:
        The report; `show` prints it.
    """
    start = time.perf_counter()
    threads = torch.get_num_threads()
    generators = torch.random.get_rng_state()
    try:
        backends = tuple(_examine(name, device, quick) for device in _devices() for name in BACKENDS)
    finally:
        torch.random.set_rng_state(generators)
        torch.set_num_threads(threads)
    # Report a missing backend only on devices for which it has kernels, and on the CPU.
    told = tuple(b for b in backends if b.checks or b.name in order(b.device) or b.device == "cpu")
    return Report(_machine(), told, time.perf_counter() - start)


def _devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _examine(name: str, device: str, quick: bool) -> Backend:
    """The backend's checks on `device`, or the reason why there are none."""
    checks = []
    for operator in OPERATORS.values():
        examples = operator.examples[::2] if quick else operator.examples
        for dtype in [torch.float32] if quick or operator.exact else ACCEPTED:
            if name == REFERENCE and dtype == torch.float64:  # with which the others are compared
                continue
            check = check_operator(operator, name, device, dtype, examples)
            if check.taken:
                checks.append(check if name == REFERENCE else _timed(check, operator, name, device))
    if checks:
        return Backend(name, device, checks=tuple(checks))
    reasons = [
        BACKENDS[name].unavailable(),
        *(
            reason
            for operator in OPERATORS.values()
            for reason in _reasons(operator, operator.examples[0], name, device, torch.float32)
        ),
    ]
    return Backend(name, device, reason=next(filter(None, reasons), "it has no operator"))


# Verification


def call_of(operator: Operator, example: Example, dtype: torch.dtype, device: str) -> Call:
    """The `Call` of `example`; nothing is computed."""
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in example.shapes.items()}
    call = operator.forward.call(*operator.prepare(**tensors, **example.options))
    return replace(call, device=device)


def _reasons(
    operator: Operator, example: Example, name: str, device: str, dtype: torch.dtype
) -> tuple[str | None, str | None]:
    """Why backend `name` does not take the example, and why not its gradients."""
    call = replace(call_of(operator, example, dtype, device), backward=False)
    return decline_reason(name, call), decline_reason(name, replace(call, backward=True))


def evaluate(
    operator: Operator, example: Example, tensors: dict[str, torch.Tensor], backend: str | None, gradients: bool = True
) -> dict[str, torch.Tensor]:
    """The output of `example` on its `tensors`, and the gradients of all of them for a fixed gradient of the output."""
    leaves = {name: t.detach().requires_grad_(gradients) for name, t in tensors.items()}
    torch.manual_seed(0)  # the same dropout on every backend
    out = operator.public(**leaves, **example.options, backend=backend)
    if not gradients:
        return {"output": out}
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad(out, list(leaves.values()), grad_out.to(out))
    return {"output": out.detach()} | {f"gradient of {n}": g for n, g in zip(leaves, found, strict=True)}


def check_operator(
    operator: Operator, name: str, device: str, dtype: torch.dtype, examples: Sequence[Example]
) -> Check:
    """Compare backend `name` with the reference in float64, on those of `examples` that it takes."""
    worst, failure, declined, taken = 0.0, "", [], False
    accepted = 0.0 if operator.exact else ACCEPTED[dtype]
    for example in examples:
        forward, backward = _reasons(operator, example, name, device, dtype)
        declined += [reason for reason in (forward, backward) if reason]
        if forward:
            continue
        taken = True
        tensors = example.tensors(dtype, device)
        wide = tensors if operator.exact else {n: t.double() for n, t in tensors.items()}
        truth = evaluate(operator, example, wide, REFERENCE, gradients=not backward)
        try:
            results = evaluate(operator, example, tensors, name, gradients=not backward)
        except Exception as error:  # whatever a broken build raises is what we look for
            worst, failure = math.inf, failure or f"{example.name}: {type(error).__name__}: {error}"
            continue
        for what, off in _errors(results, truth).items():
            worst = max(worst, off)
            if not off <= accepted:
                failure = failure or f"{example.name}: {what}: error {off:.1e}"
    reasons = tuple(dict.fromkeys(declined))
    return Check(operator.name, dtype, worst, accepted, failure, reasons, exact=operator.exact, taken=taken)


def _errors(results: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest error of each result, relative to the largest true element.

    Gradients share a scale: that of a padding token, for example, is 0 where nothing is padded.
    """
    scale = max((_largest(t) for what, t in truth.items() if what != "output"), default=0.0)
    found = {}
    for what, true in truth.items():
        result = results[what]
        error = _largest(result.double() - true) if result.shape == true.shape else math.inf
        found[what] = error / (_largest(true) if what == "output" else scale) if error else 0.0
    return found


def _largest(x: torch.Tensor) -> float:
    """``max |x|``, infinite where `x` has a NaN."""
    value = x.abs().max().item()
    return math.inf if math.isnan(value) else value


# Timing


def _timed(check: Check, operator: Operator, name: str, device: str) -> Check:
    """`check` with its speed-up, if it passed."""
    example = operator.timed[device]
    if not check.passed or any(_reasons(operator, example, name, device, check.dtype)):
        return check
    tensors = example.tensors(check.dtype, device)

    def run(backend: str) -> Callable[[], object]:
        return lambda: evaluate(operator, example, tensors, backend)

    return replace(check, speedup=_speedup(run(REFERENCE), run(name), device))


def _speedup(reference: Callable[[], object], fused: Callable[[], object], device: str) -> float:
    """Median seconds of `reference` over median seconds of `fused`, the two measured in turns."""
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
    if not BACKENDS["cpu"].unavailable():
        forced = " (forced by SWIN_KERNELS_ISA)" if os.environ.get("SWIN_KERNELS_ISA") else ""
        facts["C++ kernels for"] = f"{_isa()}{forced}"
    facts["CUDA kernels"] = "built" if CUDA_LIBRARY.is_file() else "not built"
    if torch.cuda.is_available():
        facts["GPU"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return facts


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The processor's model, or its architecture if the system does not say."""
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
    from rich.console import Console, JustifyMethod
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False)
    width = max(map(len, report.machine))
    for name, value in report.machine.items():
        console.print(Text.assemble((f"{name:<{width}}  ", "dim"), value))

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    columns: dict[str, JustifyMethod] = {
        "backend": "left",
        "operator": "left",
        "dtype": "left",
        "error": "right",
        "limit": "right",
        "check": "left",
        "speed-up": "right",
    }
    for column, justify in columns.items():
        table.add_column(column, justify=justify, no_wrap=True)
    for backend in report.backends:
        label = _label(backend)
        for number, check in enumerate(backend.checks):
            table.add_row(
                "" if number else label,
                check.operator,
                _dtype(check),
                "wrong" if check.exact and not check.passed else "exact" if check.exact else f"{check.error:.1e}",
                "exact" if check.exact else f"{check.accepted:.0e}",
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
                console.print(Text(f"{what}: some calls are left to another backend: {reason}", style="yellow"))
    console.print(
        Text(
            "Errors are against the reference in float64, outputs and gradients, relative to the largest element. "
            f"Speed-up is over the reference backend, forward and backward, median of {REPEATS} in turns.",
            style="dim",
        )
    )
    verdict = "every check passed" if report.passed else "a check FAILED"
    console.print(Text(f"{verdict} ({report.seconds:.0f} s)", style="bold green" if report.passed else "bold red"))
