"""Peak resident memory of a training step, one process per variant."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peers import CLASSES, FEATURE_SIZE, gate

SCRIPT = Path(__file__).with_name("peak_memory.py")
GIB = 2.0**30


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc/self/status (Linux)")
def test_peak_memory(benchmark, record, extent):
    """The goal is for the peak of the whole process, which is stricter than for its growth over the built model."""

    def measure(variant: str) -> dict:
        options = ["--extent", str(extent), "--threads", str(torch.get_num_threads())]
        command = [sys.executable, str(SCRIPT), variant, *options]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

    monai = measure("MONAI")
    benchmark.group = "training step"
    ours = benchmark.pedantic(measure, args=("ours",), rounds=1)
    compared = gate(*(torch.tensor(side["losses"]) for side in (ours, monai)))
    compared.require()
    if benchmark.disabled:
        return
    sides = {"MONAI": monai, "ours": ours}
    record(
        "training step, peak memory",
        "GiB",
        {name: {"median": side["peak"] / GIB} for name, side in sides.items()},
        compared,
        f"{extent}³ image, f{FEATURE_SIZE}, 1→{CLASSES}, batch 1",
        torch.float32,
        base={name: side["base"] / GIB for name, side in sides.items()},
        growth={name: (side["peak"] - side["base"]) / GIB for name, side in sides.items()},
    )
