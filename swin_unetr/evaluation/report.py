"""What an evaluation writes to its folder and prints on the terminal."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import files
from ..names import TEXT, cell, say, shown
from . import figure, statistics
from .scores import METRICS, Score, by_case

FILES = {
    "scores": "scores.csv",
    "evaluation": "evaluation.json",
    "plot": "scores.png",
    "comparison": "comparison.png",
}


def write(results: Mapping, out: Path) -> None:
    """Write `FILES` into the folder `out`, all of them or none; the comparison only if there is one.

    Raises:
        OSError: writing failed, for example because the disk is full. Files of an earlier evaluation are unchanged.
    """
    files.replace({out / FILES[kind]: content for kind, content in _contents(results).items()})


def _contents(results: Mapping) -> dict[str, bytes]:
    """The contents of `FILES`."""
    summary, options = results["summary"], results["options"]
    by_metric = {metric: by_case(results["scores"], metric) for metric in METRICS}
    values = {
        metric: {name: [_value(case, name) for case in by_metric[metric].values()] for name in summary[metric]}
        for metric in METRICS
    }
    tolerance, interval = f"NSD at {options['tolerance']:g} mm.", f"{options['confidence']:.0%} bootstrap interval"
    contents = {
        "evaluation": (json.dumps(_plain(results), indent=2, allow_nan=False) + "\n").encode(**TEXT),
        "scores": _table_of(results["scores"]).encode(**TEXT),
        "plot": figure.draw_scores(
            values,
            summary,
            f"{_count(len(results['scores']))} scored against labels",
            f"Dot: a case. Circle and bar: the mean over cases and its {interval}. {tolerance} "
            "HD95 of a class that only one of the two maps has: the volume's diagonal.",
        ),
    }
    if "comparison" in results:
        comparison = results["comparison"]
        contents["comparison"] = figure.draw_differences(
            comparison["differences"],
            f"This run minus {_end(comparison['with'])}: {_count(len(comparison['cases']))}, paired",
            f"Circle and bar: mean difference and its {interval}, coloured where it leaves out 0. {tolerance}",
        )
    return contents


def _table_of(scores: Mapping[str, Mapping[str, Score]]) -> str:
    """CSV, one line per case and class; an unknown score is an empty cell."""
    columns = [field.name for field in fields(Score)]
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["case", "class", *columns])
    for case, classes in scores.items():
        for name, score in classes.items():
            values = (getattr(score, column) for column in columns)
            table.writerow([cell(case), cell(name), *("" if math.isnan(value) else value for value in values)])
    return text.getvalue()


def _value(case: Mapping[str, float], name: str) -> float:
    """A case's value in the row of a class, or of the mean over classes."""
    return statistics.mean(case.values()) if name == statistics.MEAN else case.get(name, math.nan)


def show(results: Mapping, out: Path, console: Console) -> None:
    """Print what `write` wrote to `out`: means, differences, and what was left out."""
    summary = results["summary"]
    table = _table("class", "cases", "Dice", f"NSD at {results['options']['tolerance']:g} mm", "HD95 in mm")
    for name in summary["dice"]:
        cells = [_cell(summary[metric][name], "" if metric != "hd95" else "mm") for metric in METRICS]
        style = "bold" if name == statistics.MEAN else None
        table.add_row(Text(shown(name)), str(summary["dice"][name].cases), *cells, style=style)
    console.print(table)
    note = f"Means over cases [{results['options']['confidence']:.0%} bootstrap interval]."
    say(console, note, "dim")
    if "comparison" in results:
        comparison = results["comparison"]
        table = _table("class", "cases", "Δ Dice", "Δ NSD", "Δ HD95 in mm")
        for name in comparison["differences"]["dice"]:
            row = [comparison["differences"][metric][name] for metric in METRICS]
            table.add_row(
                Text(shown(name)),
                str(row[0].cases),
                *(_cell(e, "mm" if i == 2 else "", "+") for i, e in enumerate(row)),
            )
        console.print()
        say(console, f"This run minus {comparison['with']}, paired by case")
        console.print(table)
        for key, where in (("only_here", "only in this run"), ("only_there", "only in the other")):
            if comparison[key]:
                say(console, f"Not compared, {where}: {', '.join(comparison[key])}", "yellow")
    for name in results["absent"]:
        values = ", ".join(map(str, results["classes"][name]))
        say(console, f"No label and no prediction has class {name} ({values}): it has no score", "yellow")
    for name, why in results["failed"].items():
        say(console, f"Not scored: {name}: {why}", "red")
    if results["without_prediction"]:
        say(console, f"No prediction for: {', '.join(results['without_prediction'])}", "red")
    if results["without_label"]:
        say(console, f"No label for: {', '.join(results['without_label'])}", "yellow")
    written = [name for key, name in FILES.items() if key != "comparison" or "comparison" in results]
    console.print()
    say(console, f"In {out}: {', '.join(written)}")


def _end(path: str) -> str:
    """As much of the end of `path` as fits into a title."""
    return path if len(path) <= 70 else "…" + path[-69:]


def _count(cases: int) -> str:
    return f"{cases} case" + "s" * (cases != 1)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    return table


def _cell(estimate: statistics.Estimate, unit: str, sign: str = "") -> str:
    """``0.912 [0.890, 0.930]``."""
    if math.isnan(estimate.mean):
        return "–"
    digits = 1 if unit else 3
    text = f"{estimate.mean:{sign}.{digits}f}"
    if not math.isnan(estimate.low):
        text += f" \\[{estimate.low:{sign}.{digits}f}, {estimate.high:{sign}.{digits}f}]"
    return text


def _plain(value: object) -> object:
    """`value` for JSON: NaN is null, paths are text, dataclasses are objects."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and math.isnan(value) else value
