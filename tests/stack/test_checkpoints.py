"""Checkpoint files: whole or not at all, checked when read, no code in them, the last good one found."""

from __future__ import annotations

import errno
import os
import zipfile
from collections import OrderedDict

import pytest
import torch

from swin_unetr import SwinUNETR, checkpoints, load_pretrained


def content(step: int = 1) -> dict:
    return {"kind": "train", "model": OrderedDict(weight=torch.arange(6.0).view(2, 3)), "progress": {"step": step}}


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "made" / checkpoints.name(3)
    written = content() | {"more": [None, True, 0.1, "text", (1, 2), {"half": torch.ones(3, dtype=torch.bfloat16)}]}
    checkpoints.write(path, written)
    found = checkpoints.read(path)
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
    assert checkpoints.read(path)["progress"] == {"step": 1}
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_disk_that_fills_up_while_writing(tmp_path, monkeypatch):
    """torch's writer meets the full disk itself, in the middle of the file."""
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda whole, file: save(whole, open("/dev/full", "wb", buffering=0)))  # noqa: SIM115
    with pytest.raises(checkpoints.NotSaved, match="what was there before is untouched"):
        checkpoints.write(tmp_path / "x.pt", content() | {"large": torch.zeros(100_000)})
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
    assert torch.load(path, weights_only=True)["model"]["weight"][0, 1] == -1  # a file that torch has nothing against
    with pytest.raises(checkpoints.Damaged, match="the checksum differs"):
        checkpoints.read(path)


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
    with pytest.raises(checkpoints.Damaged, match=r"x.pt: is no checkpoint of swin-unetr: format is"):
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
