"""`swin_kernels.backends.cuda.cuts` and `tracing` on the emulated kernels, and the operators that they call."""

from __future__ import annotations

import functools
import math
import os
import re
import subprocess
from dataclasses import asdict, replace

import pytest
import torch

from swin_kernels.backends.cuda import cuts, library, tracing
from swin_kernels.backends.cuda.cuts import BackwardCut, ForwardCut
from swin_kernels.geometry import WindowGrid

from ..ops.cases import NAMES, Case, expected, make_inputs
from ..ops.tolerances import assert_close, largest
from . import builds, emulated, resource_gate, test_planted

SHAPES = (
    (Case("head_dim 16", (7, 9, 8), (6, 6, 6), (3, 3, 3), heads=1, head_dim=16), torch.bfloat16),
    (Case("head_dim 8", (13, 14), (12, 12), (6, 6), heads=2, head_dim=8), torch.float16),
)
"""Padded and shifted. The keys of the first take four warps two turns."""

DEALT = ("parts", "qkv_blocks")
"""The fields among which windows are divided."""

EXTREMES = (
    ForwardCut(warps=1),
    ForwardCut(warps=1, together=12, resident=-1, parts=1),
    ForwardCut(warps=5, resident=-1, chunks=2, parts=4),
    ForwardCut(resident=1, chunks=1, parts=2),
    BackwardCut(key_warps=1, query_block=16, qkv_blocks=1, bias_warps=1, parts=1),
    BackwardCut(key_warps=3, query_block=80, qkv_blocks=4, bias_warps=5, parts=4),
    BackwardCut(key_warps=2, query_block=192, bias_warps=1, parts=3),
)
"""Beyond what a sweep tries."""


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    """The package's functions act on the emulated kernels."""
    monkeypatch.setattr(library, "operators", builds.load)


@pytest.fixture
def device():
    """The emulated GPU, as it was after the test."""
    device = builds.load().device()
    before = device.multiprocessors, device.shared_per_block
    yield device
    device.multiprocessors, device.shared_per_block = before


def grid_of(case: Case) -> WindowGrid:
    return WindowGrid.of(case.spatial, case.window, case.shift)


def chosen(case: Case, dtype: torch.dtype, direction: str) -> ForwardCut | BackwardCut:
    of_call = {"batch": case.batch, "heads": case.heads, "head_dim": case.head_dim}
    return cuts.chosen(direction, grid_of(case), dtype=dtype, **of_call)


def direction_of(cut: ForwardCut | BackwardCut) -> str:
    return next(direction for direction, kind in cuts.CUTS.items() if isinstance(cut, kind))


def tried() -> list:
    """Every candidate of every shape; with no more parts than windows, since the shapes are small."""
    found = {}
    for case, dtype in SHAPES:
        grid = grid_of(case)
        windows = case.batch * grid.num_windows
        for direction in cuts.CUTS:
            for cut in cuts.candidates(direction, case.head_dim, grid.tokens):
                dealt = {name: min(value, windows) for name, value in asdict(cut).items() if name in DEALT}
                found[case.name, replace(cut, **dealt)] = dtype, case
        found.update(((case.name, cut), (dtype, case)) for cut in EXTREMES)
    return [pytest.param(case, dtype, cut, id=f"{name}-{cut}") for (name, cut), (dtype, case) in found.items()]


def run(case: Case, dtype: torch.dtype, direction: str) -> tuple[torch.Tensor, ...]:
    """Output and log-sum-exp, or the gradients."""
    inputs = make_inputs(case, dtype)
    if direction == "forward":
        return emulated.forward(case, inputs)
    return emulated.backward(case, inputs, *own(case, dtype, "forward"))


@functools.cache
def own(case: Case, dtype: torch.dtype, direction: str) -> tuple[torch.Tensor, ...]:
    """The same with the kernels' own cut; to be called outside any override."""
    return run(case, dtype, direction)


kernel_names = functools.cache(resource_gate.emulated_kernels)


def test_workspace_follows():
    """Planes of `parts`, and gradients of q that are carried if the warps do not hold all keys of a window."""
    case, dtype = SHAPES[0]
    module, call, padded = builds.load(), emulated.attention(case, dtype), 256

    def bytes_of(cut: BackwardCut) -> int:
        with cuts.override(cut):
            return module.backward_workspace_bytes(call)

    least = bytes_of(BackwardCut(key_warps=5, parts=1))
    assert bytes_of(BackwardCut(key_warps=5, parts=7)) == least + 6 * 4 * padded**2
    carried = 4 * 8 * padded * case.head_dim  # of 8 windows
    pad_rows = 4 * 8 * 2 * case.head_dim  # of a second turn
    assert bytes_of(BackwardCut(key_warps=4, parts=1)) == least + carried + pad_rows
    assert bytes_of(BackwardCut(key_warps=2, parts=1)) == least + carried + 2 * pad_rows


@pytest.mark.parametrize(("case", "dtype", "cut"), tried())
def test_contract(case, dtype, cut):
    """Results agree with the truth and with the kernels' own cut; what is reported and launched is as requested."""
    direction = direction_of(cut)
    before = own(case, dtype, direction)
    with cuts.override(cut):
        found, used = run(case, dtype, direction), chosen(case, dtype, direction)
        plan = getattr(builds.load(), f"plan_{direction}")(emulated.attention(case, dtype))
    assert all(getattr(used, name) == value for name, value in asdict(cut).items() if value != 0)
    assert 0 not in asdict(used).values()

    plain, truth = expected(case, dtype)
    place = slice(0, 1) if direction == "forward" else slice(1, 4)
    scale = max(map(largest, truth[place]))
    for name, value, p, t in zip(NAMES[place], found, plain[place], truth[place], strict=False):  # no log-sum-exp there
        assert_close(name, value, p, t, scale)
    for value, other in zip(found, before, strict=True):
        assert (value.float() - other.float()).norm() <= torch.finfo(dtype).eps * other.float().norm()

    grid, heads = grid_of(case), case.heads
    launched = {name.split("<")[0]: rest for name, *rest in named(plan)}
    if direction == "forward":
        blocks = math.ceil(math.ceil(grid.tokens / 32) * 2 / used.warps)
        assert launched["attend"][:2] == [(blocks, heads, used.parts), 32 * used.warps]
    else:
        assert launched["differentiate_qkv"][:2] == [(used.qkv_blocks, heads, 1), 32 * used.key_warps]
        tiles = math.ceil(math.ceil(grid.tokens / 32) / used.bias_warps) * math.ceil(grid.tokens / 64)
        assert launched["differentiate_bias"][:2] == [(tiles, heads, used.parts), 32 * used.bias_warps]


def named(plan: list) -> list:
    """A plan with the names of its kernels."""
    names = kernel_names()
    return [[names[address], tuple(grid), threads, shared] for address, grid, threads, shared in plan]


@pytest.mark.parametrize("direction", cuts.CUTS)
@pytest.mark.parametrize("tokens", [1, 49, 216, 343, 1024])
@pytest.mark.parametrize("head_dim", [8, 16, 32, 64])
def test_candidates(device, direction, tokens, head_dim):
    """On an H100 each fits; they are few, and only few are what the kernels choose by themselves."""
    device.multiprocessors = 132
    case, used = Case("", (tokens, 100), (tokens, 1), heads=1, head_dim=head_dim), []
    candidates = list(cuts.candidates(direction, head_dim, tokens))
    for cut in candidates:
        with cuts.override(cut):
            used.append(chosen(case, torch.bfloat16, direction))
    assert 3 <= len(candidates) <= 16
    assert len(set(candidates)) == len(candidates)
    if tokens >= 216:
        assert len(set(used)) >= len(used) - 3
    fewer = list(cuts.candidates(direction, head_dim, tokens, windows=10))
    assert fewer == [cut for cut in candidates if all(getattr(cut, name, 0) <= 10 for name in DEALT)]


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (ForwardCut(warps=13), "warps is 13, accepted are 1 to 12"),
        (ForwardCut(warps=-1), "warps is -1, accepted are 1 to 12"),
        (ForwardCut(warps=6, together=3), "together is 3, accepted are 1 to 2"),
        (ForwardCut(together=13), "together is 13, accepted are 1 to 12"),
        (ForwardCut(resident=2), "resident is 2, accepted are -1 to 1"),
        (ForwardCut(chunks=8), "chunks is 8, accepted are 1 to 7"),
        (ForwardCut(chunks=5), "chunks is 5, in which 7 steps of 32 keys cannot be cut evenly; .* for instance 4"),
        (ForwardCut(parts=9), "parts is 9, accepted are 1 to 8"),
        (ForwardCut(4, 3, 1, 1), "warps 4, together 3, resident 1, chunks 1 need more than the 232448 bytes"),
        (BackwardCut(key_warps=6), "key_warps is 6, accepted are 1 to 5"),
        (BackwardCut(query_block=272), "query_block is 272, accepted are 16 to 256"),
        (BackwardCut(query_block=40), "query_block is 40, accepted are multiples of 16"),
        (BackwardCut(query_block=-16), "query_block is -16, accepted are 16 to 256"),
        (BackwardCut(qkv_blocks=9), "qkv_blocks is 9, accepted are 1 to 8"),
        (BackwardCut(bias_warps=7), "bias_warps is 7, accepted are 1 to 6"),
        (BackwardCut(parts=9), "parts is 9, accepted are 1 to 8"),
    ],
    ids=str,
)
def test_refused(cut, message):
    """What does not fit is declined everywhere, and nothing is launched."""
    case, dtype = SHAPES[0]
    direction = direction_of(cut)
    module, call = builds.load(), emulated.attention(case, dtype)
    with cuts.override(cut):
        declined = getattr(module, f"{direction}_declines")(call)
        assert re.fullmatch(f"the override of the cut does not fit this call: {message}.*", declined)
        assert getattr(module, f"{direction}_workspace_bytes")(call) == 0
        for do in (lambda: run(case, dtype, direction), lambda: chosen(case, dtype, direction)):
            with pytest.raises(RuntimeError, match=f"^{re.escape(declined)}$"):
                do()
    assert getattr(module, f"{direction}_declines")(call) is None


def test_refused_for_memory(device):
    device.shared_per_block = 200 << 10
    with cuts.override(BackwardCut(5, 256)):
        declined = builds.load().backward_declines(emulated.attention(*SHAPES[0]))
    needed = "key_warps 5, query_block 256 need 226048 and 38912 bytes of shared memory, a block has 204800"
    assert declined == f"the override of the cut does not fit this call: {needed}"


def test_small_windows_have_fewer_warps():
    case = Case("", (5, 5), (5, 5), heads=1, head_dim=8)
    for cut, message in (
        (ForwardCut(warps=3), "warps is 3, accepted are 1 to 2"),
        (BackwardCut(key_warps=2), "key_warps is 2, accepted are 1 to 1"),
        (BackwardCut(bias_warps=2), "bias_warps is 2, accepted are 1 to 1"),
    ):
        with cuts.override(cut), pytest.raises(RuntimeError, match=message):
            chosen(case, torch.bfloat16, direction_of(cut))


@pytest.mark.parametrize("cut", [ForwardCut(warps=1), BackwardCut(parts=1)], ids=str)
def test_float32_has_no_cut(cut):
    case, direction = Case("", (5, 3), (3, 2), (1, 1), heads=1, head_dim=16), direction_of(cut)
    with pytest.raises(RuntimeError, match="cuts are for 16-bit tensors"):
        chosen(case, torch.float32, direction)
    with cuts.override(cut), pytest.raises(RuntimeError, match="cuts are for 16-bit tensors"):
        run(case, torch.float32, direction)
    run(case, torch.float32, direction)


def test_override_ends():
    """Also if an exception leaves the context; and it applies to one direction only."""
    case, dtype = SHAPES[0]
    before = {direction: chosen(case, dtype, direction) for direction in cuts.CUTS}
    for cut, other in ((ForwardCut(warps=3), "backward"), (BackwardCut(query_block=16), "forward")):
        with cuts.override(cut):
            assert chosen(case, dtype, direction_of(cut)) != before[direction_of(cut)]
            assert chosen(case, dtype, other) == before[other]
        assert chosen(case, dtype, direction_of(cut)) == before[direction_of(cut)]
        with pytest.raises(RuntimeError, match="parts is 99"), cuts.override(replace(cut, parts=99)):
            chosen(case, dtype, direction_of(cut))
        assert {direction: chosen(case, dtype, direction) for direction in cuts.CUTS} == before


def test_nothing_declined_is_remembered(monkeypatch):
    """`declines` remembers what the kernels decline; it must not remember what they decline under an override."""
    remembered = []
    monkeypatch.setattr(cuts.kernels_decline, "cache_clear", lambda: remembered.append("forgotten"), raising=False)
    with cuts.override(ForwardCut(warps=12)):
        assert remembered == ["forgotten"]
    assert remembered == ["forgotten"] * 2


@pytest.mark.parametrize("ask", [lambda d: next(cuts.candidates(d, 16, 343)), lambda d: chosen(*SHAPES[0], d)])
def test_unknown_direction(ask):
    with pytest.raises(ValueError, match="direction is 'sideways'; accepted are forward, backward"):
        ask("sideways")


@pytest.mark.parametrize("kind", ["file", "descriptor"])
def test_trace_names_every_launch(tmp_path, kind):
    case = Case("", (5, 3), (3, 2), (1, 1), heads=1, head_dim=16)
    own(case, torch.bfloat16, "forward")
    path = tmp_path / "trace"
    with path.open("w") as file:
        file.write("before\n")
        if kind == "descriptor":
            file.flush()
        with tracing.trace_launches(file if kind == "file" else file.fileno()):
            run(case, torch.bfloat16, "backward")
        run(case, torch.bfloat16, "backward")
    backward = ["find_tokens", "prepare_bias<BFloat16>", "prepare_rows<BFloat16>", "find_delta<BFloat16, 16>"]
    backward += ["differentiate_qkv<BFloat16, 16>", "differentiate_bias<BFloat16, 16>", "sum_planes"]
    backward += ["reduce_to_table<BFloat16>", "reduce_padding<BFloat16>"]
    before, *lines = path.read_text().splitlines()
    assert before == "before"
    assert [kernel_names()[int(line, 16)] for line in lines] == backward


def test_trace_has_a_failing_kernel_before_it_fails(tmp_path):
    with (tmp_path / "trace").open("w+") as file:
        with tracing.trace_launches(file), pytest.raises(RuntimeError) as error:
            test_planted.run("turn", "past shared memory")
        file.seek(0)
        (line,) = file.read().splitlines()
    assert re.match(rf"{line}: block \(0, 0, 0\), thread 63: writes 4 bytes", str(error.value))
    with pytest.raises(RuntimeError, match=r"^block"):  # the trace has ended
        test_planted.run("turn", "past shared memory")


def test_trace_to_nowhere_is_no_error():
    end, other_end = os.pipe()
    os.close(end), os.close(other_end)
    with tracing.trace_launches(other_end):
        run(Case("", (3, 3), (2, 2), heads=1, head_dim=8), torch.bfloat16, "forward")


def test_readable_names():
    """The trace turns mangled names, of the emulation and of nvcc, into those in the gate's tables."""
    nm = subprocess.run(["nm", builds.build("plain")], check=True, capture_output=True, text=True).stdout
    mangled = re.findall(r" [tTwW] (_ZN4swin12_GLOBAL__N_1\d+(?:attend|differentiate|find|prepare|sum|copy)\S+)", nm)
    nvcc = "60_GLOBAL__N__f03491e7_27_window_attention_forward_cu_88364b1f"
    mangled = [name for name in mangled if "DF16_" not in name]  # which not every C++ library can read
    mangled += [
        f"_ZN4swin{nvcc}6attendI13__nv_bfloat16Li16EEEvNS0_4CallE",
        f"_ZN4swin{nvcc}6attendI6__halfLi64EEEvNS0_4CallE",
        f"_ZN4swin{nvcc}11find_tokensENS0_7WindowsE",
    ]
    found = [builds.load().readable_kernel_name(name) for name in mangled]
    assert found == resource_gate.demangle(mangled)
    assert {"attend<BFloat16, 16>", "attend<Float16, 64>", "find_tokens", "copy_windows<uint4, true>"} <= set(found)
    assert builds.load().readable_kernel_name("main") == "main"


def test_operators_of_the_library():
    """What they accept before a device is needed."""
    if not library.LIBRARY.is_file():
        pytest.skip(f"{library.LIBRARY.name} is not built")
    torch.ops.load_library(library.LIBRARY)
    operators = torch.ops.swin_kernels_cuda
    for backward, cut in enumerate((ForwardCut(8, 2), BackwardCut(parts=3))):
        operators.override_cut(bool(backward), list(asdict(cut).values()))
        operators.override_cut(bool(backward), [])
    operators.trace_launches(-1)
    with pytest.raises(RuntimeError, match=r"override_cut: values are \(1, 2\); accepted are none or five"):
        operators.override_cut(True, [1, 2])
    with pytest.raises(RuntimeError, match=r"override_cut: values are \(0, 0, 0, 0, -2\); each must be -1"):
        operators.override_cut(False, [0, 0, 0, 0, -2])
    with pytest.raises(RuntimeError, match="trace_launches: fd is -2; accepted are"):
        operators.trace_launches(-2)
    with pytest.raises(RuntimeError, match="attention_cut: element is 3; accepted are 0, 1, 2"):
        operators.attention_cut(3, 1, 1, 16, [7, 7], [7, 7], [7, 7], [0, 0], False)
    assert str(operators.attention_cut.default._schema).endswith("bool backward) -> int[]")
