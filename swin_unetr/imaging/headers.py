"""Headers of NRRD and MetaImage: whether SimpleITK may read what they name, and would read it as they mean it.

Sources: the NRRD format (teem.sourceforge.net/nrrd/format.html) and MetaIO's documentation, for what fields mean.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO

from ..foreign import irregular, listed
from ..names import shown
from .nifti import GZIP, BadCase

LONGEST_PATH = 800  # bytes, of NRRD's; messages of its parser have room for a few more
LONGEST_HEADER = 2**24  # bytes
LONGEST_FIELD = 1000  # letters; values that users add to NRRD (key:=value) may be longer
NRRD_FIELD = re.compile(r"\s*([^:=#]*?)\s*:(?!=)\s*(.*?)\s*")
META_FIELD = re.compile(r"\s*(\w+)\s*[=:]\s*(.*?)\s*")
NUMBER = re.compile(r"%[0-9]*[diu]")
NUMBERED = re.compile(rf"[^%]*{NUMBER.pattern}[^%/]*")
SPACE_KINDS = ("domain", "space", "time", "none", "???", "")
"""Of NRRD's axes along which samples lie; along others a voxel's components do."""
MILLIMETRES = ("mm", "millimeter", "millimeters", "millimetre", "millimetres", "???", "?", "")
"""How they are written, and what is written where nobody knows: most files say nothing."""
PIECE = 2**20  # bytes


@dataclass(frozen=True)
class Header:
    """What a header says.

    Attributes:
        nrrd: whether it is NRRD; otherwise it is MetaImage.
        fields: by name; of NRRD in small letters without spaces, by any of which its names may be written.
        files: with the data.
        start: of the data in the header's own file, in bytes.
    """

    path: Path
    nrrd: bool
    fields: dict[str, str]
    files: tuple[Path, ...]
    start: int

    @property
    def skip(self) -> int:
        """Bytes before the data; below 0 they are the last of their file."""
        return int(self.fields.get("byteskip" if self.nrrd else "HeaderSize") or 0)


def read(path: Path) -> Header:
    """The header in `path`.

    Raises:
        BadCase: reading it would crash the process, or expose files that are not the image's own.

    Parsers overwrite their own memory with fields that are too long, and would read any file on the machine as an
    image, whose bytes would then be shown as grey values.
    """
    nrrd = path.name.endswith(".nrrd")
    if nrrd and (length := len(os.fsencode(path))) > LONGEST_PATH:
        raise BadCase(f"{path}: has a path of {length} bytes; accepted are {LONGEST_PATH} for NRRD")
    lines, listed_names, start = _lines(path, nrrd)
    fields, named = {}, []
    for text in lines:
        if len(text) > LONGEST_FIELD and ":=" not in text[:LONGEST_FIELD] and not text.startswith("#"):
            raise BadCase(f"{path}: has a field of {len(text)} letters in its header; accepted are {LONGEST_FIELD}")
        if (field := _field(text, nrrd)) is None:
            continue
        name, value = field
        if name == "NDims" and value not in ("1", "2", "3", "4"):
            raise BadCase(f"{path}: has NDims = {shown(value)}; accepted are 1 to 4 axes")
        if name in ("datafile", "ElementDataFile"):
            named.append(value)
        fields[name] = value
    files = []
    for name in [*named, *listed_names]:
        if not (name.startswith("LIST") or (not nrrd and name.upper() == "LOCAL")):
            files += _data_files(path, name)
    return Header(path, nrrd, fields, tuple(files or [path]), start)


def _field(text: str, nrrd: bool) -> tuple[str, str] | None:
    """Name and value in a line of a header."""
    if (match := (NRRD_FIELD if nrrd else META_FIELD).fullmatch(text)) is None:
        return None
    return (re.sub(r"\s", "", match[1]).lower() if nrrd else match[1]), match[2]


def _data_files(path: Path, name: str) -> list[Path]:
    """The files that the header in `path` names `name` for its data.

    Raises:
        BadCase: one is not a regular file in the folder of `path`.
    """
    said = f"{path}: its header names {shown(name)!r} as its data"
    numbers = None
    if "%" in name:
        name, *rest = name.split()
        if not NUMBERED.fullmatch(name):
            raise BadCase(f"{said}; accepted are names with one number, such as slice%03d.raw")
        if len(rest) >= 3 and all(part.isdecimal() for part in rest[:3]) and int(rest[2]):
            numbers = range(int(rest[0]), int(rest[1]) + 1, int(rest[2]))
    place = PurePath(name)
    if place.is_absolute() or ".." in place.parts or "\\" in name:
        raise BadCase(f"{said}; accepted are files in its own folder")
    file = path.parent / place
    files = _numbered(file, numbers) if "%" in name else [file]
    for file in files:
        if (why := irregular(file)) is not None:
            raise BadCase(f"{said}, which cannot be read: {why}")
    return files


def _numbered(pattern: Path, numbers: range | None) -> list[Path]:
    """The files that a name such as slice%03d.raw stands for, with one of `numbers`, or any."""
    fits = re.compile(NUMBER.sub("(-?[0-9]+)", re.escape(pattern.name).replace("\\%", "%")))
    matches = ((other, fits.fullmatch(other.name)) for other in listed(pattern.parent))
    return [other for other, match in matches if match and (numbers is None or int(match[1]) in numbers)]


def _lines(path: Path, nrrd: bool) -> tuple[list[str], list[str], int]:
    """Lines of the header in `path`, the names in a list of data files after them, and where it ends, in bytes."""
    lines: list[str] = []
    with path.open("rb") as file:
        while line := file.readline(LONGEST_HEADER):
            if file.tell() >= LONGEST_HEADER:
                raise BadCase(f"{path}: has a header of more than {LONGEST_HEADER} bytes")
            if nrrd and not line.strip():
                break  # data follow
            # Either sign ends a line of NRRD.
            lines += re.split(r"[\r\n]", os.fsdecode(line).rstrip("\r\n"))
            name, value = _field(lines[-1], nrrd) or ("", "")
            if name not in ("datafile", "ElementDataFile"):
                continue
            if value.startswith("LIST"):
                rest = re.split(r"[\r\n]", os.fsdecode(file.read(LONGEST_HEADER)))
                return lines, [name.strip() for name in rest if name.strip()], 0
            if not nrrd and value.upper() == "LOCAL":
                break  # data follow
        return lines, [], file.tell()


# --- place in space, and values ---


def check_meaning(header: Header, say: Callable[[str], None]) -> None:
    """Raise `BadCase` if SimpleITK would silently ignore what a header says about extents, units or values.

    Args:
        say: is called with what a reader of a result should know about how the header was understood.
    """
    (_check_nrrd if header.nrrd else _check_meta)(header, say)


def _check_nrrd(header: Header, say: Callable[[str], None]) -> None:
    fields = header.fields
    kinds = fields.get("kinds", "").lower().split()
    axes = len(fields.get("sizes", "").split())
    inside = [axis for axis in range(axes) if axis >= len(kinds) or kinds[axis] in SPACE_KINDS]
    spacings = fields.get("spacings", "").split()
    directions = re.findall(r"\([^)]*\)|[^\s()]+", fields.get("spacedirections", ""))
    for name, parts in (("spacings", spacings), ("space directions", directions)):
        if any("nan" in parts[axis].lower() or parts[axis] == "none" for axis in inside if axis < len(parts)):
            raise _refused(header, name, " ".join(parts), "a number for each axis in space")
    for name in ("axis mins", "axis maxs"):
        if name.replace(" ", "") in fields:
            raise _refused(header, name, fields[name.replace(" ", "")], "spacings or space directions instead")
    units = [re.findall(r'"([^"]*)"', fields.get(name, "")) for name in ("spaceunits", "units")]
    for name, found in zip(("space units", "units"), units, strict=True):
        for axis, unit in enumerate(found):
            if unit.lower() not in MILLIMETRES and (name == "space units" or axis in inside):
                raise _refused(header, name, f'"{unit}"', '"mm"')
    if not spacings and not directions:
        say("its header has no spacings: voxels are taken for 1 mm wide")


def _check_meta(header: Header, say: Callable[[str], None]) -> None:
    fields = header.fields
    if (unit := fields.get("DistanceUnits", "")).lower() not in MILLIMETRES:
        raise _refused(header, "DistanceUnits", unit, "mm")
    for name, usual in (("ElementToIntensityFunctionSlope", 1), ("ElementToIntensityFunctionOffset", 0)):
        if name in fields and _number(fields[name]) != usual:
            raise _refused(header, name, fields[name], f"{usual}: values as they are stored")
    extents = fields.get("ElementSpacing", fields.get("ElementSize"))
    if extents is None:
        say("its header has no ElementSpacing: voxels are taken for 1 mm wide")
    elif not all(math.isfinite(extent) and extent for extent in map(_number, extents.split())):
        raise _refused(header, "ElementSpacing", extents, "a number for each axis")


def _refused(header: Header, name: str, value: str, accepted: str) -> BadCase:
    return BadCase(f"{header.path}: its header has {name} {shown(value)}; accepted is {accepted}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


# --- data ---


def check_data(header: Header, size: int) -> None:
    """Raise `BadCase` unless the files of a header hold the `size` bytes of its values, compressed ones undamaged.

    MetaIO does not check whether it could inflate them, and NRRD's parser does not check their checksum.
    """
    compressed, binary = _encoding(header)
    if not binary:
        return  # text, whose numbers the parsers count
    held = sum(_held(header, file, compressed, size) for file in header.files)
    # Other files may hold more than this image.
    exact = compressed or (header.files == (header.path,) and header.skip >= 0)
    if held < size or (exact and held > size):
        more = " or more" if compressed and held > size else ""
        raise BadCase(
            f"{header.path}: has {held} bytes of data{more}{' once inflated' if compressed else ''}; its header "
            f"promises {size}"
        )


def _encoding(header: Header) -> tuple[bool, bool]:
    """Whether the data are compressed, and whether they are binary."""
    if header.nrrd:
        encoding = header.fields.get("encoding", "").lower()
        return encoding in ("gzip", "gz"), encoding in ("gzip", "gz", "raw")
    compressed = header.fields.get("CompressedData", "F")[:1] in ("T", "t", "1")
    return compressed, compressed or header.fields.get("BinaryData", "T")[:1] in ("T", "t", "1")


def _held(header: Header, file: Path, compressed: bool, size: int) -> int:
    """How many bytes of values a file has; of compressed ones more than `size` where it is more."""
    with file.open("rb") as stream:
        stream.seek(header.start if file == header.path else 0)
        skip, ends = (_skip_nrrd if header.nrrd else _skip_meta)(header, stream, compressed)
        if not compressed:
            return max(0, os.fstat(stream.fileno()).st_size - stream.tell() - skip)
        try:
            return max(0, _inflated(stream, ends, size + skip) - skip)
        except (zlib.error, EOFError) as error:
            raise BadCase(f"{header.path}: its compressed data in {file.name} are damaged: {error}") from error


def _skip_nrrd(header: Header, stream: BinaryIO, compressed: bool) -> tuple[int, float]:
    """Go to the start of data; how many of their bytes, inflated, are left out, and how many are read."""
    for _ in range(int(header.fields.get("lineskip") or 0)):
        if not stream.readline():
            break
    return max(0, header.skip), math.inf


def _skip_meta(header: Header, stream: BinaryIO, compressed: bool) -> tuple[int, float]:
    """As `_skip_nrrd`."""
    if header.skip > 0:
        stream.seek(header.skip)
    size = int(float(header.fields.get("CompressedDataSize") or 0))
    if compressed and not size and stream.tell():  # MetaIO goes to the start of the file then
        raise BadCase(
            f"{header.path}: its header has no CompressedDataSize; accepted is none where compressed data begin a file "
            "of their own"
        )
    return 0, size or math.inf


def _inflated(file: BinaryIO, ends: float, most: int) -> int:
    """How many bytes the compressed ones in an open file are, up to about `most`; no more than `ends` are read."""
    inflated, rest = 0, b""
    stream = zlib.decompressobj(zlib.MAX_WBITS + 32)  # with a header of zlib or gzip
    while inflated <= most:
        if not rest:
            rest = file.read(int(min(PIECE, ends)))
            ends -= len(rest)
        out = stream.decompress(rest, PIECE)
        inflated += len(out)
        if stream.eof:
            rest = stream.unused_data or file.read(int(min(len(GZIP), ends)))
            if not rest.startswith(GZIP):
                break
            stream = zlib.decompressobj(zlib.MAX_WBITS + 32)
        elif not rest and not out:
            raise EOFError(f"they end after {inflated} bytes once inflated: is the file cut off?")
        else:
            rest = stream.unconsumed_tail
    return inflated
