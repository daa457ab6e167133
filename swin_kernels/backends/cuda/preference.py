"""The calls that these kernels leave to another backend, because it was measured to be faster.

`MEASURED` is empty until such a call is found; `make verify-gpu` times this backend beside Triton's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...ops.window_attention import WindowAttentionCall


@dataclass(frozen=True)
class Measured:
    """A class of `window_attention` calls that runs faster elsewhere.

    Attributes:
        capability: compute capability of the GPU.
        backward: the direction.
        dtype_bytes: size of an element, 2 or 4.
        head_dim: channels of a head.
        tokens: smallest and largest number of tokens in a window.
        backend: the one that is faster.
        ours_ms, theirs_ms: median times.
        source: result file and commit that they come from.
    """

    capability: tuple[int, int]
    backward: bool
    dtype_bytes: int
    head_dim: int
    tokens: tuple[int, int]
    backend: str
    ours_ms: float
    theirs_ms: float
    source: str

    def covers(self, capability: tuple[int, int], call: WindowAttentionCall) -> bool:
        ours = (self.capability, self.backward, self.dtype_bytes, self.head_dim)
        asked = (capability, call.backward, call.dtype.itemsize, call.head_dim)
        return ours == asked and self.tokens[0] <= math.prod(call.window) <= self.tokens[1]


MEASURED: tuple[Measured, ...] = ()


def faster_elsewhere(capability: tuple[int, int], call: WindowAttentionCall) -> str | None:
    """Why a `window_attention` call is left to another backend, or None."""
    for line in MEASURED:
        if line.covers(capability, call):
            return f"{line.backend} took {line.theirs_ms} ms where this took {line.ours_ms} ms ({line.source})"
    return None
