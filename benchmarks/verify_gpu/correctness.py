"""The GPU tests, divided among processes, and four sanitizers."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from . import children, counters
from .children import Child
from .jobs import INTERPRETER, Program, Workplace, json_lines
from .reporter import KERNELS, kernels_in
from .result import Row

TESTS = "tests/ops/test_on_gpu.py"
WORKERS = 8
GIB_OF_WORKER = 6
"""GPU memory for a process: its context, and the float64 truth of the largest test."""

GIB_BESIDE = 24
"""GPU memory for what runs beside the tests: models that are compiled."""

SECONDS_OF_TEST, SECONDS_OF_SANITIZER = 1.5, 60
"""Expected on a GPU: Triton compiles in most tests, and a sanitizer makes kernels a hundred times slower."""

SLOWNESS = 2
"""How many times as long a child may be silent under a sanitizer."""


def cores() -> int:
    return len(os.sched_getaffinity(0))


def workers(memory_gib: float | None) -> int:
    """As many processes as cores and GPU memory allow."""
    by_memory = int((memory_gib - GIB_BESIDE) // GIB_OF_WORKER) if memory_gib else WORKERS
    return max(1, min(WORKERS, cores() - 1, by_memory))


def pytest_command(folder: Path, path: str, test_limit: float, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"),
        *("-p", "benchmarks.verify_gpu.pytest_plugin", "--verify-results", str(folder / "results")),
        *("--dist", "load", "--maxschedchunk", "1", "--max-worker-restart", "1000", "--no-summary"),
        *("--timeout", f"{test_limit:g}", "--timeout-method", "thread"),
        *more,
        path,
    ]


def tests(
    place: Workplace, path: str, test_limit: float, limit: Callable[[], float], on_loss: Callable[[str, str], None]
) -> Program:
    """pytest on `path`; a row for every test as soon as it fails, and one for all tests.

    Args:
        on_loss: called with the name of each test in which a process or the device was lost, and how.
    """
    row = Row("correctness", "GPU tests", Path(path).name, "ours")
    seen = 0

    def command(folder: Path) -> list[str]:
        processes = str(workers(place.result.about.get("memory_gib")))
        return pytest_command(folder, path, test_limit, "-n", processes)

    def watch(folder: Path) -> Iterator[Row]:
        nonlocal seen
        found = [line for line in json_lines(folder / "results") if "test" in line]
        for test in found[seen:]:
            outcome, name = test["outcome"], test["test"].partition("::")[2]
            if outcome in KINDS:
                yield replace(row, measure="GPU test", shape=name, status=f"{KINDS[outcome]}: {test['message']}")
            if outcome in LOSSES:
                on_loss(name, KINDS[outcome])
        seen = len(found)

    def read(folder: Path, child: Child, why: str) -> Iterator[Row]:
        lines = json_lines(folder / "results")
        collected = next((line["collected"] for line in lines if "collected" in line), None)
        counts = Counter(line["outcome"] for line in lines if "test" in line)
        total = sum(counts.values())
        said = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()) or "none was run"
        if why:
            left = f"{collected - total} of {collected} were not run" if collected else "none was collected"
            status = f"{why}; {left}; {said}"
        elif not collected:
            status = f"failed: no test was collected, {child.end_in_words}"
        elif total < collected:
            status = f"failed: {collected - total} of {collected} were not run, {child.end_in_words}; {said}"
        elif set(counts) <= {"passed", "skipped"}:
            status = "ok" if counts["passed"] else "skipped: every test was skipped, the log says why"
        else:
            status = f"failed: {said}"
        yield replace(row, status=status, value=float(counts["passed"]), unit="tests passed")

    return Program(place, row, command, read, limit, watch=watch)


def traced_test(place: Workplace, path: str, name: str, kind: str, test_limit: float) -> Program:
    """Repeat a test in which a process or the device was lost, alone and with its kernels traced, to find the kernel.

    Args:
        path, name: of the test.
        kind: how it was lost, one of the values of `KINDS`.
    """
    row = Row("correctness", "GPU test, traced", name, "ours")

    def command(folder: Path) -> list[str]:
        return pytest_command(
            folder, f"{path}::{name}", test_limit, "-n", "0", "--verify-kernels", str(folder / KERNELS)
        )

    def read(folder: Path, child: Child, why: str) -> Iterator[Row]:
        started = kernels_in(folder)
        kernel = started[-1] if started else None
        if any(line.get("outcome") == "passed" for line in json_lines(folder / "results")):
            yield replace(row, status="skipped: it passed alone, where every launch is waited for")
        else:
            yield replace(row, status=f"{kind}: in {kernel or 'no kernel of ours'}", kernel=kernel)

    return Program(place, row, command, read, lambda: test_limit + INTERPRETER)


KINDS = {
    "failed": "wrong",
    "crashed": "crashed",
    "timed out": "hung",
    "out of memory": "out of memory",
    "device lost": "lost the device",
}
"""Statuses by the outcome of a test."""

LOSSES = ("crashed", "timed out", "device lost")
MOST_TRACED = 8
"""Tests that are repeated to find the kernel."""


def find_tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def sanitizers(place: Workplace, simulated: bool, limit: Callable[[], float]) -> list[Program]:
    """compute-sanitizer's tools over every kernel; rows at once where there is no compute-sanitizer."""
    tool = find_tool("compute-sanitizer")
    found = []
    for check in counters.CHECKS:
        row = Row("sanitizers", f"sanitizer {check}", "every kernel", "ours")
        if tool is None:
            place.add(replace(row, status="skipped: compute-sanitizer was not found"))
            continue
        found.append(_sanitizer(place, row, tool, check, simulated, limit))
    return found


def _sanitizer(
    place: Workplace, row: Row, tool: str, check: str, simulated: bool, limit: Callable[[], float]
) -> Program:
    def command(folder: Path) -> list[str]:
        child = children.command_of("operators.small_calls", {"check": check, "simulated": simulated}, folder)
        return counters.sanitizer_command(tool, check, child)

    def read(folder: Path, child: Child, why: str) -> Iterator[Row]:
        findings = counters.sanitizer_findings((folder / "log").read_text(errors="replace"))
        reading = children.Reading(folder)
        reading.read()
        started = kernels_in(folder)
        at, kernel = (reading.at[0] if reading.at else row), (started[-1] if started else None)
        where = f", at {at.shape}" + (f" in {kernel}" if kernel else "")
        ended = "" if child.status in (0, counters.ERROR_EXIT_CODE) else child.end_in_words
        found = verdict(row, findings, why, ended, where)
        yield replace(found, kernel=kernel) if found.faulty else found

    silence = SLOWNESS * place.silence
    return Program(place, row, command, read, limit, counters.SANITIZER_ENVIRONMENT, silence=silence)


def verdict(row: Row, findings: list[str], why: str, ended: str, where: str) -> Row:
    """`row` with what a sanitizer's end means.

    Args:
        findings: as `counters.sanitizer_findings` gives them.
        why: the status of one that was stopped, else "".
        ended: how the program ended, "" if normally.
        where: where it was.
    """
    if why:
        return replace(row, status=f"{why}{where}")
    complete = not findings or not findings[-1].startswith("no summary")
    if ended or not complete:
        return replace(row, status=f"crashed: {'; '.join(filter(None, [ended, *findings]))}{where}")
    # initcheck watches PyTorch's kernels too: what they do is not for us to check.
    foreign = [finding for finding in findings if " at::" in finding]
    if len(findings) > len(foreign) + 1:  # the last says how many there are
        return replace(row, status=f"wrong: {'; '.join(findings)}")
    return replace(row, value=float(len(foreign)), unit="findings in PyTorch's kernels alone") if foreign else row
