"""Find the tiles of the Triton kernels that are fastest on this GPU: ``python -m swin_kernels.tune``.

Times `window_attention`, forward and backward apart, for every candidate cut of the work, each checked against the
default cut before it is timed. Prints one line for each shape; ``--store tiles.json`` writes the table, and
``SWIN_KERNELS_TILES=tiles.json`` makes the kernels use it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .backends import BACKENDS
from .geometry import WindowGrid, bias_table_length

if TYPE_CHECKING:
    from .backends.triton.tiles import Key, Tile


@dataclass(frozen=True)
class Shape:
    """A call to tune for; `spatial` in tokens."""

    spatial: tuple[int, ...]
    heads: int
    head_dim: int
    window: tuple[int, ...] = (7, 7, 7)
    shift: tuple[int, ...] = (3, 3, 3)


SHAPES = tuple(Shape((extent,) * 3, heads, head_dim) for head_dim in (16, 8) for extent, heads in ((48, 3), (6, 24)))
"""For each feature size (48, 24): the shifted block of stage 1 at 96³, which takes most of the time, and the clipped
window of stage 4. A table entry depends on head_dim and window, not on the number of heads or windows, so stages 2 and
3 share that of stage 1."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
AGREEMENT = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}
"""How far a candidate's results may be from the default's: the norm of the difference over that of the results."""


def candidates(step: str, element_size: int) -> Iterator[Tile]:
    """Cuts worth timing for a pass (`tiles.PASSES`)."""
    from .backends.triton.tiles import Tile

    rows = (32, 64) if element_size == 4 else (32, 64, 128)
    for rows_, columns, stages, programs in itertools.product(rows, (32, 64), (1, 2), (2, 4, 8)):
        for warps in {max(1, rows_ // 32), rows_ // 16}:
            yield Tile(rows_, columns, warps, stages, programs)


def median_time(run: Callable[[], object]) -> float:
    """Milliseconds of `run` on the GPU."""
    import triton

    return triton.testing.do_bench(run, warmup=5, rep=30, return_mode="median")


def tune(shape: Shape, dtype: torch.dtype, step: str) -> tuple[Key, Tile, float, float]:
    """The fastest tile for one pass over `shape`: its key, the tile, its time and the default's in ms."""
    from .backends.triton import tiles, window_attention

    grid = WindowGrid.of(shape.spatial, shape.window, shape.shift)
    channels = shape.heads * shape.head_dim
    qkv = torch.randn(1, *shape.spatial, 3 * channels, device="cuda", dtype=dtype)
    table = torch.randn(bias_table_length(shape.window), shape.heads, device="cuda")
    pad = torch.randn(3 * channels, device="cuda", dtype=dtype)
    settings = (grid, shape.head_dim**-0.5, 0.0)
    out, lse = window_attention.forward(qkv, table, pad, None, *settings)
    grad = torch.randn_like(out)

    def run() -> tuple[torch.Tensor, ...]:
        if step == "forward":
            return window_attention.forward(qkv, table, pad, None, *settings)
        return window_attention.backward(grad, qkv, table, pad, None, out, lse, *settings)

    key = tiles.key_of(step, qkv.device, dtype, shape.head_dim, grid.tokens)
    default = tiles.tile_for(key)
    expected, times = run(), {default: median_time(run)}
    for tile in candidates(step, dtype.itemsize):
        with tiles.override(tile):
            try:
                found = run()
            except Exception as error:  # a cut that does not compile, or does not fit on this GPU
                print(f"  {tile}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            far = max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(found, expected, strict=True))
            if not far <= AGREEMENT[dtype]:
                raise RuntimeError(f"{shape}, {step}: {tile} and {default} disagree (by {far:.1e})")
            times[tile] = median_time(run)
    best = min(times, key=times.__getitem__)
    return key, best, times[best], times[default]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m swin_kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="tune only the first N shapes", metavar="N")
    parser.add_argument("--store", type=Path, help="write the table as JSON")
    arguments = parser.parse_args()
    if reason := BACKENDS["triton"].unavailable():
        parser.exit(1, f"backend triton: {reason}\n")
    if not torch.cuda.is_available():
        parser.exit(1, "no CUDA device: tiles can only be timed on one\n")

    from .backends.triton import tiles

    table: list[tuple[Key, Tile]] = []
    for shape, step in itertools.product(SHAPES[: arguments.shapes], tiles.PASSES):
        key, tile, best, default = tune(shape, DTYPES[arguments.dtype], step)
        print(f"{shape}, {step}: {best:.3f} ms with {tile}; {default:.3f} ms with the default", flush=True)
        table.append((key, tile))
        if arguments.store:  # after every shape, so that an interruption loses nothing
            tiles.store(arguments.store, table)


if __name__ == "__main__":
    main()
