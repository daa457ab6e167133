"""`swin-kernels warmup`: it runs a model's blocks in parallel, and a block that fails does not affect the others."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swin_kernels import modules, warmup
from swin_kernels.cli import main
from swin_kernels.geometry import WindowGrid


def command_line(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "swin_kernels.cli", "warmup", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("extent", "window"), [(64, 7), (96, 7), (64, 5)])
def test_blocks_are_those_of_the_model(extent, window):
    """Exactly what decides the compiled kernels in each block of a real network, recorded as it runs."""
    from swin_unetr import SwinUNETR

    with torch.device("meta"):
        network = SwinUNETR(1, 2, feature_size=12, window_size=window)
    seen = set()

    def record(block: modules.SwinTransformerBlock, inputs: tuple[torch.Tensor, ...]) -> None:
        *_, channels = inputs[0].shape
        grid = WindowGrid.of(inputs[0].shape[1:-1], block.window_size, block.shift_size)
        head_dim = channels // block.attn.num_heads
        seen.add((head_dim, grid.tokens, grid.is_shifted, grid.is_padded, "float32", False))

    for module in network.modules():
        if isinstance(module, modules.SwinTransformerBlock):
            module.register_forward_pre_hook(record)
    with torch.no_grad():
        network.swinViT(torch.empty(1, 1, *[extent] * 3, device="meta"))
    blocks = warmup.blocks_of([extent] * 3, 12, window, dtype="float32", training=False)
    assert {block.kernels for block in blocks} == seen
    assert len(blocks) == len(seen)


def test_levels_are_those_of_the_model():
    """Shapes that `instance_norm_act` normalizes in a real network, recorded as it runs."""
    from swin_kernels import convolution_blocks
    from swin_unetr import SwinUNETR

    seen = set()

    def record(module, norm, x: torch.Tensor, *rest, **options) -> torch.Tensor:
        seen.add((tuple(x.shape[2:]), x.shape[1]))
        return x

    network = SwinUNETR(1, 2, feature_size=12, window_size=2)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution_blocks, "_norm_act", record)
        patch.setattr(convolution_blocks.ResidualBlock, "runs_fused", lambda self, x: True)
        network(torch.zeros(1, 1, 64, 64, 32))
    levels = warmup.levels_of((64, 64, 32), 12, dtype="float32", training=False)
    assert {(level.spatial, level.channels) for level in levels} == seen
    assert len(levels) == len(seen)


@pytest.mark.parametrize("image", [(32, 32), (32, 32, 32)])
def test_pieces_run_here(image):
    """In this process, forward and backward; the backend is named. Pieces are the same after a trip through JSON."""
    for piece in warmup.pieces_of(image, 12, dtype="float32"):
        again = warmup.read(json.loads(json.dumps(warmup.written(piece))))
        assert again == piece
        assert warmup.run(again, "cpu") in ("cpu", "reference")


def test_command_line():
    status, output = command_line(
        *("--image", "32", "32", "--window", "2", "--feature-size", "12", "--dtype", "float32", "--device", "cpu")
    )
    assert status == 0, output
    pieces = warmup.pieces_of((32, 32), 12, window_size=2, dtype="float32")
    assert [piece.grid.is_shifted for piece in pieces if isinstance(piece, warmup.Block)] == [False, True]
    lines = output.splitlines()
    assert len(lines) == len(pieces) + 1
    for piece in pieces:
        [line] = [line for line in lines if line.startswith(f"{piece}  ")]
        assert re.search(r"\d+\.\d s  on (cpu|reference)$", line)
    assert lines[-1].startswith(f"all {len(pieces)} are warm")


FAULTY = """
import os, signal, sys, time
print("said last", file=sys.stderr)
{
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "hang": lambda: (os.fork(), time.sleep(600)),
    "raise": lambda: 1 / 0,
    "end well": lambda: print("cpu"),
}[sys.argv[1]]()
"""


def alive_in(group: int) -> list[str]:
    """Processes of a group, without those that have ended but not been waited for."""
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                states.append(state)
    return states


def test_a_block_that_fails_costs_itself(monkeypatch, capsys):
    """One crashes, one hangs with a process it started, one raises, one ends well."""
    kinds = iter(("crash", "hang", "raise", "end well"))
    start, started = subprocess.Popen, []

    def faulty(command: list[str], **options) -> subprocess.Popen:
        started.append(start([sys.executable, "-c", FAULTY, next(kinds)], **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", faulty)
    blocks = [warmup.Block(1, (4, 4), 12 * n, 3, (4, 4), (0, 0)) for n in range(1, 5)]
    assert not warmup.show(warmup.warm_up(blocks, "cpu", jobs=4, limit=5), 4)
    lines = capsys.readouterr().out.splitlines()
    ends = {line.partition("  ")[0]: line.rpartition("FAILED: ")[2] for line in lines[:-1]}
    assert ends[str(blocks[0])] == "SIGSEGV: said last"
    assert ends[str(blocks[1])] == "not finished after 5 s"
    assert ends[str(blocks[2])] == "exit status 1: ZeroDivisionError: division by zero"
    assert ends[str(blocks[3])].endswith("s  on cpu")
    assert lines[-1].startswith("3 of 4 FAILED")
    assert not alive_in(started[1].pid)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--image", "96", "96", "100"), "argument --image: got 96 96 100; accepted are 2 or 3 multiples of 32"),
        (("--image", "96"), "argument --image: got 96; accepted are 2 or 3 multiples of 32"),
        (("--feature-size", "40"), "argument --feature-size: got 40; accepted are multiples of 12"),
        (("--window", "0"), "argument --window: got 0; accepted is at least 1"),
        (("--batch", "-1"), "argument --batch: got -1; accepted is at least 1"),
        (("--jobs", "0"), "argument --jobs: got 0; accepted is at least 1"),
        (("--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_bad_arguments(capsys, arguments, said):
    with pytest.raises(SystemExit) as error:
        main(["warmup", *arguments])
    assert error.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_says_that_there_is_no_device(capsys):
    with pytest.raises(SystemExit) as error:
        main(["warmup", "--device", "cuda"])
    assert error.value.code == 2
    assert "argument --device: got cuda, but there is no CUDA device; accepted is cpu" in capsys.readouterr().err
