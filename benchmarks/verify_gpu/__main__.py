"""Test the GPU kernels on this machine, time them, and try other cuts: ``python -m benchmarks.verify_gpu OUT``.

Needs PyTorch, Triton, NumPy, pytest, pytest-xdist, pytest-timeout and hypothesis, and no network. The
CUDA library is the one that was built beside the package, here or on a machine without a GPU. There are rows of MONAI
if it can be imported, and of sanitizers and counters if compute-sanitizer and ncu are found. docs/cuda.md says what
to send back. Exit status 0 means that everything ran and was correct, 1 that something was wrong or not done in time,
2 that it could not begin.
"""

from __future__ import annotations

import argparse
import gc
import importlib.abc
import importlib.machinery
import math
import os
import signal
import sys
import time
from pathlib import Path

from . import plan, tasks

BEGAN = time.monotonic()
"""The start of a run: what is imported above takes no time, PyTorch is imported by `main`."""


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    summary = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.verify_gpu",
        description=summary[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="parts:\n" + "\n".join(f"  {part.name:12} {part.seconds:3} s  {part.what}" for part in plan.PARTS),
        allow_abbrev=False,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the result; adds to an earlier one in it")
    parser.add_argument("--budget", type=float, default=plan.BUDGET, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument(
        "--part",
        choices=plan.NAMES,
        action="append",
        help="run this part alone, within the whole budget; may be repeated (default: all)",
    )
    parser.add_argument("--commit", help="commit of these sources, if git cannot tell")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and what starting processes costs here; run nothing"
    )
    parser.add_argument(
        "--silence",
        type=float,
        default=tasks.SILENCE,
        metavar="SECONDS",
        help="of silence after which a child counts as hung (default: %(default)s)",
    )
    parser.add_argument(
        "--simulated",
        action="store_true",
        help="the CPU in place of a GPU, tiny shapes, made-up times: to test this tool",
    )
    parser.add_argument(
        "--test-limit", type=float, default=60.0, metavar="SECONDS", help="of one GPU test (default: %(default)s)"
    )
    parser.add_argument("--tests", default=None, metavar="PATH", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    least = 2 * plan.ENDING
    if not least <= given.budget < math.inf:
        parser.error(f"--budget: got {given.budget:g}; accepted are {least:g} seconds and more")
    if not 0 < given.silence < math.inf:
        parser.error(f"--silence: got {given.silence:g}; accepted are positive seconds")
    return given


class WithoutCuPy(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes importing CuPy fail. Asking whether it exists does not fail: not all callers expect an error from that."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name == "cupy" else None

    def exec_module(self, module: object) -> None:
        raise ModuleNotFoundError("cupy is kept out of this process", name="cupy")


def interrupted(number: int, frame: object) -> None:
    for again in (signal.SIGTERM, signal.SIGINT):  # once is enough: what is left is ended and written
        signal.signal(again, signal.SIG_IGN)
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    for name in ("stdout", "stderr"):  # either may be closed, or limited to ASCII
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process
        getattr(sys, name).reconfigure(errors="backslashreplace")
    given = arguments_of()
    if given.out.exists() and not given.out.is_dir():
        print(f"verify_gpu: OUT: {given.out} is a file; accepted is a folder", file=sys.stderr)
        return 2
    # Children are copies of this process, and CUDA does not survive being copied: nothing here may touch it. So PyTorch
    # asks the driver's management library whether there is a GPU, and CuPy, which MONAI imports, is kept out.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    sys.meta_path.insert(0, WithoutCuPy())
    from . import run

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupted)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a lost connection does not end a run: its budget does
    try:
        return run.run(given, BEGAN)
    except ValueError as error:
        print(f"verify_gpu: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"verify_gpu: stopped by {error} before it began", file=sys.stderr)
        return 1


if __name__ == "__main__":
    status = main()
    gc.freeze()  # otherwise, on a busy machine, Python takes seconds at exit to free what the system frees at once
    sys.exit(status)
