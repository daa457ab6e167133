"""The command `swin-unetr`: each command is a module of this package with `run` and a dataclass of options.

Exit status: 0 done; 1 done, but something failed that the output names; 2 bad options or input; 75 interrupted by
SIGTERM, SIGUSR1 or SIGHUP, to be restarted; 130 interrupted from the keyboard. A training has saved by then.
"""

from __future__ import annotations

import importlib
import re
import signal
import sys
from collections.abc import Collection, Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path

from . import command_line, interruption, terminal

COMMANDS = {
    "pretrain": "train the encoder on volumes without labels",
    "train": "train or fine-tune a segmentation network",
    "predict": "segment images, with volumes of the organs and a report",
    "evaluate": "score label maps against labels, and compare two runs",
    "export": "write a trained network for other runtimes, or as a MONAI bundle",
    "demo": "pretrain, train and predict on two chest CTs, and time it beside MONAI",
}
PRESETS = resources.files("swin_unetr") / "presets"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name); returns the exit status."""
    with terminal.lasting(), interruption.raising():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    command, *rest = argv
    if command not in COMMANDS:
        print(f"swin-unetr: no command {command!r}; accepted are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    # What a command needs takes seconds to import; listing the commands should not.
    with interruption.exiting():
        module = importlib.import_module(f"swin_unetr.{command}")
    try:
        return module.run(parse(options_of(command), command, rest))
    # The user's input was wrong, and the message says how: a traceback would not help.
    except (ValueError, OSError) as error:
        print(f"swin-unetr {command}: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _is_of_memory(error):
            raise
        reason = str(error).strip() or type(error).__name__
        print(
            f"swin-unetr {command}: out of memory ({reason.splitlines()[0]}); smaller roi, batches, windows or "
            "architecture take less",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as error:
        print(f"\nswin-unetr {command}: {str(error) or 'interrupted'}", file=sys.stderr)
        return interruption.status(getattr(error, "number", signal.SIGINT))


def options_of(command: str) -> type:
    """The dataclass of a command's options, named after it: `TrainOptions` for "train"."""
    return getattr(importlib.import_module(f"swin_unetr.{command}"), f"{command.capitalize()}Options")


def parse(kind: type, command: str, argv: Sequence[str]):
    """`kind`, a dataclass of options, from `argv` and the YAML files named there; what comes last counts.

    Raises:
        ValueError: an option is unknown, its value not accepted, or one of several values is in `argv` twice.
    """
    parser = command_line.Parser(
        kind, prog=f"swin-unetr {command}", description=_summary(kind), print_config="--print_config"
    )
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file with any of these options")
    if offered := presets(kind):
        # Listed here for --help; `_expand` has made a --config of it.
        parser.add_argument(
            "--preset", metavar="NAME", help=f"options that come with the package: {', '.join(offered)}"
        )
    parser.add_class_arguments(kind, fail_untyped=True)
    words = parser.typed(_expand(argv, command, offered))
    try:
        parsed = parser.parse_args(words)
    except RecursionError as error:
        raise ValueError("config: a file holds itself, or is nested too deep; accepted are options by name") from error
    return command_line.made(kind, parsed)


def presets(kind: type | None = None) -> list[str]:
    """Names of the YAML files that ship with the package, as ``--preset`` takes them.

    Args:
        kind: a command's options: those for that command.
    """
    root = Path(str(PRESETS))
    paths = {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}
    if kind is None:
        return list(paths)
    options = {field.name for field in fields(kind)}
    return [name for name, path in paths.items() if _sections(path) <= options]


def _sections(preset: Path) -> set[str]:
    """The options and groups of options that a preset sets."""
    return set(re.findall(r"^(\w+):", preset.read_text(encoding="utf-8"), re.MULTILINE))


def _expand(argv: Sequence[str], command: str, offered: Collection[str]) -> list[str]:
    """`argv` with each ``--preset NAME`` as ``--config FILE``.

    Raises:
        ValueError: the command is offered no such preset.
    """
    expanded: list[str] = []
    words = iter(argv)
    for word in words:
        if word != "--preset" and not word.startswith("--preset="):
            expanded.append(word)
            continue
        name = word.partition("=")[2] if "=" in word else next(words, "")
        if not offered:
            raise ValueError(f"preset is {name!r}; {command} has none: presets are for train and pretrain")
        if name not in offered:
            raise ValueError(f"preset is {name!r}; accepted by {command} are {', '.join(offered)}")
        expanded += ["--config", str(PRESETS / f"{name}.yaml")]
    return expanded


def _is_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether memory ran out, for which PyTorch has no exception type on a CPU."""
    return isinstance(error, MemoryError) or any(
        text in str(error) for text in ("can't allocate memory", "not enough memory", "out of memory")
    )


def _summary(kind: type) -> str:
    """The docstring of `kind` up to its arguments, which the parser describes one by one."""
    return (kind.__doc__ or "").partition("Args:")[0].strip()


def _help() -> str:
    lines = ["usage: swin-unetr COMMAND ...", "", "Swin UNETR on fused kernels.", ""]
    lines += [f"  {name:<10}{what}" for name, what in COMMANDS.items()]
    lines += ["", "swin-unetr COMMAND --help lists the options; --config FILE.yaml and --preset NAME set many at once."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
