"""An interrupted run that resumes equals the uninterrupted one bit for bit; and bad luck loses nothing."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import torch

from swin_unetr import checkpoints, interruption
from swin_unetr.training import log, precision, resume
from swin_unetr.training.options import Schedule

from ..toy import Toy, ToyBatches, WithHead, final, loop, resumed

EVERYTHING = {"ema": 0.9, "accumulation": 3, "clip": 0.5}


class Crash(Exception):
    pass


def crash_at(number: int):
    """Batches, of which the `number`-th kills the run."""

    def before(asked):
        if asked == number:
            raise Crash

    return ToyBatches(before=before)


def signal_at(number: int, which: signal.Signals):
    def before(asked):
        if asked == number:
            os.kill(os.getpid(), which)

    return ToyBatches(before=before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Checkpoint and log of an uninterrupted run, by the kind of its task."""
    results = {}
    for task in (Toy, WithHead):
        out = tmp_path_factory.mktemp("uninterrupted")
        assert loop(out, task(), **EVERYTHING).run()
        results[task] = final(out), log.read(out), checkpoints.read(out / "best.pt").content
    return results


def timeless(lines):
    """Log lines without what clocks measure."""
    clocked = ("seconds", "data_fraction", "voxels_per_second", "memory_gib")
    return [{name: value for name, value in line.items() if name not in clocked} for line in lines]


# Steps have three batches; checkpoints follow steps 3, 6, 9, 12, validations steps 4, 8, 12.
@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(9, id="right after a checkpoint"),
        pytest.param(13, id="inside accumulation, between validation and checkpoint"),
        pytest.param(26, id="inside accumulation, before validation and checkpoint"),
        pytest.param(35, id="the last batch"),
    ],
)
@pytest.mark.parametrize("task", [Toy, WithHead])
def test_a_crashed_run_goes_on_as_if_nothing_had_been(tmp_path, uninterrupted, batch, task):
    with pytest.raises(Crash):
        loop(tmp_path, task(), crash_at(batch), **EVERYTHING).run()
    torch.rand(100)  # another process: generators are in another state
    assert resumed(tmp_path, task(), **EVERYTHING).run()
    expected, lines, best = uninterrupted[task]
    assert checkpoints.checksum(final(tmp_path)) == checkpoints.checksum(expected)
    assert checkpoints.checksum(checkpoints.read(tmp_path / "best.pt").content) == checkpoints.checksum(best)
    assert timeless(log.read(tmp_path)) == timeless(lines)


@pytest.mark.parametrize(
    ("which", "batch"),
    [
        (signal.SIGTERM, 0),
        (signal.SIGTERM, 10),
        (signal.SIGTERM, 18),
        (signal.SIGTERM, 35),
        (signal.SIGUSR1, 10),
        (signal.SIGINT, 10),
        (signal.SIGHUP, 10),
    ],
)
def test_a_signal_saves_after_the_step_it_came_in(tmp_path, uninterrupted, batch, which):
    before = signal.getsignal(which)
    task = Toy()
    assert not loop(tmp_path, task, signal_at(batch, which), **EVERYTHING).run()
    assert signal.getsignal(which) == before
    step = batch // 3 + 1
    assert final(tmp_path)["progress"]["step"] == step
    assert task.validations == (step - 1) // 4  # a validation that was due waits for the resumed run
    assert resumed(tmp_path, **EVERYTHING).run()
    expected, lines, _ = uninterrupted[Toy]
    assert checkpoints.checksum(final(tmp_path)) == checkpoints.checksum(expected)
    assert timeless(log.read(tmp_path)) == timeless(lines)


@pytest.mark.parametrize("batch", [pytest.param(10, id="the first"), pytest.param(34, id="the last")])
def test_a_validation_that_is_repeated_is_logged_once(tmp_path, uninterrupted, batch, monkeypatch):
    """A run that begins with a validation dies before its checkpoint; the next run begins with it again."""
    assert not loop(tmp_path, Toy(), signal_at(batch, signal.SIGTERM), **EVERYTHING).run()

    def crash():
        raise Crash

    dies = resumed(tmp_path, **EVERYTHING)
    monkeypatch.setattr(dies, "save", crash)
    with pytest.raises(Crash):
        dies.run()
    assert "validation" in [line["event"] for line in log.read(tmp_path) if line["step"] == batch // 3 + 1]
    assert resumed(tmp_path, **EVERYTHING).run()
    assert timeless(log.read(tmp_path)) == timeless(uninterrupted[Toy][1])


def test_a_run_that_died_before_its_first_checkpoint_is_logged_once(tmp_path, uninterrupted):
    with pytest.raises(Crash):
        loop(tmp_path, Toy(), crash_at(4), **EVERYTHING).run()
    assert loop(tmp_path, **EVERYTHING).run()
    assert timeless(log.read(tmp_path)) == timeless(uninterrupted[Toy][1])


class Slow(Toy):
    """Its step 5, or its validations, get a signal and then take a minute."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.steps = where, 0

    def losses(self, network, batch, random):
        losses = super().losses(network, batch, random)
        self.steps += 1
        if self.where == "step" and self.steps == 3 * 5:
            self._take_long()
        return losses

    def scores(self, core):
        if self.where == "validation":
            torch.rand(7)
            self._take_long()
        return super().scores(core)

    def _take_long(self):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # as under torchrun
        time.sleep(60)


@pytest.mark.parametrize("where", ["step", "validation"])
def test_what_takes_long_is_broken_off(tmp_path, uninterrupted, monkeypatch, where):
    """It is saved within seconds, and the resumed run is as if nothing had happened."""
    monkeypatch.setattr(interruption, "PATIENCE", 0.3)
    started = time.monotonic()
    assert not loop(tmp_path, Slow(where), **EVERYTHING).run()
    assert time.monotonic() - started < 20
    assert final(tmp_path)["progress"]["step"] == 4
    assert resumed(tmp_path, **EVERYTHING).run()
    expected, lines, best = uninterrupted[Toy]
    assert checkpoints.checksum(final(tmp_path)) == checkpoints.checksum(expected)
    assert checkpoints.checksum(checkpoints.read(tmp_path / "best.pt").content) == checkpoints.checksum(best)
    assert timeless(log.read(tmp_path)) == timeless(lines)


def test_signals_while_a_checkpoint_is_written_do_not_cost_it(tmp_path, monkeypatch):
    save = torch.save

    def interrupted(whole, file):
        for which in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(os.getpid(), which)
        save(whole, file)

    monkeypatch.setattr(torch, "save", interrupted)
    assert not loop(tmp_path, None, signal_at(2, signal.SIGINT)).run()
    assert final(tmp_path)["progress"]["step"] == 3


def test_nothing_is_saved_of_no_step(tmp_path, monkeypatch):
    monkeypatch.setattr(interruption, "PATIENCE", 0.3)
    task = Slow("step")
    task.steps = 14
    assert not loop(tmp_path, task, **EVERYTHING).run()
    assert checkpoints.newest(tmp_path / "checkpoints") is None


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert loop(tmp_path, None, signal_at(2, signal.SIGHUP)).run()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_precision_does_not_go_on(tmp_path, monkeypatch):
    """Another machine may choose another precision."""
    short = Schedule(steps=1)
    assert loop(tmp_path, schedule=short, precision="bf16").run()
    with pytest.raises(ValueError, match=r"precision was bf16 and is fp32 here \(asked for: fp32\); accepted is bf16"):
        resumed(tmp_path, schedule=short, precision="fp32")
    for has_bf16 in (False, True):
        monkeypatch.setattr(precision, "has_bf16", lambda device, has=has_bf16: has)
        if has_bf16:
            resumed(tmp_path, schedule=short, precision="auto")
        else:
            with pytest.raises(ValueError, match=r"is fp32 here \(asked for: auto\)"):
                resumed(tmp_path, schedule=short, precision="auto")


def test_a_longer_schedule_goes_on_as_if_it_had_been_so_from_the_start(tmp_path):
    """Warm-up and decay of the learning rate depend on a run's length; from here on the weights follow them."""
    short, long = (Schedule(steps=steps, validate_every=4, checkpoint_every=4) for steps in (4, 12))
    assert loop(tmp_path, schedule=short).run()
    assert resumed(tmp_path, schedule=long).run()
    assert loop(tmp_path / "long", schedule=long).run()
    rates, of_long = (
        [line["learning_rate"] for line in log.read(out) if line["event"] == "train"]
        for out in (tmp_path, tmp_path / "long")
    )
    assert rates[4:] == of_long[4:]
    assert rates[3] < of_long[3]
    assert resumed(tmp_path, schedule=short).finished


def test_a_chain_of_short_runs(tmp_path, uninterrupted):
    """As under Slurm with a short time limit: every run does two steps."""
    assert not loop(tmp_path, None, signal_at(5, signal.SIGTERM), **EVERYTHING).run()
    for batch in range(11, 36, 6):
        assert not resumed(tmp_path, None, signal_at(batch, signal.SIGTERM), **EVERYTHING).run()
    assert resumed(tmp_path, **EVERYTHING).run()
    assert checkpoints.checksum(final(tmp_path)) == checkpoints.checksum(uninterrupted[Toy][0])


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_scaler_and_autocast_go_on_too(tmp_path, name):
    options = {"precision": name, "ema": 0.9}
    assert loop(tmp_path / "whole", **options).run()
    with pytest.raises(Crash):
        loop(tmp_path / "parts", None, crash_at(7), **options).run()
    assert resumed(tmp_path / "parts", **options).run()
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert (whole["training"]["scaler"] != {}) == (name == "fp16")
    assert checkpoints.checksum(whole) == checkpoints.checksum(parts)


def test_a_run_whose_first_steps_overflowed_goes_on(tmp_path):
    """The scaler skipped all steps before a checkpoint: the optimizer has counted none of them."""
    schedule = Schedule(steps=4, validate_every=4, checkpoint_every=1)

    def overflowing():
        made = loop(tmp_path, schedule=schedule, precision="fp16")
        made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        return made

    made = overflowing()
    made.batches.before = crash_at(1).before
    with pytest.raises(Crash):
        made.run()
    saved = final(tmp_path)
    assert saved["progress"]["skipped"] == 1
    assert all(of_weight["step"] == 0 for of_weight in saved["training"]["optimizer"]["state"].values())
    again = overflowing()
    again.restore(saved)
    assert again.scaler.get_scale() == 2.0**39
    assert again.run()


def test_the_newest_checkpoint_is_damaged(tmp_path, uninterrupted):
    with pytest.raises(Crash):
        loop(tmp_path, None, crash_at(20), **EVERYTHING).run()
    newest = checkpoints.series(tmp_path / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    found = resume.find(tmp_path, "train", {}, fresh=False)
    assert found.path.name == "step-00000003.pt"
    assert newest.name in found.damaged[0]
    assert resumed(tmp_path, **EVERYTHING).run()
    assert checkpoints.checksum(final(tmp_path)) == checkpoints.checksum(uninterrupted[Toy][0])


def test_a_damaged_checkpoint_does_not_cost_one_that_is_whole(tmp_path):
    """Only the newest stays; a damaged one of a later step does not count as the newest."""
    schedule = Schedule(steps=8, validate_every=8, checkpoint_every=2, keep=1)
    with pytest.raises(Crash):
        loop(tmp_path, None, crash_at(2), schedule).run()
    later = tmp_path / resume.CHECKPOINTS / checkpoints.name(6)
    later.write_bytes(b"damaged")
    assert "step-00000006.pt" in resume.find(tmp_path, "train", {}, fresh=False).damaged[0]
    with pytest.raises(Crash):
        resumed(tmp_path, None, crash_at(4), schedule).run()
    assert final(tmp_path)["progress"]["step"] == 4
    assert later.with_name("step-00000006.pt.damaged").read_bytes() == b"damaged"


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    save = torch.save

    def full(whole, file):
        save(whole, file if whole["progress"]["step"] < 6 else open("/dev/full", "wb", buffering=0))  # noqa: SIM115

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(checkpoints.NotSaved, match=r"step-00000006.pt: cannot be written: .*what was there before"):
        loop(tmp_path, **EVERYTHING).run()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003.pt"]
    assert final(tmp_path)["progress"]["step"] == 3


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(b'{"event": "train", "st', id="cut off"),
        b"17",
        b"null",
        b"{}",
        b'"text"',
        pytest.param(b"\xff\xfe", id="not UTF-8"),
        pytest.param(b'{"event": "train", "step": "3"}', id="a step that is text"),
        pytest.param(b'{"event": "train", "step": true}', id="a step that is true"),
        pytest.param(b"[" * 100_000, id="brackets"),
    ],
)
def test_a_line_that_is_none_is_dropped(tmp_path, damage):
    path = tmp_path / log.LINES
    lines = [{"event": "train", "step": step, "loss": 0.5} for step in (1, 2, 3)]
    path.write_bytes(b"\n".join([damage, *(json.dumps(line).encode() for line in lines), damage]))
    assert log.read(tmp_path) == lines
    log.Log(tmp_path, 2).close()
    assert [json.loads(text) for text in path.read_text().splitlines()] == lines[:2]


def test_only_so_many_checkpoints_stay(tmp_path):
    loop(tmp_path, schedule=Schedule(steps=9, validate_every=9, checkpoint_every=2, keep=2)).run()
    assert [path.name for path in checkpoints.series(tmp_path / "checkpoints")] == [
        "step-00000008.pt",
        "step-00000009.pt",
    ]
