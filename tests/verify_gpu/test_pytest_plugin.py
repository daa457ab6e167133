"""`benchmarks/verify_gpu/pytest_plugin.py` on a file of small tests, in a separate pytest, with every planted fault.

PyTorch is a stand-in there: it is imported at once, and its device can break.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TORCH = """
OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"})

class cuda:
    broken = False

    def is_initialized():
        return True

    def synchronize():
        if cuda.broken:
            raise RuntimeError("CUDA error: unspecified launch failure\\nCUDA kernel errors might be reported late")
"""

TESTS = """
import ctypes, os
import pytest
import torch

@pytest.mark.parametrize("number", range(6))
def test_healthy_before(number):
    pass

def test_crash():
    pass

def test_exit():
    os._exit(1)

def test_hang():
    pass

def test_keeps_gil():
    ctypes.PyDLL(None).sleep(30)

def test_sticky():
    pass

def test_broken_by_a_kernel():
    torch.cuda.broken = True

def test_memory():
    pass

def test_wrong():
    pass

@pytest.fixture
def faulty_setup():
    raise ValueError("no such\\nfixture")

def test_setup(faulty_setup):
    pass

@pytest.fixture
def faulty_teardown():
    yield
    raise ValueError("the teardown")

def test_teardown(faulty_teardown):
    pass

def test_teardown_twice(faulty_teardown):
    print("printed by the test")
    assert [1, 2] == [1, 3], "the call"

def test_caused():
    try:
        raise RuntimeError("Triton Error [CUDA]: misaligned address")
    except RuntimeError as error:
        raise ValueError("the kernel failed") from error

@pytest.fixture
def hanging_teardown():
    yield
    ctypes.CDLL(None).sleep(30)

def test_fails_and_hangs(hanging_teardown):
    raise ValueError("before it hung")

@pytest.mark.skip(reason="no such device")
def test_skip():
    pass

@pytest.mark.xfail(reason="known")
def test_expected_failure():
    raise ValueError

@pytest.mark.parametrize("number", range(6))
def test_healthy_after(number):
    pass
"""

FAULTS = "crash@test_crash; sticky@test_sticky; memory@test_memory; wrong@test_wrong; hang@test_hang"

ILLEGAL = "RuntimeError: CUDA error: an illegal memory access was encountered (planted)"
LAUNCH = "RuntimeError: CUDA error: unspecified launch failure"
HEALTHY = {f"test_healthy_{when}[{number}]": ("passed", "") for when in ("before", "after") for number in range(6)}
SOFT = {
    "test_memory": (
        "out of memory",
        "MemoryError: CUDA out of memory. Tried to allocate 5.00 GiB (planted)",
    ),
    "test_wrong": ("failed", "AssertionError: results are wrong (planted)"),
    "test_setup": ("failed", "ValueError: no such"),
    "test_teardown": ("failed", "ValueError: the teardown"),
    "test_teardown_twice": ("failed", "AssertionError: the call"),
    "test_caused": ("device lost", "ValueError: the kernel failed"),
    "test_skip": ("skipped", "no such device"),
    "test_expected_failure": ("skipped", "known"),
}
"""Outcomes and messages of tests that leave the process as it was."""


class Run:
    """pytest with the plugin on ``test_toy.py``; `lines` are those in its results file now, `log` what it printed."""

    def __init__(self, folder: Path, tests: str, *options: str, faults: str = "") -> None:
        (folder / "torch.py").write_text(TORCH)
        (folder / "test_toy.py").write_text(tests)
        self.results, self.output = folder / "results.jsonl", folder / "log"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "benchmarks.verify_gpu.pytest_plugin",
            "--noconftest",
            *options,
        ]
        command += [f"--verify-results={self.results}", f"--rootdir={folder}", f"--basetemp={folder / 'temporary'}"]
        command += [str(folder / "test_toy.py")]
        environment = os.environ | {"SWIN_VERIFY_FAULTS": faults, "PYTEST_ADDOPTS": "", "PYTHONPATH": str(folder)}
        # As if started by hand, also where these tests themselves run in a worker.
        environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST")}
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    @property
    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.results.read_text().splitlines()] if self.results.exists() else []

    @property
    def log(self) -> str:
        return self.output.read_text()

    def found(self) -> dict[str, tuple[str, str]]:
        """Outcome and message of every test; that none has two lines is asserted."""
        lines = self.lines[1:]
        names = [line["test"].removeprefix("test_toy.py::") for line in lines]
        assert len(set(names)) == len(names), sorted(names)
        return {name: (line["outcome"], line["message"]) for name, line in zip(names, lines, strict=True)}

    def kill(self) -> None:
        """Kill it and its workers, without a chance to write anything more."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(tmp_path):
    """Starts a `Run`, which ends with the test."""
    runs = []

    def start(*arguments, **options) -> Run:
        runs.append(Run(tmp_path, *arguments, **options))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.kill()


def test_every_fault_in_workers(start):
    """Every test has one result, its own, whatever happened to those before it and to the process it ran in."""
    options = ("-n2", "--dist=load", "--maxschedchunk=1", "--max-worker-restart=100", "--no-summary")
    run = start(TESTS, *options, "--timeout=1.5", "--timeout-method=thread", faults=FAULTS)
    assert run.process.wait(60) == 1, run.log
    found = run.found()
    assert run.lines[0] == {"collected": len(HEALTHY) + len(SOFT) + 7} == {"collected": len(found)}
    assert {name: found[name] for name in HEALTHY | SOFT} == HEALTHY | SOFT
    assert found["test_sticky"] == ("device lost", ILLEGAL)
    assert found["test_broken_by_a_kernel"] == ("device lost", LAUNCH)
    assert found["test_hang"] == found["test_keeps_gil"] == ("timed out", "still running after its limit of 1.5 s")
    assert found["test_fails_and_hangs"] == ("failed", "ValueError: before it hung")
    for name, end in (("test_crash", "SIGSEGV"), ("test_exit", "exit status 1")):
        outcome, message = found[name]
        assert outcome == "crashed"
        assert message.endswith(f"crashed while running 'test_toy.py::{name}': {end}")
    seconds = {line["test"].partition("::")[2]: line["seconds"] for line in run.lines[1:]}
    assert 0.75 < seconds["test_hang"] < 8
    assert seconds["test_wrong"] < 1
    for name in ("strike", "test_keeps_gil", "hanging_teardown"):
        assert f" in {name}\n" in run.log  # where those that hung were
    assert "The device no longer answers: CUDA error: unspecified launch failure" in run.log
    # The 13th passed but for its teardown. A worker that leaves adds nothing to what pytest counts.
    assert "12 failed, 13 passed, 1 skipped, 1 xfailed, 3 errors" in run.log


def test_in_one_process(start):
    """Without pytest-xdist no process can be replaced; tests after a sticky error fail at once, naming it."""
    unfit = ("test_crash", "test_exit", "test_keeps_gil", "test_broken_by_a_kernel")
    left_out = [f"--deselect=test_toy.py::{name}" for name in (*unfit, "test_fails_and_hangs")]
    # The sticky error strikes in the first of the last six.
    faults = FAULTS.replace("test_sticky", "test_healthy_after")
    run = start(TESTS, *left_out, "-pno:xdist", "--timeout=1", faults=faults)
    assert run.process.wait(30) == 1, run.log
    lost = {name: ("device lost", ILLEGAL) for name in HEALTHY if "after" in name}
    hung = {"test_hang": ("timed out", "Failed: Timeout (>1.0s) from pytest-timeout.")}
    assert run.found() == HEALTHY | SOFT | hung | {"test_sticky": ("passed", "")} | lost
    assert run.lines[0] == {"collected": len(run.found())}


KILLER = """
nodes = []

def pytest_xdist_node_collection_finished(node):
    nodes.append(node)
    if len(nodes) == 2:  # pytest-xdist sends the first tests next
        process = nodes[0].gateway._io.popen
        process.kill()
        process.wait()
"""


def test_worker_gone_unnoticed(start, tmp_path):
    """Tests sent to a worker that has just ended run elsewhere: the run goes on, and no test is blamed."""
    (tmp_path / "killer.py").write_text(KILLER)
    healthy = "import pytest\n@pytest.mark.parametrize('number', range(8))\ndef test_healthy(number): pass"
    run = start(healthy, "-n2", "--max-worker-restart=100", "-pkiller")
    assert run.process.wait(30) == 0, run.log
    assert run.found() == {f"test_healthy[{number}]": ("passed", "") for number in range(8)}
    assert run.log.count("replacing crashed worker") == 1


CUT_OFF = """
import time
import pytest

@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_contract(backend):
    if backend == "triton":
        time.sleep(60)

def test_plain():
    pass

@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_production_shapes(backend):
    print("printed by the test")
    values = {"the values": backend}
    assert values is None
"""


@pytest.mark.parametrize("processes", ["-n2", "-n0"])
def test_cut_off(start, processes):
    """Tests that have ended are in the file and their failures in the log; what matters most ran first."""
    run = start(CUT_OFF, processes, "--maxschedchunk=1")
    waited = time.monotonic()
    while len(run.lines) < 5:
        assert time.monotonic() - waited < 30, run.log
        time.sleep(0.05)
    run.kill()
    assert run.lines[0] == {"collected": 5}
    found = run.found()
    names = [f"test_production_shapes[{backend}]" for backend in ("cuda", "triton")]
    order = [*names, "test_contract[cuda]", "test_plain"]
    assert (list(found) == order) if processes == "-n0" else (set(found) == set(order))
    for backend, name in zip(("cuda", "triton"), names, strict=True):
        assert found[name] == ("failed", f"AssertionError: assert {{'the values': '{backend}'}} is None")
        assert f"E       AssertionError: assert {{'the values': '{backend}'}} is None" in run.log
    assert run.log.count("printed by the test") == 4  # the code and the output of both


def test_uncollectable(start):
    """A file that cannot be imported is reported like a test that failed."""
    run = start("import nowhere", "-n2")
    assert run.process.wait(30) != 0
    assert {"collected": 0} in run.lines
    [line] = [line for line in run.lines if "test" in line]
    assert line["outcome"] == "failed"
    assert line["message"] == "ModuleNotFoundError: No module named 'nowhere'"
