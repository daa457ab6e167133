"""Every preset trains a tiny network for two steps on synthetic volumes with its modalities, spacing and labels."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from swin_unetr import checkpoints, cli
from swin_unetr.datasets import transforms

from . import synthetic

# Channels, label values and kind of image, as in the data sets.
DATA = {
    "brats21": (4, (1, 2, 4), "mr"),
    "btcv": (1, tuple(range(1, 14)), "ct"),
    "demo": (1, (1, 2), "ct"),
    "msd/task01_brain_tumour": (4, (1, 2, 3), "mr"),
    "msd/task02_heart": (1, (1,), "mr"),
    "msd/task03_liver": (1, (1, 2), "ct"),
    "msd/task04_hippocampus": (1, (1, 2), "mr"),
    "msd/task05_prostate": (2, (1, 2), "mr"),
    "msd/task06_lung": (1, (1,), "ct"),
    "msd/task07_pancreas": (1, (1, 2), "ct"),
    "msd/task08_hepatic_vessel": (1, (1, 2), "ct"),
    "msd/task09_spleen": (1, (1,), "ct"),
    "msd/task10_colon": (1, (1,), "ct"),
}
TINY = {
    "architecture.feature_size": "12",
    "architecture.depths": "[1, 1, 1, 1]",
    "roi": "[64, 32, 32]",
    "data.folds": "2",
    "data.workers": "0",
    "optimization.precision": "fp32",
    "schedule.epochs": "null",
    "schedule.steps": "2",
    "schedule.validate_every": "2",
    "schedule.checkpoint_every": "2",
    "device": "cpu",
}


def options(command: str, name: str, datalist: Path, out: Path, **overrides):
    words = {"data.datalist": datalist, "out": out, **overrides}
    argv = ["--preset", name, *(f"--{key}={value}" for key, value in words.items())]
    return cli.parse(cli.options_of(command), command, argv)


def test_every_preset_is_tested():
    assert cli.presets() == sorted([*DATA, "pretrain"])


@pytest.mark.parametrize("name", DATA)
def test_presets_train(name, tmp_path):
    channels, values, kind = DATA[name]
    shipped = options("train", name, tmp_path / "dataset.json", tmp_path / "run")
    transforms.draw(shipped.data, shipped.roi, labelled=True)  # its crops can be augmented as it says
    assert set(itertools.chain(*shipped.labels.classes.values())) == set(values)
    assert shipped.preprocessing.intensity == {"ct": "window", "mr": "zscore"}[kind]
    datalist = synthetic.dataset(
        tmp_path / "data",
        cases=2,
        channels=channels,
        values=values,
        spacing=shipped.preprocessing.spacing,
        kind=kind,
        split_files=name == "brats21",
    )
    content = train("train", name, datalist, tmp_path / "run")
    assert content["labels"]["classes"] == {name: list(group) for name, group in shipped.labels.classes.items()}


def test_the_preset_of_pretraining_trains(tmp_path):
    shipped = options("pretrain", "pretrain", tmp_path / "dataset.json", tmp_path / "run")
    datalist = synthetic.dataset(tmp_path / "data", cases=2, spacing=shipped.preprocessing.spacing)
    train("pretrain", "pretrain", datalist, tmp_path / "run")


def train(command: str, name: str, datalist: Path, out: Path) -> dict:
    """Train two steps; returns the file of weights."""
    tiny = options(command, name, datalist, out, **TINY)
    assert importlib.import_module(f"swin_unetr.{command}").run(tiny, Console(quiet=True)) == 0
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if line["event"] == "train"] == [1, 2]
    content = checkpoints.read(out / "best.pt").content
    assert all(torch.isfinite(value).all() for value in content["model"].values() if value.is_floating_point())
    return content
