"""A simulated machine for `python -m benchmarks.verify_gpu`, and what its runs leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.unmeasured import unmeasured_environment

ROOT = Path(__file__).parents[2]
BUDGET = 200
SILENCE = 4
KERNEL = "simulated_kernel<float, 16>"

GPU_TESTS = """
import pytest

@pytest.mark.parametrize("number", range(5))
def test_healthy(number):
    pass

def test_crash():
    pass

def test_hang():
    pass

def test_sticky():
    pass

def test_wrong():
    pass

def test_memory():
    pass
"""

# One runs its child; if FAULTY names a file, one finds something and one waits for a child that hangs.
SANITIZER = """#!/bin/sh
check="$2"
if [ -n "$FAULTY" ] && [ $check = memcheck ]; then
  echo "========= Invalid __global__ read of size 4 bytes"
  echo "=========     at void swin::<unnamed>::attend<float, (int)16>(swin::<unnamed>::Call)+0x1a0 in forward.cu:61"
  echo "========= ERROR SUMMARY: 1 error"
  exit 99
fi
while [ "$1" != "$PYTHON" ]; do shift; done
if [ -n "$FAULTY" ] && [ $check = racecheck ]; then
  "$@" & echo $! > "$FAULTY"; wait
elif [ -z "$FAULTY" ] && [ $check = synccheck ]; then
  "$@" || exit
fi
echo "========= ERROR SUMMARY: 0 errors"
"""

NCU = """#!/bin/sh
while [ "$1" != --log-file ]; do shift; done
cat > "$2" <<'CSV'
"ID","Kernel Name","gpu__time_duration.sum"
"","","nsecond"
"0","attend","40000"
"1","differentiate_qkv","60000"
CSV
"""


def tools_in(folder: Path) -> dict[str, str]:
    """The environment of a machine with NVIDIA's tools, as far as a run uses them; ``TESTS`` are its GPU tests."""
    for name, script in (("compute-sanitizer", SANITIZER), ("ncu", NCU)):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    (folder / "test_gpu.py").write_text(GPU_TESTS)
    return {
        **unmeasured_environment(),
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",  # waiting threads spin, and several runs share the machine
        "TESTS": str(folder / "test_gpu.py"),
    }


def start(out: Path, *arguments: object, environment: dict[str, str]) -> subprocess.Popen:
    """A run on the simulated device into `out`."""
    fixed = (
        "--simulated",
        "--budget",
        BUDGET,
        "--silence",
        SILENCE,
        "--test-limit",
        3,
        "--tests",
        environment["TESTS"],
    )
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.verify_gpu", *map(str, (out, *fixed, *arguments))],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rows_in(folder: Path) -> list[dict]:
    return json.loads((folder / "gpu.json").read_text())["rows"]


def key(row: dict) -> tuple:
    return row["measure"], row["shape"], row["variant"]


def running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
