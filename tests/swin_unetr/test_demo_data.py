"""The CTs that ship for the demo, and the rule that made their labels (`scripts/make_demo_data.py`)."""

import hashlib
import importlib.util
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT / "swin_unetr" / "data"
PATIENTS = (1, 2)


def _load(patient, kind):
    return nibabel.load(DATA / f"patient{patient}_{kind}.nii.gz")


@pytest.mark.parametrize("patient", PATIENTS)
def test_ct_and_labels_share_one_grid(patient):
    ct, labels = _load(patient, "ct"), _load(patient, "labels")
    assert ct.shape == labels.shape
    np.testing.assert_array_equal(ct.affine, labels.affine)
    assert ct.header.get_zooms() == (3.0, 3.0, 5.0)
    assert (ct.get_data_dtype(), labels.get_data_dtype()) == (np.int16, np.uint8)


@pytest.mark.parametrize("patient", PATIENTS)
def test_labels_are_anatomically_plausible(patient):
    hu = np.asarray(_load(patient, "ct").dataobj)
    labels = np.asarray(_load(patient, "labels").dataobj)
    assert set(np.unique(labels)) == {0, 1, 2}
    fractions = np.bincount(labels.ravel()) / labels.size
    assert 0.3 < fractions[1] < 0.6
    assert 0.1 < fractions[2] < 0.2
    litres = (labels == 2).sum() * 45e-6
    assert 2 < litres < 6
    assert -950 < np.median(hu[labels == 2]) < -650
    assert -150 < np.median(hu[labels == 1]) < 100
    assert np.median(hu[labels == 0]) < -950
    # Trachea: in the top third, air inside the body that is not lung.
    top = slice(2 * labels.shape[2] // 3, None)
    airway = (hu[:, :, top] < -800) & (labels[:, :, top] == 1)
    assert 2 < airway.sum() * 45e-3 < 100  # ml


def test_readme_names_every_file_with_its_hash():
    stated = dict(re.findall(r"`(\S+\.nii\.gz)` .*`([0-9a-f]{64})`", (DATA / "README.md").read_text()))
    assert stated == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in DATA.glob("*.nii.gz")}
    assert len(stated) == 4


sitk = pytest.importorskip("SimpleITK", reason="the script that makes the data needs SimpleITK")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_demo_data", ROOT / "scripts" / "make_demo_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def phantom():
    """A chest in boxes at 2/2/5 mm: CT, lesion, and the labels to expect, as (Z, Y, X) arrays.

    Two lungs, a trachea that ends in the right lung, a vessel in the left one, a lesion at its wall, the dome of
    the diaphragm inside the right one, bowel gas, a thin table and a cable.
    """
    hu = np.full((20, 80, 100), -1000.0)
    labels = np.zeros(hu.shape, np.uint8)
    lesion = np.zeros(hu.shape, np.uint8)

    def box(z, y, x, value, label):
        hu[z, y, x], labels[z, y, x] = value, label

    every = slice(None)
    box(every, slice(10, 70), slice(6, 94), 40, 1)  # body
    box(slice(4, 16), slice(20, 60), slice(16, 42), -800, 2)  # right lung
    box(slice(4, 16), slice(20, 60), slice(58, 84), -800, 2)  # left lung
    box(slice(8, 20), slice(30, 36), slice(47, 53), -950, 1)  # trachea
    box(slice(8, 9), slice(31, 35), slice(42, 53), -950, 1)  # right main bronchus, opens into the lung
    box(slice(6, 14), slice(40, 42), slice(70, 72), 60, 2)  # vessel
    box(slice(4, 6), slice(30, 50), slice(22, 36), 50, 1)  # dome of the diaphragm
    box(slice(9, 12), slice(52, 60), slice(74, 84), 30, 2)  # lesion at the wall of the lung
    lesion[9:12, 52:60, 74:84] = 1
    box(slice(0, 3), slice(40, 60), slice(60, 75), -950, 1)  # bowel gas
    box(every, slice(76, 78), every, 100, 0)  # table
    box(every, slice(4, 6), slice(40, 42), 300, 0)  # cable

    def image(array, pixel):
        result = sitk.GetImageFromArray(array.astype(pixel))
        result.SetSpacing((2.0, 2.0, 5.0))
        result.SetOrigin((-7.0, 11.0, -100.0))
        return result

    return image(hu, np.int16), image(lesion, np.uint8), labels


def test_label_rule_on_a_phantom(script, phantom):
    ct, lesion, expected = phantom
    found = sitk.GetArrayFromImage(script.label_map(ct, lesion))
    wrong = found != expected
    # Opening and closing with a disc round off the corners of boxes; the bronchus is lung where it opens into it.
    wrong[:, [10, 69]] = False
    wrong[:, :, [6, 93]] = False
    for y, x in ((30, 22), (30, 33), (47, 22), (47, 33)):
        wrong[4:6, y : y + 3, x : x + 3] = False
    wrong[8, 26:40, 42:53] = False
    assert np.argwhere(wrong).tolist() == []


def test_airway_ends_where_the_bronchus_opens_into_the_lung(script, phantom):
    ct, _, _ = phantom
    air = sitk.And(ct < script.AIR, script.body_mask(ct))
    airway = sitk.GetArrayFromImage(script.airway_mask(air))
    assert airway[9:].sum() == 11 * 36
    assert airway[:9].sum() == 0


def test_resample_keeps_the_field_of_view_and_the_labels(script, phantom):
    ct, _, labels = phantom
    label_image = sitk.GetImageFromArray(labels)
    label_image.CopyInformation(ct)
    small_ct, small_labels = script.resample(ct, label_image)
    for image in (small_ct, small_labels):
        assert image.GetSpacing() == script.SPACING
        assert image.GetSize() == (67, 53, 20)
        # The corner of the first voxel is where it was.
        corner = image.TransformContinuousIndexToPhysicalPoint([-0.5] * 3)
        np.testing.assert_allclose(corner, ct.TransformContinuousIndexToPhysicalPoint([-0.5] * 3), atol=1e-5)
    assert (small_ct.GetPixelID(), small_labels.GetPixelID()) == (sitk.sitkInt16, sitk.sitkUInt8)
    images = (label_image, small_labels)
    volume = [np.bincount(sitk.GetArrayFromImage(i).ravel()) * np.prod(i.GetSpacing()) for i in images]
    np.testing.assert_allclose(volume[1][1:], volume[0][1:], rtol=0.03)


def test_sources_are_checked(script, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lung1_image\.nrrd"):
        script.check_sources(tmp_path)
    (tmp_path / "lung1_image.nrrd").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"lung1_image\.nrrd has SHA-256 .*; accepted is 379fa48"):
        script.check_sources(tmp_path)
