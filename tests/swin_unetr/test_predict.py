"""`swin-unetr predict`: as MONAI, also in slabs, on the image's own grid; bad cases do not stop the others."""

from __future__ import annotations

import csv
import errno
import io
import itertools
import json
import math
import os
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai import transforms
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from rich.console import Console

from swin_unetr import checkpoints, cli, imaging, predict, preprocessing
from swin_unetr.architecture import Architecture
from swin_unetr.labels import Labels
from swin_unetr.prediction import ensemble as ensembles
from swin_unetr.prediction import report, windows
from swin_unetr.prediction.restore import entropy
from swin_unetr.prediction.windows import Windows, starts_along
from swin_unetr.preprocessing import Preprocessing

from ..ranks import on_ranks
from . import full
from .segmenter import ORGANS, ROI, SMALL, affine, checkpoint, image, nifti

CPU = torch.device("cpu")
TUMOUR = Labels({"whole": [1, 2, 4], "core": [1, 4], "enhancing": [4]}, overlapping=True)


def volume(axes: str = "RAS", shape=(70, 61, 33)) -> imaging.Volume:
    return imaging.Volume(image(shape)[None].astype(np.float32), affine(axes))


def by_monai(ensemble: ensembles.Ensemble, found: imaging.Volume, overlap: float, decide: bool = True):
    """Label map, or probabilities, from MONAI's transforms and their inverse: what users have now."""
    keys = ("image",)
    steps = ensemble.preprocessing
    before = transforms.Compose([*steps.geometry(keys), *steps.scale()])
    item = before({"image": MetaTensor(torch.from_numpy(found.values), affine=torch.from_numpy(found.affine))})
    with torch.inference_mode():
        logits = sliding_window_inference(
            item["image"][None], ensemble.roi, 4, ensemble.networks[0], overlap, mode="gaussian"
        )[0]
    item["pred"] = ensemble.labels.probabilities(logits[None])[0]
    inverse = transforms.Invertd("pred", before, "image", nearest_interp=False, to_tensor=True)
    probabilities = inverse(item)["pred"].as_tensor().float()[None]
    if not decide:
        return probabilities
    decided = (probabilities > 0.5).float() if ensemble.labels.overlapping else probabilities.argmax(1, keepdim=True)
    return ensemble.labels.label_map(decided)[0, 0].numpy()


@pytest.mark.parametrize("labels", [ORGANS, TUMOUR], ids=["softmax", "overlapping"])
@pytest.mark.parametrize("axes", ["RAS", "LPS", "SLA"])
def test_label_map_is_monais(tmp_path, labels, axes):
    ensemble = ensembles.load([checkpoint(tmp_path / "x.pt", labels=labels)], CPU)
    found = volume(axes)
    ours = predict.segment(found, ensemble, Windows(overlap=0.5), CPU).labels
    theirs = by_monai(ensemble, found, 0.5)
    assert len(np.unique(theirs)) > 2
    assert (ours == theirs).mean() > 0.9999


def test_a_grid_may_have_as_many_voxels_as_the_image(tmp_path):
    """Nothing is resampled, but axes are mirrored and permuted."""
    ensemble = ensembles.load([checkpoint(tmp_path / "x.pt", spacing=None)], CPU)
    found = volume("ILA", (30, 32, 50))
    ours = predict.segment(found, ensemble, Windows(overlap=0.0), CPU).labels
    assert (ours == by_monai(ensemble, found, 0.0)).mean() > 0.9999


def test_a_tilted_gantry_is_interpolated_in_space(tmp_path, monkeypatch):
    ensemble = ensembles.load([checkpoint(tmp_path / "x.pt")], CPU)
    place, said = affine(), []
    place[1, 2] = 1.1  # slices are not at right angles to the table
    found = imaging.Volume(volume().values, place)
    ours = predict.segment(found, ensemble, Windows(), CPU, say=said.append).labels
    assert "tilted gantry" in said[0]
    # The image takes 0.0007 GiB on the network's grid, and there are three classes. For these only:
    monkeypatch.setattr(preprocessing, "resampling", lambda channels: 4 * channels)
    with pytest.raises(ValueError, match=r"for the classes of the whole volume at once; accepted are .* \(largest\)"):
        predict.segment(found, ensemble, Windows(), CPU, largest=0.001)
    assert (ours == by_monai(ensemble, found, 0.5)).mean() > 0.9999


@pytest.mark.parametrize("shape", [(9, 12, 3), (40, 61, 23)], ids=["smaller than a window", "larger on an axis"])
def test_small_images_are_padded_as_monai_does(tmp_path, shape):
    ensemble = ensembles.load([checkpoint(tmp_path / "x.pt")], CPU)
    found = volume(shape=shape)
    assert (predict.segment(found, ensemble, Windows(), CPU).labels == by_monai(ensemble, found, 0.5)).mean() > 0.9999


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.7])
def test_slabs_give_what_the_whole_gives(tmp_path, overlap):
    network = ensembles.load([checkpoint(tmp_path / "x.pt")], CPU).networks[0]
    x = torch.randn(1, 1, 85, 64, 32)
    said = []
    with torch.inference_mode():
        whole = sliding_window_inference(x, ROI, 4, network, overlap, mode="gaussian")
        pieces = list(windows.slabs(x, [network], 3, ROI, Windows(overlap, 4, 1e-9), said.append))
    assert len(pieces) > 2
    assert re.match(r"in slabs: .* take 0.00584 GiB, .* 0.0022 GiB, and 1e-09 GiB are allowed", said[0])
    assert [first for first, _ in pieces] == np.cumsum([0, *(p[0].shape[2] for _, p in pieces)]).tolist()[:-1]
    torch.testing.assert_close(torch.cat([p[0] for _, p in pieces], dim=2), whole, rtol=1e-5, atol=1e-5)


def test_an_image_in_slabs_has_the_same_label_map(tmp_path):
    ensemble = ensembles.load([checkpoint(tmp_path / "x.pt")], CPU)
    for axes in ("RAS", "SLA"):
        found, said = volume(axes), []
        whole = predict.segment(found, ensemble, Windows(), CPU, entropy=True)
        slabs = predict.segment(found, ensemble, Windows(memory_limit=1e-9), CPU, entropy=True, say=said.append)
        assert said
        assert (whole.labels == slabs.labels).mean() > 0.99999
        np.testing.assert_allclose(whole.entropy, slabs.entropy, atol=1e-4)


def test_sums_move_to_the_processor_where_the_gpu_is_full(monkeypatch):
    """A tensor without memory stands for the GPU's."""
    tried, said = [], []

    def slide(part, network, roi, how, device):
        tried.append(device.type)
        if device.type != "cpu":
            raise torch.cuda.OutOfMemoryError
        return torch.zeros(1, 3, *part.shape[2:])

    monkeypatch.setattr(windows, "_slide", slide)
    image = torch.empty(1, 1, 85, 64, 32, device="meta")
    rows = [p[0].shape[2] for _, p in windows.slabs(image, [None], 3, ROI, Windows(memory_limit=1e-9), said.append)]
    assert sum(rows) == 85
    assert tried == ["meta", *["cpu"] * len(rows)]  # once is enough
    assert any("kept in the processor's memory" in text for text in said)


@pytest.mark.parametrize(("extent", "roi", "overlap"), [(96, 96, 0.5), (97, 96, 0.5), (200, 64, 0.7), (130, 32, 0.0)])
def test_windows_lie_where_monai_puts_them(extent, roi, overlap):
    seen = []

    def network(x):
        seen.extend(x[:, 0, 0, 0].tolist())
        return x

    sliding_window_inference(torch.arange(extent).float().view(1, 1, extent, 1), (roi, 1), 1, network, overlap)
    firsts = [int(first) for first in seen]
    assert starts_along(extent, roi, overlap) == firsts


def test_ensembles_average_probabilities_and_mirrors_logits(tmp_path):
    paths = [checkpoint(tmp_path / f"{seed}.pt", seed) for seed in range(2)]
    both, one = ensembles.load(paths, CPU), ensembles.load(paths[:1], CPU)
    found = volume(shape=(38, 60, 20))
    maps = [predict.segment(found, e, Windows(), CPU, entropy=True) for e in (both, one)]
    assert (maps[0].labels != maps[1].labels).mean() > 0.01
    mean = sum(by_monai(ensembles.load([path], CPU), found, 0.5, decide=False) for path in paths) / 2
    assert (maps[0].labels == ORGANS.label_map(mean.argmax(1, keepdim=True))[0, 0].numpy()).mean() > 0.9999
    x = torch.randn(1, 1, *ROI)
    network = one.networks[0]
    with torch.inference_mode():
        mean = (
            network(x) + network(x.flip(2)).flip(2) + network(x.flip(4)).flip(4) + network(x.flip(2, 4)).flip(2, 4)
        ) / 4
        torch.testing.assert_close(ensembles.Mirrored(network, (0, 2))(x), mean, rtol=1e-4, atol=1e-5)


def test_entropy_is_a_part_of_the_largest():
    even, sure = torch.full((4, 2), 0.25), torch.tensor([[1.0], [0.0], [0.0]])
    torch.testing.assert_close(entropy(even, False), torch.ones(2))
    torch.testing.assert_close(entropy(sure, False), torch.zeros(1))
    torch.testing.assert_close(entropy(torch.tensor([[0.5], [1.0]]), True), torch.tensor([0.5]))


def test_the_averaged_weights_are_used(tmp_path):
    checkpoint(tmp_path / "a.pt", 0)
    content = checkpoints.read(checkpoint(tmp_path / "b.pt", 1)).content
    content["ema"] = checkpoints.read(tmp_path / "a.pt").content["model"]
    checkpoints.write(tmp_path / "b.pt", content)
    loaded = [ensembles.load([tmp_path / name], CPU).networks[0].state_dict() for name in ("a.pt", "b.pt")]
    assert all(torch.equal(loaded[0][name], loaded[1][name]) for name in loaded[0])


@pytest.mark.parametrize("intensity", ["window", "zscore"])
@pytest.mark.parametrize("spacing", [None, (1.6, 1.9, 4.0), (2.0, 2.0, 3.0)], ids=["kept", "equal", "resampled"])
@pytest.mark.parametrize("axes", ["RAS", "LAS"])
def test_numbers_and_pictures_are_of_the_image_as_it_is(tmp_path, monkeypatch, axes, spacing, intensity):
    """If orientation and spacing copy nothing, transforms work on the array that they are given."""
    torch.manual_seed(0)
    ensemble = ensembles.Ensemble(
        (torch.nn.Conv3d(1, 3, 3, padding=1),), ORGANS, Preprocessing(spacing, intensity=intensity), ROI, 1, {}
    )
    whole, shown = image((30, 40, 20)) + 500, []
    monkeypatch.setattr(report, "picture", lambda image, *rest: shown.append(image.copy()) or "")
    (source,) = imaging.find([nifti(tmp_path / "x.nii.gz", whole, affine(axes))], 1.0)
    case = predict._case(source, tmp_path / "y.nii.gz", ensemble, options(tmp_path), CPU)
    np.testing.assert_array_equal(shown[0], whole)
    labels = np.asarray(nibabel.load(tmp_path / "y.nii.gz").dataobj)
    found = [organ for organ in case.organs if organ.voxels]
    assert found
    for organ in found:
        inside = whole[np.isin(labels, organ.values)]
        assert (organ.mean, organ.std) == pytest.approx((inside.mean(), inside.std()), rel=1e-4)


def options(tmp_path, **more) -> predict.PredictOptions:
    given = {"checkpoint": [tmp_path / "x.pt"], "input": [tmp_path / "in"], "out": tmp_path / "out", "device": "cpu"}
    return predict.PredictOptions(**given | more)


@pytest.fixture
def inputs(tmp_path):
    checkpoint(tmp_path / "x.pt")
    (tmp_path / "in").mkdir()
    nifti(tmp_path / "in" / "good.nii.gz")
    return tmp_path


def test_a_broken_case_is_reported_and_the_others_go_on(inputs):
    (inputs / "in" / "cut.nii.gz").write_bytes((inputs / "in" / "good.nii.gz").read_bytes()[:900])
    nan = image().astype(np.float32)
    nan[0, 0, 0] = np.nan
    nifti(inputs / "in" / "nan.nii.gz", nan)
    nifti(inputs / "in" / "two.nii.gz", np.stack([image(), image()], -1))
    terminal = io.StringIO()
    assert predict.run(options(inputs, entropy=True), Console(file=terminal, width=200)) == 1
    for said in (
        "cut.nii.gz: cannot be read",
        "nan.nii.gz: 1 voxels are NaN or infinite",
        "the image has 2 channels; the network takes 1",
    ):
        assert said in terminal.getvalue(), said
        assert said.replace("'", "&#x27;") in (inputs / "out" / "report.html").read_text()
    written = nibabel.load(inputs / "out" / "good.nii.gz")
    np.testing.assert_allclose(written.affine, affine(), atol=1e-5)
    labels = np.asarray(written.dataobj)
    rows = {row["class"]: row for row in csv.DictReader((inputs / "out" / "volumes.csv").open())}
    voxel = 1.6 * 1.9 * 4.0 / 1000
    for name, value in (("liver", 1), ("spleen", 7)):
        assert float(rows[name]["millilitres"]) == pytest.approx((labels == value).sum() * voxel, rel=1e-5)
        assert float(rows[name]["mean"]) == pytest.approx(image()[labels == value].mean(), rel=1e-5)
    summary = json.loads((inputs / "out" / "volumes.json").read_text())
    assert set(summary) == {"good"}
    uncertain = np.asarray(nibabel.load(inputs / "out" / "entropy" / "good.nii.gz").dataobj)
    assert 0 < uncertain.min() < uncertain.max() <= 1


def test_a_failure_is_one_line_however_long_its_names(inputs):
    """In a file or a pipe, which rich assumes to be 80 columns wide."""
    path = inputs / "in" / f"a patient [with] a name {'and a study ' * 10}.nii.gz"
    path.write_text("no image")
    terminal = io.StringIO()
    assert predict.run(options(inputs), Console(file=terminal, width=80)) == 1
    (line,) = (line for line in terminal.getvalue().splitlines() if line.startswith("not segmented"))
    assert f": {path}: cannot be read: " in line


def test_what_is_no_image_costs_nothing_and_is_named(inputs):
    os.mkfifo(inputs / "in" / "fifo.nii.gz")
    (inputs / "in" / "loop.nii.gz").symlink_to("loop.nii.gz")
    (inputs / "in" / "READ<me>.txt").write_text("no image")
    terminal = io.StringIO()
    assert predict.run(options(inputs), Console(file=terminal, width=300)) == 1
    page = (inputs / "out" / "report.html").read_text()
    for said in (
        "fifo.nii.gz: cannot be read: is a FIFO; accepted are regular files",
        "loop.nii.gz: cannot be read: Too many levels of symbolic links",
    ):
        assert said in terminal.getvalue()
        assert said in page
    assert f"1 file left out of {inputs / 'in'}: READ<me>.txt (ends in none of" in terminal.getvalue()
    assert "1 file of the input left out" in page
    assert "READ&lt;me&gt;.txt</td><td>ends in none of" in page
    assert (inputs / "out" / "good.nii.gz").exists()


def test_largest_bounds_the_networks_grid_too(inputs):
    """A file with a wrong unit for its voxels: small itself, huge once resampled."""
    nifti(inputs / "in" / "unit.nii.gz", image((12, 12, 12)), np.diag([32.0, 32.0, 32.0, 1.0]))
    (inputs / "in" / "good.nii.gz").unlink()
    terminal = io.StringIO()
    assert predict.run(options(inputs, largest=0.001), Console(file=terminal, width=300)) == 1
    # By MONAI's own transforms.
    item = {"image": MetaTensor(torch.zeros(1, 12, 12, 12), affine=torch.diag(torch.tensor([32.0, 32.0, 32.0, 1.0])))}
    for step in Preprocessing((2.0, 2.0, 3.0)).geometry(("image",)):
        item = step(item)
    size = item["image"].numel() * (32 + 24) / 2**30  # homogeneous coordinates and coordinates, in float64
    grid = " × ".join(map(str, item["image"].shape[1:]))
    said = f"takes {size:.3g} GiB on the network's grid of {grid} voxels, coordinates for its resampling included"
    assert f"{said}; accepted are 0.001 (largest)" in terminal.getvalue()
    assert "By its header its voxels are of 32 × 32 × 32 mm: is that right?" in terminal.getvalue()


def test_voxels_beyond_any_scanner_are_refused(inputs):
    """If resampling rather than the image takes the memory."""
    place = np.diag([32000.0, 32.0, 32.0, 1.0])
    nifti(inputs / "in" / "unit.nii.gz", image((12, 12, 12)), place)
    terminal = io.StringIO()
    assert predict.run(options(inputs), Console(file=terminal, width=300)) == 1
    said = (
        "unit: the image's voxels are of 3.2e+04 × 32 × 32 mm by its header; accepted are extents from 0.0001 to 1000"
    )
    assert said in terminal.getvalue()
    assert (inputs / "out" / "good.nii.gz").exists()


def test_an_image_of_the_networks_spacing_takes_no_coordinates():
    ready = MetaTensor(torch.zeros(1, 30, 40, 50), affine=torch.diag(torch.tensor([-2.0, 2.0, 3.0, 1.0])))
    Preprocessing((2.0, 2.0, 3.0)).check_grid(ready, 30 * 40 * 50 * 4 / 2**30)
    with pytest.raises(ValueError, match="coordinates for its resampling included"):
        Preprocessing((2.0, 2.0, 2.9)).check_grid(ready, 30 * 40 * 50 * 4 * 10 / 2**30)


def test_what_is_behind_an_error_of_preprocessing_is_told(inputs, monkeypatch):
    """MONAI says which transform failed, and no more."""

    def scale(self):
        def step(item):
            raise RuntimeError("no memory for 5 bytes")

        return [step]

    monkeypatch.setattr(Preprocessing, "scale", scale)
    terminal = io.StringIO()
    assert predict.run(options(inputs), Console(file=terminal, width=300)) == 1
    assert "no memory for 5 bytes" in terminal.getvalue()
    assert "applying transform" not in terminal.getvalue()


def test_intensities_that_overflow_the_preprocessing_are_refused(tmp_path):
    ensemble = ensembles.load([checkpoint(tmp_path / "x.pt", intensity="zscore")], CPU)
    found = imaging.Volume(volume().values * np.float32(1e36), affine())
    with pytest.raises(ValueError, match="intensities are too large: some are not finite after preprocessing"):
        predict.segment(found, ensemble, Windows(), CPU)


def test_results_are_not_replaced_unasked(inputs):
    quiet = Console(quiet=True)
    assert predict.run(options(inputs), quiet) == 0
    before = (inputs / "out" / "good.nii.gz").stat().st_mtime_ns
    with pytest.raises(
        ValueError, match=r"good.nii.gz is there already; accepted is another folder, or overwrite: true"
    ):
        predict.run(options(inputs), quiet)
    assert (inputs / "out" / "good.nii.gz").stat().st_mtime_ns == before
    assert predict.run(options(inputs, overwrite=True), quiet) == 0

    (inputs / "out" / "entropy").mkdir()
    (inputs / "out" / "good.nii.gz").rename(inputs / "out" / "entropy" / "good.nii.gz")
    for left in inputs.glob("out/*.*"):
        left.unlink()
    with pytest.raises(ValueError, match=r"entropy/good.nii.gz is there already"):
        predict.run(options(inputs, entropy=True), quiet)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_full_disk_leaves_tables_and_report_that_were_there(inputs):
    """The label map and a table fit on it, the report does not."""
    quiet, out = Console(quiet=True), inputs / "out"
    assert predict.run(options(inputs), quiet) == 0
    before = contents(out)
    nifti(inputs / "in" / "good.nii.gz", image(seed=3))
    room = (len(before["volumes.json"]) + len(before["good.nii.gz"]) + len(before["report.html"])) // 2
    with full.after(room), pytest.raises(OSError, match=rf"{full.SAYS}: '{re.escape(str(out / 'report.html'))}'"):
        predict.run(options(inputs, overwrite=True), quiet)
    after = contents(out)
    assert after.pop("good.nii.gz") != before.pop("good.nii.gz")
    assert after == before


def test_a_run_that_segments_nothing_replaces_nothing(inputs):
    terminal, out = io.StringIO(), inputs / "out"
    assert predict.run(options(inputs, entropy=True), Console(quiet=True)) == 0
    before = contents(out)
    with full.after(400):
        assert predict.run(options(inputs, overwrite=True), Console(file=terminal, width=80)) == 1
    assert contents(out) == before
    path = out / "good.nii.gz"
    assert (
        f"not segmented: good: [Errno {errno.EFBIG}] {full.SAYS}: '{path}'; good.nii.gz there is of an earlier "
        "prediction\n"
    ) in terminal.getvalue()
    assert f"no case was segmented; volumes.csv, volumes.json, report.html in {out} are of an earlier prediction\n" in (
        terminal.getvalue()
    )


def test_a_label_map_that_stays_is_said_to_be_of_an_earlier_prediction(inputs):
    nifti(inputs / "in" / "other.nii.gz", image(seed=1))
    assert predict.run(options(inputs), Console(quiet=True)) == 0
    (inputs / "in" / "other.nii.gz").write_text("no image")
    (inputs / "in" / "third.nii.gz").write_text("no image")
    assert predict.run(options(inputs, overwrite=True), Console(quiet=True)) == 1
    assert set(json.loads((inputs / "out" / "volumes.json").read_text())) == {"good"}
    page = (inputs / "out" / "report.html").read_text()
    assert page.count("there is of an earlier prediction") == 1
    assert "; other.nii.gz there is of an earlier prediction</li>" in page


def test_an_image_that_is_named_twice_is_one_case(inputs):
    (inputs / "link").symlink_to(inputs / "in")
    terminal = io.StringIO()
    given = [inputs / "in", inputs / "link", inputs / "in"]
    assert predict.run(options(inputs, input=given), Console(file=terminal, width=80)) == 0
    assert set(json.loads((inputs / "out" / "volumes.json").read_text())) == {"good"}
    for said in (
        f"input: {inputs / 'link'} is the same as {inputs / 'in'}; it is taken once\n",
        f"input: {inputs / 'in'} is there twice; it is taken once\n",
    ):
        assert said in terminal.getvalue()


def test_weights_that_are_not_finite_are_refused(tmp_path):
    content = checkpoints.read(checkpoint(tmp_path / "x.pt")).content
    name = "decoder5.conv_block.conv1.conv.weight"
    content["model"][name][0, 0, 0, 0, :2] = torch.tensor([math.nan, math.inf])
    size = content["model"][name].numel()
    checkpoints.write(tmp_path / "x.pt", content)
    says = (
        rf"checkpoint: .*x.pt has weights that are NaN or infinite, such as {name} \(2 of {size}\); accepted are finite"
    )
    with pytest.raises(ValueError, match=says):
        ensembles.load([tmp_path / "x.pt"], CPU)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_an_output_that_is_not_finite_is_no_segmentation(inputs, monkeypatch, value):
    """For one image; the others continue."""
    nifti(inputs / "in" / "bright.nii.gz", np.full((40, 61, 23), 90, np.int16))

    def slide(part, network, roi, how, device):
        logits = torch.zeros(1, ORGANS.channels, *part.shape[2:])
        logits[0, 1, 0, 0, 0] = value if len(part.unique()) == 2 else 0.0  # it, and zeros around it
        return logits

    monkeypatch.setattr(windows, "_slide", slide)
    terminal = io.StringIO()
    assert predict.run(options(inputs), Console(file=terminal, width=80)) == 1
    assert "not segmented: bright: the network's output for this image is not finite (NaN or infinite)\n" in (
        terminal.getvalue()
    )
    assert not (inputs / "out" / "bright.nii.gz").exists()
    assert set(json.loads((inputs / "out" / "volumes.json").read_text())) == {"good"}


@pytest.mark.parametrize("entropy", [False, True])
def test_an_image_is_never_replaced(inputs, entropy):
    """Not even if replacing results is allowed, and not through another name of its folder."""
    (inputs / "link").symlink_to(inputs / "in")
    (inputs / "in" / "entropy").mkdir()
    image_file = inputs / "in" / "entropy" / "good.nii.gz" if entropy else inputs / "in" / "good.nii.gz"
    (inputs / "in" / "good.nii.gz").rename(image_file)
    before = image_file.read_bytes()
    given = options(inputs, input=[image_file], out=inputs / "link", entropy=entropy, overwrite=True)
    with pytest.raises(ValueError, match=r"good.nii.gz is an image to segment; accepted is another folder"):
        predict.run(given, Console(quiet=True))
    assert image_file.read_bytes() == before


def _predict_on_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    status = predict.run(options(Path(folder), out=Path(folder) / "shared"), Console(quiet=True))
    torch.distributed.destroy_process_group()
    (Path(folder) / f"status{rank}").write_text(str(status))


def test_ranks_share_the_cases(inputs):
    for number in range(2):
        nifti(inputs / "in" / f"more{number}.nii.gz", image(seed=number))
    (inputs / "in" / "text.nii.gz").write_text("no image")
    on_ranks(_predict_on_a_rank, (str(inputs),), 2)
    assert [(inputs / f"status{rank}").read_text() for rank in range(2)] == ["1", "1"]
    assert predict.run(options(inputs), Console(quiet=True)) == 1
    tables = [(inputs / out / "volumes.csv").read_text() for out in ("shared", "out")]
    assert tables[0] == tables[1]
    assert [line.partition(",")[0] for line in tables[0].splitlines()[1::2]] == ["good", "more0", "more1"]
    assert "text.nii.gz: cannot be read" in (inputs / "shared" / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "pretrain"}, r"y.pt is of 'pretrain'; accepted are those of 'train'"),
        (
            {"labels": Labels({"liver": [1], "kidney": [7]})},
            "y.pt has labels .*kidney.*; accepted are checkpoints that agree",
        ),
        ({"spacing": (1.0, 1.0, 1.0)}, "y.pt has preprocessing .*; accepted are checkpoints that agree"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        ensembles.load([checkpoint(tmp_path / "x.pt"), checkpoint(tmp_path / "y.pt", **change)], CPU)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("architecture", {"spatial_dims": 2}, "x.pt is of a network for 2-D images; accepted are those for volumes"),
        (
            "architecture",
            {"depths": (1, 1, 1, 2)},
            "x.pt does not describe its own weights: RuntimeError: .*state_dict",
        ),
        ("architecture", {"layers": 3}, "x.pt does not describe its own weights: TypeError: .*'layers'"),
        ("labels", {"classes": {"liver": [1]}}, "x.pt has 3 output channels and labels for 2; accepted are as many"),
    ],
)
def test_networks_that_cannot_be_built_are_named(tmp_path, part, value, message):
    content = checkpoints.read(checkpoint(tmp_path / "x.pt")).content
    content[part] |= value
    if "spatial_dims" in value:
        content["model"] = Architecture(**content[part]).build().state_dict()
    checkpoints.write(tmp_path / "x.pt", content)
    with pytest.raises(ValueError, match=message):
        ensembles.load([tmp_path / "x.pt"], CPU)
    del content["roi"]
    content["architecture"] = {}
    checkpoints.write(tmp_path / "x.pt", content)
    with pytest.raises(ValueError, match="does not describe its own weights: KeyError: 'roi'"):
        ensembles.load([tmp_path / "x.pt"], CPU)


def test_a_shells_pattern_names_files(tmp_path):
    """A single file is not a list of files, though the parser would make it one."""
    (tmp_path / "a.pt").write_text("none.pt")
    for given, expected in (
        ([tmp_path / "a.pt"], [tmp_path / "a.pt"]),
        (["a.pt", "b c.pt"], [Path("a.pt"), Path("b c.pt")]),
        (["[a.pt,b.pt]"], [Path("a.pt"), Path("b.pt")]),
    ):
        argv = ["--checkpoint", *map(str, given), "--input", "x", "--entropy", "true"]
        assert cli.parse(predict.PredictOptions, "predict", argv).checkpoint == expected


def test_bad_options_are_named(inputs, capsys):
    assert SMALL["out_channels"] == ORGANS.channels
    base = {"--checkpoint": f"[{inputs / 'x.pt'}]", "--input": f"[{inputs / 'in'}]", "--device": "cpu"}
    for (option, value), message in (
        (["--mirror", "[0, 0]"], "mirror is (0, 0); accepted are different axes of (0, 1, 2)"),
        (["--checkpoint", "[none.pt]"], "checkpoint: none.pt does not exist"),
        (["--input", "[nowhere]"], "input: nowhere does not exist"),
        (["--identify", "name"], "identify"),
        (["--windows.overlap", "1"], "overlap is 1.0; accepted is 0 ≤ overlap < 1"),
    ):
        given = base | {"--out": str(inputs / "out"), option: value}
        assert _status(["predict", *itertools.chain(*given.items())]) == 2
        assert message in capsys.readouterr().err


def _status(argv) -> int:
    try:
        return cli.main(argv)
    except SystemExit as exit_:
        return exit_.code
