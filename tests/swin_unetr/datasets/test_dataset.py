"""Training data: what a datalist may contain, what a batch depends on, what a cache may be, what is refused."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import re
import signal
import warnings
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.transforms import Compose, Lambda

from swin_unetr.datasets import Augmentation, Data, cache, datalist, open_dataset
from swin_unetr.datasets.stream import BatchOrder
from swin_unetr.labels import Labels
from swin_unetr.preprocessing import Preprocessing

from .. import full, synthetic

ROI = (32, 32, 32)
LABELS = Labels({"organ": [1]})
PREPROCESSING = Preprocessing(spacing=None)
EVERYTHING = Augmentation(flip=0.5, rotate90=0.5, affine=0.5, intensity=0.5, noise=0.5)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """Datalist of six cases that tests only read."""
    return synthetic.dataset(tmp_path_factory.mktemp("shared"), cases=6)


@pytest.fixture
def own(tmp_path) -> Path:
    """Datalist of four cases that a test may damage."""
    return synthetic.dataset(tmp_path / "data", cases=4)


def opened(path: Path, seed: int = 0, preprocessing=PREPROCESSING, labels=LABELS, roi=ROI, **options):
    options = {"datalist": path, "workers": 0, "folds": 2, "crops_per_volume": 2} | options
    return open_dataset(Data(**options), preprocessing, roi, labels, seed)


def batches(dataset, start: int, count: int) -> list[dict[str, torch.Tensor]]:
    found = list(islice(dataset.stream(start), count))
    dataset.close()
    return found


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- batches ---


@pytest.mark.parametrize("where", ["memory", "disk", "smart", "none"])
def test_a_batch_depends_on_its_number_and_the_seed_alone(shared, tmp_path, where):
    """Not on worker processes, where the stream began, or PyTorch's generator."""
    how = {"cache": where, "cache_folder": tmp_path, "smart_cases": 2, "augmentation": EVERYTHING}
    expected = batches(opened(shared, **how), 0, 6)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = batches(opened(shared, workers=2, **how), 3, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(same(one, other) for one, other in zip(found, expected[3:], strict=True))
    assert not any(same(one, other) for one, other in combinations(expected, 2))  # two epochs: cases come again
    assert not same(batches(opened(shared, seed=1, **how), 0, 1)[0], expected[0])


def test_a_batch_is_plain_tensors_of_the_roi(shared):
    batch = batches(opened(shared, batch_size=2, crops_per_volume=3), 0, 1)[0]
    assert {key: (type(value), value.shape, value.dtype) for key, value in batch.items()} == {
        "image": (torch.Tensor, (6, 1, *ROI), torch.float32),
        "label": (torch.Tensor, (6, 1, *ROI), torch.uint8),
    }
    assert batch["image"].min() >= -0.5
    assert set(batch["label"].unique().tolist()) == {0, 1}


def test_ranks_share_the_batches_of_one(shared, monkeypatch):
    whole = batches(opened(shared, batch_size=2), 0, 3)
    parts = []
    monkeypatch.setattr("swin_unetr.distributed.ranks", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr("swin_unetr.distributed.rank", lambda rank=rank: rank)
        parts.append(batches(opened(shared, batch_size=1), 0, 3))
    for number, batch in enumerate(whole):
        assert same(batch, {key: torch.cat([part[number][key] for part in parts]) for key in batch})


def test_ranks_end_alike_when_one_cannot_use_a_case(shared, monkeypatch):
    monkeypatch.setattr("swin_unetr.distributed.gather", lambda value: [value, "x.nii.gz: is damaged"])
    with pytest.raises(ValueError, match=r"x\.nii\.gz: is damaged"):
        opened(shared)


def test_an_epoch_is_one_pass_in_an_order_of_its_own():
    schedule = BatchOrder(cases=7, batch_size=2, seed=0)
    assert schedule.batches_per_epoch == 4
    epochs = [[place for number in range(4 * e, 4 * e + 4) for place in schedule.batch(number)] for e in range(3)]
    for epoch in epochs:
        assert sorted(case for case, _ in epoch[:7]) == list(range(7))
    assert len({tuple(case for case, _ in epoch) for epoch in epochs}) == 3
    draws = [draw for epoch in epochs for _, draw in epoch]
    assert draws == list(range(24))


def test_the_smart_cache_moves_on_and_starts_at_any_epoch(shared):
    """Three of six cases, one replaced after each epoch: names by the window they come from."""
    seen = {}
    for start in (0, 2):
        cases = datalist.read(Data(shared, folds=1), labelled=True)[0]
        prepare = Compose([Lambda(lambda case: {"name": case.name})])
        window = cache.Rolling(cases, prepare, size=3, rate=0.3, epoch=start, threads=1)
        window.start()
        for epoch in range(start, 5):
            seen.setdefault(epoch, []).append([window[place]["name"] for place in range(3)])
            window.update_cache()
        window.shutdown()
    names = [f"case_{number:02d}" for number in range(6)]
    assert seen[0] == [names[:3]]
    for epoch in range(2, 5):
        assert seen[epoch] == [[names[(epoch + place) % 6] for place in range(3)]] * 2


def test_draws_leave_cached_cases_as_they_are(shared):
    dataset = opened(shared, augmentation=EVERYTHING)
    before = [{key: value.clone() for key, value in item.items()} for item in dataset._training]
    batches(dataset, 0, 12)
    assert all(same(one, other) for one, other in zip(before, dataset._training, strict=True))


def test_crops_are_centred_on_what_is_asked_for(tmp_path):
    """An organ in a corner, a body in half of the volume: other crops see body, never only air."""
    image = np.full((90, 40, 40), -1000, np.int16)
    image[:45] = 0
    label = np.zeros(image.shape, np.uint8)
    label[2:4, 2:4, 2:4] = 1
    for number in range(2):
        synthetic.write(tmp_path / f"image{number}.nii.gz", image)
        synthetic.write(tmp_path / f"label{number}.nii.gz", label)
    entries = [{"image": f"image{n}.nii.gz", "label": f"label{n}.nii.gz"} for n in range(2)]
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps({"training": entries}))
    keep = Preprocessing(spacing=None, crop_foreground=False)
    how = {"preprocessing": keep, "crops_per_volume": 40, "augmentation": Augmentation(0, 0, intensity=0)}

    positive = batches(opened(path, positive=1, negative=0, **how), 0, 1)[0]
    assert (positive["label"].amax(dim=(1, 2, 3, 4)) == 1).all()
    negative = batches(opened(path, positive=0, negative=1, **how), 0, 1)[0]
    assert (negative["label"].amax(dim=(1, 2, 3, 4)) == 0).any()
    unlabelled = batches(opened(path, labels=None, **how), 0, 1)[0]
    for batch in (negative, unlabelled):
        assert (batch["image"].amax(dim=(1, 2, 3, 4)) > 0).all()
    anywhere = batches(opened(path, crop="anywhere", **how), 0, 1)[0]
    assert (anywhere["image"].amax(dim=(1, 2, 3, 4)) == 0).any()


def test_images_smaller_than_the_roi_are_padded_and_quarter_turns_keep_the_shape(shared):
    batch = batches(opened(shared, roi=(64, 32, 32), augmentation=Augmentation(rotate90=1.0)), 0, 1)[0]
    assert batch["image"].shape[2:] == (64, 32, 32)
    with pytest.raises(ValueError, match="rotate90"):
        opened(shared, roi=(96, 64, 32))


def test_validation_cases_are_whole_on_the_preprocessed_grid(shared):
    dataset = opened(shared, preprocessing=Preprocessing(spacing=(2.0, 2.0, 2.0)))
    assert len(dataset.validation) == 3
    case = dataset.validation[0].load()
    assert {key: (type(value), value.shape, value.dtype) for key, value in case.items()} == {
        "image": (torch.Tensor, (1, 20, 18, 18), torch.float32),
        "label": (torch.Tensor, (1, 20, 18, 18), torch.uint8),
    }


@pytest.mark.parametrize("split_files", [False, True])
def test_modalities_in_one_file_or_one_each(tmp_path, split_files):
    path = synthetic.dataset(tmp_path, cases=2, channels=3, kind="mr", split_files=split_files)
    zscore = Preprocessing(spacing=None, intensity="zscore")
    dataset = opened(path, preprocessing=zscore)
    image = dataset.validation[0].load()["image"]
    name = dataset.validation[0].name
    assert name in ("case_00", "case_01")
    expected, _ = synthetic.volume(int(name[-1]), (40, 36, 34), 3, (1,), "mr")
    expected = np.moveaxis(expected, -1, 0).astype(np.float64)
    for found, channel in zip(image.numpy(), expected, strict=True):
        inside = channel[channel != 0]
        np.testing.assert_allclose(found[channel != 0], (inside - inside.mean()) / inside.std(), atol=1e-4)
    assert batches(dataset, 0, 1)[0]["image"].shape[1] == 3
    with pytest.raises(ValueError, match=r"3 modalities.*takes 4"):
        open_dataset(Data(path, folds=2), zscore, ROI, LABELS, 0, channels=4)


def test_workers_outlast_the_signals_that_end_a_job(shared):
    """They go to every process of a job; the training one must still get batches until it has saved."""
    dataset = opened(shared, workers=2, prefetch=1)
    stream = dataset.stream(0)
    for _ in range(2):  # one from each worker, which is then past its start
        next(stream)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGUSR1)
    for _ in range(10):
        next(stream)
    dataset.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([0.0, 2 * np.float32(0.99999994)], "1.9999999"),
        ([0.0, np.float32(1 + 2**-23)], "1.0000001"),
        ([0.0, 1.0, 300.0], "300.0"),
        ([0.0, 1.0, np.nan], "nan"),
    ],
)
def test_label_values_are_named_in_full(own, values, named):
    label = np.zeros((40, 36, 34), np.float32)
    label.reshape(-1)[: len(values)] = values
    synthetic.write(own.parent / "labelsTr" / "case_00.nii.gz", label)
    with pytest.raises(ValueError, match=rf"has label values {re.escape(named)}; accepted are .* \[0, 1\]"):
        opened(own)


def test_largest_bounds_the_grid_that_cases_are_resampled_to(own):
    assert opened(own, largest=0.01).validation
    with pytest.raises(ValueError, match=r"on the network's grid of 391 × 351 × 331 voxels, .*; accepted are 0.01 "):
        opened(own, preprocessing=Preprocessing(spacing=(0.1, 0.1, 0.1)), largest=0.01)


# --- the cache on disk ---


def test_the_cache_on_disk_runs_no_code_and_replaces_what_is_damaged(shared, tmp_path):
    expected = batches(opened(shared, cache="none"), 0, 2)
    opened(shared, cache="disk", cache_folder=tmp_path)
    files = sorted(tmp_path.glob("*.pt"))
    assert len(files) == 3
    proof = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(proof),)

    files[0].write_bytes(_saved(Evil()))
    files[1].write_bytes(files[1].read_bytes()[:1000])
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        found = batches(opened(shared, cache="disk", cache_folder=tmp_path), 0, 2)
    assert not proof.exists()
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))


def _saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_module=pickle)
    return buffer.getvalue()


def test_the_cache_on_disk_belongs_to_files_and_preprocessing(own, tmp_path):
    folder = tmp_path / "cache"

    def count(**options) -> int:
        opened(own, cache="disk", cache_folder=folder, **options)
        return len(list(folder.glob("*.pt")))

    assert count() == count() == 2
    assert count(preprocessing=Preprocessing(spacing=None, window=(-100, 100))) == 4
    assert count(roi=(64, 32, 32)) == 6
    image, _ = synthetic.volume(9, (40, 36, 34), 1, (1,), "ct")
    for number in range(4):
        synthetic.write(own.parent / f"imagesTr/case_{number:02d}.nii.gz", image[..., 0])
    assert count() == 8


@pytest.mark.parametrize("kind", ["full", "a file"])
def test_a_cache_folder_that_takes_no_case_is_named(shared, tmp_path, kind):
    """Not the image, which is right."""
    folder = tmp_path / "cache"
    if kind == "a file":
        folder.touch()
    why = {"full": full.SAYS, "a file": "File exists"}[kind]
    with full.after(50_000 if kind == "full" else 2**30), pytest.raises(cache.BadCase) as error:
        opened(shared, cache="disk", cache_folder=folder)
    assert str(error.value) == (
        f"data.cache_folder: {folder} cannot be written to: {why}; accepted is a folder with room for all cases, or "
        "another data.cache"
    )
    assert not list(tmp_path.glob("cache/*"))


# --- options ---


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"folds": 0}, "folds is 0"),
        ({"fold": -1}, "fold is -1"),
        ({"cache": "disk"}, "cache_folder"),
        ({"cache": "ram"}, "cache is 'ram'"),
        ({"crop": "x"}, "crop is 'x'"),
        ({"positive": 0.0, "negative": 0.0}, "positive and negative"),
        ({"smart_replaced": 0.0}, "smart_replaced is 0.0"),
        ({"largest": float("nan")}, "largest is nan"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Data(Path("dataset.json"), **options)


@pytest.mark.parametrize(
    "options", [{"flip": 1.5}, {"noise": -0.1}, {"zoom": 1.0}, {"degrees": 200}, {"noise_std": -1}]
)
def test_augmentations_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Augmentation(**options)
