"""`scripts/verify_gpu.py` without a GPU: it says so, and its plan runs through on the CPU."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def verify(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "verify_gpu.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_says_that_there_is_no_device(tmp_path):
    done = verify(tmp_path)
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert "no CUDA device" in done.stdout


def test_dry_run(tmp_path):
    done = verify("--dry-run", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["about"]["dry_run"]
    assert result["about"]["commit"]
    measures = {row["measure"] for row in result["rows"] if row["status"] == "ok"}
    assert measures == {
        "backend",
        "tests",
        "window partition",
        "window reverse",
        *(f"attention {part}, {d}" for part in ("core", "branch") for d in ("forward", "forward + backward")),
        "attention core, backward",
        "model, inference",
        "model, training step",
    }
    assert not any(row["p50"] or row["ratio"] for row in result["rows"]), "a dry run measures nothing"
    with (tmp_path / "gpu.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(result["rows"])
