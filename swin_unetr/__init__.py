"""Swin UNETR on fused kernels: the model and its published weights."""

from typing import TYPE_CHECKING

from . import lazily

if TYPE_CHECKING:
    from .model import SwinTransformer, SwinUNETR
    from .pretrained import LoadReport, load_pretrained

__all__ = ["LoadReport", "SwinTransformer", "SwinUNETR", "load_pretrained"]

__getattr__ = lazily.names(
    __name__,
    {
        "LoadReport": "pretrained",
        "SwinTransformer": "model",
        "SwinUNETR": "model",
        "load_pretrained": "pretrained",
    },
)
