"""Datalists: which cases a JSON file lists, where their files are, and which cases are for validation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from monai.data.utils import partition_dataset

from ..foreign import BadFile, irregular, reading
from ..imaging.suffixes import NIFTI, case_name
from ..names import some
from .options import Data


@dataclass(frozen=True)
class Case:
    """Where the files of a case are.

    Attributes:
        name: as in the datalist, or that of its file.
        images: one file with all channels, or one file per channel.
        label: its label map, if it has one.
        fold: its fold in the datalist, if it has one.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None = None
    fold: int | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return self.images if self.label is None else (*self.images, self.label)


def read(data: Data, labelled: bool, channels: int | None = None) -> tuple[list[Case], list[Case]]:
    """Cases to train on and cases to validate on, both sorted by name.

    Args:
        labelled: whether every case needs a label; otherwise labels are ignored, and an entry may be just a file name.
        channels: what the network takes; a datalist that names another number of modalities is refused.

    Raises:
        ValueError: the file is not a datalist, is empty, leads out of its root, or lists missing files or a case more
            than once; the message names the entry and the file.
    """
    content = _json(data.datalist)
    _check_channels(content, channels, data.datalist)
    root = (data.root or data.datalist.parent).resolve()
    inside = (root, *(folder.resolve() for folder in data.trusted))
    cases: list[Case] = []
    for section in data.sections:
        if section not in content:
            raise ValueError(f"{data.datalist}: has no list {section!r}; it has {', '.join(_lists(content)) or 'none'}")
        cases += _cases(content, section, data.datalist, root, inside, labelled)
    own = "validation" in content and "validation" not in data.sections and data.fold is None
    held_out = _cases(content, "validation", data.datalist, root, inside, labelled) if own else []
    if not cases:
        raise ValueError(f"{data.datalist}: its lists {', '.join(data.sections)} are empty; accepted is a case or more")
    _check_files([*cases, *held_out], data.datalist)
    _check_distinct(cases, held_out, data.datalist)
    cases.sort(key=lambda case: case.name)  # the split and the draws do not depend on the order of the file
    if held_out:
        return cases, sorted(held_out, key=lambda case: case.name)
    return _split(cases, data)


def _json(path: Path) -> Mapping[str, Any]:
    try:
        with reading(path, says="cannot be read as JSON"):
            content = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors may write a BOM
    except BadFile as error:
        raise ValueError(f"datalist: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"datalist: {path} holds a {type(content).__name__}; accepted is an object with lists of cases"
        )
    return content


def _lists(content: Mapping[str, Any]) -> list[str]:
    return [name for name, value in content.items() if isinstance(value, list)]


def _check_channels(content: Mapping[str, Any], channels: int | None, datalist: Path) -> None:
    modalities = content.get("modality") or content.get("channel_names")
    if channels is not None and isinstance(modalities, dict) and len(modalities) != channels:
        raise ValueError(
            f"{datalist}: lists {len(modalities)} modalities ({', '.join(map(str, modalities.values()))}); the network "
            f"takes {channels}"
        )


def _cases(
    content: Mapping[str, Any], section: str, datalist: Path, root: Path, inside: Sequence[Path], labelled: bool
) -> list[Case]:
    entries = content[section]
    if not isinstance(entries, list):
        raise ValueError(f"{datalist}: {section} is a {type(entries).__name__}; accepted is a list of cases")
    cases = []
    for number, entry in enumerate(entries):
        where = f"{datalist}: {section}[{number}]"
        fields = entry if isinstance(entry, dict) else {"image": entry}
        images = fields.get("image")
        images = images if isinstance(images, list) else [images]
        if not images or not all(isinstance(file, str) and file for file in images):
            raise ValueError(f"{where}: image is {fields.get('image')!r}; accepted is a file name or a list of them")
        label = fields.get("label") if labelled else None
        if labelled and not (isinstance(label, str) and label):
            raise ValueError(f"{where}: label is {label!r}; accepted is a file name")
        fold = fields.get("fold")
        if fold is not None and (not isinstance(fold, int) or isinstance(fold, bool)):
            raise ValueError(f"{where}: fold is {fold!r}; accepted is a whole number")
        for file in (*images, *([label] if label else ())):
            if not file.endswith(NIFTI):  # the target of a link may have any name
                raise ValueError(f"{where}: {file!r} is listed; accepted are NIfTI files, .nii or .nii.gz")
        files = tuple(_place(file, where, root, inside) for file in images)
        name = fields.get("name") or _name([root / file for file in images])
        cases.append(Case(str(name), files, _place(label, where, root, inside) if label else None, fold))
    return cases


def _place(entry: str, where: str, root: Path, inside: Sequence[Path]) -> Path:
    """The real path of an entry's file, with links followed: what is checked is what will be read."""
    try:
        path = (root / entry).resolve()
    # RuntimeError: a loop of links, before Python 3.13.
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{where}: {entry!r} is not a file name: {error}") from error
    if not any(path.is_relative_to(folder) for folder in inside):
        raise ValueError(
            f"{where}: {entry!r} leads to {path}, out of the data's root {root}; accepted are files inside of it, and "
            "of folders listed as trusted"
        )
    return path


def _name(images: Sequence[Path]) -> str:
    """The name of a case: that of its file without suffix; for several files what their names have in common, or the
    folder's name."""
    names = [case_name(path) for path in images]
    common = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in common).rstrip("_-. ") or images[0].parent.name


def _check_files(cases: Iterable[Case], datalist: Path) -> None:
    reasons = {file: irregular(file) for case in cases for file in case.files}
    missing = [f"{file} ({why})" for file, why in reasons.items() if why is not None]
    if missing:
        raise ValueError(f"{datalist}: lists files that are missing: {some(missing)}")


def _check_distinct(cases: Sequence[Case], held_out: Sequence[Case], datalist: Path) -> None:
    """A case listed twice would count twice; a case in both training and validation would make the scores worthless.

    A label file is never one of the listed images; several images, such as two sequences, may share one.
    """
    images = {file for case in (*cases, *held_out) for file in case.images}
    for case in (*cases, *held_out):
        if case.label in images:
            raise ValueError(
                f"{datalist}: the label of case {case.name!r}, {case.label}, is listed as an image, too; accepted is a "
                "label map"
            )
    trained = {file: case.name for case in cases for file in case.images}
    for case in held_out:
        shared = next((file for file in case.images if file in trained), None)
        if shared is not None or case.name in trained.values():
            raise ValueError(
                f"{datalist}: case {case.name!r} ({shared or case.images[0]}) is in training and validation"
            )
    for group in (cases, held_out):
        names = Counter(case.name for case in group)
        files = Counter(file for case in group for file in set(case.images))
        for case in group:
            if names[case.name] > 1 or any(files[file] > 1 for file in case.images):
                raise ValueError(
                    f"{datalist}: case {case.name!r} ({case.images[0]}) is listed more than once; accepted are cases "
                    "with names of their own: those of their files, or given by the key 'name'"
                )


def _split(cases: Sequence[Case], data: Data) -> tuple[list[Case], list[Case]]:
    """Cases of all other folds, and of the fold that validates."""
    chosen = data.fold or 0
    listed = [case for case in cases if case.fold is not None]
    if listed:
        without = next((case for case in cases if case.fold is None), None)
        if without is not None:
            raise ValueError(
                f"{data.datalist}: case {without.name!r} has no fold, others have; accepted is all or none"
            )
        known = sorted({case.fold for case in listed if case.fold is not None})
        if chosen not in known or len(known) < 2:
            raise ValueError(
                f"fold is {chosen}; {data.datalist} has folds {known}, and one of two or more can validate"
            )
        return [case for case in cases if case.fold != chosen], [case for case in cases if case.fold == chosen]
    if data.folds == 1:
        return list(cases), []
    if len(cases) < data.folds:
        raise ValueError(
            f"folds is {data.folds}; {data.datalist} has {len(cases)} cases, accepted are as many or fewer"
        )
    if chosen >= data.folds:
        raise ValueError(f"fold is {chosen}; accepted are 0 to {data.folds - 1} of {data.folds} folds")
    parts = partition_dataset(list(cases), num_partitions=data.folds, shuffle=True, seed=data.split_seed)
    held_out = {case.name for case in parts[chosen]}
    return [case for case in cases if case.name not in held_out], [case for case in cases if case.name in held_out]
