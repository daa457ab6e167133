"""Settings of the whole test session. There are no fixtures for tests to ask for here; `seeded` acts on every test.

- plugins: `collection` leaves out the tests that need a GPU and orders the files; `skips` fails a run in CI with
  unexpected skips,
- random numbers: Python's, NumPy's and PyTorch's generators are seeded before each test,
- threads: PyTorch uses at most two, so that times and memory are alike on small and large machines; and only one if
  several processes share the tests (pytest-xdist), since waiting threads spin,
- hypothesis: the profile "repeatable" draws the same examples in every run and has no deadline, since the machine may
  be busy; `pytest --hypothesis-profile=explore` draws new ones,
- a backend forced from outside (`SWIN_KERNELS_BACKEND`) is ignored: tests name the backends they mean.
"""

from __future__ import annotations

import os
import random

import hypothesis
import numpy
import pytest
import torch

pytest_plugins = ("pytester", "tests.collection", "tests.skips")

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True)
hypothesis.settings.load_profile("repeatable")

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))
os.environ.pop("SWIN_KERNELS_BACKEND", None)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed every generator: a test draws the same numbers alone and in any order."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
