"""The losses of pretraining: rotation, contrast, reconstruction.

Sources: Tang et al., https://arxiv.org/abs/2111.14791; contrast (NT-Xent): Chen et al., "A Simple Framework for
Contrastive Learning of Visual Representations", https://arxiv.org/abs/2002.05709.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F


def contrast(first: torch.Tensor, second: torch.Tensor, temperature: float = 0.5) -> torch.Tensor:
    """NT-Xent of two views' embeddings ``(B, E)``, with the views of every rank as negatives.

    The loss is the mean over this rank's ``2B`` rows. Gradients flow into the other ranks' embeddings too, so the
    mean over ranks, and the gradient that data parallel training averages over them, are those of one process with
    the concatenated batch.

    Raises:
        ValueError: there is only one pair on all ranks, which has no negatives, or the shapes differ.
    """
    pairs = _pairs(first, second)
    return _nt_xent(pairs, gather(pairs), _rank() * len(pairs), temperature)


def contrast_of(first: torch.Tensor, second: torch.Tensor, temperature: float = 0.5) -> torch.Tensor:
    """NT-Xent of embeddings ``(B, E)`` that are all on this rank.

    Raises:
        ValueError: as for `contrast`.
    """
    pairs = _pairs(first, second)
    return _nt_xent(pairs, pairs, 0, temperature)


def _pairs(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Both views of each crop side by side, normalised to length 1: ``(B, 2, E)``."""
    if first.shape != second.shape or first.dim() != 2:
        raise ValueError(
            f"contrast: embeddings are {tuple(first.shape)} and {tuple(second.shape)}; accepted are equal (B, E)"
        )
    # float32: a sum of exponentials over many rows.
    return F.normalize(torch.stack([first, second], dim=1).float(), dim=-1)


def _nt_xent(own: torch.Tensor, everyone: torch.Tensor, start: int, temperature: float) -> torch.Tensor:
    """The mean loss of the views of ``own (B, 2, E)``, which lie in ``everyone (N, 2, E)`` from `start` on."""
    if len(everyone) == 1:
        raise ValueError("contrast: one crop on all ranks; accepted are 2 or more, since a pair alone has no negatives")
    own, everyone = own.flatten(0, 1), everyone.flatten(0, 1)  # (2B, E), (2N, E)
    rows = 2 * start + torch.arange(len(own), device=own.device)  # of `own` among everyone
    similarity = own @ everyone.T / temperature  # (2B, 2N)
    similarity = similarity.scatter(1, rows[:, None], -torch.inf)  # nothing is its own negative
    return F.cross_entropy(similarity, rows ^ 1)  # a view's positive is its neighbour in the pair


def reconstruction(found: torch.Tensor, expected: torch.Tensor, cut: torch.Tensor | None = None) -> torch.Tensor:
    """L1 distance of images ``(B, C, *S)``: over all voxels, or over those that were `cut` out.

    Args:
        cut: bool ``(B, 1, *S)``; each image counts the same, however much of it was cut. An image with no cut counts 0.
            None: all voxels.
    """
    distance = (found.float() - expected.float()).abs()  # (B, C, *S)
    if cut is None:
        return distance.mean()
    per_image = (distance * cut).flatten(1).sum(1) / (cut.flatten(1).sum(1).clamp(min=1) * distance.shape[1])  # (B,)
    return per_image.mean()


def rotation(logits: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of ``logits (B, 4)`` and quarter turns ``(B,)``."""
    return F.cross_entropy(logits.float(), turns)


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The `tensor` ``(B, …)`` of every rank, concatenated: ``(B·ranks, …)``; differentiable.

    The shape must be the same on every rank. Without a process group, `tensor` itself.
    """
    return _Gather.apply(tensor) if dist.is_available() and dist.is_initialized() else tensor


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums what every rank's loss says about this rank's part."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)  # (B·ranks, …)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
