"""The picture of the result: three planes, the labels, the prediction, and where they differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..files import replacing
from ..imaging.planes import PLANES, ras_spacing, slice_of, tint, to_ras, write_letters
from .data import CLASSES, LABEL_NOTE, Patient

COLOURS = ("#000000", "#f2b134", "#4cc3ff")  # one per class
OPACITY = (0.0, 0.12, 0.3)
DIFFERENCE = "#ff4d6d"
HU_WINDOW = (-1000.0, 300.0)


def overlay(patient: Patient, prediction: np.ndarray, scores: Mapping[str, float], path: Path, title: str) -> None:
    """Write a PNG of `prediction` ``(X, Y, Z)`` beside the labels of `patient`, in radiological view.

    Args:
        scores: Dice by class name.
    """
    hu, labels, found = (to_ras(v, patient.affine) for v in (patient.ct, patient.labels, prediction))
    spacing = ras_spacing(patient.affine)
    lung = labels == len(CLASSES) - 1
    # In each plane, the slice that shows most lung.
    cut = [int(lung.sum(axis=tuple({0, 1, 2} - {axis})).argmax()) for axis in range(3)]

    figure = Figure(figsize=(12, 12.6), facecolor="#101418")
    grid = figure.subplots(
        3, 3, gridspec_kw={"left": 0.03, "right": 0.985, "top": 0.885, "bottom": 0.065, "wspace": 0.03, "hspace": 0.05}
    )
    for row, (plane, (normal, right, up, letters)) in zip(grid, PLANES.items(), strict=True):
        ct, reference, predicted = (slice_of(v, normal, cut[normal], right, up) for v in (hu, labels, found))
        aspect = spacing[up] / spacing[right]
        for axes, content in zip(row, ("labels", "prediction", "difference"), strict=True):
            axes.imshow(ct, cmap="gray", vmin=HU_WINDOW[0], vmax=HU_WINDOW[1], aspect=aspect, interpolation="bilinear")
            if content == "difference":
                axes.imshow(tint(reference != predicted, DIFFERENCE, 0.9), aspect=aspect, interpolation="nearest")
            else:
                _paint(axes, reference if content == "labels" else predicted, aspect)
            axes.set_axis_off()
            write_letters(axes, letters)
        row[0].text(
            -0.02, 0.5, plane, transform=row[0].transAxes, rotation=90, color="#9fb0c0", fontsize=12,
            ha="right", va="center",
        )  # fmt: skip
    for axes, name in zip(grid[0], ("labels (by rule)", "Swin UNETR", "where they differ"), strict=True):
        axes.set_title(name, color="white", fontsize=13, pad=8)

    figure.text(0.03, 0.965, title, color="white", fontsize=16, weight="bold", va="center")
    figure.text(0.03, 0.935, LABEL_NOTE, color="#9fb0c0", fontsize=11, va="center")
    handles = [
        Patch(color=colour, label=f"{name}: Dice {scores[name]:.3f}")
        for name, colour in zip(CLASSES[1:], COLOURS[1:], strict=True)
    ]
    handles.append(Patch(color=DIFFERENCE, label="labels and prediction differ"))
    figure.legend(
        handles=handles, loc="lower center", ncols=len(handles), frameon=False, labelcolor="white", fontsize=12,
        bbox_to_anchor=(0.5, 0.008),
    )  # fmt: skip
    with replacing(path) as file:
        FigureCanvasAgg(figure).print_figure(file, dpi=110, facecolor=figure.get_facecolor(), format="png")


def _paint(axes, labels: np.ndarray, aspect: float) -> None:
    for index in range(1, len(CLASSES)):
        mask = labels == index
        if mask.any():
            axes.imshow(tint(mask, COLOURS[index], OPACITY[index]), aspect=aspect, interpolation="nearest")
            axes.contour(mask, [0.5], colors=COLOURS[index], linewidths=1.1)
