"""Which tests a run collects, and in which order: a pytest plugin.

- GPU: tests marked `gpu` are left out where there is no CUDA device, and the top of the output says so. So a skip of
  any other test means something (`skips`). ``pytest -m gpu`` asks for them and fails without a device.
- order: files that take longest come first, by the seconds in `DURATIONS`, so that processes that share the files
  (``--dist loadfile --no-loadscope-reorder``) end at about the same time. A file without seconds there is new and
  comes before all others.

``pytest --store-durations``, which ``make durations`` calls, writes the seconds of this run to `DURATIONS`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

DURATIONS = Path(__file__).with_name("durations.json")
"""Seconds by file, in whole numbers: precise enough for the order, and few of them change from run to run."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--store-durations", action="store_true", help="write the seconds of each file to tests/durations.json"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("store_durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Stopwatch())


def leaves_out_gpu(config: pytest.Config) -> bool:
    """Whether this run leaves out tests marked `gpu`."""
    return not torch.cuda.is_available() and "gpu" not in config.getoption("markexpr")


def pytest_report_header(config: pytest.Config) -> str | None:
    if leaves_out_gpu(config):
        return "GPU tests: left out, there is no CUDA device"
    return None


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if leaves_out_gpu(config):
        deselected = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=deselected)
    seconds = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}
    items.sort(key=lambda item: -seconds.get(file_of(item.nodeid), float("inf")))  # stable: files stay whole


class Stopwatch:
    """Adds up the time that the tests of each file take, and writes it at the end."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[file_of(report.nodeid)] += report.duration

    def pytest_sessionfinish(self) -> None:
        rounded = {file: round(seconds) for file, seconds in sorted(self.seconds.items())}
        DURATIONS.write_text(json.dumps(rounded, indent=1) + "\n")
