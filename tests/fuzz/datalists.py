"""Mutants of datalists: cases whose files lie where allowed, each once, or a refusal that names the datalist."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swin_unetr.datasets import datalist
from swin_unetr.datasets.options import Data

from .mutation import Draw, Fault, mutate_bytes, mutate_text, mutate_tree, one_of

ROOT = "datalists-root"
STRANGER = "stranger.nii.gz"
"""A file outside the root, which no datalist may name."""
CASES = 6


def prepare(folder: Path) -> Callable[[Draw, Path], str]:
    root = folder / ROOT
    files = [
        f"{part}/case_{n}{more}.nii.gz" for part in ("i", "l") for n in range(CASES) for more in ("", "_t1", "_t2")
    ]
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    (folder / STRANGER).touch()
    (root / "link.nii.gz").symlink_to(folder / STRANGER)
    (root / "loop").symlink_to(root / "loop")
    words = (
        *files[:3],
        f"../{STRANGER}",
        str(folder / STRANGER),
        "link.nii.gz",
        "loop",
        "loop/x.nii.gz",
        "i",
        "\ud800",
    )
    bases = _bases()

    def case(draw: Draw, place: Path) -> str:
        base = draw.choice(bases)
        change = one_of(draw, ((5, _tree), (2, _text), (2, _bytes), (0.3, _nothing)))
        path = place / "dataset.json"
        path.write_bytes(change(draw, base, words))
        data = _options(draw, path, root)
        labelled, channels = draw.chance(0.7), draw.choice((None, None, None, 1, 2))
        draw.note(f"labelled {labelled}, {channels} channels")
        try:
            training, validation = datalist.read(data, labelled, channels)
        except ValueError as error:
            if str(path) not in str(error) and not str(error).startswith("fold"):  # the option, that is
                raise Fault(f"the message does not name the datalist: {error}") from error
            return "refused"
        _check(training, validation, root, labelled)
        return "read"

    return case


def _bases() -> list[dict[str, Any]]:
    """The Decathlon's form, MONAI's with folds and with a separate validation list, and one with several files."""
    images, labels = ([f"./{part}/case_{n}.nii.gz" for n in range(CASES)] for part in ("i", "l"))
    entries = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
    several = [
        {"image": [f"i/case_{n}_t1.nii.gz", f"i/case_{n}_t2.nii.gz"], "label": f"l/case_{n}.nii.gz", "name": f"p{n}"}
        for n in range(CASES)
    ]
    return [
        {"name": "x", "modality": {"0": "CT"}, "training": entries, "test": images[:1]},
        {"training": [entry | {"fold": number % 3} for number, entry in enumerate(entries)]},
        {"training": entries[:4], "validation": entries[4:]},
        {"modality": {"0": "t1", "1": "t2"}, "training": several},
        {"training": images},
    ]


def _tree(draw: Draw, base: dict[str, Any], words: tuple[str, ...]) -> bytes:
    return json.dumps(mutate_tree(draw, base, words)).encode()


def _text(draw: Draw, base: dict[str, Any], words: tuple[str, ...]) -> bytes:
    text = json.dumps(base, indent=1)
    if draw.chance(0.05):
        draw.note("brackets in brackets")
        return (text[:-1] + ',"x":' + "[" * 100_000).encode()
    return mutate_text(draw, text).encode("utf-8", "surrogatepass")


def _bytes(draw: Draw, base: dict[str, Any], words: tuple[str, ...]) -> bytes:
    return mutate_bytes(draw, json.dumps(base).encode(draw.choice(("utf-8", "utf-8", "utf-16"))))


def _nothing(draw: Draw, base: dict[str, Any], words: tuple[str, ...]) -> bytes:
    return json.dumps(base).encode()


def _options(draw: Draw, path: Path, root: Path) -> Data:
    options: dict[str, Any] = {"fold": draw.choice((None, None, None, 0, 1)), "folds": draw.choice((1, 2, 3))}
    if draw.chance(0.1):
        options |= {"fold": draw.choice((2, 7)), "folds": draw.choice((5, 100))}
    options["sections"] = ("training",)
    if draw.chance(0.1):
        options["sections"] = draw.choice((("training", "test"), ("none",), ("name",), ("training", "training")))
    draw.note(str(options))
    return Data(path, root, **options)


def _check(training: list[datalist.Case], validation: list[datalist.Case], root: Path, labelled: bool) -> None:
    cases = [*training, *validation]
    names, images = [case.name for case in cases], [file for case in cases for file in set(case.images)]
    if not training:
        raise Fault("there is nothing to train on")
    if len(set(names)) < len(names) or len(set(images)) < len(images):
        raise Fault(f"a case is there more than once: {sorted(names)}")
    for case in cases:
        if labelled and case.label is None:
            raise Fault(f"case {case.name} has no label")
        for file in case.files:
            if not file.is_file() or root not in file.resolve().parents:
                raise Fault(f"case {case.name} has the file {file}, which is none or lies outside of {root}")
