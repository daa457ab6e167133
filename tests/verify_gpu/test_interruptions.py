"""What a run that is killed or stopped leaves behind."""

from __future__ import annotations

import csv
import signal
import time
from pathlib import Path

from .simulated import rows_in, running, start


def test_killed(machine, tmp_path):
    """SIGKILL: the files are complete, as at any time before, and hold every row that was shown; no child is left."""
    out = tmp_path / "out"
    faults = {"SWIN_VERIFY_FAULTS": "hang@sweep cuda, backward"}
    process = start(out, "--part", "sweeps", "--silence", 60, environment=machine | faults)
    shown = [process.stdout.readline()]
    while not shown[-1].startswith("sweep cuda, forward"):
        rows_in(out)
        shown.append(process.stdout.readline())
    time.sleep(2)  # until the child that hangs has begun
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.kill()
    process.wait()
    shown = [line for line in (*shown, *process.stdout.read().splitlines()) if not line.startswith("parts end at")]
    rows = rows_in(out)
    assert len(rows) >= len(shown) > 10
    for row, line in zip(rows, shown, strict=False):
        assert line.startswith(row["measure"])
    with (out / "gpu.csv").open() as file:
        assert len(list(csv.DictReader(file))) in (len(rows), len(rows) - 1)  # it is written second
    end = time.monotonic() + 5
    while any(map(running, children)) and time.monotonic() < end:
        time.sleep(0.05)
    assert children
    assert not any(map(running, children))


def test_terminated(machine, tmp_path):
    """SIGTERM: whatever was running is ended and named, and the table is printed."""
    out = tmp_path / "out"
    faults = {"SWIN_VERIFY_FAULTS": "hang@ceiling, copy"}
    process = start(out, "--part", "probe", "--silence", 60, environment=machine | faults)
    while not (out / "gpu.json").exists() or not any(row["measure"] == "device" for row in rows_in(out)):
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    statuses = [row["status"] for row in rows_in(out)]
    assert any(status.startswith("cut: the run was stopped") for status in statuses)
    assert "stopped by SIGTERM in part probe" in output.splitlines()[-1]
    assert (out / "logs.zip").is_file()
