"""A few hundred cases of every subject pass; and the fuzzers find planted faults."""

from __future__ import annotations

import re

import pytest
import torch

from swin_kernels.backends.reference import instance_norm_act, window_attention

from . import __main__ as command
from . import driver, mutation, operators

BRIEF = {
    "operators": (150, {"right", "refused"}),
    "images": (400, {"read", "refused"}),
    "checkpoints": (150, {"read", "passed over", "loaded", "refused", "gone on"}),
    "datalists": (300, {"read", "refused"}),
    "configurations": (50, {"taken", "refused"}),
    "kills": (10, {"gone on"}),
}
"""Cases of each subject here, and outcomes that some must have: a few seconds each. `make fuzz` runs 10,000."""


@pytest.mark.parametrize("subject", command.SUBJECTS)
def test_nothing_is_found(tmp_path, subject):
    count, outcomes = BRIEF[subject]
    report = driver.run(subject, count, 0, tmp_path)
    assert report.cases == count
    assert not report.findings, command.described(report)
    assert outcomes <= set(report.outcomes)


# --- planted faults ---


def planted(name: str, tmp_path, count: int = 8) -> driver.Report:
    return driver.run(f"{__package__}.planted.{name}", count, 0, tmp_path)


def test_a_wrong_exception_is_found_and_repeated_by_its_seed(tmp_path):
    report = planted("wrong_exception", tmp_path, 20)
    found = {finding.index for finding in report.findings}
    assert 0 < len(found) < 20
    assert report.cases == 20
    assert all(finding.kind == "error" and finding.says == "KeyError: '4'" for finding in report.findings)
    assert "parse 4" in report.findings[0].details
    assert "wrong_exception.py" in report.findings[0].details
    last = max(found)
    again = driver.run(report.subject, 1, 0, tmp_path / "again", first=last)
    assert [finding.index for finding in again.findings] == [last]
    other = driver.run(report.subject, 20, 1, tmp_path / "other")
    assert {finding.index for finding in other.findings} != found


def test_a_hang_is_ended_named_and_passed_over(tmp_path):
    report = planted("hang", tmp_path)
    assert [(finding.kind, finding.index) for finding in report.findings] == [("hang", 2), ("hang", 5)]
    assert "case 3 of this process" in report.findings[0].details
    assert "hang.py" in report.findings[0].details
    assert report.outcomes == {"parsed": 6, "hang": 2}


def test_a_crash_is_named_and_passed_over(tmp_path):
    report = planted("segfault", tmp_path)
    assert [(finding.kind, finding.index) for finding in report.findings] == [("crash", 2), ("crash", 5)]
    assert report.findings[0].says == "the process ended with signal SIGSEGV"
    assert "case 3 of this process" in report.findings[0].details
    assert "segfault.py" in report.findings[0].details
    assert report.cases == 8


def test_a_leak_is_found(tmp_path):
    report = planted("leak", tmp_path, 120)
    assert [finding.kind for finding in report.findings] == ["leak", "leak"]
    assert [finding.says.partition(":")[0] for finding in report.findings] == ["memory", "open files"]


def test_memory_that_one_case_takes_is_found(tmp_path):
    report = planted("gluttony", tmp_path)
    assert [(finding.kind, finding.index) for finding in report.findings] == [("error", 2)]
    assert re.search(r"the case took 6\d\d MiB of memory", report.findings[0].says)


def test_what_cannot_be_prepared_is_found(tmp_path):
    report = planted("unprepared", tmp_path)
    assert [(finding.kind, finding.index) for finding in report.findings] == [("crash", None)]
    assert "no files to begin with" in report.findings[0].details


OFF = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Much more than rounding."""


@pytest.fixture
def one_thread():
    """Small tensors on several threads take long if others wait for the same cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", OFF, ids=str)
@pytest.mark.parametrize("operator", ["window_attention", "instance_norm_act"])
def test_an_operator_that_is_off_is_found(monkeypatch, operator, dtype):
    """In one element of a hundred; and nothing is found if there is no error."""
    module, make = {
        "window_attention": (window_attention, operators._attention),
        "instance_norm_act": (instance_norm_act, operators._instance_norm),
    }[operator]
    original = module.forward

    def off(*arguments):
        out, kept = original(*arguments)
        out = out.clone()
        out.view(-1)[::100] += OFF[dtype] * out.abs().max() if out.numel() else 0.0
        return out, kept

    monkeypatch.setattr(operators, "MOST_SCORES", 2000)
    found = {"right": 0, "off": 0}
    for kind in found:
        if kind == "off":
            monkeypatch.setattr(module, "forward", off)
        for number in range(6):
            results = make(mutation.Draw("planted", number), dtype, "reference")
            try:
                operators._hold_pooled(results)
            except AssertionError:
                found[kind] += 1
    assert found["right"] == 0
    assert found["off"] >= 4


def test_a_call_that_is_refused_without_its_name_is_found():
    draw = mutation.Draw(0)
    assert operators._refused(ValueError("layer_norm: x is none"), "layer_norm: ") == "refused"
    with pytest.raises(mutation.Fault, match="the message has no"):
        operators._refused(ValueError("x is none"), "layer_norm: ")
    assert not draw.notes


def test_the_command_tells_findings_and_ends_with_1(tmp_path, capsys):
    subject = f"{__package__}.planted.wrong_exception"
    assert command.main([subject, "--count", "12", "--keep", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "12 cases in" in said
    assert re.search(
        rf"× error: KeyError: '4'\n    python -m tests.fuzz {subject} --seed 0 --first \d+ --count 1", said
    )
    assert command.main([subject, "--count", "0", "--keep", str(tmp_path)]) == 0


@pytest.mark.parametrize("mutate", [mutation.mutate_bytes, mutation.mutate_text, mutation.mutate_tree])
def test_mutants_are_the_same_for_the_same_seed_and_say_what_was_done(mutate):
    bases = {
        "mutate_bytes": bytes(range(256)),
        "mutate_text": "a: 1\nb: [2, 3.5]\n",
        "mutate_tree": {"a": [1, {"b": 2}]},
    }
    base, as_it_was = bases[mutate.__name__], repr(bases[mutate.__name__])
    draws = [mutation.Draw("same", seed) for seed in (*range(200), *range(200))]
    mutants = [mutate(draw, base) for draw in draws]
    assert repr(mutants[:200]) == repr(mutants[200:])
    assert len(set(map(repr, mutants))) > 100
    assert all(draw.notes for draw, mutant in zip(draws, mutants, strict=True) if repr(mutant) != as_it_was)
    assert repr(base) == as_it_was
