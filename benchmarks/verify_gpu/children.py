"""Children: started, watched and killed with all that they started; and what became of them.

A `Child` leads its own process group, so that `kill` reaches what it started too. A guardian, started once, kills
whatever children are left when the run itself is killed. Nothing here waits: the caller asks `poll` by the clock.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .reporter import Reporter
from .result import Row

ROOT = Path(__file__).resolve().parents[2]

_GUARDIAN = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN), signal.signal(signal.SIGINT, signal.SIG_IGN)
groups = set()
for line in sys.stdin:
    sign, group = line[0], int(line[1:])
    groups.add(group) if sign == "+" else groups.discard(group)
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        continue
"""
"""Reads "+group" and "-group"; its input ends when the process that writes it ends, by whatever means."""


DEATH = 2.0
"""Seconds that a child may take to die of SIGKILL; a driver may hold it forever."""


class Guardian:
    """Kills the process groups that are still registered when this process is gone."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", _GUARDIAN], stdin=subprocess.PIPE, start_new_session=True, text=True
        )
        assert self._process.stdin is not None, "it was asked for"
        self._groups = self._process.stdin

    def _say(self, sign: str, group: int) -> None:
        with contextlib.suppress(BrokenPipeError):  # the guardian was killed: the run itself still ends the children
            self._groups.write(f"{sign}{group}\n")
            self._groups.flush()

    def watch(self, group: int) -> None:
        self._say("+", group)

    def release(self, group: int) -> None:
        self._say("-", group)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._groups.close()
        self._process.wait()

    @property
    def input(self) -> int:
        """The file descriptor that children must not hold: it would outlive this process in them."""
        return self._groups.fileno()


class Child:
    """A process group that was started.

    Attributes:
        name: for people.
        log: what it prints.
        began, heard: when it started and last wrote a line (monotonic seconds).
        status: as of `os.waitstatus_to_exitcode`; None while it runs.
    """

    def __init__(self, name: str, pid: int, log: Path, guardian: Guardian) -> None:
        self.name, self.pid, self.log = name, pid, log
        self.began = self.heard = time.monotonic()
        self.status: int | None = None
        self._guardian = guardian
        self._signalled: float | None = None

    def poll(self) -> bool:
        """Whether it has ended. What it left running in its group is killed."""
        # As long as it is not waited for, it keeps its number, so that the signal reaches no other process.
        if self.status is None and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self._signal_group()
            _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)
            self._guardian.release(self.pid)
        return self.status is not None

    def kill(self) -> None:
        """End it and all that it started, at once. One that does not even die of SIGKILL is left behind."""
        end = self.signal() + DEATH
        while time.monotonic() < end:
            if self.poll():
                return
            time.sleep(0.02)
        self.status = -signal.SIGKILL

    def signal(self) -> float:
        """Ask it and all that it started to end, without waiting; returns when it was first asked (monotonic)."""
        if self._signalled is None:
            if self.status is None:
                self._signal_group()
            self._signalled = time.monotonic()
        return self._signalled

    def _signal_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # no process is left in it
            os.killpg(self.pid, signal.SIGKILL)

    @property
    def age(self) -> float:
        return time.monotonic() - self.began

    @property
    def end_in_words(self) -> str:
        """What a status other than 0 means."""
        if self.status is not None and self.status < 0:
            return signal.Signals(-self.status).name
        return f"exit status {self.status}"


class Reading:
    """The lines that a child with a `Reporter` has written so far.

    Attributes:
        rows: all rows it has found.
        at: the row and the words of the last step, and its limit of silence.
        about: what it found out.
        done: whether it got to its end.
    """

    def __init__(self, folder: Path) -> None:
        self._lines, self._kernels = folder / "lines", folder / "kernels"
        self._offset, self._rest = 0, b""
        self._taken = 0
        self.rows: list[Row] = []
        self.at: tuple[Row, str, float | None] | None = None
        self.about: dict = {}
        self.done = False

    def read(self) -> bool:
        """Read what is new; whether there was anything."""
        if not self._lines.exists():
            return False
        with self._lines.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        *whole, self._rest = (self._rest + new).split(b"\n")
        for line in whole:
            try:
                content = json.loads(line)
            except json.JSONDecodeError:  # a full disk cuts lines; the step before it still says where the child was
                continue
            if "step" in content:
                self.at = Row(**content["row"]), content["step"], content["limit"]
            elif "found" in content:
                self.rows.append(Row(**content["found"]))
            elif "about" in content:
                self.about |= content["about"]
            else:
                self.done = True
        return bool(new)

    def take(self) -> list[Row]:
        """The rows since the last call."""
        rows, self._taken = self.rows[self._taken :], len(self.rows)
        return rows

    @property
    def kernel(self) -> str | None:
        """The last kernel that was started in the last step, where launches were traced."""
        if not self._kernels.exists():
            return None
        lines = self._kernels.read_text(errors="replace").split("\n")[:-1]
        return lines[-1] if lines else None


def function_of(name: str) -> Callable[..., None]:
    """The function that ``module.function`` of this package names."""
    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(f"{__package__}.{module}"), function)


def fork(name: str, function: str, arguments: dict, folder: Path, left_out: tuple[str, ...], guardian: Guardian):
    """Start ``function(reporter, **arguments)`` in a copy of this process, which must have only one thread.

    It starts in a hundredth of a second, with everything imported that this process has imported.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    log = folder / "log"
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            os.close(guardian.input)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1), os.dup2(output, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            run_here(function, arguments, folder, left_out)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    with contextlib.suppress(PermissionError, ProcessLookupError):  # the child was faster
        os.setpgid(pid, pid)
    guardian.watch(pid)
    return Child(name, pid, log, guardian)


def run_here(function: str, arguments: dict, folder: Path, left_out: tuple[str, ...] = ()) -> None:
    """All that a child that reports does."""
    from .measure import in_words

    reporter = Reporter(folder, left_out)
    try:
        function_of(function)(reporter, **arguments)
    except Exception as error:
        if reporter.at is not None and reporter.at.label not in reporter.reported:
            reporter.row(replace(reporter.at, status=in_words(error)))
        raise
    reporter.done()


def start(
    name: str, command: list[str], folder: Path, guardian: Guardian, environment: dict[str, str] | None = None
) -> Child:
    """Start a separate program."""
    log = folder / "log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    guardian.watch(process.pid)
    process.returncode = 0  # `Child` waits for it; Popen must not
    return Child(name, process.pid, log, guardian)


def command_of(function: str, arguments: dict, folder: Path, left_out: tuple[str, ...] = ()) -> list[str]:
    """The command line that does what `fork` does in a fresh interpreter, for tools that need a program."""
    return [sys.executable, "-m", f"{__package__}.child", function, json.dumps(arguments), str(folder), *left_out]
