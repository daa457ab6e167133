"""Pixels of DICOM slices: the stored values, whatever their encoding, and no others."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from swin_unetr import imaging

from ..segmenter import image
from .test_volume import only, series

NATIVE = {
    "implicit": ImplicitVRLittleEndian,
    "explicit": ExplicitVRLittleEndian,
    "big endian": ExplicitVRBigEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
}
SYNTAXES = {**NATIVE, "RLE": RLELossless}
FRAMES = {"JPEG": JPEGLosslessSV1, "JPEG-LS": JPEGLSLossless, "JPEG 2000": JPEG2000Lossless}


def written(folder, values, syntax=ExplicitVRLittleEndian, change=lambda data, index: None) -> None:
    """``values (X, Y, Z)`` as slices of their own type, with slope 2 and intercept -1000, in a transfer syntax."""
    series(folder, np.zeros(values.shape, np.int16))
    paths = sorted(folder.iterdir(), key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])
    for index, path in enumerate(paths):
        data = pydicom.dcmread(path)
        pixels = np.ascontiguousarray(values[:, :, index].T)
        bits = 8 * pixels.itemsize
        data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
        data.PixelRepresentation = int(pixels.dtype.kind == "i")
        order = ">" if syntax == ExplicitVRBigEndian else "<"
        stored = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
        data.PixelData = stored + bytes(len(stored) % 2)
        change(data, index)
        if syntax == RLELossless:
            data.compress(RLELossless)
        elif syntax in NATIVE.values():
            data["PixelData"].VR = "OB" if bits == 8 else "OW"
            data.file_meta.TransferSyntaxUID = syntax
            # Afresh: what was read in one order of bytes is not written in another.
            meta, data = data.file_meta, pydicom.Dataset({one.tag: one for one in data})
            data.file_meta = meta
        data.save_as(path, enforce_file_format=True)


def compressed(values: np.ndarray, syntax, folder) -> bytes:
    """A frame of ``values (rows, columns)``; by SimpleITK, and of JPEG-LS, which it does not write, pydicom's own."""
    if syntax == JPEGLSLossless:
        return next(generate_frames(pydicom.dcmread(get_testdata_file("MR_small_jpeg_ls_lossless.dcm")).PixelData))
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(folder / "frame.dcm"))
    writer.SetUseCompression(True)
    writer.SetCompressor("JPEG" if syntax == JPEGLosslessSV1 else "JPEG2000")
    writer.SetImageIO("GDCMImageIO")
    writer.Execute(sitk.GetImageFromArray(values))
    data = pydicom.dcmread(folder / "frame.dcm")
    assert data.file_meta.TransferSyntaxUID == syntax
    return next(generate_frames(data.PixelData, number_of_frames=1))


def encapsulated(folder, syntax, frame, **tags) -> None:
    """Two slices of one compressed frame, 64 × 64 of 16 bits by their headers."""
    series(folder, np.zeros((64, 64, 2), np.int16), **tags)
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.PixelData = encapsulate([frame])
        data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
        data.file_meta.TransferSyntaxUID = syntax
        data.save_as(path)


@pytest.mark.parametrize(
    ("syntax", "kind"),
    [
        (syntax, kind)
        for syntax in SYNTAXES
        for kind in ("uint8", "int8", "int16", "uint16", "int32", "uint32")
        if syntax != "RLE" or not kind.endswith("32")  # DICOM has none of 32 bits
    ],
)
def test_values_are_those_stored(tmp_path, kind, syntax):
    """Extents are odd, and slices are longer than what is read with the header."""
    values = np.random.default_rng(0).integers(-100 if kind[0] == "i" else 0, 120, (41, 43, 3)).astype(kind)
    values[3, 4] = np.iinfo(kind).max >> 9 if kind.endswith("32") else np.iinfo(kind).max
    written(tmp_path / "d", values, SYNTAXES[syntax])
    np.testing.assert_array_equal(only(tmp_path / "d").values[0], 2 * values.astype(np.float32) - 1000)


@pytest.mark.parametrize("shown", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("syntax", ["explicit", "RLE", *FRAMES])
def test_how_values_are_shown_does_not_change_them(tmp_path, shown, syntax):
    if syntax in FRAMES:
        values = pydicom.dcmread(get_testdata_file("MR_small.dcm")).pixel_array  # (rows, columns)
        encapsulated(tmp_path / "d", FRAMES[syntax], compressed(values, FRAMES[syntax], tmp_path))
        values = np.stack([values.T] * 2, axis=-1)
    else:
        values = image((6, 5, 4)).astype(np.int16)
        written(tmp_path / "d", values, SYNTAXES[syntax])
    for path in (tmp_path / "d").iterdir():
        data = pydicom.dcmread(path)
        data.PhotometricInterpretation = shown
        data.save_as(path)
    np.testing.assert_array_equal(only(tmp_path / "d").values[0], 2.0 * values - 1000)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("high", [11, 13, 15])
def test_bits_that_are_not_used_are_left_out(tmp_path, high, signed):
    values = np.arange(-60, 60).reshape(6, 5, 4) * 34 if signed else np.arange(120).reshape(6, 5, 4) * 34
    around = np.random.default_rng(0).integers(0, 2**16, values.shape) & ~(0xFFF << (high - 11))
    stored = ((values & 0xFFF) << (high - 11) | around).astype(np.uint16)

    def change(data, index):
        data.BitsStored, data.HighBit, data.PixelRepresentation = 12, high, int(signed)

    written(tmp_path / "d", stored, change=change)
    np.testing.assert_array_equal(only(tmp_path / "d").values[0], 2.0 * values - 1000)


def test_each_slice_has_its_own_slope(tmp_path):
    values = image((6, 5, 4)).astype(np.int16)

    def change(data, index):
        data.RescaleSlope, data.RescaleIntercept = f"{index + 0.123}", f"{-3.5 * index}"

    written(tmp_path / "d", values, change=change)
    expected = values * (np.arange(4) + 0.123) - 3.5 * np.arange(4)
    np.testing.assert_array_equal(only(tmp_path / "d").values[0], expected.astype(np.float32))


@pytest.mark.parametrize("kind", ["FloatPixelData", "DoubleFloatPixelData"])
def test_values_may_be_no_whole_numbers(tmp_path, kind):
    values = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32 if kind[0] == "F" else np.float64)

    def change(data, index):
        del data.PixelData, data.BitsStored, data.HighBit, data.PixelRepresentation
        setattr(data, kind, np.ascontiguousarray(values[:, :, index].T).tobytes())

    series(tmp_path / "d", np.zeros(values.shape, np.int16), BitsAllocated=8 * values.itemsize)
    paths = sorted((tmp_path / "d").iterdir(), key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])
    for index, path in enumerate(paths):
        data = pydicom.dcmread(path)
        change(data, index)
        data.save_as(path)
    expected = (2.0 * values.astype(np.float64) - 1000).astype(np.float32)
    np.testing.assert_array_equal(only(tmp_path / "d").values[0], expected)


@pytest.mark.parametrize("syntax", NATIVE)
def test_padding_after_the_pixels_is_passed_over(tmp_path, syntax):
    values = np.arange(720, dtype=np.int16).reshape(12, 20, 3)

    def change(data, index):
        data.PixelData += b"\x7f" * 128

    written(tmp_path / "d", values, NATIVE[syntax], change)
    np.testing.assert_array_equal(only(tmp_path / "d").values[0], 2.0 * values - 1000)


@pytest.mark.parametrize("length", [0, 1, 200, 478, 960, 1440])
@pytest.mark.parametrize("syntax", NATIVE)
def test_slices_have_as_many_bytes_as_their_pixels(tmp_path, syntax, length):
    """Otherwise missing pixels would be whatever was left in memory."""
    values = np.full((12, 20, 3), 42, np.int16)

    def change(data, index):
        if index == 1:
            data.PixelData = (3 * data.PixelData)[:length]

    written(tmp_path / "d", values, NATIVE[syntax], change)
    said = "20 rows of 12 pixels of 16 bits are 480: the slice is cut off, or its header is not its own"
    with pytest.raises(imaging.BadCase, match=rf"[.]dcm: .*has {length + length % 2} bytes of pixels; {said}"):
        only(tmp_path / "d")


RUNS = bytes((129, 7)) * 40  # of 128 bytes
RLE = {
    "no segments": bytes(64),
    "many segments": (2**32 - 1).to_bytes(4, "little") + bytes(60),
    "short segment": np.array([2, 64, 100, *[0] * 13], "<u4").tobytes() + RUNS[:36] + RUNS[:60],
    "segments elsewhere": np.array([2, 2**31, 2**32 - 1, *[0] * 13], "<u4").tobytes() + RUNS,
    "one segment": np.array([1, 64, *[0] * 14], "<u4").tobytes() + RUNS,
    "more runs": np.array([2, 64, 3000, *[0] * 13], "<u4").tobytes() + 250 * RUNS,
    "cut off": np.array([2, 64, 128, *[0] * 13], "<u4").tobytes()[:30],
}


@pytest.mark.parametrize("damage", RLE)
def test_damaged_run_lengths_are_refused(tmp_path, damage):
    """In a separate process, which some of them would end."""
    encapsulated(tmp_path / "d", RLELossless, RLE[damage])
    read = (
        "import sys, pathlib; from swin_unetr import imaging\n"
        "try: imaging.find([pathlib.Path(sys.argv[1])], 1.0)[0].read()\n"
        "except imaging.BadCase as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", read, tmp_path / "d"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert ".dcm: cannot be decoded (RLE Lossless): " in done.stdout


@pytest.mark.parametrize(
    ("syntax", "damage"),
    [
        (syntax, damage)
        for syntax in FRAMES
        for damage in ("cut off", "rows", "columns", "bits")
        if (syntax, damage) != ("JPEG 2000", "bits")  # its frames tell GDCM their bits, and it keeps them all
    ],
)
def test_compressed_frames_are_those_of_their_header(tmp_path, syntax, damage):
    values = pydicom.dcmread(get_testdata_file("MR_small.dcm")).pixel_array
    frame = compressed(values, FRAMES[syntax], tmp_path)
    tags = {"rows": {"Rows": 56}, "columns": {"Columns": 56}, "bits": {"BitsAllocated": 8, "BitsStored": 8}}
    encapsulated(tmp_path / "d", FRAMES[syntax], frame[:-40] if damage == "cut off" else frame, **tags.get(damage, {}))
    says = "have no end: are they cut off" if damage == "cut off" else "are .* its header says|JPEG 2000"
    with pytest.raises(imaging.BadCase, match=rf"[.]dcm: cannot be decoded \(JPEG.*{says}"):
        only(tmp_path / "d")


@pytest.mark.parametrize("name", ["JPEG-lossy", "JPEG2000", "JPEGLSNearLossless_08", "693_J2KI"])
def test_lossy_frames_are_read(tmp_path, name):
    """As in pydicom's own files: values in their rescaled range, and the shape in their header."""
    data = pydicom.dcmread(get_testdata_file(f"{name}.dcm"))
    frame = next(generate_frames(data.PixelData, number_of_frames=1))
    tags = {tag: data[tag].value for tag in ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")}
    encapsulated(tmp_path / "d", data.file_meta.TransferSyntaxUID, frame, Rows=data.Rows, Columns=data.Columns, **tags)
    values = only(tmp_path / "d").values[0]
    assert values.shape == (data.Columns, data.Rows, 2)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(get_testdata_file(f"{name}.dcm")))[0].astype(np.float32)
    expected = (expected - float(data.get("RescaleIntercept", 0))) / float(data.get("RescaleSlope", 1))
    np.testing.assert_array_equal(values[:, :, 0].T, 2 * expected - 1000)


@pytest.mark.parametrize(
    ("tag", "value", "says"),
    [
        ("RescaleSlope", "nan", "RescaleSlope is nan; accepted is a finite number"),
        ("RescaleSlope", ["3", "2"], r"RescaleSlope is .*3.*2.*; accepted is a finite number"),
        ("RescaleSlope", "0", "RescaleSlope is 0; accepted is another number"),
        ("RescaleIntercept", "inf", "RescaleIntercept is inf; accepted is a finite number"),
        ("PhotometricInterpretation", "PALETTE COLOR", "is PALETTE COLOR; accepted are MONOCHROME1 and MONOCHROME2"),
        ("HighBit", 16, "HighBit is 16 of 16 BitsStored and 16 BitsAllocated"),
    ],
    ids=["nan", "two", "zero", "infinite", "palette", "high bit"],
)
def test_what_gives_values_their_meaning_is_refused_by_name(tmp_path, tag, value, says):
    series(tmp_path / "d", image((6, 5, 4)))
    path = min((tmp_path / "d").iterdir())
    data = pydicom.dcmread(path)
    with pydicom.config.disable_value_validation():
        setattr(data, tag, value)
        data.save_as(path)
    with pytest.raises(imaging.BadCase, match=rf"{path.name}: .*{says}"):
        only(tmp_path / "d")


def test_a_slope_may_be_left_out(tmp_path):
    values = image((6, 5, 4)).astype(np.int16)

    def change(data, index):
        del data.RescaleIntercept
        data.RescaleSlope = None

    written(tmp_path / "d", values, change=change)
    np.testing.assert_array_equal(only(tmp_path / "d").values[0], values)
