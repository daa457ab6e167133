"""The demo's output on the terminal, and its record as JSON."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import monai
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from .. import train
from ..files import replace
from ..names import say
from .comparison import TOLERANCE, Timing
from .data import LABEL_NOTE


def settings(options: train.TrainOptions, pretraining_steps: int, device: torch.device, backend: str) -> dict[str, str]:
    """What is needed to read the numbers, besides facts about the machine: device, backend, sizes, date."""
    architecture, data = options.architecture, options.data
    size = data.batch_size * data.crops_per_volume
    return {
        "device": f"{device}, backend {backend}",
        "model": f"Swin UNETR, feature_size {architecture.feature_size}, depths {architecture.depths}, float32",
        "pretraining": f"{pretraining_steps} steps, on the same crops without labels",
        "training": f"{options.schedule.steps} steps of {size} × {options.roi} voxels, seed {options.seed}",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def heading(console: Console, text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left")


def settings_table(console: Console, values: Mapping[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    for name, value in values.items():
        table.add_row(name, value)
    console.print(table)


@contextmanager
def timing_bar(console: Console, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar over `total` timed runs, removed at the end; yields a function to call after each."""
    with Progress(TextColumn("timing"), BarColumn(), MofNCompleteColumn(), console=console, transient=True) as progress:
        task = progress.add_task("timing", total=total)
        yield lambda: progress.advance(task)


def organ_table(console: Console, results: Mapping[str, Mapping[str, float]]) -> None:
    table = _table("organ", "Dice", "Dice of a bare threshold", "volume", "volume of the labels")
    for name, score in results["dice"].items():
        table.add_row(
            name,
            f"[bold]{score:.3f}[/]",
            f"{results['dice_of_bare_threshold'][name]:.3f}",
            f"{results['millilitres'][name]:,.0f} ml",
            f"{results['millilitres_of_labels'][name]:,.0f} ml",
        )
    console.print(table)
    say(console, LABEL_NOTE, "dim")


def timing_table(console: Console, timings: Sequence[Timing], rounds: int) -> None:
    table = _table("", "swin_unetr", f"MONAI {monai.__version__}", "difference of results", "speed-up")
    for t in timings:
        speedup = (
            f"[bold green]{t.speedup:.2f}×[/]" if t.agrees else f"[bold red]none: differs by more than {TOLERANCE:g}[/]"
        )
        table.add_row(t.work, f"{t.fused:.3f} s", f"{t.monai:.3f} s", f"{t.difference:.1e}", speedup)
    console.print(table)
    console.print(f"Medians of {rounds} interleaved runs in this process; same weights, same input.", style="dim")


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def files(console: Console, paths: Mapping[str, Path]) -> None:
    heading(console, "Files")
    for path in paths.values():
        say(console, str(path))


def write_json(results: Mapping[str, object], path: Path) -> None:
    replace({path: (json.dumps(results, indent=2) + "\n").encode()})
