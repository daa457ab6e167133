"""The operators at the shapes of Swin UNETR's stages: smoke tests, times beside floor and peers, calls for tools."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from swin_kernels import doctor, use_backend, warmup, window_partition, window_reverse
from swin_kernels.backends import REFERENCE, decline_reason, order
from swin_kernels.backends.cuda import preference
from swin_kernels.ops import OPERATORS, Operator
from swin_kernels.ops._operator import Example
from swin_kernels.ops.window_attention import WindowAttentionCall

from . import attention, decoder, faults
from .attention import Inputs, Shape
from .device import device_of
from .measure import announcing, compare, guarded, relative_error, timing_row
from .reporter import Reporter
from .result import Row
from .tasks import Task

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SMOKE_LIMITS = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 1e-5}
"""Largest error of a sound kernel, relative, in the mean."""

STAGES = tuple(Shape(96, stage) for stage in (1, 2, 3, 4))
OTHERS = (
    *(Shape(128, stage) for stage in (1, 2, 3, 4)),
    Shape(96, 1, shifted=False),
    Shape(96, 1, feature_size=24),
)
DIRECTIONS = ("forward", "backward")
EXPONENTIALS = {"forward": 1, "backward": 2, "forward + backward": 3}
"""Per score, at least: delta needs no further one (docs/cuda.md), though `find_delta` still computes one."""

YARDSTICK = 1e-2
"""The error assumed for plain PyTorch in 16 bits where it could not run."""

FLEX_LIMIT = 60.0
"""Seconds that the first call of FlexAttention may be silent: it compiles."""

SIMULATED = Shape(16, 1, feature_size=12, window=(3, 3, 3))
TINY = Shape(24, 1, window=(5, 5, 5))
"""12³ tokens in windows of 5³, padded and shifted."""


def some(shapes: tuple[Shape, ...], simulated: bool) -> tuple[Shape, ...]:
    """`shapes`; only the first if the device is simulated, since all are the same there."""
    return shapes[:1] if simulated else shapes


def shape_in(arguments: dict, simulated: bool) -> Shape:
    """The shape that a task names; tiny if the device is simulated."""
    return SIMULATED if simulated else Shape(**{**arguments, "window": tuple(arguments["window"])})


def written(shape: Shape) -> dict:
    """`shape` as plain values."""
    names = ("extent", "stage", "shifted", "feature_size", "window")
    return {name: getattr(shape, name) for name in names}


def backends_of(simulated: bool) -> tuple[str, ...]:
    """What ours can run on."""
    return ("cpu",) if simulated else tuple(name for name in order("cuda") if name != REFERENCE)


# Smoke: every kernel once, forward and backward


def smoke_tasks(simulated: bool) -> list[Task]:
    """Every operator on every backend in every dtype, one child each."""
    found = []
    for backend in backends_of(simulated):
        for dtype in ("float32",) if simulated else DTYPES:
            row = Row("probe", f"smoke, window_attention, {dtype}", "12³ tokens, 5³ windows", backend)
            arguments = {"backend": backend, "dtype": dtype, "simulated": simulated}
            found.append(Task("operators.smoke_attention", arguments, row, 4))
            row = Row("probe", f"smoke, every operator, {dtype}", "its examples", backend)
            found.append(Task("operators.smoke_examples", arguments, row, 6))
    return found


def smoke_attention(reporter: Reporter, row: dict, backend: str, dtype: str, simulated: bool) -> None:
    """Forward and backward at every head_dim that has its own kernels, checked against float64."""
    device = device_of(simulated)
    about = Row(**row)
    for head_dim in (4,) if simulated else (16, 8, 32, 64):
        for direction in DIRECTIONS:
            mine = replace(about, measure=f"{about.measure}, {direction}", shape=f"{about.shape}, head_dim {head_dim}")
            if not reporter.wants(mine):
                continue
            call = WindowAttentionCall(
                device=device.name,
                dtype=DTYPES[dtype],
                backward=direction != "forward",
                head_dim=head_dim,
                window=TINY.window,
            )
            if reason := decline_reason(backend, call):
                reporter.row(replace(mine, status=f"declined: {reason}"))
                continue
            shape = replace(TINY, feature_size=3 * head_dim)
            t = Inputs.of(shape, DTYPES[dtype], device.name)
            core = partial(attention.run, shape, backend=backend)
            _check(reporter, device, mine, direction, core, partial(attention.plain, shape), t, SMOKE_LIMITS[dtype])


def _check(reporter, device, row: Row, direction: str, core: Callable, plain: Callable, t: Inputs, limit: float):
    """One row: `core` in `direction` against `plain` in float64."""

    def run() -> float:
        expected = directed(plain, t.double(), direction)()
        return relative_error(directed(core, t, direction)(), expected)

    error = guarded(reporter, device, row, "check", run)
    if error is None:
        return
    if faults.planted(f"{row.label} | check") == "wrong":
        error += 1.0
    sound = error <= limit
    status = "ok" if sound else f"wrong: error {error:.1e}, allowed {limit:.1e}"
    reporter.row(replace(row, status=status, error=error, kernel=None if sound else _all(reporter)))


def _all(reporter: Reporter) -> str | None:
    return ", ".join(reporter.started_kernels) or None


def smoke_examples(reporter: Reporter, row: dict, backend: str, dtype: str, simulated: bool) -> None:
    """Every operator of the registry on its examples, both directions, checked against the reference in float64."""
    device = device_of(simulated)
    about = Row(**row)
    for operator in OPERATORS.values():
        if operator.exact and dtype != "float32":
            continue  # a copy is a copy
        for example in [_smallest(operator, backend, DTYPES[dtype])] if simulated else operator.examples:
            mine = replace(about, measure=f"smoke, {operator.name}, {dtype}", shape=example.name)
            if reporter.wants(mine):
                _check_example(reporter, device, mine, operator, example, backend, DTYPES[dtype])


def _smallest(operator: Operator, backend: str, dtype: torch.dtype) -> Example:
    """The smallest example that `backend` takes on the CPU; the smallest of all if it takes none."""

    def cost(example: Example) -> tuple[bool, int]:
        call = doctor.call_of(operator, example, dtype, "cpu")
        return decline_reason(backend, call) is not None, sum(map(math.prod, example.shapes.values()))

    return min(operator.examples, key=cost)


def _check_example(reporter, device, row: Row, operator: Operator, example: Example, backend: str, dtype) -> None:
    found = guarded(
        reporter, device, row, "check", partial(doctor.check_operator, operator, backend, device.name, dtype, [example])
    )
    if found is None:
        return
    if not found.taken:
        reporter.row(replace(row, status=f"skipped: {found.declined[0]}"))
        return
    error = found.error + (1.0 if faults.planted(f"{row.label} | check") == "wrong" else 0.0)
    sound = found.passed and error <= found.accepted
    status = "ok" if sound else f"wrong: {found.failure or f'error {error:.1e}'}"
    reporter.row(replace(row, status=status, error=error, kernel=None if sound else _all(reporter)))


# Warming up


def warming_tasks(part: str, simulated: bool) -> list[Task]:
    """What `swin-kernels warmup` runs for a Swin UNETR at 96³, on every backend."""
    settings = {"image": (32, 32), "feature_size": 12, "dtype": "float32"} if simulated else {"image": (96, 96, 96)}
    return [
        Task(
            "operators.warm",
            {"backend": backend, "piece": warmup.written(piece)},
            Row(part, "warm-up", str(piece), backend),
            5,
        )
        for backend in backends_of(simulated)
        for piece in (warmup.blocks_of if backend == "cuda" else warmup.pieces_of)(**settings)
    ]


def warm(reporter: Reporter, row: dict, backend: str, piece: dict) -> None:
    """Run it once: its kernels are in the caches afterwards."""
    about = Row(**row)
    if not reporter.wants(about):
        return
    reporter.step(about, "run", limit=120)
    began = time.monotonic()
    with use_backend(backend):
        warmup.run(warmup.read(piece), "cpu" if backend == "cpu" else "cuda")
    reporter.row(replace(about, value=time.monotonic() - began, unit="s"))


# Times


def directed(core: Callable[[Inputs], torch.Tensor], t: Inputs, direction: str) -> Callable[[], list[torch.Tensor]]:
    """The call that computes `direction` of `core`."""
    if direction == "forward":
        return torch.no_grad()(lambda: [core(t)])
    if direction == "backward":
        return attention.backward_alone(core, t)
    return lambda: attention.gradients(core, t)


def timing_tasks(simulated: bool) -> list[Task]:
    """The core and the branch around it at stage 1, the core at stages 2 to 4: what the goals are about."""
    calls = [(shape, direction) for shape in some(STAGES, simulated) for direction in DIRECTIONS]
    own = [_timing(shape, direction, "core", "operators", simulated) for shape, direction in calls]
    branch = [_timing(STAGES[0], d, "branch", "operators", simulated) for d in ("forward", "forward + backward")]
    own[len(DIRECTIONS) : len(DIRECTIONS)] = branch
    return own if simulated else [*own, *(_flex(shape, direction) for shape, direction in calls)]


def other_tasks(simulated: bool) -> list[Task]:
    """What else is worth knowing, the most useful first."""
    return [
        *(_partition(shape, simulated) for shape in some(STAGES[:2], simulated)),
        *(
            _timing(shape, direction, "core", "rest", simulated)
            for shape in some(OTHERS, simulated)
            for direction in DIRECTIONS
        ),
        *(_timing(shape, "forward + backward", "branch", "rest", simulated) for shape in some(STAGES[1:], simulated)),
    ]


def _timing(shape: Shape, direction: str, part: str, plan_part: str, simulated: bool) -> Task:
    row = Row(plan_part, f"attention {part}, {direction}", str(shape), "ours")
    arguments = {"shape": written(shape), "direction": direction, "part": part, "simulated": simulated}
    return Task("operators.time_attention", arguments, row, 5, timed=True)


def _flex(shape: Shape, direction: str) -> Task:
    """FlexAttention compiles for half a minute: it comes last, beside ours, so as not to cost other rows their time."""
    task = _timing(shape, direction, "core", "operators", simulated=False)
    row = replace(task.row, variant="FlexAttention")
    return replace(task, arguments={**task.arguments, "flex": True}, row=row, seconds=30)


def time_attention(
    reporter: Reporter,
    row: dict,
    shape: dict,
    direction: str,
    part: str,
    simulated: bool,
    seconds: float,
    flex: bool = False,
) -> None:
    """The core, or the branch of a block around it, in one direction beside its peers and the floor."""
    device = device_of(simulated)
    about, chosen = Row(**row), shape_in(shape, simulated)
    dtype = torch.float32 if simulated else torch.bfloat16
    cores: dict[str, Callable[[Shape, Inputs], torch.Tensor]] = {"ours": attention.run}
    if not simulated:
        if preference.MEASURED:  # ours may be Triton's then
            cores["CUDA"] = partial(attention.run, backend="cuda")
        cores["Triton"] = partial(attention.run, backend="triton")
    cores |= {"plain PyTorch": attention.plain, "SDPA": attention.sdpa}
    if flex:
        cores = {"ours": attention.run, "plain PyTorch": attention.plain, "FlexAttention": attention.flex}
    wrap = _branch(chosen, device.name) if part == "branch" else lambda core: core
    t = Inputs.of(chosen, dtype, device.name)

    def call(core: Callable, t: Inputs) -> Callable[[], list[torch.Tensor]]:
        return directed(partial(wrap(core), chosen), t, direction)

    compare(
        reporter,
        device,
        about,
        {name: call(core, t) for name, core in cores.items()},
        lambda: call(attention.plain, t.double())(),
        lambda errors: max(2 * errors.get("plain PyTorch", YARDSTICK), 2 * torch.finfo(dtype).eps),
        seconds,
        exponentials=chosen.scores * EXPONENTIALS[direction] if part == "core" else None,
        profiled=() if flex else ("ours", "CUDA", "Triton") if part == "core" else ("ours",),
        limits={"FlexAttention": FLEX_LIMIT},
    )


def _branch(shape: Shape, device: str) -> Callable:
    generator = torch.Generator().manual_seed(1)
    weights = tuple(
        (torch.randn(rows, shape.channels, generator=generator) * shape.channels**-0.5).to(device)
        for rows in (3 * shape.channels, shape.channels)
    )
    return partial(attention.branch, weights=weights)


def _partition(shape: Shape, simulated: bool) -> Task:
    row = Row("rest", "window partition and reverse", str(shape), "ours")
    return Task("operators.time_partition", {"shape": written(shape), "simulated": simulated}, row, 3, timed=True)


def time_partition(reporter: Reporter, row: dict, shape: dict, simulated: bool, seconds: float) -> None:
    """Window partition and reverse against a plain copy of as many bytes: how fast a pass over memory can be."""
    device = device_of(simulated)
    about, chosen = Row(**row), shape_in(shape, simulated)
    dtype = torch.float32 if simulated else torch.bfloat16
    x = torch.randn(1 if simulated else 8, *chosen.tokens, chosen.channels, device=device.name).to(dtype)
    windows = window_partition(x, chosen.window, chosen.shift, backend="reference")
    moves = {
        "window partition": (lambda: [window_partition(x, chosen.window, chosen.shift)], windows),
        "window reverse": (lambda: [window_reverse(windows, chosen.window, chosen.shift, chosen.tokens)], x),
    }
    for name, (move, truth) in moves.items():
        mine = replace(about, measure=name)
        variants = {"ours": move}
        for peer in (*backends_of(simulated), "reference"):
            variants[peer] = partial(_forced, peer, move)
        compare(
            reporter,
            device,
            mine,
            variants,
            partial(_doubled, truth),
            lambda errors: 0.0,
            seconds / 3,
        )
        copied = replace(mine, variant="copy of as many bytes")
        if not reporter.wants(copied):
            continue
        # A partition reads and writes different numbers of bytes; a copy of half their sum moves the same total.
        flat = torch.empty((x.numel() + windows.numel()) * x.element_size() // 2, dtype=torch.uint8, device=device.name)
        copy = torch.empty_like(flat)
        calls: dict[str, Callable[[], object]] = {"copy": partial(copy.copy_, flat), "ours": move}
        found = device.times(calls, seconds / 3, announcing(reporter, copied))
        timed = timing_row(copied, device, found["copy"])
        timed.ratio = (
            timed.median / timing_row(mine, device, found["ours"]).median
        )  # of its bandwidth that ours reaches
        reporter.row(timed)


def _forced(backend: str, call: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    with use_backend(backend):
        return call()


def _doubled(truth: torch.Tensor) -> list[torch.Tensor]:
    return [truth.double()]


# For tools that watch a program


def small_calls(reporter: Reporter, check: str, simulated: bool = False) -> None:
    """Every kernel once, on windows that are padded and shifted: what the sanitizer `check` watches."""
    device = device_of(simulated)
    for dtype in ("float32",) if simulated else DTYPES:
        for head_dim in (4,) if simulated else (16, 8, 32, 64):
            shape = replace(TINY, feature_size=3 * head_dim)
            backend = backends_of(simulated)[0]
            mine = Row("sanitizers", f"sanitizer {check}", f"{dtype}, head_dim {head_dim}", backend)
            reporter.step(mine, "run", strikes=False)
            with device.traced(reporter.kernels):
                reporter.strike()
                t = Inputs.of(shape, DTYPES[dtype], device.name)
                attention.gradients(partial(attention.run, shape, backend=backend), t)
                windows = window_partition(t.qkv.detach(), shape.window, shape.shift, backend=backend)
                window_reverse(windows, shape.window, shape.shift, shape.tokens, backend=backend)
                device.check()
        mine = Row("sanitizers", f"sanitizer {check}", f"{dtype}, norms and convolutions", "ours")
        reporter.step(mine, "run", strikes=False)
        with device.traced(reporter.kernels):
            decoder.small_calls(device.name, DTYPES[dtype])
            device.check()


def one_call(reporter: Reporter, simulated: bool = False) -> None:
    """Stage 1 of 96³, forward and backward, on the CUDA kernels: what a profiler watches."""
    device = device_of(simulated)
    shape = shape_in(written(STAGES[0]), simulated)
    t = Inputs.of(shape, torch.float32 if simulated else torch.bfloat16, device.name)
    core = partial(attention.run, shape, backend=backends_of(simulated)[0])
    reporter.step(Row("counters", "counters", str(shape), "ours"), "run")
    attention.gradients(core, t)
    device.check()
