"""Archives: what is unpacked, and what is refused before unpacking."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from swin_unetr import cli
from swin_unetr.datasets import Data, archives, datalist

from .. import synthetic


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


# --- headers that lie ---


def test_long_headers_are_not_read(tmp_path):
    """A GNU long name of 64 MiB, pax records as long, and an endless sequence of names of 1 KiB."""
    long_name = member("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=1 << 26)
    pax = member("pax", tarfile.XHDTYPE, size=1 << 26)
    with gzip.open(tmp_path / "chain.tar.gz", "wb", 1) as file:
        for _ in range(5000):
            file.write(member("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=1024).tobuf(tarfile.GNU_FORMAT))
            file.write(b"a" * 1024)
    for name, info in (("long", long_name), ("pax", pax)):
        with gzip.open(tmp_path / f"{name}.tar.gz", "wb", 1) as file:
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            for _ in range(64):
                file.write(b"a" * (1 << 20))
            file.write(member("a").tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    tracemalloc.start()
    for name in ("long", "pax", "chain"):
        with pytest.raises(archives.Refused, match=rf"{name}\.tar\.gz: has a header of more than \d+ bytes"):
            archives.unpack(tmp_path / f"{name}.tar.gz", tmp_path / "unpacked")
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_sizes_below_zero_and_beyond_the_file(tmp_path):
    info = member("a")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    for name, size in (("negative", -(1 << 20)), ("endless", 1 << 62)):
        header[124:136] = (b"\xff" if size < 0 else b"\x80") + (size % 2**88).to_bytes(11, "big")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / f"{name}.tar").write_bytes(bytes(header) + bytes(1024))
        with pytest.raises(archives.Refused, match=rf"{name}\.tar: "):
            archives.unpack(tmp_path / f"{name}.tar", tmp_path / "unpacked")


def flipped(packed: bytes, random: np.random.Generator) -> bytes:
    """`packed` with a few bytes changed, or cut off."""
    changed = bytearray(packed)
    for place in random.integers(len(packed), size=random.integers(1, 6)):
        changed[place] = random.integers(256)
    return bytes(changed[: random.integers(1, len(packed))] if random.random() < 0.2 else changed)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.bz2", "zip"])
def test_damage_is_refused_by_the_archives_name(tmp_path, suffix):
    """Unpacked or refused, nothing else, and nothing is written outside the folder."""
    random = np.random.default_rng(0)
    path = tmp_path / f"a.{suffix}"
    if suffix == "zip":
        zipped(path, "folder/a", b"hello" * 10)
    else:
        modes = {"tar": "w", "tar.gz": "w:gz", "tar.bz2": "w:bz2"}
        tarred(path, (member("folder/" + "n" * 120), b"hello" * 10), (member("b"), b"x"), mode=modes[suffix])
    whole = path.read_bytes()
    outcomes = set()
    for number in range(80):
        path.write_bytes(flipped(whole, random))
        try:
            archives.unpack(path, tmp_path / f"{number}", largest=2**-10)
            outcomes.add("unpacked")
        except archives.Refused as error:
            outcomes.add("refused" if path.name in str(error) else str(error))
        assert {found.name for found in tmp_path.iterdir()} <= {path.name, *map(str, range(number + 1))}
    assert outcomes == {"refused", "unpacked"} or outcomes == {"refused"}


def test_zips_that_the_reader_does_not_know(tmp_path):
    whole = zipped(tmp_path / "a.zip", "a", b"hello" * 10).read_bytes()
    central = whole.index(b"PK\x01\x02")
    changes = {
        "deflate64": (8, 10, b"\x09\0"),
        "lzma": (8, 10, b"\x0e\0"),
        "patched": (6, 8, b"\x20\0"),
        "strong": (6, 8, b"\x40\0"),
    }
    for name, (local, in_central, value) in changes.items():
        changed = bytearray(whole)
        changed[local : local + 2] = changed[central + in_central : central + in_central + 2] = value
        (tmp_path / f"{name}.zip").write_bytes(changed)
        with pytest.raises(archives.Refused, match=rf"{name}\.zip: "):
            archives.unpack(tmp_path / f"{name}.zip", tmp_path / "unpacked")
    with zipfile.ZipFile(tmp_path / "name.zip", "w") as file:
        file.writestr("\u00e9", b"x")
    (tmp_path / "name.zip").write_bytes((tmp_path / "name.zip").read_bytes().replace("\u00e9".encode(), b"\xff\xfe"))
    with pytest.raises(archives.Refused, match=r"name\.zip: "):
        archives.unpack(tmp_path / "name.zip", tmp_path / "unpacked")


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a"), ("n" * 300,)])
def test_names_that_no_folder_can_have(tmp_path, names):
    path = tarred(tmp_path / "a.tar", *((member(name), b"x") for name in names))
    with pytest.raises(archives.Refused, match=r"a\.tar: member "):
        archives.unpack(path, tmp_path / "unpacked")
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_pipe_is_no_archive(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(archives.Refused, match=r"a\.tar"):
        archives.unpack(tmp_path / "a.tar", tmp_path / "unpacked")
    with pytest.raises(archives.Refused, match=r"a\.tar"):
        archives.datalist_in(tmp_path / "a.tar")


# --- as a datalist ---


def packed(folder: Path, name: str = "Task09_Spleen.tar") -> Path:
    """A data set as the Decathlon packs it, with what macOS adds."""
    own = synthetic.dataset(folder / "data", cases=4, shape=(66, 36, 34))
    path = folder / name
    with tarfile.open(path, "w:gz" if name.endswith("gz") else "w") as file:
        file.addfile(member("./._Task09_Spleen"), io.BytesIO(b""))
        file.add(own.parent, "Task09_Spleen")
        file.addfile(member("Task09_Spleen/._dataset.json"), io.BytesIO(b""))
    return path


@pytest.mark.parametrize(("name", "command"), [("Task09_Spleen.tar", "train"), ("Task09_Spleen.TAR.GZ", "pretrain")])
def test_commands_take_an_archive_and_unpack_it_once(tmp_path, capsys, name, command):
    path = packed(tmp_path, name if name.endswith("tar") else name.lower())
    path = path.rename(path.with_name(name))
    datalists = {f"{path}.unpacked/Task09_Spleen/dataset.json"}
    words = {"data.datalist": path, "data.folds": 2, "data.workers": 0, "data.crops_per_volume": 2}
    words |= {"architecture.feature_size": 12, "architecture.depths": "1,1,1,1", "preprocessing.spacing": "null"}
    words |= {"roi": "32,64,64" if command == "pretrain" else "64,32,32", "schedule.steps": 1, "device": "cpu"}
    if command == "train":
        words |= {"labels.classes": "{organ: 1}", "validation.overlap": 0}
    argv = [command, *(f"--{option}={value}" for option, value in words.items())]
    assert cli.main([*argv, f"--out={tmp_path / 'a'}"]) == 0
    assert "unpacking" in capsys.readouterr().out.replace("\n", "")
    files = {file: file.stat().st_mtime_ns for file in Path(f"{path}.unpacked").rglob("*")}
    assert {str(file) for file in files if file.name.endswith("dataset.json")} == datalists
    assert len([file for file in files if file.is_file()]) == 10  # images, labels, dataset.json, what archive it was
    assert cli.main([*argv, f"--out={tmp_path / 'b'}"]) == 0
    assert "unpacking" not in capsys.readouterr().out
    assert files == {file: file.stat().st_mtime_ns for file in Path(f"{path}.unpacked").rglob("*")}
    assert {file.name for file in tmp_path.iterdir()} == {"data", "a", "b", name, f"{name}.unpacked"}


def test_another_archive_is_not_taken_for_the_one_unpacked(tmp_path):
    path = packed(tmp_path)
    first = archives.datalist_in(path)
    assert archives.datalist_in(path) == first
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(archives.Refused, match=r"Task09_Spleen\.tar\.unpacked was not unpacked from this Task09"):
        archives.datalist_in(path)


def test_what_a_killed_process_left_is_removed(tmp_path):
    path = packed(tmp_path)
    for left in (f".{path.name}.unpacked.new", f"..{path.name}.unpacked.new.x1"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "part").touch()
    (tmp_path / f".{path.name}.unpacked.lock").touch()  # nobody holds it
    archives.datalist_in(path)
    assert {file.name for file in tmp_path.iterdir()} == {"data", path.name, f"{path.name}.unpacked"}


def test_processes_unpack_one_after_the_other(tmp_path):
    path = packed(tmp_path)
    code = "import sys\nfrom pathlib import Path\nfrom swin_unetr.datasets import archives\n"
    code += "print(archives.datalist_in(Path(sys.argv[1]), print))"
    jobs = [subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [job.communicate(timeout=100)[0].splitlines() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0]
    assert len({lines[-1] for lines in said}) == 1
    assert sum(lines[0].startswith("unpacking") for lines in said) == 1


def test_an_archive_without_a_datalist_or_with_two(tmp_path):
    with pytest.raises(archives.Refused, match=r"has 0 files named dataset\.json"):
        archives.datalist_in(tarred(tmp_path / "none.tar", (member("a"), b"x")))
    two = tarred(tmp_path / "two.tar", (member("a/dataset.json"), b"{}"), (member("b/dataset.json"), b"{}"))
    with pytest.raises(archives.Refused, match=r"has 2 files named dataset\.json"):
        archives.datalist_in(two)
