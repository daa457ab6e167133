"""NRRD and MetaImage: what a header says about data, extents and units is what is read, or is refused by name."""

from __future__ import annotations

import gzip
import re
import zlib

import numpy as np
import pytest
import SimpleITK as sitk

from swin_unetr import imaging
from swin_unetr.evaluation import label_maps

from .test_volume import META, NRRD, only

VALUES = np.random.default_rng(0).integers(0, 99, (9, 8, 7)).astype(np.int16)
RAW = VALUES.T.tobytes()  # the first axis varies fastest
GZ_NRRD = "NRRD0004\ntype: short\ndimension: 3\nsizes: 9 8 7\nspacings: 1 1 1\nendian: little\nencoding: gzip\n{more}\n"
GZ_META = (
    "ObjectType = Image\nNDims = 3\nDimSize = 9 8 7\nElementType = MET_SHORT\nElementSpacing = 1 1 1\n"
    "CompressedData = True\nCompressedDataSize = {size}\n{more}ElementDataFile = {data}\n"
)
ZLIB, GZIP = zlib.compress(RAW), gzip.compress(RAW, mtime=0)


def turned(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


def stored_turned() -> bytes:
    """A stream whose values do not match its checksum, which alone reveals it."""
    stored = zlib.compress(RAW, 0)
    return turned(stored, len(stored) // 2)


DAMAGED = {
    "checksum": (turned(ZLIB, -4), turned(GZIP, -8), "incorrect data check"),
    "values": (stored_turned(), turned(gzip.compress(RAW, 0, mtime=0), 500), "incorrect data check"),
    "cut": (ZLIB[:400], GZIP[:400], "they end after [0-9]+ bytes once inflated: is the file cut off"),
    "end": (ZLIB[:-2], GZIP[:-2], "they end after 1008 bytes once inflated"),
    "short": (zlib.compress(RAW[:-2]), gzip.compress(RAW[:-2]), "has 1006 bytes of data once inflated; .* 1008"),
    "long": (zlib.compress(RAW + b"12"), gzip.compress(RAW + b"12"), "has 1010 bytes of data or more once"),
    "none": (b"", b"", "they end after 0 bytes|takes 504 bytes|has no CompressedDataSize"),
}


@pytest.mark.parametrize("name", ["x.nrrd", "x.mha", "x.mhd"])
@pytest.mark.parametrize("damage", ["whole", *DAMAGED])
def test_compressed_data_are_whole(tmp_path, name, damage):
    """Parsers report some of these, and read the rest with wrong values."""
    zlib_data, gzip_data, says = DAMAGED.get(damage, (ZLIB, GZIP, ""))
    if name == "x.nrrd":
        (tmp_path / name).write_bytes(GZ_NRRD.format(more="").encode() + gzip_data)
    elif name == "x.mha":
        header = GZ_META.format(size=len(zlib_data), more="", data="LOCAL")
        (tmp_path / name).write_bytes(header.encode() + zlib_data)
    else:
        (tmp_path / name).write_text(GZ_META.format(size=0, more="", data="x.zraw"))  # of 0, the whole file
        (tmp_path / "x.zraw").write_bytes(zlib_data)
    if damage == "whole":
        np.testing.assert_array_equal(only(tmp_path / name).values[0], VALUES)
        return
    for read in (lambda: only(tmp_path / name), lambda: label_maps.read(tmp_path / name)):
        with pytest.raises(imaging.BadCase, match=rf"{name}: .*{says}"):
            read()


@pytest.mark.parametrize(
    ("name", "header", "data"),
    [
        ("x.nrrd", GZ_NRRD.format(more="byte skip: 5\n"), gzip.compress(b"other" + RAW)),
        ("x.nrrd", GZ_NRRD.format(more=""), gzip.compress(RAW[:600]) + gzip.compress(RAW[600:])),
        ("x.nrrd", GZ_NRRD.format(more=""), GZIP + b"whatever"),
        ("x.nrrd", GZ_NRRD.format(more="Line Skip: 2\ndata file: x.gz\n"), b"one\ntwo\n" + GZIP),
        ("x.nrrd", GZ_NRRD.format(more="data file: LIST\nx.gz\ny.gz\n"), [gzip.compress(RAW[:144]), b""]),
        ("x.mha", GZ_META.format(size=len(ZLIB), more="", data="LOCAL"), ZLIB + b"whatever"),
        ("x.mhd", GZ_META.format(size=len(ZLIB), more="HeaderSize = 5\n", data="x.gz"), b"other" + ZLIB),
    ],
    ids=["byte skip", "members", "more", "line skip", "list", "size", "header size"],
)
def test_compressed_data_lie_where_the_header_says(tmp_path, name, header, data):
    """As SimpleITK reads them, which keeps this list honest."""
    if isinstance(data, list):  # a file for each of the planes
        planes = [gzip.compress(RAW[at : at + 144]) for at in range(0, 1008, 144)]
        for number, plane in enumerate(planes):
            (tmp_path / f"plane{number}.gz").write_bytes(plane)
        header, data = header.replace("x.gz\ny.gz\n", "\n".join(f"plane{n}.gz" for n in range(7))), b""
    separate = "x.gz" in header
    (tmp_path / name).write_bytes(header.encode() + (b"" if separate else data))
    if separate:
        (tmp_path / "x.gz").write_bytes(data)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name))).T, VALUES)
    np.testing.assert_array_equal(only(tmp_path / name).values[0], VALUES)


@pytest.mark.parametrize(("more", "data"), [("", "LOCAL"), ("HeaderSize = 5\n", "x.gz")])
def test_compressed_data_begin_their_file_or_tell_their_size(tmp_path, more, data):
    """MetaIO looks for others at the start of the file, whatever is there."""
    (tmp_path / "x.gz").write_bytes(b"other" + ZLIB)
    header = GZ_META.format(size=0, more=more, data=data)
    (tmp_path / "x.mha").write_bytes(header.encode() + (ZLIB if data == "LOCAL" else b""))
    with pytest.raises(imaging.BadCase, match=r"x.mha: its header has no CompressedDataSize; accepted"):
        only(tmp_path / "x.mha")


@pytest.mark.parametrize("name", ["x.nrrd", "x.mha"])
@pytest.mark.parametrize("length", [60, 65])
def test_data_are_counted(tmp_path, name, length):
    header = NRRD + "\n" if name == "x.nrrd" else META + "ElementDataFile = LOCAL\n"
    (tmp_path / name).write_bytes(header.encode() + bytes(length))
    with pytest.raises(imaging.BadCase, match=rf"{name}: has {length} bytes of data; its header promises 64$"):
        only(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("x.nrrd", NRRD + "byte skip: -1\n\n"),
        ("x.nrrd", NRRD + "byte skip: 3\ndata file: x.raw\n"),
        ("x.mha", META + "HeaderSize = -1\nElementDataFile = LOCAL\n"),
        ("x.mhd", META + "HeaderSize = 3\nElementDataFile = x.raw\n"),
    ],
    ids=["NRRD from the end", "NRRD in another file", "MetaImage from the end", "MetaImage in another file"],
)
def test_data_are_a_part_of_a_file_where_the_header_says_so(tmp_path, name, header):
    values = np.arange(64, dtype=np.uint8)
    data = b"123" + values.tobytes()
    separate = "x.raw" in header
    (tmp_path / name).write_bytes(header.encode() + (b"" if separate else data))
    (tmp_path / "x.raw").write_bytes(data + b"more")
    np.testing.assert_array_equal(only(tmp_path / name).values[0].T.ravel(), values)


BARE = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 4 4 4\nencoding: raw\n"
BARE_META = META.replace("ElementSpacing = 1 1 1\n", "")
LPS = BARE + "space: left-posterior-superior\n"
VECTOR = BARE.replace("3\nsizes: 4 4 4", "4\nsizes: 1 4 4 4") + "kinds: vector domain domain domain\n"


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (BARE + "spacings: 1 2 nan\n", "spacings 1 2 nan; accepted is a number for each axis in space"),
        (VECTOR + "Spacings: 1 1 2 NaN\n", "spacings 1 1 2 NaN"),
        (LPS + "space directions: (1,0,0) (0,1,0) none\n", "space directions (1,0,0) (0,1,0) none"),
        (LPS + "spacedirections: (nan,nan,nan) (0,1,0) (0,0,1)\n", "space directions (nan,nan,nan) (0,1,0) (0,0,1)"),
        (LPS + 'space directions: (1,0,0) (0,1,0) (0,0,1)\nspace units: "mm" "mm" "cm"\n', 'space units "cm"; acc'),
        (BARE + 'spacings: 1 1 1\nunits: "um" "um" "um"\n', 'units "um"; accepted is "mm"'),
        (BARE + "axis mins: 0 0 0\naxis maxs: 10 10 10\n", "axis mins 0 0 0; accepted is spacings"),
        (BARE_META + "ElementSpacing = 1 nan 1\n", "ElementSpacing 1 nan 1; accepted is a number for each axis"),
        (BARE_META + "ElementSize = 1 1 0\n", "ElementSpacing 1 1 0"),
        (META + "DistanceUnits = um\n", "DistanceUnits um; accepted is mm"),
        (META + "ElementToIntensityFunctionSlope = 2\n", "ElementToIntensityFunctionSlope 2; accepted is 1"),
        (META + "ElementToIntensityFunctionOffset = -1024\n", "ElementToIntensityFunctionOffset -1024; accepted is 0"),
    ],
)
def test_what_simpleitk_leaves_out_is_refused(tmp_path, header, says):
    path = tmp_path / ("x.nrrd" if header.startswith("NRRD") else "x.mha")
    path.write_bytes(header.encode() + (b"\n" if path.suffix == ".nrrd" else b"ElementDataFile = LOCAL\n") + bytes(64))
    with pytest.raises(imaging.BadCase, match=re.escape(f"{path.name}: its header has {says}")):
        only(path)


@pytest.mark.parametrize(
    ("header", "spacing", "notes"),
    [
        (BARE, (1, 1, 1), ("its header has no spacings: voxels are taken for 1 mm wide",)),
        (BARE_META, (1, 1, 1), ("its header has no ElementSpacing: voxels are taken for 1 mm wide",)),
        (BARE + "spacings: 1 2 3\n", (1, 2, 3), ()),
        (BARE + "spacings: 1 2 -3\n", (1, 2, 3), ()),
        (VECTOR + "spacings: nan 1 2 3\n", (1, 2, 3), ()),
        (LPS + 'space directions: (1,0,0) (0,2,0) (0,0,3)\nspace units: "mm" "mm" "mm"\n', (1, 2, 3), ()),
        (BARE_META + "ElementSize = 1 2 3\n", (1, 2, 3), ()),
        (BARE_META + "ElementSpacing = 1 2 3\nDistanceUnits = mm\n", (1, 2, 3), ()),
        (META + "ElementToIntensityFunctionSlope = 1.0\nElementToIntensityFunctionOffset = 0\n", (1, 1, 1), ()),
    ],
)
def test_extents_of_voxels_are_those_written(tmp_path, header, spacing, notes):
    path = tmp_path / ("x.nrrd" if header.startswith("NRRD") else "x.mha")
    path.write_bytes(header.encode() + (b"\n" if path.suffix == ".nrrd" else b"ElementDataFile = LOCAL\n") + bytes(64))
    volume = only(path)
    assert volume.spacing == pytest.approx(spacing)
    assert volume.notes == notes
