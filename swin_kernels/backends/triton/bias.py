"""The relative position bias on the GPU: tiles of it for the score kernels, and its gradient.

Every window of a head adds the same ``(n, n)`` bias, ``bias[i, j] = table[r(i) - r(j) + r(last)]`` with
``r`` of `windows.bias_raster`. `prepare` writes it out once per call in the order in which the score
tiles hold it in registers; where that would be too large, tiles are looked up in the table (`look_up`).
Columns beyond the window are -inf, which is what keeps the padding of a tile out of every softmax.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .windows import beyond, bias_origin, bias_raster, unpack


@triton.jit
def padded_tokens(n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`n` rounded up to whole rows and columns of tiles (powers of two)."""
    LONGER: tl.constexpr = ROWS if ROWS > COLUMNS else COLUMNS
    return tl.cdiv(n, LONGER) * LONGER


@triton.jit
def look_up(table, head, heads, row, column, sign, factor, w):
    """Tile ``(rows, columns)`` of ``factor · bias`` from the table; `sign` is 1 if rows are queries, -1 if keys."""
    n = w.window_d * w.window_h * w.window_w
    index = sign * (bias_raster(row, w)[:, None] - bias_raster(column, w)[None, :]) + bias_origin(w)
    inside = (row < n)[:, None] & (column < n)[None, :]
    value = tl.load(table + (index * heads + head), mask=inside, other=0.0).to(tl.float32) * factor
    return tl.where((column < n)[None, :], value, float("-inf"))


# A score tile lies in the registers of the tensor-core warps as 16×8 fragments: a thread holds columns
# 2t and 2t + 1 of rows g and g + 8, with g = lane // 4 and t = lane % 4, for every 8 columns and for the
# 16 rows of its warp. Stored in that order, a tile is loaded by full 16-byte accesses straight into
# place: no trip through shared memory and no shuffle. Where the compiler chooses another layout, the
# order costs a conversion, never a wrong value.


@triton.jit
def to_fragments(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, PAIR: tl.constexpr):
    """A ``(ROWS, COLUMNS)`` tile as the flat sequence that `from_fragments` reads; PAIR column octets a thread."""
    fragments = tile.reshape(ROWS // (16 * WARPS), WARPS, 2, 8, COLUMNS // (8 * PAIR), PAIR, 4, 2)
    return fragments.permute(4, 0, 1, 3, 6, 5, 2, 7).reshape(ROWS * COLUMNS)


@triton.jit
def from_fragments(flat, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, PAIR: tl.constexpr):
    """The inverse of `to_fragments`."""
    fragments = flat.reshape(COLUMNS // (8 * PAIR), ROWS // (16 * WARPS), WARPS, 8, 4, PAIR, 2, 2)
    return fragments.permute(1, 2, 6, 3, 0, 5, 4, 7).reshape(ROWS, COLUMNS)


@triton.jit(do_not_specialize=["heads"])
def prepare(
    table, tiles, bits, heads, factor, w,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, PAIR: tl.constexpr, EXPANDED: tl.constexpr,
):  # fmt: skip
    """Write what the score kernels read in every window.

    - `tiles`: ``factor · bias`` as ``(orientation, heads, row tiles, column tiles, ROWS · COLUMNS)``, in
      fragment order, or row-major if PAIR is 0. Orientation 0 has queries in rows, 1 keys. Only if EXPANDED.
    - `bits`: `windows.beyond` of the tokens of a window, int32 ``(padded,)``.

    The grid is (row tiles, column tiles, orientations · heads), or 1 in the last place without tiles.
    """
    w = unpack(w)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if tl.program_id(2) == 0:  # the same value twice, where rows and columns overlap
        tl.store(bits + row, beyond(row, w))
        tl.store(bits + column, beyond(column, w))
    if EXPANDED:
        orientation = tl.program_id(2) // heads
        tile = look_up(table, tl.program_id(2) % heads, heads, row, column, 1 - 2 * orientation, factor, w)
        flat = tile.reshape(ROWS * COLUMNS) if PAIR == 0 else to_fragments(tile, ROWS, COLUMNS, WARPS, PAIR)
        position = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
        at = tiles + tl.cast(position, tl.int64) * (ROWS * COLUMNS) + tl.arange(0, ROWS * COLUMNS)
        tl.store(at, flat.to(tiles.dtype.element_ty))


@triton.jit(do_not_specialize=["heads", "first_head", "parts", "padded"])
def reduce_to_table(
    grad_bias, grad_table, heads, first_head, parts, padded, w, ENTRIES: tl.constexpr, QUERIES: tl.constexpr
):
    """``grad_table[e, first_head + h] = Σ grad_bias[h, part, i, j]`` over all (i, j) that look up row ``e``.

    `grad_bias` is float32 ``(slab of heads, parts, padded, padded)``. An entry fixes the offset between
    query and key, so a program that owns some entries walks the queries ``i`` and finds each key ``j`` by
    subtraction. No atomics: the order of the sum is fixed.
    """
    w = unpack(w)
    n = w.window_d * w.window_h * w.window_w
    offsets_h, offsets_w = 2 * w.nominal_h - 1, 2 * w.nominal_w - 1
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    delta_d = (entry // (offsets_h * offsets_w) - (w.nominal_d - 1))[:, None]  # (ENTRIES, 1)
    delta_h = (entry // offsets_w % offsets_h - (w.nominal_h - 1))[:, None]
    delta_w = (entry % offsets_w - (w.nominal_w - 1))[:, None]
    total = tl.zeros((ENTRIES, QUERIES), tl.float32)
    for first in range(0, n, QUERIES):
        i = first + tl.arange(0, QUERIES)[None, :]  # (1, QUERIES)
        d = i // (w.nominal_h * w.nominal_w) - delta_d  # (ENTRIES, QUERIES)
        h = i // w.nominal_w % w.nominal_h - delta_h
        x = i % w.nominal_w - delta_w
        j = (d * w.nominal_h + h) * w.nominal_w + x
        inside = (i < n) & (d >= 0) & (h >= 0) & (h < w.nominal_h) & (x >= 0) & (x < w.nominal_w) & (j < n)
        for part in range(parts):
            plane = (tl.program_id(1) * parts + part).to(tl.int64) * padded * padded
            total += tl.load(grad_bias + plane + i * padded + j, mask=inside, other=0.0)
    at = grad_table + entry.to(tl.int64) * heads + first_head + tl.program_id(1)
    exists = entry < (2 * w.nominal_d - 1) * offsets_h * offsets_w
    tl.store(at, tl.sum(total, 1).to(grad_table.dtype.element_ty), mask=exists)
