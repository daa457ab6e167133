"""Plain PyTorch: the definition every other backend is measured against. Runs everywhere."""

from __future__ import annotations

from typing import ClassVar

from .. import Call, Package, register


class Reference(Package):
    summary = ("everywhere", "plain PyTorch, the definition")
    ranks: ClassVar[dict[str, int]] = {}

    def declines(self, call: Call) -> str | None:
        return None


register(Reference(__name__))
