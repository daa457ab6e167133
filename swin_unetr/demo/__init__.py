"""`swin-unetr demo`: train on one patient's CT, segment another's, and time it beside MONAI."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import nibabel
import numpy as np
import torch
from monai.utils import set_determinism
from rich.console import Console

import swin_kernels
from swin_kernels import doctor

from . import report
from .comparison import compare, timed_runs
from .data import LABEL_NOTE, Patient, bare_threshold, load_patient
from .figure import overlay
from .training import Recipe, dice, predict, train

__all__ = ["FILES", "Recipe", "check_writable", "choose_backend", "default_device", "run"]

FILES = {
    "prediction": "patient1_prediction.nii.gz",
    "overlay": "overlay.png",
    "results": "results.json",
}
TIMED_ROUNDS = 5


def default_device() -> torch.device:
    """CUDA if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_writable(out: Path) -> None:
    """Make the folder `out` if it is missing; raise `OSError` unless files can be written into it."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass


def choose_backend(recipe: Recipe, device: torch.device, forced: str | None = None) -> str:
    """The backend of `swin_kernels` that attends in `recipe`'s model on `device`.

    Args:
        forced: a backend, or None for the environment's ``SWIN_KERNELS_BACKEND`` or else the first that can.

    Raises:
        ValueError: the forced one is unknown or cannot run here.
    """
    heads, window = 3, 7  # of the first stage
    qkv = torch.empty(1, *[2 * window] * 3, 3 * recipe.feature_size, device=device)
    reasons = swin_kernels.explain(qkv, torch.empty((2 * window - 1) ** 3, heads, device=device), window)
    able = [name for name, reason in reasons.items() if reason is None]
    forced = forced or os.environ.get("SWIN_KERNELS_BACKEND")
    if not forced:
        return able[0]
    if forced not in reasons:
        raise ValueError(f"got {forced!r}; accepted are {', '.join(reasons)}")
    if forced not in able:
        raise ValueError(f"{forced!r} cannot run on {device}: {reasons[forced]}; accepted are {', '.join(able)}")
    return forced


def run(
    out: Path,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    backend: str | None = None,
    rounds: int = TIMED_ROUNDS,
    console: Console | None = None,
) -> dict[str, object]:
    """Run the demo and write `FILES` into the folder `out`, over those of an earlier run.

    Args:
        recipe: what is trained, and how.
        seed: of initial weights and random views. On a CPU, seed and number of threads fix the result.
        device: `default_device()` if None.
        backend: forces a backend of `swin_kernels`; None lets it choose.
        rounds: timed runs of each piece of work.

    Returns:
        What ``results.json`` holds; ``doctor_passed`` says whether the doctor's checks passed.

    Raises:
        OSError: `out` cannot be written to.
        ValueError: `backend` is unknown or cannot run on `device`.
    """
    recipe, device, console = recipe or Recipe(), device or default_device(), console or Console()
    check_writable(out)
    paths = {kind: out / name for kind, name in FILES.items()}
    backend = choose_backend(recipe, device, backend)
    results: dict[str, object] = {"settings": report.settings(recipe, seed, device, backend)}

    report.heading(console, "Doctor")
    examination = doctor.run(quick=True)
    doctor.show(examination, console)
    results |= {"machine": examination.machine, "doctor_passed": examination.passed}

    learner, unseen = load_patient(2), load_patient(1)
    set_determinism(seed)
    with swin_kernels.use_backend(backend):
        report.heading(console, "Training on patient 2")
        report.settings_table(console, results["settings"])
        with report.TrainingBar(console, recipe.steps) as bar:
            model = train(learner, recipe, device, seed, on_step=bar.step)
        results["training"] = {"final_loss": bar.loss, "seconds_per_step": bar.seconds}

        report.heading(console, "Segmenting patient 1, not seen in training")
        logits = predict(model, unseen.image().to(device), recipe)
        prediction = logits.argmax(dim=0).to(torch.uint8).cpu().numpy()  # (X, Y, Z)
        results |= _judge(prediction, unseen)
        report.organ_table(console, results)
        _save_labels(prediction, unseen, paths["prediction"])
        overlay(unseen, prediction, results["dice"], paths["overlay"], "Trained on patient 2, segments patient 1")

        report.heading(console, "Beside MONAI")
        with report.timing_bar(console, timed_runs(rounds)) as advance:
            timings = compare(model, unseen, recipe, rounds, on_run=advance)
        results["timings"] = [asdict(t) | {"speedup": t.speedup, "rounds": rounds} for t in timings]
        report.timing_table(console, timings, rounds)

    report.write_json(results, paths["results"])
    report.files(console, paths)
    return results


def _judge(prediction: np.ndarray, patient: Patient) -> dict[str, object]:
    return {
        "labels": LABEL_NOTE,
        "dice": dice(prediction, patient.labels),
        "dice_of_bare_threshold": dice(bare_threshold(patient), patient.labels),
        "millilitres": patient.millilitres(prediction),
        "millilitres_of_labels": patient.millilitres(patient.labels),
    }


def _save_labels(labels: np.ndarray, patient: Patient, path: Path) -> None:
    """Write a label map ``(X, Y, Z)`` as uint8 NIfTI in the geometry of `patient`'s CT."""
    header = patient.header.copy()
    header.set_data_dtype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(labels, patient.affine, header), path)
