"""Archives: what is unpacked, and what is refused before it is."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from swin_unetr.datasets import Data, archives, datalist
from tests.stack import synthetic


def tarred(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:
        for info, content in members:
            info.size = info.size or len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


def zipped(path: Path, name: str, content: bytes = b"content", mode: int = 0o100644) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        info = zipfile.ZipInfo(name)
        info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
        file.writestr(info, content)
    return path


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "zip"])
def test_archives_are_unpacked(tmp_path, suffix):
    own = synthetic.dataset(tmp_path / "data", cases=4)
    path = tmp_path / f"Task.{suffix}"
    if suffix == "zip":
        with zipfile.ZipFile(path, "w") as file:
            for source in own.parent.rglob("*"):
                file.write(source, f"Task/{source.relative_to(own.parent)}")
    else:
        with tarfile.open(path, "w:gz" if suffix == "tar.gz" else "w") as file:
            file.add(own.parent, "Task")
    files = archives.unpack(path, tmp_path / "unpacked")
    assert len(files) == 9
    assert len(datalist.read(Data(tmp_path / "unpacked/Task/dataset.json", folds=1), True)[0]) == 4


ESCAPES = {
    "absolute": lambda path: tarred(path, (member("/tmp/escaped"), b"x")),
    "above": lambda path: tarred(path, (member("a/../../escaped"), b"x")),
    "link": lambda path: tarred(path, (member("escaped", tarfile.SYMTYPE, "/etc"), b"")),
    "through a link": lambda path: tarred(path, (member("a", tarfile.SYMTYPE, ".."), b""), (member("a/escaped"), b"x")),
    "hard link": lambda path: tarred(path, (member("escaped", tarfile.LNKTYPE, "/etc/passwd"), b"")),
    "device": lambda path: tarred(path, (member("escaped", tarfile.CHRTYPE), b"")),
    "pipe": lambda path: tarred(path, (member("escaped", tarfile.FIFOTYPE), b"")),
    "twice": lambda path: tarred(path, (member("escaped"), b"x"), (member("./escaped"), b"y")),
    "zip above": lambda path: zipped(path, "../escaped"),
    "zip absolute": lambda path: zipped(path, "/tmp/escaped"),
    "zip backslash": lambda path: zipped(path, "..\\escaped"),
    "zip link": lambda path: zipped(path, "escaped", b"/etc", 0o120777),
}


@pytest.mark.parametrize("make", ESCAPES.values(), ids=ESCAPES)
def test_members_that_lead_out_or_are_no_files_are_refused(tmp_path, make):
    path = make(tmp_path / "Task.archive")
    with pytest.raises(archives.Refused, match=r"Task\.archive: member '.*'"):
        archives.unpack(path, tmp_path / "unpacked")
    assert sorted(tmp_path.iterdir()) == [path]  # nothing is left, nothing is beside it


def test_archives_larger_than_allowed_or_than_their_header_says_are_refused(tmp_path):
    content = bytes(1 << 20)
    big = tarred(tmp_path / "big.tar.gz", (member("a"), content), (member("b"), content), mode="w:gz")
    with pytest.raises(archives.Refused, match=r"big\.tar\.gz: takes more than .*'b'"):
        archives.unpack(big, tmp_path / "unpacked", largest=1.5 / 1024)

    lying = zipped(tmp_path / "lying.zip", "a", content)
    packed = lying.read_bytes()
    lying.write_bytes(packed.replace((1 << 20).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(archives.Refused, match=r"lying\.zip: cannot be unpacked.*'a'"):
        archives.unpack(lying, tmp_path / "unpacked")

    short = tarred(tmp_path / "short.tar", (member("a"), content))
    short.write_bytes(short.read_bytes()[: 1 << 19])
    damaged = tmp_path / "damaged.tar.gz"
    damaged.write_bytes(big.read_bytes()[:-100])
    for path in (short, damaged):
        with pytest.raises(archives.Refused, match=path.name):
            archives.unpack(path, tmp_path / "unpacked")
    assert not [path for path in tmp_path.iterdir() if "unpacked" in path.name]


def test_unpacking_writes_over_nothing(tmp_path):
    path = zipped(tmp_path / "a.zip", "a")
    (tmp_path / "unpacked").mkdir()
    with pytest.raises(FileExistsError, match="unpacked"):
        archives.unpack(path, tmp_path / "unpacked")
