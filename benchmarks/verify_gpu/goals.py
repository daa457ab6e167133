"""What the GPU kernels have to reach, and whether the rows show it; docs/cuda.md derives the floors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .result import Row, newest

STAGE_1 = "f48 96³ stage 1 shifted"
MODEL = "f48 96³ batch 1"
CORE = ("attention core, forward", "attention core, backward")


@dataclass(frozen=True)
class Goal:
    """A figure of the rows of one measurement.

    Attributes:
        wording: the goal.
        measure, shape: the rows.
        figure: computed from the rows by variant, None where they lack it.
        limit: of the figure; `most` says whether it is an upper or a lower bound.
        form: how the figure is written.
    """

    wording: str
    measure: str
    shape: str
    figure: Callable[[dict[str, Row]], float | None]
    limit: float
    most: bool
    form: str

    def state(self, rows: list[Row]) -> tuple[str, str]:
        """The figure in words, and "met", "missed" or "unmeasured"."""
        value = self.figure({r.variant: r for r in rows if (r.measure, r.shape) == (self.measure, self.shape)})
        if value is None:
            return "–", "unmeasured"
        met = value <= self.limit if self.most else value >= self.limit
        return self.form.format(value), "met" if met else "missed"


def _core(measure: str, limit: float) -> Goal:
    def floors(rows: dict[str, Row]) -> float | None:
        own = rows.get("ours")
        return own.p50 / own.floor if own and own.p50 is not None and own.floor is not None else None

    wording = f"{measure}, {STAGE_1}: at most {limit:g} floors"
    return Goal(wording, measure, STAGE_1, floors, limit, True, "{:.2f} floors")


def _copy(measure: str) -> Goal:
    def share(rows: dict[str, Row]) -> float | None:
        return rows["copy of as many bytes"].ratio if "copy of as many bytes" in rows else None

    wording = f"{measure}, {STAGE_1}: at least 85% of a copy's bandwidth"
    return Goal(wording, measure, STAGE_1, share, 0.85, False, "{:.0%}")


def _times(measure: str, peer: str, limit: float, called: str = "") -> Goal:
    """The peer takes at least `limit` times as long as ours, measured beside it."""

    def ratio(rows: dict[str, Row]) -> float | None:
        return rows[peer].ratio if peer in rows else None

    wording = f"{measure}, {STAGE_1}: {called or peer} takes at least {limit:g} times as long"
    return Goal(wording, measure, STAGE_1, ratio, limit, False, "{:.2f}×")


def _in_a_graph(mode: str, limit: float) -> Goal:
    """MONAI's unchanged network takes at least `limit` times as long as ours in a CUDA graph."""

    def ratio(rows: dict[str, Row]) -> float | None:
        monai, ours = (rows[name].p50 if name in rows else None for name in ("MONAI", "ours in a CUDA graph"))
        return monai / ours if monai is not None and ours is not None else None

    wording = f"{mode} in a CUDA graph, {MODEL}: MONAI takes at least {limit:g} times as long"
    return Goal(wording, f"model, {mode}", MODEL, ratio, limit, False, "{:.2f}×")


def _memory(limit: float) -> Goal:
    def share(rows: dict[str, Row]) -> float | None:
        ours, monai = (rows[name].extra_mib if name in rows else None for name in ("ours", "MONAI"))
        return ours / monai if ours and monai else None

    wording = f"memory of a training step, {MODEL}: at most {limit:.0%} of what MONAI needs"
    return Goal(wording, "model, training step", MODEL, share, limit, True, "{:.0%}")


EAGER = "what MONAI computes, in plain PyTorch,"
BRANCH = ("attention branch, forward", "attention branch, forward + backward")

GOALS = (
    _core(CORE[0], 1.6),
    _core(CORE[1], 2.2),
    *(_times(measure, "FlexAttention", 3.0, "compiled FlexAttention") for measure in CORE),
    _times(BRANCH[0], "plain PyTorch", 20.0, EAGER),
    _times(BRANCH[0], "SDPA", 6.0),
    _times(BRANCH[1], "plain PyTorch", 10.0, EAGER),
    _copy("window partition"),
    _copy("window reverse"),
    _in_a_graph("inference", 4.0),
    _in_a_graph("training step", 3.0),
    _memory(0.5),
)


def states(rows: list[Row]) -> list[tuple[str, str, str]]:
    """Wording, figure and state of every goal."""
    rows = newest(rows)
    found = [(goal.wording, *goal.state(rows)) for goal in GOALS]
    beside = [row.ratio for row in rows if row.measure in CORE and row.variant == "Triton" and row.ratio is not None]
    won = sum(ratio >= 1 for ratio in beside)
    state = "unmeasured" if not beside else "met" if won == len(beside) else "missed"
    return [*found, ("no slower than Triton at any stage in either direction", f"{won} of {len(beside)}", state)]
