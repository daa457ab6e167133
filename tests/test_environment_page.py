"""`docs/environment.md` has every environment variable that the sources read, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "environment.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree: docs/environment.md is missing")

FOLDERS = ("swin_kernels", "swin_unetr", "csrc", "benchmarks", "scripts", "tests")
NAME = r"([A-Z][A-Z0-9_]+)"
READING = [
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        rf"environ(?:\.get|\.setdefault|\.pop)?[\[(]\s*[\"']{NAME}[\"']",
        rf"[\"']{NAME}[\"'] (?:not )?in (?:os\.)?environ",
        rf"getenv\(\"{NAME}\"",
        r"\"(SWIN_(?:KERNELS|UNETR|VERIFY)_[A-Z_]*[A-Z])\"",  # by a name that is passed elsewhere, or to a process
        rf"^{NAME} \?=",  # make
        rf"\$\({NAME}:%=",
        r"\$\{?\"?(SLURM_[A-Z_]+)",
    )
]
UNSEEN = {"SUBJECT"}
"""Variables that are read in another way: as make's `$(SUBJECT)`."""


def sources() -> dict[str, str]:
    files = [ROOT / "setup.py", ROOT / "Makefile"]
    files += [
        file
        for folder in FOLDERS
        for file in sorted((ROOT / folder).rglob("*"))
        if file.suffix in (".py", ".cpp", ".cu", ".h", ".sbatch") and file != Path(__file__)
    ]
    return {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}


def read_in(text: str) -> set[str]:
    return {name for pattern in READING for name in pattern.findall(text)}


def documented() -> set[str]:
    rows = [line.split("|")[1] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(rf"`{NAME}`", row)}


def test_every_variable_is_on_the_page():
    missing = {name: file for file, text in sources().items() for name in read_in(text) - documented()}
    assert not missing, f"docs/environment.md does not have {missing}"


def test_every_variable_of_the_page_is_read():
    text = "\n".join(sources().values())
    assert documented() - read_in(text) == UNSEEN


@pytest.mark.parametrize(
    "line",
    [
        'os.environ.get("SOME_NAME", "0")',
        "os.environ['SOME_NAME']",
        '"SOME_NAME" not in os.environ',
        'std::getenv("SOME_NAME")',
        "SOME_NAME ?= 3",
        '$(SOME_NAME:%=--part "%")',
    ],
)
def test_a_variable_is_found_however_it_is_read(line):
    assert read_in(line) == {"SOME_NAME"}
