"""Check variants of a call against a more precise truth, and time those that are sound."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from . import faults
from .device import Cuda, Simulated, Times, clock_of
from .reporter import Reporter
from .result import Row

T = TypeVar("T")
Values = Callable[[], list[torch.Tensor]]
TRUTH = "truth"
LOST = ("CUDA error", "illegal memory access", "launch failure", "misaligned address", "device-side assert")


class DeviceLost(RuntimeError):
    """The device no longer answers in this process: the rest of the work is left to another."""


def relative_error(values: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """The worst of ``‖value - truth‖ / ‖truth‖``; infinite for NaN."""
    errors = [((v.double() - t).norm() / t.norm().clamp(min=1e-30)).item() for v, t in zip(values, truth, strict=True)]
    return max(e if e == e else math.inf for e in errors)


def in_words(error: BaseException) -> str:
    """The status of a row that met `error`: its kind, then its message on one line."""
    said = " ".join(str(error).split())[:240] or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in said:
        return f"out of memory: {said}"
    if any(sign in said for sign in LOST):
        return f"lost the device: {said}"
    return f"failed: {type(error).__name__}: {said}"


def guarded(
    reporter: Reporter,
    device: Cuda | Simulated,
    row: Row,
    what: str,
    call: Callable[[], T],
    limit: float | None = None,
) -> T | None:
    """``call()`` as the step `what`, with every kernel of ours traced; None, and a row, where it raises.

    Raises:
        DeviceLost: the error stays.
    """
    try:
        reporter.step(row, what, limit, strikes=False)
        with device.traced(reporter.kernels):
            reporter.strike()
            found = call()
            device.check()
        return found
    except Exception as error:
        started = reporter.started_kernels
        lost = replace(row, status=in_words(error), kernel=started[-1] if started else row.kernel)
        try:
            device.check()
        except Exception as still:
            reporter.row(replace(lost, status=f"lost the device: {lost.status.partition(': ')[2]}"))
            raise DeviceLost(row.label) from still
        reporter.row(lost)
    device.free()  # what the failed call held, now that its frames are gone
    return None


def compare(
    reporter: Reporter,
    device: Cuda | Simulated,
    about: Row,
    variants: dict[str, Values],
    truth: Values,
    allowed: Callable[[dict[str, float]], float],
    seconds: float,
    exponentials: float | None = None,
    profiled: tuple[str, ...] = (),
    limits: dict[str, float] | None = None,
    most_kernels: int | None = None,
) -> None:
    """Report a row for every variant: its error and, if that is allowed, its time beside that of "ours".

    Args:
        about: part, measure and shape of the rows.
        variants: calls that return what `truth` returns.
        allowed: the largest allowed error, from the errors of the variants.
        seconds: for timing.
        exponentials: how many a call computes at least, which gives the floor.
        profiled: variants whose kernels get separate rows, of the measure "..., kernels".
        limits: seconds of silence for the first call of a variant, where they differ from the child's.
        most_kernels: how many kernels of a profiled variant get rows, the most expensive ones.
    """
    rows = {name: replace(about, variant=name) for name in variants}
    tables = {name: rows[name].of_kernels for name in profiled if name in rows}
    tables = {name: table for name, table in tables.items() if reporter.wants(table)}
    open_ = {name: row for name, row in rows.items() if reporter.wants(row)}
    if not open_ and not tables:
        return
    expected = None
    reference = replace(about, variant=TRUTH)
    if reporter.wants(reference):
        expected = guarded(reporter, device, reference, "compute", truth)
    if expected is None:
        for row in open_.values():
            reporter.row(replace(row, status="failed: there is no truth to compare it with"))
        return

    errors: dict[str, float] = {}
    started: dict[str, str | None] = {}
    for name in [*open_, *(name for name in tables if name not in open_)]:
        check = partial(_checked, rows[name], variants[name], expected)
        error = guarded(reporter, device, rows[name], "check", check, (limits or {}).get(name))
        if error is not None:
            errors[name], started[name] = error, ", ".join(reporter.started_kernels) or None
    del expected, check
    device.free()
    most = allowed(errors)
    for name in [name for name, error in errors.items() if not error <= most]:
        if name in open_:
            kernels, error = started[name], errors[name]
            status = f"wrong: error {error:.1e}, allowed {most:.1e}"
            reporter.row(replace(rows[name], status=status, error=error, kernel=kernels))
    sound = {name: variants[name] for name, error in errors.items() if error <= most}

    def timed(name: str) -> Row:
        return replace(rows[name], kernel=started[name])

    timing = {name: call for name, call in sound.items() if name in open_}
    found = device.times(timing, seconds, lambda name: reporter.step(timed(name), "time")) if timing else {}
    own = statistics.median(found["ours"].ms) if "ours" in found else None
    for name, times in found.items():
        row = timing_row(rows[name], device, times, exponentials)
        row.error = errors[name]
        row.ratio = row.median / own if own else None
        reporter.step(timed(name), "memory")
        row.extra_mib = device.extra_memory(sound[name])
        reporter.row(row)
    for name, table in tables.items():
        if name not in sound:
            continue
        reporter.step(table, "profile")
        for one in device.kernels(sound[name])[:most_kernels]:
            reporter.row(
                replace(table, kernel=one.kernel, p50=one.ms, value=round(one.launches, 2), unit="launches a call")
            )


def _checked(row: Row, call: Values, truth: list[torch.Tensor]) -> float:
    error = relative_error(call(), truth)
    return error + 1.0 if faults.planted(f"{row.label} | check") == "wrong" else error


def announcing(reporter: Reporter, row: Row) -> Callable[[str], None]:
    """A function that says, before each timed call, that `row` is being timed."""

    def announce(name: str) -> None:
        reporter.step(row, "time")

    return announce


def timing_row(row: Row, device: Cuda | Simulated, times: Times, exponentials: float | None = None) -> Row:
    """`row` with percentiles, clock and floor.

    A multiprocessor starts 16 exponentials per clock; the clock is the one it ran at (docs/cuda.md).
    """
    p20, _, _, p80 = statistics.quantiles(times.ms, n=5)
    clock = clock_of(times)
    floor = exponentials / (16 * device.multiprocessors * clock * 1e3) if exponentials and clock else None
    return replace(
        row,
        p20=p20,
        p50=statistics.median(times.ms),
        p80=p80,
        rounds=len(times.ms),
        clock_mhz=clock,
        floor=floor,
    )
