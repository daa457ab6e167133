"""Modules that take seconds to import, imported on first use: a command's options and help should not wait for them.

Blocks under ``typing.TYPE_CHECKING`` would not do: the parser of options executes them to resolve types. Those under
`MYPY`, which only mypy takes for true, tell the type checker what a `Module` stands for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

MYPY = False


class Module:
    """Stands for a module, which is imported when one of its attributes is accessed."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        # Code that inspects every name in a namespace, as a parser does, does not use this module.
        if attribute.startswith("_"):
            raise AttributeError(f"{self._name} is not imported yet; it has no {attribute}")
        return getattr(importlib.import_module(self._name), attribute)


def load(*modules: Module | ModuleType) -> None:
    """Import what `modules` stand for, now."""
    for module in modules:
        if isinstance(module, Module):
            importlib.import_module(module._name)


def names(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """The `__getattr__` of `package`, by which each name in `homes` is taken from the module named there."""

    def attribute(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return attribute
