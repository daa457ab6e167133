"""The whole way on the shipped CTs: pretrain, train, evaluate, predict, report."""

from __future__ import annotations

import json
import re
import shutil
import statistics

import pytest

from swin_unetr import checkpoints, cli
from swin_unetr.demo.data import folder
from swin_unetr.training import log

SMALL = [
    "--architecture.feature_size=12",
    "--architecture.depths=[1,1,1,1]",
    "--architecture.out_channels=3",
    "--preprocessing={spacing: [4.5, 4.5, 5.0], window: [-1000.0, 400.0], crop_foreground: false}",
    "--roi=[64,64,32]",
    "--device=cpu",
    f"--data.root={folder()}",
    "--data.workers=0",
    "--data.augmentation.rotate90=0",
]


def run(command: str, *options: str) -> None:
    assert cli.main([command, *map(str, options)]) == 0


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The folder in which all five commands ran, and their output."""
    out = tmp_path_factory.mktemp("way")
    unlabelled = {"training": [{"image": f"patient{number}_ct.nii.gz"} for number in (1, 2)]}
    labelled = {
        name: [{"image": f"patient{number}_ct.nii.gz", "label": f"patient{number}_labels.nii.gz"}]
        for name, number in (("training", 2), ("validation", 1))
    }
    for name, content in (("unlabelled", unlabelled), ("labelled", labelled)):
        (out / f"{name}.json").write_text(json.dumps(content))
    run(
        "pretrain",
        *SMALL,
        f"--data.datalist={out / 'unlabelled.json'}",
        "--data.folds=1",
        "--data.crops_per_volume=2",
        "--tasks.rotation_axes=[0,1]",
        "--optimization.learning_rate=2e-3",
        "--schedule={steps: 24, warm_up: 0.1}",
        f"--out={out / 'pretrained'}",
    )
    run(
        "train",
        *SMALL,
        f"--data.datalist={out / 'labelled.json'}",
        "--data.crops_per_volume=2",
        "--labels.classes={body: [1], lung: [2]}",
        "--optimization.learning_rate=2e-3",
        "--schedule={steps: 16, warm_up: 0.1, validate_every: 8}",
        f"--initial={out / 'pretrained' / 'best.pt'}",
        f"--out={out / 'trained'}",
    )
    run(
        "predict",
        f"--checkpoint=[{out / 'trained' / 'best.pt'}]",
        f"--input=[{folder() / 'patient1_ct.nii.gz'}]",
        f"--out={out / 'predicted'}",
        "--entropy=true",
        "--device=cpu",
    )
    (out / "labels").mkdir()
    shutil.copyfile(folder() / "patient1_labels.nii.gz", out / "labels" / "patient1_ct.nii.gz")
    run("evaluate", f"--predictions={out / 'predicted'}", f"--labels={out / 'labels'}", f"--out={out / 'evaluated'}")
    return out


def losses(out, name: str) -> list[float]:
    return [line[name] for line in log.read(out) if line["event"] == "train"]


def test_the_losses_of_pretraining_fall(walked):
    for name in ("loss", "reconstruction"):
        found = losses(walked / "pretrained", name)
        assert statistics.fmean(found[-6:]) < 0.9 * statistics.fmean(found[:6]), (name, found)


def test_pretrained_weights_flow_into_training_and_are_counted(walked):
    pretrained, trained = (checkpoints.read(walked / name / "best.pt").content for name in ("pretrained", "trained"))
    encoder = [name for name in pretrained["model"] if name.startswith("swinViT.")]
    flowed = trained["provenance"]["initial"]
    assert flowed["source"] == str(walked / "pretrained" / "best.pt")
    assert sorted(flowed["loaded"]) == sorted(encoder)
    assert len(encoder) > 60
    assert all(not name.startswith("swinViT.") for name in flowed["missing"])


def test_training_segments_lungs(walked):
    found = losses(walked / "trained", "loss")
    assert statistics.fmean(found[-4:]) < 0.7 * statistics.fmean(found[:4])
    scored = json.loads((walked / "evaluated" / "evaluation.json").read_text())["scores"]["patient1_ct"]
    best = checkpoints.read(walked / "trained" / "best.pt").content["progress"]["best"]["dice"]
    # Validation scores the resampled grid, evaluation the image's own.
    assert statistics.fmean(score["dice"] for score in scored.values()) == pytest.approx(best, abs=0.1)
    assert scored["1"]["dice"] > 0.7


def test_the_report_shows_what_was_measured(walked):
    text = (walked / "predicted" / "report.html").read_text()
    volumes = json.loads((walked / "predicted" / "volumes.json").read_text())["patient1_ct"]["organs"]
    for organ in volumes:
        assert f"{organ['millilitres']:,.1f} ml" in text
    assert len(re.findall("data:image/png;base64", text)) == 2


def test_the_model_takes_most_of_a_step(walked):
    """The loader does not starve the training: with the cases in memory, a step waits little for data."""
    steps = [line for line in log.read(walked / "trained") if line["event"] == "train"][2:]
    assert statistics.median(line["data_fraction"] for line in steps) < 0.15
