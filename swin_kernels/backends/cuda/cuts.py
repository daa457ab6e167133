"""How the CUDA kernels cut a call into blocks, and other ways to cut it, for sweeps on a GPU and for tests.

The kernels choose by themselves, from the call and the device (`cut` and `cut_half` in `csrc/cuda`). The fields are
those of `SwinForwardCut` and `SwinBackwardCut` in `csrc/cuda/window_attention.h`; 0 in an override leaves the choice to
the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import torch

from ...geometry import WindowGrid
from . import library
from .window_attention import ELEMENTS, kernels_decline


@dataclass(frozen=True)
class ForwardCut:
    """How `attend` is cut, where a block owns the bias of 16 queries for each of its warps.

    Attributes:
        warps: of a block, at most 12, and at most one for every 16 tokens of a window.
        together: blocks that a multiprocessor should hold. It bounds the shared memory of each, and more of them make
            more `parts`. With `warps`, 16 warps at most; 12 where the kernels choose.
        resident: 1 if the bias of a block stays in shared memory, -1 if it is read from memory in every window.
        chunks: in how many even chunks the keys of a window, rounded up to 32, pass through shared memory.
        parts: into how many parts the windows are divided, at most one each; a block walks over the windows of a part.
    """

    warps: int = 0
    together: int = 0
    resident: int = 0
    chunks: int = 0
    parts: int = 0


@dataclass(frozen=True)
class BackwardCut:
    """How `differentiate_qkv` is cut, where a warp owns keys, and `differentiate_bias`, where it owns 32 queries.

    Attributes:
        key_warps: of a block of the first, at most 8: each owns 48 keys up to head_dim 16, 32 at 32 and 16 at 64. A
            window with more keys is done in turns.
        query_block: queries that pass through the shared memory of the first at a time, a multiple of 16.
        qkv_blocks: blocks of the first for each head, at most one a window; the windows are divided among them.
        bias_warps: of a block of the second, at most 6.
        parts: into how many parts the second divides the windows, at most one each. Each part needs ``4 · heads · n²``
            bytes of workspace, n rounded up to 64.
    """

    key_warps: int = 0
    query_block: int = 0
    qkv_blocks: int = 0
    bias_warps: int = 0
    parts: int = 0


CUTS: dict[str, type[ForwardCut] | type[BackwardCut]] = {"forward": ForwardCut, "backward": BackwardCut}


@contextmanager
def override(cut: ForwardCut | BackwardCut) -> Iterator[None]:
    """Cut all calls of a direction by `cut` within the context, in the whole process.

    A call that it does not fit raises a RuntimeError that names the field; so does any call with float32 tensors.
    """
    _set(isinstance(cut, BackwardCut), astuple(cut))
    try:
        yield
    finally:
        _set(isinstance(cut, BackwardCut), ())


def _set(backward: bool, values: tuple[int, ...]) -> None:
    library.operators().override_cut(backward, values)
    kernels_decline.cache_clear()  # an override may make the kernels decline a call


def chosen(
    direction: str, grid: WindowGrid, *, batch: int, heads: int, head_dim: int, dtype: torch.dtype
) -> ForwardCut | BackwardCut:
    """The cut that a call of `window_attention` with a 16-bit `dtype` uses on the current device, without zeros."""
    of_grid = (grid.spatial, grid.nominal, grid.window, grid.shift)
    cut = _cut(direction)
    return cut(
        *library.operators().attention_cut(ELEMENTS[dtype], batch, heads, head_dim, *of_grid, cut is BackwardCut)
    )


def candidates(
    direction: str, head_dim: int, tokens: int, windows: int | None = None
) -> Iterator[ForwardCut | BackwardCut]:
    """Cuts that are worth timing on an A100 or H100, 16 at most; some do not fit into the shared memory of an A100.

    They vary what `tests/cuda/floor_model.py` leaves open: how many warps hide latency, whether two small blocks wait
    less than one large one, what barriers and the ends of loops cost, how evenly windows are divided.

    Args:
        direction: a key of `CUTS`.
        head_dim, tokens: of a head of the call, and of a window.
        windows: of the call, in all its volumes. If given, cuts that need more windows are left out.
    """
    found: list[ForwardCut | BackwardCut]
    found = [*_forward(head_dim, tokens)] if _cut(direction) is ForwardCut else [*_backward(head_dim, tokens)]
    for cut in dict.fromkeys(found):
        if windows is None or max(cut.parts, getattr(cut, "qkv_blocks", 0)) <= windows:
            yield cut


def _cut(direction: str) -> type[ForwardCut] | type[BackwardCut]:
    if direction not in CUTS:
        raise ValueError(f"direction is {direction!r}; accepted are {', '.join(CUTS)}")
    return CUTS[direction]


def _forward(head_dim: int, tokens: int) -> Iterator[ForwardCut]:
    steps = -(-tokens // 32)
    tiles = 2 * steps
    even = -(-tiles // 2)  # two such blocks cover the queries of a window
    blocks = [(6, 1), (8, 1), (even, 1), (12, 1), (4, 2), (6, 2), (4, 3)]
    if head_dim <= 16:  # with more channels there are not enough registers for so many warps
        blocks.append((8, 2))
    fitting = [(warps, together) for warps, together in blocks if warps <= min(tiles, 12)]
    yield from (ForwardCut(warps, together) for warps, together in fitting)
    yield from (ForwardCut(*pair, resident=-1) for pair in ((8, 1), (6, 2), (8, 2)) if pair in fitting)
    for chunks in (4, steps):
        if -(-steps // -(-steps // chunks)) == chunks:  # evenly
            yield ForwardCut(chunks=chunks)
    yield from (ForwardCut(parts=parts) for parts in (6, 25, 49))


def _backward(head_dim: int, tokens: int) -> Iterator[BackwardCut]:
    warp_keys = 48 if head_dim <= 16 else 32 if head_dim <= 32 else 16
    padded, key_units, query_units = -(-tokens // 64) * 64, -(-tokens // warp_keys), -(-tokens // 32)
    query_blocks = [queries for queries in (32, 64, 128) if queries <= padded]
    yield from (BackwardCut(query_block=queries) for queries in query_blocks)
    if key_units >= 4:  # small enough blocks for two on a multiprocessor
        yield from (BackwardCut(4, queries) for queries in query_blocks[:2])
    yield from (BackwardCut(qkv_blocks=blocks) for blocks in (25, 49, 86))
    yield from (BackwardCut(bias_warps=warps) for warps in (2, 3, 4, 6) if warps <= query_units)
    yield from (BackwardCut(parts=parts) for parts in (3, 13, 25))
