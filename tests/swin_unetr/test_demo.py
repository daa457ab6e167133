"""`swin-unetr demo`: a small run from start to finish, its parts, and what its command line refuses."""

import dataclasses
import io
import json
import math

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from swin_unetr import cli, demo
from swin_unetr.demo import comparison, data, report
from swin_unetr.imaging import planes

TINY = ("--architecture.depths=[1,1,1,1]", "--roi=[64,32,32]")
CROP = (slice(20, 84), slice(30, 66), slice(8, 40))


def options(out, **more) -> demo.DemoOptions:
    given = {"pretraining_steps": 2, "steps": 2, "rounds": 1, "device": "cpu", "more": TINY}
    return demo.DemoOptions(out=out, **given | more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, returned results, terminal output) of one tiny run on the CPU."""
    out = tmp_path_factory.mktemp("demo") / "made" / "by the demo"
    terminal = io.StringIO()
    results = demo.demonstrate(options(out), Console(file=terminal, width=100))
    return out, results, terminal.getvalue()


def test_prediction_lies_in_the_geometry_of_the_ct(finished):
    out, results, _ = finished
    prediction, patient = nibabel.load(out / demo.FILES["prediction"]), data.load_patient(1)
    np.testing.assert_array_equal(prediction.affine, patient.affine)
    np.testing.assert_array_equal(prediction.get_sform(), patient.header.get_sform())
    np.testing.assert_array_equal(prediction.get_qform(), patient.header.get_qform())
    assert prediction.shape == patient.ct.shape
    assert prediction.get_data_dtype() == np.uint8
    labels = np.asarray(prediction.dataobj)
    assert set(np.unique(labels)) <= {0, 1, 2}
    both = [(labels == 2), (patient.labels == 2)]
    assert results["dice"]["lung"] == pytest.approx(2 * (both[0] & both[1]).sum() / (both[0].sum() + both[1].sum()))
    assert results["millilitres"]["lung"] == pytest.approx((labels == 2).sum() * 3 * 3 * 5 / 1000)


def test_overlay_is_a_picture(finished):
    out, _, _ = finished
    pixels = np.asarray(Image.open(out / demo.FILES["overlay"]).convert("RGB"))
    assert min(pixels.shape[:2]) > 1000
    assert pixels.std() > 20


def test_results_are_finite_and_written_as_returned(finished):
    out, results, _ = finished
    assert json.loads((out / demo.FILES["results"]).read_text()) == json.loads(json.dumps(results))
    numbers = [*results["pretraining"].values(), *results["training"].values()]
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
    stated = (torch.__version__, "MONAI", "threads", "every check passed", "seed 0", "speed-up", "swinViT (")
    for text in (*stated, *(f"{out / name}\n" for name in demo.FILES.values())):
        assert text in terminal
    assert "nan" not in terminal.lower()


def test_results_name_machine_and_settings(finished):
    _, results, _ = finished
    assert results["doctor_passed"] is True
    assert results["machine"]["torch"] == torch.__version__
    assert results["machine"]["threads"].startswith(f"{torch.get_num_threads()} of")
    assert set(results["settings"]) == {"device", "model", "pretraining", "training", "date"}


def test_a_demo_by_other_options_is_not_continued(finished):
    out, _, _ = finished
    with pytest.raises(ValueError, match="seed"):
        demo.demonstrate(options(out, seed=1), Console(quiet=True))


def test_pretraining_sees_what_training_sees(tmp_path):
    asked = options(tmp_path)
    before, after = demo._pretraining(asked), demo._training(asked)
    assert (before.roi, before.architecture, before.preprocessing) == (
        after.roi,
        after.architecture,
        after.preprocessing,
    )
    assert after.initial == before.out / "best.pt"
    assert json.loads(before.data.datalist.read_text())["training"] == [
        {"image": "patient2_ct.nii.gz", "label": "patient2_labels.nii.gz"}
    ]


def test_no_speedup_where_results_differ_from_monai(tmp_path):
    training = demo._training(options(tmp_path))
    torch.manual_seed(0)
    model = training.architecture.build()
    model.out.register_forward_hook(lambda module, inputs, output: 1.01 * output)
    patient = data.load_patient(1)
    patient = dataclasses.replace(patient, ct=patient.ct[CROP].copy(), labels=patient.labels[CROP].copy())
    timings = comparison.compare(model, patient, training, rounds=1)
    assert [t.agrees for t in timings] == [False, False]
    assert [t.speedup for t in timings] == [None, None]
    terminal = io.StringIO()
    report.timing_table(Console(file=terminal, width=120), timings, 1)
    assert "×" not in terminal.getvalue()
    assert terminal.getvalue().count("none: differs by more than") == 2


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
        (["--steps", "0"], "steps is 0; accepted is a number ≥ 1"),
        (["--steps", "many"], "steps"),
        (["--device", "abacus"], "device: cannot use 'abacus'"),
        (["--device", "cuda:77"], "device: cannot use 'cuda:77'"),
        (["--device", "cpu", "--backend", "abacus"], "backend is 'abacus'; accepted are "),
        (["--out", "a file/below"], "out: a file/below cannot be written to: "),
        (["--out", "a file"], "out: a file cannot be written to: "),
        (["--speed", "11"], "speed"),
    ],
)
def test_a_wrong_argument_is_named_before_any_work(arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").touch()
    monkeypatch.setattr(demo.doctor, "run", lambda *args, **kwargs: pytest.fail("the demo started"))
    assert _status(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_commands_are_listed(capsys):
    assert _status(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(command in listed for command in cli.COMMANDS)
    assert _status([]) == 2
    assert _status(["fly"]) == 2
    assert "no command 'fly'; accepted are pretrain, train" in capsys.readouterr().err


def _status(arguments) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as exit_:
        return exit_.code


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    reasons = {"slow": None, "fast": "no such hardware"}
    monkeypatch.setattr(demo.swin_kernels, "explain", lambda *args: reasons)
    message = "backend 'fast' cannot run on cpu: no such hardware; accepted are slow"
    with pytest.raises(ValueError, match=message):
        demo.choose_backend(12, torch.device("cpu"), "fast")
    assert demo.choose_backend(12, torch.device("cpu")) == "slow"


@pytest.mark.parametrize("doctor_passed", [True, False])
def test_arguments_reach_the_demo_and_the_doctor_sets_the_status(doctor_passed, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(demo, "demonstrate", lambda *args: calls.append(args) or {"doctor_passed": doctor_passed})
    arguments = ["--out", str(tmp_path / "new"), "--steps", "7", "--seed", "5", "--device", "cpu"]
    assert cli.main(["demo", *arguments, "--backend", "reference"]) == (0 if doctor_passed else 1)
    (((asked), _),) = calls
    assert asked == demo.DemoOptions(tmp_path / "new", steps=7, seed=5, device="cpu", backend="reference")


def test_interrupt_leaves_a_message_and_no_traceback(monkeypatch, tmp_path, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "demonstrate", interrupted)
    assert cli.main(["demo", "--out", str(tmp_path), "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "\nswin-unetr demo: interrupted\n"
