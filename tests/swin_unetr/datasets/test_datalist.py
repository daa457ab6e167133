"""Datalists and their cases: folds, where entries may lead, and how errors name what cannot be used."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import tracemalloc
from itertools import islice
from pathlib import Path

import nibabel
import numpy as np
import pytest

from swin_unetr.datasets import Data, datalist, images, open_dataset
from swin_unetr.imaging.nifti import read_nifti
from swin_unetr.labels import Labels
from swin_unetr.preprocessing import Preprocessing

from .. import synthetic


@pytest.fixture
def own(tmp_path) -> Path:
    """Datalist of four cases that a test may damage."""
    return synthetic.dataset(tmp_path / "data", cases=4)


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def opened(path: Path, **options):
    preprocessing, labels = Preprocessing(spacing=None), Labels({"organ": [1]})
    return open_dataset(Data(path, folds=1, **options), preprocessing, (32, 32, 32), labels, 0, channels=1)


# --- datalists ---


def names(cases) -> list[str]:
    return [case.name for case in cases]


def test_folds_are_the_datalists_or_a_split_by_seed(own):
    splits = [datalist.read(Data(own, fold=fold, folds=2), True) for fold in range(2)]
    assert names(splits[0][0]) == names(splits[1][1])
    assert names(splits[0][1]) == names(splits[1][0])
    assert sorted(names(splits[0][0]) + names(splits[0][1])) == [f"case_{n:02d}" for n in range(4)]
    edit(own, lambda content: content["training"].reverse())
    assert datalist.read(Data(own, folds=2), True) == splits[0]
    assert any(datalist.read(Data(own, folds=2, split_seed=seed), True) != splits[0] for seed in range(1, 5))
    assert names(datalist.read(Data(own, folds=1), True)[0]) == [f"case_{n:02d}" for n in range(4)]

    edit(own, lambda content: [entry.update(fold=place % 2) for place, entry in enumerate(content["training"])])
    assert names(datalist.read(Data(own, fold=1), True)[1]) == ["case_00", "case_02"]
    with pytest.raises(ValueError, match=r"fold is 2.*folds \[0, 1\]"):
        datalist.read(Data(own, fold=2), True)
    edit(own, lambda content: content.update(validation=[content["training"].pop()]))
    assert names(datalist.read(Data(own), True)[1]) == ["case_00"]
    assert names(datalist.read(Data(own, fold=1), True)[1]) == ["case_02"]


def test_pretraining_takes_file_names_alone_and_other_lists(own):
    edit(own, lambda content: content.update(test=[content["training"].pop()["image"]]))
    cases = datalist.read(Data(own, sections=("training", "test"), folds=1), labelled=False)[0]
    assert names(cases) == [f"case_{n:02d}" for n in range(4)]
    assert all(case.label is None for case in cases)
    with pytest.raises(ValueError, match=r"test\[0\].*label"):
        datalist.read(Data(own, sections=("test",)), labelled=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: content.update(training=[]), "empty"),
        (lambda content: content.pop("training"), "no list 'training'"),
        (lambda content: content.update(training={}), "training is a dict"),
        (lambda content: content["training"][1].pop("image"), r"training\[1\]: image is None"),
        (lambda content: content["training"][1].pop("label"), r"training\[1\]: label is None"),
        (lambda content: content["training"][1].update(fold="a"), r"training\[1\]: fold is 'a'"),
        (lambda content: content["training"][1].update(fold=1), "has no fold"),
        (lambda content: content["training"][1].update(image="gone.nii.gz"), "missing: .*gone.nii.gz"),
        (lambda content: content["training"][1].update(image="labelsTr"), "'labelsTr' is listed; accepted are NIfTI"),
        (
            lambda content: content["training"][1].update(image="dataset.json"),
            "'dataset.json' is listed; accepted are N",
        ),
        (
            lambda content: content["training"][1].update(label=content["training"][1]["image"]),
            "label of case 'case_01', .*case_01.nii.gz, is listed as an image, too; accepted is a label map",
        ),
        (lambda content: content["training"].append(content["training"][2]), "'case_02'.*more than once"),
        (lambda content: content["training"][1].update(name="case_02"), "'case_02'.*more than once"),
        (lambda content: content["training"].append({**content["training"][2], "name": "x"}), "more than once"),
        (lambda content: content.update(validation=content["training"][2:3]), "'case_02'.*in training and validation"),
        (
            lambda content: content.update(validation=[{**content["training"].pop(), "name": "case_02"}]),
            "'case_02'.*in training and validation",
        ),
        (
            lambda content: content.update(validation=[{**content["training"][2], "name": "x"}]),
            "case_02.nii.gz.*in training and validation",
        ),
    ],
)
def test_datalists_that_are_wrong_are_refused(own, change, says):
    edit(own, change)
    with pytest.raises(ValueError, match=says) as error:
        datalist.read(Data(own, folds=2), True)
    assert str(own) in str(error.value)


def test_files_of_any_name_that_links_lead_to_are_read(own):
    """As caches keep downloads: by digest, with named links."""
    blobs = own.parent / "blobs"
    blobs.mkdir()
    expected = [values_of(case) for case in datalist.read(Data(own, folds=1), True)[0]]
    for number, path in enumerate(sorted(own.parent.glob("*/*.nii.gz"))):
        path.rename(blobs / f"{number:064x}")
        path.symlink_to(blobs / f"{number:064x}")
    cases = datalist.read(Data(own, folds=1), True)[0]
    assert names(cases) == [f"case_{n:02d}" for n in range(4)]
    for case, before in zip(cases, expected, strict=True):
        np.testing.assert_array_equal(values_of(case), before)


def values_of(case) -> np.ndarray:
    return np.stack([read_nifti(path, 1.0)[0] for path in case.files])


def test_a_datalist_may_begin_with_a_byte_order_mark(own):
    expected = datalist.read(Data(own, folds=1), True)
    own.write_bytes(b"\xef\xbb\xbf" + own.read_bytes())
    assert datalist.read(Data(own, folds=1), True) == expected


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_files_that_are_no_datalists_are_refused(tmp_path, content):
    path = tmp_path / "dataset.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"dataset\.json"):
        datalist.read(Data(path), True)


def test_what_is_no_regular_file_is_not_opened(own, tmp_path):
    """Opening a FIFO would wait forever."""
    os.mkfifo(tmp_path / "fifo.json")
    with pytest.raises(ValueError, match=r"datalist: .*fifo.json: cannot be read as JSON: is a FIFO"):
        datalist.read(Data(tmp_path / "fifo.json"), True)
    image = own.parent / "imagesTr" / "case_01.nii.gz"
    image.unlink()
    os.mkfifo(image)
    with pytest.raises(ValueError, match=r"case_01.nii.gz \(is a FIFO; accepted are regular files\)"):
        datalist.read(Data(own), True)


def test_entries_that_leave_the_root_are_refused_unless_it_is_trusted(own, tmp_path):
    outside = tmp_path / "outside"
    image, _ = synthetic.volume(9, (40, 36, 34), 1, (1,), "ct")
    synthetic.write(outside / "image.nii.gz", image[..., 0])
    (own.parent / "link.nii.gz").symlink_to(outside / "image.nii.gz")
    (own.parent / "folder").symlink_to(outside)
    (own.parent / "loop.nii.gz").symlink_to("loop.nii.gz")
    original = own.read_text()
    escapes = [str(outside / "image.nii.gz"), "../outside/image.nii.gz", "link.nii.gz", "folder/image.nii.gz"]
    for entry in escapes:
        edit(own, lambda content, entry=entry: content["training"][1].update(image=entry, name="x"))
        with pytest.raises(ValueError, match=r"training\[1\]") as error:
            datalist.read(Data(own, folds=2), True)
        assert repr(entry) in str(error.value)
        assert str(outside / "image.nii.gz") in str(error.value)
        trusting = datalist.read(Data(own, folds=1, trusted=(outside,)), True)[0]
        assert outside / "image.nii.gz" in [case.images[0] for case in trusting]
        own.write_text(original)
    for entry in ("loop.nii.gz", "nul\0.nii.gz"):
        edit(own, lambda content, entry=entry: content["training"][1].update(image=entry, name="x"))
        with pytest.raises(ValueError, match=r"loop|nul"):
            datalist.read(Data(own, folds=2), True)
        own.write_text(original)

    edit(own, lambda content: content["training"][1].update(label="../outside/image.nii.gz"))
    with pytest.raises(ValueError, match=r"training\[1\].*outside"):
        datalist.read(Data(own, folds=2), True)
    own.write_text(original)
    edit(own, lambda content: content["training"][1].update(image="imagesTr/../../data/imagesTr/case_01.nii.gz"))
    assert len(datalist.read(Data(own, folds=1), True)[0]) == 4  # comes back in


# --- cases that cannot be used ---


def spoil_truncated(folder: Path) -> Path:
    path = folder / "imagesTr/case_01.nii.gz"
    path.write_bytes(path.read_bytes()[:2000])
    return path


def spoil_short(folder: Path) -> Path:
    """A complete gzip stream with fewer voxels than the header says."""
    path = folder / "imagesTr/case_01.nii.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-10]))
    return path


def spoil_no_nifti(folder: Path) -> Path:
    path = folder / "imagesTr/case_01.nii.gz"
    path.write_bytes(gzip.compress(b"not an image" * 100))
    return path


def spoil_nan(folder: Path) -> Path:
    image, _ = synthetic.volume(1, (40, 36, 34), 1, (1,), "ct")
    image = image[..., 0].astype(np.float32)
    image[3, 3, 3] = np.nan
    synthetic.write(path := folder / "imagesTr/case_01.nii.gz", image)
    return path


def spoil_shape(folder: Path) -> Path:
    synthetic.write(path := folder / "labelsTr/case_01.nii.gz", np.zeros((40, 36, 33), np.uint8))
    return path


def spoil_place(folder: Path) -> Path:
    path = folder / "labelsTr/case_01.nii.gz"
    label = nibabel.load(path)
    affine = label.affine.copy()
    affine[0, 3] += 0.1
    nibabel.save(nibabel.Nifti1Image(np.asarray(label.dataobj), affine), path)
    return path


def spoil_value(folder: Path) -> Path:
    label = np.zeros((40, 36, 34), np.uint8)
    label[5, 5, 5] = 7
    synthetic.write(path := folder / "labelsTr/case_01.nii.gz", label)
    return path


def spoil_fraction(folder: Path) -> Path:
    label = np.zeros((40, 36, 34), np.float32)
    label[5, 5, 5] = 0.5
    synthetic.write(path := folder / "labelsTr/case_01.nii.gz", label)
    return path


def spoil_channels(folder: Path) -> Path:
    synthetic.write(path := folder / "imagesTr/case_01.nii.gz", np.ones((40, 36, 34, 2), np.int16))
    return path


def spoil_air(folder: Path) -> Path:
    synthetic.write(path := folder / "imagesTr/case_01.nii.gz", np.full((40, 36, 34), -1000, np.int16))
    return path


def spoil_affine(folder: Path) -> Path:
    path = folder / "imagesTr/case_01.nii.gz"
    image = nibabel.Nifti1Image(np.ones((40, 36, 34), np.int16), None)
    image.header.set_sform(np.zeros((4, 4)), code=1)
    nibabel.save(image, path)
    return path


SPOILED = {
    spoil_truncated: "cannot be read",
    spoil_short: "cannot be read",
    spoil_no_nifti: "not a NIfTI file",
    spoil_nan: "1 voxels are NaN",
    spoil_shape: r"\(40, 36, 33\) voxels.*one grid",
    spoil_place: r"0\.1 mm apart",
    spoil_value: "label values 7",
    spoil_fraction: r"label values 0\.5",
    spoil_channels: "2 channels",
    spoil_air: "no voxel",
    spoil_affine: "affine",
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_a_case_that_cannot_be_used_is_named(own, spoil):
    path = spoil(own.parent)
    with pytest.raises(ValueError, match=SPOILED[spoil]) as error:
        opened(own, workers=1)
    assert str(path) in str(error.value)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize(("where", "workers"), [("none", 0), ("none", 2), ("smart", 0), ("smart", 2)])
def test_a_damaged_case_ends_the_stream_when_it_is_drawn(own, where, workers):
    """Also in a worker process, and in the thread that replaces cases."""
    path = spoil_truncated(own.parent)
    dataset = opened(own, cache=where, workers=workers, smart_cases=2)
    with pytest.raises(ValueError, match="cannot be read") as error:
        list(islice(dataset.stream(0), 20))
    assert str(error.value).startswith(str(path))
    assert not multiprocessing.active_children()
    dataset.close()


def test_values_named_as_background_are_accepted(own):
    spoil_value(own.parent)
    assert opened(own, background=(7,)).batches_per_epoch == 4
    with pytest.raises(ValueError, match="background"):
        opened(own, background=(1,))


def test_a_stream_larger_than_its_header_says_is_refused_before_it_fills_memory(tmp_path):
    path = tmp_path / "bomb.nii.gz"
    synthetic.write(path, np.zeros((8, 8, 8), np.int16))
    header = gzip.decompress(path.read_bytes())
    with gzip.open(path, "wb") as stream:
        stream.write(header)
        for _ in range(200):
            stream.write(bytes(1 << 20))
    tracemalloc.start()
    with pytest.raises(images.BadCase, match=r"bomb\.nii\.gz: is larger than its header says"):
        images.read_nifti(path, largest=16)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_a_header_of_more_than_the_largest_is_refused(tmp_path):
    path = tmp_path / "vast.nii.gz"
    image = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4))
    image.header.set_data_shape((30000, 30000, 30000))
    path.write_bytes(gzip.compress(image.header.binaryblock + bytes(1000)))
    with pytest.raises(images.BadCase, match=r"vast\.nii\.gz: takes 5.03e\+04 GiB.*accepted are 16"):
        images.read_nifti(path, largest=16)
