"""What the CUDA kernels need from a GPU and what their loops execute, read from the machine code without a GPU.

``python -m tests.cuda.resource_gate`` writes two tables, against which `test_resources.py` checks new code:

- ``resources.csv``: registers, static shared memory and spills of every kernel in every architecture, and what it
  executes per 1,000 scores, in warp instructions: in its loops over scores, on the path that they take most of the
  time, and outside them for every window of 343 tokens,
- ``launches.csv``: how the launchers cut production shapes, and how many of the blocks fit on a multiprocessor.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path

import torch
import triton

from .. import sass
from ..ops.cases import Case
from . import builds, emulated

LIBRARY = builds.ROOT / "swin_kernels" / "lib" / "libswin_kernels_cuda.so"
RESOURCES = Path(__file__).with_name("resources.csv")
LAUNCHES = Path(__file__).with_name("launches.csv")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Resources:
    """One kernel in one architecture; `tensor` to `beside` per 1,000 scores, 0 where there is no loop over scores.

    Attributes:
        max_threads: the kernel's ``__launch_bounds__``: a larger block does not start.
        tensor_clocks: of a multiprocessor, at 1,024 multiply-adds per clock.
        wavefronts: passes through shared memory, one per clock.
        stored: the stores among `global_`.
        imad: integers on the float32 units, and moves encoded as such.
        other: further integers, predicates, conversions, moves, branches.
        beside: executed for a window outside the loops over scores; loops that load rows are counted once.
        loops: of any kind; not in the table, which need not have kernels without one.
    """

    kernel: str
    architecture: str
    max_threads: int
    registers: int
    static_shared: int
    stack: int
    spills: int
    tensor: int = 0
    tensor_clocks: int = 0
    exp: int = 0
    fp32: int = 0
    shared: int = 0
    wavefronts: int = 0
    global_: int = 0
    stored: int = 0
    imad: int = 0
    other: int = 0
    all: int = 0
    beside: int = 0
    loops: int = field(default=0, metadata={"stored": False})

    @property
    def key(self) -> tuple:
        return self.kernel, self.architecture


def plain_name(mangled_or_demangled: str) -> str:
    """``copy_windows<uint4, true>`` from a kernel's demangled name, whichever compiler named it."""
    name = mangled_or_demangled.removeprefix("void ").replace("swin::", "").replace("(anonymous namespace)::", "")
    name = name.replace("__nv_bfloat16", "BFloat16").replace("__half", "Float16")
    name = re.sub(r"\([A-Za-z_]\w*\)(?=\d)", "", name)  # (int)16, as some demanglers have it
    return name[: name.rindex("(")]


def demangle(names: list[str]) -> list[str]:
    """Names of kernels without what differs from build to build."""
    # nvcc names anonymous namespaces after the file and a hash
    stable = [re.sub(r"\d+_GLOBAL__N__[0-9a-f]+_\d+_\w+?_cu_[0-9a-f]{8}", "12_GLOBAL__N_1", name) for name in names]
    done = subprocess.run(["c++filt"], input="\n".join(stable), check=True, capture_output=True, text=True)
    return [plain_name(name) for name in done.stdout.splitlines()]


def _dump(option: str, library: Path) -> str:
    return subprocess.run([CUOBJDUMP, option, library], check=True, capture_output=True, text=True).stdout


def _by_function(dump: str, heading: str = r"\s*Function\s*:?\s*") -> dict[tuple[str, str], str]:
    """What a dump says about each function after its `heading`, by architecture and mangled name."""
    found = {}
    for part in re.split(r"^arch = ", dump, flags=re.M)[1:]:
        architecture = part.split()[0]
        for text in re.split(rf"^{heading}", part, flags=re.M)[1:]:
            name = re.match(r"[\w$.]+", text)[0]
            found[architecture, name] = text
    return found


@dataclass(frozen=True)
class Shape:
    """What the sources say about a kernel with a loop over scores.

    Attributes:
        scores: how many a warp computes in one turn of the loop with the exponentials.
        inner: the same for the loop without exponentials beside or within it, 0 if there is none.
        window: how many a warp computes in one window of 343 tokens.
        exact: whether 1/scale is a float16 at the default scale: the bias is then one product, else two.
    """

    scores: float
    inner: float = 0
    window: float = 0
    exact: bool = True

    @classmethod
    def of(cls, kernel: str) -> Shape | None:
        """None for a kernel without such a loop."""
        found = re.match(r"(\w+)<(?:\w+, )?(\d+)[,>]", kernel)
        if found is None:
            return None
        name, head_dim = found[1], int(found[2])
        exact, lanes = head_dim in (16, 64), max(1, head_dim // 16)
        tiles = 3 if head_dim <= 16 else 2 if head_dim <= 32 else 1  # Own::kKeyTiles
        shapes = {
            "attend": cls(16 * 32, window=16 * 352, exact=exact),
            "differentiate_qkv": cls(256 * tiles, 256 * tiles / lanes, 256 * tiles * 22, exact),
            "find_delta": cls(32 * 64, exact=exact),
            "differentiate_bias": cls(32 * 64, exact=exact),
            "attend_float": cls(32 / lanes),
            "differentiate_rows_float": cls(32 / lanes),
            "differentiate_bias_float": cls(4 * 32, 4 * 32 / (head_dim / 4 - 1)),
        }
        return shapes.get(name)


def executed(kernel: str, instructions: list[sass.Instruction]) -> dict[str, int]:
    """`tensor` to `beside` of a kernel; empty if it has no loop over scores."""
    shape = Shape.of(kernel)
    if shape is None:
        return {}
    bodies = {loop: [instructions[i] for i in loop] for loop in sass.loops(instructions)}

    def holds(loop: range, pattern: str) -> int:
        return sass.count(bodies[loop], pattern)

    def innermost(of: list[range]) -> list[range]:
        return [one for one in of if not any(one != other and one.start <= other.start < one.stop for other in of)]

    work = "LDGSTS|LDSM|STS|STG|BAR" + ("" if shape.exact else "|HMMA")

    with_exp = [one for one in bodies if holds(one, "MUFU.EX2")]
    hot = innermost(with_exp)
    # Of the copies of a loop, the one that reads the bias from shared memory, and of those the one for this scale.
    fewest = min(holds(one, "LDG") for one in hot)
    hot_loop = (min if shape.exact else max)(
        (one for one in hot if holds(one, "LDG") == fewest), key=lambda one: holds(one, "HMMA")
    )
    exponentials = max(1, round(shape.scores / 32))
    parts = [(sass.common_path(instructions, hot_loop, work, exponentials), shape.scores)]
    if shape.inner:
        quiet = [one for one in bodies if not holds(one, "MUFU.EX2") and holds(one, "HMMA|FFMA") > 1]
        (inner,) = innermost(quiet)
        parts.append((sass.common_path(instructions, inner, work, 0), shape.inner))
    found = dict.fromkeys((*sass.KINDS, "tensor_clocks", "wavefronts", "stored", "imad", "all"), 0.0)
    for places, scores in parts:
        body = [instructions[i] for i in places]
        counts = {kind: sass.count(body, pattern) for kind, pattern in sass.KINDS.items()}
        products = [one for one in body if not (shape.exact and one.predicated)]  # 1/scale's remainder is predicated
        counts["tensor_clocks"] = 2 * sass.count(products, "HMMA.16816") + sass.count(products, "HMMA.1688")
        counts["wavefronts"], counts["stored"] = sass.wavefronts(body), sass.count(body, "STG")
        counts["imad"], counts["all"] = sass.count(body, "IMAD"), len(body)
        for kind, number in counts.items():
            found[kind] += number * 1000 / scores
    found["other"] = found["all"] - sum(found[kind] for kind in (*sass.KINDS, "imad"))
    if shape.window:
        around = [one for one in bodies if one != hot_loop and hot_loop.start in one and hot_loop[-1] in one]
        around.sort(key=len)
        counted = set().union(*hot, *((inner,) if shape.inner else ()))

        def outside(loop: range, work: str) -> int:
            path = sass.common_path(instructions, loop, work, holds(loop, "MUFU.EX2"))
            return sum(i not in counted for i in path)

        # Outputs are packed. Two more blocks of queries in a window, whose staging is not counted.
        steps = outside(around[-1], "LDGSTS|LDSM|STS|BAR|F2FP")
        steps += 2 * outside(around[0], "LDSM|BAR|F2FP") if len(around) > 1 else 0
        found["beside"] = steps * 1000 / shape.window
    return {kind: round(number) for kind, number in found.items()}


def resources(library: Path = LIBRARY) -> list[Resources]:
    """The resources of every kernel in the library."""
    usage, code = (_by_function(_dump(option, library)) for option in ("--dump-resource-usage", "--dump-sass"))
    bounds = _by_function(_dump("--dump-elf", library), heading=r"\.nv\.info\.")
    found = []
    for (architecture, name), kernel in zip(code, demangle([name for _, name in code]), strict=True):
        used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", usage[architecture, name])}
        instructions = sass.read(code[architecture, name])
        found.append(
            Resources(
                kernel,
                architecture,
                int(re.search(r"EIATTR_MAX_THREADS\s+.*\s+Value:\s+(0x\w+)", bounds[architecture, name])[1], 16),
                registers=used["REG"],
                static_shared=used["SHARED"],
                stack=used["STACK"],
                spills=sass.count(instructions, "LDL|STL"),
                loops=len(sass.loops(instructions)),
                **executed(kernel, instructions),
            )
        )
    return sorted(found, key=lambda one: one.key)


@dataclass(frozen=True)
class Device:
    """What limits blocks on a multiprocessor (CUDA C++ Programming Guide, table of compute capabilities)."""

    architecture: str
    compute_capability: int
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int

    def blocks(self, registers: int, threads: int, shared_bytes: int) -> int:
        """Blocks that fit on a multiprocessor: 64 K registers in 4 quarters, 64 warps, 32 blocks, shared memory."""
        warps = -(-threads // 32)
        registers_of_warp = -(-registers * 32 // 256) * 256
        by_registers = (1 << 14) // registers_of_warp * 4 // warps
        by_shared = self.shared_per_multiprocessor // (-(-(shared_bytes + 1024) // 128) * 128)
        return min(by_registers, by_shared, 64 // warps, 32)


DEVICES = (
    Device("sm_80", 80, 108, 163 << 10, 164 << 10),  # A100
    Device("sm_90a", 90, 132, 227 << 10, 228 << 10),  # H100
    Device("sm_100a", 100, 148, 227 << 10, 228 << 10),  # B200
)


@dataclass(frozen=True)
class Launch:
    """How one kernel of a call is cut on a device, and how many of its blocks a multiprocessor holds at a time."""

    call: str
    architecture: str
    kernel: str
    grid: str
    threads: int
    shared_bytes: int
    blocks_per_multiprocessor: int

    @property
    def key(self) -> tuple:
        return self.call, self.architecture, self.kernel

    @property
    def threads_per_multiprocessor(self) -> int:
        return self.threads * self.blocks_per_multiprocessor


def calls() -> Iterable[tuple[str, Case, torch.dtype]]:
    """Production shapes: every stage of feature size 48 at 96³ and 128³; other dtypes and head_dims at stage 1."""
    for extent in (96, 128):
        for stage in range(4):
            side = extent >> 1 + stage
            shape = Case("", (side,) * 3, (7,) * 3, (3,) * 3, heads=3 << stage, head_dim=16)
            yield f"{extent}³ stage {stage + 1}", shape, torch.bfloat16
    stage_1 = Case("", (48,) * 3, (7,) * 3, (3,) * 3, heads=3, head_dim=16)
    yield "96³ stage 1 fp32", stage_1, torch.float32
    for head_dim in (8, 32, 64):
        yield f"96³ stage 1 head_dim {head_dim}", replace(stage_1, head_dim=head_dim), torch.bfloat16


def launches(needed: dict[tuple, Resources]) -> list[Launch]:
    """How the launchers cut `calls` on `DEVICES`, for kernels with a loop over scores; `needed` by `Resources.key`."""
    module = builds.load("plain")
    names = emulated_kernels()
    found = []
    present = {architecture for _, architecture in needed}
    for device in DEVICES:
        if device.architecture not in present:
            continue
        for name in ("compute_capability", "multiprocessors", "shared_per_block", "shared_per_multiprocessor"):
            setattr(module.device(), name, getattr(device, name))
        for name, case, dtype in calls():
            call = emulated.attention(case, dtype)
            for step, plan in (("forward", module.plan_forward), ("backward", module.plan_backward)):
                for address, grid, threads, shared_bytes in plan(call):
                    kernel = names[address]
                    if not needed[kernel, device.architecture].all:
                        continue
                    blocks = device.blocks(needed[kernel, device.architecture].registers, threads, shared_bytes)
                    cut = "x".join(map(str, grid))
                    found.append(
                        Launch(f"{step} {name}", device.architecture, kernel, cut, threads, shared_bytes, blocks)
                    )
    return found


def emulated_kernels() -> dict[int, str]:
    """Names of the kernels in the emulated build by their address in its file."""
    done = subprocess.run(
        ["nm", "--demangle", "--defined-only", builds.build("plain")], check=True, capture_output=True, text=True
    )
    symbols = re.findall(r"^([0-9a-f]+) [tTwW] ((?:void )?swin::\(anonymous namespace\)::.*)$", done.stdout, flags=re.M)
    return {int(address, 16): plain_name(name) for address, name in symbols}


def nvcc_version() -> str:
    """The version of the compiler that the tables are valid for, such as ``13.0``."""
    done = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True)
    return re.search(r"release (\d+\.\d+)", done.stdout)[1]


def store(found: list, path: Path) -> None:
    with path.open("w", newline="") as file:
        file.write(f"# nvcc {nvcc_version()}; written by: python -m tests.cuda.resource_gate\n")
        writer = csv.writer(file, lineterminator="\n")
        names = [f.name for f in stored_fields(type(found[0]))]
        writer.writerow(names)
        writer.writerows([getattr(one, name) for name in names] for one in found)


def stored_fields(kind: type) -> list[Field]:
    """The columns of a table of `kind`."""
    return [f for f in fields(kind) if f.metadata.get("stored", True)]


def load(path: Path, kind: type) -> tuple[str, dict[tuple, object]]:
    """The nvcc of a committed table, and its rows by `key`."""
    with path.open() as file:
        version = file.readline().split()[2].rstrip(";")
        rows = [
            kind(**{f.name: row[f.name] if f.type == "str" else int(row[f.name]) for f in stored_fields(kind)})
            for row in csv.DictReader(file)
        ]
    return version, {row.key: row for row in rows}


if __name__ == "__main__":
    needed = resources()
    store(needed, RESOURCES)
    store(launches({one.key: one for one in needed}), LAUNCHES)
    sys.stdout.write(RESOURCES.read_text() + LAUNCHES.read_text())
