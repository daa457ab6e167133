"""A tensor times a number, on the toy backend."""

from __future__ import annotations

import torch

from swin_kernels.backends import Call


def declines(call: Call) -> str | None:
    return "a toy has no gradients" if call.backward else None


def forward(x: torch.Tensor, factor: float) -> torch.Tensor:
    return factor * x


backward = None
"""`declines`."""
