"""The GPU as the measurements see it, and one simulated on the CPU, whose times are all made up."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from . import faults

ROUNDS, FEWEST_ROUNDS = 30, 5
SPIN_CYCLES = 2_000_000
"""Cycles of the wait before a call is timed, about a millisecond."""

FLUSHED_BYTES = 256 << 20
"""Read before a call is timed: more than any second-level cache holds. Writes would be written back while it runs."""

Call = Callable[[], object]


@dataclass
class Times:
    """What timing one call found.

    Attributes:
        ms: of each round.
        clocks_mhz: the multiprocessors' clock just before each round.
    """

    ms: list[float] = field(default_factory=list)
    clocks_mhz: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class KernelTime:
    """One kernel's part of a call."""

    kernel: str
    ms: float
    launches: float


def short_kernel_name(name: str) -> str:
    """A kernel's name as a profiler gives it, without its arguments and namespaces, 80 characters at most."""
    name = re.sub(r"^void ", "", name).replace("(anonymous namespace)::", "")
    depth, end = 0, len(name)
    for position, character in enumerate(name):  # arguments begin at the first parenthesis outside the brackets
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            end = position
            break
    name = name[:end].strip()
    for long, short in (("swin::", ""), ("at::native::", ""), ("__nv_bfloat16", "BFloat16"), ("__half", "Float16")):
        name = name.replace(long, short)
    name = re.sub(r"\([A-Za-z_]\w*\)(?=\d)", "", name)
    return name if len(name) <= 80 else name[:77] + "..."


class Cuda:
    """The current CUDA device."""

    name = "cuda"
    simulated = False

    def check(self) -> None:
        """Raises whatever went wrong on the device so far; after a sticky error, always."""
        faults.check_device()
        torch.cuda.synchronize()

    def times(self, calls: Mapping[str, Call], seconds: float, announce: Callable[[str], None]) -> dict[str, Times]:
        """Times each call by events, the calls in turn, at least `FEWEST_ROUNDS` rounds and at most `seconds` beyond.

        The GPU spins for about a millisecond before it takes the time, so that launching does not count where it is
        faster than the kernels. The spin is a number of cycles: its time gives the running clock.
        """
        flush = torch.zeros(FLUSHED_BYTES // 4, dtype=torch.int32, device="cuda")
        found = {name: Times() for name in calls}
        end = time.monotonic() + seconds
        for round_ in range(-1, ROUNDS):  # the first is not kept: one-time setup happens then
            if round_ >= FEWEST_ROUNDS and time.monotonic() > end:
                break
            for name, call in calls.items():
                announce(name)
                flush.max()
                spun, start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(3))
                spun.record()
                torch.cuda._sleep(SPIN_CYCLES)
                start.record()
                call()
                stop.record()
                torch.cuda.synchronize()
                if round_ >= 0:
                    found[name].ms.append(start.elapsed_time(stop))
                    found[name].clocks_mhz.append(SPIN_CYCLES / spun.elapsed_time(start) / 1e3)
        return found

    def extra_memory(self, call: Call) -> float:
        """MiB that a call needs beyond what is allocated."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def kernels(self, call: Call, repeats: int = 5) -> list[KernelTime]:
        """How long each of a call's kernels takes per call, the most expensive first."""
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(repeats):
                call()
            torch.cuda.synchronize()
        sums: dict[str, tuple[float, int]] = {}
        for event in profiler.events():
            if event.device_type != torch.autograd.DeviceType.CUDA:
                continue
            name = short_kernel_name(event.name)
            ms, launches = sums.get(name, (0.0, 0))
            sums[name] = ms + event.time_range.elapsed_us() / 1e3, launches + 1
        found = [KernelTime(name, ms / repeats, launches / repeats) for name, (ms, launches) in sums.items()]
        return sorted(found, key=lambda one: -one.ms)

    @contextlib.contextmanager
    def traced(self, descriptor: int) -> Iterator[None]:
        """In this context every kernel of ours writes its name to a file before it starts, and is waited for."""
        import os

        from swin_kernels.backends import BACKENDS

        with contextlib.ExitStack() as stack:
            if not BACKENDS["cuda"].unavailable():
                from swin_kernels.backends.cuda.tracing import trace_launches

                stack.enter_context(trace_launches(descriptor))
            if not BACKENDS["triton"].unavailable():
                import triton

                def enter(metadata) -> None:
                    os.write(descriptor, f"{metadata.get()['name']}\n".encode())

                def leave(metadata) -> None:
                    if not torch.cuda.is_current_stream_capturing():
                        torch.cuda.synchronize()

                runtime = triton.knobs.runtime
                for hooks, hook in ((runtime.launch_enter_hook, enter), (runtime.launch_exit_hook, leave)):
                    hooks.add(hook)
                    stack.callback(hooks.remove, hook)
            yield

    def graph(self, call: Call) -> Call:
        """`call` captured into a CUDA graph, as a call that replays it and returns what the capture returned.

        It keeps `call` alive: the graph reads whatever memory `call` does, such as a network's weights.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()

        def replay(held: Call = call) -> object:
            graph.replay()
            return captured

        return replay

    @functools.cached_property
    def multiprocessors(self) -> int:
        return torch.cuda.get_device_properties(0).multi_processor_count

    def free(self) -> None:
        """Give unused memory back."""
        gc.collect()
        torch.cuda.empty_cache()


class Simulated:
    """The CPU in place of a GPU, for the tests of this tool: results are real, times follow from names alone."""

    name = "cpu"
    simulated = True
    multiprocessors = 4

    def check(self) -> None:
        faults.check_device()

    def times(self, calls: Mapping[str, Call], seconds: float, announce: Callable[[str], None]) -> dict[str, Times]:
        found = {}
        for name in calls:
            announce(name)
            ms = 1 + int(hashlib.sha256(name.encode()).hexdigest()[:4], 16) / 65536
            found[name] = Times([ms * (1 + 0.01 * i) for i in range(FEWEST_ROUNDS)], [1000.0] * FEWEST_ROUNDS)
        return found

    def extra_memory(self, call: Call) -> float:
        return 1.0

    def kernels(self, call: Call, repeats: int = 5) -> list[KernelTime]:
        return [KernelTime("simulated_kernel<float, 16>", 0.5, 1.0), KernelTime("another", 0.25, 2.0)]

    @contextlib.contextmanager
    def traced(self, descriptor: int) -> Iterator[None]:
        import os

        os.write(descriptor, b"simulated_kernel<float, 16>\n")
        yield

    def graph(self, call: Call) -> Call:
        return call

    def free(self) -> None:
        gc.collect()


def device_of(simulated: bool) -> Cuda | Simulated:
    return Simulated() if simulated else Cuda()


def clock_of(times: Times) -> float | None:
    return statistics.median(times.clocks_mhz) if times.clocks_mhz else None
