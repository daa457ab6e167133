"""A toy operator and a toy backend, laid out as CONTRIBUTING.md says; importing this adds them to the package."""

from __future__ import annotations

import importlib
from pathlib import Path

import swin_kernels

ROOT = Path(__file__).parent
for _package in ("ops", "backends", "backends.reference", "backends.cpu"):
    _module = importlib.import_module(f"swin_kernels.{_package}")
    _module.__path__.append(str(ROOT.joinpath(*_package.split("."))))

importlib.import_module("swin_kernels.backends.toy")
swin_kernels.toy_scale = importlib.import_module("swin_kernels.ops.toy_scale").toy_scale
swin_kernels.__all__.append("toy_scale")
