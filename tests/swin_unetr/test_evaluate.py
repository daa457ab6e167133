"""Evaluation: scores against hand-made truths, intervals, files, comparison of two runs, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from rich.console import Console

from swin_unetr import evaluate
from swin_unetr.evaluation import label_maps, statistics
from swin_unetr.evaluation.scores import scores

from . import full

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
    """Of two equal cubes one is found, and another where there is none: half of both surfaces agrees."""
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


@pytest.mark.parametrize(("unit", "millimetres"), [("meter", 1000.0), ("mm", 1.0), ("micron", 0.001)])
def test_scores_are_in_mm_and_ml_whatever_the_unit_of_a_file(tmp_path, unit, millimetres):
    """One file in its own unit and one in mm."""
    values = cube((5, 5, 5), (13, 13, 13))
    labels = []
    for name, of_a_unit in ((unit, millimetres), ("mm", 1.0)):
        picture = nibabel.Nifti1Image(values, np.diag([*(np.array(SPACING) / of_a_unit), 1]))
        picture.header.set_xyzt_units(name)
        nibabel.save(picture, tmp_path / f"{name}.nii")
        labels.append(label_maps.read(tmp_path / f"{name}.nii"))
    label_maps.check_same_grid(*labels)
    for label in labels:
        found = scores(np.roll(values, 2, axis=2), label.values, {"organ": [1]}, label.spacing, tolerance=1.0)["organ"]
        assert found.label_ml == pytest.approx(8**3 * 6 / 1000)
        assert found.hd95 == pytest.approx(6.0)


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
        "image.nii.gz": "has values that are not integers",
        "channels.nii.gz": r"has shape \(4, 4, 4, 2\); accepted is a label map of 2 or 3 axes",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}: {message}"):
            label_maps.read(tmp_path / name)


# --- the command ---


def run_of(folder, quality, *, cases=6, missing=(), seed=0):
    """Label maps of blobs and predictions of them: the lower the `quality`, the smaller the prediction."""
    random = np.random.default_rng(seed)
    for i in range(cases):
        grid = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"))
        distance = np.linalg.norm(grid - 12 - random.uniform(-2, 2, 3)[:, None, None, None], axis=0)
        radius = random.uniform(5, 8)
        label = (distance < radius).astype(np.uint8) + (distance < radius / 2)
        error = random.normal(0, 1 - quality) - (1 - quality)
        prediction = (distance < radius + error).astype(np.uint8) + (distance < radius / 2 + 2 * error)
        write(folder / "labels" / f"case_{i}.nii.gz", label)
        if i not in missing:
            write(folder / "predictions" / f"case_{i}_seg.nii.gz", prediction)
    return folder


def evaluated(folder, **options):
    terminal = io.StringIO()
    options = {"classes": CLASSES, "resamples": 500} | options
    out = options.pop("out", folder / "evaluation")
    status = evaluate.run(
        evaluate.EvaluateOptions(folder / "predictions", folder / "labels", out, **options),
        Console(file=terminal, width=140),
    )
    return status, json.loads((out / "evaluation.json").read_text()), terminal.getvalue()


def test_files_and_terminal_tell_the_same(tmp_path):
    status, results, terminal = evaluated(run_of(tmp_path, 0.7))
    assert status == 0
    with (tmp_path / "evaluation" / "scores.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["case"], row["class"]) for row in table] == [
        (f"case_{i}", name) for i in range(6) for name in ("organ", "tumour")
    ]
    for row in table:
        score = results["scores"][row["case"]][row["class"]]
        assert {key: float(row[key]) for key in score} == score
    for metric in ("dice", "nsd", "hd95"):
        organ = results["summary"][metric]["organ"]
        values = [float(row[metric]) for row in table if row["class"] == "organ"]
        assert organ["mean"] == pytest.approx(np.mean(values))
        assert organ["low"] < organ["mean"] < organ["high"]
        digits = 1 if metric == "hd95" else 3
        cell = f"{organ['mean']:.{digits}f} [{organ['low']:.{digits}f}, {organ['high']:.{digits}f}]"
        assert any("organ" in line and cell in line for line in terminal.splitlines())
    # And the files hold what was scored.
    label, prediction = (
        nibabel.load(tmp_path / kind / name).get_fdata() > 0
        for kind, name in (("labels", "case_3.nii.gz"), ("predictions", "case_3_seg.nii.gz"))
    )
    dice = 2 * (label & prediction).sum() / (label.sum() + prediction.sum())
    assert results["scores"]["case_3"]["organ"]["dice"] == pytest.approx(dice)
    pixels = np.asarray(Image.open(tmp_path / "evaluation" / "scores.png").convert("L"))
    assert pixels.std() > 10


def test_classes_are_the_labels_values_unless_given(tmp_path):
    _, results, _ = evaluated(run_of(tmp_path, 0.7, cases=2), classes=None)
    assert results["classes"] == {"1": [1], "2": [2]}


def test_classes_that_no_case_has_are_named(tmp_path):
    status, results, terminal = evaluated(run_of(tmp_path, 0.7, cases=2), classes={"organ": [1], "cyst": [5, 6]})
    assert status == 0
    assert results["absent"] == ["cyst"]
    assert "No label and no prediction has class cyst (5, 6): it has no score\n" in terminal
    says = r"classes is \{'cyst': \[5\]\}, and no label and no prediction has any of these values; accepted are values"
    with pytest.raises(ValueError, match=says):
        evaluated(tmp_path, classes={"cyst": [5]})


def test_two_runs_are_compared_by_case(tmp_path):
    worse, better = run_of(tmp_path / "worse", 0.4), run_of(tmp_path / "better", 0.9, missing=(5,))
    evaluated(worse)
    status, results, terminal = evaluated(better, compare=worse / "evaluation" / "evaluation.json")
    assert status == 1  # case 5 has no prediction
    assert "No prediction for: case_5" in terminal
    comparison = results["comparison"]
    assert comparison["only_there"] == ["case_5"]
    assert "Not compared, only in the other: case_5" in terminal
    assert comparison["differences"]["dice"]["organ"]["cases"] == 5
    assert comparison["differences"]["dice"]["organ"]["low"] > 0
    assert comparison["differences"]["hd95"]["organ"]["high"] < 0
    assert (better / "evaluation" / "comparison.png").stat().st_size > 5000


def test_runs_that_cannot_be_compared(tmp_path):
    first, other_labels = run_of(tmp_path / "a", 0.7), run_of(tmp_path / "b", 0.7, seed=1)
    evaluated(first)
    record = first / "evaluation" / "evaluation.json"
    with pytest.raises(ValueError, match="case 'case_0' was scored against another label"):
        evaluated(other_labels, compare=record)
    assert (other_labels / "evaluation" / "scores.csv").exists()  # what was scored is not lost
    with pytest.raises(ValueError, match=r"has an NSD at 2.0 mm, this run at 1.0 mm"):
        evaluated(first, compare=record, tolerance=1.0, out=tmp_path / "c")
    with pytest.raises(ValueError, match=r"scores classes .*organ.* this run .*'1'"):
        evaluated(first, compare=record, classes=None, out=tmp_path / "c")
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(ValueError, match=r"compare: .*text.json: is not an evaluation: KeyError: 'format'"):
        evaluated(first, compare=tmp_path / "text.json")


def test_a_broken_case_is_reported_and_the_others_go_on(tmp_path):
    run_of(tmp_path, 0.7, cases=4)
    (tmp_path / "predictions" / "case_1_seg.nii.gz").write_bytes(b"no image")
    write(tmp_path / "predictions" / "case_2_seg.nii.gz", np.zeros((24, 24, 24), np.uint8), np.eye(4))
    write(tmp_path / "predictions" / "stranger.nii.gz", np.zeros((24, 24, 24), np.uint8))
    status, results, terminal = evaluated(tmp_path)
    assert status == 1
    assert set(results["scores"]) == {"case_0", "case_3"}
    assert "case_1_seg.nii.gz: cannot be read" in results["failed"]["case_1"]
    assert "mm apart at a corner" in results["failed"]["case_2"]
    assert [path for path in results["without_label"] if path.endswith("stranger.nii.gz")]
    for stated in ("Not scored: case_1", "Not scored: case_2", "No label for: "):
        assert stated in terminal


def test_a_full_disk_leaves_the_results_that_were_there(tmp_path):
    """The table fits on it, the picture does not."""
    evaluated(run_of(tmp_path, 0.7, cases=2))
    before = {path.name: path.read_bytes() for path in (tmp_path / "evaluation").iterdir()}
    room = (2 * len(before["evaluation.json"]) + len(before["scores.png"])) // 3
    picture = re.escape(str(tmp_path / "evaluation" / "scores.png"))
    with full.after(room), pytest.raises(OSError, match=rf"{full.SAYS}: '{picture}'"):
        evaluated(tmp_path, tolerance=1.0)
    assert {path.name: path.read_bytes() for path in (tmp_path / "evaluation").iterdir()} == before


def test_names_are_shown_and_written_as_they_are(tmp_path):
    """Formulas, bytes that are not UTF-8, markup, control characters, what a plot takes for mathematics."""
    names = [b"=cmd|' -C calc'!A0", b"caf\xe9", b"[bold]x[-y]", b"\x1b[31mred", b"$\\frac"]
    label = cube((2, 2, 2), (9, 9, 9)) + cube((4, 4, 4), (7, 7, 7))
    for folder in ("predictions", "labels"):
        (tmp_path / folder).mkdir()
        write(tmp_path / "x.nii.gz", label)
        for name in names:
            shutil.copy(tmp_path / "x.nii.gz", os.fsencode(tmp_path / folder) + b"/" + name + b".nii.gz")
    (tmp_path / "predictions" / "[gone].nii.gz").write_text("no image")
    write(tmp_path / "labels" / "[gone].nii.gz", label)
    classes = {"[/x]": [1], "=2+3": [2], "$\\frac$": [1, 2], "caf\udce9": [1]}
    status, results, terminal = evaluated(tmp_path, classes=classes)
    assert status == 1
    assert "Not scored: [gone]: " in terminal
    assert "\x1b" not in terminal
    for name in ("[/x]", "=2+3", "$\\frac$", "caf\\udce9"):
        assert re.search(rf"^ *{re.escape(name)} +5 +1\.000", terminal, re.MULTILINE), name
    with (tmp_path / "evaluation" / "scores.csv").open(encoding="utf-8") as file:
        table = list(csv.reader(file))
    assert len(table) == 1 + len(names) * len(classes)
    assert {row[0] for row in table[1:]} == {
        "'=cmd|' -C calc'!A0", "caf\\udce9", "[bold]x[-y]", "\x1b[31mred", "$\\frac",
    }  # fmt: skip
    assert {row[1] for row in table[1:]} == {"[/x]", "'=2+3", "$\\frac$", "caf\\udce9"}
    assert {os.fsencode(name) for name in results["scores"]} == set(names)
    assert (tmp_path / "evaluation" / "scores.png").stat().st_size > 5000
    # And again, compared with that run.
    terminal = evaluated(tmp_path, classes=classes, compare=tmp_path / "evaluation" / "evaluation.json")[2]
    assert terminal.count("[/x]") == 2


def test_labels_that_are_images_are_refused_with_the_reason(tmp_path):
    values = np.arange(24**3).reshape(24, 24, 24).astype(np.int16) % 3000 - 1000
    write(tmp_path / "predictions" / "case_0.nii.gz", (values > 0).astype(np.uint8))
    write(tmp_path / "labels" / "case_0.nii.gz", values)
    counted = r"labels/case_0.nii.gz: has 3000 different values, from -1000 to 1999: is it an image\? Accepted are"
    with pytest.raises(ValueError, match=counted):
        evaluated(tmp_path)
    with pytest.raises(ValueError, match=rf"labels have no value above 0: .*{counted}"):
        evaluated(tmp_path, classes=None)
    # What an image of 8 bits has.
    write(tmp_path / "labels" / "case_0.nii.gz", (values % 256).astype(np.uint8))
    with pytest.raises(ValueError, match=r"has 256 different values, .* up to 64 values; where these have more, name"):
        evaluated(tmp_path, classes=None)
    assert evaluated(tmp_path, classes={"organ": [7]})[0] == 0


@pytest.mark.parametrize(("value", "named"), [(2 * np.float32(0.99999994), "1.9999999"), (1e30, "1e\\+30")])
def test_values_that_are_no_labels_are_named_in_full(tmp_path, value, named):
    write(tmp_path / "x.nii.gz", cube((2, 2, 2), (9, 9, 9)).astype(np.float32) * np.float32(value))
    with pytest.raises(ValueError, match=rf"values that are not integers, such as {named}; accepted is a label map"):
        label_maps.read(tmp_path / "x.nii.gz")


def test_a_case_that_cannot_be_opened_costs_no_other(tmp_path):
    run_of(tmp_path, 0.7, cases=4)
    folder = tmp_path / "predictions"
    for number in range(3):
        (folder / f"case_{number}_seg.nii.gz").unlink()
    os.mkfifo(folder / "case_0_seg.nii.gz")
    (folder / "case_1_seg.nii.gz").symlink_to("case_1_seg.nii.gz")
    (folder / "case_2_seg.nii.gz").mkdir()
    status, results, _ = evaluated(tmp_path)
    assert status == 1
    assert list(results["scores"]) == ["case_3"]
    assert [results["failed"][f"case_{n}"].split("cannot be read: ")[1] for n in range(3)] == [
        "is a FIFO; accepted are regular files",
        "Too many levels of symbolic links",
        "is a folder; accepted are regular files",
    ]
    with pytest.raises(ValueError, match=r"case_3_seg.nii.gz: takes .* GiB by its header; accepted are 1e-06 "):
        evaluated(tmp_path, largest=1e-6)


def test_nothing_to_score(tmp_path):
    run_of(tmp_path, 0.7, cases=1)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        evaluate.run(evaluate.EvaluateOptions(tmp_path / "nowhere", tmp_path / "labels", tmp_path / "out"))
    with pytest.raises(ValueError, match="has no label maps"):
        evaluate.run(evaluate.EvaluateOptions(tmp_path, tmp_path / "labels", tmp_path / "out"))
    (tmp_path / "labels" / "case_0.nii.gz").rename(tmp_path / "labels" / "other.nii.gz")
    with pytest.raises(ValueError, match=r"no prediction in .* belongs to a label in .*: case_0_seg against other"):
        evaluated(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, "tolerance is 0.0; accepted is a distance in mm above 0"),
        ({"tolerance": math.nan}, "tolerance is nan"),
        ({"classes": {}}, "classes is {}; accepted is at least one class"),
        ({"classes": {"organ": []}}, "each with a label value"),
        ({"classes": {"mean": [1]}}, "classes has 'mean', the name of the mean over classes"),
    ],
)
def test_options_refused(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate.EvaluateOptions(Path("a"), Path("b"), **options)
