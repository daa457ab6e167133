"""How this folder measures: in one process, variants in turn, medians, and no ratio without its gate.

pytest-benchmark times one function. Here each of its rounds first runs the peers (as the round's
setup, timed by the same clock) and then ours, so every variant sees the same machine in the same
minute. Peers, ratios, gate and goals are recorded in the benchmark's `extra_info`; the table at the
end of the session and a result file (``--benchmark-json``) both come from there.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import monai
import pytest
import torch
from goals import IMAGE_EXTENT, goals_of
from peers import Gate
from pytest_benchmark.plugin import get_cpu_info
from pytest_benchmark.utils import get_commit_info
from report import cost, setting
from rich import box
from rich.console import Console
from rich.table import Table

import swin_kernels
from swin_kernels.backends import select
from swin_kernels.backends.cpu import library as cpu_library
from swin_kernels.ops.window_attention import WindowAttentionCall

THREADS = 2
ROWS = pytest.StashKey[list[dict]]()
LOAD_BEFORE = os.getloadavg()[0]  # other work on the machine: above a few tenths, distrust the ratios


def pytest_addoption(parser):
    parser.addoption(
        "--extent",
        type=int,
        default=IMAGE_EXTENT,
        help="extent of the image in voxels, a multiple of 32, at least 64; goals apply at the default",
    )


def pytest_configure(config):
    config.stash[ROWS] = []
    torch.set_num_threads(THREADS)


@pytest.fixture
def extent(pytestconfig) -> int:
    """Extent of the image on each axis."""
    return pytestconfig.getoption("extent")


def backend_in_use(dtype: torch.dtype, device: str = "cpu") -> str:
    """The backend that runs a Swin UNETR attention here, forced or chosen."""
    return select(WindowAttentionCall(device=device, dtype=dtype, head_dim=16, window=(7, 7, 7))).name


def spread(seconds: list[float]) -> dict[str, float]:
    """Percentiles of one variant's rounds."""
    if len(seconds) == 1:
        return {"median": seconds[0]}
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"p20": tenths[1], "median": tenths[4], "p80": tenths[7]}


@pytest.fixture
def record(benchmark, pytestconfig, extent, capsys):
    """Store one comparison, print it, and check it against the goals; see `versus` for the arguments."""

    def store(
        name: str, unit: str, costs: dict[str, dict[str, float]], gate: Gate, sizes: str, dtype: torch.dtype, **more
    ) -> None:
        gate.require()
        dtype_name = str(dtype).removeprefix("torch.")
        ratios = {peer: cost["median"] / costs["ours"]["median"] for peer, cost in costs.items() if peer != "ours"}
        goals = goals_of(name, extent, dtype_name)
        row = {
            "name": name,
            "sizes": sizes,
            "image_extent": extent,
            "dtype": dtype_name,
            "device": "cpu",
            "threads": torch.get_num_threads(),
            "backend": backend_in_use(dtype),
            "unit": unit,
            "costs": costs,
            "ratios": ratios,
            "goals": {peer: goal.ratio for peer, goal in goals.items()},
            "gate": {"measure": gate.measure, "value": gate.value, "limit": gate.limit},
            **more,
        }
        benchmark.extra_info.update(row)
        pytestconfig.stash[ROWS].append(row)
        with capsys.disabled():
            print(
                f"\n{name}: {', '.join(f'{ratio:.2f}× {peer}' for peer, ratio in ratios.items())} "
                f"[cpu, {THREADS} threads, {dtype_name}, {sizes}, backend {row['backend']}, torch {torch.__version__}, "
                f"monai {monai.__version__}, swin-kernels {swin_kernels.__version__}; {gate}]"
            )
        short = [
            f"{ratios[g.against]:.2f}× {g.against}: {g.wording}" for g in goals.values() if ratios[g.against] < g.ratio
        ]
        assert not short, "below the goal: " + "; ".join(short)

    return store


@pytest.fixture
def versus(benchmark, record):
    """Time ours against its peers, variants in turn, and record the ratio of medians.

    Arguments of the returned function:
        name: the row's name; `goals.GOALS` refers to it.
        variants: name to function; ``"ours"`` is timed by pytest-benchmark, the others before it.
        gate: the comparison of results; checked before anything is timed.
        sizes, dtype: what was measured.
        rounds: timed rounds after one warm-up; at least 5.
    """

    def measure(
        name: str,
        variants: dict[str, Callable[[], object]],
        *,
        gate: Gate,
        sizes: str,
        dtype: torch.dtype,
        rounds: int = 7,
    ) -> None:
        gate.require()
        peers = {peer: run for peer, run in variants.items() if peer != "ours"}
        seconds: dict[str, list[float]] = {peer: [] for peer in peers}

        def run_peers():
            for peer, run in peers.items():
                start = time.perf_counter()
                run()
                seconds[peer].append(time.perf_counter() - start)

        benchmark.group = name.partition(",")[0]
        benchmark.pedantic(variants["ours"], setup=run_peers, rounds=rounds, warmup_rounds=1)
        if benchmark.disabled:  # --benchmark-disable: the gates alone
            return
        costs = {peer: spread(values[1:]) for peer, values in seconds.items()}
        costs["ours"] = spread(list(benchmark.stats.stats.data))
        record(name, "s", costs, gate, sizes, dtype, rounds=rounds)

    return measure


def machine() -> dict[str, object]:
    """What a result depends on besides the code."""
    return {
        "cpu": get_cpu_info().get("brand_raw", platform.processor()),
        "cores": os.cpu_count(),
        "vector_extension": torch.backends.cpu.get_cpu_capability(),  # what PyTorch uses
        # what ours use, of those built
        "kernels": "none" if cpu_library.unavailable() else torch.ops.swin_kernels_cpu.isa(),
        "threads": torch.get_num_threads(),
        "load_before": LOAD_BEFORE,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": monai.__version__,
        "pytest_benchmark": version("pytest-benchmark"),
        "swin_kernels": swin_kernels.__version__,
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("SWIN_KERNELS_", "MALLOC_"))},
    }


def pytest_benchmark_generate_machine_info(config):
    return machine()


def pytest_benchmark_generate_commit_info(config):
    commit = get_commit_info()
    return {key: commit[key] for key in ("id", "time", "dirty")}


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    about, commit = machine(), get_commit_info()
    table = Table(
        title="MONAI's cost divided by ours: ratio of medians, variants in turn in one process",
        caption=f"{about['cpu']}, {setting(about, commit)}, {time.strftime('%Y-%m-%d')}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("benchmark")
    for heading in ("MONAI", "flash", "ours", "MONAI / ours", "flash / ours", "error"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['name']}\n  [dim]{row['dtype']}, {row['sizes']}, backend {row['backend']}[/dim]",
            *(cost(row, variant) for variant in ("MONAI", "MONAI flash", "ours")),
            *(show_ratio(row, peer) for peer in ("MONAI", "MONAI flash")),
            f"{row['gate']['value']:.1g}\n[dim]≤ {row['gate']['limit']:g}[/dim]",
        )
    console = Console(width=max(120, terminalreporter._tw.fullwidth), force_terminal=terminalreporter.hasmarkup)
    with console.capture() as capture:
        console.print(table)
    terminalreporter.write_line("")
    terminalreporter.write(capture.get())


def show_ratio(row: dict, peer: str) -> str:
    """One ratio, with its goal if it has one."""
    if peer not in row["ratios"]:
        return "–"
    ratio, goal = row["ratios"][peer], row["goals"].get(peer)
    if goal is None:
        return f"{ratio:.2f}×"
    return f"{ratio:.2f}×\n{'≥' if ratio >= goal else 'MISSED'} {goal:.2f}"
