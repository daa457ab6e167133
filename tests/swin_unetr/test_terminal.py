"""A terminal that goes away, or was never there, does no harm; neither does a signal that comes early."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from swin_unetr import cli, interruption, predict, terminal, train

from . import toy_job
from .segmenter import checkpoint, nifti
from .toy import final

REPOSITORY = Path(__file__).parents[2]


def gone() -> object:
    """A stream whose reader has ended."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w", buffering=1)


def full() -> object:
    return open("/dev/full", "w", buffering=1)


STREAMS = [
    pytest.param(gone, id="no reader"),
    pytest.param(
        full, id="full", marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
    ),
]


@pytest.mark.parametrize("stream", STREAMS)
def test_output_that_nobody_reads_is_no_error(stream, monkeypatch, capsys):
    with stream() as out:
        monkeypatch.setattr(sys, "stdout", out)
        with terminal.lasting():
            print("a line")
            print("another")
            assert subprocess.run(["echo", "a child's"], stdout=out.fileno()).returncode == 0
        assert sys.stdout is out
    said = capsys.readouterr().err
    assert said.count("standard output cannot be written to") == 1


def test_without_any_output(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, gone())
    with terminal.lasting():
        print("a line")
        print("an error", file=sys.stderr)
        sys.stdout.flush()


def test_a_character_that_the_terminal_lacks_is_escaped(monkeypatch, tmp_path):
    with (tmp_path / "out").open("w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with terminal.lasting():
            print("Gr\u00f6\u00dfe \u2265 1")
    assert (tmp_path / "out").read_text() == r"Gr\xf6\xdfe \u2265 1" + "\n"


@pytest.mark.parametrize("stream", STREAMS)
def test_training_goes_on_without_a_terminal(stream, monkeypatch, tmp_path):
    with stream() as out:
        monkeypatch.setattr(sys, "stdout", out)
        with terminal.lasting():
            assert toy_job.run(toy_job.ToyOptions(tmp_path)) == 0
    assert final(tmp_path)["progress"]["step"] == 8


@pytest.mark.parametrize("stream", STREAMS)
def test_predict_writes_all_without_a_terminal(stream, monkeypatch, tmp_path):
    weights, images = checkpoint(tmp_path / "x.pt"), tmp_path / "images"
    images.mkdir()
    nifti(images / "a.nii.gz")
    with stream() as out:
        monkeypatch.setattr(sys, "stdout", out)
        command = ["predict", f"--checkpoint=[{weights}]", f"--input=[{images}]", f"--out={tmp_path / 'out'}"]
        assert cli.main([*command, "--device=cpu", "--windows.overlap=0"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "a.nii.gz", "volumes.csv", "volumes.json", "report.html",
    }  # fmt: skip


@pytest.mark.parametrize(("which", "status"), [(signal.SIGHUP, 75), (signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_predict_writes_what_is_done_when_a_signal_comes(which, status, monkeypatch, tmp_path):
    weights, images = checkpoint(tmp_path / "x.pt"), tmp_path / "images"
    images.mkdir()
    for name in "abc":
        nifti(images / f"{name}.nii.gz")
    one = predict._case

    def interrupted(source, *others):
        if source.name == "b":
            os.kill(os.getpid(), which)
        return one(source, *others)

    monkeypatch.setattr(predict, "_case", interrupted)
    command = ["predict", f"--checkpoint=[{weights}]", f"--input=[{images}]", f"--out={tmp_path / 'out'}"]
    assert cli.main([*command, "--device=cpu", "--windows.overlap=0"]) == status
    with (tmp_path / "out" / "volumes.csv").open(newline="") as file:
        assert {row["case"] for row in csv.DictReader(file)} == {"a"}
    report = (tmp_path / "out" / "report.html").read_text()
    assert report.count(f"interrupted by {which.name}") == 2


@pytest.mark.parametrize(("which", "status"), [(signal.SIGHUP, 75), (signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_before_training_begins(which, status, monkeypatch, capsys):
    def interrupted(options):
        os.kill(os.getpid(), which)

    monkeypatch.setattr(train, "run", interrupted)
    monkeypatch.setattr(cli, "parse", lambda *given: None)
    before = signal.getsignal(which)
    assert cli.main(["train"]) == status
    assert f"swin-unetr train: interrupted by {which.name}" in capsys.readouterr().err
    assert signal.getsignal(which) == before


def test_a_signal_while_libraries_are_imported():
    """Whatever these do with exceptions."""
    script = (
        "import os, signal, sys\n"
        "from swin_unetr import cli\n"
        "def swallowing(name):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except BaseException:\n"
        "        pass\n"
        "cli.importlib.import_module = swallowing\n"
        "sys.exit(cli.main(['train']))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 75


def test_a_signal_that_is_repeated_at_once_is_one():
    """So that the second does not cut short what the first has begun, such as writing tables."""
    survived = []

    def signalled():
        with interruption.raising():
            try:
                os.kill(os.getpid(), signal.SIGHUP)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                survived.append(True)

    with pytest.raises(interruption.Interrupted, match="interrupted by SIGHUP"):
        signalled()
    assert survived
