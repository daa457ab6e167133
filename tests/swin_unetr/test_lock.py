"""A run's folder has one owner, whatever happened to the last one."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from swin_unetr import cli, lock

from . import exporter, toy_job
from .segmenter import nifti

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def owner(tmp_path):
    """Another process that owns `tmp_path`, and whose child lives on when it is killed."""
    script = """
        import os, pathlib, sys, time
        from swin_unetr import lock
        with lock.owned(pathlib.Path(sys.argv[1])):
            if os.fork():
                print("owned", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "owned\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_second_training_is_refused_until_the_first_is_gone(tmp_path, owner):
    match = rf"out: .* is in use by another training \(process {owner.pid} on {socket.gethostname()}, since 20"
    with pytest.raises(ValueError, match=match):
        toy_job.run(toy_job.ToyOptions(tmp_path))
    assert not (tmp_path / "config.yaml").exists()
    owner.kill()
    owner.wait()
    assert toy_job.run(toy_job.ToyOptions(tmp_path)) == 0
    assert not (tmp_path / lock.NAME).exists()


@pytest.mark.parametrize("command", ["predict", "evaluate", "export", "demo", "pretrain", "train"])
def test_no_command_writes_into_a_folder_that_another_process_owns(command, tmp_path, owner, capsys):
    """Before it reads weights or label maps, of which there are none here."""
    before = sorted(path.name for path in tmp_path.iterdir())
    image, label = (nifti(tmp_path.parent / f"{tmp_path.name}-{which}.nii.gz") for which in ("image", "label"))
    datalist = image.with_suffix(".json")
    datalist.write_text(json.dumps({"training": [{"image": image.name, "label": label.name}]}))
    data = ["--data.datalist", str(datalist), "--data.folds", "1"]
    words = {
        "predict": ["--checkpoint", "none.pt", "--input", str(image)],
        "evaluate": ["--predictions", "none", "--labels", "none"],
        "export": ["--checkpoint", str(exporter.checkpoint(image.with_suffix(".pt"))), "--formats", "safetensors"],
        "pretrain": data,
        "train": [*data, "--labels.classes", "{organ: 1}", "--architecture.out_channels", "2"],
    }
    device = [] if command in ("evaluate", "export") else ["--device", "cpu"]
    assert cli.main([command, *words.get(command, []), *device, "--out", str(tmp_path)]) == 2
    said = rf"swin-unetr {command}: out: .* is in use by another \w+ \(process {owner.pid} on "
    assert re.match(said, capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("content", [b"", b"damaged", b"[1]", json.dumps({"pid": 1, "host": "elsewhere"}).encode()])
def test_what_a_run_that_is_gone_left_is_no_owner(tmp_path, content):
    """The system's lock decides, and it ended with its process."""
    (tmp_path / lock.NAME).write_bytes(content)
    with lock.owned(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_an_owner_that_ends_between_opening_and_locking(tmp_path, monkeypatch):
    """The opened file no longer has its name: another process may lock a new one."""
    path, lockf, locked = tmp_path / lock.NAME, fcntl.lockf, []

    def late(descriptor, how):
        if not locked:
            path.unlink()
        locked.append(descriptor)
        lockf(descriptor, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    with lock.owned(tmp_path):
        assert len(locked) == 2
        assert os.path.samestat(os.fstat(locked[1]), path.stat())


@pytest.fixture
def without_locks(monkeypatch):
    """A file system without locks."""

    def unsupported(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", unsupported)


@pytest.mark.usefixtures("without_locks")
def test_without_locks_a_process_of_this_host_that_is_no_more_owns_nothing(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / lock.NAME).write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname(), "since": "then"}))
    with lock.owned(tmp_path):
        pass


@pytest.mark.usefixtures("without_locks")
@pytest.mark.parametrize("host", [None, "elsewhere"])
def test_without_locks_a_process_that_may_run_owns_its_folder(tmp_path, host):
    host = host or socket.gethostname()
    (tmp_path / lock.NAME).write_text(json.dumps({"pid": os.getppid(), "host": host, "since": "then"}))
    with pytest.raises(lock.InUse, match=rf"process {os.getppid()} on {host}, since then\).*delete .*\.lock"):
        lock.owned(tmp_path).__enter__()
    assert (tmp_path / lock.NAME).exists()
