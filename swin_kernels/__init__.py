"""Fused kernels for 3D shifted-window attention: the public functions and modules."""

from . import modules
from .accelerate import accelerate, restore
from .backends import use_backend
from .cuda_graph import graphed
from .ops import explain
from .ops.convolution import convolution
from .ops.instance_norm_act import instance_norm_act
from .ops.layer_norm import layer_norm
from .ops.projected_window_attention import projected_window_attention
from .ops.window_attention import window_attention
from .ops.window_partition import window_partition, window_reverse

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "accelerate",
    "convolution",
    "explain",
    "graphed",
    "instance_norm_act",
    "layer_norm",
    "modules",
    "projected_window_attention",
    "restore",
    "use_backend",
    "window_attention",
    "window_partition",
    "window_reverse",
]
