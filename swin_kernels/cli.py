"""The command `swin-kernels`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 where a check of the doctor failed."""
    parser = argparse.ArgumentParser(
        prog="swin-kernels", description="Fused kernels for 3D shifted-window attention.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"swin-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    doctor = commands.add_parser(
        "doctor", help="say which backends run on this machine, verify each one and time it", allow_abbrev=False
    )
    doctor.add_argument("--quick", action="store_true", help="fewer checks, shorter timing")
    options = parser.parse_args(arguments)

    from .doctor import run, show  # rich is imported only for who asks for it

    report = run(quick=options.quick)
    show(report)
    return 0 if report.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
