"""The report of a prediction: a table of volumes, and a single self-contained HTML file."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..imaging.planes import PLANES, ras_spacing, slice_of, tint, to_ras, write_letters
from ..labels import Labels
from ..names import TEXT, cell, markup
from .volumes import Organ

COLOURS = (
    "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999933", "#882255", "#44aa99",
    "#ddcc77", "#aa4499", "#88ccee", "#117733", "#cc6677",
)  # fmt: skip
"""Colours of the classes in turn: the palettes of Okabe and Ito and of P. Tol, which colour-blind readers can tell
apart."""
DARK = "#101418"
NOTICE = "Research software, not a medical device: not for diagnosis or treatment."


@dataclass(frozen=True)
class SegmentedCase:
    """A segmented image, ready for the report.

    Attributes:
        source: where the image came from.
        output: file name of the label map.
        spacing: mm.
        seconds: from reading to writing.
        picture, entropy: PNG in base64; `entropy` is "" if it was not asked for.
    """

    name: str
    source: str
    output: str
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    organs: list[Organ]
    warnings: list[str]
    notes: list[str]
    seconds: float
    picture: str
    entropy: str


def picture(image: np.ndarray, labels: np.ndarray, affine: np.ndarray, options: Labels) -> str:
    """Three planes of ``image (X, Y, Z)`` with ``labels (X, Y, Z)``, each where it shows most of them: PNG, base64."""
    low, high = np.percentile(image[:: 1 + image.shape[0] // 64, :: 1 + image.shape[1] // 64], (1, 99.5))
    figure, panels = _panels(labels, affine)
    for axes, (volumes, aspect) in panels(image, labels):
        grey, values = volumes
        axes.imshow(grey, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect, interpolation="bilinear")
        for colour, value in zip(_colours(options), options.written(), strict=True):
            mask = values == value
            if mask.any():
                axes.imshow(tint(mask, colour, 0.3), aspect=aspect, interpolation="nearest")
                if min(mask.shape) > 1:  # a volume of one slice is a line in two of the planes
                    axes.contour(mask, [0.5], colors=colour, linewidths=1.0)
    return _png(figure)


def entropy_picture(entropy: np.ndarray, labels: np.ndarray, affine: np.ndarray) -> str:
    """The same planes of ``entropy (X, Y, Z)`` in 0..1."""
    figure, panels = _panels(labels, affine)
    for axes, ((values,), aspect) in panels(entropy):
        axes.imshow(values, cmap="magma", vmin=0, vmax=1, aspect=aspect, interpolation="bilinear")
    return _png(figure)


def _panels(labels: np.ndarray, affine: np.ndarray):
    """A figure, and a function from volumes on the grid of `labels` to its axes, with the slices to show and their
    aspect."""
    spacing = ras_spacing(affine)
    found = to_ras(labels, affine) > 0
    counts = [found.sum(axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
    cut = [int(count.argmax()) if count.any() else len(count) // 2 for count in counts]
    extents = [found.shape[axis] * spacing[axis] for axis in range(3)]
    widths = [extents[right] for _, right, _, _ in PLANES.values()]
    tallest = max(extents[up] for _, _, up, _ in PLANES.values())
    figure = Figure(figsize=(13.5, max(2.0, 13.2 * tallest / sum(widths))), facecolor=DARK)
    row = figure.subplots(
        1,
        3,
        width_ratios=widths,
        gridspec_kw={"left": 0.005, "right": 0.995, "top": 0.99, "bottom": 0.01, "wspace": 0.02},
    )

    def panels(*volumes: np.ndarray):
        turned = [to_ras(volume, affine) for volume in volumes]
        for axes, (normal, right, up, letters) in zip(row, PLANES.values(), strict=True):
            axes.set_axis_off()
            yield axes, ([slice_of(v, normal, cut[normal], right, up) for v in turned], spacing[up] / spacing[right])
            write_letters(axes, letters)

    return figure, panels


def _png(figure: Figure) -> str:
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(file, dpi=90, facecolor=figure.get_facecolor(), format="png")
    return base64.b64encode(file.getvalue()).decode()


def _colours(options: Labels) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(options.classes))]


def tables(cases: Sequence[SegmentedCase]) -> dict[str, bytes]:
    """volumes.csv, one line per case and class, and volumes.json, which also has sources and warnings, by file name."""
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["case", "class", "millilitres", "mean", "std", "voxels", "cut"])
    for case in cases:
        for organ in case.organs:
            numbers = ["" if math.isnan(x) else x for x in (organ.millilitres, organ.mean, organ.std)]
            table.writerow([cell(case.name), cell(organ.name), *numbers, organ.voxels, " ".join(organ.cut)])
    plain = {
        case.name: {
            "source": case.source,
            "output": case.output,
            "spacing": list(case.spacing),
            "organs": [{k: _known(v) for k, v in asdict(organ).items()} for organ in case.organs],
            "warnings": case.warnings,
            "notes": case.notes,
            "seconds": case.seconds,
        }
        for case in cases
    }
    return {
        "volumes.csv": text.getvalue().encode(**TEXT),
        "volumes.json": (json.dumps(plain, indent=2, allow_nan=False) + "\n").encode(),
    }


def _known(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value


STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --muted: #5b6b7d; --line: #d8dee6; --card: #fff; --page: #f4f6f8;
  --warn: #8a4b00; --warn-back: #fff4e0; --bad: #a3211b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --muted: #9fb0c0; --line: #2c3742; --card: #182028;
  --page: #101418; --warn: #ffcf8a; --warn-back: #33270f; --bad: #ff9d96; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 18px; margin: 0 0 2px; overflow-wrap: anywhere; }
.notice { color: var(--muted); margin: 4px 0 20px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px; margin: 0 0 18px;
  break-inside: avoid; }
.about { color: var(--muted); font-size: 13px; overflow-wrap: anywhere; margin: 0 0 10px; }
img { width: 100%; display: block; border-radius: 6px; }
figure { margin: 0 0 12px; } figcaption { color: var(--muted); font-size: 13px; margin-top: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; color: var(--muted); font-size: 13px; }
.how td { white-space: normal; overflow-wrap: anywhere; text-align: left; vertical-align: top; }
.how td:first-child { overflow-wrap: normal; min-width: 7.5em; color: var(--muted); }
summary { cursor: pointer; font-weight: 600; font-size: 18px; } details table { margin-top: 8px; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 8px; }
.warn { background: var(--warn-back); color: var(--warn); border-radius: 6px; padding: 8px 12px; margin: 0 0 12px; }
.warn ul { margin: 0; padding-left: 18px; } .bad { color: var(--bad); }
@media (max-width: 600px) { section { padding: 12px; } img { width: 720px; }
  .classes th, .classes td:first-child { white-space: normal; }
  .classes th, .classes td { padding: 5px 4px; } }
@media print { body { background: #fff; } }
"""


def page(
    cases: Sequence[SegmentedCase],
    failed: Mapping[str, str],
    how: Mapping[str, str],
    options: Labels,
    left_out: Sequence[tuple[Path, str]] = (),
) -> bytes:
    """An HTML file: pictures, volumes and warnings of every case, and how they were made.

    Args:
        failed: reason by name of case.
        how: checkpoints, options and versions, by what they are.
        left_out: files of the input that are not images, and why.
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>Segmentation of {_count(len(cases))}</title><style>{STYLE}</style><main>",
        f"<h1>Segmentation of {_count(len(cases))}</h1><p class=notice>{NOTICE}</p>",
    ]
    if failed:
        rows = "".join(f"<li><b>{markup(name)}</b>: {markup(why)}</li>" for name, why in failed.items())
        parts.append(
            f"<section><h2 class=bad>{_count(len(failed))} could not be segmented</h2><ul>{rows}</ul></section>"
        )
    parts += [_case(case, options) for case in cases]
    if left_out:
        rows = "".join(f"<tr><td>{markup(path)}</td><td>{markup(why)}</td></tr>" for path, why in left_out)
        count = f"{len(left_out)} file{'s' * (len(left_out) != 1)} of the input left out"
        parts.append(f"<section><details><summary>{count}</summary><table class=how>{rows}</table></details></section>")
    rows = "".join(f"<tr><td>{markup(name)}</td><td>{markup(value)}</td></tr>" for name, value in how.items())
    parts.append(f"<section><h2>How it was made</h2><table class=how>{rows}</table></section></main></html>")
    return "\n".join(parts).encode(**TEXT)


def _case(case: SegmentedCase, options: Labels) -> str:
    about = (
        f"{markup(case.source)} → {markup(case.output)} · {' × '.join(map(str, case.shape))} voxels of "
        f"{' × '.join(f'{extent:.3g}' for extent in case.spacing)} mm · {case.seconds:.1f} s"
    )
    parts = [f"<section><h2>{markup(case.name)}</h2><p class=about>{about}</p>"]
    if case.warnings or case.notes:
        items = "".join(f"<li>{markup(text)}</li>" for text in (*case.warnings, *case.notes))
        parts.append(f"<div class=warn><ul>{items}</ul></div>")
    parts.append(
        _image(case.picture, "Axial, coronal and sagittal planes, each where most is segmented; radiological view")
    )
    if case.entropy:
        parts.append(
            _image(case.entropy, "Entropy of the prediction in the same planes: dark is certain, bright is not")
        )
    rows = "".join(
        f"<tr><td><span class=swatch style='background:{colour}'></span>{markup(organ.name)}</td>"
        f"<td>{organ.millilitres:,.1f} ml</td><td>{_spread(organ)}</td></tr>"
        for colour, organ in zip(_colours(options), case.organs, strict=True)
    )
    head = "<tr><th>class</th><th>volume</th><th>intensity (mean ± SD)</th></tr>"
    parts.append(f"<div class=scroll><table class=classes>{head}{rows}</table></div></section>")
    return "\n".join(parts)


def _image(png: str, caption: str) -> str:
    picture = f"<img src='data:image/png;base64,{png}' alt='{caption}'>"
    return f"<figure><div class=scroll>{picture}</div><figcaption>{caption}</figcaption></figure>"


def _spread(organ: Organ) -> str:
    return "–" if math.isnan(organ.mean) else f"{organ.mean:,.1f} ± {organ.std:,.1f}"


def _count(cases: int) -> str:
    return f"{cases} case" + "s" * (cases != 1)
