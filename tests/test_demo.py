"""`swin-unetr demo`: a small run from end to end, its parts, and what its command line refuses."""

import dataclasses
import io
import json
import math

import nibabel
import numpy as np
import pytest
import torch
from monai.utils import set_determinism
from PIL import Image
from rich.console import Console

from swin_unetr import cli, demo
from swin_unetr.demo import comparison, data, report, training
from swin_unetr.imaging import planes

TINY = demo.Recipe(steps=2, batch_size=1, window=(64, 32, 32), depths=(1, 1, 1, 1))
CROP = (slice(20, 84), slice(30, 66), slice(8, 40))


def _cropped(number):
    """The middle of a patient's chest, small enough for a test."""
    patient = data.load_patient(number)
    return dataclasses.replace(patient, ct=patient.ct[CROP].copy(), labels=patient.labels[CROP].copy())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, returned results, terminal output) of one tiny run on the CPU."""
    out = tmp_path_factory.mktemp("demo") / "made" / "by the demo"
    terminal = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "load_patient", _cropped)
        results = demo.run(
            out, recipe=TINY, device=torch.device("cpu"), rounds=1, console=Console(file=terminal, width=100)
        )
    return out, results, terminal.getvalue()


def test_prediction_lies_in_the_geometry_of_the_ct(finished):
    out, results, _ = finished
    prediction, patient = nibabel.load(out / demo.FILES["prediction"]), _cropped(1)
    np.testing.assert_array_equal(prediction.affine, patient.affine)
    np.testing.assert_array_equal(prediction.get_sform(), patient.header.get_sform())
    np.testing.assert_array_equal(prediction.get_qform(), patient.header.get_qform())
    assert prediction.shape == patient.ct.shape
    assert prediction.get_data_dtype() == np.uint8
    labels = np.asarray(prediction.dataobj)
    assert set(np.unique(labels)) <= {0, 1, 2}
    assert results["dice"] == training.dice(labels, patient.labels)
    assert results["millilitres"]["lung"] == pytest.approx((labels == 2).sum() * 3 * 3 * 5 / 1000)


def test_overlay_is_a_picture(finished):
    out, _, _ = finished
    pixels = np.asarray(Image.open(out / demo.FILES["overlay"]).convert("RGB"))
    assert min(pixels.shape[:2]) > 1000
    assert pixels.std() > 20


def test_results_are_finite_and_written_as_returned(finished):
    out, results, _ = finished
    assert json.loads((out / demo.FILES["results"]).read_text()) == json.loads(json.dumps(results))
    numbers = [*results["training"].values()]
    for key in ("dice", "dice_of_bare_threshold", "millilitres", "millilitres_of_labels"):
        assert set(results[key]) == {"body", "lung"}
        numbers += results[key].values()
    assert all(0 <= score <= 1 for score in results["dice"].values())
    for timing in results["timings"]:
        numbers += [timing[key] for key in ("fused", "monai", "difference", "speedup")]
    assert all(math.isfinite(number) for number in numbers)


def test_terminal_states_dice_labels_conditions_and_files(finished):
    out, results, terminal = finished
    assert data.LABEL_NOTE in terminal
    for organ, score in results["dice"].items():
        assert any(organ in line and f"{score:.3f}" in line for line in terminal.splitlines())
    for stated in (torch.__version__, "MONAI", "threads", "every check passed", "seed 0", "s/step", "speed-up"):
        assert stated in terminal
    for name in demo.FILES.values():
        assert f"{out / name}\n" in terminal
    assert "nan" not in terminal.lower()


def test_results_name_machine_and_settings(finished):
    _, results, _ = finished
    assert results["doctor_passed"] is True
    assert results["machine"]["torch"] == torch.__version__
    assert results["machine"]["threads"].startswith(f"{torch.get_num_threads()} of")
    assert set(results["settings"]) == {"device", "model", "training", "date"}


def test_training_is_reproducible_on_the_cpu():
    def losses(seed):
        set_determinism(seed)
        found = []
        training.train(_cropped(2), TINY, torch.device("cpu"), seed, lambda loss, seconds: found.append(loss))
        return found

    first = losses(3)
    assert len(first) == TINY.steps
    assert losses(3) == first
    assert losses(4) != first


def test_views_are_random_aligned_and_reproducible():
    patient = data.load_patient(2)
    views, again, other = (data.random_views(patient, (64, 64, 32), 4, seed) for seed in (0, 0, 1))
    seen = []
    for view, same in zip(views, again, strict=True):
        image, label = view["image"], view["label"]
        assert image.shape == label.shape == (1, 64, 64, 32)
        assert set(label.unique().tolist()) <= {0, 1, 2}
        torch.testing.assert_close(image, same["image"], rtol=0, atol=0)
        # 0.3 is about −600 HU: the label moved with the image.
        assert image[label == 2].median() < 0.3 < image[label == 1].median()
        seen.append(image)
    assert not any(torch.equal(seen[i], seen[i + 1]) for i in range(3))
    assert not torch.equal(other[0]["image"], seen[0])


def test_dice_by_class():
    expected = np.zeros((4, 4, 4), np.uint8)
    expected[:2], expected[2] = 1, 2
    assert training.dice(expected, expected) == {"body": 1.0, "lung": 1.0}
    found = expected.copy()
    found[1] = 2  # body: 16 of 32 voxels found; lung: 16 of 16, and 16 too many
    assert training.dice(found, expected) == {"body": pytest.approx(2 / 3), "lung": pytest.approx(2 / 3)}


def test_no_speedup_where_results_differ_from_monai():
    set_determinism(0)
    model = TINY.model()
    model.out.register_forward_hook(lambda module, inputs, output: 1.01 * output)
    timings = comparison.compare(model, _cropped(1), TINY, rounds=1)
    assert [t.agrees for t in timings] == [False, False]
    assert [t.speedup for t in timings] == [None, None]
    terminal = io.StringIO()
    report.timing_table(Console(file=terminal, width=120), timings, 1)
    assert "×" not in terminal.getvalue()
    assert terminal.getvalue().count("none: differs by more than") == 2


def test_a_loss_that_is_not_finite_stops_the_training():
    patient = _cropped(2)
    broken = dataclasses.replace(TINY, learning_rate=1e30, warm_up=0.5, steps=8)
    with pytest.raises(FloatingPointError, match="the training loss is nan"):
        training.train(patient, broken, torch.device("cpu"), 0, lambda loss, seconds: None)


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "SLA"])
def test_slices_are_radiological_whatever_the_orientation_of_the_scan(orientation):
    ras = np.zeros((6, 5, 4))
    ras[5, 4, 3] = 1  # the patient's rightmost, foremost, topmost voxel
    to_scan = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(orientation)
    )
    affine = nibabel.orientations.inv_ornt_aff(to_scan, ras.shape)
    volume = planes.to_ras(nibabel.apply_orientation(ras, to_scan), affine)
    last = {0: 5, 1: 4, 2: 3}
    for normal, right, up, _ in planes.PLANES.values():
        assert planes.slice_of(volume, normal, last[normal], right, up)[0, 0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["demo", "--steps", "0"], "argument --steps: got '0'; accepted is an integer of at least 1"),
        (["demo", "--steps", "many"], "argument --steps: got 'many'"),
        (["demo", "--seed", "-1"], "argument --seed: got '-1'; accepted is an integer from 0"),
        (["demo", "--device", "abacus"], "argument --device: cannot use 'abacus'"),
        (["demo", "--device", "cuda:77"], "argument --device: cannot use 'cuda:77'"),
        (["demo", "--device", "cpu", "--backend", "abacus"], "argument --backend: got 'abacus'; accepted are "),
        (["demo", "--out", "a file/below"], "argument --out: cannot write to 'a file/below': Not a directory"),
        (["demo", "--out", "a file"], "argument --out: cannot write to 'a file': File exists"),
        (["demo", "--speed", "11"], "unrecognized arguments: --speed 11"),
    ],
)
def test_a_wrong_argument_is_named_before_any_work(arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").touch()
    monkeypatch.setattr(demo, "run", lambda *args, **kwargs: pytest.fail("the demo started"))
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_backend_that_cannot_run_says_why(monkeypatch, tmp_path, capsys):
    reasons = {"slow": None, "fast": "no such hardware"}
    monkeypatch.setattr(demo.swin_kernels, "explain", lambda *args: reasons)
    with pytest.raises(SystemExit):
        cli.main(["demo", "--out", str(tmp_path), "--device", "cpu", "--backend", "fast"])
    message = "argument --backend: 'fast' cannot run on cpu: no such hardware; accepted are slow"
    assert message in capsys.readouterr().err
    assert demo.choose_backend(demo.Recipe(), torch.device("cpu")) == "slow"


@pytest.mark.parametrize("doctor_passed", [True, False])
def test_arguments_reach_the_demo_and_the_doctor_sets_the_status(doctor_passed, monkeypatch, tmp_path):
    calls = []

    def run(*args, **kwargs):
        calls.append((args, kwargs))
        return {"doctor_passed": doctor_passed}

    monkeypatch.setattr(demo, "run", run)
    arguments = ["--out", str(tmp_path / "new"), "--steps", "7", "--seed", "5", "--device", "cpu"]
    assert cli.main(["demo", *arguments, "--backend", "reference"]) == (0 if doctor_passed else 1)
    ((args, kwargs),) = calls
    assert args == (tmp_path / "new",)
    assert kwargs["recipe"] == demo.Recipe(steps=7)
    assert (kwargs["seed"], kwargs["device"], kwargs["backend"]) == (5, torch.device("cpu"), "reference")


def test_interrupt_leaves_a_message_and_no_traceback(monkeypatch, tmp_path, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert cli.main(["demo", "--out", str(tmp_path), "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "\nswin-unetr: interrupted\n"
