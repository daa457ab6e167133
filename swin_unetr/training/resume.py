"""Going on where a run was: which checkpoint, and whether it belongs to the same configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from .. import checkpoints

CHECKPOINTS = "checkpoints"
FREE = frozenset(
    {"out", "resume", "device", "schedule.checkpoint_every", "schedule.keep"}
    | {f"data.{name}" for name in ("root", "trusted", "largest", "cache_folder", "workers", "prefetch")}
)
"""Options that may differ when a run goes on: none of them changes what is computed."""
NEEDED = ("config", "provenance", "model", "progress", "training")
"""What a checkpoint must hold for a run to go on from it."""
_ABSENT = "not set"


class Found(NamedTuple):
    """A checkpoint to go on from.

    Attributes:
        path: where it is.
        content: what it holds.
        damaged: why newer ones were passed over.
    """

    path: Path
    content: dict[str, Any]
    damaged: list[str]


def find(out: Path, kind: str, config: Mapping[str, Any], *, fresh: bool) -> Found | None:
    """The newest whole checkpoint in the folder `out` of a run; None if there is none.

    Newer ones, which are damaged, get the ending ".damaged": they must not count among those that stay.

    Args:
        kind: what the checkpoint has to be of: "train" or "pretrain".
        config: the options of this run, as `plain` gives them.
        fresh: whether this run must not go on from anything.

    Raises:
        ValueError: the checkpoint is of another kind or configuration, or there is one and `fresh`.
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
    if changed := differences(content["config"], config):
        raise ValueError(
            f"out: {path} was made with other options: {'; '.join(changed)}; go on with the same ones, or choose "
            "another out"
        )
    for error in damaged:
        error.path.rename(error.path.with_name(f"{error.path.name}.damaged"))
    return Found(path, content, [str(error) for error in damaged])


def _lacks(content: Mapping[str, Any], kind: str) -> str:
    """What a checkpoint of this kind does not have for a run to go on from it."""
    lacking = [name for name in NEEDED if name not in content] if content.get("kind") == kind else []
    return f"has no {', '.join(lacking)}: weights alone are for prediction, or for initial" if lacking else ""


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of two configurations differs, `FREE` options aside: ``name was this and is that``."""
    before, after = _flat(then), _flat(now)
    names = [name for name in before | after if name not in FREE]
    return [
        f"{name} was {before.get(name, _ABSENT)} and is {after.get(name, _ABSENT)}"
        for name in names
        if before.get(name, _ABSENT) != after.get(name, _ABSENT)
    ]


def plain(options: object) -> dict[str, Any]:
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
    flat = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
