"""A training command from its options to its exit status: job, resuming, initial weights, loop, messages."""

from __future__ import annotations

import platform
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from os import environ
from pathlib import Path
from typing import Any, Protocol

import monai
import torch
import yaml
from rich.console import Console

import swin_kernels

from .. import checkpoints, distributed, files
from ..interruption import Interruption, status
from ..pretrained import load_pretrained
from . import lock, resume, state
from .loop import Loop
from .options import Optimization, Schedule
from .task import Batches, Task

CONFIG = "config.yaml"


class Options(Protocol):
    """What the options of every command that trains have."""

    out: Path
    optimization: Optimization
    schedule: Schedule
    initial: Path | None
    resume: str
    seed: int
    device: str | None


class Dataset(Batches, Protocol):
    """Batches that hold processes or memory until they are closed."""

    def close(self) -> None: ...


def run(
    command: str,
    options: Options,
    open_dataset: Callable[[Console], Dataset],
    make_task: Callable[[Dataset], Task],
    console: Console | None = None,
) -> int:
    """Train as `options` say, or go on; returns the exit status of the command.

    Once it trains, a signal to stop leaves a checkpoint; before, it does what the caller has it do.

    Args:
        command: "train" or "pretrain", which is what `make_task` makes.
        open_dataset, make_task: called once it is clear that there is something to train.

    Raises:
        ValueError, OSError: options or input are bad, or the disk is full; on every rank.
    """
    with ExitStack() as until_said:
        try:
            with distributed.job(options.device) as device:
                if not distributed.is_first():
                    console = Console(quiet=True)
                return _run(command, options, open_dataset, make_task, device, console or Console(), until_said)
        except (FloatingPointError, distributed.RankLost) as error:
            print(f"swin-unetr {command}: {error}", file=sys.stderr)
            return 1


def _run(
    command, options, open_dataset, make_task, device: torch.device, console: Console, until_said: ExitStack
) -> int:
    config = resume.plain(options)
    found = distributed.first(lambda: _prepare(command, options, config, until_said))
    for error in found.damaged if found else ():
        _say(console, f"passed over, and renamed to .damaged: {error}", style="yellow")
    state.seed(options.seed)  # the same weights on every rank
    with closing(open_dataset(console)) as dataset:
        task = make_task(dataset)
        facts = {"config": config, "provenance": {}}
        if found is None:
            facts["provenance"] = _provenance(_initial(task, options.initial, console))
        loop = Loop(
            task,
            dataset,
            options.optimization,
            options.schedule,
            out=options.out,
            device=device,
            seed=options.seed,
            facts=facts,
            console=console,
        )
        if found is not None:
            loop.restore(found.content)
            _say(console, f"goes on from {found.path}")
        # It outlasts the job: when a rank dies torchrun sends SIGTERM to the others, which have something to say first.
        interruption = until_said.enter_context(Interruption())
        ended = loop.run(interruption)
    if not ended:
        return status(interruption.asked or signal.SIGTERM)  # or another rank was asked
    best = loop.position.best
    says = f", best {task.figure} {best[task.figure]:.4f} at step {best['step']}" if best else ""
    _say(console, f"done after {loop.position.step} steps{says}; in {options.out}: best.pt, checkpoints, log.jsonl")
    return 0


def _prepare(command: str, options: Options, config: dict[str, Any], until_said: ExitStack) -> resume.Found | None:
    """Own the folder of this run, by a context of `until_said`; returns the checkpoint to go on from.

    If there is none, the options are there in a file.
    """
    begins = not checkpoints.series(options.out / resume.CHECKPOINTS)
    # Before the data, which may take long to read.
    if begins and options.initial is not None and not options.initial.is_file():
        raise ValueError(f"initial: there is no file {options.initial}")
    until_said.enter_context(lock.owned(options.out))
    for folder in (options.out, options.out / resume.CHECKPOINTS):
        files.remove_leftovers(folder)
    # A job that torchrun starts again after a failure goes on, whatever it was told about its first start.
    fresh = options.resume == "never" and int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0
    found = resume.find(options.out, command, config, fresh=fresh)
    if found is None:
        (options.out / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return found


def _initial(task: Task, path: Path | None, console: Console) -> dict[str, Any] | None:
    """Load weights from a file into the task's core; returns what matched.

    Raises:
        ValueError: the file is damaged, or no weights of this network.
    """
    if path is None:
        return None
    try:
        report = load_pretrained(task.core, path, verbose=False)
    except ValueError as error:
        raise ValueError(f"initial: {str(error).removeprefix('load_pretrained: ')}") from error
    _say(console, str(report))
    return {
        "source": report.source,
        "loaded": list(report.loaded),
        "missing": list(report.missing),
        "unexpected": list(report.unexpected),
        "mismatched": {name: [list(shape) for shape in shapes] for name, shapes in report.mismatched.items()},
        "downsample": report.downsample,
    }


def _provenance(initial: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "swin_kernels": swin_kernels.__version__,
        "torch": str(torch.__version__),
        "monai": monai.__version__,
        "python": platform.python_version(),
        "initial": initial,
    }


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
