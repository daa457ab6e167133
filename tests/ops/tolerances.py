"""How far a backend may be from the float64 truth: one rule, one table."""

from __future__ import annotations

import torch

PLAIN_FACTOR = 2.0
"""A backend's error may be this many times the error of plain PyTorch computing in the same dtype."""

PLAIN_FACTOR_OF_ELEMENTS = {torch.float64: 4.0, torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}
"""The same for the single largest error. In float32 and float64 it is a noisy number: with large scores a handful of
elements, those with a softmax that is not saturated, make up all of it."""

ARITHMETIC = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 2e-6,
    torch.float16: 2e-6,
}
"""Allowed in addition, relative to the `scale` of the results: the rounding of the arithmetic, which is float32 for
the 16-bit dtypes too. It covers the cases in which plain PyTorch happens to be exact (one token in a window)."""

STORAGE = {dtype: torch.finfo(dtype).eps / 2 for dtype in ARITHMETIC}
"""Allowed for single elements, relative to the largest one: a correctly rounded result is never wrong, even if plain
PyTorch was lucky on the few elements of a small tensor."""


def largest(x: torch.Tensor) -> float:
    """``max |x|``; infinite if `x` is NaN anywhere, 0 if it is empty."""
    if x.numel() == 0:
        return 0.0
    value = x.abs().max().item()
    return value if value == value else float("inf")


def root_mean_square(x: torch.Tensor) -> float:
    """``sqrt(mean(x²))``; infinite if `x` is NaN anywhere."""
    value = x.square().mean().sqrt().item()
    return value if value == value else float("inf")


def assert_close(name: str, value: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, scale: float) -> None:
    """Check `value` against the float64 `truth` by the rule above, in the mean and in the largest element.

    Args:
        name: what is compared, for the message.
        value: what the backend computed.
        plain: what plain PyTorch computed in the same dtype.
        truth: the float64 truth; for the gradient of qkv, the errors of q, k and v count separately.
        scale: largest true element of what is computed together; for a gradient, of all gradients, because each of them
            is what remains of sums of that size (with one token in a window the table's is 0 by cancellation).
    """
    assert value.shape == truth.shape, f"{name}: shape {tuple(value.shape)}, not {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    parts = 3 if name == "grad of qkv" else 1
    chunks = (x.detach().double().chunk(parts, dim=-1) for x in (value, plain, truth))
    for part, v, p, t in zip("qkv", *chunks, strict=False):
        label = f"{name} ({part})" if parts > 1 else name
        arithmetic, storage = ARITHMETIC[value.dtype] * scale, STORAGE[value.dtype] * largest(truth)
        for measure, factor, granted in (
            (root_mean_square, PLAIN_FACTOR, arithmetic),
            (largest, PLAIN_FACTOR_OF_ELEMENTS[value.dtype], arithmetic + storage),
        ):
            error, plain_error = measure(v - t), measure(p - t)
            assert error <= factor * plain_error + granted, (
                f"{label}: {measure.__name__} error {error:.3e} against float64; plain PyTorch in {value.dtype} has "
                f"{plain_error:.3e} and {factor} times that is accepted, beside it {granted:.3e}"
            )
