"""The command `swin-unetr`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name); returns the exit status."""
    parser = argparse.ArgumentParser(prog="swin-unetr", description="Swin UNETR on fused kernels.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("\nswin-unetr: interrupted", file=sys.stderr)
        return 130


def _add_demo(commands) -> None:
    description = (
        "Train a small Swin UNETR on one chest CT, segment another patient's, and time it beside MONAI's: "
        "about 5 minutes on 2 cores."
    )
    parser = commands.add_parser("demo", help="train and segment two chest CTs", description=description)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo_output"),
        metavar="DIR",
        help="folder for the results; files of an earlier demo in it are overwritten (default: %(default)s)",
    )
    parser.add_argument("--steps", type=_positive, metavar="N", help="training steps (default: the recipe's)")
    parser.add_argument("--seed", type=_natural, default=0, metavar="N", help="random seed (default: %(default)s)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--backend", metavar="NAME", help="force a backend of swin_kernels (default: the fastest here)")
    parser.set_defaults(run=lambda args: _demo(args, parser))


def _demo(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    # The imports take seconds; --help and a wrong argument should not.
    import dataclasses

    from . import demo

    recipe = demo.Recipe() if args.steps is None else dataclasses.replace(demo.Recipe(), steps=args.steps)
    device = _device(args.device, parser) if args.device else demo.default_device()
    try:
        demo.check_writable(args.out)
    except OSError as error:
        parser.error(f"argument --out: cannot write to {str(args.out)!r}: {error.strerror or error}")
    try:
        demo.choose_backend(recipe, device, args.backend)
    except ValueError as error:
        parser.error(f"argument --backend: {error}")
    results = demo.run(args.out, recipe=recipe, seed=args.seed, device=device, backend=args.backend)
    return 0 if results["doctor_passed"] else 1


def _device(text: str, parser: argparse.ArgumentParser):
    import torch

    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        parser.error(f"argument --device: cannot use {text!r}: {str(error).splitlines()[0]}")
    return device


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted is an integer of at least 1")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted is an integer from 0 to 2**32 - 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
