"""A small trained-looking checkpoint with everything that export reads, and an export of it."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from swin_unetr import checkpoints, export
from swin_unetr.architecture import Architecture
from swin_unetr.labels import Labels
from swin_unetr.preprocessing import Preprocessing

ROI = (64, 32, 32)
ORGANS = Labels({"liver": [6], "spleen": [1]})
CT = Preprocessing(spacing=(2.0, 2.0, 3.0), window=(-100.0, 100.0))
BUNDLE = "swin_unetr_segmentation"


def checkpoint(
    path: Path,
    labels: Labels = ORGANS,
    preprocessing: Preprocessing = CT,
    content: dict | None = None,
    roi: tuple[int, ...] = ROI,
    **architecture,
) -> Path:
    """Write a checkpoint of random weights whose moving average has others; the first stage has shifted windows."""
    options = {"out_channels": labels.channels, "feature_size": 12, "depths": (2, 1, 1, 1), "drop_rate": 0.5}
    of = Architecture(**options | architecture)
    torch.manual_seed(1)
    whole = {
        "kind": "train",
        "architecture": asdict(of),
        "roi": list(roi),
        "preprocessing": asdict(preprocessing),
        "labels": {"classes": {k: list(v) for k, v in labels.classes.items()}, "overlapping": labels.overlapping},
        "model": of.build().state_dict(),
        "ema": of.build().state_dict(),
    }
    checkpoints.write(path, whole | (content or {}))
    return path


def run(path: Path, out: Path, *names: str, **options) -> tuple[int, str]:
    """Exit status and output of an export."""
    text = io.StringIO()
    status = export.run(export.ExportOptions(path, out, names, **options), Console(file=text, width=200))
    return status, text.getvalue()
