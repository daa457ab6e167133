"""Plain PyTorch: the definition every other backend is measured against. Runs everywhere."""

from __future__ import annotations

from .. import Call
from . import convolution, instance_norm_act, layer_norm, window_attention, window_partition

__all__ = [
    "convolution",
    "instance_norm_act",
    "layer_norm",
    "supports",
    "unavailable",
    "window_attention",
    "window_partition",
]


def unavailable() -> str | None:
    return None


def supports(call: Call) -> str | None:
    return None
