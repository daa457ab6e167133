"""The record of a run, for plots: a line of JSON and TensorBoard scalars for every step and validation."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import files

LINES = "log.jsonl"
SCALARS = "tensorboard"


class Log:
    """Writes into a run's folder; only rank 0 uses it.

    After a run resumes, each step and each validation is recorded once: what an earlier attempt did after the
    checkpoint is dropped.
    """

    def __init__(self, out: Path, step: int, validates: bool = False) -> None:
        """
        Args:
            out: the folder of the run.
            step: step of the checkpoint that the run continues from, or 0.
            validates: whether the run begins with the validation of that step.

        Raises:
            OSError: the files cannot be written.
        """
        from torch.utils.tensorboard import SummaryWriter

        out.mkdir(parents=True, exist_ok=True)
        _keep(out / LINES, step, validates)
        self._out = out
        self._lines = (out / LINES).open("a")
        # Purging removes all scalars of a step; a validation that is repeated adds the same point again.
        self._scalars = SummaryWriter(out / SCALARS, purge_step=step + 1)

    def write(self, event: str, step: int, values: Mapping[str, float | int | None]) -> None:
        """One line, and a scalar ``event/name`` for each of `values`; values that are not finite are null in the line.

        Raises:
            OSError: writing failed, for example because the disk is full.
        """
        self._write({"event": event, "step": step} | {name: _finite(value) for name, value in values.items()})
        with files.naming(self._out / SCALARS):
            for name, value in values.items():
                if value is not None:
                    self._scalars.add_scalar(f"{event}/{name}", value, step)

    def say(self, event: str, step: int, texts: Mapping[str, str]) -> None:
        """One line that is not plotted.

        Raises:
            OSError: writing failed, for example because the disk is full.
        """
        self._write({"event": event, "step": step, **texts})

    def _write(self, line: Mapping[str, object]) -> None:
        with files.naming(self._out / LINES):
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()

    def close(self) -> None:
        self._lines.close()
        self._scalars.close()


def read(out: Path) -> list[dict[str, Any]]:
    """The lines in a run's folder, oldest first; those that a crash cut off or that are damaged are left out."""
    path = out / LINES
    return [line for text in path.read_bytes().splitlines() if (line := _line(text))] if path.exists() else []


def _line(text: bytes) -> dict[str, Any] | None:
    """A line as `Log.write` writes them; None for anything else."""
    try:
        line = json.loads(text)
    # ValueError: not JSON, or not UTF-8. RecursionError: brackets nested thousands deep.
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int and "event" in line else None


def _keep(path: Path, step: int, validates: bool) -> None:
    """Drop damaged lines, and those of what will be repeated after the checkpoint of `step`."""

    def done(line: Mapping[str, Any]) -> bool:
        return line["step"] < step or (line["step"] == step != 0 and not (validates and line["event"] == "validation"))

    kept = [line for line in read(path.parent) if done(line)]
    with files.replacing(path) as file:
        file.write("".join(json.dumps(line) + "\n" for line in kept).encode())


def _finite(value: float | int | None) -> float | int | None:
    return value if value is None or math.isfinite(value) else None
