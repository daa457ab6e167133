"""Whether files lie on one grid, and their suffixes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from swin_unetr.imaging import suffixes
from swin_unetr.imaging.grids import Grid, check_same

PLACE = np.diag([1.0, 2.0, 3.0, 1.0])


def moved(millimetres: float) -> np.ndarray:
    place = PLACE.copy()
    place[0, 3] = millimetres
    return place


def test_a_hundredth_of_the_shortest_extent_is_agreement():
    check_same(Grid("a.nii", (4, 5, 6), moved(0.0099)), Grid("b.nii", (4, 5, 6), PLACE))
    with pytest.raises(ValueError, match=r"^a.nii and b.nii lie 0.0101 mm apart at a corner; accepted is one grid$"):
        check_same(Grid("a.nii", (4, 5, 6), moved(0.0101)), Grid("b.nii", (4, 5, 6), PLACE))


def test_the_extent_across_a_2d_image_does_not_count():
    thin = np.diag([10.0, 10.0, 0.1, 1.0])
    other = thin.copy()
    other[0, 3] = 0.05
    check_same(Grid("a", (4, 5), other), Grid("b", (4, 5), thin))
    with pytest.raises(ValueError, match="mm apart"):
        check_same(Grid("a", (4, 5, 1), other), Grid("b", (4, 5, 1), thin))


@pytest.mark.parametrize(
    ("name", "image", "label_map"),
    [("a.b.nii.gz", "a.b", "a.b"), ("a.nii", "a", "a"), ("a.seg.nrrd", "a.seg", "a"), ("a.raw", "a.raw", "a.raw")],
)
def test_a_case_is_called_by_its_file_without_suffix(name, image, label_map):
    assert suffixes.case_name(Path(name), suffixes.IMAGES) == image
    assert suffixes.case_name(Path(name)) == label_map
