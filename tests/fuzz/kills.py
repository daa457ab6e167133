"""Runs that are killed or asked to stop at random moments: a resumed run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import nibabel
import numpy as np

import swin_unetr
from swin_unetr import checkpoints, cli, imaging, train
from swin_unetr.training import log

from ..swin_unetr import toy_job
from .mutation import Draw, Fault, one_of

LIMIT = 180.0
"""Seconds of a case, which is one or several runs."""
LONGEST_RUN = 60.0
ENDS = {
    signal.SIGKILL: {-signal.SIGKILL},
    signal.SIGTERM: {75},
    signal.SIGUSR1: {75},
    signal.SIGINT: {130},
}
"""Exit statuses of a run that a signal ended; a run that had nothing left to do ends with 0."""
PACKAGE = str(Path(swin_unetr.__file__).parent)
BEGINS, ENDED = "-- begins", "-- has ended"
"""What a training prints once a signal makes it end as `ENDS` says, and when that is over: before and after, signal
handlers come and go, and nothing is lost by what Python does by itself."""
CLOCKED = ("seconds", "data_fraction", "voxels_per_second", "memory_gib")
NAMES = re.compile(r"(best\.pt|config\.yaml|log\.jsonl|checkpoints/step-\d{8}\.pt|tensorboard/events\.[^/]*)")


@dataclass(frozen=True)
class Undisturbed:
    """What an uninterrupted run leaves, and how long it takes.

    Attributes:
        left: `_left` of it.
        events: its calls and returns: all of Python's and C's, and those in the package.
        seconds: without counting.
    """

    left: dict[str, object]
    events: dict[str, int]
    seconds: float


def prepare(folder: Path) -> Callable[[Draw, Path], str]:
    out = folder / "undisturbed"
    counts = {}
    for where in ("everywhere", "package"):
        counts[where] = _counted(lambda where=where: _train(out / where), where, out.with_suffix(".count"))
    started = time.perf_counter()
    if (status := _run(lambda: _train(out / "timed"), out.with_suffix(".output"))) != 0:
        raise RuntimeError(f"a run that nobody disturbs ends with {status}: {out.with_suffix('.output').read_text()}")
    undisturbed = Undisturbed(_left(out / "timed"), counts, time.perf_counter() - started)
    written = _counted(lambda: _write(folder / "x.nii.gz", 1), "everywhere", out.with_suffix(".count"))

    def case(draw: Draw, place: Path) -> str:
        kind = one_of(draw, ((8, _killed_training), (2, _killed_writing)))
        return kind(draw, place, undisturbed if kind is _killed_training else written)

    return case


# --- training ---


def _train(out: Path) -> int:
    """`swin-unetr train` from its first line to its last, around a toy network; options are not parsed."""

    def parse(kind, command, argv):
        print(BEGINS, flush=True)
        return toy_job.ToyOptions(Path(argv[-1]))

    def run(options):
        status = toy_job.run(options)
        print(ENDED, flush=True)
        return status

    cli.parse, train.run = parse, run
    return cli.main(["train", "--data.datalist", "none.json", "--labels.classes", "{organ: [1]}", "--out", str(out)])


def _killed_training(draw: Draw, place: Path, undisturbed: Undisturbed) -> str:
    out, ended = place / "run", []
    for number in range(draw.choice((1, 1, 2, 3))):
        which = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
        how = draw.choice(("everywhere", "package", "package", "package", "after"))
        output = place / f"{number}.output"
        if how == "after":
            delay = draw.random() * undisturbed.seconds
            draw.note(f"{which.name} after {delay:.3f} s")
            status = _run(lambda: _train(out), output, lambda pid, delay=delay, which=which: _later(pid, delay, which))
        else:
            event = draw.randrange(undisturbed.events[how])
            draw.note(f"{which.name} at call {event} {'of the package' if how == 'package' else ''}")
            status = _run(_disturbed(lambda: _train(out), how, event, which), output)
        said = output.read_text() if output.exists() else ""
        if BEGINS in said and ENDED not in said and status not in ENDS[which] | {0}:
            raise Fault(f"{which.name} ended a run with {status}: {said[-1500:]}")
        ended.append(status)
    if (status := _run(lambda: _train(out), place / "last.output")) != 0:
        raise Fault(f"the run that went on ended with {status}: {(place / 'last.output').read_text()[-1500:]}")
    left = _left(out)
    for name, value in undisturbed.left.items():
        if left[name] != value:
            raise Fault(f"{name}: {str(left[name])[:300]}, of an undisturbed run {str(value)[:300]}")
    strange = sorted(name for name in _files(out) if not NAMES.fullmatch(name))
    if strange:
        raise Fault(f"files were left behind: {strange}")
    return "gone on" if any(ended) else "too late"


def _left(out: Path) -> dict[str, object]:
    """What has to be equal."""
    _, content, damaged = checkpoints.newest(out / "checkpoints")
    lines = [{name: value for name, value in line.items() if name not in CLOCKED} for line in log.read(out)]
    return {
        "the last checkpoint": checkpoints.checksum({**content, "config": None}),
        "damaged checkpoints": [str(error) for error in damaged],
        "best.pt": checkpoints.checksum({**checkpoints.read(out / "best.pt").content, "config": None}),
        "log": json.dumps(lines),
    }


def _files(out: Path) -> list[str]:
    return [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]


# --- label maps ---


def _write(path: Path, value: int) -> int:
    volume = imaging.Volume(np.zeros((1, 9, 8, 7), np.float32), np.eye(4))
    imaging.write(np.full((9, 8, 7), value, np.uint8), volume, path)
    return 0


def _killed_writing(draw: Draw, place: Path, events: int) -> str:
    path = place / "x.nii.gz"
    if there := draw.chance(0.5):
        _write(path, 1)
    event = draw.randrange(events)
    draw.note(f"SIGKILL at call {event} of writing a label map{', one is there' if there else ''}")
    status = _run(_disturbed(lambda: _write(path, 2), "everywhere", event, signal.SIGKILL), place / "output")
    if status not in (0, -signal.SIGKILL):
        raise Fault(f"writing ended with {status}: {(place / 'output').read_text()[-1500:]}")
    if not path.exists():
        if there or status == 0:
            raise Fault("the label map is gone")
        return "not written"
    found = np.unique(nibabel.load(path).get_fdata()).tolist()
    if found not in ([2], [1] if there else [2]):
        raise Fault(f"the label map holds {found}")
    return "written" if found == [2] else "as before"


# --- processes ---


def _run(function: Callable[[], int], output: Path, meanwhile: Callable[[int], None] = lambda pid: None) -> int:
    """The exit status of `function` in a separate process, negative for a signal.

    A fork: this process has started no threads, and its imports are available there.
    """
    pid = os.fork()
    if pid == 0:
        try:
            with output.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                sys.stdout = sys.stderr = file
                try:
                    status = function()
                except BaseException:
                    traceback.print_exc()
                    status = 1
                file.flush()
                os._exit(status)
        finally:
            os._exit(99)
    meanwhile(pid)
    until = time.monotonic() + LONGEST_RUN
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise Fault(f"no end after {LONGEST_RUN:g} s: {output.read_text()[-1500:]}")
        time.sleep(0.005)


def _later(pid: int, delay: float, which: signal.Signals) -> None:
    time.sleep(delay)
    os.kill(pid, which)  # also of one that has ended: it is still to be waited for


def _disturbed(function: Callable[[], int], where: str, event: int, which: signal.Signals) -> Callable[[], int]:
    """`function`, in which the process gets a signal at a call or return of Python or C."""

    def run() -> int:
        left = event

        def profile(frame: FrameType, kind: str, argument: object) -> None:
            nonlocal left
            if where == "package" and not frame.f_code.co_filename.startswith(PACKAGE):
                return
            left -= 1
            if left < 0:
                sys.setprofile(None)
                os.kill(os.getpid(), which)

        sys.setprofile(profile)
        try:
            return function()
        finally:
            sys.setprofile(None)

    return run


def _counted(function: Callable[[], int], where: str, file: Path) -> int:
    """How many events `function` consists of."""

    def run() -> int:
        count = 0

        def profile(frame: FrameType, kind: str, argument: object) -> None:
            nonlocal count
            count += where == "everywhere" or frame.f_code.co_filename.startswith(PACKAGE)

        sys.setprofile(profile)
        try:
            return function()
        finally:
            sys.setprofile(None)
            file.write_text(str(count))

    output = file.with_suffix(".output")
    if (status := _run(run, output)) != 0:
        raise RuntimeError(f"what nobody disturbs ends with {status}: {output.read_text()}")
    return int(file.read_text())
