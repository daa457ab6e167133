"""`swin-kernels doctor`: what it says about a sound machine, and that a wrong kernel does not get past it."""

from __future__ import annotations

import functools
import io
import subprocess
import sys

import pytest
import torch
from rich.console import Console

import swin_kernels
from swin_kernels import backends, cli, doctor
from swin_kernels.doctor import Backend, Check, Report
from swin_kernels.ops import OPERATORS


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Examples that take no time; the timed one too."""
    for operator in OPERATORS.values():
        monkeypatch.setattr(operator, "timed", dict.fromkeys(operator.timed, operator.examples[-1]))
        monkeypatch.setattr(operator, "examples", operator.examples[-1:])


@pytest.fixture
def cpu(monkeypatch):
    """The C++ backend, or the reference in its place if it is not built."""
    backend = backends.BACKENDS["cpu"]
    if backend.unavailable():
        monkeypatch.setattr(backend, "unavailable", lambda: None)
        monkeypatch.setattr(backend, "kernel", backends.BACKENDS["reference"].kernel)
        monkeypatch.setattr(backend, "declines", lambda call: None)
        monkeypatch.setattr(doctor, "_isa", lambda: "none")
    return backend


def printed(report: Report, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    doctor.show(report, console)
    return console.file.getvalue()


def checks_of(report: Report, name: str) -> tuple[Check, ...]:
    return next(b for b in report.backends if b.name == name).checks


def test_a_sound_machine_passes(cpu, capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "every check passed" in out
    assert "FAILED" not in out
    assert torch.__version__ in out
    assert swin_kernels.__version__ in out


def test_every_dtype_is_checked_and_every_check_timed(cpu):
    report = doctor.run()
    assert report.passed
    attention = [c for c in checks_of(report, "cpu") if c.operator == "window_attention"]
    assert {c.dtype for c in attention} == set(doctor.ACCEPTED)
    assert {c.operator for c in checks_of(report, "reference")} == set(OPERATORS)
    assert all(c.speedup and c.speedup > 0 for c in checks_of(report, "cpu"))
    assert all(c.speedup is None for c in checks_of(report, "reference"))
    assert all(0 < c.error <= c.accepted for c in attention)


def test_quick_checks_less(cpu):
    quick = doctor.run(quick=True)
    assert quick.passed
    assert {c.dtype for c in checks_of(quick, "cpu")} == {torch.float32}


def wrong_forward(engine, monkeypatch):
    forward = engine["window_attention"].forward

    @functools.wraps(forward)
    def wrong(*args):
        out, lse = forward(*args)
        return out * 1.01, lse

    monkeypatch.setattr(engine["window_attention"], "forward", wrong)
    return "output"


def wrong_pad_gradient(engine, monkeypatch):
    backward = engine["window_attention"].backward

    @functools.wraps(backward)
    def wrong(*args):
        qkv, table, pad = backward(*args)
        return qkv, table, pad * 0.9

    monkeypatch.setattr(engine["window_attention"], "backward", wrong)
    return "gradient of pad_qkv"


def nan_in_table_gradient(engine, monkeypatch):
    backward = engine["window_attention"].backward

    @functools.wraps(backward)
    def wrong(*args):
        qkv, table, pad = backward(*args)
        table[0, 0] = float("nan")
        return qkv, table, pad

    monkeypatch.setattr(engine["window_attention"], "backward", wrong)
    return "gradient of bias_table"


def raising(engine, monkeypatch):
    @functools.wraps(engine["window_attention"].forward)
    def wrong(*args):
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(engine["window_attention"], "forward", wrong)
    return "illegal instruction"


# The reference is also the truth: copies of its kernels stand in for the C++ backend's, so that only a copy is wrong.
@pytest.fixture
def patient(monkeypatch):
    backend = backends.BACKENDS["cpu"]
    kernels = {}
    for operator in OPERATORS.values():
        original = backends.BACKENDS["reference"].kernel(operator.call_type.kernel)
        copy = type(sys)(original.__name__)
        for entry in backends.ENTRY_POINTS:
            if hasattr(original, entry):
                setattr(copy, entry, getattr(original, entry))
        kernels[operator.call_type.kernel] = copy
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    monkeypatch.setattr(backend, "kernel", kernels.get)
    monkeypatch.setattr(backend, "declines", lambda call: None)
    monkeypatch.setattr(doctor, "_isa", lambda: "none")
    return kernels


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize(
    "mistake", [wrong_forward, wrong_pad_gradient, nan_in_table_gradient, raising], ids=lambda m: m.__name__
)
def test_a_wrong_kernel_fails_and_gets_no_speedup(patient, monkeypatch, capsys, mistake, quick):
    monkeypatch.setattr(doctor, "ACCEPTED", {torch.float32: 1e-4})
    wanted = mistake(patient, monkeypatch)
    assert cli.main(["doctor", *["--quick"] * quick]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "a check FAILED" in out
    assert "every check passed" not in out
    assert wanted in out
    report = doctor.run(quick=quick)
    attention = [c for c in checks_of(report, "cpu") if c.operator == "window_attention"]
    assert all(not c.passed and c.speedup is None for c in attention)
    assert all(c.passed for c in checks_of(report, "reference"))
    rows = [line for line in printed(report).splitlines() if "window_attention" in line and "FAILED" in line]
    assert rows
    assert not any("×" in row for row in rows)


def test_a_wrong_partition_fails(patient, monkeypatch):
    forward = patient["window_partition"].forward
    monkeypatch.setattr(
        patient["window_partition"], "forward", functools.wraps(forward)(lambda x, grid: forward(x, grid).flip(1))
    )
    report = doctor.run(quick=True)
    failed = [c for b in report.backends for c in b.checks if not c.passed]
    assert [(c.operator, c.speedup) for c in failed] == [("window_partition", None), ("window_reverse", None)]
    assert "output: error" in failed[0].failure
    assert "gradient of windows: error" in failed[1].failure


def test_a_missing_backend_is_explained_and_no_failure(monkeypatch):
    monkeypatch.setattr(backends.BACKENDS["cpu"], "unavailable", lambda: "the library was not built")
    report = doctor.run(quick=True)
    assert report.passed
    assert "cpu does not run here: the library was not built" in printed(report)


def test_generator_and_threads_are_left_alone(cpu):
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    doctor.run(quick=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_output_fits_80_columns_and_a_pipe():
    check = Check("window_attention", torch.bfloat16, 1.2e-3, 3e-2, speedup=123.4)
    bad = Check("window_attention", torch.float16, 1.0, 3e-2, failure="3D, clipped: gradient of bias_table: 1.0e+00")
    report = Report(
        {"torch": "2.13.0", "processor": "x" * 40},
        (Backend("reference", "cuda", checks=(check, bad)), Backend("cpu", "cpu", reason="because " * 30)),
        seconds=3,
    )
    text = printed(report)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    assert "\x1b" not in text
    for word in ("reference (cuda)", "bfloat16", "123.4×", "FAILED", "a check FAILED (3 s)"):
        assert word in text


def test_command_line():
    done = subprocess.run([sys.executable, "-m", "swin_kernels.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["swin-kernels", swin_kernels.__version__]
    with pytest.raises(SystemExit) as caught:
        cli.main(["surgeon"])
    assert caught.value.code == 2
