"""The README's tables as `benchmarks/report.py` makes them from result files. The numbers here are made up."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest

from benchmarks.verify_gpu import goals

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def report(monkeypatch, tmp_path):
    """`benchmarks/report.py`, on a separate folder of results."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "report", raising=False)
    import report

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return report


STAGE_1 = "f48 96³ stage 1 shifted"
PARTS = ("probe", "correctness", "model", "operators", "counters", "rest")


def row(part: str, measure: str, variant: str, p50: float | None = None, shape: str = STAGE_1, **other) -> dict:
    return {"part": part, "measure": measure, "shape": shape, "variant": variant, "status": "ok", "p50": p50} | other


def rows() -> list[dict]:
    found = [
        row("probe", "backend", "cuda", shape=""),
        row("correctness", "GPU tests", "ours", shape="test_on_gpu.py", value=400.0, unit="tests passed"),
        row("model", "model, inference", "ours", 10.0, "f48 96³ batch 1", ratio=1.0),
        row("model", "model, inference", "MONAI", 55.0, "f48 96³ batch 1", ratio=5.5),
        row("model", "model, inference, kernels", "ours", 2.0, "f48 96³ batch 1", kernel="attend"),
        row("counters", "counters", "ours", kernel="attend", value=60.0, unit="XU pipe, %"),
    ]
    for measure, floor in (("attention core, forward", 0.03), ("attention core, backward", 0.06)):
        for shape in (STAGE_1, "f48 128³ stage 3 shifted"):
            found.append(row("operators", measure, "ours", 0.045, shape, floor=floor, ratio=1.0))
            found.append(row("operators", measure, "Triton", 0.09, shape, floor=floor, ratio=2.0))
    found.append(row("rest", "window partition", "copy of as many bytes", 0.01, ratio=0.9))
    return found


def write(folder: Path, rows: list[dict], **about) -> None:
    names = ("driver", "torch", "cuda", "cudnn", "triton", "monai", "python")
    about = (
        dict.fromkeys(names, "1.0")
        | {"simulated": False, "device": "Some GPU", "commit": "abc", "date": "2000-01-02"}
        | about
    )
    (folder / "gpu" / "run").mkdir(parents=True)
    (folder / "gpu" / "run" / "gpu.json").write_text(json.dumps({"about": about, "rows": rows}))


def test_gpu_section(report, tmp_path):
    write(tmp_path, rows())
    text = report.measured()
    assert "**Some GPU**: driver 1.0" in text
    assert "commit abc, 2000-01-02 ([run](benchmarks/results/gpu/run/gpu.json))" in text
    assert "None of 13 rows of ours has a fault." in text
    assert f"| attention core, forward, {STAGE_1}: at most 1.6 floors | 1.50 floors | met |" in text
    assert f"| attention core, backward, {STAGE_1}: at most 2.2 floors | 0.75 floors | met |" in text
    assert f"| window partition, {STAGE_1}: at least 85% of a copy's bandwidth | 90% | met |" in text
    assert f"| {len(goals.GOALS) - 3} others | – | unmeasured |" in text
    assert "window reverse" not in text
    assert "| no slower than Triton at any stage in either direction | 4 of 4 | met |" in text
    assert "| f48 128³ stage 3 shifted, forward | 0.045 ms | 1.50 | 2.00× | – | – | – |" in text
    assert "| inference, f48 96³ batch 1 | – | – | 10.0 | – | – | – | 55.0 |" in text


def test_gpu_section_says_what_was_missed(report, tmp_path):
    found = rows()
    forward = [one for one in found if one["measure"] == "attention core, forward" and one["shape"] == STAGE_1]
    forward[0]["p50"], forward[1]["p50"], forward[1]["ratio"] = 0.1, 0.09, 0.9  # of ours and of Triton
    found[1]["status"] = "failed: 399 passed, 1 failed"
    write(tmp_path, found)
    text = report.measured()
    assert "1 of 13 rows of ours has a fault:\n- GPU tests, test_on_gpu.py, ours: failed: 399 passed, 1 failed" in text
    assert "| 3.33 floors | **missed** |" in text
    assert "| 3 of 4 | **missed** |" in text


@pytest.mark.parametrize("parts", [c for n in range(len(PARTS) + 1) for c in itertools.combinations(PARTS, n)], ids=str)
def test_gpu_section_of_any_parts(report, tmp_path, parts):
    """Whatever is missing is unmeasured."""
    write(tmp_path, [one for one in rows() if one["part"] in parts])
    text = report.measured()
    measured = 3 * ("operators" in parts) + ("rest" in parts)
    assert f"| {len(goals.GOALS) + 1 - measured} others | – | unmeasured |" in text
    assert ("Attention core" in text) == ("operators" in parts)
    assert ("Swin UNETR in bfloat16" in text) == ("model" in parts)


def test_rows_that_were_cut_are_counted(report, tmp_path):
    """Not listed: they say nothing about the kernels."""
    write(tmp_path, [*rows(), row("rest", "a", "ours", status="cut: the time of this part was over")])
    assert "None of 14 rows of ours has a fault, 1 were not done in time." in report.measured()


def test_later_rows_count(report, tmp_path):
    """A part that was repeated."""
    found = rows()
    again = next(one for one in found if one["measure"] == "attention core, forward")
    write(tmp_path, [*found, again | {"p50": 0.06}])
    assert f"| attention core, forward, {STAGE_1}: at most 1.6 floors | 2.00 floors | **missed** |" in report.measured()


def test_device_that_did_not_answer(report, tmp_path):
    write(tmp_path, [row("probe", "device", "PyTorch", status="crashed: SIGSEGV")], device=None, driver=None)
    assert "**a device that did not answer**: torch 1.0" in report.measured()


def test_simulated_run_is_no_result(report, tmp_path):
    write(tmp_path, rows(), simulated=True)
    with pytest.raises(ValueError, match="simulated"):
        report.measured()


def test_operators_are_shown_beside_pytorch(report):
    """In a separate table: they have no counterpart in MONAI."""
    result = json.loads((BENCHMARKS / "results" / "epyc-zen4-2threads-attention.json").read_text())
    of_operator = {
        "name": "layer_norm, forward + backward",
        "sizes": "24³ tokens",
        "unit": "s",
        "backend": "cpu",
        "dtype": "float32",
        "goals": {},
        "costs": {"PyTorch": {"median": 0.3}, "ours": {"median": 0.1}},
        "ratios": {"PyTorch": 3.0},
    }
    result["benchmarks"] = [*result["benchmarks"][:1], {"extra_info": of_operator}]
    text = "\n".join(report.section(result, "x.json"))
    assert "| layer_norm, forward + backward; 24³ tokens | 300.0 ms | 100.0 ms | 3.00× |" in text
    assert text.count("layer_norm") == 1
    assert "<summary>Operators</summary>" in text


def test_readme_is_up_to_date(report, monkeypatch):
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    assert report.main() == 0
