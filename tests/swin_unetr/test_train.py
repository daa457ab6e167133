"""`swin-unetr train` from its command line to its files, what its loop does in one step, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from monai.losses import DiceCELoss, DiceLoss
from rich.console import Console
from torch import nn

from swin_unetr import SwinUNETR, checkpoints, cli, interruption, load_pretrained, train
from swin_unetr.datasets.identity import digest, identify
from swin_unetr.labels import Labels
from swin_unetr.pretraining.network import PretrainingNetwork
from swin_unetr.training import log, resume
from swin_unetr.training.deep_supervision import DeeplySupervised
from swin_unetr.training.learning_rate import warm_up_and_cosine
from swin_unetr.training.losses import parts as loss_parts
from swin_unetr.training.options import Optimization, Schedule
from swin_unetr.training.segmentation import Loss, Segmentation, Validation

from . import synthetic
from .toy import Toy, ToyBatches, final, loop

TINY = {"in_channels": 1, "out_channels": 3, "feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}


# --- the command ---


@pytest.fixture(scope="module")
def datalist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return synthetic.dataset(folder, cases=4, shape=(66, 36, 34), values=(1, 2))


def arguments(datalist, out, **more) -> list[str]:
    options = {
        "data.datalist": datalist,
        "data.folds": 2,
        "data.workers": 0,
        "data.crops_per_volume": 1,
        "labels.classes": "{organ: [1], tumour: [2]}",
        "out": out,
        "preprocessing.spacing": "null",
        "roi": "[64, 32, 32]",
        "schedule.steps": 4,
        "schedule.validate_every": 2,
        "schedule.checkpoint_every": 2,
        "validation.overlap": 0,
        "optimization.precision": "fp32",  # in which a run is the same bit for bit
        "device": "cpu",
        **{f"architecture.{name}": list(v) if isinstance(v, tuple) else v for name, v in TINY.items()},
        **more,
    }
    return ["train", *(f"--{name}={value}" for name, value in options.items())]


def test_a_run_from_the_command_line(datalist, tmp_path, capsys):
    """From pretrained weights, with dropout everywhere; a signal interrupts its third step, then it resumes."""
    encoder = SwinUNETR(**TINY).swinViT
    checkpoints.write(
        tmp_path / "pretrained.pt", {"kind": "pretrain", "model": PretrainingNetwork(encoder, 1).state_dict()}
    )
    options = {
        "initial": tmp_path / "pretrained.pt",
        "data.workers": 1,
        "loss.deep_supervision": 1,
        "optimization.ema": 0.5,
        **{f"architecture.{name}": 0.2 for name in ("drop_rate", "attn_drop_rate", "dropout_path_rate")},
    }
    command = arguments(datalist, tmp_path / "run", **options)
    losses, calls = Segmentation.losses, []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Segmentation, "losses", interrupted)
        patch.setattr(interruption, "PATIENCE", 600.0)  # on a busy machine a slow step would be abandoned
        assert cli.main(command) == 75
    assert "swinViT (" in capsys.readouterr().out  # what of the pretrained weights matched
    (tmp_path / "pretrained.pt").rename(tmp_path / "moved.pt")
    assert cli.main([*command, f"--initial={tmp_path / 'moved.pt'}"]) == 0
    said = capsys.readouterr().out
    assert "continuing from" in said
    assert "step-00000003.pt" in said

    (tmp_path / "moved.pt").rename(tmp_path / "pretrained.pt")
    best, last = checkpoints.read(tmp_path / "run" / "best.pt").content, final(tmp_path / "run")
    assert cli.main(arguments(datalist, tmp_path / "whole", **options)) == 0
    whole = final(tmp_path / "whole")
    for key in ("model", "ema", "progress", "training"):
        assert checkpoints.checksum(last[key]) == checkpoints.checksum(whole[key])
    assert set(last) == set(best) | {"training"}
    assert best["kind"] == "train"
    assert best["labels"] == {"classes": {"organ": [1], "tumour": [2]}, "overlapping": False}
    assert best["roi"] == [64, 32, 32]
    assert best["config"]["data"]["datalist"] == str(datalist)
    assert best["preprocessing"]["spacing"] is None
    initial = last["provenance"]["initial"]
    assert initial["source"] == str(tmp_path / "pretrained.pt")
    assert len(initial["loaded"]) == len(encoder.state_dict())
    network = SwinUNETR(**TINY)
    network.load_state_dict(best["ema"])
    assert not load_pretrained(network, tmp_path / "run" / "best.pt", verbose=False).unexpected

    lines = log.read(tmp_path / "run")
    assert [line["step"] for line in lines if line["event"] == "train"] == [1, 2, 3, 4]
    validations = [line for line in lines if line["event"] == "validation"]
    assert [line["step"] for line in validations] == [2, 4]
    assert set(validations[0]) == {"event", "step", "dice", "dice of organ", "dice of tumour", "seconds"}
    assert all(0 < line["data_fraction"] < 1 for line in lines if line["event"] == "train")
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_another_configuration_does_not_go_on(datalist, tmp_path, capsys):
    one_step = {"schedule.steps": 1, "data.folds": 1}
    assert cli.main(arguments(datalist, tmp_path, **one_step)) == 0
    assert (
        checkpoints.read(tmp_path / "best.pt").content["progress"]["best"] is None
    )  # nothing to validate on: the last
    capsys.readouterr()
    assert cli.main(arguments(datalist, tmp_path, **one_step, seed=1, **{"loss.kind": "dice"})) == 2
    said = capsys.readouterr().err
    assert "loss.kind was dice_ce and is dice; seed was 0 and is 1" in said
    assert "data" not in said.partition("other options")[2]
    assert cli.main(arguments(datalist, tmp_path, **one_step, resume="never")) == 2
    assert "resume is 'never' and" in capsys.readouterr().err
    assert cli.main(arguments(datalist, tmp_path, **one_step, **{"data.workers": 1, "schedule.keep": 1})) == 0
    assert "best.pt: is gone" not in capsys.readouterr().out
    (tmp_path / "best.pt").unlink()
    assert cli.main(arguments(datalist, tmp_path, **one_step)) == 0
    assert "best.pt: is gone; the next validation writes it again" in capsys.readouterr().out
    assert checkpoints.read(tmp_path / "best.pt").content["progress"]["step"] == 1


def test_the_same_data_elsewhere_go_on(datalist, tmp_path, capsys):
    """Moved, and listed in another order, in a file with another name, which gives the split as folds."""
    one_step = {"schedule.steps": 1, "validation.overlap": 0}
    assert cli.main(arguments(datalist, tmp_path / "run", **one_step)) == 0
    moved = tmp_path / "moved"
    shutil.copytree(datalist.parent, moved)
    content = json.loads(datalist.read_text())
    of_validation = set(checkpoints.read(tmp_path / "run" / "best.pt").content["data"]["validation"])
    assert len(of_validation) == 2
    for case in content["training"]:
        case["fold"] = 3 if Path(case["image"]).name.partition(".")[0] in of_validation else 1
    content["training"].reverse()
    (moved / "dataset.json").unlink()
    (tmp_path / "list.json").write_text(json.dumps(content))
    elsewhere = {"data.root": moved, "data.fold": 3, "data.cache": "none", "schedule.steps": 2}
    capsys.readouterr()
    assert cli.main(arguments(tmp_path / "list.json", tmp_path / "run", **one_step | elsewhere)) == 0
    assert "schedule.steps was 1 and is 2" in capsys.readouterr().out
    assert final(tmp_path / "run")["progress"]["step"] == 2

    for case in content["training"]:
        case["fold"] = 4 - case["fold"]
    (tmp_path / "list.json").write_text(json.dumps(content))
    label = moved / content["training"][0]["label"]
    label.write_bytes(label.read_bytes()[:-1] + b"x")
    assert cli.main(arguments(tmp_path / "list.json", tmp_path / "run", **one_step | elsewhere)) == 2
    said = capsys.readouterr().err
    assert "were trained on and are validated on; cases" in said
    assert "were validated on and are trained on; cases case_03 have other files; continue" in said


@pytest.mark.parametrize(
    ("then", "now", "says"),
    [
        ({"training": {"a": "1", "b": "2"}}, {"training": {"b": "2", "a": "1"}}, []),
        ({"training": {"a": "1"}}, {"training": {"a": "1", "b": "1"}}, ["cases b are new in the data"]),
        ({"training": dict.fromkeys("abcde", "1")}, {}, ["cases a, b, c and 2 more are gone from the data"]),
        ({"training": {"a": "1"}}, {"training": {"a": "2"}}, ["cases a have other files"]),
        ({"training": {"a": "1"}}, {"validation": {"a": "1"}}, ["cases a were trained on and are validated on"]),
    ],
)
def test_what_of_the_data_differs(then, now, says):
    assert resume.other_cases(then, now) == says


@pytest.mark.parametrize("place", [0, 500_000, 999_999])
def test_a_file_is_told_by_its_content_and_not_by_its_place(tmp_path, place):
    """A changed block in an uncompressed volume, as in an edited label map."""
    whole = np.random.default_rng(0).bytes(1_000_000)
    digests = []
    for name, content in (("a", whole), ("b", whole), ("c", whole[:place] + bytes(100_000) + whole[place + 100_000 :])):
        (tmp_path / name).write_bytes(content[: len(whole)])
        digests.append(digest((tmp_path / name,)))
    assert digests[0] == digests[1] != digests[2]


def test_an_archive_of_a_data_set_is_the_data_set(datalist, tmp_path):
    with tarfile.open(tmp_path / "Task01.tar", "w") as file:
        file.add(datalist.parent, "Task01")
    said = []
    of_folder, of_archive = (
        identify(train.Data(path, folds=2), labelled=True, say=said.append)
        for path in (datalist, tmp_path / "Task01.tar")
    )
    assert of_archive == of_folder
    assert len(said) == 1
    assert "unpacking" in said[0]


def test_the_order_of_classes_is_that_of_channels():
    then, now = ({"labels": {"classes": classes}} for classes in ({"a": [1], "b": [2]}, {"b": [2], "a": [1]}))
    assert resume.differences(then, now) == ["labels.classes was a [1], b [2] and is b [2], a [1]"]


def test_the_users_file_of_options_stays(datalist, tmp_path, capsys):
    """It lies where the run's own would."""
    own = tmp_path / "config.yaml"
    own.write_text("# a note of mine\nseed: 3\ndata: {folds: 1}\n")
    before = own.read_bytes()
    command = [*arguments(datalist, tmp_path, **{"schedule.steps": 1}), f"--config={own}"]
    for _ in range(2):
        assert cli.main(command) == 0
        assert "config.yaml says other options and stays as it is; those of this run: config-1.yaml" in (
            capsys.readouterr().out
        )
    assert own.read_bytes() == before
    assert not (tmp_path / "config-2.yaml").exists()
    assert checkpoints.read(tmp_path / "best.pt").content["config"] == yaml.safe_load(
        (tmp_path / "config-1.yaml").read_text()
    )


def test_a_full_disk_is_said(datalist, tmp_path, capsys, monkeypatch):
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda whole, file: save(whole, open("/dev/full", "wb", buffering=0)))  # noqa: SIM115
    assert cli.main(arguments(datalist, tmp_path, **{"schedule.steps": 1, "data.folds": 1})) == 2
    assert "best.pt: cannot be written" in capsys.readouterr().err


def test_initial_weights_that_cannot_be_used(datalist, tmp_path, capsys):
    whole = tmp_path / "whole.pt"
    checkpoints.write(whole, {"kind": "train", "model": SwinUNETR(**TINY).state_dict()})
    cut = tmp_path / "cut.pt"
    cut.write_bytes(whole.read_bytes()[:5000])
    assert cli.main(arguments(datalist, tmp_path / "run", initial=cut)) == 2
    assert f"initial: {cut} cannot be read" in capsys.readouterr().err
    assert cli.main(arguments(datalist, tmp_path / "run", initial=tmp_path / "none.pt")) == 2
    assert "initial: there is no file" in capsys.readouterr().err
    assert cli.main(arguments(datalist, tmp_path / "run", initial=whole, **{"architecture.feature_size": 24})) == 2
    assert "was it made with another feature_size" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run(datalist, tmp_path, capsys, monkeypatch):
    losses = Segmentation.losses

    def bad(self, network, batch, random):
        return {name: value * math.nan for name, value in losses(self, network, batch, random).items()}

    monkeypatch.setattr(Segmentation, "losses", bad)
    assert cli.main(arguments(datalist, tmp_path)) == 1
    assert "swin-unetr train: step 1: loss nan, dice nan, cross_entropy nan, norm" in capsys.readouterr().err
    assert not checkpoints.series(tmp_path / "checkpoints")


# --- a step ---


def test_the_loss_falls(tmp_path):
    loop(tmp_path, schedule=Schedule(steps=60), precision="bf16").run()
    losses = [line["loss"] for line in log.read(tmp_path) if line["event"] == "train"]
    assert sum(losses[-5:]) < 0.1 * sum(losses[:5])


def test_accumulated_batches_are_one_large_batch(tmp_path):
    class Halves(ToyBatches):
        def stream(self, start):
            for number, batch in enumerate(super().stream(start // 2)):
                for part in range(2)[start % 2 if not number else 0 :]:
                    yield {name: value[part::2] for name, value in batch.items()}

    schedule = Schedule(steps=5, validate_every=5)
    assert loop(tmp_path / "whole", Toy(noisy=False), ToyBatches(), schedule).run()
    assert loop(tmp_path / "halves", Toy(noisy=False), Halves(), schedule, accumulation=2).run()
    whole, halves = final(tmp_path / "whole"), final(tmp_path / "halves")
    torch.testing.assert_close(halves["model"], whole["model"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gradients_are_clipped_at_their_true_length(tmp_path, precision):
    """Under fp16 they are larger by the loss scale until they are unscaled."""
    clip = 0.01
    made = loop(tmp_path, Toy(noisy=False), schedule=Schedule(steps=1), precision=precision, clip=clip)
    if precision == "fp16":
        made.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # at which nothing overflows
    seen = []
    made.optimizer.register_step_pre_hook(
        lambda *_: seen.append(nn.utils.get_total_norm([p.grad for p in made.network.parameters()]).item())
    )
    made.run()
    (line,) = [line for line in log.read(tmp_path) if line["event"] == "train"]
    assert line["gradient_norm"] == pytest.approx(made_norm(), rel=0.05)
    assert line["gradient_norm"] > 10 * clip
    assert seen == [pytest.approx(clip, rel=1e-3)]


def made_norm() -> float:
    """The norm of the first gradient, in float32 and without the loop."""
    task = Toy(noisy=False)
    task.losses(task.network, next(ToyBatches().stream(0)), None)["loss"].backward()
    return nn.utils.get_total_norm([parameter.grad for parameter in task.network.parameters()]).item()


def test_an_infinite_gradient_of_a_finite_loss_is_an_error(tmp_path):
    class Steep(Toy):
        def losses(self, network, batch, random):
            found = network(batch["image"])
            return {"loss": (found - found.detach()).abs().sqrt().sum()}

    with pytest.raises(FloatingPointError, match=r"step 1: loss 0, norm of the gradient (nan|inf) on rank 0"):
        loop(tmp_path, Steep(noisy=False)).run()


def test_a_loss_that_is_not_finite_is_no_step_for_the_scaler_to_skip(tmp_path):
    class Bad(Toy):
        def losses(self, network, batch, random):
            return {"loss": super().losses(network, batch, random)["loss"] * math.nan}

    with pytest.raises(FloatingPointError, match="step 1: loss nan"):
        loop(tmp_path, Bad(), precision="fp16").run()


def test_learning_rate_rises_and_falls():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = warm_up_and_cosine(optimizer, 100, 0.1)
    rates = []
    for step in range(100):
        rates.append(schedule.get_last_lr()[0])
        again = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
        assert warm_up_and_cosine(again, 100, 0.1, done=step).get_last_lr() == rates[-1:]
        assert again.param_groups[0]["lr"] == rates[-1]
        optimizer.step()
        schedule.step()
    assert rates[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert rates[10:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * step / 90) for step in range(90)])


def test_waiting_for_data_is_logged(tmp_path):
    class Slow(Toy):
        def losses(self, *given):
            time.sleep(0.3)
            return super().losses(*given)

    def parts(task, seconds):
        out = tmp_path / type(task).__name__
        batches = ToyBatches(before=lambda number: time.sleep(seconds))
        loop(out, task, batches, Schedule(steps=3)).run()
        return [line["data_fraction"] for line in log.read(out) if line["event"] == "train"]

    assert max(parts(Toy(), 0.3)) > 0.6
    assert min(parts(Slow(), 0.0)) < 0.4


def test_epochs_are_steps():
    assert Schedule(epochs=10).total(batches_per_epoch=7, accumulation=2) == 35
    assert Schedule(epochs=1).total(batches_per_epoch=7, accumulation=2) == 4
    assert Schedule(steps=3).total(7, 2) == 3


# --- validation ---


def test_validation_does_not_move_training(tmp_path):
    """It may draw random numbers without affecting dropout in training."""
    for every in (1, 6):
        schedule = Schedule(steps=6, validate_every=every, checkpoint_every=6)
        assert loop(tmp_path / str(every), schedule=schedule).run()
    often, once = (final(tmp_path / str(every)) for every in (1, 6))
    assert checkpoints.checksum(often["model"]) == checkpoints.checksum(once["model"])


def test_the_best_stays_and_patience_ends(tmp_path):
    schedule = Schedule(steps=100, validate_every=2, checkpoint_every=100, patience=2)
    task = Toy(figures=[0.5, 0.2, 0.3, 0.4, 0.1])
    assert loop(tmp_path, task, schedule=schedule).run()
    best, last = checkpoints.read(tmp_path / "best.pt").content, final(tmp_path)
    assert best["progress"]["best"] == {"step": 4, "error": 0.2}
    assert best["progress"]["step"] == 4
    assert last["progress"]["step"] == 8
    assert not torch.equal(best["model"]["0.weight"], last["model"]["0.weight"])


def test_a_figure_that_is_not_a_number_is_no_best(tmp_path):
    schedule = Schedule(steps=3, validate_every=1, checkpoint_every=3)
    assert loop(tmp_path, Toy(figures=[math.nan, 0.5, math.nan]), schedule=schedule).run()
    assert checkpoints.read(tmp_path / "best.pt").content["progress"]["best"] == {"step": 2, "error": 0.5}
    assert [line["error"] for line in log.read(tmp_path) if line["event"] == "validation"] == [None, 0.5, None]


def test_the_average_is_what_is_validated(tmp_path):
    class Seen(Toy):
        def scores(self, core):
            self.seen = {name: value.clone() for name, value in core.state_dict().items()}
            return super().scores(core)

    task = Seen()
    assert loop(tmp_path, task, schedule=Schedule(steps=3), ema=0.5).run()
    last = final(tmp_path)
    assert checkpoints.checksum(task.seen) == checkpoints.checksum(last["ema"])
    assert checkpoints.checksum(last["ema"]) != checkpoints.checksum(last["model"])


def test_dice_of_whole_cases():
    """One case has both classes, of which half and all are found; the other has only one, which is missed."""
    label = torch.zeros(1, 64, 64, 32)
    label[:, :10], label[:, 20:30] = 1, 2
    found = label.clone()
    found[:, 5:10] = 0
    other = torch.zeros_like(label)
    other[:, 40:50] = 1
    cases = [_Case({"image": found, "label": label}), _Case({"image": torch.zeros_like(other), "label": other})]

    class Reads(nn.Module):
        """Logits that say what the image says."""

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(9.0))

        def forward(self, image):
            return self.scale * F.one_hot(image[:, 0].long(), 3).movedim(-1, 1)

    options = train.TrainOptions(**_options())
    task = Segmentation(
        options.architecture, options.labels, options.preprocessing, (64, 64, 32), Loss(), Validation(), cases
    )
    figures = task.figures([task.scores(Reads())])
    assert figures["dice of organ"] == pytest.approx((2 / 3 + 0) / 2)
    assert figures["dice of tumour"] == pytest.approx(1.0)  # the other case has none of it
    assert figures["dice"] == pytest.approx((1 / 3 + 1) / 2)


class _Case:
    name = "case"

    def __init__(self, item):
        self.load = lambda: item


# --- losses ---


def test_losses_of_exclusive_classes_are_monais():
    labels = Labels({"organ": [1], "tumour": [4, 5]})
    logits, label = torch.randn(2, 3, 8, 8, 8), torch.randint(0, 6, (2, 1, 8, 8, 8))
    target = labels.target(label)
    parts = {name: part(logits, target.float()) for name, part in loss_parts(Loss("dice_ce"), False).items()}
    assert set(parts) == {"dice", "cross_entropy"}
    torch.testing.assert_close(sum(parts.values()), DiceCELoss(to_onehot_y=True, softmax=True)(logits, target))
    focal = loss_parts(Loss("dice_focal", gamma=0.0), False)["focal"](logits, target.float())
    torch.testing.assert_close(focal, F.cross_entropy(logits, target[:, 0]) / 3)  # a mean over channels, too


def test_losses_of_overlapping_classes_have_a_sigmoid_each():
    labels = Labels({"whole": [1, 2], "core": [2]}, overlapping=True)
    logits, label = torch.randn(2, 2, 8, 8, 8), torch.randint(0, 3, (2, 1, 8, 8, 8))
    target = labels.target(label)
    parts = {name: part(logits, target) for name, part in loss_parts(Loss("dice_ce"), True).items()}
    torch.testing.assert_close(parts["dice"], DiceLoss(sigmoid=True)(logits, target))
    torch.testing.assert_close(parts["cross_entropy"], F.binary_cross_entropy_with_logits(logits, target))
    focal = loss_parts(Loss("dice_focal", gamma=0.0), True)["focal"](logits, target)
    torch.testing.assert_close(focal, parts["cross_entropy"])


def test_deep_supervision_leaves_the_network_as_it_is():
    network = SwinUNETR(**TINY)
    image = torch.rand(1, 1, 64, 32, 32)
    names = list(network.state_dict())
    expected = network(image)
    supervised = DeeplySupervised(network, 3)
    outputs = supervised(image)
    assert [tuple(o.shape[1:]) for o in outputs] == [(3, 64, 32, 32), (3, 32, 16, 16), (3, 16, 8, 8), (3, 8, 4, 4)]
    torch.testing.assert_close(outputs[0], expected, rtol=0, atol=0)
    assert list(network.state_dict()) == names
    assert not any(module._forward_hooks for module in network.modules())
    # The coarsest head alone sends gradient below it, and none above.
    outputs[-1].square().sum().backward()
    assert network.decoder4.conv_block.conv1.conv.weight.grad.abs().sum() > 0
    assert network.decoder3.conv_block.conv1.conv.weight.grad is None


# --- options ---


def _options(**more) -> dict:
    return {
        "data": train.Data("x"),
        "labels": Labels({"organ": [1], "tumour": [2]}),
        "out": "x",
        "architecture": train.Architecture(**TINY),
    } | more


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"roi": (96, 96)}, r"roi is \(96, 96\); accepted are 3 multiples of 32"),
        ({"roi": (96, 96, 48)}, r"roi is \(96, 96, 48\); accepted are 3 multiples of 32"),
        ({"roi": (32, 32, 32)}, r"roi is \(32, 32, 32\), whose deepest feature map is a single voxel"),
        ({"labels": Labels({"organ": [1]})}, "out_channels is 3; accepted is 2: organ and the background"),
        ({"labels": Labels({"a": [1, 2], "b": [2]}, True)}, "out_channels is 3; accepted is 2: a, b$"),
        ({"resume": "always"}, "resume is 'always'; accepted are 'auto' and 'never'"),
    ],
)
def test_options_that_do_not_fit_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        train.TrainOptions(**_options(**more))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Optimization(learning_rate=0), "learning_rate is 0; accepted is a number above 0"),
        (lambda: Optimization(learning_rate=math.nan), "learning_rate is nan"),
        (lambda: Optimization(weight_decay=-1), "weight_decay is -1; accepted is a number ≥ 0"),
        (lambda: Optimization(accumulation=0), "accumulation is 0; accepted is a number of batches ≥ 1"),
        (lambda: Optimization(clip=0), "clip is 0; accepted is a norm above 0, or null"),
        (lambda: Optimization(precision="fp8"), "precision is 'fp8'"),
        (lambda: Optimization(ema=1.0), "ema is 1.0; accepted is 0 < decay < 1, or null"),
        (lambda: Optimization(parallel="dp"), "parallel is 'dp'"),
        (lambda: Optimization(parallel="fsdp", precision="fp16"), "precision is 'fp16' and parallel 'fsdp'"),
        (lambda: Schedule(steps=0), "steps is 0; accepted is a number ≥ 1"),
        (lambda: Schedule(warm_up=1.0), "warm_up is 1.0; accepted is a part of the steps"),
        (lambda: Loss(kind="ce"), "kind is 'ce'"),
        (lambda: Loss(deep_supervision=5), "deep_supervision is 5; accepted are 0 to 4"),
        (lambda: Loss(gamma=-1), "gamma is -1; accepted is a number ≥ 0"),
        (lambda: Validation(overlap=1), "overlap is 1; accepted is 0 ≤ overlap < 1"),
        (lambda: Validation(windows=0), "windows is 0; accepted is a number ≥ 1"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_checkpoint_of_another_command_is_refused(tmp_path):
    checkpoints.write(tmp_path / "checkpoints" / checkpoints.name(1), {"kind": "pretrain", "config": {}})
    with pytest.raises(ValueError, match="is a checkpoint of 'pretrain'; accepted is one of 'train'"):
        resume.find(tmp_path, "train", {}, fresh=False)


def test_the_terminal_line(tmp_path):
    """What the user sees of a step: loss, speed, memory and the remaining time."""
    with (tmp_path / "seen").open("w") as file:
        made = loop(tmp_path, batches=ToyBatches(before=lambda number: time.sleep(0.15)))
        made.console = Console(file=file, force_terminal=True, width=120, color_system=None)
        made.run()
    seen = (tmp_path / "seen").read_text()
    assert "/12 loss 0." in seen
    assert "voxels/s" in seen
    assert "GiB ETA 0:00:0" in seen
    assert "best so far" in seen
