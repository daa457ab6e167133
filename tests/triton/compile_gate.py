"""Compiles the Triton kernels for GPUs that need not be present, and reads the machine code.

``python -m tests.triton.compile_gate`` compiles `SUBJECTS` and writes `instruction_mix.csv`: registers, shared memory,
spills, and what the hot loop executes per 1,000 scores (in warp instructions, on the path that it takes most of the
time). `test_compiled.py` checks new code against that file, so that a change of the mix shows in review.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import Field, dataclass, field, fields
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from swin_kernels.backends import BACKENDS
from swin_kernels.backends.triton import (
    bias,
    convolution,
    instance_norm_act,
    layer_norm,
    window_attention,
    window_partition,
)
from swin_kernels.backends.triton.tiles import Key, Tile, choose
from swin_kernels.backends.triton.windows import Windows
from swin_kernels.ops import OPERATORS

from .. import sass

TABLE = Path(__file__).with_name("instruction_mix.csv")
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes a block may have, per architecture (CUDA C++ Programming Guide, table of compute capabilities)."""

SCORE_KERNELS = ("attend", "differentiate_queries", "differentiate_keys", "differentiate_bias")
MODULES = {
    **dict.fromkeys(SCORE_KERNELS, window_attention),
    "prepare": bias,
    "reduce_to_table": bias,
    "partition": window_partition,
    "reverse": window_partition,
    **dict.fromkeys(
        ("measure", "join", "normalize", "normalize_small", "sum_gradients", "differentiate", "differentiate_small"),
        instance_norm_act,
    ),
    **dict.fromkeys(("normalize_rows", "differentiate_rows"), layer_norm),
    **dict.fromkeys(("convolve", "convolve_few"), convolution),
}
"""The module of each kernel whose arguments and constants depend on the `Subject`: `compile_subject`."""

SPECIMENS: dict[str, dict[str, str | int]] = {}
"""For every other kernel, its argument types and the values of its constants, as its module's ``SPECIMENS`` say:
``{"scale": {"x": "*bf16", "count": "i32", "BLOCK": 1024}}``."""

for _operator in OPERATORS.values():
    _module = BACKENDS["triton"].kernel(_operator.call_type.kernel)
    for _kernel, _arguments in getattr(_module, "SPECIMENS", {}).items():
        MODULES[_kernel], SPECIMENS[_kernel] = _module, _arguments

NORMS = (instance_norm_act, layer_norm)


@dataclass(frozen=True)
class Subject:
    """One compilation.

    Heads, channels, extents, windows and shifts are run-time values: one binary serves every stage of a feature size
    and every volume, so f48 at 96³ and 128³ is ``head_dim=16``, f24 is ``head_dim=8``.
    """

    kernel: str
    architecture: int
    dtype: str = "bf16"
    head_dim: int = 16
    shifted: bool = True
    padded: bool = True
    dropout: bool = False
    expanded: bool = True
    tokens: int = 343
    residual: str = "none"

    @property
    def tile(self) -> Tile:
        size = 4 if self.dtype == "fp32" else 2
        channels = max(16, triton.next_power_of_2(self.head_dim))
        step = "forward" if self.kernel == "attend" else "backward"
        return choose(Key(step, self.architecture, size, channels, 16 * triton.cdiv(self.tokens, 16)))


def subjects() -> list[Subject]:
    """Every kernel at production shapes, and every compile-time variant once."""
    found = []
    for architecture in (90, 80, 100):
        for kernel in SCORE_KERNELS:
            found += [Subject(kernel, architecture), Subject(kernel, architecture, head_dim=8)]
        found += [Subject(kernel, architecture) for kernel in MODULES if kernel not in SCORE_KERNELS]
    for kernel in SCORE_KERNELS:
        found += [
            Subject(kernel, 90, shifted=False, padded=False),
            Subject(kernel, 90, dtype="fp16"),
            Subject(kernel, 90, dtype="fp32"),
            Subject(kernel, 90, dropout=True),
            Subject(kernel, 90, expanded=False, tokens=16**3),
            Subject(kernel, 90, head_dim=32),
            Subject(kernel, 90, head_dim=64),
            Subject(kernel, 90, head_dim=128),
        ]
    for kernel, module in MODULES.items():
        if module is instance_norm_act and kernel != "join":
            found += [Subject(kernel, 90, residual="normalized"), Subject(kernel, 90, dtype="fp32", residual="plain")]
    found.append(Subject("convolve", 90, residual="plain"))
    return found


@dataclass(frozen=True)
class Report:
    """What the machine code of a `Subject` needs and does; `exp` to `all` per 1,000 scores, 0 without a score loop.

    `loops` of any kind are counted; the table need not have kernels without one.
    """

    kernel: str
    architecture: int
    variant: str
    tile: str
    registers: int
    shared_bytes: int
    spills: int
    tensor: int
    exp: int
    fp32: int
    shared: int
    global_: int
    all: int
    loops: int = field(default=0, metadata={"stored": False})

    @property
    def key(self) -> tuple:
        return self.kernel, self.architecture, self.variant


def compile_subject(subject: Subject):
    """The kernel compiled by Triton for an architecture that need not be present."""
    kernel = getattr(MODULES[subject.kernel], subject.kernel)
    if subject.kernel in SPECIMENS:
        return _compile(kernel, SPECIMENS[subject.kernel], subject.architecture)
    tile = subject.tile
    elements = dict.fromkeys(
        ("grad_out", "qkv", "pad_qkv", "out", "grad_qkv", "volume", "windows"), f"*{subject.dtype}"
    ) | dict.fromkeys(("x", "residual", "grad_x", "grad_residual"), f"*{subject.dtype}")
    if subject.kernel in SCORE_KERNELS:
        elements["windows"] = "i32"
    stored = "fp32" if subject.dtype == "fp32" else "fp16"
    pointers = {
        **{name: kind for name, kind in elements.items() if kind.startswith("*")},
        **dict.fromkeys(("lse", "rows", "grad_pad_parts", "grad_bias", "table", "grad_table"), "*fp32"),
        **dict.fromkeys(("found", "statistics", "sums", "weight", "bias"), "*fp32"),
        "bias_source": f"*{stored if subject.expanded else 'fp32'}",
        "tiles": f"*{stored}",
        "bits": "*i32",
        "seed": "*i64",
    }
    scalars = {
        **dict.fromkeys(("heads", "windows", "threshold", "first_head", "parts", "padded", "channels", "n"), "i32"),
        **dict.fromkeys(("part_rows", "rows", "depth", "height", "width"), "i32"),
        **dict.fromkeys(("scale", "factor", "keep_scale", "eps", "slope"), "fp32"),
        "w": Windows(*["fp32"] * len(Windows._fields)),
    }
    constants = {
        "HEAD_DIM": subject.head_dim,
        "CHANNELS": max(16, triton.next_power_of_2(subject.head_dim)),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "WARPS": min(tile.warps, tile.rows // 16),
        "PAIR": 0 if subject.dtype == "fp32" else 2,
        "EXPANDED": subject.expanded,
        "SHIFTED": subject.shifted,
        "PADDED": subject.padded,
        "DROPOUT": subject.dropout,
        "PRECISION": "ieee",
        "ENTRIES": window_attention.ENTRIES,
        "QUERIES": window_attention.QUERIES,
        "TOKENS": window_partition.TOKENS,
    }
    if MODULES[subject.kernel] is window_partition:
        constants["CHANNELS"] = window_partition.MAX_CHANNELS
    if MODULES[subject.kernel] in NORMS:
        constants |= _norm_constants(subject)
        pointers["rows"] = None  # a number here
    if subject.kernel == "convolve_few":
        constants |= {"KERNEL": 3, "INPUTS": 1, "PRODUCTS": 32}
        constants |= {"VOXELS": convolution.FEW_VOXELS, "CHANNELS": convolution.FEW_CHANNELS}
    if subject.kernel == "convolve":
        cut = convolution.tile_for(48, 48)
        constants |= {"KERNEL": 3, "INPUTS": cut.read, "STAGES": cut.stages, "SKIP": subject.residual != "none"}
        constants |= {"VOXELS": cut.voxels, "CHANNELS": convolution.MOST_OUTPUTS}
    if MODULES[subject.kernel] is convolution:
        pointers |= dict.fromkeys(("weight", "skip"), f"*{subject.dtype}")
        scalars |= dict.fromkeys(("inputs", "beside"), "i32")
    signature = {name: pointers.get(name) or scalars.get(name) or "constexpr" for name in kernel.arg_names}
    aligned = {
        *pointers,
        "channels",
        "inputs",
        "beside",
    }  # as at a launch: memory from PyTorch's allocator, channels a multiple of 16
    source = ASTSource(
        kernel,
        signature,
        {name: constants[name] for name, kind in signature.items() if kind == "constexpr"},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in aligned},
    )
    warps = (
        convolution.tile_for(48, 48).warps
        if subject.kernel == "convolve"
        else getattr(MODULES[subject.kernel], "WARPS", tile.warps)
    )
    options = {"num_warps": warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", subject.architecture, 32), options=options)


def _compile(kernel, arguments: dict[str, str | int], architecture: int):
    """`kernel` with these argument types and constants; pointers aligned as PyTorch's allocator does."""
    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    signature = {name: "constexpr" if name in constants else arguments[name] for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32))


def _tile_in_words(subject: Subject) -> str:
    module = MODULES[subject.kernel]
    if subject.kernel in SPECIMENS:
        return " ".join(
            f"{name} {value}" for name, value in SPECIMENS[subject.kernel].items() if not isinstance(value, str)
        )
    if module in NORMS:
        constants = _norm_constants(subject)
        return f"{constants['ROWS']}x{constants['CHANNELS']} warps {module.WARPS}"
    if subject.kernel == "convolve":
        cut = module.tile_for(48, 48)
        return f"{cut.voxels}x{module.MOST_OUTPUTS} warps {cut.warps} stages {cut.stages}"
    if subject.kernel == "convolve_few":
        return f"{module.FEW_VOXELS}x{module.FEW_CHANNELS} warps {module.WARPS}"
    tile = subject.tile
    return f"{tile.rows}x{tile.columns} warps {tile.warps} stages {tile.stages}"


def _norm_constants(subject: Subject) -> dict[str, int | bool]:
    """At 48 channels; `join` of 512 parts."""
    channels = instance_norm_act.SMALL_CHANNELS if subject.kernel.endswith("small") else 64
    halved = subject.residual == "normalized" and subject.kernel in (
        "sum_gradients",
        "differentiate",
        "differentiate_small",
    )
    return {
        "CHANNELS": instance_norm_act.JOINED_CHANNELS if subject.kernel == "join" else channels,
        "ROWS": MODULES[subject.kernel].ELEMENTS // (2 if halved else 1) // channels,
        "WEIGHT": True,
        "BIAS": True,
        "PARTS": 512,
        "RESIDUAL": ("none", "plain", "normalized").index(subject.residual),
        "FROM_OUTPUT": subject.residual == "none",
    }


def _disassemble(cubin: bytes) -> tuple[dict[str, int], list[sass.Instruction]]:
    """Resource usage and instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([BINARIES / tool, *options, file.name], check=True, capture_output=True, text=True).stdout
            for tool, options in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", ["-c"]))
        )
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return resources, sass.read(code)


def _hot_loop(instructions: list[sass.Instruction], exponentials: int) -> list[sass.Instruction]:
    """One turn of the shortest loop with at least that many `exponentials`; empty if there is none."""
    counts = {loop: sass.count([instructions[i] for i in loop], "MUFU.EX2") for loop in sass.loops(instructions)}
    hot = min((loop for loop, count in counts.items() if count >= exponentials), key=len, default=None)
    return [] if hot is None else [instructions[i] for i in sass.common_path(instructions, hot, "BAR", counts[hot])]


def report(subject: Subject) -> Report:
    """Compile `subject` and read its machine code."""
    compiled = compile_subject(subject)
    resources, instructions = _disassemble(compiled.asm["cubin"])
    tile = subject.tile
    loop = _hot_loop(instructions, tile.rows * tile.columns // (32 * tile.warps))
    counts = {kind: sass.count(loop, pattern) for kind, pattern in sass.KINDS.items()}
    # the rescaling of the forward adds an exponential or two per row; an unrolled loop has several tiles
    tiles = max(1, counts["exp"] * 32 * tile.warps // (tile.rows * tile.columns))
    scale = 1000 * tile.warps / (tile.rows * tile.columns * tiles)
    flags = ("shifted", "padded", "dropout", "expanded")
    names = [subject.dtype, f"head_dim {subject.head_dim}", *(flag for flag in flags if getattr(subject, flag))]
    if subject.kernel not in SCORE_KERNELS:
        names = [subject.dtype, f"residual {subject.residual}"] if subject.residual != "none" else [subject.dtype]
    return Report(
        kernel=subject.kernel,
        architecture=subject.architecture,
        variant=" ".join(names),
        tile=_tile_in_words(subject),
        registers=resources["REG"],
        shared_bytes=compiled.metadata.shared,
        spills=sass.count(instructions, "LDL|STL"),
        loops=len(sass.loops(instructions)),
        **{kind: round(count * scale) for kind, count in counts.items()},
        all=round(len(loop) * scale),
    )


def reports(chosen: Iterable[Subject]) -> list[Report]:
    """Reports of all `chosen`, on every core."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(report, chosen))


def store(found: list[Report], path: Path = TABLE) -> None:
    with path.open("w", newline="") as file:
        file.write(f"# Triton {triton.__version__}; written by: python -m tests.triton.compile_gate\n")
        names = [f.name for f in _stored()]
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([getattr(one, name) for name in names] for one in found)


def _stored() -> list[Field]:
    """The columns of the table."""
    return [f for f in fields(Report) if f.metadata.get("stored", True)]


def load(path: Path = TABLE) -> tuple[str, dict[tuple, Report]]:
    """The Triton version of the committed table, and its rows by `Report.key`."""
    with path.open() as file:
        version = file.readline().split()[2].rstrip(";")
        rows = [
            Report(**{f.name: row[f.name] if f.type == "str" else int(row[f.name]) for f in _stored()})
            for row in csv.DictReader(file)
        ]
    return version, {row.key: row for row in rows}


if __name__ == "__main__":
    store(reports(subjects()))
    sys.stdout.write(TABLE.read_text())
