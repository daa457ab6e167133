"""Runs that could only be worthless are refused, naming what makes them so."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest

from swin_unetr import cli

from . import synthetic

TINY = {
    "architecture.feature_size": 12,
    "architecture.depths": "1,1,1,1",
    "architecture.num_heads": "1,2,4,8",
    "data.workers": 0,
    "data.crops_per_volume": 1,
    "labels.classes": "{organ: 1}",
    "preprocessing.spacing": "null",
    "roi": "64,32,32",
    "schedule.steps": 1,
    "validation.overlap": 0,
    "device": "cpu",
}


def run(datalist, out, **more) -> int:
    words = {"data.datalist": datalist, "out": out, **TINY, **more}
    return cli.main(["train", *(f"--{name}={value}" for name, value in words.items())])


@pytest.fixture
def datalist(tmp_path):
    return synthetic.dataset(tmp_path / "data", cases=4, shape=(66, 36, 34))


def empty(datalist, *numbers: int) -> None:
    """Turn the labels of some cases into background."""
    for number in numbers:
        path = datalist.parent / f"labelsTr/case_{number:02d}.nii.gz"
        label = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.zeros(label.shape, np.uint8), label.affine), path)


def split(datalist, training: list[int], validation: list[int]) -> None:
    """Make the datalist say which cases are for validation."""
    content = json.loads(datalist.read_text())
    cases = content["training"]
    content |= {"training": [cases[i] for i in training], "validation": [cases[i] for i in validation]}
    datalist.write_text(json.dumps(content))


@pytest.mark.parametrize("cache", ["memory", "none", "smart"])
@pytest.mark.parametrize(
    ("without", "message"),
    [
        ((0, 1), "labels.classes: none of the 2 cases to train on has a voxel of organ [1]: their labels, such as"),
        ((2, 3), "labels.classes: none of the 2 cases to validate on has a voxel of organ [1]: their labels, such as"),
    ],
)
def test_labels_that_are_background_everywhere(datalist, tmp_path, capsys, cache, without, message):
    split(datalist, [0, 1], [2, 3])
    empty(datalist, *without)
    assert run(datalist, tmp_path / "run", **{"data.cache": cache}) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.endswith("hold 0\n")
    assert not (tmp_path / "run" / "best.pt").exists()


def test_classes_that_are_not_those_of_the_labels(datalist, tmp_path, capsys):
    assert (
        run(datalist, tmp_path / "run", **{"labels.classes": "{organ: 2}", "data.background": "1", "data.folds": 1})
        == 2
    )
    assert "none of the 4 cases to train on has a voxel of organ [2]" in capsys.readouterr().err


def test_one_case_with_a_class_is_enough(datalist, tmp_path):
    split(datalist, [0, 1], [2, 3])
    empty(datalist, 0, 3)
    assert run(datalist, tmp_path / "run") == 0


def test_a_class_that_resampling_loses_is_found_at_the_first_validation(datalist, tmp_path, capsys):
    """One voxel between those of a grid twice as coarse."""
    split(datalist, [0, 1], [2])
    path = datalist.parent / "labelsTr/case_02.nii.gz"
    label = nibabel.load(path)
    values = np.zeros(label.shape, np.uint8)
    values[31, 17, 15] = 1
    nibabel.save(nibabel.Nifti1Image(values, label.affine), path)
    more = {"preprocessing.spacing": "2,2,2", "preprocessing.orientation": "null", "schedule.steps": 5}
    assert run(datalist, tmp_path / "run", **more, **{"schedule.validate_every": 1}) == 2
    assert (
        "none of the 1 cases to validate on has a voxel of organ once its label is resampled" in capsys.readouterr().err
    )
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["event"] == "train"] == [1]


@pytest.mark.parametrize(
    "option", ["feature_size=13", "num_heads=5,6,12,24", "depths=0,1,1,1", "window_size=0", "drop_rate=1"]
)
def test_architectures_are_refused_before_data_are_read(option, tmp_path, capsys):
    name, _, value = option.partition("=")
    assert run(tmp_path / "nowhere.json", tmp_path / "run", **{f"architecture.{name}": value}) == 2
    assert f"swin-unetr train: architecture.{name} is " in capsys.readouterr().err
