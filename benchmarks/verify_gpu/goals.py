"""What the GPU kernels have to reach, and whether rows show it; docs/cuda.md derives the floors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .result import Row, newest

STAGE_1 = "f48 96³ stage 1 shifted"
MODEL = "f48 96³ batch 1"
CORE = ("attention core, forward", "attention core, backward")


@dataclass(frozen=True)
class Goal:
    """A figure of one row.

    Attributes:
        wording: the goal.
        measure, shape, variant: the row.
        figure: from the row, None where it does not have it.
        limit: of the figure; `most` says whether it must not exceed it or must reach it.
        form: how the figure is written.
    """

    wording: str
    measure: str
    shape: str
    variant: str
    figure: Callable[[Row], float | None]
    limit: float
    most: bool
    form: str

    def state(self, rows: list[Row]) -> tuple[str, str]:
        """The figure in words, and "met", "missed" or "unmeasured"."""
        key = (self.measure, self.shape, self.variant)
        found = (self.figure(row) for row in rows if (row.measure, row.shape, row.variant) == key)
        value = next((value for value in found if value is not None), None)
        if value is None:
            return "–", "unmeasured"
        met = value <= self.limit if self.most else value >= self.limit
        return self.form.format(value), "met" if met else "missed"


def _floors(row: Row) -> float | None:
    return row.p50 / row.floor if row.p50 is not None and row.floor is not None else None


def _ratio(row: Row) -> float | None:
    return row.ratio


def _core(measure: str, limit: float) -> Goal:
    wording = f"{measure}, {STAGE_1}: at most {limit:g} floors"
    return Goal(wording, measure, STAGE_1, "ours", _floors, limit, True, "{:.2f} floors")


def _copy(measure: str) -> Goal:
    wording = f"{measure}, {STAGE_1}: at least 85% of a copy's bandwidth"
    return Goal(wording, measure, STAGE_1, "copy of as many bytes", _ratio, 0.85, False, "{:.0%}")


GOALS = (
    _core(CORE[0], 1.6),
    _core(CORE[1], 2.2),
    _copy("window partition"),
    _copy("window reverse"),
)


def states(rows: list[Row]) -> list[tuple[str, str, str]]:
    """Wording, figure and state of every goal."""
    rows = newest(rows)
    found = [(goal.wording, *goal.state(rows)) for goal in GOALS]
    beside = [row.ratio for row in rows if row.measure in CORE and row.variant == "Triton" and row.ratio is not None]
    won = sum(ratio >= 1 for ratio in beside)
    state = "unmeasured" if not beside else "met" if won == len(beside) else "missed"
    return [*found, ("no slower than Triton at any stage in either direction", f"{won} of {len(beside)}", state)]
