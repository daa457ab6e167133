"""What a run says before it begins, and that it ends in time."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.verify_gpu import plan, probe, run
from benchmarks.verify_gpu.__main__ import WithoutCuPy, arguments_of

from .simulated import KERNEL, ROOT, rows_in, start


def test_overrun(machine, tmp_path):
    """A part that is not done in time is cut, says so and where, and that our row is missing; the budget is kept."""
    out = tmp_path / "out"
    faults = {"SWIN_VERIFY_FAULTS": "hang@attention core, forward | f48 96³ stage 1 shifted | SDPA | time"}
    began = time.monotonic()
    process = start(out, "--part", "operators", "--budget", 26, "--silence", 60, environment=machine | faults)
    printed, _ = process.communicate()
    assert time.monotonic() - began < 26
    assert process.returncode == 1, printed
    cut = {row["variant"]: row["status"] for row in rows_in(out) if row["status"].startswith("cut: ")}
    assert cut["SDPA"] == f"cut: the time of this part was over in {KERNEL} (step: time)"
    assert "ours" in cut
    assert cut["SDPA"] in printed


def test_dry_run(machine, tmp_path):
    """The plan, based on what starting costs here; every part fits in time, and nothing is written."""
    arguments = (tmp_path / "out", "--dry-run", "--budget", "200", "--tests", machine["TESTS"])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.verify_gpu", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()
    costs, header, _, *lines, total = done.stdout.splitlines()
    assert "measured: imports" in costs
    assert "collecting 10 GPU tests" in costs
    place = header.split().index("expected")
    assert [line.split()[0] for line in lines] == list(plan.NAMES)
    expected, limits = ([float(line.split()[at]) for line in lines] for at in (2 * place - 2, 2 * place))
    assert all(e <= limit for e, limit in zip(expected, limits, strict=True))
    assert sum(expected) <= sum(limits) <= 200 + len(lines)  # each is rounded to a second
    assert "of 200 s" in total


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_says_that_there_is_no_device(tmp_path):
    with pytest.raises(ValueError, match="no CUDA device"):
        run.run(arguments_of([str(tmp_path / "out")]), time.monotonic())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--budget", "5"), "--budget: got 5; accepted are 12 seconds and more"),
        (("--silence", "0"), "--silence: got 0; accepted are positive seconds"),
        (("--part", "tests"), "invalid choice: 'tests'"),
    ],
)
def test_bad_arguments(capsys, arguments, said):
    with pytest.raises(SystemExit) as error:
        arguments_of(["out", *arguments])
    assert error.value.code == 2
    assert said in capsys.readouterr().err


def test_cupy_is_kept_out(monkeypatch):
    """It would make a CUDA context, which copies of the process cannot use; asking for it is not an error."""
    monkeypatch.setattr(sys, "meta_path", [WithoutCuPy(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert importlib.util.find_spec("cupy") is not None
    with pytest.raises(ModuleNotFoundError, match="kept out"):
        importlib.import_module("cupy")
    assert "cupy" not in sys.modules


def test_commit_is_never_unknown(monkeypatch, tmp_path):
    found = probe.commit_of(None)
    assert probe.commit_of(found.removesuffix("-dirty")) == found
    assert probe.commit_of("abc") == f"abc, where git says {found}"
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "no repository"))
    assert probe.commit_of("abc") == "abc"
    with pytest.raises(ValueError, match="--commit: not given, and git does not tell it here"):
        probe.commit_of(None)
