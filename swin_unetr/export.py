"""`swin-unetr export`: a trained network as files for other runtimes, each checked against the network itself."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from . import lock
from .exporting import graphs, record
from .exporting.bundle import Bundle, BundleOptions
from .exporting.formats import TOLERANCE, CheckFailed, Format, Inputs, check
from .exporting.weights import Safetensors
from .files import naming
from .names import say
from .segmenter import Segmenter

TEMPORARY = ".export-"
FormatName = Literal["pt2", "onnx", "torchscript", "safetensors", "bundle"]
FORMATS: tuple[FormatName, ...] = get_args(FormatName)


@dataclass
class ExportOptions:
    """Write a trained network for other runtimes.

    Writes into `out` what `formats` names, and export.json: SHA-256 of every file, versions, and the error. Each file
    is loaded again and compared with the network on two images; one that does not agree is removed.

    Args:
        checkpoint: best.pt or another checkpoint of a training; averaged weights are used if it has any.
        out: folder for the files.
        formats: pt2 (torch.export), onnx, torchscript, safetensors (weights alone) and bundle (for MONAI).
        shape: voxels of an image on each axis, multiples of 32; by default the window of the training.
        batch: images at once; null for any number.
        opset: of ONNX, 18 or newer.
        portable: write pt2 in PyTorch's own operators, for machines without this package. onnx and torchscript always
            are.
        bundle: what the MONAI bundle says.
        overwrite: replace files in `out`.
    """

    checkpoint: Path
    out: Path
    formats: tuple[FormatName, ...] = FORMATS
    shape: tuple[int, ...] | None = None
    batch: int | None = None
    opset: int = 20
    portable: bool = False
    bundle: BundleOptions = field(default_factory=BundleOptions)
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.formats or any(name not in FORMATS for name in self.formats):
            raise ValueError(f"formats is {list(self.formats)}; accepted are {', '.join(FORMATS)}")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch is {self.batch}; accepted is a number ≥ 1, or null for any")
        if self.opset < 18:
            raise ValueError(f"opset is {self.opset}; accepted is a number ≥ 18")


def run(options: ExportOptions, console: Console | None = None) -> int:
    """Export; returns the exit status: 0, or 1 if a format could not be written or does not agree with the network.

    Raises:
        ValueError: the checkpoint or options do not fit, a package is missing, files are in the way, or `options.out`
            cannot be written to or is in use.
        OSError: the checkpoint cannot be read.
    """
    console = console or Console()
    lock.check(options.out)
    segmenter = Segmenter.read(options.checkpoint)
    inputs = Inputs(segmenter.description.architecture.in_channels, _shape(options, segmenter), options.batch)
    formats = _formats(options, segmenter, inputs)
    _check_packages(formats)
    with lock.owned(options.out, "export"):
        _check_in_the_way(formats, options)
        exported = record.read(options.out)
        for left in options.out.glob(f"{TEMPORARY}*"):  # by an export that was killed
            if not (left / "old").exists():  # what was there before, moved out of the way of the new
                shutil.rmtree(left)
        failed = _export_all(formats, segmenter, inputs, exported, options, console)
    _show(formats, exported, failed, options.out, console)
    return 1 if failed else 0


def _export_all(
    formats: Mapping[str, Format],
    segmenter: Segmenter,
    inputs: Inputs,
    exported: dict[str, Any],
    options: ExportOptions,
    console: Console,
) -> dict[str, str]:
    """Write `formats`, and add them to the record `exported`; why others failed, by name."""
    source = {
        "checkpoint": {"name": options.checkpoint.name, "sha256": segmenter.sha256},
        "averaged weights": segmenter.averaged,
        **segmenter.description.plain(),
    }
    images = inputs.checks()
    with torch.no_grad():
        expected = [segmenter.network(image) for image in images]
    failed: dict[str, str] = {}
    for name, form in formats.items():
        with console.status(f"exporting {name}"):
            try:
                result = _export(form, segmenter, images, expected, options.out)
                record.write(options.out, exported | {name: {**result, "network": source}})
            # Exporters and runtimes raise what they like; the other formats can continue.
            except Exception as error:
                failed[name] = str(error) if isinstance(error, CheckFailed) else f"{type(error).__name__}: {error}"
                continue
        exported[name] = {**result, "network": source}
    return failed


def _shape(options: ExportOptions, segmenter: Segmenter) -> tuple[int, ...]:
    """Extents of the images that the files take."""
    dims = segmenter.description.architecture.spatial_dims
    shape = segmenter.description.roi if options.shape is None else tuple(options.shape)
    if len(shape) != dims or any(extent < 32 or extent % 32 for extent in shape) or max(shape) == 32:
        raise ValueError(f"shape is {shape}; accepted are {dims} multiples of 32, at least one of them 64 or more")
    return shape


def _formats(options: ExportOptions, segmenter: Segmenter, inputs: Inputs) -> dict[str, Format]:
    """What `options.formats` names, in the order of `FORMATS`."""
    if "bundle" in options.formats and segmenter.description.architecture.spatial_dims != 3:
        raise ValueError("formats has bundle, and the network is one for images in 2D; accepted are networks in 3D")
    known: dict[str, Format] = {
        "pt2": graphs.Program(inputs, options.portable),
        "onnx": graphs.Onnx(inputs, options.opset),
        "torchscript": graphs.TorchScript(inputs),
        "safetensors": Safetensors(),
        "bundle": Bundle(options.bundle, portable=segmenter.description.architecture.downsample != "merging_legacy"),
    }
    return {name: known[name] for name in FORMATS if name in options.formats}


def _check_packages(formats: Mapping[str, Format]) -> None:
    for name, form in formats.items():
        missing = [package for package in form.packages if importlib.util.find_spec(package) is None]
        if missing:
            raise ValueError(
                f"formats has {name}, which needs {', '.join(missing)}: pip install 'swin-kernels[export]', or leave "
                f"{name} out"
            )


def _check_in_the_way(formats: Mapping[str, Format], options: ExportOptions) -> None:
    there = [form.output for form in formats.values() if os.path.lexists(options.out / form.output)]
    if there and not options.overwrite:
        raise ValueError(f"out: {options.out} has {', '.join(there)}; accepted is another folder, or overwrite: true")


def _export(
    form: Format, segmenter: Segmenter, images: list[torch.Tensor], expected: list[torch.Tensor], out: Path
) -> dict[str, Any]:
    """Write a format and check it; what is in `out` changes only if it passes."""
    with tempfile.TemporaryDirectory(dir=out, prefix=TEMPORARY) as folder:
        new, old = Path(folder) / "new", Path(folder) / "old"
        new.mkdir()
        with naming(out / form.output):
            form.write(segmenter, new)
        error = check(form.load(new), images, expected)
        written = record.files(new)
        if os.path.lexists(out / form.output):
            os.replace(out / form.output, old)
        os.replace(new / form.output, out / form.output)
    return {
        "files": written,
        "portable": form.portable,
        "error": error,
        "tolerance": TOLERANCE,
        "checked shapes": [list(image.shape) for image in images],
        "versions": record.versions(form.packages),
    }


def _show(
    formats: Mapping[str, Format], exported: Mapping[str, Any], failed: Mapping[str, str], out: Path, console: Console
) -> None:
    """Print what was written and how far it is from the network."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("format", "written", "needs"):
        table.add_column(title)
    table.add_column("MiB", justify="right")
    table.add_column("relative error", justify="right")
    for name, form in formats.items():
        if name in failed:
            table.add_row(name, "not written", "", "", "", style="red")
            continue
        size = sum(file["bytes"] for file in exported[name]["files"].values()) / 2**20
        needs = "" if form.portable else "swin-kernels"
        table.add_row(name, form.output, needs, f"{size:.1f}", f"{exported[name]['error']:.1e}")
    console.print(table)
    note = (
        f"Error: largest difference from the network's logits, relative to the largest; up to {TOLERANCE:.0e} passes."
    )
    say(console, note, "dim")
    for name, why in failed.items():
        say(console, f"Not exported: {name}: {' '.join(why.split())}", "red")
    console.print()
    say(console, f"In {out}: {record.NAME}")
