"""Runs cases in a separate process: whatever fails, crashes, hangs or leaks is found, and can be repeated."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .mutation import Draw, Fault

MIB = 2**20
PRELOADED = ("torch.utils.tensorboard", "monai.transforms", "pydicom", "SimpleITK", "swin_unetr", "jsonargparse")
"""Modules that take seconds to import are imported once; workers are forked from there, before any threads run."""

SLOWEST = 20.0
"""Seconds after which a case counts as hung; a subject may set its own `LIMIT`."""
PREPARED = 300.0
"""Seconds for importing and preparing, on a busy machine."""
MEMORY = 512 * MIB
"""Memory that a case may take; files and tensors here have a few kB."""
ADDRESSES = 8192 * MIB
"""Address space for a worker beyond what it has once prepared: as much as a 32-bit length may ask for, unused."""
GROWTH = 24 * MIB
"""Growth of memory from the second quarter of a run to the last that is not a leak: allocators keep what they get."""
DESCRIPTORS = 8
"""The same for open files."""
SAMPLES = 40
"""How often a worker's memory is sampled during a run."""


@dataclass(frozen=True)
class Finding:
    """Something that must not happen.

    Attributes:
        subject, index: of the case; `index` is None for a finding about a run.
        kind: "error", "crash", "hang" or "leak".
        says: the message in one line.
        details: notes of the case, and a traceback.
    """

    subject: str
    index: int | None
    kind: str
    says: str
    details: str = ""

    @property
    def signature(self) -> tuple[str, ...]:
        """What findings with the same cause share: kind, error, and the line that it came from."""
        where = [line.strip() for line in self.details.splitlines() if line.strip().startswith("File ")]
        told = re.sub(r"[0-9]+", "0", self.says)[:80] if self.says.startswith("Fault") else self.says.partition(":")[0]
        return self.subject, self.kind, told, *where[-1:]


@dataclass
class Report:
    """The outcome of a subject's cases."""

    subject: str
    seed: int
    cases: int = 0
    seconds: float = 0.0
    growth: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)


def run(subject: str, count: int, seed: int, folder: Path, first: int = 0) -> Report:
    """Run cases `first` to ``first + count`` of a subject.

    Args:
        subject: name of a module of this package, or a module's full name.
        folder: for the files of cases; each case's are deleted once it has ended, unless there is a finding.
    """
    report, started = Report(subject, seed), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    limit = getattr(importlib.import_module(module_name(subject)), "LIMIT", SLOWEST)
    index = first
    while index < first + count:
        index = _run_worker(report, range(index, first + count), folder, limit)
    report.seconds = time.perf_counter() - started
    return report


def module_name(subject: str) -> str:
    return subject if "." in subject else f"{__package__}.{subject}"


def _run_worker(report: Report, indices: range, folder: Path, limit: float) -> int:
    """Run cases in a worker until all are done or it dies; returns the next index."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    receiver, sender = context.Pipe(duplex=False)
    output = folder / f"{report.subject}.output"
    worker = context.Process(target=_work, args=(sender, report.subject, report.seed, indices, folder, output))
    worker.start()
    sender.close()
    index, samples, ended = None, [], False
    hung = False
    while not ended:
        if not receiver.poll(limit if index is not None else PREPARED):
            hung = True
            _end(worker)
        try:
            message, *values = receiver.recv()
        except (EOFError, ConnectionResetError):
            break
        if message == "begin":
            index = values[0]
            report.cases += 1
        elif message == "outcome":
            report.outcomes[values[0]] += 1
        elif message == "error":
            report.findings.append(Finding(report.subject, index, "error", *values))
        elif message == "sample":
            samples.append(values)
        elif message == "done":
            ended = True
    worker.join(10)
    _end(worker)
    if not ended:
        kind = "hang" if hung else "crash"
        says = f"no end after {limit:g} s" if hung else f"the process ended with {_status(worker.exitcode)}"
        report.findings.append(Finding(report.subject, index, kind, says, _last_words(output)))
        report.outcomes[kind] += 1
    report.findings += _leaks(report, samples)
    if index is None:
        return indices.stop  # it was never prepared, and will not be
    return index + 1


def _end(worker) -> None:
    """End a worker and what it started; if it hangs, it says where."""
    if worker.is_alive():
        os.kill(worker.pid, signal.SIGABRT)
        worker.join(5)
    try:
        os.killpg(worker.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    worker.join()


def _status(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"


def _last_words(output: Path) -> str:
    """What a worker's faulthandler wrote, and what it printed before."""
    text = output.read_bytes().replace(b"\0", b"").decode(errors="replace") if output.exists() else ""
    before, _, after = text.partition("Fatal Python error: ")
    first_thread = after.rpartition("Current thread")[2].partition("\nThread")[0]
    frames = [line.strip() for line in first_thread.splitlines() if line.startswith("  File")]
    notes = [line[:200] for line in before.splitlines() if line.strip()]
    # Most recent call first: reversed, as in a traceback.
    return "\n".join([*notes[-12:], *after.splitlines()[:1], *reversed(frames[:12])])


def _leaks(report: Report, samples: list[list[int]]) -> list[Finding]:
    """Findings for whatever only grew during a run, from its second quarter to its last."""
    quarter = len(samples) // 4
    if quarter < 2:
        return []
    found = []
    for position, (name, unit, most) in enumerate((("memory", "MiB", GROWTH), ("open files", "", DESCRIPTORS))):
        values = [sample[position] for sample in samples]
        growth = min(values[-quarter:]) - max(values[quarter : 2 * quarter])
        scale = MIB if unit else 1
        if position == 0:
            report.growth = max(report.growth, growth)
        if growth > most:
            says = f"{name}: {growth / scale:.1f} {unit} more in the last quarter of the cases than in the second"
            found.append(Finding(report.subject, None, "leak", says))
    return found


# --- in the worker ---


def _work(sender, subject: str, seed: int, indices: range, folder: Path, output: Path) -> None:
    os.setpgid(0, 0)
    file = output.open("w", buffering=1, encoding="utf-8", errors="backslashreplace")
    sys.stdout.flush()
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    sys.stdout = sys.stderr = file
    faulthandler.enable(file)
    import torch

    torch.set_num_threads(1)
    case = importlib.import_module(module_name(subject)).prepare(folder)
    _limit_addresses()
    gc.freeze()  # all modules: going through them at every sample would take longer than the cases
    every = max(1, len(indices) // SAMPLES)
    for number, index in enumerate(indices):
        sender.send(("begin", index))
        draw = Draw(subject, seed, index, tell=lambda note: file.write(f"- {note[:200]}\n"))
        place = folder / f"{subject}-{index}"
        place.mkdir()
        file.seek(0)
        file.truncate()
        _peak(forget=True)
        before = _resident()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcome = case(draw, place)
            if (taken := _peak(forget=False) - before) > MEMORY:
                raise Fault(f"the case took {taken / MIB:.0f} MiB of memory")
        except BaseException as error:  # SystemExit and KeyboardInterrupt are findings too
            sender.send(("error", f"{type(error).__name__}: {str(error)[:500]}", _told(error, draw)))
            outcome = "finding"
        else:
            shutil.rmtree(place)
        sender.send(("outcome", outcome))
        if number % every == 0:
            gc.collect()
            sender.send(("sample", _resident(), len(os.listdir("/proc/self/fd"))))
    sender.send(("done",))


def _told(error: BaseException, draw: Draw) -> str:
    """What was done, and the traceback of the error, most recent call last."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    ways = [f"File {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames[-12:]]
    return "\n".join([*(f"- {note[:200]}" for note in draw.notes), *ways])


def _limit_addresses() -> None:
    """Limit this process to `ADDRESSES`: beyond that an allocation fails before it fills the machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESSES, hard))


def _peak(forget: bool) -> int:
    """Most bytes of this process that were in memory since the peak was last reset."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    return int(peak) * 1024


def _resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
