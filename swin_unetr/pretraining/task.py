"""The three tasks together: what a step of pretraining computes, and what its validation measures."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn

from . import losses
from .network import Answers
from .options import TASKS, Tasks
from .views import View, view


def two_views(crops: torch.Tensor, tasks: Tasks, random: np.random.Generator) -> View:
    """Two views of each of `crops` ``(B, C, *S)``, all first views before all second ones: ``2B``."""
    pair = [view(crops, tasks.cutout, tasks.rotation_axes, random) for _ in range(2)]
    return View(*(torch.cat([getattr(v, name) for v in pair]) for name in View.__dataclass_fields__))


def step_losses(
    network: nn.Module, crops: torch.Tensor, tasks: Tasks, random: np.random.Generator
) -> dict[str, torch.Tensor]:
    """The losses of one step on ``crops (B, C, *S)`` in 0..1, by name in `TASKS`, and their weighted sum as ``loss``.

    The views of all ranks are each other's negatives, so every rank calls this with as many crops.

    Args:
        network: a `PretrainingNetwork`, wrapped for data parallel training or not. It is called once, on both views:
            what it computes of one image does not depend on the others of the batch.
        random: decides the views.
    """
    views = two_views(crops, tasks, random)
    answers = Answers(*network(views.image))
    first, second = answers.embedding.chunk(2)
    parts = {
        "rotation": losses.rotation(answers.turns, views.turns),
        "contrast": losses.contrast(first, second, tasks.temperature),
        "reconstruction": _distance(answers, views, tasks),
    }
    return {"loss": weighted(parts, tasks), **parts}


def weighted(parts: dict, tasks: Tasks):
    """The sum of the losses `parts` by the weights of `tasks`."""
    return sum(getattr(tasks, name) * parts[name] for name in TASKS)


@dataclass(frozen=True)
class CaseAnswers:
    """What validation keeps of one case, on the CPU.

    Attributes:
        index: which case.
        rotation, reconstruction: mean losses over its views.
        accuracy: fraction of its rotations that were recognised.
        embeddings: those of its crops' views ``(2, n, E)``.
    """

    index: int
    rotation: float
    reconstruction: float
    accuracy: float
    embeddings: torch.Tensor


@torch.no_grad()
def answer(network: nn.Module, index: int, crops: torch.Tensor, tasks: Tasks, seed: int) -> CaseAnswers:
    """What `network` answers on case `index`, of which ``crops (n, C, *S)`` were taken.

    The views depend on `seed` and `index` alone: the same in every validation, on any number of ranks.
    """
    views = two_views(crops, tasks, np.random.default_rng([seed, index]))
    answers = Answers(*network(views.image))
    return CaseAnswers(
        index=index,
        rotation=losses.rotation(answers.turns, views.turns).item(),
        reconstruction=_distance(answers, views, tasks).item(),
        accuracy=(answers.turns.argmax(1) == views.turns).float().mean().item(),
        embeddings=torch.stack(answers.embedding.float().cpu().chunk(2)),  # (2, n, E)
    )


def validation_losses(cases: Iterable[CaseAnswers], tasks: Tasks) -> dict[str, float]:
    """Means over the cases of all ranks, each counted once, and the weighted sum as ``loss``.

    Contrast compares all views of all cases, so that it does not depend on how cases were shared among ranks.
    """
    # A case that padding gave to two ranks counts once; sums do not depend on the order of ranks.
    cases = [case for _, case in sorted({case.index: case for case in cases}.items())]
    first, second = torch.cat([case.embeddings for case in cases], dim=1)  # (2, N, E)
    mean = {
        name: math.fsum(getattr(case, name) for case in cases) / len(cases) for name in ("rotation", "reconstruction")
    }
    parts = mean | {"contrast": losses.contrast_of(first, second, tasks.temperature).item()}
    accuracy = math.fsum(case.accuracy for case in cases) / len(cases)
    return {"loss": weighted(parts, tasks), **{name: parts[name] for name in TASKS}, "rotation_accuracy": accuracy}


def _distance(answers: Answers, views: View, tasks: Tasks) -> torch.Tensor:
    return losses.reconstruction(answers.image, views.whole, views.cut if tasks.region == "masked" else None)
