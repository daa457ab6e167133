"""A training command from its options to its exit status: job, resuming, initial weights, loop, messages."""

from __future__ import annotations

import itertools
import os
import platform
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import Field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import monai
import torch
import yaml
from rich.console import Console

import swin_kernels

from .. import checkpoints, distributed, files, lock
from ..datasets.identity import digest
from ..interruption import Interruption, status
from ..loading import load_pretrained
from ..names import say
from . import resume, state
from .loop import BEST, Loop
from .options import Optimization, Schedule
from .task import Batches, Task

CONFIG = "config.yaml"


class RunOptions(Protocol):
    """What every command that trains has among its options, which are a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    out: Path
    optimization: Optimization
    schedule: Schedule
    initial: Path | None
    seed: int
    device: str | None

    @property
    def resume(self) -> str: ...


class ClosableBatches(Batches, Protocol):
    """Batches that hold processes or memory until they are closed."""

    def close(self) -> None: ...


D = TypeVar("D", bound=ClosableBatches)


def run(
    command: str,
    options: RunOptions,
    open_dataset: Callable[[Console], D],
    make_task: Callable[[D], Task],
    console: Console | None = None,
    identify: Callable[[Callable[[str], None]], dict[str, dict[str, str]]] = lambda say: {},
) -> int:
    """Train as `options` say, or continue a run; returns the exit status of the command.

    During training, a signal to stop leaves a checkpoint; before, it is up to the caller.

    Args:
        command: "train" or "pretrain", which is what `make_task` makes.
        open_dataset, make_task: called when it is clear that there is something to train.
        identify: returns the cases by content, as `datasets.identify` does; called first, with a function that tells
            the user something.

    Raises:
        ValueError, OSError: options or input are bad, or the disk is full; on every rank.
    """
    with ExitStack() as until_said:
        try:
            with distributed.job(options.device) as device:
                if not distributed.is_first():
                    console = Console(quiet=True)
                return _run(
                    command, options, open_dataset, make_task, identify, device, console or Console(), until_said
                )
        except (FloatingPointError, distributed.RankLost) as error:
            print(f"swin-unetr {command}: {error}", file=sys.stderr)
            return 1


def _run(
    command, options, open_dataset, make_task, identify, device: torch.device, console: Console, until_said: ExitStack
) -> int:
    distributed.first(lambda: lock.check(options.out))  # reading the data may take long
    config = resume.plain(options)
    initial = digest((options.initial,)) if options.initial is not None and options.initial.is_file() else None
    data = _agreed(config, initial, partial(identify, partial(say, console)))
    found, recorded = distributed.first(lambda: _prepare(command, options, config, data, initial, until_said))
    if recorded != CONFIG:
        say(console, f"{options.out / CONFIG} says other options and stays as it is; those of this run: {recorded}")
    for error in found.damaged if found else ():
        say(console, f"passed over, and renamed to .damaged: {error}", "yellow")
    state.seed(options.seed)  # the same weights on every rank
    with closing(open_dataset(console)) as dataset:
        task = make_task(dataset)
        facts = {"config": config, "data": data, "provenance": {}}
        if found is None:
            facts["provenance"] = _provenance(_initial(task, options.initial, initial, console))
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
            say(console, f"continuing from {found.path}")
            if lost := distributed.first(lambda: _lost_best(options.out / BEST, loop)):
                say(console, f"{lost}; the next validation writes it again", "yellow")
                loop.forget_best()
            for change in _changes_of_schedule(found.content["config"], config):
                say(console, f"{change}; the learning rate continues as if it had been so from the start")
        # It outlasts the job: when a rank dies, torchrun sends SIGTERM to the others, which still have something to
        # report.
        interruption = until_said.enter_context(Interruption())
        ended = loop.run(interruption)
    if not ended:
        return status(interruption.asked or signal.SIGTERM)  # or another rank was asked
    best = loop.position.best
    says = f", best {task.figure} {best[task.figure]:.4f} at step {best['step']}" if best else ""
    say(console, f"done after {loop.position.step} steps{says}; in {options.out}: best.pt, checkpoints, log.jsonl")
    return 0


def _agreed(
    config: dict[str, Any], initial: str | None, identify: Callable[[], dict[str, dict[str, str]]]
) -> dict[str, dict[str, str]]:
    """What `identify` returns, after checking that all ranks agree; otherwise they would wait for each other forever.

    Args:
        initial: digest of the weights to start from.

    Raises:
        ValueError: raised on every rank; says what differs on which rank, or why one cannot read its data.
    """
    data, failed = {}, None
    try:
        data = identify()
    except (OSError, ValueError) as error:
        failed = error
    versions = {"swin_kernels": swin_kernels.__version__, "torch": str(torch.__version__)}
    told = distributed.gather(
        ({**config, "versions": versions, "weights of initial": initial}, data, failed and str(failed))
    )
    if failed is not None:
        raise failed
    if differ := [text for rank in range(distributed.ranks()) for text in _differences(rank, told[0], told[rank])]:
        more = f"; and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise ValueError(f"the ranks of this job differ: {'; '.join(differ[:5])}{more}; accepted are the same on all")
    return data


def _differences(rank: int, first: tuple, other: tuple) -> list[str]:
    """How one rank differs from rank 0; or why it cannot read its data."""
    if other[2] is not None:
        return [f"on rank {rank} {other[2]}"]
    says = f"{{name}} is {{then}} on rank 0 and {{now}} on rank {rank}"
    options = resume.differences(first[0], other[0], resume.OF_A_RANK, says)
    cases = resume.other_cases(first[1], other[1]) if first[2] is None else []
    return options + [f"on rank {rank}, compared with rank 0, {text}" for text in cases]


def _prepare(
    command: str,
    options: RunOptions,
    config: dict[str, Any],
    data: dict[str, dict[str, str]],
    initial: str | None,
    until_said: ExitStack,
) -> tuple[resume.Found | None, str]:
    """Own the folder of this run, by a context of `until_said`, and write its options to it.

    Returns:
        The checkpoint to continue from, if there is one; the name of the options' file.
    """
    begins = not checkpoints.series(options.out / resume.CHECKPOINTS)
    # Before the data, which may take long to read.
    if begins and options.initial is not None and initial is None:
        raise ValueError(f"initial: there is no file {options.initial}")
    until_said.enter_context(lock.owned(options.out))
    for folder in (options.out, options.out / resume.CHECKPOINTS):
        files.remove_leftovers(folder)
    # A job that torchrun restarts after a failure continues, whatever it was told for its first start.
    fresh = options.resume == "never" and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0
    found = resume.find(options.out, command, config, fresh=fresh, data=data, initial=initial)
    return found, _record(options.out, config)


def _record(out: Path, config: dict[str, Any]) -> str:
    """Write the options of this run to a file, unless one already has them; returns its name.

    A file with other options stays: it may be the user's own, from which these come, in another form or with comments.
    """
    names = itertools.chain([CONFIG], (f"{Path(CONFIG).stem}-{number}.yaml" for number in itertools.count(1)))
    name = next(name for name in names if not os.path.lexists(out / name) or _says(out / name, config))
    if not os.path.lexists(out / name):
        with files.replacing(out / name) as file:
            file.write(yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())
    return name


def _says(path: Path, config: dict[str, Any]) -> bool:
    """Whether a file has these options."""
    try:
        return path.is_file() and yaml.safe_load(path.read_text(encoding="utf-8")) == config
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return False


def _lost_best(path: Path, loop: Loop) -> str:
    """Why the best weights of this run so far are not in their file; "" if they are, or if there are none yet."""
    if loop.position.best is None and not loop.finished:
        return ""
    try:
        checkpoints.read(path)
    except FileNotFoundError:
        return f"{path}: is gone"
    except checkpoints.Damaged as error:
        return str(error)
    return ""


def _changes_of_schedule(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How the length of the training differs."""
    before, after = (
        {"schedule": {name: config["schedule"].get(name) for name in ("steps", "epochs")}} for config in (then, now)
    )
    return resume.differences(before, after, free=frozenset())


def _initial(task: Task, path: Path | None, content: str | None, console: Console) -> dict[str, Any] | None:
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
    for line in str(report).splitlines():
        say(console, line)
    return {
        "source": report.source,
        "digest": content,
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
