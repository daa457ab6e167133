"""Stored values of a DICOM slice, checked against what its header promises.

Native and run-length encoded values are decoded by pydicom. Those of the JPEG family are decoded by GDCM, from a file
that holds nothing else: GDCM would also rescale them, invert MONOCHROME1, and parse whatever else is in the slice.

Source: DICOM PS3.5, 8 and annexes A and G, for how values are encoded; ITU-T T.81, B.2.2, for a JPEG frame's header.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.config import disable_value_validation
from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
    SecondaryCaptureImageStorage,
)
from pydicom.valuerep import VR

from ..foreign import reading
from .nifti import BadCase

ELEMENTS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
"""Elements that may hold the values: whole numbers, and others."""
NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
JPEG = (*JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes)
GDCM = (*JPEG, *JPEG2000TransferSyntaxes)
DEFERRED = 1024  # bytes; longer values are not read for their lengths
KINDS = {None, *(kind.value for kind in VR)}  # None in files that do not tell
OPEN = 0xFFFFFFFF  # length of an element that a sign ends
END = b"\xff\xd9"
"""End of a frame of JPEG, JPEG-LS or JPEG 2000; a byte 0 or 255 may follow to make its length even."""
LONGEST_FRAME_HEADER = 1024
"""Bytes of run-length encoded values beside the runs, or fewer. Each byte of these takes two at most; pydicom inflates
what there is, up to 64 times."""
FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
"""Markers of JPEG and, the last, of JPEG-LS, after which precision, rows and columns come."""


def read(path: Path, rows: int, columns: int) -> np.ndarray:
    """The values stored in a slice ``(rows, columns)``, before slope and intercept.

    Raises:
        BadCase: they cannot be decoded, or do not match `rows`, `columns` and the bits in the header.
    """
    with reading(path, BadCase), path.open("rb") as file, disable_value_validation():
        data, syntax = _checked(file)
    says = f"cannot be decoded ({syntax.name if syntax.is_transfer_syntax else 'an unknown transfer syntax'})"
    with reading(path, BadCase, says), warnings.catch_warnings(), disable_value_validation():
        warnings.simplefilter("ignore")  # pydicom's, of what is refused below or does no harm
        element = next((name for name in ELEMENTS if name in data), None)
        if element is None:
            raise ValueError("has no pixels")
        if (shown := data.get("PhotometricInterpretation")) not in ("MONOCHROME1", "MONOCHROME2"):
            raise ValueError(f"PhotometricInterpretation is {shown}; accepted are MONOCHROME1 and MONOCHROME2")
        if syntax in GDCM:
            return _decoded_by_gdcm(data, syntax, rows, columns)
        if syntax not in (*NATIVE, RLELossless):
            raise ValueError("accepted are values that are native, run-length encoded or of the JPEG family")
        return _decoded(data, syntax, rows, columns, element)


def _checked(file: BinaryIO) -> tuple[pydicom.FileDataset, UID]:
    """Header of an open file and its transfer syntax. No element may be longer than the file: reading it would exhaust
    the memory."""
    size = os.fstat(file.fileno()).st_size
    data = pydicom.dcmread(file, defer_size=DEFERRED, force=True)
    syntax = data.file_meta.get("TransferSyntaxUID")
    inside: Iterable[pydicom.DataElement | RawDataElement] = data.values()
    if syntax == DeflatedExplicitVRLittleEndian:  # places of elements are those after inflation
        file.seek(0)
        data, inside = pydicom.dcmread(file, force=True), ()
    raw = [one for one in (*data.file_meta.values(), *inside) if isinstance(one, RawDataElement)]
    for one in raw:
        # For an unknown kind, the length is read from another place.
        if one.VR not in KINDS:
            raise ValueError(f"element {one.tag} is of kind {one.VR!r}, which DICOM does not have")
        if one.length != OPEN and (end := one.value_tell + one.length) > size:
            raise ValueError(f"element {one.tag} goes on to byte {end}, beyond the end of the file at {size}")
    if syntax is None:  # in files without file meta information
        implicit, little = data.original_encoding
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    for name in ELEMENTS:
        data.get(name)  # read while the file is open
    return data, UID(syntax)


def _decoded(data: pydicom.Dataset, syntax: UID, rows: int, columns: int, element: str) -> np.ndarray:
    """The values of a slice that are native or run-length encoded."""
    values, bits = data[element].value or b"", int(data.BitsAllocated)
    size = (rows * columns * bits + 7) // 8
    # Padding may follow, but not as much as another slice: pixels may have more bits then.
    if syntax != RLELossless and not size <= len(values) < max(2 * size, 3):
        raise ValueError(
            f"has {len(values)} bytes of pixels; {rows} rows of {columns} pixels of {bits} bits are {size}: the slice "
            "is cut off, or its header is not its own"
        )
    if syntax == RLELossless and len(values) > 2 * size + LONGEST_FRAME_HEADER:
        raise ValueError(
            f"has {len(values)} bytes of run lengths; {rows} rows of {columns} pixels of {bits} bits are {size}, and "
            "no more than twice that"
        )
    whole = element == "PixelData"
    options: dict[str, Any] = {
        "rows": rows,
        "columns": columns,
        "number_of_frames": 1,
        "samples_per_pixel": 1,
        "photometric_interpretation": "MONOCHROME2",  # MONOCHROME1 tells how to show values, not what they are
        "bits_allocated": bits,
        "bits_stored": int(data.BitsStored) if whole else bits,
        "pixel_representation": int(data.PixelRepresentation) if whole else 0,
        "pixel_keyword": element,
        "pixel_vr": data[element].VR,
        "correct_unused_bits": False,
        "decoding_plugin": "pydicom" if syntax == RLELossless else "",
    }
    stored = get_decoder(syntax).as_array(values if syntax == RLELossless else values[: size + size % 2], **options)[0]
    return _without_unused_bits(stored, data) if whole and bits > 1 else stored


def _without_unused_bits(stored: np.ndarray, data: pydicom.Dataset) -> np.ndarray:
    """The bits of ``stored (rows, columns)`` that belong to values; others may belong to an overlay, or be
    arbitrary."""
    allocated, used = 8 * stored.itemsize, int(data.BitsStored)
    high = int(data.get("HighBit", used - 1))
    if not used - 1 <= high < allocated:
        raise ValueError(f"HighBit is {high} of {used} BitsStored and {allocated} BitsAllocated")
    return stored << (allocated - 1 - high) >> (allocated - used)


def _decoded_by_gdcm(data: pydicom.Dataset, syntax: UID, rows: int, columns: int) -> np.ndarray:
    """The values of a slice that are encoded by the JPEG family."""
    frame = next(generate_frames(data.PixelData, number_of_frames=1)).rstrip(b"\x00\xff")
    # A frame that is not cut off ends with the end marker.
    if not frame.endswith(END):
        raise ValueError(f"its compressed pixels, {len(frame)} bytes, have no end: are they cut off?")
    if syntax in JPEG:
        said = _frame_header(frame)
        if said[1:] != (rows, columns) or said[0] > int(data.BitsAllocated):
            raise ValueError(
                f"its compressed pixels are {said[1]} × {said[2]} of {said[0]} bits; its header says {rows} × "
                f"{columns} of {data.BitsAllocated}"
            )
    alone = pydicom.Dataset()
    for name in ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
        alone[name] = data[name]
    alone.SamplesPerPixel, alone.PhotometricInterpretation = 1, "MONOCHROME2"
    alone.SOPClassUID, alone.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3"
    alone.add_new("PixelData", "OB", encapsulate([frame]))
    alone.file_meta = FileMetaDataset()
    alone.file_meta.TransferSyntaxUID = syntax
    with tempfile.NamedTemporaryFile(suffix=".dcm") as file:
        alone.save_as(file, enforce_file_format=True)
        file.flush()
        stored = sitk.GetArrayFromImage(sitk.ReadImage(file.name, imageIO="GDCMImageIO"))
    if stored.shape != (1, rows, columns):
        raise ValueError(f"its compressed pixels are {stored.shape[1:]}; its header says {(rows, columns)}")
    return stored[0]


def _frame_header(frame: bytes) -> tuple[int, int, int]:
    """Precision, rows and columns in the header of a JPEG or JPEG-LS `frame`."""
    place = 2  # after the marker of its start
    while place + 9 <= len(frame):
        if frame[place] != 0xFF:
            break
        if frame[place + 1] in FRAME_HEADERS:
            rows, columns = (int.from_bytes(frame[place + at : place + at + 2], "big") for at in (5, 7))
            return frame[place + 4], rows, columns
        # A marker may begin with more than one 255.
        place += 1 if frame[place + 1] == 0xFF else 2 + int.from_bytes(frame[place + 2 : place + 4], "big")
    raise ValueError("its compressed pixels have no header")
