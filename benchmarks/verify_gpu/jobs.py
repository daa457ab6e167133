"""What the run waits for: measurements in children that report, and programs whose output is read.

A job is started, polled by the clock until it has ended, and stopped when its time is over. Whatever becomes of it, it
adds rows that say so.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import children
from .children import Child, Guardian, Reading
from .reporter import kernels_in
from .result import Result, Row, show
from .tasks import Task

MOST_ATTEMPTS = 20
"""Attempts at one measurement; each lost attempt costs at least one variant."""

LOG_BYTES = 2 << 20
"""Bytes of a log's end that the archive keeps."""

INTERPRETER = 30.0
"""Additional seconds that a fresh interpreter may be silent at first: it imports PyTorch."""

MOST_SILENT_END = 10.0
"""Seconds of silence that count as a fault if a job is stopped because its time is over."""

PAUSE = 0.01
"""Seconds between two looks at the children."""


@dataclass
class Workplace:
    """What all jobs share.

    Attributes:
        result: where rows go.
        silence: seconds of silence after which a child counts as hung.
        began: when the run did (monotonic seconds).
        forks: whether children are copies of this process; fresh interpreters where those cannot use the GPU.
    """

    result: Result
    silence: float
    began: float
    guardian: Guardian = field(default_factory=Guardian)
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="verify-gpu-")))
    forks: bool = True
    _count: int = 0
    _archived: float = 0.0

    def add(self, row: Row) -> None:
        row.at = round(time.monotonic() - self.began, 2)
        self.result.add(row)

    def new_folder(self, name: str) -> Path:
        """A folder for the files of one child."""
        self._count += 1
        plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in name)[:60].strip("-")
        folder = self.folder / f"{self._count:03}-{plain}"
        folder.mkdir()
        return folder

    def archive(self, now: bool = False) -> None:
        """Write what the children have printed so far to ``logs.zip``, unless that was a moment ago."""
        if not now and time.monotonic() - self._archived < 5:
            return
        self._archived = time.monotonic()
        try:
            self._write_archive()
        except OSError as error:
            show(f"logs.zip was not written: {error}")

    def _write_archive(self) -> None:
        new = self.folder / "logs.zip"
        with zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as archive:
            for log in sorted(self.folder.glob("*/log*")):
                with log.open("rb") as file:
                    file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_BYTES))
                    content = file.read()
                if content:
                    archive.writestr(f"{log.parent.name}{log.name.removeprefix('log') or '.txt'}", content)
        self.result.keep("logs.zip", new.read_bytes())

    def close(self) -> None:
        """Kill the children that are left; keep what was printed."""
        self.guardian.close()
        self.archive(now=True)
        shutil.rmtree(self.folder, ignore_errors=True)


class Measurement:
    """A task in a child. A lost child costs the row it was at: another attempt continues with the other rows."""

    def __init__(self, place: Workplace, task: Task, seconds: Callable[[], float] = lambda: 0.0) -> None:
        """
        Args:
            seconds: called when it starts: what it may spend on timing.
        """
        self.task = task
        self.found: list[Row] = []
        self._place, self._seconds = place, seconds
        self._left_out: set[str] = set()
        self._attempts = 0
        self._child: Child | None = None

    def start(self) -> None:
        self._attempts += 1
        self._found_before = len(self.found)
        self._folder = self._place.new_folder(self.task.row.label)
        self._reading = Reading(self._folder)
        arguments = self.task.filled(self._seconds())
        left_out = tuple(sorted(self._left_out))
        if self._place.forks:
            self._child = children.fork(
                self.task.row.label, self.task.function, arguments, self._folder, left_out, self._place.guardian
            )
        else:
            command = children.command_of(self.task.function, arguments, self._folder, left_out)
            self._child = children.start(self.task.row.label, command, self._folder, self._place.guardian)

    def poll(self) -> bool:
        """Read what is new; whether it has ended."""
        child, reading = self._child, self._reading
        assert child is not None, "start comes before poll"
        ended = child.poll()
        if reading.read():
            child.heard = time.monotonic()
        self._take()
        if not ended:
            limit = (reading.at and reading.at[2]) or self._place.silence
            if reading.at is None and not self._place.forks:
                limit += INTERPRETER
            if time.monotonic() - child.heard <= limit:
                return False
            child.kill()
            reading.read()
            self._take()
            return self._lost(f"hung: silent for {limit:g} s")
        if reading.done and child.status == 0:
            return True
        return self._lost(f"crashed: {child.end_in_words}")

    def _take(self) -> None:
        for row in self._reading.take():
            self._add(row)
        if self._reading.about:
            found, self._reading.about = self._reading.about, {}
            self._place.result.describe(found)

    def _add(self, row: Row) -> None:
        self.found.append(row)
        self._left_out.add(row.label)
        if row.status != "ok":
            self._left_out.add(row.of_kernels.label)  # what does not run has no kernels to time
        self._place.add(row)

    def _at(self) -> tuple[Row, str, str | None]:
        """Where the child is or was: row, step, kernel."""
        if self._reading.at is None:
            return self.task.row, "start", None
        row, what, _ = self._reading.at
        started = kernels_in(self._folder)
        return row, what, started[-1] if started else row.kernel

    def _lost(self, how: str) -> bool:
        """Handle an attempt that ended too early: start another; returns whether there is none."""
        row, what, kernel = self._at()
        if row.label not in self._left_out:
            in_kernel = f" in {kernel}" if kernel else ""
            self._add(replace(row, status=f"{how}{in_kernel} (step: {what})", kernel=kernel))
        if len(self.found) == self._found_before or self._attempts >= MOST_ATTEMPTS:
            # Another would gain nothing.
            self._add(replace(row, variant="others", status=f"{how} again (step: {what}); given up", kernel=kernel))
            return True
        self.start()
        return False

    def stop(self, why: str) -> None:
        """End it; one row says where it was, and another that what it is about is missing."""
        if self._child is None:
            return self.skip(why)
        silent = time.monotonic() - self._child.heard
        if why == SPARED and silent > MOST_SILENT_END:
            why = f"cut: silent for {silent:.0f} s when the time was over"
        self._child.kill()
        self._reading.read()
        self._take()
        row, what, kernel = self._at()
        if row.label not in self._left_out:
            in_kernel = f" in {kernel}" if kernel else ""
            self._add(replace(row, status=f"{why}{in_kernel} (step: {what})", kernel=kernel))
        if self.task.row.label not in self._left_out:
            self._add(replace(self.task.row, status=why))

    def signal(self) -> None:
        """Have it end, without waiting."""
        if self._child is not None:
            self._child.signal()

    def skip(self, why: str) -> None:
        """Say that it never started."""
        self._add(replace(self.task.row, status=why))


class Program:
    """A separate program with a time limit; its output is read as it comes, and when it has ended."""

    def __init__(
        self,
        place: Workplace,
        row: Row,
        command: Callable[[Path], list[str]],
        read: Callable[[Path, Child, str], Iterable[Row]],
        limit: Callable[[], float],
        environment: dict[str, str] | None = None,
        watch: Callable[[Path], Iterable[Row]] = lambda folder: (),
        silence: float | None = None,
    ) -> None:
        """
        Args:
            row: what it is about.
            command: the command line, given a folder for its files.
            read: makes rows from the folder, the ended child and the status that says why it was stopped ("" if not).
            limit: called when it starts: the seconds it may take.
            watch: makes further rows from the folder, called repeatedly.
            silence: seconds that a child with a `Reporter` in it may be silent; None where there is none.
        """
        self.row = row
        self._place, self._command, self._read, self._limit = place, command, read, limit
        self._environment, self._watch, self._silence = environment, watch, silence
        self._child: Child | None = None

    def start(self) -> None:
        self._folder = self._place.new_folder(f"{self.row.measure} {self.row.shape}")
        self._seconds, self._reading = self._limit(), Reading(self._folder)
        self._child = children.start(
            self.row.measure, self._command(self._folder), self._folder, self._place.guardian, self._environment
        )

    def poll(self) -> bool:
        child = self._child
        assert child is not None, "start comes before poll"
        ended = child.poll()
        for row in self._watch(self._folder):
            self._place.add(row)
        if self._reading.read():
            child.heard = time.monotonic()
        imports = INTERPRETER if self._reading.at is None else 0.0
        if ended:
            self._finish(child, "")
        elif child.age > self._seconds:
            self.stop(f"hung: not done after {self._seconds:.0f} s")
        elif self._silence is not None and time.monotonic() - child.heard > self._silence + imports:
            self.stop(f"hung: silent for {self._silence:g} s")
        else:
            return False
        return True

    def signal(self) -> None:
        if self._child is not None:
            self._child.signal()

    def stop(self, why: str) -> None:
        if self._child is None:
            return self.skip(why)
        self._child.kill()
        for row in self._watch(self._folder):
            self._place.add(row)
        self._finish(self._child, why)

    def _finish(self, child: Child, why: str) -> None:
        for row in self._read(self._folder, child, why):
            self._place.add(row)

    def skip(self, why: str) -> None:
        self._place.add(replace(self.row, status=why))


Job = Measurement | Program


CUT = "cut: the time of this part was over"
SPARED = "skipped: no time was left"
"""Statuses of what is not done when a part's time is over: a fault, or none where the part takes what is left."""


class Queue:
    """Jobs that run side by side.

    Attributes:
        most: how many at a time.
        unfinished: the status of what is not done in time.
    """

    def __init__(self, jobs: Iterable[Job], most: int = 1, unfinished: str = CUT) -> None:
        self.most, self.unfinished = most, unfinished
        self._waiting = deque(jobs)
        self._running: list[Job] = []

    def add(self, job: Job) -> None:
        """Add a job, before the queue is empty."""
        self._waiting.append(job)

    def turn(self) -> bool:
        """Start what may start, poll what runs; whether anything is left."""
        while self._waiting and len(self._running) < self.most:
            job = self._waiting.popleft()
            try:
                job.start()
            except OSError as error:  # out of processes, descriptors or space: the next may find some
                job.skip(f"failed: it could not be started: {error}")
            else:
                self._running.append(job)
        self._running = [job for job in self._running if not job.poll()]
        return bool(self._waiting or self._running)

    def end(self, why: str) -> None:
        """Stop what runs and skip the others."""
        for job in self._running:
            job.signal()
        for job in self._running:
            job.stop(why)
        for job in self._waiting:
            job.skip(why)
        self._waiting, self._running = deque(), []


def together(place: Workplace, end: float, *queues: Queue) -> None:
    """Run the jobs of all `queues` until they have ended or it is `end` (monotonic seconds)."""
    try:
        while True:
            left = [queue.turn() for queue in queues]
            if not any(left):
                return
            place.archive()
            if time.monotonic() >= end:
                for queue in queues:
                    queue.end(queue.unfinished)
            time.sleep(PAUSE)
    except BaseException:
        for queue in queues:
            queue.end("cut: the run was stopped")
        raise


def json_lines(file: Path) -> list[dict]:
    """The complete lines of a file of JSON lines."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]
