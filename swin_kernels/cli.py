"""The command `swin-kernels`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 where a check of the doctor or a block of the warm-up failed."""
    parser = argparse.ArgumentParser(
        prog="swin-kernels", description="Fused kernels for 3D shifted-window attention.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"swin-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    doctor = commands.add_parser(
        "doctor", help="say which backends run on this machine, verify each one and time it", allow_abbrev=False
    )
    doctor.add_argument("--quick", action="store_true", help="fewer checks, shorter timing")
    warmup = commands.add_parser(
        "warmup",
        help="compile and load all kernels of a Swin UNETR, in parallel, before its first step",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    warmup.add_argument(
        "--image",
        type=int,
        nargs="+",
        default=(96, 96, 96),
        metavar="N",
        help="voxels along each axis of the model's input",
    )
    warmup.add_argument("--feature-size", type=int, default=48, metavar="N", help="channels of the first stage")
    warmup.add_argument("--window", type=int, default=7, metavar="N", help="window along every axis, in tokens")
    warmup.add_argument("--batch", type=int, default=1, metavar="N", help="volumes in a batch")
    warmup.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="dtype of the computation"
    )
    warmup.add_argument("--inference", action="store_true", help="without gradients")
    warmup.add_argument(
        "--device", choices=("cuda", "cpu"), help="where the model runs; by default cuda if there is a device"
    )
    warmup.add_argument(
        "--jobs", type=int, metavar="N", help="processes at a time; by default one per core, at most 16"
    )
    options = parser.parse_args(arguments)
    if options.command == "warmup":
        return _warm_up(options, warmup)

    from .doctor import run, show  # rich is imported only when it is needed

    report = run(quick=options.quick)
    show(report)
    return 0 if report.passed else 1


def _warm_up(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    import torch

    from . import warmup

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: got cuda, but there is no CUDA device; accepted is cpu")
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"argument --jobs: got {options.jobs}; accepted is at least 1")
    try:
        pieces = warmup.pieces_of(
            options.image, options.feature_size, options.window, options.batch, options.dtype, not options.inference
        )
    except ValueError as error:
        parser.error(f"argument --{error}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return 0 if warmup.show(warmup.warm_up(pieces, device, options.jobs), len(pieces)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
