"""Resuming a run: from which checkpoint, and whether that belongs to the same configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import checkpoints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CHECKPOINTS = "checkpoints"
FREE = frozenset(
    {"out", "resume", "device", "optimization.parallel", "validation.windows"}
    | {f"schedule.{name}" for name in ("steps", "epochs", "validate_every", "patience", "checkpoint_every", "keep")}
    | {f"data.{name}" for name in ("root", "trusted", "largest", "cache_folder", "workers", "prefetch")}
)
"""Options that may differ when a run continues: they change where and for how long it trains, not what it computes."""
BY_CONTENT = frozenset(f"data.{name}" for name in ("datalist", "sections", "fold", "folds", "split_seed"))
"""Options that may differ as long as the cases are the same ones."""
CACHE = frozenset(f"data.{name}" for name in ("cache", "smart_cases", "smart_replaced"))
"""Options that may differ unless the cache is smart, which is the only one that affects what is drawn."""
OF_A_RANK = frozenset({"device"} | {f"data.{n}" for n in ("datalist", "root", "trusted", "cache_folder", "workers")})
"""Options that may differ between the ranks of a job: where things are on their machines."""
NEEDED = ("config", "provenance", "model", "progress", "training")
"""What a checkpoint must hold for a run to continue from it."""
_ABSENT = "not set"


class Found(NamedTuple):
    """A checkpoint to continue from.

    Attributes:
        path: where it is.
        content: what it holds.
        damaged: why newer ones were passed over.
    """

    path: Path
    content: dict[str, Any]
    damaged: list[str]


def find(
    out: Path,
    kind: str,
    config: Mapping[str, Any],
    *,
    fresh: bool,
    data: Mapping[str, Mapping[str, str]] | None = None,
    initial: str | None = None,
) -> Found | None:
    """The newest whole checkpoint in the folder `out` of a run; None if there is none.

    Newer ones, which are damaged, are renamed to end in ".damaged": they must not count among those that are kept.

    Args:
        kind: the kind that the checkpoint must have: "train" or "pretrain".
        config: the options of this run, as `plain` gives them.
        fresh: whether this run must start from nothing.
        data: the cases of this run by content, as `datasets.identify` gives them; None where there are none.
        initial: digest of the weights to start from; None where there are none.

    Raises:
        ValueError: the checkpoint is of another kind, configuration or data, or there is one and `fresh`.
        Damaged: there are checkpoints, none of which is whole.
    """
    if fresh and checkpoints.series(out / CHECKPOINTS):
        raise ValueError(f"resume is 'never' and {out} holds checkpoints; accepted is another out, or resume: auto")
    found = checkpoints.newest(out / CHECKPOINTS, lambda content: _lacks(content, kind))
    if found is None:
        return None
    path, content, damaged = found
    if content.get("kind") != kind:
        raise ValueError(f"out: {path} is a checkpoint of {content.get('kind')!r}; accepted is one of {kind!r}")
    cases = content.get("data")  # checkpoints of earlier versions lack it
    free = FREE | (BY_CONTENT if cases and data else frozenset())
    if initial is not None and initial == (content["provenance"].get("initial") or {}).get("digest"):
        free |= {"initial"}
    if "precision" in content.get("training", {}):
        free |= {"optimization.precision"}  # auto stands for one; the loop compares the one it chose
    changed = differences(content["config"], config, free)
    if cases and data:
        changed += other_cases(cases, data)
    if changed:
        raise ValueError(
            f"out: {path} was made with other options: {'; '.join(changed)}; continue with the same ones, or choose "
            "another out"
        )
    for error in damaged:
        error.path.rename(error.path.with_name(f"{error.path.name}.damaged"))
    return Found(path, content, [str(error) for error in damaged])


def _lacks(content: Mapping[str, Any], kind: str) -> str:
    """What a checkpoint of this kind lacks for a run to continue from it."""
    lacking = [name for name in NEEDED if name not in content] if content.get("kind") == kind else []
    return f"has no {', '.join(lacking)}: weights alone are for prediction, or for initial" if lacking else ""


def differences(
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    free: Set[str] = FREE,
    says: str = "{name} was {then} and is {now}",
) -> list[str]:
    """The differences of two configurations, apart from `free` options, each in the form `says`."""
    before, after = _flat(then), _flat(now)
    if "smart" not in (before.get("data.cache"), after.get("data.cache")):
        free = free | CACHE
    return [
        says.format(name=name, then=before.get(name, _ABSENT), now=after.get(name, _ABSENT))
        for name in before | after
        if name not in free and before.get(name, _ABSENT) != after.get(name, _ABSENT)
    ]


def other_cases(then: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The differences of two data sets, given as `datasets.identify` returns them."""
    before, after = (
        {case: (part, digest) for part, cases in data.items() for case, digest in cases.items()} for data in (then, now)
    )
    common = before.keys() & after.keys()
    moved = {case: before[case][0] for case in common if before[case][0] != after[case][0]}
    groups = {
        "are gone from the data": before.keys() - after.keys(),
        "are new in the data": after.keys() - before.keys(),
        "were trained on and are validated on": {case for case, part in moved.items() if part == "training"},
        "were validated on and are trained on": {case for case, part in moved.items() if part == "validation"},
        "have other files": {case for case in common if before[case][1] != after[case][1]},
    }
    return [f"cases {_few(sorted(cases))} {says}" for says, cases in groups.items() if cases]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def plain(options: DataclassInstance) -> dict[str, Any]:
    """A dataclass of options as nested dictionaries of plain values; paths are text, tuples lists."""
    return _plain(asdict(options))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if key == "labels.classes":
            # Their order is that of the network's channels, in which dictionaries that differ are equal.
            flat[key] = ", ".join(f"{name} {values}" for name, values in value.items())
        else:
            flat |= _flat(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat
