"""The command `swin-unetr`: each command is a module of this package with `Options`, a dataclass, and `run`.

Exit status: 0 done; 1 done, but something failed that the output names; 2 bad options or input; 75 interrupted by
SIGTERM, SIGUSR1 or SIGHUP, to be started again; 130 interrupted from the keyboard. A training has saved by then.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import get_type_hints

from . import interruption, terminal

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
    # What a command needs takes seconds to import; the list of commands should not.
    with interruption.exiting():
        module = importlib.import_module(f"swin_unetr.{command}")
    try:
        return module.run(parse(module.Options, command, rest))
    # What a user gave was wrong, and the message says what: the way through our code would not help.
    except (ValueError, OSError) as error:
        print(f"swin-unetr {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"\nswin-unetr {command}: {str(error) or 'interrupted'}", file=sys.stderr)
        return interruption.status(getattr(error, "number", signal.SIGINT))


def parse(kind: type, command: str, argv: Sequence[str]):
    """`kind`, a dataclass of options, as `argv` and the YAML files named there say; the last word counts."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"swin-unetr {command}", description=_summary(kind), print_config="--print_config")
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file with any of these options")
    # Listed here for --help; `_expand` has made a --config of it.
    parser.add_argument("--preset", metavar="NAME", help=f"options that come with the package: {', '.join(presets())}")
    parser.add_class_arguments(kind, fail_untyped=True)
    lists = [f"--{name}" for name, of in get_type_hints(kind).items() if of == list[Path]]
    parsed = parser.instantiate(parser.parse_args(_bracketed(_expand(argv), lists)))
    return kind(**{field.name: parsed[field.name] for field in fields(kind) if field.init})


def presets() -> list[str]:
    """Names of the YAML files that ship with the package, as ``--preset`` takes them."""
    root = Path(str(PRESETS))
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def _expand(argv: Sequence[str]) -> list[str]:
    """`argv` with each ``--preset NAME`` as ``--config FILE``.

    Raises:
        ValueError: there is no such preset.
    """
    expanded: list[str] = []
    words = iter(argv)
    for word in words:
        if word != "--preset" and not word.startswith("--preset="):
            expanded.append(word)
            continue
        name = word.partition("=")[2] if "=" in word else next(words, "")
        if name not in presets():
            raise ValueError(f"preset: got {name!r}; accepted are {', '.join(presets())}")
        expanded += ["--config", str(PRESETS / f"{name}.yaml")]
    return expanded


def _bracketed(argv: Sequence[str], options: Collection[str]) -> list[str]:
    """`argv` with the paths after each of `options`, of which a shell's pattern gives several, as one word: a list."""
    bracketed: list[str] = []
    words = deque(argv)
    while words:
        word = words.popleft()
        bracketed.append(word)
        if word in options and words and not words[0].startswith(("--", "[")):
            listed = []
            while words and not words[0].startswith("--"):
                listed.append(words.popleft())
            bracketed.append(json.dumps(listed))
    return bracketed


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
