"""Prove the GPU kernels on this machine, then time them: ``python scripts/verify_gpu.py OUT``.

Needs PyTorch, Triton and pytest, nothing else and no network; the CUDA library is the one that was built beside the
package, here or on a machine without a GPU: nothing is compiled. MONAI's rows appear where MONAI can be imported,
compute-sanitizer's where the tool is found. In three parts, which ``--part`` runs one at a time: the GPU tests; the
four tools of compute-sanitizer over one small call; and for every measure the error against float64 and, only where it
is sound, the time beside the peers', variants in turn, and beside the floor that docs/cuda.md derives.

``OUT/gpu.json`` and ``OUT/gpu.csv`` (with ``--part``, of that name) are written again after every row, so that a run
that is cut off leaves what it found. ``OUT/preference.txt`` has the calls that Triton's kernels ran faster than the
CUDA ones, as lines for `swin_kernels.backends.cuda.preference.MEASURED`. A part ends within its `BUDGETS` seconds,
printed first: what no longer fits is recorded as skipped. Exit status 0 means that everything ran and was correct.
``--dry-run`` walks the same plan with tiny shapes on the CPU, to test this script; its files say so and hold no times.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import swin_kernels  # noqa: E402
from swin_kernels import geometry, window_partition, window_reverse  # noqa: E402
from swin_kernels.backends import ORDER, Call, decline_reason, load, use_backend  # noqa: E402
from swin_kernels.backends.cuda import preference  # noqa: E402

SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER = 60  # seconds for each of them
BUDGETS = {"tests": 240, "sanitizer": SANITIZER * len(SANITIZERS), "timing": 480}
"""Seconds of each part; with the start of Python each fits in ten minutes."""
GPU_TESTS = "tests/ops/test_on_gpu.py"
PROCESSES = max(1, min(12, len(os.sched_getaffinity(0)) - 1))
ROUNDS, FEWEST_ROUNDS = 30, 5
WINDOW = (7, 7, 7)


@dataclass(frozen=True)
class Shape:
    """A block of Swin UNETR: `extent` voxels an axis, stage 1 to 4."""

    extent: int
    stage: int
    shifted: bool = True
    feature_size: int = 48
    window: tuple[int, ...] = WINDOW

    @property
    def tokens(self) -> tuple[int, ...]:
        return (self.extent // 2**self.stage,) * 3

    @property
    def channels(self) -> int:
        return self.feature_size * 2 ** (self.stage - 1)

    @property
    def heads(self) -> int:
        return 3 * 2 ** (self.stage - 1)

    @property
    def shift(self) -> tuple[int, ...]:
        return tuple(w // 2 if self.shifted else 0 for w in self.window)

    @property
    def grid(self) -> geometry.WindowGrid:
        return geometry.WindowGrid.of(self.tokens, self.window, self.shift)

    def __str__(self) -> str:
        return f"f{self.feature_size} {self.extent}³ stage {self.stage}{' shifted' if self.shifted else ''}"


SHAPES = (
    Shape(96, 1),
    Shape(96, 1, shifted=False),
    Shape(96, 2),
    Shape(96, 3),
    Shape(96, 4),
    Shape(128, 1),
    Shape(128, 2),
    Shape(128, 3),
    Shape(128, 4),
    Shape(96, 1, feature_size=24),
)
DRY_SHAPES = (Shape(16, 1, feature_size=12, window=(3, 3, 3)),)


@dataclass
class Row:
    """One line of the result. Times are of one call, in ms: 20th, 50th and 80th percentile of the rounds."""

    measure: str
    shape: str
    variant: str
    status: str  # "ok", "failed: why" or "skipped: why"
    error: float | None = None  # against float64, relative, in the mean; the worst of outputs and gradients
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    ratio: float | None = None  # this variant's median over ours
    floor: float | None = None  # ms that this machine needs at least for the measure, where docs/cuda.md derives it
    extra_mib: float | None = None  # peak memory of a call beyond what was allocated before it


@dataclass
class Result:
    """What this run found, and where it is kept."""

    folder: Path
    about: dict
    name: str = "gpu"
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.write()
        shown = "" if row.p50 is None else f" {row.p50:9.3f} ms  ×{row.ratio:.2f}"
        wrong = "" if row.error is None else f" error {row.error:.1e}"
        floor = "" if row.floor is None or row.p50 is None else f"  {row.p50 / row.floor:.2f} floors"
        print(f"{row.measure:28} {row.shape:24} {row.variant:22} {row.status}{wrong}{shown}{floor}", flush=True)

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"about": self.about, "rows": [asdict(row) for row in self.rows]}, indent=1) + "\n"
        (self.folder / f"{self.name}.json").write_text(text)
        with (self.folder / f"{self.name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*self.about, *(f.name for f in fields(Row))], lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.about | asdict(row) for row in self.rows)

    @property
    def sound(self) -> bool:
        """Whether every backend runs here, and everything of ours ran and was correct."""
        own = [row for row in self.rows if row.variant == "ours" or row.measure == "backend"]
        return bool(own) and all(row.status == "ok" for row in own)


def output_of(*command: str) -> str:
    """First line that `command` prints; "unknown" if it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else "unknown"


def about(device: str) -> dict:
    """What a result depends on."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    cuda = device == "cuda"
    return {
        "dry_run": not cuda,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else "none",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "triton": triton_version,
        "monai": monai_version(),
        "cuda_library": fingerprint(load("cuda").LIBRARY),
        "sm_clock_mhz": sm_clock() if cuda else None,
        "python": platform.python_version(),
        "commit": output_of("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def fingerprint(file: Path) -> str:
    """First digits of the SHA-256 of a file: tells whether the library is the one that was built elsewhere."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else "none"


def sm_clock() -> float | None:
    """Highest clock of the multiprocessors in MHz, if the driver tells."""
    answer = output_of("nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits")
    return float(answer) if answer.replace(".", "").isdigit() else None


def monai_version() -> str:
    try:
        import monai
    except ImportError:
        return "none"
    return monai.__version__


class Clock:
    """The time left of the budget."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


# Correctness by the tests and the sanitizer


def run_child(result: Result, measure: str, command: list[str], limit: float, environment: dict | None = None) -> None:
    """Run `command`; its exit status is the row, its output a file beside the result."""
    name = measure.replace(" ", "_")
    if limit < 10:
        return result.add(Row(measure, "", "ours", "skipped: no time left"))
    with (result.folder / f"{name}.log").open("w") as log:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=os.environ | (environment or {}), stdout=log, stderr=log, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return result.add(Row(measure, "", "ours", f"failed: not done after {limit:.0f} s"))
    status = "ok" if done.returncode == 0 else f"failed: exit status {done.returncode}, see {name}.log"
    return result.add(Row(measure, "", "ours", status))


def run_tests(result: Result, clock: Clock, dry: bool) -> None:
    """The GPU tests, dealt out to processes: most of their time goes into compiling."""
    pytest = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    if dry:
        return run_child(result, "tests", [*pytest, "--collect-only", GPU_TESTS], clock.left)
    listed = subprocess.run([*pytest, "--collect-only", GPU_TESTS], cwd=ROOT, capture_output=True, text=True).stdout
    tests = [line for line in listed.splitlines() if line.startswith(GPU_TESTS)]
    shards = [tests[i::PROCESSES] for i in range(PROCESSES) if tests[i::PROCESSES]]
    end = time.monotonic() + clock.left
    running = []
    for place, shard in enumerate(shards):
        log = (result.folder / f"tests_{place}.log").open("w")
        running.append(subprocess.Popen([*pytest, *shard], cwd=ROOT, stdout=log, stderr=log))
    wrong = [] if tests else ["no test was found"]
    for place, process in enumerate(running):
        try:
            if process.wait(max(1.0, end - time.monotonic())):
                wrong.append(f"exit status {process.returncode}, see tests_{place}.log")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            wrong.append(f"tests_{place} not done in time")
    result.add(Row("tests", f"{len(tests)} tests", "ours", f"failed: {'; '.join(wrong)}" if wrong else "ok"))


def run_sanitizer(result: Result, clock: Clock, dry: bool) -> None:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    for check in SANITIZERS:
        if tool is None or dry:
            reason = "a dry run" if dry else "compute-sanitizer was not found"
            result.add(Row(f"sanitizer {check}", "", "compute-sanitizer", f"skipped: {reason}"))
            continue
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, __file__, "--small-call", "unused"]
        # PyTorch's allocator would hide accesses between its blocks
        run_child(
            result, f"sanitizer {check}", command, min(SANITIZER, clock.left), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        )


def small_call() -> None:
    """Every kernel once, on windows that are padded and shifted: what the sanitizer watches."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in (8, 16, 32, 64):
            shape = Shape(24, 1, feature_size=3 * head_dim, window=(5, 5, 5))
            tensors = Inputs.of(shape, dtype, "cuda")
            gradients(lambda t, shape=shape: ours(shape, t), tensors)
            windows = window_partition(tensors.qkv.detach(), shape.window, shape.shift)
            window_reverse(windows, shape.window, shape.shift, shape.tokens)
    torch.cuda.synchronize()


# Floors: docs/cuda.md


def floor_of(result: Result, shape: Shape, direction: str) -> float | None:
    """Milliseconds that the exponentials of the attention core take at least: one a score forward, two backward.

    A multiprocessor computes 16 a clock. None where the driver does not tell the clock.
    """
    clock = result.about["sm_clock_mhz"]
    if clock is None:
        return None
    scores = shape.grid.num_windows * shape.heads * shape.grid.tokens**2
    exponentials = scores * {"forward": 1, "backward": 2, "forward + backward": 3}[direction]
    return exponentials / (16 * torch.cuda.get_device_properties(0).multi_processor_count * clock * 1e3)


# The attention core and its peers, all on tensors in natural layout


@dataclass
class Inputs:
    """Leaves of one call and the gradient that enters it."""

    qkv: torch.Tensor
    table: torch.Tensor
    pad: torch.Tensor
    grad: torch.Tensor

    @classmethod
    def of(cls, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def leaf(*size: int, to: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(size, generator=generator).to(device, to).requires_grad_()

        rows = geometry.bias_table_length(shape.window)
        return cls(
            leaf(1, *shape.tokens, 3 * shape.channels),
            leaf(rows, shape.heads, to=torch.float32),
            leaf(3 * shape.channels),
            leaf(1, *shape.tokens, shape.channels).detach(),
        )

    def double(self) -> Inputs:
        wide = [t.detach().double().requires_grad_() for t in (self.qkv, self.table, self.pad)]
        return Inputs(*wide, self.grad.double())

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        return self.qkv, self.table, self.pad


def ours(shape: Shape, t: Inputs) -> torch.Tensor:
    return swin_kernels.window_attention(t.qkv, t.table, shape.window, shape.shift, pad_qkv=t.pad)


def triton(shape: Shape, t: Inputs) -> torch.Tensor:
    """The same call on the Triton kernels."""
    return swin_kernels.window_attention(t.qkv, t.table, shape.window, shape.shift, pad_qkv=t.pad, backend="triton")


def cuda(shape: Shape, t: Inputs) -> torch.Tensor:
    """The same call on the CUDA kernels."""
    return swin_kernels.window_attention(t.qkv, t.table, shape.window, shape.shift, pad_qkv=t.pad, backend="cuda")


def plain(shape: Shape, t: Inputs) -> torch.Tensor:
    """MONAI's chain in plain PyTorch: partition, scores, softmax, values, reverse."""
    q, k, v = _windows(shape, t)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + _bias_and_mask(shape, t)
    return _natural(shape, torch.softmax(scores, dim=-1).to(v.dtype) @ v)


def sdpa(shape: Shape, t: Inputs) -> torch.Tensor:
    q, k, v = _windows(shape, t)
    added = _bias_and_mask(shape, t).to(q.dtype).expand(q.shape[0], -1, -1, -1).contiguous()
    return _natural(shape, F.scaled_dot_product_attention(q, k, v, attn_mask=added))


def flex(shape: Shape, t: Inputs) -> torch.Tensor:
    q, k, v = _windows(shape, t)
    return _natural(shape, _compiled_flex()(q, k, v, score_mod=_score_mod(shape, t)))


_cache: dict = {}


def _compiled_flex() -> Callable:
    if "flex" not in _cache:
        from torch.nn.attention.flex_attention import flex_attention

        _cache["flex"] = torch.compile(flex_attention, dynamic=False)
    return _cache["flex"]


def _constants(shape: Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Bias index ``(n, n)`` and region labels ``(nW, n)``, built once as MONAI does."""
    key = (shape, device)
    if key not in _cache:
        index = geometry.bias_index(shape.grid.nominal, shape.grid.tokens)
        _cache[key] = index.to(device), geometry.region_labels(shape.grid).to(device)
    return _cache[key]


def _score_mod(shape: Shape, t: Inputs) -> Callable:
    index, labels = _constants(shape, t.qkv.device)
    windows, table, shifted = shape.grid.num_windows, t.table, shape.grid.is_shifted

    def score_mod(score, b, h, i, j):
        score = score + table[index[i, j], h]
        if shifted:
            score = score + torch.where(labels[b % windows, i] == labels[b % windows, j], 0.0, geometry.MASK_VALUE)
        return score

    return score_mod


def _windows(shape: Shape, t: Inputs) -> tuple[torch.Tensor, ...]:
    grid = shape.grid
    windows = window_partition(t.qkv, shape.window, shape.shift)  # (nW, n, 3C)
    if grid.is_padded:
        real = window_partition(t.qkv.new_ones(*t.qkv.shape[:-1], 1), shape.window, shape.shift) > 0
        windows = torch.where(real, windows, t.pad)
    return windows.unflatten(-1, (3, shape.heads, -1)).permute(2, 0, 3, 1, 4).unbind()  # 3 × (nW, heads, n, head_dim)


def _bias_and_mask(shape: Shape, t: Inputs) -> torch.Tensor:
    """``(1 or nW, heads, n, n)``."""
    index, labels = _constants(shape, t.qkv.device)
    bias = t.table[index].permute(2, 0, 1)[None]
    if not shape.grid.is_shifted:
        return bias
    return bias + geometry.MASK_VALUE * (labels[:, None, :, None] != labels[:, None, None, :]).to(bias)


def _natural(shape: Shape, out: torch.Tensor) -> torch.Tensor:
    return window_reverse(out.transpose(1, 2).flatten(2), shape.window, shape.shift, shape.tokens)


def branch(core: Callable, weights: tuple[torch.Tensor, ...]) -> Callable:
    """The attention branch of a block - norm, qkv projection, attention, projection - around a core."""

    def run(shape: Shape, t: Inputs) -> torch.Tensor:
        x = F.layer_norm(t.qkv[..., : shape.channels], (shape.channels,))
        qkv = F.linear(x, weights[0].to(x.dtype), t.pad)  # a padding token carries the bias of the projection
        return F.linear(core(shape, Inputs(qkv, t.table, t.pad, t.grad)), weights[1].to(x.dtype))

    return run


def backward_alone(call: Callable[[Inputs], torch.Tensor], t: Inputs) -> Callable[[], list[torch.Tensor]]:
    """The gradients without the forward, which runs once."""
    out: list[torch.Tensor] = []

    def run() -> list[torch.Tensor]:
        if not out:
            out.append(call(t))
        return list(torch.autograd.grad(out[0], t.leaves, t.grad, retain_graph=True))

    return run


def gradients(call: Callable[[Inputs], torch.Tensor], t: Inputs) -> list[torch.Tensor]:
    out = call(t)
    return [out.detach(), *torch.autograd.grad(out, t.leaves, t.grad)]


# Measuring


def relative_error(values: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """The worst of ``‖value - truth‖ / ‖truth‖``; infinite for NaN."""
    errors = [((v.double() - t).norm() / t.norm().clamp(min=1e-30)).item() for v, t in zip(values, truth, strict=True)]
    return max(e if e == e else math.inf for e in errors)


def times(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call, in turn, by CUDA events; the second-level cache is overwritten before each.

    The GPU waits about a millisecond before it takes the time, so that launching does not count where it is faster.
    """
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    end = time.monotonic() + seconds
    for round_ in range(ROUNDS):
        if round_ >= FEWEST_ROUNDS and time.monotonic() > end:
            break
        for name, call in calls.items():
            flush.zero_()
            torch.cuda._sleep(2_000_000)
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize()
            found[name].append(start.elapsed_time(stop))
    return found


def extra_memory(call: Callable[[], object]) -> float:
    """MiB that a call needs beyond what is allocated."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def compare(
    result: Result,
    measure: str,
    shape: str,
    variants: dict[str, Callable[[], list[torch.Tensor]]],
    truth: Callable[[], list[torch.Tensor]],
    allowed: Callable[[dict[str, float]], float],
    seconds: float,
    dry: bool,
    floor: float | None = None,
) -> list[Row]:
    """Hold every variant to `truth`, then time those that are sound; "ours" comes first, and no time without it.

    `allowed` gives the largest error from the errors of the variants.
    """
    errors, reasons = {}, {}
    expected = truth()
    for name, call in variants.items():
        try:
            errors[name] = relative_error(call(), expected)
        except Exception as error:  # a peer that cannot run is a row of the result, not the end of the run
            reasons[name] = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    del expected
    limit = allowed(errors)
    reasons |= {name: f"failed: error above {limit:.1e}" for name, e in errors.items() if not e <= limit}
    sound = {name: call for name, call in variants.items() if name not in reasons}
    if "ours" not in sound:
        reasons |= dict.fromkeys(sound, "skipped: ours failed, nothing is timed")
    timed = {} if dry or "ours" not in sound else times(sound, seconds)
    ours = statistics.median(timed["ours"]) if timed else None
    rows = []
    for name, call in variants.items():
        row = Row(measure, shape, name, reasons.get(name, "ok"), errors.get(name))
        if name in timed:
            row.p20, row.p50, row.p80 = statistics.quantiles(timed[name], n=10)[1:8:3]
            row.p50 = statistics.median(timed[name])
            row.ratio, row.extra_mib, row.floor = row.p50 / ours, extra_memory(call), floor
        rows.append(row)
        result.add(row)
    return rows


def attention_measures(result: Result, clock: Clock, device: str, dtype: torch.dtype, dry: bool) -> None:
    """The core and the branch around it, forward and with backward, against peers in the same process."""
    shapes = DRY_SHAPES if dry else SHAPES
    for place, shape in enumerate(shapes):
        peers = {"ours": ours, "plain PyTorch": plain, "SDPA": sdpa}
        if device == "cuda":
            peers["Triton"] = triton
            if preference.MEASURED:  # ours may be Triton's then
                peers["CUDA"] = cuda
        if shape == SHAPES[0]:  # it compiles for half a minute a shape and direction
            peers["FlexAttention"] = flex
        generator = torch.Generator().manual_seed(1)
        weights = tuple(
            (torch.randn(rows, shape.channels, generator=generator) * shape.channels**-0.5).to(device)
            for rows in (3 * shape.channels, shape.channels)
        )
        t = Inputs.of(shape, dtype, device)
        wide = t.double()
        parts = (
            ("core", lambda core: core, ("forward", "backward", "forward + backward")),
            ("branch", lambda core, w=weights: branch(core, w), ("forward", "forward + backward")),
        )
        for part, wrap, directions in parts:
            for direction in directions:
                measure = f"attention {part}, {direction}"
                if clock.left < 25:
                    result.add(Row(measure, str(shape), "ours", "skipped: no time left"))
                    continue

                def calls(core, inputs, direction=direction, shape=shape):
                    if direction == "forward":
                        return torch.no_grad()(lambda: [core(shape, inputs)])
                    if direction == "backward":
                        return backward_alone(partial(core, shape), inputs)
                    return lambda: gradients(partial(core, shape), inputs)

                rows = compare(
                    result,
                    measure,
                    str(shape),
                    {name: calls(wrap(core), t) for name, core in peers.items()},
                    calls(wrap(plain), wide),
                    lambda errors: max(2 * errors.get("plain PyTorch", 0.0), 2 * torch.finfo(dtype).eps),
                    min(3.0, clock.left / (5 * (len(shapes) - place) + 8)),
                    dry,
                    floor_of(result, shape, direction) if part == "core" else None,
                )
                if part == "core" and direction != "forward + backward":
                    note_preference(result, shape, dtype, direction == "backward", rows)


def note_preference(result: Result, shape: Shape, dtype: torch.dtype, backward: bool, rows: list[Row]) -> None:
    """Where Triton's kernels are faster than the CUDA ones, a line for `preference.MEASURED`."""
    times = {row.variant: row.p50 for row in rows if row.p50 is not None}
    own, theirs = times.get("CUDA", times.get("ours")), times.get("Triton")
    if own is None or theirs is None or own <= theirs:
        return
    line = preference.Measured(
        capability=tuple(result.about["capability"]),
        backward=backward,
        dtype_bytes=dtype.itemsize,
        head_dim=shape.channels // shape.heads,
        tokens=(shape.grid.tokens, shape.grid.tokens),
        backend="triton",
        ours_ms=round(own, 4),
        theirs_ms=round(theirs, 4),
        source=f"{shape}, {result.about['device']}, commit {result.about['commit']}",
    )
    with (result.folder / "preference.txt").open("a") as file:
        file.write(f"{line},\n")


def partition_measures(result: Result, clock: Clock, device: str, dtype: torch.dtype, dry: bool) -> None:
    """Window partition and reverse beside a plain copy of as many bytes: what a pass over memory can be."""
    for shape in DRY_SHAPES if dry else SHAPES[:3]:
        if clock.left < 25 and not dry:
            result.add(Row("window partition", str(shape), "ours", "skipped: no time left"))
            continue
        x = torch.randn(8, *shape.tokens, shape.channels, device=device).to(dtype)
        windows = window_partition(x, shape.window, shape.shift, backend="reference")

        def partition(x=x, shape=shape):
            return [window_partition(x, shape.window, shape.shift)]

        def reverse(windows=windows, shape=shape):
            return [window_reverse(windows, shape.window, shape.shift, shape.tokens)]

        for name, move, truth in (("partition", partition, windows), ("reverse", reverse, x)):
            variants = {"ours": move}
            for peer in ("triton", "reference") if device == "cuda" else ("reference",):
                variants[peer] = partial(forced, peer, move)
            measure = f"window {name}"
            exact = partial(lambda truth: [truth.double()], truth)
            rows = compare(result, measure, str(shape), variants, exact, lambda _: 0.0, 1.0, dry)
            if dry or rows[0].p50 is None:
                continue
            # A partition reads and writes different numbers of bytes; a copy of half their sum moves as many.
            moved = (x.numel() + windows.numel()) * x.element_size()
            flat = torch.empty(moved // 2, dtype=torch.uint8, device=device)
            copy = torch.empty_like(flat)
            taken = statistics.median(times({"copy": partial(copy.copy_, flat)}, 1.0)["copy"])
            share = taken / rows[0].p50  # of the copy's bandwidth that ours reaches
            result.add(Row(measure, str(shape), "copy of as many bytes", "ok", p50=taken, ratio=share))


def forced(backend: str, call: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    with use_backend(backend):
        return call()


def model_measures(result: Result, clock: Clock, device: str, dtype: torch.dtype, dry: bool) -> None:
    """The whole model, inference and a training step, against MONAI's."""
    measures = ("model, inference", "model, training step")
    if result.about["monai"] == "none":
        for measure in measures:
            result.add(Row(measure, "", "MONAI", "skipped: MONAI cannot be imported"))
        return
    import copy

    from monai.networks.nets import SwinUNETR

    torch.manual_seed(0)
    extent, feature_size = (64, 12) if dry else (96, 48)
    eager = SwinUNETR(1, 14, feature_size=feature_size).to(device)
    flash = SwinUNETR(1, 14, feature_size=feature_size, use_flash_attention=True).to(device)
    flash.load_state_dict(eager.state_dict())
    nets = {"ours": swin_kernels.accelerate(copy.deepcopy(eager)), "MONAI": eager, "MONAI flash": flash}
    if not dry and clock.left > 150:  # compiling takes a minute or two
        nets["MONAI compiled"] = torch.compile(copy.deepcopy(eager))
    image = torch.randn(1, 1, extent, extent, extent, device=device)
    target = torch.randint(14, (1, extent, extent, extent), device=device)

    low_precision = dtype != torch.float32

    def infer(net: torch.nn.Module, low: bool) -> list[torch.Tensor]:
        with torch.no_grad(), torch.autocast(device, dtype if low else None, enabled=low):
            return [net(image)]

    def train(net: torch.nn.Module, low: bool) -> list[torch.Tensor]:
        net.zero_grad()
        with torch.autocast(device, dtype if low else None, enabled=low):
            loss = F.cross_entropy(net(image).float(), target)
        loss.backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None][-4:]

    for measure, run in zip(measures, (infer, train), strict=True):
        if clock.left < 60 and not dry:
            result.add(Row(measure, f"{extent}³", "ours", "skipped: no time left"))
            continue
        compare(
            result,
            measure,
            f"f{feature_size} {extent}³",
            {name: partial(run, net, low_precision) for name, net in nets.items()},
            lambda run=run: [value.double() for value in run(eager, False)],  # MONAI in float32
            lambda errors: max(2 * errors.get("MONAI", 0.0), 1e-2),
            min(8.0, clock.left / 8),
            dry,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the result")
    parser.add_argument("--part", choices=BUDGETS, help="run one part alone (default: all of them)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, no times")
    parser.add_argument("--small-call", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        print(f"verify_gpu: no CUDA device (torch {torch.__version__}); --dry-run walks the plan without one")
        return 2
    if arguments.small_call:
        small_call()
        return 0

    dry = arguments.dry_run
    device = "cpu" if dry else "cuda"
    parts = [arguments.part] if arguments.part else list(BUDGETS)
    print(f"at most {', '.join(f'{part} {BUDGETS[part]} s' for part in parts)}", flush=True)
    name = f"gpu_{arguments.part}" if arguments.part else "gpu"
    result = Result(arguments.out.resolve(), about(device), name)
    result.write()
    (result.folder / "preference.txt").write_text("")
    dtype = torch.float32 if dry else torch.bfloat16
    call = Call("window_attention", device, dtype, 16, WINDOW)
    for backend in ORDER[device]:
        reason = decline_reason(backend, call)
        result.add(Row("backend", "", backend, "ok" if reason is None else f"declined: {reason}"))
    if "tests" in parts:
        run_tests(result, Clock(BUDGETS["tests"]), dry)
    if "sanitizer" in parts:
        run_sanitizer(result, Clock(BUDGETS["sanitizer"]), dry)
    if "timing" in parts:
        clock = Clock(BUDGETS["timing"])
        partition_measures(result, clock, device, dtype, dry)
        attention_measures(result, clock, device, dtype, dry)
        model_measures(result, clock, device, dtype, dry)
    verdict = "everything ran and was correct" if result.sound else "NOT everything ran and was correct"
    print(f"{result.folder / name}.json: {verdict}")
    return 0 if result.sound else 1


if __name__ == "__main__":
    sys.exit(main())
