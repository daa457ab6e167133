"""Counters and findings as read from what ncu and compute-sanitizer print. The numbers here are made up."""

from __future__ import annotations

import csv
import io
import re
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.verify_gpu import counters

SIGNATURE = "void swin::<unnamed>::attend<__half, (int)16>(swin::<unnamed>::Call)"
STALLS = {
    "long_scoreboard": "2.5",
    "barrier": "0.75",
    "wait": "1.5",
    "math_pipe_throttle": "0.5",
    "short_scoreboard": "0.25",
    "selected": "1.0",
    "drain": "0.01",
    "gmma": "",
}


def table(launches: list[tuple[str, dict[str, str]]], units: dict[str, str] | None = None) -> str:
    """ncu's CSV of page "raw": all quoted, a row of units below the header."""
    units = {"gpu__time_duration.sum": "nsecond", "smsp__cycles_elapsed.avg.per_second": "cycle/second"} | (units or {})
    fixed = ["ID", "Process ID", "Process Name", "Kernel Name", "Block Size", "Grid Size", "Device", "CC"]
    metrics = list(dict.fromkeys(name for _, values in launches for name in values))
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(fixed + metrics)
    writer.writerow([""] * len(fixed) + [units.get(name, "%") for name in metrics])
    for i, (kernel, values) in enumerate(launches):
        start = [str(i), "4711", "python3.12", kernel, "(256, 1, 1)", "(132, 1, 1)", "0", "9.0"]
        writer.writerow(start + [values.get(name, "") for name in metrics])
    return out.getvalue()


def measured(**changes: str) -> dict[str, str]:
    values = {metric: str(i + 0.5) for i, metric in enumerate(counters.METRICS.values())}
    stalls = {f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio": n for name, n in STALLS.items()}
    return values | stalls | {counters.METRICS[label]: text for label, text in changes.items()}


def test_read_all():
    [launch] = counters.read(table([("attend", measured())]))
    assert launch["kernel"] == "attend"
    assert list(launch["values"])[: len(counters.METRICS)] == list(counters.METRICS)
    assert launch["values"]["time, ns"] == 0.5
    stalls = [(label, n) for label, n in launch["values"].items() if label.startswith(counters.STALL)]
    assert stalls == [
        ("stall: long scoreboard", 2.5),
        ("stall: wait", 1.5),
        ("stall: barrier", 0.75),
        ("stall: math pipe throttle", 0.5),
        ("stall: short scoreboard", 0.25),
    ]


def test_read_past_noise():
    noise = (
        "==PROF== Connected to process 4711 (/usr/bin/python3.12)\n"
        'loading\n"a quoted line", of the program\n"and one not closed\n'
        '==PROF== Profiling "attend" - 0: 0%....50%....100% - 23 passes\n'
    )
    text = (
        noise + table([("attend", measured()), (SIGNATURE, measured())]) + "==PROF== Disconnected from process 4711\n"
    )
    assert [launch["kernel"] for launch in counters.read(text)] == ["attend", "attend"]


@pytest.mark.parametrize("missing", ["", "n/a", "nan", "no data", "inf"])
def test_read_leaves_out_what_is_missing(missing):
    [launch] = counters.read(table([("attend", measured(**{"tensor pipe, %": missing}))]))
    assert "tensor pipe, %" not in launch["values"]
    assert set(counters.METRICS) - set(launch["values"]) == {"tensor pipe, %"}


def test_read_zero_and_thousands():
    values = measured(**{"shared memory bank conflicts": "0", "time, ns": "1,420,832"})
    [launch] = counters.read(table([("attend", values)]))
    assert launch["values"]["shared memory bank conflicts"] == 0
    assert launch["values"]["time, ns"] == 1420832


@pytest.mark.parametrize(("unit", "time"), [("ns", 2.5), ("msecond", 2.5e6), ("fortnight", None)])
def test_read_units(unit, time):
    text = table([("attend", measured(**{"time, ns": "2.5"}))], {"gpu__time_duration.sum": unit})
    assert counters.read(text)[0]["values"].get("time, ns") == time


def test_read_stand_in():
    values = measured()
    del values[counters.METRICS["SM clock, Hz"]]
    text = table(
        [("attend", values | {"gpc__cycles_elapsed.avg.per_second": "1.5"})],
        {"gpc__cycles_elapsed.avg.per_second": "ghz"},
    )
    assert counters.read(text)[0]["values"]["SM clock, Hz"] == 1.5e9


def test_read_nothing():
    text = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n==WARNING== No kernels were profiled.\n"
    with pytest.raises(ValueError, match=r"no table of metrics.*ERR_NVGPUCTRPERM.*No kernels were profiled"):
        counters.read(text)
    with pytest.raises(ValueError, match=r"no table of metrics$"):
        counters.read("")
    with pytest.raises(ValueError, match="a table without launches"):
        counters.read("\n".join(table([("attend", measured())]).splitlines()[:2]))


def test_command():
    child = ["python", "-c", "pass"]
    line = counters.command("/opt/ncu", child, Path("/tmp/log.csv"), 4)
    assert line[0] == "/opt/ncu"
    assert line[-3:] == child
    option = dict(pairwise(line))
    assert option["--clock-control"] == "none"
    assert option["--launch-count"] == "4"
    assert option["--log-file"] == "/tmp/log.csv"
    pattern = re.compile(option["--kernel-name"].removeprefix("regex:"))
    for name in ("attend", "attend_float", "differentiate_qkv", "differentiate_bias"):
        assert pattern.search(name)
    for name in ("prepare_bias", "find_tokens", "flash_attend_fwd"):
        assert not pattern.search(name)
    # A metric or section by its plain name that ncu does not know would lose the run.
    assert all(name.startswith("regex:^") for name in option["--metrics"].split(","))
    assert option["--section"].startswith("regex:^")


@pytest.mark.parametrize(
    ("signature", "bare", "full"),
    [
        ("attend", "attend", "attend"),
        (SIGNATURE, "attend", "attend<__half, 16>"),
        ("void (anonymous namespace)::reduce<32, true>(int *)", "reduce", "reduce<32, true>"),
        ("swin::sum_planes(const float *, int)", "sum_planes", "sum_planes"),
        ("[clone kernel(int *)] swin::inner(int *)", "inner", "inner"),
    ],
)
def test_short_name(signature, bare, full):
    assert counters.short_name(signature) == bare
    assert counters.short_name(signature, templates=True) == full


@pytest.mark.parametrize("check", counters.CHECKS)
def test_sanitizer_command(check):
    line = counters.sanitizer_command("/opt/compute-sanitizer", check, ["python", "x.py"])
    assert line[0] == "/opt/compute-sanitizer"
    assert line[-2:] == ["python", "x.py"]
    option = dict(pairwise(line))
    assert option["--tool"] == check
    # initcheck does not see what kernels that are left out write.
    assert option.get("--kernel-name") == (None if check == "initcheck" else "kns=4swin")


def test_sanitizer_command_unknown():
    with pytest.raises(ValueError, match="no check 'leaks'; there are memcheck"):
        counters.sanitizer_command("compute-sanitizer", "leaks", [])


def log(*blocks: str) -> str:
    """A log of blocks, each line with compute-sanitizer's prefix."""
    lines = "\n\n".join(("COMPUTE-SANITIZER", *blocks)).splitlines()
    return "\n".join(f"========= {line}" if line else "=========" for line in lines) + "\n"


def invalid(thread: int, offset: str = "0x1a0") -> str:
    return (
        f"Invalid __global__ read of size 4 bytes\n    at {SIGNATURE}+{offset} in /src/window_attention_forward.cu:61\n"
        f"    by thread ({thread},0,0) in block (0,0,0)\n    Address 0x7f{thread:04x}00 is out of bounds\n"
        "    and is 1 bytes after the nearest allocation at 0x7f00 of size 1,024 bytes"
    )


def test_findings_of_memcheck():
    text = "output of the program\n" + log(
        invalid(0), invalid(1), invalid(0, "0x2b0"), "57 errors were not printed. Use --print-limit option to adjust",
        "ERROR SUMMARY: 60 errors",
    )  # fmt: skip
    where = "Invalid __global__ read of size 4 bytes at attend<__half, 16>+{} (window_attention_forward.cu:61)"
    assert counters.sanitizer_findings(text) == [
        where.format("0x1a0") + ", out of bounds",
        where.format("0x2b0") + ", out of bounds",
        "60 errors in all",
    ]


def test_findings_name_the_kernel_of_a_function():
    text = log(
        "Invalid __shared__ write of size 16 bytes\n    at swin::store(int *)+0xb0\n"
        "    by thread (0,0,0) in block (0,0,0)\n"
        f"    Address 0x401 is misaligned\n    Device Frame: {SIGNATURE}+0x30",
        "ERROR SUMMARY: 1 error",
    )
    assert counters.sanitizer_findings(text) == [
        "Invalid __shared__ write of size 16 bytes at store+0xb0 called by attend<__half, 16>+0x30, misaligned",
        "1 error in all",
    ]


def test_findings_of_racecheck():
    text = log(
        "Error: Race reported between Write access at differentiate_bias(int *)+0x90\n"
        "    and Read access at differentiate_bias(int *)+0x100 [508 hazards]",
        "Warning: Potential WAW hazard detected at __shared__ 0x8c in block (0,0,0) :\n"
        "    Write Thread (35,0,0) at attend()+0x10\n    Write Thread (32,0,0) at attend()+0x20\n"
        "    Current Value : 35",
        "RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)",
    )
    assert counters.sanitizer_findings(text) == [
        "Race reported between Write access at differentiate_bias+0x90 and Read access at differentiate_bias+0x100",
        "Warning: Potential WAW hazard detected Write Thread at attend+0x10 Write Thread at attend+0x20",
        "2 hazards in all",
    ]


def test_findings_of_other_checks():
    text = log(
        "Uninitialized __global__ memory read of size 4 bytes\n    at attend(int *)+0x70\n"
        "    by thread (31,0,0) in block (1,0,0)\n    Address 0x7f3c7ec000fc",
        "Barrier error detected. Divergent thread(s) in warp\n    at attend(int *)+0xf0\n"
        "    by thread (37,0,0) in block (0,0,0)",
        'Program hit cudaErrorLaunchFailure (error 719) due to "launch failure" on CUDA API call to cudaFree.',
        "ERROR SUMMARY: 3 errors",
    )
    assert counters.sanitizer_findings(text) == [
        "Uninitialized __global__ memory read of size 4 bytes at attend+0x70",
        "Barrier error detected. Divergent thread(s) in warp at attend+0xf0",
        'Program hit cudaErrorLaunchFailure (error 719) due to "launch failure" on CUDA API call to cudaFree.',
        "3 errors in all",
    ]


def test_findings_at_most_ten():
    text = log(*(invalid(0, hex(16 * i)) for i in range(1, 14)), "ERROR SUMMARY: 13 errors")
    findings = counters.sanitizer_findings(text)
    assert len(findings) == 11
    assert findings[-1] == "13 errors in all, 13 of them distinct"


@pytest.mark.parametrize(
    "summary", ["ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"]
)
def test_findings_of_a_clean_run(summary):
    assert counters.sanitizer_findings(log(summary)) == []


def test_findings_of_a_check_that_did_not_start():
    """compute-sanitizer's exit code may then be 0; the missing summary tells."""
    text = log("Error: Target application terminated before first instrumented API call")
    assert counters.sanitizer_findings(text) == [
        "Target application terminated before first instrumented API call",
        "no summary: the check did not start, or was cut short",
    ]
    assert len(counters.sanitizer_findings("")) == 1
