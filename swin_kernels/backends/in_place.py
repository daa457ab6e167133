"""What autograd must know about an operator that writes to its argument."""

from __future__ import annotations

import torch


def guard_write(namespace: torch.library.Library, operator: str) -> None:
    """Tell autograd that `operator` writes to its first argument, a tensor.

    Where a gradient would be recorded for an argument the operator raises; elsewhere the tensor's version counts the
    write, so that a graph that saved it before refuses its backward. Without this PyTorch does neither.
    """
    name = f"{namespace.ns}.{operator}"

    def run(x, *rest):
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in (x, *rest)):
            raise RuntimeError(f"torch.ops.{name}: writes to x, and a gradient is recorded; use torch.no_grad()")
        with torch._C._AutoDispatchBelowAutograd():
            getattr(getattr(torch.ops, namespace.ns), operator)(x, *rest)
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)

    namespace.impl(operator, run, "Autograd")
