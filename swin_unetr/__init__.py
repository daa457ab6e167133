"""Swin UNETR on fused kernels: the model and its published weights."""

from typing import TYPE_CHECKING

from . import lazily

if TYPE_CHECKING:
    from .loading import LoadReport, load_pretrained
    from .model import SwinTransformer, SwinUNETR

__all__ = ["LoadReport", "SwinTransformer", "SwinUNETR", "load_pretrained"]

__getattr__ = lazily.names(
    __name__,
    {
        "LoadReport": "loading",
        "SwinTransformer": "model",
        "SwinUNETR": "model",
        "load_pretrained": "loading",
    },
)
