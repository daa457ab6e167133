"""How work is divided: a table of tiles by pass, architecture, element size, head_dim and window.

The entries follow from instruction counts (the compile gate's table, `tests/triton/instruction_mix.csv`)
and from what fits in registers. `python -m swin_kernels.tune` times the candidates on a GPU and writes a table
in the same form as JSON; ``SWIN_KERNELS_TILES=<file>`` makes it take precedence. Nothing is tuned at a
user's first step.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1`` at import)."""

PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Tile:
    """How one pass is cut.

    Attributes:
        rows: queries (keys, for dk and dv) that a program owns; a power of two, at least 16.
        columns: extent of a block in the loop over the other side; a power of two, at least 16.
        warps: warps of a program. The bias is loaded without a shuffle if ``16 · warps`` divides `rows`.
        stages: depth of the software pipeline over the loop.
        programs: programs that each multiprocessor should get; windows are divided accordingly.
    """

    rows: int
    columns: int
    warps: int
    stages: int = 2
    programs: int = 4


@dataclass(frozen=True)
class Key:
    """What the choice depends on; 0 in the table stands for any.

    Attributes:
        step: one of `PASSES`.
        architecture: compute capability, ``10 · major + minor``.
        element_size: bytes of an element; 4 also means that float32 products are exact.
        channels: head_dim rounded up to a power of two, at least 16.
        tokens: tokens of a window, rounded up to a multiple of 16.
    """

    step: str
    architecture: int = 0
    element_size: int = 0
    channels: int = 0
    tokens: int = 0

    def matches(self, call: Key) -> bool:
        return all(
            mine in (0, theirs) for mine, theirs in zip(asdict(self).values(), asdict(call).values(), strict=True)
        )


# First match wins.
TABLE: tuple[tuple[Key, Tile], ...] = (
    (Key("forward", element_size=4), Tile(rows=32, columns=32, warps=4)),
    (Key("backward", element_size=4), Tile(rows=32, columns=32, warps=4)),
    (Key("forward", channels=128), Tile(rows=64, columns=32, warps=8, stages=1)),
    (Key("backward", channels=128), Tile(rows=32, columns=32, warps=8, stages=1)),
    (Key("backward", channels=64), Tile(rows=64, columns=32, warps=4, stages=1)),
    (Key("forward", tokens=4096), Tile(rows=64, columns=32, warps=4, stages=1)),  # the bias is looked up: registers
    (Key("backward", tokens=4096), Tile(rows=64, columns=32, warps=4, stages=1)),
    (Key("forward"), Tile(rows=64, columns=64, warps=4, stages=1)),
    (Key("backward"), Tile(rows=64, columns=64, warps=4, stages=1)),
)

_override: Tile | None = None


@contextmanager
def override(tile: Tile) -> Iterator[None]:
    """Cut every pass by `tile` within the context, for the tuner and tests."""
    global _override
    _override = tile
    try:
        yield
    finally:
        _override = None


def tile_for(key: Key) -> Tile:
    """The tile of the first matching entry: of the user's table, then of `TABLE`."""
    if _override:
        return _override
    if INTERPRETED:  # small windows still need several tiles; more than one warp's fragments; several programs
        rows = 16 if key.tokens <= 16 else 32 if key.tokens <= 64 else 64
        return Tile(rows, rows, warps=rows // 16, stages=1, programs=24)
    return choose(key, os.environ.get("SWIN_KERNELS_TILES", ""))


@functools.cache
def choose(key: Key, table_path: str = "") -> Tile:
    """As `tile_for`, with the user's table at `table_path` ("" for none)."""
    table = (*load(Path(table_path)), *TABLE) if table_path else TABLE
    return next(tile for pattern, tile in table if pattern.matches(key))


def load(path: Path) -> tuple[tuple[Key, Tile], ...]:
    """A table stored by `store`.

    Raises:
        ValueError: the file is not such a table.
    """
    try:
        return tuple((Key(**entry["key"]), Tile(**entry["tile"])) for entry in json.loads(path.read_text()))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"SWIN_KERNELS_TILES: {path} is not a tile table: {error!r}") from error


def store(path: Path, table: list[tuple[Key, Tile]]) -> None:
    """Write `table` as JSON."""
    path.write_text(as_json(table))


def as_json(table: list[tuple[Key, Tile]]) -> str:
    """The text of a file that `load` reads."""
    return json.dumps([{"key": asdict(key), "tile": asdict(tile)} for key, tile in table], indent=1) + "\n"


@functools.cache
def _architecture(device: torch.device) -> tuple[int, int]:
    """Compute capability (``10 · major + minor``) and multiprocessors of a device."""
    if INTERPRETED:
        return 0, 1
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a device."""
    return _architecture(device)[1]


def key_of(step: str, device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int) -> Key:
    """The key of a call."""
    return key_for(step, _architecture(device)[0], dtype.itemsize, head_dim, tokens)


def key_for(step: str, architecture: int, element_size: int, head_dim: int, tokens: int) -> Key:
    """As `key_of`, for a device that need not be present."""
    return Key(
        step, architecture, element_size, max(16, triton.next_power_of_2(head_dim)), 16 * triton.cdiv(tokens, 16)
    )


def parts(tile: Tile, owners: int, windows: int, device: torch.device) -> int:
    """Into how many parts the windows are divided if `owners` programs walk over all windows of each part."""
    return max(1, min(windows, tile.programs * multiprocessors(device) // owners))
