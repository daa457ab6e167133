"""The last thing a run prints: goals, faults and the most expensive kernels, short enough to fit a terminal."""

from __future__ import annotations

from . import goals
from .models import MODES
from .result import Result, Row, newest
from .sweeps import best

MOST_FAULTS = 25
MOST_KERNELS = 8
WIDTH = 150


def table(result: Result, stopped: str = "") -> str:
    """Lines of text.

    Args:
        stopped: what ended the run early, "" if nothing did.
    """
    rows = newest(result.rows)
    lines = ["", "=" * 40]
    lines += _models(rows)
    lines += ["goals:", *(f"  {state:10} {figure:>12}  {wording}" for wording, figure, state in goals.states(rows))]
    lines += _kernels(rows)
    lines += _sweeps(rows)
    lines += _faults(result.own)
    skipped = sorted({f"{row.measure}: {row.status}" for row in result.own if row.status.startswith("skipped: ")})
    lines += ["skipped:", *(f"  {line[:WIDTH]}" for line in skipped[:MOST_KERNELS])] if skipped else []
    if len(skipped) > MOST_KERNELS:
        lines.append(f"  and {len(skipped) - MOST_KERNELS} more")
    verdict = "everything ran and was correct" if result.sound else "NOT everything ran and was correct"
    lines.append(f"{result.folder / 'gpu.json'}: {len(result.own)} rows, {stopped or verdict}")
    return "\n".join(lines)


def _models(rows: list[Row]) -> list[str]:
    lines = []
    for mode in MODES:
        shapes = dict.fromkeys(row.shape for row in rows if row.measure == f"model, {mode}" and row.p50 is not None)
        for shape in shapes:
            found = {r.variant: r.p50 for r in rows if (r.measure, r.shape) == (f"model, {mode}", shape) and r.p50}
            times = ", ".join(f"{variant} {ms:.1f}" for variant, ms in sorted(found.items(), key=lambda one: one[1]))
            lines.append(f"  {mode}, {shape}: {times}")
    return ["model, ms:", *lines] if lines else []


def _kernels(rows: list[Row]) -> list[str]:
    """The most expensive of our kernels, over the measures of the operators."""
    own = [r for r in rows if r.measure.startswith("attention core, ") and r.measure.endswith(", kernels")]
    own = sorted((r for r in own if r.variant == "ours" and r.p50 is not None), key=lambda r: -r.median)
    if not own:
        return []
    lines = [f"  {r.p50:9.4f} ms  {r.kernel}  {r.measure.split(', ')[1]}, {r.shape}" for r in own[:MOST_KERNELS]]
    return ["most expensive kernels:", *lines]


def _sweeps(rows: list[Row]) -> list[str]:
    lines = [
        f"  {backend}, {direction}, {shape}: {row.p50:.4f} ms with {row.variant}, {default.p50:.4f} ms by default"
        for backend in ("cuda", "triton")
        for (direction, shape), (row, default) in best(rows, backend).items()
    ]
    return ["faster cuts:", *lines] if lines else []


def _faults(rows: list[Row]) -> list[str]:
    faults = [row for row in rows if row.faulty]
    if not faults:
        return []
    ours = [row for row in faults if row.ours]
    shown = [*ours, *(row for row in faults if not row.ours)][:MOST_FAULTS]
    lines = [f"  {row.measure}, {row.shape}, {row.variant}: {row.status}"[:WIDTH] for row in shown]
    if len(faults) > len(shown):
        lines.append(f"  and {len(faults) - len(shown)} more in gpu.csv")
    return [f"faults, {len(ours)} of ours and {len(faults) - len(ours)} of peers:", *lines]
