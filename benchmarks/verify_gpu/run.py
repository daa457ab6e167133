"""A run from its first row to its last."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import children, correctness, counters, decoder, models, operators, plan, probe, summary, sweeps
from .children import ROOT, Child
from .jobs import SPARED, Job, Measurement, Program, Queue, Workplace, together
from .result import Result, Row, show
from .tasks import Task

MOST_SMOKE = 8
"""Children at a time, each checking one kernel."""

MOST_COMPILING = 2
"""Children at a time that compile beside the tests, each with its own threads."""

MOST_TIMING, LEAST_TIMING = 6.0, 0.2
"""Seconds of timing in one child."""

SECONDS_OF_COUNTERS = 30
"""Seconds of work in one program under ncu: about 40 passes over a launch."""


@dataclass
class Run:
    """The parts, each a method of the same name.

    Attributes:
        place: what all jobs share.
        end: when the part has to be over (monotonic seconds).
        tests: what pytest runs.
        no_monai: why there are no models, "" if there are.
        compiled: variant and mode of the models that `torch.compile` was done with.
        warm: whether the caches hold what our kernels compile when they first run.
    """

    place: Workplace
    simulated: bool
    tests: str
    test_limit: float
    no_monai: str = ""
    end: float = 0.0
    compiled: tuple[tuple[str, str], ...] = ()
    warm: bool = False

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def _until_end(self) -> float:
        return max(1.0, self.left + 5)  # the part's end stops it before

    def _timed(self, tasks: list[Task]) -> list[Job]:
        """Measurements one after the other, each with an even share of the time that is left for timing."""
        remaining, begun = len(tasks), set()

        def share(task: Task) -> Callable[[], float]:
            def seconds() -> float:
                nonlocal remaining
                even = self.left / max(1, remaining) - task.seconds
                if id(task) not in begun:  # it may be called again for another attempt
                    begun.add(id(task))
                    remaining -= 1
                return min(MOST_TIMING, max(LEAST_TIMING, even))

            return seconds

        return [Measurement(self.place, task, share(task)) for task in tasks]

    def describe(self) -> None:
        """What the device is; and whether children that are copies of this process can use it."""
        first = Measurement(self.place, probe.describing(self.simulated))
        together(self.place, self.end, Queue([first]))
        faults = [row for row in first.found if row.faulty and row.measure == "device"]
        if self.place.forks and any(not row.status.startswith("cut: ") for row in faults):
            self.place.forks = False
            said = "skipped: copies of one process cannot use the GPU here; every child is a fresh interpreter"
            self.place.add(replace(first.task.row, measure="children", status=said))
            together(self.place, self.end, Queue([Measurement(self.place, first.task)]))

    def probe(self) -> None:
        """Ceilings of the machine, and whether any kernel works."""
        together(self.place, self.end, Queue(self._timed([probe.ceilings(self.simulated)])))
        jobs = [Measurement(self.place, task) for task in operators.smoke_tasks(self.simulated)]
        together(self.place, self.end, Queue(jobs, MOST_SMOKE))

    def correctness(self) -> None:
        lost: list[str] = []
        again = Queue([], 2)

        def trace(name: str, kind: str) -> None:
            lost.append(name)
            if len(lost) <= correctness.MOST_TRACED:
                again.add(correctness.traced_test(self.place, self.tests, name, kind, self.test_limit))

        tests = correctness.tests(self.place, self.tests, self.test_limit, self._until_end, trace)
        beside = [Measurement(self.place, task) for task in self._model_preparations()] + self._warming("correctness")
        together(self.place, self.end, Queue([tests]), again, Queue(beside, MOST_COMPILING, SPARED))
        self.compiled = tuple(
            (row.variant, row.measure.partition(", ")[2])
            for job in beside
            for row in job.found
            if row.measure.startswith("compile, ") and row.variant in models.COMPILED and row.status == "ok"
        )

    def _warming(self, part: str) -> list[Measurement]:
        """The jobs that compile our kernels, once per run; none if that was done."""
        tasks = [] if self.warm else operators.warming_tasks(part, self.simulated)
        self.warm = True
        return [Measurement(self.place, task) for task in tasks]

    def _model_preparations(self) -> list[Task]:
        return [] if self.no_monai or self.simulated else models.preparations(self.simulated)

    def model(self) -> None:
        tasks = models.tasks(self.simulated, self.compiled)
        if self.no_monai:
            for task in tasks:
                self.place.add(replace(task.row, status=f"skipped: {self.no_monai}"))
            return
        # A network would compile its kernels one after another, which takes a third of a short part.
        soon = time.monotonic() + self.left / 3
        together(self.place, soon, Queue(self._warming("model"), max(2, correctness.cores() // 2), SPARED))
        together(self.place, self.end, Queue(self._timed(tasks)))
        for row in models.not_compiled(self.simulated, self.compiled):
            self.place.add(row)

    def operators(self) -> None:
        together(self.place, self.end, Queue(self._timed(operators.timing_tasks(self.simulated))))
        about = self.place.result.about
        if lines := sweeps.preferences(self.place.result.rows, about):
            self.place.result.keep("preference.txt", "".join(lines).encode())

    def counters(self) -> None:
        row = Row("counters", "counters", str(operators.STAGES[0]), "ours")
        if (tool := correctness.find_tool("ncu")) is None:
            self.place.add(replace(row, status="skipped: ncu was not found"))
            return
        together(self.place, self.end, Queue([self._counted(row, tool)]))

    def _counted(self, row: Row, tool: str) -> Program:
        def command(folder: Path) -> list[str]:
            arguments = {"simulated": self.simulated}
            child = children.command_of("operators.one_call", arguments, folder)
            return counters.command(tool, child, folder / "log.ncu", len(counters.KERNELS))

        def read(folder: Path, child: Child, why: str) -> Iterator[Row]:
            log = folder / "log.ncu"
            try:
                found = counters.read(log.read_text(errors="replace") if log.exists() else "")
            except ValueError as error:
                yield replace(row, status=why or f"failed: {error}, {child.end_in_words}")
                return
            for launch in found:
                for label, value in launch["values"].items():
                    yield replace(row, kernel=launch["kernel"], value=value, unit=label)
            if why:
                yield replace(row, status=why)

        return Program(self.place, row, command, read, self._until_end)

    def decoder(self) -> None:
        together(self.place, self.end, Queue(self._timed(decoder.tasks(self.simulated))))

    def sanitizers(self) -> None:
        jobs = correctness.sanitizers(self.place, self.simulated, self._until_end)
        together(self.place, self.end, Queue(jobs, len(jobs) or 1))

    def sweeps(self) -> None:
        together(self.place, self.end, Queue(self._timed(sweeps.tasks("cuda", self.simulated)), 1, SPARED))
        compilations = [Measurement(self.place, task) for task in sweeps.preparations(self.simulated)]
        soon = time.monotonic() + self.left / 2
        together(self.place, soon, Queue(compilations, correctness.cores(), SPARED))
        together(self.place, self.end, Queue(self._timed(sweeps.tasks("triton", self.simulated)), 1, SPARED))
        about = self.place.result.about
        if table := sweeps.tile_table(self.place.result.rows, about):
            self.place.result.keep("tiles.json", table.encode())

    def rest(self) -> None:
        together(self.place, self.end, Queue(self._timed(operators.other_tasks(self.simulated)), 1, SPARED))


def run(given: argparse.Namespace, began: float) -> int:
    """Run what the command line says; returns the exit status.

    Raises:
        ValueError: it cannot begin, and the message says why.
    """
    chosen = [part for part in plan.PARTS if not given.part or part.name in given.part]
    if not given.simulated and not given.dry_run and (reason := no_gpu()):
        raise ValueError(reason)
    no_monai = import_monai(chosen)
    if given.dry_run:
        return dry_run(chosen, given, time.monotonic() - began)
    about = probe.host(probe.commit_of(given.commit), given.simulated)
    result = Result.open(given.out.resolve(), about)
    place = Workplace(result, given.silence, began)
    it = Run(place, given.simulated, given.tests or correctness.TESTS, given.test_limit, no_monai)
    stopped, part = "", chosen[0]
    step_back()
    try:
        it.end = began + given.budget / 2
        it.describe()
        ends = plan.ends(chosen, given.budget, time.monotonic() - began)
        show(f"parts end at {', '.join(f'{name} {end:.0f} s' for name, end in ends.items())}")
        for part in chosen:
            it.end = began + ends[part.name]
            getattr(it, part.name)()
    except KeyboardInterrupt as error:
        stopped = f"stopped by {error or 'SIGINT'} in part {part.name}"
        place.add(Row(part.name, "run", "", "ours", status=f"cut: {stopped}"))
    finally:
        place.close()
    show(summary.table(result, stopped))
    return 0 if result.sound and not stopped else 1


def step_back() -> None:
    """Yield the machine to others that need it: it must stay responsive, whatever the run demands.

    If the machine goes, so may the process that started the run, and all results; a run alone can be started again.
    """
    os.nice(5)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, correctness.cores() // 4)))
    with contextlib.suppress(OSError):  # not Linux: the system itself chooses what to kill when memory runs out
        Path("/proc/self/oom_score_adj").write_text("900")


def import_monai(chosen: list[plan.Part]) -> str:
    """Import what the models need, for all children at once, if one of the parts has models; why it cannot, or ""."""
    if {part.name for part in chosen} & {"correctness", "model"}:
        try:
            importlib.import_module("monai.networks.nets")
        except Exception as error:  # whatever is wrong with MONAI, all other parts can run
            return f"MONAI cannot be imported, its wheel on PYTHONPATH will do: {type(error).__name__}: {error}"
    return ""


def no_gpu() -> str | None:
    """Why there is nothing to measure here, or None."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return f"no CUDA device (torch {torch.__version__}); --dry-run prints the plan without one"
    return None


def dry_run(chosen: list[plan.Part], given: argparse.Namespace, imports: float) -> int:
    """Print the plan: what each part starts, what that and its work are expected to take, and when it is cut."""
    tests = given.tests or correctness.TESTS
    costs = plan.HostCosts.measured(imports, _fork_nothing, tests, ROOT)
    print(
        f"here, measured: imports {costs.imports:.1f} s, a copied child {costs.fork * 1e3:.0f} ms, a fresh interpreter "
        f"{costs.interpreter:.1f} s, collecting {costs.tests} GPU tests {costs.collect:.1f} s"
    )
    line = "{:12} {:>8} {:>9} {:>7} {:>9} {:>7}  {}"
    print(line.format("part", "children", "starting", "work", "expected", "at most", "what"))
    print(line.format("imports", "", f"{imports:.0f} s", "", f"{imports:.0f} s", f"{imports:.0f} s", "PyTorch, MONAI"))
    ends, before = plan.ends(chosen, given.budget, imports), imports
    total = imports
    for part in chosen:
        copies, fresh, work = WORK[part.name](costs)
        starting = copies * costs.fork + fresh * costs.interpreter
        limit = ends[part.name] - before
        expected, before = min(starting + work, limit), ends[part.name]
        total += expected
        seconds = (f"{value:.0f} s" for value in (starting, work, expected, limit))
        print(line.format(part.name, copies + fresh, *seconds, part.what))
    ending = f"and {plan.ENDING:g} s to end, of {given.budget:g} s"
    print(line.format("all", "", "", "", f"{total:.0f} s", f"{before:.0f} s", ending))
    return 0


def _fork_nothing() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


CONTEXT = 0.6
"""Seconds that a child needs to make a CUDA context and load kernels, as a guess for a machine without a GPU."""


def _measured(tasks: list[Task], at_a_time: int = 1) -> tuple[int, int, float]:
    """Copied children, fresh interpreters and seconds of work of some tasks."""
    timing = sum(1.5 for task in tasks if task.timed)
    return len(tasks), 0, (sum(task.seconds + CONTEXT for task in tasks) + timing) / at_a_time


def _correctness_work(costs: plan.HostCosts) -> tuple[int, int, float]:
    workers = correctness.workers(None)
    tests = costs.collect + costs.tests * correctness.SECONDS_OF_TEST / workers
    return len([*models.preparations(False), *operators.warming_tasks("correctness", False)]), workers, tests


def _sweeps_work(costs: plan.HostCosts) -> tuple[int, int, float]:
    times = [*sweeps.tasks("cuda", False), *sweeps.tasks("triton", False)]
    parts = (_measured(sweeps.preparations(False), correctness.cores()), _measured(times))
    return sum(children for children, _, _ in parts), 0, sum(work for _, _, work in parts)


WORK: dict[str, Callable[[plan.HostCosts], tuple[int, int, float]]] = {
    "probe": lambda costs: _measured(
        [probe.describing(False), probe.ceilings(False), *operators.smoke_tasks(False)],
        min(MOST_SMOKE, correctness.cores()),
    ),
    "correctness": _correctness_work,
    "model": lambda costs: _measured(models.tasks(False, ())),
    "operators": lambda costs: _measured(operators.timing_tasks(False)),
    "decoder": lambda costs: _measured(decoder.tasks(False)),
    "counters": lambda costs: (0, 1, SECONDS_OF_COUNTERS),
    "sanitizers": lambda costs: (0, len(counters.CHECKS), correctness.SECONDS_OF_SANITIZER),
    "sweeps": _sweeps_work,
    "rest": lambda costs: _measured(operators.other_tasks(False)),
}
"""What each part starts and how long its work takes on a GPU, estimated; the cost of starting is measured."""
