"""The CUDA kernels as machine code: nothing spills, blocks fit as the committed tables say, loops stay short."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("triton", reason="Triton is not installed, and with it cuobjdump")

from .. import sass
from . import builds, resource_gate

WORSE = 1.05
"""An instruction count may be this many times the committed one."""

ACCEPT = "python -m tests.cuda.resource_gate accepts what changed"


@pytest.fixture(scope="module")
def found() -> dict[tuple, resource_gate.Resources]:
    """Resources of every kernel in the library."""
    library = resource_gate.LIBRARY
    if not library.exists():
        pytest.skip(f"{library.name} is not built: that needs nvcc, see setup.py")
    sources = [*(builds.ROOT / "csrc/cuda").iterdir(), builds.ROOT / "csrc/geometry.h"]
    newer = [source.name for source in sources if source.stat().st_mtime > library.stat().st_mtime]
    assert not newer, f"{library.name} is older than {', '.join(newer)}: make install builds it"
    return {one.key: one for one in resource_gate.resources()}


def committed(path, kind: type, found: dict[tuple, resource_gate.Resources]) -> dict:
    """A committed table, for the architectures of the library; skips if another nvcc made the library."""
    if not shutil.which("nvcc"):
        pytest.skip("there is no nvcc to compare the version of")
    version, table = resource_gate.load(path, kind)
    if version != resource_gate.nvcc_version():
        pytest.skip(f"{path.name} was written with nvcc {version}; this is {resource_gate.nvcc_version()}")
    present = {one.architecture for one in found.values()}
    chosen = {key: row for key, row in table.items() if row.architecture in present}
    assert chosen, f"{path.name} has nothing for {sorted(present)}"
    return chosen


def test_nothing_spills(found):
    spilling = [one for one in found.values() if one.spills or one.stack]
    assert not spilling, "\n".join(map(str, spilling))


def test_every_kernel_is_in_the_table(found):
    table = committed(resource_gate.RESOURCES, resource_gate.Resources, found)
    assert set(table) <= set(found), ACCEPT
    assert set(table) >= {key for key, one in found.items() if one.loops}, ACCEPT


def test_instruction_mix(found):
    """Fails if the code of a loop over scores got worse."""
    table = committed(resource_gate.RESOURCES, resource_gate.Resources, found)
    worse = [
        f"{key}: {name} {getattr(found[key], name)}, was {getattr(before, name)}"
        for key, before in table.items()
        for name in (*sass.KINDS, "tensor_clocks", "wavefronts", "all", "beside")
        if getattr(found[key], name) > max(WORSE * getattr(before, name), getattr(before, name) + 2)
    ]
    assert not worse, "\n".join([*worse, ACCEPT])


@pytest.fixture(scope="module")
def launches(found) -> dict[tuple, resource_gate.Launch]:
    """How production shapes are cut."""
    return {one.key: one for one in resource_gate.launches(found)}


def test_every_block_starts(found, launches):
    for launch in launches.values():
        assert launch.threads <= found[launch.kernel, launch.architecture].max_threads, launch
        assert launch.blocks_per_multiprocessor > 0, launch


def test_occupancy(found, launches):
    """Fails if fewer threads than before fit on a multiprocessor at production shapes."""
    table = committed(resource_gate.LAUNCHES, resource_gate.Launch, found)
    assert set(launches) == set(table), ACCEPT
    lost = [
        f"{key}: {launches[key].threads_per_multiprocessor} threads, was {before.threads_per_multiprocessor}"
        for key, before in table.items()
        if launches[key].threads_per_multiprocessor < before.threads_per_multiprocessor
    ]
    assert not lost, "\n".join([*lost, ACCEPT])


def test_scores_stay_on_chip(found):
    """No loop over scores writes to memory."""
    loops = [one for one in found.values() if one.all]
    assert {one.kernel.split("<")[0] for one in loops} >= {
        "attend",
        "find_delta",
        "differentiate_qkv",
        "differentiate_bias",
    }
    for one in loops:
        assert one.stored == 0, one
        if "Float16" in one.kernel:
            assert one.tensor > 0, one


def test_three_blocks_of_the_convolution_share_a_multiprocessor(found):
    """One loads while two compute (an A100 has memory for two)."""
    module = builds.load("plain")
    call = module.Convolution(1, 1, [96, 96, 96], 48, 48, 48)
    ((_, grid, threads, shared_bytes),) = module.plan_convolution(call)
    assert grid == [24 * 24 * 6, 1, 1]
    for device in resource_gate.DEVICES:
        if one := found.get(("convolve<BFloat16>", device.architecture)):
            assert threads == one.max_threads
            assert device.blocks(one.registers, threads, shared_bytes) == (2 if device.compute_capability == 80 else 3)
