"""Images in files: where they lie, how DICOM series are told apart, and what is refused."""

from __future__ import annotations

import gzip
import os
import re
import warnings
import zlib

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import (
    BasicTextSRStorage,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    generate_uid,
)

from swin_unetr import imaging
from swin_unetr.evaluation import label_maps
from swin_unetr.imaging import dicom
from swin_unetr.imaging.itk import write_itk

from ..segmenter import affine, image, nifti


def only(path) -> imaging.Volume:
    (source,) = imaging.find([path], 1.0)
    return source.read()


@pytest.mark.parametrize("name", ["x.nii.gz", "x.nii", "x.nrrd", "x.mha"])
@pytest.mark.parametrize("axes", ["RAS", "LPS", "SLA"])
def test_every_format_says_where_voxels_lie(tmp_path, name, axes):
    values, place = image((7, 5, 4)), affine(axes)
    if ".nii" in name:
        nifti(tmp_path / name, values, place)
    else:
        write_itk(values, place, tmp_path / name)
    volume = only(tmp_path / name)
    np.testing.assert_array_equal(volume.values[0], values)
    np.testing.assert_allclose(volume.affine, place, atol=1e-4)
    # A label map of it lies at the same place, and its file is of the same kind.
    (source,) = imaging.find([tmp_path / name], 1.0)
    out = tmp_path / f"label{imaging.output_suffix(source)}"
    imaging.write((values > 0).astype(np.uint8), volume, out)
    again = only(out)
    np.testing.assert_array_equal(again.values[0], values > 0)
    np.testing.assert_allclose(again.affine, place, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({name, out.name})


def test_both_forms_of_a_nifti_geometry_are_kept(tmp_path):
    nifti(tmp_path / "x.nii.gz")
    picture = nibabel.load(tmp_path / "x.nii.gz")
    picture.set_qform(affine("LPS"), code=1)
    picture.set_sform(affine("RAS"), code=2)
    picture.header.set_slope_inter(2, 5)
    picture.header["cal_max"] = 300
    nibabel.save(picture, tmp_path / "x.nii.gz")
    volume = only(tmp_path / "x.nii.gz")
    imaging.write(np.ones(volume.values.shape[1:], np.uint8), volume, tmp_path / "y.nii.gz")
    written = nibabel.load(tmp_path / "y.nii.gz")
    assert written.get_qform(coded=True)[1] == 1
    assert written.get_sform(coded=True)[1] == 2
    np.testing.assert_allclose(written.get_qform(), affine("LPS"), atol=1e-4)
    assert written.get_data_dtype() == np.uint8
    assert written.header["cal_max"] == 0
    assert np.unique(written.get_fdata()).tolist() == [1]


@pytest.mark.parametrize(
    ("unit", "millimetres"), [("unknown", 1), ("mm", 1), ("meter", 1000), ("micron", 0.001)], ids=lambda part: str(part)
)
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_places_are_in_mm_and_files_in_their_own_unit(tmp_path, kind, unit, millimetres):
    """A label map lies on its image both for readers that heed units and for those that do not."""
    values = image((7, 5, 4))
    picture = kind(values, affine("LPS"))
    picture.header.set_xyzt_units(unit, "sec")
    nibabel.save(picture, tmp_path / "x.nii.gz")
    volume = only(tmp_path / "x.nii.gz")
    place = np.diag([millimetres] * 3 + [1]) @ affine("LPS")
    np.testing.assert_allclose(volume.affine, place, rtol=1e-6)
    np.testing.assert_allclose(volume.spacing, np.linalg.norm(place[:3, :3], axis=0), rtol=1e-6)
    imaging.write((values > 0).astype(np.uint8), volume, tmp_path / "y.nii.gz")
    source, written = (nibabel.load(tmp_path / name).header for name in ("x.nii.gz", "y.nii.gz"))
    assert written.get_xyzt_units() == (unit, "sec")
    for of in (lambda header: header.get_sform(), lambda header: header.get_qform(), lambda header: header["pixdim"]):
        np.testing.assert_array_equal(of(written), of(source))
    np.testing.assert_array_equal(label_maps.read(tmp_path / "y.nii.gz").affine, volume.affine)


@pytest.mark.parametrize(
    ("name", "number", "says"),
    [
        ("xyzt_units", 5, "its header has unit 5 of space; accepted are 1 (metre), 2 (mm), 3 (micron) and 0 (unknown)"),
        ("pixdim", 0, "its header has voxels of 1 × 0 × 1, and no affine; accepted are extents above 0"),
    ],
)
def test_extents_that_nibabel_replaces_are_refused(tmp_path, name, number, says):
    header = nibabel.Nifti1Header()
    header.set_data_shape((4, 4, 4))
    header["vox_offset"], header["magic"], header["pixdim"] = 352, b"n+1", 1
    header[name][... if name == "xyzt_units" else 2] = number
    (tmp_path / "x.nii").write_bytes(header.binaryblock + bytes(4 + 4 * 64))
    with pytest.raises(imaging.BadCase, match=re.escape(f"x.nii: {says}")):
        only(tmp_path / "x.nii")


def test_channels_come_first(tmp_path):
    nifti(tmp_path / "x.nii.gz", np.stack([image((6, 5, 4), seed) for seed in range(3)], axis=-1))
    assert only(tmp_path / "x.nii.gz").values.shape == (3, 6, 5, 4)
    sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(image((6, 5, 4)).T)]), str(tmp_path / "y.nrrd"))
    with pytest.raises(imaging.BadCase, match=r"y.nrrd: has 4 axes; accepted are three"):
        only(tmp_path / "y.nrrd")


def test_damaged_files_are_named(tmp_path):
    whole = nifti(tmp_path / "x.nii.gz").read_bytes()
    (tmp_path / "x.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(imaging.BadCase, match=r"x.nii.gz: cannot be read"):
        only(tmp_path / "x.nii.gz")
    # A stream is not read beyond what its header says.
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(gzip.decompress(whole) + bytes(1 << 20)))
    with pytest.raises(imaging.BadCase, match=r"x.nii.gz: is larger than its header says"):
        only(tmp_path / "x.nii.gz")
    write_itk(image(), affine(), tmp_path / "x.nrrd")
    (large,) = imaging.find([tmp_path / "x.nrrd"], 1e-9)
    with pytest.raises(imaging.BadCase, match=r"x.nrrd: takes .* GiB by its header; accepted are 1e-09"):
        large.read()
    sitk.WriteImage(sitk.GetImageFromArray(image().astype(np.complex64)), str(tmp_path / "y.nrrd"))
    with pytest.raises(imaging.BadCase, match=r"y.nrrd: has voxels of type complex64"):
        only(tmp_path / "y.nrrd")
    (tmp_path / "x.nrrd").write_bytes(b"NRRD0004\nnothing")
    with pytest.raises(imaging.BadCase, match=r"x.nrrd: cannot be read"):
        only(tmp_path / "x.nrrd")
    broken = image().astype(np.float32)
    broken[3, 4, 5:7] = np.nan
    with pytest.raises(imaging.BadCase, match=r"z.nii: 2 voxels are NaN or infinite"):
        only(nifti(tmp_path / "z.nii", broken))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_headers_that_promise_more_than_their_files_can_hold_are_refused(tmp_path, suffix):
    """A reader would allocate that memory first."""
    path = tmp_path / f"x{suffix}"
    if "nii" in suffix:
        header = nibabel.Nifti1Header()
        header.set_data_dtype(np.uint8)
        header.set_data_shape((1500, 1500, 1500))
        header["vox_offset"], header["magic"] = 352, b"n+1"
        data = header.binaryblock + bytes(100)
        path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    elif suffix == ".nrrd":
        path.write_bytes(b"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 1500 1500 1500\nencoding: gzip\n\nabc")
    else:
        path.write_text(
            "ObjectType = Image\nNDims = 3\nCompressedData = True\nDimSize = 1500 1500 1500\n"
            "ElementType = MET_UCHAR\nElementDataFile = LOCAL\nabc"
        )
    for read in (imaging.find([path], 1000.0)[0].read, lambda: label_maps.read(path)):
        with pytest.raises(imaging.BadCase, match=r"by its header, which [0-9]+ bytes on disk cannot hold"):
            read()


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_what_compresses_best_is_read(tmp_path, suffix):
    imaging.write(np.zeros((150, 160, 170), np.uint8), imaging.Volume(image()[None], affine()), tmp_path / f"x{suffix}")
    assert not only(tmp_path / f"x{suffix}").values.any()


def test_what_is_no_image_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.jpg").touch()
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "x.dcm").touch()
    for path, message in (
        (
            "others",
            "files that end in .nii.gz, .nii, .nrrd, .mha, .mhd: x.dcm (is empty)",
        ),
        ("none", "none does not exist"),
        ("x.jpg", "x.jpg ends in none of .nii.gz, .nii, .nrrd"),
        ("empty", "empty holds neither DICOM files nor files that end in"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            imaging.find([tmp_path / path], 1.0)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        nifti(tmp_path / folder / "x.nii.gz")
    with pytest.raises(ValueError, match="are both case 'x'"):
        imaging.find([tmp_path / "a", tmp_path / "b"], 1.0)


NRRD = (
    "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 4 4 4\nspace: left-posterior-superior\n"
    "space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\nencoding: raw\n"
)
META = "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\nElementSpacing = 1 1 1\n"


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("x.nrrd", f"{NRRD}data file: {{secret}}\n"),
        ("x.nrrd", f"{NRRD}DATA FILE:   ../secret\n"),
        ("x.nrrd", f"{NRRD}datafile: own/../../secret\n"),
        ("x.nrrd", f"{NRRD}content: x\rdata file: {{secret}}\n"),  # a lone carriage return ends a line there
        ("x.nrrd", f"{NRRD}data file: LIST 3\n../secret\n"),
        ("x.mhd", f"{META}ElementDataFile = {{secret}}\n"),
        ("x.mha", f"{META} ElementDataFile\t:\t../secret\n"),
        ("x.mhd", f"{META}ElementDataFile = LIST\n../secret\n"),
        ("x.mhd", f"{META}ElementDataFile = ../secr%ct 101 101 1\n"),
        ("x.mhd", f"{META}ElementDataFile = ..%csecret 47 47 1\n"),  # number 47 is a slash
    ],
)
def test_headers_name_no_files_of_other_folders(tmp_path, name, header):
    """SimpleITK reads each of these, and the test of that keeps this list honest."""
    (tmp_path / "own").mkdir()
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(64)))
    path = tmp_path / "own" / name
    (tmp_path / "own" / "own").mkdir()
    path.write_bytes(header.format(secret=secret).encode())
    assert sitk.GetArrayFromImage(sitk.ReadImage(str(path))).size == 64
    with pytest.raises(imaging.BadCase, match=rf"{name}: its header names .* as its data; accepted are"):
        only(path)


def test_a_path_that_would_end_the_process_is_refused(tmp_path):
    """A message of NRRD's parser that names a longer one overwrites other memory."""
    folder = tmp_path.joinpath(*["d" * 100] * 11)
    folder.mkdir(parents=True)
    (folder / "a.nrrd").write_bytes(b"NRRD0004\ntype: float\ndimension: 3\nsizes: 2 2\nencoding: raw\n\nabc")
    with pytest.raises(imaging.BadCase, match=r"has a path of 1[0-9]{3} bytes; accepted are 800 for NRRD"):
        only(folder / "a.nrrd")


def test_headers_name_files_of_their_own_folder(tmp_path):
    values = np.arange(64, dtype=np.uint8)
    values.tofile(tmp_path / "x.raw")
    for number, plane in enumerate(values.reshape(4, 16)):
        plane.tofile(tmp_path / f"plane{number:02d}.raw")
    for name, header in (
        ("a.nrrd", f"{NRRD}data file: ./x.raw\n"),
        ("b.nrrd", f"{NRRD}data file: plane%02d.raw 0 3 1 2\n"),
        ("c.mhd", f"{META}ElementDataFile = x.raw\n"),
        ("d.mhd", f"{META}ElementDataFile = LIST\n" + "".join(f"plane{n:02d}.raw\n" for n in range(4))),
        ("e.mhd", f"{META}ElementDataFile = plane%02d.raw 0 3 1\n"),
    ):
        (tmp_path / name).write_text(header)
        np.testing.assert_array_equal(only(tmp_path / name).values[0].T.ravel(), values)
    (tmp_path / "x.raw").unlink()
    os.mkfifo(tmp_path / "x.raw")
    with pytest.raises(imaging.BadCase, match=r"names 'x.raw' as its data, which cannot be read: is a FIFO"):
        only(tmp_path / "c.mhd")


@pytest.mark.parametrize(
    ("name", "header", "says"),
    [
        ("x.mhd", META.replace("NDims = 3", "NDims = 65536"), "has NDims = 65536; accepted are 1 to 4 axes"),
        ("x.mha", META.replace("NDims = 3", "NDims = 1e+30"), r"has NDims = 1e\+30; accepted are"),
        ("x.mhd", META.replace("NDims = 3", "NDims : -1"), "has NDims = -1; accepted are"),
        ("x.nrrd", NRRD.replace("(0,0,1)", f"(0,0,{'1' * 5000})"), "has a field of 50[0-9]+ letters in its header"),
        ("x.nrrd", f"{NRRD}{'x' * 5000}: 1\n", "has a field of 500[0-9] letters in its header"),
        ("x.mhd", META.replace("4 4 4", "4 4 0"), "has shape .4, 4, 0.; accepted is one voxel or more"),
        ("x.mhd", f"{META}TransformMatrix = 1 0 0 0 1 0 0 0 -1e300\n", "has an affine that cannot be inverted"),
    ],
)
def test_headers_that_would_end_the_process_are_refused(tmp_path, name, header, says):
    """Or that yield an image for which no label map can be written."""
    np.zeros(64, np.uint8).tofile(tmp_path / "x.raw")
    (tmp_path / name).write_text(header + ("data file: x.raw\n" if name == "x.nrrd" else "ElementDataFile = x.raw\n"))
    with pytest.raises(imaging.BadCase, match=rf"{name}: {says}"):
        only(tmp_path / name)


@pytest.mark.parametrize("name", ["x.nii.gz", "x.nrrd"])
def test_voxels_are_finite_as_float32(tmp_path, name):
    values = image((7, 5, 4)).astype(np.float64)
    values[:2] = np.finfo(np.float64).max
    if name.endswith(".nrrd"):
        write_itk(values, affine(), tmp_path / name)
    else:
        nifti(tmp_path / name, values)
    with pytest.raises(imaging.BadCase, match="40 voxels are NaN or infinite, 40 of them beyond the range of float32"):
        only(tmp_path / name)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mhd"])
def test_a_name_may_be_as_long_as_the_system_allows(tmp_path, suffix):
    path = tmp_path / f"{'x' * (255 - len(suffix))}{suffix}"
    imaging.write(np.ones((4, 4, 4), np.uint8), imaging.Volume(np.ones((1, 4, 4, 4), np.float32), affine()), path)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    if suffix != ".mhd":
        assert only(path).values.sum() == 64


# --- DICOM ---

ORIENTATIONS = {"axial": (1, 0, 0, 0, 1, 0), "coronal": (1, 0, 0, 0, 0, -1), "sagittal": (0, 1, 0, 0, 0, -1)}


def series(folder, values, orientation="axial", uid=None, gap=2.5, skip=(), **tags) -> str:
    """Write ``values (X, Y, Z)`` as slices with slope 2 and intercept -1000; returns the series' UID."""
    folder.mkdir(exist_ok=True)
    uid = uid or generate_uid()
    axes = np.array(ORIENTATIONS[orientation], float).reshape(2, 3)
    normal = np.cross(*axes)
    for index in range(values.shape[2]):
        if index in skip:
            continue
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.SeriesNumber, data.SeriesDescription = uid, 3, "Thorax / 2.5"
        data.PatientName, data.PatientID, data.Modality = "Doe^Jane", "secret", "CT"
        data.ImageOrientationPatient = [float(x) for x in axes.flatten()]
        data.ImagePositionPatient = [float(x) for x in np.array([-20.0, 10.0, 50.0]) + index * gap * normal]
        data.PixelSpacing, data.SliceThickness = [0.5, 0.75], gap
        data.Rows, data.Columns = values.shape[1], values.shape[0]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.RescaleSlope, data.RescaleIntercept = 2, -1000
        data.PixelData = np.ascontiguousarray(values[:, :, index].T).astype("<i2").tobytes()
        for name, value in tags.items():
            setattr(data, name, value)
        # File names that do not follow the slices' order.
        data.save_as(
            folder / f"{(index * 7) % 11:02d}-{uid[-6:]}-{orientation}-{tags.get('EchoTime', '')}.dcm",
            enforce_file_format=False,
        )
    return uid


def test_a_series_is_read_in_space_and_in_hu(tmp_path):
    values = image((6, 5, 4))
    series(tmp_path / "d", values)
    (tmp_path / "d" / "README.txt").write_text("no image")
    (source,) = imaging.find([tmp_path / "d"], 1.0)
    assert source.name == "series_3_thorax_2_5"
    volume = source.read()
    np.testing.assert_array_equal(volume.values[0], 2.0 * values - 1000)
    expected = np.diag([-0.75, -0.5, 2.5, 1.0])
    expected[:3, 3] = (20.0, -10.0, 50.0)
    np.testing.assert_allclose(volume.affine, expected)
    # SimpleITK puts it at the same place.
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "d"))
    itk = sitk.ReadImage(names)
    np.testing.assert_allclose(
        itk.TransformIndexToPhysicalPoint((2, 1, 3)), (np.diag([-1, -1, 1, 1]) @ volume.affine @ (2, 1, 3, 1))[:3]
    )
    assert imaging.output_suffix(source) == ".nii.gz"
    imaging.write(np.ones((6, 5, 4), np.uint8), volume, tmp_path / "label.nii.gz")
    written = nibabel.load(tmp_path / "label.nii.gz")
    np.testing.assert_allclose(written.affine, expected)
    assert written.header.get_xyzt_units()[0] == "mm"


def test_echoes_orientations_and_series_are_told_apart(tmp_path):
    uid = series(tmp_path / "d", image((6, 5, 4)), EchoTime=4.6, EchoNumbers=1)
    series(tmp_path / "d", image((6, 5, 4), 1), uid=uid, EchoTime=9.2, EchoNumbers=2)
    for orientation in ORIENTATIONS:
        series(tmp_path / "d", image((6, 5, 3), 2), orientation, uid="1.2.3", SeriesNumber=8, SeriesDescription="Loc")
    found = {source.name: source.read() for source in imaging.find([tmp_path / "d"], 1.0)}
    assert sorted(re.sub(r"_\d$", "", name) for name in found) == [
        "series_3_thorax_2_5_echo1",
        "series_3_thorax_2_5_echo2",
        "series_8_loc_axial",
        "series_8_loc_coronal",
        "series_8_loc_sagittal",
    ]
    for name, volume in found.items():
        seed = 2 if "loc" in name else int("echo2" in name)
        shape = (6, 5, 3) if "loc" in name else (6, 5, 4)
        np.testing.assert_array_equal(np.sort(volume.values, None), np.sort(2.0 * image(shape, seed) - 1000, None))
    assert not any("doe" in name or "secret" in name for name in found)


def test_slices_differ_by_rounding_but_not_in_the_extents_of_pixels(tmp_path):
    uid = series(tmp_path / "d", image((6, 5, 4)))
    for number, path in enumerate(sorted((tmp_path / "d").iterdir())):
        data = pydicom.dcmread(path)
        data.ImageOrientationPatient = [1, 0.0005 + 1e-6 * number, 0, -0.0005, 1, 0]  # to either side of a third digit
        data.save_as(path)
    (source,) = imaging.find([tmp_path / "d"], 1.0)
    assert source.read().values.shape == (1, 6, 5, 4)
    series(tmp_path / "d" / "more", image((6, 5, 4)), uid=uid, PixelSpacing=[0.25, 0.25])
    assert len(imaging.find([tmp_path / "d"], 1.0)) == 2


@pytest.mark.parametrize(
    ("tag", "written"),
    [
        ("EchoTime", ["4.92", "4.920"]),
        ("EchoTime", ["30", "30.001"]),
        ("EchoNumbers", ["1", "01"]),
        ("PixelSpacing", [["0.78125", "0.78125"], ["0.7813", "0.7813"]]),
        ("ImageOrientationPatient", [["1", "0", "0", "0", "1", "0"], ["1.000", "-1e-7", "0.0", "0", "1", "0"]]),
    ],
)
def test_equal_values_are_equal_however_they_are_written(tmp_path, tag, written):
    values = image((6, 5, 8))
    series(tmp_path / "d", values)
    paths = sorted((tmp_path / "d").iterdir(), key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])
    for number, path in enumerate(paths):
        data = pydicom.dcmread(path)
        with pydicom.config.disable_value_validation():
            setattr(data, tag, written[number % 2])
            data.save_as(path)
    volume = only(tmp_path / "d")
    np.testing.assert_array_equal(volume.values[0], 2.0 * values - 1000)
    extents = (0.78125, 0.78125, 2.5) if tag == "PixelSpacing" else (0.75, 0.5, 2.5)
    assert volume.spacing == pytest.approx(extents, rel=1e-4)


@pytest.mark.parametrize("gap", [0.125, 0.3333, 0.625])
def test_gaps_are_as_even_as_positions_are_written(tmp_path, gap):
    """To 0.01 mm, which is more than the fraction of a distance by which uneven slices differ."""
    series(tmp_path / "d", image((6, 5, 10)), gap=gap)
    series(tmp_path / "short", image((6, 5, 10)), gap=gap, skip=(5,))
    for path in [*(tmp_path / "d").iterdir(), *(tmp_path / "short").iterdir()]:
        data = pydicom.dcmread(path)
        data.ImagePositionPatient = [round(float(x), 2) for x in data.ImagePositionPatient]
        data.save_as(path)
    assert only(tmp_path / "d").spacing[2] == pytest.approx(gap, abs=0.01 / 9)
    with pytest.raises(imaging.BadCase, match="1 missing between"):
        only(tmp_path / "short")


def test_series_named_alike_are_told_apart_by_their_folders(tmp_path):
    for folder in ("first", "second"):
        series(tmp_path / folder, image((6, 5, 4)))
    names = [source.name for source in imaging.find([tmp_path / "first", tmp_path / "second"], 1.0)]
    assert names == ["first_series_3_thorax_2_5", "second_series_3_thorax_2_5"]


def test_patients_with_equal_series_are_told_apart(tmp_path):
    """Also if the innermost folders have the same name, and if one patient has two of them."""
    for folder in ("case_07", "case_12"):
        (tmp_path / folder).mkdir()
        series(tmp_path / folder / "scan", image((6, 5, 4)))
    series(tmp_path / "case_12" / "scan", image((6, 5, 4), 1))
    series(tmp_path / "case_12" / "other", image((6, 5, 4)), SeriesDescription="flair")
    found = {source.name: source.path for source in imaging.find([tmp_path], 1.0)}
    assert found == {
        "case_07_scan_series_3_thorax_2_5": tmp_path / "case_07" / "scan",
        "case_12_scan_series_3_thorax_2_5_6x5_1": tmp_path / "case_12" / "scan",
        "case_12_scan_series_3_thorax_2_5_6x5_2": tmp_path / "case_12" / "scan",
        "series_3_flair": tmp_path / "case_12" / "other",
    }


@pytest.mark.parametrize(("identify", "start"), [("patient", "secret"), ("accession", "a_17")])
def test_names_have_data_of_patients_where_asked_for(tmp_path, identify, start):
    series(tmp_path / "d", image((6, 5, 4)), AccessionNumber="A/17")
    names = [imaging.find([tmp_path / "d"], 1.0, identify=asked)[0].name for asked in (None, identify)]
    assert names == ["series_3_thorax_2_5", f"{start}_series_3_thorax_2_5"]


def test_a_damaged_header_costs_its_own_series_alone(tmp_path):
    series(tmp_path / "d", image((6, 5, 4)))
    path = next((tmp_path / "d").iterdir())
    path.write_bytes(path.read_bytes().replace(b"1.0\\0.0\\0.0\\0.0\\1.0\\0.0", b"1.0\\0.0\\x.0\\0.0\\1.0\\0.0"))
    series(tmp_path / "d", image((6, 5, 4)), SeriesNumber=4)
    whole, broken = sorted(imaging.find([tmp_path / "d"], 1.0), key=lambda source: source.name, reverse=True)
    assert (whole.name, broken.name) == ("series_4_thorax_2_5", "series_3_thorax_2_5")
    assert whole.read().values.shape == (1, 6, 5, 4)
    with pytest.raises(imaging.BadCase, match=rf"{path.name}: cannot be read: .*x\.0"):
        broken.read()


def test_slices_are_finite_and_names_short_enough(tmp_path):
    series(tmp_path / "d", image((6, 5, 3)), SeriesDescription="long " * 12, RescaleSlope="1e40")
    (tmp_path / ("f" * 240)).mkdir()
    (tmp_path / "d").rename(tmp_path / ("f" * 240) / "d")
    series(tmp_path / "d", image((6, 5, 3)), SeriesDescription="long " * 12)
    found = imaging.find([tmp_path], 1.0)
    assert len({source.name for source in found}) == 2
    assert all(len(source.name) < 240 for source in found)
    with pytest.raises(imaging.BadCase, match=r"voxels are NaN or infinite"):
        next(source for source in found if "f" * 240 in str(source.path)).read()


ROWS, UID = b"\x28\x00\x10\x00US", b"\x20\x00\x0e\x00UI"


@pytest.mark.parametrize(
    ("damage", "series_known"),
    [
        (lambda data: data.replace(ROWS, ROWS[:4] + b"UW"), True),  # no such kind of value
        (lambda data: data.replace(ROWS + b"\x02", ROWS + b"\x03"), True),  # a number of three bytes
        (lambda data: data[: data.index(ROWS)], True),  # cut off
        (lambda data: data[: data.index(UID)], False),
        (lambda data: data.replace(UID, UID[:4] + b"UW"), False),
        (lambda data: data.replace(UID[:4] + b"UI", UID[:4] + b"SQ"), False),
    ],
    ids=["kind", "length", "cut", "cut before UID", "kind of UID", "UID as sequence"],
)
def test_damaged_slices_are_named(tmp_path, damage, series_known):
    """However the parser reads them, no image is silently a slice short."""
    series(tmp_path / "d", image((6, 5, 4)))
    series(tmp_path / "d", image((6, 5, 4)), SeriesNumber=4)
    last = max((tmp_path / "d").iterdir(), key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])
    data = last.read_bytes()
    last.write_bytes(damage(data))
    assert last.read_bytes() != data
    told, refused = [], []
    found = imaging.find([tmp_path / "d"], 1.0, lambda path, why: told.append(path.name))
    for source in found:
        try:
            short = source.read().values.shape[3] < 4
            assert not short or any(last.name in note for note in source.notes)
        except imaging.BadCase as error:
            refused.append(str(error))
    assert len(refused) + len(told) == 1
    assert last.name in (refused + told)[0]
    if series_known:
        assert len(refused) == 1
        assert len(found) == 2


def without_preamble(path) -> None:
    """As in older exports: no preamble, no file meta information, implicit kinds of values."""
    data = pydicom.dcmread(path)
    plain = pydicom.Dataset({element.tag: element for element in data})
    plain.save_as(path, implicit_vr=True, little_endian=True)
    assert path.read_bytes()[128:132] != b"DICM"


@pytest.mark.parametrize("which", ["ends", "all"])
def test_slices_without_preamble_are_read(tmp_path, which):
    values = image((6, 5, 6))
    series(tmp_path / "d", values)
    paths = sorted((tmp_path / "d").iterdir(), key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])
    for path in paths if which == "all" else (paths[0], paths[-1]):
        without_preamble(path)
    np.testing.assert_array_equal(only(tmp_path / "d").values[0], 2.0 * values - 1000)


def test_what_is_left_out_is_counted_and_named(tmp_path):
    series(tmp_path / "d", image((6, 5, 4)))
    (tmp_path / "d" / "empty.dcm").touch()
    (tmp_path / "d" / "README.txt").write_text("no image, but a longer text than the preamble of a file. " * 5)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "d" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "d" / "fifo.dcm")
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = BasicTextSRStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    report = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    report.SOPClassUID, report.SeriesInstanceUID = BasicTextSRStorage, generate_uid()
    report.save_as(tmp_path / "d" / "sr", enforce_file_format=False)
    told = {}
    (source,) = imaging.find([tmp_path / "d"], 1.0, lambda path, why: told.update({path.name: why}))
    assert told == {
        "README.txt": "is not a DICOM file",
        "empty.dcm": "is empty",
        "fifo.dcm": "is a FIFO; accepted are regular files",
        "link": "is a link to a folder, which is not followed",
        "loop": "Too many levels of symbolic links",
        "sr": "is DICOM without an image (Basic Text SR Storage)",
    }
    assert source.notes == ("left out of its folder: README.txt, empty.dcm, fifo.dcm and 3 more",)
    assert source.read().values.shape == (1, 6, 5, 4)
    # Beside volumes too.
    nifti(tmp_path / "d" / "x.nii.gz")
    told.clear()
    assert [source.name for source in imaging.find([tmp_path / "d"], 1.0, lambda p, why: told.update({p: why}))] == [
        "x"
    ]
    assert len(told) == 10
    assert told[tmp_path / "d" / "empty.dcm"].startswith("ends in none of .nii.gz")


def test_volumes_that_are_no_regular_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo.nii.gz")
    (tmp_path / "folder.nrrd").mkdir()
    (tmp_path / "loop.mha").symlink_to("loop.mha")
    (tmp_path / "nothing.nii").symlink_to("nowhere")
    said = []
    for source in imaging.find([tmp_path], 1.0):
        with pytest.raises(imaging.BadCase) as error:
            source.read()
        said.append(str(error.value).removeprefix(f"{tmp_path}/"))
    assert said == [
        "fifo.nii.gz: cannot be read: is a FIFO; accepted are regular files",
        "folder.nrrd: cannot be read: is a folder; accepted are regular files",
        "loop.mha: cannot be read: Too many levels of symbolic links",
        "nothing.nii: cannot be read: No such file or directory",
    ]


def test_series_that_are_no_volume_are_refused_with_numbers(tmp_path):
    cases = {
        "missing": (
            {"skip": (2, 3)},
            r"2 missing between 52.50 and 60.00 mm: 7.5 mm apart where the others are 2.5 mm",
        ),
        "alone": ({"skip": range(1, 8)}, "has 1 slice; accepted is a volume of 2 or more"),
        "colour": ({"SamplesPerPixel": 3}, "is a colour image"),
    }
    for name, (options, message) in cases.items():
        series(tmp_path / name, image((6, 5, 8)), **options)
        (source,) = imaging.find([tmp_path / name], 1.0)
        with pytest.raises(imaging.BadCase, match=message):
            source.read()
    series(tmp_path / "beside", image((6, 5, 5)))
    moved = sorted((tmp_path / "beside").iterdir())[1]
    data = pydicom.dcmread(moved)
    data.ImagePositionPatient = [data.ImagePositionPatient[0] + 4, *data.ImagePositionPatient[1:]]
    data.save_as(moved)
    (source,) = imaging.find([tmp_path / "beside"], 1.0)
    with pytest.raises(imaging.BadCase, match="lies 4 mm beside the line of the other slices"):
        source.read()
    series(tmp_path / "doubled", image((6, 5, 3)))
    again = next((tmp_path / "doubled").iterdir())
    again.with_name("again.dcm").write_bytes(again.read_bytes())
    (source,) = imaging.find([tmp_path / "doubled"], 1.0)
    with pytest.raises(imaging.BadCase, match="lie at the same place"):
        source.read()
    series(tmp_path / "nowhere", image((6, 5, 3)))
    for path in (tmp_path / "nowhere").iterdir():
        data = pydicom.dcmread(path)
        del data.ImagePositionPatient
        data.save_as(path)
    (source,) = imaging.find([tmp_path / "nowhere"], 1.0)
    with pytest.raises(imaging.BadCase, match="has no ImagePositionPatient; accepted are slices with a place in space"):
        source.read()
    series(tmp_path / "large", image((6, 5, 3)))
    with pytest.raises(imaging.BadCase, match=r"takes .* GiB; accepted are 1e-09"):
        dicom.read(dicom.find(tmp_path / "large")[0], 1e-9)


def test_elements_that_are_longer_than_their_file_are_refused(tmp_path):
    """The decoder of the pixels would take that much memory before noticing."""
    series(tmp_path / "d", image((6, 5, 3)), WindowCenterWidthExplanation="x" * 60)
    for path in (tmp_path / "d").iterdir():
        data = path.read_bytes()
        start = data.index(b"\x28\x00\x55\x10LO") + 6
        path.write_bytes(data[:start] + b"\xf0\xff" + data[start + 2 :])
    with pytest.raises(imaging.BadCase, match=r"dcm: cannot be read: element .* goes on to byte 6[0-9]{4}, beyond"):
        only(tmp_path / "d")


def test_kinds_of_values_that_dicom_does_not_have_are_refused(tmp_path):
    """The decoder of the pixels would take the length, and the memory to allocate, from another place."""
    series(tmp_path / "d", image((6, 5, 3)))
    for path in (tmp_path / "d").iterdir():
        path.write_bytes(path.read_bytes().replace(b"\x02\x00\x03\x00UI", b"\x02\x00\x03\x00U "))
    with pytest.raises(imaging.BadCase, match=r"element \(0002,0003\) is of kind 'U ', which DICOM does not have"):
        only(tmp_path / "d")


def test_deflated_slices_are_read(tmp_path):
    series(tmp_path / "plain", image((6, 5, 3)))
    series(tmp_path / "deflated", image((6, 5, 3)))
    for path in (tmp_path / "deflated").iterdir():
        data = pydicom.dcmread(path)
        data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        data.save_as(path)
        assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian
    np.testing.assert_array_equal(only(tmp_path / "deflated").values, only(tmp_path / "plain").values)


def test_a_slice_that_inflates_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(zlib, "decompress", None)  # what would take the memory
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    (tmp_path / "d").mkdir()
    with (tmp_path / "d" / "a.dcm").open("wb") as file:
        file.write(bytes(128) + b"DICM")
        write_file_meta_info(file, meta)
        file.writelines(deflater.compress(bytes(2**20)) for _ in range(257))
        file.write(deflater.flush())
    with pytest.raises(imaging.BadCase, match="has more than 256 MiB once inflated; accepted is up to that"):
        only(tmp_path / "d")


def test_pixels_that_cannot_be_decoded_name_their_syntax(tmp_path):
    series(tmp_path / "d", image((6, 5, 3)))
    for path in (tmp_path / "d").iterdir():
        data = pydicom.dcmread(path)
        data.file_meta.TransferSyntaxUID = JPEG2000Lossless
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data.PixelData = pydicom.encaps.encapsulate([b"not a picture at all"])
            data["PixelData"].is_undefined_length = True
            data.save_as(path)
    (source,) = imaging.find([tmp_path / "d"], 1.0)
    with pytest.raises(imaging.BadCase, match=r"cannot be decoded \(JPEG 2000 Image Compression \(Lossless Only\)\)"):
        source.read()
