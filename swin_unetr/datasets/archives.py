"""Unpacking of archives that are not to be trusted: the Decathlon's .tar, compressed or not, and .zip."""

from __future__ import annotations

import errno
import lzma
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

GIB = 2**30
CHUNK = 1 << 20  # bytes copied at once
MOST_MEMBERS = 100_000


class Refused(ValueError):
    """An archive is damaged or does what no data set has to; the message names it and the member."""


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


def unpack(archive: Path, folder: Path, largest: float = 64.0) -> list[Path]:
    """Unpack `archive` into `folder`, which appears once all of it is there; returns the files.

    Nothing is written outside of `folder`, and nothing but files and folders: no links, no devices. Permissions and
    owners in the archive are passed over.

    Args:
        archive: .tar, .tar.gz, .tar.bz2, .tar.xz or .zip.
        folder: does not exist yet.
        largest: GiB that all members may take together by their headers; none is unpacked beyond what its header says.

    Raises:
        Refused: the archive is damaged, too large, or a member leads out of the folder or is no plain file.
        OSError: `folder` cannot be written to, exists, or the disk has no room.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; accepted is a folder that does not")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with _opened(archive) as (listed, open_member):
            members = _checked(archive, listed, largest * GIB)
            total = sum(member.size for member in members)
            if total > (free := shutil.disk_usage(temporary).free):
                says = f"{archive}: takes {total / GIB:.3g} GiB; {folder.parent} has {free / GIB:.3g} GiB free"
                raise OSError(errno.ENOSPC, says)
            for member in members:
                path = temporary / member.name
                if member.kind == "folder":
                    path.mkdir(parents=True, exist_ok=True)
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                with open_member(member.key) as source, path.open("xb") as target:
                    # Both readers end a member where its header says, and refuse one that is shorter or, by its
                    # checksum, longer.
                    shutil.copyfileobj(source, target, CHUNK)
        temporary.chmod(0o755)  # mkdtemp's are for their owner alone
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return [folder / member.name for member in members if member.kind == "file"]


@contextmanager
def _opened(archive: Path) -> Iterator[tuple[Iterable[Member], Callable[..., IO[bytes]]]]:
    """The members of `archive`, and how one is opened; what its reader raises becomes `Refused`."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                members = (Member(info.filename, info.file_size, _zip_kind(info), info) for info in file.infolist())
                yield members, file.open
        else:
            with tarfile.open(archive) as file:
                members = (Member(info.name, info.size, _tar_kind(info), info) for info in file)
                yield members, file.extractfile
    # An OSError without a number is not the system's but gzip's or bz2's, of damaged data.
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise Refused(f"{archive}: cannot be unpacked: {str(error).strip() or type(error).__name__}") from error


def _zip_kind(info: zipfile.ZipInfo) -> str:
    mode = info.external_attr >> 16
    if info.is_dir():
        return "folder"
    if info.flag_bits & 1:
        return "encrypted file"
    # An archive made under Windows has no type of file here.
    return "file" if stat.S_IFMT(mode) in (0, stat.S_IFREG) else "link" if stat.S_ISLNK(mode) else "special file"


def _tar_kind(info: tarfile.TarInfo) -> str:
    if info.isdir():
        return "folder"
    if info.issparse():
        return "sparse file"
    return "file" if info.isreg() else "link" if info.issym() or info.islnk() else "special file"


def _checked(archive: Path, listed: Iterable[Member], largest: float) -> list[Member]:
    """All members, if every one is harmless by its header."""
    members: list[Member] = []
    names: set[PurePosixPath] = set()
    total = 0
    for member in listed:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or any(letter in member.name for letter in "\\\0"):
            raise Refused(f"{archive}: member {member.name!r} leads out of the folder it is unpacked into")
        if member.kind not in ("file", "folder"):
            raise Refused(f"{archive}: member {member.name!r} is a {member.kind}; accepted are files and folders")
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
