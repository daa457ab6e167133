"""The report of a prediction: self-contained, harmless, and right about volumes and about what looks wrong."""

from __future__ import annotations

import base64
import csv
import io
import math
import re

import numpy as np
import pytest
from PIL import Image

from swin_unetr.labels import Labels
from swin_unetr.prediction import report, volumes

from ..segmenter import ORGANS, affine, image

NASTY = "<script>alert('x')</script>"


def labels() -> np.ndarray:
    found = np.zeros((40, 61, 23), np.uint8)
    found[10:20, 20:40, 5:15] = 1
    found[25:40, 30:50, 8:12] = 7  # to the last plane of the first axis
    return found


def case(name: str = "case") -> report.SegmentedCase:
    organs = volumes.measure(labels(), image(), affine(), ORGANS)
    return report.SegmentedCase(
        name=name,
        source=NASTY,
        output="x.nii.gz",
        shape=(40, 61, 23),
        spacing=(1.6, 1.9, 4.0),
        organs=organs,
        warnings=volumes.warnings(organs, (1.6, 1.9, 4.0)),
        notes=[],
        seconds=1.5,
        picture=report.picture(image(), labels(), affine(), ORGANS),
        entropy=report.entropy_picture(np.random.default_rng(0).random(labels().shape), labels(), affine()),
    )


def test_organs_are_measured_in_the_images_unit():
    liver, spleen = volumes.measure(labels(), image(), affine(), ORGANS)
    assert liver.millilitres == pytest.approx(2000 * 1.6 * 1.9 * 4 / 1000)
    assert liver.mean == pytest.approx(image()[labels() == 1].mean())
    assert liver.std == pytest.approx(image()[labels() == 1].std())
    assert liver.cut == ()
    assert spleen.cut == ("right",)


@pytest.mark.parametrize(("axes", "side"), [("RAS", "right"), ("LPS", "left"), ("ASR", "front"), ("IPL", "bottom")])
def test_a_cut_is_named_after_the_patients_side(axes, side):
    place = affine(axes, (1.6, 1.6, 1.6))
    assert volumes.measure(labels(), image(), place, ORGANS)[1].cut == (side,)


def test_overlapping_classes_are_measured_whole():
    tumour = Labels({"whole": [1, 2, 4], "core": [1, 4], "enhancing": [4]}, overlapping=True)
    found = np.zeros((10, 10, 10), np.uint8)
    found[:4], found[:2], found[:1] = 2, 1, 4
    organs = volumes.measure(found, np.zeros(found.shape), np.diag([10.0, 1, 1, 1]), tumour)
    assert [organ.millilitres for organ in organs] == pytest.approx([4.0, 2.0, 1.0])


def test_what_looks_wrong_is_said():
    empty = volumes.measure(np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 4)), np.eye(4), ORGANS)
    assert math.isnan(empty[0].mean)
    said = volumes.warnings(empty, (1.0, 1.0, 12.0))
    assert said == [
        "liver was not found",
        "spleen was not found",
        "voxels of 1 × 1 × 12 mm are implausible: volumes may be wrong",
    ]
    assert "very unlike" in volumes.warnings([], (0.3, 0.3, 9.0))[0]
    assert "spleen is cut by the image's border (right)" in case().warnings[0]


def test_the_file_needs_no_other_and_runs_nothing():
    failed = {f"bad {NASTY}": f"{NASTY} & more"}
    text = report.page([case(NASTY)], failed, {"options": NASTY}, ORGANS).decode()
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 5
    assert not re.search(r"(src|href)='?(?!data:)|url\(|@import", text.replace("src='data:", ""))
    assert "not a medical device" in text
    for said in ("1 case could not be segmented", "24.3 ml", "spleen is cut by"):
        assert said in text


def test_pictures_show_every_class():
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(case().picture))).convert("RGB")).astype(int)
    assert pixels.shape[1] > 1000
    for colour in report.COLOURS[:2]:
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(pixels - rgb).sum(-1) < 30).sum() > 100


def test_no_cell_is_a_formula():
    rows = list(csv.reader(report.tables([case("=HYPERLINK(1)")])["volumes.csv"].decode().splitlines()))
    assert rows[1][0] == "'=HYPERLINK(1)"
    assert float(rows[1][2]) == pytest.approx(24.32)


def test_a_single_slice_has_a_picture():
    flat, one = np.zeros((40, 61, 1), np.uint8), image((40, 61, 2))[..., :1]
    flat[5:20, 5:20] = 1
    pixels = Image.open(io.BytesIO(base64.b64decode(report.picture(one, flat, affine(), ORGANS))))
    assert np.asarray(pixels.convert("RGB")).std() > 5


def test_a_name_that_is_not_utf8_costs_no_results():
    name = b"case\xff".decode("utf-8", "surrogateescape")
    page = report.page([case(name)], {name: "damaged"}, {"input": name}, ORGANS)
    for content in (*report.tables([case(name)]).values(), page):
        assert "case\\udcff" in content.decode()
