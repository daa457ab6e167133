"""Data sets in archives, which are not trusted: the Decathlon's .tar, compressed or not, and .zip."""

from __future__ import annotations

import bz2
import errno
import fcntl
import gzip
import io
import json
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from ..files import GIB

CHUNK = 1 << 20  # bytes copied at once
MOST_MEMBERS = 100_000
MOST_OF_A_TAR_HEADER = 1 << 16  # bytes, long names and pax records included
MOST_OF_A_ZIP_DIRECTORY = 1 << 26  # bytes
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".zip")
DATALIST = "dataset.json"
RECORD = ".archive.json"
"""File in an unpacked data set that says which archive it came from."""
OF_THE_ARCHIVE = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL)
"""Errors in a new folder that are caused by a member's name."""


class Refused(ValueError):
    """An archive is damaged or contains what no data set needs; the message names the archive and the member."""


@dataclass(frozen=True)
class Member:
    """A file or folder in an archive.

    Attributes:
        name: path in the archive.
        size: bytes by the archive's header.
        kind: "file", "folder", or what it is instead.
        key: what the archive's reader opens it by.
    """

    name: str
    size: int
    kind: str
    key: tarfile.TarInfo | zipfile.ZipInfo


def is_archive(path: Path) -> bool:
    """Whether `path` is named like an archive."""
    return path.name.lower().endswith(SUFFIXES)


def datalist_in(archive: Path, say: Callable[[str], None] = lambda text: None) -> Path:
    """The dataset.json in `archive`, which is unpacked beside it if that was not done before.

    Args:
        say: is called when unpacking begins, which may take minutes.

    Raises:
        Refused: the archive cannot be unpacked, does not hold exactly one dataset.json, or is not the one that was
            unpacked before.
        OSError: the folder of the archive cannot be written to, or the disk has no room.
    """
    folder = archive.with_name(f"{archive.name}.unpacked")
    if not archive.is_file():
        raise Refused(f"datalist: there is no file {archive}")
    if not folder.exists():
        with _locked(folder.with_name(f".{folder.name}.lock")):
            if not folder.exists():  # another process may have had the lock
                _unpack_whole(archive, folder, say)
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        record = None
    if record != _identity(archive):
        raise Refused(f"datalist: {folder} was not unpacked from this {archive.name}; remove it to unpack the archive")
    found = sorted(folder.rglob(DATALIST))
    if len(found) != 1:
        raise Refused(f"datalist: {archive} has {len(found)} files named {DATALIST}; accepted is one")
    return found[0]


def _unpack_whole(archive: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Make `folder` with all of `archive` and a record of it; while the lock is held."""
    new = folder.with_name(f".{folder.name}.new")
    for left in (new, *folder.parent.glob(f".{new.name}.*")):  # left by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    say(f"unpacking {archive} into {folder}, once")
    identity = _identity(archive)
    unpack(archive, new)
    (new / RECORD).write_text(json.dumps(identity))
    new.rename(folder)


def _identity(archive: Path) -> dict[str, int]:
    status = archive.stat()
    return {"bytes": status.st_size, "modified": status.st_mtime_ns}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock on `path` among processes; the file is removed afterwards."""
    while True:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # The previous owner of the lock has removed the file: a third process may have created a new one.
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def unpack(archive: Path, folder: Path, largest: float = 64.0) -> list[Path]:
    """Unpack `archive` into `folder`, which appears when it is complete; returns the files.

    Nothing is written outside of `folder`, and nothing but files and folders: no links, no devices. Permissions and
    owners in the archive are ignored, and so are the files "._…" in which macOS keeps metadata.

    Args:
        archive: .tar, .tar.gz, .tar.bz2 or .zip.
        folder: must not exist yet.
        largest: GiB that all members together may take, by their headers; none is unpacked beyond the size in its
            header.

    Raises:
        Refused: the archive is damaged, too large, or a member leads out of the folder or is not a plain file.
        OSError: `folder` cannot be written to, exists, or the disk has no room.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; accepted is a folder that does not")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with _opened(archive, largest * GIB) as (listed, open_member):
            members = _checked(archive, listed, largest * GIB)
            total = sum(member.size for member in members)
            if total > (free := shutil.disk_usage(temporary).free):
                says = f"{archive}: takes {total / GIB:.3g} GiB; {folder.parent} has {free / GIB:.3g} GiB free"
                raise OSError(errno.ENOSPC, says)
            for member in members:
                try:
                    _write(member, temporary, open_member)
                except OSError as error:
                    if error.errno not in OF_THE_ARCHIVE:
                        raise
                    raise Refused(f"{archive}: member {member.name!r}: {error.strerror}") from error
        temporary.chmod(0o755)  # mkdtemp grants access to the owner alone
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return [folder / member.name for member in members if member.kind == "file"]


def _write(member: Member, folder: Path, open_member: Callable[..., IO[bytes]]) -> None:
    path = folder / member.name
    if member.kind == "folder":
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_member(member.key) as source, path.open("xb") as target:
        # Both readers stop where the header says, and refuse a member that is shorter or, by its checksum, longer.
        shutil.copyfileobj(source, target, CHUNK)


class _Bounded:
    """A file from which only a limited number of bytes can be read: what headers say about their own length is not
    trusted.

    Attributes:
        left: bytes that may still be read; None for any number.
    """

    def __init__(self, file: io.BufferedIOBase, archive: Path, largest: float, left: int) -> None:
        """
        Args:
            largest: bytes of the whole file, unpacked.
        """
        self._file, self._archive, self._largest = file, archive, largest
        self.left: int | None = left

    def read(self, size: int = -1) -> bytes:
        if self.left is None:
            return self._file.read(size)
        part = self._file.read(size if 0 <= size <= self.left else self.left + 1)
        if len(part) > self.left:
            raise Refused(f"{self._archive}: has a header of more than {self.left} bytes; accepted are shorter ones")
        self.left -= len(part)
        return part

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        # In a compressed file, everything before the new position is unpacked.
        if whence == os.SEEK_SET and not 0 <= offset <= self._largest:
            raise Refused(f"{self._archive}: has a member that ends after {offset} bytes; accepted are fewer (largest)")
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


@contextmanager
def _opened(archive: Path, largest: float) -> Iterator[tuple[Iterable[Member], Callable[..., IO[bytes]]]]:
    """The members of `archive`, and a function that opens one; errors of the reader become `Refused`."""
    if not archive.is_file():
        raise Refused(f"{archive}: is not a file")
    try:
        if zipfile.is_zipfile(archive):
            with archive.open("rb") as stream:
                bounded = _Bounded(stream, archive, archive.stat().st_size, MOST_OF_A_ZIP_DIRECTORY)
                with zipfile.ZipFile(bounded) as file:
                    bounded.left = None
                    yield [Member(i.filename, i.file_size, _zip_kind(i), i) for i in file.infolist()], file.open
        else:
            with _unpressed(archive) as stream:
                headers = MOST_MEMBERS * MOST_OF_A_TAR_HEADER
                bounded = _Bounded(stream, archive, largest + headers, MOST_OF_A_TAR_HEADER)
                with tarfile.open(fileobj=cast(IO[bytes], bounded), mode="r:") as file:  # it reads, seeks and tells
                    # It returns None only for what is not a file.
                    yield _tar_members(file, bounded), cast(Callable[..., IO[bytes]], file.extractfile)
    except Refused:
        raise
    except OSError as error:
        # An error without a number is not the system's, but that of gzip or bz2 about damaged data.
        if error.errno is not None:
            raise
        raise Refused(f"{archive}: cannot be unpacked: {error}") from error
    except MemoryError:
        raise
    # Damage makes the readers raise many kinds of errors; what matters is the archive's name.
    except Exception as error:
        says = str(error).strip() or type(error).__name__
        raise Refused(f"{archive}: cannot be unpacked: {says}") from error


def _unpressed(archive: Path) -> io.BufferedIOBase:
    """The tar file in `archive`, decompressed as its first bytes require."""
    with archive.open("rb") as file:
        head = file.read(3)
    return (
        gzip.open(archive) if head[:2] == b"\x1f\x8b" else bz2.open(archive) if head == b"BZh" else archive.open("rb")
    )


def _tar_members(file: tarfile.TarFile, bounded: _Bounded) -> Iterator[Member]:
    bounded.left = MOST_OF_A_TAR_HEADER
    for info in file:
        yield Member(info.name, info.size, _tar_kind(info), info)
        bounded.left = MOST_OF_A_TAR_HEADER
    bounded.left = None


def _zip_kind(info: zipfile.ZipInfo) -> str:
    mode = info.external_attr >> 16
    if info.is_dir():
        return "folder"
    if info.flag_bits & 1:
        return "encrypted file"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        return f"file compressed by method {info.compress_type}"
    # An archive made under Windows has no file type here.
    return "file" if stat.S_IFMT(mode) in (0, stat.S_IFREG) else "link" if stat.S_ISLNK(mode) else "special file"


def _tar_kind(info: tarfile.TarInfo) -> str:
    if info.isdir():
        return "folder"
    if info.issparse():
        return "sparse file"
    return "file" if info.isreg() else "link" if info.issym() or info.islnk() else "special file"


def _checked(archive: Path, listed: Iterable[Member], largest: float) -> list[Member]:
    """All members, if all are harmless by their headers."""
    members: list[Member] = []
    names: set[PurePosixPath] = set()
    total = 0
    for member in listed:
        path = PurePosixPath(member.name)
        if path.name.startswith("._"):
            continue
        if member.size < 0:
            raise Refused(f"{archive}: member {member.name!r} has {member.size} bytes; accepted are 0 or more")
        if path.is_absolute() or ".." in path.parts or any(letter in member.name for letter in "\\\0"):
            raise Refused(f"{archive}: member {member.name!r} leads out of the folder it is unpacked into")
        if member.kind not in ("file", "folder"):
            raise Refused(
                f"{archive}: member {member.name!r} is a {member.kind}; accepted are folders, and files as "
                "they are or compressed by deflate or bzip2"
            )
        if member.kind == "file" and (path in names or path == PurePosixPath()):
            raise Refused(f"{archive}: member {member.name!r} is there twice or has no name")
        names.add(path)
        total += member.size
        if total > largest:
            raise Refused(
                f"{archive}: takes more than {largest / GIB:g} GiB with member {member.name!r}; accepted is up to that "
                "(largest)"
            )
        members.append(member)
        if len(members) > MOST_MEMBERS:
            raise Refused(f"{archive}: has more than {MOST_MEMBERS} members, such as {member.name!r}")
    return members
