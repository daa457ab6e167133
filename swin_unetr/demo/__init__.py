"""`swin-unetr demo`: pretrain and train on one patient's CT, segment another's, and time it beside MONAI."""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from rich.console import Console

import swin_kernels
from swin_kernels import doctor

from .. import cli, distributed, evaluate, lock, predict, pretrain, train
from ..datasets.transforms import square_plane
from ..evaluation.scores import scores
from ..prediction import ensemble
from ..prediction.windows import Windows
from ..training import log
from . import report
from .comparison import compare, timed_runs
from .data import CLASSES, LABEL_NOTE, Patient, bare_threshold, folder, load_patient, write_datalist
from .figure import overlay

FILES = {
    "prediction": "prediction/patient1_ct.nii.gz",
    "report": "prediction/report.html",
    "scores": "evaluation/scores.png",
    "overlay": "overlay.png",
    "results": "results.json",
}


@dataclass
class DemoOptions:
    """Pretrain and train a small Swin UNETR on one chest CT, segment another patient's, and time it beside MONAI's.

    About 5 minutes on 2 cores. An interrupted demo continues where it stopped.

    Args:
        out: folder for the results; those of an earlier demo in it are overwritten.
        pretraining_steps: steps of pretraining, on patient 2 without labels.
        steps: steps of training, on patient 2; by default those of the preset.
        seed: for weights and crops. On a CPU, seed and number of threads determine the result.
        rounds: timed runs of each piece of work.
        device: cpu, cuda or cuda:N; by default a GPU if there is one.
        backend: a backend of swin_kernels to use; by default the fastest on this machine.
        more: options of both pretrain and train, such as --roi=[64,64,64].
    """

    out: Path = Path("demo_output")
    pretraining_steps: int = 20
    steps: int | None = None
    seed: int = 0
    rounds: int = 5
    device: str | None = None
    backend: str | None = None
    more: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("pretraining_steps", "steps", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; accepted is a number ≥ 1")


def run(options: DemoOptions, console: Console | None = None) -> int:
    """Run the demo; returns the exit status: 0, or 1 if a check of the doctor failed.

    Raises:
        ValueError: `options.backend` is unknown or cannot run on the device, or `options.out` holds a demo with other
            options, cannot be written to or is in use.
        OSError: writing failed, for example because the disk is full.
    """
    results = demonstrate(options, console or Console())
    return 0 if results["doctor_passed"] else 1


def demonstrate(options: DemoOptions, console: Console) -> dict[str, Any]:
    """Run the demo, write `FILES` into its folder and return what ``results.json`` holds."""
    with lock.owned(options.out, "demo"):
        return _demonstrate(options, console)


def _demonstrate(options: DemoOptions, console: Console) -> dict[str, Any]:
    with distributed.job(options.device) as device:
        pass  # the device can be used
    training = _training(options)
    backend = choose_backend(training.architecture.feature_size, device, options.backend)
    results: dict[str, Any] = {
        "settings": report.settings(training, options.pretraining_steps, device, backend),
    }
    report.heading(console, "Doctor")
    examination = doctor.run(quick=True)
    doctor.show(examination, console)
    results |= {"machine": examination.machine, "doctor_passed": examination.passed}

    paths = {kind: options.out / name for kind, name in FILES.items()}
    with swin_kernels.use_backend(backend):
        report.heading(console, "Pretraining on patient 2, without labels")
        report.settings_table(console, results["settings"])
        _must(pretrain.run(_pretraining(options), console))
        results["pretraining"] = _summary(options.out / "pretraining")
        report.heading(console, "Training on patient 2")
        _must(train.run(training, console))
        results["training"] = _summary(training.out)

        report.heading(console, "Segmenting patient 1, not seen in training")
        unseen = load_patient(1)
        results |= _segment(training, unseen, options, console)
        report.organ_table(console, results)
        prediction = _voxels(paths["prediction"])
        overlay(unseen, prediction, results["dice"], paths["overlay"], "Trained on patient 2, segments patient 1")

        report.heading(console, "Beside MONAI")
        (network,) = ensemble.load([training.out / "best.pt"], device).networks
        with report.timing_bar(console, timed_runs(options.rounds)) as advance:
            timings = compare(network.requires_grad_(True), unseen, training, options.rounds, on_run=advance)
        results["timings"] = [asdict(t) | {"speedup": t.speedup, "rounds": options.rounds} for t in timings]
        report.timing_table(console, timings, options.rounds)

    report.write_json(results, paths["results"])
    report.files(console, paths)
    return results


def choose_backend(feature_size: int, device: torch.device, forced: str | None = None) -> str:
    """The backend of `swin_kernels` that computes the attention of a network of `feature_size` on `device`.

    Args:
        forced: a backend; None for that of the variable ``SWIN_KERNELS_BACKEND``, or else the first that can.

    Raises:
        ValueError: the forced one is unknown or cannot run here.
    """
    heads, window = 3, 7  # of the first stage
    qkv = torch.empty(1, *[2 * window] * 3, 3 * feature_size, device=device)
    reasons = swin_kernels.explain(qkv, torch.empty((2 * window - 1) ** 3, heads, device=device), window)
    able = [name for name, reason in reasons.items() if reason is None]
    forced = forced or os.environ.get("SWIN_KERNELS_BACKEND")
    if not forced:
        return able[0]
    if forced not in reasons:
        raise ValueError(f"backend is {forced!r}; accepted are {', '.join(reasons)}")
    if forced not in able:
        raise ValueError(
            f"backend {forced!r} cannot run on {device}: {reasons[forced]}; accepted are {', '.join(able)}"
        )
    return forced


def _common(options: DemoOptions, out: str) -> list[str]:
    device = [] if options.device is None else [f"--device={options.device}"]
    return [
        f"--data.datalist={write_datalist(options.out / 'datalist.json')}",
        f"--data.root={folder()}",
        "--data.folds=1",  # patient 2 alone
        f"--out={options.out / out}",
        f"--seed={options.seed}",
        *device,
        *options.more,
    ]


def _training(options: DemoOptions) -> train.TrainOptions:
    steps = [] if options.steps is None else [f"--schedule.steps={options.steps}"]
    initial = f"--initial={options.out / 'pretraining' / 'best.pt'}"
    return cli.parse(train.TrainOptions, "train", ["--preset=demo", *_common(options, "training"), initial, *steps])


def _pretraining(options: DemoOptions) -> pretrain.PretrainOptions:
    """Options for pretraining on the crops of the training, prepared in the same way."""
    of_training = _training(options)
    more = [
        f"--tasks.rotation_axes={list(square_plane(of_training.roi))}",
        f"--schedule.steps={options.pretraining_steps}",
        "--schedule.warm_up=0.1",
        "--optimization.learning_rate=1e-3",
        f"--optimization.precision={of_training.optimization.precision}",
    ]
    parsed = cli.parse(pretrain.PretrainOptions, "pretrain", [*_common(options, "pretraining"), *more])
    parsed.architecture, parsed.preprocessing = of_training.architecture, of_training.preprocessing
    parsed.roi, parsed.data = of_training.roi, of_training.data
    parsed.__post_init__()
    return parsed


def _must(status: int) -> None:
    """Continue only after success; a signal to stop ends the demo as it ends a training."""
    if status:
        raise SystemExit(status)


def _summary(out: Path) -> dict[str, float]:
    """First and last loss (means of up to 5 steps) and the median seconds of a step, from a run's log."""
    steps = [line for line in log.read(out) if line["event"] == "train"]
    losses = [line["loss"] for line in steps]
    return {
        "first_loss": statistics.fmean(losses[:5]),
        "final_loss": statistics.fmean(losses[-5:]),
        "seconds_per_step": statistics.median(line["seconds"] for line in steps),
    }


def _segment(training: train.TrainOptions, unseen: Patient, options: DemoOptions, console: Console) -> dict[str, Any]:
    """Predict and evaluate; returns what is known about the result."""
    asked = predict.PredictOptions(
        checkpoint=[training.out / "best.pt"],
        input=[folder() / "patient1_ct.nii.gz"],
        out=options.out / "prediction",
        windows=Windows(overlap=training.validation.overlap),
        overwrite=True,
        device=options.device,
    )
    _must(predict.run(asked, console))
    labels = options.out / "labels"
    labels.mkdir(exist_ok=True)
    shutil.copyfile(folder() / "patient1_labels.nii.gz", labels / "patient1_ct.nii.gz")  # named like its prediction
    judged = evaluate.EvaluateOptions(asked.out, labels, options.out / "evaluation", classes={**training.labels.groups})
    _must(evaluate.run(judged, console))
    found = _voxels(asked.out / "patient1_ct.nii.gz")
    return {
        "labels": LABEL_NOTE,
        "dice": _dice(found, unseen),
        "dice_of_bare_threshold": _dice(bare_threshold(unseen), unseen),
        "millilitres": unseen.millilitres(found),
        "millilitres_of_labels": unseen.millilitres(unseen.labels),
    }


def _voxels(path: Path) -> np.ndarray:
    """What a label map holds ``(X, Y, Z)``."""
    return np.asarray(nibabel.Nifti1Image.from_filename(path).dataobj)


def _dice(found: np.ndarray, patient: Patient) -> dict[str, float]:
    classes: Mapping[str, list[int]] = {name: [value] for value, name in enumerate(CLASSES) if value}
    judged = scores(found, patient.labels, classes, patient.spacing.tolist(), tolerance=2.0)
    return {name: score.dice for name, score in judged.items()}
