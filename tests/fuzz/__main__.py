"""The command ``python -m tests.fuzz``: see `tests.fuzz`. Exit status 1 if anything was found."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from . import driver

SUBJECTS = ("operators", "images", "checkpoints", "datalists", "configurations", "kills")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("subject", nargs="*", default=SUBJECTS, help=f"of {', '.join(SUBJECTS)}; all by default")
    parser.add_argument("--count", type=int, default=1000, help="cases of each subject")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to repeat a finding")
    parser.add_argument("--keep", type=Path, help="folder in which to keep the files of findings")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = 0
        for subject in options.subject:
            report = driver.run(subject, options.count, options.seed, folder.resolve(), options.first)
            print(described(report), flush=True)
            found += len(report.findings)
    return 1 if found else 0


def described(report: driver.Report) -> str:
    """A line on what was done, and each distinct finding with the command that repeats its first case."""
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in report.outcomes.most_common())
    lines = [
        f"{report.subject}: {report.cases} cases in {report.seconds:.0f} s ({outcomes}), memory grew "
        f"{report.growth / driver.MIB:.1f} MiB, {len(report.findings)} findings"
    ]
    alike: dict[tuple[str, ...], list[driver.Finding]] = {}
    for finding in report.findings:
        alike.setdefault(finding.signature, []).append(finding)
    for group in sorted(alike.values(), key=len, reverse=True):
        finding = group[0]
        lines.append(f"\n  {len(group)} × {finding.kind}: {finding.says}")
        if finding.index is not None:
            where = f"--seed {report.seed} --first {finding.index} --count 1"
            others = ", ".join(str(other.index) for other in group[1:10])
            lines.append(f"    python -m tests.fuzz {report.subject} {where}{f'; also {others}' if others else ''}")
        lines += [f"    {line}" for line in finding.details.splitlines()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
