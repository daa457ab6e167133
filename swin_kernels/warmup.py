"""The kernels of a Swin UNETR compiled and loaded before its first step: ``swin-kernels warmup``.

The first step otherwise waits for Triton to compile its kernels and for the driver to compile PTX, one after the other.
Here the encoder's blocks, and the operators of each level of the decoder, run once, forward and backward, at their real
extents, in parallel processes. What they compile is then in the caches on disk (Triton's, ``TRITON_CACHE_DIR``, and the
driver's, ``CUDA_CACHE_PATH``) that every later process reads. Of blocks that need the same kernels only one is run.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import BinaryIO

import torch

from .backends import select
from .geometry import WindowGrid
from .modules import SwinTransformerBlock
from .ops._operator import has_kernel
from .ops.convolution import convolution
from .ops.instance_norm_act import InstanceNormActCall, instance_norm_act
from .ops.layer_norm import autocast_layer_norm
from .ops.window_attention import WindowAttentionCall

DTYPES = ("bfloat16", "float16", "float32")
MOST_JOBS = 16


@dataclass(frozen=True)
class Block:
    """A block of the encoder, and how it is run.

    Attributes:
        batch: volumes.
        spatial: tokens along each axis.
        channels, heads: of the stage.
        window, shift: nominal, one extent per axis.
        dtype: one of `DTYPES`; those of 16 bits by autocast, as in training.
        training: forward and backward; otherwise only the forward, without gradients.
    """

    batch: int
    spatial: tuple[int, ...]
    channels: int
    heads: int
    window: tuple[int, ...]
    shift: tuple[int, ...]
    dtype: str = "bfloat16"
    training: bool = True

    @property
    def grid(self) -> WindowGrid:
        return WindowGrid.of(self.spatial, self.window, self.shift)

    @property
    def kernels(self) -> tuple:
        """Equal for blocks that run the same compiled kernels: all else is passed to these as arguments."""
        grid = self.grid
        return self.channels // self.heads, grid.tokens, grid.is_shifted, grid.is_padded, self.dtype, self.training

    def __str__(self) -> str:
        tokens, window = ("×".join(map(str, extents)) for extents in (self.spatial, self.grid.window))
        shifted = " shifted" if self.grid.is_shifted else ""
        return f"{tokens} tokens, {self.heads} heads of {self.channels // self.heads}, window {window}{shifted}"


@dataclass(frozen=True)
class Level:
    """What the decoder's blocks run at one resolution, and the norm of the features that they get from the encoder.

    Attributes:
        batch: volumes.
        spatial: voxels along each axis.
        channels: of the blocks.
        image_channels: of the image if this is its resolution, else 0.
        dtype, training: as in `Block`.
    """

    batch: int
    spatial: tuple[int, ...]
    channels: int
    image_channels: int = 0
    dtype: str = "bfloat16"
    training: bool = True

    def __str__(self) -> str:
        return f"{'×'.join(map(str, self.spatial))} voxels, {self.channels} channels"


Piece = Block | Level


def written(piece: Piece) -> dict:
    """`piece` as values that JSON can hold."""
    return {"kind": type(piece).__name__, **asdict(piece)}


def read(values: dict) -> Piece:
    """The piece that `written` wrote."""
    kind = {"Block": Block, "Level": Level}[values["kind"]]
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return kind(**{name: value for name, value in fields.items() if name != "kind"})


def pieces_of(
    image: Sequence[int],
    feature_size: int = 48,
    window_size: int = 7,
    batch: int = 1,
    dtype: str = "bfloat16",
    training: bool = True,
) -> list[Piece]:
    """The pieces that run all kernels of a Swin UNETR: `blocks_of` and `levels_of`."""
    blocks = blocks_of(image, feature_size, window_size, batch, dtype, training)
    return [*blocks, *levels_of(image, feature_size, batch, dtype, training)]


def levels_of(
    image: Sequence[int], feature_size: int = 48, batch: int = 1, dtype: str = "bfloat16", training: bool = True
) -> list[Level]:
    """The resolutions of a Swin UNETR from the image's to the deepest, for an image of one channel."""
    found = []
    for level, channels in enumerate((1, 1, 2, 4, 8, 16)):
        spatial = tuple(extent // 2**level for extent in image)
        if math.prod(spatial) > 1:  # a single voxel has no norm
            found.append(Level(batch, spatial, channels * feature_size, int(level == 0), dtype, training))
    return found


def blocks_of(
    image: Sequence[int],
    feature_size: int = 48,
    window_size: int = 7,
    batch: int = 1,
    dtype: str = "bfloat16",
    training: bool = True,
) -> list[Block]:
    """Blocks that together run all kernels of a Swin UNETR, the largest first.

    Args:
        image: voxels ``(D, H, W)`` or ``(H, W)`` of the model's input.
        feature_size: channels of the first stage.
        window_size: along every axis.
        batch, dtype, training: as in `Block`.

    Raises:
        ValueError: extents, feature size or dtype that Swin UNETR does not accept.
    """
    if len(image) not in (2, 3) or any(extent < 32 or extent % 32 for extent in image):
        raise ValueError(f"image: got {' '.join(map(str, image))}; accepted are 2 or 3 multiples of 32")
    if feature_size < 12 or feature_size % 12:
        raise ValueError(f"feature-size: got {feature_size}; accepted are multiples of 12")
    for name, value in (("window", window_size), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}: got {value}; accepted is at least 1")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype}; accepted are {', '.join(DTYPES)}")
    found: dict[tuple, Block] = {}
    window = (window_size,) * len(image)
    for stage in range(4):
        spatial = tuple(extent // 2 ** (stage + 1) for extent in image)
        for shift in (0, window_size // 2):
            block = Block(
                *(batch, spatial, feature_size * 2**stage, 3 * 2**stage, window, (shift,) * len(image)),
                *(dtype, training),
            )
            found.setdefault(block.kernels, block)
    return list(found.values())


def run(piece: Piece, device: str) -> str:
    """Run `piece` on `device` in this process; returns the backend of its attention, or of its norms."""
    backend = _run_level(piece, device) if isinstance(piece, Level) else _run_block(piece, device)
    if device == "cuda":
        torch.cuda.synchronize()
    return backend


def _run_level(level: Level, device: str) -> str:
    dtype = getattr(torch, level.dtype)
    low = dtype != torch.float32

    def volume(channels: int) -> torch.Tensor:
        rows = torch.randn(level.batch, *level.spatial, channels, device=device, dtype=dtype)
        return rows.movedim(-1, 1).requires_grad_(level.training)  # (B, C, *S), channels last

    x, skip = volume(level.channels), volume(level.channels)
    sources = [(x, None), (x, skip)]
    if level.image_channels:
        sources.append((volume(level.image_channels).detach(), None))
    results = []
    with torch.set_grad_enabled(level.training), torch.autocast(device, dtype if low else None, enabled=low):
        results += [
            instance_norm_act(x),
            instance_norm_act(x, skip),
            instance_norm_act(x, skip, normalize_residual=True),
        ]
        results.append(autocast_layer_norm(x.movedim(1, -1)))
        for (source, beside), kernel in itertools.product(sources, (3, 1)):
            count = source.shape[1] + (0 if beside is None else beside.shape[1])
            channels = (source.shape[1], count - source.shape[1], level.channels)
            window = (kernel,) * len(level.spatial)
            if has_kernel("convolution", device=device, dtype=dtype, window=window, channels=channels):
                shape = (level.channels, count, *[kernel] * len(level.spatial))
                weight = torch.randn(shape, device=device, requires_grad=level.training)
                results.append(convolution(source, weight.to(dtype), beside))
    if level.training:
        for result in results:
            result.float().sum().backward()
    return select(InstanceNormActCall(device=device, dtype=dtype)).name


def _run_block(block: Block, device: str) -> str:
    dtype = getattr(torch, block.dtype)
    low = dtype != torch.float32
    module = SwinTransformerBlock(block.channels, block.heads, block.window, block.shift).to(device)
    x = torch.randn(block.batch, *block.spatial, block.channels, device=device, requires_grad=block.training)
    with torch.set_grad_enabled(block.training), torch.autocast(device, dtype if low else None, enabled=low):
        out = module(x)
    if block.training:
        out.float().sum().backward()
    call = WindowAttentionCall(
        device=device, dtype=dtype, head_dim=block.channels // block.heads, window=block.grid.window
    )
    return select(call).name


@dataclass(frozen=True)
class Outcome:
    """The result of a piece: the backend that `run` returned and the seconds it took, or why it failed."""

    piece: Piece
    backend: str = ""
    seconds: float = 0.0
    failure: str = ""


def warm_up(pieces: Sequence[Piece], device: str, jobs: int | None = None, limit: float = 600.0) -> Iterator[Outcome]:
    """Run each piece in its own process, so that a crash ends no other.

    Args:
        device: "cuda", the current device, or "cpu".
        jobs: processes at a time; None for one per core, at most `MOST_JOBS`.
        limit: seconds that a piece may take.

    Yields:
        the outcome of each piece as it ends.
    """
    waiting = deque(pieces)
    running: list[_Process] = []
    most = jobs or min(MOST_JOBS, len(os.sched_getaffinity(0)))
    try:
        while waiting or running:
            while waiting and len(running) < most:
                running.append(_Process(waiting.popleft(), device, limit))
            for process in running[:]:
                if outcome := process.outcome():
                    running.remove(process)
                    yield outcome
            time.sleep(0.02)
    finally:
        for process in running:
            process.kill()


class _Process:
    """A piece in a fresh interpreter that leads a process group, so that compilers that it starts end with it."""

    def __init__(self, piece: Piece, device: str, limit: float) -> None:
        self.piece, self.limit, self.began = piece, limit, time.monotonic()
        self.output, self.errors = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115 - as long as this
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, device, json.dumps(written(piece))],
            stdout=self.output,
            stderr=self.errors,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def outcome(self) -> Outcome | None:
        """None while it runs."""
        seconds = time.monotonic() - self.began
        # It keeps its process id until it is waited for, so that `kill` hits no other process.
        ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if not ended and seconds <= self.limit:
            return None
        status = self.kill()
        if not ended:
            return Outcome(self.piece, failure=f"not finished after {self.limit:g} s")
        if status == 0:
            return Outcome(self.piece, _last_line(self.output), seconds)
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return Outcome(self.piece, failure=": ".join(filter(None, (how, _last_line(self.errors)))))

    def kill(self) -> int:
        """End it and all that it started; returns its exit status."""
        os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


def _last_line(file: BinaryIO) -> str:
    file.seek(0)
    lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


def show(outcomes: Iterator[Outcome], count: int) -> bool:
    """Print a line for each of `count` outcomes as it comes; returns whether none failed."""
    began, failed = time.monotonic(), 0
    for outcome in outcomes:
        failed += bool(outcome.failure)
        ended = f"FAILED: {outcome.failure}" if outcome.failure else f"{outcome.seconds:6.1f} s  on {outcome.backend}"
        print(f"{outcome.piece!s:64}  {ended}", flush=True)
    said = f"{failed} of {count} FAILED" if failed else f"all {count} are warm"
    print(f"{said}, {time.monotonic() - began:.1f} s")
    return not failed


def _main() -> None:
    device, piece = sys.argv[1], json.loads(sys.argv[2])
    print(run(read(piece), device))


if __name__ == "__main__":
    _main()
