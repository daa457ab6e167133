"""Hardware counters of our kernels from Nsight Compute (`ncu`), and what `compute-sanitizer` finds in them.

Command lines around a child command, and readers of what the two tools print. Nothing here starts a process.
"""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

METRICS = {
    "time, ns": "gpu__time_duration.sum",
    "SM clock, Hz": "smsp__cycles_elapsed.avg.per_second",
    "registers per thread": "launch__registers_per_thread",
    "theoretical occupancy, %": "sm__maximum_warps_per_active_cycle_pct",
    "achieved occupancy, %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "issue slots, %": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "tensor pipe, %": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "FMA pipe, %": "sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_active",
    "ALU pipe, %": "sm__pipe_alu_cycles_active.avg.pct_of_peak_sustained_active",
    "XU pipe, %": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "LSU pipe, %": "sm__inst_executed_pipe_lsu.avg.pct_of_peak_sustained_active",
    "shared memory, %": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum.pct_of_peak_sustained_elapsed",
    "shared memory wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "shared memory bank conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "L2, %": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "DRAM, %": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
}
"""What `read` looks for, by the label shown. Pipes are in % of the SM's active cycles, memories of all cycles."""

_STAND_INS = {
    "smsp__cycles_elapsed.avg.per_second": ("sm__cycles_elapsed.avg.per_second", "gpc__cycles_elapsed.avg.per_second"),
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": ("dram__throughput.avg.pct_of_peak_sustained_elapsed",),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": (
        "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
    ),
}
"""Equivalent metrics for where a version of ncu or a GPU lacks one."""

_UNITS = {
    "time, ns": {"ns": 1, "nsecond": 1, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9, "second": 1e9},
    "SM clock, Hz": {
        **{"hz": 1, "khz": 1e3, "mhz": 1e6, "ghz": 1e9},
        **{"cycle/second": 1, "cycle/msecond": 1e3, "cycle/usecond": 1e6, "cycle/nsecond": 1e9},
    },
}
"""Units that ncu scales, as its versions name them. It is told not to, but a wrong power of ten would go unnoticed."""

_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
STALL = "stall: "
"""How labels of stall reasons begin. Values are the warps of a scheduler that wait for this reason as one issues."""

KERNELS = ("attend", "differentiate_qkv", "differentiate_bias")

_SECTIONS = (
    "SpeedOfLight",
    "Occupancy",
    "LaunchStats",
    "WarpStateStats",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis_Tables",
)
_BESIDE_SECTIONS = ("smsp__cycles_elapsed.avg.per_second",)


def command(ncu: str, child: list[str], log: Path, launches: int) -> list[str]:
    """The command that profiles the first `launches` launches of our attention kernels in `child`.

    What it measures is written to `log`, for `read`. The child's own output stays on its stdout.
    """
    # Asking for a metric by its full name that a GPU does not have is an error that loses the launch; in a section it
    # is only a warning. So metrics come from sections, and from a regex, which may well match nothing. All sections
    # come from one regex, too: asking by its full name for one that does not exist ends the run before it starts.
    sections = "regex:^(" + "|".join(_SECTIONS) + ")$"
    metrics = ",".join(f"regex:^{re.escape(name)}$" for name in _BESIDE_SECTIONS)
    return [
        ncu,
        *("--target-processes", "all"),
        *("--replay-mode", "kernel"),
        *("--clock-control", "none"),  # by default it locks clocks to their base, which is not ours to change
        *("--cache-control", "all"),  # every pass starts with empty caches, so passes agree with each other
        *("--kernel-name-base", "function"),
        *("--kernel-name", "regex:^(" + "|".join(KERNELS) + ")(_float)?$"),
        *("--launch-count", str(launches)),
        *("--section", sections),
        *("--metrics", metrics),
        *("--apply-rules", "no"),
        "--csv",
        *("--page", "raw"),
        *("--print-units", "base"),
        *("--print-kernel-base", "function"),
        *("--log-file", str(log)),
        *child,
    ]


def read(csv_text: str) -> list[dict]:
    """Counters of each profiled launch, in order: ``{"kernel": "attend", "values": {label: number}}``.

    Labels are those of `METRICS`, then the five largest reasons for which warps waited, largest first. What was not
    measured is left out.

    Raises:
        ValueError: there is no table, or no launch in it.
    """
    header, units, launches = None, {}, []
    # Rows of the table are quoted throughout; other output, from ncu or the program, seldom is, and is not such a row.
    # Line by line, so that a stray quotation mark does not swallow what follows.
    for row in (next(csv.reader([line])) for line in csv_text.splitlines() if line.startswith('"')):
        if row[0] == "ID" and "Kernel Name" in row:
            header = row
        elif header and len(row) == len(header) and not row[0]:
            units = dict(zip(header, row, strict=True))
        elif header and len(row) == len(header) and row[0].isdigit():
            launches.append(dict(zip(header, row, strict=True)))
    if not launches:
        said = [line.strip() for line in csv_text.splitlines() if re.match(r"\s*==(ERROR|WARNING)==", line)]
        what = "a table without launches" if header else "no table of metrics"
        raise ValueError(f"ncu left {what}" + (": " + " ".join(said[:3]) if said else ""))
    return [{"kernel": short_name(launch["Kernel Name"]), "values": _values(launch, units)} for launch in launches]


def _values(launch: dict[str, str], units: dict[str, str]) -> dict[str, float]:
    values = {}
    for label, metric in METRICS.items():
        for name in (metric, *_STAND_INS.get(metric, ())):
            number = _number(launch.get(name))
            factor = _UNITS[label].get(units.get(name, "").lower()) if label in _UNITS else 1
            if number is not None and factor is not None:
                values[label] = number * factor
                break
    stalls = {}
    for name, text in launch.items():
        # "selected" is the warp that issues: the only state that is not a wait.
        if (match := _STALL.fullmatch(name)) and match[1] != "selected" and (number := _number(text)):
            stalls[STALL + match[1].replace("_", " ")] = number
    return values | dict(sorted(stalls.items(), key=lambda stall: -stall[1])[:5])


def _number(text: str | None) -> float | None:
    """The number in a cell; None where the cell is absent, empty, "n/a", "nan" or the like."""
    try:
        number = float((text or "").replace(",", ""))  # some locales have thousands separated
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def short_name(signature: str, *, templates: bool = False) -> str:
    """The bare name of a function from its demangled signature, with its template's arguments if `templates`.

    ``void swin::<unnamed>::attend<__half, (int)16>(swin::Call)`` is ``attend``, or ``attend<__half, 16>``.
    """
    text = re.sub(r"\[clone [^]]*\] ", "", signature.strip())
    text = re.sub(r"(<unnamed>|\(anonymous namespace\)|_GLOBAL__N_\w+|_NV_ANON_NAMESPACE)::", "", text)
    text = re.sub(r"\((int|unsigned int|bool|long|unsigned long)\)(?=-?\d)", "", text)
    depth, start, stop, end = 0, 0, None, len(text)  # the name is text[start:stop], its template's arguments up to end
    for i, c in enumerate(text):
        if depth == 0 and c == "(":
            end = i
            break
        if c == "<":
            stop = i if depth == 0 else stop
            depth += 1
        elif c == ">":
            depth -= 1
        elif depth == 0 and c in " :*&":  # what came before was a type or a namespace
            start, stop = i + 1, None
    return text[start : end if templates or stop is None else stop] or signature


CHECKS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER_ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
"""For the child of `sanitizer_command`. PyTorch's allocator cuts tensors from blocks it keeps: an access beyond a
tensor is then inside some block, and memory that an earlier tensor wrote counts as written. Without it, the checks
see each tensor as a separate allocation."""
ERROR_EXIT_CODE = 99
_OURS = "4swin"
"""Part of the mangled name of all that is in namespace swin."""


def sanitizer_command(tool: str, check: str, child: list[str]) -> list[str]:
    """The command that runs `child` under one of `CHECKS`. Its output is mixed into the child's, for
    `sanitizer_findings`, and it exits with `ERROR_EXIT_CODE` if it found something in a child that did not itself
    fail. Only its output tells whether it checked anything: other exit codes may also mean that no check took place.

    Raises:
        ValueError: there is no such check.
    """
    if check not in CHECKS:
        raise ValueError(f"no check {check!r}; there are {', '.join(CHECKS)}")
    options = {
        # Errors of CUDA API calls that PyTorch makes on purpose and handles do not concern our kernels.
        "memcheck": ["--report-api-errors", "no"],
        # Neither do copies of partly written memory, as of a padded tensor.
        "initcheck": ["--check-api-memory-access", "no"],
    }.get(check, [])
    # initcheck must see all kernels: what is written by kernels left out counts as never written
    # (versions before 2026.4).
    if check != "initcheck":
        options += ["--kernel-name", f"kns={_OURS}"]
    return [
        tool,
        *("--tool", check),
        *options,
        *("--target-processes", "all"),
        *("--launch-timeout", "300"),  # s; the default of 10 to 60 is short for a cold start of Python
        *("--show-backtrace", "device"),  # host frames are Python's interpreter's, and slow to get
        *("--demangle", "full"),
        *("--print-limit", "100"),
        *("--error-exitcode", str(ERROR_EXIT_CODE)),
        *child,
    ]


_NO_FINDING = re.compile(r"$|COMPUTE-SANITIZER|\w+ SUMMARY:|\d+ errors? (was|were) not printed")
_VARIES = re.compile(
    r",? (starting at|in block|(?<=Thread )|by thread) ?\(\d+,\d+,\d+\)|,? \(active mask: \w+\)|, barrier address: \w+"
    r"| at (__\w+__ )?0x[0-9a-f]+| \[\d+ hazards?\]| :$|^(Error|ERROR): "
)
"""What differs between reports of one error, or says nothing."""
_PLACE = re.compile(
    r"(?P<what>\bat|Device Frame:) ?(?P<function>\S.*?)\+(?P<offset>0x[0-9a-f]+)(?: in (?P<source>\S+))?"
)


def sanitizer_findings(text: str) -> list[str]:
    """A line for each distinct error in the output of `sanitizer_command`, ten at most, and a last one with how many
    there were; empty if the check ended without error. An output without a summary ends with a line that says so.
    """
    lines = [match[1] or "" for match in re.finditer(r"^ ?={9}(?: (.*))?$", text, re.MULTILINE)]
    reports: list[list[str]] = []
    for line in lines:
        if not line.startswith("   "):
            reports.append([line.strip()])
        elif reports:  # details of the report above are indented
            reports[-1].append(line.strip())
    findings = list(dict.fromkeys(_finding(*report) for report in reports if not _NO_FINDING.match(report[0])))
    # racecheck has a different summary, of hazards, which are errors or warnings.
    summary = re.compile(r"\w+ SUMMARY: (\d+) (error|hazard)")
    summaries = [(int(match[1]), match[2]) for match in map(summary.match, lines) if match]
    if not summaries:
        return [*findings[:10], "no summary: the check did not start, or was cut short"]
    number = sum(n for n, _ in summaries)
    if not findings and not number:
        return []
    total = f"{number} {summaries[0][1]}{'s' * (number != 1)} in all"
    return [*findings[:10], total + (f", {len(findings)} of them distinct" if len(findings) > 10 else "")]


def _finding(title: str, *details: str) -> str:
    """One line for a report, from its title and the lines below it."""
    details_with_place = [line for line in details if _PLACE.search(line)]
    frames = [line for line in details_with_place if line.startswith("Device Frame:")]
    places = [line for line in details_with_place if line not in frames]
    # The last frame is the kernel; those before it are functions it called.
    line = " ".join(_PLACE.sub(_place, _VARIES.sub("", part)) for part in (title, *places, *frames[-1:]))
    reason = next((match[1] for match in map(re.compile(r"Address 0x\w+ is (.*)").match, details) if match), None)
    return line + (f", {reason}" if reason else "")


def _place(match: re.Match) -> str:
    source = f" ({Path(match['source']).name})" if match["source"] else ""
    what = "at" if match["what"] == "at" else "called by"
    return f"{what} {short_name(match['function'], templates=True)}+{match['offset']}{source}"
