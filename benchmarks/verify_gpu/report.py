"""What a run measured, as Markdown for the README (see `benchmarks/report.py`). Needs no PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

from . import goals
from .result import Row, newest

PEERS = ("Triton", "SDPA", "plain PyTorch", "FlexAttention")
MODELS = (
    *("ours in a CUDA graph", "ours compiled", "ours"),
    *("MONAI in a CUDA graph", "MONAI compiled", "MONAI flash", "MONAI"),
)


def goal_table(rows: list[Row]) -> list[str]:
    """A table of the goals that were measured, and how many were not."""
    lines = ["| goal | measured | |", "|---|--:|---|"]
    unmeasured = 0
    for wording, figure, state in goals.states(rows):
        if state == "unmeasured":
            unmeasured += 1
        else:
            lines.append(f"| {wording} | {figure} | {'**missed**' if state == 'missed' else state} |")
    return [*lines, f"| {unmeasured} others | – | unmeasured |"] if unmeasured else lines


def _ratios(rows: list[Row], ours: Row, peers: tuple[str, ...]) -> str:
    """Cells: how many times as long each peer takes."""
    found = {r.variant: r.ratio for r in rows if (r.measure, r.shape) == (ours.measure, ours.shape) and r.ratio}
    return " | ".join(f"{found[peer]:.2f}×" if peer in found else "–" for peer in peers)


def core_table(rows: list[Row]) -> list[str]:
    """The attention core: medians, floors, and how many times as long each peer takes."""
    own = [r for r in rows if r.measure in goals.CORE and r.variant == "ours" and r.p50 is not None]
    if not own:
        return []
    lines = [
        f"| attention core | ours | floors | {' | '.join(f'{peer} takes' for peer in PEERS)} |",
        f"|---|--:|--:|{'--:|' * len(PEERS)}",
    ]
    for row in own:
        floors = f"{row.median / row.floor:.2f}" if row.floor else "–"
        direction = row.measure.removeprefix("attention core, ")
        lines.append(f"| {row.shape}, {direction} | {row.p50:.3f} ms | {floors} | {_ratios(rows, row, PEERS)} |")
    return lines


def model_table(rows: list[Row]) -> list[str]:
    """The whole model: the median of each variant."""
    medians: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row.measure.startswith("model, ") and not row.measure.endswith(", kernels") and row.p50 is not None:
            medians.setdefault((row.measure.removeprefix("model, "), row.shape), {})[row.variant] = row.p50
    if not medians:
        return []
    lines = [f"| Swin UNETR, ms | {' | '.join(MODELS)} |", f"|---|{'--:|' * len(MODELS)}"]
    for (mode, shape), found in medians.items():
        cells = (f"{found[name]:.1f}" if name in found else "–" for name in MODELS)
        lines.append(f"| {mode}, {shape} | {' | '.join(cells)} |")
    return lines


def section(folder: Path) -> list[str]:
    """Markdown lines of one run, of whichever parts.

    Raises:
        ValueError: the run was on a simulated device.
    """
    result = json.loads((folder / "gpu.json").read_text())
    about, rows = result["about"], newest([Row(**row) for row in result["rows"]])
    if about["simulated"]:
        raise ValueError(f"{folder} is the result of a simulated device; accepted is one of a GPU")
    own = [row for row in rows if row.ours and not row.status.startswith("skipped: ")]
    wrong = [row for row in own if row.faulty and not row.cut]
    cut = sum(row.cut for row in own)
    names = ("driver", "torch", "cuda", "cudnn", "triton", "monai", "python", "commit")
    facts = ", ".join(f"{name} {about[name]}" for name in names if about.get(name) is not None)
    link = f"[{folder.name}](benchmarks/results/gpu/{folder.name}/gpu.json)"
    lines = [
        f"**{about.get('device') or 'a device that did not answer'}**: {facts}, {about['date'][:10]} ({link}).",
        "",
        f"{len(wrong) or 'None'} of {len(own)} rows of ours has a fault"
        f"{f', {cut} were not done in time' if cut else ''}{':' if wrong else '.'}",
        *(f"- {row.measure}, {row.shape}, {row.variant}: {row.status}" for row in wrong),
        "",
        *goal_table(rows),
        "",
    ]
    for title, table in (
        ("Swin UNETR in bfloat16", model_table(rows)),
        ("Attention core in bfloat16", core_table(rows)),
    ):
        if table:
            lines += [f"<details><summary>{title}, medians</summary>", "", *table, "", "</details>", ""]
    return lines
