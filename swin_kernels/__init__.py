"""Fused kernels for 3D shifted-window attention, and the door to them."""

from . import modules
from .accelerate import accelerate, restore
from .backends import use_backend
from .cuda_graph import graphed
from .ops.convolution import convolution
from .ops.instance_norm_act import instance_norm_act
from .ops.window_attention import explain, window_attention
from .ops.window_partition import window_partition, window_reverse

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "accelerate",
    "convolution",
    "explain",
    "graphed",
    "instance_norm_act",
    "modules",
    "restore",
    "use_backend",
    "window_attention",
    "window_partition",
    "window_reverse",
]
