"""`precision: auto`: what the hardware computes fast, the same on every rank, and reported."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from swin_unetr import cli, pretrain, train
from swin_unetr.training import log, precision
from swin_unetr.training.loop import Loop
from swin_unetr.training.options import Optimization, Schedule

from ..toy import Toy, ToyBatches


@pytest.mark.parametrize(("able", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bf16_where_the_processor_has_it(tmp_path, monkeypatch, able, expected):
    monkeypatch.setattr(precision, "has_bf16", lambda device: able)
    seen, say = [], io.StringIO()

    class Watched(Toy):
        def losses(self, network, batch, random):
            losses = super().losses(network, batch, random)
            seen.append(network[0](batch["image"]).dtype)  # of a convolution, as autocast has it
            return losses

    made = Loop(
        Watched(),
        ToyBatches(),
        Optimization(),
        Schedule(steps=1),
        out=tmp_path,
        device=torch.device("cpu"),
        console=Console(file=say, width=200),
    )
    made.run()
    assert seen[0] == expected
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[expected]
    assert say.getvalue().startswith(f"precision: {name} (this processor has {'' if able else 'no '}bfloat16")
    assert log.read(tmp_path)[0] == {"event": "start", "step": 0, "precision": name}
    assert not made.scaler.is_enabled()


def test_a_precision_that_was_asked_for_is_kept(monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda device: pytest.fail("nobody asked for the best"))
    for asked in ("fp32", "bf16", "fp16"):
        assert precision.chosen(asked, torch.device("cpu")) == asked


def test_ranks_of_unlike_hardware_compute_in_one_precision(monkeypatch):
    """A rank without bfloat16 makes all ranks compute in float32."""
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    monkeypatch.setattr("swin_unetr.distributed.any_rank", lambda flag, device: True)
    assert precision.chosen("auto", torch.device("cpu")) == "fp32"


def test_what_a_processor_has_is_what_the_system_says():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), ())
    assert precision.has_bf16(torch.device("cpu")) == bool({"avx512_bf16", "amx_bf16"} & set(flags))


def test_presets_leave_the_precision_to_the_hardware():
    for kind, command in ((train.TrainOptions, "train"), (pretrain.PretrainOptions, "pretrain")):
        for name in cli.presets(kind):
            options = cli.parse(kind, command, ["--preset", name, "--data.datalist", "x", "--out", "y"])
            assert options.optimization.precision == ("fp32" if name == "demo" else "auto"), name
