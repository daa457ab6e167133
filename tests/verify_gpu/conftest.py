"""Fixtures of the tests of verify-gpu."""

from __future__ import annotations

import pytest

from .simulated import tools_in


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> dict[str, str]:
    """The environment of a simulated machine."""
    return tools_in(tmp_path_factory.mktemp("machine"))
