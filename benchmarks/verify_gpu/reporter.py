"""A child's side of the report: what it is about to do, and the rows it has found, as JSON lines in a file.

The file outlives the child. The last step in it says where the child was when it died or fell silent; the file of
kernels says which one was running (`Device.traced`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path

from . import faults
from .result import Row

LINES, KERNELS = "lines", "kernels"


def kernels_in(folder: Path) -> list[str]:
    """The kernels that were started in the last step of the child that reports to `folder`, in order."""
    file = folder / KERNELS
    return file.read_text(errors="replace").split("\n")[:-1] if file.exists() else []


class Reporter:
    """Writes the lines of one attempt.

    Attributes:
        kernels: descriptor of the file of kernels.
        at: the row of the last step.
        reported: labels of the rows found.
    """

    def __init__(self, folder: Path, left_out: Collection[str] = ()) -> None:
        """
        Args:
            folder: where the files are.
            left_out: labels of rows to skip: they were found already, or an attempt was lost at them.
        """
        self._folder, self._left_out = folder, left_out
        self.at: Row | None = None
        self._what = ""
        self.reported: set[str] = set()
        self._lines = (folder / LINES).open("ab", buffering=0)
        self.kernels = os.open(folder / KERNELS, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def _write(self, **content: object) -> None:
        self._lines.write(json.dumps(content).encode() + b"\n")

    def wants(self, row: Row) -> bool:
        return row.label not in self._left_out

    def step(self, row: Row, what: str, limit: float | None = None, strikes: bool = True) -> None:
        """Announce the next step: `what` for the measurement that `row` names.

        Args:
            row: the row of the fault if the step never ends.
            what: a word or two.
            limit: how many seconds of silence are too many from here on, if not the child's limit.
            strikes: whether a fault that is planted here strikes now; otherwise `strike` triggers it.
        """
        os.ftruncate(self.kernels, 0)
        self.at, self._what = row, what
        self._write(step=what, row=asdict(row), limit=limit)
        if strikes:
            self.strike()

    def strike(self) -> None:
        """Fail as planted at this step."""
        assert self.at is not None, "a step comes first"
        faults.strike(f"{self.at.label} | {self._what}")

    @property
    def started_kernels(self) -> list[str]:
        """Those of this step, where launches are traced, each once."""
        return list(dict.fromkeys(kernels_in(self._folder)))

    def row(self, row: Row) -> None:
        """A row of the result."""
        self.reported.add(row.label)
        if row.error is not None and not math.isfinite(row.error):
            row = replace(row, error=None)  # JSON has no infinity; the status says it
        self._write(found=asdict(row))

    def about(self, **found: object) -> None:
        """Something that all rows depend on."""
        self._write(about=found)

    def done(self) -> None:
        self._write(done=True)
