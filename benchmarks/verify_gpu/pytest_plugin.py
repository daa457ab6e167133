"""A pytest plugin for GPU tests in a run that may be cut off at any time: ``-p benchmarks.verify_gpu.pytest_plugin``.

With ``--verify-results FILE`` the file holds one JSON line as soon as tests are collected, ``{"collected": N}``, and
one for every test as soon as its result is known: ``{"test", "outcome", "message", "seconds"}`` (`Results`). Failures
are printed in full as they occur, not only at the end.

A process whose device no longer answers fails all its tests from then on. Under pytest-xdist it therefore exits after
the test that broke the device, and pytest-xdist starts another. There the limits of pytest-timeout hold for a whole
test, whatever it hangs in. Faults that `faults` plants strike in the tests.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from benchmarks.verify_gpu import faults

CUDA_ERROR = re.compile(
    r"CUDA (driver )?error|CUDA_ERROR_|illegal (memory access|address|instruction)|misaligned address"
    r"|unspecified launch failure|device-side assert",
    re.IGNORECASE,
)
stderr = pytest.StashKey[int]()  # of the session: a descriptor that tests cannot capture
limit = pytest.StashKey[float]()  # of a test: the seconds it may last


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--verify-results", metavar="FILE", help="write a JSON line for every test as it ends")
    parser.addoption("--verify-kernels", metavar="FILE", help="write the name of every kernel of ours before it starts")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[stderr] = os.dup(2)
    if config.getoption("verify_kernels"):
        importlib.import_module(f"{__package__}.device")  # PyTorch, before the time of a test begins
    if not in_worker(config):
        config.pluginmanager.register(Results(config))


def in_worker(config: pytest.Config) -> bool:
    """Whether this process was started by pytest-xdist, which starts another when it ends."""
    return hasattr(config, "workerinput")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put first what matters most if the run is cut short."""
    items.sort(
        key=lambda item: ("test_production_shapes" not in item.nodeid, "triton" in item.nodeid.partition("[")[2])
    )


# ------------------------------------------------------------------------------------------------------------ the tests


def check_device() -> None:
    """Raises whatever any call to the device would raise; waits for what was launched on it."""
    faults.check_device()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def device_error() -> Exception | None:
    """What `check_device` raises."""
    try:
        check_device()
    except Exception as error:
        return error
    return None


def start_clock(item: pytest.Item) -> None:
    """End this process if it is still in this test when the time is up, and print where all threads were."""
    if limit in item.stash:
        faulthandler.dump_traceback_later(item.stash[limit], exit=True, file=item.config.stash[stderr])


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings) -> bool | None:
    """Replaces pytest-timeout's own clock under pytest-xdist.

    That one is a Python thread, which cannot run while the test holds the GIL; it prints where nobody sees it, and it
    stops once a test has failed, although its teardown and `check_device` may hang as well.
    """
    if not in_worker(item.config):
        return None
    item.stash[limit] = settings.timeout
    start_clock(item)
    return True


def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    if isinstance(node, pytest.Item):
        start_clock(node)  # pytest itself has just stopped it, for the sake of debuggers


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_protocol(item: pytest.Item):
    result = yield
    if in_worker(item.config):
        if error := device_error():
            # All reports of the test are on their way. pytest-xdist does not count it as complete yet, so it takes this
            # end for a crash in it, not in the next one, and `Results` knows better.
            os.write(item.config.stash[stderr], f"The device no longer answers: {error}\n".encode())
            os._exit(0)
        faulthandler.cancel_dump_traceback_later()
    return result


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item):
    with traced(item.config):
        faults.strike(item.nodeid)
        result = yield
        if faults.planted(item.nodeid) == "wrong":
            raise AssertionError("results are wrong (planted)")
        check_device()  # an error in a kernel shows late; it must not be blamed on the next test
    return result


@contextlib.contextmanager
def traced(config: pytest.Config) -> Iterator[None]:
    """In this context our kernels are traced, if that was asked for."""
    path = config.getoption("verify_kernels")
    if path is None:
        yield
        return
    import torch

    from .device import device_of

    with open(path, "ab", buffering=0) as file, device_of(not torch.cuda.is_available()).traced(file.fileno()):
        yield


# ---------------------------------------------------------------------------------------------------------- the results


class Results:
    """Keeps the results of the whole run, in the main process.

    Outcomes are "passed", "failed", "skipped", "crashed", "timed out", "out of memory" and "device lost". A test that
    fails more than once, for example in its teardown too, counts by its first failure. A file that cannot be collected
    counts as a test.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        path = config.getoption("verify_results")
        self.file = open(path or os.devnull, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 - as long as the run
        self.collected: int | None = None
        self.began: dict[str, float] = {}
        self.reports: dict[str, list[pytest.TestReport]] = {}
        self.ended: set[str] = set()

    @property
    def terminal(self) -> pytest.TerminalReporter:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        assert terminal is not None, "with -p no:terminal, failures cannot be shown"
        return terminal

    def write(self, test: str, outcome: str, message: str, seconds: float) -> None:
        self.ended.add(test)
        line = {"test": test, "outcome": outcome, "message": message, "seconds": round(seconds, 3)}
        self.file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def pytest_unconfigure(self) -> None:
        self.file.close()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.write_collected(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.write_collected(len(ids))

    def write_collected(self, number: int) -> None:
        if self.collected is None:  # every worker of pytest-xdist collects
            self.collected = number
            self.file.write(json.dumps({"collected": number}) + "\n")

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node) -> None:
        """Let pytest-xdist send tests to a worker that has just ended, as happens when two end at once.

        Otherwise pytest-xdist would end the whole run. So it learns of the end next, and gives the tests to others.
        """
        send = node.send_runtest_some

        def send_unless_gone(indices: list[int]) -> None:
            with contextlib.suppress(OSError):
                send(indices)

        node.send_runtest_some = send_unless_gone

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.show(report)
            self.write(report.nodeid, *outcome_of(report), 0)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.began[nodeid] = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.setdefault(report.nodeid, []).append(report)
        if report.failed:
            self.show(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        reports = self.reports.pop(nodeid)
        decisive = max(reports, key=lambda r: (r.failed, r.skipped))  # the first that failed, or else was skipped
        call = next((r for r in reports if r.when == "call"), decisive)
        self.write(nodeid, *outcome_of(decisive), call.duration)

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport, sched) -> None:
        """A worker ended, which pytest-xdist takes for a crash in the test it was running."""
        if crashitem in self.ended or crashitem not in self.began:
            if crashitem in self.ended:
                self.terminal.write_line(f"\n{report.node.gateway.id} ended after it had reported {crashitem}")
            else:
                sched.mark_test_pending(crashitem)  # it was sent to a worker that was gone
            # pytest counts and shows this report next; this makes it one of those that every test has and none shows.
            report.when, report.outcome, report.longrepr = "teardown", "passed", None
            return
        seconds = time.monotonic() - self.began[crashitem]
        status, allowed = status_of(report.node), self.config.getoption("timeout", None)
        # The clock of a worker ends it with status 1. The beginning of the test was reported with some delay.
        if status in (1, None) and allowed and seconds > allowed / 2:
            outcome, message = "timed out", f"still running after its limit of {allowed:g} s"
            report.longrepr = f"{report.longrepr}: {message}; where it was is printed above"
        else:
            outcome, message = "crashed", f"{report.longrepr}: {in_words(status)}"
            report.longrepr = message
        failed = next((r for r in self.reports.pop(crashitem, []) if r.failed), None)
        self.write(crashitem, *(outcome_of(failed) if failed else (outcome, message)), seconds)

    def show(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        """Print a failure in full, now."""
        self.terminal.ensure_newline()
        self.terminal.write_sep("_", f"{report.nodeid} ({report.when})")
        report.toterminal(self.config.get_terminal_writer())
        for name, content in report.sections:
            self.terminal.write_sep("-", name)
            self.terminal.write_line(content)
        self.terminal.flush()


def outcome_of(report: pytest.CollectReport | pytest.TestReport) -> tuple[str, str]:
    """Outcome and message."""
    if report.passed:
        return "passed", ""
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
        return "skipped", one_line(reason.removeprefix("Skipped: "))
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else report.longreprtext
    # Errors that led to this one decide its kind: "RuntimeError: kernel failed" may come from a CUDA error.
    causes = [text, *(cause.message for _, cause, _ in getattr(report.longrepr, "chain", ()) if cause)]
    if "from pytest-timeout" in text:
        return "timed out", one_line(text)
    if any("out of memory" in cause or "OutOfMemoryError" in cause for cause in causes):
        return "out of memory", one_line(text)
    if any(CUDA_ERROR.search(cause) for cause in causes):
        return "device lost", one_line(text)
    return "failed", one_line(text)


def one_line(text: str) -> str:
    """The first informative line: in pytest's code excerpts, the one with the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("E ").strip() for line in lines if line.startswith("E ")]
    return next(iter(errors or lines), "")


def status_of(worker) -> int | None:
    """The exit status of a pytest-xdist worker, or minus the signal that killed it; None if unknown."""
    process = getattr(getattr(worker.gateway, "_io", None), "popen", None)
    if process is None:
        return None
    try:
        return process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return None


def in_words(status: int | None) -> str:
    if status is None:
        return "exit status unknown"
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
