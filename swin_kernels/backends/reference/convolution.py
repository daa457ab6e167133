"""Convolution over a concatenation, by PyTorch's convolution. Volumes are ``(B, *S, C)``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

LEAST_EXTENT = 3
"""Extent from which PyTorch's gradient of a bfloat16 weight is right on a CPU: see `_is_miscomputed`."""


def forward(x: torch.Tensor, skip: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """``(B, *S, C1)`` and ``(B, *S, C2)`` with ``(C_out, C1 + C2, k, …)`` to ``(B, *S, C_out)``."""
    both = x if skip is None else torch.cat([x, skip], -1)  # (B, *S, C1 + C2)
    convolve = F.conv2d if weight.dim() == 4 else F.conv3d
    return convolve(both.movedim(-1, 1), weight, padding=weight.shape[-1] // 2).movedim(1, -1).contiguous()


def backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    skip: torch.Tensor | None,
    weight: torch.Tensor,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of `x`, `skip` and `weight`; None for those not `wanted`."""
    parts = [(x, weight[:, : x.shape[-1]], wanted[0])]
    if skip is not None:
        parts.append((skip, weight[:, x.shape[-1] :], wanted[1]))
    gradients = [source_gradients(grad_out, source, part, (asked, wanted[2])) for source, part, asked in parts]
    of_sources, of_weight = [g[0] for g in gradients], [g[1] for g in gradients if g[1] is not None]
    return of_sources[0], of_sources[1] if skip is not None else None, torch.cat(of_weight, 1) if wanted[2] else None


def source_gradients(
    grad_out: torch.Tensor, source: torch.Tensor, weight: torch.Tensor, wanted: Sequence[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of one source and of its part of the weight; None for those not `wanted`."""
    if wanted[1] and _is_miscomputed(source):
        of_source, _ = source_gradients(grad_out, source, weight, (wanted[0], False))
        _, of_weight = source_gradients(grad_out.float(), source.float(), weight.float(), (False, True))
        return of_source, None if of_weight is None else of_weight.to(weight.dtype)
    axes = weight.dim() - 2
    of_source, of_weight, _ = torch.ops.aten.convolution_backward(
        grad_out.movedim(-1, 1),
        source.movedim(-1, 1),
        weight,
        None,
        [1] * axes,
        [weight.shape[-1] // 2] * axes,
        [1] * axes,
        False,
        [0] * axes,
        1,
        [*wanted, False],
    )
    return of_source.movedim(1, -1).contiguous() if wanted[0] else None, of_weight


def _is_miscomputed(source: torch.Tensor) -> bool:
    """Whether PyTorch's gradient of the weight may contain uninitialised memory.

    In bfloat16 on a CPU, for volumes thinner than a window of 3: 2×1×6 and 2×8×8 voxels on a Zen 4, 1×9×1 with AMX.
    """
    return source.device.type == "cpu" and source.dtype == torch.bfloat16 and min(source.shape[1:-1]) < LEAST_EXTENT
