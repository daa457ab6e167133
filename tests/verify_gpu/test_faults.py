"""A run in which nothing goes wrong and, at the same time, one in which everything that can be planted does."""

from __future__ import annotations

import csv
import shutil
import zipfile
from pathlib import Path

import pytest

from benchmarks.verify_gpu import plan
from swin_kernels.ops import OPERATORS

from .simulated import BUDGET, KERNEL, SILENCE, key, rows_in, running, start

STAGE_1 = "f48 96³ stage 1 shifted"

SMOKE = "12³ tokens, 5³ windows"
FAULTS = {
    "sticky@smoke, window_partition, float32 | 10×9 in windows of 7×7 | cpu | check": "lost the device: CUDA error",
    f"wrong@smoke, window_attention, float32, backward | {SMOKE}, head_dim 4 | cpu | check": "wrong: error",
    "memory@model, inference | f12 96³ batch 1 | ours | check": "out of memory: CUDA out of memory",
    f"crash@attention core, forward | {STAGE_1} | ours | check": f"crashed: SIGSEGV in {KERNEL}",
    f"hang@attention core, backward | {STAGE_1} | SDPA | time": f"hung: silent for {SILENCE} s in {KERNEL}",
    "sticky@attention core, backward | f48 128³ stage 1 shifted | ours | time": "lost the device: CUDA error",
    f"crash@window reverse | {STAGE_1} | cpu | time": f"crashed: SIGSEGV in {KERNEL}",
}
"""Planted in measurements, and how the status of the row that each costs begins."""

NOT_ON_EVERY_CPU = ("layer_norm", "projected_window_attention")
"""Operators for which the backend cpu has no kernel here, or on some processors."""

TEST_FAULTS = {
    "crash": "crashed",
    "hang": "hung",
    "sticky": "lost the device",
    "wrong": "wrong",
    "memory": "out of memory",
}
"""Planted in GPU tests, and how the status of its row begins."""


@pytest.fixture(scope="module")
def runs(machine, tmp_path_factory) -> dict[str, tuple[Path, int, str]]:
    """Folder, exit status and output of both runs; they are started at the same time."""
    folder = tmp_path_factory.mktemp("runs")
    planted = [*FAULTS, "hang@sanitizer racecheck", *(f"{kind}@::test_{kind}" for kind in TEST_FAULTS)]
    faulty = {"FAULTY": str(folder / "pid"), "SWIN_VERIFY_FAULTS": "; ".join(planted)}
    processes = {
        "clean": start(folder / "clean", environment=machine),
        "faulty": start(folder / "faulty", environment=machine | faulty),
    }
    outputs = {name: process.communicate()[0] for name, process in processes.items()}
    return {name: (folder / name, process.returncode, outputs[name]) for name, process in processes.items()}


@pytest.fixture
def clean(runs) -> tuple[Path, int, str]:
    return runs["clean"]


def test_clean_run(clean):
    out, status, printed = clean
    assert status == 0, printed
    assert len(list(out.iterdir())) <= 6
    rows = rows_in(out)
    assert {row["part"] for row in rows} == set(plan.NAMES)
    measures = {row["measure"] for row in rows if row["status"] == "ok"}
    assert measures >= {
        "backend",
        "ceiling, copy",
        "ceiling, product",
        "smoke, window_attention, float32, forward",
        "smoke, window_attention, float32, backward",
        *(f"smoke, {name}, float32" for name in OPERATORS if name not in NOT_ON_EVERY_CPU),
        "GPU tests",
        *(f"sanitizer {check}" for check in ("memcheck", "racecheck", "initcheck", "synccheck")),
        "model, inference",
        "model, training step",
        "model, training step, kernels",
        "attention core, forward",
        "attention core, backward",
        "attention core, backward, kernels",
        "counters",
        "sweep cuda, forward",
        "sweep cuda, backward",
        "window partition",
        "window reverse",
        "attention branch, forward + backward",
    }
    assert "everything ran and was correct" in printed.splitlines()[-1]
    with (out / "gpu.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["measure"] for row in table] == [row["measure"] for row in rows]
    assert table[0]["commit"]
    with zipfile.ZipFile(out / "logs.zip") as logs:
        assert logs.testzip() is None


@pytest.fixture
def faulty(runs) -> list[dict]:
    """The rows of the faulty run that show a fault."""
    rows = rows_in(runs["faulty"][0])
    return [row for row in rows if row["status"] != "ok" and not row["status"].startswith("skipped: ")]


def test_every_fault_at_once(runs):
    """It ends in time and says that something was wrong, and at its end everything that was."""
    out, status, printed = runs["faulty"]
    assert status == 1, printed
    assert rows_in(out)[-1]["at"] < BUDGET
    end = printed.splitlines()[-60:]
    for name in ("crashed: SIGSEGV", "hung: silent", "lost the device", "out of memory", "wrong: error"):
        assert any(name in line for line in end), f"{name} is not in the table at the end"


@pytest.mark.parametrize("fault", FAULTS)
def test_measurement(faulty, fault):
    """A fault in a measurement costs one row, which names shape, kind and kernel."""
    place = tuple(fault.partition("@")[2].split(" | ")[:3])
    [row] = [row for row in faulty if key(row) == place]
    assert row["status"].startswith(FAULTS[fault])
    assert row["kernel"] == KERNEL


@pytest.mark.parametrize("kind", TEST_FAULTS)
def test_gpu_test(faulty, kind):
    """A fault in a GPU test; if a process or the device was lost, the kernel is found."""
    rows = {row["measure"]: row for row in faulty if row["shape"] == f"test_{kind}"}
    assert rows["GPU test"]["status"].startswith(f"{TEST_FAULTS[kind]}: ")
    if kind in ("crash", "hang", "sticky"):
        traced = rows["GPU test, traced"]
        assert (traced["status"], traced["kernel"]) == (f"{TEST_FAULTS[kind]}: in {KERNEL}", KERNEL)
    else:
        assert "GPU test, traced" not in rows


def test_healthy_gpu_tests(faulty):
    [row] = [row for row in faulty if row["measure"] == "GPU tests"]
    assert (row["value"], row["unit"]) == (5, "tests passed")


def test_sanitizers(runs, faulty):
    """One that found something, and one that did not end; the processes it had started are gone."""
    [memory] = [row for row in faulty if row["measure"] == "sanitizer memcheck"]
    assert memory["status"].startswith("wrong: Invalid __global__ read of size 4 bytes at attend<float, 16>")
    [race] = [row for row in faulty if row["measure"] == "sanitizer racecheck"]
    assert race["status"] == f"hung: silent for {2 * SILENCE} s, at float32, head_dim 4 in {KERNEL}"
    assert not running(int((runs["faulty"][0].parent / "pid").read_text()))


def test_all_others_are_as_in_the_clean_run(runs, faulty):
    """Nothing else shows a fault; all else is sound, and timed wherever the other run timed it."""
    places = {tuple(fault.partition("@")[2].split(" | ")[:3]) for fault in FAULTS}
    others = [row for row in faulty if not row["measure"].startswith(("GPU test", "sanitizer "))]
    assert {key(row) for row in others} == places
    touched = {key(row) for row in faulty} | {(f"{measure}, kernels", *rest) for measure, *rest in places}
    untouched = [row for row in rows_in(runs["clean"][0]) if key(row) not in touched]
    assert len(untouched) > 60
    found = {key(row): row for row in rows_in(runs["faulty"][0]) if row["status"] == "ok"}
    for row in untouched:
        if row["status"] == "ok":
            assert key(row) in found
            assert (row["p50"] is None) == (found[key(row)]["p50"] is None)


def test_parts_are_added(clean, machine, tmp_path):
    """To the same file."""
    out = shutil.copytree(clean[0], tmp_path / "out")
    before = rows_in(out)
    process = start(out, "--part", "probe", environment=machine)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    rows = rows_in(out)
    assert rows[: len(before)] == before
    assert {row["part"] for row in rows[len(before) :]} == {"probe"}
    assert len(list(out.iterdir())) <= 6
