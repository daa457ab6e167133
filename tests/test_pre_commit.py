"""pre-commit runs the tools at the versions of the lock."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CONFIGURATION, LOCK = ROOT / ".pre-commit-config.yaml", ROOT / "requirements" / "lock.txt"
pytestmark = pytest.mark.skipif(
    not CONFIGURATION.exists(), reason=f"needs the source tree: {CONFIGURATION.name} is missing"
)


@pytest.mark.parametrize("tool", ["ruff", "clang-format"])
def test_the_version_is_that_of_the_lock(tool):
    (pinned,) = (line for line in LOCK.read_text().splitlines() if line.startswith(f"{tool}=="))
    repositories = yaml.safe_load(CONFIGURATION.read_text())["repos"]
    (revision,) = (one["rev"] for one in repositories if tool in one["repo"])
    assert pinned == f"{tool}=={revision.removeprefix('v')}"
