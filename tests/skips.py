"""Expected skips, and a run that fails on any other: a pytest plugin.

In CI (``CI`` is set) a test may only be skipped if `EXPECTED`, or a file that ``--expect-skips`` names, lists it with
the reason that it gives. There the C++ kernels must be built, too. Elsewhere a machine may lack anything.

A line of such a file is ``test | reason``. The test is the id of one test or, without ``[...]``, of a test with all its
parameters; or a file, if the file as a whole is skipped. The reason is the beginning of the reason given.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from swin_kernels import backends

EXPECTED = Path(__file__).with_name("expected_skips.txt")


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--expect-skips", action="append", default=[], metavar="FILE", help="file of further skips to expect in CI"
    )


def pytest_configure(config: pytest.Config) -> None:
    if in_ci() and not hasattr(config, "workerinput"):
        files = EXPECTED, *(config.invocation_params.dir / file for file in config.getoption("expect_skips"))
        config.pluginmanager.register(Unexpected([line for file in files for line in read(file)]))


def pytest_sessionstart() -> None:
    if in_ci() and (reason := unbuilt()):
        raise pytest.UsageError(f"CI needs the C++ kernels: {reason}")


def unbuilt() -> str | None:
    """Why there are no C++ kernels, or None."""
    return backends.BACKENDS["cpu"].unavailable()


def read(file: Path) -> list[tuple[str, str]]:
    """Tests and reasons.

    Raises:
        ValueError: a line is not ``test | reason``.
    """
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        test, separator, reason = map(str.strip, line.partition(" | "))
        if not (test and separator and reason):
            raise ValueError(f"{file.name}, line {number}: accepted is 'test | reason', got {line!r}")
        found.append((test, reason))
    return found


def reason_of(report: pytest.CollectReport | pytest.TestReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


class Unexpected:
    """Fails the run, and says why, if a skip is not expected."""

    def __init__(self, expected: list[tuple[str, str]]) -> None:
        self.expected = expected
        self.found: list[tuple[str, str]] = []

    def _expects(self, test: str, reason: str) -> bool:
        names = (test, test.partition("[")[0])
        return any(name in names and reason.startswith(beginning) for name, beginning in self.expected)

    def _see(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            skip = report.nodeid, reason_of(report)
            if not self._expects(*skip):
                self.found.append(skip)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._see(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._see(report)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.found and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.found:
            terminalreporter.section(f"{len(self.found)} skips that {EXPECTED.name} does not expect", red=True)
            for test, reason in self.found:
                terminalreporter.write_line(f"{test} | {reason}")
