"""Evaluation: scores against hand-made truths, intervals, files, comparison of two runs, and what is refused."""

from __future__ import annotations

import math

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from swin_unetr.evaluation import label_maps, statistics
from swin_unetr.evaluation.scores import scores

CLASSES = {"organ": [1, 2], "tumour": [2]}
SPACING = (1.0, 2.0, 3.0)
FEW = statistics.Bootstrap(resamples=500)


# --- scores ---


def cube(start, stop, value=1, shape=(20, 20, 20)):
    values = np.zeros(shape, np.uint8)
    values[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = value
    return values


def test_scores_of_a_shifted_cube():
    label, prediction = cube((5, 5, 5), (13, 13, 13)), cube((5, 5, 7), (13, 13, 15))  # 2 voxels of 3 mm along z
    found = scores(prediction, label, {"organ": [1]}, SPACING, tolerance=1.0)["organ"]
    assert found.dice == pytest.approx(6 / 8)
    assert found.hd95 == pytest.approx(6.0)
    assert found.label_ml == found.prediction_ml == pytest.approx(8**3 * 6 / 1000)
    assert 0 < found.nsd < 1
    assert scores(prediction, label, {"organ": [1]}, SPACING, tolerance=6.0)["organ"].nsd == pytest.approx(1.0)


def test_surface_dice_is_the_part_of_both_surfaces_within_tolerance():
    """Of two equal cubes one is found, and another where none is: half of both surfaces agrees."""
    label = cube((1, 1, 1), (6, 6, 6)) + cube((12, 12, 12), (17, 17, 17))
    prediction = cube((1, 1, 1), (6, 6, 6)) + cube((1, 12, 1), (6, 17, 6))
    assert scores(prediction, label, {"organ": [1]}, SPACING, tolerance=2.0)["organ"].nsd == pytest.approx(0.5)


def test_perfect_and_overlapping_classes():
    label = cube((2, 2, 2), (10, 10, 10)) + cube((4, 4, 4), (6, 6, 6))
    found = scores(label, label, CLASSES, SPACING, 1.0)
    assert found["organ"].label_ml == pytest.approx(512 * 6 / 1000)
    assert found["tumour"].label_ml == pytest.approx(8 * 6 / 1000)
    for score in found.values():
        assert (score.dice, score.nsd, score.hd95) == (1.0, 1.0, 0.0)


def test_a_class_that_one_of_the_two_lacks_counts_as_a_failure():
    something, nothing = cube((2, 2, 2), (10, 10, 10)), np.zeros((20, 20, 20), np.uint8)
    for prediction, label in ((something, nothing), (nothing, something)):
        found = scores(prediction, label, {"organ": [1]}, SPACING, 1.0)["organ"]
        assert (found.dice, found.nsd) == (0.0, 0.0)
        assert found.hd95 == pytest.approx(math.hypot(20, 40, 60))
    absent = scores(nothing, nothing, {"organ": [1]}, SPACING, 1.0)["organ"]
    assert all(math.isnan(value) for value in (absent.dice, absent.nsd, absent.hd95))
    assert (absent.label_ml, absent.prediction_ml) == (0.0, 0.0)


def test_surfaces_at_the_border_of_the_volume_count():
    label, prediction = cube((0, 0, 0), (8, 8, 8)), cube((0, 0, 0), (8, 8, 10))
    found = scores(prediction, label, {"organ": [1]}, (1, 1, 1), 1.0)["organ"]
    assert found.hd95 == pytest.approx(2.0)
    assert scores(label, label, {"organ": [1]}, (1, 1, 1), 1.0)["organ"].nsd == 1.0


def test_scores_refuse_other_shapes():
    with pytest.raises(ValueError, match=r"prediction is \(4, 4, 4\), label \(4, 4, 5\), spacing \(1, 1, 1\)"):
        scores(np.zeros((4, 4, 4)), np.zeros((4, 4, 5)), CLASSES, (1, 1, 1), 1.0)


# --- statistics ---


def test_the_interval_of_the_mean_is_that_of_theory():
    values = np.random.default_rng(3).normal(0.8, 0.1, 100)
    found = statistics.estimate(values, statistics.Bootstrap())
    error = values.std(ddof=1) / 10
    assert found.cases == 100
    assert found.mean == pytest.approx(values.mean())
    assert found.std == pytest.approx(values.std(ddof=1))
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    wider = statistics.estimate(values, statistics.Bootstrap(confidence=0.99))
    assert wider.low < found.low < found.high < wider.high
    assert statistics.estimate(values, statistics.Bootstrap()) == found


def test_cases_without_a_score_do_not_count():
    assert statistics.estimate([0.5, math.nan, 0.7], FEW).cases == 2
    assert statistics.estimate([0.5, math.nan, 0.7], FEW).mean == pytest.approx(0.6)
    one = statistics.estimate([0.5], FEW)
    assert (one.mean, one.median) == (0.5, 0.5)
    assert math.isnan(one.low)
    assert statistics.estimate([math.nan], FEW).cases == 0
    assert math.isnan(statistics.estimate([math.nan], FEW).mean)


def test_the_mean_over_classes_is_taken_in_each_case():
    by_case = {"a": {"organ": 0.9, "tumour": math.nan}, "b": {"organ": 0.7, "tumour": 0.1}}
    found = statistics.summary(by_case, FEW)
    assert list(found) == ["organ", "tumour", "mean"]
    assert found["mean"].mean == pytest.approx((0.9 + 0.4) / 2)
    assert found["tumour"].cases == 1


def test_differences_are_paired():
    """A gain of 0.02 in every case is certain, though the cases differ by far more than it."""
    theirs = {f"case{i}": {"organ": 0.3 + 0.05 * i} for i in range(10)}
    ours = {name: {"organ": score["organ"] + 0.02 + 0.001 * (i % 3)} for i, (name, score) in enumerate(theirs.items())}
    ours["alone"] = {"organ": 0.0}
    found = statistics.summary(statistics.differences(ours, theirs), FEW)["organ"]
    assert found.cases == 10
    assert 0.02 <= found.low < found.mean < found.high < 0.023


@pytest.mark.parametrize(
    ("options", "message"),
    [({"resamples": 10}, "resamples is 10; accepted is 100"), ({"confidence": 1.0}, "confidence is 1.0; accepted")],
)
def test_bootstrap_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        statistics.Bootstrap(**options)


# --- label maps ---


def write(path, values, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([*SPACING, 1]) if affine is None else affine), path)
    return path


def test_predictions_find_their_labels():
    predictions = {name: name for name in ("liver_1_seg", "liver_10", "liver_2_prediction_final", "heart")}
    labels = ("liver_1", "liver_10", "liver_2", "liver_3")
    expected = {"liver_1": "liver_1_seg", "liver_10": "liver_10", "liver_2": "liver_2_prediction_final"}
    assert label_maps.pair(predictions, labels) == expected
    with pytest.raises(ValueError, match="liver_1_a and liver_1_b are both predictions of case 'liver_1'"):
        label_maps.pair({name: name for name in ("liver_1_a", "liver_1_b")}, labels)


def test_a_format_does_not_move_a_label_map(tmp_path):
    values = np.random.default_rng(0).integers(0, 3, (4, 5, 6)).astype(np.uint8)
    affine = np.array([[0, -2.0, 0, 10], [1.5, 0, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1]])
    nifti = label_maps.read(write(tmp_path / "a.nii.gz", values, affine))
    image = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    for name in ("a.nrrd", "a.mha"):
        sitk.WriteImage(image, str(tmp_path / name))
        other = label_maps.read(tmp_path / name)
        np.testing.assert_array_equal(other.values, values)
        np.testing.assert_allclose(other.affine, affine, atol=1e-5)
        assert other.spacing == pytest.approx((1.5, 2.0, 3.0))
        label_maps.check_same_grid(other, nifti)


def test_label_maps_on_other_grids_are_refused(tmp_path):
    values, affine = np.zeros((4, 5, 6), np.uint8), np.diag([*SPACING, 1.0])
    label = label_maps.LabelMap(values, affine)
    with pytest.raises(ValueError, match=r"prediction has \(4, 5, 5\) voxels, label \(4, 5, 6\)"):
        label_maps.check_same_grid(label_maps.LabelMap(values[..., :5], affine), label)
    flipped = affine @ np.array([[-1, 0, 0, 3], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    with pytest.raises(ValueError, match="prediction and label lie 3 mm apart at a corner"):
        label_maps.check_same_grid(label_maps.LabelMap(values, flipped), label)


def test_files_that_are_no_label_maps_are_named(tmp_path):
    whole = write(tmp_path / "whole.nii.gz", np.random.default_rng(0).integers(0, 9, (16, 16, 16)).astype(np.uint8))
    (tmp_path / "cut.nii.gz").write_bytes(whole.read_bytes()[:-900])
    (tmp_path / "text.nrrd").write_text("no image")
    write(tmp_path / "image.nii.gz", np.random.default_rng(0).random((4, 4, 4)).astype(np.float32))
    write(tmp_path / "channels.nii.gz", np.zeros((4, 4, 4, 2), np.uint8))
    for name, message in {
        "cut.nii.gz": "cannot be read",
        "text.nrrd": "cannot be read",
        "image.nii.gz": "has values that are no integers",
        "channels.nii.gz": r"has shape \(4, 4, 4, 2\); accepted is a label map of 2 or 3 axes",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}: {message}"):
            label_maps.read(tmp_path / name)
