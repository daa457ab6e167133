"""How far a backend may be from the float64 truth: one rule, one table."""

from __future__ import annotations

import torch

PLAIN_FACTOR = 2.0
"""A backend's error may be this many times the error of plain PyTorch computing in the same dtype."""

ARITHMETIC = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 2e-6,
    torch.float16: 2e-6,
}
"""Granted beside it, relative to the largest true element: the rounding of the arithmetic, which is float32 for the
16-bit dtypes too. It carries the cases in which plain PyTorch happens to be exact (one token in a window)."""

STORAGE = {dtype: torch.finfo(dtype).eps / 2 for dtype in ARITHMETIC}
"""Granted to single elements, relative to the largest one: a correctly rounded result is never wrong, also where plain
PyTorch was lucky on the few elements of a small tensor."""


def largest(x: torch.Tensor) -> float:
    """``max |x|``; infinite if `x` is NaN anywhere."""
    value = x.abs().max().item()
    return value if value == value else float("inf")


def root_mean_square(x: torch.Tensor) -> float:
    """``sqrt(mean(x²))``; infinite if `x` is NaN anywhere."""
    value = x.square().mean().sqrt().item()
    return value if value == value else float("inf")


def assert_close(name: str, value: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    """Hold `value` to the float64 `truth` by the rule above, in the mean and in the largest element.

    Args:
        name: what is compared, for the message.
        value: what the backend computed.
        plain: what plain PyTorch computed in the same dtype.
        truth: the float64 truth; for the gradient of qkv, the errors of q, k and v each count for themselves.
    """
    assert value.shape == truth.shape, f"{name}: shape {tuple(value.shape)}, not {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    scale = largest(truth)
    parts = 3 if name == "grad of qkv" else 1
    chunks = (x.detach().double().chunk(parts, dim=-1) for x in (value, plain, truth))
    for part, v, p, t in zip("qkv", *chunks, strict=False):
        label = f"{name} ({part})" if parts > 1 else name
        for measure, granted in (
            (root_mean_square, ARITHMETIC[value.dtype] * scale),
            (largest, max(ARITHMETIC[value.dtype], STORAGE[value.dtype]) * scale),
        ):
            error, plain_error = measure(v - t), measure(p - t)
            assert error <= PLAIN_FACTOR * plain_error + granted, (
                f"{label}: {measure.__name__} error {error:.3e} against float64; plain PyTorch in {value.dtype} has "
                f"{plain_error:.3e}, granted beside it {granted:.3e}, the largest true element is {scale:.3e}"
            )
