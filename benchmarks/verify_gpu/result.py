"""What a run found, and how it is kept: ``gpu.json`` and ``gpu.csv`` are complete after every row."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import select
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

PEERS = (
    "plain PyTorch",
    "SDPA",
    "FlexAttention",
    "MONAI",
    "MONAI flash",
    "MONAI compiled",
    "reference",
    "copy of as many bytes",
    "PyTorch",
)
"""Variants that are not ours: their faults do not fail a run."""

IDENTITY = ("simulated", "commit", "device", "libraries", "torch", "triton", "monai")
"""What rows of one file have in common."""


@dataclass
class Row:
    """One line of the result.

    Attributes:
        part: part of the plan.
        measure, shape, variant: what was run, on what, and by whom.
        status: "ok", "skipped: why", "cut: why", or what went wrong: "wrong: ...", "crashed: ...", "hung: ...",
            "lost the device: ...", "out of memory: ...", "failed: ...".
        kernel: the kernel that the row is about; for a fault, the one that was running, if known.
        error: against float64, relative, in the mean; the worst of outputs and gradients.
        p20, p50, p80: percentiles of the rounds in ms, each of one call.
        rounds: how many.
        ratio: this variant's median over ours.
        floor: the least ms that this machine needs at the clock it ran at, where docs/cuda.md derives it.
        clock_mhz: the multiprocessors' clock while it was timed, the median.
        extra_mib: peak memory of a call beyond what was allocated before it.
        value, unit: any other figure.
        at: seconds since the run began.
    """

    part: str
    measure: str
    shape: str
    variant: str
    status: str = "ok"
    kernel: str | None = None
    error: float | None = None
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    rounds: int | None = None
    ratio: float | None = None
    floor: float | None = None
    clock_mhz: float | None = None
    extra_mib: float | None = None
    value: float | None = None
    unit: str | None = None
    at: float | None = None

    @property
    def median(self) -> float:
        """`p50` of a row that has times."""
        assert self.p50 is not None, f"{self.label} has no times"
        return self.p50

    @property
    def spread(self) -> float:
        """From the 20th to the 80th percentile of a row that has times."""
        assert self.p20 is not None, f"{self.label} has no times"
        assert self.p80 is not None, f"{self.label} has no times"
        return self.p80 - self.p20

    @property
    def ours(self) -> bool:
        return self.variant not in PEERS

    @property
    def cut(self) -> bool:
        """Whether it was not done in time, which is no fault of the kernels."""
        return self.status.startswith("cut: ")

    @property
    def faulty(self) -> bool:
        """Whether something went wrong, or did not run for lack of time."""
        return self.status != "ok" and not self.status.startswith("skipped: ")

    @property
    def label(self) -> str:
        """What was run, for people and for `faults`."""
        return f"{self.measure} | {self.shape} | {self.variant}"

    @property
    def of_kernels(self) -> Row:
        """The row of the time that each kernel of this takes."""
        return replace(self, measure=f"{self.measure}, kernels")

    @property
    def key(self) -> tuple:
        """What the row is about; a fault concerns the whole measurement, whichever kernel was running."""
        return self.measure, self.shape, self.variant, None if self.faulty else self.kernel, self.unit

    def __str__(self) -> str:
        shown = [f"{self.measure:30} {self.shape:26} {self.variant:18}"]
        if self.kernel and not self.faulty:
            shown.append(self.kernel)
        if self.status != "ok":
            shown.append(self.status)
        if self.error is not None:
            shown.append(f"error {self.error:.1e}")
        if self.p50 is not None:
            shown.append(f"{self.p50:9.4f} ms")
        if self.ratio is not None:
            shown.append(f"×{self.ratio:.2f}")
        if self.floor is not None and self.p50 is not None:
            shown.append(f"{self.p50 / self.floor:.2f} floors")
        if self.value is not None:
            shown.append(f"{self.value:,.6g} {self.unit}")
        return "  ".join(shown)


def replace_file(path: Path, content: bytes) -> None:
    """Write `path` so that a reader, at any time, finds either the old or the new content complete."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content)
    os.replace(new, path)


def _takes_a_line() -> bool:
    """Whether printing would not block, as it does on a stopped terminal or a full pipe."""
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # it is not a file of the operating system
        return True
    return bool(select.select([], [descriptor], [], 0.05)[1])


def show(text: object) -> None:
    """Print, or do nothing if nobody reads: a run continues for the sake of its files."""
    for line in str(text).split("\n"):
        try:
            if _takes_a_line():
                print(line, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@dataclass
class Result:
    """The rows of a folder.

    Attributes:
        folder: where the files are.
        about: what the rows depend on; the first row that is added keeps it.
        rows: all of them, those of earlier runs of other parts included.
        began: how many of `rows` are of earlier runs.
        unwritten: whether the last rows could not be written.
    """

    folder: Path
    about: dict
    rows: list[Row] = field(default_factory=list)
    began: int = 0
    unwritten: bool = False

    @classmethod
    def open(cls, folder: Path, about: dict) -> Result:
        """A new result, or the one in `folder`, to add to.

        Raises:
            ValueError: `folder` holds a result of something else or a file that is not a result, or cannot be written.
        """
        result = cls(folder, about)
        result._lock()
        file = folder / "gpu.json"
        if file.is_file():
            try:
                before = json.loads(file.read_text())
                result.rows = [Row(**row) for row in before["rows"]]
                known = before["about"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"OUT: {file} is not a result that can be added to: {error!r}") from error
            result.began = len(result.rows)
            result.about = known
            result.describe({name: value for name, value in about.items() if value is not None})
        try:
            result.write()
        except OSError as error:
            raise ValueError(f"OUT: {folder} cannot be written: {error}") from error
        return result

    def _lock(self) -> None:
        """Keep other runs out of the folder, as long as this process lives."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"OUT: another run writes into {self.folder}; give another folder") from error
        except OSError as error:
            raise ValueError(f"OUT: {self.folder} cannot be written: {error}") from error

    def close(self) -> None:
        """Let other runs into the folder."""
        os.close(self._descriptor)

    def describe(self, found: dict) -> None:
        """Add what a run finds out as it goes, such as the device.

        Raises:
            ValueError: the rows of an earlier run were found on something else.
        """
        for name in IDENTITY if self.began else ():
            known, new = self.about.get(name), found.get(name)
            if known is not None and new is not None and known != new:
                raise ValueError(
                    f"OUT: {self.folder} holds rows of {name} {known!r}, this run is of {new!r}; give another folder"
                )
        self.about = self.about | found
        self._save()

    def add(self, row: Row) -> None:
        """Keep a row, then show it."""
        self.rows.append(row)
        self._save()
        show(row)

    def _save(self) -> None:
        """Write the files; if that fails the run continues, since a full disk may have room again for the next row."""
        try:
            self.write()
            self.unwritten = False
        except OSError as error:
            self.unwritten = True
            show(f"not in {self.folder} yet, only here: {error}")

    def keep(self, name: str, content: bytes) -> None:
        """A file beside the rows."""
        try:
            replace_file(self.folder / name, content)
        except OSError as error:
            show(f"{name} was not written: {error}")

    @property
    def own(self) -> list[Row]:
        """The rows of this run."""
        return self.rows[self.began :]

    def write(self) -> None:
        text = json.dumps({"about": self.about, "rows": [asdict(row) for row in self.rows]}, indent=1) + "\n"
        replace_file(self.folder / "gpu.json", text.encode())
        table = io.StringIO()
        # Some of what rows depend on is itself a table: it goes into JSON only.
        plain = {name: value for name, value in self.about.items() if not isinstance(value, dict | list)}
        writer = csv.DictWriter(table, [*plain, *(f.name for f in fields(Row))], lineterminator="\n")
        writer.writeheader()
        writer.writerows(plain | asdict(row) for row in self.rows)
        replace_file(self.folder / "gpu.csv", table.getvalue().encode())

    @property
    def sound(self) -> bool:
        """Whether something of ours ran in this run, and all that ran was correct and done in time."""
        return bool(self.own) and not self.unwritten and not any(row.faulty and row.ours for row in self.own)


def newest(rows: list[Row]) -> list[Row]:
    """The last of all rows about the same thing; in the order of `rows`."""
    last = {row.key: row for row in rows}
    kept = {id(row) for row in last.values()}
    return [row for row in rows if id(row) in kept]
