"""Rows, how they are kept, and what follows from them. The numbers here are made up."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.verify_gpu import goals, sweeps
from benchmarks.verify_gpu.operators import STAGES
from benchmarks.verify_gpu.result import Result, Row, newest, replace_file, show

ABOUT = {"simulated": False, "commit": "abc", "device": None, "torch": "2.11"}
GPU = {"capability": "9.0", "device": "Some GPU", "commit": "abc"}
STAGE_1, STAGE_4 = str(STAGES[0]), str(STAGES[3])


def timed(measure: str, variant: str, p50: float, spread: float = 0.0, shape: str = STAGE_1, **other) -> Row:
    return Row("operators", measure, shape, variant, p20=p50 - spread / 2, p50=p50, p80=p50 + spread / 2, **other)


def test_rows_are_added_to_those_of_before(tmp_path):
    with closing(Result.open(tmp_path, ABOUT)) as first:
        first.add(timed("a", "ours", 1.0))
    second = Result.open(tmp_path, ABOUT)
    second.describe({"device": "Some GPU"})
    second.add(timed("b", "ours", 2.0))
    assert [row.measure for row in second.rows] == ["a", "b"]
    assert [row.measure for row in second.own] == ["b"]
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["measure"] for row in kept["rows"]] == ["a", "b"]
    assert kept["about"]["device"] == "Some GPU"


@pytest.mark.parametrize("changed", ["commit", "torch", "simulated"])
def test_rows_of_something_else_are_not_added_to(tmp_path, changed):
    with closing(Result.open(tmp_path, ABOUT)) as first:
        first.add(timed("a", "ours", 1.0))
    before = (tmp_path / "gpu.json").read_bytes()
    with pytest.raises(ValueError, match=f"holds rows of {changed} "):
        Result.open(tmp_path, {**ABOUT, changed: "another"})
    assert (tmp_path / "gpu.json").read_bytes() == before


def test_device_must_be_the_same(tmp_path):
    with closing(Result.open(tmp_path, ABOUT)) as first:
        first.describe({"device": "one"})
        first.add(timed("a", "ours", 1.0))
    with pytest.raises(ValueError, match="holds rows of device 'one', this run is of 'another'"):
        Result.open(tmp_path, ABOUT).describe({"device": "another"})


@pytest.mark.parametrize("content", ["", "{}", '{"about": {}, "rows": [{"no": "row"}]}'])
def test_what_is_no_result_is_left_alone(tmp_path, content):
    (tmp_path / "gpu.json").write_text(content)
    with pytest.raises(ValueError, match="is not a result that can be added to"):
        Result.open(tmp_path, ABOUT)
    assert (tmp_path / "gpu.json").read_text() == content


def test_newest():
    """A later row replaces an earlier fault, whichever kernel that was in; kernels of a call are separate rows."""
    fault = Row("operators", "a", STAGE_1, "ours", status="crashed: SIGSEGV", kernel="attend")
    sound = timed("a", "ours", 1.0)
    kernels = [timed("a, kernels", "ours", 1.0, kernel=name) for name in ("attend", "find_tokens")]
    assert newest([fault, sound, *kernels]) == [sound, *kernels]
    assert newest([sound, fault]) == [fault]


@pytest.mark.parametrize(
    ("status", "variant", "sound"),
    [
        ("ok", "ours", True),
        ("skipped: ncu was not found", "ours", True),
        ("wrong: error 1", "ours", False),
        ("cut: the time of this part was over", "Triton", False),
        ("crashed: SIGSEGV", "FlexAttention", True),
    ],
)
def test_sound(tmp_path, status, variant, sound):
    result = Result.open(tmp_path, ABOUT)
    assert not result.sound, "nothing ran"
    result.add(Row("operators", "a", STAGE_1, variant, status=status))
    assert result.sound == sound


def test_one_run_at_a_time(tmp_path):
    first = Result.open(tmp_path, ABOUT)
    with pytest.raises(ValueError, match="another run writes into"):
        Result.open(tmp_path, ABOUT)
    first.close()
    Result.open(tmp_path, ABOUT)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out cannot be written: "):
        Result.open(tmp_path / "file" / "out", ABOUT)


def test_old_content_is_there_until_the_new_is_whole(tmp_path, monkeypatch):
    file, write = tmp_path / "file", Path.write_bytes
    replace_file(file, b"old")
    seen = []

    def write_and_look(path: Path, content: bytes) -> None:
        write(path, content)
        seen.append(file.read_bytes())

    monkeypatch.setattr(Path, "write_bytes", write_and_look)
    replace_file(file, b"new")
    assert seen == [b"old"]
    assert file.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [file]


def test_full_disk(tmp_path, monkeypatch, capsys):
    """A row that could not be written is shown, and written with the next; existing files stay complete."""
    result = Result.open(tmp_path, ABOUT)
    result.add(timed("a", "ours", 1.0))
    before = (tmp_path / "gpu.json").read_bytes()

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(Path, "write_bytes", full)
        result.add(timed("b", "ours", 1.0))
    assert "No space left on device" in capsys.readouterr().out
    assert not result.sound
    assert (tmp_path / "gpu.json").read_bytes() == before
    result.add(timed("c", "ours", 1.0))
    assert result.sound
    assert [row["measure"] for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]] == ["a", "b", "c"]


def test_full_output(monkeypatch):
    """Like a log on a full disk: whatever follows is dropped."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        show("a row")
        assert os.fstat(full.fileno()).st_rdev == os.stat(os.devnull).st_rdev
        show("another")


def test_nobody_reads(monkeypatch):
    """As before ``| head``: whatever follows is dropped."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        show("a row")
        show("another")


def test_output_that_is_held(monkeypatch):
    """Like a terminal after Ctrl-S: lines are dropped, nothing waits; they come again when there is room."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    with os.fdopen(writing, "w") as held:
        monkeypatch.setattr(sys, "stdout", held)
        show("left out")
        os.read(reading, 1 << 20)
        show("shown")
    with os.fdopen(reading) as read:
        assert read.read().strip("\0") == "shown\n"


def test_margin_is_twice_the_wider_spread():
    slow = timed("a", "ours", 1.0, spread=0.1)
    assert sweeps.is_faster(timed("a", "Triton", 0.79, spread=0.02), slow)
    assert not sweeps.is_faster(timed("a", "Triton", 0.81, spread=0.02), slow)
    assert not sweeps.is_faster(timed("a", "Triton", 0.5, spread=0.3), slow)


def test_preferences():
    rows = [
        timed("attention core, forward", "ours", 1.0, 0.01),
        timed("attention core, forward", "Triton", 0.9, 0.01),
        timed("attention core, backward", "ours", 1.0, 0.1),
        timed("attention core, backward", "Triton", 0.9, 0.01),
        timed("attention core, forward", "ours", 1.0, 0.01, STAGE_4),
        timed("attention core, forward", "Triton", 1.5, 0.01, STAGE_4),
    ]
    [line] = sweeps.preferences(rows, GPU)
    assert line == (
        "Measured(capability=(9, 0), backward=False, dtype_bytes=2, head_dim=16, tokens=(343, 343), backend='triton', "
        f"ours_ms=1.0, theirs_ms=0.9, source='{STAGE_1}, Some GPU, commit abc'),\n"
    )


def test_preferences_compare_within_a_process():
    """Ours is measured again later, beside FlexAttention: that time is not compared with Triton's earlier one."""
    rows = [
        timed("attention core, forward", "ours", 1.0, 0.01),
        timed("attention core, forward", "Triton", 1.1, 0.01),
        timed("attention core, forward", "ours", 1.3, 0.01),
        timed("attention core, forward", "FlexAttention", 2.0, 0.01),
    ]
    assert sweeps.preferences(rows, GPU) == []


def test_tile_table(tmp_path):
    """The format of `SWIN_KERNELS_TILES`, with the fastest of the tiles that beat their default."""
    tiles = pytest.importorskip("swin_kernels.backends.triton.tiles", reason="Triton is not installed")
    fast, faster = (tiles.Tile(rows, 32, warps=4, stages=2, programs=4) for rows in (32, 128))
    rows = [
        timed("sweep triton, forward", "ours", 1.0, 0.01, f"{STAGE_1}, from 0"),
        timed("sweep triton, forward", sweeps.named(fast), 0.9, 0.01, f"{STAGE_1}, from 0"),
        timed("sweep triton, forward", "ours", 1.0, 0.01, f"{STAGE_1}, from 8"),
        timed("sweep triton, forward", sweeps.named(faster), 0.8, 0.01, f"{STAGE_1}, from 8"),
        timed("sweep triton, backward", "ours", 1.0, 0.01, f"{STAGE_1}, from 0"),
        timed("sweep triton, backward", sweeps.named(fast), 0.99, 0.01, f"{STAGE_1}, from 0"),
    ]
    assert sweeps.tile_table(rows[4:], GPU) is None
    (tmp_path / "tiles.json").write_text(sweeps.tile_table(rows, GPU))
    [(key, tile)] = tiles.load(tmp_path / "tiles.json")
    assert tile == faster
    assert key == tiles.Key("forward", architecture=90, element_size=2, channels=16, tokens=352)


def test_goals():
    rows = [
        timed("attention core, forward", "ours", 0.06, floor=0.04),
        timed("attention core, backward", "ours", 0.15, floor=0.06),
        timed("attention core, backward", "Triton", 0.14, ratio=0.14 / 0.15),
        timed("attention core, forward", "FlexAttention", 0.15, ratio=2.5),
        timed("attention branch, forward", "plain PyTorch", 2.1, ratio=21.0),
        timed("window partition", "copy of as many bytes", 0.1, ratio=0.9),
        timed("model, inference", "ours in a CUDA graph", 7.0, shape=goals.MODEL),
        timed("model, inference", "MONAI", 31.5, shape=goals.MODEL),
        timed("model, training step", "MONAI", 80.0, shape=goals.MODEL, extra_mib=4000.0),
        timed("model, training step", "ours", 30.0, shape=goals.MODEL, extra_mib=2400.0),
    ]
    states = {wording: (figure, state) for wording, figure, state in goals.states(rows)}
    branch = "what MONAI computes, in plain PyTorch, takes at least"
    assert states == {
        f"attention core, forward, {STAGE_1}: at most 1.6 floors": ("1.50 floors", "met"),
        f"attention core, backward, {STAGE_1}: at most 2.2 floors": ("2.50 floors", "missed"),
        f"attention core, forward, {STAGE_1}: compiled FlexAttention takes at least 3 times as long": (
            *("2.50×", "missed"),
        ),
        f"attention core, backward, {STAGE_1}: compiled FlexAttention takes at least 3 times as long": (
            *("–", "unmeasured"),
        ),
        f"attention branch, forward, {STAGE_1}: {branch} 20 times as long": ("21.00×", "met"),
        f"attention branch, forward, {STAGE_1}: SDPA takes at least 6 times as long": ("–", "unmeasured"),
        f"attention branch, forward + backward, {STAGE_1}: {branch} 10 times as long": ("–", "unmeasured"),
        f"window partition, {STAGE_1}: at least 85% of a copy's bandwidth": ("90%", "met"),
        f"window reverse, {STAGE_1}: at least 85% of a copy's bandwidth": ("–", "unmeasured"),
        f"inference in a CUDA graph, {goals.MODEL}: MONAI takes at least 4 times as long": ("4.50×", "met"),
        f"training step in a CUDA graph, {goals.MODEL}: MONAI takes at least 3 times as long": ("–", "unmeasured"),
        f"memory of a training step, {goals.MODEL}: at most 50% of what MONAI needs": ("60%", "missed"),
        "no slower than Triton at any stage in either direction": ("0 of 1", "missed"),
    }
