"""What `scripts/verify_gpu.py` measured, as Markdown for the README (see `report.py`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

PEERS = ("Triton", "SDPA", "plain PyTorch", "FlexAttention")
CORE = ("attention core, forward", "attention core, backward")


@dataclass(frozen=True)
class Goal:
    """A figure of one row; docs/cuda.md derives the floors.

    Attributes:
        measure, shape, variant: the row.
        figure: "floors", the time over that of the floor, or "ratio", the row's own.
        limit: the goal; `most` says whether the figure must not exceed it or must reach it.
    """

    measure: str
    shape: str
    variant: str
    figure: str
    limit: float
    most: bool

    @property
    def wording(self) -> str:
        if self.figure == "floors":
            return f"{self.measure}, {self.shape}: at most {self.limit:g} floors"
        return f"{self.measure}, {self.shape}: at least {self.limit:.0%} of a copy's bandwidth"

    def reached(self, row: dict) -> tuple[str, bool]:
        """The figure in words, and whether it is the goal's."""
        value = row["p50"] / row["floor"] if self.figure == "floors" else row["ratio"]
        words = f"{value:.2f} floors" if self.figure == "floors" else f"{value:.0%}"
        return words, value <= self.limit if self.most else value >= self.limit


STAGE_1 = "f48 96³ stage 1 shifted"
GOALS = (
    Goal(CORE[0], STAGE_1, "ours", "floors", 1.6, most=True),
    Goal(CORE[1], STAGE_1, "ours", "floors", 2.2, most=True),
    Goal("window partition", STAGE_1, "copy of as many bytes", "ratio", 0.85, most=False),
    Goal("window reverse", STAGE_1, "copy of as many bytes", "ratio", 0.85, most=False),
)


def goals(rows: list[dict]) -> list[str]:
    """A table of the goals; a goal without its row is named as unmeasured."""
    lines = ["| goal | measured | |", "|---|--:|---|"]
    for goal in GOALS:
        key = (goal.measure, goal.shape, goal.variant)
        row = next((r for r in rows if (r["measure"], r["shape"], r["variant"]) == key and r["p50"] is not None), None)
        needs_floor = row is not None and goal.figure == "floors" and row["floor"] is None
        if row is None or needs_floor:
            lines.append(f"| {goal.wording} | – | unmeasured |")
            continue
        words, met = goal.reached(row)
        lines.append(f"| {goal.wording} | {words} | {'met' if met else '**missed**'} |")
    stages = {}
    for row in rows:
        if row["measure"] in CORE and row["p50"] is not None:
            stages.setdefault((row["measure"], row["shape"]), {})[row["variant"]] = row["p50"]
    beside = [times for times in stages.values() if {"ours", "Triton"} <= times.keys()]
    won = sum(times["ours"] < times["Triton"] for times in beside)
    met = "met" if beside and won == len(beside) else "**missed**" if beside else "unmeasured"
    return [*lines, f"| faster than Triton on every stage in both directions | {won} of {len(beside)} | {met} |"]


def times(rows: list[dict]) -> list[str]:
    """A table of the attention core: medians, floors, and how many times as long each peer takes."""
    lines = [
        f"| attention core | ours | floors | {' | '.join(f'{peer} takes' for peer in PEERS)} |",
        f"|---|--:|--:|{'--:|' * len(PEERS)}",
    ]
    for ours in rows:
        if not ours["measure"].startswith("attention core") or ours["variant"] != "ours" or ours["p50"] is None:
            continue
        ratios = {
            row["variant"]: row["ratio"]
            for row in rows
            if (row["measure"], row["shape"]) == (ours["measure"], ours["shape"]) and row["ratio"] is not None
        }
        floors = f"{ours['p50'] / ours['floor']:.2f}" if ours["floor"] else "–"
        cells = (f"{ratios[peer]:.2f}×" if peer in ratios else "–" for peer in PEERS)
        direction = ours["measure"].removeprefix("attention core, ")
        lines.append(f"| {ours['shape']}, {direction} | {ours['p50']:.3f} ms | {floors} | {' | '.join(cells)} |")
    return lines


def section(folder: Path) -> list[str]:
    """Markdown lines of one run.

    Raises:
        ValueError: the run was a dry one.
    """
    result = json.loads((folder / "gpu.json").read_text())
    about, rows = result["about"], result["rows"]
    if about["dry_run"]:
        raise ValueError(f"{folder} is the result of a dry run; accepted is one of a GPU")
    own = [row for row in rows if row["variant"] == "ours" or row["measure"] == "backend"]
    wrong = [row for row in own if row["status"] != "ok"]
    facts = (
        *(f"{name} {about[key]}" for name, key in (("driver", "driver"), ("torch", "torch"), ("CUDA", "cuda"))),
        *(f"{name} {about[key]}" for name, key in (("cuDNN", "cudnn"), ("Triton", "triton"), ("MONAI", "monai"))),
        f"Python {about['python']}",
        f"commit {about['commit']}",
    )
    link = f"[{folder.name}](benchmarks/results/gpu/{folder.name}/gpu.json)"
    lines = [
        f"**{about['device']}**: {', '.join(facts)}, {about['date'][:10]} ({link}).",
        "",
        f"{len(own) - len(wrong)} of {len(own)} checks against float64, tests and sanitizers passed"
        f"{'.' if not wrong else ':'}",
        *(f"- {row['measure']} {row['shape']}: {row['status']}" for row in wrong),
        "",
        *goals(rows),
        "",
    ]
    table = times(rows)
    if len(table) > 2:
        lines += ["<details><summary>Attention core in bfloat16, medians</summary>", "", *table, "", "</details>", ""]
    return lines
