"""Checkpoint files: complete or not there, checked when read, without code in them; the last good one is found."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import zipfile
from collections import OrderedDict

import pytest
import torch

from swin_unetr import SwinUNETR, checkpoints, files, load_pretrained
from swin_unetr.training import resume

from . import full


def content(step: int = 1) -> dict:
    return {"kind": "train", "model": OrderedDict(weight=torch.arange(6.0).view(2, 3)), "progress": {"step": step}}


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "made" / checkpoints.name(3)
    written = content() | {"more": [None, True, 0.1, "text", (1, 2), {"half": torch.ones(3, dtype=torch.bfloat16)}]}
    checkpoints.write(path, written)
    found = checkpoints.read(path).content
    assert found.pop("format") == checkpoints.FORMAT
    assert checkpoints.checksum(found) == checkpoints.checksum(written)
    assert torch.equal(found["model"]["weight"], written["model"]["weight"])
    assert [path.name for path in path.parent.iterdir()] == ["step-00000003.pt"]


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.zeros(2)},
        {"a": torch.zeros(2, dtype=torch.int32)},
        {"a": torch.zeros(2, 1)},
        {"a": [0.0, 0.0]},
        {"b": torch.zeros(2, dtype=torch.float64)},
        {"a": torch.zeros(2, dtype=torch.float64), "b": None},
    ],
)
def test_the_checksum_tells_contents_apart(other):
    assert checkpoints.checksum(other) != checkpoints.checksum({"a": torch.zeros(2, dtype=torch.float64)})


def test_other_values_than_tensors_and_plain_ones_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"content\['progress'\]\['where'\] is a PosixPath; accepted are tensors"):
        checkpoints.write(tmp_path / "x.pt", {"progress": {"where": tmp_path}})
    with pytest.raises(TypeError, match=r"content\['version'\] is a TorchVersion"):
        checkpoints.write(tmp_path / "x.pt", {"version": torch.__version__})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / checkpoints.name(1)
    checkpoints.write(path, content(1))

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(checkpoints.NotSaved, match="No space left on device; what was there before is untouched"):
        checkpoints.write(path, content(2))
    assert checkpoints.read(path).content["progress"] == {"step": 1}
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("size", [50, 3000, 150_000])
def test_a_disk_that_fills_up_while_writing(tmp_path, size):
    """torch's zip writer hits it in the middle of the file, and reports something about positions."""
    weights = {f"w{number}": torch.rand(size) for number in range(600_000 // size // 4 or 1)}
    with full.after(200_000), pytest.raises(checkpoints.NotSaved) as error:
        checkpoints.write(tmp_path / "x.pt", content() | {"model": weights})
    assert str(error.value) == (
        f"{tmp_path / 'x.pt'}: cannot be written: {full.SAYS}; what was there before is untouched"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_damaged(tmp_path, part):
    path = tmp_path / checkpoints.name(1)
    checkpoints.write(path, content())
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(checkpoints.Damaged, match=r"step-00000001.pt: cannot be read"):
        checkpoints.read(path)


def test_an_altered_weight_is_damage(tmp_path):
    path = tmp_path / checkpoints.name(1)
    checkpoints.write(path, content())
    _replace(path, "data/0", torch.arange(6.0).neg().numpy().tobytes())
    assert torch.load(path, weights_only=True)["model"]["weight"][0, 1] == -1  # a file that torch accepts
    with pytest.raises(checkpoints.Damaged, match="the checksum differs"):
        checkpoints.read(path)


@pytest.mark.filterwarnings("ignore")  # PyTorch's about the protocols that damage names
@pytest.mark.parametrize("value", [0x00, ord("s"), 0xFF])
def test_any_byte_changed_is_damage(tmp_path, value):
    """In the file as it is, and in the unpickler's program inside, with the zip's own checksums made right."""
    whole, path = tmp_path / "whole.pt", tmp_path / checkpoints.name(1)
    checkpoints.write(whole, content())
    expected, original = checkpoints.read(whole).content, whole.read_bytes()
    with zipfile.ZipFile(whole) as file:
        program = next(file.read(name) for name in file.namelist() if name.endswith("data.pkl"))

    def check():
        with contextlib.suppress(checkpoints.Damaged):
            found = checkpoints.read(path).content  # where nothing reads the byte, such as a date in the zip file
            assert checkpoints.checksum(found) == checkpoints.checksum(expected)

    for place in range(0, len(original), 17):
        path.write_bytes(original[:place] + bytes([value]) + original[place + 1 :])
        check()
    for place in range(len(program)):
        path.write_bytes(original)
        _replace(path, "data.pkl", program[:place] + bytes([value]) + program[place + 1 :])
        check()


def test_a_checkpoint_that_holds_itself_is_damaged(tmp_path):
    whole = {"format": checkpoints.FORMAT, "checksum": "0" * 64}
    whole["model"] = whole
    torch.save(whole, tmp_path / "x.pt")
    with pytest.raises(checkpoints.Damaged, match=r"x.pt: its content is not what was written: maximum recursion"):
        checkpoints.read(tmp_path / "x.pt")


class _Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoints.FORMAT, "model": _Code()}, "x.pt")
    with pytest.raises(checkpoints.Damaged, match=r"x.pt: does not load with weights_only=True"):
        checkpoints.read(tmp_path / "x.pt")
    assert not os.path.exists("executed")


@pytest.mark.parametrize("found", [[1], {"state_dict": {}}])
def test_other_files_are_no_checkpoints(tmp_path, found):
    torch.save(found, tmp_path / "x.pt")
    with pytest.raises(checkpoints.Damaged, match=r"x.pt: is not a checkpoint of swin-unetr: format is"):
        checkpoints.read(tmp_path / "x.pt")
    with pytest.raises(FileNotFoundError):
        checkpoints.read(tmp_path / "y.pt")


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    assert checkpoints.newest(tmp_path / "none") is None
    for step in (9, 10, 200):
        checkpoints.write(tmp_path / checkpoints.name(step), content(step))
    (tmp_path / checkpoints.name(200)).write_bytes(b"cut off")
    path, found, damaged = checkpoints.newest(tmp_path)
    assert (path.name, found["progress"]) == ("step-00000010.pt", {"step": 10})
    assert "step-00000200.pt" in str(damaged[0])
    for path in checkpoints.series(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(checkpoints.Damaged, match=r"no checkpoint is whole: .*200.*10.*9"):
        checkpoints.newest(tmp_path)


@pytest.mark.parametrize(
    "kind", ["a byte", "a folder", "a pipe", "a link to nowhere", "no training state", "a sparse tensor"]
)
def test_whatever_is_wrong_with_the_newest_the_one_before_is_found(tmp_path, kind):
    folder = tmp_path / resume.CHECKPOINTS
    more = {"config": {}, "provenance": {}, "training": {}}
    checkpoints.write(folder / checkpoints.name(1), content() | more)
    bad = folder / checkpoints.name(2)
    if kind == "a byte":
        checkpoints.write(bad, content() | more)
        with zipfile.ZipFile(bad) as file:
            program = next(file.read(name) for name in file.namelist() if name.endswith("data.pkl"))
        _replace(bad, "data.pkl", program[:2] + b"s" + program[3:])  # SETITEM on an empty stack
    elif kind == "a folder":
        bad.mkdir()
    elif kind == "a pipe":
        os.mkfifo(bad)
    elif kind == "a link to nowhere":
        bad.symlink_to(tmp_path / "nowhere")
    elif kind == "no training state":
        checkpoints.write(bad, content() | {"config": {}})
    else:
        torch.save({"format": checkpoints.FORMAT, "checksum": "", "model": torch.eye(2).to_sparse()}, bad)
    found = resume.find(tmp_path, "train", {}, fresh=False)
    assert found.path.name == checkpoints.name(1)
    assert len(found.damaged) == 1
    assert checkpoints.name(2) in str(found.damaged[0])


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_damaged(tmp_path, monkeypatch):
    checkpoints.write(tmp_path / checkpoints.name(1), content())

    def forbidden(*arguments, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(torch, "load", forbidden)
    with pytest.raises(PermissionError):
        checkpoints.newest(tmp_path)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_files_have_the_modes_of_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        checkpoints.write(tmp_path / "best.pt", content())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "best.pt").stat().st_mode) == mode


def test_what_killed_processes_left_is_removed(tmp_path):
    killed = files.replacing(tmp_path / "best.pt")
    killed.__enter__().write(b"half of it")
    kept = [tmp_path / name for name in ("best.pt", "step-00000001.pt", ".hidden", "notes.part")]
    for path in [*kept, tmp_path / ".best.pt.x1y2z3"]:
        path.touch()
    assert len(list(tmp_path.iterdir())) == 6
    files.remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_old_ones_and_what_was_left_behind_are_pruned(tmp_path):
    for step in range(5):
        checkpoints.write(tmp_path / checkpoints.name(step), content(step))
    for name in (".step-00000004.pt.x1", "best.pt"):
        (tmp_path / name).touch()
    checkpoints.prune(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000003.pt", "step-00000004.pt", "best.pt"}


def test_a_checkpoint_is_a_file_of_weights(tmp_path):
    options = {"in_channels": 1, "out_channels": 2, "feature_size": 12, "depths": (1, 1, 1, 1)}
    trained, fresh = SwinUNETR(**options), SwinUNETR(**options)
    checkpoints.write(tmp_path / "x.pt", {"kind": "train", "model": trained.state_dict()})
    assert not load_pretrained(fresh, tmp_path / "x.pt").missing
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), fresh.parameters(), strict=True))


def _replace(path, ending: str, value: bytes) -> None:
    """`path` with another member of its zip file."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, old in members.items():
            file.writestr(name, value if name.endswith(ending) else old)
