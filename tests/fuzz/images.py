"""Mutants of NIfTI, NRRD, MetaImage and DICOM files: read as they are, or refused by name, and nothing else."""

from __future__ import annotations

import gzip
import io
import math
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from swin_unetr import imaging
from swin_unetr.datasets.datalist import Case
from swin_unetr.datasets.images import ReadCase
from swin_unetr.evaluation import label_maps

from .mutation import NUMBERS, WORDS, Draw, Fault, mutate_bytes, mutate_text, one_of

LARGEST = 0.01
"""GiB that an image may take; the files here take a few kB."""

STRANGER = 77
"""Value of every voxel in a file outside the case's folder, which no header may name."""
STRANGER_NAME = "stranger.raw"

SHAPE = (6, 5, 4)
ITK_LINES = (
    *("type: double", "type: uint8", "type: block", "dimension: 4", "dimension: 1000000000", "sizes: 6 5 4 1"),
    *(
        "sizes: 100000 100000 100000",
        "sizes: -6 5 4",
        "sizes: 0 5 4",
        "encoding: raw",
        "encoding: gzip",
        "encoding: hex",
    ),
    *("encoding: ascii", "encoding: bzip2", "endian: big", "space: scanner-xyz", "space dimension: 9", "kinds: list"),
    *("space directions: (0,0,0) (0,1,0) (0,0,1)", "space directions: none (0,1,0) (0,0,1)", "space origin: (nan,0,0)"),
    *(f"data file: ../{STRANGER_NAME}", "data file: LIST", "data file: x%03d.raw 1 1000000 1", "data file: /dev/zero"),
    *("byte skip: -1", "byte skip: 1000000000000", "line skip: 1000000000", "spacings: 0 nan -1", "content: a"),
    *("NDims = 4", "NDims = 0", "DimSize = 100000 100000 100000", "DimSize = 0 5 4", "DimSize = -6 5 4"),
    *("ElementType = MET_DOUBLE", "ElementType = MET_NONE", "ElementNumberOfChannels = 1000000", "HeaderSize = -1"),
    *("TransformMatrix = 0 0 0 0 0 0 0 0 0", "ElementSpacing = nan 0 -1", "Offset = inf 0 0", "CompressedData = True"),
    *(f"ElementDataFile = ../{STRANGER_NAME}", "ElementDataFile = LIST", "ElementDataFile = x%03d.raw 1 1000000 1"),
    *("ElementDataFile = /dev/zero", "BinaryDataByteOrderMSB = True", "CompressedDataSize = 1000000000000"),
    *("spacings: 1 2 nan", "axis mins: 0 0 0", 'space units: "cm" "mm" "mm"', "DistanceUnits = um", "HeaderSize = 5"),
    *("ElementToIntensityFunctionSlope = 2", "ElementToIntensityFunctionOffset = nan", "line skip: 1", "byte skip: 5"),
)
"""Lines of NRRD and MetaImage headers."""


def prepare(folder: Path) -> Callable[[Draw, Path], str]:
    nifti = [_nifti(gz, kind, values) for gz in (False, True) for kind in _KINDS for values in _arrays()]
    itk = [_itk(folder, name, values) for name in _ITK_NAMES for values in _arrays()[:2]]
    series = [_series(syntax, preamble) for syntax, preamble in _SYNTAXES]
    # As large as the voxels of an image here, or larger.
    (folder / STRANGER_NAME).write_bytes(np.full(math.prod(SHAPE) * 4, STRANGER, np.int16).tobytes())

    def case(draw: Draw, place: Path) -> str:
        make = one_of(draw, ((4, _mutant_nifti), (4, _mutant_itk), (4, _mutant_series)))
        path = make(draw, place, {_mutant_nifti: nifti, _mutant_itk: itk, _mutant_series: series}[make])
        read = draw.choice((_read_image, _read_image, _read_labels, _read_case) if path.is_file() else (_read_image,))
        try:
            outcome = read(path, draw)
        except (imaging.BadCase, ValueError) as error:
            if read is _read_image and not isinstance(error, imaging.BadCase):  # the others may read a label map
                raise
            outcome = "refused"
            _check_named(error, path)
        if outcome == "read" and CUT in draw.notes:
            raise Fault("slices with fewer or more bytes than their pixels take were read")
        # Not every image here is a label map.
        if outcome == "refused" and not draw.notes and read is _read_image:
            raise Fault(f"{path.name}: was refused, and is as it was written")
        return outcome

    return case


def _check_named(error: Exception, path: Path) -> None:
    if str(path) not in str(error):
        raise Fault(f"the message does not name {path.name}: {error}") from error


# --- readers ---


def _read_image(path: Path, draw: Draw) -> str:
    """As `predict` does: read every image that the path names, and write and read a label map in its geometry."""
    try:
        sources = imaging.find([path], LARGEST)
    except ValueError as error:
        if isinstance(error, imaging.BadCase) or path.is_file():
            raise
        _check_named(error, path)  # a folder that holds no image
        return "refused"
    read = 0
    for source in sources:
        try:
            volume = source.read()
        except imaging.BadCase as error:
            _check_named(error, path)
            continue
        read += 1
        _check_volume(volume)
        shape = volume.values.shape[1:]
        if path.is_file() and len(shape) == 3:
            out = path.parent / f"label{imaging.output_suffix(source)}"
            imaging.write(np.ones(shape, np.uint8), volume, out)
            (again,) = imaging.find([out], LARGEST)
            if again.read().values.shape[1:] != shape:
                raise Fault(f"a label map of {shape} voxels was written and is read as {again.read().values.shape[1:]}")
    return "read" if read else "refused"


def _check_volume(volume: imaging.Volume) -> None:
    values = volume.values
    if values.dtype != np.float32 or values.ndim != 4 or not values.size:
        raise Fault(f"an image is read as {values.dtype} of shape {values.shape}")
    if values.nbytes > LARGEST * 2**30:
        raise Fault(f"an image takes {values.nbytes} bytes, more than `largest`")
    if not np.isfinite(values).all():
        raise Fault("voxels of an image that was read are not finite")
    if not np.isfinite(volume.affine).all() or not abs(np.linalg.det(volume.affine[:3, :3])) > 0:
        raise Fault(f"an image that was read has no place in space: {volume.affine.tolist()}")
    if (values == STRANGER).all():
        raise Fault("the voxels are those of a file outside of the image's folder")


def _read_labels(path: Path, draw: Draw) -> str:
    """As `evaluate` does."""
    label = label_maps.read(path)
    if label.values.ndim not in (2, 3) or label.values.dtype.kind not in "iu" or not label.values.size:
        raise Fault(f"a label map is read as {label.values.dtype} of shape {label.values.shape}")
    if (label.values == STRANGER).all():
        raise Fault("the voxels are those of a file outside of the label map's folder")
    return "read"


def _read_case(path: Path, draw: Draw) -> str:
    """As `train` does; NIfTI files only."""
    if not path.name.endswith(imaging.suffixes.NIFTI):
        return _read_labels(path, draw)
    as_label = draw.chance(0.3)
    if as_label:
        image = path.with_name("image.nii")
        nibabel.save(nibabel.Nifti1Image(np.zeros(SHAPE, np.int16), np.diag([1.0, 2.0, 3.0, 1.0])), image)
        case = Case("case", (image,), path)
    else:
        case = Case("case", (path,))
    try:
        read = ReadCase(range(256) if as_label else None, None, LARGEST)(case)
    except imaging.BadCase:
        if as_label:
            draw.note("read as the label of a case")
        raise
    if not all(np.isfinite(value.numpy()).all() for value in read.values()):
        raise Fault("voxels of a case that was read are not finite")
    return "read"


# --- NIfTI ---

_KINDS = (nibabel.Nifti1Image, nibabel.Nifti2Image)


def _arrays() -> list[np.ndarray]:
    values = np.arange(math.prod(SHAPE)).reshape(SHAPE)
    return [
        values.astype(np.int16),
        (values % 3).astype(np.uint8),
        (values / 7).astype(np.float32),
        np.stack([values, -values], axis=-1).astype(np.float64),
    ]


def _nifti(gz: bool, kind: type[nibabel.Nifti1Image], values: np.ndarray) -> tuple[str, bytes, type]:
    image = kind(values, np.diag([1.0, 2.0, 3.0, 1.0]))
    return ("x.nii.gz" if gz else "x.nii"), image.to_bytes(), kind


def _mutant_nifti(draw: Draw, place: Path, bases: list) -> Path:
    name, data, kind = draw.choice(bases)
    change = one_of(draw, ((4, _nifti_field), (3, mutate_bytes), (0.3, lambda draw, data: data)))
    data = change(draw, data, kind) if change is _nifti_field else change(draw, data)
    if name.endswith(".gz"):
        data = gzip.compress(data, 1, mtime=0)
        if draw.chance(0.3):
            draw.note("compressed, then")
            data = mutate_bytes(draw, data)
    (place / name).write_bytes(data)
    return place / name


def _nifti_field(draw: Draw, data: bytes, kind: type[nibabel.Nifti1Image]) -> bytes:
    """Absurd numbers in fields of the header."""
    template = kind.header_class.template_dtype
    header = np.frombuffer(data[: template.itemsize], template).copy()
    for _ in range(draw.some()):
        name = draw.choice((*template.names, "dim", "dim", "pixdim", "datatype", "vox_offset", "scl_slope", "srow_x"))
        field = header[name].reshape(-1)
        place = draw.randrange(field.size) if field.size else 0
        if field.dtype.kind == "S":
            value: object = draw.choice(WORDS).encode()
        else:
            number = draw.choice(NUMBERS)
            with np.errstate(all="ignore"):
                value = number if field.dtype.kind == "f" else _wrapped(number, field.dtype)
                value = np.float64(value).astype(field.dtype) if field.dtype.kind == "f" else value
        flat = header[name].reshape(-1)
        flat[place] = value
        header[name] = flat.reshape(header[name].shape)
        draw.note(f"header: {name}[{place}] = {value!r}"[:120])
    return header.tobytes() + data[template.itemsize :]


def _wrapped(number: float, dtype: np.dtype) -> np.generic:
    """`number` as the lowest bits of an integer of `dtype`."""
    whole = int(number) if math.isfinite(number) else -1
    return np.frombuffer((whole % 2 ** (8 * dtype.itemsize)).to_bytes(dtype.itemsize, "little"), dtype)[0]


# --- NRRD and MetaImage ---

_ITK_NAMES = ("x.nrrd", "gz.nrrd", "x.mha", "gz.mha", "x.mhd")


def _itk(folder: Path, name: str, values: np.ndarray) -> tuple[str, dict[str, bytes]]:
    """Name of the header's file, and the bytes of it and of the image's other files."""
    target = folder / "itk"
    target.mkdir(exist_ok=True)
    image = sitk.GetImageFromArray(values.T)
    image.SetSpacing((1.0, 2.0, 3.0))
    sitk.WriteImage(image, str(target / name), useCompression=name.startswith("gz"))
    files = {path.name: path.read_bytes() for path in sorted(target.iterdir())}
    for path in target.iterdir():
        path.unlink()
    return name, files


def _mutant_itk(draw: Draw, place: Path, bases: list) -> Path:
    name, files = draw.choice(bases)
    change = one_of(draw, ((5, _itk_header), (3, mutate_bytes), (0.3, lambda draw, data: data)))
    for file, data in files.items():
        (place / file).write_bytes(change(draw, data) if file == name else data)
    return place / name


def _itk_header(draw: Draw, data: bytes) -> bytes:
    """Changes to the text before the voxels."""
    end = data.find(b"\n\n") + 1 if data.startswith(b"NRRD") else data.find(b"\n", data.find(b"ElementDataFile")) + 1
    text = mutate_text(draw, data[:end].decode("latin-1"), ITK_LINES)
    return text.encode("utf-8", "surrogateescape") + data[end:]


# --- DICOM ---

_SYNTAXES = (
    (ExplicitVRLittleEndian, True),
    (ExplicitVRLittleEndian, False),
    (ImplicitVRLittleEndian, True),
    (ExplicitVRBigEndian, True),
    (RLELossless, True),
)
CUT = "pixels of every slice cut or longer"
_SLICES = 4


def _series(syntax, preamble: bool) -> list[bytes]:
    return [_slice(index, syntax, preamble) for index in range(_SLICES)]


def _slice(index: int, syntax, preamble: bool) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, f"1.2.3.{index + 1}"
    meta.TransferSyntaxUID = syntax
    header = FileDataset("", {}, file_meta=meta, preamble=bytes(128) if preamble else None)
    header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, f"1.2.3.{index + 1}"
    header.StudyInstanceUID, header.SeriesInstanceUID, header.Modality = "1.2.3", "1.2.4", "CT"
    header.SeriesNumber, header.SeriesDescription, header.InstanceNumber = 3, "Thorax", index + 1
    header.PatientName, header.PatientID = "A^B", "17"
    header.Rows, header.Columns = SHAPE[:2]
    header.ImageOrientationPatient, header.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 3 * index]
    header.PixelSpacing, header.SliceThickness = [1, 2], 3
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 16, 15, 1
    header.RescaleSlope, header.RescaleIntercept = 1, -1024
    order = ">i2" if syntax == ExplicitVRBigEndian else "<i2"
    header.PixelData = (np.arange(30).reshape(SHAPE[:2]) + index).astype(order).tobytes()
    header["PixelData"].VR = "OW"
    if syntax == RLELossless:
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.compress(RLELossless, generate_instance_uid=False)
    return _encoded(header)


def _encoded(header: FileDataset) -> bytes:
    file = io.BytesIO()
    pydicom.dcmwrite(file, header, enforce_file_format=False)
    return file.getvalue()


def _mutant_series(draw: Draw, place: Path, bases: list) -> Path:
    files = list(draw.choice(bases))
    change = one_of(
        draw,
        ((5, _dicom_element), (4, mutate_bytes), (2, _dicom_frame), (0.3, _dicom_cut), (0.3, lambda draw, data: data)),
    )
    if change is _dicom_cut:
        files = _dicom_cut(draw, files)
    for index in draw.sample(range(_SLICES), draw.choice((1, 1, 1, _SLICES))) if change is not _dicom_cut else ():
        if change.__name__ != "<lambda>":
            draw.note(f"slice {index}:")
        files[index] = change(draw, files[index])
    if draw.chance(0.05):
        dropped = draw.randrange(_SLICES)
        del files[dropped]
        draw.note(f"drop slice {dropped}")
    if draw.chance(0.05):
        draw.note("one more file that is none")
        files.append(mutate_bytes(draw, b"no slice"))
    for index, data in enumerate(files):
        (place / f"{index}.dcm").write_bytes(data)
    return place


_VRS = ("DS", "IS", "US", "UI", "LO", "SQ", "OW", "OB", "UN", "FD", "PN", "AT", "??")
_PLACES = (
    *("Rows", "Columns", "ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "SamplesPerPixel"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "NumberOfFrames", "RescaleSlope", "PixelData"),
    *("SeriesInstanceUID", "SeriesDescription", "SeriesNumber", "PhotometricInterpretation", "EchoTime"),
)


def _dicom_element(draw: Draw, data: bytes) -> bytes:
    """Elements with other bytes or kinds, added or removed."""
    header = pydicom.dcmread(io.BytesIO(data), force=True)
    for _ in range(draw.some()):
        keyword = draw.choice(_PLACES)
        tag = pydicom.tag.Tag(keyword)
        if draw.chance(0.15):
            header.pop(tag, None)
            draw.note(f"drop {keyword}")
            continue
        vr = draw.choice(_VRS) if draw.chance(0.3) else pydicom.datadict.dictionary_VR(tag).partition(" ")[0]
        parts = [str(draw.choice((*NUMBERS, *WORDS))) for _ in range(draw.choice((1, 1, 2, 3, 6, 6)))]
        text = "\\".join(parts)[:3000].encode("utf-8")
        number = (int(draw.choice([n for n in NUMBERS if isinstance(n, int)])) % 2**16).to_bytes(2, "little")
        value = number if vr == "US" else text + b" " * (len(text) % 2)
        header._dict[tag] = RawDataElement(tag, vr, len(value), value, 0, header.original_encoding[0], True)
        draw.note(f"{keyword} ({vr}) = {value[:60]!r}")
    try:
        return _encoded(header)
    except Exception:  # what pydicom does not write in this form
        draw.note("cannot be written; bytes instead")
        return mutate_bytes(draw, data)


_FRAMES = (RLELossless, RLELossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless)
_STARTS = {
    RLELossless: b"",
    JPEGLosslessSV1: bytes.fromhex("ffd8ffc3000b10000500060101110000"),
    JPEGLSLossless: bytes.fromhex("ffd8fff7000b100005000601011100ffda0008010100000000"),
    JPEG2000Lossless: bytes.fromhex("ff4fff510029"),
}
"""Headers of frames, followed by anything."""


def _dicom_frame(draw: Draw, data: bytes) -> bytes:
    """Other compressed pixels."""
    header = pydicom.dcmread(io.BytesIO(data), force=True)
    syntax = draw.choice(_FRAMES)
    if syntax == RLELossless and header.file_meta.get("TransferSyntaxUID") == RLELossless:
        frame = next(generate_frames(header.PixelData, number_of_frames=1))
        # Its header of 64 bytes, rather than what comes after.
        frame = mutate_bytes(draw, frame[:64]) + frame[64:] if draw.chance(0.5) else mutate_bytes(draw, frame)
    else:
        frame = _STARTS[syntax] + mutate_bytes(draw, bytes(range(200))) + b"\xff\xd9"
    draw.note(f"a frame of {syntax.name}")
    whole = pydicom.Dataset({element.tag: element for element in header})
    whole.file_meta = FileMetaDataset()
    whole.file_meta.TransferSyntaxUID = syntax
    whole.PixelData = encapsulate([frame])
    whole["PixelData"].VR = "OB"
    return _encoded(whole)


def _dicom_cut(draw: Draw, files: list[bytes]) -> list[bytes]:
    """Slices that have too few or too many bytes of pixels, and are otherwise unchanged."""
    native, packed = draw.choice([*range(0, 60, 2), *range(120, 180, 2)]), draw.randrange(2, 90)
    cut = []
    for data in files:
        header = pydicom.dcmread(io.BytesIO(data), force=True)
        if header.file_meta.get("TransferSyntaxUID") == RLELossless:
            frame = next(generate_frames(header.PixelData, number_of_frames=1))
            header.PixelData = encapsulate([frame[:packed]])  # of 112
        else:
            header.PixelData = (3 * header.PixelData)[:native]
        cut.append(_encoded(header))
    draw.note(CUT)
    return cut
