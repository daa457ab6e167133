"""The attention branch of a Swin block: norm, qkv, window attention, projection (MONAI's `forward_part1`).

Both sides start from the same contiguous ``(B, *S, C)`` volume and the same weights; MONAI's mask is
built beforehand. MONAI's flash attention works for inference only, so it has no backward row.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import swin_unetr as upstream
from peers import FEATURE_SIZE, STAGES, WINDOW, block_of, encoders, exact_gate, gate, mask_of, stage_tokens

import swin_kernels


@pytest.fixture(scope="module")
def sides():
    return encoders()


def precision(dtype: torch.dtype):
    """float32 as it is; a lower precision through autocast, as users run it."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype)


class Branch:
    """One stage's attention branch on every side, over one input."""

    def __init__(self, sides, image_extent: int, stage: int, shifted: bool):
        tokens = stage_tokens(image_extent, stage)
        channels = FEATURE_SIZE * 2 ** (stage - 1)
        generator = torch.Generator().manual_seed(stage)
        shape = (1, *(tokens,) * 3, channels)
        self.blocks = {name: block_of(encoder, stage, shifted) for name, encoder in sides.items()}
        self.x = torch.randn(shape, generator=generator)
        self.cotangent = torch.randn(shape, generator=generator)
        self.mask = mask_of(tokens, shifted)
        self.name = f"attention branch, stage {stage}{' shifted' if shifted else ''}"
        self.sizes = f"{tokens}³ tokens, {self.blocks['ours'].num_heads} heads, C {channels}, window {WINDOW}"

    def forward(self, side: str, dtype: torch.dtype) -> list[torch.Tensor]:
        with torch.no_grad(), precision(dtype):
            return [self.blocks[side].forward_part1(self.x, self.mask)]

    def forward_backward(self, side: str, dtype: torch.dtype) -> list[torch.Tensor]:
        block = self.blocks[side]
        inputs = [self.x.requires_grad_(), *block.norm1.parameters(), *block.attn.parameters()]
        with precision(dtype):
            out = block.forward_part1(self.x, self.mask)
        return [out.detach(), *torch.autograd.grad(out, inputs, self.cotangent.to(out.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shifted", [True, False], ids=["shifted", "plain"])
@pytest.mark.parametrize("stage", STAGES)
def test_forward(versus, sides, extent, stage, shifted, dtype):
    branch = Branch(sides, extent, stage, shifted)
    run = branch.forward
    truth = None if dtype == torch.float32 else run("MONAI", torch.float32)
    versus(
        f"{branch.name}, forward",
        {side: lambda side=side: run(side, dtype) for side in branch.blocks},
        gate=gate(run("ours", dtype), run("MONAI", dtype), truth),
        sizes=branch.sizes,
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shifted", [True, False], ids=["shifted", "plain"])
@pytest.mark.parametrize("stage", STAGES)
def test_forward_backward(versus, sides, extent, stage, shifted, dtype):
    branch = Branch(sides, extent, stage, shifted)
    run = branch.forward_backward
    truth = None if dtype == torch.float32 else run("MONAI", torch.float32)
    versus(
        f"{branch.name}, forward + backward",
        {side: lambda side=side: run(side, dtype) for side in ("MONAI", "ours")},
        gate=gate(run("ours", dtype), run("MONAI", dtype), truth),
        sizes=branch.sizes,
        dtype=dtype,
        rounds=5,
    )


def monai_partition(x: torch.Tensor, shift: int) -> torch.Tensor:
    """MONAI's chain: pad, roll, `window_partition`; ``(B, *S, C)`` to ``(B·nW, n, C)``."""
    pad = [p for extent in reversed(x.shape[1:-1]) for p in (0, -extent % WINDOW)]
    rolled = torch.roll(F.pad(x, (0, 0, *pad)), (-shift,) * 3, (1, 2, 3))  # (B, *padded, C)
    return upstream.window_partition(rolled, (WINDOW,) * 3)


def monai_reverse(windows: torch.Tensor, shift: int, tokens: int) -> torch.Tensor:
    """MONAI's chain: `window_reverse`, roll back, crop; ``(B·nW, n, C)`` to ``(B, *S, C)``."""
    padded = -(-tokens // WINDOW) * WINDOW
    windows = windows.view(-1, *(WINDOW,) * 3, windows.shape[-1])
    x = upstream.window_reverse(windows, (WINDOW,) * 3, (1, *(padded,) * 3))  # (1, *padded, C)
    x = torch.roll(x, (shift,) * 3, (1, 2, 3))
    return x[:, :tokens, :tokens, :tokens].contiguous()


@pytest.mark.parametrize("direction", ["window_partition", "window_reverse"])
@torch.no_grad()
def test_window_partition(versus, extent, direction):
    tokens, shift = stage_tokens(extent, 1), WINDOW // 2
    x = torch.randn(1, *(tokens,) * 3, FEATURE_SIZE, generator=torch.Generator().manual_seed(0))
    windows = monai_partition(x, shift)
    variants = {
        "window_partition": {
            "MONAI": lambda: monai_partition(x, shift),
            "ours": lambda: swin_kernels.window_partition(x, WINDOW, shift),
        },
        "window_reverse": {
            "MONAI": lambda: monai_reverse(windows, shift, tokens),
            "ours": lambda: swin_kernels.window_reverse(windows, WINDOW, shift, (tokens,) * 3),
        },
    }[direction]
    versus(
        f"{direction}, shifted",
        variants,
        gate=exact_gate([variants["ours"]()], [variants["MONAI"]()]),
        sizes=f"{tokens}³ tokens, C {FEATURE_SIZE}, window {WINDOW}, shift {shift}",
        dtype=torch.float32,
        rounds=15,
    )
