"""Swin UNETR on fused kernels: the model and its published weights."""

from .model import SwinTransformer, SwinUNETR
from .pretrained import LoadReport, load_pretrained

__all__ = ["LoadReport", "SwinTransformer", "SwinUNETR", "load_pretrained"]
