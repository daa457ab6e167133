"""Layer norm on the GPU: a program holds whole rows, so that each is read once; the backward finds its mean again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import Call
from .tiles import INTERPRETED, multiprocessors
from .windows import device_of


def declines(call: Call) -> str | None:
    return None


ELEMENTS = 512 if INTERPRETED else 4096
"""Elements of a tile: rows times channels."""

WARPS = 8
PROGRAMS = 4
"""Programs that each multiprocessor should get in the backward; rows are divided accordingly."""


@triton.jit
def _normalized(x, offsets, exists, inside, channels, eps):
    """``(x - mean) / sqrt(variance + eps)`` of each row, and the divisor's reciprocal."""
    value = tl.load(x + offsets, mask=exists, other=0).to(tl.float32)
    mean = tl.sum(value, 1) / channels
    deviation = tl.where(inside[None, :], value - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(deviation * deviation, 1) / channels + eps)
    return deviation * scale[:, None], scale


@triton.jit(do_not_specialize=["rows"])
def normalize_rows(
    x, weight, bias, out, rows, channels, eps,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The norm of `ROWS` rows."""
    first = tl.cast(tl.program_id(0), tl.int64) * ROWS
    channel = tl.arange(0, CHANNELS)
    inside = channel < channels
    lane = tl.arange(0, ROWS)[:, None]
    exists = (lane < rows - first) & inside[None, :]
    offsets = lane * channels + channel[None, :]  # (ROWS, CHANNELS)
    value, _ = _normalized(x + first * channels, offsets, exists, inside, channels, eps)
    if WEIGHT:
        value *= tl.load(weight + channel, mask=inside, other=0).to(tl.float32)[None, :]
    if BIAS:
        value += tl.load(bias + channel, mask=inside, other=0).to(tl.float32)[None, :]
    tl.store(out + first * channels + offsets, value.to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["rows", "part_rows"])
def differentiate_rows(
    grad_out, x, weight, grad_x, found, rows, channels, part_rows, eps,
    WEIGHT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient of a part of the rows; ``found[part]`` = its share of those of weight and bias ``(2, C)``."""
    first = tl.cast(tl.program_id(0), tl.int64) * part_rows
    part_end = tl.minimum(tl.cast(part_rows, tl.int64), rows - first)
    grad_out += first * channels
    x += first * channels
    grad_x += first * channels
    channel = tl.arange(0, CHANNELS)
    inside = channel < channels
    lane = tl.arange(0, ROWS)[:, None]
    offsets = lane * channels + channel[None, :]  # (ROWS, CHANNELS)
    sums = tl.zeros((ROWS, CHANNELS), tl.float32)
    products = tl.zeros((ROWS, CHANNELS), tl.float32)
    for row in range(0, part_rows, ROWS):
        exists = (row + lane < part_end) & inside[None, :]
        normalized, scale = _normalized(x, offsets, exists, inside, channels, eps)
        grad = tl.load(grad_out + offsets, mask=exists, other=0).to(tl.float32)
        sums += grad
        products += grad * normalized
        if WEIGHT:
            grad *= tl.load(weight + channel, mask=inside, other=0).to(tl.float32)[None, :]
        mean = tl.sum(grad, 1) / channels
        mean_product = tl.sum(grad * normalized, 1) / channels
        value = scale[:, None] * (grad - mean[:, None] - normalized * mean_product[:, None])
        tl.store(grad_x + offsets, value.to(grad_x.dtype.element_ty), mask=exists)
        grad_out += ROWS * channels
        x += ROWS * channels
        grad_x += ROWS * channels
    found += tl.program_id(0) * 2 * channels
    tl.store(found + channel, tl.sum(products, 0), mask=inside)
    tl.store(found + channels + channel, tl.sum(sums, 0), mask=inside)


def _tile(channels: int) -> dict[str, int]:
    width = triton.next_power_of_2(channels)
    return {"ROWS": max(1, ELEMENTS // width), "CHANNELS": width, "num_warps": WARPS}


def forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """Arguments and results of the reference's `forward`."""
    out = torch.empty_like(x, dtype=dtype)
    if x.numel() == 0:
        return out
    channels = x.shape[-1]
    rows, tile = x.numel() // channels, _tile(channels)
    flags = weight is not None, bias is not None
    with device_of(x):
        normalize_rows[(triton.cdiv(rows, tile["ROWS"]),)](x, weight, bias, out, rows, channels, eps, *flags, **tile)
    return out


def backward(
    grad_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments and results of the reference's `backward`."""
    grad_x, channels = torch.empty_like(x), x.shape[-1]
    if x.numel() == 0:
        nothing = x.new_zeros((2, channels), dtype=torch.float32)
        return grad_x, nothing[0], nothing[1]
    rows, tile = x.numel() // channels, _tile(channels)
    part_rows = triton.cdiv(triton.cdiv(rows, PROGRAMS * multiprocessors(x.device)), tile["ROWS"]) * tile["ROWS"]
    parts = triton.cdiv(rows, part_rows)
    found = x.new_empty((parts, 2, channels), dtype=torch.float32)
    with device_of(x):
        differentiate_rows[(parts,)](
            grad_out, x, weight, grad_x, found, rows, channels, part_rows, eps, weight is not None, **tile
        )
    grad_weight, grad_bias = found.sum(0).unbind()
    return grad_x, grad_weight, grad_bias
