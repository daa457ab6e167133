"""Scores of one predicted label map: Dice, normalised surface Dice and 95 % Hausdorff distance, by MONAI.

Sources: normalised surface Dice (NSD) over surface elements: Nikolov et al., https://arxiv.org/abs/1809.04430, as in
the Medical Segmentation Decathlon; what counts where a class is missing: Maier-Hein et al., "Metrics reloaded",
https://doi.org/10.1038/s41592-023-02151-z.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

METRICS = ("dice", "nsd", "hd95")
HIGHER_IS_BETTER = {"dice": True, "nsd": True, "hd95": False}


@dataclass(frozen=True)
class Score:
    """Scores of one class in one case. All are NaN where neither label nor prediction has the class.

    Attributes:
        dice: overlap, 0..1.
        nsd: fraction of both surfaces that lies within the tolerance of the other, 0..1.
        hd95: mm; the larger of both directions' 95th percentile of distances between surfaces. Where only one of
            the two has the class, there is no distance and the volume's diagonal counts.
        label_ml, prediction_ml: volumes in ml.
    """

    dice: float
    nsd: float
    hd95: float
    label_ml: float
    prediction_ml: float


def scores(
    prediction: np.ndarray,
    label: np.ndarray,
    classes: Mapping[str, Sequence[int]],
    spacing: Sequence[float],
    tolerance: float,
) -> dict[str, Score]:
    """Scores of `prediction` against `label`, label maps of one shape ``(*S)``, by name of class.

    Args:
        classes: for each name the values of the label map that belong to it; classes may overlap (whole tumour and
            enhancing tumour, for example).
        spacing: voxel extents in mm, one per axis.
        tolerance: distance in mm up to which surfaces agree, for NSD.

    Raises:
        ValueError: the shapes differ, or `spacing` does not fit them.
    """
    if prediction.shape != label.shape or len(spacing) != label.ndim:
        raise ValueError(
            f"scores: prediction is {prediction.shape}, label {label.shape}, spacing {tuple(spacing)}; accepted are "
            "equal shapes and one spacing an axis"
        )
    return {
        name: _score(np.isin(prediction, values), np.isin(label, values), spacing, tolerance)
        for name, values in classes.items()
    }


def by_case(scores_of: Mapping[str, Mapping[str, Score]], metric: str) -> dict[str, dict[str, float]]:
    """One of `METRICS` by case and class, from scores by case and class."""
    return {
        case: {name: getattr(score, metric) for name, score in classes.items()} for case, classes in scores_of.items()
    }


def _score(found: np.ndarray, expected: np.ndarray, spacing: Sequence[float], tolerance: float) -> Score:
    """The score of two masks ``(*S)``."""
    spacing = [float(extent) for extent in spacing]
    millilitres = math.prod(spacing) / 1000
    volumes = float(expected.sum()) * millilitres, float(found.sum()) * millilitres
    if not found.any() and not expected.any():
        return Score(math.nan, math.nan, math.nan, *volumes)
    if not found.any() or not expected.any():
        diagonal = math.dist([0] * found.ndim, [extent * n for extent, n in zip(spacing, found.shape, strict=True)])
        return Score(0.0, 0.0, diagonal, *volumes)
    box = _bounding_box(found | expected)
    # Each (1, 1, *S').
    ours, truth = (torch.from_numpy(np.ascontiguousarray(mask[box]))[None, None] for mask in (found, expected))
    with warnings.catch_warnings():
        # MONAI 1.6 warns of an argument that its own metrics pass.
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        dice = compute_dice(ours, truth)
        nsd = compute_surface_dice(
            ours, truth, [tolerance], include_background=True, spacing=spacing, use_subvoxels=True
        )
        hd95 = compute_hausdorff_distance(ours, truth, include_background=True, percentile=95, spacing=spacing)
    return Score(dice.item(), nsd.item(), hd95.item(), *volumes)


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box that holds all of `mask`: distance transforms of the rest would only cost time."""
    axes = range(mask.ndim)
    lines = [np.flatnonzero(mask.any(axis=tuple(a for a in axes if a != axis))) for axis in axes]
    return tuple(slice(line[0], line[-1] + 1) for line in lines)
