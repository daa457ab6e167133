"""Segmentation of whole images: networks from checkpoints, windows, the way back to the image's grid, the report."""
