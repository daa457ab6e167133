"""Shifted-window attention on the GPU; scores never leave the chip.

With ``s = q·k + (bias + mask) / scale`` and ``c = scale · log2(e)``, the weight of a key for a query is
``p = 2^(c (s - lse / scale))``: one multiply-add and one exponential a score, as the bias enters where the
tensor cores accumulate. The forward keeps a running maximum and sum over blocks of keys; the backward
computes ``p`` again from the stored log-sum-exp (a natural logarithm, as in every backend)::

    out = Σ p v                          delta = Σ_channels grad_out · out = Σ_keys p dp / Σ_keys p
    dp  = grad_out · v                   ds = p (dp - delta)
    dq  = scale Σ_keys ds k              dk = scale Σ_queries ds q             dv = Σ_queries p grad_out

A 16-bit `out` is rounded: where one key has nearly all the weight its ``dp - delta`` would be nothing but the rounding.
The pass over queries takes delta from `out` as a first guess ``delta₀`` and corrects it and what it has summed::

    e  = Σ_keys p (dp - delta₀) / Σ_keys p        delta = delta₀ + e
    dq = scale (Σ_keys p (dp - delta₀) k - e Σ_keys p k)

With dropout, ``p`` becomes ``keep p / (1 - dropout_p)`` in `out` and `dv`, and ``dp`` likewise.

A scale that is negative or nearly zero cannot be divided by: q is multiplied by the part of it that is
left over ``max(|scale|, 2^-6)`` (1 for any usual scale).

Beside 16-bit tensors the tiles of the bias are float16: a bias beyond ``65504 · scale`` becomes infinite.

The bias is the same in every window. A program therefore owns one tile of it - a head and a block of
queries (or of keys, for dk and dv) - and walks over windows, so that the tile stays in its cache. The
gradient of the bias is the sum of ``ds`` over windows: one more pass, whose programs own a tile of
queries × keys, then `bias.reduce_to_table`. Nothing is accumulated by atomics; results repeat bit by bit.

Workspaces, freed on return: the bias tiles (`bias.prepare`); in the backward also two floats a score row
(`rows`), the bias gradient before reduction, and a few rows for the gradient of `pad_qkv`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ...geometry import MASK_VALUE, WindowGrid, dropout_threshold
from . import bias
from .tiles import key_of, parts, tile_for
from .windows import arguments, check_counts, device_of, first_row, locate, seams, unpack

if TYPE_CHECKING:
    from ...ops.window_attention import WindowAttentionCall

MAX_TOKENS = 16**3
MAX_HEAD_DIM = 128


def declines(call: WindowAttentionCall) -> str | None:
    tokens = math.prod(call.window)
    if tokens > MAX_TOKENS:
        return f"a window of {tokens} tokens; at most {MAX_TOKENS} are supported"
    if call.head_dim > MAX_HEAD_DIM:
        return f"head_dim {call.head_dim} is above {MAX_HEAD_DIM}"
    return None


_LN2 = tl.constexpr(math.log(2.0))
_LOG2E = tl.constexpr(math.log2(math.e))
_MASK = tl.constexpr(MASK_VALUE)
_GOLDEN = tl.constexpr(0x9E3779B9)
_MIX_1 = tl.constexpr(0x7FEB352D)
_MIX_2 = tl.constexpr(0x846CA68B)


@triton.jit
def _mix32(x):
    """`geometry._mix32` on uint32."""
    x = (x ^ (x >> 16)) * tl.cast(_MIX_1, tl.uint32)
    x = (x ^ (x >> 15)) * tl.cast(_MIX_2, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _row_hashes(seed, rows):
    """The part of `geometry.dropout_keep` that depends on the score row (int64) alone."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    return _mix32(_mix32(rows.to(tl.uint32) ^ low) + (rows >> 32).to(tl.uint32) + high)


@triton.jit
def _dropout(values, row_hash, key, threshold, keep_scale):
    """``keep · values / (1 - dropout_p)``; `row_hash` and `key` are shaped to broadcast to `values`."""
    hashes = _mix32(row_hash + key.to(tl.uint32) * tl.cast(_GOLDEN, tl.uint32))
    return tl.where(hashes >= threshold.to(tl.uint32), values * keep_scale, 0.0)


@triton.jit
def _at(tensor, first, row, stride, start, channel):
    """Pointers to channels ``start + channel`` of the tokens `row` of the volume that begins at token `first`."""
    return tensor + (first * stride + start) + (row.to(tl.int64) * stride)[:, None] + channel


@triton.jit
def _load(tensor, first, row, stride, start, channel, exists, HEAD_DIM: tl.constexpr):
    """HEAD_DIM channels from `start` of some tokens, ``(tokens, CHANNELS)``; zeros where nothing exists."""
    inside = exists[:, None] & (channel < HEAD_DIM)
    return tl.load(_at(tensor, first, row, stride, start, channel), mask=inside, other=0.0)


@triton.jit
def _load_padded(
    qkv, pad_qkv, first, row, stride, start, channel, exists, token, n, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr
):
    """As `_load`, but a padding token of the window carries `pad_qkv`."""
    tile = _load(qkv, first, row, stride, start, channel, exists, HEAD_DIM)
    if PADDED:
        pad = tl.load(pad_qkv + start + channel, mask=channel < HEAD_DIM, other=0.0)  # (1, CHANNELS)
        tile = tl.where(((token < n) & ~exists)[:, None], pad, tile)
    return tile


@triton.jit
def _times(tile, value):
    """`tile` times a scalar, in float32 on the way."""
    return (tile.to(tl.float32) * value).to(tile.dtype)


@triton.jit
def _bias_tile(
    source, head, heads, row_tile, column_tile, row, column, orientation: tl.constexpr, factor, w,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, PAIR: tl.constexpr, EXPANDED: tl.constexpr,
):  # fmt: skip
    """``factor · bias`` of a score tile in float32: from the tiles of `bias.prepare`, or looked up in the table."""
    if EXPANDED:
        n = w.window_d * w.window_h * w.window_w
        padded = bias.padded_tokens(n, ROWS, COLUMNS)
        row_tiles, column_tiles = padded // ROWS, padded // COLUMNS
        position = ((orientation * heads + head) * row_tiles + row_tile) * column_tiles + column_tile
        flat = tl.load(source + tl.cast(position, tl.int64) * (ROWS * COLUMNS) + tl.arange(0, ROWS * COLUMNS))
        tile = flat.reshape(ROWS, COLUMNS) if PAIR == 0 else bias.from_fragments(flat, ROWS, COLUMNS, WARPS, PAIR)
        return tile.to(tl.float32)
    else:
        return bias.look_up(source, head, heads, row, column, 1 - 2 * orientation, factor, w)


@triton.jit
def _scores(a, b, bias_tile, bits, row, column, factor, seam, SHIFTED: tl.constexpr, PRECISION: tl.constexpr):
    """``a bᵀ + factor · (bias + mask)``, ``(ROWS, COLUMNS)``, of the tokens `row` and `column` of a window."""
    if SHIFTED:  # noqa: SIM102 - decided at compile time
        if seam != 0:  # windows away from every seam pay nothing
            row_region = tl.load(bits + row) & seam
            column_region = tl.load(bits + column) & seam
            bias_tile += tl.where(row_region[:, None] != column_region[None, :], _MASK * factor, 0.0)
    return tl.dot(a, tl.trans(b), bias_tile, input_precision=PRECISION)


@triton.jit
def _weights(s, reference, c, dtype: tl.constexpr):
    """``2^(c (s - reference))``; `reference` has one value a query, already broadcastable to `s`."""
    if dtype == tl.float32:
        return tl.exp2((s - reference) * c)  # of large scores only the difference is exact
    else:
        return tl.exp2(s * c - reference * c)  # one multiply-add a score


@triton.jit(do_not_specialize=["heads", "windows", "threshold"])
def attend(
    qkv, bias_source, pad_qkv, bits, seed, out, lse, heads, windows, scale, factor, threshold, keep_scale, w,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr,
    PAIR: tl.constexpr, EXPANDED: tl.constexpr, SHIFTED: tl.constexpr, PADDED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`out` and `lse` of one head and one block of ROWS queries, for every ``num_programs(2)``-th window."""
    w = unpack(w)
    n = w.window_d * w.window_h * w.window_w
    c = _LOG2E / factor
    head = tl.program_id(1)
    width = heads * HEAD_DIM  # C
    channel = tl.arange(0, CHANNELS)[None, :]
    query = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    for window in range(tl.program_id(2), windows, tl.num_programs(2)):
        first = first_row(window, w)
        row, exists = locate(query, window, w, SHIFTED, PADDED)
        if tl.max(exists.to(tl.int32), 0) > 0:  # blocks of padding alone have no output
            seam = seams(window, w)
            q = _times(_load(qkv, first, row, 3 * width, head * HEAD_DIM, channel, exists, HEAD_DIM), scale * factor)
            if DROPOUT:
                row_hash = _row_hashes(tl.load(seed), (tl.cast(window, tl.int64) * heads + head) * n + query)
            maximum = tl.full((ROWS,), float("-inf"), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            values = tl.zeros((ROWS, CHANNELS), tl.float32)
            for tile in range(tl.cdiv(n, COLUMNS)):
                key = tile * COLUMNS + tl.arange(0, COLUMNS)
                at, real = locate(key, window, w, SHIFTED, PADDED)
                k_start, v_start = (heads + head) * HEAD_DIM, (2 * heads + head) * HEAD_DIM
                k = _load_padded(qkv, pad_qkv, first, at, 3 * width, k_start, channel, real, key, n, HEAD_DIM, PADDED)
                v = _load_padded(qkv, pad_qkv, first, at, 3 * width, v_start, channel, real, key, n, HEAD_DIM, PADDED)
                bias_tile = _bias_tile(
                    bias_source, head, heads, tl.program_id(0), tile, query, key, 0, factor, w,
                    ROWS, COLUMNS, WARPS, PAIR, EXPANDED,
                )  # fmt: skip
                s = _scores(q, k, bias_tile, bits, query, key, factor, seam, SHIFTED, PRECISION)
                new_maximum = tl.maximum(maximum, tl.max(s, 1))
                p = _weights(s, new_maximum[:, None], c, q.dtype)
                shrink = tl.exp2((maximum - new_maximum) * c)
                maximum = new_maximum
                total = total * shrink + tl.sum(p, 1)
                if DROPOUT:
                    p = _dropout(p, row_hash[:, None], key[None, :], threshold, keep_scale)
                values = tl.dot(p.to(v.dtype), v, values * shrink[:, None], input_precision=PRECISION)
            values = values / total[:, None]
            at = _at(out, first, row, width, head * HEAD_DIM, channel)
            tl.store(at, values.to(out.dtype.element_ty), mask=exists[:, None] & (channel < HEAD_DIM))
            tl.store(lse + (first + row) * heads + head, maximum / factor + tl.log2(total) * _LN2, mask=exists)


@triton.jit(do_not_specialize=["heads", "windows", "threshold"])
def differentiate_queries(
    grad_out, qkv, bias_source, pad_qkv, bits, seed, out, lse, rows, grad_qkv,
    heads, windows, scale, factor, threshold, keep_scale, w,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr,
    PAIR: tl.constexpr, EXPANDED: tl.constexpr, SHIFTED: tl.constexpr, PADDED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The q part of `grad_qkv`; ownership as in `attend`. It also writes what the other two passes read.

    `rows` is float32 ``(2, windows, heads, padded)``: log-sum-exp (times `factor`, as `s`) and delta of each query,
    by window. A query that does not exist has no output: its infinite log-sum-exp makes its weights zero.

    Of a 16-bit `out`, delta is only near: the ds of a query add up to what it lacks, which the float32 sums know.
    """
    CORRECTED: tl.constexpr = qkv.dtype.element_ty != tl.float32
    w = unpack(w)
    n = w.window_d * w.window_h * w.window_w
    padded = bias.padded_tokens(n, ROWS, COLUMNS)
    c = _LOG2E / factor
    head = tl.program_id(1)
    width = heads * HEAD_DIM
    channel = tl.arange(0, CHANNELS)[None, :]
    query = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    for window in range(tl.program_id(2), windows, tl.num_programs(2)):
        first = first_row(window, w)
        row, exists = locate(query, window, w, SHIFTED, PADDED)
        stored = rows + (tl.cast(window, tl.int64) * heads + head) * padded + query
        if tl.max(exists.to(tl.int32), 0) > 0:
            seam = seams(window, w)
            q = _times(_load(qkv, first, row, 3 * width, head * HEAD_DIM, channel, exists, HEAD_DIM), scale * factor)
            grad = _load(grad_out, first, row, width, head * HEAD_DIM, channel, exists, HEAD_DIM)
            o = _load(out, first, row, width, head * HEAD_DIM, channel, exists, HEAD_DIM)
            row_delta = tl.sum(grad.to(tl.float32) * o.to(tl.float32), 1)
            row_lse = tl.load(lse + (first + row) * heads + head, mask=exists, other=float("inf")) * factor
            tl.store(stored, row_lse)
            if DROPOUT:
                row_hash = _row_hashes(tl.load(seed), (tl.cast(window, tl.int64) * heads + head) * n + query)
            grad_q = tl.zeros((ROWS, CHANNELS), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)  # of p
            excess = tl.zeros((ROWS,), tl.float32)  # of ds
            mean_k = tl.zeros((ROWS, CHANNELS), tl.float32)
            for tile in range(tl.cdiv(n, COLUMNS)):
                key = tile * COLUMNS + tl.arange(0, COLUMNS)
                at, real = locate(key, window, w, SHIFTED, PADDED)
                k_start, v_start = (heads + head) * HEAD_DIM, (2 * heads + head) * HEAD_DIM
                k = _load_padded(qkv, pad_qkv, first, at, 3 * width, k_start, channel, real, key, n, HEAD_DIM, PADDED)
                v = _load_padded(qkv, pad_qkv, first, at, 3 * width, v_start, channel, real, key, n, HEAD_DIM, PADDED)
                bias_tile = _bias_tile(
                    bias_source, head, heads, tl.program_id(0), tile, query, key, 0, factor, w,
                    ROWS, COLUMNS, WARPS, PAIR, EXPANDED,
                )  # fmt: skip
                s = _scores(q, k, bias_tile, bits, query, key, factor, seam, SHIFTED, PRECISION)
                p = _weights(s, row_lse[:, None], c, q.dtype)
                dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
                if DROPOUT:
                    dp = _dropout(dp, row_hash[:, None], key[None, :], threshold, keep_scale)
                ds = p * (dp - row_delta[:, None])
                grad_q = tl.dot(ds.to(k.dtype), k, grad_q, input_precision=PRECISION)
                if CORRECTED:
                    total += tl.sum(p, 1)
                    excess += tl.sum(ds, 1)
                    mean_k = tl.dot(p.to(k.dtype), k, mean_k, input_precision=PRECISION)
            if CORRECTED:
                excess = tl.where(exists, excess / total, 0.0)
                row_delta += excess
                grad_q -= excess[:, None] * mean_k
            tl.store(stored + windows.to(tl.int64) * heads * padded, row_delta)
            at = _at(grad_qkv, first, row, 3 * width, head * HEAD_DIM, channel)
            grad_q = (grad_q * scale).to(grad_qkv.dtype.element_ty)
            tl.store(at, grad_q, mask=exists[:, None] & (channel < HEAD_DIM))
        else:
            tl.store(stored, tl.full((ROWS,), float("inf"), tl.float32))
            tl.store(stored + windows.to(tl.int64) * heads * padded, tl.zeros((ROWS,), tl.float32))


@triton.jit(do_not_specialize=["heads", "windows", "threshold"])
def differentiate_keys(
    grad_out, qkv, bias_source, pad_qkv, bits, seed, rows, grad_qkv, grad_pad_parts,
    heads, windows, scale, factor, threshold, keep_scale, w,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr,
    PAIR: tl.constexpr, EXPANDED: tl.constexpr, SHIFTED: tl.constexpr, PADDED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The k and v parts of `grad_qkv`, and this program's share of the gradient of `pad_qkv`.

    A program owns one head and a block of ROWS keys; score tiles have keys in rows and queries in columns.
    """
    w = unpack(w)
    n = w.window_d * w.window_h * w.window_w
    padded = bias.padded_tokens(n, ROWS, COLUMNS)
    c = _LOG2E / factor
    head = tl.program_id(1)
    width = heads * HEAD_DIM
    k_start, v_start = (heads + head) * HEAD_DIM, (2 * heads + head) * HEAD_DIM
    channel = tl.arange(0, CHANNELS)[None, :]
    key = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    grad_pad_k = tl.zeros((CHANNELS,), tl.float32)
    grad_pad_v = tl.zeros((CHANNELS,), tl.float32)
    for window in range(tl.program_id(2), windows, tl.num_programs(2)):
        first = first_row(window, w)
        row, real = locate(key, window, w, SHIFTED, PADDED)
        seam = seams(window, w)
        k = _load_padded(qkv, pad_qkv, first, row, 3 * width, k_start, channel, real, key, n, HEAD_DIM, PADDED)
        k = _times(k, scale * factor)
        v = _load_padded(qkv, pad_qkv, first, row, 3 * width, v_start, channel, real, key, n, HEAD_DIM, PADDED)
        stored = rows + (tl.cast(window, tl.int64) * heads + head) * padded
        if DROPOUT:
            first_score = (tl.cast(window, tl.int64) * heads + head) * n
        grad_k = tl.zeros((ROWS, CHANNELS), tl.float32)
        grad_v = tl.zeros((ROWS, CHANNELS), tl.float32)
        for tile in range(tl.cdiv(n, COLUMNS)):
            query = tile * COLUMNS + tl.arange(0, COLUMNS)
            at, exists = locate(query, window, w, SHIFTED, PADDED)
            q = _load(qkv, first, at, 3 * width, head * HEAD_DIM, channel, exists, HEAD_DIM)  # (COLUMNS, CHANNELS)
            grad = _load(grad_out, first, at, width, head * HEAD_DIM, channel, exists, HEAD_DIM)
            query_lse = tl.load(stored + query)
            query_delta = tl.load(stored + windows.to(tl.int64) * heads * padded + query)
            bias_tile = _bias_tile(
                bias_source, head, heads, tl.program_id(0), tile, key, query, 1, factor, w,
                ROWS, COLUMNS, WARPS, PAIR, EXPANDED,
            )  # fmt: skip
            s = _scores(k, q, bias_tile, bits, key, query, factor, seam, SHIFTED, PRECISION)
            p = _weights(s, query_lse[None, :], c, q.dtype)  # (ROWS, COLUMNS): keys × queries
            dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            kept = p
            if DROPOUT:
                query_hash = _row_hashes(tl.load(seed), first_score + query)
                kept = _dropout(p, query_hash[None, :], key[:, None], threshold, keep_scale)
                dp = _dropout(dp, query_hash[None, :], key[:, None], threshold, keep_scale)
            grad_v = tl.dot(kept.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
            ds = p * (dp - query_delta[None, :])
            grad_k = tl.dot(ds.to(q.dtype), q, grad_k, input_precision=PRECISION)
        grad_k *= scale
        inside = real[:, None] & (channel < HEAD_DIM)
        at = _at(grad_qkv, first, row, 3 * width, 0, channel)
        tl.store(at + k_start, grad_k.to(grad_qkv.dtype.element_ty), mask=inside)
        tl.store(at + v_start, grad_v.to(grad_qkv.dtype.element_ty), mask=inside)
        if PADDED:
            padding = ((key < n) & ~real)[:, None]
            grad_pad_k += tl.sum(tl.where(padding, grad_k, 0.0), 0)
            grad_pad_v += tl.sum(tl.where(padding, grad_v, 0.0), 0)
    if PADDED:  # (parts, 2, C)
        part = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        flat_channel = tl.arange(0, CHANNELS)
        at = grad_pad_parts + part.to(tl.int64) * (2 * width) + head * HEAD_DIM + flat_channel
        tl.store(at, grad_pad_k, mask=flat_channel < HEAD_DIM)
        tl.store(at + width, grad_pad_v, mask=flat_channel < HEAD_DIM)


@triton.jit(do_not_specialize=["heads", "first_head", "windows", "threshold"])
def differentiate_bias(
    grad_out, qkv, bias_source, pad_qkv, bits, seed, rows, grad_bias,
    heads, first_head, windows, scale, factor, threshold, keep_scale, w,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr,
    PAIR: tl.constexpr, EXPANDED: tl.constexpr, SHIFTED: tl.constexpr, PADDED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of ``ds`` over every ``num_programs(2)``-th window, for one head and ROWS queries × COLUMNS keys.

    `grad_bias` is float32 ``(slab of heads, num_programs(2), padded, padded)``.
    """
    w = unpack(w)
    n = w.window_d * w.window_h * w.window_w
    padded = bias.padded_tokens(n, ROWS, COLUMNS)
    c = _LOG2E / factor
    head = first_head + tl.program_id(1)
    width = heads * HEAD_DIM
    row_tile = tl.program_id(0) // (padded // COLUMNS)
    column_tile = tl.program_id(0) % (padded // COLUMNS)
    channel = tl.arange(0, CHANNELS)[None, :]
    query = row_tile * ROWS + tl.arange(0, ROWS)
    key = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    bias_tile = _bias_tile(
        bias_source, head, heads, row_tile, column_tile, query, key, 0, factor, w, ROWS, COLUMNS, WARPS, PAIR, EXPANDED
    )
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for window in range(tl.program_id(2), windows, tl.num_programs(2)):
        first = first_row(window, w)
        row, exists = locate(query, window, w, SHIFTED, PADDED)
        at, real = locate(key, window, w, SHIFTED, PADDED)
        seam = seams(window, w)
        k_start, v_start = (heads + head) * HEAD_DIM, (2 * heads + head) * HEAD_DIM
        q = _times(_load(qkv, first, row, 3 * width, head * HEAD_DIM, channel, exists, HEAD_DIM), scale * factor)
        grad = _load(grad_out, first, row, width, head * HEAD_DIM, channel, exists, HEAD_DIM)
        k = _load_padded(qkv, pad_qkv, first, at, 3 * width, k_start, channel, real, key, n, HEAD_DIM, PADDED)
        v = _load_padded(qkv, pad_qkv, first, at, 3 * width, v_start, channel, real, key, n, HEAD_DIM, PADDED)
        stored = rows + (tl.cast(window, tl.int64) * heads + head) * padded + query
        row_lse = tl.load(stored)
        row_delta = tl.load(stored + windows.to(tl.int64) * heads * padded)
        s = _scores(q, k, bias_tile, bits, query, key, factor, seam, SHIFTED, PRECISION)
        p = _weights(s, row_lse[:, None], c, q.dtype)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            row_hash = _row_hashes(tl.load(seed), (tl.cast(window, tl.int64) * heads + head) * n + query)
            dp = _dropout(dp, row_hash[:, None], key[None, :], threshold, keep_scale)
        total += p * (dp - row_delta[:, None])
    part = (tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)).to(tl.int64)
    at = grad_bias + (part * padded + query)[:, None] * padded + key[None, :]
    tl.store(at, total)


BIAS_LIMIT = 32 << 20
"""Bytes up to which the bias is expanded into tiles, and to which its gradient is kept before reduction."""


class _Plan:
    """How one call is cut and launched: what both directions derive from their arguments."""

    def __init__(self, step: str, qkv, bias_table, seed, grid: WindowGrid, scale: float, dropout_p: float):
        check_counts("window_attention", qkv.shape[0], grid)
        self.heads = bias_table.shape[1]
        self.head_dim = qkv.shape[-1] // (3 * self.heads)
        self.windows = qkv.shape[0] * grid.num_windows
        self.device = qkv.device
        self.tile = tile_for(key_of(step, qkv.device, qkv.dtype, self.head_dim, grid.tokens))
        self.padded = triton.cdiv(grid.tokens, longer := max(self.tile.rows, self.tile.columns)) * longer
        self.row_tiles, self.column_tiles = self.padded // self.tile.rows, self.padded // self.tile.columns
        self.w = arguments(grid)
        self.seed = qkv if seed is None else seed  # never read without dropout
        threshold = dropout_threshold(dropout_p)
        self.factor = 1 / max(abs(scale), 2**-6)
        self.scalars = (scale, self.factor, threshold - (threshold >> 31 << 32), 1 / (1 - dropout_p), self.w)

        precision = fp32_precision()
        on_tensor_cores = qkv.dtype != torch.float32 or precision == "tf32"
        self.bias_dtype = torch.float32 if qkv.dtype == torch.float32 else torch.float16
        bias_bytes = self.heads * self.padded**2 * self.bias_dtype.itemsize
        self.cut = {
            "ROWS": self.tile.rows,
            "COLUMNS": self.tile.columns,
            "WARPS": min(self.tile.warps, self.tile.rows // 16),
            "PAIR": 4 // self.bias_dtype.itemsize if on_tensor_cores else 0,
            "EXPANDED": bias_bytes <= BIAS_LIMIT,
        }
        self.options = {"num_warps": self.tile.warps, "enable_fp_fusion": True}
        self.compiled = {
            "HEAD_DIM": self.head_dim,
            "CHANNELS": max(16, triton.next_power_of_2(self.head_dim)),  # the least extent of `tl.dot`
            "SHIFTED": grid.is_shifted,
            "PADDED": grid.is_padded,
            "DROPOUT": dropout_p > 0,
            "PRECISION": precision,
            "num_stages": self.tile.stages,
            **self.cut,
            **self.options,
        }

    def prepare(self, bias_table: torch.Tensor, orientations: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What `_bias_tile` reads - tiles, or the table itself where they would be too large - and the seam bits."""
        bits = bias_table.new_empty(self.padded, dtype=torch.int32)
        programs, tiles = (self.row_tiles, self.column_tiles, 1), bias_table
        if self.cut["EXPANDED"]:
            programs = (self.row_tiles, self.column_tiles, orientations * self.heads)
            tiles = bias_table.new_empty(orientations * self.heads * self.padded**2, dtype=self.bias_dtype)
        bias.prepare[programs](bias_table, tiles, bits, self.heads, self.factor, self.w, **self.cut, **self.options)
        return tiles, bits

    def parts(self, owners: int) -> int:
        return parts(self.tile, owners, self.windows, self.device)


def _pad_source(qkv: torch.Tensor, pad_qkv: torch.Tensor | None, grid: WindowGrid) -> torch.Tensor:
    """`pad_qkv`, zeros for None; any tensor where there is no padding, as it is not read then."""
    if not grid.is_padded:
        return qkv
    return qkv.new_zeros(qkv.shape[-1]) if pad_qkv is None else pad_qkv


def fp32_precision() -> str:
    """How float32 products are formed: exactly, or in TF32 where the user allowed it for matrix products."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def forward(
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    pad_qkv: torch.Tensor | None,
    seed: torch.Tensor | None,
    grid: WindowGrid,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results of the reference's `forward`. Two launches."""
    out = qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))
    lse = qkv.new_empty((*qkv.shape[:-1], bias_table.shape[1]), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    plan = _Plan("forward", qkv, bias_table, seed, grid, scale, dropout_p)
    with device_of(qkv):
        tiles, bits = plan.prepare(bias_table, orientations=1)
        pad = _pad_source(qkv, pad_qkv, grid)
        programs = (plan.row_tiles, plan.heads, plan.parts(plan.row_tiles * plan.heads))
        attend[programs](
            qkv, tiles, pad, bits, plan.seed, out, lse, plan.heads, plan.windows, *plan.scalars, **plan.compiled
        )
    return out, lse


def backward(
    grad_out: torch.Tensor,
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    pad_qkv: torch.Tensor | None,
    seed: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    grid: WindowGrid,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments and results of the reference's `backward`. Five launches, and two more where there is padding."""
    grad_qkv = torch.empty_like(qkv)
    if qkv.numel() == 0:
        return grad_qkv, torch.zeros_like(bias_table), qkv.new_zeros(qkv.shape[-1])
    plan = _Plan("backward", qkv, bias_table, seed, grid, scale, dropout_p)
    with device_of(qkv):
        tiles, bits = plan.prepare(bias_table, orientations=2)
        pad = _pad_source(qkv, pad_qkv, grid)
        rows = lse.new_empty(2 * plan.windows * plan.heads * plan.padded)
        inputs = (grad_out, qkv, tiles, pad, bits, plan.seed)
        scalars = (plan.windows, *plan.scalars)

        parts = plan.parts(plan.row_tiles * plan.heads)
        programs = (plan.row_tiles, plan.heads, parts)
        differentiate_queries[programs](*inputs, out, lse, rows, grad_qkv, plan.heads, *scalars, **plan.compiled)

        pad_parts = qkv.new_empty((parts * plan.row_tiles, 2 * out.shape[-1]), dtype=torch.float32)
        differentiate_keys[programs](*inputs, rows, grad_qkv, pad_parts, plan.heads, *scalars, **plan.compiled)
        grad_bias_table = _differentiate_bias(plan, inputs, rows, scalars, bias_table)
    if not grid.is_padded:
        return grad_qkv, grad_bias_table, qkv.new_zeros(qkv.shape[-1])
    grad_pad = torch.nn.functional.pad(pad_parts.sum(0), (out.shape[-1], 0))  # (3C,); no gradient reaches a padding q
    return grad_qkv, grad_bias_table, grad_pad.to(qkv.dtype)


ENTRIES, QUERIES = 16, 64  # tile of `reduce_to_table`


def _differentiate_bias(plan: _Plan, inputs, rows, scalars, bias_table) -> torch.Tensor:
    """The gradient of the table, in slabs of heads where the bias gradient of all heads would exceed `BIAS_LIMIT`."""
    grad_table = torch.empty_like(bias_table)
    plane = 4 * plan.padded**2
    slab = max(1, min(plan.heads, BIAS_LIMIT // plane))
    tiles = plan.row_tiles * plan.column_tiles
    parts = min(plan.parts(tiles * slab), max(1, BIAS_LIMIT // (plane * slab)))
    grad_bias = rows.new_empty((slab, parts, plan.padded, plan.padded))
    for first in range(0, plan.heads, slab):
        heads = min(slab, plan.heads - first)
        differentiate_bias[(tiles, heads, parts)](
            *inputs, rows, grad_bias, plan.heads, first, *scalars, **plan.compiled
        )
        bias.reduce_to_table[(triton.cdiv(grad_table.shape[0], ENTRIES), heads)](
            grad_bias, grad_table, plan.heads, first, parts, plan.padded, plan.w, ENTRIES, QUERIES
        )
    return grad_table
