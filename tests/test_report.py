"""The README's tables: what `benchmarks/report.py` makes of result files. Numbers here are made up, and stay here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def report(monkeypatch, tmp_path):
    """`benchmarks/report.py`, on a folder of results of its own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "report", raising=False)
    import report

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return report


STAGE_1 = "f48 96³ stage 1 shifted"


def row(measure: str, variant: str, p50: float | None, shape: str = STAGE_1, **other) -> dict:
    empty = dict.fromkeys(("error", "p20", "p80", "ratio", "floor", "extra_mib"))
    return {"measure": measure, "shape": shape, "variant": variant, "status": "ok", "p50": p50} | empty | other


def rows() -> list[dict]:
    found = [row("backend", "cuda", None, ""), row("tests", "ours", None, "400 tests")]
    for measure, floor in (("attention core, forward", 0.03), ("attention core, backward", 0.06)):
        for shape in (STAGE_1, "f48 128³ stage 3 shifted"):
            found.append(row(measure, "ours", 0.045, shape, floor=floor, ratio=1.0))
            found.append(row(measure, "Triton", 0.09, shape, floor=floor, ratio=2.0))
    found.append(row("window partition", "copy of as many bytes", 0.01, ratio=0.9))
    return found


def write(folder: Path, rows: list[dict], **about) -> None:
    names = ("driver", "torch", "cuda", "cudnn", "triton", "monai", "python")
    about = (
        dict.fromkeys(names, "1.0")
        | {"dry_run": False, "device": "Some GPU", "commit": "abc", "date": "2000-01-02"}
        | about
    )
    (folder / "gpu" / "run").mkdir(parents=True)
    (folder / "gpu" / "run" / "gpu.json").write_text(json.dumps({"about": about, "rows": rows}))


def test_gpu_section(report, tmp_path):
    write(tmp_path, rows())
    text = report.measured()
    assert "**Some GPU**: driver 1.0" in text
    assert "commit abc, 2000-01-02 ([run](benchmarks/results/gpu/run/gpu.json))" in text
    assert "6 of 6 checks" in text
    assert f"| attention core, forward, {STAGE_1}: at most 1.6 floors | 1.50 floors | met |" in text
    assert f"| attention core, backward, {STAGE_1}: at most 2.2 floors | 0.75 floors | met |" in text
    assert f"| window partition, {STAGE_1}: at least 85% of a copy's bandwidth | 90% | met |" in text
    assert f"| window reverse, {STAGE_1}: at least 85% of a copy's bandwidth | – | unmeasured |" in text
    assert "| faster than Triton on every stage in both directions | 4 of 4 | met |" in text
    assert "| f48 128³ stage 3 shifted, forward | 0.045 ms | 1.50 | 2.00× | – | – | – |" in text


def test_gpu_section_says_what_was_missed(report, tmp_path):
    found = rows()
    found[2]["p50"], found[3]["p50"] = 0.1, 0.09  # the forward of ours and of Triton
    found[1]["status"] = "failed: exit status 1"
    write(tmp_path, found)
    text = report.measured()
    assert (
        "5 of 6 checks against float64, tests and sanitizers passed:\n- tests 400 tests: failed: exit status 1" in text
    )
    assert "| 3.33 floors | **missed** |" in text
    assert "| 3 of 4 | **missed** |" in text


def test_gpu_section_without_times(report, tmp_path):
    """What a run of the tests alone leaves."""
    write(tmp_path, rows()[:2])
    text = report.measured()
    assert text.count("unmeasured") == 5
    assert "<details>" not in text


def test_dry_run_is_no_result(report, tmp_path):
    write(tmp_path, rows(), dry_run=True)
    with pytest.raises(ValueError, match="dry run"):
        report.measured()


def test_readme_is_up_to_date(report, monkeypatch):
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    assert report.main() == 0
