"""The precision in which a device computes fastest, among those in which training converges without loss scaling."""

from __future__ import annotations

import torch

from swin_kernels import cpu_bfloat16

from .. import distributed


def has_bf16(device: torch.device) -> bool:
    """Whether `device` has instructions for bfloat16; without them PyTorch's bfloat16 is many times slower."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return cpu_bfloat16.has_bfloat16()


def chosen(asked: str, device: torch.device) -> str:
    """The precision "fp32", "bf16" or "fp16" of a job that was `asked` for one of them or for "auto"; on all ranks."""
    if asked != "auto":
        return asked
    return "fp32" if distributed.any_rank(not has_bf16(device), device) else "bf16"


def reason(device: torch.device) -> str:
    """Why "auto" chose what it did, in words."""
    if device.type == "cuda":
        name, has = torch.cuda.get_device_name(device), "bfloat16 tensor cores"
    else:
        name, has = "this processor", "bfloat16 instructions (AVX512_BF16 or AMX)"
    return f"{name} has {has}" if has_bf16(device) else f"{name} has no {has}"
