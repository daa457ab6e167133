"""Series of DICOM slices: told apart, sorted in space, and refused where a slice is missing.

Source: DICOM PS3.3, C.7.6.2 (Image Plane Module), for the equation from pixels to patient coordinates.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pydicom
from pydicom.config import disable_value_validation
from pydicom.datadict import tag_for_keyword
from pydicom.filereader import read_dataset, read_partial
from pydicom.multival import MultiValue
from pydicom.uid import DeflatedExplicitVRLittleEndian

from ..files import GIB
from ..foreign import BadFile, reading, walk
from ..names import shorten, some
from . import pixels
from .itk import TO_RAS
from .nifti import BadCase

TAGS = (
    "SOPClassUID", "SeriesDescription", "SeriesInstanceUID", "SeriesNumber", "EchoNumbers", "EchoTime",
    "ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "Rows", "Columns", "NumberOfFrames",
    "SamplesPerPixel", "RescaleSlope", "RescaleIntercept",
)  # fmt: skip
IDENTITIES = {"accession": "AccessionNumber", "patient": "PatientID"}
"""What else may be part of a series' name, if a user asks for it."""
PREAMBLE = 128  # bytes
MAGIC = b"DICM"  # after the preamble
MOST_INFLATED = 2**28  # bytes; a slice of 8,192 × 8,192 has half
STARTS = (b"\x02\x00", b"\x08\x00", b"\x00\x02", b"\x00\x08")
"""How DICOM without preamble starts: with the group of the first element, 2 or 8, in either byte order."""
PARALLEL = 1e-3
"""How much the components of a direction may differ between slices of one volume."""
SQUARE = 0.05
"""How much the lengths of directions, and of what is at right angles to both, may differ from 1."""
WRITTEN = 0.01
"""Fraction by which a number may differ between slices of one volume, which may round it differently."""
UNEVEN = 0.02
"""Fraction of the distance of slices by which one distance may differ from the others."""
ROUNDED = 0.01
"""Precision in mm to which positions are written, or better."""
LONGEST_LABEL = 80
"""Longest series name taken from a header, in characters: a file name has room for 255 bytes."""


class Place(NamedTuple):
    """Where a slice lies, in LPS as DICOM has it.

    Attributes:
        axes: directions of rows and of columns.
        position: of the first pixel's centre, in mm.
        spacing: mm from row to row, and from column to column.
    """

    axes: tuple[float, ...]
    position: tuple[float, ...]
    spacing: tuple[float, ...]


@dataclass(frozen=True)
class Slice:
    """A file and what its header says: numbers, or None where it says nothing.

    Attributes:
        series: UID.
        label: from the number and description of the series; no patient data unless asked for.
        echo_time: ms.
        axes: directions of rows and of columns, in LPS as DICOM has them.
        position: of the first pixel's centre, mm in LPS.
        spacing: mm from row to row, and from column to column.
        slope, intercept: of stored values to those in HU, or their unit.
    """

    path: Path
    series: str
    label: str
    rows: int
    columns: int
    frames: int
    samples: int
    echoes: tuple[float, ...] | None
    echo_time: tuple[float, ...] | None
    axes: tuple[float, ...] | None
    position: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    slope: float
    intercept: float

    @property
    def place(self) -> Place:
        """Where it lies.

        Raises:
            BadCase: the file does not say.
        """
        if self.axes is None or self.position is None or self.spacing is None:
            said = {
                "ImageOrientationPatient": self.axes,
                "ImagePositionPatient": self.position,
                "PixelSpacing": self.spacing,
            }
            missing = ", ".join(tag for tag, value in said.items() if value is None)
            raise BadCase(f"{self.path}: has no {missing}; accepted are slices with a place in space")
        return Place(self.axes, self.position, self.spacing)


def _normal(axes: Sequence[float]) -> np.ndarray:
    """Normal of the plane of a slice with these `Slice.axes`: ``(3,)``."""
    return np.cross(axes[:3], axes[3:])


@dataclass(frozen=True)
class Other:
    """A file that is not a slice.

    Attributes:
        why: what it is, or what is wrong with it.
        series: UID, if it is DICOM and has one.
        damaged: whether it is DICOM that cannot be read, so that a series may lack a slice.
    """

    path: Path
    why: str
    series: str = ""
    damaged: bool = False


@dataclass(frozen=True)
class Series:
    """Slices of one acquisition.

    Attributes:
        label: what its headers call it, or its folder's name where no header can be read.
        folder: the innermost folder that holds all slices.
        difference: what distinguishes it from others of the same series: its echo, the plane it lies in, or its
            extents.
        damaged: why it cannot be read, where a file of it is damaged.
        notes: what a reader of a result should know about its files.
    """

    label: str
    folder: Path
    slices: tuple[Slice, ...]
    difference: str = ""
    damaged: BadCase | None = None
    notes: tuple[str, ...] = ()


def find(
    folder: Path, skip: Callable[[Path, str], None] = lambda path, why: None, identify: str | None = None
) -> list[Series]:
    """The series among the files in `folder` and below it, by folder.

    Slices of one series that differ in echo, orientation, extents or pixel extents form separate series. A series with
    a damaged file is found, too, and refused when it is read, as it would lack a slice; so is a folder with damaged
    files that do not name their series.

    Args:
        skip: is called for every file that is not a slice, with the reason.
        identify: one of `IDENTITIES`, with which labels then begin: patient data.
    """
    files = [_file(path, identify) if why is None else Other(path, why) for path, why in walk(folder)]
    groups = _groups(file for file in files if isinstance(file, Slice))
    known = {group[0].series for group in groups}
    damaged: dict[str | Path, list[Other]] = defaultdict(list)  # by series, or by folder if that is unknown
    skipped: dict[Path, list[Other]] = defaultdict(list)
    for file in files:
        if isinstance(file, Slice):
            continue
        # A series of images holds nothing else: a file without pixels was cut off.
        if file.damaged or file.series in known:
            damaged[file.series if file.series in known else file.path.parent].append(file)
        else:
            skipped[file.path.parent].append(file)
            skip(file.path, file.why)
    found = [_series(group, groups, damaged, skipped) for group in groups]
    found += [
        Series(Path(os.path.abspath(where)).name, where, (), damaged=_bad(others))
        for where, others in damaged.items()
        if isinstance(where, Path)
    ]
    return sorted(found, key=lambda one: (one.folder, one.label))


def _file(path: Path, identify: str | None) -> Slice | Other:
    """The slice in a regular file, or why it is none."""
    dicom = False
    try:
        with reading(path, BadCase), path.open("rb") as file, disable_value_validation():
            head = file.read(PREAMBLE + len(MAGIC))
            dicom = head[PREAMBLE:] == MAGIC
            if not dicom and head[:2] not in STARTS:
                return Other(path, "is not a DICOM file" if head else "is empty")
            _check_inflated(file)
            tags = [*TAGS, IDENTITIES[identify]] if identify else list(TAGS)
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags, force=True)
            series = str(header.get("SeriesInstanceUID") or "")
            if not series or not header.get("Rows"):
                kind = getattr(header.get("SOPClassUID"), "name", "")
                cut = kind.endswith("Image Storage")  # says that it has one
                return Other(path, f"is DICOM without an image{f' ({kind})' if kind else ''}", series, damaged=cut)
            return _slice(path, series, header, str(header.get(IDENTITIES[identify]) or "") if identify else "")
    except BadCase as error:
        return Other(path, str(error).removeprefix(f"{path}: "), _series_of(path), dicom)


def _check_inflated(file: BinaryIO) -> None:
    """Raise `ValueError` if an open file is a deflated one that would exhaust the memory; rewinds it."""
    file.seek(0)
    if file.read(PREAMBLE + len(MAGIC))[PREAMBLE:] != MAGIC:
        file.seek(0)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        stream, inflated = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while not stream.eof and (rest := stream.unconsumed_tail or file.read(2**16)):
            inflated += len(stream.decompress(rest, 2**20))
            if inflated > MOST_INFLATED:
                raise ValueError(f"has more than {MOST_INFLATED / 2**20:g} MiB once inflated; accepted is up to that")
    file.seek(0)


def _series_of(path: Path) -> str:
    """UID of the series of a damaged file; "" if the damage comes before it."""
    last = tag_for_keyword("SeriesInstanceUID")
    try:
        with reading(path), path.open("rb") as file:
            _check_inflated(file)
            header = read_partial(file, stop_when=lambda tag, vr, length: tag > last, force=True)
            return str(header.get("SeriesInstanceUID") or "")
    except BadFile:
        return ""


def _slice(path: Path, series: str, header: pydicom.Dataset, identity: str) -> Slice:
    axes, spacing = _numbers(header, "ImageOrientationPatient", 6), _numbers(header, "PixelSpacing", 2)
    if axes is not None:
        lengths = [np.linalg.norm(part) for part in (axes[:3], axes[3:], np.cross(axes[:3], axes[3:]))]
        if not np.allclose(lengths, 1, rtol=0, atol=SQUARE):
            raise ValueError(f"ImageOrientationPatient is {axes}; accepted are two directions at right angles")
    if spacing is not None and not min(spacing) > 0:
        raise ValueError(f"PixelSpacing is {spacing}; accepted are distances in mm above 0")
    (slope,), (intercept,) = (
        _numbers(header, name, 1) or (default,) for name, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))
    )
    if not slope:
        raise ValueError("RescaleSlope is 0; accepted is another number")
    parts = (identity, "series", str(header.get("SeriesNumber") or ""), str(header.get("SeriesDescription") or ""))
    return Slice(
        path=path,
        series=series,
        label=_plain("_".join(part for part in parts if part)),
        rows=int(header.Rows),
        columns=int(header.Columns),
        frames=int(header.get("NumberOfFrames") or 1),
        samples=int(header.get("SamplesPerPixel") or 1),
        echoes=_numbers(header, "EchoNumbers"),
        echo_time=_numbers(header, "EchoTime", 1),
        axes=axes,
        position=_numbers(header, "ImagePositionPatient", 3),
        spacing=spacing,
        slope=slope,
        intercept=intercept,
    )


def _numbers(header: pydicom.Dataset, name: str, count: int | None = None) -> tuple[float, ...] | None:
    value = header.get(name)
    if value is None or value == "":
        return None
    values = tuple(float(x) for x in (value if isinstance(value, MultiValue) else [value]))
    if count not in (None, len(values)) or not all(map(math.isfinite, values)):
        accepted = "is a finite number" if count == 1 else f"are {count or ''} finite numbers"
        raise ValueError(f"{name} is {value}; accepted {accepted}")
    return values


def _plain(text: str) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_").lower()[:LONGEST_LABEL]


def _groups(slices: Iterable[Slice]) -> list[list[Slice]]:
    """Slices that may be of one volume."""
    groups: dict[tuple, list[list[Slice]]] = defaultdict(list)
    for one in slices:
        alike = groups[one.series, one.rows, one.columns, one.echoes]
        group = next((group for group in alike if _alike(group[0], one)), None)
        if group is None:
            alike.append([one])
        else:
            group.append(one)
    return [group for alike in groups.values() for group in alike]


def _alike(one: Slice, other: Slice) -> bool:
    """Whether both have the same plane, pixels and echo, up to rounding."""
    return (
        _close(one.axes, other.axes, atol=PARALLEL)
        and _close(one.spacing, other.spacing, rtol=WRITTEN)
        and _close(one.echo_time, other.echo_time, rtol=WRITTEN)
    )


def _close(one: tuple[float, ...] | None, other: tuple[float, ...] | None, rtol: float = 0, atol: float = 0) -> bool:
    if one is None or other is None:
        return one is other
    return len(one) == len(other) and np.allclose(one, other, rtol=rtol, atol=atol)


def _series(
    group: list[Slice],
    groups: Sequence[list[Slice]],
    damaged: Mapping[str | Path, list[Other]],
    skipped: Mapping[Path, list[Other]],
) -> Series:
    folders = sorted({one.path.parent for one in group})
    own = damaged.get(group[0].series)
    unknown, beside = ([one.path.name for folder in folders for one in of.get(folder, ())] for of in (damaged, skipped))
    notes = []
    if unknown:
        notes.append(f"if a damaged file of its folder is of this series, the volume is short: {some(unknown)}")
    if beside:
        notes.append(f"left out of its folder: {some(beside)}")
    return Series(
        label=group[0].label,
        folder=Path(os.path.commonpath(folders)),
        slices=tuple(group),
        difference=_difference(group[0], [other[0] for other in groups if other[0].series == group[0].series]),
        damaged=_bad(own) if own else None,
        notes=tuple(notes),
    )


def _bad(damaged: Sequence[Other]) -> BadCase:
    first, *more = damaged
    cut = ": is it cut off?" if first.why.startswith("is DICOM without") else ""
    return BadCase(f"{first.path}: {first.why}{cut}" + (f"; {len(more)} more files are damaged" if more else ""))


def _difference(one: Slice, siblings: Sequence[Slice]) -> str:
    """What distinguishes `one` from the others of its series: its echo, the plane it lies in, or its extents."""
    if len({other.echoes for other in siblings}) > 1:
        return "echo" + "_".join(f"{number:g}" for number in one.echoes or ())
    if not all(_close(one.echo_time, other.echo_time, rtol=WRITTEN) for other in siblings):
        return "echo" + "".join(f"{time:g}" for time in one.echo_time or ())
    if one.axes is not None and not all(_close(one.axes, other.axes, atol=PARALLEL) for other in siblings):
        return ("sagittal", "coronal", "axial")[int(np.abs(_normal(one.axes)).argmax())]
    return f"{one.columns}x{one.rows}"


def names(found: Sequence[Series]) -> list[str]:
    """A name for each, different ones: its label; where several share it, after what their folders differ in; and where
    that is the same, followed by their difference and a number."""
    alike: dict[str, list[Series]] = defaultdict(list)
    for one in found:
        alike[one.label].append(one)
    wanted = []
    for one in found:
        folders = [os.path.abspath(other.folder) for other in alike[one.label]]
        start = os.path.commonpath(folders)
        wanted.append("_".join([*Path(os.path.abspath(one.folder)).relative_to(start).parts, one.label]))
    shared, taken, chosen = Counter(wanted), Counter[str](), list[str]()
    for one, name in zip(found, wanted, strict=True):
        taken[name] += 1
        chosen.append(shorten(name if shared[name] == 1 else f"{name}_{one.difference}_{taken[name]}"))
    return chosen


def read(series: Series, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Values float32 ``(1, X, Y, Z)`` of a series, rescaled to HU (or its unit), and the affine ``(4, 4)`` to RAS+.

    Args:
        largest: GiB that it may take.

    Raises:
        BadCase: slices are missing, doubled or not evenly spaced, have no place in space, or cannot be decoded.
    """
    if series.damaged is not None:
        raise series.damaged
    first = series.slices[0]
    where = f"{series.folder}, series {series.label}"
    places: list[Place] = []
    for one in series.slices:
        if one.frames > 1:
            raise BadCase(f"{one.path}: has {one.frames} frames; accepted is one a file: convert it to NIfTI first")
        places.append(one.place)
        if one.samples != 1:
            raise BadCase(f"{one.path}: is a colour image; accepted is one sample a pixel")
    axes, _, spacing = places[0]
    normal = _normal(axes)
    slices = sorted(series.slices, key=lambda one: float(np.dot(one.place.position, normal)))
    step = _step(slices, normal, where)
    rows, columns = first.rows, first.columns
    if (size := rows * columns * len(slices) * 4) > largest * GIB:
        raise BadCase(f"{where}: takes {size / GIB:.3g} GiB; accepted are {largest:g} (largest)")
    values = np.empty((columns, rows, len(slices)), np.float32)  # (X, Y, Z)
    for index, one in enumerate(slices):
        stored = pixels.read(one.path, rows, columns)
        with np.errstate(over="ignore"):  # infinite values are refused later, with all other infinite voxels
            values[:, :, index] = (stored * one.slope + one.intercept).T
    # PixelSpacing is from row to row, then from column to column; a row runs along the first axis.
    between_rows, between_columns = spacing
    affine = np.eye(4)
    affine[:3, 0] = np.multiply(axes[:3], between_columns)
    affine[:3, 1] = np.multiply(axes[3:], between_rows)
    affine[:3, 2] = step
    affine[:3, 3] = slices[0].place.position
    return values[None], TO_RAS @ affine


def _step(slices: list[Slice], normal: np.ndarray, where: str) -> np.ndarray:
    """From one slice to the next ``(3,)`` in mm."""
    if len(slices) < 2:
        raise BadCase(f"{where}: has 1 slice; accepted is a volume of 2 or more")
    along = np.array([float(np.dot(one.place.position, normal)) for one in slices])
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    if (gaps < 1e-3).any():
        index = int(gaps.argmin())
        raise BadCase(
            f"{where}: {slices[index].path.name} and {slices[index + 1].path.name} lie at the same place, "
            f"{along[index]:.2f} mm; accepted is one slice at each"
        )
    # Rounding moves both ends of a distance, and of the usual one, but never by as much as a missing slice.
    uneven = min(max(UNEVEN * usual, 2 * ROUNDED * float(np.abs(normal).sum())), usual / 2)
    if (np.abs(gaps - usual) > uneven).any():
        index = int(np.abs(gaps - usual).argmax())
        missing = round(gaps[index] / usual) - 1
        reason = f"{missing} missing" if missing > 0 else "unevenly spaced"
        raise BadCase(
            f"{where}: slices are {reason} between {along[index]:.2f} and {along[index + 1]:.2f} mm: "
            f"{gaps[index]:.3g} mm apart where the others are {usual:.3g} mm; accepted are evenly spaced slices"
        )
    positions = np.array([one.place.position for one in slices])  # (n, 3)
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    off = positions - positions[0] - np.arange(len(slices))[:, None] * step  # (n, 3)
    beside = np.linalg.norm(off - np.outer(off @ normal, normal), axis=1)  # (n,)
    if beside.max() > min(slices[0].place.spacing):
        index = int(beside.argmax())
        raise BadCase(
            f"{where}: {slices[index].path.name} lies {beside[index]:.3g} mm beside the line of the other slices; "
            "accepted are slices above each other"
        )
    return step
