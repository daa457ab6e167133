"""The convolution blocks of the decoder and what they are made of, at the image's resolution.

MONAI's side is what its blocks run: contiguous volumes, PyTorch's convolution, instance norm and LeakyReLU.
"MONAI, channels last" is the same layers on channels-last volumes: PyTorch's convolutions are faster there, its
instance norm is slower.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks import UnetrUpBlock
from peers import FEATURE_SIZE, gate

import swin_unetr.model
from swin_kernels import convolution, instance_norm_act

CHANNELS_LAST = {"memory_format": torch.channels_last_3d}


def volume(extent: int, channels: int, seed: int) -> torch.Tensor:
    return torch.randn(1, channels, *(extent,) * 3, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_instance_norm_act(versus, extent):
    x = volume(extent, FEATURE_SIZE, 0)
    last = x.contiguous(**CHANNELS_LAST)
    variants = {
        "MONAI": lambda: F.leaky_relu_(F.instance_norm(x), 0.01),
        "MONAI, channels last": lambda: F.leaky_relu_(F.instance_norm(last), 0.01),
        "ours": lambda: instance_norm_act(last),
    }
    versus(
        "instance norm + LeakyReLU, forward",
        variants,
        gate=gate([variants["ours"]()], [variants["MONAI"]()]),
        sizes=f"{extent}³ voxels, C {FEATURE_SIZE}",
        dtype=torch.float32,
    )


@pytest.mark.parametrize("kernel", [3, 1])
@torch.no_grad()
def test_convolution(versus, extent, kernel):
    x, skip = (volume(extent, FEATURE_SIZE, seed) for seed in (0, 1))
    x_last, skip_last = (t.contiguous(**CHANNELS_LAST) for t in (x, skip))
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(FEATURE_SIZE, 2 * FEATURE_SIZE, *(kernel,) * 3, generator=generator)
    variants = {
        "MONAI": lambda: F.conv3d(torch.cat([x, skip], 1), weight, padding=kernel // 2),
        "MONAI, channels last": lambda: F.conv3d(torch.cat([x_last, skip_last], 1), weight, padding=kernel // 2),
        "ours": lambda: convolution(x_last, weight, skip_last),
    }
    versus(
        f"concatenation + {kernel}×{kernel}×{kernel} convolution, forward",
        variants,
        gate=gate([variants["ours"]()], [variants["MONAI"]()]),
        sizes=f"{extent}³ voxels, {FEATURE_SIZE} + {FEATURE_SIZE} → {FEATURE_SIZE} channels",
        dtype=torch.float32,
        rounds=5,
    )


def test_convolution_backward(versus, extent):
    """The gradients of a 3×3×3 convolution of the image's resolution."""
    x, grad_out = (volume(extent, FEATURE_SIZE, seed) for seed in (0, 1))
    weight = torch.randn(FEATURE_SIZE, FEATURE_SIZE, 3, 3, 3, generator=torch.Generator().manual_seed(2))

    def gradients_of(convolve, **memory):
        leaves = [x.contiguous(**memory).requires_grad_(), weight.clone().requires_grad_()]
        gradient, out = grad_out.contiguous(**memory), convolve(*leaves)
        return lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True)

    def plain(x, weight):
        return F.conv3d(x, weight, padding=1)

    variants = {
        "MONAI": gradients_of(plain),
        "MONAI, channels last": gradients_of(plain, **CHANNELS_LAST),
        "ours": gradients_of(convolution, **CHANNELS_LAST),
    }
    versus(
        "3×3×3 convolution, backward",
        variants,
        gate=gate(variants["ours"](), variants["MONAI"]()),
        sizes=f"{extent}³ voxels, {FEATURE_SIZE} → {FEATURE_SIZE} channels",
        dtype=torch.float32,
        rounds=5,
    )


@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
def test_decoder_block(versus, extent, direction):
    """The last block of the decoder, which with encoder1 holds most of the model's arithmetic."""
    torch.manual_seed(0)
    theirs = UnetrUpBlock(3, FEATURE_SIZE, FEATURE_SIZE, 3, 2, "instance", res_block=True)
    ours = swin_unetr.model.DecoderBlock(3, FEATURE_SIZE, FEATURE_SIZE, "instance")
    ours.load_state_dict(theirs.state_dict())
    x, skip = volume(extent // 2, FEATURE_SIZE, 0), volume(extent, FEATURE_SIZE, 1)
    cotangent = volume(extent, FEATURE_SIZE, 2)
    memory = {"MONAI": torch.contiguous_format, "ours": torch.channels_last_3d}

    def run(block: torch.nn.Module, side: str) -> list[torch.Tensor]:
        inputs = [t.contiguous(memory_format=memory[side]) for t in (x, skip)]
        if direction == "forward":
            with torch.no_grad():
                return [block(*inputs)]
        leaves = [*(t.requires_grad_() for t in inputs), *block.parameters()]
        out = block(*inputs)
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]

    sides = {"MONAI": theirs, "ours": ours}
    # Gradients are compared without LeakyReLU's kink, where rounding decides which side a value is on.
    smooth = {side: copy.deepcopy(block) for side, block in sides.items()}
    for block in smooth.values():
        block.conv_block.lrelu = torch.nn.SiLU()
    compared = smooth if direction != "forward" else sides
    versus(
        f"decoder block, {direction}",
        {side: lambda side=side: run(sides[side], side) for side in sides},
        gate=gate(*(run(compared[side], side) for side in ("ours", "MONAI"))),
        sizes=f"{extent // 2}³ → {extent}³ voxels, C {FEATURE_SIZE}",
        dtype=torch.float32,
        rounds=5,
    )
