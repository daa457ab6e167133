"""Other ways to cut the work: Triton's tiles and the CUDA kernels' cuts, checked against the default, then timed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from swin_kernels import tune
from swin_kernels.backends.cuda import cuts, preference

from . import attention
from .attention import Inputs
from .device import device_of
from .goals import CORE
from .measure import compare
from .operators import DIRECTIONS, OTHERS, STAGES, directed, shape_in, some, written
from .reporter import Reporter
from .result import Row, newest
from .tasks import Task

if TYPE_CHECKING:  # it imports Triton, which is not available everywhere
    from swin_kernels.backends.triton.tiles import Tile

    Cut = Tile | cuts.ForwardCut | cuts.BackwardCut

SHAPES = (STAGES[0], STAGES[3])
"""Stage 1, which takes most of the time, and the clipped window of stage 4: tiles depend on nothing else of a shape."""

CHUNK = 8
"""Candidates of one child, besides the default."""

AGREEMENT = 2e-2
"""How far a candidate's results may be from the default's, relative, in the mean; for bfloat16."""

DEFAULT = "ours"


def tile_candidates(direction: str) -> list[Tile]:
    """Triton's tiles that are worth timing in bfloat16.

    The number of programs per multiprocessor is not compiled in: it is varied for the default's tile only.
    """
    from swin_kernels.backends.triton.tiles import TABLE, Key, Tile

    default = next(tile for key, tile in TABLE if key == Key(direction))
    shapes = {(one.rows, one.columns, one.warps, one.stages): one for one in tune.candidates(direction, 2)}
    found = [Tile(*shape, programs=default.programs) for shape in shapes]
    return [*found, *(replace(default, programs=programs) for programs in (2, 8))]


def named(cut: Cut) -> str:
    """The name of a candidate's variant: what it sets."""
    values = {name: value for name, value in asdict(cut).items() if value not in (None, 0)}
    return f"{type(cut).__name__} " + " ".join(f"{name} {value}" for name, value in values.items())


def _candidates(backend: str, direction: str, place: int) -> list[Cut]:
    if backend == "triton":
        return list(tile_candidates(direction))
    shape = SHAPES[place]
    grid = shape.grid
    return list(cuts.candidates(direction, shape.channels // shape.heads, grid.tokens, grid.num_windows))


def _override(cut: Cut) -> contextlib.AbstractContextManager:
    if isinstance(cut, (cuts.ForwardCut, cuts.BackwardCut)):
        return cuts.override(cut)
    from swin_kernels.backends.triton import tiles

    return tiles.override(cut)


def preparations(simulated: bool) -> list[Task]:
    """Triton's compilations for the cache on disk, one child for each tile: on all cores, before times are taken."""
    if simulated:
        return []
    return [
        Task(
            "sweeps.compile_tile",
            {"direction": direction, "tile": place},
            Row("sweeps", f"compile, {direction}", f"tile {place}", "Triton"),
            5,
        )
        for direction in DIRECTIONS
        for place in range(len(tile_candidates(direction)))
    ]


def compile_tile(reporter: Reporter, row: dict, direction: str, tile: int) -> None:
    """Run one candidate once on stage 1; afterwards its kernels are in Triton's cache."""
    about = Row(**row)
    if not reporter.wants(about):
        return
    reporter.step(about, "compile", limit=120)
    shape = SHAPES[0]
    t = Inputs.of(shape, torch.bfloat16, "cuda")
    with _override(tile_candidates(direction)[tile]):
        directed(partial(attention.run, shape, backend="triton"), t, direction)()
    torch.cuda.synchronize()


def tasks(backend: str, simulated: bool) -> list[Task]:
    """The candidates of a backend, those for stage 1 first."""
    if backend == "triton" and simulated:
        return []
    # Stage 1 has most of the time, and Triton's tiles for it serve stages 2 and 3.
    places = range(len(some(SHAPES, simulated))) if backend == "cuda" else (0,)
    found = []
    for place, direction in itertools.product(places, DIRECTIONS):
        count = len(_candidates(backend, direction, place))
        for first in range(0, min(count, CHUNK) if simulated else count, CHUNK):
            row = Row("sweeps", f"sweep {backend}, {direction}", f"{SHAPES[place]}, from {first}", DEFAULT)
            arguments = {"backend": backend, "place": place, "direction": direction, "first": first}
            found.append(Task("sweeps.sweep", {**arguments, "simulated": simulated}, row, 4, timed=True))
    return found


def sweep(
    reporter: Reporter,
    row: dict,
    backend: str,
    place: int,
    direction: str,
    first: int,
    simulated: bool,
    seconds: float,
) -> None:
    """The default beside `CHUNK` candidates from `first` on."""
    device = device_of(simulated)
    about, shape = Row(**row), shape_in(written(SHAPES[place]), simulated)
    t = Inputs.of(shape, torch.float32 if simulated else torch.bfloat16, device.name)
    core = partial(attention.run, shape, backend="cpu" if simulated else backend)
    call = directed(core, t, direction)
    candidates = _candidates(backend, direction, place)[first : first + CHUNK]

    def under(cut: Cut) -> Callable[[], list[torch.Tensor]]:
        def run() -> list[torch.Tensor]:
            with contextlib.nullcontext() if simulated else _override(cut):
                return call()

        return run

    compare(
        reporter,
        device,
        about,
        {DEFAULT: call, **{named(cut): under(cut) for cut in candidates}},
        lambda: [value.double() for value in call()],
        lambda errors: AGREEMENT,
        seconds,
    )


# What the rows imply


def is_faster(one: Row, other: Row) -> bool:
    """Whether `one` beats `other` by more than twice the wider of their spreads."""
    return other.median - one.median > 2 * max(one.spread, other.spread)


def best(rows: Iterable[Row], backend: str) -> dict[tuple[str, str], tuple[Row, Row]]:
    """For each direction and shape, the fastest candidate that beats the default beside it by the margin, and the
    default."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.measure.startswith(f"sweep {backend}, ") and row.p50 is not None:
            groups.setdefault((row.measure, row.shape), []).append(row)
    found: dict[tuple[str, str], tuple[Row, Row]] = {}
    for (measure, shape), members in groups.items():
        default = next((row for row in members if row.variant == DEFAULT), None)
        if default is None:
            continue
        faster = [row for row in members if row is not default and is_faster(row, default)]
        if not faster:
            continue
        fastest = min(faster, key=lambda row: row.median)
        key = measure.partition(", ")[2], shape.rpartition(", from")[0]
        if key not in found or fastest.median < found[key][0].median:
            found[key] = fastest, default
    return found


def tile_table(rows: list[Row], about: dict) -> str | None:
    """The tiles that were faster than the default, as ``SWIN_KERNELS_TILES`` takes them; None if there are none."""
    if about.get("capability") is None:  # the device never said what it is
        return None
    found = best(newest(rows), "triton")
    if not found:
        return None
    from swin_kernels.backends.triton import tiles

    table = []
    for (direction, shape_name), (row, _) in found.items():
        shape = next(one for one in SHAPES if str(one) == shape_name)
        architecture = int(about["capability"].replace(".", ""))
        key = tiles.key_for(direction, architecture, 2, shape.channels // shape.heads, shape.grid.tokens)
        words = row.variant.split()[1:]  # as `named` wrote them
        values = {name: int(value) for name, value in zip(words[::2], words[1::2], strict=True)}
        table.append((key, tiles.Tile(**values)))
    return tiles.as_json(table)


def preferences(rows: list[Row], about: dict) -> list[str]:
    """Where Triton's kernels beat the CUDA ones by the margin: lines for `preference.MEASURED`."""
    if about.get("capability") is None:  # the device never said what it is
        return []
    # Only times from one process are compared: a measurement reports ours, then Triton's.
    own: dict[tuple[str, str, str], Row] = {}
    pairs: dict[tuple[str, str], tuple[Row, Row]] = {}
    variant = "CUDA" if preference.MEASURED else "ours"  # ours may be Triton's if something was measured
    for row in rows:
        if row.measure in CORE and row.p50 is not None:
            own[row.measure, row.shape, row.variant] = row
            if row.variant == "Triton" and (mine := own.get((row.measure, row.shape, variant))):
                pairs[row.measure, row.shape] = mine, row
    shapes = {str(shape): shape for shape in (*STAGES, *OTHERS)}
    lines = []
    for (measure, name), (mine, theirs) in pairs.items():
        if not is_faster(theirs, mine):
            continue
        shape = shapes[name]
        major, minor = map(int, about["capability"].split("."))
        line = preference.Measured(
            capability=(major, minor),
            backward=measure.endswith("backward"),
            dtype_bytes=2,
            head_dim=shape.channels // shape.heads,
            tokens=(shape.grid.tokens, shape.grid.tokens),
            backend="triton",
            ours_ms=round(mine.median, 4),
            theirs_ms=round(theirs.median, 4),
            source=f"{name}, {about['device']}, commit {about['commit']}",
        )
        lines.append(f"{line},\n")
    return lines
