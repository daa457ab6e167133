"""Children that are fresh interpreters, and how many processes share a GPU."""

from __future__ import annotations

import time

import pytest

from benchmarks.verify_gpu import correctness, jobs, probe
from benchmarks.verify_gpu.jobs import Measurement, Queue, Workplace, together
from benchmarks.verify_gpu.result import Result, Row


@pytest.fixture
def place(tmp_path):
    result = Result.open(tmp_path, {"simulated": True, "commit": "abc", "device": None})
    place = Workplace(result, silence=1.0, began=time.monotonic(), forks=False)
    yield place
    place.close()


def test_fresh_interpreter(place):
    """Where copies cannot use the GPU; the time that its imports take does not count as silence."""
    measurement = Measurement(place, probe.describing(simulated=True))
    together(place, time.monotonic() + 60, Queue([measurement]))
    assert {row.measure: row.status for row in place.result.rows} == {"backend": "ok", "device": "ok"}
    assert place.result.about["device"] == "simulated on the CPU"


def test_time_is_over(place):
    """Running jobs are ended, waiting ones are not begun, and both say so."""
    both = [Measurement(place, probe.describing(simulated=True)) for _ in range(2)]
    together(place, time.monotonic(), Queue(both))
    assert [row.status for row in place.result.rows] == [
        "cut: the time of this part was over (step: start)",
        "cut: the time of this part was over",
    ]


def test_silent_where_the_time_is_over(place, monkeypatch):
    """A fault even for a job that takes the time that is left; a job that was not begun is not a fault."""
    monkeypatch.setattr(jobs, "MOST_SILENT_END", 0.0)
    both = [Measurement(place, probe.describing(simulated=True)) for _ in range(2)]
    together(place, time.monotonic(), Queue(both, unfinished=jobs.SPARED))
    assert [row.status for row in place.result.rows] == [
        "cut: silent for 0 s when the time was over (step: start)",
        "skipped: no time was left",
    ]


@pytest.mark.parametrize(
    ("memory_gib", "cores", "workers"), [(80, 17, 8), (40, 17, 2), (24, 17, 1), (80, 5, 4), (None, 17, 8)]
)
def test_workers(monkeypatch, memory_gib, cores, workers):
    monkeypatch.setattr(correctness, "cores", lambda: cores)
    assert correctness.workers(memory_gib) == workers


OURS, FOREIGN = "Invalid read at attend<Float16, 16>+0x10", "Uninitialized read at at::native::copy+0x10"
TOTAL, NO_SUMMARY = "1 error in all", "no summary: the check did not start, or was cut short"


@pytest.mark.parametrize(
    ("findings", "why", "ended", "status"),
    [
        ([], "", "", "ok"),
        ([OURS, TOTAL], "", "", "wrong: "),
        ([FOREIGN, TOTAL], "", "", "ok"),
        ([FOREIGN, OURS, TOTAL], "", "", "wrong: "),
        ([], "hung: silent", "SIGKILL", "hung: silent"),
        ([FOREIGN, NO_SUMMARY], "hung: silent", "SIGKILL", "hung: silent"),
        ([FOREIGN, NO_SUMMARY], "", "SIGSEGV", "crashed: SIGSEGV"),
        ([NO_SUMMARY], "", "", "crashed: no summary"),
        ([], "", "SIGSEGV", "crashed: SIGSEGV"),
    ],
)
def test_verdict_of_a_sanitizer(findings, why, ended, status):
    """Findings in PyTorch's kernels excuse neither a finding in ours nor a check that did not end."""
    row = Row("sanitizers", "sanitizer initcheck", "every kernel", "ours")
    found = correctness.verdict(row, findings, why, ended, ", at float32")
    assert found.status.startswith(status)
    assert found.faulty == (status != "ok")
    assert (found.value == 1) == (findings == [FOREIGN, TOTAL])
